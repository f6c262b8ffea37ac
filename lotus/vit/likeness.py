"""What a model was made as, read off its parts: to make it again, and to see whether that comes out the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lotus.vit import anatomy
from lotus.vit.parts import Select
from lotus.vit.weights import shapes, side_of

# What lies in here is compared by what it computes: a cut changes its shapes, an attention of ours its names.
_CUT = re.compile(r"(^|\.)blocks\.\d+\.(attn|mlp)\.")

# A norm of which a part is read lies inside of a Select.
_SELECTED = re.compile(r"^(blocks\.\d+\.norm[12])\.norm")


def widths(model: nn.Module) -> dict[str, Any]:
    """Heads and MLP units as timm's constructor takes them, ``num_heads`` and ``mlp_ratio``; nothing where it cannot say them.

    Whether the constructor then gives these very widths, heads that do not fill the width among them, is for the caller to try.
    """
    blocks = anatomy.blocks(model)
    # A plain ViT's packed SwiGLU halves what the ratio gives.
    halves = 2 if anatomy.is_vit(model) and anatomy.is_timm(blocks[0].mlp, "GluMlp") else 1
    ratios = {_ratio(halves * block.hidden, block.width) for block in blocks}
    equal = all(block.dims.qk_dim == block.dims.v_dim for block in blocks)
    whole = all(block.has_attn and block.has_mlp for block in blocks)
    if not (equal and whole) or len(ratios) != 1:
        return {}
    heads = _num_heads(model, blocks)
    return {} if heads is None else {"mlp_ratio": ratios.pop(), "num_heads": heads}


def _num_heads(model: nn.Module, found: Sequence[anatomy.Block]) -> int | list[int] | None:
    """Of all blocks, or of each of Swin's stages; None where they differ."""
    stages: Any = getattr(model, "layers", None)
    if stages is None:
        return found[0].heads if len({block.dims for block in found}) == 1 else None
    heads = [{block.attn.num_heads for block in stage.blocks} for stage in stages]
    return [one.pop() for one in heads] if all(len(one) == 1 for one in heads) else None


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio from which timm's int(width * ratio) makes ``hidden``."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def is_data(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(is_data(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def skeleton(model: Any, besides: tuple[str, ...] = ()) -> dict[str, Any]:
    """What must be the same in a model made again: shapes that no cut changes, and the kinds of modules.

    Args:
        model: a plain ViT, cut or not
        besides: beginnings of names that are left out
    """
    own = {_SELECTED.sub(r"\1", name): shape for name, shape in shapes(model.state_dict()).items()}
    uncut = {name: shape for name, shape in own.items() if not _CUT.search(name) and not name.startswith(besides)}
    blocks = anatomy.blocks(model, convolved=True)
    kinds: dict[str, Any] = {"model": type(model).__name__, "depth": len(blocks)}
    for name, module in model.named_modules():
        if not name.startswith(besides) and _is_told(name, module):
            kinds[_SELECTED.sub(r"\1", name)] = _kind(module)
    for block in blocks:
        if block.has_attn and f"{block.name}.attn." not in besides:
            kinds[f"{block.name}.attn"] = _attention(block)
        if block.has_mlp:
            kinds[f"{block.name}.mlp"] = _mlp(block)
    kinds |= _rope(model)
    kinds["pool"], kinds["attn_pool"] = str(model.global_pool), pool_heads(model)
    return {**uncut, **kinds}


def _rope(model: Any) -> dict[str, Any]:
    """Of rotary positions, whose angles follow from numbers that no weight shows."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return {}
    return {"rope": {name: value for name, value in vars(rope).items() if is_data(value) and name != "training"}}


def _is_told(name: str, module: nn.Module) -> bool:
    """Of what has no weights, the activations and the norms' eps would change the function unseen."""
    told = name.endswith(".act") or "norm" in name.rpartition(".")[2]
    return told and not _CUT.search(f"{name}.") and not isinstance(module, (nn.Identity, Select))


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


def facts(model: Any) -> dict[str, Any]:
    """The arguments that can be read off a model, as the constructors of its family take them."""
    blocks = anatomy.blocks(model)
    embed, first, kind = model.patch_embed, blocks[0], anatomy.family(model)
    args: dict[str, Any] = {
        "img_size": side_of(embed.img_size),
        "patch_size": side_of(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": embed.proj.out_channels,
        "depth": len(blocks),
        "qkv_bias": first.biases[0],
        "proj_bias": first.proj.bias is not None,
        "qk_norm": _is_there(getattr(first.attn, "q_norm", None)),
        # timm turns None into the architecture's own; 0 is what leaves LayerScale out of a plain ViT
        "init_values": 1e-5 if first.gamma("attn") is not None else 0 if kind == "VisionTransformer" else None,
        "class_token": getattr(model, "cls_token", None) is not None,
        "no_embed_class": bool(getattr(model, "no_embed_class", False)),
        "dynamic_img_size": bool(getattr(model, "dynamic_img_size", False)),
        **_OF_FAMILY[kind](model, first),
        **widths(model),
    }
    if kind == "SwinTransformer":
        del args["depth"]  # it has depths
    return args


def _of_plain(model: Any, first: anatomy.Block) -> dict[str, Any]:
    return {
        "scale_attn_norm": first.norm("attn") is not None,
        "scale_mlp_norm": first.norm("mlp") is not None,
        "reg_tokens": _registers(model),
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "pre_norm": _is_there(model.norm_pre),
        "fc_norm": _is_there(model.fc_norm),
        "final_norm": _is_there(model.norm) or _is_there(model.fc_norm),
        "pool_include_prefix": bool(getattr(model, "pool_include_prefix", False)),
    }


def _of_eva(model: Any, first: anatomy.Block) -> dict[str, Any]:
    return {
        **_of_eva_and_beit(model, first),
        "scale_attn_inner": first.norm("attn") is not None,
        "qkv_fused": getattr(first.attn, "qkv", None) is not None,
        "num_reg_tokens": _registers(model),
        "use_rot_pos_emb": model.rope is not None,
        "use_pre_transformer_norm": _is_there(model.norm_pre),
        "use_post_transformer_norm": _is_there(model.norm),
        "attn_pool_num_heads": pool_heads(model) or None,
    }


def _of_beit(model: Any, first: anatomy.Block) -> dict[str, Any]:
    return {**_of_eva_and_beit(model, first), "use_rel_pos_bias": first.table is not None}


def _of_eva_and_beit(model: Any, first: anatomy.Block) -> dict[str, Any]:
    return {
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_fc_norm": _is_there(model.fc_norm),
        "swiglu_mlp": first.glu,
        "scale_mlp": first.norm("mlp") is not None,
    }


def _of_swin(model: Any, first: anatomy.Block) -> dict[str, Any]:
    stages = list(model.layers)
    return {
        "depths": [len(stage.blocks) for stage in stages],
        "window_size": [side_of(stage.blocks[0].window_size) for stage in stages],
    }


_OF_FAMILY = {"VisionTransformer": _of_plain, "Eva": _of_eva, "Beit": _of_beit, "SwinTransformer": _of_swin}


def _registers(model: Any) -> int:
    token = getattr(model, "reg_token", None)
    return 0 if token is None else int(token.shape[1])


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)
