"""The ticket: which images train, what each weighs, where it comes from and what data it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selection import memory, npz
from selection.errors import Refused
from selection.identity import check_classes, check_fingerprint

KIND, FORMAT = "a ticket of LOTUS", 1
CURE = "Give another ticket, or run the select stage again."
REBIND = "If the images are the same, in the same order, lotus ticket import binds it to these by force."
_MANY = 10_000_000
MADE = (
    "Give a ticket, which is what the select stage and `lotus select` write; `lotus ticket import` makes one of a list."
)


class Known(NamedTuple):
    """What is known of all images of the data set, for those who look at the ticket later."""

    labels: npt.ArrayLike | None = None
    """(total,); None: not known."""
    classes: Sequence[str] = ()
    """Names of the labels."""
    scores: npt.ArrayLike | None = None
    """(total,), may hold +inf; None: not known."""


_NOTHING = Known()


class Subset:
    """Rows of one data set, checked once so that nobody downstream checks again. Nothing can be changed.

    Args:
        rows: which images, distinct, in [0, total); stored sorted.
        total: images in the data set.
        fingerprint: of the data set.
        weights: positive, mean 1, in the order of ``rows``; None: 1 each.
        keep: the part that was asked for; None: what the rows are.
        origin: how it was made, JSON-ready: score, pick, balance, seed.
        known: of all ``total`` images.

    Raises:
        Refused: no rows, duplicate ones or ones out of range, weights, labels or scores that do not fit.
    """

    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None
    scores: npt.NDArray[np.float32] | None

    def __init__(
        self,
        rows: npt.ArrayLike,
        total: int,
        *,
        fingerprint: str,
        weights: npt.ArrayLike | None = None,
        keep: float | None = None,
        origin: Mapping[str, Any] | None = None,
        known: Known = _NOTHING,
        place: str = "ticket",
    ) -> None:
        _check_total(total, place)
        self.total, self.fingerprint = total, check_fingerprint(fingerprint, place)
        rows = np.asarray(rows)
        _check_rows(rows, total, place)
        weights = np.ones(len(rows), np.float32) if weights is None else np.asarray(weights)
        if weights.dtype.kind == "f":
            with np.errstate(over="ignore"):
                weights = weights.astype(
                    np.float32
                )  # as they are written: 1e-60 is 0 then, and nobody could read it back
        _check_weights(weights, len(rows), place)
        keep = len(rows) / total if keep is None else keep
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise Refused(f"{place}: keep={keep!r} is no fraction in (0, 1].")
        try:
            self.origin: dict[str, Any] = json.loads(json.dumps(dict(origin or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise Refused(f"{place}: its origin cannot be written as JSON ({error}).") from None
        self.classes = check_classes(known.classes, place)
        labels, scores = known.labels, known.scores
        self.labels = None if labels is None else _checked_labels(np.asarray(labels), total, self.classes, place)
        self.scores = None if scores is None else _checked_scores(np.asarray(scores), total, place)
        order = np.argsort(rows)
        self.rows = rows[order].astype(np.int64)
        self.weights = weights[order].astype(np.float32)
        self.rows.setflags(write=False)
        self.weights.setflags(write=False)
        self.keep = float(keep)

    @classmethod
    def whole(cls, total: int, *, fingerprint: str) -> Subset:
        """Every image, with weight 1."""
        return cls(np.arange(total), total, fingerprint=fingerprint)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {self.total} images, keep={self.keep:g}, data {self.fingerprint})"

    @property
    def known(self) -> Known:
        """What is known of all images."""
        return Known(self.labels, self.classes, self.scores)

    @property
    def complement(self) -> npt.NDArray[np.int64]:
        """The rows that the ticket leaves out, sorted."""
        out = np.ones(self.total, dtype=bool)
        out[self.rows] = False
        return np.flatnonzero(out)

    def spread(self) -> npt.NDArray[np.float32]:
        """The weights of all ``total`` images: 0 for those that the ticket leaves out."""
        out = np.zeros(self.total, np.float32)
        out[self.rows] = self.weights
        return out

    def check(self, fingerprint: str, total: int, *, place: str = "ticket") -> None:
        """Hold the ticket to a data set.

        Raises:
            Refused: it is of other data.
        """
        if total != self.total or fingerprint != self.fingerprint:
            raise Refused(
                f"{place}: it is for {self.total} images of data {self.fingerprint}, and here are {total} of data {fingerprint}. {CURE} {REBIND}"
            )

    def save(self, path: str | Path) -> None:
        """Write the ticket to an .npz, beside and renamed.

        Raises:
            Refused: it cannot be written there.
        """
        about: dict[str, Any] = {"total": self.total, "fingerprint": self.fingerprint, "keep": self.keep}
        about |= {"origin": self.origin, "classes": self.classes}
        arrays: dict[str, np.ndarray] = {"rows": self.rows, "weights": self.weights}
        if self.labels is not None:
            arrays["labels"] = self.labels.astype(np.int32)
        if self.scores is not None:
            arrays["scores"] = self.scores
        npz.write(path, arrays, about, kind=KIND, version=FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> Subset:
        """Read what :meth:`save` wrote. Hold it to the data at hand with :meth:`check`.

        Raises:
            Refused: the file is missing, cut short, damaged, foreign, or holds rows that cannot be; names the path and the cure.
        """
        arrays, about = npz.read(path, kind=KIND, version=FORMAT, cure=CURE, made=MADE)
        missing, strange = {"rows", "weights"} - set(arrays), set(arrays) - {"rows", "weights", "labels", "scores"}
        if missing or strange or not isinstance(about.get("origin"), dict):
            raise Refused(f"{path}: no complete ticket. {CURE}")
        try:
            return cls(
                arrays["rows"],
                about.get("total", 0),
                fingerprint=about.get("fingerprint", ""),
                weights=arrays["weights"],
                keep=about.get("keep"),
                origin=about["origin"],
                known=Known(arrays.get("labels"), about.get("classes") or (), arrays.get("scores")),
                place=str(path),
            )
        except Refused as error:
            raise Refused(f"{error} {CURE}") from None


def _check_total(total: Any, place: str) -> None:
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        raise Refused(f"{place}: of {total!r} images in all; that is a whole number of at least 1.")
    if total > _MANY:  # whoever looks at a ticket has some numbers of each image, those that it leaves out included
        memory.there(memory.size(9 * total), f"{place}: a ticket of {total} images", "Is it whole?")


def _check_rows(rows: np.ndarray, total: int, place: str) -> None:
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise Refused(
            f"{place}: rows are a list of row numbers, not {rows.dtype} {rows.shape}. A mask: np.flatnonzero(mask)."
        )
    if len(rows) == 0:
        raise Refused(f"{place}: no rows. A ticket keeps at least one image.")
    outside = rows[(rows < 0) | (rows >= total)]
    if len(outside):
        raise Refused(f"{place}: row {outside[0]} is out of range; the {total} images are 0 to {total - 1}.")
    values, counts = np.unique(rows, return_counts=True)
    if len(values) < len(rows):
        raise Refused(
            f"{place}: row {values[counts > 1][0]} stands there {counts.max()} times. An image is kept once; give it a weight."
        )


def _checked_labels(labels: np.ndarray, total: int, classes: tuple[str, ...], place: str) -> npt.NDArray[np.int64]:
    if labels.shape != (total,) or labels.dtype.kind not in "iu":
        raise Refused(f"{place}: {total} images want {total} labels, not {labels.dtype} {labels.shape}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= (len(classes) or 1 << 31):
        raise Refused(f"{place}: labels from {low} to {high}; they count from 0, and there are {len(classes)} names.")
    found = labels.astype(np.int64)
    found.setflags(write=False)
    return found


def _checked_scores(scores: np.ndarray, total: int, place: str) -> npt.NDArray[np.float32]:
    if scores.shape != (total,) or scores.dtype.kind not in "fiu":
        raise Refused(f"{place}: {total} images want {total} scores, not {scores.dtype} {scores.shape}.")
    if np.isnan(scores).any() or scores.min() == -np.inf:
        raise Refused(f"{place}: a score is finite or +inf, and there is one that is not.")
    most = float(np.finfo(np.float32).max)
    found = np.where(np.isfinite(scores), np.clip(scores, -most, most), np.inf).astype(np.float32)
    found.setflags(write=False)
    return found


def _check_weights(weights: np.ndarray, rows: int, place: str) -> None:
    if weights.shape != (rows,) or weights.dtype.kind not in "fiu":
        raise Refused(f"{place}: {rows} rows want {rows} weights, not {weights.dtype} {weights.shape}.")
    if not np.isfinite(weights).all() or weights.min() <= 0:
        raise Refused(
            f"{place}: weights are positive and finite, in single precision. Leave out an image that should weigh nothing."
        )
    mean = weights.mean(dtype=np.float64)
    if abs(mean - 1) > 1e-3:
        raise Refused(
            f"{place}: the weights' mean is {mean:g}, not 1, and so would change the learning rate. Divide by it."
        )
