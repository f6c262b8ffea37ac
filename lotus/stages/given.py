"""The model that a run starts from, whoever made its weights: a file, a folder of the hub, or one of LOTUS, cut or not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotus.config import Model
from selection.errors import Notice, Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.vit.preprocessing import Preprocessing


def is_ours(model: Model) -> bool:
    """Whether the weights are a folder of LOTUS, which says itself what it is."""
    return bool(model.weights) and (Path(model.weights) / "spec.json").is_file()


def holds_weights(path: Path) -> bool:
    """Whether a model lies there, and no run or config: a folder of LOTUS or the hub, or a file of weights."""
    if path.is_dir():
        return not (path / "config.yaml").is_file() and any(
            (path / name).is_file() for name in ("spec.json", "config.json")
        )
    return path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".tar")


AS_IT_IS = ("train.shrink=null", "prune.keep.macs=1")
"""What lets a model as it is."""


def notes(path: Path, *, again: bool = True) -> list[str]:
    """What there is to say of a model before it is trained on: that it was cut before, and whether it is cut ``again``."""
    from lotus.pruning import spec

    if not (path / "spec.json").is_file():
        return []
    about = spec.read(path)
    part = about["cost"]["macs"] / about["dense_cost"]["macs"] if "dense_cost" in about else 1.0
    if part > 0.999:
        return []
    known = f"{path}: has {part:.2f} of its dense model's MACs"
    if not again:
        return [f"{known}, and is not cut again. prune.keep.macs=0.8 would let it shrink to 0.8 of what is left."]
    return [f"{known}. What is cut now is a fraction of what is left; {' '.join(AS_IT_IS)} cuts nothing."]


def model_of(model: Model, classes: int, *, names: Sequence[str] = (), place: str = "model") -> nn.Module:
    """As :func:`lotus.vit.model.create`, or what a folder of LOTUS holds, in training mode: cut ones too.

    Args:
        model: by name, or the folder that ``weights`` names
        classes: how many the data have
        place: where the model is named, for a refusal
        names: of the classes; a head whose folder knows as many others starts anew

    Raises:
        Refused: also where ``model.args`` ask for other things than another side.
    """
    from lotus.vit import model as door

    made: Any = _from_folder(model, classes, place) if is_ours(model) else door.create(model, classes, place=place)
    known = (getattr(made, "pretrained_cfg", None) or {}).get("label_names", ())
    other = next(((one, two) for one, two in zip(known, names) if one != two), None)
    if other is not None and len(known) == classes:
        warnings.warn(
            f"{place}.weights: {model.weights} knows other classes, {other[0]!r} where the data has {other[1]!r}: head starts anew.",
            category=Notice,
            stacklevel=2,
        )
        made.reset_classifier(classes)
    return made  # type: ignore[no-any-return]


def shape_of(model: Model, classes: int) -> nn.Module:
    """Such a model to look at its shape, with no weights of anybody's."""
    from lotus.vit import model as door

    if is_ours(model):
        with warnings.catch_warnings(action="ignore"):
            return _from_folder(model, classes, "model")
    named, _ = door.of_hub(model, "model")
    return door.create(named.model_copy(update={"pretrained": False, "weights": ""}), classes)


def _from_folder(model: Model, classes: int, place: str) -> nn.Module:
    import lotus.pruning
    from lotus.vit import model as door

    made: Any = lotus.pruning.load(model.weights)
    origin = door.origin(made)
    side = model.args.get("img_size")
    if side is not None and side != origin["args"].get("img_size", door.side(made, 0)):
        if getattr(made, "pos_embed", None) is None or not hasattr(made, "set_input_size"):
            raise Refused(f"{place}.args.img_size: {model.weights} holds a model whose side is its own. Leave it out.")
        warnings.warn(
            f"{place}.weights: positions of {model.weights} were resampled to images of {side} pixels.",
            category=Notice,
            stacklevel=3,
        )
        made.set_input_size(img_size=side)
        origin["args"]["img_size"] = side
    if made.num_classes != classes:
        warnings.warn(
            f"{place}.weights: {model.weights} classifies {made.num_classes} classes, the data has {classes}: head starts anew.",
            category=Notice,
            stacklevel=3,
        )
        made.reset_classifier(classes)
        origin["args"]["num_classes"] = classes
    door.remember(made, origin)
    return made.train()  # type: ignore[no-any-return]


def preprocessing_of(model: Model) -> Preprocessing:
    """What the weights that ``model`` starts from want of their images: by their folder, or by timm's word for that name."""
    from lotus.pruning import spec
    from lotus.vit import model as door
    from lotus.vit.preprocessing import preprocessing, resizing

    made = shape_of(model, 10)
    if not is_ours(model):
        door.remember_images(made, door.of_hub(model, "model")[1])
        wanted = preprocessing(made)
        return wanted._replace(interpolation="bilinear" if wanted.interpolation == "bilinear" else "bicubic")
    held = spec.read(model.weights).get("about", {})
    about = held if isinstance(held, dict) else {}
    wanted = preprocessing(made).updated(about)
    return wanted._replace(interpolation=resizing({"interpolation": wanted.interpolation, **about}))


def license_of(model: Model) -> str:
    """Of the weights that ``model`` starts from, where their folder says it, or timm of its published ones; empty where nobody does."""
    from lotus.pruning import spec
    from lotus.vit import model as door
    from lotus.vit import zoo

    told: Any = {}
    if is_ours(model):
        told = spec.read(model.weights).get("about")
    elif model.weights:
        told = door.of_hub(model, "model")[1]
    elif model.pretrained:
        told = zoo.published(model.name, "model")
    found = told.get("license") if isinstance(told, dict) else None
    return found if isinstance(found, str) else ""
