"""How a model's weights start, where none are given: a shelf, chosen by ``model.start``.

A start changes a model that timm has just made, in place, and draws from torch's global generator. What it does not name
stays as timm starts it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lotus.vit import anatomy


def timm(model: nn.Module) -> None:
    """timm's own."""


def xavier(model: nn.Module) -> None:
    """The patch embedding as if it were a linear layer over flattened patches, as in MAE (2111.06377) and big_vision."""
    embed: Any = model.get_submodule("patch_embed.proj")
    nn.init.xavier_uniform_(embed.weight.view(embed.weight.shape[0], -1))
    if embed.bias is not None:
        nn.init.zeros_(embed.bias)


@torch.no_grad()
def mimetic(
    model: nn.Module, *, alpha_qk: float = 0.7, beta_qk: float = 0.7, alpha_vo: float = 0.4, beta_vo: float = 0.4
) -> None:
    """Attention that starts as trained attention looks (2305.09828, section 3).

    Of each head, W_q W_k^T is the nearest matrix of rank Q to ``alpha_qk`` Z + ``beta_qk`` I, so that tokens attend to what is
    like them. W_v W_proj over all heads together is ``alpha_vo`` Z - ``beta_vo`` I, which is of full rank where the heads' values
    are as wide as the stream. Z is (D, D), normal, of variance 1 / D, and drawn anew each time; both factors have the
    same singular values. Made for Adam.
    """
    for block in anatomy.blocks(model):
        if not block.has_attn or block.kernel:
            continue
        q, k, v = _projections(block)
        width, heads = block.proj.out_features, block.heads
        eye = torch.eye(width)
        for q_head, k_head in zip(q.chunk(heads), k.chunk(heads), strict=True):  # (Q, D)
            left, right = _factors(alpha_qk * _noise(width) + beta_qk * eye, len(q_head))
            q_head.copy_(left.T)
            k_head.copy_(right)
        left, right = _factors(alpha_vo * _noise(width) - beta_vo * eye, len(v))
        v.copy_(left.T)
        block.proj.weight.copy_(right.T)


def _projections(block: anatomy.Block) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of queries and keys, (H Q, D), and of values, (H V, D), that may lie in one."""
    weights = [linear.weight for linear in block.projections]
    if len(weights) == 1:
        dims = block.dims
        queries = dims.heads * dims.qk_dim
        q, k, v = weights[0].split((queries, queries, dims.heads * dims.v_dim))
        return q, k, v
    q, k, v = weights
    return q, k, v


def _noise(width: int) -> Tensor:
    found: Tensor = torch.randn(width, width) / width**0.5
    return found


def _factors(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(D, D) -> (D, R) and (R, D), whose product is nearest to it; zeros beyond rank D."""
    u, s, vh = torch.linalg.svd(target)
    count, root = min(rank, len(s)), s.sqrt()
    left, right = target.new_zeros(len(target), rank), target.new_zeros(rank, len(target))
    left[:, :count], right[:count] = u[:, :count] * root[:count], root[:count, None] * vh[:count]
    return left, right
