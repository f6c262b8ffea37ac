"""Top-1 class by class, of the model that ships and of the one that it is compared with. No more than strings and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lotus.report.numbers import accuracy as with_error
from lotus.report.numbers import count, standard_error
from lotus.stage import Section

ENDS = 10
"""Classes that are shown at each end, where there are more than twice as many."""


def per_class(
    names: Sequence[str], final: Mapping[str, Sequence[int]], dense: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """``accuracy`` of results.json: the macro average, and a row a class.

    Args:
        names: (C,) of the classes
        final, dense: ``right`` and ``of``, (C,) each: images of each class that were named right, and how many there are
    """
    other = dense or {}
    rows = [
        {
            "class": name, "right": right, "of": of, "top1": 100 * right / of if of else None,
            **({"dense_top1": 100 * other["right"][at] / of if of else None} if other else {}),
        }
        for at, (name, right, of) in enumerate(zip(names, final["right"], final["of"], strict=True))
    ]  # fmt: skip
    told: dict[str, Any] = {"macro": _mean(rows, "top1"), "classes": rows}
    return told | ({"dense_macro": _mean(rows, "dense_top1")} if other else {})


def section(accuracy: Mapping[str, Any], top1: float) -> Section:
    """That, as a table: all classes, worst first, or of many the worst and the best ten."""
    rows = sorted((row for row in accuracy["classes"] if row["of"]), key=lambda row: (row["top1"], row["class"]))
    many = len(rows) > 2 * ENDS
    shown = [*rows[:ENDS], *rows[-ENDS:]] if many else rows
    dense = "dense_macro" in accuracy
    gap = ("...",) + ("",) * (2 + dense)
    table = [_row(row, dense) for row in shown]
    if many:
        table.insert(ENDS, gap)
    missing = [row["class"] for row in accuracy["classes"] if not row["of"]]
    text = (
        f"Macro average {accuracy['macro']:.2f} %, over all images {with_error(top1, sum(row['of'] for row in rows))}"
    )
    text += f"; of the model beside it {accuracy['dense_macro']:.2f} %" if dense else ""
    text += f". The worst and the best {ENDS} of {count(len(rows))} classes; all are in results.json" if many else ""
    if missing:
        others = f" and {count(len(missing) - 5)} more" if len(missing) > 5 else ""
        text += f". Not in the validation images, and so not measured: {', '.join(missing[:5])}{others}"
    columns = ("class", "top-1, %", *(("beside it, %",) if dense else ()), "images")
    return Section("Class by class", f"{text}.", columns, tuple(table))


def _row(row: Mapping[str, Any], dense: bool) -> tuple[str, ...]:
    told = f"{row['top1']:.1f} ± {standard_error(row['top1'], row['of']):.1f}"
    return (row["class"], told, *((f"{row['dense_top1']:.1f}",) if dense else ()), count(row["of"]))


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values)
