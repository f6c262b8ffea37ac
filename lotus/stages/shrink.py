"""What the stage ``train`` does for a training that shrinks: looks at its images, forecasts, bills and tells."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Config, Prune
from lotus.stage import TRAIN_FORWARDS, Outcome, Section
from lotus.stages.ahead import Ahead, Cost
from lotus.stages.context import CALIBRATION, Context
from selection.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from lotus.pruning import Pruned
    from lotus.stages.fit import Price
    from lotus.training.shrink import Shrink

_BETWEEN = ("evit", "tome", "cumulative")
"""Ways to leave patches out that need both sublayers of each block."""


def request_of(config: Config) -> Prune:
    """What the last cut is to: ``prune``, with all channels where nothing is said of them, and whole blocks where patches leave
    between attention and MLP."""
    request, patches = config.prune, config.train.patches
    changes: dict[str, Any] = {"embed_dim": None} if request.embed_dim == "auto" else {}
    if patches is not None and patches.mode in _BETWEEN:
        changes["sublayers"] = False
    return request.model_copy(update=changes)


def shrinking(context: Context, model: nn.Module, rows: np.ndarray) -> Shrink:
    """The guest that cuts ``model``, which is looked at on some of ``rows`` as they are, without augmentation."""
    import lotus.pruning
    from lotus.pruning.measure import enough
    from lotus.training import loop
    from lotus.training.shrink import Shrink

    config, run = context.config, context.run
    settings, request = config.train.shrink, request_of(config)
    assert settings is not None
    rng = np.random.default_rng([config.seed, CALIBRATION])
    looked_at = np.sort(rng.choice(rows, size=min(request.calibration or enough(model), len(rows)), replace=False))

    given = lotus.pruning.Given(context.shelves, seed=config.seed)

    def draw(model: nn.Module, request: Prune, dense: nn.Module | None) -> Pruned:
        with context.alone().images(run.train_beton, looked_at, config.train, model) as loader:
            return lotus.pruning.lottery(model, lambda: loader.epoch(0), request, given, dense=dense)

    def measure(model: nn.Module) -> Mapping[str, float]:
        with context.images(run.val_beton, None, config.train, model) as loader:
            return loop.evaluate(model, loader, context.world)

    return Shrink(
        model, settings, request, draw, measure=measure if settings.evaluate else None, drop_path=config.train.drop_path
    )


# --------------------------------------------------------------------------------------------- before anything is done


def check_cuts(ahead: Ahead) -> None:
    """Refuse cuts after which nothing is trained, and budgets that this model cannot meet."""
    from lotus.pruning import budget, narrow
    from lotus.vit import anatomy
    from lotus.vit.cost import outline

    recipe, request = ahead.config.train, request_of(ahead.config)
    assert recipe.shrink is not None
    total = recipe.epochs * math.ceil(ahead.kept / recipe.batch_size)
    for number, one in enumerate(recipe.shrink.cuts):
        place = f"train.shrink.steps.{number}.at" if recipe.shrink.steps else "train.shrink.at"
        if math.ceil(one.at * total) >= total:
            raise Refused(
                f"{place}: after {one.at:g} of {total} steps nothing is left to train what was cut. Cut sooner, or train longer."
            )
    if request.round == "auto":
        request = request.model_copy(update={"round": 8})
    whole = outline(ahead.shape)
    sublayers = request.sublayers if anatomy.is_vit(ahead.shape) else False
    for one in recipe.shrink.cuts:
        least = whole
        if one.keep is None and request.embed_fraction < 1:
            narrowest = narrow.channels(ahead.shape, request.embed_fraction, request.multiple)
            least = outline(narrow.skeleton(ahead.shape, narrowest))
        keep = request.keep if one.keep is None else one.keep
        budget.check_reach(least, request.at(keep.asked, sublayers=sublayers), whole=whole.cost())


def seen_before(ahead: Ahead, at: float) -> float:
    """Fraction of the images of the training that are seen before a cut at ``at``, which is after the first step that reaches it."""
    recipe, kept = ahead.config.train, ahead.kept
    steps = math.ceil(kept / recipe.batch_size)
    done = math.ceil(at * recipe.epochs * steps - 1e-9)
    return min(1.0, (done // steps * kept + done % steps * recipe.batch_size) / (recipe.epochs * kept))


def forecast_cuts(ahead: Ahead) -> tuple[float, Cost]:
    """The fraction of the dense model's MACs that the training's average image takes, and what looking at the models costs.

    Of a budget that says nothing of MACs its own part stands for them.
    """
    from lotus.pruning.measure import enough

    config, shrink = ahead.config, ahead.config.train.shrink
    assert shrink is not None
    request = request_of(config)
    images = min(request.calibration or enough(ahead.dense), ahead.kept)
    measured = len(ahead.sources[1].labels) if shrink.evaluate else 0
    share, now, began = 0.0, 1.0, 0.0
    forwards = macs = 0.0
    if shrink.until_stable is not None:  # at the latest
        looks = images * int(shrink.cuts[0].at * config.train.epochs) * (TRAIN_FORWARDS + request.rotate)
        forwards, macs = forwards + looks, macs + looks * ahead.macs
    for one in shrink.cuts:
        keep = (request.keep if one.keep is None else one.keep).asked
        after = keep.get("macs", min(keep.values()))
        at = seen_before(ahead, one.at)
        share += (at - began) * now
        looks = (TRAIN_FORWARDS + request.rotate) * images
        forwards += looks + 2 * measured
        macs += ((looks + measured) * now + measured * after) * ahead.macs
        began, now = at, after
    return share + (1 - began) * now, (forwards, macs)


# ------------------------------------------------------------------------------------------------------------ afterwards


def cuts_told(context: Context, shrink: Shrink, price: Price) -> dict[str, Any]:
    """What is recorded of the cuts, and of the model before them.

    Raises:
        Refused: the training ended before the last of them.
    """
    from lotus.vit import anatomy, cost

    request = context.config.train.shrink
    assert request is not None
    if len(shrink.cuts) < len(request.cuts):
        raise Refused("train.shrink: the training ended before its cut. Cut sooner, or leave out what ends it.")
    dense = context.new_model()
    whole = cost.count(dense)
    blocks = [{"heads": d.heads, "v_dim": d.v_dim, "hidden": d.hidden} for d in (b.dims for b in anatomy.blocks(dense))]
    uncut = {"params": whole.params, "macs": whole.macs, "blocks": blocks}
    return {"cuts": shrink.cuts, "uncut": uncut, "train_macs": price.macs}


def billed(done: Outcome, shrink: Shrink) -> Outcome:
    """``done`` with what looking at the models cost."""
    forwards, macs = shrink.bill
    return dataclasses.replace(done, image_forwards=done.image_forwards + forwards, macs=done.macs + macs)


def tell_cuts(results: dict[str, Any]) -> Section:
    """A row a cut."""
    measured = [
        (f"{one['top1_before']:.2f} %", f"{one['top1_after']:.2f} %") if "top1_before" in one else ("", "")
        for one in results["train"]["cuts"]
    ]
    rows = tuple(
        (
            f"{one['step']:,}", str(one["epoch"]), f"{one['after']['macs'] / one['before']['macs']:.3f}",
            f"{one['after']['params'] / one['before']['params']:.3f}", before, after,
        )
        for one, (before, after) in zip(results["train"]["cuts"], measured, strict=True)
    )  # fmt: skip
    text = "The model was cut within its training, which went on with what was left. MACs and parameters are parts of the dense model's."
    columns = ("after step", "epoch", "MACs", "parameters", "top-1 before", "top-1 after")
    return Section("Cut in the training", text, columns, rows)
