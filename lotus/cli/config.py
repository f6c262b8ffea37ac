"""``lotus config``: every setting with its sentence and its default, as a JSON schema, or as a config sets them."""

from __future__ import annotations

import argparse
import json
import textwrap
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

from lotus.cli.shared import Verbs, overrides
from selection.errors import Refused
from selection.methods import nearest

WIDE = 100


class Setting(NamedTuple):
    """A setting or a section of the page."""

    place: str
    default: Any
    sentence: str
    annotation: Any
    is_section: bool


def add(verb: Verbs) -> None:
    page = verb(
        "config", "say what may be set, every setting with its sentence and its default, or what a config sets", _config
    )
    page.add_argument("name", nargs="?", default="", help="one setting or section, e.g. prune.keep; all without it; or a config or a "
                      "run's folder: all of its settings, as a run resolves them")  # fmt: skip
    overrides(page)
    page.add_argument("--schema", action="store_true", help="as a JSON schema")


def settings() -> Iterator[Setting]:
    """All of the page, in its order; a section stands before what is in it."""
    from lotus.config import Config

    yield from _below("", Config, Config())


def _below(place: str, section: Any, values: Any) -> Iterator[Setting]:
    """What is in ``section``; of one that is off by default (``values`` is None), with the defaults that it has when it is on."""
    for name, field in section.model_fields.items():
        below = _section(field.annotation)
        required = None if field.is_required() else field.get_default(call_default_factory=True)
        default = getattr(values, name) if values is not None else required
        shown = _as_written(section, name, default)
        yield Setting(f"{place}{name}", shown, field.description or "", field.annotation, below is not None)
        if below is not None:
            yield from _below(f"{place}{name}.", below, default)


def _as_written(section: Any, name: str, default: Any) -> Any:
    """A default as a config file says it: a teacher that is nobody is the word none."""
    from lotus.config import Section

    if default is None and isinstance(section, type) and issubclass(section, Section):
        return section.model_construct(**{name: None}).model_dump(mode="json", include={name}, warnings=False).get(name)
    return default


def _section(annotation: Any) -> Any:
    """The section in an annotation like ``Section | None``; None where there is none, and for methods, which take any options."""
    from lotus.config import Method, Section

    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) and not issubclass(annotation, Method) else None
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:  # a list of sections is one value
        return None
    if typing.get_origin(annotation) is Annotated:
        inside = inside[:1]
    return next((found for part in inside if (found := _section(part)) is not None), None)


def _config(options: argparse.Namespace) -> int:
    every = {one.place: one for one in settings()}
    given = Path(options.name)
    if options.name and options.name not in every and (given.suffix in (".yaml", ".yml") or given.is_dir()):
        return _resolved(options)
    if options.overrides:
        cure = f"lotus config CONFIG {options.overrides[0]}"
        raise Refused(f"{options.overrides[0]}: changes a setting of a config. Say which: {cure}")
    name = options.name.strip(".")
    if name and name not in every:
        _refuse(name, every)
    if options.schema:
        from pydantic import TypeAdapter

        from lotus.config import Config

        print(json.dumps(TypeAdapter(every[name].annotation if name else Config).json_schema(), indent=1))
        return 0
    for one in every.values():
        if not name or one.place == name or one.place.startswith(f"{name}."):
            print(_told(one))
    return 0


def _resolved(options: argparse.Namespace) -> int:
    """All settings of a config, or of a run, as YAML."""
    from lotus.config import read

    if options.schema:
        raise Refused(
            f"{options.name}: is a config, and a schema is of all configs. Leave it out: lotus config --schema"
        )
    print(read(options.name, options.overrides).yaml(), end="")
    return 0


def _refuse(name: str, every: Iterable[str]) -> NoReturn:
    from lotus.config.reader import OLD, suggested

    if name in OLD:
        raise Refused(f"{name}: is called {OLD[name]} now. See: lotus config {OLD[name].partition('=')[0]}")
    raise Refused(f"{name}: no such setting.{suggested(name, ()) or nearest(name, every) or ' See: lotus config'}")


def _told(one: Setting) -> str:
    default = "" if one.is_section and one.default is not None else f" = {_value(one.default)}"
    sentence = " ".join(one.sentence.split())
    return "\n".join(
        [f"{one.place}{default}", *textwrap.wrap(sentence, WIDE, initial_indent="    ", subsequent_indent="    ")]
    )


def _value(default: Any) -> str:
    from lotus.config import Method

    if isinstance(default, Method) and not default.options:
        return default.name
    return json.dumps(default.model_dump(mode="json") if hasattr(default, "model_dump") else default)
