"""``lotus ticket``: look at tickets, compare them, bring them in and out as files of others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from lotus.cli.select import refuse_to_replace
from lotus.cli.shared import Verbs, as_json, load_shelves, tell, with_files
from selection.errors import Refused


def add(verb: Verbs) -> None:
    does = "look at a ticket, compare tickets, bring them in and out as files of others"
    verbs = verb("ticket", does, _ticket_show).add_subparsers(title="verbs", required=True, metavar="VERB")

    def part(name: str, does: str, action: Callable[[argparse.Namespace], int], data: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        added.set_defaults(verb=action)
        if data:
            _data(added, must=data == "must")
        more = "; write over a file that is there" if action is _ticket_export else ""
        added.add_argument("--force", action="store_true",
                           help=f"go on where data and ticket do not fit; says what it risks{more}")  # fmt: skip
        as_json(added)
        return added

    show = part("show", "what a ticket holds", _ticket_show, "may")
    show.add_argument("ticket", help="a ticket (.npz), or a run's folder")
    show.add_argument("--picture", default="", metavar="FILE", help="draw it: .png, .svg or .html")

    compare = part("compare", "what tickets of the same data share", _ticket_compare, "")
    compare.add_argument("tickets", nargs="+", metavar="ticket", help="two or more tickets (.npz), or runs' folders")

    does = (
        "write a ticket as a file of others: .npy, .json, .txt, .csv, .parquet, .beton, or a folder of images by class"
    )
    _export_flags(part("export", does, _ticket_export, "may"))

    does = "make a ticket, or scores for `lotus select --score given`, out of a file of others"
    _import_flags(part("import", does, _ticket_import, "must"))


def _data(added: argparse.ArgumentParser, *, must: bool) -> None:
    added.add_argument("--data", default="", metavar="WHERE", required=must,
                       help="a run's folder, a config, signals.npz, train.beton, or a folder of pictures")  # fmt: skip
    with_files(added, "with the function of the data set")


def _index(added: argparse.ArgumentParser) -> None:
    added.add_argument("--index", choices=("source", "row"), default="",
                       help="numbers count the data set as it comes (source, where it is known), or the images that LOTUS "
                            "trains on, without those held out or damaged (row)")  # fmt: skip


def _export_flags(export: argparse.ArgumentParser) -> None:
    export.add_argument("ticket", help="a ticket (.npz), or a run's folder")
    export.add_argument("out", help="rows.npy, rows.json, rows.txt, all.csv, part.beton, or a folder's name")
    export.add_argument("--as", dest="kind", choices=("npy", "json", "txt", "csv", "parquet", "beton", "folder"), default="",
                        help="where the name does not say it")  # fmt: skip
    export.add_argument("--paths", action="store_true", help="in .txt, paths in place of indices")
    export.add_argument("--labels", action="store_true", help="in .txt, paths and labels")
    export.add_argument("--weights", action="store_true",
                        help="in .npy, .json and .txt, the weights too; .csv and .parquet have them always")  # fmt: skip
    export.add_argument("--copy", action="store_true", help="in a folder, copies in place of links")
    _index(export)


def _import_flags(bring: argparse.ArgumentParser) -> None:
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
        "--keep", type=float, help="of scores, keep this fraction of the highest: a ticket in place of scores"
    )
    bring.add_argument("--seed", type=int, default=0, help="for ties among them (0)")
    _index(bring)


def _ticket_show(options: argparse.Namespace) -> int:
    from lotus import ticket
    from selection import exchange

    subset, data = ticket.opened(options.ticket, options.data, load_shelves(options.shelves))
    notes = (
        []
        if data is None
        else ticket.held(subset, data, force=options.force, risk="names and pictures may be of other images")
    )
    described = exchange.describe(subset)
    if options.picture:
        from lotus.report import ticket_picture as picture

        picture.write(options.picture, subset, data)
    if options.json:
        print(json.dumps({**described, "notes": notes, "picture": options.picture}))
        return 0
    from lotus.report.terminal import ticket_told

    ticket_told(described, subset.scores, subset.rows, place=options.ticket, notes=notes, picture=options.picture)
    return 0


def _ticket_compare(options: argparse.Namespace) -> int:
    from lotus import ticket
    from selection import exchange

    if len(options.tickets) < 2:
        raise Refused("lotus ticket compare: give two tickets or more.")
    subsets = [ticket.opened(name)[0] for name in options.tickets]
    compared = exchange.compare(subsets, force=options.force)
    if options.json:
        print(json.dumps({"tickets": options.tickets, **compared}))
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
    compare_page(options.tickets, compared, notes=risk)
    return 0


def _ticket_export(options: argparse.Namespace) -> int:
    from lotus import ticket

    subset, data = ticket.opened(options.ticket, options.data, load_shelves(options.shelves))
    how = ticket.Export(
        options.kind, options.index, options.paths, options.labels, options.weights, options.copy, options.force
    )
    notes = ticket.export(subset, data, options.out, how)
    return _written(options, notes, kept=len(subset), of=subset.total)


def _ticket_import(options: argparse.Namespace) -> int:
    from lotus import ticket
    from selection.subset import Subset

    data = ticket.behind(options.data, load_shelves(options.shelves))
    how = ticket.Import(
        options.kind, options.column, options.order, options.index, options.negate, options.keep, options.seed, options.force
    )  # fmt: skip
    made, notes = ticket.bring(options.file, data, how)
    if Path(options.out).suffix != ".npz":
        raise Refused(f"--out {options.out}: tickets and scores are .npz files. Say --out {options.out}.npz.")
    refuse_to_replace(Path(options.out), scores=not isinstance(made, Subset))
    made.save(options.out)
    if isinstance(made, Subset):
        return _written(options, notes, kept=len(made), of=made.total)
    return _written(options, notes, scores=made.images)


def _written(options: argparse.Namespace, told: list[str], **numbers: int) -> int:
    if options.json:
        print(json.dumps({"out": str(options.out), **numbers, "told": told}))
        return 0
    words = (
        f"{numbers['kept']:,} of {numbers['of']:,} images"
        if "kept" in numbers
        else f"scores of {numbers['scores']:,} images"
    )
    tell(f"{options.out}: {words}")
    for line in told:
        tell(f"  {line}")
    return 0
