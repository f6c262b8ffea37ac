"""What a checkpoint of a training is made of, out and in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from lotus.training.checkpoint import Checkpoint, Checkpoints, check_fits, taken_up
from lotus.training.engine import Engine
from lotus.training.guests import Guest, Position, name_of
from lotus.training.spikes import Passed


class Book:
    """The checkpoints of a training, its engine and its guests."""

    def __init__(self, guests: Sequence[Guest], checkpoints: Checkpoints) -> None:
        self._guests, self._checkpoints = guests, checkpoints

    def save(self, at: Position, engine: Engine) -> Path:
        """Every rank must call: the engine's state lies on all of them."""
        tensors: dict[str, Mapping[str, Tensor]] = {"weights": engine.weights(), "moments": engine.moments()}
        for guest in self._guests:
            if state := guest.state():
                tensors[name_of(guest)] = state
        return self._checkpoints.save(tensors, dataclasses.asdict(at))

    def find(self, over: Passed) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
        """The checkpoint to go on from, where these steps are passed over, and sentences (with their level) about it."""
        checkpoint, passed = self._checkpoints.latest(over.why_not)
        notes = [(text, "warning") for text in passed]
        if checkpoint is not None:
            notes.append((f"goes on after step {checkpoint.state['step']}, from {checkpoint.path}", "info"))
        return checkpoint, notes

    def rebuilt(self, model: nn.Module, found: Checkpoint) -> nn.Module:
        """The model that ``found`` is of, as the guests say."""
        for guest in self._guests:
            guest.detach()
        with taken_up(found):
            for guest in self._guests:
                model = guest.rebuilt(model, found.tensors.get(name_of(guest), {}))
        return model

    def restore(self, found: Checkpoint, engine: Engine) -> Position:
        """Take it up; says where to go on."""
        check_fits(found, engine.shapes())
        with taken_up(found):
            engine.load_weights(found.tensors["weights"])
            engine.load_moments(found.tensors["moments"])
            for guest in self._guests:
                if (state := found.tensors.get(name_of(guest))) is not None:
                    guest.load_state(state)
            return Position(**found.state)
