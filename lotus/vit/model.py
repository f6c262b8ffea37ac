"""How a ViT is made, and how to make it again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lotus import config
from lotus.vit import anatomy, starts, zoo
from lotus.vit.likeness import facts, skeleton
from lotus.vit.parts import gone, places, strip_like, sublayers
from lotus.vit.preprocessing import preprocessing
from lotus.vit.unmade import without_memory
from lotus.vit.weights import difference, hub_config, load, state_of
from selection import memory
from selection.errors import Refused, reason
from selection.methods import call, find


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
    model, about = of_hub(model, place)
    args = {**model.args, "num_classes": classes}
    published = model.pretrained and not model.weights  # weights of one's own win
    vit = build(model.name, args, pretrained=published, place=place)
    if vit.global_pool == "":
        raise Refused(
            f"{place}.args.global_pool: '' leaves the tokens unpooled, which classifies nothing. Take token or avg."
        )
    if not published:
        _start(vit, model, place)
    if model.weights:
        load(vit, Path(model.weights), place=place, args=model.args)
        remember_images(vit, about)
    return vit


def of_hub(model: config.Model, place: str) -> tuple[config.Model, dict[str, Any]]:
    """``model`` with the name and arguments that a folder laid out as the hub does says its weights are of, over which a side and
    patches of one's own stand; and the ``pretrained_cfg`` that lies there, with ``label_names``. Any other is as it was."""
    hub = hub_config(Path(model.weights), f"{place}.weights") if model.weights else {}
    if not hub:
        return model, {}
    args, own = hub.get("model_args"), hub.get("pretrained_cfg")
    mine = {key: value for key, value in model.args.items() if key in ("img_size", "patch_size")}
    made = {**(args if isinstance(args, dict) else {}), **mine}
    made.pop("num_classes", None)
    told_images = dict(own) if isinstance(own, dict) else {}
    if isinstance(hub.get("label_names"), list):
        told_images["label_names"] = hub["label_names"]
    if "img_size" not in made and told_images.get("input_size"):
        mine_size = told_images["input_size"]
        made["img_size"] = mine_size[-1] if isinstance(mine_size, list) else mine_size
    return model.model_copy(update={"name": hub["architecture"], "args": made}), told_images


def remember_images(model: Any, told: Mapping[str, Any]) -> None:
    """Let ``pretrained_cfg`` say how the images of the weights were made, and what their classes are called."""
    known = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
    cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **{name: told[name] for name in known if name in told}}
    model.pretrained_cfg = model.default_cfg = cfg


def proxy(model: config.Model, classes: int, *, place: str = "model") -> nn.Module:
    """Any timm model, to serve as a proxy and never to be cut; what :func:`create` makes where it is one that LOTUS supports.

    Raises:
        Refused: as :func:`create`, but for the architecture; one that gives no features before its classifier.
    """
    arch = zoo.architecture(model.name, place, any_kind=True)
    return _any(model, classes, place) if zoo.other_kind(arch) else create(model, classes, place=place)


def _any(model: config.Model, classes: int, place: str) -> nn.Module:
    import timm

    if model.pos_embed_std is not None or model.patch_embed_init != "timm" or model.start.name != "timm":
        raise Refused(
            f"{place}: start, pos_embed_std and patch_embed_init are of plain ViTs, not of {model.name}. Remove them."
        )

    published = model.pretrained and not model.weights

    def failed(error: Exception) -> Refused:
        what, cure = ("get the published weights of", zoo.instead(place)) if published else ("make", "")
        return Refused(f"{place}: timm cannot {what} {model.name!r} with {model.args} ({reason(error)}).{cure}")

    zoo.check_sizes(model.args, place)
    try:
        allowed = set(inspect.signature(zoo.class_of(model.name).__init__).parameters)
    except Exception as error:
        raise failed(error) from None
    zoo.check_args(model.args, allowed - {*zoo.CALLABLES, "num_classes", "kwargs"}, model.name, place)
    try:
        if published:
            zoo.ask_the_hub(model.name)
        made = timm.create_model(model.name, pretrained=published, num_classes=classes, **model.args)
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
        load(
            made, Path(model.weights), place=place, args=model.args, heads=(names,) if isinstance(names, str) else names
        )
    return made


