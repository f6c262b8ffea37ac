"""Guests that a config names: found on the shelf or in a file of the user's own, and made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from lotus.config import Method, options
from lotus.training import guest_shelf, trackers
from lotus.training.guests import Guest
from selection import methods
from selection.errors import Refused

READS = ("model", "recipe", "rows", "labels", "classes", "seed", "world")
"""What a function that makes a guest may read: the model; its recipe; (K,) rows of the ticket; (N,) labels of the data set;
the number of classes; the training's seed; the ranks."""


def check(wanted: Sequence[Method], shelves: Sequence[ModuleType], *, place: str) -> None:
    """Refuse guests that are not on a shelf, or are given what they do not have, before anything is made.

    Args:
        place: where they are named, e.g. ``train.guests``

    Raises:
        Refused: with the nearest right name.
    """
    for settings in wanted:
        method = _found(settings, shelves, place)
        options(method, settings.options, place=f"{place}.{settings.name}")


def chosen(
    wanted: Sequence[Method], available: Mapping[str, Any], shelves: Sequence[ModuleType], *, place: str
) -> list[Guest]:
    """The guests that a config names: each a function of a shelf, called with what it reads and what the config sets.

    Raises:
        Refused: there is no such function, or it makes no guest.
    """
    found = []
    for settings in wanted:
        method, where = _found(settings, shelves, place), f"{place}.{settings.name}"
        guest = methods.call(method, available, options(method, settings.options, place=where), place=where, here=READS)
        if not isinstance(guest, Guest):
            raise Refused(
                f"{place}: {settings.name!r} makes a {type(guest).__name__}, not a guest. Return an instance of a subclass of "
                "lotus.training.guests.Guest."
            )
        found.append(guest)
    return found


def _found(settings: Method, shelves: Sequence[ModuleType], place: str) -> Any:
    return methods.find([guest_shelf, trackers, *shelves], settings.name, place=place, here=READS)
