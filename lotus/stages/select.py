"""The stage ``select``: the ticket is drawn, the images worth training on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lotus.config import Config
from lotus.events import Said, Wrote
from lotus.run import Run, reads
from lotus.stage import Outcome, Stage, Work
from lotus.stages.ahead import Ahead
from lotus.stages.context import Context
from selection.errors import Refused

if TYPE_CHECKING:
    import numpy as np


def select(context: Context) -> Work:
    from selection import exclude
    from selection.lottery import select as draw
    from selection.subset import Subset

    run, settings, manifest = context.run, context.config.select, context.manifest()
    if settings.ticket:
        subset = Subset.load(settings.ticket)
        subset.check(fingerprint=manifest.fingerprint, total=manifest.n, place=settings.ticket)
        if settings.exclude:
            subset = exclude.without(subset, _excluded(context))
    else:
        signals, gone = context.signals(), None
        if settings.exclude:
            gone = _excluded(context)
            yield Said("select", f"{len(gone):,} images of {settings.exclude} are excluded")
        drawn = draw(
            signals if gone is None else exclude.others(signals, gone),
            score=settings.score,
            pick=settings.pick,
            keep=settings.keep,
            balance=settings.balance,
            floor=settings.floor,
            seed=context.config.seed,
            start=Subset.load(settings.start) if settings.start else None,
            max_memory=settings.max_memory,
            shelves=context.shelves,
        )
        for warning in drawn.warnings:
            yield Said("select", warning, level="warning")
        subset = drawn.subset if gone is None else exclude.among(drawn.subset, gone, signals)
    subset.save(run.ticket)
    yield Wrote("select", str(run.ticket))
    return Outcome(values={"kept": len(subset.rows), "of": subset.total})


def _excluded(context: Context) -> np.ndarray:
    """The rows that ``select.exclude`` names."""
    from lotus import ticket
    from selection import exclude

    run = context.run
    data = ticket.Data(str(run.folder), context.config, run.train_beton, shelves=context.shelves)
    return exclude.rows(context.config.select.exclude, data.images())


def _after(config: Config) -> tuple[str, ...]:
    return ("prepare", "score") if reads(config) else ("prepare",)


def _files(config: Config) -> dict[str, str]:
    return {"select.ticket": config.select.ticket or "", "select.start": config.select.start or "",
            "select.exclude": config.select.exclude or ""}  # fmt: skip


def _check(ahead: Ahead) -> None:
    from selection import exclude
    from selection.subset import Subset

    wants = ahead.config.select
    for file in (wants.ticket, wants.start):
        if file:
            Subset.load(file)
    if wants.exclude:
        exclude.lines(wants.exclude)
        if wants.start:
            raise Refused(
                "select.exclude: does not go with select.start, whose images all stay. Leave one of them out."
            )


def _tell(run: Run, results: dict[str, Any]) -> None:
    results["kept"]["images"] = {name: results["select"][name] for name in ("kept", "of")}


STAGE = Stage(
    "select",
    "draw the ticket: the images worth training on",
    select,
    settings=("select", "seed"),
    after=_after,
    outputs=("subset.npz",),
    part="choosing",
    files=_files,
    check=_check,
    tell=_tell,
)
