"""The stage ``select``: the ticket is drawn, the images worth training on."""

from __future__ import annotations

from typing import Any

from lotus.config import Config
from lotus.events import Said, Wrote
from lotus.run import Run, reads
from lotus.stage import Outcome, Stage, Work
from lotus.stages.ahead import Ahead
from lotus.stages.context import Context


def select(context: Context) -> Work:
    from selection.lottery import select as draw
    from selection.subset import Subset

    run, settings, manifest = context.run, context.config.select, context.manifest()
    if settings.ticket:
        subset = Subset.load(settings.ticket)
        subset.check(fingerprint=manifest.fingerprint, total=manifest.n, place=settings.ticket)
    else:
        drawn = draw(
            context.signals(),
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
        subset = drawn.subset
    subset.save(run.ticket)
    yield Wrote("select", str(run.ticket))
    return Outcome(values={"kept": len(subset.rows), "of": subset.total})


def _after(config: Config) -> tuple[str, ...]:
    return ("prepare", "score") if reads(config) else ("prepare",)


def _files(config: Config) -> dict[str, str]:
    return {"select.ticket": config.select.ticket or "", "select.start": config.select.start or ""}


def _check(ahead: Ahead) -> None:
    from selection.subset import Subset

    for file in _files(ahead.config).values():
        if file:
            Subset.load(file)


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
