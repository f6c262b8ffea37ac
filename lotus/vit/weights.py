"""Weights from files, held to the model that they are for, and the differences told in words."""

from __future__ import annotations

import json
import math
import pickle
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selection import regular
from selection.errors import Notice, Refused, reason

HEADS = ("head", "head_dist", "head.fc")
FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in a folder."""
_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
"""Where training scripts save weights, the first that is there."""
_SETTINGS = ("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath")
"""What timm's and DeiT's checkpoints hold beside tensors."""
_WRAPPED = re.compile(r"^((module|_orig_mod)\.)+")


def state_of(path: Path, place: str) -> dict[str, Tensor]:
    """Weights by name, from a .safetensors, a state dict or training checkpoint that torch saved, or a folder.

    Of a training checkpoint (timm's, DeiT's) it is the average of the weights where there is one, as timm takes it. Its
    ``argparse.Namespace`` is read as the data that it is; nothing in a file is run.

    Raises:
        Refused: no such file, or one that holds more than tensors and settings.
    """
    from safetensors.torch import load_file

    file = file_of(path)
    if not file.exists():
        raise Refused(
            f"{place}: {file} cannot be read: nothing is there. Give a file of weights, or the folder of a model."
        )
    try:
        regular.check(file)
        state: Any = load_file(file) if file.suffix == ".safetensors" else _torch_file(file)
    except OSError as error:
        raise Refused(f"{place}: {file} cannot be read ({reason(error)}). Is it whole, and yours to read?") from None
    except Exception as error:  # a damaged file can break its parsers in any way
        # torch's own words may advise to run what the file holds.
        advises = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        why = "damaged, or more than tensors" if advises else reason(error)
        if file.suffix == ".safetensors":
            raise Refused(f"{place}: {file} cannot be read ({why}). Is it whole?") from None
        raise Refused(
            f"{place}: {file} is no state dict of tensors alone ({why}). Save model.state_dict(), best as .safetensors."
        ) from None
    for key in _INSIDE:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) and state[key]:
            state = state[key]
    tensors = isinstance(state, Mapping) and all(isinstance(tensor, Tensor) for tensor in state.values())
    if not tensors or not state:
        raise Refused(f"{place}: {file} holds no state dict. Save model.state_dict().")
    return {_WRAPPED.sub("", str(name)): tensor for name, tensor in state.items()}


def file_of(path: Path) -> Path:
    """The weights in a folder, as LOTUS or the hub lays it out; a file is itself."""
    if not path.is_dir():
        return path
    return next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])


class _Inert:
    """What stands for settings in a training checkpoint: it holds nothing and does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _torch_file(file: Path) -> Any:
    """What ``torch.save`` wrote, by torch's reader of tensors alone, which may also meet settings."""
    with torch.serialization.safe_globals([(_Inert, name) for name in _SETTINGS]):
        return torch.load(file, "cpu", weights_only=True)


