"""A budget in milliseconds: a table measured on this device, then an exact dynamic program over the blocks' widths.

Blocks of one residual width add up, so what a cut saves is what each block's attention and each block's MLP save. The table
holds both on a small grid of widths, measured inside of the model (not a layer alone, whose caches are warm); between the
points it is linear. Halves that are small together do not save what each saves alone, the less so the smaller they are: a few whole
models are timed too, and the sums are carried over by the curve through those. The program finds the widths of least lost score among all whose predicted latency is
within the budget (a multiple-choice knapsack over time in whole steps).

No table knows every plan. :func:`settle` times the very plan that was found, beside the dense model, scales the table to
that, and draws again, until what is measured is what was asked.
"""

from __future__ import annotations

import itertools
import json
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from lotus.pruning import budget, surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, cost
from lotus.vit.anatomy import Dims
from selection.errors import Refused

STEPS = 5000
"""Into which the program divides the time between the smallest and the dense model: a plan may miss the budget by one in so many a block."""
CLOSE = 0.02
"""A measured latency that differs from what was asked by so large a part of it is what was asked: two timings differ as much."""
ROUNDS = 6
"""Plans that are measured at most, each drawn by what the ones before it showed."""
_DEEP = 4
"""Blocks that are enough to time one."""
_EVEN = (0.75, 0.5, 0.25)
"""Parts of all widths at which whole models are timed."""

_TOGETHER = (0.05, 2.0)
"""Between which the slopes of :attr:`Table.together` lie; what was measured beyond them is noise."""

Timer = Callable[[nn.Module], float]
"""Milliseconds of a forward pass of a model."""


@dataclass(frozen=True)
class Table:
    """What a model's forward pass takes on one device, dense, and what each block's halves save at smaller widths."""

    device: str
    batch: int
    dense: float
    """Milliseconds of the whole dense model."""
    of: Dims
    """The dense widths of every block."""
    heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    attention: tuple[tuple[float, ...], ...]
    """``[heads][head dimension]`` -> milliseconds that one block takes less than at its dense attention."""
    units: tuple[int, ...]
    mlp: tuple[float, ...]
    """[units] -> the same of its MLP."""
    together: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    """(milliseconds that the halves of a model save alone, in all; what the whole model saves), rising: caches and memory are
    shared. Through (0, 0), straight between the points, and beyond the last as before it."""

    def saves(self, dims: Dims) -> float:
        """Milliseconds that a block of these widths saves; linear between what was measured, and beyond it as at its end."""
        return self.attention_saves(dims.heads, (dims.qk_dim + dims.v_dim) / 2) + self.mlp_saves(dims.hidden)

    def attention_saves(self, heads: int, head_dim: float) -> float:
        """The attention's part of :meth:`saves`."""
        rows = [np.interp(head_dim, self.head_dims, row) for row in self.attention]
        return float(np.interp(heads, self.heads, rows))

    def mlp_saves(self, units: int) -> float:
        """The MLP's part of :meth:`saves`."""
        return float(np.interp(units, self.units, self.mlp))

    def predict(self, dims: Sequence[Dims]) -> float:
        """Milliseconds of the model with blocks of these widths."""
        return self.dense - self.in_all(sum(self.saves(one) for one in dims))

    def in_all(self, alone: float) -> float:
        """Milliseconds that a model saves whose halves save ``alone`` by themselves."""
        return _along([(0.0, 0.0), *self.together], alone)

    def alone(self, in_all: float) -> float:
        """What :meth:`in_all` makes ``in_all`` of."""
        return _along([(0.0, 0.0), *((real, alone) for alone, real in self.together)], in_all)

    def corrected(self, dims: Sequence[Dims], part: float) -> Table:
        """As this one, but of blocks of these widths it says that they take ``part`` of the dense model's time."""
        alone = sum(self.saves(one) for one in dims)
        if alone <= 0:  # the dense model, or as slow as that by the table: nothing to put right
            return self
        return self.scaled((1 - part) * self.dense / self.in_all(alone))

    def scaled(self, by: float) -> Table:
        """As this one, but all models save ``by`` times as much."""
        return replace(self, together=_curve([(alone, by * real) for alone, real in self.together]))

    def to_json(self) -> str:
        """Text that :meth:`from_json` takes back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The table that :meth:`to_json` wrote.

        Raises:
            Refused: it is none.
        """
        try:
            raw = json.loads(text)
            raw["of"] = Dims(*raw["of"])
            raw["attention"] = tuple(tuple(float(ms) for ms in row) for row in raw["attention"])
            raw["together"] = tuple((float(alone), float(real)) for alone, real in raw["together"])
            for name in ("heads", "head_dims", "units", "mlp"):
                raw[name] = tuple(raw[name])
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"This is no table of latencies ({type(error).__name__}: {error}). Measure it again."
            ) from None


