"""The stage ``baseline``: what everything is compared with, on all images and without any lottery.

The dense model by the training's own recipe or by the textbook's, or a narrower model of the shipped one's MACs from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from lotus.config import Baseline, Config, Model, Sparsity, Train
from lotus.run import Run
from lotus.stage import TRAIN_FORWARDS, Curve, Stage, Work, named
from lotus.stages.ahead import LOOK, Ahead, Cost, training
from lotus.stages.context import Context
from lotus.stages.fit import Images, Task, fit, keep_model, outcome
from lotus.stages.still import spared_of
from lotus.stages.teacher import taught, teacher_files, teacher_macs
from selection.errors import Refused

AVERAGES = ("late_average",)
"""The guests of a training that are a part of its recipe and no lottery."""
PLAIN = ("optimizer", "lr", "adamw_lr", "schedule", "min_lr", "ema")
"""What the textbook says of a training, by LOTUS' own defaults."""


TEACHING = ("teacher", "distill", "temperature", "teacher_weight")
"""What a recipe says of its teacher."""


def baseline(context: Context) -> Work:
    import torch

    from lotus.vit.cost import count
    from lotus.vit.model import create

    run, config, settings = context.run, context.config, asked(context.config)
    manifest = context.manifest()
    model = context.new_model()
    epochs = settings.epochs or config.train.epochs
    if settings.name == "small":
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = create(smaller(config.model, config.prune.keep.macs or 1.0), len(manifest.classes))
        if settings.epochs is None:
            epochs = affordable(_spent(run), count(model).macs * manifest.n)
    plain = recipe(config, epochs)
    task, guests = Task("baseline", plain, place="train", own_guests=True), taught(context, plain, "train")
    fitted, price = yield from fit(context, task, model, Images(np.arange(manifest.n)), guests)
    yield from keep_model(context, "baseline", model, run.of("baseline"))
    return outcome(fitted, price, model, {"kind": settings.name, "epochs": epochs, "taught": teaching(config)})


def asked(config: Config) -> Baseline:
    """Which baseline; where none is wanted and the lottery asks one nevertheless, the best."""
    return config.baseline or Baseline()


def is_asked(config: Config) -> bool:
    """Whether the lottery asks the run's own dense model which patches matter, so that it is more than a comparison."""
    return any(one.patches is not None and one.patches.asks_baseline for one in (config.train, config.finetune))


def recipe(config: Config, epochs: int) -> Train:
    """``train``'s recipe without any lottery, for so many epochs; the textbook's where that is asked for."""
    train = config.train
    averages = tuple(guest for guest in train.guests if guest.name in AVERAGES)
    changes: dict[str, Any] = {
        "epochs": epochs, "sparsity": Sparsity(gates=False), "shrink": None, "dynamic": None, "sides": (), "patches": None,
        "guests": averages, "teacher": None if _learns_alone(config) else train.teacher,
    }  # fmt: skip
    if asked(config).name != "best":
        changes |= {"freeze": (), "probe_epochs": 0.0}
    if asked(config).name == "textbook":
        plain = Train()
        changes |= {
            **{name: getattr(plain, name) for name in PLAIN},
            "guests": (),
            **({} if train.warmup else {"warmup_epochs": None, "warmup_ratio": 0.1}),
        }
    return train.model_copy(update=changes)


def _learns_alone(config: Config) -> bool:
    """Whether nobody teaches the baseline: who else would is a part of the recipe, but for the model before the cut."""
    teacher = config.train.taught_by
    return teacher is None or teacher.is_uncut or asked(config).name == "textbook"


def teaching(config: Config) -> dict[str, Any]:
    """Who teaches the baseline, and how; nothing where nobody does."""
    told = config.train.model_dump(mode="json", include=set(TEACHING))
    return {} if _learns_alone(config) else told


def smaller(model: Model, keep: float) -> Model:
    """``model`` from scratch, narrower: of at most ``keep`` of its MACs.

    Raises:
        Refused: none can be made of it by its arguments.
    """
    from lotus.vit.smaller import narrower

    try:
        return narrower(model, keep)
    except Refused as refusal:
        raise Refused(f"baseline.name: small needs a narrower model. {refusal} Or take baseline=best.") from None


