"""A model that is gone through once, and cut from there to any budget: rotated, measured, scored, drawn, compensated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from lotus.config import Prune
from lotus.pruning import budget, criteria, latency, measure, program, scoring, surgery, unfit
from lotus.pruning import compensate as folds
from lotus.pruning import rotate as turns
from lotus.pruning.plan import BlockPlan, Plan
from lotus.pruning.wrapping import Batches, passes_of
from lotus.vit import anatomy, cost, families
from lotus.vit import model as door
from selection import methods
from selection.errors import Refused

Progress = Callable[[int], None]
"""Told the images gone through so far."""


@dataclass(frozen=True, eq=False)
class Given:
    """What a criterion has beside the model and the images."""

    shelves: Sequence[ModuleType] = ()
    """Modules with criteria of the user's own."""
    gates: Mapping[str, Tensor] | None = None
    """Learned gates by site, for a criterion that reads them."""
    seed: int = 0
    """For the criterion ``random``."""


@dataclass(frozen=True)
class Pruned:
    """A dimension lottery's outcome."""

    model: nn.Module
    """The small model, in eval mode."""
    plan: Plan
    before: dict[str, int]
    """``params`` and ``macs``."""
    after: dict[str, int]
    scores: dict[str, np.ndarray]
    """Site -> a score a unit; ``blocks.3.attn`` (H * V,), ``blocks.3.mlp`` (F,), ``blocks.3.qk`` (H * Q,)."""
    images: int
    """Calibration images; 0 where none were needed."""
    forwards: int
    """Forward passes of an image that this took; a backward counts as two, squared derivatives by weights as one more."""
    notes: tuple[str, ...]
    """Where a step was not possible, and what was done instead."""
    latency: latency.Settled | None = None
    """What was asked of the clock, predicted and measured; None without such a budget."""
    turned: Mapping[str, turns.Turns] = field(default_factory=dict)
    """How heads were turned before the cut, by block."""

    def text(self) -> str:
        """The plan for people: what stays of each block, what it costs, and the notes."""
        rows = [f"{'block':>5} {'heads':>7} {'q/k':>7} {'v':>7} {'MLP units':>11}"]
        for i, plan in enumerate(self.plan.blocks):
            now, of = plan.dims, plan.of
            cells = [f"{new}/{old}" for new, old in zip(now[:4], of[:4], strict=True)]
            rows.append(f"{i:>5} {cells[0]:>7} {cells[1]:>7} {cells[2]:>7} {cells[3]:>11}{_gone(plan)}")
        for what, name in (("macs", "MACs an image"), ("params", "parameters")):
            share = self.after[what] / self.before[what]
            rows.append(f"{name}: {self.after[what]:,} of {self.before[what]:,} ({share:.3f})")
        return "\n".join([*rows, *self.notes])


