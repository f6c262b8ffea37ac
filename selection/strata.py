"""What a cut drops of a ranking, and the strata of what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from selection.errors import Refused
from selection.methods import check_choice

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

# Zheng et al. 2023, grid search on ImageNet-1k: the part cut off, by the part that is *not* kept. On CIFAR-10 they cut less
# (0, 0, 0.1, 0.1, 0.3), on CIFAR-100 more (0.1, 0.2, 0.2, 0.4, 0.5).
CCS_DROPPED = (0.3, 0.5, 0.7, 0.8, 0.9)
CCS_CUT = (0.0, 0.1, 0.2, 0.2, 0.3)

_LARGE = 1e-6 * float(np.finfo(np.float64).max)


def ccs_cut(keep: float) -> float:
    """The part to cut off that was published for the part kept."""
    return min(float(np.interp(1 - keep, CCS_DROPPED, CCS_CUT)), 1 - keep)


def cut_off(method: str, cut: Any, keep: float, n: int, budget: int) -> int:
    """How many of n images a cut drops; no more than leave ``budget``.

    Raises:
        Refused: a cut that leaves less than the part ``keep``.
    """
    if isinstance(cut, bool) or not isinstance(cut, (int, float)) or not 0 <= cut <= 1 - keep + 1e-9:
        raise Refused(f"{method}(cut={cut!r}): with keep={keep:g}, a part from 0 to {1 - keep:g} can be cut off.")
    # Where a small class is rounded up to its budget, the budget goes before the cut. 1e-9: 0.29 * 100 is 28.99...
    return min(int(cut * n + 1e-9), n - budget)


def finite(scores: Floats) -> Floats:
    """``scores`` with +inf as the highest finite one (0 where there is none), and none so large that a sum of some overflows."""
    known = scores[np.isfinite(scores)]
    return np.minimum(scores, known.max() if len(known) else 0.0).clip(-_LARGE, _LARGE)


def strata(scores: Floats, bins: int, binning: str) -> Rows:
    """The bin in [0, bins) of each score, hardest bin first; ``scores`` come highest first."""
    check_choice(binning, ("width", "quantile"), place="ccs(binning)")
    if binning == "quantile":
        return np.arange(len(scores)) * bins // len(scores)
    easy = -finite(scores)  # as the paper has it (AUM): the hardest lowest
    low, high = easy.min(), easy.max()
    if high == low:
        return np.zeros(len(scores), dtype=np.int64)
    binned: Rows = np.minimum(((easy - low) / (high - low) * bins).astype(np.int64), bins - 1)
    return binned


def k_means(values: Floats, groups: int) -> Rows:
    """The group of each, 0 the lowest: k-means in one dimension, from the quantiles."""
    order = np.sort(values)
    centers = np.quantile(order, (np.arange(groups) + 0.5) / groups)
    sums = np.concatenate([[0.0], np.cumsum(order)])
    for _ in range(100):
        edges = np.searchsorted(order, (centers[1:] + centers[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [len(order)]])
        counts = np.diff(bounds)
        means = np.diff(sums[bounds]) / np.maximum(counts, 1)
        after = np.where(counts > 0, means, centers)
        if np.array_equal(after, centers):
            break
        centers = after
    return np.searchsorted((centers[1:] + centers[:-1]) / 2, values, side="right")
