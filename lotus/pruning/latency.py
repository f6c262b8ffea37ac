"""What widths take on this device: a table that is measured, and plans that are timed until one takes what was asked.

Blocks of one residual width add up, so what a cut saves is what each block's attention and each block's MLP save. The table
holds both on a small grid of widths, measured inside of the model (not a layer alone, whose caches are warm); between the
points it is linear. Halves that are small together do not save what each saves alone, the less so the smaller they are: a few
whole models are timed too, and the sums are carried over by the curve through those. :mod:`lotus.pruning.program` finds the
widths of least lost score by it.

No table knows every plan. :func:`settle` times the very plan that was found, beside the dense model, scales the table to
that, and draws again, until what is measured is what was asked.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from lotus.pruning import surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, cost
from lotus.vit.anatomy import Dims
from selection.errors import Refused, reason

CLOSE = 0.02
"""A measured latency that differs from what was asked by so large a fraction of it is what was asked: two timings differ as much."""
ROUNDS = 6
"""Plans that are measured at most, each drawn by what the ones before it showed."""
_DEEP = 4
"""Blocks that are enough to time one."""
_MULTIPLES = (4, 8, 16, 32, 64)
"""That ``round: auto`` may stand for."""
_EVEN = (0.75, 0.5, 0.25)
"""Parts of all widths at which whole models are timed."""

_APART = 1e-6  # milliseconds
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
        return replace(self, together=curve([(alone, by * real) for alone, real in self.together]))

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
            raise Refused(f"This is no table of latencies ({reason(error)}). Measure it again.") from None


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
    smaller = {point: like(few, point) for point in _points(of, heads, dims, units) if point != of}
    entire = {point: like(model, point) for point in _whole(of, dims, units)}
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
    return replace(plain, together=curve(whole_models))


def curve(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points in order, made to rise from (0, 0) on at a slope within :data:`_TOGETHER`; points within a
    nanosecond of the one before, which no clock tells apart, are left out."""
    found, (x, y) = [], (0.0, 0.0)
    for to, reached in sorted(points):
        if to - x < _APART:
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
    """Time of ``small`` as a fraction of ``dense``'s: they take turns, and the median of the turns' ratios counts."""
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

    def record(self) -> dict[str, Any]:
        """For a record."""
        return {
            "asked": self.asked, "predicted": self.predicted, "measured": self.measured, "dense_ms": self.table.dense,
            "batch": self.table.batch, "device": self.table.device,
        }  # fmt: skip

    def text(self) -> str:
        """A sentence."""
        found = "not measured here" if self.measured is None else f"measured {self.measured:.3f}"
        return (
            f"Latency at batch {self.table.batch} on {self.table.device}, as a fraction of the dense {self.table.dense:.3g} ms: asked "
            f"{self.asked:g}, predicted {self.predicted:.3f}, {found}.{' No plan that was measured came closer.' if self.over else ''}"
        )


def settle(
    draw: Callable[[Table], Plan | str], least: Plan, table: Table, keep: float, take: Callable[[Plan], float]
) -> Settled:
    """Draw a plan, measure it, correct the table by it and draw again, until ``keep`` is met to within :data:`CLOSE`, at most
    :data:`ROUNDS` times.

    Of all that were measured the slowest within the budget is taken, or the fastest where none is. Nothing is refused by
    the table's word alone: the smallest plan is measured first.

    Args:
        draw: The plan by a table, or why that has none, as :func:`lotus.pruning.program.attempt` tells.
        least: The smallest that can be drawn.
        table: What each part takes, before anything was measured.
        keep: The fraction of the dense model's time that may stay.
        take: Time of a plan, measured, as a fraction of the dense model's.

    Raises:
        Refused: what ``draw`` tells, where the smallest plan was measured and is beyond the budget.
    """
    tried: dict[tuple[Dims, ...], Settled] = {}
    most, scale = keep * (1 + CLOSE), 1.0
    under: tuple[float, float] | None = None  # (scale, measured part) of a plan below the budget, and of one above it
    over: tuple[float, float] | None = None
    for _ in range(ROUNDS):
        now = table.scaled(scale)
        plan = draw(now)
        if isinstance(plan, str):
            if least.dims in tried and tried[least.dims].part > most:
                raise Refused(plan)
            plan = least
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


def fast_multiple(model: nn.Module, batch: int, *, timer: Timer | None = None) -> int:
    """The smallest of :data:`_MULTIPLES` such that MLP widths that are multiples of it are as fast a unit as any, to within 3 %.

    Each is tried at the multiple of it nearest to 0.6 of the width that is no multiple of the next.

    Raises:
        Refused: a model that cannot be cut.
    """
    blocks = anatomy.blocks(model)
    of = blocks[0].dims
    take = timer or (lambda one: cost.latency(one, batch, repeats=7, warmup=2))
    few = _first(model, min(_DEEP, len(blocks)))
    least = like(few, of._replace(hidden=min(8, of.hidden)))
    widths = {}
    for multiple in _MULTIPLES:
        odd = max(1, round((0.6 * of.hidden / multiple - 1) / 2)) * 2 + 1
        if multiple * odd <= of.hidden:
            widths[multiple] = multiple * odd
    if not widths:
        return min(_MULTIPLES)
    floor = take(least)
    pace = {
        multiple: (take(like(few, of._replace(hidden=width))) - floor) / width for multiple, width in widths.items()
    }
    best = min(pace.values())
    return min(multiple for multiple, each in pace.items() if each <= best + 0.03 * abs(best))


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
    blocks = anatomy.blocks(model)
    of = blocks[0].dims
    alike = all(block.dims == of and block.width == blocks[0].width for block in blocks)
    if not alike or of.qk_dim != of.v_dim:
        raise Refused(
            "prune.keep.latency: the model's blocks differ in width already, and the table is of blocks that are alike. "
            "Give a budget of macs, or cut the dense model."
        )
    dims = (of.v_dim,) if any(block.whole_qk for block in blocks) else _grid(of.v_dim, min(8, of.v_dim))
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


def like(model: nn.Module, dims: Dims) -> nn.Module:
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
