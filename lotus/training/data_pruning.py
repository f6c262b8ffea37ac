"""Dynamic data pruning (selection/dynamic_pruning.py), fed by a training: who trains next, and what they said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lotus.config import Dynamic
from lotus.training import guests
from lotus.training.distributed import World
from lotus.training.guests import Epoch, Guest, Position, Training, Turn
from selection.dynamic_pruning import EpochSubset, Seen, State, choose, epoch_subset
from selection.errors import Refused


class DynamicSelection:
    """Draws each epoch's images out of the rows of a ticket, and remembers the loss of each that trained.

    A loss is taken as it is before any weight. With mixup or CutMix on, it is that of the image's own mixed input against its
    own mixed target: half of a hard image makes an easy one harder. (So it is in InfoBatch as published.)

    Every rank draws the same, out of what all ranks saw; they tell each other once an epoch.
    """

    def __init__(
        self,
        settings: Dynamic,
        *,
        rows: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        epochs: int,
        seed: int,
        shelves: Sequence[ModuleType] = (),
        place: str = "dynamic",
    ) -> None:
        """
        Args:
            rows: (K,) the ticket's, of the data set's N
            labels: (N,)
            place: where ``settings`` stand

        Raises:
            Refused: see :func:`selection.dynamic_pruning.choose`.
        """
        self.rows, self.epochs = np.sort(rows), epochs
        self._settings, self._seed, self._shelves, self._where = settings, seed, shelves, place
        self._keep = choose(pick=settings, keep=settings.keep, epochs=epochs, shelves=shelves, place=place)
        self._state = State(labels[self.rows])
        self._place = np.full(len(labels), -1, np.int64)  # of each row in the ticket
        self._place[self.rows] = np.arange(len(self.rows))
        self._told: list[tuple[Tensor, Tensor]] = []  # left on the device: reading them would make a GPU wait

    def draw(self, epoch: int) -> EpochSubset:
        """The rows of ``epoch``, of the data set's, and their weights; the same however often it is asked."""
        drawn = epoch_subset(
            self._state,
            pick=self._settings,
            epoch=epoch,
            epochs=self.epochs,
            keep=self._keep,
            seed=self._seed,
            shelves=self._shelves,
            place=self._where,
        )
        return EpochSubset(self.rows[drawn.rows], drawn.weights)

    def add(self, index: Tensor, losses: Tensor) -> None:
        """Take in a batch: (B,) row numbers, and the loss of each before weights."""
        self._told.append((index, losses.detach()))

    def end(self, epoch: int, world: World) -> None:
        """Close ``epoch``: the ranks tell each other what they saw. Every rank must call."""
        self._state.end(epoch, self._parts(world))

    def saved(self, images: int, epochs: int) -> float:
        """The fraction of the passes of ``epochs`` epochs over the whole ticket that was saved, when ``images`` were made."""
        return 1 - images / (epochs * len(self.rows))

    def state(self, world: World) -> dict[str, Tensor]:
        """All that a resumed training needs, what the ranks saw of the epoch under way included; every rank must call."""
        parts = self._parts(world)
        arrays = self._state.arrays()
        for rows, losses, below in parts:
            arrays["now"][rows], arrays["now_below"][rows] = losses, below
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state(self, state: Mapping[str, Tensor], world: World) -> None:
        """Take up what :meth:`state` gave, on any number of ranks.

        Raises:
            Refused: it is of other images.
        """
        arrays: dict[str, Any] = {name: value.numpy() for name, value in state.items()}
        if not world.is_main:  # what all ranks saw lies on one of them
            arrays["now"] = np.full_like(arrays["now"], np.nan)
            arrays["now_below"] = np.zeros_like(arrays["now_below"])
        found = State.of(arrays, place=self._where)
        if not np.array_equal(found.labels, self._state.labels):
            raise Refused(f"{self._where}: the checkpoint is of other images. Begin the training anew.")
        self._state, self._told = found, []

    def _parts(self, world: World) -> list[Seen]:
        """What every rank saw in the epoch under way, in the order of the ranks."""
        if self._told:  # read in one piece: each makes a GPU wait
            sizes = [len(index) for index, _ in self._told]
            rows, whole = (torch.cat(parts).cpu().split(sizes) for parts in zip(*self._told, strict=True))
            for index, losses in zip(rows, whole, strict=True):
                self._state.add(self._place[index.numpy()], losses.float().numpy())
        self._told = []
        mine = self._state.pending()
        if world.size == 1:
            return [mine]
        told = [world.gather(torch.from_numpy(np.ascontiguousarray(part))) for part in mine]
        return [Seen(*(part.numpy() for part in parts)) for parts in zip(*told, strict=True)]


class DynamicPruning(Guest):
    """Lets a lottery say which rows each epoch of a training goes through, and what they weigh besides the ticket's weights."""

    name = "dynamic"
    turn = Turn.WATCH

    def __init__(self, dynamic: DynamicSelection) -> None:
        self._dynamic = dynamic
        self._drawn = 0

    def attach(self, training: Training) -> None:
        self._world = training.world

    def before_epoch(self, epoch: Epoch) -> Epoch:
        drawn = self._dynamic.draw(epoch.number)
        self._drawn = len(drawn.rows)
        return dataclasses.replace(epoch, rows=drawn.rows, weights=drawn.weights)

    def losses(self, losses: Tensor, seen: guests.Seen) -> Tensor:
        self._dynamic.add(seen.batch.index, losses)
        return losses

    def close_epoch(self, at: Position) -> Iterable[str]:
        # Not sooner: whoever is stopped while evaluating must draw this epoch again.
        self._dynamic.end(at.epoch, self._world)
        saved = self._dynamic.saved(at.images, at.epoch + 1)
        yield f"{self._drawn:,} of {len(self._dynamic.rows):,} images, {100 * saved:.1f} % of all passes saved"

    def state(self) -> dict[str, Tensor]:
        return self._dynamic.state(self._world)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._dynamic.load_state(state, self._world)
