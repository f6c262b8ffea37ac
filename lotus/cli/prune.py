"""``lotus prune``: the stage of a run, or a model that LOTUS never trained."""

from __future__ import annotations

import argparse
from typing import Literal

from lotus.cli.run import flags_of_a_run, run, run_options
from lotus.cli.shared import Verbs, pairs, scalar
from selection.errors import Refused


def add(verb: Verbs) -> None:
    cut = verb(
        "prune", "run the stages up to 'prune', or, with --model, prune a model that LOTUS never trained", _prune
    )
    run_options(cut, until="prune", config="?")
    _prune_options(cut)


def _prune_options(parser: argparse.ArgumentParser) -> None:
    """What ``lotus prune --model`` takes, beside ``--plain``."""
    own = parser.add_argument_group("a model that LOTUS never trained, without a config")
    own.add_argument("--model", metavar="NAME", help="a timm name, e.g. deit_small_patch16_224")
    own.add_argument("--weights", default="", metavar="FILE",
                     help="safetensors, a state dict of torch, or a folder of LOTUS; without it timm's published ones")  # fmt: skip
    own.add_argument("--data", metavar="FOLDER", help="train/CLASS/* and val/CLASS/*, or CLASS/*; or an .npz")
    own.add_argument("--keep", action="extend", nargs="+", default=[], metavar="BUDGET=PART",
                     help="macs=0.5, params=0.5, latency=0.5 (on this device), or several, all of which then hold; "
                          "gates=0.5, with --rank quantile: of all that is scored")  # fmt: skip
    own.add_argument(
        "--latency-batch", type=int, default=64, metavar="N", help="images in the passes that are timed (64)"
    )
    own.add_argument("--out", default="small", metavar="FOLDER", help="where the small model goes (small)")
    own.add_argument("--force", action="store_true", help="write over another model of LOTUS")
    own.add_argument("--arg", action="extend", nargs="+", default=[], metavar="NAME=VALUE",
                     help="arguments for timm.create_model, e.g. img_size=32")  # fmt: skip
    own.add_argument("--criterion", default="fisher", help="a criterion of lotus/pruning/criteria.py (fisher)")
    own.add_argument("--rank", default="pool", choices=("pool", "kind", "quantile", "uniform"),
                     help="what competes with what (pool); quantile: one threshold for all scores, whatever a unit costs; "
                          "uniform: the same widths in every block, for timm alone")  # fmt: skip
    own.add_argument("--round", type=_multiple, default=8, metavar="N",
                     help="widths stay a multiple of this, or auto: of what is fast here (8)")  # fmt: skip
    own.add_argument("--split", action="store_true", help="query/key and value dimensions may differ in number")
    own.add_argument("--width", default="auto", metavar="PART",
                     help="part of the stream's channels that stays (1: all); search: the best of six; auto: those one after the "
                          "other, while all are not good enough and fewer are better (auto)")  # fmt: skip
    own.add_argument("--inputs", action="store_true", help="channels that attention and MLPs read may go too")
    own.add_argument("--branches", action=argparse.BooleanOptionalAction, default=None,
                     help="whole branches and blocks may go (only where units cannot meet the budget)")  # fmt: skip
    own.add_argument("--no-rotate", action="store_true", help="cut the dimensions of heads by index")
    own.add_argument(
        "--compensate",
        default="affine",
        choices=("none", "mean", "affine"),
        help="how what goes is made up for (affine)",
    )
    own.add_argument(
        "--calibration", type=int, metavar="N", help="images that are looked at (2,048; of large images 512)"
    )
    own.add_argument("--evaluate", type=int, default=5000, metavar="N",
                     help="at most so many validation images are measured on before and after; 0: none (5000)")  # fmt: skip
    own.add_argument("--seed", type=int, default=0, help="which images are drawn (0)")


def _prune(options: argparse.Namespace) -> int:
    """Of a run, or of a model of one's own."""
    if not options.model:
        own = argparse.ArgumentParser(add_help=False)
        _prune_options(own)
        strange = [flag for flag, default in vars(own.parse_args([])).items() if getattr(options, flag) != default]
        if options.config is None or strange:
            named = f"--{strange[0].replace('_', '-')} belongs to --model NAME. " if strange else ""
            raise Refused(f"lotus prune: {named}Give a CONFIG, or --model NAME --data FOLDER --keep macs=0.5.")
        return run(options)
    if options.config is not None or options.overrides:
        raise Refused(
            f"lotus prune --model takes no config ({options.config}). Arguments of the model: --arg NAME=VALUE."
        )
    if strange := flags_of_a_run(options):
        raise Refused(f"lotus prune --model: is no run, and takes no {strange[0]}. Leave it out.")
    for flag in ("data", "keep"):
        if not getattr(options, flag):
            raise Refused(f"lotus prune --model: --{flag} is missing, e.g. --data FOLDER --keep macs=0.5.")
    for flag, least in (("calibration", 1), ("evaluate", 0), ("latency_batch", 1)):
        given = getattr(options, flag)
        if given is not None and given < least:
            raise Refused(f"--{flag.replace('_', '-')}: a number from {least} on, not {given}.")
    from lotus import outside
    from lotus.report.terminal import Terminal, pruned_page

    args = {name: scalar(value) for name, value in pairs("--arg", options.arg, "NAME=VALUE, e.g. --arg img_size=32")}
    keep = outside.budgets(pairs("--keep", options.keep, "BUDGET=PART, e.g. --keep macs=0.5"))
    job = outside.Job(
        model=options.model, data=options.data, keep=keep, weights=options.weights, args=args,
        out=options.out, criterion=options.criterion, rank=options.rank, round=options.round, rotate=not options.no_rotate,
        split=options.split, compensate=options.compensate, calibration=options.calibration, evaluate=options.evaluate,
        seed=options.seed, latency_batch=options.latency_batch, force=options.force,
        inputs=options.inputs, branches=options.branches, width=scalar(options.width),
    )  # fmt: skip
    with Terminal(plain=options.plain or None) as terminal:
        for event in outside.prune(job):
            terminal.show(event)
    if isinstance(event, outside.Cut):
        pruned_page(event.plan, event.values, event.out, event.alone)
    return 0


def _multiple(text: str) -> int | Literal["auto"]:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or auto, not {text!r}") from None
