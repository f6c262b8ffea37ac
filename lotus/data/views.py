"""What is seen of an image, as numbers: a pure function of (seed, epoch, image index).

FFCV's own augmentations cannot be seeded, so the randomness is ours: a hash, no generator. Both loaders read the same
table, an image's cached saliency can be cropped as its pixels were, a resumed run goes on bit for bit, and two ranks
never disagree.

How a row of the table is carried out: the box is cut out of the stored image and resized to S x S (``INTER_AREA``; not
at all where it has this size); the output's pixel (y, x) shows that picture's (y + down, x + right), and the fill color
beyond its border; last, the output is mirrored where ``flip`` is 1. Where the center view is resized by one of timm's
filters the box is told to a pixel and not carried out: the whole image is resized, and S x S of that are cut out, as
:func:`lotus.data.pictures.middle` and timm do it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lotus.config import Augment

TOP, LEFT, HEIGHT, WIDTH, DOWN, RIGHT, FLIP = COLUMNS = range(7)
"""Columns of the table: the box in the stored image, the shift of the picture made of it, and whether it is mirrored."""

CENTER = 7 / 8
"""Fraction of the shorter side that evaluation looks at in natural images: 224 of 256, the usual ImageNet protocol."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What of the stored images is looked at."""

    size: int
    """S, the side of the model's input."""
    augment: Augment | None = None
    """None is evaluation: the center view, see :func:`center`. ``crop: none`` and ``pad`` start from the same view; ``resized`` takes
    torchvision's random-resized crop instead (ten tries, then the center)."""
    seed: int = 0
    """Of the augmentations."""
    crop: float = CENTER
    """Fraction of the shorter side in the center view."""
    interpolation: str = "area"
    """How that view is resized: ``area``, ``bilinear`` or ``bicubic``. Random crops go by area."""
    crop_mode: str = "center"
    """timm's word where that is by a filter: ``squash`` resizes both sides alike, whatever the shape."""

    @property
    def filter(self) -> str:
        """``bilinear`` or ``bicubic`` where images are resized so, as timm does it; empty where it goes by area."""
        random = self.augment is not None and self.augment.crop == "resized"
        return "" if random or self.interpolation == "area" else self.interpolation


@dataclass(frozen=True, kw_only=True)
class Look(View):
    """How a model sees the stored images: what of them, and normalized how."""

    mean: Sequence[float]
    """Of each channel, in 0..1."""
    std: Sequence[float]
    """Likewise."""


_TRIES = 10
_FLIP, _DOWN, _RIGHT, _CROP = 0, 1, 2, 16  # streams: what a random number is for; a try of a crop takes four

Uint64 = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Table = npt.NDArray[np.int32]


def parameters(
    view: View, epoch: int, index: npt.ArrayLike, heights: npt.ArrayLike, widths: npt.ArrayLike, side: int | None = None
) -> Table:
    """The table (n, 7) for n images; see ``COLUMNS``.

    Args:
        view: how images are seen.
        epoch: from 0, what chance follows from.
        index: (n,) row numbers, what the hash is keyed by.
        heights: (n,) of the stored images, in pixels.
        widths: (n,) likewise.
        side: what the view is shown at in this epoch, where it is not S: the boxes stay, and the padding shrinks or grows
            with the picture.
    """
    augment, seed = view.augment, view.seed
    rows = np.asarray(index, dtype=np.uint64)
    high, wide = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    table = np.zeros((len(rows), len(COLUMNS)), dtype=np.int32)
    if augment is not None and augment.crop == "resized":
        table[:, :4] = _resized(augment, seed, epoch, rows, high, wide)
    else:
        table[:, :4] = middle(view, high, wide)
    if augment is None:
        return table
    if augment.crop == "pad":
        pad = augment.pad if side is None else round(augment.pad * side / view.size)
        for column, stream in ((DOWN, _DOWN), (RIGHT, _RIGHT)):
            table[:, column] = _below(uniform(seed, epoch, rows, stream), 2 * pad + 1) - pad
    if augment.flip:
        table[:, FLIP] = uniform(seed, epoch, rows, _FLIP) < 0.5
    return table


