"""The only door to timm's models: how a ViT is made, and how to make it again."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lotus import config
from lotus.vit import anatomy, starts
from lotus.vit.parts import Select, gone, places, strip_like, sublayers
from selection import memory
from selection.errors import Refused
from selection.methods import call, find, nearest

# What an argument may be: data, never something that timm would import, open or call.
_CALLABLES = {"embed_layer", "block_fn", "mlp_layer", "attn_layer", "device", "dtype", "self"}
# What lies in here is compared by what it computes: a cut changes its shapes, an attention of ours its names.
_CUT = re.compile(r"(^|\.)blocks\.\d+\.(attn|mlp)\.")
# A norm of which a part is read lies inside of a Select.
_SELECTED = re.compile(r"^(blocks\.\d+\.norm[12])\.norm")
_HEADS = ("head", "head_dist", "head.fc")
_DEEPEST, _WIDEST = 1000, 1 << 20  # blocks; units of a layer or pixels of a side: no model has as many
PATIENCE = 5.0
"""Seconds that the Hugging Face hub has for its first answer."""
# timm's constructors, by the module that a name is registered in.
_CLASSES = {module: kind for kind, (module, _) in anatomy.FAMILIES.items()}


def create(model: config.Model, classes: int, *, place: str = "model") -> nn.Module:
    """A timm ViT in training mode, with a classifier for ``classes``; ``lotus_origin`` tells how it was made.

    Random starts come from torch's global generator: seed it first. Published or loaded weights win over the
    ``pos_embed_std``, ``patch_embed_init`` and ``start`` starts.

    Raises:
        Refused: an unknown name, an architecture that is no plain ViT, arguments that timm does not take, weights that do
            not fit or cannot be had.
    """
    if "num_classes" in model.args:
        raise Refused(f"{place}.args.num_classes: the data set says how many classes there are. Remove it.")
    args = {**model.args, "num_classes": classes}
    vit = build(model.name, args, pretrained=model.pretrained, place=place, instead=_instead(place))
    if vit.global_pool == "":
        raise Refused(
            f"{place}.args.global_pool: '' leaves the tokens unpooled, which classifies nothing. Take token or avg."
        )
    if not model.pretrained:
        _start(vit, model)
    if model.weights:
        _load(vit, Path(model.weights), place=place)
    return vit


def proxy(model: config.Model, classes: int, *, place: str = "model") -> nn.Module:
    """Any timm model, to serve as a proxy and never to be cut; what :func:`create` makes where it is one that LOTUS supports.

    Raises:
        Refused: as :func:`create`, but for the architecture; one that gives no features before its classifier.
    """
    import timm

    arch = model.name.partition(".")[0]
    if ":" in model.name or not timm.is_model(arch):
        raise Refused(f"{place}.name: timm has no model {model.name!r}.{nearest(arch, timm.list_models())}")
    return _any(model, classes, place) if _other_kind(arch) else create(model, classes, place=place)


def _class_of(name: str) -> type[nn.Module]:
    """The class that timm makes of a name."""
    import timm

    arch = name.partition(".")[0]
    try:
        with without_memory():
            return type(timm.create_model(arch))
    except Exception:  # some cannot be made without memory
        return type(timm.create_model(arch))


def _any(model: config.Model, classes: int, place: str) -> nn.Module:
    import timm

    if model.pos_embed_std is not None or model.patch_embed_init != "timm" or model.start.name != "timm":
        raise Refused(
            f"{place}: start, pos_embed_std and patch_embed_init are of plain ViTs, not of {model.name}. Remove them."
        )

    def failed(error: Exception) -> Refused:
        what, cure = ("get the published weights of", _instead(place)) if model.pretrained else ("make", "")
        return Refused(f"{place}: timm cannot {what} {model.name!r} with {model.args} ({_reason(error)}).{cure}")

    _check_sizes(model.args, place)
    try:
        allowed = set(inspect.signature(_class_of(model.name).__init__).parameters)
    except Exception as error:
        raise failed(error) from None
    allowed -= {*_CALLABLES, "num_classes", "kwargs"}
    for key, value in model.args.items():
        if key not in allowed:
            raise Refused(f"{place}.args.{key}: {model.name} takes no such argument.{nearest(key, allowed)}")
        if not _plain(value):
            raise Refused(f"{place}.args.{key}: must be a number, text, truth value or list, not {value!r}.")
    try:
        if model.pretrained:
            _ask_the_hub(model.name)
        made = timm.create_model(model.name, pretrained=model.pretrained, num_classes=classes, **model.args)
    except Exception as error:
        raise failed(error) from None
    head = getattr(made, "forward_head", None)
    if head is None or "pre_logits" not in inspect.signature(head).parameters:
        raise Refused(
            f"{place}.name: {model.name!r} gives no features before its classifier. Take another, e.g. resnet18."
        )
    if model.weights:
        about: Any = made
        names = about.default_cfg.get("classifier") or ()
        _load(made, Path(model.weights), place=place, heads=(names,) if isinstance(names, str) else names)
    return made


def adopt(
    name: str, args: Mapping[str, Any], weights: str, *, place: str = "model"
) -> tuple[nn.Module, dict[str, Any]]:
    """A model that was trained elsewhere, and what is known of the images that it wants: ``mean`` and ``std``, for pixels in 0 to 1.

    Args:
        weights: A .safetensors, a state dict that torch saved, or a folder that LOTUS wrote; empty: timm's published ones.
            The number of classes is read off them.

    Raises:
        Refused: as :func:`build`; weights that cannot be read or do not fit.
    """
    if not weights:
        instead = f" Without a network give weights of your own: {place}.weights=FILE."
        model = build(name, args, pretrained=True, place=place, instead=instead)
    else:
        path = Path(weights)
        state = _state(path, f"{place}.weights")
        for head in ("head.weight", "head.fc.weight"):
            if head in state and "num_classes" not in args:
                args = {**args, "num_classes": len(state[head])}
        model = build(name, args, place=place)
        own = model.state_dict()
        beside = {where for where, _ in model.named_buffers()} - own.keys()  # tables that older timm kept in the file
        state = {where: tensor for where, tensor in state.items() if where not in beside}
        fault = difference(shapes(own), shapes(state))
        if fault:
            cure = _other_images(model, state, f"{place}.args.") or _was_it_cut(path)
            raise Refused(f"{place}.weights: {weights} does not fit {name}: {fault}.{cure}")
        model.load_state_dict(state)
    made_as: Any = getattr(model, "pretrained_cfg", None) or {}
    about = {"mean": list(made_as.get("mean", (0.5,) * 3)), "std": list(made_as.get("std", (0.5,) * 3))}
    return model.eval(), about


def _state(path: Path, place: str) -> dict[str, Tensor]:
    """Weights by name, from a .safetensors, a state dict that torch saved, or a folder.

    Raises:
        Refused: no such file, or one that holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors" if path.is_dir() else path
    try:
        found: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except OSError as error:
        raise Refused(f"{place}: {file} cannot be read ({_reason(error)}).") from None
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        # torch's own words would advise to run what the file holds.
        why = "damaged, or more than tensors" if isinstance(error, pickle.UnpicklingError) else _reason(error)
        raise Refused(
            f"{place}: {file} no state dict of tensors alone ({why}). Save model.state_dict(), best as .safetensors."
        ) from None
    for key in ("model", "state_dict", "model_state_dict"):  # as training scripts save it
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise Refused(f"{place}: {file} holds no state dict. Save model.state_dict().")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def build(
    name: str,
    args: Mapping[str, Any],
    *,
    pretrained: bool = False,
    meta: bool = False,
    place: str = "model",
    instead: str = "",
) -> nn.Module:
    """A plain timm ViT by name and arguments; on the meta device (shapes without memory) with ``meta``.

    Args:
        instead: what to do where timm's published weights cannot be had, in a sentence

    Raises:
        Refused: as :func:`create`; ``place`` is the part of the config, or the file, that the message names.
    """
    import timm

    arch = _known(name, place)
    _check_sizes(args, place)
    allowed = _arguments(timm.model_entrypoint(arch).__module__)
    for key, value in args.items():
        if key not in allowed:
            raise Refused(f"{place}.args.{key}: timm's ViT takes no such argument.{nearest(key, allowed)}")
        if not _plain(value):
            raise Refused(f"{place}.args.{key}: must be a number, text, truth value or list, not {value!r}.")
    args = {key: value for key, value in args.items() if value is not None}
    try:
        with without_memory():
            skeleton = timm.create_model(name, **args)
    except Exception as error:
        # Does the bare name stand for a ViT at all? Otherwise the arguments are not what is wrong.
        _refuse_other_kinds(arch, place, None)
        raise Refused(f"{place}: timm cannot make {name!r} with {dict(args)} ({_reason(error)}).") from None
    _refuse_other_kinds(arch, place, skeleton)
    if meta:
        made = skeleton
    else:
        numbers = sum(tensor.numel() for tensor in skeleton.state_dict().values())
        memory.there(4 * numbers / memory.GB, f"{place}: {name!r} with {dict(args)}", "Take a smaller model.")
        try:
            if pretrained:
                _ask_the_hub(name)
            made = timm.create_model(name, pretrained=pretrained, **args)
        except Exception as error:
            what = "get the published weights of" if pretrained else "make"
            raise Refused(
                f"{place}: timm cannot {what} {name!r} ({_reason(error)}).{instead if pretrained else ''}"
            ) from None
    if name != arch:  # the tag of published weights may have brought an image size of its own
        args = {**_introspected(made)["args"], **args}
    remember(made, {"name": arch, "args": args})
    return made