@dataclass(frozen=True)
class Study:
    """A model that has been gone through and scored: it can be cut to any budgets from here, without the images."""

    model: nn.Module
    dense: nn.Module
    """What is cut: ``model`` with its heads rotated."""
    measured: measure.Measured
    scores: dict[str, np.ndarray]
    request: Prune
    """What it was gone through for: ``criterion``, ``rotate``, ``compensate`` and ``in_channels`` are as in there whatever is drawn."""
    images: int
    forwards: int
    notes: tuple[str, ...]
    beside: nn.Module | None = None
    """What a budget of latency is a fraction of, where that is not ``model``, which was cut from it before."""
    turned: Mapping[str, turns.Turns] = field(default_factory=dict)
    """How the heads of ``dense`` are turned, by block."""

    def draw(
        self,
        request: Prune,
        *,
        whole: cost.Cost | None = None,
        within: Plan | None = None,
        table: latency.Table | None = None,
        timer: latency.Timer | None = None,
    ) -> Pruned:
        """Cut to the budget of ``request``, by its ``scope``, ``round``, ``decouple_qk`` and ``sublayers``, and by ``in_channels`` where they are
        scored.

        For a budget of latency the plan is measured, and drawn again by what that shows, unless the table is of another device.

        Args:
            whole: What the budget is a fraction of, where that is not the model.
            within: A plan of a larger model, of which all that this one keeps is to be a part; of the same settings.
            table: What widths take on this device, for a budget of latency; None: measured now, at ``request.latency_batch``.
            timer: milliseconds of a model; None: by the clock, at the table's batch.

        Raises:
            Refused: a budget out of reach, or of another way than this one.
        """
        request, measured = rounded(self.model, request, table)
        if not anatomy.is_vit(self.dense):
            if request.sublayers:
                anatomy.plain(self.dense, "prune.sublayers")
            request = request.model_copy(update={"sublayers": False})
        large, settled = None if within is None else within.dims, None
        if request.keep.latency is not None:
            table = table or latency.measure(self.beside or self.dense, request.latency_batch, timer=timer)

            def attempt(now: latency.Table) -> Plan | str:
                return program.attempt(self._outline, self.scores, request, now, whole=whole, within=large)

            settled = self.settle(attempt, request, table, timer=timer)
            plan = settled.plan
        else:
            plan = budget.fit_plan(self._outline, self.scores, request, whole=whole, within=large)
        drawn = self.cut(plan, decouple_qk=request.decouple_qk)
        return dataclasses.replace(
            drawn,
            before=_brief(whole or self._outline.cost()),
            notes=(*measured, *drawn.notes, *([] if settled is None else [settled.text()])),
            latency=settled,
        )

    def settle(
        self,
        draw: Callable[[latency.Table], Plan | str],
        request: Prune,
        table: latency.Table,
        *,
        timer: latency.Timer | None = None,
    ) -> latency.Settled:
        """What :func:`lotus.pruning.latency.settle` makes of ``draw``, timed by ``timer``; where the table is of another device,
        what it says itself.

        Raises:
            Refused: a budget out of reach; a table of another model.
        """
        whole, here, keep = self.beside or self.model, str(next(self.dense.parameters()).device), request.keep.latency
        assert keep is not None
        if any(dims != table.of for dims in cost.outline(whole).dims):
            raise Refused("prune.keep.latency: the table was measured on a model of other widths. Measure this one.")

        def take(plan: Plan) -> float:  # what is folded into the weights takes no time
            small = families.close(surgery.cut(self.dense, plan), self.model)
            return latency.beside(whole, small, table.batch, timer=timer)

        if timer is None and table.device != here:
            plan = draw(table)
            if isinstance(plan, str):
                raise Refused(plan)
            return latency.Settled(plan, table, keep, table.predict(plan.dims) / table.dense, None)
        least = program.least_plan(self._outline, self.scores, request, table)
        return latency.settle(draw, least, table, keep, take)

    def nested(
        self,
        request: Prune,
        keeps: Sequence[Mapping[str, float]],
        *,
        table: latency.Table | None = None,
        timer: latency.Timer | None = None,
    ) -> list[Pruned]:
        """Cut as ``request``, but to several budgets, the largest first: what a smaller model keeps, all larger ones keep.

        Raises:
            Refused: as :meth:`draw`, and where the budgets do not fall.
        """
        each = [request.at(keep) for keep in keeps]
        budget.check_nested([one.keep.asked for one in each])
        request, measured = rounded(self.model, request, table)
        if table is None and any(one.keep.latency is not None for one in each):
            table = latency.measure(self.beside or self.dense, request.latency_batch, timer=timer)
        drawn: list[Pruned] = []
        for one in each:
            within = drawn[-1].plan if drawn else None
            one = one.model_copy(update={"round": request.round})
            drawn.append(self.draw(one, within=within, table=table, timer=timer))
        return [dataclasses.replace(one, notes=(*measured, *one.notes)) for one in drawn]

    @property
    def _outline(self) -> cost.Outline:
        """Of ``model``: opened, as ``dense`` is, keys have biases that a cut model may lose again."""
        return cost.outline(self.model)

    @functools.cached_property
    def _origin(self) -> dict[str, Any] | None:
        """How the model was made, which a cut one no longer shows; looked up once, since a search cuts a hundred times.

        One that timm would not make so can be used all the same; save() says why it cannot be saved.
        """
        return door.remade(self.model)

    def cut(self, plan: Plan, *, decouple_qk: bool = False) -> Pruned:
        """Cut by a plan for :attr:`dense`, and compensate.

        Raises:
            Refused: a plan for another model.
        """
        outline = self._outline
        small = families.close(surgery.cut(self.dense, plan), self.model)
        notes = folds.carry_over(small, self.dense, plan, self.measured.moments, self.request.compensate)
        if self._origin is not None:
            door.remember(small, self._origin)
        return Pruned(
            small.eval(),
            plan,
            _brief(outline.cost()),
            _brief(plan.cost(outline)),
            self.scores,
            images=self.images,
            forwards=self.forwards,
            notes=(*_notes(self.dense, decouple_qk, rotated=self.request.rotate), *self.notes, *notes),
            turned=self.turned,
        )


