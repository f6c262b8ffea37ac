"""Structured pruning by scores: measured on calibration images, cut to one budget or to several.

What takes long tells its progress as events, for a run's model and for one that LOTUS never trained alike.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Prune
from lotus.events import Event, Said, Wrote, watched
from lotus.files import write_text
from lotus.report.numbers import accuracy
from lotus.stages.context import Context
from lotus.stages.fit import keep_model

if TYPE_CHECKING:
    from torch import nn

    from lotus.pruning import Batches, Given, Pruned, Study
    from lotus.pruning.latency import Table


@dataclass(frozen=True)
class Uncut:
    """What is to be cut, and what is known of it before."""

    context: Context
    model: nn.Module
    gates: Any
    """Learned gates by site; None without."""
    calibration: np.ndarray
    """Rows of the training images that are looked at."""
    request: Prune
    """With a whole number for ``round``."""
    table: Table | None = None
    """What widths take on this device, for a budget of latency."""

    @property
    def given(self) -> Given:
        """What a criterion has beside the model and the images."""
        from lotus.pruning import Given

        return Given(self.context.shelves, self.gates, self.context.config.seed)


@dataclass(frozen=True)
class Cut:
    """What the prune stage goes on with, however it came about."""

    model: nn.Module
    before: Mapping[str, int]
    after: Mapping[str, int]
    forwards: float
    """In units of the dense model's forward pass of an image, whatever was spent."""
    notes: Sequence[str]
    about: Mapping[str, Any] = field(default_factory=dict)
    """What is written beside the model."""


Cutting = Generator[Event, None, tuple[Cut, dict[str, Any]]]


def rounded(model: nn.Module, request: Prune) -> Generator[Event, None, Prune]:
    """The request, with the number that ``round: auto`` stands for on this device."""
    from lotus.pruning import latency

    if request.round != "auto":
        return request
    multiple = latency.fast_multiple(model, request.latency_batch)
    yield Said("prune", f"Widths stay multiples of {multiple}: measured at batch {request.latency_batch}.")
    return request.model_copy(update={"round": multiple})


def known_here(model: nn.Module, request: Prune) -> Generator[Event, None, tuple[Prune, Table | None]]:
    """What this device has to say: the number that ``round: auto`` stands for, and, for a budget of latency, what widths take."""
    from lotus.pruning import latency

    request = yield from rounded(model, request)
    if request.keep.latency is None:
        return request, None
    table = yield from watched(
        "prune",
        latency.timings(model),
        lambda progress: latency.measure(model, request.latency_batch, progress=progress),
        unit="timings",
    )
    return request, table


def lottery(
    model: nn.Module, batches: Batches, request: Prune, *, images: int, **more: Any
) -> Generator[Event, None, Pruned]:
    """:func:`lotus.pruning.lottery`, with its progress.

    Args:
        model: the dense one
        request: the section ``prune``
        images: how many ``batches`` hold
        more: its other arguments
    """
    from lotus import pruning
    from lotus.pruning import narrow

    tried = narrow.GRID if request.embed_dim == "search" else (request.embed_fraction,)  # auto: others perhaps, later
    passes = len(tried) * (1 + request.rotate) + any(part < 1 for part in tried)
    return (
        yield from watched(
            "prune",
            images * passes,
            lambda progress: pruning.lottery(model, batches, request, **more, progress=progress),
        )
    )


def draw(uncut: Uncut) -> Cutting:
    """By scores, to one budget."""
    context, calibration = uncut.context, uncut.calibration
    with context.images(context.run.train_beton, calibration, context.config.train, uncut.model) as loader:
        drawn = yield from lottery(
            uncut.model,
            lambda: loader.epoch(0),
            uncut.request,
            images=len(calibration),
            given=uncut.given,
            table=uncut.table,
        )
    told = yield from timed(context, drawn)
    return Cut(drawn.model, drawn.before, drawn.after, drawn.forwards, drawn.notes), told