def _check_sizes(args: Mapping[str, Any], place: str) -> None:
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


def _instead(place: str) -> str:
    return f" Without a network give weights of your own: {place}.pretrained=false {place}.weights=FILE."


def _ask_the_hub(name: str) -> None:
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


def remember(model: Any, made: Mapping[str, Any]) -> None:
    """Note on ``model`` how it was made: what :func:`origin` returned for the model that it came from."""
    model.lotus_origin = {"name": made["name"], "args": dict(made["args"])}


def origin(model: nn.Module) -> dict[str, Any]:
    """How to make ``model`` again, dense and without its weights: ``{"name": ..., "args": {...}}``.

    Remembered by :func:`create`, or, for a model that timm made elsewhere, read off its parts; verified in both cases by
    making it on the meta device and comparing classes of modules, names and shapes (apart from the widths that a cut changes).

    Raises:
        Refused: no supported ViT, or one that timm would not make so again.
    """
    anatomy.supported(model, convolved=True)
    remembered: Any = getattr(model, "lotus_origin", None)
    if remembered is None:
        remembered = _introspected(model)
    again: Any = build(remembered["name"], remembered["args"], meta=True)
    if anatomy.is_vit(model) and len(again.blocks) == len(places(model)) + len(gone(model)):
        strip_like(again, model)
    found = anatomy.blocks(model, convolved=True)
    besides = tuple(f"{block.name}.attn." for block in found if block.kernel)  # nothing there is timm's
    fault = difference(_skeleton(again, besides), _skeleton(model, besides))
    if fault:
        raise Refused(
            f"{type(model).__name__}: {remembered['name']} with {remembered['args']} would come out otherwise: {fault}. "
            "Make it by timm.create_model or lotus, unchanged but for its weights."
        )
    return {"name": remembered["name"], "args": dict(remembered["args"])}


