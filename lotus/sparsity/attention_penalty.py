"""SHELF of penalties on attention probabilities, and how they join the loss.

A penalty reads ``attention`` (B, H, N, N), rows of sum 1, and returns a number an image, (B,). B batch, H heads, N tokens.

Fused attention hides its probabilities. They are recomputed from the output of ``qkv``, in the penalized blocks alone
and in training alone; the forward pass itself stays fused everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lotus.config import Attention
from lotus.vit import anatomy
from lotus.vit.attention import matrix
from selection.errors import Refused
from selection.methods import find


def log(attention: Tensor) -> Tensor:
    """mean over heads, rows and columns of log(1 + a^2): Sparse-ViT (2307.11988), as published.

    It does not make attention sparse. A row sums to 1 and log(1 + a^2) is convex on [0, 1], so the least a row can cost
    is what the uniform one costs: the penalty spreads attention. Its size is small, too: at most log(2) / N.
    """
    return attention.square().log1p().mean((1, 2, 3))


def entropy(attention: Tensor) -> Tensor:
    """mean over heads and rows of -sum_j a_j log a_j, in nats: least, 0, for a row of a single 1. This one does sparsify."""
    return torch.special.entr(attention).sum(-1).mean((1, 2))


class AttentionPenalty:
    """A penalty on a model's attention while it trains.

    Works on any number of ranks and under every ZeRO stage: it is a part of the loss, made of activations.
    """

    def __init__(self, model: nn.Module, settings: Attention) -> None:
        import lotus.sparsity.attention_penalty as shelf

        self._penalty = find(shelf, settings.kind, place="train.sparsity.attention.kind")
        self._strength = settings.strength
        blocks = anatomy.blocks(model)
        self._blocks = blocks[-1:] if settings.layers == "last" else blocks
        self._seen: list[Tensor] = []
        self._last: Tensor | None = None
        self._macs: dict[int, int] = {}
        self._handles = [block.qkv.register_forward_hook(self._hook(block.attn)) for block in self._blocks]

    def of_images(self) -> Tensor:
        """(B,) float32, what the forward pass just made costs each image: lambda times the mean over the penalized blocks.

        Raises:
            Refused: the forward pass was not seen.
        """
        if len(self._seen) != len(self._blocks):
            raise Refused("train.sparsity.attention: not every penalized block took part in the forward pass.")
        mean = torch.stack(self._seen).mean(0)
        self._seen.clear()
        self._last = mean.detach().mean()
        return self._strength * mean

    def summary(self) -> dict[str, float]:
        """``attention``: the penalty of the last batch, without lambda."""
        return {} if self._last is None else {"attention": float(self._last)}

    def macs(self) -> int:
        """Multiply-accumulates of an image that the recomputed QK^T cost in the last forward pass."""
        return sum(self._macs.values())

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, attn: Any) -> Any:
        def after(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
            if attn.training and torch.is_grad_enabled():
                if len(self._seen) == len(self._blocks):
                    self._seen.clear()  # a forward pass that nobody asked about
                attention = matrix(attn, out)  # (B, H, N, N)
                v_dim = attn.proj.in_features // attn.num_heads
                q_dim = (out.shape[-1] // attn.num_heads - v_dim) // 2
                self._macs[id(attn)] = attention[0].numel() * q_dim
                self._seen.append(self._penalty(attention.float()))

        return after
