"""The one place that sorts by score, and that breaks ties by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def ranking(scores: npt.NDArray[np.float64], rng: np.random.Generator) -> Rows:
    """The rows, highest score first. Ties are in random order: in that of the rows, the first folder would always win."""
    shuffled = rng.permutation(len(scores))
    return shuffled[np.argsort(-scores[shuffled], kind="stable")]


def highest(values: npt.NDArray[Any], count: int) -> Rows:
    """The rows of the ``count`` highest values, highest first; none where ``count`` is 0. Ties fall as they fall: shuffle before."""
    if count <= 0:
        return np.empty(0, np.int64)
    rows = np.argpartition(-values, count - 1)[:count]
    return rows[np.argsort(-values[rows], kind="stable")]


def shuffled(n: int, rng: np.random.Generator, start: Rows) -> tuple[Rows, list[int]]:
    """The rows in random order, and where those of ``start`` stand in it."""
    order = rng.permutation(n)
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    return order, place[np.asarray(start, np.int64)].tolist()


def shares(wanted: npt.NDArray[np.float64], sizes: Rows, budget: int) -> Rows:
    """``budget`` in proportion to ``wanted``, none above its size (which may be 0); whole numbers by largest remainder."""
    found = np.zeros(len(sizes))
    open_ = np.ones(len(sizes), bool)
    while True:
        rest = budget - found[~open_].sum()
        weight = np.maximum(wanted[open_], 1e-12)
        found[open_] = rest * weight / weight.sum()
        over = open_ & (found >= sizes)
        if not over.any():
            break
        found[over] = sizes[over]
        open_ &= ~over
        if not open_.any():
            break
    whole = np.floor(found + 1e-9).astype(np.int64)
    remainder = np.where(whole < sizes, found - whole, -1.0)
    whole[highest(remainder, budget - int(whole.sum()))] += 1
    return whole
