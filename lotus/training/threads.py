"""How many threads a training computes with.

A small model's operations take less time than two threads take to meet; and sums in another order have other last digits. So the
number follows from the model and the machine alone, not from a clock: the same seed on the same machine is the same training,
whoever else is at work, and a checkpoint knows with how many it began. How they wait for each other is set where a command
begins (:func:`lotus.cli.main`): asleep, since threads that wait by spinning keep each other off the cores of a machine that
has other work, and a training becomes a hundred times slower.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from lotus.data import cores
from lotus.training.distributed import World
from lotus.vit import anatomy
from lotus.vit.cost import count

A_THREAD = 60e6
"""Multiply-accumulates of a block's forward pass over a micro-batch, for each of which there is a thread more than one. At so many
two threads are 1.4 to 1.6 times as fast as one, and beside a busy process 2.5 to 2.7 times slower than alone (128 x 6: 2.0)."""

_USERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def take(model: nn.Module, images: int, world: World, began_with: int = 0) -> int:
    """Let torch compute with as many threads as ``model`` is worth, in this process; returns how many it had before.

    What the user has set in the environment stays, and so does torch's own number where a GPU computes.

    Args:
        images: of a micro-batch
        world: of which the device is asked
        began_with: how many the training that goes on had; 0: it begins
    """
    before = torch.get_num_threads()
    if world.device.type == "cpu" and not any(name in os.environ for name in _USERS):
        torch.set_num_threads(began_with or worth(model, images, cores.count()))
    return before


def worth(model: nn.Module, images: int, most: int) -> int:
    """Threads, 1 to ``most``, that steps of ``images`` of ``model`` keep busy; ``most`` for a model whose cost is not known."""
    if anatomy.why_not(model, convolved=True):
        return most
    cost = count(model)
    block = cost.macs * images / max(1, len(cost.blocks))
    return min(most, 1 + int(block / A_THREAD))
