"""Which changes are made to the pixels of which image: RandAugment, TrivialAugment, 3-Augment, color jitter.

As in :mod:`lotus.data.views`, all of it is a pure function of (seed, epoch, image index), drawn on the host; it is then
carried out on the batch, wherever that lies, action by action over all images that share one.

Names and strengths are timm's (``timm.data.auto_augment``) and, of TrivialAugment, torchvision's. Papers: RandAugment,
arXiv 1909.13719; TrivialAugment, 2103.10158; 3-Augment in DeiT III, 2204.07118.

Letters: n images, L changes one after another, S the side of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lotus.config import Augment, Auto
from lotus.data import pixel_ops
from lotus.data.pixel_ops import BICUBIC, BILINEAR, NEAREST
from lotus.data.views import uniform

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ACTIONS = (
    "nothing", "auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "gaussian_blur", "hue", "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
"""What can be done; the geometric ones last. Translations are in parts of the side, rotations in degrees."""

PIECE = 1 << 18
"""Values that a CPU works on at a time, so that what lies between two steps stays in its cache."""

_LAYER, _WEIGHTED, _JITTER = 1024, 2048, 4096  # streams of the hash, apart from those of augment.py; a layer takes 16


class Changes(NamedTuple):
    """What is done to n images, from left to right."""

    action: npt.NDArray[np.int64]
    """(n, L): which of ``ACTIONS``."""
    amount: Floats
    """(n, L): by how much, in what the action counts in."""
    between: npt.NDArray[np.int64]
    """(n, L): how a geometric action reads between pixels."""


Amount = Callable[[Floats, Floats], Floats]
"""(fraction of the full magnitude, sign) -> amount."""


def _increasing(part: Floats, sign: Floats) -> Floats:
    return np.maximum(0.1, 1.0 + sign * (part * 0.9))


def _enhanced(part: Floats, sign: Floats) -> Floats:
    return part * 1.8 + 0.1


def _solarized(part: Floats, sign: Floats) -> Floats:
    return np.minimum(256, np.trunc(part * 256))


OPS: dict[str, tuple[str, Amount]] = {
    "AutoContrast": ("auto_contrast", lambda part, sign: part),
    "Equalize": ("equalize", lambda part, sign: part),
    "Invert": ("invert", lambda part, sign: part),
    "Rotate": ("rotate", lambda part, sign: sign * (part * 30.0)),
    "Posterize": ("posterize", lambda part, sign: np.trunc(part * 4)),
    "PosterizeIncreasing": ("posterize", lambda part, sign: 4 - np.trunc(part * 4)),
    "Solarize": ("solarize", _solarized),
    "SolarizeIncreasing": ("solarize", lambda part, sign: 256 - _solarized(part, sign)),
    "SolarizeAdd": ("solarize_add", lambda part, sign: np.minimum(128, np.trunc(part * 110))),
    "Color": ("color", _enhanced),
    "ColorIncreasing": ("color", _increasing),
    "Contrast": ("contrast", _enhanced),
    "ContrastIncreasing": ("contrast", _increasing),
    "Brightness": ("brightness", _enhanced),
    "BrightnessIncreasing": ("brightness", _increasing),
    "Sharpness": ("sharpness", _enhanced),
    "SharpnessIncreasing": ("sharpness", _increasing),
    "ShearX": ("shear_x", lambda part, sign: sign * (part * 0.3)),
    "ShearY": ("shear_y", lambda part, sign: sign * (part * 0.3)),
    "TranslateXRel": ("translate_x", lambda part, sign: sign * (part * 0.45)),
    "TranslateYRel": ("translate_y", lambda part, sign: sign * (part * 0.45)),
    "Desaturate": ("color", lambda part, sign: 1.0 - np.clip(0.5 + 0.5 * part, 0.5, 1.0)),
    "GaussianBlur": ("gaussian_blur", lambda part, sign: np.clip(0.1 + (2.0 - 0.1) * part, 0.1, 2.0)),
}
"""timm's operations: what each does, and how much of it at a fraction of magnitude 10."""

