"""The stage ``select``: the ticket is drawn, the images worth training on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
_WITH_START = "does not go with select.start, whose images all stay. Leave one of them out."


def select(context: Context) -> Work:
    from selection import exclude
    from selection.subset import Subset

    run, settings, manifest = context.run, context.config.select, context.manifest()
    said, own = excluded(context), context.config.watches_itself
    for place, rows in said.items():
        yield Said("select", f"{len(rows):,} images are left out by {place}")
    gone = together(said)
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


def excluded(context: Context) -> dict[str, np.ndarray]:
    """The rows that shall not train, by who says so: ``select.exclude``, or a stage before this one.

    Raises:
        Refused: a list is none, or together they name every image.
    """
    from lotus import ticket
    from selection import exclude

    run, asked = context.run, context.config.select
    lists = {_EXCLUDE: Path(asked.exclude)} if asked.exclude else {}
    lists |= {stage.name: run.folder / stage.excludes for stage in run.stages.values() if stage.excludes}
    if not lists:
        return {}
    places = " and ".join(lists)
    if asked.start:
        raise Refused(f"{places}: {_WITH_START}")
    images = ticket.Data(str(run.folder), context.config, run.train_beton, shelves=context.shelves).images()
    found = {place: exclude.rows(file, images, place) for place, file in lists.items()}
    gone = together(found)
    if gone is not None and len(gone) == images.total:
        raise Refused(f"{places}: name all {images.total} images, so that none is left. Shorten a list.")
    return found


def together(rows: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """All that :func:`excluded` names, in order; None where nobody names any."""
    import numpy as np

    return np.unique(np.concatenate([*rows.values()])) if rows else None


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
            raise Refused(f"select.exclude: {_WITH_START}")


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
