"""The stage ``select``: the ticket is drawn, the images worth training on."""

from __future__ import annotations

from collections.abc import Mapping
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

    from selection.signals import Signals
    from selection.subset import Subset


_EXCLUDE = "select.exclude"


def select(context: Context) -> Work:
    from selection import exclude
    from selection.subset import Subset

    run, settings, manifest = context.run, context.config.select, context.manifest()
    gone, own = excluded(context), context.config.watches_itself
    if settings.ticket or own:  # one's own is drawn on the way: until then all train
        subset = (
            Subset.load(settings.ticket)
            if settings.ticket
            else Subset.whole(manifest.n, fingerprint=manifest.fingerprint)
        )
        subset.check(fingerprint=manifest.fingerprint, total=manifest.n, place=settings.ticket)
        if gone is not None:
            subset = exclude.without(subset, gone, _EXCLUDE)
    else:
        if gone is not None:
            yield Said("select", f"{len(gone):,} images of {settings.exclude} are excluded")
        subset, warnings = draw(context, context.signals(), gone)
        for warning in warnings:
            yield Said("select", warning, level="warning")
    subset.save(run.ticket)
    yield Wrote("select", str(run.ticket))
    return Outcome(values={"kept": len(subset.rows), "of": subset.total, **({"own": True} if own else {})})


def draw(context: Context, signals: Signals, gone: np.ndarray | None) -> tuple[Subset, list[str]]:
    """The ticket by ``select``, out of what is known of each image, and what is to be said of it.

    Args:
        context: of the run, whose section ``select`` says how
        signals: of the training images
        gone: rows that shall not train
    """
    from selection import exclude, lottery
    from selection.subset import Subset

    settings = context.config.select
    drawn = lottery.select(
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
    return drawn.subset if gone is None else exclude.among(drawn.subset, gone, signals), list(drawn.warnings)


def excluded(context: Context) -> np.ndarray | None:
    """The rows that ``select.exclude`` names; None where it names none."""
    from lotus import ticket
    from selection import exclude

    run, asked = context.run, context.config.select.exclude
    if not asked:
        return None
    data = ticket.Data(str(run.folder), context.config, run.train_beton, shelves=context.shelves)
    return exclude.rows(asked, data.images(), _EXCLUDE)


def _stale(config: Config, values: Mapping[str, Any]) -> str | None:
    """A ticket of all images for a training that is to choose, or the other way round."""
    if bool(values.get("own")) == config.watches_itself:
        return None
    return "score.proxy: whether the training draws the ticket itself"


def _after(config: Config) -> tuple[str, ...]:
    return ("prepare", "score") if reads(config) else ("prepare",)


def _files(config: Config) -> dict[str, str]:
    return {"select.ticket": config.select.ticket or "", "select.start": config.select.start or "",
            "select.exclude": config.select.exclude or ""}  # fmt: skip


def _check(ahead: Ahead) -> None:
    from selection import exclude
    from selection.subset import Subset

    request = ahead.config.select
    for file in (request.ticket, request.start):
        if file:
            Subset.load(file)
    if request.exclude:
        exclude.lines(request.exclude, _EXCLUDE)
        if request.start:
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
    stale=_stale,
    check=_check,
    tell=_tell,
)
