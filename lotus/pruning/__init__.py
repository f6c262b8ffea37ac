"""Pruning: score the units of a ViT, keep what a budget allows, cut the rest and fold what it carried into what stays.

small = lotus.prune(model, batches, keep={"macs": 0.5})
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lotus.pruning import budget, criteria, latency, measure, narrow, surgery
from lotus.pruning import compensate as folds
from lotus.pruning import rotate as turns
from lotus.pruning.budget import Rank
from lotus.pruning.check import Verified, verify
from lotus.pruning.compensate import Compensate
from lotus.pruning.narrow import Width
from lotus.pruning.plan import BlockPlan, Plan
from lotus.pruning.spec import load, save
from lotus.vit import anatomy, cost, families
from lotus.vit import model as door
from selection import methods
from selection.errors import Refused

__all__ = ["Drawn", "Plan", "Study", "Verified", "load", "lottery", "prune", "save", "study", "verify"]

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
_SOME = 8
"""One in so many calibration images tries a narrower stream, and another one in so many tells how good it is; of few images all do."""


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
    latency: latency.Settled | None = None
    """What was asked of the clock, predicted and measured; None without such a budget."""

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


def prune(
    model: nn.Module,
    batches: Batches,
    keep: Mapping[str, float],
    *,
    criterion: str | Callable[..., np.ndarray] = "fisher",
    rank: Rank = "pool",
    round: int | Literal["auto"] = 8,
    rotate: bool = True,
    split: bool = False,
    compensate: Compensate = "affine",
    inputs: bool = False,
    branches: bool | None = None,
    width: Width = "auto",
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
        rank: ``pool``: all units compete by score a saved cost; ``kind``: heads, head dimensions, MLP units among themselves;
            ``quantile``: one threshold for all scores, whatever a unit costs; ``uniform``: the same widths in every block.
        round: Widths stay a multiple of this; ``auto``: the smallest that is fast on the model's device, by measurement (seconds).
        rotate: Turn each head's query/key and value dimensions into those of which the first few carry the most, and only
            then score and cut (:mod:`lotus.pruning.rotate`).
        split: Let a block keep more value than query/key dimensions, or fewer. timm's own attention cannot hold that.
        compensate: ``none``, ``mean`` or ``affine``: how what was cut is folded into what stays.
        inputs: Channels that attention and the MLP read of the stream may go too; the stream keeps its width.
        branches: Whether whole branches, and blocks, may go. None: only where units alone cannot meet the budget.
        width: The part of the stream's channels that stays (:mod:`lotus.pruning.narrow`); ``"search"`` tries six and takes the
            one that agrees best with the model on the calibration images; ``"auto"`` looks beyond all channels only where
            what is left by cutting units is more than :data:`narrow.CLOSE` from the model, and stops where fewer channels
            agree less. None: all stay.
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
        inputs=inputs,
        branches=branches,
        width=width,
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
    round: int | Literal["auto"] = 8,
    rotate: bool = True,
    split: bool = False,
    compensate: Compensate = "affine",
    inputs: bool = False,
    branches: bool | None = None,
    width: Width = "auto",
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
    _refuse_unfit(model)
    share = budget.check_keep(keep)
    wants = narrow.tries(model, width, share, plain=not (inputs or branches))
    if all(part == 1 for part in (*share.values(), *wants)):  # then nothing is to be turned or folded
        rotate, compensate = False, "none"
    passes = _passes(batches)
    round, notes = _multiple(model, round, table)
    if "latency" in share and (wants != (1.0,) or inputs or branches):
        raise Refused(
            "prune.keep.latency: is predicted for heads, their dimensions and MLP units alone. Leave inputs, branches and width out."
        )
    if wants != (1.0,) and inputs and "gates" in _reads(criterion, shelves):
        raise Refused(
            "prune.width: turns the stream, and learned gates of inputs belong to its channels. Leave one out."
        )
    widths = narrow.useful(model, wants, share, round)
    learn = functools.partial(
        study,
        criterion=criterion,
        criterion_options=criterion_options,
        shelves=shelves,
        rotate=rotate,
        compensate=compensate,
        inputs=inputs,
        gates=gates,
        seed=seed,
    )
    cut = functools.partial(
        Study.draw, keep=share, rank=rank, round=round, split=split, branches=branches, whole=cost.count(model), table=table
    )  # fmt: skip
    streams = _Streams(model, passes, learn, cut, compensate, progress)
    if width == "auto" and len(widths) > 1:
        streams.descend(widths)
    else:
        for channels in widths:
            drawn = streams.take(channels)
            if len(widths) > 1:
                streams.judge(channels, drawn, 1)
    best = streams.best()
    return dataclasses.replace(best, notes=(*notes, *best.notes))


class _Streams:
    """A model cut to one budget at several widths of its stream, and how far each is from the model."""

    def __init__(
        self,
        model: nn.Module,
        passes: Callable[[], Iterable[Any]],
        learn: Callable[..., Study],
        cut: Callable[[Study], Drawn],
        compensate: Compensate,
        progress: Callable[[int], None] | None,
    ) -> None:
        """
        Args:
            learn: :func:`study`, but for the model, the images and the progress.
            cut: :meth:`Study.draw` to the budget.
        """
        self.model, self.passes, self.learn, self.cut = model, passes, learn, cut
        self.compensate, self.progress = compensate, progress
        self.wide = cost.outline(model).width
        self.done = self.forwards = 0
        self.apart: dict[int, float] = {}
        """Width -> nats an image from the model."""
        self.drawn: dict[int, Drawn] = {}
        """By all images."""
        self._stream: dict[int, narrow.Statistics] = {}
        self._images = 0
        self._beyond: Refused | None = None

    def descend(self, widths: Sequence[int]) -> None:
        """All channels; where that is too far from the model fewer, as long as that is nearer, tried with some of the images; and
        the last of those with all of them. Few images are all looked at each time."""
        drawn = self.take(widths[0])
        some = _SOME if self._count() >= measure.FEWEST else 1
        least, nearest = self.judge(widths[0], drawn, some), None
        if least <= narrow.CLOSE:
            return
        for channels in widths[1:]:
            apart = self.judge(channels, self.take(channels, some), some)
            if apart > least:
                break
            least, nearest = apart, channels
        if nearest is not None and some > 1:
            self.judge(nearest, self.take(nearest), some)

    def take(self, channels: int, every: int = 1) -> Drawn | None:
        """Cut with so many channels, as one in ``every`` image has it; None where the budget cannot be met so."""
        given = self.passes if every == 1 else functools.partial(_thinned, self.passes, every)
        start = self.model
        if channels < self.wide:
            if every not in self._stream:
                self._stream[every] = narrow.statistics(
                    self.model, _fitting(self.model, given)(), progress=_beyond(self.progress, self.done)
                )
                self.done += self._stream[every].images
                self.forwards += self._stream[every].images
            start = narrow.narrow(self.model, self._stream[every], channels, compensate=self.compensate)
        studied = self.learn(start, given, progress=_beyond(self.progress, self.done))
        self.done += (1 + studied.rotated) * studied.images
        self.forwards += studied.forwards
        if every == 1:
            self._images = studied.images
        try:
            drawn = self.cut(studied)
        except Refused as refusal:  # a narrower stream may do it
            self._beyond = refusal
            return None
        finally:
            del studied  # or the next one's statistics would come on top of these
        if every == 1:
            self.drawn[channels] = drawn
        return drawn

    def judge(self, channels: int, drawn: Drawn | None, every: int) -> float:
        """How far it is from the model, infinite where there is none: by one in ``every`` image, others than a trial saw."""
        if drawn is None:
            return math.inf
        self.apart[channels], images = narrow.apart(self.model, drawn.model, _thinned(self.passes, every, every - 1))
        self.forwards += 2 * images
        return self.apart[channels]

    def _count(self) -> int:
        """How many images there are, which nothing may have read yet."""
        if not self._images:
            self._images = sum(len(images) for images, _ in measure.pairs(self.passes(), labelled=False))
        return self._images

    def best(self) -> Drawn:
        """The nearest of those by all images, with what was found on the way."""
        if not self.drawn and self._beyond is not None:
            raise self._beyond
        channels = min(self.drawn, key=lambda width: self.apart.get(width, 0.0))
        found, notes = self.drawn[channels], []
        if channels < self.wide:
            notes.append(f"Of the stream's {self.wide} channels {channels} stay, turned.")
        if len(self.apart) > 1:
            lines = ", ".join(f"{width}: {apart:.4f}" for width, apart in self.apart.items())
            notes.append(f"Widths tried, and how far each is from the dense model (nats an image): {lines}.")
        return dataclasses.replace(found, forwards=self.forwards, notes=(*notes, *found.notes))


def _thinned(passes: Callable[[], Iterable[Any]], every: int, first: int = 0) -> Iterator[Any]:
    """The batches with one in ``every`` of their images, from number ``first`` on."""
    done = 0
    for batch in passes():
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        start, done = (first - done) % every, done + len(parts[0])
        if start < len(parts[0]):
            yield tuple(None if part is None else part[start::every] for part in parts[:2])


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
    inputs: bool = False
    rotated: bool = True
    beside: nn.Module | None = None
    """What a budget of latency is a part of, where that is not ``model``, which was cut from it before."""

    def draw(
        self,
        keep: Mapping[str, float],
        *,
        rank: Rank = "pool",
        round: int | Literal["auto"] = 8,
        split: bool = False,
        branches: bool | None = None,
        whole: cost.Cost | None = None,
        within: Plan | None = None,
        table: latency.Table | None = None,
        timer: latency.Timer | None = None,
    ) -> Drawn:
        """Cut to a budget; the arguments are those of :func:`prune`.

        For a budget of latency the plan is measured, and drawn again by what that shows, unless the table is of another device.

        Args:
            whole: What ``keep`` is a part of, where that is not the model.
            within: A plan of a larger model, of which all that this one keeps is to be a part; of the same settings.
            table: What widths take on this device, for a budget of latency; None: measured now, at a batch of 64.
            timer: milliseconds of a model; None: by the clock, at the table's batch.

        Raises:
            Refused: a budget that is none, or out of reach.
        """
        round, measured = _multiple(self.model, round, table)
        outline, settled = self._outline, None
        if not anatomy.is_vit(self.dense):
            if branches:
                anatomy.plain(self.dense, "prune.branches")
            branches = False
        large = None if within is None else within.dims
        if "latency" in budget.check_keep(keep):
            if rank != "pool" or split or branches or self.inputs:
                raise Refused(
                    "prune.keep.latency: goes with prune.rank=pool, and without prune.split, prune.branches and prune.inputs."
                )
            table = table or latency.measure(self.beside or self.dense, 64, timer=timer)
            fit = functools.partial(
                latency.fit_plan, outline, self.scores, keep, round=round, whole=whole, within=large
            )
            settled = self.settle(fit, keep["latency"], table, timer=timer, round=round)
            plan = settled.plan
        else:
            plan = budget.fit_plan(
                outline,
                self.scores,
                keep,
                rank=rank,
                round=round,
                split=split,
                inputs=self.inputs,
                branches=branches,
                whole=whole,
                within=large,
            )
        drawn = self.cut(plan, split=split)
        return dataclasses.replace(
            drawn,
            before=_brief(whole or outline.cost()),
            notes=(*measured, *drawn.notes, *([] if settled is None else [settled.text()])),
            latency=settled,
        )

    def settle(
        self,
        draw: Callable[[latency.Table], Plan],
        keep: float,
        table: latency.Table,
        *,
        timer: latency.Timer | None = None,
        round: int = 8,
    ) -> latency.Settled:
        """What :func:`lotus.pruning.latency.settle` makes of ``draw``, timed by ``timer``; where the table is of another device,
        what it says itself.

        Raises:
            Refused: as ``draw``; a table of another model.
        """
        whole, here = self.beside or self.model, str(next(self.dense.parameters()).device)
        if any(dims != table.of for dims in cost.outline(whole).dims):
            raise Refused("prune.keep.latency: the table was measured on a model of other widths. Measure this one.")

        def take(plan: Plan) -> float:  # what is folded into the weights takes no time
            small = families.close(surgery.cut(self.dense, plan), self.model)
            return latency.beside(whole, small, table.batch, timer=timer)

        if timer is None and table.device != here:
            plan = draw(table)
            return latency.Settled(plan, table, keep, table.predict(plan.dims) / table.dense, None)
        least = latency.least_plan(self._outline, self.scores, table, round=round)
        return latency.settle(draw, least, table, keep, take)

    def nested(
        self,
        keeps: Sequence[Mapping[str, float]],
        *,
        round: int | Literal["auto"] = 8,
        split: bool = False,
        branches: bool | None = None,
        table: latency.Table | None = None,
        timer: latency.Timer | None = None,
    ) -> list[Drawn]:
        """Cut to several budgets, the largest first: what a smaller model keeps, all larger ones keep.

        Raises:
            Refused: as :meth:`draw`, and where the budgets do not fall.
        """
        shares = budget.check_nested(keeps)
        round, measured = _multiple(self.model, round, table)
        if table is None and any("latency" in share for share in shares):
            table = latency.measure(self.beside or self.dense, 64, timer=timer)
        found: list[Drawn] = []
        for keep in shares:
            within = found[-1].plan if found else None
            found.append(
                self.draw(keep, round=round, split=split, branches=branches, within=within, table=table, timer=timer)
            )
        return [dataclasses.replace(one, notes=(*measured, *one.notes)) for one in found]

    @property
    def _outline(self) -> cost.Outline:
        """Of ``model``: opened, as ``dense`` is, keys have biases that a cut model may lose again."""
        return cost.outline(self.model)

    @functools.cached_property
    def _origin(self) -> dict[str, Any] | None:
        """How the model was made, which a cut one no longer shows; looked up once, since a search cuts a hundred times.

        One that timm would not make so can be used all the same; save() says why it cannot be saved.
        """
        with contextlib.suppress(Refused):
            return door.origin(self.model)
        return None

    def cut(self, plan: Plan, *, split: bool = False) -> Drawn:
        """Cut by a plan for :attr:`dense`, and compensate.

        Raises:
            Refused: a plan for another model.
        """
        outline = self._outline
        small = families.close(surgery.cut(self.dense, plan), self.model)
        notes = folds.carry_over(small, self.dense, plan, self.measured.moments, self.compensate)
        if self._origin is not None:
            door.remember(small, self._origin)
        return Drawn(
            small.eval(),
            plan,
            _brief(outline.cost()),
            _brief(plan.cost(outline)),
            self.scores,
            images=self.images,
            forwards=self.forwards,
            notes=(*_notes(self.dense, split, rotated=self.rotated), *self.notes, *notes),
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
    inputs: bool = False,
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
    methods.check_choice(compensate, folds.HOW, place="prune.compensate")
    _refuse_unfit(model)
    reads = set(methods.reads(method))
    if "gates" in reads:
        _refuse_gates(model, gates, inputs)
    squares, spread = bool(reads & {"read_squares", "write_squares"}), bool(reads & {"covariance", "gain"})
    labelled = squares or "gradients" in reads
    passes = _fitting(model, _passes(batches))
    dense, turned, notes = families.opened(model), 0, []
    if rotate and any(block.has_attn for block in anatomy.blocks(model)):
        gone = [0]  # images; of large ones not all are looked at

        def told(images: int) -> None:
            gone[0] = images
            if progress is not None:
                progress(images)

        found = turns.statistics(dense, passes(), progress=told)
        progress = _beyond(progress, gone[0])
        turned = next(iter(found.values())).logits.images
        learned = "gates" in reads
        dense = turns.rotate(dense, found, v=not learned)
        if learned:
            notes.append(
                "Value dimensions are cut by index, not rotated: a learned gate belongs to the dimension it was learned on."
            )
    measured = measure.Measured()
    watched = "attention" in reads
    if watched:
        anatomy.plain(model, "prune.criterion: attention")
    if labelled or spread or watched or compensate != "none":
        measured = measure.measure(
            dense,
            passes(),
            gradients="gradients" in reads,
            moments="affine" if spread else compensate,
            logits=spread,
            squares=squares,
            inputs=inputs,
            attention=watched,
            progress=progress,
        )
    return Study(
        model,
        dense,
        measured,
        measure.score(dense, method, options, measured=measured, gates=gates, inputs=inputs, seed=seed),
        compensate,
        images=max(turned, measured.images),
        forwards=turned + (3 + squares if labelled else 1) * measured.images,
        notes=tuple(notes),
        inputs=inputs,
        rotated=rotate,
    )


def _reads(criterion: str | Callable[..., np.ndarray], shelves: Iterable[ModuleType]) -> Iterable[str]:
    found = criterion if callable(criterion) else methods.find([criteria, *shelves], criterion, place="prune.criterion")
    return methods.reads(found)


def _multiple(model: nn.Module, round: int | Literal["auto"], table: latency.Table | None) -> tuple[int, list[str]]:
    """The number that ``round`` stands for, and what is to be said of it."""
    if round == "auto":
        round = latency.fast_multiple(model, table.batch if table is not None else 64)
        return round, [f"Widths stay multiples of {round}: measured."]
    budget.check_round(round)
    return round, []


def _passes(batches: Batches) -> Callable[[], Iterable[Any]]:
    """The batches, as often as they are asked for."""
    if callable(batches):
        return batches
    again = list(batches) if iter(batches) is batches else batches
    return lambda: again


def _fitting(model: nn.Module, passes: Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
    """The batches, refused where ``model`` cannot read their images."""
    embed: Any = getattr(model, "patch_embed", None)
    side, channels = getattr(embed, "img_size", None), getattr(getattr(embed, "proj", None), "in_channels", None)
    if not getattr(embed, "strict_img_size", True):
        side = None

    def again() -> Iterable[Any]:
        for batch in passes():
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if isinstance(images, Tensor):
                wrong = images.ndim != 4 or (channels is not None and images.shape[1] != channels)
                if wrong or (side is not None and tuple(images.shape[2:]) != tuple(side)):
                    size = " x ".join(map(str, side)) if side is not None else "any"
                    raise Refused(
                        f"prune: calibration images are {tuple(images.shape)}, the model reads (images, {channels}) of {size} pixels. "
                        "Resize them, or make the model with that img_size."
                    )
            yield batch

    return again


def _beyond(progress: Callable[[int], None] | None, done: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda images: progress(done + images)


def _notes(model: nn.Module, split: bool, *, rotated: bool) -> list[str]:
    """What the architecture rules out."""
    found, notes = anatomy.blocks(model), []
    rest = "Value dimensions are cut alone." if split else "Value dimensions too, since split is off."
    for whole, why in (
        ([block for block in found if block.qk_norm], "qk-norm reads them all"),
        ([block for block in found if block.rotary and not block.qk_norm], "rotary positions turn them in pairs"),
    ):
        if whole:
            notes.append(f"Query/key dimensions stay whole where {why} ({whole[0].name} to {whole[-1].name}). {rest}")
    if rotated and any(block.norm("attn") is not None for block in found):
        notes.append("Value dimensions are cut by index, not rotated: a norm stands between them and proj.")
    if any(block.norm(branch) is not None for block in found for branch in ("attn", "mlp")):
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


def _refuse_unfit(model: nn.Module) -> None:
    if torch.is_inference_mode_enabled() or any(weight.is_inference() for weight in model.parameters()):
        raise Refused(
            "prune: no derivative can be taken inside of torch.inference_mode(), or of weights made there. Call it outside; "
            "torch.no_grad() is no hindrance."
        )
    for block in anatomy.blocks(model):
        owners = [getattr(block.module, name, None) for name in ("attn", "mlp")]
        for name, linear in (pair for owner in owners if owner is not None for pair in owner.named_modules()):
            if isinstance(linear, nn.Linear) and (linear._forward_pre_hooks or linear._forward_hooks):
                raise Refused(
                    f"{block.name}: {name} carries a forward hook, which a cut would lose. Take it off first (gates: remove())."
                )
    first = next(iter(model.parameters())).dtype
    for where, weight in model.named_parameters():
        if weight.dtype != first:
            raise Refused(
                f"{where}: is {weight.dtype}, other weights are {first}. Bring all to one, e.g. model.float()."
            )
        if weight.is_meta:
            raise Refused(f"{where}: has no memory (meta device). Load the weights first.")
        if not torch.isfinite(weight).all():
            raise Refused(f"{where}: holds values that are not finite. Prune a checkpoint from before.")


def _refuse_gates(model: nn.Module, gates: Mapping[str, Tensor] | None, inputs: bool) -> None:
    """Refuse gates that are missing or of other widths."""
    for site, linear in anatomy.sites(model, inputs=inputs).items():
        if gates is None or site not in gates:
            raise Refused(
                f"prune.criterion: this one reads the learned gate of {site}, which is not here. Train with gates, or take another."
            )
        if gates[site].numel() != linear.in_features:
            raise Refused(f"prune.criterion: {gates[site].numel()} gates for the {linear.in_features} units of {site}.")
