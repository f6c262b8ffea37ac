"""How strongly gates are pressed: lambda, and whether their budget is met. What it does and why stands in :mod:`lotus.sparsity.gates`.

All of it is arithmetic on the gates' own device, in float64: a GPU is never waited for. On a CPU, where a look costs nothing, it is
left out where it would change nothing.

G gates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lotus.sparsity.gate_macs import Macs

EVERY = 5  # optimizer steps between two corrections of lambda
_FASTEST = 2.5  # lambda grows or shrinks at most by this factor at a look while the target is ahead
_ARRIVAL = 0.85  # fraction of training by which the budget should be met, so that the rest can settle
LARGEST = 1e3  # of lambda: far beyond any step of Adam, so that no gate leaves zero


class Steering:
    """Lambda, and where steering stands."""

    def __init__(self, strength: float, *, target: float | None, macs: Macs, by_count: bool, tau: float) -> None:
        """
        Args:
            strength: lambda, to begin with
            target: fraction that is to stay open; None: lambda is not steered
            macs: what closing gates saves
            by_count: the fraction is of the gates, not of the MACs
            tau: a gate of at most this size counts as closed
        """
        self.target, self._macs, self._by_count, self._tau = target, macs, by_count, tau
        self.device = macs.device
        # lambda; whether the budget is met; size of the gate at the budget's edge and progress (below 0: not yet), when last looked
        self._state = torch.tensor([strength, 0.0, 1.0, -1.0], dtype=torch.float64, device=self.device)
        self.presses = strength > 0

    @property
    def strength(self) -> float:
        """Lambda, as it is pressed on all gates until the budget is met; read from the device."""
        return float(self._state[0])

    @property
    def met(self) -> bool:
        """Whether the open gates are within the budget; read from the device."""
        return bool(self._state[1])

    def pressure(self, values: Tensor) -> float | Tensor:
        """Lambda of each gate, or one for all."""
        if self.device.type == "cpu" and not self.met:
            return self.strength
        strength, met = self._state[0], self._state[1] > 0
        closed = values.abs() <= self._tau
        held = (closed * (strength if self._tau else LARGEST)).to(values.dtype)
        return held if self.device.type == "cpu" else torch.where(met, held, strength.to(values.dtype))

    def look(self, values: Tensor, before: Tensor, progress: float, lr: float, *, due: bool) -> None:
        """After a step: is the budget met? And, where lambda is ``due`` to be corrected, how much of it is needed?

        Close to the budget each step is looked at, so as not to run past it.

        Args:
            values: (G,) the gates, of which some may be opened again
            before: (G,) what they were before the step
            progress: fraction of the training that is done
            lr: the gates' rate at this step
            due: see above
        """
        assert self.target is not None
        strength, was_met, old_edge, looked = self._state.unbind()
        near = (was_met == 0) & (old_edge < 2 * EVERY * lr * strength.clamp(min=1.0))
        if self.device.type == "cpu" and not (due or bool(near)):
            return
        sizes = values.abs()
        order, count = self._first_within(sizes)
        edge = sizes.index_select(0, order.index_select(0, count - 1)).double().squeeze(0)
        now_met = edge <= self._tau
        looks = near | due  # of a GPU the host does not know
        arrived = looks & now_met & (was_met == 0)
        if self.device.type != "cpu" or bool(arrived):
            self._reopen(values, sizes, before, arrived)
        met = torch.where(looks, now_met, was_met > 0)
        if due:
            self.presses = True
            factor = self._factor(edge, old_edge, looked, progress)
            corrected = (strength.clamp(min=1e-6) * factor).clamp(max=LARGEST)  # a start at 0 would stay there
            strength = torch.where(met, strength, corrected)
            old_edge = torch.where(met, old_edge, edge)
            looked = torch.where(met, looked, progress)
        self._state.copy_(torch.stack([strength, met.double(), old_edge, looked]))

    def state(self) -> Tensor:
        """(4,) on the CPU."""
        return self._state.cpu().clone()

    def load_state(self, state: Tensor) -> None:
        """Take up what :meth:`state` gave."""
        self._state.copy_(state)
        self.presses = bool(state[0] > 0)

    def first_within(self, sizes: Tensor) -> Tensor:
        """The gates that meet the budget when closed, in ascending order of ``sizes`` (G,) and not one more; indices."""
        order, count = self._first_within(sizes)
        return order[: int(count)]

    def _reopen(self, values: Tensor, sizes: Tensor, before: Tensor, arrived: Tensor) -> None:
        """The last step closed some more than the budget asks for: those that were largest before it stay open."""
        closed = sizes <= self._tau
        order, count = self._first_within(torch.where(closed, before.abs(), math.inf))
        again = closed & (_ranks(order) >= count) & arrived
        values.copy_(torch.where(again, before, values))

    @staticmethod
    def _factor(edge: Tensor, old_edge: Tensor, looked: Tensor, progress: float) -> Tensor:
        fell = (old_edge - edge) / (progress - looked)
        # A little beyond zero, so that it arrives with speed and does not creep; past the date, or shortly before it, hurried no
        # more than over a twentieth of training.
        wanted = (edge + 0.1) / max(_ARRIVAL - progress, 0.05)
        asked = torch.where(fell <= 0, _FASTEST, (wanted / fell).sqrt().clamp(1 / _FASTEST, _FASTEST))
        return torch.where((looked >= 0) & (looked < progress), asked, 1.0)

    def _first_within(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (G,) in ascending order of ``sizes``, and (1,) how many of them have to be closed."""
        assert self.target is not None
        order, most = sizes.argsort(stable=True), len(sizes)
        if self._by_count:
            closed = max(1, most - max(1, math.floor(self.target * most + 1e-9)))
            return order, torch.full((1,), closed, dtype=torch.int64, device=self.device)
        if self._macs.costs is not None:
            left = 1 - self._macs.costs[order].cumsum(0)  # (G,) MACs left when the gates up to here are closed
            return order, ((left > self.target).sum() + 1).clamp(max=most).view(1)
        ranks = _ranks(order)
        low, high = (torch.full((), end, dtype=torch.int64, device=self.device) for end in (1, most))
        for _ in range(most.bit_length()):  # what closing k gates leaves falls with k
            middle = (low + high) // 2
            within = self._macs.left(ranks >= middle) <= self.target
            open_yet = low < high
            low = torch.where(open_yet & ~within, middle + 1, low)
            high = torch.where(open_yet & within, middle, high)
        return order, low.view(1)


def _ranks(order: Tensor) -> Tensor:
    """(G,) the place of each gate in ``order``."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
