"""A budget in milliseconds: a table measured on this device, then an exact dynamic program over the blocks' widths.

Blocks of one residual width add up, so what a cut saves is what each block's attention and each block's MLP save. The table
holds both on a small grid of widths, measured inside of the model (not a layer alone, whose caches are warm); between the
points it is linear. The program finds the widths of least lost score among all whose predicted latency is within the budget
(a multiple-choice knapsack over time in whole steps).
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from lotus.pruning import budget, surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, cost
from lotus.vit.anatomy import Dims
from selection.errors import Refused

STEPS = 5000
"""Into which the program divides the time between the smallest and the dense model: a plan may miss the budget by one in so many a block."""
_DEEP = 4
"""Blocks that are enough to time one."""

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
    """[heads][head dimension] -> milliseconds that one block takes less than at its dense attention."""
    units: tuple[int, ...]
    mlp: tuple[float, ...]
    """[units] -> the same of its MLP."""

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
        return self.dense - sum(self.saves(one) for one in dims)

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
            for name in ("heads", "head_dims", "units", "mlp"):
                raw[name] = tuple(raw[name])
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"This is no table of latencies ({type(error).__name__}: {error}). Measure it again."
            ) from None


def timings(model: nn.Module, *, repeats: int = 3) -> int:
    """How many forward passes :func:`measure` times.

    Raises:
        Refused: as :func:`measure`.
    """
    heads, dims, units = _axes(model)
    return repeats * len(_points(anatomy.blocks(model)[0].dims, heads, dims, units))


def measure(
    model: nn.Module,
    batch: int,
    *,
    repeats: int = 3,
    timer: Timer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Time ``model`` and smaller ones like it on its device, in turns, and take medians of what stands beside the dense one.

    Args:
        batch: images in a forward pass.
        repeats: rounds; in each, every width is timed once beside the dense model.
        timer: milliseconds of a model; None: one pass over ``batch`` random images, by the clock.
        progress: told how many timings are done, out of :func:`timings`.

    Raises:
        Refused: a model that cannot be cut, or one whose blocks differ already.
    """
    heads, dims, units = _axes(model)
    of = anatomy.blocks(model)[0].dims
    # A pass after another model's pays for memory that was given back: not the first counts, but the median of the next.
    take = timer or (lambda one: cost.latency(one, batch, repeats=3, warmup=1))
    few = _first(model, min(_DEEP, len(anatomy.blocks(model))))
    smaller = {point: _like(few, point) for point in _points(of, heads, dims, units) if point != of}
    beside: dict[Dims, list[float]] = {point: [] for point in smaller}
    bases, whole, done = [], [], 0
    for _ in range(repeats):
        bases.append(take(few))
        whole.append(bases[-1] if few is model else take(model))
        done += 1
        for point, one in smaller.items():
            beside[point].append(take(one) / bases[-1])
            done += 1
            if progress is not None:
                progress(done)
    each = statistics.median(bases) / len(anatomy.blocks(few))
    saved = {of: 0.0} | {point: each * (1 - statistics.median(ratios)) for point, ratios in beside.items()}
    return Table(
        device=str(next(model.parameters()).device),
        batch=batch,
        dense=statistics.median(whole),
        of=of,
        heads=heads,
        head_dims=dims,
        attention=tuple(tuple(saved[Dims(h, d, d, of.hidden)] for d in dims) for h in heads),
        units=units,
        mlp=tuple(saved[of._replace(hidden=f)] for f in units),
    )


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
) -> Plan:
    """The plan that loses the least score within ``keep["latency"]`` of the dense model's time, as the table predicts it.

    With other budgets beside it, the same program is run with a price on what they count, and the lowest price at which they
    hold is taken: then the plan is the best for that price.

    Args:
        outline: The model, as :func:`lotus.vit.cost.outline` reads it.
        scores: As of :func:`lotus.pruning.budget.fit_plan`.
        keep: ``latency``, and what else is to hold; parts in (0, 1].
        table: Of this model, on the device that it is for.
        round: Widths stay a multiple of this, where they are cut.
        whole: What the budgets beside ``latency`` are a part of, where that is not the present model.

    Raises:
        Refused: a budget that is none or out of reach, with what can be reached; a table of another model.
    """
    share = budget.check_keep(keep)
    limits = budget.check_reach(outline, share, round=round, branches=False, whole=whole)
    if any(dims != table.of for dims in outline.dims):
        raise Refused("prune.keep.latency: the table was measured on a model of other widths. Measure this one.")
    blocks = [budget.BlockWidths(index, outline, scores, round, inputs=False) for index in range(len(outline.dims))]
    items = [item for block in blocks for item in _items(block, outline, table, limits)]
    limit = share["latency"] * table.dense
    floor = table.dense - sum(max(option.saves for option in item.options) for item in items)
    if floor > limit:
        reach = -(-10000 * floor // table.dense) / 10000
        raise Refused(
            f"prune.keep.latency: {share['latency']} is out of reach. The smallest blocks would take {reach:.4f} of the dense "
            f"{table.dense:.3g} ms at batch {table.batch}. Take {reach:.4f} to 1."
        )
    spare = table.dense - floor
    budgeted = limit - floor

    def solve(price: float) -> list[_Option]:
        return _program(items, budgeted, spare / STEPS, price)

    def holds(chosen: list[_Option]) -> bool:
        now = outline.cost(_dims(chosen, blocks))
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
    for block, dims in zip(blocks, _dims(chosen, blocks), strict=True):
        block.dims = dims
    return Plan(tuple(block.plan() for block in blocks))


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


def _items(block: Any, outline: cost.Outline, table: Table, limits: Mapping[str, int]) -> Iterator[_Item]:
    """The attention of a block, then its MLP."""
    of: Dims = block.of
    heads, qk_dim, v_dim, hidden = of[:4]
    dims = [v_dim] if block.whole_qk else _multiples(v_dim, block.round)

    def option(to: Dims, loss: float, saves: float) -> _Option:
        now = outline.block(block.index, to)
        return _Option(to, loss, saves, sum(getattr(now, what) / max(1, limit) for what, limit in limits.items()))

    yield _Item(
        tuple(
            option(
                Dims(h, qk_dim if block.whole_qk else d, d, hidden),
                # A head takes its query/key dimensions along, but they act through its outputs alone: they are no extra loss.
                float(block.v_sums[:, v_dim].sum() - block.v_sums[:h, d].sum())
                + (0.0 if block.whole_qk else float(block.qk_sums[:h, qk_dim].sum() - block.qk_sums[:h, d].sum())),
                table.attention_saves(h, d),
            )
            for h in range(1, heads + 1)
            for d in dims
        )
    )
    yield _Item(
        tuple(
            option(of._replace(hidden=f), float(block.unit_sums[hidden] - block.unit_sums[f]), table.mlp_saves(f))
            for f in _multiples(hidden, block.round)
        )
    )


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


def _dims(chosen: Sequence[_Option], blocks: Sequence[Any]) -> list[Dims]:
    """Attention and MLP of each block put together."""
    pairs = zip(chosen[::2], chosen[1::2], strict=True)
    return [attention.dims._replace(hidden=mlp.dims.hidden) for attention, mlp in pairs]


def _multiples(width: int, round: int) -> list[int]:
    """The widths that a cut may leave: multiples of ``round``, and all."""
    return sorted({*range(min(round, width), width, round), width})


def _grid(width: int, least: int) -> tuple[int, ...]:
    """At most five widths to time, from the least to all."""
    return tuple(sorted({max(least, round(width * part)) for part in (0.0, 0.25, 0.5, 0.75, 1.0)}))


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
    return _grid(of.heads, 1), dims, _grid(of.hidden, min(8, of.hidden))


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
