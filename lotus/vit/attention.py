"""Attention for blocks that timm's own class cannot hold: heads with fewer query/key dimensions than value dimensions,
or a timm whose ``Attention`` insists on heads x dimensions = width. Everything else stays timm's.

Shapes: B batch, N tokens, D width, H heads, Q query/key dimensions a head, V value dimensions a head.
"""

from __future__ import annotations

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
        """(B, N, D) -> (B, N, D). Masks are not taken: images attend to all of themselves."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("SplitAttention takes no attention mask")
        batch, tokens, _ = x.shape
        heads, qk, v_dim = self.num_heads, self.qk_dim, self.v_dim
        q, k, v = self.qkv(x).split((heads * qk, heads * qk, heads * v_dim), dim=-1)
        q = q.reshape(batch, tokens, heads, qk).transpose(1, 2)  # (B, H, N, Q)
        k = k.reshape(batch, tokens, heads, qk).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        v = v.reshape(batch, tokens, heads, v_dim).transpose(1, 2)  # (B, H, N, V)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            x = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(batch, tokens, heads * v_dim)
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, qk_dim={self.qk_dim}, v_dim={self.v_dim}"
