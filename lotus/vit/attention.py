"""Attention for blocks that timm's own class cannot hold: heads with fewer query/key dimensions than value dimensions,
or a timm whose ``Attention`` insists on heads x dimensions = width. Everything else stays timm's.

And what fused attention hides, recomputed from the output of ``qkv``: one row of the attention matrix, or all of it.

Shapes: B batch, N tokens, P prefix tokens (class, distillation, registers), D width, H heads, Q query/key dimensions a
head, V value dimensions a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SplitAttention(nn.Module):
    """Multi-head self-attention whose heads have Q query/key and V value dimensions.

    Weights have timm's names and order: ``qkv`` holds H x Q rows of q, H x Q of k, H x V of v; ``proj`` reads H x V. It can
    be called as each of timm's attentions is: with a mask (plain), rotary positions (EVA), relative positions (BEiT, Swin) or
    the mask of shifted windows (Swin).
    """

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor | None

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
        norm: nn.Module | None = None,
        prefix: int = 0,
        rotate_half: bool = False,
        index: Tensor | None = None,
        distances: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            norm: over the H x V outputs
            prefix: how many tokens stand before the patches and are not turned by rotary positions
            rotate_half: pairs lie half a head apart, not side by side
            index: (N, N) which of ``distances`` relative positions lies between two tokens; None: there are none
        """
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim = heads, qk_dim, v_dim
        self.scale = qk_dim**-0.5
        self.fused_attn = fused
        self.num_prefix_tokens, self.rotate_half = prefix, rotate_half
        self.q_norm = nn.Identity() if q_norm is None else q_norm  # over the Q dimensions of a head
        self.k_norm = nn.Identity() if k_norm is None else k_norm
        self.qkv = nn.Linear(width, heads * (2 * qk_dim + v_dim), bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = nn.Identity() if norm is None else norm
        self.proj = nn.Linear(heads * v_dim, width, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        if index is None:
            self.relative_position_bias_table = None
        else:
            table = torch.zeros(distances, heads, device=device, dtype=dtype)
            self.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos_bias: None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            x: tokens
            attn_mask: added to QK^T, of a shape that broadcasts to (B, H, N, N)
            is_causal: always False: an image attends to all of itself
            rope: (n, 2 Q) sines and cosines of the n patches
            shared_rel_pos_bias: always None: such a model is refused
            mask: (W, N, N) added to QK^T of each of an image's W windows, which are the B rows of ``x``
        """
        if is_causal:
            raise NotImplementedError("SplitAttention takes no causal mask: images attend to all of themselves")
        batch, tokens, _ = x.shape
        heads, qk, v_dim = self.num_heads, self.qk_dim, self.v_dim
        q, k, v = self.qkv(x).split((heads * qk, heads * qk, heads * v_dim), dim=-1)
        q = q.reshape(batch, tokens, heads, qk).transpose(1, 2)  # (B, H, N, Q)
        k = k.reshape(batch, tokens, heads, qk).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._turn(q, rope), self._turn(k, rope)
        v = v.reshape(batch, tokens, heads, v_dim).transpose(1, 2)  # (B, H, N, V)
        added = self._added(attn_mask, mask, batch)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout)
        else:
            logits = q * self.scale @ k.transpose(-2, -1)
            x = self.attn_drop((logits if added is None else logits + added).softmax(dim=-1)) @ v
        x = self.norm(x.transpose(1, 2).reshape(batch, tokens, heads * v_dim))
        found: Tensor = self.proj_drop(self.proj(x))
        return found

    def _turn(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotate pairs of dimensions of the patches, (B, H, N, Q), as RoFormer (2104.09864, equation 34)."""
        prefix, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        sine, cosine = rope.chunk(2, dim=-1)
        if self.rotate_half:
            first, second = patches.chunk(2, dim=-1)
            across = torch.cat((-second, first), dim=-1)
        else:
            across = torch.stack((-patches[..., 1::2], patches[..., ::2]), dim=-1).reshape(patches.shape)
        return torch.cat((prefix, (patches * cosine + across * sine).to(x.dtype)), dim=2)

    def _added(self, attn_mask: Tensor | None, mask: Tensor | None, batch: int) -> Tensor | None:
        """What is added to the logits, of a shape that broadcasts to (B, H, N, N)."""
        if self.relative_position_bias_table is None:
            return attn_mask
        bias = self._get_rel_pos_bias()
        if attn_mask is not None:
            bias = bias + attn_mask
        if mask is None:
            return bias
        windows = len(mask)
        every = bias[:, None] + mask[None, :, None]  # (1, W, H, N, N)
        return every.expand(batch // windows, -1, -1, -1, -1).flatten(0, 1)

    def _get_rel_pos_bias(self) -> Tensor:
        """(1, H, N, N); called as BEiT's is."""
        table, index = self.relative_position_bias_table, self.relative_position_index
        assert table is not None
        assert index is not None
        return table[index.reshape(-1)].reshape(*index.shape, -1).permute(2, 0, 1)[None]

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, qk_dim={self.qk_dim}, v_dim={self.v_dim}"


def unfuse(model: nn.Module) -> Callable[[], None]:
    """Let ``model`` attend in single operations instead of torch's fused one; what is returned takes it back.

    On a CPU the fused one is slow in bfloat16, its backward pass most of all: "bare" of ``benchmarks/train_step.py --precision bf16``
    has it, and "no gates" has not.
    """
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]

    def attend(at_once: bool) -> None:
        for module in fused:
            module.fused_attn = at_once  # type: ignore[assignment]

    attend(False)
    return functools.partial(attend, True)


class PackedGlu(nn.Module):
    """A gated MLP, act(gate x) * (value x), whose two halves are the rows of one ``fc1``, the gate's first (2002.05202)."""

    def __init__(
        self, fc1: nn.Linear, act: nn.Module, drop: nn.Module, norm: nn.Module, fc2: nn.Linear, last: nn.Module
    ):
        super().__init__()
        self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2 = fc1, act, drop, norm, fc2, last

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        found: Tensor = self.drop2(self.fc2(self.norm(self.drop1(self.act(gate) * value))))
        return found


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
        attn: the module, of timm or ours
        qkv: (B, N, ...) what its ``qkv`` gave
        prefix: P, how many tokens stand before the patches; the class token is the first of them
        has_class: whether the model reads out a class token
    """
    q, k, _ = parts(attn, qkv)
    query = q[:, :, :1] if has_class else q[:, :, prefix:].mean(2, keepdim=True)  # (B, H, 1, Q)
    found: Tensor = (query * attn.scale @ k.transpose(-2, -1)).softmax(-1)[:, :, 0]
    return found


def matrix(attn: Any, qkv: Tensor) -> Tensor:
    """The whole attention matrix of each head, (B, H, N, N)."""
    q, k, _ = parts(attn, qkv)
    found: Tensor = (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)
    return found


def explicit(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What ``attn`` computes without fused attention: (B, N, D) -> (B, N, D), and the attention matrix (B, H, N, N)."""
    q, k, v = parts(attn, attn.qkv(x))
    probabilities = (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)
    mixed = (attn.attn_drop(probabilities) @ v).transpose(1, 2).flatten(2)  # (B, N, H V)
    return attn.proj_drop(attn.proj(mixed)), probabilities
