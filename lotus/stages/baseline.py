"""The stage ``baseline``: the dense model on all images, by the same recipe. What everything is compared with."""

from __future__ import annotations

import numpy as np

from lotus.config import Config
from lotus.stage import Curve, Stage, Work
from lotus.stages.ahead import Ahead, Cost, training
from lotus.stages.context import Context
from lotus.stages.fit import Images, Task, fit, keep_model, outcome


def baseline(context: Context) -> Work:
    run, config = context.run, context.config
    model = context.new_model()
    images = Images(np.arange(context.manifest().n))
    every_patch = config.train.model_copy(update={"patches": None})
    fitted, price = yield from fit(context, Task("baseline", every_patch, place="train"), model, images)
    yield from keep_model(context, "baseline", model, run.of("baseline"))
    return outcome(fitted, price, model)


def is_asked(config: Config) -> bool:
    """Whether the lottery asks the run's own dense model which patches matter, so that it is more than a comparison."""
    return any(one.patches is not None and one.patches.model == "baseline" for one in (config.train, config.finetune))


def _forecast(ahead: Ahead) -> Cost:
    return training(ahead.config.train.epochs * ahead.images, ahead.macs)


STAGE = Stage(
    "baseline",
    "train the dense model on all images, to compare with",
    baseline,
    settings=(
        "train",
        "-train.sparsity",
        "-train.dynamic",
        "-train.shrink",
        "-train.patches",
        "-train.guests",
        "model",
        "data.normalize",
        "seed",
    ),
    after=("prepare",),
    outputs=("baseline/spec.json",),
    every_rank=True,
    part="dense",
    files=lambda config: {"model.weights": config.model.weights},
    forecast=_forecast,
    curve=Curve("dense", "dense", "dense, all images"),
)
