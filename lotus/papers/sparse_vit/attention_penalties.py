"""SHELF of penalties on attention probabilities.

A penalty reads ``attention`` (B, H, N, N), rows of sum 1, and returns a number an image, (B,). B batch, H heads, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log(attention: Tensor) -> Tensor:
    """mean over heads, rows and columns of log(1 + a^2): Sparse-ViT (2307.11988), as published.

    It does not make attention sparse. A row sums to 1 and log(1 + a^2) is convex on [0, 1], so the least a row can cost
    is what the uniform one costs: the penalty spreads attention. Its size is small, too: at most log(2) / N.
    """
    return attention.square().log1p().mean((1, 2, 3))


def entropy(attention: Tensor) -> Tensor:
    """mean over heads and rows of -sum_j a_j log a_j, in nats: least, 0, for a row of a single 1. This one does sparsify."""
    return torch.special.entr(attention).sum(-1).mean((1, 2))
