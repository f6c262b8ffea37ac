"""SHELF: one function a policy: which of n images stay, given what a score says of them.

A picker is handed one class at a time where classes are balanced (selection/lottery.py), else all images. It reads, by
parameter name:

* ``scores`` (n,) float64, higher = keep first, may hold +inf;
* ``ranking`` (n,) int64: the n rows, highest score first, ties in random order. Pickers do not sort scores themselves;
* ``budget``: how many rows it must return, 1 to n;
* ``keep``: the part of the whole data set that stays, in (0, 1];
* ``rng``: the one source of chance;
* any signal, of these n images, e.g. ``labels`` (n,), ``embeddings`` (n, D), ``p_label`` (S, E, n).

It returns ``budget`` distinct rows in [0, n), or those and their positive weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selection.errors import Refused

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

# Zheng et al. 2023, grid search on ImageNet-1k: the part cut off, by the part that is *not* kept. On CIFAR-10 they cut less
# (0, 0, 0.1, 0.1, 0.3), on CIFAR-100 more (0.1, 0.2, 0.2, 0.4, 0.5).
CCS_DROPPED = (0.3, 0.5, 0.7, 0.8, 0.9)
CCS_CUT = (0.0, 0.1, 0.2, 0.2, 0.3)


def top_k(ranking: Rows, budget: int) -> Rows:
    """The highest scores. For difficulty scores it is worse than chance where less than half stays (Zheng et al. 2023)."""
    return ranking[:budget]


def random(labels: Rows, budget: int, rng: np.random.Generator) -> Rows:
    """Any, all alike, whatever the score says. The bar for every other policy."""
    return rng.choice(len(labels), budget, replace=False)


def ccs(
    scores: Floats,
    ranking: Rows,
    budget: int,
    keep: float,
    rng: np.random.Generator,
    *,
    cut: float | None = None,
    bins: int = 50,
    binning: str = "width",
) -> Rows:
    """Coverage-centric: drop the hardest, then draw evenly along the score. Zheng et al. 2023 (arXiv 2210.15809), alg. 1.

    1. Drop the ``cut * n`` highest scores (floor).
    2. Divide the rest into bins by score.
    3. Go through the bins from the smallest to the largest; each gives all it has, or an even share of what is still to be
       drawn (floor), whichever is less.
    4. Draw uniformly inside a bin.

    Args:
        scores: hardest first. +inf joins the hardest bin that is left.
        cut: part of the n images to drop as too hard; None: the published one for ImageNet, in between by interpolation.
        bins: number of strata; no more than the budget, for the floor of step 3 would leave the smallest with nothing.
        binning: ``"width"``: equally wide in score, the paper's; ``"quantile"``: equally many images, for scores with outliers.

    Raises:
        Refused: a cut that leaves fewer images than are to stay.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise Refused(f"ccs(bins={bins!r}): a whole number of at least 1 is wanted.")
    if cut is None:
        cut = min(float(np.interp(1 - keep, CCS_DROPPED, CCS_CUT)), 1 - keep)
    elif isinstance(cut, bool) or not isinstance(cut, (int, float)) or not 0 <= cut <= 1 - keep + 1e-9:
        raise Refused(f"ccs(cut={cut!r}): with keep={keep:g}, a part from 0 to {1 - keep:g} can be cut off.")
    # Where a small class is rounded up to its budget, the budget goes before the cut. 1e-9: 0.29 * 100 is 28.99...
    dropped = min(int(cut * len(scores) + 1e-9), len(scores) - budget)
    rest = ranking[dropped:]
    bins = min(bins, budget)
    stratum = _strata(scores[rest], bins, binning)
    sizes = np.bincount(stratum, minlength=bins)
    chosen, left = [], budget
    for visited, bin_ in enumerate(np.argsort(sizes, kind="stable")):
        share = min(int(sizes[bin_]), left // (bins - visited))
        chosen.append(rng.choice(rest[stratum == bin_], share, replace=False))
        left -= share
    return np.concatenate(chosen)


def beta(
    scores: Floats,
    p_label: npt.NDArray[np.floating],
    budget: int,
    keep: float,
    rng: np.random.Generator,
    *,
    c_d: float = 4.0,
) -> Rows:
    """Draw by score times a Beta density that moves to easier images as fewer stay. Cho et al. 2025 (arXiv 2502.06905).

    P(i) is proportional to ``score_i * Beta(p_i; 16 - b, b)`` with ``b = 15 (1 - mu) (1 - r ** c_d)``, where p is the image's
    mean probability of its label, mu the mean of p over the ten highest scores and r the part that goes. Made for ``dual``.

    Args:
        scores: not negative; +inf counts as the highest finite one.
        p_label: (S, E, n).
        c_d: 4 for CIFAR (the authors' code), 11 for ImageNet.

    Raises:
        Refused: a negative score, which cannot be a probability.
    """
    if isinstance(c_d, bool) or not isinstance(c_d, (int, float)) or not 0 < c_d < np.inf:
        raise Refused(f"beta(c_d={c_d!r}): a positive number is wanted.")
    if scores.min() < 0:
        raise Refused(
            f"beta: draws in proportion to the score, and there is one of {scores.min():g}. Take dual, el2n, loss."
        )
    easy = p_label.mean(axis=(0, 1), dtype=np.float64)
    easy = easy.clip(1e-6, 1 - 1e-6)  # the density has poles at 0 and 1
    mu = easy[np.argpartition(-scores, min(10, len(scores)) - 1)[:10]].mean()
    b = 15 * (1 - mu) * (1 - (1 - keep) ** c_d)
    logs = np.log(np.maximum(_finite(scores), np.finfo(np.float64).tiny))
    logs += (15 - b) * np.log(easy) + (b - 1) * np.log1p(-easy)
    # The budget highest of log-weight plus Gumbel noise are a draw one by one without replacement, with no underflow.
    keys = logs + rng.gumbel(size=len(logs))
    return np.argpartition(-keys, budget - 1)[:budget]


def _finite(scores: Floats) -> Floats:
    """``scores`` with +inf as the highest finite one (0 where there is none)."""
    finite = scores[np.isfinite(scores)]
    return np.minimum(scores, finite.max() if len(finite) else 0.0)


def _strata(scores: Floats, bins: int, binning: str) -> Rows:
    """The bin in [0, bins) of each score, hardest bin first; ``scores`` come highest first."""
    if binning == "quantile":
        return np.arange(len(scores)) * bins // len(scores)
    if binning != "width":
        raise Refused(f"ccs(binning={binning!r}): bins are of one 'width', or 'quantile'.")
    easy = -_finite(scores)  # as the paper has it (AUM): the hardest lowest
    low, high = easy.min(), easy.max()
    if high == low:
        return np.zeros(len(scores), dtype=np.int64)
    return np.minimum(((easy - low) / (high - low) * bins).astype(np.int64), bins - 1)
