"""The verbs over stages: ``lotus run``, and one a stage, for those that have no verb of their own."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lotus.cli.planning import keep_plan, plan_told, settled
from lotus.cli.shared import Verbs, load_shelves, overrides, tell, with_files
from lotus.cli.stopping import heeded
from lotus.stage_names import STAGES
from selection import regular
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.config import Config
    from lotus.events import Event
    from lotus.report.board import Board
    from lotus.report.live import JsonLines, Quiet, Terminal


def add(verb: Verbs) -> None:
    whole = verb("run", "run every stage that is not done yet", run)
    run_options(whole, until=None)
    whole.add_argument("--from", dest="first", metavar="STAGE", help="run again from this stage on, whoever brings it")
    tuned = verb(
        "finetune",
        "fine-tune the model in a folder or file by configs/finetune.yaml, or run a config's stages up to 'finetune'",
        _finetune,
    )
    run_options(tuned, until="finetune")


def add_stages(verb: Verbs, taken: Sequence[str]) -> None:
    """A verb for each stage whose name is not ``taken``."""
    for stage in STAGES:
        if stage not in taken:
            added = verb(stage, f"run the stages up to {stage!r} that are not done yet", run)
            run_options(added, until=stage)


def run_options(parser: argparse.ArgumentParser, until: str | None, config: str | None = None) -> None:
    parser.add_argument("config", nargs=config, help="a YAML file, e.g. configs/digits.yaml")
    overrides(parser)
    parser.add_argument("--again", action="store_true", help="run every stage again")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="let go of what other settings have left, instead of keeping it in RUN/earlier",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would run, and what it would cost")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--plain", action="store_true", help="plain lines instead of live progress")
    seen.add_argument("--quiet", action="store_true", help="warnings alone")
    seen.add_argument("--json", action="store_true", help="print JSON alone: each event on a line, as in log.jsonl")
    with_files(parser)
    # What DeepSpeed's launcher and its users pass.
    parser.add_argument("--deepspeed", action="store_true", help="accepted for DeepSpeed's sake: it is always on")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed settings of your own (train.deepspeed)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(until=until, first=None)


def run(options: argparse.Namespace) -> int:
    from lotus import stages
    from lotus.config import read

    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    theirs = [f"train.deepspeed={options.deepspeed_config}"] if options.deepspeed_config else []
    config = read(options.config, [*options.overrides, *theirs])
    shelves = load_shelves(options.shelves)
    config, planned = settled(config, shelves)
    quiet = int(os.environ.get("RANK", "0")) != 0
    told = not (quiet or options.quiet or options.json)
    if planned is not None and options.until is None and told:
        plan_told(planned)
    if options.dry_run:
        return _dry_run(config, options, shelves, told=told)
    if planned is not None and not quiet:
        keep_plan(config, planned, shelves)
    asked = {"until": options.until, "first": options.first, "again": options.again, "replace": options.replace}
    events = heeded(stages.go(config, **asked, shelves=shelves))
    if quiet:
        for _ in events:
            pass
        return 0
    _show(events, config, options, shelves)
    if options.until is None and told:
        last_page(config, shelves)
    return 0


def _dry_run(config: Config, options: argparse.Namespace, shelves: Sequence[ModuleType], *, told: bool) -> int:
    from lotus import stages
    from lotus.report.terminal import plan_page

    rows = stages.forecast(config, until=options.until, first=options.first, again=options.again, shelves=shelves)
    if options.json:
        print(json.dumps(rows))
    elif told:
        plan_page(rows)
        if left := stages.passed_over(stages.run_of(config, shelves), options.until):
            tell(f"! {left}")
    return 0


def _show(events: Iterable[Event], config: Config, options: argparse.Namespace, shelves: Sequence[ModuleType]) -> None:
    """Go through a run, before those who watch."""
    from lotus import stages
    from lotus.events import Said
    from lotus.report.board import Board
    from lotus.report.live import JsonLines, Quiet, Terminal
    from lotus.run import Run

    folder = Run(config).folder
    with contextlib.ExitStack() as open_things:
        listeners: list[Terminal | Board | Quiet | JsonLines] = []
        if options.quiet or options.json:
            listeners.append(JsonLines() if options.json else Quiet())
        else:
            ahead = functools.partial(stages.costs, config, until=options.until, shelves=shelves)
            listeners.append(open_things.enter_context(Terminal(plain=options.plain or None, ahead=ahead)))
            listeners[0].show(Said("run", f"{folder}: torch is loaded, and what is asked for is checked"))
        if config.tensorboard:
            listeners.append(open_things.enter_context(Board(folder / "tensorboard")))
        _tell(events, listeners)


def _tell(events: Iterable[Event], listeners: Sequence[Terminal | Board | Quiet | JsonLines]) -> None:
    """Show each event to all who watch. Where nobody reads on (``| head``), what was trained is saved, and the run stops.

    Raises:
        KeyboardInterrupt: it does.
    """
    for event in events:
        try:
            for listener in listeners:
                listener.show(event)
        except (BrokenPipeError, SystemExit):  # which rich makes of it
            from lotus.training.distributed import StopFlag

            sys.stdout, listeners = open(os.devnull, "w"), ()  # noqa: SIM115 - python flushes it at exit
            if not StopFlag.ask("nobody reads its output"):
                raise KeyboardInterrupt("nobody reads its output. The same command goes on from here.") from None


def flags_of_a_run(options: argparse.Namespace) -> list[str]:
    """Those that were given, of what a verb takes for a run alone."""
    said = {
        "--again": options.again, "--replace": options.replace, "--dry-run": options.dry_run, "--with": options.shelves,
        "--deepspeed_config": options.deepspeed_config,
    }  # fmt: skip
    return [flag for flag, given in said.items() if given]


def _finetune(options: argparse.Namespace) -> int:
    """Of a run; or a whole one, by the config that is shipped for it, from the weights that are named in place of a config."""
    from lotus.config import shipped
    from lotus.stages import given

    weights = Path(options.config)
    if not weights.exists() and weights.parts[:1] != ("configs",):  # which are found from any folder
        raise Refused(
            f"{weights}: there is no such file or folder. Give the weights of a model (a folder, or a file and model.name=NAME), a "
            "config, or a run's folder."
        )
    if not given.holds_weights(weights):
        return run(options)
    if any(word.partition("=")[0].strip() == "model.weights" for word in options.overrides):
        raise Refused(f"lotus finetune {weights}: are the weights already. Leave out model.weights.")
    asks = any(
        re.match(r"\s*((prune|train\.shrink|budget)\b|train\.teacher\s*=\s*uncut)", word) for word in options.overrides
    )
    lines = given.notes(weights, again=asks)
    for line in lines:
        tell(line)
    as_it_is = given.AS_IT_IS if lines and not asks else ()
    options.overrides = [
        f"model.weights={json.dumps(str(weights), ensure_ascii=False)}", *as_it_is, *options.overrides
    ]  # fmt: skip
    options.config, options.until = str(shipped("finetune")), None
    return run(options)


def last_page(config: Config, shelves: Sequence[ModuleType] = ()) -> None:
    from lotus.report import terminal
    from lotus.stages import run_of

    run = run_of(config, shelves)
    run.check_file(run.results)
    terminal.last_page(json.loads(regular.text(run.results)), run.report, run.stages)
