"""Several runs side by side: what each reached, what it ships and what it cost, and its accuracy over its cost."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lotus.report import ledger
from lotus.report.canvas import Canvas
from lotus.report.figures import tick, ticks
from lotus.report.html import evaluations, events
from lotus.report.ledger import Stages
from lotus.report.numbers import count, duration, si, standard_error
from selection import regular
from selection.errors import Refused

COLORS = ("lotus", "dense", "ink", "faint")


class Row(NamedTuple):
    """A finished run."""

    name: str
    """Its folder."""
    top1: float
    """Of the model that ships, in percent."""
    images: int
    """That it was measured on."""
    macs: int
    """Of the model that ships, an image."""
    params: int
    spent: float
    """MACs of all that was computed for it, the baseline aside."""
    seconds: float
    """Of all stages but the baseline."""
    course: tuple[tuple[float, float], ...]
    """(MACs spent so far, top-1 in percent) at each evaluation of its trainings."""

    @property
    def error(self) -> float:
        """Standard error of top-1, in points: binomial, of the validation images."""
        return standard_error(self.top1, self.images) if self.images else math.nan


def read(folder: Path, stages: Stages) -> Row:
    """What ``folder`` tells.

    Raises:
        Refused: no results.json is there, or it tells of no top-1.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise Refused(f"{folder}: no results.json here, so no finished run. Run: lotus run CONFIG.")
    try:
        results = json.loads(regular.text(file))
        shipped = ledger.shipped(results, stages)
        rows = results["ledger"]["stages"]
        log = list(events(folder))
        measured = [one.get("values") or {} for one in log if one.get("event") == "evaluated"]
        row = Row(
            name=str(folder),
            top1=float(shipped["top1"]),
            images=int(results.get("validation_images") or (measured or [{}])[-1].get("images", 0)),
            macs=int(shipped["macs"]),
            params=int(shipped["params"]),
            spent=float(results["ledger"]["lottery_macs"]),
            seconds=sum(row["seconds"] for row in rows if row["part"] != "dense"),
            course=tuple(_course(results, rows, log)),
        )
        if not (
            all(map(math.isfinite, (row.spent, row.seconds, *itertools.chain(*row.course)))) and 0 <= row.top1 <= 100
        ):
            raise ValueError("numbers that no run reaches")
        return row
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Refused(f"{file}: is not what a run writes ({type(error).__name__}). Run: lotus run {folder}.") from error


def _course(
    results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], log: list[dict[str, Any]]
) -> Iterator[tuple[float, float]]:
    spent = 0.0
    for row in rows:
        if row["part"] in ("apart", "dense"):
            continue
        evaluated = evaluations(log, row["stage"]) if row["part"] in ("training", "shipped") else []
        for epoch, values in evaluated:
            if values.get("top1") is not None:
                yield (
                    spent + row["macs"] * _done(results.get(row["stage"]) or {}, epoch / evaluated[-1][0]),
                    values["top1"],
                )
        spent += row["macs"]


