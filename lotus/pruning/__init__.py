"""Pruning: score the units of a ViT, keep what a budget allows, cut the rest and fold what it carried into what stays.

small = lotus.prune(model, batches, keep={"macs": 0.5})
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lotus.pruning import budget, criteria, latency, measure, surgery
from lotus.pruning import compensate as folds
from lotus.pruning import rotate as turns
from lotus.pruning.budget import Rank
from lotus.pruning.compensate import Compensate
from lotus.pruning.plan import Plan
from lotus.pruning.spec import load, save
from lotus.vit import anatomy, cost
from lotus.vit import model as door
from selection import methods
from selection.errors import Refused

__all__ = ["Drawn", "Plan", "Study", "load", "lottery", "prune", "save", "study"]

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Drawn:
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

    def text(self) -> str:
        """The plan for people: what stays of each block, what it costs, and the notes."""
        rows = [f"{'block':>5} {'heads':>7} {'q/k':>7} {'v':>7} {'MLP units':>11}"]
        for i, plan in enumerate(self.plan.blocks):
            now, of = plan.dims, plan.of
            cells = [f"{new}/{old}" for new, old in zip(now, of, strict=True)]
            rows.append(f"{i:>5} {cells[0]:>7} {cells[1]:>7} {cells[2]:>7} {cells[3]:>11}")
        for what, name in (("macs", "MACs an image"), ("params", "parameters")):
            share = self.after[what] / self.before[what]
            rows.append(f"{name}: {self.after[what]:,} of {self.before[what]:,} ({share:.3f})")
        return "\n".join([*rows, *self.notes])


def prune(
    model: nn.Module,
    batches: Batches,
    keep: Mapping[str, float],
    *,
    criterion: str | Callable[..., np.ndarray] = "fisher",
    rank: Rank = "pool",
    round: int = 8,
    rotate: bool = True,
    split: bool = False,
    compensate: Compensate = "affine",
    gates: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A smaller model within the budget, in eval mode, on the model's device; the model itself is left as it was.

    Args:
        model: Any supported timm ViT, trained by LOTUS or not.
        batches: Calibration data: tuples that begin with images and labels, some 2,000 images; or a function that gives them.
            With ``rotate`` they are gone through twice; a plain iterator's are kept in memory until then.
        keep: ``macs``, ``params``, ``latency`` (on the model's device, at a batch of 64), or several, as parts of the model's.
        criterion: A name from :mod:`lotus.pruning.criteria`, or a function like those.
        rank: ``pool``: all units compete by score a saved cost; ``kind``: heads, head dimensions, MLP units among themselves.
        round: Widths stay a multiple of this.
        rotate: Turn each head's query/key and value dimensions into those of which the first few carry the most, and only
            then score and cut (:mod:`lotus.pruning.rotate`).
        split: Let a block keep more value than query/key dimensions, or fewer. timm's own attention cannot hold that.
        compensate: ``none``, ``mean`` or ``affine``: how what was cut is folded into what stays.
        gates: Learned gates by site, for the criterion ``gate``.
        seed: For the criterion ``random``.

    Raises:
        Refused: a model that cannot be cut, a budget out of reach, calibration data that do not serve; says what would.
    """
    return lottery(
        model,
        batches,
        keep,
        criterion=criterion,
        rank=rank,
        round=round,
        rotate=rotate,
        split=split,
        compensate=compensate,
        gates=gates,
        seed=seed,
    ).model


