"""``lotus select``: a ticket out of recorded signals, or of embeddings and scores that others made. Needs no torch, but to make
embeddings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from lotus.cli import sharded
from lotus.cli.shared import Verbs, as_json, load_shelves, pairs, scalar, tell, with_files
from selection.errors import Refused
from selection.images import Words
from selection.shares import BALANCES

if TYPE_CHECKING:
    import numpy as np

    from selection.incoming import Incoming
    from selection.lottery import Lottery, Places
    from selection.signals import Signals

FLAGS = Words(
    {"labels": "--labels", "paths": "--paths", "weights": "--weights"}, " ", "Give a table with a column of paths."
)
"""What refusals of selection call what is said here."""
LISTS = (".txt", ".csv", ".json", ".npy", ".parquet")
"""Endings of what is written for others."""
TABLES = (".csv", ".parquet")
"""Those that have the weights always."""


def add(verb: Verbs) -> None:
    ticket = verb("select", "draw a ticket (a subset of the images) from recorded signals; needs no torch", _select)
    ticket.add_argument("signals", help="signals.npz, as `lotus score` leaves it; embeddings (.npy, .npz); a table with a score an "
                        "image (.csv, .tsv, .parquet); with --features, a folder of pictures")  # fmt: skip
    sharded.add(ticket)
    ticket.add_argument("--features", default="", metavar="MODEL", help="make the embeddings of a folder of pictures: a timm name, a "
                        "folder of LOTUS, or NAME=FILE with weights of your own")  # fmt: skip
    ticket.add_argument("--embeddings", default="", metavar="FILE.npz",
                        help="where --features leaves them, to select from again (FOLDER.embeddings.npz)")  # fmt: skip
    ticket.add_argument("--labels", default="", metavar="FILE",
                        help="of embeddings and scores of others: a label an image, as .npy, .npz, .txt or a table")  # fmt: skip
    ticket.add_argument("--score", help="a score of selection/scores.py; higher = keep first (dual)")
    ticket.add_argument("--pick", help="a picker of selection/pickers.py (beta)")
    budget = ticket.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=float, help="the fraction of the images that stays, in (0, 1]")
    budget.add_argument("--prune", type=float, help="the fraction that goes, in [0, 1): the complement of --keep")
    ticket.add_argument("--seed", type=int, default=0, help="what is random follows from it (0)")
    ticket.add_argument(
        "--out", default="", help="where the ticket goes, e.g. ticket.npz; as a list: .txt, .csv, .json, .npy, .parquet"
    )
    ticket.add_argument("--weights", action="store_true",
                        help="in a list, write the weights too (.csv and .parquet have them always)")  # fmt: skip
    ticket.add_argument("--start", default="", metavar="TICKET", help="a ticket whose images all stay; more are added")
    balance = ticket.add_mutually_exclusive_group()
    balance.add_argument("--balance", choices=BALANCES, default=None, help="of every class the same fraction (so without it), as "
                         "many as of any other (equal), or by the root of its size (sqrt)")  # fmt: skip
    balance.add_argument("--no-balance", action="store_true", help="pick from all images, whatever their class")
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
    from selection.subset import Subset

    _check_signals(options)
    asked = _asked(options)
    shelves = load_shelves(options.shelves)
    _check_outputs(options)
    if options.more or options.shards or options.dask:
        drawn, given = sharded.draw(options, asked.pick, asked.keep)
        _tell(options, asked, given.signals, drawn, [*given.told, *_written(options, drawn, given)])
        return 0
    given = _given(options, asked, shelves)
    signals, asked = given.signals, _fitting(options, asked, given.signals)
    request = lottery.Request(
        score=asked.score,
        pick=asked.pick,
        keep=asked.keep,
        balance=False if options.no_balance else options.balance or True,
        floor=options.floor,
        seed=options.seed,
        start=Subset.load(options.start) if options.start else None,
        max_memory=gigabytes(options.max_memory, "--max-memory") if options.max_memory else None,
    )
    drawn = lottery.draw(signals, request, shelves, _places(options))
    notes = [
        *given.told,
        *([f"embeddings: {options.signals}"] if options.features else []),
        *_written(options, drawn, given),
    ]
    if options.picture:
        from lotus import ticket
        from lotus.report import ticket_picture as picture

        picture.write(options.picture, drawn.subset, ticket.recorded(options.signals, drawn.subset, shelves, given))
    _tell(options, asked, signals, drawn, notes)
    return 0


def _check_signals(options: argparse.Namespace) -> None:
    """Refuse a config and a run, which other verbs take, with what to say instead."""
    given = Path(options.signals)
    is_run, then = (given / "config.yaml").is_file(), "lotus select {} --keep 0.3 --out ticket.npz"
    if is_run and (given / "signals.npz").is_file():
        raise Refused(f"{given}: is a run. Give its signals: {then.format(given / 'signals.npz')}")
    if is_run or given.suffix.lower() in (".yaml", ".yml"):
        what, signals = ("run", given / "signals.npz") if is_run else ("config", Path("RUN/signals.npz"))
        raise Refused(
            f"{given}: is a {what}, and a ticket is drawn from signals. Have them recorded: lotus score {given} select.keep=0.3; then "
            f"{then.format(signals)}. Or lotus train {given} select.keep=0.3 draws the ticket that its settings say, and trains."
        )


def _given(options: argparse.Namespace, asked: _Asked, shelves: list[ModuleType]) -> Incoming:
    """What is known of the images."""
    from selection import incoming, lottery

    if options.features:
        if not (options.pick or options.score):
            raise Refused("--pick: say one that goes by embeddings, e.g. --pick facility_location.")
        lottery.choose(score=asked.score, pick=asked.pick, keep=asked.keep, shelves=shelves, places=_places(options))
        options.signals = _featured(options)
    elif options.embeddings:
        raise Refused(f"--embeddings {options.embeddings}: is where --features leaves them. Say --features MODEL too.")
    elif Path(options.signals).is_dir():
        raise Refused(
            f"{options.signals}: is a folder. Give what `lotus score` leaves in it (signals.npz), or embeddings (.npy); or say "
            "--features MODEL, to make them of its pictures."
        )
    only = lottery.reads(asked.score, asked.pick, shelves)
    return incoming.read(options.signals, labels=options.labels, only=only, say=FLAGS)


def _featured(options: argparse.Namespace) -> str:
    """Make the embeddings of a folder of pictures; returns their file."""
    import contextlib

    from lotus.events import Said
    from lotus.report.live import Terminal
    from lotus.stages import features

    out = options.embeddings or f"{Path(options.signals).resolve().name}.embeddings.npz"
    with contextlib.nullcontext() if options.json else Terminal() as terminal:
        for event in features.make(features.Job(options.features, options.signals, out)):
            if terminal is not None:
                terminal.show(event)
            elif isinstance(event, Said) and event.level == "warning":
                tell(f"! {event.text}", file=sys.stderr)
    return out


def _fitting(options: argparse.Namespace, asked: _Asked, signals: Signals) -> _Asked:
    """The methods for what is there, where it is of others: the score that came with it, if none is said.

    Raises:
        Refused: the picker reads what is not there; names those that do not.
    """
    from selection import methods, pickers, scores

    if "p_label" in signals.known or options.score:
        return asked
    scored = "given" in signals
    here = {*signals.known, "budget", "keep", "quotas", "rng", "start"} | ({"scores", "ranking"} if scored else set())
    picks, own = (
        {
            name: set(methods.reads(getattr(shelf, name))) - ({"labels"} if name == "random" else set())
            for name in methods.names(shelf)
        }
        for shelf in (pickers, scores)
    )
    missing = picks.get(asked.pick["name"], set()) - here
    if missing:
        lacks = "a score" if missing == {"scores", "ranking"} else ", ".join(sorted(missing))
        scorers = [name for name, needed in own.items() if needed <= here]
        first = "" if scored else f" Or score them first: --score {', '.join(scorers)}."
        raise Refused(
            f"--pick: {asked.pick['name']!r} reads {lacks}, and {options.signals} has {', '.join(signals.known)}. Take one of: "
            f"{', '.join(name for name, needed in picks.items() if needed <= here)}.{first}"
        )
    return asked._replace(score={**asked.score, "name": "given"}) if scored else asked


class _Asked(NamedTuple):
    """What is to be drawn."""

    keep: float
    score: dict[str, Any]
    pick: dict[str, Any]


def _asked(options: argparse.Namespace) -> _Asked:
    from selection.lottery import DEFAULT_PICK, DEFAULT_SCORE

    keep = options.keep
    if keep is None and options.prune is None:
        raise Refused("--keep: nothing says how many images stay. Say e.g. --keep 0.3, or --prune 0.7.")
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
        floor="--floor", balance="--balance", unbalanced="--no-balance", start="--start", max_memory="--max-memory",
        options_of_score="--set score", options_of_pick="--set pick", labels="--labels FILE, a label an image",
    )  # fmt: skip


def _check_outputs(options: argparse.Namespace) -> None:
    """Before the work: whether all can be written."""
    from selection import atomic_files, exchange

    if options.out:
        atomic_files.check(options.out)
        if Path(options.out).suffix in LISTS:
            exchange.check(options.out)
            if Path(options.out).exists():
                raise Refused(f"--out {options.out}: is there already. Give another name, or remove it.")
        else:
            refuse_to_replace(Path(options.out))
    if options.picture:
        from lotus.report import ticket_picture as picture

        picture.check(options.picture)


def _written(options: argparse.Namespace, drawn: Lottery, given: Incoming) -> list[str]:
    """Write the ticket, and sentences about what a list leaves out."""
    from selection import exchange

    if not options.out:
        return []
    ending = Path(options.out).suffix
    if ending not in LISTS:
        drawn.subset.save(options.out)
        return []
    paths = given.names is not None and (ending == ".txt" or options.weights)
    exchange.write(drawn.subset, options.out, given.images(FLAGS), paths=paths, weights=options.weights)
    heavy = drawn.subset.weights
    left = ending not in TABLES and not options.weights and heavy.max() > heavy.min()
    return ["the weights are left behind: --weights writes them too"] if left else []


def _tell(options: argparse.Namespace, asked: _Asked, signals: Signals, drawn: Lottery, told: list[str]) -> None:
    classes = signals.classes or [str(number) for number in range(signals.n_classes)]
    kept, of = per_class(signals["labels"], drawn.subset.rows, signals.n_classes)
    score, pick = asked.score["name"], asked.pick["name"]
    notes = [*told, *drawn.warnings]
    if options.score and not drawn.read:
        notes.append(f"--pick {pick} goes by no score: {score} had no part in it")
    if options.json:
        print(json.dumps({
            "kept": len(drawn.subset.rows), "of": len(signals["labels"]), "keep": asked.keep, "seed": options.seed,
            "score": score if drawn.read or options.score else None, "pick": pick, "out": options.out, "warnings": notes,
            "picture": options.picture,
            "classes": [{"class": name, "kept": k, "of": o} for name, k, o in zip(classes, kept, of)],
        }))  # fmt: skip
        return
    from lotus.report.terminal import ticket_page

    named = bool(drawn.read or options.score)  # what was not asked for and has no part in it is not told
    ticket_page(list(zip(classes, kept, of, strict=True)), drawn.scores if named else None, drawn.subset.rows,
                title=f"{score}, {pick}" if named else pick, highest_first=pick == "top_k", warnings=notes,
                out=options.out)  # fmt: skip


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

    return (np.bincount(labels[rows], minlength=classes).tolist(), np.bincount(labels, minlength=classes).tolist())
