"""The one surgeon: executes a plan on a copy of a model.

What comes out are plain modules with smaller Linears: no masks, no hooks. The copy computes exactly what the model computes with
the cut units silenced.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, families, parts
from lotus.vit.anatomy import Block, Dims
from lotus.vit.attention import SplitAttention
from lotus.vit.convolution import ConvAttention
from lotus.vit.parts import Select


def cut(model: nn.Module, plan: Plan, *, power: int = 1) -> nn.Module:
    """A copy of ``model``, on its device and in its dtype, in which only what ``plan`` keeps is left.

    Query weights are multiplied by sqrt(kept / all query/key dimensions), since attention divides by the root of what is
    left: so the logits are those of the kept dimensions, unscaled. A sublayer that goes adds nothing any more.

    Args:
        power: of that factor. 1 for weights; where the parameters hold something else: -1 for gradients, -2 for their squares,
            0 for what is only selected

    Raises:
        Refused: the plan was not made for this model, or the model cannot be cut.
    """
    plan.check(model)
    dense = families.opened(model)
    small = copy.deepcopy(dense)
    olds = anatomy.blocks(dense)
    stays = [(bool(keep.heads), bool(keep.units)) for keep in plan.blocks]
    if any(stay != (block.has_attn, block.has_mlp) for stay, block in zip(stays, olds, strict=True)):
        anatomy.plain(model, "sublayers")
        parts.strip(small, stays)
    for block, (index, keep) in zip(anatomy.blocks(small), survivors(plan), strict=True):
        old = olds[index]
        weights = cut_weights(old, keep, power)
        reshape(block, keep.dims, {sublayer: _channels(old, keep, sublayer) for sublayer in ("attn", "mlp")})
        for name, linear in block.linears.items():
            weight, bias = weights[name]
            before = getattr(old, name)
            linear.weight = nn.Parameter(weight.contiguous(), requires_grad=before.weight.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias.clone(), requires_grad=before.bias.requires_grad)
        _cut_beside(block, old, keep)
    return families.close(small, model)


def survivors(plan: Plan) -> list[tuple[int, BlockPlan]]:
    """The blocks of which something stays, with their numbers before the cut."""
    return [(index, keep) for index, keep in enumerate(plan.blocks) if keep.heads or keep.units]


def _channels(block: Block, keep: BlockPlan, sublayer: str) -> tuple[int, ...] | None:
    """The channels of the residual stream that a sublayer reads after the cut; None: all."""
    kept, now = (keep.attn_in if sublayer == "attn" else keep.mlp_in), block.reads(sublayer)
    if kept is None or now is None:
        return now if kept is None else kept
    return tuple(now[i] for i in kept)


def reshape(block: Block, dims: Dims, reads: Mapping[str, Sequence[int] | None] | None = None) -> None:
    """Give ``block`` Linears of the widths ``dims``, in place, without memory or weights (meta device).

    The attention stays timm's own where its class can hold the widths, else it becomes a :class:`SplitAttention`. Sublayers
    are taken out by :func:`lotus.vit.parts.strip`, before.

    Args:
        reads: ``attn``, ``mlp`` -> the channels of the residual stream that the sublayer reads; None or absent: all
    """
    for sublayer, norm in (("attn", "norm1"), ("mlp", "norm2")):
        index = (reads or {}).get(sublayer)
        if index is not None:
            inside = getattr(block.module, norm)
            setattr(block.module, norm, Select(inside.norm if isinstance(inside, Select) else inside, index))
    width = block.width
    if block.has_attn:
        _reshape_attention(block, dims, width)
    if block.has_mlp:
        mlp: Any = block.mlp
        mlp.fc1 = _empty(mlp.fc1, dims.mlp_in or width, (1 + block.glu) * dims.hidden)
        mlp.fc2 = _empty(mlp.fc2, dims.hidden, width)
        if (norm_before := block.norm("mlp")) is not None:
            mlp.norm = families.resized(norm_before, dims.hidden)


def _reshape_attention(block: Block, dims: Dims, width: int) -> None:
    heads, qk_dim, v_dim, _, attn_in, _ = dims
    attn: Any = block.attn
    if qk_dim != v_dim or not (
        type(attn) is SplitAttention or heads * v_dim == width or families.holds(attn.__class__)
    ):
        made: Any = families.split(block, dims)
        if attn_in is not None:
            made.qkv = _empty(made.qkv, attn_in, made.qkv.out_features)
        block.module.attn = made
        return
    attn.qkv = _empty(attn.qkv, attn_in or width, heads * (2 * qk_dim + v_dim))
    attn.proj = _empty(attn.proj, heads * v_dim, width)
    if (norm := block.norm("attn")) is not None:
        attn.norm = families.resized(norm, heads * v_dim)
    if (table := block.table) is not None:
        attn.relative_position_bias_table = nn.Parameter(table.new_empty(len(table), heads, device="meta"))
    families.set_heads(attn, dims)


def convolve(block: Block, kernel: int, channels: int, model: nn.Module) -> ConvAttention:
    """Put a convolution in the place of a block's attention, without memory or weights (meta device)."""
    vit: Any = model
    attn: Any = block.attn
    grid = vit.patch_embed.grid_size
    new = ConvAttention(
        block.qkv.in_features,
        channels,
        kernel,
        grid,
        int(vit.num_prefix_tokens),
        bias=attn.qkv.bias is not None,
        proj_bias=attn.proj.bias is not None,
        device="meta",
        dtype=attn.qkv.weight.dtype,
    ).train(attn.training)
    block.module.attn = new
    return new


