"""Tickets and scores as files of others: what published code leaves, and what other tools read.

Nothing here opens images. What has to be known of them (how many, their labels, their names, how others count them) comes as
:class:`Images`. Formats and their traps: lists of rows, masks, orders, class-sorted scores, rows to *remove*, pickled
dictionaries (read without running them, see selection/pickles.py), and tables by path.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from selection import files, npz, pickles, regular
from selection.errors import Refused
from selection.lottery import ranking
from selection.methods import nearest
from selection.signals import Signals
from selection.subset import Subset

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KINDS = ("rows", "mask", "remove", "order", "scores")
"""What a bare list of numbers can be: rows that stay, one truth value an image, rows that go, all rows with the best last, or
one score an image."""

_NAMED = {
    "index": ("index", "row", "idx", "id", "indices"),
    "path": ("path", "file", "filename", "name", "image", "img", "relpath"),
    "label": ("label", "labels", "class", "target", "targets", "y"),
    "score": ("score", "scores", "value"),
    "weight": ("weight", "weights"),
    "kept": ("kept", "keep", "selected", "mask"),
}


@dataclass(frozen=True, eq=False)
class Images:
    """What a file of others is held to."""

    total: int
    """Images that LOTUS counts: N."""
    fingerprint: str
    labels: Rows
    """(N,)"""
    classes: tuple[str, ...] = ()
    names: Sequence[str] | None = None
    """N paths, relative to the folder of all where there is one; None where images have none."""
    index: Rows | None = None
    """(N,) the number of each image as others count it: with those that LOTUS held out for validation or found damaged. None: ours."""
    counted: int = 0
    """How many others count; 0: N."""
    said: bool = False
    """Whether it was said that the file counts as ``index`` does, so that nothing in it speaks against it."""

    @property
    def numbers(self) -> Rows:
        return np.arange(self.total) if self.index is None else self.index

    @property
    def of(self) -> int:
        return self.counted or self.total


@dataclass(eq=False)
class Found:
    """What a file turned out to hold. Rows are LOTUS' own."""

    rows: Rows | None = None
    scores: Floats | None = None
    """(N,) higher = keep first; may hold +inf."""
    weights: Floats | None = None
    told: str = ""
    """What it was taken for."""
    warnings: list[str] = field(default_factory=list)


# -------------------------------------------------------------------------------------------------------------- in


def read(
    path: str | Path,
    images: Images,
    *,
    kind: str = "",
    column: str = "",
    order: str = "index",
    negate: bool = False,
    force: bool = False,
) -> Found:
    """Rows or scores out of a file of others.

    Args:
        kind: one of :data:`KINDS`; empty: what the file itself leaves no doubt about.
        column: which array of a dictionary, or column of a table, holds the scores.
        order: of a value an image: by ``"index"``, by ``"class"`` (sorted by label, stably), or a .npy of the index of each.
        negate: low scores are those to keep.
        force: go on where labels in the file are not those of the images.

    Raises:
        Refused: it cannot be read, can be taken for several things, or does not fit the images; says the cure.
    """
    path = Path(path)
    if kind and kind not in KINDS:
        raise Refused(f"--as {kind}: there is no such kind.{nearest(kind, KINDS)} There are: {', '.join(KINDS)}.")
    table = _table(path)
    found = _by_name(path, table, images, kind, column, order, force) if isinstance(table, dict) else None
    if found is None:
        values = table if isinstance(table, np.ndarray) else _column(path, table, column, images, force)
        found = _by_number(path, values, images, kind, order)
    if negate:
        if found.scores is None:
            raise Refused(f"--negate: {path} holds no scores. Leave it out.")
        if not np.isfinite(found.scores).all():
            raise Refused(f"--negate: {path} has a score of +inf, which would become the least wanted. Leave it out.")
        found.scores = -found.scores
        found.told += ", negated"
    return found