def study(
    model: nn.Module, batches: Batches, request: Prune, given: Given = Given(), *, progress: Progress | None = None
) -> Study:
    """Rotate, measure and score, by the ``criterion``, ``rotate``, ``compensate`` and ``in_channels`` of ``request``.

    Args:
        model, batches: As of :func:`lotus.prune`.
        given: What the criterion has beside them.
        progress: Told the calibration images gone through so far, in all passes together.

    Raises:
        Refused: a model that cannot be cut, no such criterion, calibration data that do not serve; says what would.
    """
    method = criterion(request, given.shelves)
    unfit.refuse_model(model)
    reads = set(methods.reads(method))
    if "gates" in reads:
        unfit.refuse_gates(model, given.gates, request.in_channels)
    passes = unfit.checked(model, passes_of(batches))
    dense, notes = families.opened(model), []
    turned, looked_at = dict[str, turns.Turns](), 0
    if request.rotate and any(block.has_attn for block in anatomy.blocks(model)):
        learned = "gates" in reads
        turned, looked_at, progress = _turns(dense, passes, progress, v=not learned)
        dense = turns.apply(dense, turned)
        if learned:
            notes.append(
                "Value dimensions are cut by index, not rotated: a learned gate belongs to the dimension it was learned on."
            )
    if "attention" in reads:
        anatomy.plain(model, "prune.criterion: attention")
    measured, forwards = _measured(dense, passes, request, reads, progress)
    return Study(
        model,
        dense,
        measured,
        scoring.score(
            dense,
            method,
            request.criterion.options,
            measured=measured,
            gates=given.gates,
            in_channels=request.in_channels,
            seed=given.seed,
        ),
        request,
        images=max(looked_at, measured.images),
        forwards=looked_at + forwards,
        notes=tuple(notes),
        turned=turned,
    )


def _turns(
    dense: nn.Module, passes: Callable[[], Iterable[Any]], progress: Progress | None, *, v: bool
) -> tuple[dict[str, turns.Turns], int, Progress | None]:
    """How the heads are to be turned, the images that this took, and the progress of what comes after."""
    gone = [0]  # images; of large ones not all are looked at

    def told(images: int) -> None:
        gone[0] = images
        if progress is not None:
            progress(images)

    statistics = turns.statistics(dense, passes(), progress=told)
    return turns.turns(dense, statistics, v=v), next(iter(statistics.values())).logits.images, beyond(progress, gone[0])