def cut_weights(block: Block, keep: BlockPlan, power: int = 1) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each Linear after the cut, by name; ``power`` as of :func:`cut`."""
    weights: dict[str, tuple[Tensor, Tensor | None]] = {}
    if keep.heads:
        weights |= _cut_attention(block, keep, power)
    if keep.units:
        units = list(keep.units)
        halves = [half * keep.of.hidden + unit for half in range(1 + block.glu) for unit in units]
        weights["fc1"] = (_columns(block.fc1.weight.detach()[halves], keep.mlp_in), _rows(block.fc1, halves))
        weights["fc2"] = (block.fc2.weight.detach()[:, units], _rows(block.fc2))
    return weights


def _cut_attention(block: Block, keep: BlockPlan, power: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    inner = keep.of.heads * keep.of.qk_dim
    queries, outputs = keep.queries, keep.outputs
    rows = [*queries, *(inner + row for row in queries), *(2 * inner + row for row in outputs)]
    qkv, bias = block.qkv.weight.detach()[rows], _rows(block.qkv, rows)
    scale = math.sqrt(keep.dims.qk_dim / keep.of.qk_dim) ** power
    if scale != 1:
        qkv[: len(queries)] *= scale
        if bias is not None:
            bias[: len(queries)] *= scale
    return {
        "qkv": (_columns(qkv, keep.attn_in), bias),
        "proj": (block.proj.weight.detach()[:, outputs], _rows(block.proj)),
    }


def _cut_beside(block: Block, old: Block, keep: BlockPlan) -> None:
    """What is cut along with the Linears: norms before proj and fc2, a head's relative positions."""
    for sublayer, kept in (("attn", keep.outputs), ("mlp", list(keep.units))):
        norm, before = block.norm(sublayer), old.norm(sublayer)
        if norm is not None and before is not None:
            for name, weight in before.named_parameters(recurse=False):
                setattr(norm, name, nn.Parameter(weight.detach()[kept], requires_grad=weight.requires_grad))
    if keep.heads and (table := old.table) is not None:
        left = table.detach()[:, list(keep.heads)].contiguous()
        block.attn.relative_position_bias_table = nn.Parameter(left, requires_grad=table.requires_grad)


def _columns(weight: Tensor, kept: Sequence[int] | None) -> Tensor:
    return weight if kept is None else weight[:, list(kept)]


def _rows(linear: nn.Linear, rows: Sequence[int] | None = None) -> Tensor | None:
    if linear.bias is None:
        return None
    bias = linear.bias.detach()
    return bias.clone() if rows is None else bias[list(rows)]


def _empty(like: nn.Linear, reads: int, writes: int) -> nn.Linear:
    linear = nn.Linear(reads, writes, bias=like.bias is not None, device="meta", dtype=like.weight.dtype)
    return linear.train(like.training)
