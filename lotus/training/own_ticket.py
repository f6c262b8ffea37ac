"""A training that is its own proxy: what it says of each image is recorded until it is cut, and who trains on is drawn from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from lotus.training.dynamics import Recorder
from lotus.training.evaluation import at_once
from lotus.training.guests import Epoch, Guest, Position, Rows, Seen, Training, Turn
from lotus.training.shrink import by_main

Draw = Callable[[Mapping[str, np.ndarray], Rows], tuple[Rows, np.ndarray]]
"""What was said of each image, (E, N) by the names of :data:`selection.signals.VOCABULARY`, and (U,) rows that no epoch has shown ->
(K,) rows that train on, (K,) their weights."""


class OwnTicket(Guest):
    """Records every batch until the ticket is due at the end of an epoch, and lets nobody else train from then on.

    Its turn is that of those who watch, so that a loss is what the model said; recording it costs no pass.
    """

    name = "own_ticket"
    turn = Turn.WATCH

    def __init__(self, recorder: Recorder, draw: Draw, due: Callable[[], bool]) -> None:
        """
        Args:
            recorder: of at least as many epochs as end before the draw
            draw: is asked once, on rank 0
            due: whether the ticket is to be drawn now that an epoch has ended
        """
        self._recorder, self._draw, self._due = recorder, draw, due
        self.rows: Rows | None = None
        """(K,) of the ticket; None: it is not drawn yet."""
        self._weights = np.zeros(0, np.float32)
        self._all: Rows | None = None

    def attach(self, training: Training) -> None:
        self._world = training.world
        if self._all is None:  # later the plan may have what an epoch is left with
            self._all = training.plan.rows

    def before_epoch(self, epoch: Epoch) -> Epoch:
        return epoch if self.rows is None else dataclasses.replace(epoch, rows=self.rows, weights=self._weights)

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        if self.rows is None:
            self._recorder.add(seen.batch.index, seen.logits, seen.batch.labels)
        return losses

    def end_epoch(self, epoch: int) -> None:
        if self.rows is None:
            self._recorder.end(epoch, self._world)

    def close_epoch(self, at: Position) -> Iterable[str]:
        # Not sooner: whoever is stopped while evaluating does this epoch's end again.
        if self.rows is not None or not self._due():
            return

        unseen = self._recorder.unseen()
        out = np.intersect1d(unseen, self._all if self._all is not None else [])  # the others were not to train

        def drawn() -> dict[str, Tensor]:
            with at_once():  # a picker may take long, and looks at no flag
                rows, weights = self._draw(self._recorder.signals(of_all=len(out) >= self._world.size), unseen)
            return {"rows": torch.from_numpy(rows), "weights": torch.from_numpy(weights)}

        ticket = by_main(self._world, drawn)
        self.load_state(ticket)
        rest = len(ticket["rows"]) % self._world.size
        sits = f", {rest} of them sitting each epoch out" if rest else ""
        yield f"the ticket is drawn from what was said so far: {len(ticket['rows']):,} images train on{sits}"
        if len(out):
            yield f"{len(out)} of the images sat out, as {self._world.size} ranks share a step evenly, and the ticket goes without"

    def state(self) -> dict[str, Tensor]:
        if self.rows is None:
            return self._recorder.state(self._world)
        return {"rows": torch.from_numpy(self.rows), "weights": torch.from_numpy(self._weights)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if "rows" not in state:
            return self._recorder.load_state(dict(state), self._world)
        self.rows, self._weights = (state[name].cpu().numpy().copy() for name in ("rows", "weights"))
        return None
