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

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lotus.config.section import Fraction
from lotus.training.average import LateAverage
from lotus.training.guests import Guest
from lotus.training.spikes import LossSpikes

if TYPE_CHECKING:
    from torch import nn

    from lotus.config import Recipe


def late_average(*, start: Annotated[float, Field(ge=0, lt=1)] = 0.75, every: Annotated[int, Field(ge=1)] = 5) -> Guest:
    """The plain mean of the weights over the last part of the training (SWA, 1803.05407; LAWA, 2209.14981).

    Args:
        start: fraction of the training before the first weights are taken
        every: steps between two that are taken
    """
    return LateAverage(start, every)


def hardest(
    model: nn.Module,
    classes: int,
    seed: int,
    *,
    keep: Fraction = 0.5,
    proxy: Fraction = 0.1,
    lr: Annotated[float, Field(gt=0)] = 1e-3,
) -> Guest:
    """The hardest part of each batch, as a narrower model sees it that trains along (airbench96). One process.

    Args:
        model: that trains
        classes: C
        seed: of the narrower model's weights
        keep: fraction of a batch that is trained on
        proxy: fraction of the model's MACs that the narrower one has; it goes through all images, and is billed
        lr: of the narrower one, by AdamW
    """
    from lotus.training.hardest import Hardest, proxy_of

    return Hardest(proxy_of(model, classes, proxy, seed), keep, lr)


def loss_spikes(
    recipe: Recipe, *, times: Annotated[float, Field(gt=0)] = 8.0, window: Annotated[int, Field(ge=8)] = 50
) -> Guest:
    """Which steps' loss jumped, and the image that had most of it: after each epoch, in words. The training is left as it is; or,
    where ``on_spike`` is set, it is told at once, and that becomes of the step.

    A step's loss is the mean over its images on all ranks, before weights, and before penalties where it is told alone. It jumps
    where it lies above the median of the ``window`` steps before it by more than ``times`` their spread, 1.4826 times the median
    distance from that median (of a normal distribution that is its standard deviation). A spike that comes back with the same
    image is that image's; one with any images asks for a lower rate or a smaller ``clip``.

    Args:
        recipe: whose ``on_spike`` says whether it acts
        times: of the spread
        window: steps, of earlier epochs too; the first eight of the training are not judged. With ``on_spike`` it begins anew
            where the model is cut or the pictures grow
    """
    return LossSpikes(times, window, recipe.on_spike is not None)
