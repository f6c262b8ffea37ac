"""Labels that others wrote as text: names or numbers of classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from selection import regular
from selection.errors import Refused
from selection.methods import nearest


def numbered(
    told: Sequence[str], classes: tuple[str, ...], at: Callable[[int], str]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """What was written of each image as a number, and the classes.

    Args:
        told: a class's name, or its number from 0
        classes: their names; empty: numbers are their own names, and names are counted in their alphabet
        at: where label ``i`` stands, for messages

    Raises:
        Refused: a label that is empty, none of ``classes``, below 0, or as large as only a mistake makes it.
    """
    if not classes:
        known = set(told)
        if all(map(_whole, known)):
            highest = max(map(int, known), default=0)
            if highest >= max(1, len(told)):  # one of them is empty; do not count up to it
                i = next(i for i, label in enumerate(told) if int(label) == highest)
                raise Refused(f"{at(i)}: label {highest} in {len(told)} images. Count classes from 0.")
            classes = tuple(map(str, range(highest + 1)))
        else:
            classes = tuple(sorted(known))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.empty(len(told), np.int64)
    for i, label in enumerate(told):
        found = number.get(label, int(label) if _whole(label) else -1)
        if not label or not 0 <= found < len(classes):
            raise Refused(f"{at(i)}: label {label!r} is none of the {len(classes)} classes.{nearest(label, classes)}")
        labels[i] = found
    return labels, classes


def _whole(label: str) -> bool:
    return re.fullmatch("-?[0-9]{1,9}", label) is not None


def names(file: str) -> tuple[str, ...]:
    """The classes' names in a file, a line each; none where no file is named.

    Raises:
        Refused: it cannot be read, or names a class twice.
    """
    if not file:
        return ()
    try:
        text = regular.text(file)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text in UTF-8"
        raise Refused(f"data.options.classes: {file} cannot be read: {why}.") from None
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(set(found)) < len(found) or not found:
        raise Refused(f"data.options.classes: {file} has {len(found)} names, {len(set(found))} of them different.")
    return found
