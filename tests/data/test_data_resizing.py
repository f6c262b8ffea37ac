"""How evaluation looks: which part of an image, resized how; timm's transform is the oracle, and both loaders agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lotus.config import Augment
from lotus.data import paint, unpacked
from lotus.data.format import Beton
from lotus.data.loader import open_loader
from lotus.data.sample_plan import SamplePlan
from lotus.data.source import Source
from lotus.data.views import CENTER, Look, View, center, parameters

FILTERS = ("bilinear", "bicubic")


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


def by_timm(pixels: np.ndarray, size: int, how: str, crop: float, mode: str = "center") -> np.ndarray:
    own = timm.data.create_transform(
        (3, size, size), interpolation=how, crop_pct=crop, crop_mode=mode, mean=(0,) * 3, std=(1,) * 3
    )
    return (255 * own(Image.fromarray(np.ascontiguousarray(pixels)))).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize(("size", "crop"), [(12, CENTER), (9, 1.0), (17, 0.9), (40, 0.5)])
def test_an_image_is_seen_as_timms_transform_sees_it(
    stored: dict[str, Path], kind: str, how: str, mode: str, size: int, crop: float
) -> None:
    """Larger and smaller than the model's side, of its side, upright and lying."""
    for name in ("mixed", "jpeg"):
        beton = Beton(stored[name])
        found = seen(stored[name], kind, size=size, crop=crop, interpolation=how, crop_mode=mode)
        for row, image in enumerate(found):
            wanted = by_timm(beton.image(row), size, how, crop, mode)
            # A sum near a half is rounded either way, twice; and two decoders of JPEG differ.
            assert np.abs(image - wanted).max() <= (2.01 if name == "mixed" else 8), (name, row)


def test_both_loaders_see_the_same(stored: dict[str, Path]) -> None:
    pytest.importorskip("ffcv")
    for how in ("area", *FILTERS):
        one, other = (seen(stored["mixed"], kind, size=17, crop=0.8, interpolation=how) for kind in ("ffcv", "torch"))
        assert np.abs(one - other).max() <= 1.01, how


def test_an_image_of_the_models_side_is_untouched_by_area_and_where_all_is_looked_at(
    stored: dict[str, Path], kind: str
) -> None:
    beton = Beton(stored["square"])
    side = int(beton.heights[0])
    for how, crop in (("area", 0.5), ("bilinear", 1.0), ("bicubic", 1.0)):
        found = seen(stored["square"], kind, rows=3, size=side, crop=crop, interpolation=how)
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


@pytest.mark.parametrize(("height", "width"), [(100, 37), (24, 40), (17, 17), (5, 9), (1, 1), (300, 11)])
def test_the_box_of_the_table_is_where_timm_looks(height: int, width: int) -> None:
    """What is told of the view to a pixel, by a picture of its own coordinates: scores of patches are cropped by it."""
    for axis, length in enumerate((height, width)):
        ramp = np.broadcast_to(np.expand_dims(np.arange(length) / length, 1 - axis), (height, width))
        gray = np.repeat((255 * ramp).astype(np.uint8)[..., None], 3, axis=2)
        for crop, mode in ((0.875, "center"), (1.0, "center"), (0.9, "squash")):
            view = View(size=16, crop=crop, interpolation="bilinear", crop_mode=mode)
            top, tall = parameters(view, 0, [0], [height], [width])[0, [axis, 2 + axis]] / length * 255
            line = by_timm(gray, 16, "bilinear", crop, mode)[..., 0].mean(1 - axis)
            slack = 2 * 255 / length + 255 / 16 + 3  # a pixel of the box, a pixel of the picture, a gray level or two
            assert abs(line.min() - top) <= slack, (axis, crop, mode)
            assert abs(line.max() - (top + tall)) <= slack, (axis, crop, mode)
            assert top >= 0, "inside of the picture"
            assert top + tall <= 255, "inside of the picture"


def test_weights_of_a_filter_are_a_mean() -> None:
    pytest.importorskip("numba")
    for cubic in (False, True):
        for length, size in ((256, 224), (100, 224), (7, 3), (1, 5)):
            first, weights = paint._taps(length, size, 0, size, cubic)
            assert weights.shape[0] == size
            assert (first >= 0).all()
            np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
            whole = np.zeros((size, length + weights.shape[1]), np.float32)
            for row, start, some in zip(whole, first, weights):
                row[start : start + len(some)] = some
            assert not whole[:, length:].any(), "nothing is read beyond the line"
            np.testing.assert_allclose(whole[:, :length], whole[::-1, :length][:, ::-1], atol=1e-6)


def test_images_that_lie_unpacked_are_seen_likewise() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 30, 3), dtype=np.uint8)
    source = Source(np.zeros(4, np.int64), ("one",), pixels.__getitem__, str, "x", where="here")
    for how in FILTERS:
        look = Look(size=12, mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.9, interpolation=how)
        ((images, _),) = unpacked.batches(source, np.arange(4), look)
        for image, one in zip((255 * images).permute(0, 2, 3, 1).numpy(), pixels):
            assert np.abs(image - by_timm(one, 12, how, 0.9)).max() <= 0.01