def lottery(
    model: nn.Module,
    batches: Batches,
    keep: Mapping[str, float],
    *,
    criterion: str | Callable[..., np.ndarray] = "fisher",
    criterion_options: Mapping[str, Any] | None = None,
    shelves: Iterable[ModuleType] = (),
    rank: Rank = "pool",
    round: int = 8,
    rotate: bool = True,
    split: bool = False,
    compensate: Compensate = "affine",
    gates: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    table: latency.Table | None = None,
    progress: Callable[[int], None] | None = None,
) -> Drawn:
    """As :func:`prune`, with all that came to light on the way.

    Args:
        table: As of :meth:`Study.draw`.
        criterion_options: Settings of the criterion.
        shelves: Modules with criteria of the user's own.
        progress: Told the calibration images gone through so far, in all passes together.

    Raises:
        Refused: as :func:`prune`.
    """
    share = budget.check_keep(keep)
    if all(part == 1 for part in share.values()):  # then nothing is to be turned or folded
        rotate, compensate = False, "none"
    return study(
        model,
        batches,
        criterion=criterion,
        criterion_options=criterion_options,
        shelves=shelves,
        rotate=rotate,
        compensate=compensate,
        gates=gates,
        seed=seed,
        progress=progress,
    ).draw(share, rank=rank, round=round, split=split, table=table)


@dataclass(frozen=True)
class Study:
    """A model that has been gone through and scored: it can be cut to any budgets from here, without the images."""

    model: nn.Module
    dense: nn.Module
    """What is cut: ``model`` with its heads rotated."""
    measured: measure.Measured
    scores: dict[str, np.ndarray]
    compensate: Compensate
    images: int
    forwards: int
    notes: tuple[str, ...]

    def draw(
        self,
        keep: Mapping[str, float],
        *,
        rank: Rank = "pool",
        round: int = 8,
        split: bool = False,
        table: latency.Table | None = None,
    ) -> Drawn:
        """Cut to a budget; the arguments are those of :func:`prune`.

        Args:
            table: what widths take on this device, for a budget of latency; None: measured now, at a batch of 64.

        Raises:
            Refused: a budget that is none, or out of reach.
        """
        outline = cost.outline(self.dense)
        if "latency" in budget.check_keep(keep):
            if rank != "pool" or split:
                raise Refused("prune.keep.latency: goes with prune.rank=pool and prune.split=false.")
            table = table or latency.measure(self.dense, 64)
            plan = latency.fit_plan(outline, self.scores, keep, table, round=round)
        else:
            plan = budget.fit_plan(outline, self.scores, keep, rank=rank, round=round, split=split)
        small = surgery.cut(self.dense, plan)
        for block, before, kept in zip(anatomy.blocks(small), anatomy.blocks(self.dense), plan.blocks, strict=True):
            for site, linear, old, stay in (
                (f"{block.name}.attn", block.proj, before.proj, kept.outputs),
                (f"{block.name}.mlp", block.fc2, before.fc2, list(kept.units)),
            ):
                folds.apply(linear, old, stay, self.measured.moments.get(site), self.compensate)
        # Read off now: a cut model no longer shows what it was made as. One that timm would not make so can be used all the
        # same; save() says why it cannot be saved.
        with contextlib.suppress(Refused):
            door.remember(small, door.origin(self.model))
        return Drawn(
            small.eval(),
            plan,
            _brief(outline.cost()),
            _brief(plan.cost(outline)),
            self.scores,
            images=self.images,
            forwards=self.forwards,
            notes=(*_notes(self.dense, split), *self.notes, *_timed(table if "latency" in keep else None, plan)),
        )


