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

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from lotus.training.average import LateAverage
from lotus.training.guests import Guest, Position, Seen, Training, Turn

_FEWEST, _TOLD = 8, 3
"""Steps before one is judged; spikes that are told by number."""

if TYPE_CHECKING:
    from torch import nn


def late_average(*, start: float = 0.75, every: int = 5) -> Guest:
    """The plain mean of the weights over the last part of the training (SWA, 1803.05407; LAWA, 2209.14981).

    Args:
        start: fraction of the training before the first weights are taken
        every: steps between two that are taken
    """
    return LateAverage(start, every)


def hardest(
    model: nn.Module, classes: int, seed: int, *, keep: float = 0.5, proxy: float = 0.1, lr: float = 1e-3
) -> Guest:
    """The hardest part of each batch, as a narrower model sees it that trains along (airbench96). One process.

    Args:
        keep: fraction of a batch that is trained on
        proxy: fraction of the model's MACs that the narrower one has; it goes through all images, and is billed
        lr: of the narrower one, by AdamW
    """
    from lotus.training.hardest import Hardest, proxy_of

    return Hardest(proxy_of(model, classes, proxy, seed), keep, lr)


def loss_spikes(*, times: Annotated[float, Field(gt=0)] = 8.0, window: Annotated[int, Field(ge=_FEWEST)] = 50) -> Guest:
    """Which steps' loss jumped, and the image that had most of it: after each epoch, in words. The training is left as it is.

    A step's loss is the mean over its images on all ranks, before penalties and weights. It jumps where it lies above the median
    of the ``window`` steps before it by more than ``times`` their spread, 1.4826 times the median distance from that median (of
    a normal distribution that is its standard deviation). A spike that comes back with the same image is that image's;
    one with any images asks for a lower rate or a smaller ``clip``.

    Args:
        times: of the spread
        window: steps, of earlier epochs too; the first eight of the training are not judged
    """
    return LossSpikes(times, window)


class LossSpikes(Guest):
    """Remembers each step's loss, and tells which jumped."""

    name = "loss_spikes"
    turn = Turn.WATCH

    def __init__(self, times: float, window: int) -> None:
        self._times, self._window = times, window
        self._parts: list[Tensor] = []  # of the step under way, a micro-batch each
        self._steps: list[Tensor] = []  # (5,) each: number, sum of losses, images, highest loss, its row
        self._old = 0  # of them those of earlier epochs

    def attach(self, training: Training) -> None:
        self._world = training.world

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        found = losses.detach().double()
        highest, at = found.max(0)
        row = seen.batch.index.to(found.device)[at].double()
        self._parts.append(torch.stack([found.sum(), torch.full_like(highest, len(found)), highest, row]))  # no wait
        return losses

    def after_step(self, at: Position, progress: float, finite: bool) -> None:
        if finite:  # else the loop has told it
            parts = torch.stack(self._parts)
            which = parts[:, 2].argmax()
            number = torch.full_like(parts[0, 0], at.step)
            self._steps.append(torch.stack([number, *parts[:, :2].sum(0), *parts[which, 2:]]))
        self._parts = []

    def close_epoch(self, at: Position) -> Iterable[str]:
        table = self._of_all_ranks()
        found = [told for now in range(self._old, len(table)) if (told := self._judged(table, now))]
        self._steps = self._steps[-self._window :]
        self._old = len(self._steps)
        if found:
            more = f", and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
            yield f"{len(found)} loss spike{'s' if len(found) > 1 else ''}: {'; '.join(found[:_TOLD])}{more}"

    def _judged(self, table: npt.NDArray[np.float64], now: int) -> str:
        """What is told of a step; nothing where its loss is as usual."""
        means = table[max(0, now - self._window) : now + 1, 1] / table[max(0, now - self._window) : now + 1, 2]
        before, loss = means[:-1], means[-1]
        if len(before) < _FEWEST:
            return ""
        usual = np.median(before)
        if loss <= usual + self._times * 1.4826 * np.median(np.abs(before - usual)):
            return ""
        number, _, _, highest, row = table[now]
        return f"step {number:.0f}, {loss:.3g} where {usual:.3g} is usual (row {row:.0f}: {highest:.3g})"

    def _of_all_ranks(self) -> npt.NDArray[np.float64]:
        """(S, 5) of the steps that are remembered."""
        own = torch.stack(self._steps) if self._steps else torch.empty(0, 5, dtype=torch.float64)
        ranks = np.stack([part.numpy().reshape(-1, 5) for part in self._world.gather(own.flatten())])  # (R, S, 5)
        worst = ranks[ranks[:, :, 3].argmax(0), np.arange(ranks.shape[1])]
        return np.concatenate([worst[:, :1], ranks[:, :, 1:3].sum(0), worst[:, 3:]], axis=1)

    def state(self) -> dict[str, Tensor]:
        return {"steps": torch.from_numpy(self._of_all_ranks()), "old": torch.tensor(self._old)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        steps, self._old = state["steps"].to(self._world.device, copy=True), int(state["old"])
        if not self._world.is_main:  # rank 0 has what all had
            steps[:, 1:3], steps[:, 3] = 0, -torch.inf
        self._steps = list(steps.unbind())
