"""Who teaches a training, in ``train`` and ``finetune`` alike: found, held to the data's classes, forecast and told."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotus.config import Finetune, Model, Taught, Teacher
from lotus.stage import named
from lotus.stages import given
from lotus.stages.ahead import Ahead, Cost, seen_before
from lotus.stages.context import Context
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.training.guests import Guest
    from lotus.vit.preprocessing import Preprocessing


def taught(context: Context, recipe: Taught, place: str) -> list[Guest]:
    """The guest by whom the teacher of ``recipe`` has its say; nobody where there is none.

    Args:
        context: of the run
        recipe: a section with a ``taught_by``
        place: where the recipe stands, as in "train"

    Raises:
        Refused: a teacher of other classes, or one that cannot be had.
    """
    import lotus.pruning
    from lotus.training import distill
    from lotus.vit import model as door

    teacher = recipe.taught_by
    if teacher is None:
        return []
    pixels = context.preprocessing()
    own = pixels

    def teaches(model: nn.Module) -> distill.Distiller:
        shown = distill.Shown(model, pixels[:2], own[:2], door.side(model, 0) or None)
        made = distill.make_distiller(shown, recipe, context.world.device, place=place)
        assert made is not None
        return made

    if teacher.is_uncut and not isinstance(recipe, Finetune):
        return [distill.TaughtByUncut(teaches)]
    if teacher.is_uncut:
        return [distill.Taught(teaches(lotus.pruning.load(context.run.of(named(context.run.stages, "training")))))]
    model, own = load(teacher, context.manifest().classes, place)
    return [distill.Taught(teaches(model))]


def load(teacher: Teacher, classes: Sequence[str], place: str) -> tuple[nn.Module, Preprocessing]:
    """The teacher, and how it wants its images.

    Raises:
        Refused: there is no such model, it cannot be had, or it tells other classes apart than ``classes``.
    """
    import lotus.pruning
    from lotus.pruning import spec
    from lotus.vit import model as door
    from lotus.vit.preprocessing import preprocessing

    asked, where = _model(teacher), f"{place}.teacher"
    if asked.weights and not os.path.exists(asked.weights):
        raise Refused(
            f"{where}: there is nothing at {asked.weights}. Give a file of weights, or the folder of a model."
        )
    if given.is_ours(asked):
        _check_classes(spec.read(asked.weights).get("about", {}), classes, asked.weights, where)
        ours: Any = lotus.pruning.load(asked.weights)
        _check_number(ours.num_classes, classes, asked.weights, where)
        return ours, preprocessing(ours)
    asked, told = door.of_hub(asked, where)
    if not asked.name:
        raise Refused(
            f"{where}: {asked.weights} does not say which model it is of. Say {{name: NAME, weights: {asked.weights}}}, with a "
            "timm model's name."
        )
    _check_classes({"classes": told.get("label_names")}, classes, asked.weights, where)
    _check_number(_known_classes(asked, where), classes, asked.weights or asked.name, where)
    model = door.proxy(asked, len(classes), place=where)
    door.remember_images(model, told)
    return model, preprocessing(model)


def _known_classes(asked: Model, where: str) -> int:
    """How many classes the weights tell apart: those that are given, or timm's published ones."""
    from lotus.vit import zoo
    from lotus.vit.weights import HEADS, state_of

    cfg = zoo.published(asked.name, where)
    if not asked.weights:
        return int(cfg.get("num_classes", 0))
    names = cfg.get("classifier") or ()
    heads = (*HEADS, *((names,) if isinstance(names, str) else names))
    state = state_of(Path(asked.weights), f"{where}.weights")
    known = [len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state]
    if not known:
        raise Refused(
            f"{where}: {asked.weights} has no classifier where {asked.name} has one. Name the model that it is of, trained on "
            "these classes."
        )
    return known[0]


def _model(teacher: Teacher) -> Model:
    return Model(name=teacher.name, args=teacher.args, weights=teacher.weights, pretrained=not teacher.weights)


def _check_number(known: int, classes: Sequence[str], who: str, where: str) -> None:
    if known != len(classes):
        raise Refused(
            f"{where}: {who} tells {known} classes apart, the data has {len(classes)}. Take a teacher that was trained on these "
            "classes (lotus train makes one), or none."
        )


def _check_classes(about: Any, classes: Sequence[str], who: str, where: str) -> None:
    """Refuse classes of other names, where they are known, and their logits in another order."""
    names = about.get("classes") if isinstance(about, dict) else None
    if not isinstance(names, list) or not names or list(names) == list(classes):
        return
    _check_number(len(names), classes, who, where)
    one, other = next((one, other) for one, other in zip(names, classes, strict=True) if one != other)
    raise Refused(
        f"{where}: {who} knows other classes than the data, or in another order: {one!r} where the data has {other!r}. Take a "
        "teacher that was trained on these classes (lotus train makes one), or none."
    )


# --------------------------------------------------------------------------------------------- before anything is done


def check_teacher(place: str, recipe: Taught, ahead: Ahead) -> None:
    """Refuse a teacher that cannot be had, or of other classes: it is loaded."""
    teacher = recipe.taught_by
    if teacher is not None and not teacher.is_uncut:
        with warnings.catch_warnings(action="ignore"):
            load(teacher, ahead.sources[0].classes, place)


def teacher_macs(recipe: Taught, ahead: Ahead) -> float:
    """Of the teacher's pass over an image; 0 where nobody teaches."""
    from lotus.pruning import spec
    from lotus.vit import cost
    from lotus.vit import model as door

    teacher = recipe.taught_by
    if teacher is None:
        return 0.0
    if teacher.is_uncut:
        return ahead.macs
    asked = _model(teacher)
    if given.is_ours(asked):
        return float(spec.read(asked.weights)["cost"]["macs"])
    asked = door.of_hub(asked, "teacher")[0].model_copy(update={"pretrained": False, "weights": ""})
    made = door.proxy(asked, ahead.classes)
    return cost.macs(made, door.side(made, door.image_size(ahead.dense)))


def teacher_forecast(recipe: Taught, images: float, ahead: Ahead) -> Cost:
    """What teaching a training of so many images costs: the uncut model teaches after the first cut alone."""
    each, teacher = teacher_macs(recipe, ahead), recipe.taught_by
    train = ahead.config.train
    if teacher is not None and teacher.is_uncut and train.shrink is not None:
        images *= 1 - seen_before(train, ahead.kept, train.shrink.cuts[0].at)
    return (images, images * each) if teacher is not None else (0.0, 0.0)


def teacher_files(place: str, recipe: Taught) -> dict[str, str]:
    """Where the teacher lies, by the setting."""
    return {} if recipe.teacher is None else {f"{place}.teacher": recipe.teacher.weights}


def taught_told(recipe: Taught) -> str:
    """What a stage says of its teacher, behind what it does."""
    teacher = recipe.taught_by
    if teacher is None:
        return ""
    return f", taught by {'the unpruned model' if teacher.is_uncut else teacher.weights or teacher.name}"
