"""A file of others as an array, or as columns by name: lists, tables and dictionaries of published code and of other tools.

Pickled dictionaries are read without running them (selection/pickles.py). What the numbers mean is none of this file's business.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selection import memory, npz, pickles, regular
from selection.errors import Refused, reason

Floats = npt.NDArray[np.float64]


def table(path: Path) -> Any:
    """An array, or a dictionary of columns.

    Raises:
        Refused: it cannot be read, or is neither.
    """
    try:
        with regular.check(path).open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}). Give a file of rows or scores.") from None
    try:
        return _parsed(path, head)
    except Refused:
        raise
    except Exception as error:  # a damaged or foreign file can break its parser in any way
        why = reason(error)
        raise Refused(
            f"{path}: {_looks(path, head)}, and cannot be read: {why}. Wanted is a list of row numbers, paths, scores or truth "
            "values: .npy, .npz, .txt, .csv, .json, or a pickle or PyTorch file of arrays. Save it anew with np.save, or as text."
            + (" If it was a ticket of LOTUS, draw it again." if path.suffix == ".npz" else "")
        ) from None


def _parsed(path: Path, head: bytes) -> Any:
    if head.startswith(b"\x93NUMPY"):
        array = npz.array(path)
        return {name: array[name] for name in array.dtype.names} if array.dtype.names else array
    if path.suffix == ".parquet":
        return parquet(path)
    if path.suffix == ".json":
        return _json(json.loads(_text(path)))
    if path.suffix in (".csv", ".tsv"):
        return _csv(_text(path))
    if path.suffix in (".txt", ".lst", ".list"):
        return _lines(_text(path))
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            held = archive.namelist()
        if held and not any(name.endswith("data.pkl") for name in held):
            return npz.arrays(path)
    return _json(pickles.load(path))


def holds_nothing(path: Path) -> bool:
    """Whether a text list is empty, as one of what is to go may well be."""
    small = path.suffix in (".txt", ".lst", ".list") and path.is_file() and path.stat().st_size < 1 << 20
    return small and not path.read_bytes().strip()


def _text(path: Path) -> str:
    """Of a file that fits into memory; the names of files in it need not be UTF-8, as they are written in :mod:`selection.exchange`.

    Raises:
        Refused: it does not fit.
    """
    memory.there(memory.size(regular.check(path).stat().st_size), str(path), "Take a part of it.")
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")


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
    rows = [row for row in _cells(text) if row]
    if not rows:
        raise ValueError("it is empty")
    odd = next((number for number, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if odd is not None:
        raise ValueError(f"its line {odd + 1} has {len(rows[odd])} columns, not {len(rows[0])}; it may be cut short")
    head = [cell.strip() for cell in rows[0]]
    if any(map(_is_number, head)):
        return _guessed([_typed(list(column)) for column in zip(*rows, strict=True)])
    if len(rows) == 1:
        raise ValueError("a head and no line")
    below = zip(*rows[1:], strict=True)
    return {name: _typed(list(column)) for name, column in zip(head, below, strict=True) if any(column)}


def _cells(text: str) -> Any:
    """The lines of a table, by tabs where its first has one, else by commas: what :func:`csv.reader` gives."""
    return csv.reader(io.StringIO(text), delimiter="\t" if "\t" in text.split("\n", 1)[0] else ",")


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
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not lines:
        raise ValueError("it is empty")
    if all(re.search(r"\t[0-9]+[.][0-9e+-]*$", line) for line in lines):
        return _tabbed([line.split("\t") for line in lines])
    told = _typed(lines)
    if told.dtype.kind != "U":
        return told
    if all(len(cells) > 1 and all(map(_is_number, cells)) for cells in map(str.split, lines)):
        raise ValueError("its lines hold several numbers each; write one a line, or a .csv with a head")
    return _labeled(lines)


def _labeled(lines: list[str]) -> Any:
    """Paths, and their labels where every line has one."""
    labeled = [match for match in (re.fullmatch(r"(.*\S)\s+(\d+)", line) for line in lines) if match]
    if len(labeled) == len(lines):
        return {
            "path": np.array([match[1] for match in labeled]),
            "label": np.array([int(match[2]) for match in labeled]),
        }
    return np.array(lines)


def _tabbed(rows: list[list[str]]) -> dict[str, np.ndarray]:
    """Columns of lines that :func:`selection.exchange.write` wrote with weights: index or path, maybe a label, the weight."""
    width = len(rows[0])
    if width not in (2, 3) or any(len(row) != width for row in rows):
        raise ValueError("its lines have other than 2 or 3 cells between tabs")
    columns = [_typed(list(column)) for column in zip(*rows, strict=True)]
    first = "path" if columns[0].dtype.kind == "U" else "index"
    return dict(zip([first, *["label"] * (width - 2), "weight"], columns, strict=True))


def parquet(path: Path, only: Container[str] | None = None) -> dict[str, np.ndarray]:
    """The columns of a .parquet, (N,) or (N, D) each.

    Args:
        path: the file
        only: the columns to read, by their names in small letters; None: all

    Raises:
        Refused: the library that reads it is not here, or the table does not fit into memory.
        Exception: any other, where the file is damaged, or has blanks.
    """
    try:
        from pyarrow import parquet as reader
    except ImportError:
        raise Refused(f"{path}: needs the library pyarrow: pip install pyarrow. Or write a .csv.") from None
    with reader.ParquetFile(regular.check(path)) as file:
        about = file.metadata
        claimed = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
        memory.there(memory.size(4 * claimed), str(path), "Take a part of it.")  # as numbers of Python on the way
        wanted = [name for name in file.schema_arrow.names if only is None or name.lower() in only]
        table = file.read(columns=wanted)
    blank = next((name for name in wanted if table.column(name).null_count), None)
    if blank is not None:
        raise ValueError(f"its column {blank!r} has {table.column(blank).null_count} blanks")
    return {name: np.asarray(table.column(name).to_pylist()) for name in wanted}


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


def numbers(path: Path, values: np.ndarray, what: str) -> Floats:
    """A column as numbers, each finite or +inf.

    Raises:
        Refused: one is not; says which, and where it stands.
    """
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
    table = _cells(_text(path))
    ends = [table.line_num for row in table if row]
    return f"line {ends[at - values]}"  # the head, where there is one, holds no value


def truth(path: Path, values: np.ndarray) -> npt.NDArray[np.bool_]:
    """A column as truth values.

    Raises:
        Refused: it holds others than true and false, 1 and 0.
    """
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise Refused(f"{path}: a mask holds true and false, or 1 and 0.")
    return values.astype(bool)
