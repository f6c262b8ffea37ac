"""The command line. ``lotus VERB`` and ``tools/VERB.py`` are the same code; heavy packages are imported when needed.

Exit codes: 0 done, 2 for what the user can mend, 75 stopped on request (the same command goes on), 1 for a fault of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from selection.errors import Refused
from selection.methods import nearest
from selection.shown import shown

if TYPE_CHECKING:
    import numpy as np

    from lotus.config import Config

STOPPED = 75  # sysexits' EX_TEMPFAIL: try again


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words[:1]) if words[:1] and words[0] in ("-h", "--help", "--version") else None
    if options is None:
        options = _parse(parser, words)
    try:
        with _terminated_like_interrupted():
            return options.verb(options)
    except Refused as refusal:
        return _told(refusal, 2)
    except KeyboardInterrupt as stop:
        return _told(str(stop) or "stopped. The same command goes on from here.", STOPPED)
    except BrokenPipeError:  # `lotus ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - python flushes it at exit
        return 0


def _told(why: object, code: int) -> int:
    """Say why on rank 0; the others would only repeat it."""
    if os.environ.get("RANK", "0") == "0":
        _tell(f"lotus: {why}", file=sys.stderr)
    return code


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """``key=value`` may stand anywhere among the flags, which argparse alone does not allow inside sub-commands."""
    options, rest = parser.parse_known_args(words)
    strange = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if strange:
        parser.error(f"{strange[0]}: no such option. See: lotus {words[0]} --help")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


class _Parser(argparse.ArgumentParser):
    """argparse, which names the nearest of its choices."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        super().error(message + (nearest(found[1], re.findall(r"[\w-]+", found[2])) if found else ""))


