"""Shelves that are there without being named: the published systems of lotus/papers, and what installed packages bring.

A shelf is a module. ``--with mine.py`` names one by its file; a package that is installed names its own as an entry point::

    [project.entry-points."lotus.shelves"]
    mine = "my_package.my_shelf"

A config never names a module: it may come from elsewhere, and chooses among what the user installed or named. The published
systems need no entry: all that lies in their room is theirs, whether LOTUS is installed or only found on the path.

On a shelf are functions (:mod:`selection.methods`) and values: stages (:class:`lotus.stage.Stage`), ways to prune and rivals
of a search (:mod:`lotus.way`), rows of what goes with what (``RULES``, :mod:`lotus.config.rules`), and the names of those of its
guests that only watch a training (``WATCHERS``).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Protocol, TypeVar

from selection import methods
from selection.errors import Refused

GROUP = "lotus.shelves"
ROOM = "lotus.papers"
TRACKERS = "lotus.training.trackers"
"""Named here alone, as text: nothing below them imports them."""


class Named(Protocol):
    """A value of a shelf."""

    @property
    def name(self) -> str: ...


V = TypeVar("V", bound=Named)


@functools.cache
def installed() -> tuple[ModuleType, ...]:
    """The published systems, then what installed packages bring, each by name.

    Raises:
        Refused: a package's shelf cannot be imported.
    """
    room = importlib.import_module(ROOM)
    modules = [importlib.import_module(f"{ROOM}.{name}") for _, name, _ in pkgutil.iter_modules(room.__path__)]
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            shelf = point.load()
        except Exception as error:
            raise Refused(
                f"{point.value}, which an installed package brings as {GROUP}.{point.name}: it cannot be imported "
                f"({type(error).__name__}: {error}). Mend that package, or uninstall it."
            ) from error
        if not isinstance(shelf, ModuleType):
            raise Refused(f"{point.value}: an entry of {GROUP} is a module. Mend that package, or uninstall it.")
        modules.append(shelf)
    return tuple(modules)


def known(own: Sequence[ModuleType] = ()) -> tuple[ModuleType, ...]:
    """All shelves beside LOTUS' own: those that are installed, then the user's ``own`` files, which win; each once."""
    return tuple(dict.fromkeys((*installed(), *own)))


def watches(guest: str, own: Sequence[ModuleType] = ()) -> bool:
    """Whether a guest of this name changes nothing of a training, as its shelf says: the last one that has it."""
    having = [shelf for shelf in (importlib.import_module(TRACKERS), *known(own)) if guest in methods.names(shelf)]
    return bool(having) and guest in getattr(having[-1], "WATCHERS", ())


def values(shelf: Any, kind: type[V]) -> dict[str, V]:
    """The values of a kind that ``shelf`` brings, by name."""
    return {value.name: value for value in vars(shelf).values() if isinstance(value, kind)}


def find(kind: type[V], shelves: Sequence[Any], name: str, *, place: str) -> V:
    """The value called ``name``; later shelves win.

    Raises:
        Refused: there is none; with the nearest.
    """
    there = {known: value for shelf in shelves for known, value in values(shelf, kind).items()}
    methods.check_choice(name, sorted(there), place=place)
    methods.tell_replaced([shelf for shelf in shelves if name in values(shelf, kind)], name, place=place)
    return there[name]
