"""Facility location, whichever way it is maximized: the images that represent all, and whom each of them represents.

Legend: n images, k neighbors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from selection import bounds
from selection.memory import within
from selection.methods import check_choice
from selection.neighbors import Kernel, nearest, slices
from selection.submodular import (
    FacilityLocation,
    SparseFacilityLocation,
    dense,
    in_rounds,
    lazy,
    need,
    need_sparse,
    neighborhood,
    stochastic,
)  # fmt: skip

Rows = npt.NDArray[np.int64]
Maximizer = Literal["auto", "lazy", "sparse", "stochastic"]


@dataclass(frozen=True)
class Way:
    """How it is maximized: settings of the pickers that do."""

    maximizer: Maximizer = "auto"
    """``"lazy"``: exactly greedy, with all n^2 similarities in memory; ``"sparse"``: exactly greedy over the nearest neighbors of
    each image only; ``"stochastic"``: greedy among a random few; ``"auto"``: lazy where ``max_memory`` allows, else sparse."""
    neighbors: int | None = None
    """For sparse; None: 32, or twice ``n / budget`` where that is more, so that neighborhoods overlap."""
    epsilon: float = 0.05
    """For stochastic: the fraction of the value that may be lost."""
    max_memory: float = 0.5
    """GB. What would take more is refused before it is begun."""

    def check(self, method: str) -> None:
        """Raises:
        Refused: a setting that cannot be.
        """
        check_choice(self.maximizer, get_args(Maximizer), place=f"{method}(maximizer)")
        bounds.number(method, "epsilon", self.epsilon, 1e-6, 1 - 1e-6)
        bounds.number(method, "max_memory", self.max_memory, 0)
        if self.neighbors is not None:
            bounds.count(method, "neighbors", self.neighbors)


def represent(
    method: str,
    kernel: Kernel,
    budget: int,
    rng: np.random.Generator,
    start: list[int],
    way: Way,
    stands: npt.NDArray[np.float64] | None = None,
) -> tuple[Rows, Callable[[Rows], Rows]]:
    """Facility location over ``kernel``: the rows, and a function that says which of them (its number) each image is nearest to.

    Args:
        method: what a refusal calls it
        budget: how many to take of the n
        rng: of what is drawn at random
        start: rows that are in from the beginning, and count
        way: how it is maximized
        stands: (n,) how many images each of them counts for; None: one
    """
    way.check(method)
    n, max_memory, maximizer = len(kernel), way.max_memory, way.maximizer
    if maximizer == "auto":
        maximizer = "lazy" if need(n) <= max_memory else "sparse"
    if maximizer == "lazy":
        what = f"{method}: the similarities of {n} images with one another"
        within(max_memory, need(n), what, "Take maximizer=sparse, balance the classes")
        similar = dense(kernel)
        rows = lazy(FacilityLocation(kernel, similar, stands), budget, order=np.arange(n), start=start)
        return np.array(rows), lambda of: similar[of].argmax(0)
    if maximizer == "stochastic":
        matrix = dense(kernel) if need(n) <= max_memory else None
        rows = stochastic(FacilityLocation(kernel, matrix, stands), budget, rng, epsilon=way.epsilon, start=start)
        return np.array(rows), lambda of: _closest(kernel, of, np.arange(n))
    k = neighborhood(n, budget, way.neighbors)
    what = f"{method}: the {k - 1} nearest of each of {n} images"
    within(max_memory, need_sparse(n, k), what, "Take fewer neighbors, maximizer=stochastic, balance the classes")
    index, similar = nearest(kernel, k, rng)
    greedy = SparseFacilityLocation(index, similar, stands)
    greedy.begin(np.array(start, np.int64))
    rows = in_rounds(greedy, budget, list(start))

    def closest(of: Rows) -> Rows:
        number = np.full(n, -1)
        number[of] = np.arange(len(of))
        known = number[index] >= 0  # neighbors are in order, the most similar first
        found: Rows = number[index[np.arange(n), known.argmax(1)]]
        alone = np.flatnonzero(~known.any(1))
        found[alone] = _closest(kernel, of, alone)
        return found

    return np.array(rows), closest


def _closest(kernel: Kernel, of: Rows, rows: Rows) -> Rows:
    """The number in ``of`` of the one most similar to each of ``rows``."""
    found = np.empty(len(rows), np.int64)
    for part in slices(len(rows), len(of)):
        found[part] = kernel.block(rows[part], of).argmax(1)
    return found
