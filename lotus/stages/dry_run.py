"""What ``--dry-run`` tells: which stages would run, and what they would cost."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from lotus.config import Config
from lotus.stage import of
from lotus.stages.ahead import Ahead
from lotus.stages.checks import check, look_ahead, notice
from lotus.stages.shelf import check_named, run_of


def costs(config: Config, *, until: str | None = None, shelves: Sequence[ModuleType] = ()) -> dict[str, float]:
    """MACs that each stage which leads to ``until`` is forecast to take, whether it has run or not. Nothing is checked."""
    import torch

    run, ahead = run_of(config, shelves), Ahead(config, shelves)
    with torch.random.fork_rng():  # models are made, perhaps beside one that trains
        return {name: (run.stages[name].forecast(ahead) or (0, 0))[1] for name in run.plan(until)}


def forecast(
    config: Config,
    *,
    until: str | None = None,
    first: str | None = None,
    again: bool = False,
    shelves: Sequence[ModuleType] = (),
) -> list[dict[str, Any]]:
    """A row a stage that leads to ``until`` (the last): whether it would run, why, and what it would cost."""
    check(config, shelves)
    run, ahead = run_of(config, shelves), Ahead(config, shelves)
    look_ahead(config, run.stages.values(), shelves)
    check_named(until, list(run.stages), "until")
    notice(config.train)
    names = run.plan(until)
    check_named(first, names, "--from")
    rows: list[dict[str, Any]] = []
    dirty = False
    for name in names:
        stage = run.stages[name]
        asked = again or (first is not None and names.index(name) >= names.index(first))
        why = "asked for" if asked else run.why(name)
        if why is None and dirty and any(row["why"] for row in rows if row["stage"] in run.after(name)):
            why = "what it reads is made again"
        dirty |= why is not None
        forwards, spent = stage.forecast(ahead) or (0, 0)
        ahead.spent += spent if stage.part not in ("dense", "apart") else 0
        rows.append(
            {"stage": name, "says": of(stage.says, config), "why": why, "image_forwards": forwards, "macs": spent}
        )
    return rows
