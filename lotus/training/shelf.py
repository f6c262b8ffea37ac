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

from lotus.training.average import LateAverage
from lotus.training.guests import Guest


def late_average(*, start: float = 0.75, every: int = 5) -> Guest:
    """The plain mean of the weights over the last part of the training (SWA, 1803.05407; LAWA, 2209.14981).

    Args:
        start: fraction of the training before the first weights are taken
        every: steps between two that are taken
    """
    return LateAverage(start, every)
