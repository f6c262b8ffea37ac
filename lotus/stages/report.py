"""The stage ``report``: what was kept and what it cost, out of the records of the stages before it."""

from __future__ import annotations

import dataclasses
from typing import Any

from lotus.config import Config
from lotus.events import Wrote
from lotus.files import write_json
from lotus.run import Run
from lotus.stage import Outcome, Section, Stage, Work, named
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
    from lotus.data.beton import Manifest
    from lotus.report import ledger

    records = {name: record for name in run.plan() if (record := run.record(name)) is not None}
    page: dict[str, Any] = {"format": ledger.FORMAT, "name": run.config.name, "kept": {}, "sections": []}
    page |= {name: dict(record.values) for name, record in records.items()}
    for name in records:
        told = run.stages[name].tell(run, page) or ()
        for section in (told,) if isinstance(told, Section) else told:
            page["sections"].append({"stage": name, **dataclasses.asdict(section)})
    spent = [
        {"stage": name, "part": run.stages[name].part, "seconds": record.seconds,
         "image_forwards": record.image_forwards, "macs": record.macs}
        for name, record in records.items()
    ]  # fmt: skip
    share = 1.0
    for part in ("images", "passes"):
        if part in page["kept"]:
            share *= page["kept"][part]["kept"] / page["kept"][part]["of"]
    trained = page.get(named(run.stages, "training"), {})
    cut = trained["train_macs"] / trained["uncut"]["macs"] if "uncut" in trained else 1.0
    dense = named(run.stages, "dense")
    asked = any(dense in run.after(name) for name in records if run.stages[name].part not in ("dense", "apart"))
    if run.val_beton.exists():
        page["validation_images"] = Manifest.load(run.val_beton).n
        before, after = (ledger.reference(page, run.stages), page.get(named(run.stages, "shipped"), {}))
        if "top1" in before and "top1" in after:
            page["top1"] = ledger.compare_top1(before["top1"], after["top1"], page["validation_images"])
    small = ledger.is_small(page, run.stages)
    page["ledger"] = ledger.account(spent, kept_share=share, spent_share=cut, asks_dense=asked, small=small)
    return page


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
