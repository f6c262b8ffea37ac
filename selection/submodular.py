"""Greedy maximization of functions whose gains only fall, apart from what is maximized.

Three ways, one result: *lazy* looks again only at what leads, *stochastic* at a random few, *in rounds* at a leading group
through one matrix product. Facility location is held dense, as near neighbors, or not at all.

Legend: n images, k neighbors, D width.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from selection.gradients import EVERY
from selection.memory import GB
from selection.neighbors import Kernel, slices

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


class Function(Protocol):
    """A set function whose gains only fall as the set grows (submodular); it holds the set."""

    at_once: int
    """Candidates that are best looked at in one call."""

    def __len__(self) -> int: ...

    def gains(self, rows: Rows | None = None) -> Array:
        """What each of ``rows`` (all of them: None) would add: float64."""

    def add(self, row: int) -> None:
        """Take ``row`` into the set."""


def lazy(function: Function, budget: int, *, order: Rows, start: Sequence[int] = ()) -> list[int]:
    """Greedy, exactly, looking again only at what leads. Minoux 1978.

    A gain that was once computed bounds what it is now from above. The row that still leads once it is computed anew is the best.

    Args:
        function: what is to be as large as it can be.
        budget: how many to take, those of ``start`` counted.
        order: a permutation of the rows: of equal gains, the row that stands first in it.
        start: rows that are in the set from the beginning; they count.

    Returns:
        ``budget`` rows in the order in which they were taken.
    """
    chosen = [int(row) for row in start]
    for row in chosen:
        function.add(row)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    inside = set(chosen)
    gains = function.gains().tolist()
    heap = [(-gains[row], at, row) for row, at in enumerate(place.tolist()) if row not in inside]
    heapq.heapify(heap)
    known = [len(chosen)] * len(order)  # size of the set when the gain was computed
    while len(chosen) < budget:
        if known[heap[0][2]] == len(chosen):
            row = heapq.heappop(heap)[2]
            function.add(row)
            chosen.append(row)
            continue
        stale: list[tuple[int, int]] = []
        while heap and len(stale) < function.at_once and known[heap[0][2]] < len(chosen):
            stale.append(heapq.heappop(heap)[1:3])
        rows = [row for _, row in stale]
        for (at, row), gain in zip(stale, function.gains(np.array(rows)).tolist(), strict=True):
            heapq.heappush(heap, (-gain, at, row))
            known[row] = len(chosen)
    return chosen


def stochastic(
    function: Function, budget: int, rng: np.random.Generator, *, epsilon: float = 0.05, start: Sequence[int] = ()
) -> list[int]:
    """Greedy among a random few. Mirzasoleiman et al. 2015 (arXiv 1409.7938).

    Each step looks at ``n / budget * ln(1 / epsilon)`` rows that are not in the set, so that some ``n ln(1 / epsilon)`` gains
    are computed in all: in expectation within ``epsilon`` of what greedy is sure of.
    """
    chosen = [int(row) for row in start]
    for row in chosen:
        function.add(row)
    outside = np.setdiff1d(np.arange(len(function)), chosen)
    looks = math.ceil(len(function) / budget * math.log(1 / epsilon))
    while len(chosen) < budget:
        at = rng.choice(len(outside), min(looks, len(outside)), replace=False)
        best = at[int(function.gains(outside[at]).argmax())]
        row = int(outside[best])
        function.add(row)
        chosen.append(row)
        outside[best] = outside[-1]
        outside = outside[:-1]
    return chosen


class FacilityLocation:
    """How well each image is represented by the one in the set that is most like it: the sum of ``max_j s_ij``.

    With a matrix its rows are read; without one they are computed as they are asked for.

    Args:
        matrix: similarities as :func:`dense` gives them: not negative, (n, n); None: ``kernel`` is asked.
        stands: (n,) how many images each counts for; None: one.
    """

    at_once = 8

    def __init__(self, kernel: Kernel, matrix: Array | None = None, stands: Array | None = None) -> None:
        self.kernel, self.matrix, self.stands = kernel, matrix, stands
        # An image that nothing represents counts as one that is represented as badly as can be. Without a matrix that is not
        # known; it moves the first pick only, and so a bound does.
        least = 0.0 if matrix is not None else min(0.0, float(kernel.block(np.array([0])).min()) * 2)
        self.cover = np.full(len(kernel), least, np.float32)  # (n,) similarity to the most alike in the set

    def __len__(self) -> int:
        return len(self.kernel)

    @property
    def value(self) -> float:
        return float((self.cover if self.stands is None else self.cover * self.stands).sum(dtype=np.float64))

    def gains(self, rows: Rows | None = None) -> Array:
        if rows is None:
            rows = np.arange(len(self))
        found = np.empty(len(rows))
        for part in slices(len(rows), len(self)):
            block = self._rows(rows[part])
            block -= self.cover
            np.maximum(block, 0, out=block)
            found[part] = block.sum(1) if self.stands is None else block @ self.stands
        return found

    def add(self, row: int) -> None:
        np.maximum(self.cover, self._rows(np.array([row]))[0], out=self.cover)

    def _rows(self, rows: Rows) -> Array:
        return self.kernel.block(rows, EVERY) if self.matrix is None else self.matrix[rows]


def dense(kernel: Kernel) -> Array:
    """All similarities, shifted so that the least is 0: (n, n) float32. Look at :func:`need` first."""
    n = len(kernel)
    matrix = np.empty((n, n), np.float32)
    for part in slices(n, n):
        matrix[part] = kernel.block(part)
    matrix -= matrix.min()
    return matrix


def need(n: int) -> float:
    """GB that :func:`dense` takes."""
    return 4 * n * n / GB


def neighborhood(n: int, budget: int, neighbors: int | None) -> int:
    """How many neighbors an image has, itself included; None: 32, or twice ``n / budget`` where that is more."""
    return min(n, 1 + (neighbors or max(32, math.ceil(2 * n / budget))))


def need_sparse(n: int, k: int) -> float:
    """GB that :class:`SparseFacilityLocation` takes, with the search for the k neighbors."""
    return 40 * n * k / GB


class Rounds(Protocol):
    """A greedy choice whose n values only fall, given a group at a time."""

    values: Array
    """(n,) upper bounds of what each row is worth now; -inf once it is taken."""

    def open(self, group: Rows) -> Array:
        """What each row of ``group`` is worth, exactly; the array is kept and changed by :meth:`take`."""

    def take(self, at: int) -> None:
        """The row at place ``at`` of the group is taken: bring the others of the group up to date. It is marked by the caller."""

    def close(self, taken: Rows) -> None:
        """The rows ``taken`` (there may be none) were taken: bring ``values`` up to date, or leave bounds that still hold."""

    def begin(self, rows: Rows) -> None:
        """``rows`` are in the set before the first round."""


def in_rounds(greedy: Rounds, budget: int, chosen: list[int], *, group: int = 512, most: int = 4096) -> list[int]:
    """Greedy, exactly, in rounds: the leading rows compete among themselves for as long as the best of them is worth no less
    than any row outside can be; then all are brought up to date at once, by a matrix product in place of many vector products.

    Args:
        greedy: what holds and updates the gains.
        budget: how many to take, ``chosen`` counted.
        chosen: rows that are taken already; extended and returned.
        group: rows in the first round; more while rounds end for want of rows, fewer while they end after a few.
        most: rows in a round at most.
    """
    n = len(greedy.values)
    while len(chosen) < budget:
        size = min(group, n)
        leading = np.argpartition(-greedy.values, size - 1)[:size]
        leading.sort()  # of equals the lowest row, as argmax has it
        if size < n:
            outside = greedy.values.copy()
            outside[leading] = -np.inf
            bar = outside.max()
        else:
            bar = -np.inf
        worth = greedy.open(leading)
        taken: list[int] = []
        while len(chosen) + len(taken) < budget and len(taken) < size:
            best = int(worth.argmax())
            if worth[best] < bar or worth[best] == -np.inf:
                break
            taken.append(int(leading[best]))
            greedy.take(best)
            worth[best] = -np.inf
        chosen.extend(taken)
        greedy.close(np.array(taken, dtype=np.int64))
        if len(taken) > size // 2:
            group = min(most, 2 * group)
        elif len(taken) < size // 16:
            group = max(64, group // 2)
    return chosen


class SparseFacilityLocation:
    """Facility location in which an image can be represented by its k nearest only.

    What no neighbor represents counts as represented as well as by the last of them, which bounds the truth from above: a gain
    is what an image adds to *that*. A pick changes the gains of its neighbors' neighbors alone, and so all are kept up to date.

    Args:
        index, similar: as :func:`selection.neighbors.nearest` gives them: (n, k).
        stands: (n,) how many images each counts for; None: one.
    """

    def __init__(self, index: Array, similar: Array, stands: Array | None = None) -> None:
        n, _ = index.shape
        self.index, self.above = index, similar - similar[:, -1:]  # (n, k), at least 0
        if stands is not None:
            self.above *= stands[:, None].astype(np.float32)
        # Sorted as one number each, which is many times as fast as an argsort: whom j can represent stands in
        # rows[first[j]:first[j + 1]].
        pairs = np.sort((index.astype(np.int64) << 32 | np.arange(n)[:, None]).ravel())
        self.first = np.searchsorted(pairs, np.arange(n + 1) << 32)
        self.rows = (pairs & 0xFFFFFFFF).astype(np.int32)
        self.values = np.bincount(index.ravel(), self.above.ravel(), n)
        self.cover = np.zeros(n, np.float32)

    def open(self, group: Rows) -> Array:
        self._group, self._worth = group, self.values[group]
        return self._worth

    def take(self, at: int) -> None:
        self._add(int(self._group[at]))
        np.take(self.values, self._group, out=self._worth)

    def close(self, taken: Rows) -> None:
        """Nothing is left to do."""

    def begin(self, rows: Rows) -> None:
        for row in rows.tolist():
            self._add(row)

    def _add(self, row: int) -> None:
        of = self.rows[self.first[row] : self.first[row + 1]]
        near, above = self.index[of], self.above[of]  # (m, k)
        reached = above[near == row]  # (m,): everyone has ``row`` once
        better = reached > self.cover[of]
        of, near, reached = of[better], near[better], reached[better]
        # In double precision differences of single precision, and their sums, are exact: gains that are equal stay so.
        before = self.cover[of, None].astype(np.float64)
        lost = np.clip(above[better], before, reached[:, None]) - before
        np.subtract.at(self.values, near.ravel(), lost.ravel())
        self.cover[of] = reached
        self.values[row] = -np.inf


class FarthestFirst:
    """Each image is worth its squared distance to the nearest that is taken."""

    def __init__(self, features: Array) -> None:
        self.features = features  # (n, D) float32
        self.squares = np.einsum("nd,nd->n", features, features)
        self.values = np.full(len(features), np.inf, np.float32)

    def open(self, group: Rows) -> Array:
        self._worth = self.values[group]
        members, squares = self.features[group], self.squares[group]
        self._apart = members @ members.T
        self._apart *= -2
        self._apart += squares
        self._apart += squares[:, None]
        return self._worth

    def take(self, at: int) -> None:
        np.minimum(self._worth, np.maximum(self._apart[at], 0), out=self._worth)

    def close(self, taken: Rows) -> None:
        if not len(taken):
            return
        centers, squares = -2 * self.features[taken], self.squares[taken]
        for part in slices(len(self.features), len(taken)):
            apart = self.features[part] @ centers.T
            apart += squares
            nearest = apart.min(1) + self.squares[part]
            np.minimum(self.values[part], np.maximum(nearest, 0), out=self.values[part])
        self.values[taken] = -np.inf

    begin = close


class GraphCut:
    """``balance * sum_i sum_{j in S} s_ij - sum_{j,l in S} s_jl`` with ``s = (1 + cos) / 2``, which needs no matrix.

    The similarity is an inner product, and so its sums are: of an image with many, one product with their sum.
    """

    def __init__(self, unit: Array, balance: float) -> None:
        self.unit = unit  # (n, D) float32, length 1
        self.values = balance * self._to(unit.sum(0), len(unit)) - 1

    def _to(self, total: Array, count: int) -> Array:
        """(n,) the similarity of each to ``count`` images with the sum ``total``, added up."""
        return 0.5 * (count + (self.unit @ total).astype(np.float64))

    def open(self, group: Rows) -> Array:
        self._worth = self.values[group]
        members = self.unit[group]
        self._alike = members @ members.T
        self._alike += 1  # twice the similarity
        return self._worth

    def take(self, at: int) -> None:
        self._worth -= self._alike[at]

    def close(self, taken: Rows) -> None:
        self.values -= 2 * self._to(self.unit[taken].sum(0), len(taken))
        self.values[taken] = -np.inf

    begin = close


class LogDet:
    """``log det(I + K / ridge)`` of the kernel ``K = <h_i, h_j>`` among the images in the set: its volume.

    With ``M = I + sum_{j in S} h_j h_j^T / ridge`` (D, D) image i adds ``log(1 + q_i / ridge)``, ``q_i = h_i^T M^-1 h_i``: what of
    it the set does not span. Values are the q, and bounds until they are looked at: nothing of size n is computed for a pick.
    """

    def __init__(self, features: Array, ridge: float) -> None:
        self.features, self.ridge = features, ridge  # (n, D) float32
        self.inverse = np.eye(features.shape[1])
        self.values = np.einsum("nd,nd->n", features, features).astype(np.float64)
        self.gains: list[float] = []
        """What each row that was taken added, in order."""

    def open(self, group: Rows) -> Array:
        self._group, self._members = group, self.features[group].astype(np.float64)
        worth: Array = np.einsum("nd,nd->n", self._members @ self.inverse, self._members)
        worth[self.values[group] == -np.inf] = -np.inf
        self._worth = worth
        return worth

    def take(self, at: int) -> None:
        worth = float(self._worth[at])
        turned = self.inverse @ self._members[at]  # (D,)
        self.inverse -= np.outer(turned, turned) / (self.ridge + worth)
        self._worth -= (self._members @ turned) ** 2 / (self.ridge + worth)
        self.gains.append(math.log1p(max(worth, 0.0) / self.ridge))

    def close(self, taken: Rows) -> None:
        self.values[self._group] = self._worth
        self.values[taken] = -np.inf

    def begin(self, rows: Rows) -> None:
        if len(rows):
            self.open(rows)
            for at in range(len(rows)):
                self.take(at)
            self.close(rows)
