"""Every change of the pixels, beside Pillow's, timm's and torchvision's own: not a bit may differ."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from few import few
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment as timm_augment
from torch import Tensor
from torchvision.transforms import InterpolationMode, autoaugment, functional

from lotus.config import Auto
from lotus.data import pixel_ops, policies
from lotus.data.pixel_ops import BICUBIC, BILINEAR, NEAREST
from lotus.data.policies import ACTIONS, act, amounts, operations

FILL = (12, 130, 250)
PILLOW = {NEAREST: Image.Resampling.NEAREST, BILINEAR: Image.Resampling.BILINEAR, BICUBIC: Image.Resampling.BICUBIC}
SIDES = (1, 2, 3, 32, 37)
GEOMETRIC = ACTIONS[ACTIONS.index("rotate") :]


def pictures(side: int) -> list[Image.Image]:
    """Noise, soft pictures, and those without anything to stretch."""
    rng = np.random.default_rng(side)
    soft = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((side, side), 3) for _ in range(4)]
    shape = (side, side, 3)
    others: list[np.ndarray] = [
        rng.integers(0, 256, shape),
        rng.integers(60, 90, shape),
        255 * rng.integers(0, 2, shape),
    ]
    others += [
        np.full(shape, 77),
        np.zeros(shape),
        np.full(shape, 255),
        rng.integers(0, 256, (side, side, 1)) + 0 * others[0],
    ]
    return soft + [Image.fromarray(picture.astype(np.uint8)) for picture in others]


def batch(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def check(ours: Tensor, theirs: Callable[[Image.Image], Image.Image], images: list[Image.Image]) -> None:
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, batch([theirs(image) for image in images]))


@pytest.fixture(params=few(SIDES, (3, 32)))
def side(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def same(images: list[Image.Image], amount: float) -> np.ndarray:
    return np.full(len(images), amount)


# ---------------------------------------------------------------------------------------------------------- Pillow


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.37, 1.0, 1.63, 1.9])
@pytest.mark.parametrize("name", ["brightness", "contrast", "color", "sharpness"])
def test_enhancers(side: int, name: str, factor: float) -> None:
    images = pictures(side)
    theirs = getattr(ImageEnhance, name.capitalize())
    ours = getattr(pixel_ops, name)(batch(images), same(images, factor))
    check(ours, lambda image: theirs(image).enhance(factor), images)


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.5, 1.0, 1.3, 1.99, 2.0, 3.3])
def test_gaussian_blur(side: int, radius: float) -> None:
    images = pictures(side)
    ours = pixel_ops.gaussian_blur(batch(images), same(images, radius))
    check(ours, lambda image: image.filter(ImageFilter.GaussianBlur(radius)), images)


def test_blurs_of_different_width_in_one_batch() -> None:
    images = pictures(32)
    radii = np.linspace(0.1, 4, len(images))
    ours = pixel_ops.gaussian_blur(batch(images), radii)
    for one, image, radius in zip(ours, images, radii):
        check(one[None], lambda image: image.filter(ImageFilter.GaussianBlur(float(radius))), [image])  # noqa: B023


def test_tables(side: int) -> None:
    images = pictures(side)
    seen = batch(images)
    check(pixel_ops.invert(seen), ImageOps.invert, images)
    check(pixel_ops.auto_contrast(seen), ImageOps.autocontrast, images)
    check(pixel_ops.equalize(seen), ImageOps.equalize, images)
    for bits in range(1, 9):
        check(
            pixel_ops.posterize(seen, same(images, bits)), lambda image: ImageOps.posterize(image, bits), images  # noqa: B023
        )  # fmt: skip
    for threshold in (0, 1, 100, 255, 256):
        ours = pixel_ops.solarize(seen, same(images, threshold))
        check(ours, lambda image: ImageOps.solarize(image, threshold), images)  # noqa: B023


@pytest.mark.parametrize("turn", [-0.5, -0.2, -0.003, 0.0, 0.1, 0.31, 0.5])
def test_hue(side: int, turn: float) -> None:
    images = pictures(side)
    ours = pixel_ops.hue(batch(images), same(images, turn))
    check(ours, lambda image: functional.adjust_hue(image, turn), images)


def test_hue_of_every_fourth_color() -> None:
    values = np.stack(np.meshgrid(*[np.arange(0, 256, 4)] * 3), axis=-1).astype(np.uint8).reshape(64, 64, 64, 3)
    images = [Image.fromarray(picture) for picture in values[::8]]
    check(pixel_ops.hue(batch(images), same(images, 0.17)), lambda image: functional.adjust_hue(image, 0.17), images)


@pytest.mark.parametrize("between", list(PILLOW))
@pytest.mark.parametrize("seed", range(3))
def test_any_affine_map(side: int, between: int, seed: int) -> None:
    images = pictures(side)
    rng = np.random.default_rng(seed)
    matrix = np.array([1, 0, 0, 0, 1, 0]) + rng.normal(0, [0.3, 0.3, 3, 0.3, 0.3, 3])
    ours = pixel_ops.warp(batch(images), np.tile(matrix, (len(images), 1)), np.array(FILL), between)
    asked = tuple(float(value) for value in matrix)
    check(
        ours,
        lambda image: image.transform(image.size, Image.Transform.AFFINE, asked, PILLOW[between], fillcolor=FILL),
        images,
    )


# ------------------------------------------------------------------------------------------------------------ timm


def levels() -> Iterator[tuple[float, float]]:
    for level in (0, 1, 3.7, 5, 9, 10):
        yield from ((level, -1), (level, 1))


@pytest.mark.parametrize("between", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("name", list(policies.OPS))
def test_timm_s_operations(side: int, name: str, between: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each magnitude and either sign."""
    images = pictures(side)
    action, _ = amounts(name, 0, 1)
    if between == BICUBIC and action not in GEOMETRIC:
        pytest.skip("does not look between pixels")
    for level, sign in levels():
        monkeypatch.setattr(random, "random", lambda: 0.9 if sign < 0 else 0.1)  # noqa: B023
        theirs = timm_augment.AugmentOp(
            name, prob=1, magnitude=level, hparams={"img_mean": FILL, "interpolation": PILLOW[between]}
        )
        _, amount = amounts(name, level, sign)
        ours = act(action, batch(images), same(images, float(amount)), between=between, fill=np.array(FILL), size=side)
        if action == "posterize" and amount == 0:  # black, until Pillow 12 refused it
            assert not ours.any()
        else:
            check(ours, theirs, images)


