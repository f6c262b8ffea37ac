"""What the stage ``train`` does for a training that shrinks: looks at its images, forecasts, bills and tells."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Prune
from lotus.report.numbers import accuracy
from lotus.stage import Section
from lotus.stages import course
from lotus.stages.ahead import Ahead, Cost
from lotus.stages.context import CALIBRATION, Context
from lotus.stages.course import request_of
from selection.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from lotus.pruning import Pruned
    from lotus.stages.fit import Price
    from lotus.training.shrink import Shrink


def shrinking(context: Context, model: nn.Module, rows: np.ndarray) -> Shrink:
    """The guest that cuts ``model``, which is looked at on some of ``rows`` as they are, without augmentation."""
    import lotus.pruning
    from lotus.pruning.measure import enough
    from lotus.training.distributed import StopFlag
    from lotus.training.evaluation import evaluate_classes, heard
    from lotus.training.shrink import Shrink

    config, run = context.config, context.run
    settings, request = config.train.shrink, request_of(config)
    assert settings is not None
    rng = np.random.default_rng([config.seed, CALIBRATION])
    looked_at = np.sort(rng.choice(rows, size=min(request.calibration or enough(model), len(rows)), replace=False))

    given = lotus.pruning.Given(context.shelves, seed=config.seed)

    def draw(model: nn.Module, request: Prune, dense: nn.Module | None) -> Pruned:
        with context.alone().images(run.train_beton, looked_at, config.train, model) as loader:
            return lotus.pruning.lottery(model, lambda: heard(loader.epoch(0)), request, given, dense=dense)

    def measure(model: nn.Module) -> Mapping[str, float]:
        with context.images(run.val_beton, None, config.train, model) as loader:
            return evaluate_classes(model, loader, context.world, stop=StopFlag.now())[0]

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
    step = 0
    for number, one in enumerate(recipe.shrink.cuts):
        place = f"train.shrink.steps.{number}.at" if recipe.shrink.steps else "train.shrink.at"
        step = max(math.ceil(one.at * total), step + 1)  # after each step one cut
        if step >= total:
            raise Refused(
                f"{place}: after {one.at:g} of {total} steps nothing is left to train what was cut. Cut sooner, or train longer."
            )
    stable, at = recipe.shrink.until_stable, recipe.shrink.cuts[0].at
    if stable is not None and at * recipe.epochs < (wanted := stable.epochs + 1):
        enough = math.ceil(round(wanted / at, 6))
        later = math.ceil(round(wanted / recipe.epochs * 100, 6)) / 100
        raise Refused(
            f"train.shrink.until_stable: a plan is drawn at the end of each epoch, and the cut, at {at:g} of {recipe.epochs}, comes before "
            f"one could have settled. Set {f'train.shrink.at={later:g}, or ' if later < 1 else ''}train.epochs={enough}."
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


def forecast_looks(ahead: Ahead) -> Cost:
    """What looking at the models costs: on calibration images for each plan, on the validation images around each cut."""
    from lotus.pruning.measure import enough
    from lotus.pruning.study import forwards_of

    config, shrink, found = ahead.config, ahead.config.train.shrink, course.shapes_of(ahead)
    assert shrink is not None
    request = request_of(config)
    looked_at = min(request.calibration or enough(ahead.dense), ahead.kept)
    last = looked_at * forwards_of(request, ahead.shelves)
    images = looked_at * forwards_of(request.model_copy(update={"embed_dim": None}), ahead.shelves)
    measured = len(ahead.sources[1].labels) if shrink.evaluate else 0
    forwards = macs = 0.0
    if shrink.until_stable is not None:  # at the latest
        forwards = last * int(shrink.cuts[0].at * config.train.epochs)
        macs = forwards * ahead.macs
    costs = [shape.macs() for shape in found]
    for number, (now, after) in enumerate(itertools.pairwise(costs), start=1):
        looks = last if number == len(shrink.cuts) else images
        forwards += looks + 2 * measured
        macs += (looks + measured) * now + measured * after
    return forwards, macs


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


def tell_cuts(results: dict[str, Any]) -> Section:
    """A row a cut."""
    measured = [
        tuple(accuracy(one[f"top1_{when}"], one.get(f"images_{when}")) for when in ("before", "after"))
        if "top1_before" in one
        else ("", "")
        for one in results["train"]["cuts"]
    ]
    rows = tuple(
        (
            f"{one['step']:,}", str(one["epoch"]), f"{one['after']['macs'] / one['before']['macs']:.3f}",
            f"{one['after']['params'] / one['before']['params']:.3f}", before, after,
        )
        for one, (before, after) in zip(results["train"]["cuts"], measured, strict=True)
    )  # fmt: skip
    text = "The model was cut within its training, which went on with what was left. MACs and parameters are fractions of the dense model's."
    columns = ("after step", "epoch", "MACs", "parameters", "top-1 before", "top-1 after")
    return Section("Cut in the training", text, columns, rows)
