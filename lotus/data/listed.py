"""A list of pictures: a table of paths and labels."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lotus.data import pictures, written_labels
from lotus.data.source import Source, digest
from selection import regular
from selection.errors import Refused

_HEADS = {"path", "file", "filename", "image"}
_LONGEST = 1 << 16
"""Signs of a line; of a longer one the pieces are no path and label."""


def source(file: Path, root: str, classes: tuple[str, ...], *, partial: bool = False) -> Source:
    """The pictures that ``file`` lists: ``path,label`` a line in a ``.csv``, else path, blank or tab, label.

    Args:
        root: what the paths start from; empty: the list's own folder
        classes: see :func:`lotus.data.written_labels.numbered`
        partial: only a part of the data's images is listed: they need not show every class

    Raises:
        Refused: the list cannot be read, or a line lacks a label, names a file that is not there, or a label out of range.
    """
    home, lines, paths, told, sizes = root or str(file.parent), array("q"), list[str](), list[str](), array("q")
    for line, path, label in _lines(file):
        whole = os.path.join(home, path)
        try:
            sizes.append(regular.check(whole).stat().st_size)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise Refused(
                f"{file}, line {line}: {whole}: {why}. Paths start from {home}; data.options.root names another folder."
            ) from None
        lines.append(line)
        paths.append(whole)
        told.append(label)
    if not paths:
        raise Refused(f"{file}: lists no images.")
    labels, classes = written_labels.numbered(told, classes, lambda i: f"{file}, line {lines[i]}")
    return Source(
        labels=labels,
        classes=classes,
        read=lambda i: pictures.read(paths[i]),
        name=lambda i: paths[i],
        fingerprint=digest([os.path.relpath(path, home) for path in paths], np.asarray(sizes), labels, classes),
        where=str(file),
        partial=partial,
        root=home,
    )


def _lines(file: Path) -> Iterator[tuple[int, str, str]]:
    """Number of the line, path, label."""
    try:
        with regular.check(file).open(encoding="utf-8", newline="") as opened:
            lines = iter(lambda: opened.readline(_LONGEST), "")
            if file.suffix.lower() == ".csv":
                rows: Iterator[list[str]] = csv.reader(lines, strict=True)
            else:
                rows = (line.strip().rsplit(None, 1) for line in lines)
            for line, row in enumerate(rows, 1):
                cells = [cell.strip() for cell in row]
                if not any(cells) or (line == 1 and cells[0].lower() in _HEADS):
                    continue
                if len(cells) != 2 or not all(cells):
                    raise Refused(f"{file}, line {line}: {', '.join(cells)!r:.80} is no path and label.")
                yield line, cells[0], cells[1]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise Refused(f"{file} cannot be read: {why}. Name a list, path,label a line.") from None
