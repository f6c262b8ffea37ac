"""``lotus inspect``: what is wrong with a folder of pictures. Needs no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lotus.cli.shared import Verbs, as_json, load_shelves, tell, with_files
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.data.source import Source


def add(verb: Verbs) -> None:
    added = verb("inspect", "look for doubles, leaks, wrong labels, outliers and damage in pictures", _inspect)
    added.add_argument("data", help="a folder of pictures, a config, or a run's folder, whose signals judge the labels")
    added.add_argument("--out", default="inspected", metavar="FOLDER",
                       help="where inspect.html, inspect.json and delete.txt go (inspected)")  # fmt: skip
    added.add_argument("--delete", default="duplicates,leaks,damaged", metavar="KINDS",
                       help="what goes on the list: duplicates, leaks, damaged, labels (the first three)")  # fmt: skip
    added.add_argument(
        "--most", type=int, default=1000, help="label errors and outliers that are listed at most (1000)"
    )
    with_files(added, "with the function of the data set")
    as_json(added)


def _inspect(options: argparse.Namespace) -> int:
    from lotus import files, ticket
    from lotus.data import threads
    from lotus.data.dataset import open_data
    from lotus.inspect import findings, page

    kinds = tuple(options.delete.split(",")) if options.delete else ()
    if strange := [kind for kind in kinds if kind not in findings.KINDS]:
        raise Refused(f"--delete {strange[0]}: there is no such kind. There are: {', '.join(findings.KINDS)}.")
    if options.most < 1:
        raise Refused(f"--most: at least 1, not {options.most}.")
    out = Path(options.out)
    for name in ("inspect.html", "inspect.json", "delete.txt"):
        files.check(out / name)
    shelves = load_shelves(options.shelves)
    behind = ticket.behind(options.data, shelves)
    if behind.settings is None:
        raise Refused(f"{options.data}: there are no pictures to look at. Give a folder of them, a config or a run.")
    train, val = open_data(behind.settings.data, shelves, learned=False)
    recorded = behind.signals
    margins = recorded["margin"] if recorded is not None and "margin" in recorded else None
    if margins is not None:
        behind.images()  # refuses signals of pictures that have changed since
    root = behind.settings.data.path if train.root else ""
    found = findings.inspect(train, val, margins=margins, most=options.most, workers=threads.count(), root=root)
    gone = found.to_delete(kinds)
    names = [train.name(row) for row in gone] if train.root else [str(_number(train, row)) for row in gone]
    if odd := next((name for name in names if "\n" in name), None):
        raise Refused(f"{odd!r}: a name with a line break cannot stand on a list. Rename it.")
    told = found.as_json() | {"delete": names}
    files.write_json(out / "inspect.json", told)
    files.write_bytes(out / "delete.txt", "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"))
    files.write_text(out / "inspect.html", page.render(found, f"Inspected: {options.data}", len(gone)))
    if options.json:
        print(json.dumps(told))
        return 0
    counts = {name: len(told[name]) for name in ("duplicates", "leaks", "labels", "outliers", "damaged")}
    tell(f"{len(train):,} images for training ({train.where}), {len(val):,} for validation ({val.where})")
    tell("  " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if found.passed:
        tell("  passed over: " + ", ".join(f"{count:,} {ending}" for ending, count in found.passed.items()))
    tell(f"{out / 'inspect.html'}: look here first")
    tell(f"{out / 'delete.txt'}: {len(names):,} images, for select.exclude={out / 'delete.txt'}")
    return 0


def _number(source: Source, row: int) -> int:
    """As others count: the data set as it comes."""
    return row if source.rows is None else int(source.rows[row])
