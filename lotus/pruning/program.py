"""A budget in milliseconds: an exact dynamic program over the blocks' widths.

It finds the widths of least lost score among all whose latency, as a table of :mod:`lotus.pruning.latency` predicts it, is
within the budget (a multiple-choice knapsack over time in whole steps).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lotus.config import Prune
from lotus.pruning import budget
from lotus.pruning.latency import Table
from lotus.pruning.plan import Plan
from lotus.pruning.widths import BlockWidths
from lotus.vit import cost
from lotus.vit.anatomy import Dims
from selection.errors import Refused

STEPS = 5000
"""Into which the program divides the time between the smallest and the dense model: a plan may miss the budget by one in so many a block."""


def attempt(
    outline: cost.Outline,
    scores: Mapping[str, np.ndarray],
    request: Prune,
    table: Table,
    *,
    whole: cost.Cost | None = None,
    within: Sequence[Dims] | None = None,
    least: Sequence[Dims] | None = None,
) -> Plan | str:
    """The plan that loses the least score within ``request.keep.latency`` of the dense model's time, as the table predicts it; where
    it puts the budget out of reach, why.

    Args:
        outline: The model, as :func:`lotus.vit.cost.outline` reads it.
        scores: As of :func:`lotus.pruning.budget.fit_plan`.
        request: A budget of ``latency``, what else is to hold, and what widths stay a multiple of.
        table: Of this model, or of the one that it was cut from, on the device that it is for.
        whole: What the budgets beside ``latency`` are a fraction of, where that is not the present model.
        within: Widths of each block that may stay; None: all.
        least: Widths of each block that have to stay, and are within the budgets; None: the smallest.

    Raises:
        Refused: a table of another model.
    """
    blocks = budget.of_outline(outline, scores, request)
    halves = [half for block in blocks for half in _halves(block)]
    if within is not None:
        halves = _only(halves, operator.le, within)
    if least is not None:
        halves = _only(halves, operator.ge, least)
    dims = allocate(outline, halves, request, table, whole=whole)
    return dims if isinstance(dims, str) else _planned(dims, blocks)


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
    request: Prune,
    table: Table,
    *,
    whole: cost.Cost | None = None,
) -> list[Dims] | str:
    """The widths of each block, one option for each of its halves, that lose the least in all within the budgets; where the
    table puts those out of reach, why.

    With other budgets beside ``latency``, the same program is run with a price on what they count, and the lowest price at
    which they hold is taken: then the widths are the best for that price.

    Args:
        outline: Of the dense model.
        halves: The options of the first block's attention, of its MLP, of the second block's attention, and so on.
        request: With a budget of latency.
        table: What each width takes.
        whole: As of :func:`lotus.pruning.budget.check_reach`.

    What is refused is what :func:`lotus.pruning.budget.fit_plan` refuses.
    """
    limits = budget.check_reach(outline, request.model_copy(update={"sublayers": False}), whole=whole)
    asked = request.keep.latency
    assert asked is not None
    if any(now > of for dims in outline.dims for now, of in zip(dims[:4], table.of[:4], strict=True)):
        raise Refused("prune.keep.latency: the table was measured on a model of other widths. Measure this one.")
    items = [_item(half, number, outline, table, limits) for number, half in enumerate(halves)]
    limit = asked * table.dense
    most = sum(max(option.saves for option in item.options) for item in items)
    floor = table.dense - table.in_all(most)
    if floor > limit * (1 + 1e-9):  # what was found within it may be asked for again
        reach = -(-10000 * floor // table.dense) / 10000
        return (
            f"prune.keep.latency: {asked} is out of reach. The smallest blocks would take {reach:.4f} of the dense "
            f"{table.dense:.3g} ms at batch {table.batch}. Take {reach:.4f} to 1."
        )
    room = max(0.0, most - table.alone(table.dense - limit))  # of what can be saved, what need not be

    def solve(price: float) -> list[_Option]:
        return _program(items, room, most / STEPS, price)

    def holds(chosen: list[_Option]) -> bool:
        now = outline.cost(_dims(chosen))
        return all(getattr(now, what) <= most for what, most in limits.items())

    return _cheapest(solve, holds, 1e-9 * (1 + sum(max(option.loss for option in item.options) for item in items)))


def _cheapest(
    solve: Callable[[float], list[_Option]], holds: Callable[[list[_Option]], bool], high: float
) -> list[Dims] | str:
    """What ``solve`` chooses at the lowest price at which it ``holds``, which is 0 or looked for from ``high`` on."""
    chosen = solve(0.0)
    if holds(chosen):
        return _dims(chosen)
    low = 0.0
    while not holds(chosen := solve(high)):
        low, high = high, 4 * high
        if high > 1e30:
            return "prune.keep: these budgets cannot be held together. Raise one of them."
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
    """What the other budgets count, each as a fraction of its limit."""


@dataclass(frozen=True)
class _Item:
    """One half of a block: exactly one of its options is taken."""

    options: tuple[_Option, ...]


def _halves(block: BlockWidths) -> Iterator[list[Option]]:
    """All widths of a block's attention, then of its MLP, and the scores that go with them."""
    of = block.of
    _, qk_dim, v_dim, hidden = of[:4]
    heads, dims, units = block.choices()
    yield [
        Option(
            Dims(h, qk_dim if block.whole_qk else d, d, hidden),
            # A head takes its query/key dimensions along, but they act through its outputs alone: they are no extra loss.
            float(block.v_sums[:, v_dim].sum() - block.v_sums[:h, d].sum())
            + (0.0 if block.whole_qk else float(block.qk_sums[:h, qk_dim].sum() - block.qk_sums[:h, d].sum())),
        )
        for h in heads
        for d in dims
    ]
    yield [Option(of._replace(hidden=f), float(block.unit_sums[hidden] - block.unit_sums[f])) for f in units]


def _item(half: Sequence[Option], number: int, outline: cost.Outline, table: Table, limits: Mapping[str, int]) -> _Item:
    """A half's options with what they save and cost; attention and MLPs take turns."""
    index, options = number // 2, []
    for dims, loss in half:
        to, saves = outline.dims[index]._replace(hidden=dims.hidden), table.mlp_saves(dims.hidden)
        if number % 2 == 0:
            to = dims._replace(hidden=outline.dims[index].hidden)
            saves = table.attention_saves(dims.heads, (dims.qk_dim + dims.v_dim) / 2)
        now = outline.block(index, to)
        price = sum(getattr(now, what) / max(1, limit) for what, limit in limits.items())
        options.append(_Option(to, loss, saves, price))
    return _Item(tuple(options))


def least_plan(outline: cost.Outline, scores: Mapping[str, np.ndarray], request: Prune, table: Table) -> Plan:
    """The plan that the table takes for the fastest; the arguments are those of :func:`fit_plan`."""
    blocks = budget.of_outline(outline, scores, request)
    halves = [half for block in blocks for half in _halves(block)]
    items = [_item(half, number, outline, table, {}) for number, half in enumerate(halves)]
    return _planned(_dims([max(item.options, key=lambda option: option.saves) for item in items]), blocks)


def _planned(found: Sequence[Dims], blocks: Sequence[BlockWidths]) -> Plan:
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
