"""How a config finds its data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from lotus import config
from lotus.data import catalog
from lotus.data.source import Source, check_range
from selection import methods
from selection.errors import Refused


def open_data(data: config.Data, shelves: Iterable[ModuleType] = (), *, learned: bool = True) -> tuple[Source, Source]:
    """``(train, val)`` of the data set that a config names: one of the catalog, of ``shelves``, or ``hf:NAME``.

    Args:
        data: the section ``data`` of the page.
        shelves: modules with data sets of the user's own.
        learned: whether the classes are to be learned, which takes two.

    Raises:
        Refused: no such data set, an option it does not have, or images and labels that it refuses.
    """
    name, colon, remote = data.name.partition(":")
    if colon and name != "hf":
        raise Refused(f"data.name: {data.name!r}. Before a colon only 'hf' is known: hf:NAME.")
    if name == "hf" and not remote:
        raise Refused("data.name: say which data set of the Hugging Face hub, e.g. hf:uoft-cs/cifar10.")
    available = {"path": data.path, "name": remote}
    method = methods.find([catalog, *shelves], name, place="data.name", here=available, or_nothing=True)
    methods.check_settings(method, data.options, place="data.options")
    given = methods.call(method, available, _typed(method, data.options), place="data.options")
    if not isinstance(given, tuple) or [type(part) for part in given] != [Source, Source]:
        raise Refused(
            f"data.name: {name!r} gave {_kind(given)}, which is no data set. Return two lotus.data.source.Source, of training "
            "and of validation."
        )
    train, val = given
    if learned and len(train.classes) < 2:
        raise Refused(f"{train.where}: one class, {', '.join(train.classes)}. There is nothing to learn: give two.")
    if train.classes != val.classes:
        raise Refused(f"{data.name}: train and val do not have the same classes. {_apart(train.classes, val.classes)}")
    return train, val


def _apart(train: tuple[str, ...], val: tuple[str, ...]) -> str:
    """Which classes only one of them has, or that they count them otherwise."""
    told = [
        f"{which} has {', '.join(more[:5])}{', ...' if len(more) > 5 else ''}"
        for which, one, other in (("Only train", train, val), ("Only val", val, train))
        if (more := [name for name in one if name not in other])
    ]
    return f"{'. '.join(told or ['They have them in other orders'])}. Give both the same names, in the same order."


def _kind(given: Any) -> str:
    """What a data set of the user's own gave, for a refusal."""
    if isinstance(given, tuple):
        return f"({', '.join(type(part).__name__ for part in given)})"
    return "nothing" if given is None else f"a {type(given).__name__}"


_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


def _typed(method: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` held to the kinds by which ``method`` annotates them; kinds other than bool, int, float, str are its own affair.

    Raises:
        Refused: one of another kind, or a ``val_fraction`` or ``seed`` out of range, needed or not.
    """
    kinds = methods.kinds(method)
    typed = {}
    for name, value in options.items():
        kind = getattr(kinds.get(name), "__name__", "")
        given = value
        if kind == "float":
            try:
                # YAML reads 1e-1 as a text.
                value = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):
                value = math.nan
        fits = math.isfinite(value) if kind == "float" else kind not in _KINDS or type(value).__name__ == kind
        if not fits:
            raise Refused(f"data.options.{name}: {_KINDS[kind]}, not {given!r}.")
        if kind in _KINDS:
            check_range(name, value)
        typed[name] = value
    return typed
