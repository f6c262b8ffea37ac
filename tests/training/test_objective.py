"""Mixing and losses against timm's, given the same lambda and box."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import mixup as timms

from lotus.config import Recipe
from lotus.training import objective
from lotus.training.distributed import World
from lotus.training.objective import Objective

IMAGES = torch.randn(6, 3, 10, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 3, 1])
WHERE = {"epoch": 3, "step": 7}


def test_with_nothing_on_images_pass_and_the_loss_is_cross_entropy():
    plain = Objective(Recipe(smoothing=0), 4, seed=0)
    images, targets = plain.mix(IMAGES, LABELS, **WHERE)
    assert images is IMAGES
    assert torch.equal(targets, F.one_hot(LABELS, 4).float())
    logits = torch.randn(6, 4)
    losses = plain.losses(logits.bfloat16(), targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.bfloat16().float(), LABELS, reduction="none"))


def test_smoothing_is_torchs():
    smooth = Objective(Recipe(smoothing=0.1), 4, seed=0)
    _, targets = smooth.mix(IMAGES, LABELS, **WHERE)
    logits = torch.randn(6, 4)
    torch.testing.assert_close(
        smooth.losses(logits, targets), F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1)
    )


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_timms_given_the_same_draws(alphas, monkeypatch):
    """timm's own Mixup, its global generator's draws replaced by those of ours."""
    for seed in range(8):
        ours = Objective(Recipe(smoothing=0.1, **alphas), 4, seed=seed)
        given = IMAGES.clone()
        images, targets = ours.mix(given, LABELS, **WHERE)
        assert torch.equal(given, IMAGES)

        rng = np.random.default_rng([seed, 3, 7, 0, 0x313])
        both = len(alphas) == 2
        # timm asks first whether to mix at all (prob=1), which ours does not draw
        draws = iter([0.0, rng.random()] if both else [0.0])
        monkeypatch.setattr(np.random, "rand", lambda *_, draws=draws: next(draws))
        monkeypatch.setattr(np.random, "beta", lambda a, b, size=None, rng=rng: rng.beta(a, b))
        monkeypatch.setattr(np.random, "randint", lambda low, high, size=None, rng=rng: rng.integers(low, high))
        theirs = timms.Mixup(
            mixup_alpha=alphas.get("mixup", 0), cutmix_alpha=alphas.get("cutmix", 0), label_smoothing=0.1, num_classes=4
        )
        expected_images, expected_targets = theirs(IMAGES.clone(), LABELS)
        torch.testing.assert_close(images, expected_images)
        torch.testing.assert_close(targets, expected_targets)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_mixing_follows_from_its_key_alone():
    both = Objective(Recipe(mixup=1, cutmix=1), 4, seed=5)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    state = torch.random.get_rng_state()
    first = both.mix(IMAGES, LABELS, epoch=1, step=2)
    torch.rand(3)
    again = both.mix(IMAGES, LABELS, epoch=1, step=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.random.set_rng_state(state)
    assert np.random.rand() == np.random.RandomState(0).rand()  # noqa: NPY002
    for other in ({"epoch": 2, "step": 2}, {"epoch": 1, "step": 3}):
        assert not torch.equal(first[1], both.mix(IMAGES, LABELS, **other)[1])


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_everyone_is_mixed_with_one_other_and_one_alone_with_none(size, alphas):
    """Each image holds its own number, and each label is of its own class: what it met is read off both."""
    images = torch.arange(size).float().view(size, 1, 1, 1).expand(size, 3, 8, 8).contiguous()
    for step in range(6):
        mixed, targets = Objective(Recipe(smoothing=0, **alphas), size, seed=1).mix(
            images, torch.arange(size), epoch=0, step=step
        )
        own = targets.diagonal()
        others = [set(row.nonzero().flatten().tolist()) - {number} for number, row in enumerate(targets)]
        torch.testing.assert_close(targets.sum(1), torch.ones(size))
        if size == 1:
            assert torch.equal(mixed, images)
            assert own.item() == 1
            continue
        if own.min() == 1:  # a box that lies outside, or a lambda of one
            continue
        assert all(len(met) == 1 for met in others)
        assert sorted(next(iter(met)) for met in others) == list(range(size)), "each is met by one"
        expected = torch.stack([own[i] * i + (1 - own[i]) * next(iter(others[i])) for i in range(size)])
        torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)


def test_the_box_is_timms(monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(200):
        share, row, column = rng.random(), int(rng.integers(9)), int(rng.integers(13))
        draws = iter([row, column])
        monkeypatch.setattr(np.random, "randint", lambda *_, draws=draws, **__: next(draws))
        assert objective.cut_box(9, 13, share, row, column) == timms.rand_bbox((3, 9, 13), share)


@pytest.mark.parametrize(("size", "ranks"), [(8, 2), (9, 3), (6, 3), (2, 2), (15, 5)])
@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_ranks_mix_among_all_of_their_images(alphas, size, ranks, monkeypatch):
    """Each rank's part is that part of what one process mixes. What is passed is looked up here, in all of the batch."""
    images, labels = torch.randn(size, 3, 8, 8), torch.arange(size)
    ours = Objective(Recipe(smoothing=0.1, **alphas), size, seed=2)
    for step in range(4):
        whole = ours.mix(images, labels, epoch=0, step=step)
        for rank, mine in enumerate(torch.arange(size).chunk(ranks)):

            def passed(world, tensor, to, of, mine=mine):
                assert 0 <= to < ranks
                assert 0 <= of < ranks
                parts = labels.chunk(ranks) if tensor.dim() == 1 else images.chunk(ranks)
                own, other = parts[world.rank], parts[of]
                if tensor.dim() == 4 and tensor.shape[-2:] != (8, 8):  # a box: found by where it lies
                    where = [(t, s) for t in range(9 - tensor.shape[2]) for s in range(9 - tensor.shape[3])]
                    t, s = next(
                        (t, s) for t, s in where
                        if torch.equal(own[-len(tensor):, :, t:t + tensor.shape[2], s:s + tensor.shape[3]], tensor)
                    )  # fmt: skip
                    other = other[..., t : t + tensor.shape[2], s : s + tensor.shape[3]]
                return other[-len(tensor) :]

            monkeypatch.setattr(World, "passed", passed)
            found = ours.mix(images[mine], labels[mine], epoch=0, step=step, world=World(rank, ranks))
            monkeypatch.undo()
            torch.testing.assert_close(found[0], whole[0][mine])
            torch.testing.assert_close(found[1], whole[1][mine])