def affordable(macs: float, epoch: float) -> int:
    """Epochs of training, of ``epoch`` MACs forward each, that come nearest to ``macs`` in all; 1 at least."""
    return max(1, round(macs / (TRAIN_FORWARDS * epoch)))


def _spent(run: Run) -> float:
    """MACs of the lottery so far."""
    records = [
        run.record(name)
        for name in run.plan(named(run.stages, "shipped"))
        if run.stages[name].part not in ("dense", "apart")
    ]
    return sum(record.macs for record in records if record is not None)


def _check(ahead: Ahead) -> None:
    if asked(ahead.config).name == "small":
        smaller(ahead.config.model, ahead.config.prune.keep.macs or 1.0)


def _forecast(ahead: Ahead) -> Cost:
    from lotus.vit.cost import count
    from lotus.vit.model import build

    config, settings = ahead.config, asked(ahead.config)
    epochs, macs = settings.epochs or config.train.epochs, ahead.macs
    if settings.name == "small":
        small = smaller(config.model, config.prune.keep.macs or 1.0)
        macs = count(build(small.name, {**small.args, "num_classes": ahead.classes}, meta=True)).macs
        if settings.epochs is None:
            epochs = affordable(ahead.spent, macs * ahead.images)
    made = recipe(config, epochs)
    forwards, spent = training(epochs * ahead.images, macs, teacher_macs(made, ahead))
    less = spared_of(made, epochs * ahead.images, macs, ahead) if made.holds_still else (0.0, 0.0)
    return forwards + less[0], spent + less[1]


def _says(config: Config) -> str:
    return {
        "best": "train the dense model on all images, to compare with",
        "textbook": "train the dense model on all images by the textbook, to compare with",
        "small": "train a small model from scratch on all images, to compare with",
    }[asked(config).name]


def _settings(config: Config) -> tuple[str, ...]:
    settings = asked(config)
    own = () if settings == Baseline() else ("baseline",)  # what stands was made before there was another
    left_out = ["sparsity", "dynamic", "shrink", "patches"]
    left_out += PLAIN if settings.name == "textbook" else ()
    left_out += TEACHING  # who teaches is told by the record's values
    left_out += ("freeze", "probe_epochs") if settings.name != "best" else ()
    if settings.name == "textbook" or not any(guest.name in AVERAGES for guest in config.train.guests):
        left_out.append("guests")
    if settings.epochs is not None or settings.name == "small":
        left_out.append("epochs")
    small = ("prune.keep.macs",) if settings.name == "small" else ()
    return ("train", *(f"-train.{name}" for name in left_out), "model", *LOOK, "seed", *own, *small)


def _stale(config: Config, values: Mapping[str, Any]) -> str | None:
    """Another kind, or another length, than was trained: a record is not asked for settings that are not named any more."""
    settings, was = asked(config), values.get("kind", "best")
    if was != settings.name:
        return f"baseline.name: {was} -> {settings.name}"
    taught, now = values.get("taught", {}), teaching(config)
    if taught != now:
        return f"train.teacher of the baseline: {taught.get('teacher', 'none')} -> {now.get('teacher', 'none')}"
    epochs = settings.epochs or (None if settings.name == "small" else config.train.epochs)
    stood = values.get("epochs", epochs)
    return None if epochs in (None, stood) else f"epochs of the baseline: {stood} -> {epochs}"


def _bind(config: Config, _: Sequence[ModuleType]) -> dict[str, Any]:
    return {"curve": Curve("dense", "small", "small, all images")} if asked(config).name == "small" else {}


STAGE = Stage(
    "baseline",
    _says,
    baseline,
    settings=_settings,
    after=lambda config: ("finetune",) if asked(config).name == "small" else ("prepare",),
    outputs=("baseline/spec.json",),
    every_rank=True,
    part="dense",
    files=lambda config: {
        **({} if asked(config).name == "small" else {"model.weights": config.model.weights}),
        **({} if _learns_alone(config) else teacher_files("train", config.train)),
    },
    stale=_stale,
    check=_check,
    forecast=_forecast,
    curve=Curve("dense", "dense", "dense, all images"),
    bind=_bind,
)