def timings(model: nn.Module, *, repeats: int = 5) -> int:
    """How many forward passes :func:`measure` times.

    Raises:
        Refused: as :func:`measure`.
    """
    heads, dims, units = _axes(model)
    of = anatomy.blocks(model)[0].dims
    return repeats * len({*_points(of, heads, dims, units), *_whole(of, dims, units)} - {of})


def measure(
    model: nn.Module,
    batch: int,
    *,
    repeats: int = 5,
    timer: Timer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Time ``model`` and smaller ones like it on its device, each beside the dense one, and take medians of the ratios.

    A machine's pace drifts by more than some cuts save; two timings one after the other drift together.

    Args:
        batch: images in a forward pass.
        repeats: rounds; in each, every width is timed once.
        timer: milliseconds of a model; None: the fastest of three passes over ``batch`` random images, after two, by the clock.
        progress: told how many timings are done, out of :func:`timings`.

    Raises:
        Refused: a model that cannot be cut, or one whose blocks differ already.
    """
    heads, dims, units = _axes(model)
    of = anatomy.blocks(model)[0].dims
    take = timer or _clock(batch)
    depth = len(anatomy.blocks(model))
    few = _first(model, min(_DEEP, depth))
    smaller = {point: _like(few, point) for point in _points(of, heads, dims, units) if point != of}
    entire = {point: _like(model, point) for point in _whole(of, dims, units)}
    beside: dict[Dims, list[float]] = {point: [] for point in (*smaller, *entire)}
    bases, whole, done = [take(few)], [take(model)], 0
    for _ in range(repeats):
        for models, dense, times in ((entire, model, whole), (smaller, few, bases)):
            for point, one in models.items():
                times.append(take(dense))
                beside[point].append(take(one) / times[-1])
                done += 1
                if progress is not None:
                    progress(done)
    each = statistics.median(bases) / len(anatomy.blocks(few))
    saved = {of: 0.0} | {point: each * (1 - statistics.median(beside[point])) for point in smaller}
    plain = Table(
        device=str(next(model.parameters()).device),
        batch=batch,
        dense=statistics.median(whole),
        of=of,
        heads=heads,
        head_dims=dims,
        attention=_falling([[saved[Dims(h, d, d, of.hidden)] for d in dims] for h in heads]),
        units=units,
        mlp=_falling([[saved[of._replace(hidden=f)] for f in units]])[0],
    )
    whole_models = [
        (depth * plain.saves(point), plain.dense * (1 - statistics.median(beside[point]))) for point in entire
    ]
    return replace(plain, together=_curve(whole_models))


def _curve(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points in order, made to rise from (0, 0) on at a slope within :data:`_TOGETHER`; points without an extent are left out."""
    found, (x, y) = [], (0.0, 0.0)
    for to, reached in sorted(points):
        if to <= x:
            continue
        least, most = (y + slope * (to - x) for slope in _TOGETHER)
        x, y = to, min(max(reached, least), most)
        found.append((x, y))
    return tuple(found) or ((1.0, 1.0),)


def _along(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at ``x`` of the lines through ``points``, two or more in order; beyond the last as before it."""
    right = next((number for number in range(1, len(points)) if x <= points[number][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


def _falling(saved: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """The nearest table in which a wider half never saves more: what the clock says otherwise is its noise. Rows, then columns."""
    from sklearn.isotonic import IsotonicRegression

    fit = IsotonicRegression(increasing=False)
    table = np.array(saved, dtype=np.float64)
    for _ in range(2):  # of one axis after the other
        table = np.array([fit.fit_transform(np.arange(len(row)), row) for row in table]).T
    return tuple(tuple(float(value) for value in row) for row in table)


def beside(dense: nn.Module, small: nn.Module, batch: int, *, turns: int = 11, timer: Timer | None = None) -> float:
    """Time of ``small`` as a part of ``dense``'s: they take turns, and the median of the turns' ratios counts."""
    take, ratios = timer or _clock(batch), []
    for _ in range(turns):
        whole = take(dense)
        ratios.append(take(small) / whole)
    return statistics.median(ratios)


@dataclass(frozen=True)
class Settled:
    """A plan that was measured; latencies are parts of the dense model's."""

    plan: Plan
    table: Table
    """As it was scaled to what was measured."""
    asked: float
    predicted: float
    """What the table said of the plan before it was measured."""
    measured: float | None
    """None where the table is of another device."""

    @property
    def part(self) -> float:
        """What is known of the plan's latency: measured, else predicted."""
        return self.predicted if self.measured is None else self.measured

    @property
    def over(self) -> bool:
        """Whether it is beyond the budget."""
        return self.part > self.asked * (1 + CLOSE)

    def told(self) -> dict[str, Any]:
        """For a record."""
        return {
            "asked": self.asked, "predicted": self.predicted, "measured": self.measured, "dense_ms": self.table.dense,
            "batch": self.table.batch, "device": self.table.device,
        }  # fmt: skip

    def text(self) -> str:
        """A sentence."""
        found = "not measured here" if self.measured is None else f"measured {self.measured:.3f}"
        return (
            f"Latency at batch {self.table.batch} on {self.table.device}, as a part of the dense {self.table.dense:.3g} ms: asked "
            f"{self.asked:g}, predicted {self.predicted:.3f}, {found}.{' No plan that was measured came closer.' if self.over else ''}"
        )


def settle(
    draw: Callable[[Table], Plan],
    least: Plan,
    table: Table,
    keep: float,
    take: Callable[[Plan], float],
    *,
    rounds: int = ROUNDS,
) -> Settled:
    """Draw a plan, measure it, correct the table by it and draw again, until ``keep`` is met to within :data:`CLOSE`.

    Of all that were measured the slowest within the budget is taken, or the fastest where none is. Nothing is refused by
    the table's word alone: the smallest plan is measured first.

    Args:
        draw: The plan by a table, as :func:`fit_plan` draws it.
        least: The smallest that can be drawn.
        keep: The part of the dense model's time that may stay.
        take: Time of a plan, measured, as a part of the dense model's.
        rounds: Plans that are measured at most.

    Raises:
        Refused: as ``draw``, where the smallest plan was measured and is beyond the budget.
    """
    tried: dict[tuple[Dims, ...], Settled] = {}
    most, scale = keep * (1 + CLOSE), 1.0
    under: tuple[float, float] | None = None  # (scale, measured part) of a plan below the budget, and of one above it
    over: tuple[float, float] | None = None
    for _ in range(rounds):
        now = table.scaled(scale)
        try:
            plan = draw(now)
        except Refused:
            plan = least
            if least.dims in tried and tried[least.dims].part > most:
                raise
        if plan.dims in tried:
            break
        part = take(plan)
        right = now.corrected(plan.dims, part)
        tried[plan.dims] = Settled(plan, right, keep, now.predict(plan.dims) / now.dense, part)
        if abs(part - keep) <= CLOSE * keep:
            break
        if part < keep:
            under = scale, part
        else:
            over = scale, part
        if under and over and under[0] < over[0]:  # what the table believes, between the two
            scale = under[0] + (keep - under[1]) / (over[1] - under[1]) * (over[0] - under[0])
        else:
            scale *= right.in_all(1.0) / now.in_all(1.0)
    return max(tried.values(), key=lambda one: one.part if one.part <= most else -one.part)


def fast_multiple(
    model: nn.Module,
    batch: int,
    *,
    among: Sequence[int] = (4, 8, 16, 32, 64),
    slack: float = 0.03,
    timer: Timer | None = None,
) -> int:
    """The smallest of ``among`` such that MLP widths that are multiples of it are as fast a unit as any, to within ``slack``.

    Each is tried at the multiple of it nearest to 0.6 of the width that is no multiple of the next.

    Raises:
        Refused: a model that cannot be cut.
    """
    found = anatomy.blocks(model)
    of = found[0].dims
    take = timer or (lambda one: cost.latency(one, batch, repeats=7, warmup=2))
    few = _first(model, min(_DEEP, len(found)))
    least = _like(few, of._replace(hidden=min(8, of.hidden)))
    widths = {}
    for multiple in among:
        odd = max(1, round((0.6 * of.hidden / multiple - 1) / 2)) * 2 + 1
        if multiple * odd <= of.hidden:
            widths[multiple] = multiple * odd
    if not widths:
        return min(among)
    floor = take(least)
    pace = {
        multiple: (take(_like(few, of._replace(hidden=width))) - floor) / width for multiple, width in widths.items()
    }
    best = min(pace.values())
    return min(multiple for multiple, each in pace.items() if each <= best + slack * abs(best))


def fit_plan(
    outline: cost.Outline,
    scores: Mapping[str, np.ndarray],
    keep: Mapping[str, float],
    table: Table,
    *,
    round: int = 8,
    whole: cost.Cost | None = None,
    within: Sequence[Dims] | None = None,
    least: Sequence[Dims] | None = None,
) -> Plan:
    """The plan that loses the least score within ``keep["latency"]`` of the dense model's time, as the table predicts it.

    Args:
        outline: The model, as :func:`lotus.vit.cost.outline` reads it.
        scores: As of :func:`lotus.pruning.budget.fit_plan`.
        keep: ``latency``, and what else is to hold; parts in (0, 1].
        table: Of this model, or of the one that it was cut from, on the device that it is for.
        round: Widths stay a multiple of this, where they are cut.
        whole: What the budgets beside ``latency`` are a part of, where that is not the present model.
        within: Widths of each block that may stay; None: all.
        least: Widths of each block that have to stay, and are within the budgets; None: the smallest.

    Raises:
        Refused: a budget that is none or out of reach, with what can be reached; a table of another model.
    """
    blocks = [budget.BlockWidths(index, outline, scores, round, inputs=False) for index in range(len(outline.dims))]
    halves = [half for block in blocks for half in _halves(block)]
    if within is not None:
        halves = _only(halves, operator.le, within)
    if least is not None:
        halves = _only(halves, operator.ge, least)
    return _planned(allocate(outline, halves, keep, table, round=round, whole=whole), blocks)


def _only(
    halves: Sequence[list[Option]], holds: Callable[[Any, Any], bool], bounds: Sequence[Dims]
) -> list[list[Option]]:
    """The options with widths that hold against those of the blocks."""
    own = (("heads", "qk_dim", "v_dim"), ("hidden",))  # widths of an attention, of an MLP
    return [
        [
            option
            for option in half
            if all(holds(getattr(option.dims, name), getattr(bounds[i // 2], name)) for name in own[i % 2])
        ]
        for i, half in enumerate(halves)
    ]


class Option(NamedTuple):
    """What one half of a block, its attention or its MLP, may become."""

    dims: Dims
    """The block's widths; those of the other half are not looked at."""
    loss: float
    """What is lost by it, in any unit."""


def allocate(
    outline: cost.Outline,
    halves: Sequence[Sequence[Option]],
    keep: Mapping[str, float],
    table: Table,
    *,
    round: int = 8,
    whole: cost.Cost | None = None,
) -> list[Dims]:
    """The widths of each block, one option for each of its halves, that lose the least in all within the budgets.

    With other budgets beside ``latency``, the same program is run with a price on what they count, and the lowest price at
    which they hold is taken: then the widths are the best for that price.

    Args:
        halves: The options of the first block's attention, of its MLP, of the second block's attention, and so on.

    The other arguments, and what is refused, are those of :func:`fit_plan`.
    """
    share = budget.check_keep(keep)
    limits = budget.check_reach(outline, share, round=round, branches=False, whole=whole)
    if any(now > of for dims in outline.dims for now, of in zip(dims[:4], table.of[:4], strict=True)):
        raise Refused("prune.keep.latency: the table was measured on a model of other widths. Measure this one.")
    items = [_item(half, number, outline, table, limits) for number, half in enumerate(halves)]
    limit = share["latency"] * table.dense
    most = sum(max(option.saves for option in item.options) for item in items)
    floor = table.dense - table.in_all(most)
    if floor > limit * (1 + 1e-9):  # what was found within it may be asked for again
        reach = -(-10000 * floor // table.dense) / 10000
        raise Refused(
            f"prune.keep.latency: {share['latency']} is out of reach. The smallest blocks would take {reach:.4f} of the dense "
            f"{table.dense:.3g} ms at batch {table.batch}. Take {reach:.4f} to 1."
        )
    room = max(0.0, most - table.alone(table.dense - limit))  # of what can be saved, what need not be

    def solve(price: float) -> list[_Option]:
        return _program(items, room, most / STEPS, price)

    def holds(chosen: list[_Option]) -> bool:
        now = outline.cost(_dims(chosen))
        return all(getattr(now, what) <= most for what, most in limits.items())

    chosen = solve(0.0)
    if not holds(chosen):
        low, high = 0.0, 1e-9 * (1 + sum(max(option.loss for option in item.options) for item in items))
        while not holds(chosen := solve(high)):
            low, high = high, 4 * high
            if high > 1e30:
                raise Refused("prune.keep: these budgets cannot be held together. Raise one of them.")
        for _ in range(40):
            middle = (low + high) / 2
            if holds(found := solve(middle)):
                high, chosen = middle, found
            else:
                low = middle
    return _dims(chosen)


@dataclass(frozen=True)
class _Option:
    """A width of one half of a block."""

    dims: Dims
    loss: float
    """Scores that go."""
    saves: float
    """Milliseconds."""
    price: float
    """What the other budgets count, each as a part of its limit."""


@dataclass(frozen=True)
class _Item:
    """One half of a block: exactly one of its options is taken."""

    options: tuple[_Option, ...]


def _halves(block: budget.BlockWidths) -> Iterator[list[Option]]:
    """All widths of a block's attention, then of its MLP, and the scores that go with them."""
    of = block.of
    heads, qk_dim, v_dim, hidden = of[:4]
    dims = [v_dim] if block.whole_qk else _multiples(v_dim, block.round)
    yield [
        Option(
            Dims(h, qk_dim if block.whole_qk else d, d, hidden),
            # A head takes its query/key dimensions along, but they act through its outputs alone: they are no extra loss.
            float(block.v_sums[:, v_dim].sum() - block.v_sums[:h, d].sum())
            + (0.0 if block.whole_qk else float(block.qk_sums[:h, qk_dim].sum() - block.qk_sums[:h, d].sum())),
        )
        for h in range(1, heads + 1)
        for d in dims
    ]
    yield [
        Option(of._replace(hidden=f), float(block.unit_sums[hidden] - block.unit_sums[f]))
        for f in _multiples(hidden, block.round)
    ]


def _item(half: Sequence[Option], number: int, outline: cost.Outline, table: Table, limits: Mapping[str, int]) -> _Item:
    """A half's options with what they save and cost; attention and MLPs take turns."""
    index, found = number // 2, []
    for dims, loss in half:
        to, saves = outline.dims[index]._replace(hidden=dims.hidden), table.mlp_saves(dims.hidden)
        if number % 2 == 0:
            to = dims._replace(hidden=outline.dims[index].hidden)
            saves = table.attention_saves(dims.heads, (dims.qk_dim + dims.v_dim) / 2)
        now = outline.block(index, to)
        price = sum(getattr(now, what) / max(1, limit) for what, limit in limits.items())
        found.append(_Option(to, loss, saves, price))
    return _Item(tuple(found))


def least_plan(outline: cost.Outline, scores: Mapping[str, np.ndarray], table: Table, *, round: int = 8) -> Plan:
    """The plan that the table takes for the fastest; the arguments are those of :func:`fit_plan`."""
    blocks = [budget.BlockWidths(index, outline, scores, round, inputs=False) for index in range(len(outline.dims))]
    halves = [half for block in blocks for half in _halves(block)]
    items = [_item(half, number, outline, table, {}) for number, half in enumerate(halves)]
    return _planned(_dims([max(item.options, key=lambda option: option.saves) for item in items]), blocks)


def _planned(found: Sequence[Dims], blocks: Sequence[budget.BlockWidths]) -> Plan:
    for block, dims in zip(blocks, found, strict=True):
        block.dims = dims
    return Plan(tuple(block.plan() for block in blocks))


def _program(items: Sequence[_Item], time: float, step: float, price: float) -> list[_Option]:
    """One option an item, of least loss (and price), within ``time`` above the fastest options.

    Times are rounded down to whole steps, and the room is lowered, by less than a step an item, until the sum is in truth
    within ``time``.
    """
    fastest = [max(item.options, key=lambda option: option.saves) for item in items]
    if step <= 0:
        return fastest
    room = int(time / step + 1e-9)
    best, choices, steps = np.zeros(room + 1), [], []
    for item, first in zip(items, fastest, strict=True):
        takes = [int((first.saves - option.saves) / step) for option in item.options]
        now, choice = np.full(room + 1, np.inf), np.zeros(room + 1, np.int32)
        for number, (option, count) in enumerate(zip(item.options, takes, strict=True)):
            if count > room:
                continue
            value = best[: room + 1 - count] + option.loss + price * option.price
            better = value < now[count:]
            now[count:][better], choice[count:][better] = value[better], number
        best = now
        choices.append(choice)
        steps.append(takes)
    for start in range(room, -1, -1):
        left, chosen = start, []
        for item, choice, takes in zip(reversed(items), reversed(choices), reversed(steps), strict=True):
            number = int(choice[left])
            left -= takes[number]
            chosen.append(item.options[number])
        chosen.reverse()
        if sum(first.saves - option.saves for first, option in zip(fastest, chosen, strict=True)) <= time * (1 + 1e-12):
            return chosen
    return fastest


def _dims(chosen: Sequence[_Option]) -> list[Dims]:
    """Attention and MLP of each block put together."""
    pairs = zip(chosen[::2], chosen[1::2], strict=True)
    return [attention.dims._replace(hidden=mlp.dims.hidden) for attention, mlp in pairs]


def _multiples(width: int, round: int) -> list[int]:
    """The widths that a cut may leave: multiples of ``round``, and all."""
    return sorted({*range(min(round, width), width, round), width})


def _grid(width: int, least: int, parts: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> tuple[int, ...]:
    """Widths to time, from the least to all."""
    return tuple(sorted({max(least, round(width * part)) for part in parts}))


def _clock(batch: int) -> Timer:
    """A pass after another model's is slower, and whatever else the machine does only adds: the fastest of those that follow counts."""
    return lambda model: cost.latency(model, batch, repeats=3, warmup=2, fastest=True)


def _whole(of: Dims, dims: Sequence[int], units: Sequence[int]) -> list[Dims]:
    """Widths of the whole models to time: the least there are, or plans beyond the others would be guessed; then all heads with
    fewer dimensions, where those can go, else fewer heads, and fewer units."""
    found = [Dims(1, min(dims), min(dims), min(units))]
    for part in _EVEN:
        point = of._replace(hidden=max(1, round(part * of.hidden)))
        if len(dims) > 1:
            dim = max(min(dims), round(part * of.v_dim))
            found.append(point._replace(qk_dim=dim, v_dim=dim))
        else:
            found.append(point._replace(heads=max(1, round(part * of.heads))))
    return [point for point in dict.fromkeys(found) if point != of]


def _axes(model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Numbers of heads, head dimensions and MLP units to time."""
    found = anatomy.blocks(model)
    of = found[0].dims
    alike = all(block.dims == of and block.width == found[0].width for block in found)
    if not alike or of.qk_dim != of.v_dim:
        raise Refused(
            "prune.keep.latency: the model's blocks differ in width already, and the table is of blocks that are alike. "
            "Give a budget of macs, or cut the dense model."
        )
    dims = (of.v_dim,) if any(block.whole_qk for block in found) else _grid(of.v_dim, min(8, of.v_dim))
    return _grid(of.heads, 1, (0.0, 0.5, 1.0)), dims, _grid(of.hidden, min(8, of.hidden))


def _points(of: Dims, heads: Sequence[int], dims: Sequence[int], units: Sequence[int]) -> list[Dims]:
    """The widths to time, the dense ones among them."""
    attention = (Dims(h, d, d, of.hidden) for h, d in itertools.product(heads, dims))
    return list(dict.fromkeys([*attention, *(of._replace(hidden=f) for f in units)]))


def _first(model: nn.Module, count: int) -> nn.Module:
    """``model`` with its first blocks only; shares their weights."""
    if count == len(anatomy.blocks(model)):
        return model
    short = _shallow(model)
    short.blocks = nn.Sequential(*itertools.islice(model.blocks, count))  # type: ignore[arg-type]
    return short


def _shallow(model: nn.Module) -> nn.Module:
    """Another module with the same children."""
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    twin.__dict__["_modules"] = dict(model.__dict__["_modules"])
    return twin


def _like(model: nn.Module, dims: Dims) -> nn.Module:
    """``model`` with every block cut to ``dims``; which units stay does not matter to the clock."""

    def plan(of: Dims) -> BlockPlan:
        return BlockPlan(
            of=of,
            heads=tuple(range(dims.heads)),
            qk=(tuple(range(dims.qk_dim)),) * dims.heads,
            v=(tuple(range(dims.v_dim)),) * dims.heads,
            units=tuple(range(dims.hidden)),
        )

    return surgery.cut(model, Plan(tuple(plan(block.dims) for block in anatomy.blocks(model))))
