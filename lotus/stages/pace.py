"""How fast a training is on this machine: a few bare steps of the dense and of the small model are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lotus.stage import TRAIN_FORWARDS
from lotus.stages.ahead import Ahead
from lotus.stages.shrink import forecast_cuts, seen_before

if TYPE_CHECKING:
    from torch import nn

WARM, STEPS = 2, 5


@dataclass(frozen=True)
class Tempo:
    """Images a second in training."""

    dense: float
    small: float
    """After the cut; the dense one's where there is none."""

    def seconds(self, ahead: Ahead) -> float:
        """Of the training, with looking at the models and the evaluations on the way; loading images is taken to keep up."""
        recipe = ahead.config.train
        images, before, looks = recipe.epochs * ahead.kept, 1.0, 0.0
        if recipe.shrink is not None:
            before = seen_before(ahead, recipe.shrink.cuts[0].at)
            looks = forecast_cuts(ahead)[1][0] / TRAIN_FORWARDS / self.dense
        times = recipe.epochs // recipe.evaluate_every if recipe.evaluate_every else 1
        evaluated = times * len(ahead.sources[1].labels) / TRAIN_FORWARDS / self.small
        return images * (before / self.dense + (1 - before) / self.small) + looks + evaluated

    def told(self) -> dict[str, Any]:
        return {"dense_images_per_second": self.dense, "small_images_per_second": self.small}


Timer = Callable[[Ahead, float], Tempo]


def timer(ahead: Ahead, keep: float, clock: Callable[[], float] = time.perf_counter) -> Tempo:
    """The pace of the dense model, and, where it is to be cut, of one of ``keep`` of its MACs, on this machine."""
    from lotus.vit.model import create
    from lotus.vit.smaller import narrower

    dense = images_per_second(ahead.dense, ahead, clock)
    if ahead.config.train.shrink is None:
        return Tempo(dense, dense)
    return Tempo(dense, images_per_second(create(narrower(ahead.config.model, keep), ahead.classes), ahead, clock))


def images_per_second(model: nn.Module, ahead: Ahead, clock: Callable[[], float]) -> float:
    """Of bare training steps by the recipe's optimizer, on random images; the median of some."""
    import copy

    import torch
    from torch.nn import functional

    from lotus.training.optim import make_optimizer
    from lotus.vit.model import image_size
    from lotus.vit.steady import wait

    recipe, config = ahead.config.train, ahead.config
    gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = copy.deepcopy(model).to(device).train()
    optimizer, side, batch = make_optimizer(model, recipe), image_size(model), recipe.batch_size // recipe.accumulate
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(0, ahead.classes, (batch,), device=device)
    times = []
    for turn in range(WARM + STEPS):
        wait(device)
        began = clock()
        for _ in range(recipe.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = functional.cross_entropy(model(images), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        if turn >= WARM:
            times.append(clock() - began)
    return batch * recipe.accumulate / statistics.median(times)
