"""A method is a plain function on a shelf (a module).

Its positional parameters say what it *reads*; its keyword-only parameters are what a config may *set*.
A keyword-only parameter whose default is a dataclass stands for several settings, its fields, which a config says like any others.
It is found by its name: a public function defined in the shelf's own module. There is no registry to feed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from selection.errors import Notice, Refused

REQUIRED: Any = inspect.Parameter.empty
"""The default of a setting that has none."""
_HOUSE = ("selection", "lotus")
_PLAIN: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"), int: ((int, float), "a number"), float: ((int, float), "a number"), str: ((str,), "a word"),
}  # fmt: skip
"""What a setting without an annotation takes where its default is of a kind: the kinds, and what they are called."""


def names(shelf: ModuleType) -> list[str]:
    """Names of the methods on ``shelf``, sorted."""
    return sorted(
        name
        for name, value in vars(shelf).items()
        if inspect.isfunction(value) and value.__module__ == shelf.__name__ and not name.startswith("_")
    )


def nearest(word: str, words: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest of ``words``, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(value: Any, among: Sequence[str], *, place: str) -> None:
    """Refuse a word that is none of ``among``.

    Raises:
        Refused: with the nearest of them, and all.
    """
    if not isinstance(value, str) or value not in among:
        raise Refused(f"{place}: there is no {value!r}.{nearest(str(value), among)} Here: {', '.join(among)}.")


def find(
    shelves: ModuleType | Iterable[ModuleType],
    name: str,
    *,
    place: str,
    here: Iterable[str] | None = None,
    or_nothing: bool = False,
) -> Callable[..., Any]:
    """The method called ``name``; later shelves (the user's own) win over earlier ones.

    Args:
        here: all that a method of this kind may read; None: nobody knows. A user's file holds methods of several kinds, which
            are told apart by what they read.
        or_nothing: a method of this kind may read nothing at all, as a guest or a data set may

    Raises:
        Refused: no such method, or one of another kind; the message names ``place`` (a setting, say) and what there is.
    """
    shelves = [shelves] if isinstance(shelves, ModuleType) else list(shelves)
    on = _holding(shelves, name, here, or_nothing)
    if on:
        tell_replaced(on, name, place=place)
        found: Callable[..., Any] = getattr(on[-1], name)
        return found
    other = named(shelves, name)
    if other is not None:
        here = set(here or ())
        missing = [read for read in reads(other) if read not in here]
        if not missing:
            raise Refused(
                f"{place}: {name!r} reads nothing, and is of another kind. It has to read some of: {', '.join(sorted(here))}."
            )
        raise Refused(_misread(place, name, missing, here, nearest(missing[0], sorted(here))))
    known = sorted(
        {known for shelf in shelves for known in names(shelf) if _fits(getattr(shelf, known), here, or_nothing)}
    )
    raise Refused(f"{place}: there is no {name!r}.{nearest(name, known)} Here: {', '.join(known)}.")


def named(
    shelves: Iterable[ModuleType], name: Any, here: Iterable[str] | None = None, *, or_nothing: bool = False
) -> Callable[..., Any] | None:
    """As :func:`find`; None where there is none."""
    on = _holding(shelves, name, here, or_nothing)
    return getattr(on[-1], name) if on else None


def _holding(
    shelves: Iterable[ModuleType], name: Any, here: Iterable[str] | None, or_nothing: bool
) -> list[ModuleType]:
    """The shelves that have a method of this name and kind."""
    return [shelf for shelf in shelves if name in names(shelf) and _fits(getattr(shelf, name), here, or_nothing)]


def tell_replaced(shelves: Sequence[ModuleType], name: str, *, place: str) -> None:
    """Notice that of several ``shelves`` with something of this name the last is taken.

    Args:
        shelves: that have it, in their order
        name: of a method, a stage, a way to prune
        place: where it is named
    """
    if len(shelves) < 2:
        return
    files = [getattr(shelf, "__file__", None) or shelf.__name__ for shelf in shelves]
    theirs = f"that of {files[-2]}"
    if shelves[-2].__name__.partition(".")[0] in _HOUSE:
        theirs = f"LOTUS' own {name!r}"
    text = f"{place}: {name!r} of {files[-1]} takes the place of {theirs}. Give it another name to have both."
    warnings.warn(text, Notice, stacklevel=3)


def _fits(method: Callable[..., Any], here: Iterable[str] | None, or_nothing: bool) -> bool:
    return here is None or (set(reads(method)) <= set(here) and (or_nothing or bool(reads(method))))


def _misread(place: str, name: str, missing: Sequence[str], here: Iterable[str], cure: str = "") -> str:
    """What is said of a method that reads what is not here."""
    cure = f"{cure.strip()} " if cure else ""
    return f"{place}: {name!r} reads {', '.join(missing)}, which is not here. {cure}Here: {', '.join(sorted(here))}."


def reads(method: Callable[..., Any]) -> list[str]:
    """What ``method`` reads: the names of its positional parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in inspect.signature(method).parameters.items() if parameter.kind in kinds]


def settings(method: Callable[..., Any]) -> dict[str, Any]:
    """What a config may set on ``method``, with their published defaults."""
    found: dict[str, Any] = {}
    for name, default in _keywords(method).items():
        found |= _parts(default) if _is_group(default) else {name: default}
    return found