def remade(model: nn.Module) -> dict[str, Any] | None:
    """As :func:`origin`; None where timm would not make ``model`` so again, which it then cannot be saved as."""
    try:
        return origin(model)
    except Refused:  # timm tells what it cannot make by failing to make it
        return None


def image_size(model: nn.Module) -> int:
    """Side of the square images that ``model`` reads, in pixels.

    Raises:
        Refused: it reads other than square images, or any size.
    """
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None or size[0] != size[1]:
        raise Refused(
            f"{type(model).__name__}: reads images of {size or 'any size'}, not square ones. Set model.args.img_size."
        )
    return int(size[0])


def side(model: nn.Module, other: int) -> int:
    """Side of the square images that ``model`` reads; ``other`` where it reads any."""
    return image_size(model) if getattr(getattr(model, "patch_embed", None), "img_size", None) is not None else other


def widths(model: nn.Module) -> dict[str, Any]:
    """Heads and MLP units as timm's constructor takes them, ``num_heads`` and ``mlp_ratio``; nothing where it cannot say them.

    Whether the constructor then gives these very widths, heads that do not fill the width among them, is for the caller to try.
    """
    found = anatomy.blocks(model)
    # A plain ViT's packed SwiGLU halves what the ratio gives.
    halves = 2 if anatomy.is_vit(model) and anatomy.is_timm(found[0].mlp, "GluMlp") else 1
    ratios = {_ratio(halves * block.hidden, block.width) for block in found}
    equal = all(block.dims.qk_dim == block.dims.v_dim for block in found)
    whole = all(block.has_attn and block.has_mlp for block in found)
    if not (equal and whole) or len(ratios) != 1:
        return {}
    told = {"mlp_ratio": ratios.pop()}
    stages: Any = getattr(model, "layers", None)
    if stages is not None:
        heads = [{block.attn.num_heads for block in stage.blocks} for stage in stages]
        return {**told, "num_heads": [one.pop() for one in heads]} if all(len(one) == 1 for one in heads) else {}
    return {**told, "num_heads": found[0].heads} if len({block.dims for block in found}) == 1 else {}


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio from which timm's int(width * ratio) makes ``hidden``."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


