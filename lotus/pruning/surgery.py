"""The one surgeon: executes a plan on a copy of a model.

What comes out are plain modules with smaller Linears: no masks, no hooks. The copy computes exactly what the model computes with
the cut units silenced; :func:`masked` makes that model, for comparison.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, parts
from lotus.vit.anatomy import Block, Dims
from lotus.vit.attention import SplitAttention
from lotus.vit.parts import Select


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model``, on its device and in its dtype, in which only what ``plan`` keeps is left.

    Query weights are multiplied by sqrt(kept / all query/key dimensions), since attention divides by the root of what is
    left: so the logits are those of the kept dimensions, unscaled. A branch that goes adds nothing any more.

    Raises:
        Refused: the plan was not made for this model, or the model cannot be cut.
    """
    plan.check(model)
    small = copy.deepcopy(model)
    parts.strip(small, [(bool(keep.heads), bool(keep.units)) for keep in plan.blocks])
    for block, (index, keep) in zip(anatomy.blocks(small), survivors(plan), strict=True):
        old = anatomy.blocks(model)[index]
        weights = cut_weights(old, keep)
        reshape(block, keep.dims, {branch: _channels(old, keep, branch) for branch in ("attn", "mlp")})
        for name, linear in block.linears.items():
            weight, bias = weights[name]
            before = getattr(old, name)
            linear.weight = nn.Parameter(weight.contiguous(), requires_grad=before.weight.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias.clone(), requires_grad=before.bias.requires_grad)
    return small


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A full-size copy of ``model`` in which what ``plan`` cuts is silenced: the oracle for :func:`cut`.

    Raises:
        Refused: as :func:`cut`.
    """
    plan.check(model)
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for block, keep in zip(anatomy.blocks(silent), plan.blocks, strict=True):
            inner = keep.of.heads * keep.of.qk_dim
            for there, last, norm in ((keep.heads, "proj", "norm1"), (keep.units, "fc2", "norm2")):
                if last in block.linears and not there:
                    silence = [getattr(block, last), *([getattr(block.module, norm)] if block.norm_after else [])]
                    for weight in (weight for module in silence for weight in module.parameters()):
                        weight.zero_()
            for reads, first in ((keep.attn_in, "qkv"), (keep.mlp_in, "fc1")):
                if reads is not None:
                    linear = getattr(block, first)
                    linear.weight[:, _others(reads, linear.in_features)] = 0
            if keep.units:
                block.fc2.weight[:, _others(keep.units, keep.of.hidden)] = 0
            if not keep.heads:
                continue
            block.proj.weight[:, _others(keep.outputs, block.proj.in_features)] = 0
            for start in (0, inner):  # q, then k
                rows = [start + row for row in _others(keep.queries, inner)]
                block.qkv.weight[rows] = 0
                if block.qkv.bias is not None:
                    block.qkv.bias[rows] = 0
    return silent


def survivors(plan: Plan) -> list[tuple[int, BlockPlan]]:
    """The blocks of which something stays, with their numbers before the cut."""
    return [(index, keep) for index, keep in enumerate(plan.blocks) if keep.heads or keep.units]


def _channels(block: Block, keep: BlockPlan, branch: str) -> tuple[int, ...] | None:
    """The channels of the stream that a branch reads after the cut; None: all."""
    kept, now = (keep.attn_in if branch == "attn" else keep.mlp_in), block.reads(branch)
    if kept is None or now is None:
        return now if kept is None else kept
    return tuple(now[i] for i in kept)


def reshape(block: Block, dims: Dims, reads: Mapping[str, Sequence[int] | None] | None = None) -> None:
    """Give ``block`` Linears of the widths ``dims``, in place, without memory or weights (meta device).

    The attention stays timm's own where its class can hold the widths, else it becomes a :class:`SplitAttention`. Branches
    are taken out by :func:`lotus.vit.parts.strip`, before.

    Args:
        reads: ``attn``, ``mlp`` -> the channels of the stream that the branch reads; None or absent: all
    """
    for branch, norm in (("attn", "norm1"), ("mlp", "norm2")):
        index = (reads or {}).get(branch)
        if index is not None:
            inside = getattr(block.module, norm)
            setattr(block.module, norm, Select(inside.norm if isinstance(inside, Select) else inside, index))
    width = block.width
    if block.has_attn:
        _reshape_attention(block, dims, width)
    if block.has_mlp:
        mlp: Any = block.mlp
        mlp.fc1 = _empty(mlp.fc1, dims.mlp_in or width, dims.hidden)
        mlp.fc2 = _empty(mlp.fc2, dims.hidden, width)


def _reshape_attention(block: Block, dims: Dims, width: int) -> None:
    heads, qk_dim, v_dim, _, attn_in, _ = dims
    attn: Any = block.attn
    if qk_dim != v_dim or not (type(attn) is SplitAttention or heads * v_dim == width or _holds(attn.__class__)):
        attn = SplitAttention(
            width,
            heads,
            qk_dim,
            v_dim,
            qkv_bias=attn.qkv.bias is not None,
            proj_bias=attn.proj.bias is not None,
            attn_drop=attn.attn_drop.p,
            proj_drop=attn.proj_drop.p,
            fused=bool(attn.fused_attn),
            q_norm=attn.q_norm,
            k_norm=attn.k_norm,
            device="meta",
            dtype=attn.qkv.weight.dtype,
        ).train(attn.training)
        if attn_in is not None:
            attn.qkv = _empty(attn.qkv, attn_in, attn.qkv.out_features)
        block.module.attn = attn
    else:
        attn.qkv = _empty(attn.qkv, attn_in or width, heads * (2 * qk_dim + v_dim))
        attn.proj = _empty(attn.proj, heads * v_dim, width)
        _set_heads(attn, heads, qk_dim, v_dim)


def cut_weights(block: Block, keep: BlockPlan) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each Linear after the cut, by name."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    if keep.heads:
        found |= _cut_attention(block, keep)
    if keep.units:
        units = list(keep.units)
        found["fc1"] = (_columns(block.fc1.weight.detach()[units], keep.mlp_in), _rows(block.fc1, units))
        found["fc2"] = (block.fc2.weight.detach()[:, units], _rows(block.fc2))
    return found


def _cut_attention(block: Block, keep: BlockPlan) -> dict[str, tuple[Tensor, Tensor | None]]:
    inner = keep.of.heads * keep.of.qk_dim
    queries, outputs = keep.queries, keep.outputs
    rows = [*queries, *(inner + row for row in queries), *(2 * inner + row for row in outputs)]
    qkv, bias = block.qkv.weight.detach()[rows], _rows(block.qkv, rows)
    scale = math.sqrt(keep.dims.qk_dim / keep.of.qk_dim)
    if scale != 1:
        qkv[: len(queries)] *= scale
        if bias is not None:
            bias[: len(queries)] *= scale
    return {
        "qkv": (_columns(qkv, keep.attn_in), bias),
        "proj": (block.proj.weight.detach()[:, outputs], _rows(block.proj)),
    }


def _columns(weight: Tensor, kept: Sequence[int] | None) -> Tensor:
    return weight if kept is None else weight[:, list(kept)]


def _rows(linear: nn.Linear, rows: Sequence[int] | None = None) -> Tensor | None:
    if linear.bias is None:
        return None
    bias = linear.bias.detach()
    return bias.clone() if rows is None else bias[list(rows)]


def _others(kept: Sequence[int], count: int) -> list[int]:
    gone = set(range(count)) - set(kept)
    return sorted(gone)


def _empty(like: nn.Linear, reads: int, writes: int) -> nn.Linear:
    linear = nn.Linear(reads, writes, bias=like.bias is not None, device="meta", dtype=like.weight.dtype)
    return linear.train(like.training)


def _set_heads(attn: Any, heads: int, qk_dim: int, v_dim: int) -> None:
    attn.num_heads = heads
    attn.scale = qk_dim**-0.5
    if type(attn) is SplitAttention:
        attn.qk_dim, attn.v_dim = qk_dim, v_dim
        return
    attn.head_dim = v_dim
    if hasattr(attn, "attn_dim"):
        attn.attn_dim = heads * v_dim


@functools.cache
def _holds(attention: Callable[..., Any]) -> bool:
    """Whether timm's attention class computes with heads that do not fill the width. Tried, since versions differ."""
    attn = attention(4, num_heads=2, qkv_bias=True)
    attn.qkv, attn.proj = nn.Linear(4, 3), nn.Linear(1, 4)
    _set_heads(attn, 1, 1, 1)
    try:
        return bool(attn(torch.zeros(1, 2, 4)).shape == (1, 2, 4))
    except (RuntimeError, AttributeError, TypeError):
        return False
