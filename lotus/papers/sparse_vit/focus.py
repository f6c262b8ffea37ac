"""How peaked a model's attention is: what a penalty on attention was meant to change, measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lotus.vit import saliency

LARGE = 0.1
"""A probability above this counts as large."""


def shape(attention: Tensor) -> Tensor:
    """(B, H, N, N) -> (3,): mean entropy of a row in nats, mean of its largest probability, share of all above 0.1."""
    entropy = torch.special.entr(attention).sum(-1).mean()
    return torch.stack([entropy, attention.amax(-1).mean(), (attention > LARGE).float().mean()])


def focus(model: nn.Module, batches: Iterable[Any], device: torch.device | str = "cpu") -> dict[str, dict[str, float]]:
    """Mean over images, heads and rows of :func:`shape`: ``last`` for the last block, ``all`` for the mean over blocks.

    Args:
        model: a plain ViT; ends up on ``device``
        batches: tuples that begin with images
        device: where it is computed
    """
    sums, images = torch.zeros(2, 3, dtype=torch.float64), 0
    model = model.to(device)
    for batch in batches:
        attentions = saliency.watch(model, batch[0].to(device))["attentions"]
        blocks = torch.stack([shape(one.float()) for one in attentions]).double().cpu()  # (L, 3)
        sums += len(batch[0]) * torch.stack([blocks[-1], blocks.mean(0)])
        images += len(batch[0])
    names = ("entropy", "largest", "above")
    return {
        where: dict(zip(names, (row / max(images, 1)).tolist(), strict=True))
        for where, row in zip(("last", "all"), sums, strict=True)
    }
