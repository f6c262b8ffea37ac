"""The stage ``report``: what was kept and what it cost, out of the records of the stages before it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lotus.config import Config
from lotus.events import Wrote
from lotus.files import write_json
from lotus.record import Record
from lotus.run import Run
from lotus.stage import Outcome, Section, Stage, Work, named
from lotus.stages import plan_file
from lotus.stages.baseline import is_asked
from lotus.stages.context import Context


def report(context: Context) -> Work:
    from lotus.report import html

    run = context.run
    page = results(run)
    write_json(run.results, page)
    yield Wrote("report", str(run.results))
    html.write(run.folder, run.stages)
    yield Wrote("report", str(run.report))
    return Outcome()


def results(run: Run) -> dict[str, Any]:
    """results.json: what each stage measured, by its name, and what they tell of it together."""
    from lotus.report import ledger

    records = {name: record for name in run.plan() if (record := run.record(name)) is not None}
    page: dict[str, Any] = {"format": ledger.FORMAT, "name": run.config.name, "kept": {}, "sections": []}
    page |= {name: dict(record.values) for name, record in records.items()}
    for name in records:
        told = run.stages[name].tell(run, page) or ()
        for section in (told,) if isinstance(told, Section) else told:
            page["sections"].append({"stage": name, **dataclasses.asdict(section)})
    if (plan := plan_file.followed(run)) is not None:
        page["budget"] = {
            name: plan[name] for name in ("way", "budget", "cost", "dense_macs", "dense_epochs", "dense_model")
        }
    _compared(run, page)
    page["ledger"] = _account(run, records, page)
    return page


def _compared(run: Run, page: dict[str, Any]) -> None:
    """Adds how the model that ships does on the validation images, beside what it is compared with."""
    from lotus.data.beton import Manifest
    from lotus.report import ledger

    if not run.val_beton.exists():
        return
    images = Manifest.load(run.val_beton)
    page["validation_images"] = images.n
    before, after = ledger.reference(page, run.stages), page.get(named(run.stages, "shipped"), {})
    if "top1" in before and "top1" in after:
        page["top1"] = ledger.compare_top1(before["top1"], after["top1"], images.n)
    _by_class(page, images.classes, before, after)


def _account(run: Run, records: Mapping[str, Record], page: Mapping[str, Any]) -> dict[str, Any]:
    """What it cost."""
    from lotus.report import ledger

    spent = [
        {"stage": name, "part": run.stages[name].part, "seconds": record.seconds,
         "image_forwards": record.image_forwards, "macs": record.macs}
        for name, record in records.items()
    ]  # fmt: skip
    trained = page.get(named(run.stages, "training"), {})
    parts = (
        ("passes",) if "own_ticket" in trained else ("images", "passes")
    )  # of a ticket drawn on the way they are of all images
    kept = [page["kept"][part] for part in parts if part in page["kept"]]
    cut = trained["train_macs"] / trained["uncut"]["macs"] if "uncut" in trained else 1.0
    dense = named(run.stages, "dense")
    asked = any(dense in run.after(name) for name in records if run.stages[name].part not in ("dense", "apart"))
    return ledger.account(
        spent,
        kept_share=math.prod(part["kept"] / part["of"] for part in kept),
        spent_share=cut,
        asks_dense=asked,
        small=ledger.is_small(page, run.stages),
        planned=page.get("budget", {}).get("dense_macs"),
    )


def _by_class(
    page: dict[str, Any], names: tuple[str, ...], before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """Adds what each class came to; nothing where a record is of before classes were counted."""
    from lotus.report import classes

    if not after.get("per_class") or "top1" not in after:
        return
    page["accuracy"] = classes.per_class(names, after["per_class"], before.get("per_class"))
    told = classes.section(page["accuracy"], after["top1"])
    page["sections"].append({"stage": "report", **dataclasses.asdict(told)})


def _after(config: Config) -> tuple[str, ...]:
    return ("export", "baseline") if config.baseline or is_asked(config) else ("export",)


STAGE = Stage(
    "report",
    "say what it cost",
    report,
    settings=("baseline",),
    after=_after,
    outputs=("results.json", "report.html"),
)
