"""Images that shall not train, by a list of paths or numbers; and a lottery among the others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from selection import images as held
from selection import links, parsing
from selection.errors import Refused
from selection.images import Images
from selection.signals import VOCABULARY, Signals
from selection.subset import Known, Subset

Rows = npt.NDArray[np.int64]


def lines(file: str | Path, place: str = "exclude") -> np.ndarray:
    """The paths (texts) or numbers (whole) of a list; none where it is empty.

    Raises:
        Refused: it cannot be read, or is no such list.
    """
    path = Path(file)
    if parsing.holds_nothing(path):
        return np.empty(0, np.int64)  # nothing was found: nothing goes
    table = parsing.table(path)
    if isinstance(table, dict):
        table = next((column for name, column in table.items() if name in ("path", "index")), None)
    if not isinstance(table, np.ndarray) or table.ndim != 1 or table.dtype.kind not in "iuU":
        raise Refused(
            f"{place}: {file} is no list of images. Give a text with a path or a number a line (lotus inspect)."
        )
    return table


def rows(file: str | Path, images: Images, place: str = "exclude") -> Rows:
    """The rows of the images that a list names; those of them that do not train (of the validation set, damaged, no pictures) are
    passed over.

    Raises:
        Refused: it is no list, names none of these images, or all of them.
    """
    warnings: list[str] = []
    wanted = lines(file, place)
    if not len(wanted):
        return np.empty(0, np.int64)
    if wanted.dtype.kind == "U" and images.names is not None:
        found = _by_path(Path(file), wanted.tolist(), images, place)
    elif wanted.dtype.kind == "U":
        found = held.by_path(Path(file), wanted.tolist(), images, warnings)
    else:
        found = held.by_number(Path(file), wanted, images, warnings)
    gone = np.unique(found[found >= 0])
    if len(gone) == images.total:
        raise Refused(f"{place}: {file} names all {images.total} images, so that none is left to train on. Shorten it.")
    return gone


def _by_path(file: Path, wanted: list[str], images: Images, place: str) -> Rows:
    """The row of each path, -1 for those of no image. One that is there is looked for by its place, and else by what it is a link to: a
    file of another folder is none of these, though it end alike."""
    assert images.names is not None
    there = [bool(images.root) and os.path.lexists(name) for name in wanted]
    away = [name for name, here in zip(wanted, there, strict=True) if not here]
    found = np.full(len(wanted), -1, np.int64)
    found[~np.array(there)] = held.rows_of(file, away, images.names)
    if any(there):
        homes = {links.place(os.path.join(images.root, name)): row for row, name in enumerate(images.names)}
        for at in np.flatnonzero(there).tolist():
            found[at] = next((homes[one] for one in links.passed(wanted[at]) if one in homes), -1)
    if (found < 0).all() and not any(there):
        raise Refused(
            f"{place}: {file}: none of its {len(wanted)} paths is an image of this data, e.g. {wanted[0]}. Is it of other data, "
            f"or are they deleted? Then leave {place} out."
        )
    return found


def others(signals: Signals, gone: Rows) -> Signals:
    """What is known of the images that are not ``gone``."""
    stay = np.setdiff1d(np.arange(signals.images), gone)
    kept = {name: signals.take(name, stay) if "N" in VOCABULARY[name].dims else signals[name] for name in signals}
    left = Signals(kept, classes=signals.classes, fingerprint=signals.fingerprint, unlabeled=signals.unlabeled)
    left.recorded = signals.recorded
    return left


def among(drawn: Subset, gone: Rows, signals: Signals) -> Subset:
    """A ticket drawn from :func:`others`, as one of all images. Those that are gone score as low as the lowest."""
    stay = np.setdiff1d(np.arange(signals.images), gone)
    scores = None
    if drawn.scores is not None:
        scores = np.full(signals.images, drawn.scores.min(), np.float32)
        scores[stay] = drawn.scores
    return Subset(
        stay[drawn.rows], signals.images, fingerprint=signals.fingerprint, weights=drawn.weights, keep=drawn.keep,
        origin={**drawn.origin, "excluded": len(gone)}, known=Known(signals["labels"], signals.classes, scores),
    )  # fmt: skip


def without(subset: Subset, gone: Rows, place: str = "exclude") -> Subset:
    """A ticket less what is gone.

    Raises:
        Refused: nothing is left.
    """
    stays = ~np.isin(subset.rows, gone)
    if not stays.any():
        raise Refused(f"{place}: names all {len(subset)} images of the ticket, so that none is left. Shorten it.")
    weights = subset.weights[stays]
    return Subset(
        subset.rows[stays], subset.total, fingerprint=subset.fingerprint, weights=weights / weights.mean(),
        keep=subset.keep, origin={**subset.origin, "excluded": len(gone)}, known=subset.known,
    )  # fmt: skip
