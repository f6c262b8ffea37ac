"""What an option of a method may be. A refusal names the method, the option and what it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from selection.errors import Refused


def number(method: str, option: str, value: Any, least: float, most: float = math.inf) -> None:
    """Hold an option to be a number from ``least`` to ``most``.

    Raises:
        Refused: it is not.
    """
    if not _is_number(value) or not least <= value <= most:
        limits = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise Refused(f"{method}({option}={value!r}): a number {limits} is wanted.")


def positive(method: str, option: str, value: Any) -> None:
    """Hold an option to be a positive number, and finite.

    Raises:
        Refused: it is not.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise Refused(f"{method}({option}={value!r}): a positive number is wanted.")


def part(method: str, option: str, value: Any, *, whole: bool = False, least: float = 0.0) -> None:
    """Hold an option to be a part from ``least`` to 1.

    Args:
        method: whose it is
        option: its name
        value: as it was given
        whole: it may be all of it

    Raises:
        Refused: it is not.
    """
    if not _is_number(value) or not (least <= value < 1 or (whole and value == 1)):
        less = "" if whole else ", and less than 1"
        raise Refused(f"{method}({option}={value!r}): a part from {least:g} to 1 is wanted{less}.")


def count(method: str, option: str, value: Any, least: int = 1) -> None:
    """Hold an option to be a whole number.

    Raises:
        Refused: it is not, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise Refused(f"{method}({option}={value!r}): a whole number of at least {least} is wanted.")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float))
