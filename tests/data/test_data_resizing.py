"""How evaluation looks: which part of an image, resized how; Pillow is the oracle, and both loaders agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lotus.config import Augment
from lotus.data import torch_loader, unpacked
from lotus.data.format import Beton
from lotus.data.loader import open_loader
from lotus.data.sample_plan import SamplePlan
from lotus.data.source import Source
from lotus.data.views import CENTER, Look, center

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture(params=["ffcv", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "ffcv":
        pytest.importorskip("ffcv")
    return str(request.param)


def seen(file: Path, kind: str, rows: int = 24, **how: Any) -> np.ndarray:
    """(N, S, S, 3) gray levels, as a loader gives them."""
    look = Look(**{"size": 12, "mean": (0.0,) * 3, "std": (1.0,) * 3, **how})
    plan = SamplePlan.evaluation(np.arange(rows), batch_size=8)
    with open_loader(file, plan, look, kind=kind, workers=2) as loader:
        images = torch.cat([batch.images for batch in loader.epoch(0)])
    return (255 * images).permute(0, 2, 3, 1).numpy()


def by_pillow(pixels: np.ndarray, size: int, how: str, crop: float) -> np.ndarray:
    high, wide = pixels.shape[:2]
    side = min(high, wide, max(size, round(crop * min(high, wide))))
    top, left = (high - side) // 2, (wide - side) // 2
    part = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    return np.asarray(part if side == size else part.resize((size, size), PILLOW[how]))


@pytest.mark.parametrize("how", PILLOW)
@pytest.mark.parametrize(("size", "crop"), [(12, CENTER), (9, 1.0), (17, 0.9), (40, 0.5)])
def test_an_image_is_seen_as_pillow_resizes_its_middle(
    stored: dict[str, Path], kind: str, how: str, size: int, crop: float
) -> None:
    for name in ("mixed", "jpeg"):
        beton = Beton(stored[name])
        found = seen(stored[name], kind, size=size, crop=crop, interpolation=how)
        for row, image in enumerate(found):
            wanted = by_pillow(beton.image(row), size, how, crop)
            # A sum near a half is rounded either way, twice; and two decoders of JPEG differ.
            assert np.abs(image - wanted).max() <= (2.01 if name == "mixed" else 8), (name, row)


def test_both_loaders_see_the_same(stored: dict[str, Path]) -> None:
    pytest.importorskip("ffcv")
    for how in ("area", *PILLOW):
        one, other = (seen(stored["mixed"], kind, size=17, crop=0.8, interpolation=how) for kind in ("ffcv", "torch"))
        assert np.abs(one - other).max() <= 1.01, how


def test_an_image_of_the_models_side_is_untouched(stored: dict[str, Path], kind: str) -> None:
    beton = Beton(stored["square"])
    side = int(beton.heights[0])
    for how in PILLOW:
        found = seen(stored["square"], kind, rows=3, size=side, crop=0.5, interpolation=how)
        assert np.array_equal(found.round(), np.stack([beton.image(row) for row in range(3)]))


def test_random_crops_go_by_area_whatever_evaluation_does(stored: dict[str, Path], kind: str) -> None:
    augment = Augment(crop="resized")
    one, other = (seen(stored["mixed"], kind, augment=augment, interpolation=how) for how in ("area", "bicubic"))
    assert np.array_equal(one, other)
    plain = [seen(stored["mixed"], kind, augment=Augment(), interpolation=how) for how in ("area", "bicubic")]
    assert not np.array_equal(*plain), "what is not cropped at random is the view of evaluation"


@pytest.mark.parametrize("crop", [0.5, CENTER, 0.9, 1.0])
def test_the_middle_is_as_large_as_is_asked(crop: float) -> None:
    high, wide = np.array([256, 300, 100, 224]), np.array([256, 400, 300, 900])
    boxes = center(high, wide, 224, crop)
    for (top, left, tall, width), tall_image, wide_image in zip(boxes.tolist(), high.tolist(), wide.tolist()):
        shorter = min(tall_image, wide_image)
        assert tall == width == min(shorter, max(224, round(crop * shorter)))
        assert (top, left) == ((tall_image - tall) // 2, (wide_image - width) // 2)
    assert np.array_equal(center(high, wide, 224), center(high, wide, 224, CENTER))


def test_weights_of_a_filter_are_a_mean() -> None:
    for cubic in (False, True):
        for length, size in ((256, 224), (100, 224), (7, 3), (1, 5)):
            weights = torch_loader.smooth(length, size, cubic)
            assert weights.shape == (size, length)
            np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
            np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


def test_images_that_lie_unpacked_are_seen_likewise() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 30, 3), dtype=np.uint8)
    source = Source(np.zeros(4, np.int64), ("one",), pixels.__getitem__, str, "x", where="here")
    for how in PILLOW:
        look = Look(size=12, mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.9, interpolation=how)
        ((images, _),) = unpacked.batches(source, np.arange(4), look)
        for image, one in zip((255 * images).permute(0, 2, 3, 1).numpy(), pixels):
            assert np.abs(image - by_pillow(one, 12, how, 0.9)).max() <= 2.01
