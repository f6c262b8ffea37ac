"""Balanced sampling: each epoch sees every class as often, or by the root of its size."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from lotus.data.sample_plan import balanced
from lotus.training.guests import Epoch, Guest, Turn


class BalancedClasses(Guest):
    """Draws each epoch's rows anew, so that small classes come as often as ``how`` says; see
    :func:`lotus.data.sample_plan.balanced`. The epoch stays as long as it is.

    Args:
        how: ``"equal"`` or ``"sqrt"``
        labels: (N,) of the data set
        seed: the draw is a function of it and of the epoch
    """

    name = "balance"
    turn = Turn.WATCH

    def __init__(self, how: str, labels: npt.NDArray[np.int64], seed: int) -> None:
        self._how, self._labels, self._seed = how, labels, seed

    def before_epoch(self, epoch: Epoch) -> Epoch:
        drawn = balanced(self._labels[epoch.rows], self._how, seed=self._seed, epoch=epoch.number)
        weights = None if epoch.weights is None else epoch.weights[drawn]
        return dataclasses.replace(epoch, rows=epoch.rows[drawn], weights=weights, repeats=True)
