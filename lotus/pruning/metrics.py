"""SHELF: how far a cut model is from the dense one, for a search (``prune.search.metric``). One function a metric.

A metric says it of each of B images, which are averaged: 0 where the cut model is as the dense one, higher is worse. It reads

    logits  (B, C) of the cut model
    dense   (B, C) of the dense one
    labels  (B,)

by the names of its parameters.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def divergence(logits: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    """KL(dense || cut) of an image in nats: 0 where the cut model says what the dense one says. Needs no labels."""
    return functional.kl_div(logits.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def loss(logits: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of an image in nats, beyond the dense model's; below 0 where the cut model is better."""
    return functional.cross_entropy(logits, labels, reduction="none") - functional.cross_entropy(
        dense, labels, reduction="none"
    )


def agreement(logits: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    """1 where the cut model decides otherwise than the dense one, else 0."""
    return (logits.argmax(-1) != dense.argmax(-1)).float()
