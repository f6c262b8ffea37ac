"""The stages of a run: ours, in order, and those that a user's own file brings, each in its place among them."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType

from lotus import stage_names
from lotus.config import Config
from lotus.run import Run, brought
from lotus.shelves import known
from lotus.stage import Stage, of
from selection.errors import Notice, Refused
from selection.methods import check_choice, nearest

STAGES: tuple[Stage, ...] = tuple(importlib.import_module(f"lotus.stages.{name}").STAGE for name in stage_names.STAGES)
_TAKEN = (
    "name",
    "format",
    "device",
    "kept",
    "sections",
    "ledger",
    "evaluated",
    "top1",
    "accuracy",
    "validation_images",
    "stages",
    "checkpoints",
    "data",
)
"""What is something else in results.json or in a run's folder."""


def run_of(config: Config, shelves: Sequence[ModuleType] = ()) -> Run:
    """The run of ``config``, with its stages."""
    return Run(config, stages(config, shelves), shelves)


def stages(config: Config, shelves: Sequence[ModuleType] = ()) -> list[Stage]:
    """Ours, those of what is installed and those of ``shelves``: one of a name that is there takes its place, another stands behind the last that it reads. What
    no other stage is to read is read by the last, the report.

    Raises:
        Refused: it reads a stage that is not there, or one that comes after those that are to read it.
    """
    joined, all_shelves = _ordered(config), known(shelves)
    for shelf in all_shelves:
        for stage in brought(shelf).values():
            if stage.wanted(config):
                _join(joined, stage, config, str(shelf.__file__))
    return [dataclasses.replace(stage, **stage.bind(config, all_shelves)) for stage in joined]


def _ordered(config: Config) -> list[Stage]:
    """Ours that are wanted: one that reads a later one with these settings stands right behind it."""
    wanted = [stage for stage in STAGES if stage.wanted(config)]
    ordered = list(wanted)
    for stage in wanted:
        reads = set(of(stage.after, config))
        behind = max((place for place, other in enumerate(ordered) if other.name in reads), default=0)
        if (place := ordered.index(stage)) < behind:
            ordered.insert(behind, ordered.pop(place))
    return ordered


def _join(joined: list[Stage], stage: Stage, config: Config, file: str) -> None:
    names = [other.name for other in joined]
    place = f"--with {file}: the stage {stage.name!r}"
    if not stage.name.isidentifier() or stage.name in _TAKEN:
        raise Refused(f"{place} needs another name: a word that is not {', '.join(_TAKEN)}.")
    reads = of(stage.after, config)
    for name in (*reads, *stage.before):
        if name not in names:
            raise Refused(f"{place} names {name!r}, which is no stage.{nearest(name, names)} Here: {', '.join(names)}.")
    if stage.name in names:
        warnings.warn(
            f"{place} takes the place of the one of that name. Call it otherwise to have both.", Notice, stacklevel=2
        )
        joined[names.index(stage.name)] = stage
        return
    stage = dataclasses.replace(stage, before=stage.before or (names[-1],))
    behind = max((names.index(name) + 1 for name in reads), default=0)
    if behind > min(names.index(name) for name in stage.before):
        raise Refused(
            f"{place} reads {names[behind - 1]}, which comes after {stage.before[0]}, by which it is to be read."
        )
    joined.insert(behind, stage)


def check_asked(config: Config, shelves: Sequence[ModuleType] = ()) -> None:
    """Refuse stages that ``stages`` names and that are not there, and settings that they do not have.

    Raises:
        Refused: with the nearest; or one is named twice.
    """
    names = [one.name for one in config.stages]
    own = [name for shelf in known(shelves) for name in brought(shelf)]
    there = {stage.name: stage for stage in stages(config, shelves)} if names else {}
    for number, name in enumerate(names):
        check_choice(name, [*dict.fromkeys([*stage_names.STAGES, *own])], place="stages")
        if name not in there:
            raise Refused(f"stages: {name!r} is not there with these settings. Leave it out.")
        if name in names[:number]:
            raise Refused(f"stages: {name!r} is named twice. Name it once, with all of its settings.")
        there[name].options(config)


def passed_over(run: Run, until: str | None) -> str:
    """What ``stages`` names and no stage on the way to ``until`` reads, in a sentence; empty where there is nothing."""
    names = run.plan(until)
    left = [one.name for one in run.config.stages if one.name in run.stages and one.name not in names]
    return f"stages: {', '.join(left)}: not read by {names[-1]}, and left to lotus run" if left else ""


def check_named(name: str | None, names: Sequence[str], place: str) -> None:
    """Refuse a stage that is not there.

    Raises:
        Refused: with the nearest.
    """
    if name is not None and name not in names:
        raise Refused(f"{place} {name}: this run has no such stage.{nearest(name, names)} It has: {', '.join(names)}.")
