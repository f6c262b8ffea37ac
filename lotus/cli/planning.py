"""``lotus plan``: how a budget of training would be spent, with the cost of each part and what is expected of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lotus.cli.shared import Verbs, as_json, load_shelves, overrides, tell, with_files

if TYPE_CHECKING:
    from lotus.config import Config
    from lotus.stages.ahead import Ahead
    from lotus.stages.speed import Tempo


def add(verb: Verbs) -> None:
    added = verb("plan", "say how a budget of training would be spent, and what is expected", _plan)
    added.add_argument(
        "config", help="a YAML file, e.g. configs/cifar10.yaml, with budget.train=0.33 or budget.minutes=20"
    )
    overrides(added)
    with_files(added)
    as_json(added)


def _plan(options: argparse.Namespace) -> int:
    from lotus.config import read
    from lotus.stages import check, planner, run_of
    from lotus.stages.checks import look_ahead, notice

    config, shelves = read(options.config, options.overrides), load_shelves(options.shelves)
    planner.check_open(config, shelves)
    resolved, plan = planner.resolved(config, shelves, timed=_timed)
    check(resolved, shelves)
    look_ahead(resolved, run_of(resolved, shelves).stages.values(), shelves)
    notice(resolved.train)
    if options.json:
        print(json.dumps(plan, indent=1))
    else:
        plan_told(plan)
    return 0


def settled(config: Config, shelves: Sequence[ModuleType] = ()) -> tuple[Config, dict[str, Any] | None]:
    """The config that is run, and the plan that made it, where a budget asks for one."""
    if config.budget is None:
        return config, None
    from lotus.stages import planner

    return planner.resolved(config, shelves, timed=_timed, ranks=int(os.environ.get("WORLD_SIZE", "1")))


def _timed(ahead: Ahead) -> Tempo:
    """As :func:`lotus.stages.speed.timer`, which takes some seconds."""
    from lotus.stages import speed

    what = "a training that shrinks" if ahead.config.train.shrink else "a training of one size"
    tell(f"budget.minutes: times steps of {what} ...", file=sys.stderr)
    return speed.timer(ahead)


def keep_plan(config: Config, found: dict[str, Any], shelves: Sequence[ModuleType] = ()) -> None:
    """Write the plan into the run's folder."""
    from lotus.stages import plan_file, planner, run_of

    run = run_of(config, shelves)
    if plan_file.stored(run) != found:
        planner.write(run, found)


def plan_told(found: Mapping[str, Any]) -> None:
    """Print a plan."""
    for line in lines(found):
        tell(line)


def lines(found: Mapping[str, Any]) -> list[str]:
    """A plan as text."""
    from lotus.report.numbers import count, duration, listed, si

    what = {"shrink": "a training that shrinks", "small": "a smaller model from scratch", "dense": "the dense model"}
    cut = f", cut at {found['at']:g} of its steps" if found["at"] is not None else ""
    ships = found.get("ships") or {"macs": found["keep"]}  # one of an earlier version says no more
    names = {"macs": "MACs", "params": "parameters"}
    ship = listed([f"{part:g} of the {names.get(measure, measure)}" for measure, part in ships.items()])
    epochs = f"{found['epochs']} epoch{'s' * (found['epochs'] != 1)}"
    told = [
        f"plan: {what[found['way']]}, {epochs} of {count(found['images'])} images{cut}; {ship} ship",
        f"  since {found['why']}",
        "",
        f"  {'part':<26}{'epochs':>8}{'MACs':>10}{'of dense':>10}",
    ]
    for row in (*found["parts"], *found["beside"]):
        epochs = f"{row['epochs']:.2f}" if row.get("epochs") is not None else ""
        name = row["part"] + (" (not in the budget)" if row in found["beside"] else "")
        told.append(f"  {name:<26}{epochs:>8}{si(row['macs']):>10}{row['share']:>10.4f}")
    total = sum(row["macs"] for row in found["parts"])
    budget = found["budget"]
    limit = (
        f"of {budget['train']:g}"
        if budget["train"] is not None
        else f"{duration(found['seconds'])} of {budget['minutes']:g} min"
    )
    whole = f"{found['dense_epochs']} epoch{'s' * (found['dense_epochs'] != 1)}"
    told += [
        f"  {'in all':<26}{'':>8}{si(total):>10}{found['cost']:>10.4f}  {limit}",
        f"  1 is the dense training on all images for {whole}: {si(found['dense_macs'])} MACs",
    ]
    if "pace" in found:
        steps = (f"{speed:,.0f} images/s at {si(macs)} MACs" for macs, speed in found["pace"]["images_per_second"])
        told.append(f"  timed here, under the load of now: {', '.join(steps)}")
    return [*told, "", *_expected(found["expected"]), *(f"  note: {note}" for note in found["notes"])]


def _expected(seen: Mapping[str, Any]) -> list[str]:
    if not seen:
        return ["  expected: nothing of the kind was measured"]
    text = (
        f"  expected: measured on {seen['data']} at {seen['cost']:.3g} of the dense training, {seen['keep']:.2g} of the MACs: "
        f"{seen['top1']:.2f} % top-1 (the mean of {seen['n']} run{'s' * (seen['n'] != 1)})"
    )
    if seen["dense_top1"] is not None and seen["way"] != "dense":
        text += f"; the dense model at a cost of {seen['dense_cost']:.3g}: {seen['dense_top1']:.2f} %"
    return [text + (". This plan is far from it" if seen["far"] else "") + " (docs/measured.md)"]
