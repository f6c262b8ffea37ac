"""Instant soup (Jaiswal et al., 2306.10460): which weights become zero is asked of copies that looked a few steps ahead.

A round: the model trains a little; copies of it, optimizer included, train a few steps more, each with a learning rate, a
weight decay and images of its own, and each names the weights that it would keep. What any of them keeps stays, the model's
own choice included. Nothing is rewound. When little is left to go, it goes by magnitude, so that the budget is met exactly.

The paper adjusts to the rate after every union. That would undo it: of a set that holds a model's largest weights, the largest
are those (a test shows it). Its code adjusts once, at the end, after training on, and so does this.

One process does it, in fp32, while other ranks wait; a soup that is stopped begins anew.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lotus.config import Recipe
from lotus.events import Event, Said, Step
from lotus.papers.soup.recipe import Soup
from lotus.papers.zeros import masks as zeros
from lotus.training.objective import Objective
from lotus.training.optim import make_optimizer
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.data.base import Batch

LITTLE = 0.05
"""Of all weights: when less is still to go it goes at once (the paper's code)."""

Batches = Callable[[int, float, int], contextlib.AbstractContextManager[Iterator["Batch"]]]


@dataclass(frozen=True)
class Supply:
    """The images that spans draw from."""

    images: int
    batches: Batches
    """(number of the span, fraction of the images, steps) -> that many batches of images drawn for this span."""


@dataclass(frozen=True)
class Cooked:
    """What came out. The model that was given holds it."""

    masks: dict[str, Tensor]
    images: int
    """That were trained on, by the model and its copies."""
    left: tuple[float, ...]
    """Fraction of the weights left after each round, and at the end."""


def cook(
    model: nn.Module,
    keep: float,
    supply: Supply,
    settings: Soup,
    *,
    stage: str,
    recipe: Recipe,
    objective: Objective,
    seed: int,
) -> Generator[Event, None, Cooked]:
    """Thin ``model`` to ``keep`` of its listed weights, in place.

    Args:
        supply: of batches
        settings: of ``prune.method``
        stage: the events' stage
        recipe: of the optimizer and its batches
        objective: what the loss asks for
        seed: of the copies' learning rates and weight decays

    Raises:
        Refused: a loss that is not finite.
    """
    listed = zeros.listed(model, settings.weights)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in listed.items()}
    optimizer = make_optimizer(model, recipe, place="finetune")
    rng = np.random.default_rng([seed, 0x50])
    own_steps = _own_steps(settings, supply.images, recipe.batch_size)
    course = _Course(stage, sum(steps(keep, recipe.batch_size, settings, supply.images)))
    left, span, share = [], 0, 1.0
    for number in range(settings.rounds + 1):
        with supply.batches(span, settings.train, own_steps) as given:
            yield from course.run(model, optimizer, given, objective, recipe, masks, span)
        span += 1
        if number == settings.rounds or share - keep < LITTLE:
            break
        target = max(keep, share * (1 - settings.step))
        found = [zeros.magnitude(listed, target, within=masks)]
        for _ in range(settings.copies):
            ahead = copy.deepcopy(model)
            scout = make_optimizer(ahead, recipe, place="finetune")
            scout.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            vary(scout, rng, settings.vary)
            with supply.batches(span, settings.data, settings.steps) as given:
                yield from course.run(ahead, scout, given, objective, recipe, masks, span)
            span += 1
            found.append(zeros.magnitude(zeros.listed(ahead, settings.weights), target, within=masks))
        masks = zeros.union(found)
        zeros.put(model, masks)
        stays, of = zeros.counted(masks)
        share = stays / of
        left.append(share)
        yield Said(
            stage,
            f"soup, round {number + 1}: {100 * share:.1f} % of the weights are left, {100 * target:.1f} % in each mask",
        )
    masks = zeros.magnitude(listed, keep, within=masks)
    zeros.put(model, masks)
    left.append(keep)
    return Cooked(masks, course.images, tuple(left))


class _Course:
    """Plain training spans, counted together."""

    def __init__(self, stage: str, total: int) -> None:
        self._stage, self._total = stage, total
        self._done, self.images = 0, 0

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Batch],
        objective: Objective,
        recipe: Recipe,
        masks: zeros.Masks,
        span: int,
    ) -> Iterator[Event]:
        model.train()
        with zeros.held(model, masks):
            for number, batch in enumerate(batches):
                images, targets = objective.mix(batch.images, batch.labels, epoch=span, step=number)
                loss = objective.losses(model(images), targets).mean()
                optimizer.zero_grad()
                loss.backward()
                parameters = [weight for weight in model.parameters() if weight.grad is not None]
                norm = nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf)
                if not torch.isfinite(norm):
                    raise Refused("prune.method: the loss of a soup or its gradient was not finite. Lower finetune.lr.")
                optimizer.step()
                zeros.put(model, masks)  # moments of weights that were let go just now would move them
                self._done += 1
                self.images += len(batch.labels)
                self._total = max(self._total, self._done)
                yield Step(self._stage, self._done, self._total, values={"loss": float(loss.detach())})
        model.eval()


def steps(keep: float, batch_size: int, settings: Soup, images: int) -> tuple[int, int]:
    """Optimizer steps of the model, and of all its copies, if every union keeps no more than its masks do."""
    rounds = _nominal(keep, settings)
    return (rounds + 1) * _own_steps(settings, images, batch_size), rounds * settings.copies * settings.steps


def _own_steps(settings: Soup, images: int, batch_size: int) -> int:
    return max(1, math.ceil(settings.train * images / batch_size))


def _nominal(keep: float, settings: Soup) -> int:
    share, rounds = 1.0, 0
    while share - keep >= LITTLE and rounds < settings.rounds:
        share, rounds = max(keep, share * (1 - settings.step)), rounds + 1
    return rounds


def vary(optimizer: torch.optim.Optimizer, rng: np.random.Generator, factor: float) -> None:
    """A learning rate and a weight decay of the copy's own; the paper varies both and names no range."""
    rate, decay = (float(factor ** rng.uniform(-1, 1)) for _ in range(2))
    group: dict[str, Any]
    for group in optimizer.param_groups:
        group["lr"] *= rate
        group["weight_decay"] *= decay