@pytest.mark.parametrize("written", ["rand", "rand-inc1", "rand-t3a", "rand-t3aw", "rand-tweights"])
def test_timm_s_sets(written: str) -> None:
    theirs = timm_augment.rand_augment_transform(written, {})
    ours = operations(Auto.model_validate(written))
    assert list(ours) == [op.name for op in theirs.ops]
    if theirs.choice_weights is not None:
        assert np.allclose(np.array(list(ours.values())) / sum(ours.values()), theirs.choice_weights)


# ----------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("bin_", few(range(31), (0, 1, 13, 20, 30)))
def test_torchvision_s_trivial_augment(bin_: int) -> None:
    """Its magnitudes, to a float32's precision; and with them, pixel by pixel."""
    images, side = pictures(64), 64
    space = autoaugment.TrivialAugmentWide()._augmentation_space(31)
    assert len(space) == len(policies.TRIVIAL)
    for name, (values, signed) in space.items():
        magnitude = float(values[bin_]) if values.ndim else 0.0
        action = "nothing" if name == "Identity" else "".join(f"_{c.lower()}" if c.isupper() else c for c in name)[1:]
        of = policies.TRIVIAL[action]
        for sign in (-1, 1) if signed else (1,):
            amount = 0.0 if of is None else float(of(np.array(bin_ / 30), np.array(sign)))
            asked = sign * magnitude + (action in ("brightness", "color", "contrast", "sharpness"))
            if action.startswith("translate"):
                assert amount == int(round(asked, 4)), "of 31 magnitudes in float32, the 16th is 15.999999"
                amount = asked = int(asked)
            asked = math.ceil(asked) if action == "solarize" else asked  # below 246.5 is below 247
            assert amount == pytest.approx(asked, abs=1e-5)
            amount = asked
            told = -amount if action.startswith("translate") else amount  # the picture moves there, our eye here
            told = told / side if action.startswith("translate") else told
            seen = batch(images)
            ours = seen if action == "nothing" else act(
                action, seen, same(images, told), between=NEAREST, fill=np.array(FILL), size=side
            )  # fmt: skip
            theirs = batch([
                autoaugment._apply_op(image, name, sign * magnitude, InterpolationMode.NEAREST, list(FILL)) for image in images
            ])  # fmt: skip
            assert torch.equal(ours, theirs), (name, sign)


# ------------------------------------------------------------------------------------------------------- every one


@pytest.mark.parametrize("action", ACTIONS[1:])
def test_an_image_comes_out_the_same_in_whatever_company(action: str) -> None:
    images = batch(pictures(32))
    amount = {"hue": 0.2, "posterize": 3, "solarize": 99, "solarize_add": 40, "gaussian_blur": 1.2}.get(action, 0.3)
    some = np.linspace(amount, amount / 2, len(images)) if amount < 3 else np.full(len(images), amount)
    whole = act(action, images, some, between=BICUBIC, fill=np.array(FILL), size=32)
    assert not torch.equal(whole, images)
    for start in range(len(images)):
        rows = slice(start, start + 1)
        alone = act(action, images[rows], some[rows], between=BICUBIC, fill=np.array(FILL), size=32)
        assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("between", list(PILLOW))
@pytest.mark.parametrize("action", ACTIONS[1:])
def test_nothing_waits_for_the_device(action: str, between: int) -> None:
    """On a device without values, whatever asks for one fails."""
    nowhere = torch.empty((5, 3, 8, 8), dtype=torch.uint8, device="meta")
    found = act(action, nowhere, np.full(5, 0.5), between=between, fill=np.array(FILL), size=8)
    assert found.shape == nowhere.shape
    assert found.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("between", list(PILLOW))
@pytest.mark.parametrize("action", ACTIONS[1:])
def test_a_gpu_gives_the_same_bits(action: str, between: int) -> None:
    images = batch(pictures(37))
    amount = np.linspace(0.1, 0.5, len(images))
    here = act(action, images, amount, between=between, fill=np.array(FILL), size=37)
    there = act(action, images.cuda(), amount, between=between, fill=np.array(FILL), size=37)
    assert torch.equal(here, there.cpu())
