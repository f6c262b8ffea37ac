"""Structured pruning by scores: measured on calibration images, cut to one budget or to several."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.events import Event, Said, Wrote, watched
from lotus.stages.shop import Shop

if TYPE_CHECKING:
    from torch import nn

    from lotus.config import Prune


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
    import lotus.pruning

    config, wants = shop.config, shop.config.prune
    with shop.images(shop.run.train_beton, calibration, config.train, model) as loader:
        drawn = yield from watched(
            "prune",
            len(calibration) * _passes(wants),
            lambda progress: lotus.pruning.lottery(
                model,
                lambda: loader.epoch(0),
                wants.keep.model_dump(exclude_none=True),
                criterion=wants.criterion.name,
                criterion_options=wants.criterion.options,
                shelves=shop.shelves,
                rank=wants.rank,
                round=multiple,
                rotate=wants.rotate,
                split=wants.split,
                compensate=wants.compensate,
                inputs=wants.inputs,
                branches=wants.branches,
                width=wants.width,
                gates=gates,
                seed=config.seed,
                table=table,
                progress=progress,
            ),
        )
    return Cut(drawn.model, drawn.before, drawn.after, drawn.forwards, drawn.notes), {}


def _passes(wants: Prune) -> int:
    """How often the calibration images are gone through."""
    from lotus.pruning import narrow

    tried = narrow.check_width(wants.width)
    return len(tried) * (1 + wants.rotate) + any(part < 1 for part in tried)


def draw_sizes(shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, multiple: int) -> Cutting:
    """By scores: measured once, cut to the budget and to all further sizes."""
    import lotus.pruning
    from lotus.training import loop

    run, wants = shop.run, shop.config.prune
    keep = wants.keep.model_dump(exclude_none=True)
    whole = all(part == 1 for part in (*keep.values(), *wants.sizes))  # then nothing is to be turned or folded
    studied = yield from study(shop, model, gates, calibration, whole=whole)
    shared: dict[str, Any] = {"round": multiple, "split": wants.split, "branches": wants.branches}
    drawn = studied.draw(keep, **shared)
    told: dict[str, Any] = {}
    budgets = sorted(wants.sizes, reverse=True)
    for part, small in zip(budgets, studied.nested([{"macs": part} for part in budgets], **shared), strict=True):
        with shop.images(run.val_beton, None, shop.config.train, small.model) as loader:
            measured = loop.evaluate(small.model, loader, shop.world)
        folder = run.folder / f"pruned-{part:g}"
        lotus.pruning.save(small.model, folder)
        yield Wrote("prune", str(folder))
        yield Said("prune", f"{part:g} of the MACs: top-1 {measured['top1']:.2f} % right after the cut")
        told[f"{part:g}"] = {"keep": part, "top1": measured["top1"], "loss": measured["loss"], **small.after}
    return Cut(drawn.model, drawn.before, drawn.after, drawn.forwards, drawn.notes), {"sizes": told}


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
