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
from lotus.data.pictures import Pixels, middle
from lotus.data.sample_plan import Rows
from lotus.data.views import Table, View

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
            seen = view(self._pixels(int(row)), line, self.side, self.fill, self.look)
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


def view(pixels: Pixels, line: npt.NDArray[np.int32], size: int, fill: Pixels, how: View | None = None) -> Pixels:
    """One line of the table of augmentations, carried out: (S, S, 3) uint8; see :mod:`lotus.data.views`.

    Args:
        pixels: (H, W, 3) uint8, as stored
        line: its seven numbers
        size: S
        fill: (3,) what stands beyond the border
        how: what the table was made by, where that may be by a filter of timm's
    """
    top, left, height, width, down, right, flip = (int(value) for value in line)
    if how is not None and how.filter:
        seen = middle(pixels, size, how.crop, how.filter, how.crop_mode)
    else:
        seen = resize(pixels[top : top + height, left : left + width], size)
    if down or right:
        rows, columns = np.arange(size) + down, np.arange(size) + right
        seen = seen[rows.clip(0, size - 1)[:, None], columns.clip(0, size - 1)]
        seen[(rows < 0) | (rows >= size)] = fill
        seen[:, (columns < 0) | (columns >= size)] = fill
    return seen[:, ::-1] if flip else seen


def resize(pixels: Pixels, size: int) -> Pixels:
    """To (S, S, 3), as OpenCV's ``resize(..., INTER_AREA)`` to within one gray level; untouched where it has that size.

    Shrinking, a pixel is the mean of the area that it covers. Enlarging in either direction, OpenCV takes a kind of
    linear interpolation in both, and so do we. Either is a matrix for the rows and one for the columns.
    """
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    shrinks = height >= size and width >= size
    down = _weights(height, size, shrinks) @ pixels.reshape(height, width * 3).astype(np.float32)  # (S, W 3)
    turned = down.reshape(size, width, 3).transpose(1, 0, 2).reshape(width, size * 3)
    across = _weights(width, size, shrinks) @ turned  # (S, S 3), columns first
    return np.rint(across).clip(0, 255).astype(np.uint8).reshape(size, size, 3).transpose(1, 0, 2)


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


def _done(raw: Raw, work: list[Future[None]]) -> Raw:
    for piece in work:
        piece.result()
    return raw
