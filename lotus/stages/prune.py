"""The stage ``prune``: the trained model loses dimensions, or weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Config
from lotus.events import Evaluated, Pruned, Said, Wrote
from lotus.files import read_tensors
from lotus.run import Run
from lotus.stage import TRAIN_FORWARDS, Curve, Outcome, Stage, Work
from lotus.stages.ahead import Ahead, Cost
from lotus.stages.context import CALIBRATION, Context
from lotus.stages.cut import Cutting, Uncut, draw, draw_sizes, known_here
from lotus.stages.patches import as_evaluated, told_of_patches
from lotus.stages.search import convolve_attention, search_widths
from lotus.stages.zeros import zero_weights

if TYPE_CHECKING:
    from torch import nn

WAYS: dict[str, Callable[[Uncut], Cutting]] = {
    "search": search_widths,
    "convolve": convolve_attention,
    "sizes": draw_sizes,
}
"""Settings of ``prune`` that are another way to choose what stays than by scores to one budget."""


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
    from lotus.training import loop
    from selection.subset import Subset

    run, config, wants = context.run, context.config, context.config.prune
    clear(run.folder)
    if config.train.shrink is not None:
        return (yield from passed_on(context))
    if wants.method != "structured":
        return (yield from zero_weights(context))
    model = lotus.pruning.load(run.of("train")).to(context.world.device)
    again = "Make it again: lotus run CONFIG --from train."
    gates = read_tensors(run.gates, again) if config.train.sparsity.gates else None
    rows = Subset.load(run.ticket).rows
    rng = np.random.default_rng([config.seed, CALIBRATION])
    calibration = np.sort(rng.choice(rows, size=min(wants.calibration or enough(model), len(rows)), replace=False))
    wants, table = yield from known_here(model, wants)
    way = next((way for name, way in WAYS.items() if getattr(wants, name)), draw)
    cut, more = yield from way(Uncut(context, model, gates, calibration, wants, table))
    for note in cut.notes:
        yield Said("prune", note)
    yield Pruned("prune", {**cut.before}, {**cut.after})
    with (
        context.images(run.val_beton, None, config.train, cut.model) as loader,
        as_evaluated(cut.model, config.train.patches, context.shelves) as tokens,
    ):
        measured = loop.evaluate(cut.model, loader, context.world)
        patches = {} if tokens is None else {"patches": told_of_patches(config.train.patches, tokens)}
    yield Evaluated("prune", 0, measured)
    lotus.pruning.save(cut.model, run.of("prune"))
    yield Wrote("prune", str(run.of("prune")))
    spent = cut.forwards * cut.before["macs"]
    told = {"top1": measured["top1"], "loss": measured["loss"], **cut.after, **patches, **more}
    return Outcome(cut.forwards, spent, told)


def passed_on(context: Context) -> Work:
    """The model that was cut within its training, as it is: nothing is left to cut."""
    import lotus.pruning

    run = context.run
    lotus.pruning.save(lotus.pruning.load(run.of("train")), run.of("prune"))
    yield Wrote("prune", str(run.of("prune")))
    done = run.record("train").values  # type: ignore[union-attr]
    told = {name: done[name] for name in ("top1", "loss", "params", "macs", "patches") if name in done}
    return Outcome(values={**told, "cuts": done["cuts"]})


# --------------------------------------------------------------------------------------------- before anything is done


def _check(ahead: Ahead) -> None:
    if ahead.config.prune.method == "structured":
        _check_reach(ahead.config, ahead.shape)
    else:
        _check_pattern(ahead.config, ahead.shape)


def _check_reach(config: Config, model: nn.Module) -> None:
    """Refuse a budget that this model cannot meet in the way that is asked for."""
    from lotus.pruning import budget, convolve, latency, narrow
    from lotus.vit import anatomy
    from lotus.vit.cost import outline

    wants, whole = config.prune, outline(model)
    if wants.round == "auto":
        wants = wants.model_copy(update={"round": 8})
    if wants.inputs:
        anatomy.sites(model, inputs=True)
    if wants.keep.latency is not None:
        latency.timings(model)
    if wants.convolve is not None:
        convolve.refuse(model)
        convolve.check_reach(whole, wants.keep.macs or 1, round=wants.multiple)
    elif wants.search is None:
        widths = (wants.stream,) if wants.sizes else narrow.tries(model, wants)
        narrowest, least = min(widths), whole
        if narrowest < 1:
            least = outline(narrow.skeleton(model, narrow.channels(model, narrowest, wants.multiple)))
        branches = wants.branches if anatomy.is_vit(model) else False
        for keep in (wants.keep.asked, *wants.more_sizes):
            budget.check_reach(least, wants.at(keep, branches=branches), whole=whole.cost())
        if not wants.sizes:
            narrow.useful(model, widths, wants)
    elif wants.search.compare:
        anatomy.plain(model, "prune.search.compare")
    if wants.search is not None and wants.search.drop is None:
        least = whole
        if wants.stream < 1:
            least = outline(narrow.skeleton(model, narrow.channels(model, wants.stream, wants.multiple)))
        budget.check_reach(least, wants.model_copy(update={"branches": False}), whole=whole.cost())


def _check_pattern(config: Config, model: nn.Module) -> None:
    """Refuse a pattern of zeros that does not fit the model."""
    from lotus.pruning import unstructured

    listed = unstructured.listed(model, config.prune.weights)
    if config.prune.pattern:
        unstructured.n_of_m(listed, *unstructured.pattern(config.prune.pattern))


def _forecast(ahead: Ahead) -> Cost:
    from lotus.pruning.measure import enough
    from lotus.pruning.narrow import GRID

    wants, kept = ahead.config.prune, ahead.kept
    if ahead.config.train.shrink is not None:
        return 0, 0
    searched, convolve = wants.search, wants.convolve
    looked_at = min(wants.calibration or enough(ahead.dense), kept)
    forwards: float = (TRAIN_FORWARDS + wants.rotate) * looked_at
    if wants.method != "structured":
        forwards = _forecast_zeros(ahead.config, kept, len(ahead.sources[1].labels))
    elif searched is not None:
        # about: what is tried has half of the MACs, and how much is tried follows from what is found
        each = 8 * searched.levels * searched.rounds
        tries = searched.grid**2 + 40 * searched.rounds if searched.kind == "ratios" else each
        forwards = searched.rounds * forwards + round(searched.images * tries / 2)
    elif convolve is not None:
        forwards = 1.5 * TRAIN_FORWARDS * convolve.epochs * kept
    elif wants.width == "search":  # auto: at least the first of these
        forwards *= len(GRID)
    return forwards, forwards * ahead.macs


def _forecast_zeros(config: Config, kept: int, validation: int) -> float:
    """Image-forwards of unstructured pruning: what is measured, and what a soup trains."""
    from lotus.pruning.unstructured import SWEEP
    from lotus.training import soup

    wants = config.prune
    looks = (len(SWEEP) + 1 if wants.sweep else 1) * validation
    if wants.method != "soup" or wants.keep.weights is None:
        return looks
    own, each = soup.steps(wants.keep.weights, config.finetune.batch_size, wants.soup, kept)
    return looks + TRAIN_FORWARDS * config.finetune.batch_size * (own + each)


# -------------------------------------------------------------------------------------------------------- the declaration


def _says(config: Config) -> str:
    wants = config.prune
    if config.train.shrink is not None:
        return "pass on what was cut in the training"
    if wants.method != "structured":
        return f"set weights to zero ({wants.method}), keep {wants.keep.weights:g}"
    return "cut what is not worth keeping"


def _settings(config: Config) -> tuple[str, ...]:
    search = config.prune.search
    trains = config.prune.method == "soup" or (search is not None and search.recovery > 0)
    return ("prune", "seed", "finetune") if trains else ("prune", "seed")  # it trains by this recipe


def _tell(run: Run, found: dict[str, Any]) -> None:
    if "latency" in found["prune"]:
        found["kept"]["latency"] = found["prune"]["latency"]


STAGE = Stage(
    "prune",
    _says,
    prune,
    settings=_settings,
    after=("train",),
    outputs=("prune/spec.json",),
    part="lottery",
    check=_check,
    forecast=_forecast,
    measured_on=lambda config: config.train.patches,
    tell=_tell,
    curve=Curve("lotus", "cut"),
)
