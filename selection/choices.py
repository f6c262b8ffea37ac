"""What a config says of a method: its name and its options; and what refusals call the places where that was said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from selection import methods
from selection.errors import Refused


class Named(Protocol):
    """A method by name, with its options: what a config has for ``score`` and ``pick``."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


Choice = str | Mapping[str, Any] | Named
"""``"ccs"``, ``{"name": "ccs", "bins": 20}``, or an object with ``name`` and ``options``."""


@dataclass(frozen=True)
class Places:
    """What a refusal calls what the user can change: a config's settings, unless the caller asks for them in another way."""

    score: str = "select.score"
    pick: str = "select.pick"
    keep: str = "select.keep"
    floor: str = "select.floor"
    balance: str = "select.balance"
    unbalanced: str = "select.balance=false"
    start: str = "select.start"
    max_memory: str = "select.max_memory"
    labels: str = "labels"
    """How images without labels get some."""
    options_of_score: str = "select.score"
    """What stands before a dot and the name of the option."""
    options_of_pick: str = "select.pick"


CONFIG = Places()


class Method(NamedTuple):
    """A method that was found, with options that it has."""

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All its settings: the options, and the defaults of the others."""
        return {**methods.settings(self.function), **self.options}


def check_seed(seed: Any) -> int:
    """``seed`` as a whole number of at least 0.

    Raises:
        Refused: it is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise Refused(f"seed: {seed!r} is no whole number of at least 0.")
    return int(seed)


def resolve(
    shelf: ModuleType,
    shelves: Iterable[ModuleType],
    choice: Choice,
    place: str,
    *,
    options_place: str = "",
    also: Callable[[Callable[..., Any]], Iterable[str]] = lambda method: (),
    here: Iterable[str] | None = None,
) -> Method:
    """The method of a choice, its options checked.

    Args:
        shelf: ours
        shelves: the user's own, which win over ours
        choice: a name, or a mapping with ``name`` and options
        options_place: what a refusal has before the name of an option; empty: ``place``
        also: what can be said beside a method's own settings, and was taken out of the options, for a refusal to name
        here: see :func:`selection.methods.find`

    Raises:
        Refused: no such method, or an option that it does not have.
    """
    name, options = _said(choice)
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise Refused(f"{place}: expected a name, or a name with options like {{name: ccs, bins: 20}}, not {choice!r}.")
    method = methods.find([shelf, *shelves], name, place=place, here=here)
    methods.check_settings(method, options, place=options_place or place, also=also(method))
    return Method(name, method, dict(options))


def named(
    shelf: ModuleType, shelves: Iterable[ModuleType], choice: Choice, here: Iterable[str] | None = None
) -> Callable[..., Any] | None:
    """The function that a choice names, whatever its options; None where it is on no shelf, or reads what is not ``here``."""
    return methods.named([shelf, *shelves], _said(choice)[0], here)


def _said(choice: Any) -> tuple[Any, Any]:
    """Name and options."""
    if isinstance(choice, str):
        return choice, {}
    if isinstance(choice, Mapping):
        return choice.get("name"), {name: value for name, value in choice.items() if name != "name"}
    return getattr(choice, "name", None), getattr(choice, "options", None)
