"""Which data rows belong to: the fingerprint of the data set, and the names of its classes."""

from __future__ import annotations

from typing import Any

from selection.errors import Refused


def check_fingerprint(fingerprint: Any, place: str) -> str:
    """``fingerprint``, which is a text and not empty.

    Raises:
        Refused: it is not.
    """
    if not isinstance(fingerprint, str) or not fingerprint:
        raise Refused(f"{place}: the fingerprint of the data is missing. Take the data set's own.")
    return fingerprint


def check_classes(classes: Any, place: str) -> tuple[str, ...]:
    """The names of classes.

    Raises:
        Refused: it is no list of texts.
    """
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise Refused(f"{place}: classes are a list of names, not {classes!r}.")
    return tuple(classes)
