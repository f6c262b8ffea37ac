"""Sparsity regularization in a training: gates that learn beside the weights, and a search that ends early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from lotus.training.finite import Answer
from lotus.training.guests import Guest, Position, Training

if TYPE_CHECKING:
    from lotus.sparsity.gates import Gates


class Gated(Protocol):
    """What is learned outside of the model, the engine and the optimizer; see :class:`lotus.sparsity.gates.Gates`."""

    def step(self, progress: float, reduce: Callable[[Tensor], Any] | None = None) -> None: ...

    def skip(self) -> None: ...

    def summary(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Gating(Guest):
    """Moves gates after each step that moved the weights."""

    name = "gates"

    def __init__(self, gates: Gated) -> None:
        self._gates = gates

    def attach(self, training: Training) -> None:
        self._reduce = training.world.mean_ if training.world.size > 1 else None

    def after_step(self, at: Position, progress: float, finite: bool | Answer) -> None:
        if finite:
            self._gates.step(progress, self._reduce)
        else:
            self._gates.skip()

    def summary(self) -> dict[str, float]:
        return self._gates.summary()

    def state(self) -> dict[str, Tensor]:
        return self._gates.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._gates.load_state(dict(state))


class EarlyBird(Guest):
    """Ends a training once the masks of its gates have settled. What it knows lies in the gates' state."""

    def __init__(self, gates: Gates) -> None:
        self._gates = gates

    def attach(self, training: Training) -> None:
        self._epochs = training.recipe.epochs

    def end_epoch(self, epoch: int) -> None:
        self._gates.end_epoch(epoch)

    def ended(self) -> bool:
        return self._gates.settled()

    def close_epoch(self, at: Position) -> Iterable[str]:
        if self._gates.settled() and at.epoch + 1 < self._epochs:
            moved = ", ".join(f"{one:.3f}" for one in self._gates.distances())
            yield f"the masks have settled (they moved by {moved}), so the search ends here"