_PLAIN = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
_INCREASING = tuple(f"{name}Increasing" if f"{name}Increasing" in OPS else name for name in _PLAIN)

_SETS: dict[str, dict[str, float]] = {
    "3a": {"SolarizeIncreasing": 1, "Desaturate": 1, "GaussianBlur": 1},
    "3aw": {
        "SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2, "ShearY": 2,
        "PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1, "SharpnessIncreasing": 1,
        "ContrastIncreasing": 1, "BrightnessIncreasing": 1, "Equalize": 1, "Invert": 1,
    },
    "weights": {
        "Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1, "ColorIncreasing": 0.25,
        "SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05,
        "ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05,
        "Invert": 0.05,
    },
}  # fmt: skip
"""timm's other sets of operations, with how often each is taken."""


def operations(auto: Auto) -> dict[str, float]:
    """RandAugment's operations under timm's names, with how often each is taken."""
    return _SETS[auto.t] if auto.t else dict.fromkeys(_INCREASING if auto.inc else _PLAIN, 1.0)


def amounts(name: str, level: npt.ArrayLike, sign: npt.ArrayLike) -> tuple[str, Floats]:
    """What timm's operation does at magnitude ``level`` (of 10), turned to ``sign`` (-1 or 1): an action and its amount."""
    action, amount = OPS[name]
    return action, amount(np.asarray(level, np.float64) / 10.0, np.asarray(sign, np.float64))


_Rows = Callable[[int], Floats]
"""Numbers in [0, 1) of the images, by stream."""


def changes(
    augment: Augment, seed: int, epoch: int, index: npt.ArrayLike, *, size: int, strength: float = 1.0
) -> Changes:
    """What is done to images ``index`` (n,) in ``epoch``.

    Args:
        augment: the policy and its strengths.
        seed: what chance follows from, with ``epoch`` and ``index``.
        size: side of the model's input. Lengths in pixels (a blur's radius, TrivialAugment's 32) are of an image of it.
        strength: a factor of RandAugment's magnitude, TrivialAugment's bins and color jitter's ranges, and of how often
            3-Augment's three are done.
    """
    rows = np.asarray(index, dtype=np.uint64)

    def numbers(stream: int) -> Floats:
        return uniform(seed, epoch, rows, stream)

    n, parts = len(rows), []
    if augment.auto is not None:
        draw = {"rand": _rand, "trivial": _trivial, "3a": _three}[augment.auto.name]
        parts.append(draw(augment.auto, numbers, n, size, strength))
    if any(augment.jitter):
        parts.append(_jitter(augment.jitter, numbers, strength))
    if not parts:
        return Changes(np.zeros((n, 0), np.int64), np.zeros((n, 0)), np.zeros((n, 0), np.int64))
    return Changes(*(np.concatenate(columns, axis=1) for columns in zip(*parts)))


def _rand(auto: Auto, numbers: _Rows, n: int, size: int, strength: float) -> Changes:
    """RandAugment with timm's settings."""
    weights = operations(auto)
    names, found = list(weights), []
    chosen = _weighted(list(weights.values()), auto.n, numbers) if auto.t in ("3aw", "weights") else None
    for layer in range(auto.n):
        stream = _LAYER + 16 * layer
        which = _pick(numbers(stream), len(names)) if chosen is None else chosen[:, layer]
        level = _levels(auto, numbers, stream + 1, strength)
        sign = np.where(numbers(stream + 4) > 0.5, -1.0, 1.0)
        done = numbers(stream + 5) <= auto.p
        action, amount = np.zeros(n, np.int64), np.zeros(n)
        for place, name in enumerate(names):
            mine = done & (which == place)
            does, amount[mine] = amounts(name, level[mine], sign[mine])
            action[mine] = ACTIONS.index(does)
        found.append((action, amount, _between(auto, numbers(stream + 6))))
    return Changes(*(np.stack(columns, axis=1) for columns in zip(*found)))