def ticket(
    found: Found, images: Images, *, name: str, keep: float | None = None, seed: int = 0, force: bool = False
) -> Subset:
    """The ticket of what was found.

    Args:
        keep: for scores: the fraction of the highest that stays, ties by ``seed``.

    Raises:
        Refused: scores without ``keep``, or rows with one; a ``keep`` or ``seed`` that cannot be.
    """
    origin: dict[str, Any] = {"imported": name, "as": found.told}
    rows = found.rows
    if rows is None:
        if keep is None or found.scores is None:
            raise Refused(f"{name}: holds scores and no choice. Say --keep 0.3 to keep the highest 30 %.")
        if not 0 < keep <= 1:
            raise Refused(f"--keep: the fraction that stays lies in (0, 1], not {keep:g}.")
        if seed < 0:
            raise Refused(f"--seed: {seed} is no whole number of at least 0.")
        budget = round(keep * images.total)
        if not budget:
            raise Refused(f"--keep {keep:g}: of {images.total} images that is none. Keep more.")
        rows = ranking(found.scores, np.random.default_rng(seed))[:budget]
        origin |= {"seed": seed}
    elif keep is not None:
        raise Refused(f"--keep {keep:g}: {name} says itself which {len(rows)} images stay. Leave it out.")
    if force:
        origin |= {"forced": True}
    return Subset(
        rows,
        images.total,
        fingerprint=images.fingerprint,
        weights=None if found.weights is None else found.weights / found.weights.mean(),
        keep=keep,
        origin=origin,
        labels=images.labels,
        classes=images.classes,
        scores=found.scores,
        place=name,
    )


def scores(found: Found, images: Images, *, name: str, beside: Signals | None = None) -> Signals:
    """What ``lotus select --score given`` reads: the scores, with the labels and with all that was recorded of the same images.

    Raises:
        Refused: there are none.
    """
    if found.scores is None:
        raise Refused(f"{name}: holds rows, no scores. It becomes a ticket: lotus ticket import.")
    arrays = {name: beside[name] for name in beside} if beside is not None else {"labels": images.labels}
    arrays["given"] = np.where(np.isfinite(found.scores), found.scores, np.finfo(np.float64).max)
    return Signals(arrays, fingerprint=images.fingerprint, classes=images.classes, place=name)


def _table(path: Path) -> Any:
    """An array, or a dictionary of columns."""
    try:
        with regular.check(path).open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}). Give a file of rows or scores.") from None
    try:
        if head.startswith(b"\x93NUMPY"):
            return npz.array(path)
        if path.suffix == ".json":
            return _json(json.loads(path.read_text(encoding="utf-8")))
        if path.suffix in (".csv", ".tsv"):
            return _csv(path.read_text(encoding="utf-8-sig"))
        if path.suffix in (".txt", ".lst", ".list"):
            return _lines(path.read_text(encoding="utf-8-sig"))
        if head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(path) as archive:
                held = archive.namelist()
            if held and not any(name.endswith("data.pkl") for name in held):
                return npz.arrays(path)
        return _json(pickles.load(path))
    except Refused:
        raise
    except Exception as error:  # a damaged or foreign file can break its parser in any way
        why = " ".join(str(error).split()) or type(error).__name__
        raise Refused(
            f"{path}: {_looks(path, head)}, and cannot be read: {why}. Wanted is a list of row numbers, paths, scores or truth "
            "values: .npy, .npz, .txt, .csv, .json, or a pickle or PyTorch file of arrays. Save it anew with np.save, or as text."
            + (" If it was a ticket of LOTUS, draw it again." if path.suffix == ".npz" else "")
        ) from None


def _looks(path: Path, head: bytes) -> str:
    """What a file that cannot be read looks like, whatever its name."""
    if not head:
        return "an empty file"
    if head.startswith(b"\x93NUMPY"):
        return "a .npy, cut short or of objects"
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            return "a .npz or PyTorch file, cut short"
        with zipfile.ZipFile(path) as archive:
            torchs = any(name.endswith("data.pkl") for name in archive.namelist())
        return "a PyTorch file, of more than arrays" if torchs else "a zip file, of other things than arrays"
    if head.startswith(b"\x80"):
        return "a pickle or PyTorch file, cut short or of more than arrays"
    return f"a {path.suffix or 'nameless'} file" if b"\0" in head else "text"


