"""How a budget of images is shared among the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from selection.errors import Refused
from selection.methods import nearest

Rows = npt.NDArray[np.int64]

BALANCES = ("fraction", "equal", "sqrt")
"""The same fraction of each class; as many of each; as many as the square root of its size is of all."""


def balance_of(balance: Any, place: str) -> str:
    """One of :data:`BALANCES`, or an empty text where classes are not balanced.

    Args:
        balance: that; True: ``"fraction"``; False: not balanced
        place: where it is set, for a refusal to name

    Raises:
        Refused: it is none of these.
    """
    if isinstance(balance, (bool, np.bool_)):
        return BALANCES[0] if balance else ""
    if balance not in BALANCES:
        raise Refused(
            f"{place}: there is no {balance!r}.{nearest(str(balance), BALANCES)} Here: {', '.join(BALANCES)}, false."
        )
    return str(balance)


def quotas(sizes: npt.ArrayLike, budget: int, rng: np.random.Generator, balance: str = "fraction") -> Rows:
    """Share ``budget`` among classes, at least one image a class.

    Exact: they sum to ``budget``, and none is above its size. ``fraction``: in proportion to their sizes, by largest remainder;
    each is within one of ``budget * size / sum(sizes)`` but where the least of one image moves it. ``equal`` and ``sqrt``:
    there is a level t so that each is within one of ``t`` and ``t * sqrt(size)``, or is the class's size where that is less, and
    one where that is more: what small classes cannot give, the others do. Equal remainders are served in random order.

    Args:
        sizes: (C,) images of each class, at least 1 each.
        budget: C to ``sum(sizes)``.
        rng: of that order.
        balance: one of :data:`BALANCES`.
    """
    order = rng.permutation(np.size(sizes))
    mixed = np.asarray(sizes, dtype=np.int64)[order]
    found = _proportional(mixed, budget) if balance == "fraction" else _leveled(mixed, budget, balance)
    result = np.empty_like(found)
    result[order] = found
    return result


def _proportional(sizes: Rows, budget: int) -> Rows:
    whole = int(sizes.sum())
    shares: Rows = np.maximum(1, sizes * budget // whole)
    missing = budget - int(shares.sum())
    for _ in range(abs(missing)):  # fewer than there are classes
        behind = sizes * budget - shares * whole  # in parts of an image: integers, hence exact
        if missing > 0:
            shares[np.argmax(np.where(shares < sizes, behind, np.iinfo(np.int64).min))] += 1
        else:
            shares[np.argmin(np.where(shares > 1, behind, np.iinfo(np.int64).max))] -= 1
    return shares


def _leveled(sizes: Rows, budget: int, balance: str) -> Rows:
    """Shares of ``clip(t w, 1, size)``, with w 1 or the root of the size and t such that they sum to the budget."""
    weights = np.ones(len(sizes)) if balance == "equal" else np.sqrt(sizes)
    low, high = 0.0, float((sizes / weights).max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * weights, 1, sizes).sum() < budget else (low, middle)
    wanted = np.clip(high * weights, 1, sizes)
    shares: Rows = np.floor(wanted + 1e-9).astype(np.int64)
    behind = np.where(shares < sizes, wanted - shares, -np.inf)
    shares[np.argsort(-np.round(behind, 6), kind="stable")[: budget - int(shares.sum())]] += 1
    return shares
