"""The stage ``inspect``: doubles, leaks and, where asked, wrong labels are looked for, and trained on in no case. It is there where
``stages`` names it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lotus.config import Config
from lotus.events import Said, Wrote, watched
from lotus.run import Run
from lotus.stage import Outcome, Section, Stage, Work
from lotus.stages.ahead import Ahead, Cost
from lotus.stages.context import Context
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.inspect.findings import Findings

Kind = Literal["duplicates", "leaks", "damaged", "labels"]
_LIST = "inspect/delete.txt"
MANY = 0.1
"""Fraction of the training images from which on it is said how many go: pictures of a few pixels look alike."""
_STREAMED = (
    "stages.inspect: pictures that come as a stream are not looked at side by side. Set data.options.streaming=false, or leave "
    "inspect out of stages."
)


def inspect(
    context: Context, *, delete: tuple[Kind, ...] = ("duplicates", "leaks", "damaged"), most: int = 1000
) -> Work:
    """What ``lotus inspect`` does, on the images of the run.

    Args:
        context: of the run
        delete: what is left out of the ticket: of doubles all but one, of leaks the copy in train, damaged pictures, likely wrong
            labels. Labels and outliers are judged only where labels are named, by a network that is trained for it.
        most: label errors and outliers that are listed at most
    """
    from lotus import ticket
    from lotus.data import cores
    from lotus.data.dataset import open_data
    from lotus.inspect import findings, findings_page
    from selection import exclude

    run, data = context.run, context.config.data
    train, val = open_data(data, context.shelves)
    if train.streamed or val.streamed:
        raise Refused(_STREAMED)
    yield Said("inspect", f"{len(train):,} images for training and {len(val):,} for validation, beside each other")
    step, root = itertools.count(1), data.path if train.root else ""

    def look(progress: Callable[[int], None]) -> Findings:
        return findings.inspect(
            train,
            val,
            most=most if "labels" in delete else 0,
            workers=cores.count(),
            root=root,
            say=lambda _: progress(next(step)),
        )

    found = yield from watched("inspect", 2, look, unit="steps")  # read, compared; where labels are judged more
    findings_page.write(run.of("inspect"), found, found.listed(delete), f"Inspected: {run.config.name}")
    yield Wrote("inspect", str(run.of("inspect") / findings_page.PAGE))
    damaged = found.looked[0].damaged  # none of them was prepared
    values = {"duplicates": len(found.pairs), "leaks": len(found.leaks), "damaged": len(damaged), "by": [*delete]}
    images = ticket.Data(str(run.folder), context.config, run.train_beton, shelves=context.shelves).images()
    values["left_out"] = gone = len(exclude.rows(run.folder / _LIST, images, "stages.inspect"))
    if gone > MANY * images.total:
        text = f"{gone:,} of {images.total:,} images will not train: look at {findings_page.PAGE} whether they should"
        yield Said("inspect", text, level="warning")
    if found.judged_by == "network":
        values |= {"labels": len(found.mislabeled), "outliers": len(found.outliers)}
        from lotus.inspect import network

        return Outcome(*network.cost(len(train) - len(damaged), len(train.classes)), values=values)
    if "labels" in delete:
        yield Said("inspect", "labels were not judged: fewer than 100 images, or one class", level="warning")
    return Outcome(values=values)


def _check(ahead: Ahead) -> None:
    asked = STAGE.options(ahead.config)
    if asked["most"] < 1:
        raise Refused("stages.inspect.most: at least 1. To judge no labels, leave them out of stages.inspect.delete.")
    if ahead.config.data.options.get("streaming"):
        raise Refused(_STREAMED)
    if ahead.config.select.start:
        raise Refused("stages.inspect: does not go with select.start, whose images all stay. Leave one of them out.")


def _forecast(ahead: Ahead) -> Cost | None:
    from lotus.inspect import findings, network

    if "labels" in STAGE.options(ahead.config)["delete"] and findings.can_judge(ahead.images, ahead.classes):
        return network.cost(ahead.images, ahead.classes)
    return None


def _says(config: Config) -> str:
    labels = "labels" in STAGE.options(config)["delete"]
    return f"look for duplicates{', leaks and wrong labels' if labels else ' and leaks'} among the images"


def _tell(run: Run, results: dict[str, Any]) -> Section:
    told = results["inspect"]
    rows = [
        (kind, f"{told[kind]:,}", "left out" if kind in told["by"] else "listed")
        for kind in ("duplicates", "leaks", "damaged", "labels", "outliers") if kind in told
    ]  # fmt: skip
    text = f"{told['left_out']:,} images for training were left out of the ticket; inspect/inspect.html shows what was found."
    return Section("What was found in the images", text, ("what", "how many", "what became of them"), tuple(rows))


STAGE = Stage(
    "inspect",
    _says,
    inspect,
    after=("prepare",),
    before=("select",),
    outputs=("inspect/inspect.html", "inspect/inspect.json", _LIST),
    excludes=_LIST,
    part="choosing",
    check=_check,
    forecast=_forecast,
    tell=_tell,
    wanted=lambda config: config.asked("inspect") is not None,
)
