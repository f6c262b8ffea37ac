"""The way to prune that a config names: by scores, which is our own, or one of a shelf."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from lotus import shelves as all_shelves
from lotus.config import Prune, options
from lotus.stages import structured, width_search
from lotus.way import Options, Way


def chosen(request: Prune, shelves: Sequence[ModuleType]) -> tuple[Way, Options]:
    """The way of ``prune.method``, and all of its settings.

    Raises:
        Refused: there is no such way, or it is given what it does not have.
    """
    way = all_shelves.find(Way, (structured, *shelves), request.method.name, place="prune.method")
    return way, options(way.make, request.method.options, place="prune.method", name=way.name)


def check(request: Prune, shelves: Sequence[ModuleType]) -> None:
    """Refuse names and settings that are not on a shelf.

    Raises:
        Refused: with the nearest right name.
    """
    chosen(request, shelves)
    if request.search is not None and request.search.compare is not None:
        width_search.rival(request, shelves)


def named(request: Prune, shelves: Sequence[ModuleType]) -> Way | None:
    """The way of ``prune.method``; None where no shelf at hand has it, as when a run is only looked at."""
    there: dict[str, Any] = {}
    for shelf in (structured, *shelves):
        there |= all_shelves.values(shelf, Way)
    return there.get(request.method.name)
