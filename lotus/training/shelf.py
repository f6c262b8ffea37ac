"""SHELF of guests that a config can name: ``train.guests: [late_average]``. One function a guest.

A function makes a guest (:class:`lotus.training.guests.Guest`). Its positional parameters say what it reads, out of

    model    the model that is trained
    recipe   how
    rows     (K,) of the ticket
    labels   (N,) of the data set
    classes  how many
    seed     of this training
    world    the ranks

and its keyword-only parameters what a config may set. What is switched on by a section of its own (gates, a teacher, a
dynamic data pruning, token pruning, the moving average) does not stand here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lotus.training.average import LateAverage
from lotus.training.guests import Guest

if TYPE_CHECKING:
    from torch import nn


def late_average(*, start: float = 0.75, every: int = 5) -> Guest:
    """The plain mean of the weights over the last part of the training (SWA, 1803.05407; LAWA, 2209.14981).

    Args:
        start: fraction of the training before the first weights are taken
        every: steps between two that are taken
    """
    return LateAverage(start, every)


def hardest(
    model: nn.Module, classes: int, seed: int, *, keep: float = 0.5, proxy: float = 0.1, lr: float = 1e-3
) -> Guest:
    """The hardest part of each batch, as a narrower model sees it that trains along (airbench96). One process.

    Args:
        keep: fraction of a batch that is trained on
        proxy: fraction of the model's MACs that the narrower one has; it goes through all images, and is billed
        lr: of the narrower one, by AdamW
    """
    from lotus.training.hardest import Hardest, proxy_of

    return Hardest(proxy_of(model, classes, proxy, seed), keep, lr)
