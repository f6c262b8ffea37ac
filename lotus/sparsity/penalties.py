"""SHELF: how L1 acts on the gates. One function a penalty.

A penalty makes one penalized step over all G gates at once. It reads

    values    (G,) float32, the gates now
    gradient  (G,) float32, of the loss without the penalty
    descend   a gradient in, the values after the optimizer's step out; called exactly once
    lr        learning rate of the gates
    strength  lambda, >= 0: one number, or (G,) with one for each gate

and returns the gates after the step, (G,). What a config may set would be keyword-only; these two have nothing to set.
:class:`lotus.sparsity.gates.Gates` takes one by its name, a user's own as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Descend = Callable[[Tensor], Tensor]


def proximal(values: Tensor, gradient: Tensor, descend: Descend, lr: float, strength: float | Tensor) -> Tensor:
    """The optimizer's step, then sign(a) max(|a| - lr lambda, 0): reaches exact zeros, and keeps them.

    The proximal operator of lr lambda ||a||_1 (Parikh & Boyd 2014, section 6.5.2), decoupled from the optimizer as
    AdamW's weight decay is. Under Adam, whose step is lr times a number in about [-1, 1], a gate at zero comes back
    only while that number is above lambda.
    """
    moved = descend(gradient)
    return moved.sign() * F.relu(moved.abs() - lr * strength)


def subgradient(values: Tensor, gradient: Tensor, descend: Descend, lr: float, strength: float | Tensor) -> Tensor:
    """The gradient plus lambda sign(a), then the optimizer's step: L1 in the loss, as VTP has it (2104.08500, eq. 6).

    Never reaches exact zeros: a gate swings round zero by about ``lr`` under Adam.
    """
    return descend(gradient + strength * values.sign())