def _parser() -> argparse.ArgumentParser:
    from lotus.run import STAGES

    parser = _Parser(
        prog="lotus", description="Train Vision Transformers on less data and ship them with fewer dimensions."
    )
    parser.add_argument("--version", action="version", version=f"lotus {__import__('lotus').__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, does: str, action: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        added.set_defaults(verb=action)
        return added

    whole = verb("run", "run every stage that is not done yet", _run)
    _run_options(whole, until="report")
    whole.add_argument("--from", dest="first", choices=[stage.name for stage in STAGES], metavar="STAGE",
                       help=f"run again from this stage on: {', '.join(stage.name for stage in STAGES)}")  # fmt: skip
    for name in ("prepare", "score", "train", "finetune"):
        _run_options(verb(name, f"run the stages up to '{name}' that are not done yet", _run), until=name)
    out = verb(
        "export", "run the stages up to 'export' that are not done yet, or export the model in a folder", _export
    )
    _run_options(out, until="export")
    cut = verb(
        "prune", "run the stages up to 'prune', or, with --model, prune a model that LOTUS never trained", _prune
    )
    _run_options(cut, until="prune", config="?")
    _prune_options(cut)

    ticket = verb("select", "draw a ticket (a subset of the images) from recorded signals; needs no torch", _select)
    ticket.add_argument("signals", help="signals.npz, as `lotus score` leaves it")
    ticket.add_argument("--score", help="a score of selection/scores.py; higher = keep first (dual)")
    ticket.add_argument("--pick", help="a policy of selection/pickers.py (beta)")
    budget = ticket.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep", type=float, help="the part of the images that stays, in (0, 1]")
    budget.add_argument("--prune", type=float, help="the part that goes, in [0, 1): the complement of --keep")
    ticket.add_argument("--seed", type=int, default=0, help="what is random follows from it (0)")
    ticket.add_argument("--out", default="", help="where the ticket goes, e.g. ticket.npz")
    ticket.add_argument("--start", default="", metavar="TICKET", help="a ticket whose images all stay; more are added")
    ticket.add_argument("--no-balance", action="store_true", help="do not keep the same part of every class")
    ticket.add_argument("--floor", type=float, metavar="PART",
                        help="with --no-balance: the part of what balance would give it that each class keeps at least")  # fmt: skip
    ticket.add_argument(
        "--max-memory", default="", metavar="SIZE", help="what score and picker may take, e.g. 4GB or 500MB"
    )
    ticket.add_argument("--picture", metavar="FILE", help="the picture of `lotus ticket show`: .png, .svg or .html")
    ticket.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of the method: score.window=5, pick.bins=20")  # fmt: skip
    _with(ticket)
    _json(ticket)

    _ticket_verbs(
        verb("ticket", "look at a ticket, compare tickets, bring them in and out as files of others", _nothing)
    )

    patches = verb("patches", "make the patch ticket of a run: what each patch of each training image scores", _patches)
    patches.add_argument("config", help="the run's config file, its folder, or a folder with a train.beton")
    _overrides(patches)
    patches.add_argument("--score", default="", help="a score of lotus/vit/patch_scores.py (train.patches.score)")
    patches.add_argument(
        "--model", default="", help="a folder written by LOTUS: the model to ask (train.patches.model)"
    )
    patches.add_argument("--keep", type=float, help="the part of the patches that stays (train.patches.keep, else 0.7)")
    patches.add_argument("--picture", metavar="OUT.png", help="a contact sheet: what leaves is dimmed")
    patches.add_argument("--images", type=int, default=12, help="images on it (12)")
    _with(patches)
    patches.add_argument("--plain", action="store_true", help="plain lines instead of live progress")
    _json(patches)

    evaluate = verb("evaluate", "measure a model of a run on the validation images", _evaluate)
    evaluate.add_argument("config", help="the run's config file, or its folder")
    _overrides(evaluate)
    evaluate.add_argument("--model", default="final", help="baseline, trained, pruned, final, or a folder (final)")
    _json(evaluate)
    evaluate.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    verify = verb("verify", "check that the folder of a model is what its spec says", _verify)
    verify.add_argument("folder", help="a folder of spec.json and model.safetensors")
    verify.add_argument("--against", metavar="FOLDER", help="the folder of the model that it was cut from")
    _json(verify)

    report = verb("report", "write report.html of a run again and show its last page", _report)
    report.add_argument("folder", help="the run's folder, e.g. runs/digits")

    doctor = verb("doctor", "check this machine and say what to do", _doctor)
    doctor.add_argument("--brief", action="store_true", help="say only what is wrong")
    return parser


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. train.lr=3e-4")


def _with(parser: argparse.ArgumentParser, what: str = "whose functions join the shelves") -> None:
    parser.add_argument(
        "--with", dest="shelves", action="append", default=[], metavar="FILE.py", help=f"a file of your own {what}"
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _ticket_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, does: str, action: Callable[[argparse.Namespace], int], data: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        added.set_defaults(verb=action)
        if data:
            added.add_argument(
                "--data",
                default="",
                metavar="WHERE",
                required=data == "must",
                help="a run's folder, a config, signals.npz, train.beton, or a folder of pictures",
            )
            _with(added, "with the function of the data set")
        added.add_argument(
            "--force",
            action="store_true",
            help="go on where data and ticket do not fit; says what it risks"
            + ("; write over a file that is there" if action is _ticket_export else ""),
        )
        _json(added)
        return added

    def index(added: argparse.ArgumentParser) -> None:
        added.add_argument("--index", choices=("source", "row"), default="",
                           help="numbers count the data set as it comes (source, where it is known), or the images that LOTUS "
                                "trains on, without those held out or damaged (row)")  # fmt: skip

    show = verb("show", "what a ticket holds", _ticket_show, "may")
    show.add_argument("ticket", help="a ticket (.npz), or a run's folder")
    show.add_argument("--picture", default="", metavar="FILE", help="draw it: .png, .svg or .html")

    compare = verb("compare", "what tickets of the same data share", _ticket_compare, "")
    compare.add_argument("tickets", nargs="+", metavar="ticket", help="two or more tickets (.npz), or runs' folders")

    export = verb("export", "write a ticket as a file of others: .npy, .json, .txt, .csv, .beton, or a folder of images by class",
                  _ticket_export, "may")  # fmt: skip
    export.add_argument("ticket", help="a ticket (.npz), or a run's folder")
    export.add_argument("out", help="rows.npy, rows.json, rows.txt, all.csv, part.beton, or a folder's name")
    export.add_argument("--as", dest="kind", choices=("npy", "json", "txt", "csv", "beton", "folder"), default="",
                        help="where the name does not say it")  # fmt: skip
    export.add_argument("--paths", action="store_true", help="in .txt, paths in place of indices")
    export.add_argument("--labels", action="store_true", help="in .txt, paths and labels")
    export.add_argument("--copy", action="store_true", help="in a folder, copies in place of links")
    index(export)

    bring = verb(
        "import",
        "make a ticket, or scores for `lotus select --score given`, out of a file of others",
        _ticket_import,
        "must",
    )
    bring.add_argument(
        "file", help=".npy, .npz, .txt, .csv, .json, a pickle or PyTorch file of arrays, or a ticket of LOTUS"
    )
    bring.add_argument("--out", required=True, help="where the ticket or the scores go, e.g. ticket.npz")
    bring.add_argument("--as", dest="kind", choices=("rows", "mask", "remove", "order", "scores"), default="",
                       help="rows that stay, a mask, rows that go, an ascending order of all, or one score an image")  # fmt: skip
    bring.add_argument("--column", default="", metavar="NAME", help="which array of a dictionary, or column of a table")
    bring.add_argument("--order", default="index", metavar="HOW",
                       help="one value an image: by index, by class (sorted by label), or a .npy of the index of each (index)")  # fmt: skip
    bring.add_argument("--negate", action="store_true", help="low scores are those to keep")
    bring.add_argument(
        "--keep", type=float, help="of scores, keep this part of the highest: a ticket in place of scores"
    )
    bring.add_argument("--seed", type=int, default=0, help="for ties among them (0)")
    index(bring)


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
    own.add_argument("--keep", action="extend", nargs="+", default=[], metavar="BUDGET=PART",
                     help="macs=0.5, params=0.5, latency=0.5 (on this device), or several, all of which then hold: short for "
                          "prune.keep.macs=0.5")  # fmt: skip
    own.add_argument("--out", default="small", metavar="FOLDER", help="where the small model goes (small)")
    own.add_argument("--force", action="store_true", help="write over another model of LOTUS")
    own.add_argument("--evaluate", type=int, default=5000, metavar="N",
                     help="at most so many validation images are measured on before and after; 0: none (5000)")  # fmt: skip


def _run_options(parser: argparse.ArgumentParser, until: str, config: str | None = None) -> None:
    parser.add_argument("config", nargs=config, help="a YAML file, e.g. configs/digits.yaml")
    _overrides(parser)
    parser.add_argument("--again", action="store_true", help="run every stage again")
    parser.add_argument("--dry-run", action="store_true", help="only say what would run, and what it would cost")
    parser.add_argument("--plain", action="store_true", help="plain lines instead of live progress")
    _with(parser)
    # What DeepSpeed's launcher and its users pass.
    parser.add_argument("--deepspeed", action="store_true", help="accepted for DeepSpeed's sake: it is always on")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed settings of your own (train.deepspeed)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(until=until, first=None)


# ------------------------------------------------------------------------------------------------------------- verbs


def _run(options: argparse.Namespace) -> int:
    from lotus import stages
    from lotus.config import read
    from lotus.report.board import Board
    from lotus.report.terminal import Terminal
    from lotus.run import Run

    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    theirs = [f"train.deepspeed={options.deepspeed_config}"] if options.deepspeed_config else []
    config = read(options.config, [*options.overrides, *theirs])
    shelves = _shelves(options.shelves)
    if options.dry_run:
        from lotus.report.terminal import plan_page

        told = stages.forecast(config, until=options.until, first=options.first, again=options.again, shelves=shelves)
        plan_page(told)
        return 0
    quiet = int(os.environ.get("RANK", "0")) != 0
    events = stages.go(config, until=options.until, first=options.first, again=options.again, shelves=shelves)
    if quiet:
        for _ in events:
            pass
        return 0
    with contextlib.ExitStack() as open_things:
        listeners: list[Terminal | Board] = [open_things.enter_context(Terminal(plain=options.plain or None))]
        if config.tensorboard:
            listeners.append(open_things.enter_context(Board(Run(config).folder / "tensorboard")))
        for event in events:
            for listener in listeners:
                listener.show(event)
    if options.until == "report":
        _last_page(config)
    return 0


def _prune(options: argparse.Namespace) -> int:
    """Of a run, or of a model of one's own."""
    if not options.model:
        own = argparse.ArgumentParser(add_help=False)
        _prune_options(own)
        strange = [flag for flag, default in vars(own.parse_args([])).items() if getattr(options, flag) != default]
        if options.config is None or strange:
            named = f"--{strange[0].replace('_', '-')} belongs to --model NAME. " if strange else ""
            raise Refused(f"lotus prune: {named}Give a CONFIG, or --model NAME --data FOLDER --keep macs=0.5.")
        return _run(options)
    if options.config is not None and "=" not in options.config:
        raise Refused(f"lotus prune --model takes no config ({options.config}), but settings: prune.keep.macs=0.5.")
    if strange := [flag for flag in _flags_of_a_run(options) if flag != "--with"]:
        raise Refused(f"lotus prune --model: is no run, and takes no {strange[0]}. Leave it out.")
    if not options.data:
        raise Refused("lotus prune --model: --data is missing, e.g. --data FOLDER.")
    if options.evaluate < 0:
        raise Refused(f"--evaluate: a number from 0 on, not {options.evaluate}.")
    from lotus.config import one_cut
    from lotus.report.terminal import Terminal, pruned_page
    from lotus.stages import outside

    page = one_cut([*_spelled(options), *([options.config] if options.config else []), *options.overrides])
    job = outside.Job(page, options.out, options.force, options.evaluate, _shelves(options.shelves))
    with Terminal(plain=options.plain or None) as terminal:
        for event in outside.prune(job):
            terminal.show(event)
    if isinstance(event, outside.Cut):
        pruned_page(event.plan, event.values, event.out, event.alone)
    return 0


def _spelled(options: argparse.Namespace) -> list[str]:
    """The settings that flags of ``lotus prune --model`` are short for."""
    named = "npz" if options.data.endswith(".npz") else "imagefolder"
    texts = {
        "model.name": options.model,
        "model.weights": options.weights,
        "data.name": named,
        "data.path": options.data,
    }
    settings = [word for word in options.keep if "." in word.partition("=")[0]]  # --keep macs=0.5 prune.round=16
    keep: dict[str, str] = {}
    budgets = [word for word in options.keep if word not in settings]
    for what, part in _pairs("--keep", budgets, "BUDGET=PART, e.g. --keep macs=0.5"):
        if what in keep:
            raise Refused(f"--keep {what}={part}: there is a --keep {what} already. Give one of them.")
        keep[what] = part
    return [
        *(f"{name}={json.dumps(text, ensure_ascii=False)}" for name, text in texts.items()),
        *(f"prune.keep.{what}={part}" for what, part in keep.items()),
        *settings,
    ]


def _flags_of_a_run(options: argparse.Namespace) -> list[str]:
    """Those that were given, of what a verb takes for a run alone."""
    said = {
        "--again": options.again, "--dry-run": options.dry_run, "--with": options.shelves,
        "--deepspeed_config": options.deepspeed_config,
    }  # fmt: skip
    return [flag for flag, given in said.items() if given]


def _export(options: argparse.Namespace) -> int:
    """Of a run, or of the folder of a model: then into ``export`` inside of it."""
    folder = Path(options.config)
    if not (folder / "spec.json").is_file() or (folder / "config.yaml").is_file():
        return _run(options)
    if strange := [*options.overrides, *_flags_of_a_run(options), *(["--plain"] if options.plain else [])]:
        raise Refused(f"lotus export {folder}: is a model, not a run, and takes no {strange[0]}. Leave it out.")
    from lotus import export, pruning

    sent = export.export(pruning.load(folder), folder / "export", source=folder.resolve().name)
    files = [sent[kind]["file"] for kind in ("timm", "onnx") if sent[kind]]
    _tell(f"{folder / 'export'}: {', '.join([*files, 'MODEL.md'])}")
    for line in [*sent["notes"], *export.lines(sent["timm"], folder / "export")]:
        _tell(f"  {line}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from lotus.pruning import verify

    found = verify(options.folder, against=options.against)
    if options.json:
        print(json.dumps({"folder": options.folder, "faults": list(found.faults), **found.facts}))
    else:
        for fault in found.faults:
            _tell(f"{options.folder}: {fault.removeprefix(f'{options.folder}: ')}", file=sys.stderr)
        if found:
            told = found.facts
            _tell(
                f"{options.folder}: whole. {told['name']}, {told['tensors']} tensors, {told['params']:,} parameters, {told['macs']:,} MACs."
            )
            if options.against:
                _tell(
                    f"Against {options.against}: names the same class for {100 * told['agree']:.0f} % of a few drawn images, "
                    f"logits differ by {told['distance']:.2g} (relative)."
                )
    return 0 if found else 2


def _last_page(config: Config) -> None:
    from lotus.report.terminal import last_page
    from lotus.run import Run

    run = Run(config)
    last_page(json.loads(run.results.read_text(encoding="utf-8")), run.report)


def _select(options: argparse.Namespace) -> int:
    from selection import files
    from selection.lottery import DEFAULT_PICK, DEFAULT_SCORE, Places, reads, select
    from selection.memory import gigabytes
    from selection.signals import Signals
    from selection.subset import Subset

    if options.keep is None:
        if not 0 <= options.prune < 1:
            raise Refused(f"--prune: the part that goes lies in [0, 1), not {options.prune}.")
        options.keep = round(1 - options.prune, 12)  # 1 - 0.7 is 0.30000000000000004
    if not 0 < options.keep <= 1:
        raise Refused(f"--keep: the part that stays lies in (0, 1], not {options.keep}.")
    settings: dict[str, dict[str, Any]] = {"score": {}, "pick": {}}
    form = "score.NAME=VALUE or pick.NAME=VALUE, e.g. --set pick.bins=20"
    for key, value in _pairs("--set", options.set, form):
        method, dot, name = key.partition(".")
        if not (dot and method in settings):
            raise Refused(f"--set {key}={value}: write {form}.")
        if name == "name":
            raise Refused(f"--set {key}={value}: which one it is, is said by --{method}. Write --{method} {value}.")
        settings[method][name] = _value(value)
    options.score = options.score or DEFAULT_SCORE
    score = {**settings["score"], "name": options.score}
    options.pick = options.pick or DEFAULT_PICK
    pick = {**settings["pick"], "name": options.pick}
    shelves = _shelves(options.shelves)
    typed = Places(
        score="--score", pick="--pick", keep="--keep" if options.prune is None else f"--prune {options.prune:g}",
        floor="--floor", unbalanced="--no-balance", start="--start", max_memory="--max-memory",
        options_of_score="--set score", options_of_pick="--set pick",
    )  # fmt: skip
    if options.out:
        files.check(options.out)
        _refuse_to_replace(Path(options.out))
    if options.picture:
        from lotus.report import ticket as picture

        picture.check(options.picture)
    signals = Signals.load(options.signals, only=reads(score, pick, shelves))
    drawn = select(
        signals,
        score=score,
        pick=pick,
        keep=options.keep,
        balance=not options.no_balance,
        floor=options.floor,
        seed=options.seed,
        start=Subset.load(options.start) if options.start else None,
        max_memory=gigabytes(options.max_memory, "--max-memory") if options.max_memory else None,
        shelves=shelves,
        places=typed,
    )
    if options.out:
        drawn.subset.save(options.out)
    if options.picture:
        from lotus import ticket

        picture.write(options.picture, drawn.subset, ticket.recorded(options.signals, drawn.subset, shelves))
    classes = signals.classes or [str(number) for number in range(signals.n_classes)]
    kept, of = _per_class(signals["labels"], drawn.subset.rows, signals.n_classes)
    if options.json:
        print(json.dumps({
            "kept": len(drawn.subset.rows), "of": len(signals["labels"]), "keep": options.keep, "seed": options.seed,
            "score": options.score, "pick": options.pick, "out": options.out, "warnings": list(drawn.warnings),
            "picture": options.picture,
            "classes": [{"class": name, "kept": k, "of": o} for name, k, o in zip(classes, kept, of)],
        }))  # fmt: skip
        return 0
    from lotus.report.terminal import ticket_page

    ticket_page(classes, kept, of, drawn.scores, drawn.subset.rows, title=f"{options.score}, {options.pick}",
                warnings=drawn.warnings, out=options.out)  # fmt: skip
    return 0


def _refuse_to_replace(out: Path, *, scores: bool = False) -> None:
    """A probe may be hours of work: a ticket is written over a ticket only, and scores over those that were imported alone."""
    from selection.signals import Signals
    from selection.subset import Subset

    if not out.exists():
        return
    wanted = "file of imported scores alone" if scores else "ticket"
    try:
        if scores:
            fits = set(Signals.load(out, only=()).recorded) == {"labels", "given"}
        else:
            fits = bool(Subset.load(out))
    except Refused:
        fits = False
    if not fits:
        raise Refused(f"--out {out}: there is something there that is no {wanted}. Give another name, or remove it.")


def _nothing(options: argparse.Namespace) -> int:
    raise AssertionError("argparse asks for a verb")


def _ticket_show(options: argparse.Namespace) -> int:
    from lotus import ticket
    from selection import exchange

    subset, data = ticket.opened(options.ticket, options.data, _shelves(options.shelves))
    notes = (
        []
        if data is None
        else ticket.held(subset, data, force=options.force, risk="names and pictures may be of other images")
    )
    told = exchange.describe(subset)
    if options.picture:
        from lotus.report import ticket as picture

        picture.write(options.picture, subset, data)
    if options.json:
        print(json.dumps({**told, "notes": notes, "picture": options.picture}))
        return 0
    from lotus.report.terminal import ticket_told

    ticket_told(told, subset.scores, subset.rows, place=options.ticket, notes=notes, picture=options.picture)
    return 0


def _ticket_compare(options: argparse.Namespace) -> int:
    from lotus import ticket
    from selection import exchange

    if len(options.tickets) < 2:
        raise Refused("lotus ticket compare: give two tickets or more.")
    subsets = [ticket.opened(name)[0] for name in options.tickets]
    told = exchange.compare(subsets, force=options.force)
    if options.json:
        print(json.dumps({"tickets": options.tickets, **told}))
        return 0
    from lotus.report.terminal import compare_page

    same = len({subset.fingerprint for subset in subsets}) == 1
    risk = (
        []
        if same
        else [
            "forced: these tickets are of different data; a row of one may be another image than the same row of the other"
        ]
    )
    compare_page(options.tickets, told, notes=risk)
    return 0


def _ticket_export(options: argparse.Namespace) -> int:
    from lotus import ticket

    subset, data = ticket.opened(options.ticket, options.data, _shelves(options.shelves))
    told = ticket.export(
        subset, data, options.out, kind=options.kind, index=options.index, paths=options.paths,
        labels=options.labels, copy=options.copy, force=options.force,
    )  # fmt: skip
    return _written(options, told, kept=len(subset), of=subset.total)


def _ticket_import(options: argparse.Namespace) -> int:
    from lotus import ticket
    from selection.subset import Subset

    data = ticket.behind(options.data, _shelves(options.shelves))
    made, told = ticket.bring(
        options.file, data, kind=options.kind, column=options.column, order=options.order, index=options.index,
        negate=options.negate, keep=options.keep, seed=options.seed, force=options.force,
    )  # fmt: skip
    if Path(options.out).suffix != ".npz":
        raise Refused(f"--out {options.out}: tickets and scores are .npz files. Say --out {options.out}.npz.")
    _refuse_to_replace(Path(options.out), scores=not isinstance(made, Subset))
    made.save(options.out)
    if isinstance(made, Subset):
        return _written(options, told, kept=len(made), of=made.total)
    return _written(options, told, scores=made.images)


def _written(options: argparse.Namespace, told: list[str], **numbers: int) -> int:
    if options.json:
        print(json.dumps({"out": str(options.out), **numbers, "told": told}))
        return 0
    words = (
        f"{numbers['kept']:,} of {numbers['of']:,} images"
        if "kept" in numbers
        else f"scores of {numbers['scores']:,} images"
    )
    _tell(f"{options.out}: {words}")
    for line in told:
        _tell(f"  {line}")
    return 0


def _patches(options: argparse.Namespace) -> int:
    from lotus import stages
    from lotus.config import read
    from lotus.report.terminal import Terminal, patches_page

    folder = Path(options.config)
    bare = folder.is_dir() and not (folder / "config.yaml").is_file()
    if bare and not (folder / "train.beton").is_file():
        raise Refused(
            f"{folder}: neither a run nor prepared images are here. Give a config file, or run: lotus prepare."
        )
    config = read(None, [f"data.folder={folder}", *options.overrides]) if bare else read(folder, options.overrides)
    if options.images < 1:
        raise Refused(f"--images: at least 1, not {options.images}.")
    making = stages.patch_ticket(
        config,
        score=options.score,
        model=options.model,
        keep=options.keep,
        prepared=bare,
        picture=Path(options.picture) if options.picture else None,
        shown=options.images,
        shelves=_shelves(options.shelves),
    )
    with contextlib.nullcontext() if options.json else Terminal(plain=options.plain or None) as terminal:
        while True:
            try:
                event = next(making)
            except StopIteration as stop:
                told = stop.value
                break
            if terminal is not None:
                terminal.show(event)
    if options.json:
        print(json.dumps(told))
    else:
        patches_page(told)
    return 0


def _per_class(labels: np.ndarray, rows: np.ndarray, classes: int) -> tuple[list[int], list[int]]:
    import numpy as np

    return (
        np.bincount(labels[rows], minlength=classes).tolist(),
        np.bincount(labels, minlength=classes).tolist(),
    )


def _evaluate(options: argparse.Namespace) -> int:
    from lotus import stages
    from lotus.config import read

    config = read(options.config, options.overrides)
    found = stages.evaluate_model(config, options.model)
    where = "" if found["own_data"] else f" of {config.data.path or config.data.name}, not the run's own"
    if options.json:
        print(json.dumps(found))
    else:
        _tell(
            f"{options.model}: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f} "
            f"on {found['images']:.0f} images{where}; {found['params'] / 1e6:.3f} M parameters, {found['macs'] / 1e6:.2f} M MACs"
        )
    if found["outdated"]:
        _tell(
            f"! {options.model} is older than what it was made from, or of other settings; lotus run makes it again",
            file=sys.stderr,
        )
    return 0


def _report(options: argparse.Namespace) -> int:
    from lotus.config import read
    from lotus.report import html
    from lotus.report.terminal import last_page
    from lotus.run import Run
    from lotus.stages import plan

    folder = Path(options.folder)
    results = folder / "results.json"
    if not results.is_file():
        raise Refused(f"{folder}: no results.json here, so no finished run. Run: lotus run CONFIG.")
    page = html.write(folder)
    last_page(json.loads(results.read_text(encoding="utf-8")), page)
    config = read(folder)
    if older := Run(config).outdated(plan(config)):
        _tell(
            f"! {', '.join(older)}: older than what they were made from, or of other settings; lotus run makes them again",
            file=sys.stderr,
        )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from lotus import doctor
    from lotus.report.terminal import doctor_page

    checks = list(doctor.checks())
    doctor_page([check for check in checks if check.cure] if options.brief else checks)
    return 2 if any(check.fatal and check.cure for check in checks) else 0


# ---------------------------------------------------------------------------------------------------- what verbs share


def _shelves(files: Sequence[str]) -> list[ModuleType]:
    """Modules of the user's own, named on the command line (never by a config, which may come from elsewhere)."""
    shelves = []
    for number, file in enumerate(files):
        spec = importlib.util.spec_from_file_location(f"lotus_shelf_{number}", file)
        if spec is None or spec.loader is None or not Path(file).is_file():
            raise Refused(f"--with {file}: no such Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise Refused(f"--with {file}: it cannot be imported: {type(error).__name__}: {error}") from error
        shelves.append(module)
    return shelves


def _pairs(flag: str, given: Sequence[str], form: str) -> Iterator[tuple[str, str]]:
    """(NAME, VALUE) of each ``NAME=VALUE`` that a flag was given; ``form`` says how it is written."""
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise Refused(f"{flag} {text}: write {form}.")
        yield name, value


def _value(text: str) -> Any:
    from lotus import yaml_safe

    try:
        return yaml_safe.load(text, "value")
    except Refused:
        raise Refused(f"{text[:80]}: is no value in YAML. Write a number, a word, or a list like [1, 2].") from None


def _tell(text: object, *, file: TextIO | None = None) -> None:
    """A message, whatever names are in it; one of :func:`print` would hand their escapes to the terminal."""
    print(shown(text, lines=True), file=file)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that what is half-written is taken away. Training has its own, gentler way."""

    def interrupt(number: int, frame: Any) -> None:
        raise _Interrupted

    try:
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever called us keeps the signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Interrupted(KeyboardInterrupt):
    """Python ends itself by SIGINT, whatever exit code it was told, once a plain KeyboardInterrupt has left an exec'd string."""
