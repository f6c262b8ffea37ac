"""What happened. Stages and the training loop yield these; drawing, logging and saving belong to whoever listens."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    def record(self) -> dict[str, Any]:
        """A flat, JSON-ready dictionary; ``event`` holds the kind in lower case."""
        return {"event": type(self).__name__.lower(), **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Began(Event):
    """A stage started."""

    stage: str
    why: str
    """Why it runs: ``"not done yet"``, ``"train.lr changed"``."""


@dataclass(frozen=True)
class Step(Event):
    """A unit of progress inside a stage: an optimizer step, a batch scored, a thousand images written."""

    stage: str
    done: int
    total: int
    unit: str = "steps"
    values: dict[str, float] = field(default_factory=dict)
    """What there is to show now, e.g. ``epoch``, ``loss``, ``lr``, ``images_per_second``, ``zero_gates``."""


@dataclass(frozen=True)
class Evaluated(Event):
    """The validation set was gone through once."""

    stage: str
    epoch: int
    values: dict[str, float]
    """``top1`` in percent, ``loss`` in nats, and what else was measured."""


@dataclass(frozen=True)
class Pruned(Event):
    """The model was cut."""

    stage: str
    before: dict[str, float]
    after: dict[str, float]
    """``params`` and ``macs`` (multiply-accumulates an image), before and after."""


@dataclass(frozen=True)
class Wrote(Event):
    """A file or folder is complete under its final name."""

    stage: str
    path: str


@dataclass(frozen=True)
class Said(Event):
    """A sentence for the user: something that they should know but that does not stop the run."""

    stage: str
    text: str
    level: str = "info"
    """``info`` or ``warning``."""


@dataclass(frozen=True)
class Ended(Event):
    """A stage is done."""

    stage: str
    seconds: float
    values: dict[str, float] = field(default_factory=dict)
    """What it cost and reached: ``image_forwards``, ``macs``, ``top1``, ..."""


@dataclass(frozen=True)
class Skipped(Event):
    """A stage was not run since its file stands and its settings are unchanged."""

    stage: str
    why: str = "done before, settings unchanged"


class Rewound(Exception):
    """Raised, not yielded: a stage is to be carried out once more, and goes on from before where it was; says where."""


def watched(
    stage: str, total: int, work: Callable[[Callable[[int], None]], T], unit: str = "images"
) -> Generator[Event, None, T]:
    """Do ``work`` in a thread while its progress, which it reports through its argument, is passed on as events.

    Work that goes on beyond ``total`` is taken to go through as much once more.
    """
    told: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    result: list[T] = []
    fault: list[BaseException] = []

    def thread() -> None:
        try:
            result.append(work(told.put))
        except BaseException as error:  # it is raised again where somebody waits for it
            fault.append(error)
        finally:
            told.put(None)

    worker = threading.Thread(target=thread, daemon=True)
    worker.start()
    while (done := told.get()) is not None:
        yield Step(stage, done, total * max(1, -(-done // max(1, total))), unit=unit)
    worker.join()
    if fault:
        raise fault[0]
    return result[0]


def sound(value: Any) -> Any:
    """``value`` as JSON knows it: no number, for one that is infinite or none."""
    if isinstance(value, Mapping):
        return {name: sound(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [sound(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