def study(
    model: nn.Module,
    batches: Batches,
    *,
    criterion: str | Callable[..., np.ndarray] = "fisher",
    criterion_options: Mapping[str, Any] | None = None,
    shelves: Iterable[ModuleType] = (),
    rotate: bool = True,
    compensate: Compensate = "affine",
    gates: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Study:
    """Rotate, measure and score; the arguments are those of :func:`lottery`.

    Raises:
        Refused: as :func:`prune`, but for the budget.
    """
    method = (
        criterion if callable(criterion) else methods.find([criteria, *shelves], criterion, place="prune.criterion")
    )
    options = dict(criterion_options or {})
    methods.check_settings(method, options, place="prune.criterion")
    if compensate not in folds.HOW:
        raise Refused(f"prune.compensate: there is no {compensate!r}. Here: {', '.join(folds.HOW)}.")
    _refuse_unfit(model)
    reads = set(methods.reads(method))
    if "gates" in reads:
        _refuse_gates(model, gates)
    squares, spread = bool(reads & {"read_squares", "write_squares"}), bool(reads & {"covariance", "gain"})
    labelled = squares or "gradients" in reads
    passes = _passes(batches)
    dense, turned, notes = model, 0, []
    if rotate:
        found = turns.statistics(model, passes(), progress=progress)
        turned = next(iter(found.values())).logits.images
        learned = "gates" in reads
        dense = turns.rotate(model, found, v=not learned)
        if learned:
            notes.append(
                "Value dimensions are cut by index, not rotated: a learned gate belongs to the dimension it was learned on."
            )
    measured = measure.Measured()
    if labelled or spread or compensate != "none":
        measured = measure.measure(
            dense,
            passes(),
            gradients="gradients" in reads,
            moments="affine" if spread else compensate,
            logits=spread,
            squares=squares,
            progress=_beyond(progress, turned),
        )
    return Study(
        model,
        dense,
        measured,
        measure.score(dense, method, options, measured=measured, gates=gates, seed=seed),
        compensate,
        images=max(turned, measured.images),
        forwards=turned + (3 + squares if labelled else 1) * measured.images,
        notes=tuple(notes),
    )


def _passes(batches: Batches) -> Callable[[], Iterable[Any]]:
    """The batches, as often as they are asked for."""
    if callable(batches):
        return batches
    again = list(batches) if iter(batches) is batches else batches
    return lambda: again


def _beyond(progress: Callable[[int], None] | None, done: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda images: progress(done + images)


def _notes(model: nn.Module, split: bool) -> list[str]:
    """What the architecture rules out."""
    normed = [block.name for block in anatomy.blocks(model) if block.qk_norm]
    if not normed:
        return []
    rest = "Value dimensions are rotated and cut alone." if split else "Value dimensions too, since split is off."
    return [f"Query/key dimensions stay whole where qk-norm reads them all ({normed[0]} to {normed[-1]}). {rest}"]


def _timed(table: latency.Table | None, plan: Plan) -> list[str]:
    """What a table predicts."""
    if table is None:
        return []
    then = table.predict(plan.dims)
    return [
        f"Predicted from timings on {table.device} at batch {table.batch}: {then:.3g} ms of {table.dense:.3g} ms ({then / table.dense:.3f})."
    ]


def _brief(whole: cost.Cost) -> dict[str, int]:
    return {"params": whole.params, "macs": whole.macs}


def _refuse_unfit(model: nn.Module) -> None:
    for block in anatomy.blocks(model):
        for name in ("qkv", "proj", "fc1", "fc2"):
            linear = getattr(block, name)
            if linear._forward_pre_hooks or linear._forward_hooks:
                raise Refused(
                    f"{block.name}: {name} carries a forward hook, which a cut would lose. Take it off first (gates: remove())."
                )
    for where, weight in model.named_parameters():
        if weight.is_meta:
            raise Refused(f"{where}: has no memory (meta device). Load the weights first.")
        if not torch.isfinite(weight).all():
            raise Refused(f"{where}: holds values that are not finite. Prune a checkpoint from before.")


def _refuse_gates(model: nn.Module, gates: Mapping[str, Tensor] | None) -> None:
    """Refuse gates that are missing or of other widths."""
    for site, linear in anatomy.sites(model).items():
        if gates is None or site not in gates:
            raise Refused(
                f"prune.criterion: this one reads the learned gate of {site}, which is not here. Train with gates, or take another."
            )
        if gates[site].numel() != linear.in_features:
            raise Refused(f"prune.criterion: {gates[site].numel()} gates for the {linear.in_features} units of {site}.")