def _json(value: Any) -> Any:
    """Lists as arrays; a dictionary of them as one; a dictionary of numbers by index or path as two columns."""
    if isinstance(value, dict):
        if value and all(isinstance(v, (int, float, np.number)) for v in value.values()):
            whole = all(re.fullmatch(r"-?[0-9]+", str(key)) for key in value)  # keys of JSON are texts always
            keys = {"index": _array([int(key) for key in value])} if whole else {"path": _array(list(value))}
            return {**keys, "score": _array(list(value.values()))}
        lists = {str(key): entry for key, entry in value.items() if isinstance(entry, (list, tuple, np.ndarray))}
        columns = {key: array for key, entry in lists.items() if (array := _array(entry)).ndim == 1}
        if not columns:
            raise ValueError("a dictionary without a list in it")
        return columns
    return _array(sorted(value) if isinstance(value, set) else value)


def _array(values: Any) -> np.ndarray:
    try:
        found = np.asarray(values)
    except ValueError:
        found = np.empty(0, object)
    if found.dtype.kind not in "biufU":
        raise ValueError("neither numbers nor texts")
    return found


def _csv(text: str) -> dict[str, np.ndarray]:
    """Columns by name; those of a table without a head by what is in them."""
    first = text.split("\n", 1)[0]
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t" if "\t" in first else ",") if row]
    if not rows:
        raise ValueError("it is empty")
    if len({len(row) for row in rows}) > 1:
        odd = next(number for number, row in enumerate(rows) if len(row) != len(rows[0]))
        raise ValueError(f"its line {odd + 1} has {len(rows[odd])} columns, not {len(rows[0])}; it may be cut short")
    head = [cell.strip() for cell in rows[0]]
    if any(_is_number(cell) for cell in head):
        columns = [_typed(list(column)) for column in zip(*rows, strict=True)]
        return _guessed(columns)
    if len(rows) == 1:
        raise ValueError("a head and no line")
    below = zip(*rows[1:], strict=True)
    return {name: _typed(list(column)) for name, column in zip(head, below, strict=True) if any(column)}


