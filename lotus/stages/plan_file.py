"""The plan of a budget in a run's folder (plan.json), which :mod:`lotus.stages.planner` makes and the report tells of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lotus.config import Config
from lotus.config.reader import check as page
from lotus.run import Run
from selection import regular
from selection.errors import Refused

FORMAT = 1
FILE = "plan.json"
Plan = dict[str, Any]
"""JSON-ready: ``way`` and ``why``, ``epochs``, ``at``, ``keep`` (for which the forecast is), ``ships`` (by measure), ``images``, ``parts`` (``part``, ``macs``, ``share`` of the dense training,
``image_forwards``, ``epochs``), ``beside`` (what the budget is not for), ``cost`` and ``budget`` as such shares, ``dense_macs``,
``dense_epochs`` and ``dense_model`` (``macs`` of an image, ``params``), ``seconds`` and ``pace`` of a budget of minutes, ``expected``,
``notes``, and ``settings``, which make the config asked the one that is run."""


def stored(run: Run) -> Plan | None:
    """The plan in the run's folder; None where none can be read."""
    try:
        found = json.loads(regular.text(run.folder / FILE))
    except (OSError, ValueError, RecursionError):
        return None
    sound = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("settings"), dict)
    return found if sound else None


def followed(run: Run) -> Plan | None:
    """The plan by which the run goes; None where there is none, or another was followed since."""
    found = stored(run)
    if found is None or "dense_model" not in found:  # of an earlier version
        return None
    try:
        same = applied(run.config, found["settings"]).model_dump() == run.config.model_dump()
    except (Refused, KeyError, TypeError):
        return None
    return found if same else None


def applied(config: Config, settings: Mapping[str, Any]) -> Config:
    """``config`` with settings by place, and no budget any more."""
    raw = config.model_dump(mode="json")
    for place, value in settings.items():
        *way, last = place.split(".")
        here = raw
        for step in way:
            here = here[step]
        here[last] = value
    return page({**raw, "budget": None}, place="plan")
