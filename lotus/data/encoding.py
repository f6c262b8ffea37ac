"""Pictures of a source, read, checked and packed in threads, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lotus import config
from lotus.data import cores, format, pictures
from lotus.data.format import Stored
from lotus.data.pictures import Pixels
from lotus.data.source import Source
from lotus.data.views import uniform
from selection.errors import Refused, reason

SAMPLE = 10_000
"""Images over which mean and standard deviation are taken."""

BLOCK = 1 << 22  # pixels of which moments are taken at a time


class Encoded(NamedTuple):
    """An image ready to be written, or why it cannot be."""

    stored: Stored | None
    moments: npt.NDArray[np.float64] | None
    """(2, 3), see :func:`moments`; None where it is not in the sample."""
    fault: str
    notes: list[str]
    """What was noted of it while it was read."""


class InTurn:
    """Room for what is decoded and not yet written, handed out so that the image whose turn it is to be written always gets in.

    Args:
        most: pixels, apart from those of that image.
    """

    def __init__(self, most: int) -> None:
        self._most, self._next = most, 0
        self._held: dict[int, int] = {}
        self._changed = threading.Condition()

    def enter(self, number: int, pixels: int) -> None:
        """Wait until ``pixels`` of image ``number`` have room."""
        with self._changed:
            self._changed.wait_for(lambda: number <= self._next or self._has(pixels))
            self._held[number] = pixels

    def _has(self, pixels: int) -> bool:
        """Whether there is room out of turn. More than half waits for its turn: two such would meet where one enters as the next."""
        return 2 * pixels <= self._most and sum(self._held.values()) + pixels <= self._most

    def leave(self, number: int) -> None:
        """Image ``number`` is written, or nobody waits for it any more."""
        with self._changed:
            self._held.pop(number, None)
            self._next = number + 1
            self._changed.notify_all()


def encoded(source: Source, data: config.Data) -> Iterator[Encoded]:
    """Each image ready to be written, in order, with its moments where it is in the sample; or why it cannot be; and what was
    noted of it."""
    total = len(source)
    # Row i is in the sample where the running count i * SAMPLE / N passes a whole number: evenly spread.
    sampled = np.diff(np.arange(total + 1) * min(SAMPLE, total) // total) > 0
    room = InTurn(pictures.AT_ONCE)

    def one(i: int) -> Encoded:
        notes: list[str] = []
        try:
            with pictures.watched(lambda pixels: room.enter(i, pixels), notes):
                pixels = pictures.fit(checked(source.read(i)), data.max_side)
            return Encoded(stored(pixels, i, data), moments(pixels) if sampled[i] else None, "", notes)
        except Refused:  # not one picture, but what they all come from
            raise
        except Exception as error:  # a damaged picture can raise anything
            return Encoded(None, None, reason(error), notes)

    workers = cores.count(data.workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lotus-prepare")
    pending: deque[Future[Encoded]] = deque()
    try:
        for i in range(total + 8 * workers):
            if i < total:
                pending.append(pool.submit(one, i))
            if pending and i >= 8 * workers:
                yield pending.popleft().result()
                room.leave(i - 8 * workers)
    finally:
        room.leave(total)  # whoever still waits for room gets it
        pool.shutdown(wait=True, cancel_futures=True)


def checked(pixels: Pixels) -> Pixels:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"{pixels.shape} of {pixels.dtype}, expected (H, W, 3) of uint8")
    if min(pixels.shape) < 1 or max(pixels.shape) > pictures.MAX_SIDE:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels; a side is 1 to {pictures.MAX_SIDE}")
    if pixels.shape[0] * pixels.shape[1] > pictures.MAX_PIXELS:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels; at most {pictures.MAX_PIXELS:,} are stored")
    return pixels


def stored(pixels: Pixels, row: int, data: config.Data) -> Stored:
    """An image as raw pixels or JPEG, as ``data.write`` says."""
    packed = data.write == "jpg"
    if data.write == "smart":
        packed = pixels.nbytes > data.smart_threshold
    elif data.write == "proportion":
        packed = bool(uniform(0, 0, np.array([row], np.uint64), stream=1 << 20)[0] < data.jpeg_share)
    height, width = pixels.shape[:2]
    if packed:
        return Stored(format.JPEG, height, width, pictures.jpeg(pixels, data.jpeg_quality))
    return Stored(format.RAW, height, width, np.ascontiguousarray(pixels).data.cast("B"))


def moments(pixels: Pixels) -> npt.NDArray[np.float64]:
    """(2, 3): mean and mean square of each channel, in 0..1. Every image weighs the same, whatever its size."""
    flat = pixels.reshape(-1, 3)
    sums = np.zeros((2, 3))
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK] / 255.0
        share = len(part) / len(flat)  # 1 where there is one part
        sums += share * np.stack([part.mean(axis=0), (part * part).mean(axis=0)])
    return sums
