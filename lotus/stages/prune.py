"""The stage ``prune``: the trained model loses dimensions, or weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lotus.config import Config
from lotus.events import Evaluated, Pruned, Said
from lotus.files import read_tensors
from lotus.stage import Curve, Outcome, Stage, Work, of
from lotus.stages import ways
from lotus.stages.ahead import Ahead, Cost
from lotus.stages.context import CALIBRATION, Context
from lotus.stages.cut import Uncut, known_here
from lotus.stages.fit import keep_model
from lotus.stages.patches import as_evaluated, told_of_patches
from selection import methods


def clear(folder: Path) -> None:
    """Remove what an earlier pruning left beside its model: with other settings it may not be written again."""
    for name in ("latency.json", "search.json", "pareto.json"):
        (folder / name).unlink(missing_ok=True)
    for size in folder.glob("prune-*"):
        if (size / "spec.json").is_file():  # a folder of the user's own has none
            shutil.rmtree(size)


def prune(context: Context) -> Work:
    import lotus.pruning
    from lotus.pruning.measure import enough
    from lotus.training.evaluation import evaluate_classes
    from selection.subset import Subset

    run, config, request = context.run, context.config, context.config.prune
    clear(run.folder)
    if config.train.shrink is not None:
        return (yield from passed_on(context))
    way, options = ways.chosen(request, context.shelves)
    model = lotus.pruning.load(run.of("train")).to(context.world.device)
    again = "Make it again: lotus run CONFIG --from train."
    gates = read_tensors(run.gates, again) if config.train.sparsity.gates else None
    rows = Subset.load(run.ticket).rows
    rng = np.random.default_rng([config.seed, CALIBRATION])
    calibration = np.sort(rng.choice(rows, size=min(request.calibration or enough(model), len(rows)), replace=False))
    table = None
    if way.cuts:
        request, table = yield from known_here(model, request)
    cut, more = yield from way.make(
        Uncut(context, model, gates, calibration, request, table), **methods.arguments(way.make, options)
    )
    for note in cut.notes:
        yield Said("prune", note)
    if way.cuts:
        yield Pruned("prune", {**cut.before}, {**cut.after})
    with (
        context.images(run.val_beton, None, config.train, cut.model) as loader,
        as_evaluated(cut.model, config.train.patches, context.shelves) as tokens,
    ):
        measured, classes = evaluate_classes(cut.model, loader, context.world)
        patches = {} if tokens is None else {"patches": told_of_patches(config.train.patches, tokens)}
    yield Evaluated("prune", 0, measured)
    yield from keep_model(context, "prune", cut.model, run.of("prune"), cut.about)
    spent = cut.forwards * cut.before["macs"]
    told = {"top1": measured["top1"], "loss": measured["loss"], "per_class": classes, **cut.after, **patches, **more}
    return Outcome(cut.forwards, spent, told)


def passed_on(context: Context) -> Work:
    """The model that was cut within its training, as it is: nothing is left to cut."""
    import lotus.pruning

    run = context.run
    yield from keep_model(context, "prune", lotus.pruning.load(run.of("train")), run.of("prune"))
    done = run.record("train").values  # type: ignore[union-attr]
    told = {name: done[name] for name in ("top1", "loss", "per_class", "params", "macs", "patches") if name in done}
    return Outcome(values={**told, "cuts": done["cuts"]})


# --------------------------------------------------------------------------------------------- before anything is done


def _check(ahead: Ahead) -> None:
    way, options = ways.chosen(ahead.config.prune, ahead.shelves)
    way.check(ahead, options)


def _forecast(ahead: Ahead) -> Cost:
    if ahead.config.train.shrink is not None:
        return 0, 0
    way, options = ways.chosen(ahead.config.prune, ahead.shelves)
    forwards = way.forecast(ahead, options)
    return forwards, forwards * ahead.macs


# -------------------------------------------------------------------------------------------------------- the declaration


def _bind(config: Config, shelves: Sequence[ModuleType]) -> dict[str, Any]:
    """What the way says of itself. One that is not at hand says nothing: what it left can be looked at all the same."""
    if config.train.shrink is not None:
        return {"says": "pass on what was cut in the training"}
    way = ways.named(config.prune, shelves)
    if way is None:
        return {}
    options = ways.chosen(config.prune, shelves)[1]
    return {
        "says": "evaluate: nothing is to be cut" if way.cuts and config.prune.keeps_all else way.says,
        "settings": (*_SETTINGS, *of(way.settings, config)),
        "tell": lambda run, results: way.tell(run, results, options),
    }


_SETTINGS = ("prune", "seed")

STAGE = Stage(
    "prune",
    "cut what is not worth keeping",
    prune,
    settings=_SETTINGS,
    after=("train",),
    outputs=("prune/spec.json",),
    part="lottery",
    check=_check,
    forecast=_forecast,
    measured_on=lambda config: config.train.patches,
    curve=Curve("lotus", "cut"),
    bind=_bind,
)
