"""What the planner goes by: rules, and what was measured. Cells lie in measured.csv beside this file, a line each.

    python -m lotus.stages.plan_table runs/cheaper/cells.jsonl    # adds those that benchmarks/cheaper.py has measured since
    python -m lotus.stages.plan_table > docs/measured.md          # prints the page

Cost: MACs of everything, 1 is the dense training by the textbook's length (12 epochs of CIFAR-10).
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lotus.config.training_budget import Strategy
from lotus.files import write_text

Start = Literal["scratch", "given"]

FILE = Path(__file__).with_name("measured.csv")

USUAL = "cifar10"
"""Whose cells are asked where the images at hand have none."""

MARGIN = 0.5
"""Points by which a training that shrinks has to end above a smaller model from scratch, at equal cost and MACs, to be taken."""

_WAYS = {"dense": "dense", "lotus": "shrink", "narrow": "small"}
"""Arms of benchmarks/cheaper.py."""

_OWN = (
    "select.keep", "baseline", "train.evaluate_every", "train.sparsity.gates", "train.shrink", "train.epochs", "train.warmup", "train.lr",
    "prune.keep.macs", "model.args", "model.weights", "train.precision",
)  # fmt: skip
"""What these arms set, and the precision, which was seen to change no accuracy. A cell with more was measured by another recipe."""

_DIGITS = {"cost": 4, "keep": 3, "at": 4}


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
    # Cells are cut at 0.05 to 0.09, as whole epochs at a given cost have it; no other cut was measured with this recipe.
    Rule("scratch", math.inf, 0.10, 0.30),
    Rule("given", math.inf, 0.10, 0.30),
)
"""The first that fits is taken."""


class Cell(NamedTuple):
    """A training that was measured."""

    data: str
    start: Start
    way: Strategy
    budget: float
    """That was asked for; :attr:`cost` is as near as whole epochs came."""
    seed: int
    cost: float
    """Fraction of the dense training's MACs."""
    at: float | None
    keep: float
    """Fraction of the dense model's MACs that ships."""
    top1: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """What cells that differ in their seed alone have in common."""
        at = None if self.at is None else round(self.at, 3)
        return (self.data, self.start, self.way, self.budget, at, size(self.keep))


class Seen(NamedTuple):
    """The mean of the cells that differ in their seed alone."""

    data: str
    start: Start
    way: Strategy
    cost: float
    at: float | None
    keep: float
    top1: float
    n: int
    """Seeds."""


def size(keep: float) -> float:
    """``keep`` to the next twentieth: budgets are met from below, by a little."""
    return max(round(20 * keep), 1) / 20


@cache
def cells() -> tuple[Cell, ...]:
    """What stands in the file.

    Raises:
        ValueError: a line is no cell.
    """
    return tuple(_cell(line) for line in csv.DictReader(io.StringIO(FILE.read_text(encoding="utf-8"))))


def _cell(line: Mapping[str, str]) -> Cell:
    found = Cell(
        line["data"], line["start"], line["way"], float(line["budget"]), int(line["seed"]), float(line["cost"]),  # type: ignore[arg-type]
        float(line["at"]) if line["at"] else None, float(line["keep"]), float(line["top1"]),
    )  # fmt: skip
    if found.start not in get_args(Start) or found.way not in get_args(Strategy):
        raise ValueError(f"{FILE.name}: {line} is no cell")
    return found


