"""What the planner goes by: rules that were measured, and the measurements. To mend a rule, edit this file alone.

All figures: CIFAR-10, ViT of 128 x 6, 8-pixel patches, Muon 3e-3 (2e-3 from given weights), batch 128, 10,000 test images, one
seed. Cost: MACs of all training images, 1.0 = 12 epochs of the dense model. ``python -m lotus.stages.plan_table`` prints
the tables of docs/planning.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from lotus.config.budget import Way

Start = Literal["scratch", "given"]


class Rule(NamedTuple):
    """Up to a budget: where a training that shrinks is cut, and to what where nobody says."""

    start: Start
    up_to: float
    """The largest budget, as a fraction of the dense training, that it is for."""
    at: float
    """Fraction of the optimizer steps of the training that shrinks before its cut (not of its cost)."""
    keep: float
    """Fraction of the MACs that stays."""


RULES = (
    # 0.08 to 0.35 ends at 74.51 and 0.12 to 0.25 at 74.96, where 0.20 to 0.35 ends at 73.93 and 0.33 to 0.50 at 71.06.
    Rule("scratch", math.inf, 0.10, 0.35),
    # 0.10 to 0.35 ends at 70.34, where the dense fine-tune of the same cost ends at 66.95.
    Rule("given", math.inf, 0.10, 0.35),
)
"""The first that fits is taken."""

TIE = 0.5
"""Points within which two ways are the same: one seed stands behind a figure, and 10,000 images have a standard error of 0.43 points.
A tie is the shrinking training's, which needs no choice of an architecture."""


class Seen(NamedTuple):
    """A measurement."""

    start: Start
    way: Way
    cost: float
    """Fraction of the dense training's MACs."""
    at: float | None
    keep: float
    """Fraction of the dense model's MACs that ships."""
    top1: float


SEEN = (
    Seen("scratch", "dense", 0.33, None, 1.00, 68.22),  # 4 epochs
    Seen("scratch", "dense", 1.00, None, 1.00, 77.72),  # 12 epochs
    Seen("scratch", "shrink", 0.34, 0.33, 0.50, 71.06),  # 6 epochs
    Seen("scratch", "shrink", 0.32, 0.20, 0.35, 73.93),  # 8 epochs
    Seen("scratch", "shrink", 0.34, 0.08, 0.35, 74.51),  # 10 epochs
    Seen("scratch", "shrink", 0.31, 0.12, 0.25, 74.96),  # 11 epochs
    Seen("scratch", "small", 0.34, None, 0.36, 74.63),  # 76 x 6, 11.3 epochs
    Seen("scratch", "small", 0.32, None, 0.26, 75.23),  # 64 x 6, 14.6 epochs
    # From the same model, trained on CIFAR-100 for 5 epochs.
    Seen("given", "dense", 0.083, None, 1.00, 66.95),  # 1 epoch
    Seen("given", "dense", 0.200, None, 1.00, 71.41),  # 2.4 epochs
    Seen("given", "shrink", 0.086, 0.10, 0.35, 70.34),  # 2.4 epochs
)


def rule(start: Start, budget: float) -> Rule:
    """What was measured to be best for ``budget``."""
    return next(one for one in RULES if one.start == start and budget <= one.up_to)


def nearest(start: Start, way: Way, cost: float, keep: float, at: float | None = None) -> Seen | None:
    """The measurement whose cost, size and cut are nearest, as ratios; None where there is none of that way."""

    def far(one: Seen) -> float:
        return (
            abs(math.log(one.cost / cost))
            + abs(math.log(one.keep / keep))
            + (abs(math.log(one.at / at)) if one.at and at else 0)
        )

    return min((one for one in SEEN if (one.start, one.way) == (start, way)), key=far, default=None)


def choose(start: Start, ways: Sequence[Way], cost: float, keep: float, at: float) -> tuple[Way, str]:
    """The way to take out of ``ways``, and why; the dense training only where nothing else is allowed."""
    allowed = [way for way in ways if way != "small" or start == "scratch"]
    if "shrink" not in allowed or "small" not in allowed:
        way = next(way for way in ("shrink", "small", "dense") if way in allowed)
        if start == "given" and way == "shrink":
            return way, "weights are given, and from them nothing that was measured comes near an early cut"
        return way, "of what budget.ways allows it is the best"
    cut, small = (nearest(start, way, cost, keep, at) for way in ("shrink", "small"))
    if cut is None or small is None:
        return "shrink", "nothing else was measured"
    told = f"a smaller model from scratch ended at {small.top1:.2f} %, a training that shrinks at {cut.top1:.2f} %"
    if small.top1 > cut.top1 + TIE:
        return "small", f"{told}, at about this cost and size"
    why = f", which is no difference beyond {TIE:g} points" if abs(small.top1 - cut.top1) <= TIE else ""
    return "shrink", f"{told}{why}, at about this cost and size"


def markdown() -> str:
    """Both tables, for docs/planning.md."""
    rules = (
        (one.start, "any" if one.up_to == math.inf else f"{one.up_to:g}", f"{one.at:g}", f"{one.keep:g}")
        for one in RULES
    )
    seen = (
        (
            one.start,
            one.way,
            f"{one.cost:g}",
            "" if one.at is None else f"{one.at:g}",
            f"{one.keep:g}",
            f"{one.top1:.2f}",
        )
        for one in SEEN
    )
    return "\n\n".join(
        [
            _table(("start", "budget up to", "cut at", "to, where nobody says"), rules),
            _table(("start", "way", "cost", "cut at", "MACs shipped", "top-1"), seen),
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(markdown())
