"""What a file of others turns out to hold: rows or scores, of lines that name their images or of one value an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from selection import images as held
from selection import npz, parsing
from selection.errors import Refused
from selection.images import Images
from selection.methods import nearest

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Columns = dict[str, np.ndarray]

_NAMED = {
    "index": ("index", "row", "idx", "id", "indices"),
    "path": ("path", "file", "filename", "name", "image", "img", "relpath"),
    "label": ("label", "labels", "class", "target", "targets", "y"),
    "score": ("score", "scores", "value"),
    "weight": ("weight", "weights"),
    "kept": ("kept", "keep", "selected", "mask"),
}


@dataclass(eq=False)
class Contents:
    """What a file turned out to hold. Rows are LOTUS' own."""

    rows: Rows | None = None
    scores: Floats | None = None
    """(N,) higher = keep first; may hold +inf."""
    weights: Floats | None = None
    told: str = ""
    """What it was taken for."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """What was said of a file; see :func:`selection.exchange.read`."""

    kind: str
    column: str
    order: str
    force: bool


def find(path: Path, asked: Asked, images: Images) -> Contents:
    """Rows or scores out of a file of others.

    Raises:
        Refused: it cannot be read, can be taken for several things, or does not fit the images; says the cure.
    """
    table = parsing.table(path)
    if not isinstance(table, dict):
        return _by_number(path, table, images, asked)
    found = _by_name(path, table, images, asked)
    return _by_number(path, _column(path, table, images, asked), images, asked) if found is None else found


def _pick(columns: Columns, word: str) -> np.ndarray | None:
    return next((column for name, column in columns.items() if name.lower() in _NAMED[word]), None)


def _chosen(path: Path, columns: Columns, column: str) -> np.ndarray:
    """The column that was asked for by its name."""
    if column not in columns:
        raise Refused(f"{path}: there is no {column!r}.{nearest(column, columns)} Here: {', '.join(columns)}.")
    return columns[column]


def _by_name(path: Path, columns: Columns, images: Images, asked: Asked) -> Contents | None:
    """A table whose lines name their image, by number or by path; None where they do not."""
    index, names = _pick(columns, "index"), _pick_names(columns)
    if index is None and names is None:
        return None
    if asked.order != "index":
        said = images.say("order", asked.order)
        raise Refused(f"{said}: the lines of {path} name their images themselves. Leave it out.")
    found = Contents()
    rows = _lines_rows(path, index, names, images, found.warnings)
    values, kept = _score(path, columns, asked.column, images), _pick(columns, "kept")
    _check_kind(path, columns, asked.kind, values is not None, images)
    there = rows >= 0
    held.check_once(path, rows[there])
    if index is not None and names is not None:
        _check_agree(path, names[there].tolist(), rows[there].tolist(), images)
    if (labels := _pick(columns, "label")) is not None:
        found.warnings += held.check_labels(path, labels[there], images, rows[there], asked.force)
    if values is not None:
        choice = {"scores": False, "rows": True, "remove": True}.get(asked.kind, kept is not None)
        found.scores = _all_scores(path, values, rows, images, needed=not choice)
    stays = there if kept is None else there & parsing.truth(path, kept)
    _choose(path, found, rows, stays, asked.kind, kept is not None, images.total)
    if found.told == "images that stay":
        found.weights = _weights(path, _pick(columns, "weight"), stays)
    if found.rows is not None and not len(found.rows):
        raise Refused(f"{path}: no image is left. A ticket keeps at least one.")
    found.told += " by index" if index is not None else " by path"
    return found


def _pick_names(columns: Columns) -> np.ndarray | None:
    """The column of paths, where it holds texts."""
    names = _pick(columns, "path")
    return names if names is not None and names.dtype.kind == "U" else None


def _lines_rows(
    path: Path, index: np.ndarray | None, names: np.ndarray | None, images: Images, warnings: list[str]
) -> Rows:
    """The row of the image that each line names, by number where it can; -1 for those that do not train."""
    if index is not None and index.dtype.kind in "iu":
        return held.by_number(path, index, images, warnings)
    if names is None:
        raise Refused(f"{path}: its column of indices holds no whole numbers.")
    return held.by_path(path, names.tolist(), images, warnings)


def _score(path: Path, columns: Columns, column: str, images: Images) -> np.ndarray | None:
    """The column of scores: the one that was asked for, one of that name, or the only one of numbers with a name of its own."""
    if column:
        return _chosen(path, columns, column)
    if (values := _pick(columns, "score")) is not None:
        return values
    words = {name for names in _NAMED.values() for name in names}
    others = [name for name, one in columns.items() if name.lower() not in words and one.dtype.kind in "fiu"]
    if len(others) > 1:
        cure = images.say("column", others[0])
        raise Refused(f"{path}: {', '.join(others)} could be the score. Say which: {cure}.")
    return columns[others[0]] if others else None


def _all_scores(path: Path, values: np.ndarray, rows: Rows, images: Images, *, needed: bool) -> Floats | None:
    """(N,) the scores of all images; None where some have none and the scores are not ``needed``."""
    there = rows >= 0
    if there.sum() != images.total:
        if needed:
            raise Refused(
                f"{path}: scores for {there.sum()} of {images.total} images. Every image needs one; or take those that are "
                f"there for the ticket: {images.say('kind', 'rows')}, or out of it: {images.say('kind', 'remove')}."
            )
        return None
    scores = np.empty(images.total)
    scores[rows[there]] = parsing.numbers(path, values, "score")[there]
    return scores


def _check_kind(path: Path, columns: Columns, kind: str, scored: bool, images: Images) -> None:
    """Hold a table to what it was said to be."""
    say, here = images.say, ", ".join(columns)
    if kind == "order":
        raise Refused(
            f"{say('kind', kind)}: the lines of {path} name their images themselves. Take {say('kind', 'rows')} or "
            f"{say('kind', 'scores')}."
        )
    if kind == "mask" and _pick(columns, "kept") is None:
        raise Refused(
            f"{say('kind', kind)}: {path} has no column 'kept'. Here: {here}. Name it so, or take {say('kind', 'rows')}."
        )
    if kind == "scores" and not scored:
        raise Refused(
            f"{say('kind', kind)}: {path} has no score. Here: {here}. Say which it is: {say('column', 'NAME')}."
        )


def _check_agree(path: Path, named: list[str], rows: list[int], images: Images) -> None:
    """Hold the paths in a table to those of the images with their index, where these have any."""
    if images.names is None:
        return
    known = [images.names[row] for row in rows]
    wrong = [a for a, b in zip(named, known, strict=True) if not held.posix(a).endswith(held.posix(b))]
    if wrong:
        raise Refused(
            f"{path}: {len(wrong)} paths are not those of the images with their index, e.g. {wrong[0]}: another order or other "
            "data. Take its column of indices away, to go by the paths."
        )


def _choose(
    path: Path, found: Contents, rows: Rows, stays: npt.NDArray[np.bool_], kind: str, marked: bool, total: int
) -> None:
    """Which images a table keeps, if it says so: by a column ``kept`` (``marked``), or for want of scores.

    Args:
        rows: of each line
        stays: lines whose images stay, or go where they are ``kind="remove"``
    """
    if kind == "remove":
        found.rows, found.told = np.setdiff1d(np.arange(total), rows[stays]), "images to remove"
    elif kind != "scores" and (marked or found.scores is None or kind == "rows"):
        found.rows, found.told = rows[stays], "images that stay"
    else:
        found.told = "scores"


def _weights(path: Path, values: np.ndarray | None, stays: npt.NDArray[np.bool_]) -> Floats | None:
    """The weights of the images that stay, where a table has some."""
    if values is None:
        return None
    weights = parsing.numbers(path, values, "weight")[stays]
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise Refused(
            f"{path}: the weights of images that stay are positive and finite, and these are from "
            f"{weights.min():g} to {weights.max():g}. Leave out the images that should weigh nothing."
        )
    return weights


def _column(path: Path, columns: Columns, images: Images, asked: Asked) -> np.ndarray:
    """The one array of a dictionary that is meant; its labels, where it has some, must be those of the images."""
    if asked.column:
        meant = _chosen(path, columns, asked.column)
    else:
        rest = {name: one for name, one in columns.items() if name.lower() not in _NAMED["label"]}
        if len(rest) != 1:
            cure = images.say("column", next(iter(rest), "NAME"))
            raise Refused(f"{path}: holds {', '.join(columns)}. Say which one: {cure}.")
        meant = next(iter(rest.values()))
    labels = _pick(columns, "label")
    if labels is not None and labels is not meant and len(labels) == images.of:
        held.check_labels(path, labels[images.numbers], images, np.arange(images.total), asked.force)
    return meant


def _by_number(path: Path, values: np.ndarray, images: Images, asked: Asked) -> Contents:
    """A bare list: rows, a mask, an order, scores, or paths."""
    if values.ndim != 1 or not len(values):
        raise Refused(f"{path}: of shape {values.shape}. Wanted is a list: one number an image, or a row number each.")
    if values.dtype.kind == "U":
        if asked.kind not in ("", "rows", "remove"):
            raise Refused(
                f"{path}: holds paths, not {asked.kind}. Leave out {images.say('kind')}, or take rows or remove."
            )
        return _taken(path, values, images, asked.kind or "rows")
    kind = asked.kind or _guess(path, values, images)
    if kind in ("rows", "remove"):
        return _taken(path, values, images, kind)
    if len(values) != images.of:
        more = f" ({images.total} of them train)" if images.of != images.total else ""
        raise Refused(
            f"{path}: {len(values)} values, and the data has {images.of} images{more}. They are of other data, or they count "
            f"otherwise: see {images.say('index')}."
        )
    if kind == "order":
        if not _is_order(values):
            raise Refused(f"{path}: no order: it does not name each of the {len(values)} images once.")
        place = np.empty(len(values))
        place[values] = np.arange(len(values))
        return Contents(scores=place[images.numbers], told="order, the best last")
    values = _in_order(values, images, asked.order)
    if kind == "mask":
        stays = np.flatnonzero(parsing.truth(path, values))
        if not len(stays):
            raise Refused(f"{path}: a mask that keeps no image.")
        return Contents(rows=stays, told="mask, true = stays")
    scores = parsing.numbers(path, values, "score")
    _check_pair(path, scores, images)
    return Contents(scores=scores, told="scores" if asked.order == "index" else f"scores in the order of {asked.order}")


def _guess(path: Path, values: np.ndarray, images: Images) -> str:
    if values.dtype.kind == "b":
        return "mask"
    if values.dtype.kind == "f":
        return "scores"
    if path.name.endswith("_mask.npy") and len(values) == images.of and len(np.unique(values)) == len(values):
        return "order"  # TDDS, DUAL: X_mask.npy is the argsort of X_score.npy
    few = len(values) < images.of and len(np.unique(values)) == len(values)
    if few or np.array_equal(values, np.arange(images.of)):
        return "rows"
    if len(values) > images.of:
        raise Refused(f"{path}: {len(values)} numbers, and the data has {images.of} images. It is of other data.")
    raise Refused(
        f"{path}: {len(values)} whole numbers can be taken for several things. Say what: "
        f"{images.say('kind', 'rows')}, mask, remove, order or scores."
    )


def _is_order(values: np.ndarray) -> bool:
    """Whether it names each image once."""
    return values.dtype.kind in "iu" and np.array_equal(np.sort(values), np.arange(len(values)))


def _in_order(values: np.ndarray, images: Images, order: str) -> np.ndarray:
    """One value an image, of those that LOTUS counts, in its order."""
    say = images.say
    if order == "index":
        return values[images.numbers]
    if order == "class":
        if images.of != images.total:
            raise Refused(
                f"{say('order', order)}: the file counts {images.of} images, of which {images.total} have a label here: the others "
                f"were held out or damaged. Give the order as a file: {say('order', 'ORDER.npy')}, the index of each value."
            )
        at = np.argsort(images.labels[np.argsort(images.numbers)], kind="stable")  # others' numbers, class by class
    else:
        try:
            at = npz.array(order)
        except (OSError, ValueError, EOFError) as error:
            raise Refused(
                f"{say('order', order)}: 'index', 'class', or a .npy of the index of each value ({error})."
            ) from None
        if at.shape != (images.of,) or not _is_order(at):
            raise Refused(f"{say('order', order)}: it does not name each of the {images.of} images once.")
    by_index = np.empty_like(values)
    by_index[at] = values
    return by_index[images.numbers]


def _check_pair(path: Path, found: Floats, images: Images) -> None:
    """X_score.npy goes with X_mask.npy, its ascending argsort: where both are there, they must agree."""
    beside = path.with_name(path.name.replace("_score.npy", "_mask.npy"))
    if not path.name.endswith("_score.npy") or not beside.is_file() or images.of != images.total:
        return
    try:
        order = npz.array(beside)
    except (OSError, ValueError, EOFError) as error:
        raise Refused(f"{beside}: cannot be read ({error}). Mend it, or take it away.") from None
    if order.shape != found.shape or order.dtype.kind not in "iu":
        return
    if (
        not np.array_equal(np.sort(order), np.arange(len(order)))
        or (np.diff(found[np.argsort(images.numbers)][order]) < 0).any()
    ):
        raise Refused(
            f"{path}: {beside.name} beside it is not its ascending order. The two are of different trainings."
        )


def _taken(path: Path, values: np.ndarray, images: Images, kind: str) -> Contents:
    """Images by number or by path, which stay or (``kind="remove"``) go."""
    found = Contents()
    by_path = values.dtype.kind == "U"
    if by_path:
        rows = held.by_path(path, values.tolist(), images, found.warnings)
    elif values.dtype.kind in "iu":
        rows = held.by_number(path, values, images, found.warnings)
    else:
        cure = images.say("kind", "scores")
        raise Refused(f"{path}: row numbers are whole, and these are {values.dtype}. Say what they are: {cure}.")
    rows = rows[rows >= 0]
    held.check_once(path, rows)
    found.rows = np.setdiff1d(np.arange(images.total), rows) if kind == "remove" else rows
    if not len(found.rows):
        raise Refused(f"{path}: no image is left. Rows that are to stay: {images.say('kind', 'rows')}.")
    found.told = f"images {'to remove' if kind == 'remove' else 'that stay'} by {'path' if by_path else 'index'}"
    return found
