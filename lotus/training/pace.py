"""How far a training is, and when to tell of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lotus.events import Step
from lotus.training.guests import Guest, Position
from lotus.training.peak import peak

if TYPE_CHECKING:
    from lotus.data import sample_plan
    from lotus.data.base import Batch
    from lotus.training.distributed import World

_SHOW_SECONDS = 0.25
FLOPS = 6
"""A multiply-accumulate of the forward pass in a training step: two operations, and twice as many again in the backward pass."""


@dataclass(frozen=True)
class StepCount:
    """How far a training is, in steps of the epoch at hand.

    Every epoch is as long a part of the schedules as any other, however many steps dynamic data pruning gives it: how many the
    later ones will have, nobody knows. Steps that were not finite do not count. Where all epochs have the same number of
    steps, :meth:`gone` is the number of steps that moved the weights.
    """

    steps: int
    """Of this epoch."""
    before: int
    """Steps that were tried in the epochs before it."""
    total: int
    """Of all epochs, if those after this one have as many."""
    epochs: int

    @classmethod
    def of(cls, steps: Sequence[sample_plan.Step], at: Position, epochs: int) -> StepCount:
        """At ``at``, in an epoch of these steps."""
        before = at.step - sum(step.number < at.epoch_step for step in steps)
        return cls(len(steps), before, before + len(steps) * (epochs - at.epoch), epochs)

    def gone(self, at: Position) -> int:
        return max(0, at.epoch * self.steps + at.step - self.before - (at.step - at.applied))

    def progress(self, at: Position) -> float:
        """Fraction of the training that is done, 0 to 1."""
        return self.gone(at) / (self.epochs * self.steps)


class Pace:
    """When to tell of a step, and what: the mean loss of rank 0's images and the speed of all since it last told."""

    def __init__(self, stage: str, world: World, clock: Callable[[], float]) -> None:
        self._stage, self._ranks, self._clock = stage, world.size, clock
        self.peak = peak(world.device)
        self._ticked = self._told = clock()
        self._loss: Tensor | float = 0.0
        self._images, self._seconds, self._waited = 0, 0.0, 0.0

    def resume(self) -> None:
        """Time before this does not count."""
        self._ticked = self._clock()

    def spent(self) -> float:
        """Seconds since this, or :meth:`resume`, was last called."""
        now = self._clock()
        seconds, self._ticked = now - self._ticked, now
        self._seconds += seconds
        return seconds

    def fed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """``batches``, and how long each was waited for."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def saw(self, loss: Tensor, images: int) -> None:
        self._loss = self._loss + loss  # not read here: a GPU would have to be waited for
        self._images += images

    def forget(self) -> None:
        """Begin anew."""
        self._loss, self._images, self._seconds, self._waited = 0.0, 0, 0.0, 0.0

    def due(self, *, last: bool) -> bool:
        return last or self._clock() - self._told >= _SHOW_SECONDS

    def event(self, at: Position, lr: float, guests: Sequence[Guest], total: int, macs: float = 0.0) -> Step:
        """
        Args:
            at: where the training is
            lr: rate of the last step
            guests: who have their summaries told
            total: steps of the training
            macs: of an image's forward pass; 0: not known
        """
        speed = self._images * self._ranks / self._seconds if self._seconds else 0.0
        values = {
            "epoch": float(at.epoch + 1),
            "loss": float(self._loss) / max(self._images, 1),
            "lr": lr,
            "images_per_second": speed,
            **({"stall": min(1.0, self._waited / self._seconds)} if self._seconds else {}),
            **({"mfu": FLOPS * macs * speed / (self.peak * self._ranks)} if self.peak and macs else {}),
            **{name: value for guest in guests for name, value in guest.summary().items()},
        }
        self.forget()
        self._told = self._clock()
        return Step(self._stage, at.step, total, values=values)
