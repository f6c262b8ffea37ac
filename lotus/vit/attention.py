"""Attention for blocks that timm's own class cannot hold: heads with fewer query/key dimensions than value dimensions,
or a timm whose ``Attention`` insists on heads x dimensions = width. Everything else stays timm's.

And what fused attention hides, recomputed from the output of ``qkv``: one row of the attention matrix, or all of it.

Shapes: B batch, N tokens, P prefix tokens (class, distillation, registers), D width, H heads, Q query/key dimensions a
head, V value dimensions a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SplitAttention(nn.Module):
    """Multi-head self-attention whose heads have Q query/key and V value dimensions.

    Weights have timm's names and order: ``qkv`` holds H x Q rows of q, H x Q of k, H x V of v; ``proj`` reads H x V.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_dim: int,
        v_dim: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        fused: bool = True,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim = heads, qk_dim, v_dim
        self.scale = qk_dim**-0.5
        self.fused_attn = fused
        self.q_norm = nn.Identity() if q_norm is None else q_norm  # over the Q dimensions of a head
        self.k_norm = nn.Identity() if k_norm is None else k_norm
        self.qkv = nn.Linear(width, heads * (2 * qk_dim + v_dim), bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(heads * v_dim, width, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            attn_mask: added to QK^T, of a shape that broadcasts to (B, H, N, N)
        """
        if is_causal:
            raise NotImplementedError("SplitAttention takes no causal mask: images attend to all of themselves")
        batch, tokens, _ = x.shape
        heads, qk, v_dim = self.num_heads, self.qk_dim, self.v_dim
        q, k, v = self.qkv(x).split((heads * qk, heads * qk, heads * v_dim), dim=-1)
        q = q.reshape(batch, tokens, heads, qk).transpose(1, 2)  # (B, H, N, Q)
        k = k.reshape(batch, tokens, heads, qk).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        v = v.reshape(batch, tokens, heads, v_dim).transpose(1, 2)  # (B, H, N, V)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        else:
            logits = q * self.scale @ k.transpose(-2, -1)
            x = self.attn_drop((logits if attn_mask is None else logits + attn_mask).softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(batch, tokens, heads * v_dim)
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, qk_dim={self.qk_dim}, v_dim={self.v_dim}"


def parts(attn: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, H (2 Q + V)), what ``attn.qkv`` gave -> q, k (B, H, N, Q), normed where the model norms them, and v (B, H, N, V)."""
    heads = int(attn.num_heads)
    v_dim = attn.proj.in_features // heads
    qk_dim = (qkv.shape[-1] // heads - v_dim) // 2
    q, k, v = qkv.split((heads * qk_dim, heads * qk_dim, heads * v_dim), dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return attn.q_norm(q), attn.k_norm(k), v


def row(attn: Any, qkv: Tensor, prefix: int, *, has_class: bool) -> Tensor:
    """How much the read-out attends to each token: one row of the attention matrix, each head's -> (B, H, N).

    The class token's row. A model without one is read out by its patches' mean, and so their mean query asks (ours;
    no paper's). Costs H Q N multiply-accumulates, and fused attention stays on for all the rest.

    Args:
        prefix: P, how many tokens stand before the patches; the class token is the first of them
    """
    q, k, _ = parts(attn, qkv)
    query = q[:, :, :1] if has_class else q[:, :, prefix:].mean(2, keepdim=True)  # (B, H, 1, Q)
    return (query * attn.scale @ k.transpose(-2, -1)).softmax(-1)[:, :, 0]


def matrix(attn: Any, qkv: Tensor) -> Tensor:
    """The whole attention matrix of each head, (B, H, N, N)."""
    q, k, _ = parts(attn, qkv)
    return (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)
