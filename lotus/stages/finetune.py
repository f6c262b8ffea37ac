"""The stage ``finetune``: what was pruned recovers, taught by the model before the cut. Its model is the one that ships."""

from __future__ import annotations

import json
from typing import Any

from lotus.config import Config
from lotus.run import Run
from lotus.stage import Curve, Outcome, Stage, Work
from lotus.stages import ways
from lotus.stages.ahead import Ahead, Cost, asked_of_patches, check_recipe, patches_told, training
from lotus.stages.context import Context
from lotus.stages.course import left_of
from lotus.stages.fit import Images, Task, fit, keep_model, outcome
from lotus.stages.teacher import check_teacher, taught, taught_told, teacher_files, teacher_macs


def finetune(context: Context) -> Work:
    import lotus.pruning
    from lotus.training.guests import Guest
    from selection.subset import Subset

    run, recipe = context.run, context.config.finetune
    model = lotus.pruning.load(run.of("prune"))
    if recipe.epochs == 0:
        yield from keep_model(context, "finetune", model, run.of("finetune"))
        return Outcome(values={**(run.record("prune").values), "images_seen": 0, "train_seconds": 0.0})  # type: ignore[union-attr]
    ticket = Subset.load(run.ticket)
    guests: list[Guest] = list(taught(context, recipe, "finetune"))
    way, options = ways.chosen(context.config.prune, context.shelves)
    held = way.hold(model, options)
    guests += [] if held is None else [held]
    images = Images(ticket.rows, ticket.spread())
    fitted, price = yield from fit(context, Task("finetune", recipe), model, images, guests)
    model = fitted.model
    more, about = ({}, {}) if held is None else held.left(model)
    yield from keep_model(context, "finetune", model, run.of("finetune"), about)
    return outcome(fitted, price, model, more)


def _check(ahead: Ahead) -> None:
    check_recipe("finetune", ahead.config.finetune, ahead.shape)
    if ahead.config.finetune.epochs:
        check_teacher("finetune", ahead.config.finetune, ahead)


def _forecast(ahead: Ahead) -> Cost:
    recipe = ahead.config.finetune
    teacher = teacher_macs(recipe, ahead) if recipe.epochs else 0
    return training(recipe.epochs * ahead.kept, _left(ahead) * ahead.share(recipe, "finetune"), teacher)


def _left(ahead: Ahead) -> float:
    """MACs of an image in what the cut leaves, as a plan foresees it; other ways than by scores say theirs in MACs, or cut none."""
    request = ahead.config.prune
    asked = request.keep.asked
    if request.method.name == "structured" and asked.keys() <= {"macs", "params", "latency"}:
        return left_of(ahead.dense, request).macs()
    return ahead.macs * asked.get("macs", 1.0)


def _tell(run: Run, results: dict[str, Any]) -> None:
    """What is left of the dimensions of the model before the cut, and on how many patches it was measured."""
    uncut = results["train"].get("uncut")  # the model before the cut, where that was within the training
    old, new = uncut or results["train"], results["finetune"]
    kept, folders = results["kept"], (run.of("train"), run.of("finetune"))
    kept["dimensions"] = {what: new[what] / old[what] for what in ("macs", "params")}
    specs = [json.loads((folder / "spec.json").read_text(encoding="utf-8")) for folder in folders]
    kernels = specs[1].get("convolutions", {})
    kept["blocks"] = [
        {
            "heads": now["heads"], "of_heads": was["heads"], "head_dim": now["v_dim"], "of_head_dim": was["v_dim"],
            "hidden": now["hidden"], "of_hidden": was["hidden"],
            **({"kernel": kernels[str(place)]} if str(place) in kernels else {}),
        }
        for place, (was, now) in enumerate(zip(uncut["blocks"] if uncut else specs[0]["blocks"], specs[1]["blocks"]))
    ]  # fmt: skip
    measured = new.get("patches") or {"evaluated": "dense"}
    results["evaluated"] = {
        "patches": measured["evaluated"],
        "share": measured.get("evaluated_share", 1.0),
        "macs": measured.get("evaluated_macs", new["macs"]),
    }


def _says(config: Config) -> str:
    if config.finetune.epochs == 0:
        return f"pass on {'the model' if config.train.shrink is None else 'what was cut in the training'}"
    return "recover" + taught_told(config.finetune)


STAGE = Stage(
    "finetune",
    lambda config: _says(config) + patches_told(config.finetune.patches),
    finetune,
    settings=("finetune", "seed"),
    after=("prune",),
    outputs=("finetune/spec.json",),
    every_rank=True,
    part="shipped",
    files=lambda config: {
        **asked_of_patches("finetune.patches", config.finetune.patches),
        **teacher_files("finetune", config.finetune),
    },
    check=_check,
    forecast=_forecast,
    measured_on=lambda config: config.finetune.patches if config.finetune.epochs else config.train.patches,
    tell=_tell,
    curve=Curve("tune", "fine-tuned", "fine-tune"),
)
