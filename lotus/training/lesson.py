"""An optimizer step up to the moment when the weights move: what is shown, and what it costs.

Letters: B batch, C classes, K rows of an epoch, N rows of the data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lotus.training.distributed import World
from lotus.training.engine import Engine
from lotus.training.guests import Epoch, Guest, Micro, Position, Seen
from lotus.training.objective import Objective

if TYPE_CHECKING:
    from lotus.data.base import Batch
    from lotus.data.sample_plan import SamplePlan


@dataclass(frozen=True)
class Lesson:
    """An optimizer step up to the moment when the weights move."""

    engine: Engine
    plan: SamplePlan
    objective: Objective
    guests: Sequence[Guest] = ()
    counts: Tensor | None = None
    """(N,) what each row counts in the loss; None for 1 each."""

    def give(self, batches: Iterator[Batch], at: Position, parts: int) -> tuple[Tensor, int]:
        """Forward and backward through ``parts`` micro-batches: the sum of this rank's losses, and of how many images."""
        world = self.engine.world
        _seed(_hash(self.objective.seed, at.step, world.rank), world.device)
        losses, images = [], 0
        for part in range(parts):
            number, last = at.epoch_step * self.plan.accumulate + part, part == parts - 1
            micro = Micro(at.epoch, number, world, self.objective, last)
            batch = next(batches)
            for guest in self.guests:
                batch = guest.show(batch, micro)
            loss = self._loss(batch, micro)
            self.engine.backward(loss / self.plan.micro, last=last)
            losses.append(loss.detach())
            images += len(batch.labels)
        return torch.stack(losses).sum(), images

    def _loss(self, batch: Batch, micro: Micro) -> Tensor:
        """Sum over the micro-batch of each image's loss, times what the image counts."""
        images, targets = micro.mixed(batch.images, batch.labels)
        logits = self.engine.forward(images)  # (B, C)
        losses = self.objective.losses(logits, targets)  # (B,)
        seen = Seen(batch, images, logits)
        for guest in self.guests:
            losses = guest.losses(losses, seen)
        if self.counts is not None:
            losses = losses * self.counts[batch.index]
        return losses.sum()


def counts_of(weights: npt.NDArray[np.float32] | None, epoch: Epoch | None, world: World) -> Tensor | None:
    """(N,) what each row counts: its weight in the ticket times what an epoch says of it; None for 1 each."""
    if epoch is None or epoch.weights is None:
        return None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=world.device)
    rows, own = epoch.rows, epoch.weights
    counts = np.zeros(1 + int(rows.max()) if weights is None else len(weights), np.float32)
    counts[rows] = own if weights is None else weights[rows] * own
    return torch.as_tensor(counts, device=world.device)


def _seed(seed: int, device: torch.device) -> None:
    """torch.manual_seed for the devices that are used; that one takes a millisecond where a GPU was never touched."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _hash(*numbers: int) -> int:
    """63 bits that look random, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1