def timed(context: Context, drawn: Any) -> Generator[Event, None, dict[str, Any]]:
    """What is told of a budget of latency, where there was one; leaves latency.json."""
    if drawn.latency is None:
        return {}
    write_text(context.run.folder / "latency.json", drawn.latency.table.to_json())
    yield Wrote("prune", str(context.run.folder / "latency.json"))
    return {"latency": drawn.latency.record()}


def draw_sizes(uncut: Uncut) -> Cutting:
    """By scores: measured once, cut to the budget and to all further sizes."""
    from lotus.vit.cost import count

    context, request, table = uncut.context, uncut.request, uncut.table
    keep = request.keep.asked
    dense = count(uncut.model)
    if all(
        part == 1 for part in (*keep.values(), *request.sizes, request.embed_fraction)
    ):  # nothing is to be turned or folded
        request = request.model_copy(update={"rotate": False, "compensate": "none"})
    model, spent, notes = yield from narrow_stream(context, uncut.model, uncut.calibration, request)
    studied = yield from study(uncut, model, request)
    drawn = studied.draw(request, whole=dense, table=table)
    now = count(model)
    told: dict[str, Any] = {}
    # Of a smaller embedding dimension's MACs more may stay; sizes beyond it are as large as it.
    keeps = [
        {what: min(1.0, part * dense.macs / now.macs) for what, part in keep.items()} for keep in request.more_sizes
    ]
    for part, small in zip(
        sorted(request.sizes, reverse=True), studied.nested(request, keeps, table=table), strict=True
    ):
        told[f"{part:g}"] = yield from _keep_size(context, part, small)
    more = yield from timed(context, drawn)
    cut = Cut(drawn.model, drawn.before, drawn.after, spent + drawn.forwards, (*notes, *drawn.notes))
    return cut, {"sizes": told, **more}


def _keep_size(context: Context, part: float, small: Pruned) -> Generator[Event, None, dict[str, Any]]:
    """Measure and write one of several sizes."""
    from lotus.training import loop

    with context.images(context.run.val_beton, None, context.config.train, small.model) as loader:
        measured = loop.evaluate(small.model, loader, context.world)
    folder = context.run.folder / f"prune-{part:g}"
    yield from keep_model(context, "prune", small.model, folder)
    of = "MACs" if small.latency is None else "latency"
    yield Said(
        "prune", f"{part:g} of the {of}: top-1 {accuracy(measured['top1'], measured['images'])} right after the cut"
    )
    told = {"keep": part, "top1": measured["top1"], "loss": measured["loss"], **small.after}
    if small.latency is None:
        return told
    yield Said("prune", small.latency.text())
    return {**told, "latency": small.latency.record()}


def narrow_stream(
    context: Context, model: nn.Module, calibration: np.ndarray, request: Prune
) -> Generator[Event, None, tuple[nn.Module, int, list[str]]]:
    """The model with ``prune.embed_dim`` of its stream's channels, the images gone through for it, and what is to be said."""
    from lotus.pruning import narrow
    from lotus.vit import anatomy

    wide = anatomy.blocks(model)[0].width
    channels = narrow.channels(model, request.embed_fraction, request.multiple)
    if channels == wide:
        return model, 0, []
    with context.images(context.run.train_beton, calibration, context.config.train, model) as loader:
        found = yield from watched(
            "prune",
            len(calibration),
            lambda progress: narrow.statistics(model, loader.epoch(0), progress=progress),
        )
    small = narrow.narrow(model, found, channels, compensate=context.config.prune.compensate)
    return small, found.images, [f"Of the residual stream's {wide} channels {channels} stay, turned."]


def study(uncut: Uncut, model: nn.Module, request: Prune) -> Generator[Event, None, Study]:
    """``model``, which was made of what is to be cut, rotated, measured and scored."""
    import lotus.pruning

    context, calibration = uncut.context, uncut.calibration
    with context.images(context.run.train_beton, calibration, context.config.train, model) as loader:
        return (
            yield from watched(
                "prune",
                len(calibration) * (2 if request.rotate else 1),
                lambda progress: lotus.pruning.study(
                    model, lambda: loader.epoch(0), request, uncut.given, progress=progress
                ),
            )
        )
