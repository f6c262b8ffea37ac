"""Growing pictures: what is shown, at which cost, measured at the full side, and gone on with bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from few import few
from tiny import CLASSES, ROWS, Memory, pictures, recipe, same, train, vit
from torch import Tensor, nn

from lotus.config import Augment, Data, Patches
from lotus.data import beton
from lotus.data.loader import open_loader
from lotus.data.sample_plan import SamplePlan
from lotus.data.source import Source
from lotus.data.views import Look
from lotus.training import growing
from lotus.training.fewer import FewerPatches
from lotus.training.growing import GrowingPictures
from lotus.vit import cost, sides
from lotus.vit.tokens import Tokens
from selection.errors import Refused

STEPS = [(0, 8, 0.3), (0.33, 12, 0.7), (0.66, 16, 1.0)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pictures as a .beton."""
    images, labels = pictures()
    drawn = (images * 40 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    source = Source(labels.numpy(), tuple("abc"), lambda i: drawn[i], str, "pictures")
    file = tmp_path_factory.mktemp("stored") / "x.beton"
    list(beton.prepare(source, file, Data(write="raw", max_side=0)))
    return file


def test_the_side_follows_the_epoch_alone() -> None:
    assert [growing.at(STEPS, epoch, 3) for epoch in range(3)] == STEPS
    assert [growing.at([(0.5, 16)], epoch, 4) for epoch in range(4)] == [None, None, (0.5, 16), (0.5, 16)]
    assert growing.at([(0, 8), (0.15, 12)], 3, 20) == (0.15, 12), "3 of 20 are 0.15, however it is rounded"


@pytest.mark.parametrize("kind", few(["torch", "ffcv"], ["torch"]))
def test_real_loaders_are_told_side_and_strength(
    tmp_path: Path, stored: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "ffcv":
        pytest.importorskip("ffcv")
    plan = SamplePlan(np.arange(ROWS), seed=5, batch_size=8)
    told: list[Any] = []
    augment = Augment.model_validate({"crop": "pad", "pad": 2, "flip": True, "auto": "trivial"})
    look = Look(size=16, augment=augment, mean=(0.5,) * 3, std=(0.25,) * 3, seed=5)
    with open_loader(stored, plan, look, kind=kind, workers=2) as loader:
        whole = loader.epoch

        def epoch(number: int, skip: int = 0, **view: Any) -> Any:
            told.append((view, next(iter(whole(number, skip, **view))).images.shape[-1]))
            return whole(number, skip, **view)

        monkeypatch.setattr(loader, "epoch", epoch)
        train(tmp_path, recipe(epochs=3), model=vit(patch=4), plan=plan, loader=loader, guests=[GrowingPictures(STEPS)])
    assert told == [({"side": side, "strength": strength}, side) for _, side, strength in STEPS]


def test_it_is_measured_at_the_full_side_and_let_go(tmp_path: Path) -> None:
    seen: list[tuple[bool, int]] = []
    model: Any = vit(patch=4)
    model.patch_embed.register_forward_pre_hook(
        lambda module, inputs: seen.append((model.training, inputs[0].shape[-1]))
    )
    train(tmp_path, recipe(epochs=3), model=model, guests=[GrowingPictures([step[:2] for step in STEPS])])
    assert {side for training, side in seen if not training} == {16}
    assert sorted({side for training, side in seen if training}) == [8, 12, 16]
    embed = model.patch_embed
    assert (model.dynamic_img_size, embed.strict_img_size, embed.flatten) == (False, True, True)
    with pytest.raises(AssertionError):
        model(torch.zeros(1, 3, 8, 8))


def test_cost_is_counted_by_side(tmp_path: Path) -> None:
    """Against models that were made for these sides."""

    def made(side: int) -> nn.Module:
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=side, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES
        )

    done = train(tmp_path, recipe(epochs=3), model=vit(patch=4), guests=[GrowingPictures([s[:2] for s in STEPS])])
    assert done.fitted.macs == ROWS * sum(cost.count(made(side)).macs for _, side, _ in STEPS)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_trains_the_same(tmp_path: Path, zero: int) -> None:
    def run(stage: int) -> dict[str, Tensor]:
        settings = recipe(epochs=2, zero=stage, clip=0)
        steps = [(0, 8), (0.5, 16)]
        return train(tmp_path / str(stage), settings, model=vit(patch=4), guests=[GrowingPictures(steps)]).fitted.state

    for one, other in zip(run(0).values(), run(zero).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}),
        ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
    ],
    ids=str,
)
def test_another_side_is_read_as_by_a_model_whose_positions_were_resampled(name: str, more: dict[str, Any]) -> None:
    """By hand: a model of that side, with positions interpolated, those of class token and registers left alone."""
    small = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES, **more}
    torch.manual_seed(0)
    model: Any = timm.create_model(name, img_size=16, **small).eval()
    other: Any = timm.create_model(name, img_size=8, **small).eval()
    state = model.state_dict()
    prefix = model.pos_embed.shape[1] - 16
    grid = state["pos_embed"][:, prefix:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    less = nn.functional.interpolate(grid, size=(2, 2), mode="bicubic", antialias=True)
    whole = torch.cat([state["pos_embed"][:, :prefix], less.flatten(2).transpose(1, 2)], 1)
    other.load_state_dict({**state, "pos_embed": whole})
    images, full = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 16, 16)
    before = model(full)
    assert sides.why_not(model) == ""
    flexible = sides.AnySide(model)
    torch.testing.assert_close(model(images), other(images))
    assert torch.equal(model(full), before), "nothing changes at its own side"
    assert cost.outline(model, 8).cost().macs == cost.count(other).macs
    flexible.remove()
    with pytest.raises(AssertionError):
        model(images)


