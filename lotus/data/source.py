"""What a data set is to LOTUS: images that can be read one by one, with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus.data.pictures import Pixels
from selection.errors import Refused


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one, with their labels.

    Attributes:
        labels: (N,) int64, into ``classes``.
        classes: names.
        read: image ``i`` as (H, W, 3) uint8 RGB; raises whatever a damaged image makes it raise. Called from threads.
        name: what image ``i`` is called in messages: its path, or ``"digits train 17"``.
        fingerprint: changes when an image, a label or a class does.

    Raises:
        Refused: labels that do not fit the classes, a class without an image.
    """

    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    read: Callable[[int], Pixels]
    name: Callable[[int], str]
    fingerprint: str
    where: str = "data"
    """The part of the data set, for messages."""
    partial: bool = False
    """Whether a class may be without an image, as in a small validation set."""
    root: str = ""
    """Folder of the files that ``name`` names; empty where images are no files."""
    rows: npt.NDArray[np.int64] | None = None
    """(N,) where each image stands in the whole that this is a part of; None: this is the whole."""
    whole: int = 0
    """Images of that whole; 0: N."""
    streamed: bool = False
    """Whether images come one after another, so that going back is dear."""
    note: str = ""
    """What the user should know of it, in a sentence."""

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise Refused(
                f"{self.where}: labels of shape {labels.shape} and type {labels.dtype}, expected whole numbers."
            )
        if len(labels) == 0:
            raise Refused(f"{self.where}: no images.")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise Refused(
                f"{self.where}: labels from {low} to {high}, but {len(self.classes)} classes, counted from 0."
            )
        object.__setattr__(self, "labels", np.ascontiguousarray(labels, dtype=np.int64))
        counts = np.bincount(self.labels, minlength=len(self.classes))
        if not self.partial and (counts == 0).any():
            empty = self.classes[int(np.argmin(counts))]
            raise Refused(f"{self.where}: class {empty!r} is empty. Add images, or take the class away.")

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: npt.NDArray[np.int64], where: str) -> Source:
        """The images ``rows`` alone."""
        read, name = self.read, self.name
        return replace(
            self,
            labels=self.labels[rows],
            rows=rows if self.rows is None else self.rows[rows],
            whole=self.whole or len(self),
            read=lambda i: read(int(rows[i])),
            name=lambda i: name(int(rows[i])),
            fingerprint=digest(self.fingerprint, rows),
            where=where,
        )


def split(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """``(train, val)``: ``fraction`` of every class is held out, at least one image, drawn by ``seed``.

    Raises:
        Refused: the fraction is not inside (0, 1), or a class has one image only.
    """
    check_range("val_fraction", fraction)
    train, val = [], []
    for number, name in enumerate(source.classes):
        rows = np.flatnonzero(source.labels == number)
        if len(rows) < 2:
            raise Refused(f"{source.where}: class {name!r} has one image, which cannot be in train and in val.")
        rows = np.random.default_rng(np.random.SeedSequence([seed, number])).permutation(rows)
        held = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        val.append(rows[:held])
        train.append(rows[held:])
    parts = np.sort(np.concatenate(train)), np.sort(np.concatenate(val))
    return source.part(parts[0], f"{source.where} (train)"), source.part(parts[1], f"{source.where} (val)")


def as_labels(array: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
    """``array`` as (N,) int64; a column of one is taken for that.

    Raises:
        Refused: it is something else.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise Refused(f"{where}: shape {array.shape} of {array.dtype}; labels are (N,) whole numbers.")
    return array.astype(np.int64)


def digest(*parts: str | bytes | npt.NDArray[np.generic] | Iterable[str]) -> str:
    """A fingerprint of texts and arrays."""
    hashed = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, np.ndarray):
            hashed.update(f"{part.dtype.str}{part.shape}".encode())
            hashed.update(np.ascontiguousarray(part).data)
        elif isinstance(part, bytes):
            hashed.update(part)
        else:
            for text in [part] if isinstance(part, str) else part:
                hashed.update(text.encode("utf-8", "surrogateescape") + b"\0")
        hashed.update(b"\1")
    return hashed.hexdigest()


def without(fingerprint: str, skipped: Sequence[str]) -> str:
    """The fingerprint of images less those of these names."""
    return digest(fingerprint, skipped) if skipped else fingerprint


def check_range(name: str, value: Any) -> None:
    """Hold the options that many data sets have to what they can be.

    Raises:
        Refused: ``val_fraction`` is no part, or ``seed`` is below 0.
    """
    if name == "val_fraction" and not 0 < value < 1:
        raise Refused(f"data.options.val_fraction: {value}. It is a fraction between 0 and 1, e.g. 0.1.")
    if name == "seed" and value < 0:
        raise Refused(f"data.options.seed: {value}. It is a whole number from 0.")
