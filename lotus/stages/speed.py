"""How fast a training is on this machine: some bare steps of its largest and of its smallest model are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lotus.stage import TRAIN_FORWARDS
from lotus.stages import course, train
from lotus.stages.ahead import Ahead, training

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lotus.config import Patches

WARM = 2
"""Steps that are not timed: the first ones are slower."""
STEPS, SECONDS = 5, 5.0
"""Least steps that are timed, and for how long at least: on a machine with other work a few steps are luck."""
MOST = 200
"""Steps that are timed at most."""
ADDED = 0.05
"""What the engine and the loader add to a step, as a fraction of one of the largest model: they do the same for a small one
(benchmarks/engine.py: 0.952 of a bare loop)."""


@dataclass(frozen=True)
class Tempo:
    """How long an image takes in training, by what its forward pass costs."""

    points: tuple[tuple[float, float], ...]
    """(MACs, seconds of an image), rising; straight between them, and never less than the first."""
    looked: float
    """Seconds a MAC where images are only looked at."""

    def of(self, macs: float) -> float:
        """Seconds of an image."""
        import numpy as np

        costs, seconds = zip(*self.points, strict=True)
        if macs > costs[-1]:
            return seconds[-1] * macs / costs[-1]
        return float(np.interp(macs, costs, seconds))

    def seconds(self, ahead: Ahead) -> float:
        """Of the training, with looking at the models, teachers, proxies and the evaluations on the way; loading images is taken to keep
        up."""
        recipe, gone, added = ahead.config.train, course.pieces(ahead), ADDED * self.points[-1][1]
        images, each, _ = train.passes(ahead)
        stepped = sum(piece.images * (self.of(piece.macs) + added) for piece in gone) / sum(one.images for one in gone)
        beside = train.forecast(ahead)[1] - training(images, each)[1]  # less than nothing where much is frozen
        times = -(-recipe.epochs // recipe.evaluate_every) if recipe.evaluate_every else 1
        evaluated = times * len(ahead.sources[1].labels) * self.of(course.shapes_of(ahead)[-1].macs()) / TRAIN_FORWARDS
        return images * stepped + beside * self.looked + evaluated

    def record(self) -> dict[str, Any]:
        return {"images_per_second": [[macs, 1 / seconds] for macs, seconds in self.points]}


Timer = Callable[[Ahead], Tempo]


def timer(ahead: Ahead, clock: Callable[[], float] = time.perf_counter) -> Tempo:
    """The pace on this machine, under the load that it has now, of the largest and the smallest model and pictures of the training, by
    as many threads as it will have."""
    import torch

    from lotus.training import threads
    from lotus.training.distributed import World

    shapes, gone = course.shapes_of(ahead), course.pieces(ahead)
    patches = ahead.config.train.patches
    ends = [(piece.cuts, piece.side, patches) for piece in (min(gone, key=_macs), max(gone, key=_macs))]
    if patches is not None:  # from all patches to as few as there will be
        ends[1] = (0, None, None)
    before = threads.take(shapes[0].model, _micro(ahead), World(device=_device(ahead)))
    try:
        timed = [timed_step(shapes[cuts], ahead, clock, side, fewer) for cuts, side, fewer in dict.fromkeys(ends)]
    finally:
        torch.set_num_threads(before)
    points = tuple(sorted(point for point in timed if point is not None))
    return Tempo(points, points[-1][1] / points[-1][0] / TRAIN_FORWARDS)


def _device(ahead: Ahead) -> torch.device:
    import torch

    return torch.device("cuda" if ahead.config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _micro(ahead: Ahead) -> int:
    """Images of a micro-batch."""
    return ahead.config.train.batch_size // ahead.config.train.accumulate


def _macs(piece: course.Piece) -> float:
    return piece.macs


def timed_step(
    shape: course.Shape,
    ahead: Ahead,
    clock: Callable[[], float],
    side: int | None = None,
    patches: Patches | None = None,
) -> tuple[float, float] | None:
    """MACs and seconds of an image in bare training steps by the recipe's optimizer, on random images; None where the model that a cut
    leaves is not known before it.

    Args:
        shape: the model: dense, or as a cut leaves it
        ahead: what is known of the run before it
        clock: seconds
        side: of the images in pixels; None: the model's own
        patches: on as few of them as there are in the end; None: on all
    """
    from lotus.vit.sides import AnySide
    from lotus.vit.tokens import Tokens

    model = shape.built()
    if model is None:
        return None
    if patches is not None:  # by chance: as many enter whatever they score
        by_chance = {"mode": "dropout", "model": "", "cached": False} if patches.mode == "input" else {}
        with Tokens(model, patches.model_copy(update={**by_chance, "joint": None, "until": 1.0})) as tokens:
            tokens.schedule(1.0)
            return float(tokens.macs()), _seconds(model, ahead, clock, side)
    if side is not None:
        AnySide(model)
    return shape.macs(side), _seconds(model, ahead, clock, side)


def _seconds(model: nn.Module, ahead: Ahead, clock: Callable[[], float], side: int | None) -> float:
    import torch
    from torch.nn import functional

    from lotus.training.optim import make_optimizer
    from lotus.training.precision import settled
    from lotus.vit.attention import unfuse
    from lotus.vit.model import image_size
    from lotus.vit.steady import wait

    device = _device(ahead)
    recipe, model = settled(ahead.config.train, model, device), model.to(device).train()
    half = recipe.precision == "bf16"
    if half and device.type == "cpu":  # as the engine does
        unfuse(model)
    optimizer, batch = make_optimizer(model, recipe), _micro(ahead)
    masters = _Masters(model) if half else None
    side = side or image_size(model)
    images = torch.randn(batch, 3, side, side, device=device, dtype=torch.bfloat16 if half else torch.float32)
    labels = torch.randint(0, ahead.classes, (batch,), device=device)
    times: list[float] = []
    for turn in range(WARM + MOST):
        wait(device)
        began = clock()
        for _ in range(recipe.accumulate):
            functional.cross_entropy(model(images).float(), labels).backward()
        if masters is not None:
            masters.take_over()
        optimizer.step()
        optimizer.zero_grad()
        if masters is not None:
            masters.round()
        wait(device)
        if turn >= WARM:
            times.append(clock() - began)
        if len(times) >= STEPS and sum(times) >= SECONDS:
            break
    return statistics.fmean(times) / (batch * recipe.accumulate)


class _Masters:
    """A model's weights in fp32, which the optimizer moves, behind those in bf16 that it computes with, as the engine has them."""

    def __init__(self, model: nn.Module) -> None:
        import torch

        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._wide = [p.data for p in self._parameters]
        model.to(torch.bfloat16)

    def take_over(self) -> None:
        """The parameters are in fp32, and so are their gradients."""
        for p, wide in zip(self._parameters, self._wide, strict=True):
            grad, p.grad = p.grad, None
            p.data = wide
            p.grad = None if grad is None else grad.float()

    def round(self) -> None:
        """They are in bf16 again."""
        for p in self._parameters:
            p.data = p.data.bfloat16()
