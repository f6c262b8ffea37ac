"""The smallest weights become zeros in one shot: ``prune.method: unstructured``.

The pruning of Sparse-ViT (2307.11988), and what essential sparsity (2306.03805) is measured by. Instant soup
(lotus/papers/soup) is another way to the same zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lotus.config import Rule
from lotus.papers.zeros import common
from lotus.way import Way

if TYPE_CHECKING:
    from lotus.stages.cut import Cutting, Uncut


def _make(
    uncut: Uncut, *, weights: Literal["linears", "sparse_vit"] = "linears", pattern: str = "", sweep: bool = False
) -> Cutting:
    """
    Args:
        weights: which may become zero: the blocks' matrices, or also patch embedding, norms and classifier
        pattern: keep N of every M neighbors, e.g. ``2:4``, instead of the largest of all
        sweep: also measure the trained model at sparsities from 0 to 90 %, to see where accuracy breaks
    """
    from lotus.papers.zeros.one_shot import one_shot

    return (yield from one_shot(uncut, weights=weights, pattern=pattern, sweep=sweep))


WAY = Way(
    "unstructured",
    common.says,
    _make,
    cuts=False,
    check=common.check,
    forecast=common.looks,
    hold=common.hold,
    tell=common.tell,
)


def _part(pattern: str) -> float | None:
    """N / M of a pattern N:M; None where it is none."""
    n, _, m = pattern.partition(":")
    return int(n) / int(m) if n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) else None


def _ours(request: object) -> str:
    """The pattern that is asked for."""
    method = request.method  # type: ignore[attr-defined]
    return str(method.options.get("pattern", "")) if method.name == "unstructured" else ""


_ZEROS = "prune.method={name: unstructured, pattern: '%s'} prune.keep.weights=0.5"

RULES = (
    *common.rules("unstructured"),
    Rule("Prune", "method.pattern", lambda it: bool(_ours(it)) and _part(_ours(it)) is None,
         "is N:M, e.g. 2:4, which keeps 2 of every 4",
         _ZEROS % "4:2", _ZEROS % "2:4"),
    Rule("Prune", "method.pattern",
         lambda it: _part(_ours(it)) is not None and it.keep.weights != _part(_ours(it)),
         "keeps N of M weights. Say that very part in {place}.keep.weights, e.g. 0.5 for 2:4",
         _ZEROS % "1:4", _ZEROS % "2:4"),
)  # fmt: skip
