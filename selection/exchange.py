"""Tickets and scores as files of others: what published code leaves, and what other tools read.

Nothing here opens images. What has to be known of them (how many, their labels, their names, how others count them) comes as
:class:`Images`. Formats and their traps: lists of rows, masks, orders, class-sorted scores, rows to *remove*, pickled
dictionaries, and tables by path. How a file is taken apart: selection/parsing.py and selection/reading.py.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selection import atomic_files, parsing
from selection.comparison import compare, describe, spearman
from selection.errors import Refused
from selection.images import Images, Words
from selection.methods import nearest
from selection.ranks import ranking
from selection.reading import Asked, Contents, find
from selection.signals import Signals
from selection.subset import Known, Subset

__all__ = [
    "KINDS", "Contents", "Images", "Words", "compare", "describe", "read", "scores", "spearman", "ticket", "write",
]  # fmt: skip

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LISTS = (".npy", ".json", ".txt", ".csv", ".parquet")
"""Endings of lists that are written."""

KINDS = ("rows", "mask", "remove", "order", "scores")
"""What a bare list of numbers can be: rows that stay, one truth value an image, rows that go, all rows with the best last, or
one score an image."""

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
) -> Contents:
    """Rows or scores out of a file of others.

    Args:
        path: the file; its ending says how it is read.
        images: of the data that it is to be of.
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
        raise Refused(
            f"{images.say('kind', kind)}: there is no such kind.{nearest(kind, KINDS)} There are: {', '.join(KINDS)}."
        )
    if kind == "remove" and parsing.holds_nothing(path):
        return Contents(np.arange(images.total), told="rows that go, of which there are none")
    contents = find(path, Asked(kind, column, order, force), images)
    if negate:
        say = images.say("negate")
        if contents.scores is None:
            raise Refused(f"{say}: {path} holds no scores. Leave it out.")
        if not np.isfinite(contents.scores).all():
            raise Refused(f"{say}: {path} has a score of +inf, which would become the least wanted. Leave it out.")
        contents.scores = -contents.scores
        contents.told += ", negated"
    return contents


def ticket(
    found: Contents, images: Images, *, name: str, keep: float | None = None, seed: int = 0, force: bool = False
) -> Subset:
    """The ticket of what was found.

    Args:
        found: as :func:`read` gives it.
        images: of the data.
        name: what refusals and the ticket call the file.
        keep: for scores: the fraction of the highest that stays, ties by ``seed``.
        force: was said when it was read; the ticket says so.

    Raises:
        Refused: scores without ``keep``, or rows with one; a ``keep`` or ``seed`` that cannot be.
    """
    say = images.say
    origin: dict[str, Any] = {"imported": name, "as": found.told}
    rows = found.rows
    if rows is None:
        if keep is None or found.scores is None:
            raise Refused(f"{name}: holds scores and no choice. Say {say('keep', 0.3)} to keep the highest 30 %.")
        if not 0 < keep <= 1:
            raise Refused(f"{say('keep')}: the fraction that stays lies in (0, 1], not {keep:g}.")
        if seed < 0:
            raise Refused(f"{say('seed')}: {seed} is no whole number of at least 0.")
        budget = round(keep * images.total)
        if not budget:
            raise Refused(f"{say('keep', keep)}: of {images.total} images that is none. Keep more.")
        rows = ranking(found.scores, np.random.default_rng(seed))[:budget]
        origin |= {"seed": seed}
    elif keep is not None:
        raise Refused(f"{say('keep', keep)}: {name} says itself which {len(rows)} images stay. Leave it out.")
    if force:
        origin |= {"forced": True}
    return Subset(
        rows,
        images.total,
        fingerprint=images.fingerprint,
        weights=None if found.weights is None else found.weights / found.weights.mean(),
        keep=keep,
        origin=origin,
        known=Known(images.labels, images.classes, found.scores),
        place=name,
    )


def scores(found: Contents, images: Images, *, name: str, beside: Signals | None = None) -> Signals:
    """What the score ``given`` reads: the scores, with the labels and with all that was recorded of the same images.

    Raises:
        Refused: there are none.
    """
    if found.scores is None:
        raise Refused(f"{name}: holds rows, no scores. It becomes a ticket: see exchange.ticket.")
    arrays = {name: beside[name] for name in beside} if beside is not None else {"labels": images.labels}
    arrays["given"] = np.where(np.isfinite(found.scores), found.scores, np.finfo(np.float64).max)
    bare = beside is not None and beside.unlabeled
    return Signals(arrays, fingerprint=images.fingerprint, classes=images.classes, place=name, unlabeled=bare)


# ------------------------------------------------------------------------------------------------------------- out


