"""A joint budget of images and patches: easy images get few patches, hard ones many, and all of them together a fixed sum.

Nobody has published this one; it is LOTUS' own. Each image's wish is a share of its patches in proportion to its rank by
score, no less than ``least`` and no more than all. Shares are rounded to a few levels, so that images of one level make
batches that stay rectangular. One factor before all wishes is solved for, so that the budget is met.

Shapes: N images, n patches of each, L levels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selection.errors import Refused
from selection.ranks import ranking


class Allotment(NamedTuple):
    """How many patches each image gets."""

    levels: npt.NDArray[np.int64]
    """(L,) numbers of patches, rising."""
    level: npt.NDArray[np.int64]
    """(N,) the level of each image, counted from 0."""

    @property
    def total(self) -> int:
        """Patches of all images together."""
        return int(self.levels[self.level].sum())


def levels(patches: int, buckets: int, least: float) -> npt.NDArray[np.int64]:
    """``buckets`` whole numbers, evenly from ``least`` of the patches (rounded up) to all of them; fewer where they coincide."""
    lowest = max(1, int(np.ceil(least * patches - 1e-9)))
    return np.unique(np.rint(np.linspace(lowest, patches, buckets)).astype(np.int64))


def allot(
    scores: npt.ArrayLike, *, patches: int, keep: float, buckets: int = 3, least: float | None = None, seed: int = 0,
    place: str = "joint",
) -> Allotment:  # fmt: skip
    """Share ``round(keep * N * n)`` patches among the images, by the ranks of their scores.

    The image of rank r (0 for the lowest score) wishes for ``factor * (r + 1/2) / N`` of its patches, at least ``least`` and
    at most all, and gets the nearest level. ``factor`` is the largest that the budget bears: what is left of it would not
    bring one more image to its next level.

    Args:
        scores: (N,), higher = more patches; ties in random order, may hold infinities
        patches: n
        keep: the mean fraction of its patches that an image gets, in (0, 1)
        buckets: levels, at least 2
        least: fraction of its patches that an image gets at least; None: half of ``keep``
        seed: of the order of ties
        place: what messages begin with

    Raises:
        Refused: the least is not below the mean; NaN among the scores; fewer than two levels.
    """
    scores = np.asarray(scores, np.float64)
    least = keep / 2 if least is None else least
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise Refused(f"{place}: a score for each image is needed, and none of them NaN. Take another score.")
    steps = levels(patches, buckets, least)
    images, budget = len(scores), round(keep * len(scores) * patches)
    if len(steps) < 2 or steps[0] * images >= budget:
        raise Refused(
            f"{place}.least: {least:g} of {patches} patches leaves nothing to share out at keep {keep:g} and {buckets} buckets. "
            "Lower it."
        )
    rank = np.empty(images, np.int64)
    rank[ranking(scores, np.random.default_rng(seed))[::-1]] = np.arange(images)
    # At which factor each image rises above each level: where its wish passes the middle between that and the next.
    middles = (steps[:-1] + steps[1:]) / 2
    rises = (middles[:, None] * images / (patches * (np.arange(images) + 0.5))).ravel()
    cost = np.repeat(np.diff(steps), images)
    # A stable sort, the hardest image first among equal factors: an image passes its levels in their order.
    order = np.lexsort((-np.tile(np.arange(images), len(middles)), rises))
    affordable = np.searchsorted(np.cumsum(cost[order]), budget - steps[0] * images, side="right")
    by_rank = np.bincount(order[:affordable] % images, minlength=images)
    return Allotment(steps, by_rank[rank])
