"""Masks through a training, and the soup against the same algorithm written out in numpy."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from ranks import two_ranks
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from tiny import CLASSES, ROWS, Batch, Killed, kill, masked, pictures, recipe, train, vit

from lotus.events import Said, Step
from lotus.papers.soup.cook import Supply, cook, steps, vary
from lotus.papers.soup.recipe import Soup
from lotus.papers.sparse_vit.penalty import AttentionPenalty
from lotus.papers.zeros import masks as unstructured
from lotus.training.objective import Objective
from lotus.training.optim import make_optimizer

TRAINING = Path(__file__).resolve().parents[1] / "training"
LAYOUTS = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]


@pytest.mark.parametrize(("zero", "precision"), few(LAYOUTS, [(1, "bf16"), (3, "fp32")]))
def test_masked_weights_stay_zero_through_a_training(tmp_path: Path, zero: int, precision: str) -> None:
    model = vit()
    masks = unstructured.magnitude(unstructured.listed(model, "sparse_vit"), 0.5)
    unstructured.put(model, masks)
    before = copy.deepcopy(model.state_dict())
    asked = recipe(zero=zero, precision=precision, accumulate=2, weight_decay=0.3, ema=0 if zero == 3 else 0.9)
    with unstructured.held(model, masks):
        done = train(tmp_path, asked, model=model)
    unstructured.check(model, masks)
    for name, mask in masks.items():
        assert (done.fitted.state[name][~mask] == 0).all(), name
        assert not torch.equal(done.fitted.state[name][mask], before[name][mask]), f"{name}: the others learn"
    assert all(not parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.slow
def test_two_ranks_hold_masks_and_penalize_as_one(tmp_path: Path) -> None:
    two_ranks(TRAINING / "tiny.py", tmp_path, "masked", timeout=280)
    alone = masked(tmp_path / "alone", 1).fitted.state
    for zero in (1, 2, 3):
        found = load_file(tmp_path / f"{zero}.safetensors")
        for name, value in alone.items():
            assert torch.equal(found[name] == 0, value == 0), f"ZeRO {zero}: {name}"
            torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3)


def test_every_step_holds_and_a_resumed_training_too(tmp_path: Path) -> None:
    model = vit()
    masks = unstructured.magnitude(unstructured.listed(model), 0.3)
    unstructured.put(model, masks)
    looks = []

    def look(losses: torch.Tensor) -> torch.Tensor:
        looks.append(unstructured.counted(unstructured.zeros(model))[0])
        return losses

    whole = copy.deepcopy(model)
    with unstructured.held(whole, masks):
        straight = train(tmp_path / "whole", recipe(), model=whole)
    with unstructured.held(model, masks), pytest.raises(Killed):
        train(tmp_path / "killed", recipe(), model=model, at={**dict.fromkeys(range(9), look), 9: kill})
    again = vit()
    unstructured.put(again, masks)
    with unstructured.held(again, masks):
        done = train(tmp_path / "killed", recipe(), model=again)
    assert looks == [unstructured.counted(masks)[0]] * 9
    unstructured.check(again, masks)
    assert all(torch.equal(value, straight.fitted.state[name]) for name, value in done.fitted.state.items())


def test_an_attention_penalty_is_in_the_loss_of_the_engine(tmp_path: Path) -> None:
    """Two trainings apart by the penalty alone: entropy is lower where it was penalized, higher under log(1 + a^2)."""
    from lotus.papers.sparse_vit.focus import focus

    found, images = {}, pictures()[0]
    for kind, strength in (("none", 0.0), ("entropy", 3.0), ("log", 300.0)):
        model = vit()
        penalty = None if kind == "none" else AttentionPenalty(model, kind, strength)
        done = train(tmp_path / kind, recipe(), model=model, guests=[] if penalty is None else [penalty])
        found[kind] = focus(model, [(images,)])["all"]["entropy"]
        steps = [event for event in done.events if isinstance(event, Step)]
        assert ("attention" in steps[-1].values) == (penalty is not None)
    assert found["entropy"] < found["none"] < found["log"]


# ------------------------------------------------------------------------------------------------------------- soup


def shown(span: int, part: float, count: int) -> list[Batch]:
    images, labels = pictures()
    draw = np.random.default_rng(span)
    rows = draw.choice(ROWS, round(part * ROWS), replace=False)
    picked = [torch.from_numpy(draw.choice(rows, 8)) for _ in range(count)]
    return [Batch(images[index], labels[index], index) for index in picked]


@contextlib.contextmanager
def batches(span: int, part: float, count: int) -> Iterator[Any]:
    yield iter(shown(span, part, count))


def cooked(model, keep: float, asked, settings: Soup):
    making = cook(
        model, keep, Supply(ROWS, batches), settings, stage="prune", recipe=asked,
        objective=Objective(asked, CLASSES, 0), seed=4,
    )  # fmt: skip
    events = []
    while True:
        try:
            events.append(next(making))
        except StopIteration as stop:
            return stop.value, events


def numpy_top(values: np.ndarray, count: int, inside: np.ndarray) -> np.ndarray:
    order = sorted(np.flatnonzero(inside), key=lambda place: (-abs(values[place]), place))
    mask = np.zeros(len(values), bool)
    mask[order[:count]] = True
    return mask


def numpy_soup(model, keep: float, asked, settings: Soup) -> np.ndarray:
    """The algorithm line by line; only the training of a span is torch's."""
    names = list(unstructured.listed(model))

    def flat(one) -> np.ndarray:
        state = one.state_dict()
        return np.concatenate([state[name].numpy().ravel() for name in names])

    def go(one, optimizer, span: int, part: float, count: int, mask: np.ndarray) -> None:
        one.train()
        held = dict(
            zip(names, np.split(mask, np.cumsum([one.state_dict()[n].numel() for n in names])[:-1]), strict=True)
        )
        for number, batch in enumerate(shown(span, part, count)):
            objective = Objective(asked, CLASSES, 0)
            images, targets = objective.mix(batch.images, batch.labels, epoch=span, step=number)
            optimizer.zero_grad()
            objective.losses(one(images), targets).mean().backward()
            for name, parameter in one.named_parameters():
                if name in held:
                    parameter.grad *= torch.from_numpy(held[name]).view_as(parameter)
            torch.nn.utils.clip_grad_norm_(one.parameters(), asked.clip)
            optimizer.step()
            with torch.no_grad():
                for name, parameter in one.named_parameters():
                    if name in held:
                        parameter *= torch.from_numpy(held[name]).view_as(parameter)

    rng = np.random.default_rng([4, 0x50])
    total = len(flat(model))
    mask, span, optimizer = np.ones(total, bool), 0, make_optimizer(model, asked)
    own = -(-round(settings.train * ROWS * 1000) // (asked.batch_size * 1000))
    for number in range(settings.rounds + 1):
        go(model, optimizer, span, settings.train, own, mask)
        span += 1
        if number == settings.rounds or mask.mean() - keep < 0.05:
            break
        target = max(keep, mask.mean() * (1 - settings.step))
        count = total - round((1 - target) * total)
        votes = numpy_top(flat(model), count, mask)
        for _ in range(settings.copies):
            ahead = copy.deepcopy(model)
            scout = make_optimizer(ahead, asked)
            scout.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            vary(scout, rng, settings.vary)
            go(ahead, scout, span, settings.data, settings.steps, mask)
            span += 1
            votes |= numpy_top(flat(ahead), count, mask)
        mask = votes
        with torch.no_grad():
            for name, part in zip(names, np.split(mask, np.cumsum([model.state_dict()[n].numel() for n in names])[:-1]), strict=True):  # fmt: skip
                parameter = dict(model.named_parameters())[name]
                parameter *= torch.from_numpy(part).view_as(parameter)
    return numpy_top(flat(model), total - round((1 - keep) * total), mask)


@pytest.mark.parametrize(("keep", "step"), [(0.6, 0.25), (0.97, 0.1), (0.5, 0.6)])
def test_the_soup_is_the_algorithm_line_by_line(keep: float, step: float) -> None:
    asked, settings = recipe(lr=5e-3), Soup(step=step, copies=2, steps=3, train=0.3, data=0.5, rounds=4)
    model = vit(width=16)
    oracle = copy.deepcopy(model)
    found, events = cooked(model, keep, asked, settings)
    mask = numpy_soup(oracle, keep, asked, settings)
    assert np.array_equal(np.concatenate([part.numpy().ravel() for part in found.masks.values()]), mask)
    stays, of = unstructured.counted(found.masks)
    assert stays == unstructured.kept_of(keep, of), "the rate is exact"
    unstructured.check(model, found.masks)
    assert [one for one, two in zip(found.left, found.left[1:]) if two > one] == [], "what left does not come back"
    seen = [event for event in events if isinstance(event, Step)]
    assert found.images == 8 * len(seen)
    assert seen[-1].done == len(seen) <= seen[-1].total
    said = [event.text for event in events if isinstance(event, Said)]
    assert len(said) == len(found.left) - 1
    assert (len(said) == 0) == (keep == 0.97), "less than 5 % goes at once, by magnitude"
    assert sum(steps(keep, 8, settings, ROWS)) <= len(seen), "the forecast is the least there can be"


def test_copies_agree_less_the_further_they_look() -> None:
    """A union of masks that differ keeps more than each of them: else there would be nothing to denoise."""
    lefts = []
    for count in (1, 12):
        settings = Soup(step=0.3, copies=3, steps=count, train=0.2, data=0.5, rounds=1)
        lefts.append(cooked(vit(width=16), 0.5, recipe(lr=1e-2), settings)[0].left[0])
    assert 0.7 < lefts[0] < lefts[1] < 1
