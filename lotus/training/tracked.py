"""A guest that tells a service of the user's own how a training goes; the services are on the shelf :mod:`lotus.training.trackers`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from lotus.training.finite import Answer
from lotus.training.guests import Guest, Position, Seen, Training
from selection.errors import Refused

Tell = Callable[[Mapping[str, float], int], object]
"""Values by name, and the step that they are of."""


class Tracked(Guest):
    """Tells a service: ``train/loss``, ``train/images`` and ``train/seconds``; ``validation/top1`` and ``validation/loss``."""

    def __init__(self, name: str, begin: Callable[[], tuple[Tell, Callable[[], object]]], every: int) -> None:
        """
        Args:
            begin: opens the service's run; returns how it is told, and how it ends
            every: steps between two that are told
        """
        self.name = name  # type: ignore[misc]  # there may be two
        self._begin, self._every = begin, every
        self._tell: Tell | None = None
        self._end: Callable[[], object] | None = None
        self._main = False
        self._loss: Tensor | float = 0.0
        self._images = 0

    def attach(self, training: Training) -> None:
        if not training.world.is_main or self._tell is not None:
            return
        self._main, self._place = True, training.place
        try:
            self._tell, self._end = self._begin()
        except Refused as missing:
            raise Refused(f"{training.place}.guests: {missing}") from None

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        if self._main:
            self._loss = self._loss + losses.detach().sum()  # not read here
            self._images += len(losses)
        return losses

    def after_step(self, at: Position, progress: float, finite: bool | Answer) -> None:
        if self._tell is None or at.step % self._every:
            return
        mean = float(self._loss) / max(1, self._images)
        self._loss, self._images = 0.0, 0
        self._tell(_sound({"train/loss": mean, "train/images": at.images, "train/seconds": at.seconds}), at.step)

    def close_epoch(self, at: Position) -> Iterable[str]:
        if self._tell is not None:
            values = {"validation/top1": at.top1, "validation/loss": at.loss, "epoch": at.epoch + 1}
            self._tell(_sound(values), at.step)
        return ()

    def leave(self) -> None:
        if self._end is not None:
            self._end()
        self._tell = self._end = None


def _sound(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