def _guessed(columns: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Names for the columns of a table without a head: a text is a path; of numbers the last is a score, if it has a fraction."""
    found: dict[str, np.ndarray] = {}
    for column in columns:
        if column.dtype.kind == "U":
            found.setdefault("path", column)
        elif column.dtype.kind == "f":
            found.setdefault("score", column)
        else:
            found.setdefault("label" if "path" in found else "index", column)
    return found


def _lines(text: str) -> Any:
    """Numbers, paths, or paths with a label."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError("it is empty")
    if all(_is_number(line) or line.lower() in ("true", "false") for line in lines):
        return _typed(lines)
    if all(len(cells) > 1 and all(map(_is_number, cells)) for cells in (line.split() for line in lines)):
        raise ValueError("its lines hold several numbers each; write one a line, or a .csv with a head")
    labeled = [re.fullmatch(r"(.*\S)\s+(\d+)", line) for line in lines]
    if all(labeled):
        paths, labels = zip(*(match.groups() for match in labeled if match), strict=True)
        return {"path": np.array(paths), "label": np.array([int(label) for label in labels])}
    return np.array(lines)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _typed(cells: list[str]) -> np.ndarray:
    """Whole numbers where all are, else numbers, else texts; ``true`` and ``false`` are truth values."""
    if all(cell.lower() in ("true", "false") for cell in cells):
        return np.array([cell.lower() == "true" for cell in cells])
    for kind in (int, float):
        try:
            return np.array([kind(cell) for cell in cells])
        except (ValueError, OverflowError):
            continue
    return np.array(cells)


def _pick(columns: dict[str, np.ndarray], word: str) -> np.ndarray | None:
    return next((column for name, column in columns.items() if name.lower() in _NAMED[word]), None)


def _by_name(
    path: Path, columns: dict[str, np.ndarray], images: Images, kind: str, column: str, order: str, force: bool
) -> Found | None:
    """A table whose lines name their image, by number or by path; None where they do not."""
    index, names = _pick(columns, "index"), _pick(columns, "path")
    if index is None and (names is None or names.dtype.kind != "U"):
        return None
    if order != "index":
        raise Refused(f"--order {order}: the lines of {path} name their images themselves. Leave it out.")
    found = Found()
    if index is not None and index.dtype.kind in "iu":
        rows = _ours(path, index, images, found)
    elif names is not None and names.dtype.kind == "U":
        rows = _of_paths(path, names.tolist(), images, found)
    else:
        raise Refused(f"{path}: its column of indices holds no whole numbers.")
    values = columns.get(column) if column else _pick(columns, "score")
    if column and values is None:
        raise Refused(f"{path}: there is no {column!r}.{nearest(column, columns)} Here: {', '.join(columns)}.")
    if values is None:
        words = {name for names_ in _NAMED.values() for name in names_}
        others = [name for name, one in columns.items() if name.lower() not in words and one.dtype.kind in "fiu"]
        values = columns[others[0]] if len(others) == 1 else None
        if len(others) > 1:
            raise Refused(f"{path}: {', '.join(others)} could be the score. Say which: --column {others[0]}.")
    kept, weights = _pick(columns, "kept"), _pick(columns, "weight")
    if kind == "order":
        raise Refused(f"--as order: the lines of {path} name their images themselves. Take --as rows or --as scores.")
    if kind == "mask" and kept is None:
        raise Refused(
            f"--as mask: {path} has no column 'kept'. Here: {', '.join(columns)}. Name it so, or take --as rows."
        )
    if kind == "scores" and values is None:
        raise Refused(f"--as scores: {path} has no score. Here: {', '.join(columns)}. Say which it is: --column NAME.")
    there = rows >= 0
    _check_once(path, rows[there])
    if index is not None and names is not None and names.dtype.kind == "U" and images.names is not None:
        known = [_posix(images.names[row]) for row in rows[there].tolist()]
        if wrong := [a for a, b in zip(names[there].tolist(), known, strict=True) if not _posix(a).endswith(b)]:
            raise Refused(
                f"{path}: {len(wrong)} paths are not those of the images with their index, e.g. {wrong[0]}: another order or other "
                "data. Take its column of indices away, to go by the paths."
            )
    labels = _pick(columns, "label")
    if labels is not None:
        _check_labels(path, labels[there], images, rows[there], force, found)
    if values is not None and there.sum() == images.total:
        found.scores = np.empty(images.total)
        found.scores[rows[there]] = _numbers(path, values, "score")[there]
    elif values is not None and (kind == "scores" or (kept is None and kind not in ("rows", "remove"))):
        raise Refused(
            f"{path}: scores for {there.sum()} of {images.total} images. Every image needs one; or take those that are there "
            "for the ticket: --as rows, or out of it: --as remove."
        )
    inside = np.ones(len(rows), bool) if kept is None else _truth(path, kept)
    if kind == "remove":
        found.rows = np.setdiff1d(np.arange(images.total), rows[there & inside])
        found.told = "images to remove"
    elif kind != "scores" and (kept is not None or found.scores is None or kind == "rows"):
        found.rows = rows[there & inside]
        found.told = "images that stay"
        if weights is not None:
            found.weights = _numbers(path, weights, "weight")[there & inside]
            if not (np.isfinite(found.weights) & (found.weights > 0)).all():
                raise Refused(
                    f"{path}: the weights of images that stay are positive and finite, and these are from "
                    f"{found.weights.min():g} to {found.weights.max():g}. Leave out the images that should weigh nothing."
                )
    else:
        found.told = "scores"
    if found.rows is not None and not len(found.rows):
        raise Refused(f"{path}: no image is left. A ticket keeps at least one.")
    found.told += " by index" if index is not None else " by path"
    return found


def _column(path: Path, columns: dict[str, np.ndarray], column: str, images: Images, force: bool) -> np.ndarray:
    """The one array of a dictionary that is meant; its labels, where it has some, must be those of the images."""
    if column:
        if column not in columns:
            raise Refused(f"{path}: there is no {column!r}.{nearest(column, columns)} Here: {', '.join(columns)}.")
        meant = columns[column]
    else:
        rest = {name: one for name, one in columns.items() if name.lower() not in _NAMED["label"]}
        if len(rest) != 1:
            raise Refused(f"{path}: holds {', '.join(columns)}. Say which one: --column {next(iter(rest), 'NAME')}.")
        meant = next(iter(rest.values()))
    labels = _pick(columns, "label")
    if labels is not None and labels is not meant and len(labels) == images.of:
        _check_labels(path, labels[images.numbers], images, np.arange(images.total), force, Found())
    return meant


def _by_number(path: Path, values: np.ndarray, images: Images, kind: str, order: str) -> Found:
    """A bare list: rows, a mask, an order, scores, or paths."""
    found = Found()
    if values.ndim != 1 or not len(values):
        raise Refused(f"{path}: of shape {values.shape}. Wanted is a list: one number an image, or a row number each.")
    if values.dtype.kind == "U":
        if kind not in ("", "rows", "remove"):
            raise Refused(f"{path}: holds paths, not {kind}. Leave out --as, or take rows or remove.")
        rows = _of_paths(path, values.tolist(), images, found)
        return _taken(path, rows[rows >= 0], images, kind or "rows", found, "path")
    if not kind:
        kind = _guess(path, values, images)
    if kind in ("rows", "remove"):
        if values.dtype.kind not in "iu":
            raise Refused(
                f"{path}: row numbers are whole, and these are {values.dtype}. Say what they are: --as scores."
            )
        rows = _ours(path, values, images, found)
        return _taken(path, rows[rows >= 0], images, kind, found, "index")
    if len(values) != images.of:
        more = f" ({images.total} of them train)" if images.of != images.total else ""
        raise Refused(
            f"{path}: {len(values)} values, and the data has {images.of} images{more}. They are of other data, or they count "
            "otherwise: see --index."
        )
    if kind == "order":
        if values.dtype.kind not in "iu" or not np.array_equal(np.sort(values), np.arange(len(values))):
            raise Refused(f"{path}: no order: it does not name each of the {len(values)} images once.")
        place = np.empty(len(values))
        place[values] = np.arange(len(values))
        found.scores, found.told = place[images.numbers], "order, the best last"
        return found
    values = _in_order(values, images, order)
    if kind == "mask":
        found.rows, found.told = np.flatnonzero(_truth(path, values)), "mask, true = stays"
        if not len(found.rows):
            raise Refused(f"{path}: a mask that keeps no image.")
        return found
    found.scores = _numbers(path, values, "score")
    found.told = "scores" if order == "index" else f"scores in the order of {order}"
    _check_pair(path, found.scores, images)
    return found


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
    cure = "Say what: --as rows, mask, remove, order or scores."
    if len(values) > images.of:
        raise Refused(f"{path}: {len(values)} numbers, and the data has {images.of} images. It is of other data.")
    raise Refused(f"{path}: {len(values)} whole numbers can be taken for several things. {cure}")


def _in_order(values: np.ndarray, images: Images, order: str) -> np.ndarray:
    """One value an image, of those that LOTUS counts, in its order."""
    if order == "index":
        return values[images.numbers]
    if order == "class":
        if images.of != images.total:
            raise Refused(
                f"--order class: the file counts {images.of} images, of which {images.total} have a label here: the others were "
                "held out or damaged. Give the order as a file: --order ORDER.npy, the index of each value."
            )
        at = np.argsort(images.labels[np.argsort(images.numbers)], kind="stable")  # others' numbers, class by class
    else:
        try:
            at = npz.array(order)
        except (OSError, ValueError, EOFError) as error:
            raise Refused(
                f"--order {order}: 'index', 'class', or a .npy of the index of each value ({error})."
            ) from None
        if at.dtype.kind not in "iu" or not np.array_equal(np.sort(at), np.arange(images.of)):
            raise Refused(f"--order {order}: it does not name each of the {images.of} images once.")
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


def _taken(path: Path, rows: Rows, images: Images, kind: str, found: Found, by: str) -> Found:
    _check_once(path, rows)
    if kind == "remove":
        rows = np.setdiff1d(np.arange(images.total), rows)
        found.told = f"images to remove by {by}"
    else:
        found.told = f"images that stay by {by}"
    if not len(rows):
        raise Refused(f"{path}: no image is left. Rows that are to stay: --as rows.")
    found.rows = rows
    return found


def _ours(path: Path, numbers: np.ndarray, images: Images, found: Found) -> Rows:
    """LOTUS' row of each number of others; -1 for those that it held out or found damaged."""
    outside = numbers[(numbers < 0) | (numbers >= images.of)]
    if len(outside):
        raise Refused(
            f"{path}: there is no image {outside[0]}; the {images.of} of this data are 0 to {images.of - 1}. It is of other data."
        )
    row = np.full(images.of, -1, np.int64)
    row[images.numbers] = np.arange(images.total)
    rows = row[numbers.astype(np.int64)]
    gone = int((rows < 0).sum())
    if gone and not images.said and numbers.max() < images.total:
        raise Refused(
            f"{path}: {gone} of its numbers are of images that are held out for validation, or damaged, and none is above "
            f"{images.total - 1}, the last row of those that train. So it may count these alone, as a ticket does that was exported with "
            "--index row. Say --index row if it does, --index source if it counts the data set as it comes."
        )
    if gone:
        found.warnings.append(f"{gone} of them are held out for validation, or damaged, and are left out")
    return rows


def _of_paths(path: Path, wanted: Iterable[str], images: Images, found: Found) -> Rows:
    """The row of each path: as it is, without the folders before, or by its last name where no two share one."""
    if images.names is None:
        raise Refused(
            f"{path}: names its images by path, and those of this data are not known. Give --data a run, a config or a folder."
        )
    whole = {_posix(name): row for row, name in enumerate(images.names)}
    last: dict[str, int] = {}
    for name, row in whole.items():
        last[PurePosixPath(name).name] = -2 if PurePosixPath(name).name in last else row
    rows, strange = [], []
    for given in wanted:
        parts = PurePosixPath(_posix(given)).parts
        tails = ("/".join(parts[first:]) for first in range(len(parts)))
        row = next((whole[tail] for tail in tails if tail in whole), -1)
        if row < 0:
            row = last.get(parts[-1] if parts else "", -1)
            if row == -2:
                raise Refused(f"{path}: {given}: several images have this name. Write the class's folder before it.")
        if row < 0:
            strange.append(given)
        rows.append(row)
    if strange and images.of == images.total:
        raise Refused(f"{path}: {strange[0]}: no image of this data, and {len(strange) - 1} more. It is of other data.")
    if len(strange) == len(rows):
        raise Refused(f"{path}: none of its {len(rows)} paths is an image of this data, e.g. {strange[0]}.")
    if strange:
        found.warnings.append(
            f"{len(strange)} of them are no training images here (e.g. {strange[0]}) and are left out"
        )
    return np.array(rows, np.int64)


def _posix(name: str) -> str:
    name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


def _check_once(path: Path, rows: Rows) -> None:
    values, counts = np.unique(rows, return_counts=True)
    if len(values) < len(rows):
        raise Refused(f"{path}: row {values[counts > 1][0]} stands there {counts.max()} times. An image is kept once.")


def _check_labels(path: Path, labels: np.ndarray, images: Images, rows: Rows, force: bool, found: Found) -> None:
    if labels.dtype.kind == "U":
        number = {name: str(label) for label, name in enumerate(images.classes)}
        labels = np.array([number.get(str(name), str(name)) for name in labels])
        wrong = labels != images.labels[rows].astype(str)
    else:
        wrong = labels != images.labels[rows]
    if wrong.any():
        told = f"{path}: {wrong.sum()} of {len(rows)} labels are not those of the images"
        if not force:
            raise Refused(
                f"{told}: another order or other data. Give the data that it is of; or --force, if only the classes are "
                "numbered otherwise, at the risk of a ticket of random images."
            )
        found.warnings.append(told.split(": ", 1)[1])


def _numbers(path: Path, values: np.ndarray, what: str) -> Floats:
    if values.dtype.kind not in "biuf":
        cells = [str(value) for value in values.tolist()]
        at = next((at for at, cell in enumerate(cells) if not _is_number(cell)), 0)
        raise Refused(
            f"{path}: a {what} is a number, and {_line(path, at, len(cells))} has {cells[at].strip() or 'a blank'}. "
            "Write a number there, or leave that image out."
        )
    found = values.astype(np.float64)
    wrong = np.flatnonzero(np.isnan(found) | (found == -np.inf))
    if len(wrong):
        raise Refused(
            f"{path}: the {what} {found[wrong[0]]} at {wrong[0]}, and {len(wrong) - 1} more. It is finite or +inf."
        )
    return found


def _line(path: Path, at: int, values: int) -> str:
    """Where the value ``at`` of a column stands."""
    if path.suffix not in (".csv", ".tsv"):
        return f"entry {at}"
    text = path.read_text(encoding="utf-8-sig")
    table = csv.reader(io.StringIO(text), delimiter="\t" if "\t" in text.split("\n", 1)[0] else ",")
    ends = [table.line_num for row in table if row]
    return f"line {ends[at - values]}"  # the head, where there is one, holds no value


def _truth(path: Path, values: np.ndarray) -> npt.NDArray[np.bool_]:
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise Refused(f"{path}: a mask holds true and false, or 1 and 0.")
    return values.astype(bool)


# ------------------------------------------------------------------------------------------------------------- out


def write(subset: Subset, path: str | Path, images: Images, *, labels: bool = False, paths: bool = False) -> None:
    """The ticket as a file of others, by the ending of its name: .npy and .json (indices), .txt (indices, or paths), .csv (all images).

    Args:
        labels: in .txt, write the label after each path.
        paths: in .txt, write paths.

    Raises:
        Refused: another ending, no paths where they are asked for, or it cannot be written.
    """
    path = Path(path)
    kinds: dict[str, Callable[[], bytes]] = {
        ".npy": lambda: _npy(images.numbers[subset.rows]),
        ".json": lambda: (json.dumps(images.numbers[subset.rows].tolist()) + "\n").encode(),
        ".txt": lambda: _text(subset, images, labels, paths or labels),
        ".csv": lambda: _comma(subset, images),
    }
    if path.suffix not in kinds:
        raise Refused(f"{path}: written are .npy, .json, .txt, .csv, .beton, or a folder.{nearest(path.suffix, kinds)}")
    files.write_bytes(path, kinds[path.suffix]())


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _text(subset: Subset, images: Images, labels: bool, paths: bool) -> bytes:
    if not paths:
        return "".join(f"{number}\n" for number in images.numbers[subset.rows].tolist()).encode()
    if images.names is None:
        raise Refused(
            "--paths: the images of this data are no files, or not known here. Give --data where they are files; else leave --paths and --labels out, for indices, or write a .csv."
        )
    lines = [images.names[row] for row in subset.rows.tolist()]
    if odd := next((line for line in lines if "\n" in line or line != line.strip()), None):
        raise Refused(f"--paths: {odd!r} cannot stand on a line of a text. Write a .csv.")
    if labels:
        lines = [f"{line} {label}" for line, label in zip(lines, images.labels[subset.rows].tolist(), strict=True)]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def _comma(subset: Subset, images: Images) -> bytes:
    names = images.names or [""] * subset.total
    scores = [""] * subset.total if subset.scores is None else [f"{value:.9g}" for value in subset.scores.tolist()]
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["index", "path", "label", "score", "weight", "kept"])
    columns = (images.numbers.tolist(), names, images.labels.tolist(), scores, subset.spread().tolist())
    for number, name, label, score, heavy in zip(*columns, strict=True):
        table.writerow([number, name, label, score, f"{heavy:.9g}", int(heavy > 0)])
    return out.getvalue().encode("utf-8", "surrogateescape")


