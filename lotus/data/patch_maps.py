"""Patch tickets: what each patch of each training image scores, one byte a patch, in a file beside the .beton.

The scores belong to the stored picture. In training they are cropped, shifted and mirrored as the pixels are, by the same
table of :mod:`lotus.data.views`: they are a picture themselves, of one channel, and so can be mixed like one too.

Shapes: N images, B of a batch, G x G patches of the model that was asked, S side of the trained model's input in pixels.
"""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lotus import files
from lotus.data.pixel_ops import sent
from lotus.data.views import DOWN, FLIP, HEIGHT, LEFT, RIGHT, TOP, WIDTH, View, middle, parameters
from selection import npz, regular
from selection.errors import Refused, reason

FORMAT = 1
_UNKNOWN = 127.5  # of what the asked model did not see: as good as the middle patch

Bytes = npt.NDArray[np.uint8]


def ranks(scores: Tensor, rng: torch.Generator) -> Tensor:
    """(B, n) scores -> (B, n) uint8: 255 for the best patch of its image, 0 for the worst; exact up to 256 patches.

    Among equals, such as the patches of a black border, chance decides: by their place, one side of every image would win.
    """
    mixed = torch.rand(scores.shape, generator=rng).argsort(dim=1)
    found = scores.cpu().gather(1, mixed).argsort(dim=1, stable=True).argsort(1)  # 0 for the worst
    places = torch.empty_like(found).scatter_(1, mixed, found)
    return (places * 255.0 / max(scores.shape[1] - 1, 1)).round().to(torch.uint8)


class Mass:
    """How much of the sum of an image's scores its best k patches have, for each k; the mean over the images."""

    def __init__(self, patches: int) -> None:
        self._sum, self._images, self._sound = np.zeros(patches), 0, True

    def add(self, scores: Tensor) -> None:
        """Take in (B, n)."""
        if bool((scores < 0).any()):  # a part of a sum has no meaning then
            self._sound = False
            return
        falling = scores.double().sort(1, descending=True).values.cumsum(1)
        whole = falling[:, -1:]
        even = torch.arange(1, scores.shape[1] + 1, dtype=torch.float64) / scores.shape[1]  # of an image without any
        self._sum += torch.where(whole > 0, falling / whole, even).sum(0).numpy()
        self._images += len(scores)

    def curve(self) -> npt.NDArray[np.float64] | None:
        """(n,), of 1 to n patches; None where some score was below 0."""
        return self._sum / self._images if self._sound and self._images else None


def save(file: Path, maps: Bytes, *, size: int, fingerprint: str, mass: npt.NDArray[np.float64] | None = None) -> None:
    """Write (N, G, G) scores.

    Args:
        file: the .npz to write
        maps: those scores, uint8
        size: side in pixels of what the asked model saw: the center view of each image
        fingerprint: of the data
        mass: what :class:`Mass` found
    """
    told: dict[str, Any] = {} if mass is None else {"mass": mass}
    with files.opened(file) as out:
        np.savez(out, format=FORMAT, maps=maps, size=size, fingerprint=np.array(fingerprint), **told)


def stands(file: Path) -> bool:
    """Whether :func:`save` wrote ``file`` and it is not cut short."""
    return zipfile.is_zipfile(file)


class Maps(NamedTuple):
    """Scores, and what they were asked of."""

    scores: Bytes
    """(N, G, G)."""
    size: int
    """Side in pixels of what the asked model saw."""


def load(file: Path, *, fingerprint: str) -> Maps:
    """What :func:`save` wrote.

    Raises:
        Refused: it cannot be read, or was made from other data.
    """
    try:
        arrays = npz.arrays(regular.check(file))
        if int(arrays["format"]) != FORMAT:
            raise ValueError(f"format {int(arrays['format'])}")
        maps, size, of = arrays["maps"], int(arrays["size"]), str(arrays["fingerprint"])
        if maps.dtype != np.uint8 or maps.ndim != 3:
            raise ValueError(f"{maps.dtype} of {maps.ndim} dimensions")
        if size < 1 or 0 in maps.shape:
            raise ValueError(f"no patches: {maps.shape} of {size} pixels")
    except Exception as error:  # a damaged file can break its parsers in any way
        raise Refused(f"{file}: cannot be read ({reason(error)}). Delete it; it is made again.") from None
    if of != fingerprint:
        raise Refused(f"{file}: was made from other data. Delete it; it is made again.")
    return Maps(maps, size)


