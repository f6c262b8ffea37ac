"""``lotus select``: a ticket out of recorded signals. Needs no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lotus.cli.shared import Verbs, as_json, load_shelves, pairs, scalar, with_files
from selection.errors import Refused

if TYPE_CHECKING:
    import numpy as np

    from selection.lottery import Lottery, Places
    from selection.signals import Signals


def add(verb: Verbs) -> None:
    ticket = verb("select", "draw a ticket (a subset of the images) from recorded signals; needs no torch", _select)
    ticket.add_argument("signals", help="signals.npz, as `lotus score` leaves it")
    ticket.add_argument("--score", help="a score of selection/scores.py; higher = keep first (dual)")
    ticket.add_argument("--pick", help="a policy of selection/pickers.py (beta)")
    budget = ticket.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep", type=float, help="the fraction of the images that stays, in (0, 1]")
    budget.add_argument("--prune", type=float, help="the fraction that goes, in [0, 1): the complement of --keep")
    ticket.add_argument("--seed", type=int, default=0, help="what is random follows from it (0)")
    ticket.add_argument("--out", default="", help="where the ticket goes, e.g. ticket.npz")
    ticket.add_argument("--start", default="", metavar="TICKET", help="a ticket whose images all stay; more are added")
    ticket.add_argument("--no-balance", action="store_true", help="do not keep the same fraction of every class")
    ticket.add_argument("--floor", type=float, metavar="FRACTION",
                        help="with --no-balance: the fraction of what balance would give it that each class keeps at least")  # fmt: skip
    ticket.add_argument(
        "--max-memory", default="", metavar="SIZE", help="what score and picker may take, e.g. 4GB or 500MB"
    )
    ticket.add_argument("--picture", metavar="FILE", help="the picture of `lotus ticket show`: .png, .svg or .html")
    ticket.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of the method: score.window=5, pick.bins=20")  # fmt: skip
    with_files(ticket)
    as_json(ticket)


def _select(options: argparse.Namespace) -> int:
    from selection import lottery
    from selection.memory import gigabytes
    from selection.signals import Signals
    from selection.subset import Subset

    asked = _asked(options)
    shelves = load_shelves(options.shelves)
    _check_outputs(options)
    signals = Signals.load(options.signals, only=lottery.reads(asked.score, asked.pick, shelves))
    drawn = lottery.select(
        signals,
        score=asked.score,
        pick=asked.pick,
        keep=asked.keep,
        balance=not options.no_balance,
        floor=options.floor,
        seed=options.seed,
        start=Subset.load(options.start) if options.start else None,
        max_memory=gigabytes(options.max_memory, "--max-memory") if options.max_memory else None,
        shelves=shelves,
        places=_places(options),
    )
    if options.out:
        drawn.subset.save(options.out)
    if options.picture:
        from lotus import ticket
        from lotus.report import ticket as picture

        picture.write(options.picture, drawn.subset, ticket.recorded(options.signals, drawn.subset, shelves))
    _tell(options, asked, signals, drawn)
    return 0


class _Asked(NamedTuple):
    """What is to be drawn."""

    keep: float
    score: dict[str, Any]
    pick: dict[str, Any]


def _asked(options: argparse.Namespace) -> _Asked:
    from selection.lottery import DEFAULT_PICK, DEFAULT_SCORE

    keep = options.keep
    if keep is None:
        if not 0 <= options.prune < 1:
            raise Refused(f"--prune: the fraction that goes lies in [0, 1), not {options.prune}.")
        keep = round(1 - options.prune, 12)  # 1 - 0.7 is 0.30000000000000004
    if not 0 < keep <= 1:
        raise Refused(f"--keep: the fraction that stays lies in (0, 1], not {keep}.")
    settings: dict[str, dict[str, Any]] = {"score": {}, "pick": {}}
    form = "score.NAME=VALUE or pick.NAME=VALUE, e.g. --set pick.bins=20"
    for key, value in pairs("--set", options.set, form):
        method, dot, name = key.partition(".")
        if not (dot and method in settings):
            raise Refused(f"--set {key}={value}: write {form}.")
        if name == "name":
            raise Refused(f"--set {key}={value}: which one it is, is said by --{method}. Write --{method} {value}.")
        settings[method][name] = scalar(value)
    score = {**settings["score"], "name": options.score or DEFAULT_SCORE}
    return _Asked(keep, score, {**settings["pick"], "name": options.pick or DEFAULT_PICK})


def _places(options: argparse.Namespace) -> Places:
    from selection.lottery import Places

    return Places(
        score="--score", pick="--pick", keep="--keep" if options.prune is None else f"--prune {options.prune:g}",
        floor="--floor", unbalanced="--no-balance", start="--start", max_memory="--max-memory",
        options_of_score="--set score", options_of_pick="--set pick",
    )  # fmt: skip


def _check_outputs(options: argparse.Namespace) -> None:
    """Before the work: whether all can be written."""
    from selection import files

    if options.out:
        files.check(options.out)
        refuse_to_replace(Path(options.out))
    if options.picture:
        from lotus.report import ticket as picture

        picture.check(options.picture)


def _tell(options: argparse.Namespace, asked: _Asked, signals: Signals, drawn: Lottery) -> None:
    classes = signals.classes or [str(number) for number in range(signals.n_classes)]
    kept, of = per_class(signals["labels"], drawn.subset.rows, signals.n_classes)
    score, pick = asked.score["name"], asked.pick["name"]
    if options.json:
        print(json.dumps({
            "kept": len(drawn.subset.rows), "of": len(signals["labels"]), "keep": asked.keep, "seed": options.seed,
            "score": score, "pick": pick, "out": options.out, "warnings": list(drawn.warnings),
            "picture": options.picture,
            "classes": [{"class": name, "kept": k, "of": o} for name, k, o in zip(classes, kept, of)],
        }))  # fmt: skip
        return
    from lotus.report.terminal import ticket_page

    ticket_page(list(zip(classes, kept, of, strict=True)), drawn.scores, drawn.subset.rows, title=f"{score}, {pick}",
                warnings=drawn.warnings, out=options.out)  # fmt: skip


def refuse_to_replace(out: Path, *, scores: bool = False) -> None:
    """A proxy may be hours of work: a ticket is written over a ticket only, and scores over those that were imported alone."""
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


def per_class(labels: np.ndarray, rows: np.ndarray, classes: int) -> tuple[list[int], list[int]]:
    import numpy as np

    return (
        np.bincount(labels[rows], minlength=classes).tolist(),
        np.bincount(labels, minlength=classes).tolist(),
    )