def _done(values: Mapping[str, Any], part: float) -> float:
    """Fraction of a training's MACs that its first ``part`` took; steps after a cut cost less."""
    total = values.get("steps") or 1
    marks = [(0, 1.0), *((cut["step"], cut["after"]["macs"] / cut["before"]["macs"]) for cut in values.get("cuts", ()))]
    rates = np.cumprod([rate for _, rate in marks])
    ends = [*(step for step, _ in marks[1:]), total]
    costs = [max(0.0, min(part * total, end) - begin) for (begin, _), end in zip(marks, ends, strict=True)]
    whole = [end - begin for (begin, _), end in zip(marks, ends, strict=True)]
    return float(rates @ np.array(costs) / (rates @ np.array(whole)))


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: top-1 with its standard error; cost beside that of the first run."""
    head = ["run", "top-1, %", "n", "MACs", "params", "MACs spent", "cost", "time"]
    first = rows[0].spent or math.nan
    lines = [
        [one.name, f"{one.top1:.2f} ± {one.error:.2f}", count(one.images), si(one.macs), si(one.params), si(one.spent),
         f"{one.spent / first:.2f} x", duration(one.seconds)]
        for one in rows
    ]  # fmt: skip
    return head, lines


def draw(rows: Sequence[Row], *, wide: int = 680) -> Canvas:
    """Top-1 over the MACs that were spent, a curve a run."""
    courses = {one.name: list(one.course) or [(one.spent, one.top1)] for one in rows}
    return chart(courses, x="MACs spent, choosing and cutting included", y="top-1, %", told=si, wide=wide)


def chart(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, told: Callable[[float], str] = tick,
    wide: int = 680,
) -> Canvas:  # fmt: skip
    """Lines with their names over one pair of axes, x from 0.

    Args:
        curves: by name, at least one point each
        x, y: what the axes show, with units
        told: how a number of the x axis is written
        wide: of the picture, in pixels
    """
    canvas = Canvas(wide, 400)
    points = [point for curve in curves.values() for point in curve]
    right = 1.05 * max(across for across, _ in points) or 1.0
    low, high = min(up for _, up in points), max(up for _, up in points)
    low, high = low - 0.05 * (high - low) - 0.5, high + 0.05 * (high - low) + 0.5

    def at(across: float, up: float) -> tuple[float, float]:
        return 60 + (wide - 90) * across / right, 330 - 300 * (up - low) / (high - low)

    for value in ticks(low, high):
        canvas.line(*at(0, value), *at(right, value), "grid")
        canvas.text(52, at(0, value)[1] + 4, tick(value), color="faint", anchor="end")
    for value in ticks(0, right, most=max(2, wide // 130)):
        canvas.text(at(value, low)[0], 348, told(value), color="faint", anchor="middle")
    canvas.text(wide / 2 + 15, 368, x, color="faint", anchor="middle")
    canvas.text(60, 18, y, color="faint")
    for number, (name, curve) in enumerate(curves.items()):
        color, dash = COLORS[number % len(COLORS)], number >= len(COLORS)
        places = [at(*point) for point in curve]
        for here, there in itertools.pairwise(places):
            canvas.line(*here, *there, color, dash=dash, wide=2)
        canvas.dots(np.array(places), 2.5, color)
        canvas.text(wide - 40, 300 - 16 * number, _tail(name, (wide - 100) // 7), color=color, anchor="end")
    return canvas


def _tail(name: str, most: int) -> str:
    """The end of a name, by which runs differ."""
    return name if len(name) <= most else "…" + name[1 - most :]


def page(rows: Sequence[Row]) -> str:
    """The table and the picture as one HTML file that loads nothing."""
    from markupsafe import escape

    head, lines = table(rows)
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td data-label="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(head, line, strict=True)) + "</tr>"
        for line in lines
    )  # fmt: skip
    style = (
        "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:56rem;padding:0 1rem;background:#fbfaf8;color:#22252b}"
        "table{border-collapse:collapse;width:100%;margin-bottom:1.5rem}td,th{padding:.3rem .6rem;text-align:right}"
        "td:first-child,th:first-child{text-align:left;overflow-wrap:anywhere}td+td{white-space:nowrap}"
        "svg{max-width:100%;height:auto}.narrow{display:none}"
        "@media(max-width:600px){.wide,thead{display:none}.narrow{display:block}tr{display:block;padding:.5rem 0;border-bottom:1px solid #e9e7e2}"
        "td,td:first-child{display:flex;justify-content:space-between;gap:1rem;padding:.1rem 0;text-align:right}"
        "td::before{content:attr(data-label);color:#6b7079;text-align:left;white-space:nowrap}}"
    )
    pictures = "".join(
        f'<div class="{kind}">{draw(rows, wide=wide).svg("Top-1 over cost", alone=True)}</div>'
        for kind, wide in (("wide", 680), ("narrow", 360))
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>LOTUS: runs compared</title><style>{style}</style><h1>Runs compared</h1>"
        f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>{pictures}</html>"
    )