@contextmanager
def without_memory() -> Iterator[None]:
    """Models made here have shapes but no memory (meta device)."""
    with torch.device("meta"), _Numbers():
        yield


_FILLS = {
    getattr(Tensor, name)
    for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "div_", "clamp_", "zero_", "fill_")
}
"""What draws a model's start, in place."""


class _Numbers(TorchFunctionMode):
    """Older timm (1.0.20) reads the rates of stochastic depth back from a tensor, which must then have values. A start that
    nobody will see is not drawn: torch's bookkeeping of it would be most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args and args[0].is_meta:
            return args[0]
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth in place, rising linearly from 0 to ``rate`` at the last block, as timm's ``drop_path_rate``."""
    from timm.layers import DropPath

    found = anatomy.blocks(model, convolved=True)
    for i, block in enumerate(found):
        here = rate * i / max(1, len(found) - 1)
        for name in ("drop_path1", "drop_path2"):
            setattr(block.module, name, DropPath(here) if here > 0 else nn.Identity())


def _known(name: str, place: str) -> str:
    """The architecture of a timm name, which may carry a tag of published weights (``arch.tag``).

    Raises:
        Refused: timm has no such model; names the nearest.
    """
    import timm

    arch = name.partition(".")[0]
    # Only the registry: "hf-hub:" and "local-dir:" names would bring a config from elsewhere.
    if ":" in name or not timm.is_model(arch):
        raise Refused(f"{place}.name: timm has no model {name!r}.{_near(arch)}")
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


@functools.cache
def _arguments(module: str) -> dict[str, Any]:
    """Argument -> default, of the model that timm's ``module`` makes; of a plain ViT where the module is none of a family."""
    known = module if module in _CLASSES else "timm.models.vision_transformer"
    made = getattr(importlib.import_module(known), _CLASSES[known])
    parameters = inspect.signature(made.__init__).parameters
    return {key: value.default for key, value in parameters.items() if key not in _CALLABLES}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _refuse_other_kinds(arch: str, place: str, made: nn.Module | None) -> None:
    if fault := _other_kind(arch, made):
        raise Refused(f"{place}.name: {arch!r} {fault}")


def _other_kind(arch: str, made: nn.Module | None = None) -> str:
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


def _reason(error: Exception) -> str:
    """One line of what timm said."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _start(vit: Any, model: config.Model) -> None:
    if model.pos_embed_std is not None:
        if getattr(vit, "pos_embed", None) is None:
            raise Refused(f"model.pos_embed_std: {model.name!r} has no position embeddings. Remove it.")
        std = model.pos_embed_std
        nn.init.trunc_normal_(vit.pos_embed, std=std, a=-3 * std, b=3 * std)
    if model.patch_embed_init == "xavier":
        starts.xavier(vit)
    begin = find(starts, model.start.name, place="model.start")
    call(begin, {"model": vit}, model.start.options, place="model.start")


def _load(vit: nn.Module, path: Path, *, place: str = "model", heads: Sequence[str] = _HEADS) -> None:
    """Weights from a .safetensors file or from a folder that LOTUS wrote. A head for other classes starts anew.

    Raises:
        Refused: no such file, not safetensors, or weights of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise Refused(f"{place}.weights: {path} is no .safetensors file and no folder written by LOTUS.")
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{place}.weights: {file} cannot be read ({_reason(error)}).") from None
    own = vit.state_dict()
    for head in heads:
        here, there = own.get(f"{head}.weight"), weights.get(f"{head}.weight")
        if here is not None and there is not None and here.shape[1:] == there.shape[1:] and len(here) != len(there):
            warnings.warn(
                f"{place}.weights: {file} classifies {len(there)} classes, the data has {len(here)}: {head} starts anew.",
                stacklevel=3,
            )
            for part in (f"{head}.weight", f"{head}.bias"):
                if part in own:
                    weights[part] = own[part]
    fault = difference(shapes(own), shapes(weights))
    if fault:
        cure = _other_images(vit, weights, f"{place}.args.") or _was_it_cut(path)
        raise Refused(f"{place}.weights: {file} does not fit this model: {fault}.{cure}")
    vit.load_state_dict(weights)