def arguments(method: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` as the keyword-only parameters of ``method``: those of a group together, as its dataclass."""
    given = dict(options)
    for name, default in _keywords(method).items():
        if _is_group(default):
            given[name] = dataclasses.replace(
                default, **{part: given.pop(part) for part in _parts(default) if part in given}
            )
    return given


def _keywords(method: Callable[..., Any]) -> dict[str, Any]:
    """Its keyword-only parameters and their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _is_group(default: Any) -> bool:
    return dataclasses.is_dataclass(default) and not isinstance(default, type)


def _parts(group: Any) -> dict[str, Any]:
    return {part.name: getattr(group, part.name) for part in dataclasses.fields(group)}


def check_settings(
    method: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    place: str,
    also: Iterable[str] = (),
    name: str | None = None,
) -> None:
    """Refuse options that ``method`` does not have, words that its annotations (``Literal``) do not name, values of another kind than
    the default of a setting that has no annotation, and a setting without a default that is not said.

    Args:
        options: by name
        place: where they stand, for a refusal to name
        also: what can be said in the same place beside the method's own settings, for a refusal to name
        name: what a config calls the method; None: as the function is called

    Raises:
        Refused: an unknown option or word, with the nearest right one; a value of another kind; a setting that is missing.
    """
    own, hints = settings(method), kinds(method)
    known = dict.fromkeys([*own, *also])
    bare = _keywords(method).keys() - getattr(method, "__annotations__", {}).keys()
    for option in options:
        if option not in own:
            has = f"It has: {', '.join(known)}." if known else "It has none."
            raise Refused(
                f"{place}.{option}: {name or _name(method)!r} has no such setting.{nearest(option, known)} {has}"
            )
        if get_origin(hints.get(option)) is Literal:
            check_choice(options[option], get_args(hints[option]), place=f"{place}.{option}")
        if option in bare:
            _check_like(options[option], own[option], place=f"{place}.{option}")
    for option in own:
        if own[option] is REQUIRED and option not in options:
            raise Refused(f"{place}.{option}: has no default. Set it.")


def _check_like(value: Any, default: Any, *, place: str) -> None:
    """Refuse a value that is plainly of another kind than the ``default`` of its setting, which nothing else says the kind of."""
    kinds, called = _PLAIN.get(type(default), ((object,), ""))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
        raise Refused(
            f"{place}: {called} like its default {default!r}, not {value!r}. If it takes others, annotate it in its file."
        )


def kinds(method: Callable[..., Any]) -> dict[str, Any]:
    """How the settings of ``method`` are annotated; nothing where that names what is nowhere, as one's own method may."""
    keywords = _keywords(method)
    own = {name: note for name, note in getattr(method, "__annotations__", {}).items() if name in keywords}
    try:
        found = get_type_hints(
            SimpleNamespace(__annotations__=own), getattr(method, "__globals__", {}), include_extras=True
        )
        for default in filter(_is_group, keywords.values()):
            found |= get_type_hints(type(default), include_extras=True)
    except (NameError, TypeError):
        return {}
    return found


def call(
    method: Callable[..., Any],
    available: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    place: str,
    here: Iterable[str] | None = None,
    cures: Mapping[str, str] = {},
) -> Any:
    """Call ``method`` with what it reads out of ``available`` and with ``options``.

    Args:
        place: where its options stand, for a refusal to name
        here: what a refusal says that there is; None: all of ``available``. (Of a file only what is read may be at hand.)
        cures: how something is to be had, in a sentence, by its name

    Raises:
        Refused: something it reads is not available, or an option it does not have; or the method is the user's own and
            raises something, which it then names.
    """
    check_settings(method, options, place=place)
    wanted = reads(method)
    missing = [name for name in wanted if name not in available]
    if missing:
        cure = "".join(f"{cure} " for cure in dict.fromkeys(cures[name] for name in missing if name in cures))
        parameters = inspect.signature(method).parameters
        if any(parameters[name].default is not inspect.Parameter.empty for name in missing):
            cure = f"{cure.strip()} A setting stands behind a *, as in (loss, *, power=1.0).".strip()
        raise Refused(_misread(place, method.__name__, missing, available if here is None else here, cure))
    given, options = [available[name] for name in wanted], arguments(method, options)
    if is_ours(method):
        return method(*given, **options)
    with blamed(method, place=place):
        return method(*given, **options)


@contextlib.contextmanager
def blamed(method: Callable[..., Any], *, place: str, spared: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around a call of the user's own ``method``: what it raises is for the user to mend.

    Args:
        place: where it is named
        spared: goes through as it is, as what is refused does

    Raises:
        Refused: it raises something, which is named, with its line.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (Refused, *spared)):
            raise
        raise Refused(f"{place} ({_name(method)}): {type(error).__name__}: {error}{_line(method, error)}.") from error


def is_ours(method: Any) -> bool:
    """Whether ``method`` (or a class) is the house's, not the user's own."""
    return (getattr(method, "__module__", None) or "").split(".")[0] in _HOUSE


def whose(method: Callable[..., Any], place: str) -> str:
    """What a refusal of what ``method`` gave begins with: ``place``, and the name of a method of the user's own."""
    return place if is_ours(method) else f"{place} ({_name(method)})"


def _name(method: Callable[..., Any]) -> str:
    return str(getattr(method, "__name__", method))


def _line(method: Callable[..., Any], error: Exception) -> str:
    """``" (mine.py, line 3)"``: the last line of the method's own file on the way to ``error``."""
    code = getattr(method, "__code__", None)
    lines = [
        frame for frame in traceback.extract_tb(error.__traceback__) if code and frame.filename == code.co_filename
    ]
    return f" ({os.path.basename(lines[-1].filename)}, line {lines[-1].lineno})" if lines else ""
