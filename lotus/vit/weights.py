"""Weights from files, held to the model that they are for, and the differences told in words."""

from __future__ import annotations

import argparse
import importlib
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selection.errors import Notice, Refused

HEADS = ("head", "head_dist", "head.fc")
_INSIDE = ("model_ema", "state_dict_ema", "model", "state_dict", "model_state_dict")
"""Where training checkpoints keep their weights."""


def state_of(path: Path, place: str) -> dict[str, Tensor]:
    """Weights by name, from a .safetensors, a file that torch saved, or a folder that holds a model.safetensors.

    A training checkpoint (timm's, DeiT's, of DataParallel) is looked through for its weights: the averaged ones where it has
    any. Its settings, an ``argparse.Namespace``, are the only object besides tensors that is made while it is read.

    Raises:
        Refused: no such file, or one that holds other things than these.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors" if path.is_dir() else path
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: Any = (
                load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
            )
    except (OSError, SafetensorError) as error:
        raise Refused(f"{place}: {file} cannot be read ({reason(error)}).") from None
    except Exception as error:  # a damaged file can break its parsers in any way
        # torch's own words would advise to run what the file holds.
        why = "damaged, or more than tensors" if isinstance(error, pickle.UnpicklingError) else reason(error)
        raise Refused(
            f"{place}: {file} holds no state dict of tensors alone ({why}). Save model.state_dict(), best as .safetensors."
        ) from None
    for key in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise Refused(f"{place}: {file} holds no state dict. Save model.state_dict().")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def reason(error: Exception) -> str:
    """One line of what timm said."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def load(vit: nn.Module, path: Path, *, place: str = "model", heads: Sequence[str] = HEADS) -> None:
    """Weights from a file or a folder, as :func:`state_of` reads them. A head for other classes starts anew; position
    embeddings and patches of another size are resampled, as timm does it.

    Raises:
        Refused: no such file, one that holds no weights, or those of another model.
    """
    weights, own = state_of(path, f"{place}.weights"), vit.state_dict()
    file = path / "model.safetensors" if path.is_dir() else path
    beside = {where for where, _ in vit.named_buffers()} - own.keys()  # tables that older timm kept in the file
    weights = resampled(vit, {name: tensor for name, tensor in weights.items() if name not in beside})
    for head in heads:
        here, there = own.get(f"{head}.weight"), weights.get(f"{head}.weight")
        if here is None or (there is not None and here.shape == there.shape):
            continue
        if there is not None and here.shape[1:] != there.shape[1:]:
            continue  # a model of another width: said below
        if there is None and f"{head}.bias" in weights:
            continue
        told = "has no head" if there is None else f"classifies {len(there)} classes, the data has {len(here)}"
        warnings.warn(f"{place}.weights: {file} {told}: {head} starts anew.", Notice, stacklevel=3)
        for part in (f"{head}.weight", f"{head}.bias"):
            if part in own:
                weights[part] = own[part]
    fault = difference(shapes(own), shapes(weights))
    if fault:
        cure = other_images(vit, weights, f"{place}.args.") or was_it_cut(path)
        raise Refused(f"{place}.weights: {file} does not fit this model: {fault}.{cure}")
    vit.load_state_dict(weights)


def resampled(vit: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` for the sides, patches and names of ``vit``, by the family's own filter in timm; as they are where they fit."""
    own = vit.state_dict()
    bodies = [
        {name: shape for name, shape in shapes(state).items() if not name.startswith("head")}
        for state in (own, weights)
    ]
    embed = getattr(vit, "patch_embed", None)
    fits = getattr(importlib.import_module(type(vit).__module__), "checkpoint_filter_fn", None)
    if bodies[0] == bodies[1] or embed is None or fits is None or not {*own} & {*weights}:
        return weights
    widths = [
        state["patch_embed.proj.weight"].shape[:2] for state in (own, weights) if "patch_embed.proj.weight" in state
    ]
    if len(widths) < 2 or widths[0] != widths[1]:
        return weights  # another model: what differs is said of the file as it is
    try:
        found = dict(fits(dict(weights), vit))
    except Exception:  # made for published files alone; the differences are told by whoever asked
        return weights
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        return weights
    for name, what in (("pos_embed", "position embeddings"), ("patch_embed.proj.weight", "patches")):
        if name in weights and name in found and weights[name].shape != found[name].shape:
            then, now = ("x".join(map(str, state[name].shape[1:])) for state in (weights, found))
            warnings.warn(f"{what} are resampled from {then} to {now}", Notice, stacklevel=4)
    return found


def other_images(model: nn.Module, weights: Mapping[str, Tensor], argument: str) -> str:
    """With which arguments the model would have patches as many and as large as ``weights`` are for, in a sentence; empty where
    it has, or where their position embedding does not tell.

    Args:
        argument: what the user writes before NAME=VALUE
    """
    embed: Any = getattr(model, "patch_embed", None)
    here, there = getattr(model, "pos_embed", None), weights.get("pos_embed")
    kernel = weights.get("patch_embed.proj.weight")
    if here is None or there is None or kernel is None or here.shape[::2] != there.shape[::2] or kernel.ndim != 4:
        return ""
    patches = there.shape[1] - (here.shape[1] - embed.num_patches)  # less the class token
    side, patch = math.isqrt(max(0, patches)), kernel.shape[-1]
    asks = {"img_size": side * patch, "patch_size": patch}
    other = [f"{argument}{name}={asks[name]}" for name in asks if side_of(getattr(embed, name)) != asks[name]]
    if side * side != patches or not other:
        return ""
    return f" These weights are for images of {side * patch} pixels in patches of {patch}: say {' '.join(other)}."


def was_it_cut(path: Path) -> str:
    return " Was it cut? Then load the folder by lotus.load." if path.is_dir() else ""


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