def _other_images(model: nn.Module, weights: Mapping[str, Tensor], argument: str) -> str:
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
    other = [f"{argument}{name}={asks[name]}" for name in asks if _side(getattr(embed, name)) != asks[name]]
    if side * side != patches or not other:
        return ""
    return f" These weights are for images of {side * patch} pixels in patches of {patch}: say {' '.join(other)}."


def _was_it_cut(path: Path) -> str:
    return " Was it cut? Then load the folder by lotus.load." if path.is_dir() else ""


def shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _skeleton(model: Any, besides: tuple[str, ...] = ()) -> dict[str, Any]:
    """What must be the same in a model made again: shapes that no cut changes, and the kinds of modules.

    Args:
        besides: beginnings of names that are left out
    """
    own = {_SELECTED.sub(r"\1", name): shape for name, shape in shapes(model.state_dict()).items()}
    uncut = {name: shape for name, shape in own.items() if not _CUT.search(name) and not name.startswith(besides)}
    found = anatomy.blocks(model, convolved=True)
    kinds: dict[str, Any] = {"model": type(model).__name__, "depth": len(found)}
    for name, module in model.named_modules():
        if name.startswith(besides):
            continue
        # Of what has no weights, the activations and the norms' eps would change the function unseen.
        told = (name.endswith(".act") or "norm" in name.rpartition(".")[2]) and not _CUT.search(f"{name}.")
        if told and not isinstance(module, (nn.Identity, Select)):
            kinds[_SELECTED.sub(r"\1", name)] = _kind(module)
    for block in found:
        if block.has_attn and f"{block.name}.attn." not in besides:
            kinds[f"{block.name}.attn"] = _attention(block)
        if block.has_mlp:
            kinds[f"{block.name}.mlp"] = _mlp(block)
    rope = getattr(model, "rope", None)
    if rope is not None:  # its angles follow from numbers that no weight shows
        kinds["rope"] = {name: value for name, value in vars(rope).items() if _plain(value) and name != "training"}
    kinds["pool"], kinds["attn_pool"] = str(model.global_pool), pool_heads(model)
    return {**uncut, **kinds}


def pool_heads(model: Any) -> int:
    """Heads of attention pooling, which its weights do not show; 0 where there is none."""
    pool = getattr(model, "attn_pool", None)
    return 0 if pool is None else int(pool.num_heads)


def _attention(block: anatomy.Block) -> str:
    """What of an attention no cut changes; keys may have got a bias with an attention of ours."""
    attn, table = block.attn, block.table
    parts = [
        f"bias of qkv {block.biases[0]}, of proj {block.proj.bias is not None}",
        f"reads {_reads(block, 'attn', block.projections[0])}, writes {block.width}",
        *(_kind(norm) for norm in (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)) if norm is not None),
        _kind(block.norm("attn"), sized=False),
    ]
    parts += [] if table is None else [f"{len(table)} relative positions"]
    if block.rotary:
        parts.append(f"prefix {attn.num_prefix_tokens}, half {bool(getattr(attn, 'rotate_half', False))}")
    return ", ".join(part for part in parts if part)


def _mlp(block: anatomy.Block) -> str:
    """What of an MLP no cut changes."""
    fc1, gated = block.units[0], "gated, " if block.glu else ""
    last = "gate last, " if getattr(block.mlp, "gate_last", False) else ""
    act, norm = _kind(block.mlp.act), _kind(block.norm("mlp"), sized=False)
    biases = f"biases {fc1.bias is not None}, {block.fc2.bias is not None}"
    return f"{gated}{last}{act}, {norm}{biases}, reads {_reads(block, 'mlp', fc1)}, writes {block.fc2.out_features}"


def _reads(block: anatomy.Block, sublayer: str, linear: nn.Linear) -> int:
    """Channels of the stream that a sublayer read before some of them were cut."""
    return linear.in_features if block.reads(sublayer) is None else block.width


