"""The command line. ``lotus VERB`` and ``tools/VERB.py`` are the same code; heavy packages are imported when needed.

Exit codes: 0 done, 2 for what the user can mend, 3 where some pictures were passed over, 75 stopped on request (the same command goes on), 1 for a fault of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from typing import Any, NoReturn

from lotus.cli import compare, config, export, inspect, look, planning, predict, prune, run, select, ticket
from lotus.cli.shared import Action, tell
from lotus.cli.stopping import asked_once, terminated_like_interrupted
from lotus.watch import STOPPED, Lost, over_launcher, placed, speaks
from selection.atomic_files import disk_faults_refused
from selection.errors import Notice, Refused
from selection.methods import nearest


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    """:func:`main` as a whole process."""
    asked_once()
    code = main(arguments)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        from lotus.training import distributed

        distributed.leave(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    _let_threads_sleep()
    over_launcher()
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words[:1]) if words[:1] and words[0] in ("-h", "--help", "--version") else None
    if options is None:
        options = _parse(parser, words)
    try:
        with terminated_like_interrupted(), notices_as_they_are(), _FirstWord(), disk_faults_refused():
            placed()
            return options.verb(options)
    except Refused as refusal:
        return _told(refusal, 2)
    except Lost as lost:
        lost.leave()
    except KeyboardInterrupt as stop:
        return _told(str(stop) or "stopped. The same command goes on from here.", STOPPED)
    except BrokenPipeError:  # `lotus ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - python flushes it at exit
        return 0


class _FirstWord(MetaPathFinder):
    """Says on a terminal what is being imported that takes seconds: else nothing would be heard meanwhile. Finds nothing."""

    def __init__(self) -> None:
        self._slow = [name for name in ("torch", "timm", "sklearn") if name not in sys.modules]

    def __enter__(self) -> None:
        if sys.stderr.isatty() and speaks() and self._slow:
            sys.meta_path.insert(0, self)

    def __exit__(self, *fault: object) -> None:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in self._slow:
            self._slow.remove(name)
            tell(f"lotus: importing {name}", file=sys.stderr)
        if not self._slow:
            self.__exit__()


def _let_threads_sleep() -> None:
    """Threads that wait for each other, torch's and numba's, give their core away instead of spinning: beside other work, a second
    training or a browser, spinning makes a small model's training a hundred times slower. GNU's, which torch brings, look a thousand
    times first: to be woken at each operation costs a small model a sixth. Read when torch is imported. Whoever has said how they
    are to wait, keeps it: OMP_WAIT_POLICY=ACTIVE on a machine that does nothing else."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def _told(why: object, code: int) -> int:
    """Say why on rank 0, or where nobody can tell who that is; the others would only repeat it."""
    if speaks():
        tell(why if code == 0 else f"lotus: {why}", file=sys.stderr)
    return code


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """``key=value`` may stand anywhere among the flags, which argparse alone does not allow inside sub-commands."""
    options, rest = parser.parse_known_args(words)
    strange = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if strange:
        parser.error(
            f"{strange[0]}: no such option. {_as_setting(words, strange[0]) or f'See: lotus {words[0]} --help'}"
        )
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _as_setting(words: list[str], flag: str) -> str:
    """What to say instead of a flag of a stage that is a setting of its section, like the old ``lotus prune --round 16``; or nothing."""
    from lotus.config.reader import OLD

    name, equals, value = flag.partition("=")
    place = f"{words[0]}.{name.lstrip('-').replace('-', '_')}"
    place = OLD.get(place, place)
    if all(one.place != place for one in config.settings()):
        return ""
    after = words[words.index(flag) + 1 :][:1]
    value = value if equals else after[0] if after and not after[0].startswith("-") else "VALUE"
    return f"It is a setting: {place}={value}."


class _Parser(argparse.ArgumentParser):
    """argparse, which names the nearest of its choices."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        super().error(message + (nearest(found[1], re.findall(r"[\w-]+", found[2])) if found else ""))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lotus", description="Train Vision Transformers on less data and ship them with fewer dimensions."
    )
    parser.add_argument("--version", action="version", version=f"lotus {__import__('lotus').__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, does: str, action: Action) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        added.set_defaults(verb=action)
        return added

    for group in (run, export, planning, prune, predict, select, ticket, inspect, look, compare, config):
        group.add(verb)
    run.add_stages(verb, taken=tuple(verbs.choices))
    return parser


@contextlib.contextmanager
def notices_as_they_are() -> Iterator[None]:
    """A notice is one line of rank 0, said once, without the place in our code that Python would put before it; warnings of libraries
    are not for our users."""
    before, said = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            if str(message) not in said:  # the model is made anew by each stage that starts from it
                _told(f"! {message}", 0)
            said.add(str(message))
        elif sys.warnoptions:  # -W or PYTHONWARNINGS: somebody wants to see what libraries say to their developers
            before(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
