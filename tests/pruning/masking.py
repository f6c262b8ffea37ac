"""The oracle for a cut: the same model at full size, in which what is cut is silenced."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lotus.pruning.plan import Plan
from lotus.vit import anatomy, families
from lotus.vit.anatomy import Block


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A full-size copy of ``model`` in which what ``plan`` cuts is silenced."""
    plan.check(model)
    silent = copy.deepcopy(families.opened(model))
    with torch.no_grad():
        for block, keep in zip(anatomy.blocks(silent), plan.blocks, strict=True):
            if block.has_attn:
                _silence(block, "attn", ("qkv", keep.attn_in), ("proj", keep.outputs))
            if block.has_mlp:
                _silence(block, "mlp", ("fc1", keep.mlp_in), ("fc2", keep.units))
            if keep.heads:
                inner = keep.of.heads * keep.of.qk_dim
                gone = _others(keep.queries, inner)
                rows = [*gone, *(inner + row for row in gone)]  # of q, then of k
                block.qkv.weight[rows] = 0
                if block.qkv.bias is not None:
                    block.qkv.bias[rows] = 0
    return silent


def _silence(
    block: Block, sublayer: str, first: tuple[str, Sequence[int] | None], last: tuple[str, Sequence[int]]
) -> None:
    """In a sublayer, all but what its first Linear is to read of the stream (None: all) and its last of the units."""
    (reader, reads), (writer, kept) = first, last
    if not kept:
        after = {"attn": "norm1", "mlp": "norm2"}[sublayer]
        for module in (getattr(block, writer), *([getattr(block.module, after)] if block.norm_after else [])):
            for weight in module.parameters():
                weight.zero_()
        return
    for name, stays in ((reader, reads), (writer, kept)):
        linear = getattr(block, name)
        if stays is not None:
            linear.weight[:, _others(stays, linear.in_features)] = 0
    norm = block.norm(sublayer)
    if norm is not None:  # what is gone must not count in its statistics either
        getattr(block.module, sublayer).norm = _NormOfSome(norm, kept)


class _NormOfSome(nn.Module):
    """A norm with the statistics of the inputs ``kept``; the others come out as nothing."""

    def __init__(self, norm: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        self.kept = list(kept)
        self.small = families.resized(norm, len(self.kept))
        for name, weight in norm.named_parameters(recurse=False):
            setattr(self.small, name, nn.Parameter(weight.detach()[self.kept]))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[..., self.kept] = self.small(x[..., self.kept])
        return y


def _others(kept: Sequence[int], count: int) -> list[int]:
    gone = set(range(count)) - set(kept)
    return sorted(gone)
