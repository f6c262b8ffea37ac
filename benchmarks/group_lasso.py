"""A guest of training for benchmarks/regularize.py: a group lasso over what a cut takes. ``--with`` it; no benchmark itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lotus.training.guests import Guest
from lotus.vit import anatomy


def group(model: nn.Module, *, strength: float = 1e-4) -> Guest:
    """Adds ``strength`` times the sum of the groups' Euclidean norms to the loss (Yuan & Lin 2006).

    A group is an MLP unit's row of fc1 and column of fc2, or an attention dimension's row of v and column of proj.
    """
    return GroupLasso(model, strength)


class GroupLasso(Guest):
    """Holds nothing but the model."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self._model, self._strength = model, strength

    def losses(self, losses: Tensor, seen: Any) -> Tensor:
        return losses + self._strength * self.penalty()

    def penalty(self) -> Tensor:
        """Sum of the groups' norms over all blocks."""
        norms = []
        for block in anatomy.blocks(self._model):
            value = block.qkv.weight.chunk(3)[2]
            for rows, columns in ((value, block.proj.weight), (block.fc1.weight, block.fc2.weight)):
                norms.append((rows.square().sum(1) + columns.square().sum(0) + 1e-12).sqrt().sum())
        return torch.stack(norms).sum()
