"""What a ticket holds, and what tickets of the same data share: JSON-ready."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from selection.errors import Refused
from selection.subset import Subset


def compare(subsets: Sequence[Subset], *, force: bool = False) -> dict[str, Any]:
    """What tickets share: JSON-ready.

    Returns:
        ``pairs``: for each two, by number, images that ``both`` keep, ``jaccard`` (of those that either keeps), the ``jaccard`` that
        two random tickets of their sizes would have (``by_chance``), and ``spearman`` of their scores, null where one has none;
        ``kept_by_all``, ``kept_by_any``; ``classes``: a row a class, with what each keeps of it, where labels are known.

    Raises:
        Refused: they are not of the same data.
    """
    first = subsets[0]
    for number, other in enumerate(subsets[1:], 2):
        if other.total != first.total:
            raise Refused(
                f"ticket {number}: of {other.total} images, and the first of {first.total}. They share no rows."
            )
        if not force:
            other.check(first.fingerprint, first.total, place=f"ticket {number}")
    masks = np.zeros((len(subsets), first.total), bool)
    for mask, subset in zip(masks, subsets, strict=True):
        mask[subset.rows] = True
    known = next((subset for subset in subsets if subset.labels is not None), None)
    return {
        "of": first.total,
        "kept": [len(subset) for subset in subsets],
        "kept_by_all": int(masks.all(0).sum()),
        "kept_by_any": int(masks.any(0).sum()),
        "pairs": [{"a": a, "b": b, **_pair(subsets[a], subsets[b])} for a, b in combinations(range(len(subsets)), 2)],
        "classes": [] if known is None else _by_class(known, subsets),
    }


def _pair(a: Subset, b: Subset) -> dict[str, Any]:
    both = len(np.intersect1d(a.rows, b.rows, assume_unique=True))
    chance = len(a) * len(b) / a.total
    return {
        "both": both,
        "jaccard": both / (len(a) + len(b) - both),
        "by_chance": chance / (len(a) + len(b) - chance),
        "spearman": None if a.scores is None or b.scores is None else spearman(a.scores, b.scores),
    }


def _by_class(known: Subset, subsets: Sequence[Subset]) -> list[dict[str, Any]]:
    """A row a class that has images: how many, and how many each ticket keeps, by the labels of ``known``."""
    labels = known.labels
    assert labels is not None
    size = len(known.classes) or int(labels.max()) + 1
    kept = [np.bincount(labels[subset.rows], minlength=size).tolist() for subset in subsets]
    names = known.classes or [str(label) for label in range(size)]
    counted = enumerate(np.bincount(labels, minlength=size).tolist())
    return [{"class": names[c], "of": of, "kept": [counts[c] for counts in kept]} for c, of in counted if of]


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Correlation of the ranks, ties at their mean rank; None where one has a single value."""
    ranks = []
    for values in (np.asarray(a), np.asarray(b)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        ranks.append(rank - rank.mean())
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale > 0 else None


def describe(subset: Subset) -> dict[str, Any]:
    """What a ticket holds: JSON-ready."""
    found: dict[str, Any] = {
        "kept": len(subset),
        "of": subset.total,
        "keep": subset.keep,
        "fingerprint": subset.fingerprint,
        "origin": subset.origin,
        "weights": {"low": float(subset.weights.min()), "high": float(subset.weights.max())},
        "classes": [],
        "scores": None,
    }
    if subset.labels is not None:
        size = len(subset.classes) or int(subset.labels.max()) + 1
        kept = np.bincount(subset.labels[subset.rows], minlength=size).tolist()
        of = np.bincount(subset.labels, minlength=size).tolist()
        names = subset.classes or tuple(str(label) for label in range(size))
        found["classes"] = [{"class": n, "kept": k, "of": o} for n, k, o in zip(names, kept, of, strict=True)]
    if subset.scores is not None:
        found["scores"] = {
            name: _quantiles(values)
            for name, values in (("kept", subset.scores[subset.rows]), ("dropped", subset.scores[subset.complement]))
            if len(values)
        }
    return found


def _quantiles(values: np.ndarray) -> dict[str, Any]:
    """Five of them, of the finite scores; how many are without bound."""
    finite = values[np.isfinite(values)].astype(np.float64)
    at = ("low", "q25", "median", "q75", "high")
    told = np.quantile(finite, (0, 0.25, 0.5, 0.75, 1)).tolist() if len(finite) else [None] * 5
    return {**dict(zip(at, told, strict=True)), "unbounded": len(values) - len(finite)}
