"""Nearest neighbors among many thousand: descriptors sorted into cells, so that not all are compared with all.

Q queries, N descriptors, D numbers each, all of length 1, K nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

BLOCK = 2048
_CELL, _LOOKED_IN = 256, 8
"""Descriptors in a cell, about; and cells that a query is looked for in."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Descriptors (N, D) around centers (an inverted file: Sivic and Zisserman, ICCV 2003). Up to 2,048 all are compared."""

    own: Floats
    centers: Floats
    members: list[Rows]

    @classmethod
    def of(cls, own: Floats) -> Cells:
        """Around a random sample, moved into the middle of what is nearest to it, twice."""
        count = max(1, len(own) // _CELL)
        centers = own[np.random.default_rng(0).permutation(len(own))[:count]]
        for turn in range(3):
            home = np.concatenate([(own[at : at + BLOCK] @ centers.T).argmax(1) for at in range(0, len(own), BLOCK)])
            order = np.argsort(home, kind="stable")
            members = np.split(order, np.cumsum(np.bincount(home, minlength=count))[:-1])
            if turn < 2:
                means = [own[rows].mean(0) if len(rows) else old for rows, old in zip(members, centers, strict=True)]
                centers = unit(np.stack(means))
        return cls(own, centers, members)

    def nearest(self, seen: Floats, count: int, floor: float = -2.0) -> tuple[Rows, Rows, Floats]:
        """Of queries (Q, D): rows of ``seen``, rows of ``own`` and their cosine, of the ``count`` nearest to each that are nearer
        than ``floor``; by rows of ``seen``, the nearest first."""
        cells = min(_LOOKED_IN, len(self.members))
        asked = np.argpartition(-(seen @ self.centers.T), cells - 1, axis=1)[:, :cells]
        found: list[tuple[Rows, Rows, Floats]] = []
        for cell, rows in enumerate(self.members):
            who = np.flatnonzero((asked == cell).any(1))
            if not len(who) or not len(rows):
                continue
            near = seen[who] @ self.own[rows].T
            best = np.argpartition(-near, min(count, len(rows)) - 1, axis=1)[:, :count]
            cosine = np.take_along_axis(near, best, 1)
            a, b = np.nonzero(cosine > floor)
            found.append((who[a], rows[best[a, b]], cosine[a, b]))
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        first, second, by = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((second, -by, first))
        first, second, by = first[order], second[order], by[order]
        few = np.arange(len(first)) - np.searchsorted(first, first) < count
        return first[few], second[few], by[few]


def unit(x: Floats) -> Floats:
    """Rows of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
