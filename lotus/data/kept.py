"""JPEG images that are decoded once and then lie in memory, where all of a file's have room."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lotus.data import cores
from lotus.data.format import JPEG, Beton
from selection import memory

SHARE = 0.5
"""Of the memory that is free, shared among the ranks of a machine: the most that one file's images take."""


class Kept(NamedTuple):
    """Where the pixels of a file's JPEG images lie once they are decoded; memory is taken as they come.

    N images of the file.
    """

    pool: npt.NDArray[np.uint8]
    """(bytes,) flat: one image (H, W, 3) after another."""
    at: npt.NDArray[np.int64]
    """(N,) where each begins; nothing is there of raw ones, which are mapped from the file."""
    there: npt.NDArray[np.bool_]
    """(N,) whether it has been decoded."""


NOTHING = Kept(np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.bool_))
"""Every image is decoded whenever it is read."""

HELD: weakref.WeakKeyDictionary[Beton, dict[str, Kept]] = weakref.WeakKeyDictionary()


def keep(beton: Beton, kind: str) -> Kept:
    """Room for the decoded images of ``beton``, the same for every loader of one ``kind`` (two kinds decode differently in the last
    bit) in this process; :data:`NOTHING` where none is JPEG, or memory lacks."""
    known = HELD.setdefault(beton, {})
    if kind not in known:
        size = _size(beton)
        if not 0 < size.sum() <= room():
            return NOTHING
        known[kind] = Kept(np.empty(int(size.sum()), np.uint8), np.cumsum(size) - size, np.zeros(len(beton), np.bool_))
    return known[kind]


def room() -> float:
    """Bytes that the images of one file may take."""
    return SHARE * memory.available() * memory.GB / cores.ranks_here()


def sentence(beton: Beton, kept: Kept) -> str:
    """What the user is told of it; empty where no image is JPEG."""
    size, count = int(_size(beton).sum()), int((beton.modes == JPEG).sum())
    if not count:
        return ""
    if kept is NOTHING:
        return (
            f"{beton.file.name}: {count:,} JPEG images are decoded whenever they are read: {size / memory.GB:,.2f} GB is more than "
            f"half of the memory that is free"
        )
    return (
        f"{beton.file.name}: {count:,} JPEG images stay decoded in memory once they are read, {size / memory.GB:,.2f} GB "
        "(data.keep_decoded=false: not)"
    )


def _size(beton: Beton) -> npt.NDArray[np.int64]:
    """(N,) bytes of each JPEG, decoded; 0 of what is raw."""
    return np.where(beton.modes == JPEG, 3 * beton.heights * beton.widths, 0)
