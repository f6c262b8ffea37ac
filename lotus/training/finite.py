"""Whether the gradient of a step is finite, without a GPU being waited for.

The weights must not move by a gradient that is not finite. Who asks first and moves them then leaves a GPU idle from the end
of the backward pass until the host has heard of it. Here the device itself leaves such a step out, where the optimizer can be
told to (``found_inf``, by which torch's gradient scaler tells it), and the host hears of it while the device is at work on the
next step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lotus.training.muon import Muon


class Answer:
    """A yes or no of the device, which ``bool`` waits for: for what came before it, and for nothing that was asked since."""

    def __init__(self, told: Tensor) -> None:
        """
        Args:
            told: () bool, on the device
        """
        self._told: Tensor | bool = told.to("cpu", non_blocking=True)  # pinned, where it comes from a GPU
        self._there = None
        if told.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def __bool__(self) -> bool:
        if self._there is not None:
            self._there.synchronize()
            self._there = None
        self._told = bool(self._told)
        return self._told


def clipped(gradients: Sequence[Tensor], most: float) -> Tensor:
    """() bool: whether all gradients together are finite; then, in place, of a norm of at most ``most`` (0: any).

    Where they are not, what is left of them is of no use.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    if most > 0:
        torch._foreach_mul_(list(gradients), (most / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grads_with_norm_
    return norm.isfinite()


def can_be_told(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it leaves a step out where the device says so. torch's fused SGD can, but for its first step, which would leave
    momentum that nobody has written."""
    known = isinstance(optimizer, (Muon, torch.optim.Adam, torch.optim.AdamW))
    return known and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def tell(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Let its next step be none where not ``finite``, () bool on the device."""
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
