"""The loaders with policies, and with another side or strength in each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import few

from lotus.config import Augment
from lotus.data import beton, erasing, policies
from lotus.data.base import Batch, Loader
from lotus.data.loader import open_loader
from lotus.data.sample_plan import SamplePlan
from lotus.data.torch_loader import view
from lotus.data.views import DOWN, FLIP, RIGHT, Look, View, parameters

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.22, 0.2)
WRITTEN: dict[str, dict[str, Any]] = {
    "rand": {"crop": "pad", "pad": 2, "flip": True, "auto": "rand-m9-n2-mstd0.5-inc1", "erase": 0.25},
    "trivial": {"auto": "trivial", "erase": 0.5, "erase_mode": "rand", "erase_count": 2},
    "3a": {"flip": True, "auto": "3a", "color_jitter": 0.3},
    "erasing alone": {"erase": 0.6},
}


@pytest.fixture(params=["ffcv", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "ffcv":
        pytest.importorskip("ffcv")
    return str(request.param)


def open_(
    file: Path,
    kind: str,
    batch: int = 16,
    plan: SamplePlan | None = None,
    *,
    workers: int = 2,
    device: str = "cpu",
    **look: Any,
) -> Loader:
    plan = SamplePlan(np.arange(70), seed=1, batch_size=batch) if plan is None else plan
    seen = Look(**{"size": 12, "mean": MEAN, "std": STD, "seed": 5, **look})
    return open_loader(file, plan, seen, kind=kind, workers=workers, device=device)


def by_row(batches: list[Batch]) -> torch.Tensor:
    rows = torch.cat([batch.index for batch in batches])
    return torch.cat([batch.images for batch in batches])[torch.argsort(rows)]


def gray(images: torch.Tensor) -> torch.Tensor:
    return (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


@pytest.mark.parametrize("name", WRITTEN)
def test_both_loaders_any_batch_any_threads_any_ranks(stored: dict[str, Path], name: str) -> None:
    pytest.importorskip("ffcv")
    augment, seen = Augment.model_validate(WRITTEN[name]), []
    for kind, batch, workers in (("ffcv", 16, 2), ("torch", 16, 1), ("ffcv", 7, 1), ("torch", 64, 3)):
        with open_(stored["square"], kind, batch, augment=augment, workers=workers) as opened:
            seen.append(by_row(list(opened.epoch(3))))
    ranks: list[Batch] = []
    for rank in range(2):
        plan = SamplePlan(np.arange(70), seed=1, batch_size=14, world=2, rank=rank)
        with open_(stored["square"], "torch", plan=plan, augment=augment) as opened:
            ranks += opened.epoch(3)
    for other in (*seen[1:], by_row(ranks)):
        assert torch.equal(seen[0], other)
    with open_(stored["square"], "torch", augment=augment) as opened:
        assert not torch.equal(by_row(list(opened.epoch(4))), seen[0])


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_seen_is_the_table_then_the_changes_then_the_boxes(stored: dict[str, Path], name: str) -> None:
    """Put together here, image by image."""
    augment, rows = Augment.model_validate(WRITTEN[name]), np.arange(70)
    with open_(stored["square"], "torch", augment=augment) as opened:
        found = by_row(list(opened.epoch(2)))
    table = parameters(View(size=12, augment=augment, seed=5), 2, rows, np.full(70, 12), np.full(70, 12))
    fill = np.array([128, 115, 102], np.uint8)
    for row, line in enumerate(table):
        pixels = view(beton.image(stored["square"], row), line, 12, fill)
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
        made = policies.changes(augment, 5, 2, [row], size=12)
        image = policies.change(image, made, fill=fill, size=12).to(torch.float32)
        mean, std = (torch.tensor(values) * 255 for values in (MEAN, STD))
        image = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        erasing.erase(image, erasing.boxes(augment, 5, 2, [row], 12), augment.erase_mode)
        assert torch.equal(image[0], found[row])


def test_bytes_that_travel_give_the_same_images(stored: dict[str, Path], kind: str) -> None:
    augment = Augment.model_validate(WRITTEN["rand"])
    with open_(stored["square"], kind, augment=augment) as opened:
        here = list(opened.epoch(0))
    with open_(stored["square"], kind, augment=augment, device="meta") as opened:
        opened.device = torch.device("cpu")  # type: ignore[attr-defined]
        for one, other in zip(here, opened.epoch(0), strict=True):
            assert torch.equal(one.images, other.images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", WRITTEN)
def test_on_a_gpu(stored: dict[str, Path], kind: str, name: str) -> None:
    augment = Augment.model_validate(WRITTEN[name])
    with (
        open_(stored["square"], kind, augment=augment) as here,
        open_(stored["square"], kind, augment=augment, device="cuda") as there,
    ):
        for one, other in zip(here.epoch(0, side=24), there.epoch(0, side=24), strict=True):
            assert other.images.is_cuda
            assert torch.equal(one.images, other.images.cpu())


# ------------------------------------------------------------------------------------------------------ side, strength


@pytest.mark.parametrize("name", few(["none", *WRITTEN], ("none", "rand")))
@pytest.mark.parametrize("file", ["square", "jpeg"])
def test_another_side_each_epoch(stored: dict[str, Path], kind: str, file: str, name: str) -> None:
    """Smaller, larger than ever, back again: what a loader opened anew gives, in the middle of an epoch too."""
    augment = Augment.model_validate({**WRITTEN.get(name, {}), "crop": "resized"})
    with open_(stored[file], kind, augment=augment, size=16) as opened:
        for epoch, side, skip in ((0, 8, 0), (1, 24, 0), (2, None, 0), (2, 40, 3), (3, 8, 1)):
            batches = list(opened.epoch(epoch, skip, side=side, strength=0.5))
            assert {batch.images.shape[1:] for batch in batches} == {(3, side or 16, side or 16)}
            assert all(batch.images.is_contiguous() for batch in batches)
            with open_(stored[file], kind, augment=augment, size=16, workers=1) as anew:
                for one, other in zip(batches, anew.epoch(epoch, skip, side=side, strength=0.5), strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(one, other))
            with open_(stored[file], kind, augment=augment, size=16) as whole:
                every = list(whole.epoch(epoch, side=side, strength=0.5))
            for one, other in zip(batches, every[skip:], strict=True):
                assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("side", [8, 12, 30])
def test_both_loaders_agree_at_every_side(stored: dict[str, Path], side: int) -> None:
    pytest.importorskip("ffcv")
    augment = Augment(crop="pad", pad=3, flip=True)
    with (
        open_(stored["square"], "ffcv", augment=augment) as one,
        open_(stored["square"], "torch", augment=augment) as other,
    ):
        for a, b in zip(one.epoch(1, side=side), other.epoch(1, side=side), strict=True):
            gap = (gray(a.images) - gray(b.images)).abs().max()
            assert gap < (1e-3 if side == 12 else 1.01), "as everywhere, where it resizes"


def test_a_smaller_side_shows_the_same_view(stored: dict[str, Path]) -> None:
    """Not the middle of it: boxes are those of the model's side, and shifts shrink with the picture."""
    rows, size = np.arange(400), np.full(400, 32)
    for crop in ("none", "pad", "resized"):
        augment = Augment(crop=crop, pad=4, flip=True)  # type: ignore[arg-type]
        asked = View(size=32, augment=augment, seed=1)
        large, small = (parameters(asked, 2, rows, size, size, side) for side in (32, 16))
        assert np.array_equal(large[:, :4], small[:, :4])
        assert np.array_equal(large[:, FLIP], small[:, FLIP])
        for column in (DOWN, RIGHT):
            assert np.abs(small[:, column] - large[:, column] / 2).max() <= 0.75
            assert np.abs(small[:, column]).max() == (2 if crop == "pad" else 0)


def test_strength_zero_leaves_the_pixels(stored: dict[str, Path], kind: str) -> None:
    augment = Augment.model_validate({**WRITTEN["3a"], "erase": 0.5})
    with (
        open_(stored["square"], kind, augment=augment) as opened,
        open_(stored["square"], kind, augment=Augment(flip=True)) as plain,
    ):
        for one, other in zip(opened.epoch(0, strength=0), plain.epoch(0), strict=True):
            assert torch.equal(one.images, other.images)
        strong, weak = by_row(list(opened.epoch(0))), by_row(list(opened.epoch(0, strength=0.3)))
    plainly = (strong - weak).abs().amax((1, 2, 3))
    assert (plainly > 0).any()


@pytest.mark.parametrize(("side", "strength"), [(0, 1.0), (-8, 1.0), (8, 1.5), (8, -0.1), (8, float("nan"))])
def test_sides_and_strengths_that_are_none(stored: dict[str, Path], kind: str, side: int, strength: float) -> None:
    with open_(stored["square"], kind) as opened, pytest.raises(ValueError, match=r"a side of .* and a strength of"):
        opened.epoch(0, side=side, strength=strength)
