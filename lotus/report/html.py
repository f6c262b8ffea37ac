"""report.html: one file that holds everything it shows, made from the run's folder alone.

What a run did not leave is left out, not faked. Names come from data sets and configs of anyone's: all text is escaped, and the page
may load nothing and run nothing.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lotus import config, files
from lotus.report import figures, ledger, ticket_picture
from lotus.report.figures import Point, Series
from lotus.report.ledger import Stages
from lotus.report.names import plain
from lotus.report.numbers import count, percent, si
from lotus.stage import named
from selection import regular
from selection.errors import Refused, reason

_SHEET = 24  # images at each end of the scores


def write(folder: str | Path, stages: Stages) -> Path:
    """Write ``report.html`` into a run's folder; returns its path.

    Args:
        folder: the run's
        stages: of the run, by name, in order

    Raises:
        Refused: there is no results.json, or it cannot be read; the page cannot be written.
    """
    folder = Path(folder)
    file = folder / "report.html"
    files.write_text(file, render(folder, stages), "Make room there, or take a copy of the run that can be written to.")
    return file


def render(folder: Path, stages: Stages) -> str:
    """The page's text."""
    from jinja2 import Environment
    from markupsafe import Markup

    results = _results(folder, stages)
    source = importlib.resources.files("lotus.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=plain)
    environment.filters |= {"si": si, "count": count, "percent": percent}
    log, settings, scored = list(events(folder)), _settings(folder), _scored(folder)
    kept = results.get("kept") or {}
    pictures = [
        (heading, Markup(svg))  # drawn by figures, which escapes every name
        for heading, svg in (*_pictures(results, log, settings, stages), ("What the search tried", _search(folder)))
        if svg
    ]
    return environment.from_string(source).render(
        results=results,
        headline=ledger.headline(results, stages),
        chance=ledger.chance(results, stages),
        lines=ledger.compared(results, stages),
        has_dense=ledger.has_dense(results, stages),
        side=ledger.side(results, stages),
        costs=results.get("ledger") or {},
        kept=kept,
        patches_told=ledger.patches_told(kept.get("tokens") or {}),
        latency_told=ledger.latency_told(timed) if (timed := kept.get("latency")) else "",
        pictures=pictures,
        sections=[{**one, "svg": Markup(_plot(one.get("plot")))} for one in results.get("sections") or ()],
        sizes=ledger.sizes(results, stages),
        widths=[Markup(svg) for svg in figures.widths(kept.get("blocks") or [])],
        **_of_ticket(folder, settings, scored),
        warnings=[event["text"] for event in log if event.get("event") == "said" and event.get("level") == "warning"],
        config=_text(folder / "config.yaml"),
        versions=_text(folder / "versions.txt"),
    )


def _of_ticket(folder: Path, settings: config.Config | None, scored: _Scored | None) -> dict[str, Any]:
    """What the page shows of the ticket, by the names that it has there."""
    from markupsafe import Markup

    if scored is None:
        return {"scores": "", "ticket": [], "sheets": []}
    shown = ticket_picture.in_report(scored.labels, scored.rows, scored.classes, scored.embeddings)
    return {
        "scores": Markup(figures.scores(scored.values, scored.rows, name=scored.name)),
        "ticket": [(name, Markup(svg)) for name, svg in shown],
        "sheets": _sheets(folder, settings, scored),
    }


class _Scored(NamedTuple):
    """Scores of all images, the ticket's rows, labels and the names of the classes."""

    name: str
    values: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    embeddings: npt.NDArray[np.floating] | None

    def class_of(self, row: int) -> str:
        label = int(self.labels[row])
        return self.classes[label] if label < len(self.classes) else str(label)


def _results(folder: Path, stages: Stages) -> dict[str, Any]:
    file = folder / "results.json"
    try:
        results = json.loads(regular.text(file))
    except FileNotFoundError:
        raise Refused(f"{folder}: no results.json here, so no finished run. Run: lotus run CONFIG.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            f"{file}: cannot be read ({reason(error)}). Run the report stage again: lotus run CONFIG --from report."
        ) from None
    is_ours = isinstance(results, dict) and results.get("format") == ledger.FORMAT
    if not is_ours or not isinstance(results.get(named(stages, "shipped")), dict):
        raise Refused(f"{file}: was not written by this version of LOTUS. Run it again: lotus run CONFIG.")
    return results


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """The log's lines; one that was cut off by a kill is passed over."""
    try:
        with open(regular.bounded(folder / "log.jsonl"), encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if _is_ours(event):
                    yield event
    except OSError:
        return


_TOLD: Mapping[str, Mapping[str, type]] = {
    "step": {"stage": str, "done": int, "total": int, "values": dict},
    "evaluated": {"stage": str, "epoch": int, "values": dict},
    "said": {"text": str},
}
"""What must be told of an event for it to be shown; of others nothing is read."""


def _is_ours(event: Any) -> bool:
    """Whether a line of the log tells what one of its kind does: a byte of it may have changed."""
    if not isinstance(event, dict) or not isinstance(kind := event.get("event"), str):
        return False
    told = all(type(event.get(name)) is of for name, of in _TOLD.get(kind, {}).items())
    numbers = event["values"].values() if told and "values" in _TOLD.get(kind, {}) else ()
    return told and all(type(number) in (int, float) for number in numbers if number is not None)


def _settings(folder: Path) -> config.Config | None:
    """What the run was asked for; None where that cannot be read any more: the page tells the rest."""
    try:
        return config.read(folder / "config.yaml")
    except Refused:
        return None


def _text(file: Path) -> str:
    try:
        return regular.text(file, errors="replace")
    except OSError:
        return ""


def _scored(folder: Path) -> _Scored | None:
    """The scores that the ticket carries, whoever's they are; None where it has none, or labels are not known."""
    from selection.signals import Signals
    from selection.subset import Subset

    if not (folder / "subset.npz").is_file():
        return None
    subset = Subset.load(folder / "subset.npz")
    signals = Signals.load(folder / "signals.npz") if (folder / "signals.npz").is_file() else None
    if signals is not None and (signals.fingerprint, signals.images) != (subset.fingerprint, subset.total):
        signals = None
    labels = subset.labels if subset.labels is not None else None if signals is None else signals["labels"]
    if subset.scores is None or labels is None or not ticket_picture.score_read(subset):
        return None
    classes = subset.classes or (signals.classes if signals is not None else ())
    embeddings = None if signals is None else signals.available().get("embeddings")
    name = ticket_picture.score_name(subset)
    return _Scored(name, subset.scores.astype(np.float64), subset.rows, labels, tuple(classes), embeddings)


def _pictures(
    results: Mapping[str, Any], log: list[dict[str, Any]], settings: config.Config | None, stages: Stages
) -> Iterator[tuple[str, str]]:
    """Heading and SVG of each picture of the training; an empty SVG where there is nothing to draw."""
    yield from _courses(results, log, stages)
    # The dense model, and the lottery's on its way from trained to cut to shipped.
    points = [
        Point(stage.curve.point, stage.curve.style, float(results[name]["macs"]), float(results[name]["top1"]))
        for name, stage in stages.items()
        if stage.curve is not None and {"macs", "top1"} <= set(results.get(name) or {})
    ]
    yield "Accuracy for its cost", figures.trade(points)
    steps = last_course(log, named(stages, "training"), "open_macs")
    yield "Gates", _gates(steps, settings.prune.keep.macs if settings else None)


def _courses(results: Mapping[str, Any], log: list[dict[str, Any]], stages: Stages) -> Iterator[tuple[str, str]]:
    """Accuracy and loss over the images seen; what the shipped model was trained on comes after the training before it."""
    training, shipped = named(stages, "training"), named(stages, "shipped")
    curves = {name: stage.curve for name, stage in stages.items() if stage.curve is not None and stage.curve.course}
    measured = {name: evaluations(log, name) for name in curves}
    for key, name, unit, bounds in (
        ("top1", "Accuracy", "top-1 on the validation images, %", (0, 100)),
        ("loss", "Loss", "loss on the validation images, nats", (0, None)),
    ):
        series, offset = [], 0.0
        for stage, rows in measured.items():
            seen = (results.get(stage) or {}).get("images_seen") or 0
            x, values = _course(rows, key, seen, offset if stage == shipped else 0.0)
            if not x:
                continue
            if stage == training:
                offset = seen
            series.append(Series(curves[stage].course, curves[stage].style, x, values))
        title = f"{name} over training"
        yield name, figures.curves(series, title=title, x="images seen in training", y=unit, bounds=bounds)


def _course(
    rows: list[tuple[int, dict[str, float]]], key: str, seen: float, start: float
) -> tuple[list[float], list[float]]:
    """Images seen, from ``start`` on, and values of ``key`` at a stage's evaluations; empty where it saw none."""
    points = [(epoch, values[key]) for epoch, values in rows if key in values]
    if not points or not seen:
        return [], []
    last = max(epoch for epoch, _ in points)
    return [start + seen * epoch / last for epoch, _ in points], [value for _, value in points]


def _plot(plot: Mapping[str, Any] | None) -> str:
    """The lines of a section, if it has any (:class:`lotus.stage.Plot`)."""
    if not plot:
        return ""
    styles = itertools.cycle(("lotus", "dense", "tune"))
    lines = [Series(name, style, [*at], [*values]) for (name, at, values), style in zip(plot["lines"], styles)]
    low, high = plot["bounds"]
    level = plot.get("level")
    return figures.curves(
        lines, title=plot["title"], x=plot["x"], y=plot["y"], bounds=(low, high), level=tuple(level) if level else None
    )


def _gates(steps: list[tuple[float, dict[str, float]]], target: float | None) -> str:
    at = [x for x, _ in steps]
    return figures.curves(
        [
            Series("MACs behind open gates", "lotus", at, [100 * values["open_macs"] for _, values in steps]),
            Series("gates closed", "dense", at, [100 * values.get("zero_gates", 0) for _, values in steps]),
        ],
        title="Gates while training",
        x="fraction of training done, %",
        y="%",
        bounds=(0, 100),
        level=(100 * target, f"budget {percent(target)}") if target else None,
    )


def _search(folder: Path) -> str:
    """What a search for ratios tried, if there was one; empty where its file is not what we write."""
    try:
        search = json.loads(regular.text(folder / "search.json"))
        if search.get("format") != 1 or "tried" not in search:
            return ""
        points, front, others = (
            [(float(row["macs"]), float(row["worse"])) for row in search[name]] for name in ("tried", "pareto", "rows")
        )
        chosen = (float(search["chosen"]["macs"]), float(search["chosen"]["worse"]))
        unit = {"agreement": "decided otherwise than dense, part", "loss": "loss above dense, nats"}
        return figures.tried(
            points,
            front,
            others,
            y=unit.get(search["metric"], "divergence from dense, nats"),
            chosen=chosen,
            rival=str(search.get("rival", "")),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def evaluations(log: list[dict[str, Any]], stage: str) -> list[tuple[int, dict[str, float]]]:
    """(epoch, values) of a stage's last course: one that was broken off and taken up again counts as one."""
    rows: list[tuple[int, dict[str, float]]] = []
    for event in log:
        if event.get("event") == "evaluated" and event.get("stage") == stage:
            epoch = int(event["epoch"])
            rows = [row for row in rows if row[0] < epoch]  # begun anew, from this epoch or from the first
            rows.append((epoch, dict(event.get("values") or {})))
    return rows


def last_course(log: list[dict[str, Any]], stage: str, key: str) -> list[tuple[float, dict[str, float]]]:
    """(percent of the stage done, values) of the steps that tell ``key``, of the last course."""
    rows: list[tuple[float, dict[str, float]]] = []
    for event in log:
        values = event.get("values") or {}
        if event.get("event") == "step" and event.get("stage") == stage and key in values and event.get("total"):
            done = 100 * event["done"] / event["total"]
            rows = [row for row in rows if row[0] < done]
            rows.append((done, values))
    return rows


def _sheets(folder: Path, settings: config.Config | None, scored: _Scored) -> list[dict[str, Any]]:
    """The images at both ends of the scores; none where their file is not here."""
    from lotus.data import beton

    data = Path(settings.data.folder) if settings and settings.data.folder else folder / "data"
    order = np.argsort(-scored.values, kind="stable")
    size = min(_SHEET, len(order) // 2)
    kept = set(scored.rows.tolist())
    sheets = []
    for title, rows in (("Highest scores: kept first", order[:size]), ("Lowest scores: kept last", order[::-1][:size])):
        tiles = []
        for row in rows.tolist():
            try:
                pixels = beton.image(data / "train.beton", row)
            except (Refused, OSError):
                return []
            tiles.append(
                {
                    "source": figures.tile(pixels),
                    "kept": row in kept,
                    "class": scored.class_of(row),
                    "told": f"row {row}, {scored.class_of(row)}, {scored.name} {scored.values[row]:.4g}, "
                    f"{'in the ticket' if row in kept else 'left out'}",
                }
            )
        sheets.append({"title": title, "tiles": tiles})
    return sheets
