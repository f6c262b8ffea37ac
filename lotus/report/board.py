"""TensorBoard (the extra ``tensorboard``): the numbers of a run as scalars, one folder a stage."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lotus.events import Evaluated, Event, Step
from selection.errors import Refused


class Board:
    """Listens to events and writes what they measured under ``folder/STAGE``. A context manager.

    Raises:
        Refused: the extra is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise Refused(
                "tensorboard: not installed. Run: pip install 'lotus-vit[tensorboard]', or tensorboard=false."
            )
        self._folder = folder
        self._writers: dict[str, Any] = {}

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def show(self, event: Event) -> None:
        """Write the event's numbers: training by optimizer step, validation by epoch."""
        if isinstance(event, Step):
            part, at = "train", event.done
        elif isinstance(event, Evaluated):
            part, at = "validation", event.epoch
        else:
            return
        for name, value in event.values.items():
            self._writer(event.stage).add_scalar(f"{part}/{name}", value, at)

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writers[stage] = SummaryWriter(str(self._folder / stage))
        return self._writers[stage]
