"""Data sets of the library ``datasets`` in and out: what their columns say of the images, and tickets applied to them and back.

Only methods of a ``datasets.Dataset`` are called, so that the library itself is imported by those alone who have one already.
Letters: N rows of the data set, K rows of a ticket.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from selection import incoming
from selection.errors import Refused
from selection.incoming import Incoming
from selection.subset import Subset

INDEX, WEIGHT = "lotus_index", "lotus_weight"
"""The columns that :func:`apply` adds: which row of the whole each is, and what it weighs."""


def signals(dataset: Any, *, embeddings: str = "", score: str = "", label: str = "", path: str = "") -> Incoming:
    """What the columns of a data set say of its images, to select by.

    Args:
        dataset: a ``datasets.Dataset`` of N rows
        embeddings: the column of (D,) numbers each
        score: the column of a number each
        label: the column of classes; empty: there are none
        path: the column of names

    Raises:
        Refused: no such column, or one that holds other things.
    """
    asked = {"embeddings": embeddings, "given": score, "labels": label, "paths": path}
    columns = {ours: _column(dataset, name) for ours, name in asked.items() if name}
    names = getattr(dataset.features[label], "names", None) if label else None
    if names:
        columns["classes"] = np.array(names)
    return incoming.of_arrays(columns, place="dataset")


def apply(subset: Subset, dataset: Any, rows: npt.ArrayLike | None = None) -> Any:
    """The images of a ticket, as a data set: with the columns :data:`INDEX` and :data:`WEIGHT`.

    Args:
        subset: the ticket
        dataset: a ``datasets.Dataset``
        rows: (N,) where each image that the ticket counts stands in ``dataset``, if some were held out of it or damaged (of a
            run: ``lotus.ticket.behind(RUN).images().numbers``); None: it is of all N rows

    Raises:
        Refused: it is of other data.
    """
    numbers = np.arange(subset.total) if rows is None else np.asarray(rows)
    if len(numbers) != subset.total or numbers.max() >= len(dataset) or (rows is None and len(dataset) != subset.total):
        raise Refused(
            f"ticket: of {subset.total} images, and the data set has {len(dataset)}. Give the one that it was drawn from, or the "
            "rows in it of the images that the ticket counts."
        )
    chosen = numbers[subset.rows]
    held = [name for name in (INDEX, WEIGHT) if name in dataset.column_names]
    part = dataset.remove_columns(held).select(chosen.tolist())
    return part.add_column(INDEX, chosen.tolist()).add_column(WEIGHT, [float(weight) for weight in subset.weights])


def ticket(part: Any, total: int, *, fingerprint: str, rows: npt.ArrayLike | None = None) -> Subset:
    """The ticket of what :func:`apply` made, whatever was filtered out of it, sorted or saved since.

    Args:
        part: a ``datasets.Dataset``
        total: N, images that the ticket counts
        fingerprint: of their data
        rows: as of :func:`apply`

    Raises:
        Refused: it has no :data:`INDEX`, or one of other data; no row is left, or one is there twice.
    """
    if INDEX not in part.column_names:
        raise Refused(
            f"dataset: has no column {INDEX!r}, so that nothing says which rows it has. selection.hub.apply adds it."
        )
    chosen = np.asarray(part[INDEX][:], np.int64)
    if rows is not None:
        row = np.full(int(np.max(rows)) + 1, -1)
        row[np.asarray(rows)] = np.arange(total)
        if len(chosen) and (chosen.max() >= len(row) or (row[chosen] < 0).any()):
            raise Refused("dataset: has rows that the ticket's data do not have. Give the rows that it was made with.")
        chosen = row[chosen]
    weights = np.asarray(part[WEIGHT][:], np.float64) if WEIGHT in part.column_names else np.ones(len(chosen))
    mean = weights.mean() if len(weights) else 1.0
    return Subset(
        chosen, total, fingerprint=fingerprint, weights=weights / mean, origin={"imported": "dataset"}, place="dataset"
    )


def _column(dataset: Any, name: str) -> np.ndarray:
    if name not in dataset.column_names:
        raise Refused(f"dataset: has no column {name!r}. It has: {', '.join(dataset.column_names)}.")
    try:
        column = np.asarray(dataset.with_format("numpy")[name][:])
    except ValueError:
        column = np.empty(0, object)
    if column.dtype.kind == "O":
        raise Refused(f"dataset: the column {name!r} holds neither numbers nor texts of one shape. Give another.")
    return column
