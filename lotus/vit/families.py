"""Families of timm differ in how a block stores its weights; here each is brought into one form, and back.

A block is *open* when ``attn.qkv`` is one Linear with all rows of q, k and v (and its bias), and ``mlp.fc1`` one with all rows of
the hidden units, both called as modules: so they can be watched, turned and cut alike. Plain ViTs and Swin lie open as they
are. EVA and BEiT keep the biases of q and v apart, EVA-02 the three projections and the two halves of SwiGLU; these get a
:class:`SplitAttention` and a :class:`PackedGlu`, which compute the same, and :func:`close` puts timm's own classes back
wherever they can hold the widths.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lotus.vit import anatomy
from lotus.vit.anatomy import Block, Dims
from lotus.vit.attention import PackedGlu, SplitAttention


def opened(model: nn.Module) -> nn.Module:
    """A model that computes what ``model`` does and whose blocks are all open: ``model`` itself, where they are.

    Else a copy that shares every weight but those of the parts that were rebuilt.
    """
    if all(block.is_open for block in anatomy.blocks(model)):
        return model
    made: nn.Module = _shell(model)
    for block in anatomy.blocks(made):
        if getattr(block.attn, "q_bias", None) is not None or len(block.projections) > 1:
            block.module.attn = _open_attention(block)
        if len(block.units) > 1:
            block.module.mlp = _open_mlp(block.mlp)
    return made


def close(model: nn.Module, like: nn.Module) -> nn.Module:
    """Give ``model``, in place, the classes that the blocks of ``like`` have, wherever they can hold the widths."""
    if all(block.is_open for block in anatomy.blocks(like)):  # so are those of a plain ViT, which may have lost some
        return model
    for block, before in zip(anatomy.blocks(model), anatomy.blocks(like), strict=True):
        if before.is_open:
            continue
        if (
            type(block.attn) is SplitAttention
            and type(before.attn) is not SplitAttention
            and _can_close(before, block.dims)
        ):
            block.module.attn = _close_attention(block, before)
        if type(block.mlp) is PackedGlu and len(before.units) > 1:
            block.module.mlp = _close_mlp(block.mlp, before.mlp)
    return model


def split(block: Block, dims: Dims) -> SplitAttention:
    """An attention of ours with the widths ``dims`` and all else as the block's, without memory (meta device)."""
    attn = block.attn
    weight = block.proj.weight
    table, norm = block.table, block.norm("attn")
    made = SplitAttention(
        block.width,
        dims.heads,
        dims.qk_dim,
        dims.v_dim,
        qkv_bias=block.biases[0],
        proj_bias=block.proj.bias is not None,
        attn_drop=attn.attn_drop.p,
        proj_drop=attn.proj_drop.p,
        fused=bool(attn.fused_attn),
        q_norm=getattr(attn, "q_norm", None),
        k_norm=getattr(attn, "k_norm", None),
        norm=None if norm is None else resized(norm, dims.heads * dims.v_dim),
        prefix=int(getattr(attn, "num_prefix_tokens", 0)),
        rotate_half=bool(getattr(attn, "rotate_half", False)),
        index=None if table is None else attn.relative_position_index,
        distances=0 if table is None else len(table),
        device="meta",
        dtype=weight.dtype,
    )
    return made.train(attn.training)


def resized(norm: nn.Module, width: int) -> nn.Module:
    """A norm like ``norm`` over ``width`` values, without memory or weights (meta device)."""
    made = copy.deepcopy(norm)
    vars(made)["normalized_shape"] = (width,)
    for name, old in norm.named_parameters(recurse=False):
        setattr(made, name, nn.Parameter(old.new_empty(width, device="meta"), requires_grad=old.requires_grad))
    return made


@functools.cache
def holds(attention: Any) -> bool:
    """Whether timm's attention class computes with heads that do not fill the width. Tried, since versions differ."""
    name = attention.__name__
    needs: dict[str, dict[str, Any]] = {
        "EvaAttention": {"scale_norm": False},
        "WindowAttention": {"window_size": (1, 2)},
    }
    attn = attention(4, num_heads=2, qkv_bias=name == "WindowAttention", **needs.get(name, {}))
    attn.qkv, attn.proj = nn.Linear(4, 3), nn.Linear(1, 4)
    if name == "WindowAttention":
        attn.relative_position_bias_table = nn.Parameter(attn.relative_position_bias_table[:, :1])
    set_heads(attn, Dims(1, 1, 1, 0))
    try:
        return bool(attn(torch.zeros(1, 2, 4)).shape == (1, 2, 4))
    except (RuntimeError, AttributeError, TypeError):
        return False


