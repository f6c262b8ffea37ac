"""The loader for machines where FFCV cannot be built: numpy, Pillow and threads, the same batches.

Letters: S side of the model's input.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lotus.data.base import BaseLoader, Raw
from lotus.data.format import RAW
from lotus.data.kept import NOTHING
from lotus.data.pictures import Pixels
from lotus.data.sample_plan import Rows
from lotus.data.views import Table

AHEAD = 3
"""Batches made while one is worked on."""


class TorchLoader(BaseLoader):
    """Carries out the table with numpy. Threads suffice: Pillow and numpy let go of the interpreter while they work."""

    kind = "torch"

    def _ahead(self, rows: Rows, table: Table, sizes: Sequence[int]) -> Generator[Raw, None, None]:
        step = max(1, -(-self.plan.micro // (4 * self.workers)))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="lotus-loader")
        pending: deque[tuple[Raw, list[Future[None]]]] = deque()
        try:
            ends = np.cumsum(sizes)[:-1]
            for batch, lines in zip(np.split(rows, ends), np.split(table, ends), strict=True):
                planes = self.blank(len(batch))
                raw = Raw(planes, torch.from_numpy(self.beton.labels[batch]), torch.from_numpy(self.beton.index[batch]))
                starts = range(0, len(batch), step)
                work = [
                    pool.submit(
                        self._paint, planes.numpy()[at : at + step], batch[at : at + step], lines[at : at + step]
                    )
                    for at in starts
                ]
                pending.append((raw, work))
                if len(pending) > AHEAD:
                    yield _done(*pending.popleft())
            while pending:
                yield _done(*pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _paint(self, planes: npt.NDArray[Any], rows: Rows, table: Table) -> None:
        """Fill ``planes`` (n, 3, S, S) with the images ``rows``, as ``table`` says."""
        for out, row, line in zip(planes, rows, table):
            seen = view(self._pixels(int(row)), line, self.side, self.fill, self.interpolation)
            for channel in range(3):
                np.take(self.levels[channel], seen[:, :, channel], out=out[channel])

    def _pixels(self, row: int) -> Pixels:
        if self.beton.modes[row] == RAW:  # a view will do, since nobody writes into it
            return self.beton.payload(row).reshape(self.beton.heights[row], self.beton.widths[row], 3)
        if self.kept is NOTHING:
            return self.beton.image(row)
        pool, at, there = self.kept
        shape = int(self.beton.heights[row]), int(self.beton.widths[row]), 3
        pixels = pool[at[row] : at[row] + math.prod(shape)].reshape(shape)
        if not there[row]:
            pixels[:] = self.beton.image(row)
            there[row] = True
        return pixels


def view(pixels: Pixels, line: npt.NDArray[np.int32], size: int, fill: Pixels, how: str = "area") -> Pixels:
    """One line of the table of augmentations, carried out: (S, S, 3) uint8; see :mod:`lotus.data.views`."""
    top, left, height, width, down, right, flip = (int(value) for value in line)
    seen = resize(pixels[top : top + height, left : left + width], size, how)
    if down or right:
        rows, columns = np.arange(size) + down, np.arange(size) + right
        seen = seen[rows.clip(0, size - 1)[:, None], columns.clip(0, size - 1)]
        seen[(rows < 0) | (rows >= size)] = fill
        seen[:, (columns < 0) | (columns >= size)] = fill
    return seen[:, ::-1] if flip else seen


def resize(pixels: Pixels, size: int, how: str = "area") -> Pixels:
    """To (S, S, 3); untouched where it has that size. ``bilinear`` and ``bicubic`` are Pillow's, to within two gray levels, which
    widen with what they shrink (antialiased). ``area`` is OpenCV's ``resize(..., INTER_AREA)``, to within one.

    Shrinking, a pixel is the mean of the area that it covers. Enlarging in either direction, OpenCV takes a kind of
    linear interpolation in both, and so do we. Either is a matrix for the rows and one for the columns.
    """
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    if how != "area":  # columns first, and whole levels between the two, as Pillow has it
        rows, columns = smooth(height, size, how == "bicubic"), smooth(width, size, how == "bicubic")
        turned = pixels.transpose(1, 0, 2).reshape(width, height * 3).astype(np.float32)
        across = _levels(columns @ turned).reshape(size, height, 3).transpose(1, 0, 2).reshape(height, size * 3)
        return _levels(rows @ across).astype(np.uint8).reshape(size, size, 3)
    shrinks = height >= size and width >= size
    down = _weights(height, size, shrinks) @ pixels.reshape(height, width * 3).astype(np.float32)  # (S, W 3)
    turned = down.reshape(size, width, 3).transpose(1, 0, 2).reshape(width, size * 3)
    across = _weights(width, size, shrinks) @ turned  # (S, S 3), columns first
    return _levels(across).astype(np.uint8).reshape(size, size, 3).transpose(1, 0, 2)


def _levels(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.rint(values).clip(0, 255)


@functools.lru_cache(maxsize=1024)
def _weights(length: int, size: int, area: bool) -> npt.NDArray[np.float32]:
    """(S, length): what each input contributes to each output along one side."""
    inverse = size / length
    scale = 1 / inverse  # not length / size: where a pixel begins on a border, the last bit decides which one it is in
    start = np.arange(size)[:, None] * scale
    inputs = np.arange(length)[None]
    if area:
        covered = np.minimum(start + scale, inputs + 1) - np.maximum(start, inputs)
        weights = np.clip(covered, 0, None)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    # cv::resize: what of the output pixel lies beyond the input pixel in which it begins belongs to the next one.
    first = np.minimum(np.floor(start), length - 1)
    beyond = (np.arange(1, size + 1)[:, None] - (first + 1) * inverse).astype(np.float32)
    part = np.where((beyond <= 0) | (first >= length - 1), 0, beyond - np.floor(beyond))
    return ((inputs == first) * (1 - part) + (inputs == first + 1) * part).astype(np.float32)


@functools.lru_cache(maxsize=1024)
def smooth(length: int, size: int, cubic: bool) -> npt.NDArray[np.float32]:
    """(S, length): what each input contributes to each output, by a triangle or by Keys' cubic at a = -1/2 (IEEE ASSP 29, 1981, eq. 4),
    stretched by how much is shrunk, as Pillow and timm have it."""
    scale = length / size
    wide = max(scale, 1.0)
    off = np.abs((np.arange(length)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / wide)
    if cubic:
        near, far = (1.5 * off - 2.5) * off * off + 1, ((-0.5 * off + 2.5) * off - 4) * off + 2
        weights = np.where(off < 1, near, np.where(off < 2, far, 0))
    else:
        weights = np.clip(1 - off, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _done(raw: Raw, work: list[Future[None]]) -> Raw:
    for piece in work:
        piece.result()
    return raw
