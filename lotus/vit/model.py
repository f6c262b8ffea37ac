"""The only door to timm's models: how a ViT is made, and how to make it again."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lotus import config
from lotus.vit import anatomy
from lotus.vit.parts import Select, branches, gone, places, strip_like
from selection.errors import Refused
from selection.methods import nearest

# What an argument may be: data, never something that timm would import, open or call.
_CALLABLES = {"embed_layer", "block_fn", "mlp_layer", "attn_layer", "device", "dtype", "self"}
# A cut changes the shapes of these, and of nothing else.
_CUT = re.compile(r"^blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))\.(weight|bias)$")
# A norm of which a part is read lies inside of a Select.
_SELECTED = re.compile(r"^(blocks\.\d+\.norm[12])\.norm")


def create(model: config.Model, classes: int, *, place: str = "model") -> nn.Module:
    """A timm ViT in training mode, with a classifier for ``classes``; ``lotus_origin`` tells how it was made.

    Random starts come from torch's global generator: seed it first. Published or loaded weights win over the
    ``pos_embed_std`` and ``patch_embed_init`` starts.

    Raises:
        Refused: an unknown name, an architecture that is no plain ViT, arguments that timm does not take, weights that do
            not fit or cannot be had.
    """
    if "num_classes" in model.args:
        raise Refused(f"{place}.args.num_classes: the data set says how many classes there are. Remove it.")
    vit = build(model.name, {**model.args, "num_classes": classes}, pretrained=model.pretrained, place=place)
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
    """Any timm model, to be probed and never cut; what :func:`create` makes where it is one that LOTUS supports.

    Raises:
        Refused: as :func:`create`, but for the architecture; one that gives no features before its classifier.
    """
    import timm

    arch = model.name.partition(".")[0]
    if ":" in model.name or not timm.is_model(arch):
        raise Refused(f"{place}.name: timm has no model {model.name!r}.{nearest(arch, timm.list_models())}")
    try:
        _refuse_other_kinds(arch, place)
    except Refused:
        return _any(model, classes, place)
    return create(model, classes, place=place)


def _kind(name: str) -> type[nn.Module]:
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

    if model.pos_embed_std is not None or model.patch_embed_init != "timm":
        raise Refused(
            f"{place}: pos_embed_std and patch_embed_init are of plain ViTs, not of {model.name}. Remove them."
        )
    what = "get the published weights of" if model.pretrained else "make"
    try:
        allowed = set(inspect.signature(_kind(model.name).__init__).parameters) - _CALLABLES - {"num_classes", "kwargs"}
        for key, value in model.args.items():
            if key not in allowed:
                raise Refused(f"{place}.args.{key}: {model.name} takes no such argument.{nearest(key, allowed)}")
            if not _plain(value):
                raise Refused(f"{place}.args.{key}: must be a number, text, truth value or list, not {value!r}.")
        made = timm.create_model(model.name, pretrained=model.pretrained, num_classes=classes, **model.args)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{place}: timm cannot {what} {model.name!r} with {model.args} ({_reason(error)}).") from None
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


def build(
    name: str, args: Mapping[str, Any], *, pretrained: bool = False, meta: bool = False, place: str = "model"
) -> nn.Module:
    """A plain timm ViT by name and arguments; on the meta device (shapes without memory) with ``meta``.

    Raises:
        Refused: as :func:`create`; ``place`` is the part of the config, or the file, that the message names.
    """
    import timm

    arch = _known(name, place)
    allowed = _arguments()
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
        _refuse_other_kinds(arch, place)
        raise Refused(f"{place}: timm cannot make {name!r} with {dict(args)} ({_reason(error)}).") from None
    _refuse_other_kinds(arch, place, skeleton)
    if meta:
        made = skeleton
    else:
        try:
            made = timm.create_model(name, pretrained=pretrained, **args)
        except Exception as error:
            what = "get the published weights of" if pretrained else "make"
            raise Refused(f"{place}: timm cannot {what} {name!r} ({_reason(error)}).") from None
    if name != arch:  # the tag of published weights may have brought an image size of its own
        args = {**_introspected(made)["args"], **args}
    remember(made, {"name": arch, "args": args})
    return made


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
    anatomy.supported(model)
    remembered: Any = getattr(model, "lotus_origin", None)
    if remembered is None:
        remembered = _introspected(model)
    again: Any = build(remembered["name"], remembered["args"], meta=True)
    if len(again.blocks) == len(places(model)) + len(gone(model)):
        strip_like(again, model)
    fault = _difference(_skeleton(again), _skeleton(model))
    if fault:
        raise Refused(
            f"{type(model).__name__}: {remembered['name']} with {remembered['args']} would come out otherwise: {fault}. "
            "Make it by timm.create_model or lotus, unchanged but for its weights."
        )
    return {"name": remembered["name"], "args": dict(remembered["args"])}


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


@contextmanager
def without_memory() -> Iterator[None]:
    """Models made here have shapes but no memory (meta device)."""
    with torch.device("meta"), _Numbers():
        yield


class _Numbers(TorchFunctionMode):
    """Older timm (1.0.20) reads the rates of stochastic depth back from a tensor, which must then have values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth in place, rising linearly from 0 to ``rate`` at the last block, as timm's ``drop_path_rate``."""
    from timm.layers import DropPath

    found = anatomy.blocks(model)
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

    known = [name for kind in ("vision_transformer", "deit") for name in timm.list_models(module=kind)]
    # Where some begin alike the last one stays: the shortest.
    begins = {name[: len(arch)]: name for name in sorted(known, key=lambda name: (len(name), name), reverse=True)}
    close = difflib.get_close_matches(arch, begins, n=1, cutoff=0.6)
    return f" Did you mean {begins[close[0]]!r}?" if close else " LOTUS takes timm's vit_* and deit*."


