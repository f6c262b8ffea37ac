"""``lotus select``: a ticket out of recorded signals. Needs no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotus.cli.shared import Verbs, as_json, load_shelves, pairs, scalar, with_files
from selection.errors import Refused

if TYPE_CHECKING:
    import numpy as np


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
    from selection import files
    from selection.lottery import DEFAULT_PICK, DEFAULT_SCORE, Places, reads, select
    from selection.memory import gigabytes
    from selection.signals import Signals
    from selection.subset import Subset

    if options.keep is None:
        if not 0 <= options.prune < 1:
            raise Refused(f"--prune: the fraction that goes lies in [0, 1), not {options.prune}.")
        options.keep = round(1 - options.prune, 12)  # 1 - 0.7 is 0.30000000000000004
    if not 0 < options.keep <= 1:
        raise Refused(f"--keep: the fraction that stays lies in (0, 1], not {options.keep}.")
    settings: dict[str, dict[str, Any]] = {"score": {}, "pick": {}}
    form = "score.NAME=VALUE or pick.NAME=VALUE, e.g. --set pick.bins=20"
    for key, value in pairs("--set", options.set, form):
        method, dot, name = key.partition(".")
        if not (dot and method in settings):
            raise Refused(f"--set {key}={value}: write {form}.")
        if name == "name":
            raise Refused(f"--set {key}={value}: which one it is, is said by --{method}. Write --{method} {value}.")
        settings[method][name] = scalar(value)
    options.score = options.score or DEFAULT_SCORE
    score = {**settings["score"], "name": options.score}
    options.pick = options.pick or DEFAULT_PICK
    pick = {**settings["pick"], "name": options.pick}
    shelves = load_shelves(options.shelves)
    typed = Places(
        score="--score", pick="--pick", keep="--keep" if options.prune is None else f"--prune {options.prune:g}",
        floor="--floor", unbalanced="--no-balance", start="--start", max_memory="--max-memory",
        options_of_score="--set score", options_of_pick="--set pick",
    )  # fmt: skip
    if options.out:
        files.check(options.out)
        refuse_to_replace(Path(options.out))
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
    kept, of = per_class(signals["labels"], drawn.subset.rows, signals.n_classes)
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
