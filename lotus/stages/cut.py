"""Structured pruning by scores: measured on calibration images, cut to one budget or to several."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.events import Event, Said, Wrote, watched
from lotus.run import write_text
from lotus.stages.shop import Shop

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Cut:
    """What the prune stage goes on with, however it came about."""

    model: nn.Module
    before: Mapping[str, int]
    after: Mapping[str, int]
    forwards: float
    """In units of the dense model's forward pass of an image, whatever was spent."""
    notes: Sequence[str]


Cutting = Generator[Event, None, tuple[Cut, dict[str, Any]]]


def draw(shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, multiple: int, table: Any) -> Cutting:
    """By scores, to one budget."""
    from lotus.pruning import steps

    config, wants = shop.config, shop.config.prune
    with shop.images(shop.run.train_beton, calibration, config.train, model) as loader:
        drawn = yield from steps.lottery(
            model,
            lambda: loader.epoch(0),
            wants.keep.model_dump(exclude_none=True),
            wants,
            images=len(calibration),
            criterion=wants.criterion.name,
            criterion_options=wants.criterion.options,
            shelves=shop.shelves,
            round=multiple,
            gates=gates,
            seed=config.seed,
            table=table,
        )
    told = yield from timed(shop, drawn)
    return Cut(drawn.model, drawn.before, drawn.after, drawn.forwards, drawn.notes), told


def timed(shop: Shop, drawn: Any) -> Generator[Event, None, dict[str, Any]]:
    """What is told of a budget of latency, where there was one; leaves latency.json."""
    if drawn.latency is None:
        return {}
    write_text(shop.run.folder / "latency.json", drawn.latency.table.to_json())
    yield Wrote("prune", str(shop.run.folder / "latency.json"))
    return {"latency": drawn.latency.told()}


def draw_sizes(shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, multiple: int, table: Any) -> Cutting:
    """By scores: measured once, cut to the budget and to all further sizes."""
    import lotus.pruning
    from lotus.training import loop
    from lotus.vit.cost import count

    run, wants = shop.run, shop.config.prune
    keep = wants.keep.model_dump(exclude_none=True)
    dense = count(model)
    parts = (*keep.values(), *wants.sizes, wants.stream)
    model, spent, notes = yield from narrow_stream(shop, model, calibration, multiple)
    studied = yield from study(shop, model, gates, calibration, whole=all(part == 1 for part in parts))
    shared: dict[str, Any] = {"round": multiple, "split": wants.split, "branches": wants.branches, "table": table}
    drawn = studied.draw(keep, whole=dense, **shared)
    now = count(model)
    told: dict[str, Any] = {}
    # Of a narrower stream's MACs more may stay; sizes beyond it are as large as it.
    keeps = [{what: min(1.0, part * dense.macs / now.macs) for what, part in keep.items()} for keep in wants.more_sizes]
    for part, small in zip(sorted(wants.sizes, reverse=True), studied.nested(keeps, **shared), strict=True):
        with shop.images(run.val_beton, None, shop.config.train, small.model) as loader:
            measured = loop.evaluate(small.model, loader, shop.world)
        folder = run.folder / f"prune-{part:g}"
        lotus.pruning.save(small.model, folder)
        yield Wrote("prune", str(folder))
        of = "MACs" if small.latency is None else "latency"
        yield Said("prune", f"{part:g} of the {of}: top-1 {measured['top1']:.2f} % right after the cut")
        told[f"{part:g}"] = {"keep": part, "top1": measured["top1"], "loss": measured["loss"], **small.after}
        if small.latency is not None:
            yield Said("prune", small.latency.text())
            told[f"{part:g}"]["latency"] = small.latency.told()
    more = yield from timed(shop, drawn)
    cut = Cut(drawn.model, drawn.before, drawn.after, spent + drawn.forwards, (*notes, *drawn.notes))
    return cut, {"sizes": told, **more}


def narrow_stream(
    shop: Shop, model: nn.Module, calibration: np.ndarray, multiple: int
) -> Generator[Event, None, tuple[nn.Module, int, list[str]]]:
    """The model with ``prune.width`` of its stream's channels, the images gone through for it, and what is to be said."""
    from lotus.pruning import narrow
    from lotus.vit import anatomy

    wide = anatomy.blocks(model)[0].width
    channels = narrow.channels(model, shop.config.prune.stream, multiple)
    if channels == wide:
        return model, 0, []
    with shop.images(shop.run.train_beton, calibration, shop.config.train, model) as loader:
        found = yield from watched(
            "prune",
            len(calibration),
            lambda progress: narrow.statistics(model, loader.epoch(0), progress=progress),
        )
    small = narrow.narrow(model, found, channels, compensate=shop.config.prune.compensate)
    return small, found.images, [f"Of the stream's {wide} channels {channels} stay, turned."]


def study(
    shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, *, whole: bool = False
) -> Generator[Event, None, Any]:
    """The model rotated, measured and scored; with ``whole`` nothing is to go, so nothing is turned or folded."""
    import lotus.pruning

    wants = shop.config.prune
    rotate = wants.rotate and not whole
    with shop.images(shop.run.train_beton, calibration, shop.config.train, model) as loader:
        return (
            yield from watched(
                "prune",
                len(calibration) * (2 if rotate else 1),
                lambda progress: lotus.pruning.study(
                    model,
                    lambda: loader.epoch(0),
                    criterion=wants.criterion.name,
                    criterion_options=wants.criterion.options,
                    shelves=shop.shelves,
                    rotate=rotate,
                    compensate="none" if whole else wants.compensate,
                    inputs=wants.inputs,
                    gates=gates,
                    seed=shop.config.seed,
                    progress=progress,
                ),
            )
        )
