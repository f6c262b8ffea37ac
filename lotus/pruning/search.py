"""How much of the attention and of the MLPs stays, found by trying rather than by one ratio for both.

    request = Prune(keep={"macs": 0.5}, search={"kind": "ratios"})
    studied = study(model, calibration, request)
    found = search.ratios(studied, Judge(model, held_out), request)
    small = found.pruned.model

``ratios`` is our realization of Feng et al. (PRAI 2023, doi 10.1109/PRAI59366.2023.10332058): one ratio for all
attention and one for all MLPs, a coarse grid, bisection along directions, rounds with nested masks. Of the paper only the
abstract could be had. ``blocks`` lets every block have its own: greedy by what each loses a saved MAC, or, for a budget of
latency, by the exact program of :mod:`lotus.pruning.latency` over what each was measured to lose.

What is tried is judged right after the cut, compensated, by :class:`lotus.pruning.judge.Judge`.

A ratio here is the fraction of the module's MACs that *stays*: the same ratio of attention and of MLPs is a very different budget.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from lotus.config import Prune, Search, rules
from lotus.pruning import budget, latency, program
from lotus.pruning.judge import Judge
from lotus.pruning.plan import Plan
from lotus.pruning.study import Pruned, Study
from lotus.vit import cost
from lotus.vit.anatomy import Dims

DIRECTIONS = (0.0, 1 / 3, 1 / 2, 2 / 3, 1.0)
"""Where attention goes to MLP as 1:0, 2:1, 1:1, 1:2, 0:1: the MLPs' part of both."""
COARSE = 0.1
"""Between two points of the coarse grid: 0, 0.1, ..., 0.7 of the MACs go."""
FINE = 1 / 64
"""A bisection that looks at images ends when a ratio is known to this."""


@dataclass(frozen=True)
class Tried:
    """Widths that were measured."""

    how: str
    """dense, grid, bisect, budget, alternate, sensitivity, greedy, program or scores."""
    dims: tuple[Dims, ...]
    attention: float
    """Fraction of the attention's MACs that stays."""
    mlp: float
    macs: int
    params: int
    worse: float
    top1: float

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **{name: getattr(self, name) for name in ("how", "attention", "mlp", "macs", "params", "worse", "top1")},
            "blocks": [{name: wide for name, wide in one._asdict().items() if wide is not None} for one in self.dims],
        }


@dataclass
class SearchResult:
    """What a search ended with."""

    pruned: Pruned
    chosen: Tried
    tried: list[Tried]
    """Everything that was measured, in order; widths that came up again are not measured again."""
    forwards: float
    """Image-forwards of the search beside the study's, in units of the dense model's: each by the MACs of what was tried."""
    notes: list[str] = field(default_factory=list)

    @property
    def pareto(self) -> list[Tried]:
        """See :func:`pareto`."""
        return pareto(self.tried)


def pareto(tried: Iterable[Tried]) -> list[Tried]:
    """Those that nothing cheaper is as good as, the most expensive first."""
    front: list[Tried] = []
    for one in sorted(tried, key=lambda one: (one.macs, one.worse)):
        if not front or one.worse < front[-1].worse:
            front.append(one)
    return front[::-1]


