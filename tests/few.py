"""Few parameters for the fast tests, every one for the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def few(every: Iterable[Any], fast: Collection[Any] | Callable[[Any], bool]) -> list[Any]:
    """``every`` parameter, or tuple of parameters; those that are not ``fast`` run with the slow tests."""
    is_fast = fast if callable(fast) else fast.__contains__
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=() if is_fast(one) else pytest.mark.slow)
        for one in every
    ]
