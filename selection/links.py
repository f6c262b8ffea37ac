"""Which pictures are links to which, so that nothing is deleted that another picture is a link to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache

_MOST = 40
"""Links after one another that are followed, as Linux does it."""


def apart(listed: Iterable[str], pictures: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of paths to be deleted those that may go, in order and once, and those that have to stay, since one of ``pictures`` that is not
    listed is a link to them, or the same file by a folder that is a link."""
    asked = dict.fromkeys(listed)
    needed = {one for name in pictures if name not in asked for one in passed(name)}
    held = [name for name in asked if place(name) in needed]
    return [name for name in asked if name not in set(held)], held


def place(name: str) -> str:
    """Where a name stands, by the real folder: what would be deleted, be it a link or not."""
    home, last = os.path.split(name)
    return os.path.join(_real(home), last)


def passed(name: str) -> list[str]:
    """The places on the way from a name to its file, both among them: none of them can go while the name is to be read."""
    found = [place(name)]
    while os.path.islink(found[-1]) and len(found) <= _MOST:
        found.append(place(os.path.join(os.path.dirname(found[-1]), os.readlink(found[-1]))))
    return found


@lru_cache(maxsize=65536)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
