"""``lotus prune``: the stage of a run, or a model that LOTUS never trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lotus.cli.run import flags_of_a_run, run, run_options
from lotus.cli.shared import Verbs, load_shelves, pairs
from selection.errors import Refused


def add(verb: Verbs) -> None:
    cut = verb(
        "prune", "run the stages up to 'prune', or, with --model, prune a model that LOTUS never trained", _prune
    )
    run_options(cut, until="prune", config="?")
    _prune_options(cut)


def _prune_options(parser: argparse.ArgumentParser) -> None:
    """What ``lotus prune --model`` takes, beside ``--plain`` and ``--with``."""
    own = parser.add_argument_group("a model that LOTUS never trained, without a config, by settings prune.NAME=VALUE")
    own.add_argument(
        "--model",
        metavar="NAME",
        help="a timm name, e.g. deit_small_patch16_224; its arguments are model.args.NAME=VALUE",
    )
    own.add_argument("--weights", default="", metavar="FILE",
                     help="safetensors, a state dict of torch, or a folder of LOTUS; without it timm's published ones")  # fmt: skip
    own.add_argument("--data", metavar="FOLDER", help="train/CLASS/* and val/CLASS/*, or CLASS/*; or an .npz")
    own.add_argument("--keep", action="extend", nargs="+", default=[], metavar="BUDGET=FRACTION",
                     help="macs=0.5, params=0.5, latency=0.5 (on this device), or several, all of which then hold: short for "
                          "prune.keep.macs=0.5")  # fmt: skip
    own.add_argument("--out", default="small", metavar="FOLDER", help="where the small model goes (small)")
    own.add_argument("--force", action="store_true", help="write over another model of LOTUS")
    own.add_argument("--evaluate", type=int, default=5000, metavar="N",
                     help="at most so many validation images are measured on before and after; 0: none (5000)")  # fmt: skip


def _prune(options: argparse.Namespace) -> int:
    """Of a run, or of a model of one's own."""
    if not options.model:
        _check_run(options)
        return run(options)
    _check_alone(options)
    _weights_alone(options)
    from lotus.config import one_cut
    from lotus.report.live import Terminal
    from lotus.report.terminal import pruned_page
    from lotus.stages import outside

    page = one_cut(_spelled(options, [*([options.config] if options.config else []), *options.overrides]))
    job = outside.Job(page, options.out, options.force, options.evaluate, load_shelves(options.shelves))
    with Terminal(plain=options.plain or None) as terminal:
        for event in outside.prune(job):
            terminal.show(event)
    if isinstance(event, outside.Cut):
        pruned_page(event.plan, event.values, event.out, event.alone)
    return 0


def _check_run(options: argparse.Namespace) -> None:
    """Refuse what belongs to a model of one's own."""
    own = argparse.ArgumentParser(add_help=False)
    _prune_options(own)
    strange = [flag for flag, default in vars(own.parse_args([])).items() if getattr(options, flag) != default]
    if options.config is None or strange:
        named = f"--{strange[0].replace('_', '-')} belongs to --model NAME. " if strange else ""
        raise Refused(f"lotus prune: {named}Give a CONFIG, or --model NAME --data FOLDER --keep macs=0.5.")


def _check_alone(options: argparse.Namespace) -> None:
    """Refuse what belongs to a run, and what cannot be of a model of one's own."""
    if options.config is not None and "=" not in options.config:
        raise Refused(f"lotus prune --model takes no config ({options.config}), but settings: prune.keep.macs=0.5.")
    if strange := [flag for flag in flags_of_a_run(options) if flag != "--with"]:
        raise Refused(f"lotus prune --model: is no run, and takes no {strange[0]}. Leave it out.")
    if not options.data:
        raise Refused("lotus prune --model: --data is missing, e.g. --data FOLDER.")
    if options.evaluate < 0:
        raise Refused(f"--evaluate: a number from 0 on, not {options.evaluate}.")


def _weights_alone(options: argparse.Namespace) -> None:
    """Let ``--model FOLDER`` of one that says itself what it is be its weights."""
    from lotus.config import Model
    from lotus.stages import given

    asked = Path(options.model)
    if options.weights or not asked.exists() or not given.holds_weights(asked):
        return
    if asked.is_file():
        raise Refused(f"--model {asked}: are weights. Say of which model: --model NAME --weights {asked}.")
    options.model, options.weights = Model().name, str(asked)


def _spelled(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The settings that flags of ``lotus prune --model`` are short for, and those of its own."""
    named = "npz" if options.data.endswith(".npz") else "imagefolder"
    texts = {
        "model.name": options.model,
        "model.weights": options.weights,
        "data.name": named,
        "data.path": options.data,
    }
    taken = [
        word for word in options.keep if "." in word.partition("=")[0] and "=" in word
    ]  # --keep macs=0.5 prune.round=16
    settings = [*taken, *overrides]
    said = {name.strip(): word for word in settings for name in [word.partition("=")[0]]}
    keep: dict[str, str] = {}
    budgets = [word for word in options.keep if word not in taken]
    for what, part in pairs("--keep", budgets, "BUDGET=FRACTION, e.g. --keep macs=0.5"):
        if what in keep:
            raise Refused(f"--keep {what}={part}: there is a --keep {what} already. Give one of them.")
        if twice := said.get(f"prune.keep.{what}") or said.get("prune.keep"):
            raise Refused(f"--keep {what}={part}: there is a setting {twice} already. Give one of them.")
        keep[what] = part
    return [
        *(f"{name}={json.dumps(text, ensure_ascii=False)}" for name, text in texts.items()),
        *(f"prune.keep.{what}={part}" for what, part in keep.items()),
        *settings,
    ]