def _levels(auto: Auto, numbers: _Rows, stream: int, strength: float) -> Floats:
    """(n,) magnitudes: the same for all, around it along a bell, or (``mstd`` above 100) evenly up to it."""
    magnitude, noise = auto.m * strength, numbers(stream)
    if auto.mstd > 100:
        level = noise * magnitude
    else:
        bell = np.sqrt(-2.0 * np.log1p(-noise)) * np.cos(2.0 * math.pi * numbers(stream + 1))  # Box and Muller
        level = magnitude + auto.mstd * bell
    return np.clip(level, 0.0, auto.mmax)


def _weighted(weights: list[float], count: int, numbers: _Rows) -> Ints:
    """(n, count) of ``weights``, drawn one after another, none twice (Efraimidis and Spirakis, 2006)."""
    keys = [-np.log1p(-numbers(_WEIGHTED + place)) / weight for place, weight in enumerate(weights)]
    return np.argsort(np.stack(keys, axis=1), axis=1, kind="stable")[:, :count]


TRIVIAL: dict[str, Amount | None] = {
    "nothing": None,
    "shear_x": lambda part, sign: sign * 0.99 * part,
    "shear_y": lambda part, sign: sign * 0.99 * part,
    "translate_x": lambda part, sign: sign * np.trunc(32.0 * part),
    "translate_y": lambda part, sign: sign * np.trunc(32.0 * part),
    "rotate": lambda part, sign: sign * 135.0 * part,
    "brightness": lambda part, sign: 1.0 + sign * 0.99 * part,
    "color": lambda part, sign: 1.0 + sign * 0.99 * part,
    "contrast": lambda part, sign: 1.0 + sign * 0.99 * part,
    "sharpness": lambda part, sign: 1.0 + sign * 0.99 * part,
    "posterize": lambda part, sign: 8.0 - np.rint(6.0 * part),
    "solarize": lambda part, sign: np.ceil(255.0 - 255.0 * part),
    "auto_contrast": None,
    "equalize": None,
}
"""TrivialAugment's wide space."""

_BINS = 31


def _trivial(auto: Auto, numbers: _Rows, n: int, size: int, strength: float) -> Changes:
    """One action for each image, at one of 31 magnitudes."""
    which, part = _pick(numbers(_LAYER), len(TRIVIAL)), strength * _pick(numbers(_LAYER + 1), _BINS) / (_BINS - 1)
    sign = np.where(numbers(_LAYER + 4) < 0.5, -1.0, 1.0)
    action, amount = np.zeros(n, np.int64), np.zeros(n)
    for place, (does, of) in enumerate(TRIVIAL.items()):
        mine = which == place
        action[mine] = ACTIONS.index(does)
        if of is not None:
            amount[mine] = of(part[mine], sign[mine]) / (size if does.startswith("translate") else 1)
    return Changes(action[:, None], amount[:, None], _between(auto, numbers(_LAYER + 6))[:, None])


def _three(auto: Auto, numbers: _Rows, n: int, size: int, strength: float) -> Changes:
    """Solarize, grayscale, or a Gaussian blur of 0.1 to 2 pixels: one of the three, for each image."""
    names = np.array([ACTIONS.index(name) for name in ("solarize", "color", "gaussian_blur")])
    which = _pick(numbers(_LAYER), 3)
    action = np.where(numbers(_LAYER + 5) < strength, names[which], 0)
    amount = np.choose(which, [np.full(n, 128.0), np.zeros(n), 0.1 + (2.0 - 0.1) * numbers(_LAYER + 1)])
    return Changes(action[:, None], amount[:, None], np.zeros((n, 1), np.int64))


