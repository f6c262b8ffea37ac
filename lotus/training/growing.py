"""Growing pictures: a training begins on small images and ends on whole ones, which spares most of the early epochs' work.

FixRes (1906.06423) and progressive learning (2104.00298, section 4.2, which lets augmentation grow along): what is learned first
needs few pixels. The side is a function of the epoch alone, so that a training goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import nn

from lotus.training.guests import Epoch, Guest, Training
from lotus.vit import sides
from lotus.vit.cost import outline
from selection.errors import Refused

Step = Sequence[float]
"""(from this fraction of the training on, this side in pixels), and a strength of augmentation, 0 to 1, where it is to grow too."""


def at(steps: Sequence[Step], epoch: int, epochs: int) -> Step | None:
    """The step that ``epoch`` (from 0) of ``epochs`` is in; None before the first."""
    return next((step for step in reversed(steps) if epoch >= step[0] * epochs - 1e-9), None)


def check(model: nn.Module, steps: Sequence[Step], epochs: int | None = None, *, place: str) -> None:
    """Refuse what ``model`` cannot read, and, where it is known how many epochs there are, a last side that is never shown.

    Raises:
        Refused: as :func:`lotus.vit.sides.check`; none of the ``epochs`` begins where the last side does, or later.
    """
    if steps and epochs is not None and math.ceil(steps[-1][0] * epochs - 1e-9) >= epochs:
        raise Refused(
            f"{place}: a side is an epoch's, and none of {epochs} begins at {steps[-1][0]:g} of the training or later. Let the last side "
            "begin sooner, or train longer."
        )
    for step in steps:
        sides.check(model, int(step[1]), place=place)


class GrowingPictures(Guest):
    """Says at which side an epoch's images are shown, lets the model read them, and counts their MACs.

    Evaluations are at the loader's own side.
    """

    name = "growing"

    def __init__(self, steps: Sequence[Step]) -> None:
        """
        Args:
            steps: rising; the side before the first is the model's own
        """
        self._steps, self._epochs = tuple(steps), 0
        self._model: nn.Module | None = None
        self._any: sides.AnySide | None = None
        self._side: int | None = None
        self._macs = 0.0

    def attach(self, training: Training) -> None:
        check(training.model, self._steps, place=f"{training.place}.sides")
        self.leave()
        self._epochs, self._model = training.recipe.epochs, training.model
        self._any = sides.AnySide(training.model)
        self._count()  # in the middle of an epoch, where the model was replaced

    def leave(self) -> None:
        if self._any is not None:
            self._any.remove()
        self._any = self._model = None

    def before_epoch(self, epoch: Epoch) -> Epoch:
        step = at(self._steps, epoch.number, self._epochs)
        self._side = None if step is None else int(step[1])
        self._count()
        strength = step[2] if step is not None and len(step) > 2 else epoch.strength
        return dataclasses.replace(epoch, side=self._side, strength=strength)

    def macs(self, macs: float) -> float:
        return self._macs

    def summary(self) -> dict[str, float]:
        return {"side": float(self._side)} if self._side is not None else {}

    def _count(self) -> None:
        assert self._model is not None, "attached first"
        self._macs = float(outline(self._model, self._side).cost().macs)
