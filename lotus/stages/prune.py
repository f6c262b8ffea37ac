"""The stage ``prune``: the trained model loses dimensions, or weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lotus.events import Evaluated, Pruned, Said, Wrote
from lotus.files import read_tensors
from lotus.stages.cut import Cutting, Uncut, draw, draw_sizes, known_here
from lotus.stages.patches import as_evaluated, told_of_patches
from lotus.stages.search import convolve_attention, search_widths
from lotus.stages.shop import CALIBRATION, Making, Outcome, Shop
from lotus.stages.zeros import zero_weights

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
    for size in folder.glob("pruned-*"):
        if (size / "spec.json").is_file():  # a folder of the user's own has none
            shutil.rmtree(size)


def prune(shop: Shop) -> Making:
    import lotus.pruning
    from lotus.pruning.measure import enough
    from lotus.training import loop
    from selection.subset import Subset

    run, config, wants = shop.run, shop.config, shop.config.prune
    clear(run.folder)
    if wants.method != "structured":
        return (yield from zero_weights(shop))
    model = lotus.pruning.load(run.trained).to(shop.world.device)
    again = "Make it again: lotus run CONFIG --from train."
    gates = read_tensors(run.gates, again) if config.train.sparsity.gates else None
    rows = Subset.load(run.ticket).rows
    rng = np.random.default_rng([config.seed, CALIBRATION])
    calibration = np.sort(rng.choice(rows, size=min(wants.calibration or enough(model), len(rows)), replace=False))
    wants, table = yield from known_here(model, wants)
    way = next((way for name, way in WAYS.items() if getattr(wants, name)), draw)
    cut, more = yield from way(Uncut(shop, model, gates, calibration, wants, table))
    for note in cut.notes:
        yield Said("prune", note)
    yield Pruned("prune", {**cut.before}, {**cut.after})
    with (
        shop.images(run.val_beton, None, config.train, cut.model) as loader,
        as_evaluated(cut.model, config.train.patches, shop.shelves) as tokens,
    ):
        measured = loop.evaluate(cut.model, loader, shop.world)
        patches = {} if tokens is None else {"patches": told_of_patches(config.train.patches, tokens)}
    yield Evaluated("prune", 0, measured)
    lotus.pruning.save(cut.model, run.pruned)
    yield Wrote("prune", str(run.pruned))
    spent = cut.forwards * cut.before["macs"]
    told = {"top1": measured["top1"], "loss": measured["loss"], **cut.after, **patches, **more}
    return Outcome(cut.forwards, spent, told)
