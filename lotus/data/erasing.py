"""Random erasing (Zhong et al., arXiv 1708.04896), as timm does it: boxes of noise in normalized images.

A pure function of (seed, epoch, image index) as everything in :mod:`lotus.data.views`. Noise is a piece of one long
strip of normal numbers, and where it begins is drawn: no generator runs, and the same image has the same noise on every
device.

Letters: n images, k boxes, S the side of the images.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lotus.config import Augment
from lotus.data.views import uniform

IMAGE, TOP, LEFT, HEIGHT, WIDTH, NOISE = range(6)
"""Columns of the boxes: place in the batch, the box in pixels, and where its noise begins."""

AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
"""Of a box, as a fraction of the image (all its boxes together), and height over width: timm's."""

STRIP = 1 << 21
"""Normal numbers of the strip: enough for the largest box of an image of 1,400 pixels."""

_TRIES = 10
_WHETHER, _COUNT, _BOX = 8192, 8193, 8200  # streams of the hash, apart from the others'; a try of a box takes four


def boxes(
    augment: Augment, seed: int, epoch: int, index: npt.ArrayLike, side: int, *, strength: float = 1.0
) -> npt.NDArray[np.int64]:
    """(k, 6) of images ``index`` (n,), in their order; see the columns.

    Args:
        augment: says how often an image is erased, and in how many boxes at most.
        seed, epoch: what chance follows from.
        side: S, pixels.
        strength: a factor of how often an image is erased.
    """
    rows = np.asarray(index, dtype=np.uint64)
    taken = np.flatnonzero(uniform(seed, epoch, rows, _WHETHER) < augment.erase * strength)
    counts = 1 + (uniform(seed, epoch, rows[taken], _COUNT) * augment.erase_count).astype(np.int64)
    found = []
    for number in range(augment.erase_count):
        open_ = taken[counts > number]
        parts = AREA[1] - AREA[0]
        shares = counts[counts > number]
        for attempt in range(_TRIES):
            if not len(open_):
                break
            stream = _BOX + 64 * number + 4 * attempt
            one, two, three, four = (uniform(seed, epoch, rows[open_], stream + place) for place in range(4))
            area = (AREA[0] + parts * one) * side * side / shares
            aspect = np.exp(np.log(ASPECT[0]) + (np.log(ASPECT[1]) - np.log(ASPECT[0])) * two)
            high, wide = (np.rint(np.sqrt(held)).astype(np.int64) for held in (area * aspect, area / aspect))
            fits = (high < side) & (wide < side)
            top, left = (three * (side - high + 1)).astype(np.int64), (four * (side - wide + 1)).astype(np.int64)
            start = (uniform(seed, epoch, rows[open_], stream + 40) * (STRIP - 3 * high * wide)).astype(np.int64)
            found.append(np.stack([open_, top, left, high, wide, start], axis=1)[fits])
            open_, shares = open_[~fits], shares[~fits]
    return np.concatenate(found) if found else np.zeros((0, 6), np.int64)


def erase(images: Tensor, where: npt.NDArray[np.int64], mode: str) -> Tensor:
    """Fill the boxes of ``images`` (n, 3, S, S), normalized, in place.

    Args:
        where: (k, 6), as :func:`boxes` gives them
        mode: ``pixel``: each pixel a normal number for each channel; ``rand``: each box; ``const``: zero, the mean.
    """
    noise = strip(str(images.device))
    for place, top, left, high, wide, start in where.tolist():
        box = images[place, :, top : top + high, left : left + wide]
        if mode == "const":
            box.zero_()
        elif mode == "rand":
            box.copy_(noise[start : start + 3].view(3, 1, 1).expand_as(box))
        else:
            box.copy_(noise[start : start + 3 * high * wide].view(3, high, wide))
    return images


@functools.lru_cache(maxsize=8)
def strip(device: str) -> Tensor:
    """(STRIP,) normal numbers, always the same."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(STRIP, dtype=np.float32)).to(device)
