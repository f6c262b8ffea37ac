"""``lotus inspect``: what is wrong with a folder of pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotus.cli.shared import Verbs, as_json, load_shelves, tell, with_files
from selection.errors import Refused

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lotus.data.source import Source
    from lotus.inspect.findings import Findings, Listed
    from lotus.ticket import Data


def add(verb: Verbs) -> None:
    added = verb("inspect", "look for duplicates, leaks, wrong labels, outliers and damage in pictures", _inspect)
    added.add_argument("data", help="a folder of pictures, a config, or a run's folder, whose signals judge the labels")
    added.add_argument("--out", default="inspected", metavar="FOLDER",
                       help="where inspect.html, inspect.json and delete.txt go (inspected)")  # fmt: skip
    added.add_argument("--delete", default="duplicates,leaks,damaged", metavar="KINDS",
                       help="what goes on the list: duplicates, leaks, damaged, labels, passed (the first three)")  # fmt: skip
    added.add_argument(
        "--most", type=int, default=1000, help="label errors and outliers that are listed at most (1000)"
    )
    added.add_argument("--model", default="", metavar="FOLDER",
                       help="judge the labels by the features of this model, not by a small network")  # fmt: skip
    added.add_argument("--features", default="", metavar="FILE",
                       help="judge them by these embeddings, as lotus select --features leaves them: needs no torch")  # fmt: skip
    with_files(added, "with the function of the data set")
    as_json(added)


def _inspect(options: argparse.Namespace) -> int:
    from lotus import ticket
    from lotus.data import cores
    from lotus.data.dataset import open_data
    from lotus.inspect import findings, findings_page

    kinds = _checked(options)
    shelves = load_shelves(options.shelves)
    behind = ticket.behind(options.data, shelves, flag="")
    if behind.settings is None:
        raise Refused(f"{options.data}: there are no pictures to look at. Give a folder of them, a config or a run.")
    train, val = open_data(behind.settings.data, shelves, learned=False)
    found = findings.inspect(
        train, val, recorded=_margins(behind), features=_features(options, train), most=options.most, workers=cores.count(),
        root=behind.settings.data.path if train.root else "",
        say=lambda text: tell(f"{text} ...", file=sys.stderr),
    )  # fmt: skip
    listed = found.listed(kinds)
    told = findings_page.write(Path(options.out), found, listed, f"Inspected: {options.data}")
    if options.json:
        print(json.dumps(told))
    else:
        _tell(Path(options.out), found, told)
        _links_told(listed)
    return 0


def _checked(options: argparse.Namespace) -> tuple[str, ...]:
    """The kinds that go on the list, after everything that can be refused before a picture is looked at."""
    from lotus import files
    from lotus.inspect import findings, findings_page

    kinds = tuple(options.delete.split(",")) if options.delete else ()
    if strange := [kind for kind in kinds if kind not in findings.KINDS]:
        raise Refused(f"--delete {strange[0]}: there is no such kind. There are: {', '.join(findings.KINDS)}.")
    if options.most < 1:
        raise Refused(f"--most: at least 1, not {options.most}.")
    if options.model and not (Path(options.model) / "spec.json").is_file():
        raise Refused(f"--model {options.model}: has no spec.json. Give the folder of a model, e.g. RUN/finetune.")
    if options.model and options.features:
        raise Refused("--features: are there, and --model makes others. Leave one of the two out.")
    for name in (findings_page.PAGE, findings_page.JSON, findings_page.LIST):
        files.check(Path(options.out) / name)
    return kinds


def _features(options: argparse.Namespace, train: Source) -> str | npt.NDArray[np.float32]:
    """By what labels are judged: features that are there, the folder of a model, or nothing."""
    if not options.features:
        return str(options.model)
    import numpy as np

    from lotus.inspect import embeddings

    found = embeddings.of(options.features, train)
    if missing := int(np.isnan(found).any(1).sum()):
        tell(
            f"! {missing:,} of {len(train):,} images have no features in {options.features}: not judged",
            file=sys.stderr,
        )
    return found


def _margins(behind: Data) -> npt.NDArray[np.floating] | None:
    """What a run recorded of the training images, if these are still the ones."""
    recorded = behind.signals
    if recorded is None or "margin" not in recorded:
        return None
    behind.images()  # refuses signals of pictures that have changed since
    return recorded["margin"]


def _tell(out: Path, found: Findings, told: dict[str, Any]) -> None:
    from lotus.data import pictures

    train, val = found.train, found.val
    counts = {name: len(told[name]) for name in ("duplicates", "leaks", "labels", "outliers", "damaged")}
    tell(f"{len(train):,} images for training ({train.where}), {len(val):,} for validation ({val.where})")
    tell(
        "  "
        + ", ".join(
            f"{count:,} {name[:-1] if count == 1 and name[-1] == 's' else name}" for name, count in counts.items()
        )
    )
    if found.judged_by in ("network", "model", "features"):
        tell(
            f"  labels: an estimated {100 * found.share_wrong:.1f} % are wrong; the list would hold {100 * found.share_found:.0f} % of "
            "those that were made wrong on purpose"
        )
    if found.judged_by == "nobody":
        tell("  labels and outliers were not judged: fewer than 100 images, or one class")
    if found.passed:
        tell("  passed over: " + ", ".join(f"{count:,} {ending}" for ending, count in found.endings.items()))
        if unread := pictures.UNREAD & set(found.endings):
            tell(f"    {', '.join(sorted(unread))}: nothing here reads them; save them as JPEG or PNG")
    tell(f"{out / 'inspect.html'}: look here first")
    gone = len(told["delete"])
    tell(f"{out / 'delete.txt'}: {gone:,} image{'' if gone == 1 else 's'}, for select.exclude={out / 'delete.txt'}")
    if odd := told["names_with_line_breaks"]:
        tell(f"  {len(odd):,} more cannot stand on it, since a name has a line break: rename {odd[0]!r}")


def _links_told(listed: Listed) -> None:
    """Why the list is not what somebody who knows the leaks would expect."""
    if listed.links:
        tell(
            f"  {listed.links:,} of them {'is a link' if listed.links == 1 else 'are links'} of val to a picture of train, which stays"
        )
    if listed.held:
        tell(
            f"  {len(listed.held):,} more would be on it, but a picture that stays is a link to them, e.g. {listed.held[0]}"
        )
