"""How a penalty on attention joins a loss.

Fused attention hides its probabilities. They are recomputed from the output of ``qkv``, in the penalized blocks alone
and in training alone; the forward pass itself stays fused everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lotus.papers.sparse_vit import attention_penalties
from lotus.training.guests import Guest, Seen, Turn
from lotus.vit import anatomy
from lotus.vit.attention import matrix
from selection.errors import Refused
from selection.methods import find


class AttentionPenalty(Guest):
    """A penalty on a model's attention while it trains: joins what each image costs.

    Works on any number of ranks and under every ZeRO stage: it is a part of the loss, made of activations.
    """

    name = "attention"
    turn = Turn.PENALIZE

    def __init__(self, model: nn.Module, kind: str = "log", strength: float = 0.01, layers: str = "all") -> None:
        """
        Args:
            kind: a penalty of lotus/papers/sparse_vit/attention_penalties.py
            strength: lambda
            layers: which blocks are penalized: ``last`` or ``all``
        """
        self._penalty = find(attention_penalties, kind, place="attention_penalty.kind")
        self._strength = strength
        blocks = anatomy.blocks(model)
        self._blocks = blocks[-1:] if layers == "last" else blocks
        self._seen: list[Tensor] = []
        self._last: Tensor | None = None
        self._macs: dict[int, int] = {}
        self._handles = [block.qkv.register_forward_hook(self._hook(block.attn)) for block in self._blocks]

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        return losses + self.of_images()

    def of_images(self) -> Tensor:
        """(B,) float32, what the forward pass just made costs each image: lambda times the mean over the penalized blocks.

        Raises:
            Refused: the forward pass was not seen.
        """
        if len(self._seen) != len(self._blocks):
            raise Refused("attention_penalty: not every penalized block took part in the forward pass.")
        mean = torch.stack(self._seen).mean(0)
        self._seen.clear()
        self._last = mean.detach().mean()
        return self._strength * mean

    def summary(self) -> dict[str, float]:
        """``attention``: the penalty of the last batch, without lambda."""
        return {} if self._last is None else {"attention": float(self._last)}

    def own_macs(self) -> float:
        """Multiply-accumulates of an image that the recomputed QK^T cost in the last forward pass."""
        return sum(self._macs.values())

    def leave(self) -> None:
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
