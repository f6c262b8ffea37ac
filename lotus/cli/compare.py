"""``lotus compare``: finished runs side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lotus.cli.shared import Verbs, as_json, load_shelves, tell, with_files
from selection.errors import Refused


def add(verb: Verbs) -> None:
    compare = verb("compare", "show finished runs side by side: top-1, what ships, what it cost", _compare)
    compare.add_argument(
        "folders", nargs="+", metavar="RUN", help="folders of finished runs; cost counts against the first"
    )
    compare.add_argument("--html", metavar="FILE", help="also write a page with the curves of accuracy over cost")
    with_files(compare)
    as_json(compare)


def _compare(options: argparse.Namespace) -> int:
    from lotus.config import read
    from lotus.report import compare
    from lotus.report.terminal import table
    from lotus.stages import run_of
    from selection import atomic_files

    shelves, rows = load_shelves(options.shelves), []
    for name in options.folders:
        folder = Path(name)
        if not (folder / "config.yaml").is_file():
            raise Refused(f"{folder}: no run is here. Name the folder of a finished one, e.g. runs/digits.")
        run = run_of(read(folder), shelves)
        if run.results.is_file():
            run.check_file(run.results)
        rows.append(compare.read(folder, run.stages))
    if options.html:
        atomic_files.write_text(options.html, compare.page(rows))
    if options.json:
        print(json.dumps([one._asdict() | {"standard_error": one.error} for one in rows]))
    else:
        table(*compare.table(rows))
        if options.html:
            tell(f"page: {options.html}")
    return 0
