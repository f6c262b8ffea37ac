"""The one surgeon: executes a plan on a copy of a model.

What comes out are plain modules with smaller Linears: no masks, no hooks. The copy computes exactly what the model computes with
the cut units silenced; :func:`masked` makes that model, for comparison.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy
from lotus.vit.anatomy import Block, Dims
from lotus.vit.attention import SplitAttention


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model``, on its device and in its dtype, in which only what ``plan`` keeps is left.

    Query weights are multiplied by sqrt(kept / all query/key dimensions), since attention divides by the root of what is
    left: so the logits are those of the kept dimensions, unscaled.

    Raises:
        Refused: the plan was not made for this model, or the model cannot be cut.
    """
    plan.check(model)
    small = copy.deepcopy(model)
    for block, old, keep in zip(anatomy.blocks(small), anatomy.blocks(model), plan.blocks, strict=True):
        weights = _cut_weights(old, keep)
        reshape(block, keep.dims)
        for name, linear in (("qkv", block.qkv), ("proj", block.proj), ("fc1", block.fc1), ("fc2", block.fc2)):
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
            block.proj.weight[:, _others(keep.outputs, block.proj.in_features)] = 0
            block.fc2.weight[:, _others(keep.units, keep.of.hidden)] = 0
            for start in (0, inner):  # q, then k
                rows = [start + row for row in _others(keep.queries, inner)]
                block.qkv.weight[rows] = 0
                if block.qkv.bias is not None:
                    block.qkv.bias[rows] = 0
    return silent


def reshape(block: Block, dims: Dims) -> None:
    """Give ``block`` Linears of the widths ``dims``, in place, without memory or weights (meta device).

    The attention stays timm's own where its class can hold the widths, else it becomes a :class:`SplitAttention`.
    """
    heads, qk_dim, v_dim, hidden = dims
    attn: Any = block.attn
    width = block.qkv.in_features
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
        block.module.attn = attn
    else:
        attn.qkv = _empty(attn.qkv, width, heads * (2 * qk_dim + v_dim))
        attn.proj = _empty(attn.proj, heads * v_dim, width)
        _set_heads(attn, heads, qk_dim, v_dim)
    mlp: Any = block.mlp
    mlp.fc1 = _empty(mlp.fc1, width, hidden)
    mlp.fc2 = _empty(mlp.fc2, hidden, width)


def _cut_weights(block: Block, keep: BlockPlan) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each Linear after the cut."""
    inner = keep.of.heads * keep.of.qk_dim
    queries, outputs = keep.queries, keep.outputs
    rows = [*queries, *(inner + row for row in queries), *(2 * inner + row for row in outputs)]
    qkv, bias = block.qkv.weight.detach()[rows], _rows(block.qkv, rows)
    scale = math.sqrt(keep.dims.qk_dim / keep.of.qk_dim)
    if scale != 1:
        qkv[: len(queries)] *= scale
        if bias is not None:
            bias[: len(queries)] *= scale
    units = list(keep.units)
    return {
        "qkv": (qkv, bias),
        "proj": (block.proj.weight.detach()[:, outputs], _rows(block.proj)),
        "fc1": (block.fc1.weight.detach()[units], _rows(block.fc1, units)),
        "fc2": (block.fc2.weight.detach()[:, units], _rows(block.fc2)),
    }


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