def load_mass(file: Path) -> npt.NDArray[np.float64] | None:
    """What :class:`Mass` found; None where it is not in the file."""
    return npz.arrays(file, {"mass"}).get("mass")


class Tickets:
    """The scores of all images, as training sees them."""

    def __init__(
        self,
        maps: Maps,
        heights: npt.NDArray[np.int64],
        widths: npt.NDArray[np.int64],
        view: View,
        patch: tuple[int, int],
    ) -> None:
        """
        Args:
            maps: of all images
            heights, widths: (N,) of the stored images, in pixels
            view: the training's, as its loader has it
            patch: height and width of the trained model's patches
        """
        if len(maps.scores) != len(heights):
            raise Refused(
                f"patch tickets: scores of {len(maps.scores)} images, and the data has {len(heights)}. Make them anew."
            )
        self._maps, self._asked = maps
        self._heights, self._widths, self._view, self._patch = heights, widths, view, patch

    def seen(self, index: Tensor, epoch: int) -> Tensor:
        """The scores as a picture (B, 1, S, S), as the pixels of these images are seen in ``epoch``: a pixel has the score
        of the patch that it comes from, the middle one beyond what was scored, and 0 in the padding.

        Args:
            index: (B,) row numbers
        """
        rows = index.cpu().numpy()
        high, wide = self._heights[rows], self._widths[rows]
        table = parameters(self._view, epoch, rows, high, wide).astype(np.int64)
        box = middle(replace(self._view, augment=None), high, wide, self._asked)  # what was scored
        down, in_rows = self._places(table[:, TOP], table[:, HEIGHT], table[:, DOWN], box[:, 0], box[:, 2], 0)
        across, in_columns = self._places(table[:, LEFT], table[:, WIDTH], table[:, RIGHT], box[:, 1], box[:, 3], 1)
        mirrored = table[:, FLIP] == 1
        across[mirrored], in_columns[mirrored] = across[mirrored, ::-1], in_columns[mirrored, ::-1]
        framed = np.pad(self._maps[rows].astype(np.float32), ((0, 0), (1, 1), (1, 1)), constant_values=_UNKNOWN)
        device = index.device
        maps, y, x, high_in, wide_in = (
            sent(torch.from_numpy(one), device) for one in (framed, down, across, in_rows, in_columns)
        )
        picture = maps[torch.arange(len(rows), device=device)[:, None, None], y[:, :, None], x[:, None]]
        return (picture * (high_in[:, :, None] & wide_in[:, None]))[:, None]

    def pooled(self, pictures: Tensor) -> Tensor:
        """(B, 1, S, S) -> (B, n): the mean over each of the trained model's patches."""
        return functional.avg_pool2d(pictures, self._patch).flatten(1)

    def _places(
        self,
        start: npt.NDArray[np.int64],
        length: npt.NDArray[np.int64],
        shift: npt.NDArray[np.int64],
        box: npt.NDArray[np.int64],
        side: npt.NDArray[np.int64],
        axis: int,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Along one axis: from which patch each output pixel comes (counted from 1; 0 and G + 1 are beyond what was scored),
        and whether it is of the picture at all, not of its padding; both (B, S)."""
        grid, size = self._maps.shape[1 + axis], self._view.size
        at = np.arange(size)[None] + shift[:, None]  # of the crop, resized to S
        middle = start[:, None] + (at + 0.5) * (length / size)[:, None]  # of the stored image, in pixels
        place = np.floor((middle - box[:, None]) * (grid / side)[:, None]).astype(np.int64)
        return place.clip(-1, grid) + 1, (at >= 0) & (at < size)