def check(path: str | Path) -> None:
    """Before the work: whether a ticket can be written as a list of this ending.

    Raises:
        Refused: another ending, or what writes it is not here.
    """
    ending = Path(path).suffix
    if ending not in LISTS:
        raise Refused(
            f"{path}: written are {', '.join(LISTS)}, .beton, or a folder.{nearest(ending, [*LISTS, '.beton'])}"
        )
    if ending == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise Refused(f"{path}: needs the library pyarrow: pip install pyarrow. Or write a .csv.")


def write(
    subset: Subset,
    path: str | Path,
    images: Images,
    *,
    labels: bool = False,
    paths: bool = False,
    weights: bool = False,
) -> None:
    """The ticket as a file of others, by the ending of its name: .npy and .json (indices), .txt (indices, or paths), .csv and
    .parquet (all images, with paths, labels, scores and weights).

    Args:
        subset: what is written.
        path: where to; its ending says as what.
        images: of the ticket's data.
        labels: in .txt, write the label after each path.
        paths: write paths: in .txt in place of the indices, in .npy and .json with ``weights``, beside them.
        weights: write what each image weighs: a .txt then has tabs between its cells, a .npy fields, a .json lists by name.

    Raises:
        Refused: another ending, no paths where they are asked for, or it cannot be written.
    """
    path = Path(path)
    check(path)
    if path.suffix == ".txt":
        content = _text(subset, images, labels, paths or labels, weights)
    elif path.suffix == ".csv":
        content = _comma(subset, images)
    elif path.suffix == ".parquet":
        content = _parquet(subset, images)
    else:
        content = _array(path.suffix, _columns(subset, images, paths) if weights else None, images.numbers[subset.rows])
    atomic_files.write_bytes(path, content)


def _columns(subset: Subset, images: Images, paths: bool) -> dict[str, np.ndarray]:
    """Of the images that stay."""
    columns = {"index": images.numbers[subset.rows]}
    if paths and images.names is not None:
        columns["path"] = np.array([images.names[row] for row in subset.rows.tolist()])
    return {**columns, "weight": subset.weights}


def _array(ending: str, columns: dict[str, np.ndarray] | None, numbers: Rows) -> bytes:
    if ending == ".json":
        told = numbers.tolist() if columns is None else {name: column.tolist() for name, column in columns.items()}
        return (json.dumps(told) + "\n").encode()
    if columns is None:
        return _npy(numbers)
    array = np.empty(len(numbers), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        array[name] = column
    return _npy(array)


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _text(subset: Subset, images: Images, labels: bool, paths: bool, weights: bool) -> bytes:
    between = "\t" if weights else " "
    lines = _paths(subset, images, between) if paths else [str(n) for n in images.numbers[subset.rows].tolist()]
    if labels:
        lines = [f"{line}{between}{n}" for line, n in zip(lines, images.labels[subset.rows].tolist(), strict=True)]
    if weights:  # always with a point: a whole number after a path is a label
        lines = [f"{line}\t{heavy:#.9g}" for line, heavy in zip(lines, subset.weights.tolist(), strict=True)]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def _paths(subset: Subset, images: Images, between: str) -> list[str]:
    """Of the images that stay.

    Raises:
        Refused: they have none, or one that cannot stand on a line.
    """
    say = images.say
    if images.names is None:
        raise Refused(
            f"{say('paths')}: the images of this data are no files, or not known here. {say.names} Where they are none, leave "
            f"{say('paths')} and {say('labels')} out, for indices, or write a .csv."
        )
    lines = [images.names[row] for row in subset.rows.tolist()]
    apart = {"\n", between} - {" "}
    if odd := next((line for line in lines if line != line.strip() or any(sign in line for sign in apart)), None):
        raise Refused(f"{say('paths')}: {odd!r} cannot stand on a line of a text. Write a .csv.")
    return lines


def _parquet(subset: Subset, images: Images) -> bytes:
    """Of all images.

    Raises:
        Refused: a name is no UTF-8.
    """
    import pyarrow
    from pyarrow import parquet

    heavy = subset.spread()
    columns: dict[str, Any] = {"index": images.numbers, "path": images.names, "label": images.labels}
    columns |= {"score": subset.scores, "weight": heavy, "kept": heavy > 0}
    out = io.BytesIO()
    try:
        table = pyarrow.table({name: column for name, column in columns.items() if column is not None})
    except UnicodeEncodeError as error:
        raise Refused(f"{error.object!r}: a name that is no UTF-8 cannot stand in a .parquet. Write a .csv.") from None
    parquet.write_table(table, out)
    return out.getvalue()


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
