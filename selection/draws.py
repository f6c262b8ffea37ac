"""A picker at work: what it is told of each group of the images that it is handed, and what it gives back, checked."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from selection import methods
from selection.choices import Places
from selection.errors import Refused
from selection.limits import Limits
from selection.ranks import ranking
from selection.signals import CURES, Signals

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Weighed = tuple[Rows, Floats]
"""Rows, and how many images each stands for."""
Group = tuple[int, Rows, int]
"""A key, which no other group has; the rows; how many of them stay."""

# Streams of chance that must not repeat one another: seed, then one of these, then the key of the group.
QUOTAS, RANKING, PICK = 1, 2, 3


@dataclass(frozen=True, eq=False)
class Drawing:
    """All that is the same whichever group of the images the picker is handed."""

    signals: Signals
    values: Floats | None
    """(N,) scores, where the picker reads them."""
    limits: Limits
    """With the picker."""
    keep: float
    begun: Rows
    """Images that are in already."""
    seed: int
    places: Places

    def draw(self, group: Rows, quota: int, key: int, shares: Rows | None = None) -> Weighed:
        """``quota`` rows of a group, and their weights; those that are in already among them.

        Args:
            group: (g,) rows to draw from
            key: of its stream of chance
            shares: (C,) how many of each class, in the order of their labels, for a picker that keeps them itself

        Raises:
            Refused: more are in than are to stay; or a picker that does not return what it should.
        """
        inside = np.isin(group, self.begun)
        have = np.flatnonzero(inside)
        options = self.limits.options(len(group))
        short, left = len(have) > quota, None
        if shares is not None:
            of = np.unique(self.signals["labels"][group], return_inverse=True)[1]
            left = shares - np.bincount(of[have], minlength=len(shares))
            short = bool((left < 0).any())
            left = left[np.bincount(of[~inside], minlength=len(shares)) > 0]
        if short:
            raise Refused(
                f"{self.places.start}: it has {len(have)} of {len(group)} images (class {key}, where classes are balanced), and "
                f"{quota} are to stay. Keep more."
            )
        if not len(have) or "start" in methods.reads(self.limits.picker.function):
            return self._pick(group, have, quota, key, shares, options)
        if len(have) == quota:
            return group[have], np.ones(quota)
        # It adds to nothing: it is handed what is not in yet.
        rows, weights = self._pick(group[~inside], have[:0], quota - len(have), key, left, options)
        return np.concatenate([group[have], rows]), np.concatenate([np.ones(len(have)), weights])

    def _pick(self, group: Rows, have: Rows, quota: int, key: int, shares: Rows | None, options: Any) -> Weighed:
        picker, place = self.limits.picker.function, self.places.pick
        rng = np.random.default_rng([self.seed, PICK, key])
        known: dict[str, Any] = {"budget": quota, "keep": self.keep, "quotas": shares, "rng": rng, "start": have}
        if self.values is not None:
            known["scores"] = self.values[group]
            known["ranking"] = ranking(known["scores"], np.random.default_rng([self.seed, RANKING, key]))
        available: Any = ChainMap(known, self.signals.available(group))  # type: ignore[arg-type]
        here = {*known, *self.signals.known}
        taken = methods.call(picker, available, options, place=place, here=here, cures=CURES)
        rows, weights = _checked(taken, quota, len(group), have, f"{place} ({picker.__name__})")
        return group[rows], weights


def _checked(taken: Any, quota: int, n: int, have: Rows, place: str) -> Weighed:
    """What a picker gave for n images, of which ``have`` were in already."""
    rows, weights = taken if isinstance(taken, tuple) else (taken, np.ones(quota))
    rows, weights = np.asarray(rows), np.asarray(weights, dtype=np.float64)
    if rows.shape != (quota,) or rows.dtype.kind not in "iu" or len(np.unique(rows)) < quota:
        raise Refused(
            f"{place}: was to return {quota} distinct rows, and gave {len(np.unique(rows))} in {rows.dtype} {rows.shape}."
        )
    if rows.min() < 0 or rows.max() >= n:
        raise Refused(f"{place}: was to return rows of 0 to {n - 1}, and gave {rows.min()} to {rows.max()}.")
    if not np.isin(have, rows).all():
        raise Refused(f"{place}: was to keep the {len(have)} rows that it started from, and did not.")
    if weights.shape != (quota,) or not np.isfinite(weights).all() or weights.min() <= 0:
        raise Refused(f"{place}: was to return {quota} positive weights.")
    return rows, weights


def above_floor(
    floor: float, groups: Sequence[Group], budget: int, labels: Rows, draw: Callable[[Rows, int, int], Weighed]
) -> list[Weighed]:
    """Draws over all classes together in which none falls below its floor.

    Classes that a draw leaves below it get it, picked from alone; then the others are drawn from again with what is left, for
    some of them may be below theirs now. A draw that took fewer from those leaves room for the rest, so it always ends.
    """
    least = {key: math.ceil(floor * quota - 1e-9) for key, _, quota in groups}
    short: set[int] = set()
    rest, key = np.arange(len(labels)), 0
    while True:
        rows, weights = draw(rest, budget - sum(least[key] for key in short), key)
        kept = np.bincount(labels[rows], minlength=int(labels.max()) + 1)
        below = {key for key, _, _ in groups if key not in short and kept[key] < least[key]}
        if not below:
            alone = [draw(group, least[key], key) for key, group, _ in groups if key in short]
            return [(rows, weights), *alone]
        short |= below
        rest = np.flatnonzero(~np.isin(labels, list(short)))
        key = int(labels.max()) + 1  # another stream of chance than any class has