def hub_config(path: Path, place: str) -> dict[str, Any]:
    """What a folder laid out as the hub does says of its model in ``config.json``: ``architecture``, ``model_args``,
    ``pretrained_cfg``; nothing where there is none of timm's.

    Raises:
        Refused: it cannot be read.
    """
    file = path / "config.json"
    if not file.is_file() or (path / "spec.json").is_file():
        return {}
    try:
        held = json.loads(regular.text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{place}: {file} cannot be read ({reason(error)}). Is it whole?") from None
    return held if isinstance(held, dict) and isinstance(held.get("architecture"), str) else {}


def load(
    model: nn.Module,
    path: Path,
    *,
    place: str = "model",
    heads: Sequence[str] = HEADS,
    args: Mapping[str, Any] | None = None,
) -> None:
    """Weights from a file or folder of any form that :func:`state_of` reads, resampled to the model's side and patches where
    ``args`` ask for those (timm's way), and a head for other classes anew.

    Args:
        model: takes the weights, in place
        path: of a file, or a folder that holds one
        place: where the model is named, for a refusal
        heads: the linear layers that may start anew
        args: what the model was made with

    Raises:
        Refused: no such file, or weights of another model; says of which.
    """
    file, weights = file_of(path), state_of(path, f"{place}.weights")
    own = model.state_dict()
    for table in {where for where, _ in model.named_buffers()} - own.keys():  # older timm kept them in the file
        weights.pop(table, None)
    cure, sides = other_images(model, weights, f"{place}.args."), _other_sides(model, weights)
    if cure and any(f".{name}=" in cure for name in ("img_size", "patch_size") if name not in (args or {})):
        raise Refused(f"{place}.weights: {file} does not fit this model: it has other patches.{cure}")
    sizes = shapes(weights)
    weights = _converted(model, weights)
    if cure and shapes(weights) != sizes:
        warnings.warn(
            f"{place}.weights: positions and patches of {file} were resampled to this model's.",
            category=Notice,
            stacklevel=3,
        )
    anew = []
    for head in heads:
        if was := _other_classes(own.get(f"{head}.weight"), weights.get(f"{head}.weight")):
            anew.append(f"{was}: {head} starts anew")
            weights |= {part: own[part] for part in (f"{head}.weight", f"{head}.bias") if part in own}
    fault = difference(shapes(own), shapes(weights))
    if fault:
        raise Refused(
            f"{place}.weights: {file} does not fit this model: {fault}.{other_shape(own, weights, place, sides)}"
        )
    for text in anew:
        warnings.warn(f"{place}.weights: {file} {text}.", category=Notice, stacklevel=3)
    model.load_state_dict(weights)


def _other_classes(here: Tensor | None, there: Tensor | None) -> str:
    """What a file's head ``there`` is for, where the model's, ``here``, has to begin anew; empty where it need not."""
    if here is None or (there is not None and (here.shape[1:] != there.shape[1:] or len(here) == len(there))):
        return ""
    if there is None or not len(there):
        return "has no classifier"
    return f"classifies {len(there)} classes, the data has {len(here)}"


def _converted(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As timm's own loader would have them, which renames what others call otherwise and resamples positions and patches."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        return dict(convert(dict(weights), model))
    except Exception:  # of another model altogether: what does not fit is told from the weights as they are
        return weights


def other_shape(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], place: str, sides: Mapping[str, int] | None = None
) -> str:
    """Of which width and depth ``weights`` are, with the arguments that make such a model, in a sentence; empty where they
    are of the same, or of no ViT. ``sides`` are those of images and patches, where they are others too."""
    mine, theirs = _size(own), _size(weights)
    if mine is None:  # a teacher may be of any kind
        return f" Set {place}.name to the model that they are of."
    if theirs is None:
        return " These are not the weights of a ViT as timm names them: take a timm ViT's."
    other = {name: value for name, value in theirs.items() if mine.get(name) != value}
    if not other:
        return ""
    heads = f" and {place}.args.num_heads=N, which no shape tells" if "embed_dim" in other else ""
    said = " ".join(f"{place}.args.{name}={value}" for name, value in {**other, **(sides or {})}.items())
    return (
        f" These weights are of {theirs['depth']} blocks, {theirs['embed_dim']} wide: set {place}.name to the model that they are "
        f"of, or say {said}{heads}."
    )


def _size(state: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Width and depth by the names that timm gives them; None for what is no ViT."""
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    norm = state.get("blocks.0.norm1.weight")
    return {"embed_dim": len(norm), "depth": len(blocks)} if norm is not None else None


def other_images(model: nn.Module, weights: Mapping[str, Tensor], argument: str) -> str:
    """With which arguments the model would have patches as many and as large as ``weights`` are for, in a sentence; empty where
    it has, or where their position embedding does not tell.

    Args:
        model: that is to have them
        argument: what the user writes before NAME=VALUE
    """
    here, there = getattr(model, "pos_embed", None), weights.get("pos_embed")
    asks = _other_sides(model, weights)
    if not asks or here is None or there is None or here.shape[2] != there.shape[2]:
        return ""
    sides = {**{name: side_of(getattr(model.patch_embed, name)) for name in ("img_size", "patch_size")}, **asks}
    return (
        f" Say {' and '.join(f'{argument}{name}' for name in sides)} as you want them, and they are resampled. These weights are for "
        f"images of {sides['img_size']} pixels in patches of {sides['patch_size']}: say "
        f"{' '.join(f'{argument}{name}={value}' for name, value in asks.items())}."
    )


def _other_sides(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The sides of the images and patches that ``weights`` are for, by timm's arguments: those that are not the model's; none
    where their position embedding does not tell."""
    embed: Any = getattr(model, "patch_embed", None)
    here, there = getattr(model, "pos_embed", None), weights.get("pos_embed")
    kernel = weights.get("patch_embed.proj.weight")
    if here is None or there is None or kernel is None or here.ndim != there.ndim or here.ndim != 3 or kernel.ndim != 4:
        return {}
    patches = there.shape[1] - (here.shape[1] - embed.num_patches)  # less the class token
    side, patch = math.isqrt(max(0, patches)), kernel.shape[-1]
    if side * side != patches:
        return {}
    asks = {"img_size": side * patch, "patch_size": patch}
    return {name: value for name, value in asks.items() if side_of(getattr(embed, name)) != value}


def shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first differences in words; empty where there are none."""
    return few(differences(expected, found))


def few(faults: Sequence[str]) -> str:
    return "; ".join(faults[:3]) + (f", and {len(faults) - 3} more" if len(faults) > 3 else "")


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Every difference in words."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} does not belong" for name in found if name not in expected]
    faults += [
        f"{name} is {found[name]}, not {want}"
        for name, want in expected.items()
        if name in found and found[name] != want
    ]
    return faults


def side_of(pair: tuple[int, int] | None) -> int | list[int] | None:
    return None if pair is None else pair[0] if pair[0] == pair[1] else list(pair)