def adopt(
    name: str, args: Mapping[str, Any], weights: str, *, place: str = "model"
) -> tuple[nn.Module, dict[str, Any]]:
    """A model that was trained elsewhere, and what is known of the images that it wants: ``mean`` and ``std``, for pixels in 0 to 1.

    Args:
        name: of timm
        args: of timm's constructor
        weights: A .safetensors, a state dict that torch saved, or a folder that LOTUS wrote; empty: timm's published ones.
            The number of classes is read off them; without a classifier they are a backbone's.
        place: where the model is named, for a refusal

    Raises:
        Refused: as :func:`build`; weights that cannot be read or do not fit.
    """
    if not weights:
        model = build(name, args, pretrained=True, place=place)
    else:
        asked, about = of_hub(config.Model(name=name, args=dict(args), weights=weights), place)
        name, args, state = asked.name, dict(asked.args), state_of(Path(weights), f"{place}.weights")
        for head in ("head.weight", "head.fc.weight"):
            if head in state and "num_classes" not in args:
                args = {**args, "num_classes": len(state[head])}
        if "num_classes" not in args and not any(tensor.startswith(("head", "fc", "classifier")) for tensor in state):
            args["num_classes"] = 0  # a head that was never trained would tell nothing
        model = build(name, args, place=place)
        load(model, Path(weights), place=place, args=args)
        remember_images(model, about)
    return model.eval(), preprocessing(model).about()


def build(
    name: str, args: Mapping[str, Any], *, pretrained: bool = False, meta: bool = False, place: str = "model"
) -> nn.Module:
    """A plain timm ViT by name and arguments; on the meta device (shapes without memory) with ``meta``.

    Raises:
        Refused: as :func:`create`; ``place`` is the part of the config, or the file, that the message names.
    """
    import timm

    arch = zoo.architecture(name, place)
    zoo.check_sizes(args, place)
    zoo.check_args(args, zoo.arguments(timm.model_entrypoint(arch).__module__), "timm's ViT", place)
    args = {key: value for key, value in args.items() if value is not None}
    try:
        with without_memory():
            skeleton = timm.create_model(name, **args)
    except Exception as error:
        # Does the bare name stand for a ViT at all? Otherwise the arguments are not what is wrong.
        zoo.refuse_other_kinds(arch, place, None)
        raise Refused(f"{place}: timm cannot make {name!r} with {dict(args)} ({reason(error)}).") from None
    zoo.refuse_other_kinds(arch, place, skeleton)
    if meta:
        made = skeleton
    else:
        numbers = sum(tensor.numel() for tensor in skeleton.state_dict().values())
        memory.there(memory.size(4 * numbers), f"{place}: {name!r} with {dict(args)}", "Take a smaller model.")
        try:
            if pretrained:
                zoo.ask_the_hub(name)
            made = timm.create_model(name, pretrained=pretrained, **args)
        except Exception as error:
            what = "get the published weights of" if pretrained else "make"
            raise Refused(
                f"{place}: timm cannot {what} {name!r} ({reason(error)}).{zoo.instead(place) if pretrained else ''}"
            ) from None
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
    anatomy.supported(model, convolved=True)
    remembered: Any = getattr(model, "lotus_origin", None)
    if remembered is None:
        remembered = _introspected(model)
    again: Any = build(remembered["name"], remembered["args"], meta=True)
    if anatomy.is_vit(model) and len(again.blocks) == len(places(model)) + len(gone(model)):
        strip_like(again, model)
    blocks = anatomy.blocks(model, convolved=True)
    besides = tuple(f"{block.name}.attn." for block in blocks if block.kernel)  # nothing there is timm's
    fault = difference(skeleton(again, besides), skeleton(model, besides))
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


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth in place, rising linearly from 0 to ``rate`` at the last block, as timm's ``drop_path_rate``."""
    from timm.layers import DropPath

    blocks = anatomy.blocks(model, convolved=True)
    for i, block in enumerate(blocks):
        here = rate * i / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            setattr(block.module, name, DropPath(here) if here > 0 else nn.Identity())


def _start(vit: Any, model: config.Model, place: str) -> None:
    if model.pos_embed_std is not None:
        if getattr(vit, "pos_embed", None) is None:
            raise Refused(f"{place}.pos_embed_std: {model.name!r} has no position embeddings. Remove it.")
        std = model.pos_embed_std
        nn.init.trunc_normal_(vit.pos_embed, std=std, a=-3 * std, b=3 * std)
    if model.patch_embed_init == "xavier":
        starts.xavier(vit)
    begin = find(starts, model.start.name, place=f"{place}.start")
    call(begin, {"model": vit}, model.start.options, place=f"{place}.start")


@functools.cache
def _by_default(name: str) -> dict[str, Any]:
    """What :func:`facts` reads off timm's ``name`` as it comes; not to be changed."""
    return facts(build(name, {}, meta=True))


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
    blocks = anatomy.blocks(model, convolved=True)
    if gone(model) or not all(all(sublayers(block.module)) and not block.kernel for block in blocks):
        raise Refused(
            f"{type(model).__name__}: lost whole sublayers, or convolves, and does not say what it was made as. Cut it by "
            "lotus.prune."
        )
    default, known = _by_default(name), zoo.arguments(anatomy.FAMILIES[anatomy.family(model)][0])
    args = {key: value for key, value in facts(model).items() if key in known and default.get(key) != value}
    return {"name": name, "args": args}