# --------------------------------------------------------------------------------------------------------- compare


def compare(subsets: Sequence[Subset], *, force: bool = False) -> dict[str, Any]:
    """What tickets share: JSON-ready.

    Returns:
        ``pairs``: for each two, by number, images that ``both`` keep, ``jaccard`` (of those that either keeps), the ``jaccard`` that
        two random tickets of their sizes would have (``by_chance``), and ``spearman`` of their scores, null where one has none;
        ``kept_by_all``, ``kept_by_any``; ``classes``: a row a class, with what each keeps of it, where labels are known.

    Raises:
        Refused: they are not of the same data.
    """
    first = subsets[0]
    for number, other in enumerate(subsets[1:], 2):
        if other.total != first.total:
            raise Refused(
                f"ticket {number}: of {other.total} images, and the first of {first.total}. They share no rows."
            )
        if not force:
            other.check(first.fingerprint, first.total, place=f"ticket {number}")
    masks = np.zeros((len(subsets), first.total), bool)
    for mask, subset in zip(masks, subsets, strict=True):
        mask[subset.rows] = True
    pairs = []
    for a in range(len(subsets)):
        for b in range(a + 1, len(subsets)):
            both, either = int((masks[a] & masks[b]).sum()), int((masks[a] | masks[b]).sum())
            chance = len(subsets[a]) * len(subsets[b]) / first.total
            one, other_scores = subsets[a].scores, subsets[b].scores
            pairs.append({
                "a": a, "b": b, "both": both, "jaccard": both / either,
                "by_chance": chance / (len(subsets[a]) + len(subsets[b]) - chance),
                "spearman": None if one is None or other_scores is None else spearman(one, other_scores),
            })  # fmt: skip
    known = next((subset for subset in subsets if subset.labels is not None), None)
    classes = []
    if known is not None and known.labels is not None:
        labels = known.labels
        size = len(known.classes) or int(labels.max()) + 1
        kept = [np.bincount(labels[subset.rows], minlength=size).tolist() for subset in subsets]
        of = np.bincount(labels, minlength=size).tolist()
        names = known.classes or tuple(str(label) for label in range(size))
        classes = [
            {"class": names[c], "of": of[c], "kept": [counts[c] for counts in kept]} for c in range(size) if of[c]
        ]
    return {
        "of": first.total,
        "kept": [len(subset) for subset in subsets],
        "kept_by_all": int(masks.all(0).sum()),
        "kept_by_any": int(masks.any(0).sum()),
        "pairs": pairs,
        "classes": classes,
    }


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Correlation of the ranks, ties at their mean rank; None where one has a single value."""
    ranks = []
    for values in (np.asarray(a), np.asarray(b)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        ranks.append(rank - rank.mean())
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale > 0 else None


def describe(subset: Subset) -> dict[str, Any]:
    """What a ticket holds: JSON-ready."""
    found: dict[str, Any] = {
        "kept": len(subset),
        "of": subset.total,
        "keep": subset.keep,
        "fingerprint": subset.fingerprint,
        "origin": subset.origin,
        "weights": {"low": float(subset.weights.min()), "high": float(subset.weights.max())},
        "classes": [],
        "scores": None,
    }
    if subset.labels is not None:
        size = len(subset.classes) or int(subset.labels.max()) + 1
        kept = np.bincount(subset.labels[subset.rows], minlength=size).tolist()
        of = np.bincount(subset.labels, minlength=size).tolist()
        names = subset.classes or tuple(str(label) for label in range(size))
        found["classes"] = [{"class": n, "kept": k, "of": o} for n, k, o in zip(names, kept, of, strict=True)]
    if subset.scores is not None:
        found["scores"] = {
            name: _quantiles(values)
            for name, values in (
                ("kept", subset.scores[subset.rows]),
                ("dropped", subset.scores[subset.complement]),
            )
            if len(values)
        }
    return found


def _quantiles(values: np.ndarray) -> dict[str, Any]:
    """Five of them, of the finite scores; how many are without bound."""
    finite = values[np.isfinite(values)].astype(np.float64)
    at = ("low", "q25", "median", "q75", "high")
    told = np.quantile(finite, (0, 0.25, 0.5, 0.75, 1)).tolist() if len(finite) else [None] * 5
    return {**dict(zip(at, told, strict=True)), "unbounded": len(values) - len(finite)}