def _kind(module: nn.Module | None, *, sized: bool = True) -> str:
    """Class and settings of a module without weights, or of a norm; without the width where that may be cut."""
    if module is None or isinstance(module, nn.Identity):
        return ""
    told = module.extra_repr() if sized else f"eps={getattr(module, 'eps', None)}, "
    return f"{type(module).__name__}({told})"


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


def _introspected(model: nn.Module) -> dict[str, Any]:
    """Name and arguments of a model that timm made elsewhere.

    Raises:
        Refused: it does not tell its architecture.
    """
    made_as = getattr(model, "pretrained_cfg", None)
    name = made_as.get("architecture") if isinstance(made_as, Mapping) else getattr(made_as, "architecture", None)
    if not name:
        raise Refused(
            f"{type(model).__name__}: does not say which timm model it is (pretrained_cfg). Make it by timm.create_model."
        )
    found = anatomy.blocks(model, convolved=True)
    if gone(model) or not all(all(sublayers(block.module)) and not block.kernel for block in found):
        raise Refused(
            f"{type(model).__name__}: lost whole sublayers, or convolves, and does not say what it was made as. Cut it by "
            "lotus.prune."
        )
    default = _facts(build(name, {}, meta=True))
    facts = _facts(model)
    return {"name": name, "args": {key: value for key, value in facts.items() if default.get(key) != value}}


def _facts(model: Any) -> dict[str, Any]:
    """The arguments that can be read off a model, as its constructor takes them."""
    found = anatomy.blocks(model)
    embed, first, kind = model.patch_embed, found[0], anatomy.family(model)
    width, fused = embed.proj.out_channels, getattr(first.attn, "qkv", None) is not None
    reg_token = getattr(model, "reg_token", None)
    registers = 0 if reg_token is None else reg_token.shape[1]
    glu = first.glu
    facts: dict[str, Any] = {
        "img_size": _side(embed.img_size),
        "patch_size": _side(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": width,
        "depth": len(found),
        "qkv_bias": first.biases[0],
        "proj_bias": first.proj.bias is not None,
        "qk_norm": _is_there(getattr(first.attn, "q_norm", None)),
        # timm turns None into the architecture's own; 0 is what leaves LayerScale out of a plain ViT
        "init_values": 1e-5 if first.gamma("attn") is not None else 0 if kind == "VisionTransformer" else None,
        "class_token": getattr(model, "cls_token", None) is not None,
        "no_embed_class": bool(getattr(model, "no_embed_class", False)),
        "dynamic_img_size": bool(getattr(model, "dynamic_img_size", False)),
    }
    if kind == "VisionTransformer":
        facts |= {
            "scale_attn_norm": first.norm("attn") is not None,
            "scale_mlp_norm": first.norm("mlp") is not None,
            "reg_tokens": registers,
            "pos_embed": "none" if model.pos_embed is None else "learn",
            "pre_norm": _is_there(model.norm_pre),
            "fc_norm": _is_there(model.fc_norm),
            "final_norm": _is_there(model.norm) or _is_there(model.fc_norm),
            "pool_include_prefix": bool(getattr(model, "pool_include_prefix", False)),
        }
    if kind in ("Eva", "Beit"):
        facts |= {
            "use_abs_pos_emb": model.pos_embed is not None,
            "use_fc_norm": _is_there(model.fc_norm),
            "swiglu_mlp": glu,
            "scale_mlp": first.norm("mlp") is not None,
        }
    if kind == "Eva":
        facts |= {
            "scale_attn_inner": first.norm("attn") is not None,
            "qkv_fused": fused,
            "num_reg_tokens": registers,
            "use_rot_pos_emb": model.rope is not None,
            "use_pre_transformer_norm": _is_there(model.norm_pre),
            "use_post_transformer_norm": _is_there(model.norm),
            "attn_pool_num_heads": pool_heads(model) or None,
        }
    if kind == "Beit":
        facts["use_rel_pos_bias"] = first.table is not None
    if kind == "SwinTransformer":
        del facts["depth"]
        stages = list(model.layers)
        facts["depths"] = [len(stage.blocks) for stage in stages]
        facts["window_size"] = [_side(stage.blocks[0].window_size) for stage in stages]
    facts |= widths(model)
    default = _arguments(anatomy.FAMILIES[kind][0])
    return {key: value for key, value in facts.items() if key in default}


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _side(pair: tuple[int, int] | None) -> int | list[int] | None:
    return None if pair is None else pair[0] if pair[0] == pair[1] else list(pair)
