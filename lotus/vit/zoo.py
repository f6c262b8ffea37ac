"""What timm has: names, the arguments that its models take, and published weights. None of them is made here to stay."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from lotus.vit import anatomy
from lotus.vit.likeness import is_data
from lotus.vit.unmade import without_memory
from selection.errors import Refused
from selection.methods import nearest

# What an argument may be: data, never something that timm would import, open or call.
CALLABLES = {"embed_layer", "block_fn", "mlp_layer", "attn_layer", "device", "dtype", "self"}
_DEEPEST, _WIDEST = 1000, 1 << 20  # blocks; units of a layer or pixels of a side: no model has as many
PATIENCE = 5.0
"""Seconds that the Hugging Face hub has for its first answer."""
# timm's constructors, by the module that a name is registered in.
_CLASSES = {module: kind for kind, (module, _) in anatomy.FAMILIES.items()}


def architecture(name: str, place: str, *, any_kind: bool = False) -> str:
    """The architecture of a timm name, which may carry a tag of published weights (``arch.tag``).

    Raises:
        Refused: timm has no such model; names the nearest of the ViTs, or of any kind.
    """
    import timm

    arch = name.partition(".")[0]
    # Only the registry: "hf-hub:" and "local-dir:" names would bring a config from elsewhere.
    if ":" in name or not timm.is_model(arch):
        near = nearest(arch, timm.list_models()) if any_kind else _near(arch)
        raise Refused(f"{place}.name: timm has no model {name!r}.{near}")
    return arch


def _near(arch: str) -> str:
    """The nearest of the ViTs, by as many letters as were given: ``vit_tinny`` means ``vit_tiny_patch16_224``."""
    import timm

    modules = ["deit", *(module.rpartition(".")[2] for module in _CLASSES)]
    known = [name for module in modules for name in timm.list_models(module=module)]
    # Where some begin alike the last one stays: the shortest.
    begins = {name[: len(arch)]: name for name in sorted(known, key=lambda name: (len(name), name), reverse=True)}
    close = difflib.get_close_matches(arch, begins, n=1, cutoff=0.6)
    return f" Did you mean {begins[close[0]]!r}?" if close else f" LOTUS takes {anatomy.SUPPORTED}."


def published(name: str, place: str) -> dict[str, Any]:
    """What timm knows of the published weights of any of its models, which there has to be: ``num_classes``, ``classifier``, ..."""
    import timm

    architecture(name, place, any_kind=True)
    made_as: Any = timm.get_pretrained_cfg(name)
    return made_as.to_dict() if made_as is not None else {}


def class_of(name: str) -> type[nn.Module]:
    """The class that timm makes of a name."""
    import timm

    arch = name.partition(".")[0]
    try:
        with without_memory():
            return type(timm.create_model(arch))
    except Exception:  # some cannot be made without memory
        return type(timm.create_model(arch))


@functools.cache
def arguments(module: str) -> dict[str, Any]:
    """Argument -> default, of the model that timm's ``module`` makes; of a plain ViT where the module is none of a family."""
    known = module if module in _CLASSES else "timm.models.vision_transformer"
    made = getattr(importlib.import_module(known), _CLASSES[known])
    parameters = inspect.signature(made.__init__).parameters
    return {key: value.default for key, value in parameters.items() if key not in CALLABLES}


def check_args(args: Mapping[str, Any], allowed: Collection[str], what: str, place: str) -> None:
    """Refuse arguments that ``what`` does not take, or that are no data."""
    for key, value in args.items():
        if key not in allowed:
            raise Refused(f"{place}.args.{key}: {what} takes no such argument.{nearest(key, allowed)}")
        if not is_data(value):
            raise Refused(f"{place}.args.{key}: must be a number, text, truth value or list, not {value!r}.")


def check_sizes(args: Mapping[str, Any], place: str) -> None:
    """Before anything is built: thousands of blocks take minutes, even without memory for their weights.

    Raises:
        Refused: a model deeper or wider than any.
    """
    for key, value in args.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        whole = [number for number in numbers if isinstance(number, int)]
        most, of = (_DEEPEST, "blocks") if key in ("depth", "depths") else (_WIDEST, "units or pixels")
        if len(numbers) > _DEEPEST or max([*whole, sum(whole) if key == "depths" else 0], default=0) > most:
            raise Refused(f"{place}.args.{key}: {value!r:.60} is beyond any model; at most {most} {of}.")


def refuse_other_kinds(arch: str, place: str, made: nn.Module | None) -> None:
    if fault := other_kind(arch, made):
        raise Refused(f"{place}.name: {arch!r} {fault}")


def other_kind(arch: str, made: nn.Module | None = None) -> str:
    """Why the architecture is none that LOTUS supports, in the rest of a sentence; empty where it is one."""
    import timm

    if made is None:
        try:
            with without_memory():
                made = timm.create_model(arch)
        except Exception:  # some other architectures cannot be made without memory
            entry = timm.model_entrypoint(arch).__module__
            ours = entry in (*_CLASSES, "timm.models.deit")
            return "" if ours else f"is of {entry}, no family of ours. Supported: {anatomy.SUPPORTED}."
    fault = anatomy.why_not(made)
    return f"is not supported. {fault}" if fault else ""


def ask_the_hub(name: str) -> None:
    """One short question, where the published weights of ``name`` still have to come from the Hugging Face hub.

    Whatever there is no answer for raises at once; timm's own call would be repeated five times, with longer and longer pauses.
    """
    import huggingface_hub as hub
    import timm
    from huggingface_hub.errors import HfHubHTTPError

    made_as: Any = timm.get_pretrained_cfg(name)
    if made_as is None or not made_as.hf_hub_id:
        return
    repo, _, revision = made_as.hf_hub_id.partition("@")
    files = [made_as.hf_hub_filename] if made_as.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if any(isinstance(hub.try_to_load_from_cache(repo, file, revision=revision or None), str) for file in files):
        return
    with suppress(HfHubHTTPError):  # it answers; what it says is for timm to read
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, files[0], revision=revision or None), timeout=PATIENCE)


def instead(place: str) -> str:
    return f" Without a network give weights of your own: {place}.weights=FILE."