class _Trial:
    """Tries widths of a studied model, each once."""

    def __init__(
        self,
        studied: Study,
        judge: Judge,
        request: Prune,
        *,
        table: latency.Table | None,
        timer: latency.Timer | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.asks = request.search or Search()
        rules.refuse(request.model_copy(update={"search": self.asks}), place="prune")
        # No sublayer goes as a whole.
        self.studied, self.judge, self.request = studied, judge, request.model_copy(update={"sublayers": False})
        self.outline = cost.outline(studied.model)
        whole = self.outline.cost()
        self.whole = whole
        self._attention = max(1, sum(block.attn_macs for block in whole.blocks))  # 0 where all of it was cut out before
        self._mlp = max(1, sum(block.mlp_macs for block in whole.blocks))
        self._known: dict[tuple[Dims, ...], Tried] = {}
        self._done = 0.0
        self._progress = progress
        self.limits = budget.check_reach(self.outline, self.request)
        self._table, self._timer = None, timer
        if request.keep.latency is not None:
            self._table = table or latency.measure(studied.beside or studied.dense, request.latency_batch, timer=timer)

    @property
    def all(self) -> list[Tried]:
        return list(self._known.values())

    def __call__(self, dims: tuple[Dims, ...], how: str) -> Tried:
        if dims not in self._known:
            small = self.draw(dims).model
            judged, spent = self.judge(small), self.outline.cost(dims)
            self._done += self.judge.images * spent.macs
            self._known[dims] = Tried(
                how,
                dims,
                sum(block.attn_macs for block in spent.blocks) / self._attention,
                sum(block.mlp_macs for block in spent.blocks) / self._mlp,
                spent.macs,
                spent.params,
                *judged,
            )
            if self._progress is not None:
                self._progress(len(self._known))
        return self._known[dims]

    def ratios(self, attention: float, mlp: float) -> tuple[Dims, ...]:
        return budget.by_ratios(self.outline, self.studied.scores, self.request, attention=attention, mlp=mlp)

    def fits(self, dims: Sequence[Dims], table: latency.Table | None) -> bool:
        spent, milliseconds = self.outline.cost(dims), self.request.keep.latency
        counted = all(getattr(spent, what) <= limit for what, limit in self.limits.items())
        return counted and (table is None or milliseconds is None or table.predict(dims) <= milliseconds * table.dense)

    def fill(self, dims: Sequence[Dims], table: latency.Table | None) -> tuple[Dims, ...] | str:
        """Widths within the budget, with what else the scores put into it; why the table puts it out of reach, where it does."""
        scores = self.studied.scores
        if table is None:
            return budget.fill(self.outline, scores, self.request, dims)
        return _dims(program.attempt(self.outline, scores, self.request, table, least=dims))

    def by_scores(self, table: latency.Table | None) -> tuple[Dims, ...] | str:
        """What the scores alone would make of the budget; or why, as :meth:`fill`."""
        scores = self.studied.scores
        if table is None:
            return budget.fit_plan(self.outline, scores, self.request).dims
        return _dims(program.attempt(self.outline, scores, self.request, table))

    def settle(self, how: str, choose: Callable[[latency.Table | None], Sequence[Dims] | str]) -> _Rival:
        """The widths that ``choose`` makes of the budget; those for a budget of latency have been timed too."""

        def draw(table: latency.Table | None) -> Plan | str:
            dims = choose(table)
            return dims if isinstance(dims, str) else budget.best(self.outline, self.studied.scores, dims)

        if self._table is None:
            plan = draw(None)
            assert not isinstance(plan, str), "there is no table"
            return _Rival(self(plan.dims, how), None)
        settled = self.studied.settle(draw, self.request, self._table, timer=self._timer)
        return _Rival(self(settled.plan.dims, how), settled)

    def draw(self, dims: Sequence[Dims]) -> Pruned:
        return self.studied.cut(
            budget.best(self.outline, self.studied.scores, dims), decouple_qk=self.request.decouple_qk
        )

    def result(self, chosen: Tried, settled: latency.Settled | None = None) -> SearchResult:
        drawn = self.draw(chosen.dims)
        if settled is not None:
            drawn = replace(drawn, notes=(*drawn.notes, settled.text()), latency=settled)
        return SearchResult(drawn, chosen, self.all, self._done / self.whole.macs)


def _dims(plan: Plan | str) -> tuple[Dims, ...] | str:
    return plan if isinstance(plan, str) else plan.dims


class _Rival(NamedTuple):
    """Widths for a budget, judged, and timed where it is of latency."""

    tried: Tried
    settled: latency.Settled | None

    @property
    def rank(self) -> tuple[bool, float]:
        """The lowest is the best: within the budget, and the least worse."""
        return self.settled is not None and self.settled.over, self.tried.worse


def ratios(
    studied: Study,
    judge: Judge,
    request: Prune,
    *,
    table: latency.Table | None = None,
    timer: latency.Timer | None = None,
    progress: Callable[[int], None] | None = None,
) -> SearchResult:
    """Two ratios, one for all attention and one for all MLPs.

    A budget is hit as :func:`lotus.pruning.prune` hits it, and of all splits of it between attention and MLPs
    the one that is least worse is looked for: along each of :data:`DIRECTIONS` bisection finds the cut that meets the budget,
    then the angle is bisected round the best. For a budget of latency a table says which cut meets it, the best is timed, and
    all is done again by what that shows. With ``request.search.drop`` as few MACs as possible stay while the metric is at most
    that: the largest cut along each direction by bisection, then attention and MLPs alternate, first the one that loses less a
    saved MAC. Where the metric does not rise monotonically, the best that was seen and allowed is taken; where nothing is
    allowed, not even the model as it is, nothing is cut and ``notes`` say so.

    Args:
        studied: The model, measured.
        judge: Says how much worse a cut model is.
        request: The budget, or the allowed drop; ``search.grid``: points of the coarse grid an axis, 0 leaves it out (with a
            budget it serves the Pareto points alone).
        table: As of :meth:`Study.draw`, and so ``timer``.
        progress: told how many widths have been tried.

    Raises:
        Refused: a budget out of reach.
    """
    trial = _Trial(studied, judge, request, table=table, timer=timer, progress=progress)
    trial(trial.outline.dims, "dense")
    for a, m in itertools.product(range(trial.asks.grid), repeat=2):
        trial(trial.ratios(1 - COARSE * a, 1 - COARSE * m), "grid")
    drop = trial.asks.drop
    if drop is None:
        return trial.result(*trial.settle("budget", lambda table: _on_budget(trial, table)))

    def allowed(scale: float, *, part: float) -> bool:
        return trial(_along(trial, part, scale), "bisect").worse <= drop

    for part in DIRECTIONS:
        largest(functools.partial(allowed, part=part), 0.0, 1.0, FINE)
    chosen = _cheapest(trial, drop)
    return _told(trial.result(chosen if chosen.worse > drop else _alternate(trial, chosen, drop)), drop)


def blocks(
    studied: Study,
    judge: Judge,
    request: Prune,
    *,
    table: latency.Table | None = None,
    timer: latency.Timer | None = None,
    progress: Callable[[int], None] | None = None,
) -> SearchResult:
    """A ratio for the attention and the MLP of each block.

    Each is cut alone to ``request.search.levels`` widths and measured. On the lower convex hull of (MACs saved, worse) the steps
    of all of them are then taken in the order of what they lose a saved MAC, as if losses added up: a path from the whole
    model to the least, each plan within the one before. Where the budget is met it is filled; for an allowed drop the path is
    bisected, measured as a whole. For a budget of latency there is no path: of all ways to combine the widths that were
    measured, the one of the least sum within what a table predicts is filled, timed, and found again by what that shows. With
    a budget the plan that the scores alone would have made is measured too, and kept where it is better.

    Args:
        studied: The model, measured.
        judge: Says how much worse a cut model is.
        request: The budget, or the allowed drop.
        table: As of :meth:`Study.draw`, and so ``timer``.
        progress: told how many widths have been tried.

    Raises:
        Refused: a budget out of reach.
    """
    trial = _Trial(studied, judge, request, table=table, timer=timer, progress=progress)
    dense = trial.outline.dims
    trial(dense, "dense")
    halves, steps = _alone(trial)
    path = [dense]
    for _, index, _, kind, to in sorted(steps):
        now = path[-1][index]
        both = (
            to._replace(hidden=now.hidden, mlp_in=now.mlp_in) if kind == "attention" else now._replace(hidden=to.hidden)
        )
        path.append((*path[-1][:index], both, *path[-1][index + 1 :]))
    drop = trial.asks.drop
    if drop is not None:
        largest(lambda place: trial(path[int(place)], "greedy").worse <= drop, 0, len(path) - 1, 1)
        return _told(trial.result(_cheapest(trial, drop)), drop)

    def combine(table: latency.Table | None) -> Sequence[Dims] | str:
        if table is not None:
            found = program.allocate(trial.outline, halves, trial.request, table)
            return found if isinstance(found, str) else trial.fill(found, table)
        within = next((dims for dims in path if trial.fits(dims, None)), None)
        # The path's end is the least that can stay, unless qk-norm keeps it wider.
        return trial.by_scores(None) if within is None else trial.fill(within, None)

    how = "greedy" if request.keep.latency is None else "program"
    rivals = (trial.settle("scores", trial.by_scores), trial.settle(how, combine))
    return trial.result(*min(rivals, key=lambda rival: rival.rank))


def _alone(trial: _Trial) -> tuple[list[list[program.Option]], list[tuple[float, int, int, str, Dims]]]:
    """Each attention and each MLP cut alone and measured: its options, and its steps along the hull as (loss a saved MAC, block,
    place, part, widths)."""
    dense, scores, levels = trial.outline.dims, trial.studied.scores, trial.asks.levels
    steps: list[tuple[float, int, int, str, Dims]] = []
    halves: list[list[program.Option]] = []
    parts: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    for index, part in itertools.product(range(len(dense)), parts):
        points: list[tuple[float, float, Dims]] = []
        for level in range(1, levels + 1):
            to = budget.of_block(trial.outline, scores, trial.request, index=index, part=part, share=1 - level / levels)
            if to == dense[index] or any(to == known for *_, known in points):
                continue
            tried = trial((*dense[:index], to, *dense[index + 1 :]), "sensitivity")
            points.append((trial.whole.macs - tried.macs, tried.worse, to))
        halves.append([program.Option(to, max(0.0, worse)) for _, worse, to in [(0, 0.0, dense[index]), *points]])
        # Slopes rise along a hull, so that sorting by slope keeps the order of a module's own steps.
        steps += [(slope, index, place, part, to) for place, (slope, to) in enumerate(hull(points))]
    return halves, steps


def largest(allowed: Callable[[float], bool], low: float, high: float, step: float) -> float:
    """The largest number in [low, high], to ``step``, that is ``allowed``, by bisection; ``low`` is taken to be.

    Where ``allowed`` is not monotone it is one of those after which something is not allowed. Whole ends and a ``step`` of 1
    ask for whole numbers alone.
    """
    if allowed(high):
        return high
    while high - low > step:
        middle = (low + high) / 2 if step < 1 else (low + high) // 2
        if allowed(middle):
            low = middle
        else:
            high = middle
    return low


def hull(points: Sequence[tuple[float, float, Any]]) -> list[tuple[float, Any]]:
    """(slope, what) of each step along the lower convex hull of (saved, worse, what) points and the origin.

    A point that is not worse than the origin costs nothing: chance makes some cuts look better than none.
    """
    corners: list[tuple[float, float, Any]] = [(0.0, 0.0, None)]
    for saved, worse, what in sorted(points, key=lambda point: point[0]):
        worse = max(worse, 0.0)
        while True:
            x, y, _ = corners[-1]
            if len(corners) > 1:
                before_x, before_y, _ = corners[-2]
                if (worse - y) * (x - before_x) <= (y - before_y) * (saved - x):  # the last corner lies on or above
                    corners.pop()
                    continue
            break
        corners.append((saved, worse, what))
    return [(max(0.0, (b[1] - a[1]) / (b[0] - a[0])), b[2]) for a, b in itertools.pairwise(corners) if b[0] > a[0]]


def _along(trial: _Trial, part: float, scale: float) -> tuple[Dims, ...]:
    """Widths when ``scale`` of what a direction can take goes; ``part`` is the MLPs' part of the direction."""
    most = max(part, 1 - part)
    return trial.ratios(1 - scale * (1 - part) / most, 1 - scale * part / most)


def _on_budget(trial: _Trial, table: latency.Table | None) -> tuple[Dims, ...] | str:
    """The best split of the budget between attention and MLPs."""
    seen: dict[float, Tried] = {}

    def look(part: float) -> None:
        """The smallest cut along a direction that meets the budget: counted, not measured."""
        stays = largest(lambda scale: trial.fits(_along(trial, part, 1 - scale), table), 0.0, 1.0, 2.0**-12)
        dims = _along(trial, part, 1 - stays)
        if trial.fits(dims, table):  # else one of the two alone cannot save so much
            full = trial.fill(dims, table)
            seen[part] = trial(dims if isinstance(full, str) else full, "budget")

    for part in DIRECTIONS:
        look(part)
    if not seen:  # e.g. a budget near the least, which lies between two directions
        dims = trial.by_scores(table)
        return dims if isinstance(dims, str) else trial(dims, "scores").dims
    for _ in range(2):
        chosen = min(seen, key=lambda part: seen[part].worse)
        known = sorted(seen)
        place = known.index(chosen)
        for other in known[max(0, place - 1) : place] + known[place + 1 : place + 2]:
            look((chosen + other) / 2)
    return min(seen.values(), key=lambda one: one.worse).dims


def _alternate(trial: _Trial, chosen: Tried, drop: float) -> Tried:
    """Take more of attention and of the MLPs in turn, as far as ``drop`` allows; first the one that loses less a saved MAC."""

    def at(part: str, stays: float) -> Tried:
        attention, mlp = (stays, chosen.mlp) if part == "attention" else (chosen.attention, stays)
        return trial(trial.ratios(attention, mlp), "alternate")

    def allowed(gone: float, *, part: str, stays: float) -> bool:
        return at(part, stays - gone).worse <= drop

    def slope(part: str) -> float:
        tried = at(part, max(0.0, getattr(chosen, part) - 1 / 16))
        saved = chosen.macs - tried.macs
        return (tried.worse - chosen.worse) / saved if saved > 0 else math.inf

    for part in sorted(("attention", "mlp"), key=slope):
        stays = getattr(chosen, part)
        largest(functools.partial(allowed, part=part, stays=stays), 0.0, stays, FINE)
        chosen = _cheapest(trial, drop)
    return chosen


def _cheapest(trial: _Trial, drop: float) -> Tried:
    """Of what is allowed, what has the fewest MACs; the better of two alike. The model as it is where nothing is allowed:
    recovery between rounds may have moved it further from the dense one than ``drop``."""
    allowed = [one for one in trial.all if one.worse <= drop]
    return min(allowed, key=lambda one: (one.macs, one.worse)) if allowed else trial(trial.outline.dims, "dense")


def _told(found: SearchResult, drop: float) -> SearchResult:
    """With a note where nothing was allowed."""
    if found.chosen.worse > drop:
        found.notes.append(
            f"Nothing that was tried is within {drop:.4g} of the dense model, and what this began with is at "
            f"{found.chosen.worse:.4g}: nothing is cut here. Allow more, or change what it recovers by."
        )
    return found