@functools.cache
def _arguments() -> dict[str, Any]:
    """Argument -> default, of timm's VisionTransformer."""
    from timm.models.vision_transformer import VisionTransformer

    parameters = inspect.signature(VisionTransformer.__init__).parameters
    return {key: value.default for key, value in parameters.items() if key not in _CALLABLES}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _refuse_other_kinds(arch: str, place: str, made: nn.Module | None = None) -> None:
    import timm

    if made is None:
        try:
            with without_memory():
                made = timm.create_model(arch)
        except Exception:  # some other architectures cannot be made without memory
            entry = timm.model_entrypoint(arch).__module__
            if entry in ("timm.models.vision_transformer", "timm.models.deit"):
                return
            raise Refused(
                f"{place}.name: {arch!r} is of {entry}, no plain ViT. Supported: {anatomy.SUPPORTED}."
            ) from None
    try:
        anatomy.supported(made)
    except Refused as refusal:
        raise Refused(f"{place}.name: {arch!r} is not supported. {refusal}") from None


def _reason(error: Exception) -> str:
    """One line of what timm said."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _start(vit: Any, model: config.Model) -> None:
    if model.pos_embed_std is not None:
        if vit.pos_embed is None:
            raise Refused(f"model.pos_embed_std: {model.name!r} has no position embeddings. Remove it.")
        std = model.pos_embed_std
        nn.init.trunc_normal_(vit.pos_embed, std=std, a=-3 * std, b=3 * std)
    if model.patch_embed_init == "xavier":
        # As if it were a Linear over flattened patches, as in MAE (2111.06377) and big_vision.
        embed = vit.patch_embed.proj
        nn.init.xavier_uniform_(embed.weight.view(embed.weight.shape[0], -1))
        if embed.bias is not None:
            nn.init.zeros_(embed.bias)


def _load(vit: nn.Module, path: Path, *, place: str = "model", heads: Sequence[str] = ("head", "head_dist")) -> None:
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
    fault = _difference(_shapes(own), _shapes(weights))
    if fault:
        cure = " It was cut: load it by lotus.load." if (path / "spec.json").is_file() and _is_cut(path) else ""
        raise Refused(f"{place}.weights: {file} does not fit this model: {fault}.{cure}")
    vit.load_state_dict(weights)


def _is_cut(folder: Path) -> bool:
    try:
        spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
        return bool(spec["cost"] != spec["dense_cost"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _skeleton(model: Any) -> dict[str, Any]:
    """What must be the same in a model made again: shapes that no cut changes, and the kinds of modules."""
    own = {_SELECTED.sub(r"\1", name): shape for name, shape in _shapes(model.state_dict()).items()}
    shapes = {name: "cut" if _CUT.match(name) else shape for name, shape in own.items()}
    kinds = {"model": type(model).__name__, "depth": len(model.blocks)}
    for name, module in model.named_modules():
        # Of what has no weights, the activations and the norms' eps would change the function unseen.
        if isinstance(module, Select):
            continue
        if (name.endswith(".act") or "norm" in name.rpartition(".")[2]) and not isinstance(module, nn.Identity):
            kinds[_SELECTED.sub(r"\1", name)] = f"{type(module).__name__}({module.extra_repr()})"
    kinds["pool"] = str(model.global_pool)
    return {**shapes, **kinds}


def _difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first differences in words; empty where there are none."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} does not belong" for name in found if name not in expected]
    faults += [
        f"{name} is {found[name]}, not {want}"
        for name, want in expected.items()
        if name in found and found[name] != want
    ]
    more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more


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
    if gone(model) or not all(all(branches(block)) for block in model.blocks):  # type: ignore[union-attr, arg-type]
        raise Refused(
            f"{type(model).__name__}: lost whole branches and does not say what it was made as. Cut it by lotus.prune."
        )
    default = _facts(build(name, {}, meta=True))
    facts = _facts(model)
    return {"name": name, "args": {key: value for key, value in facts.items() if default.get(key) != value}}


def _facts(model: Any) -> dict[str, Any]:
    """The arguments that can be read off a ViT, as its constructor takes them."""
    embed, first = model.patch_embed, model.blocks[0]
    width, dims = embed.proj.out_channels, anatomy.Block("blocks.0", first).dims

    def is_there(module: nn.Module | None) -> bool:
        return module is not None and not isinstance(module, nn.Identity)

    def side(pair: tuple[int, int] | None) -> int | list[int] | None:
        return None if pair is None else pair[0] if pair[0] == pair[1] else list(pair)

    facts: dict[str, Any] = {
        "img_size": side(embed.img_size),
        "patch_size": side(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": width,
        "depth": len(model.blocks),
        "qkv_bias": first.attn.qkv.bias is not None,
        "proj_bias": first.attn.proj.bias is not None,
        "qk_norm": is_there(first.attn.q_norm),
        # timm turns None into the architecture's own; 0 is what leaves LayerScale out
        "init_values": 1e-5 if is_there(getattr(first, "ls1", None)) else 0,
        "class_token": model.cls_token is not None,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": bool(model.no_embed_class),
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "pre_norm": is_there(model.norm_pre),
        "fc_norm": is_there(model.fc_norm),
        "final_norm": is_there(model.norm) or is_there(model.fc_norm),
        "pool_include_prefix": bool(getattr(model, "pool_include_prefix", False)),
        "dynamic_img_size": bool(getattr(model, "dynamic_img_size", False)),
    }
    every = {anatomy.Block(f"blocks.{i}", block).dims for i, block in enumerate(model.blocks)}
    if len(every) == 1 and dims.qk_dim == dims.v_dim and dims.heads * dims.v_dim == width:
        facts["num_heads"] = dims.heads
        # timm takes int(width * ratio): half a unit more survives the rounding
        facts["mlp_ratio"] = dims.hidden / width if dims.hidden % width == 0 else (dims.hidden + 0.5) / width
    return {key: value for key, value in facts.items() if key in _arguments()}