def set_heads(attn: Any, dims: Dims) -> None:
    """Tell an attention how many heads it has, and how wide they are."""
    attn.num_heads = dims.heads
    attn.scale = dims.qk_dim**-0.5
    if type(attn) is SplitAttention:
        attn.qk_dim, attn.v_dim = dims.qk_dim, dims.v_dim
        return
    for name, value in (
        ("head_dim", dims.v_dim),
        ("attn_dim", dims.heads * dims.v_dim),
        ("num_kv_heads", dims.heads),
        ("kv_dim", dims.heads * dims.v_dim),
    ):
        if hasattr(attn, name):
            setattr(attn, name, value)


def _can_close(before: Block, dims: Dims) -> bool:
    if dims.qk_dim != dims.v_dim:
        return False
    # Keys without a bias are timm's alone (SplitAttention has one), so that they tell what a block's bias costs: see cost.py.
    return dims.heads * dims.v_dim == before.width or (
        before.biases[0] == before.biases[1] and holds(before.attn.__class__)
    )


def _open_attention(block: Block) -> SplitAttention:
    attn: Any = block.attn
    made = split(block, block.dims)
    weight = attn.qkv.weight if attn.qkv is not None else _cat([part.weight for part in block.projections])
    made.qkv.weight = _parameter(weight, block.projections[0].weight)
    if block.biases[0]:
        parts: Sequence[Tensor | None] = (
            (attn.q_bias, None, attn.v_bias) if attn.qkv is not None else [part.bias for part in block.projections]
        )
        rows = block.dims.heads * block.dims.qk_dim
        made.qkv.bias = _parameter(_cat([weight.new_zeros(rows) if part is None else part for part in parts]), parts[0])
    made.proj = attn.proj
    if block.norm("attn") is not None:
        made.norm = attn.norm
    if block.table is not None:
        made.relative_position_bias_table = attn.relative_position_bias_table
    return made


def _close_attention(block: Block, before: Block) -> Any:
    ours: Any = block.attn
    heads, qk_dim, v_dim, _ = block.dims[:4]
    made = _shell(before.attn)
    rows = (heads * qk_dim, heads * qk_dim, heads * v_dim)
    weights = ours.qkv.weight.detach().split(rows)
    biases: Any = (None,) * 3 if ours.qkv.bias is None else ours.qkv.bias.detach().split(rows)
    if made.qkv is not None:
        made.qkv = _linear(ours.qkv.weight, None, before.attn.qkv)
        if before.attn.q_bias is not None:
            made.q_bias, made.v_bias = (_parameter(biases[i].clone(), before.attn.q_bias) for i in (0, 2))
            made.register_buffer("k_bias", torch.zeros_like(biases[1]), persistent=False)
    else:
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            old = getattr(before.attn, name)
            told = None if old.bias is None or bias is None else bias.clone()
            setattr(made, name, _linear(weight.clone(), told, old))
    made.proj = ours.proj
    if block.norm("attn") is not None:
        made.norm = ours.norm
    if block.table is not None:
        made.relative_position_bias_table = ours.relative_position_bias_table
        made.register_buffer("relative_position_index", ours.relative_position_index, persistent=False)
    if hasattr(made, "q_norm"):
        made.q_norm, made.k_norm = ours.q_norm, ours.k_norm
    set_heads(made, block.dims)
    return made.train(ours.training)


def _open_mlp(mlp: Any) -> PackedGlu:
    fc1 = _linear(
        _cat([mlp.fc1_g.weight, mlp.fc1_x.weight]),
        None if mlp.fc1_g.bias is None else _cat([mlp.fc1_g.bias, mlp.fc1_x.bias]),
        mlp.fc1_g,
    )
    return PackedGlu(fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2).train(mlp.training)


def _close_mlp(mlp: PackedGlu, before: Any) -> Any:
    made = _shell(before)
    weights = mlp.fc1.weight.detach().chunk(2)
    biases = (None, None) if mlp.fc1.bias is None else mlp.fc1.bias.detach().chunk(2)
    for name, weight, bias in zip(("fc1_g", "fc1_x"), weights, biases, strict=True):
        setattr(made, name, _linear(weight.clone(), None if bias is None else bias.clone(), getattr(before, name)))
    made.norm, made.fc2 = mlp.norm, mlp.fc2
    return made.train(mlp.training)


def _shell(module: nn.Module) -> Any:
    """A copy of ``module`` whose weights are those of ``module`` still: to be replaced."""
    shared: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """A Linear with these weights, trainable where those of ``like`` are."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    made.weight = _parameter(weight, like.weight)
    if bias is not None:
        made.bias = _parameter(bias, like.weight if like.bias is None else like.bias)
    return made.train(like.training)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach() for part in parts])


def _parameter(tensor: Tensor, like: Tensor | None) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=like is None or like.requires_grad)
