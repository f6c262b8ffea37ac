"""Data sets of the Hugging Face hub, by its library: whole, or as a stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lotus.data import pictures
from lotus.data.pictures import Pixels
from lotus.data.source import Source, as_labels, digest
from selection.errors import Refused, reason


@dataclass(frozen=True)
class Layout:
    """Where in a data set of the hub images and labels are."""

    train: str = "train"
    """The split that trains."""
    val: str = ""
    """Empty: validation, valid, val or test, or a seeded part that is held out."""
    image: str = ""
    """The column; empty: the only one that holds pictures."""
    label: str = ""
    """Empty: the only one of class labels, or, for want of one, the whole numbers or texts in a column called label or labels."""


def columns(datasets: Any, name: str, rows: Any, layout: Layout) -> tuple[str, str, tuple[str, ...]]:
    """The columns of pictures and of labels, and the names of the classes."""
    features = rows.features
    pictured = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    labeled = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labeled = labeled or [key for key in ("label", "labels") if key in features]
    column = _column(name, "image", layout.image, pictured, features)
    target = _column(name, "label", layout.label, labeled, features)
    classes = tuple(getattr(features[target], "names", None) or ())
    return column, target, classes or tuple(map(str, sorted(set(_values(rows, target)))))


def _column(data_set: str, what: str, asked: str, found: list[str], features: Mapping[str, Any]) -> str:
    if asked:
        if asked not in features:
            raise Refused(f"data.options.{what}: {data_set} has no column {asked!r}. It has: {', '.join(features)}.")
        return asked
    if len(found) != 1:
        seen = f"{len(found)} that could be it ({', '.join(found)})" if found else "none that could be it"
        raise Refused(f"data.options.{what}: {data_set} has {seen}. Name one of: {', '.join(features)}.")
    return found[0]


def source(
    datasets: Any, rows: Any, where: str, image: str, label: str, classes: tuple[str, ...], *, partial: bool = False
) -> Source:
    """One split; pictures stay encoded until they are read, and are decoded by us."""
    values = _values(rows, label)
    own = getattr(rows.features[label], "names", None)
    other = False
    if own is not None and tuple(own) != classes:  # numbers of another list of names: the names decide
        other, values = True, [own[value] if value >= 0 else value for value in values]
    if values and (other or isinstance(values[0], str) or not hasattr(rows.features[label], "names")):
        number = {name: i for i, name in enumerate(classes)}
        unknown = next((value for value in values if str(value) not in number), None)
        if unknown is not None:
            raise Refused(f"{where}: label {unknown!r} is not among those of train.")
        values = [number[str(value)] for value in values]
    labels = as_labels(np.array(values), f"{where} {label}")
    rows = rows.cast_column(image, datasets.Image(decode=False))
    encoded = rows if hasattr(rows, "__len__") else Stream(rows, where)

    def read(i: int) -> Pixels:
        packed = encoded[i][image]
        return pictures.read(packed["bytes"] if packed["bytes"] is not None else packed["path"])

    about = rows.info
    return Source(
        labels=labels,
        classes=classes,
        read=read,
        name=lambda i: f"{where} {i}",
        fingerprint=digest(
            where, labels, classes, image, str(about.version), str(about.dataset_size), str(len(labels))
        ),
        where=where,
        partial=partial,
        streamed=encoded is not rows,
    )


def _values(rows: Any, column: str) -> list[Any]:
    """A column; of a stream it is read through, without the pictures where its files allow that."""
    if hasattr(rows, "__len__"):
        return list(rows[column])
    return [row[column] for row in rows.select_columns([column])]


class Stream:
    """Rows of a stream by their number. The last ones are kept, for threads that come late; for others it begins again."""

    KEPT = 512

    def __init__(self, rows: Any, where: str) -> None:
        self._rows, self._where, self._lock = rows, where, threading.Lock()
        self._coming: Iterator[tuple[int, Any]] = iter(())
        self._next, self._kept = 0, dict[int, Any]()

    def __getitem__(self, i: int) -> Any:
        with self._lock:
            if i in self._kept:
                return self._kept[i]
            if i < self._next or not self._next:
                self._coming, self._kept = enumerate(iter(self._rows)), {}
            try:
                for number, row in self._coming:
                    self._kept[number], self._next = row, number + 1
                    self._kept.pop(number - self.KEPT, None)
                    if number == i:
                        return row
            except Exception as error:  # the network or the files: the library's own words say it best
                why, after, self._next = reason(error), self._next, 0
                raise Refused(f"{self._where}: the stream breaks off after {after} images: {why}") from None
            raise Refused(f"{self._where}: the stream ends after {self._next} images. It was changed meanwhile.")
