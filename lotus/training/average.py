"""Averages of the weights: what is measured and kept in place of where the last step ended."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lotus.training.engine import Engine
from lotus.training.finite import Answer
from lotus.training.guests import Guest, Position, Training
from selection.errors import Refused


class Average:
    """An average of the weights, in fp32, each rank of its own masters; it begins with those of now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = [master.detach().clone() for master in engine.masters]

    def take(self, part: float) -> None:
        """Go ``part`` of the way to the weights of now."""
        with torch.no_grad():
            torch._foreach_lerp_(self._numbers, self._engine.masters, part)

    def carried(self) -> contextlib.AbstractContextManager[None]:
        """The engine's model with the average as its weights, for the length of a ``with``."""
        return self._engine.carrying(self._numbers)

    def weights(self) -> dict[str, Tensor]:
        """The average as a whole state dict; every rank must call."""
        with self.carried():
            return self._engine.weights()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`weights` gave."""
        with self.carried():
            self._engine.load_weights(weights)
            self._numbers = [master.detach().clone() for master in self._engine.masters]


def moving(decay: float, steps: int) -> float:
    """What part of the weights after ``steps`` steps, from 1, goes into a moving average: 1 - decay, where that rises to ``decay`` as
    (1 + t) / (10 + t), so that a short training is not averaged with its start (TensorFlow's
    ``ExponentialMovingAverage(num_updates=...)``)."""
    return 1 - min(decay, (1 + steps) / (10 + steps))


class MovingAverage(Guest):
    """An exponential moving average over all steps; it begins anew where the model is replaced."""

    name = "average"

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def attach(self, training: Training) -> None:
        self._average = Average(training.engine)

    def after_step(self, at: Position, progress: float, finite: bool | Answer) -> None:
        self._average.take(moving(self._decay, at.step))  # of a step that was none, too: what stands is finite

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return self._average.carried()

    def weights(self) -> dict[str, Tensor]:
        return self._average.weights()

    def state(self) -> dict[str, Tensor]:
        return self._average.weights()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._average.load_weights(state)


class LateAverage(Guest):
    """The plain mean of the weights, taken every few steps over the last part of the training."""

    name = "late_average"

    def __init__(self, start: float, every: int) -> None:
        """
        Args:
            start: fraction of the training before the first weights are taken, in [0, 1)
            every: steps between two that are taken

        Raises:
            Refused: a start outside of the training.
        """
        if not 0 <= start < 1 or every < 1:
            raise Refused(f"late_average: start {start:g} is in [0, 1), and every {every} at least 1.")
        self._start, self._every, self._taken = start, every, 0

    def attach(self, training: Training) -> None:
        if training.engine.stage == 3:
            raise Refused(
                f"{training.place}.guests: late_average: under ZeRO 3 no rank has the weights. Use ZeRO 0 to 2."
            )
        self._average, self._taken = Average(training.engine), 0

    def after_step(self, at: Position, progress: float, finite: bool | Answer) -> None:
        if progress >= self._start and at.step % self._every == 0:
            self._taken += 1
            self._average.take(1 / self._taken)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return self._average.carried() if self._taken else contextlib.nullcontext()

    def weights(self) -> dict[str, Tensor] | None:
        return self._average.weights() if self._taken else None

    def state(self) -> dict[str, Tensor]:
        return {**self._average.weights(), _TAKEN: torch.tensor(self._taken)} if self._taken else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._taken = int(state[_TAKEN])
        self._average.load_weights({name: value for name, value in state.items() if name != _TAKEN})


_TAKEN = "late_average.taken"
"""Beside the weights' names in a checkpoint."""
