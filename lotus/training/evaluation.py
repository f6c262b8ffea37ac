"""Once through the validation images: what a model names right, of all and of each class.

Letters: B batch, C classes, S side of an image.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.training.distributed import StopFlag, Wishes, World
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.data.base import Batch, Loader

T = TypeVar("T")

STOP = 2
"""What ranks tell each other where one was asked to stop."""


class Stopped(KeyboardInterrupt):
    """Training ended early because it was asked to. What was reached is saved; the message says where."""


def heard(batches: Iterator[T]) -> Iterator[T]:
    """``batches``, as long as nobody has asked to stop.

    Raises:
        Stopped: somebody has.
    """
    for batch in batches:
        if stop := StopFlag.now():
            raise Stopped(f"stopped ({stop.reason}). The same command goes on.")
        yield batch


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """What is inside ends as soon as somebody asks to stop: for long work that looks at no flag and can be left anywhere.

    Raises:
        Stopped: somebody has.
    """
    flag = StopFlag.now()
    if flag is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    if flag:
        raise Stopped(f"stopped ({flag.reason}). The same command goes on.")
    asked: list[int] = []

    def heard(number: int, frame: Any) -> None:
        before[number](number, frame)
        if not asked:  # once: what is half-written is taken away meanwhile
            asked.append(number)
            raise Stopped(f"stopped ({flag.reason}). The same command goes on.")

    before: dict[int, Any] = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception as fault:
        if asked:  # a library may have made an error of its own of it
            raise Stopped(str(fault)) from fault
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluate(forward: nn.Module | Callable[[Tensor], Tensor], loader: Loader, world: World) -> dict[str, float]:
    """What :func:`evaluate_classes` tells of all classes together."""
    return evaluate_classes(forward, loader, world)[0]


def evaluate_classes(
    forward: nn.Module | Callable[[Tensor], Tensor], loader: Loader, world: World, *, stop: StopFlag | None = None
) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Go through ``loader`` once and count, exactly: over ranks nothing is repeated and nothing left out. Ranks tell each other
    beforehand how many batches they have, and on the way of a wish to stop, as in training.

    Args:
        forward: (B, 3, S, S) -> (B, C) logits. A module is put into eval mode meanwhile.
        loader: of each rank's part of the images
        world: the ranks
        stop: asked before each batch; None: nobody stops it

    Returns:
        ``top1`` and ``top5`` in percent, ``macro`` (the mean of each class's top-1, of classes with an image), ``loss`` in
        nats, ``images``. And of each class ``right`` and ``of``, (C,) each: images named right, and how many there are.

    Raises:
        Refused: there are no images.
        Stopped: ``stop`` was raised on some rank.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # images, top 1, top 5, loss
    classes = torch.zeros(2, 0, dtype=torch.int64, device=world.device)  # right and of, as many classes as were met
    images: Tensor | None = None
    most, wishes = world.max(len(loader.plan.sizes(0))), Wishes(world, time.perf_counter)
    with _evaluating(forward), closing(loader, 0, 0) as batches, torch.no_grad():
        for _ in range(most):
            if wishes.exchanged(STOP if stop else 0):
                raise Stopped("stopped while evaluating")
            batch = next(batches, None)
            if batch is None:
                if images is not None:
                    forward(images)  # under ZeRO 3 no rank can go forward alone, and another one has a batch left
                continue
            images = batch.images
            logits = forward(images).float()  # (B, C)
            best = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]  # (B, 5)
            loss = F.cross_entropy(logits, batch.labels, reduction="none")
            sums += torch.stack([torch.ones_like(loss), best[:, 0], best.any(1), loss]).double().sum(1)
            told = torch.stack([best[:, 0], torch.ones_like(best[:, 0])]).long()  # (2, B) right, of
            # Not by bincount or a mask: of what they give the host would have to know the size, and wait for a GPU.
            classes = _wide(classes, logits.shape[1]).index_add(1, batch.labels, told)
    count, top1, top5, loss_sum = world.sum_(sums).tolist()
    if not count:
        raise Refused("validation: there is no image to measure on. Give a validation set of at least one.")
    right, of = world.sum_(_wide(classes, world.max(classes.shape[1]))).cpu()
    macro = float((right / of)[of > 0].double().mean())
    values = {
        "top1": 100 * top1 / count, "macro": 100 * macro, "top5": 100 * top5 / count, "loss": loss_sum / count,
        "images": count,
    }  # fmt: skip
    return values, {"right": right.tolist(), "of": of.tolist()}


def _wide(classes: Tensor, width: int) -> Tensor:
    return F.pad(classes, (0, width - classes.shape[1]))


@contextlib.contextmanager
def closing(loader: Loader, epoch: int, skip: int, **view: Any) -> Iterator[Iterator[Batch]]:
    """An epoch of ``loader`` that is closed when it is left early; ``view`` is :attr:`lotus.training.guests.Epoch.view`."""
    batches = iter(loader.epoch(epoch, skip, **view))
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


@contextlib.contextmanager
def _evaluating(forward: object) -> Iterator[None]:
    if not isinstance(forward, nn.Module) or not forward.training:
        yield
        return
    forward.eval()
    try:
        yield
    finally:
        forward.train()