def _measured(
    dense: nn.Module, passes: Callable[[], Iterable[Any]], request: Prune, reads: set[str], progress: Progress | None
) -> tuple[measure.Measured, int]:
    """What the criterion reads of the images and compensation needs, and the forward passes that this took."""
    squares, spread = bool(reads & {"read_squares", "write_squares"}), bool(reads & {"covariance", "gain"})
    each = _forwards(request, reads)
    if not each:
        return measure.Measured(), 0
    measured = measure.measure(
        dense,
        passes(),
        gradients="gradients" in reads,
        moments="affine" if spread else request.compensate,
        logits=spread,
        squares=squares,
        in_channels=request.in_channels,
        attention="attention" in reads,
        progress=progress,
    )
    return measured, each * measured.images


def _forwards(request: Prune, reads: set[str]) -> int:
    """Forward passes that measuring takes of an image; a backward one is two."""
    squares = bool(reads & {"read_squares", "write_squares"})
    if squares or "gradients" in reads:  # of a backbone no label is read
        return 3 + squares
    return int(bool(reads & {"covariance", "gain", "attention"}) or request.compensate != "none")


def forwards_of(request: Prune, shelves: Iterable[ModuleType] = ()) -> int:
    """Forward passes of the dense model that looking at an image takes, by one embedding dimension: rotating, measuring, narrowing.

    Raises:
        Refused: as :func:`criterion`.
    """
    reads = set(methods.reads(criterion(request, shelves)))
    return request.rotate + _forwards(request, reads) + (request.embed_fraction < 1)


def criterion(request: Prune, shelves: Iterable[ModuleType]) -> Callable[..., np.ndarray]:
    """The criterion that is asked for.

    Raises:
        Refused: there is none of that name, or it has no such setting.
    """
    method = methods.find([criteria, *shelves], request.criterion.name, place="prune.criterion", here=scoring.READS)
    methods.check_settings(method, request.criterion.options, place="prune.criterion")
    return method


def rounded(model: nn.Module, request: Prune, table: latency.Table | None = None) -> tuple[Prune, list[str]]:
    """``request`` with the number that ``round: auto`` stands for on the model's device, and what is to be said of it."""
    if request.round != "auto":
        return request, []
    multiple = latency.fast_multiple(model, request.latency_batch if table is None else table.batch)
    return request.model_copy(update={"round": multiple}), [f"Widths stay multiples of {multiple}: measured."]


def beyond(progress: Progress | None, done: int) -> Progress | None:
    return None if progress is None else lambda images: progress(done + images)


def _notes(model: nn.Module, decouple_qk: bool, *, rotated: bool) -> list[str]:
    """What the architecture rules out."""
    blocks, notes = anatomy.blocks(model), []
    rest = "Value dimensions are cut alone." if decouple_qk else "Value dimensions too, since decouple_qk is off."
    for whole, why in (
        ([block for block in blocks if block.qk_norm], "qk-norm reads them all"),
        ([block for block in blocks if block.rotary and not block.qk_norm], "rotary positions turn them in pairs"),
    ):
        if whole:
            notes.append(f"Query/key dimensions stay whole where {why} ({whole[0].name} to {whole[-1].name}). {rest}")
    if rotated and any(block.norm("attn") is not None for block in blocks):
        notes.append("Value dimensions are cut by index, not rotated: a norm stands between them and proj.")
    if any(block.norm(sublayer) is not None for block in blocks for sublayer in ("attn", "mlp")):
        notes.append(
            "The norms before proj and fc2 take their statistics from what stays, rescaled to what they were on average."
        )
    return notes


def _gone(plan: BlockPlan) -> str:
    """What of a block is gone as a whole, and what it reads where that is not all."""
    if not plan.heads and not plan.units:
        return "  gone"
    said = ["no attention" if not plan.heads else "", "no MLP" if not plan.units else ""]
    for what, reads in (("attention", plan.attn_in), ("MLP", plan.mlp_in)):
        said.append(f"{what} reads {len(reads)}" if reads is not None else "")
    return "".join(f"  {one}" for one in said if one)


def _brief(whole: cost.Cost) -> dict[str, int]:
    return {"params": whole.params, "macs": whole.macs}
