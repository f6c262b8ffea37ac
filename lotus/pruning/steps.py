"""What of pruning takes long, with its progress as events: for the stage and for a model that LOTUS never trained alike."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from torch import nn

from lotus import pruning
from lotus.events import Event, watched
from lotus.pruning import Batches, Drawn, latency, narrow

ALIKE = ("rank", "rotate", "split", "compensate", "inputs", "branches", "width")
"""Settings that a config's ``prune`` and a job of ``lotus prune --model`` name alike."""


def table(model: nn.Module, batch: int) -> Generator[Event, None, latency.Table]:
    """What widths take on this device."""
    return (
        yield from watched(
            "prune",
            latency.timings(model),
            lambda progress: latency.measure(model, batch, progress=progress),
            unit="timings",
        )
    )


def lottery(
    model: nn.Module, batches: Batches, keep: Mapping[str, float], wants: Any, *, images: int, **more: Any
) -> Generator[Event, None, Drawn]:
    """:func:`lotus.pruning.lottery`, as ``wants`` says in :data:`ALIKE`.

    Args:
        images: how many ``batches`` hold
        more: its other arguments
    """
    tried = (1.0,) if wants.width == "auto" else narrow.check_width(wants.width)  # auto: others perhaps, later
    passes = len(tried) * (1 + wants.rotate) + any(part < 1 for part in tried)
    alike = {name: getattr(wants, name) for name in ALIKE}
    return (
        yield from watched(
            "prune",
            images * passes,
            lambda progress: pruning.lottery(model, batches, keep, **alike, **more, progress=progress),
        )
    )
