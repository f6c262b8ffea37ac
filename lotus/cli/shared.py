"""What verbs share: their flags, and files of the user's own."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO

from selection.errors import Refused
from selection.shown import shown

Action = Callable[[argparse.Namespace], int]
"""What a verb does; returns the exit code."""


class Verbs(Protocol):
    """Where verbs are added."""

    def __call__(self, name: str, does: str, action: Action) -> argparse.ArgumentParser: ...


def overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings to change, e.g. train.lr=3e-4"
    )


def with_files(parser: argparse.ArgumentParser, what: str = "whose functions join the shelves") -> None:
    parser.add_argument(
        "--with", dest="shelves", action="append", default=[], metavar="FILE.py", help=f"a file of your own {what}"
    )


def as_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def load_shelves(files: Sequence[str]) -> list[ModuleType]:
    """Modules of the user's own, named on the command line (never by a config, which may come from elsewhere)."""
    shelves = []
    for number, file in enumerate(files):
        spec = importlib.util.spec_from_file_location(f"lotus_shelf_{number}", file)
        if spec is None or spec.loader is None or not Path(file).is_file():
            raise Refused(f"--with {file}: no such Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            # Not by the loader: of two versions within a second, alike in size, it would run the bytecode of the first.
            exec(compile(Path(file).read_bytes(), file, "exec"), vars(module))
        except (Exception, SystemExit) as error:
            lines = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin
            ]
            at = f" (line {lines[-1]})" if lines else ""  # a SyntaxError says its line itself
            raise Refused(f"--with {file}: it cannot be imported: {type(error).__name__}: {error}{at}") from error
        shelves.append(module)
    return shelves


def pairs(flag: str, given: Sequence[str], form: str) -> Iterator[tuple[str, str]]:
    """(NAME, VALUE) of each ``NAME=VALUE`` that a flag was given; ``form`` says how it is written."""
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise Refused(f"{flag} {text}: write {form}.")
        yield name, value


def scalar(text: str) -> Any:
    from lotus import yaml_safe

    try:
        return yaml_safe.load(text, "value")
    except Refused:
        raise Refused(f"{text[:80]}: is no value in YAML. Write a number, a word, or a list like [1, 2].") from None


def tell(text: object, *, file: TextIO | None = None) -> None:
    """A message, whatever names are in it; one of :func:`print` would hand their escapes to the terminal."""
    print(shown(text, lines=True), file=file)