def middle(view: View, heights: Ints, widths: Ints, size: int | None = None) -> Ints:
    """Boxes (n, 4) of evaluation: :func:`center`, or where timm's transform looks, to a pixel.

    Args:
        view: how images are seen
        heights, widths: (n,) of the stored images, in pixels
        size: of another model than the view is for
    """
    size = view.size if size is None else size
    if not view.filter:
        return center(heights, widths, size, view.crop)
    short, shorter = math.floor(size / view.crop), np.minimum(heights, widths)
    boxes = []
    for lengths in (heights, widths):
        alike = (lengths == shorter) | (view.crop_mode == "squash")
        resized = np.where(alike, short, (short * lengths / shorter).astype(np.int64))
        start = np.rint(np.rint((resized - size) / 2) * lengths / resized).astype(np.int64)
        boxes.append((start, np.maximum(1, np.rint(size * lengths / resized).astype(np.int64))))
    (top, tall), (left, wide) = boxes
    return np.stack([top, left, np.minimum(tall, heights - top), np.minimum(wide, widths - left)], axis=1)


def center(heights: Ints, widths: Ints, size: int, crop: float = CENTER) -> Ints:
    """Boxes (n, 4) of evaluation by area: a square in the middle.

    Its side is ``crop``, 7/8, of the shorter side (a 224 crop of an image resized to 256), but at least ``size`` where the image
    has that many pixels, and never more than the shorter side. So an image stored at the model's size is seen whole and
    untouched, one of shorter side 256 gives its middle 224 pixels without resizing, and a smaller one is enlarged.
    """
    shorter = np.minimum(heights, widths)
    side = np.minimum(shorter, np.maximum(size, np.rint(crop * shorter).astype(np.int64)))
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def uniform(seed: int, epoch: int, index: Uint64, stream: int) -> Floats:
    """(n,) numbers in [0, 1): splitmix64 over (seed, epoch, index, stream), one after the other.

    Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (the mixer is Stafford's variant 13).
    """
    with np.errstate(over="ignore"):  # 64-bit arithmetic is meant to wrap
        state = _mix(np.full(1, seed % 2**64, dtype=np.uint64))
        state = _mix(state + np.uint64(epoch % 2**64))
        state = _mix(state + index)
        state = _mix(state + np.uint64(stream))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: Uint64) -> Uint64:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _below(numbers: Floats, bound: int | Ints) -> Ints:
    """Whole numbers in [0, bound)."""
    return np.minimum((numbers * bound).astype(np.int64), np.asarray(bound) - 1)


def _resized(augment: Augment, seed: int, epoch: int, rows: Uint64, heights: Ints, widths: Ints) -> Ints:
    """torchvision's RandomResizedCrop.get_params for many images at once: boxes (n, 4)."""
    low, high = np.log(augment.ratio[0]), np.log(augment.ratio[1])
    boxes = np.zeros((len(rows), 4), dtype=np.int64)
    open_ = np.arange(len(rows))
    for number in range(_TRIES):
        key, tall, wide = rows[open_], heights[open_], widths[open_]
        stream = _CROP + 4 * number
        part = augment.scale[0] + uniform(seed, epoch, key, stream) * (augment.scale[1] - augment.scale[0])
        ratio = np.exp(low + uniform(seed, epoch, key, stream + 1) * (high - low))
        area = part * tall * wide
        w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (w > 0) & (w <= wide) & (h > 0) & (h <= tall)
        top = _below(uniform(seed, epoch, key, stream + 2), np.maximum(tall - h, 0) + 1)
        left = _below(uniform(seed, epoch, key, stream + 3), np.maximum(wide - w, 0) + 1)
        boxes[open_[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        open_ = open_[~fits]
        if not len(open_):
            return boxes
    # Ten misses: the middle, as much of it as the allowed ratios let in.
    tall, wide = heights[open_], widths[open_]
    ratio = np.clip(wide / tall, augment.ratio[0], augment.ratio[1])
    w = np.clip(np.rint(np.minimum(wide, tall * ratio)).astype(np.int64), 1, wide)
    h = np.clip(np.rint(np.minimum(tall, wide / ratio)).astype(np.int64), 1, tall)
    boxes[open_] = np.stack([(tall - h) // 2, (wide - w) // 2, h, w], axis=1)
    return boxes