def means() -> tuple[Seen, ...]:
    """Over the seeds, in the order of data, start, way and cost."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for one in cells():
        groups.setdefault(one.kind, []).append(one)

    def mean(group: Sequence[Cell], name: str) -> float:
        return statistics.fmean(getattr(one, name) for one in group)

    made = [
        Seen(*group[0][:3], mean(group, "cost"), group[0].at, mean(group, "keep"), mean(group, "top1"), len(group))
        for group in groups.values()
    ]
    return tuple(sorted(made, key=lambda one: (one.data, one.start != "scratch", one.way, one.cost)))


def rule(start: Start, budget: float) -> Rule:
    """What was measured to be best for ``budget``."""
    return next(one for one in RULES if one.start == start and budget <= one.up_to)


def nearest(data: str, start: Start, way: Strategy, cost: float, keep: float) -> Seen | None:
    """The measurement whose cost and size are nearest, as ratios; None where there is none of that way."""
    return min(
        _of(data, start, way),
        key=lambda one: abs(math.log(one.cost / cost)) + abs(math.log(one.keep / keep)),
        default=None,
    )


Curve = list[tuple[float, float, int]]
"""(cost, top-1, seeds), the costs rising."""


def curve(data: str, start: Start, way: Strategy, keep: float) -> Curve:
    """What was measured, of the size nearest to ``keep``."""
    found = _of(data, start, way)
    near = min((size(one.keep) for one in found), key=lambda of: abs(math.log(of / keep)), default=None)
    return sorted((one.cost, one.top1, one.n) for one in found if size(one.keep) == near)


def at_cost(measured: Curve, cost: float) -> float:
    """Top-1 at exactly ``cost``: straight between measurements over the logarithm of the cost, and level beyond them."""
    import numpy as np

    costs, tops, _ = zip(*measured, strict=True)
    return float(np.interp(math.log(cost), np.log(costs), tops))


def _of(data: str, start: Start, way: Strategy) -> list[Seen]:
    """Those of ``data``, or of the usual images where there are none."""
    known = [one for one in means() if (one.start, one.way) == (start, way)]
    return [one for one in known if one.data == data] or [one for one in known if one.data == USUAL]


def possible(start: Start, ways: Sequence[Strategy]) -> tuple[Strategy, ...]:
    """Of ``ways`` those to choose from, the best first: no small model starts from given weights, and the dense training is taken only
    where nothing else is allowed."""
    found: tuple[Strategy, ...] = ("shrink", "small") if start == "scratch" else ("shrink",)
    return tuple(way for way in found if way in ways) or ("dense",)


def choose(start: Start, costs: Mapping[Strategy, float], keep: float, data: str = USUAL) -> tuple[Strategy, str]:
    """The way to take, and why.

    Args:
        start: from scratch or from given weights
        costs: of each way to choose from (:func:`possible`), what it may cost
        keep: fraction of the MACs that ships
        data: the images; others' figures are read where these have none
    """
    if len(costs) > 1:
        return _cut_or_small(data, costs["shrink"], costs["small"], keep)
    (way,) = costs
    if start == "given" and way == "shrink":
        return way, "weights are given, and from them nothing that was measured comes near an early cut"
    return way, "of what budget.ways allows it is the best"


def _cut_or_small(data: str, cost: float, small_cost: float, keep: float) -> tuple[Strategy, str]:
    """Which of the two is better from scratch. Where the cost is none that both were measured around, it is the nearest that is."""
    if not all(one.data == data for way in ("shrink", "small") for one in _of(data, "scratch", way)):
        data = USUAL  # figures of two data sets are not compared
    cut, small = (curve(data, "scratch", way, keep) for way in ("shrink", "small"))
    if not cut or not small:
        return "shrink", "nothing else was measured"
    near = min(max(cost, cut[0][0], small[0][0]), cut[-1][0], small[-1][0])
    costs = near, small_cost * near / cost
    ends = [at_cost(one, each) for one, each in zip((cut, small), costs, strict=True)]
    at, other = (f"{each:.2g}" for each in costs)
    apart = f" at {other}" * (other != at)
    told = (
        f"on {data}, at {at} of the dense training, a training that shrinks ends at {ends[0]:.2f} % and a smaller model from scratch"
        f"{apart} at {ends[1]:.2f} % (seeds: {min(n for *_, n in cut)} and {min(n for *_, n in small)})"
    )
    if ends[0] - ends[1] >= MARGIN:
        return "shrink", told
    return "small", f"{told}; to be taken, the first has to be {MARGIN:g} points ahead"


# ------------------------------------------------------------------------------------------------------------- the file


def add(lines: Iterable[Mapping[str, Any]]) -> int:
    """Put the cells of benchmarks/cheaper.py into the file, as far as the planner reads them; one that was measured anew takes the
    place of the old one. Returns how many are new or changed."""
    known = {(one.kind, one.seed): one for one in cells()}
    before = set(known.values())
    measured = [one for line in lines if (one := _measured(line)) is not None]
    known |= {(one.kind, one.seed): one for one in measured}
    found = sorted(known.values(), key=lambda one: (one.data, one.start != "scratch", one.way, one.budget, one.seed))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Cell._fields)
    writer.writerows(["" if value is None else value for value in one] for one in found)
    write_text(FILE, text.getvalue())
    cells.cache_clear()
    return len(set(found) - before)


def _measured(line: Mapping[str, Any]) -> Cell | None:
    """A line of cells.jsonl; None for an arm that the planner has no use for, a part of the images, or another recipe."""
    way, told = _WAYS.get(line["arm"]), dict(word.split("=", 1) for word in line["set"])
    if way is None or line.get("images") or not all(name.startswith(_OWN) for name in told):
        return None
    start = "given" if "model.weights" in told else "scratch"
    at = told.get("train.shrink.at") if way == "shrink" else None
    number = {
        name: round(value, _DIGITS[name]) for name, value in (("cost", line["cost"]), ("keep", min(1.0, line["macs"])))
    }
    return Cell(
        line["row"], start, way, line["budget"], line["seed"], number["cost"],  # type: ignore[arg-type]
        None if at is None else round(float(at), _DIGITS["at"]), number["keep"], round(line["top1"], 2),
    )  # fmt: skip


HEAD = """# What the planner goes by

This page is printed by `python -m lotus.stages.plan_table` from the rules of lotus/stages/plan_table.py and
the measurements of lotus/stages/measured.csv, to which `python -m lotus.stages.plan_table CELLS` adds what
benchmarks/cheaper.py has measured since (CELLS: its `cells.jsonl`).
[planning.md](planning.md) says how they are read. All trainings are by Muon at 3e-3; a smaller model is a
narrower one. Cost 1 is the dense model's training for the textbook's epochs (CIFAR-10: 12, by a ViT of 128 x
6, 8-pixel patches).

## Where the cut is, and to what

Steps before the cut and MACs that stay, as fractions.
"""


def markdown() -> str:
    """The page."""
    rules = (
        (one.start, "any" if one.up_to == math.inf else f"{one.up_to:g}", f"{one.at:g}", f"{one.keep:g}")
        for one in RULES
    )
    seen = (
        (
            one.data, one.start, one.way, f"{one.cost:.3f}", "" if one.at is None else f"{one.at:.3f}", f"{one.keep:.2f}",
            f"{one.top1:.2f}", str(one.n),
        )
        for one in means()
    )  # fmt: skip
    return "\n".join(
        [
            HEAD,
            *_table(("start", "budget up to", "cut at", "to, where nobody says"), rules),
            "\n## What was measured\n\nTop-1 in percent, the mean of n seeds.\n",
            *_table(("data", "start", "way", "cost", "cut at", "MACs shipped", "top-1", "n"), seen),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells_of in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells_of)} |"


def main(files: Sequence[str]) -> None:
    """Add the cells of ``files``; without any, print the page."""
    for file in files:
        lines = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        print(f"{file}: {add(lines)} new", file=sys.stderr)
    if not files:
        print(markdown(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