def _jitter(ranges: tuple[float, float, float, float], numbers: _Rows, strength: float) -> Changes:
    """torchvision's ColorJitter: factors from evenly around 1, turns of the hue around 0, in any order."""
    found = []
    for place, (name, reach) in enumerate(zip(("brightness", "contrast", "color", "hue"), ranges)):
        reach, number = reach * strength, numbers(_JITTER + place)
        low, high = (-reach, reach) if name == "hue" else (max(0.0, 1.0 - reach), 1.0 + reach)
        action = np.full(len(number), ACTIONS.index(name) if reach else 0)
        found.append((action, low + (high - low) * number, np.zeros(len(number), np.int64)))
    order = np.argsort(np.stack([numbers(_JITTER + 8 + place) for place in range(4)], axis=1), axis=1, kind="stable")
    return Changes(*(np.take_along_axis(np.stack(columns, axis=1), order, axis=1) for columns in zip(*found)))


def _pick(numbers: Floats, count: int) -> Ints:
    return np.minimum((numbers * count).astype(np.int64), count - 1)


def _between(auto: Auto, numbers: Floats) -> Ints:
    kind = auto.interpolation or ("nearest" if auto.name == "trivial" else "random")  # torchvision's, timm's
    if kind == "random":
        return np.where(numbers < 0.5, BILINEAR, BICUBIC)
    return np.full(len(numbers), {"nearest": NEAREST, "bilinear": BILINEAR, "bicubic": BICUBIC}[kind])


def change(images: Tensor, made: Changes, *, fill: npt.NDArray[np.uint8], size: int) -> Tensor:
    """Carry out ``made`` on ``images`` (n, 3, S, S) uint8, in place.

    Args:
        fill: (3,): what is seen beyond an image's border.
        size: side that a blur's radius is for; see :func:`changes`.
    """
    step = len(images) if images.is_cuda else max(1, PIECE // images[0].numel())
    for layer in range(made.action.shape[1]):
        keys = made.action[:, layer] * 4 + made.between[:, layer]
        for key in np.unique(keys[made.action[:, layer] > 0]):
            rows = np.flatnonzero(keys == key)
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                where = pixel_ops.sent(torch.from_numpy(some), images.device)
                seen, amount = images.index_select(0, where), made.amount[some, layer]
                done = act(ACTIONS[key // 4], seen, amount, between=int(key % 4), fill=fill, size=size)
                images.index_copy_(0, where, done)
    return images


def act(action: str, images: Tensor, amount: Floats, *, between: int, fill: npt.NDArray[np.uint8], size: int) -> Tensor:
    """One action on images (n, 3, S, S) uint8, each by its amount (n,)."""
    if action in ("auto_contrast", "equalize", "invert"):
        return getattr(pixel_ops, action)(images)  # type: ignore[no-any-return]
    if action == "gaussian_blur":
        return pixel_ops.gaussian_blur(images, amount * (images.shape[-1] / size))
    if action in ACTIONS[ACTIONS.index("rotate") :]:
        axes = {"x": "x", "y": "y", "e": "xy"}[action[-1]]
        return pixel_ops.warp(images, matrix(action, amount, images.shape[-1]), fill, between, axes)
    return getattr(pixel_ops, action)(images, amount)  # type: ignore[no-any-return]


def matrix(action: str, amount: Floats, side: int) -> Floats:
    """(n, 6) for :func:`lotus.data.pixel_ops.warp`, rounded as Pillow rounds its own."""
    found = np.tile(np.array([1.0, 0, 0, 0, 1.0, 0]), (len(amount), 1))
    if action == "rotate":
        for line, degrees in zip(found, amount):
            angle, half = -math.radians(degrees % 360.0), side / 2.0
            cosine, sine, back = round(math.cos(angle), 15), round(math.sin(angle), 15), round(-math.sin(angle), 15)
            line[:] = (
                cosine, sine, cosine * -half + sine * -half + 0.0 + half,
                back, cosine, back * -half + cosine * -half + 0.0 + half,
            )  # fmt: skip
        return found
    column = {"shear_x": 1, "translate_x": 2, "shear_y": 3, "translate_y": 5}[action]
    found[:, column] = amount * (side if action.startswith("translate") else 1)
    return found