def test_positions_learn_through_the_resampling() -> None:
    model: Any = vit(patch=4)
    sides.AnySide(model)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert bool((model.pos_embed.grad.abs().sum((0, 2)) > 0).all()), "each position gets its share"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer: its windows"),
        ("beit_base_patch16_224", "Beit: its tables"),
        ("eva02_tiny_patch14_224", "Eva: its rotary positions"),
        ("resnet18", "ResNet"),
    ],
)
def test_who_cannot_is_refused_by_name(name: str, says: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(Refused, match=rf"^train\.sides: {says}.*Leave train\.sides out"):
        sides.check(model, 28, place="train.sides")


def test_rotary_positions_of_any_side_are_read() -> None:
    small = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": CLASSES}
    model = timm.create_model("eva02_tiny_patch14_224", img_size=16, dynamic_img_size=True, **small)
    sides.check(model, 8, place="train.sides")
    sides.AnySide(model).remove()
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, CLASSES)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^train\.sides: 10 pixels .*4 x 4.*Take 8"):
        train(tmp_path, recipe(), model=vit(patch=4), guests=[GrowingPictures([(0, 10)])])
    assert not (tmp_path / "checkpoints").exists()


def test_patches_that_are_counted_at_one_side_are_refused(tmp_path: Path) -> None:
    model = vit(patch=4)
    with Tokens(model, Patches(mode="dropout", keep=0.5)) as tokens, pytest.raises(Refused, match="growing pictures"):
        train(tmp_path, recipe(), model=model, guests=[FewerPatches(tokens), GrowingPictures([(0, 8)])])


def test_without_steps_before_the_first_it_is_the_own_side(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", recipe(epochs=1), model=vit(patch=4)).fitted
    late = train(tmp_path / "late", recipe(epochs=1), model=vit(patch=4), guests=[GrowingPictures([(0.9, 8)])]).fitted
    assert same(plain.state, late.state)
    assert late.macs == ROWS * cost.count(vit(patch=4)).macs


def test_memory_is_a_loader_of_any_side() -> None:
    loader = Memory(SamplePlan(np.arange(ROWS), seed=5, batch_size=8))
    assert next(iter(loader.epoch(0, side=8))).images.shape == (8, 3, 8, 8)
