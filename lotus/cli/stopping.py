"""A wish to stop, Ctrl-C or SIGTERM, comes through whatever library is at work. Training has its own, gentler way."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_asked: list[int] = []
"""Signals that came to the command at work."""


class Interrupted(KeyboardInterrupt):
    """Python ends itself by SIGINT, whatever exit code it was told, once a plain KeyboardInterrupt has left an exec'd string."""


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that what is half-written is taken away."""

    def interrupt(number: int, frame: Any) -> None:
        _asked.append(number)
        raise Interrupted

    _asked.clear()
    try:
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever called us keeps the signals
        yield
        return
    try:
        yield
    except Exception as fault:
        if _asked:  # Python that a library's C or Rust has called may come out of it as an error of the library's
            raise Interrupted from fault
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_once() -> None:
    """From now on, for a whole process: who was asked to stop and has stopped is not asked again while it leaves. Launchers send SIGTERM
    after a Ctrl-C that all of a group had, and it would end by that instead of its own code."""

    def last(number: int, frame: Any) -> None:
        if _asked:
            return
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's job in the background
            signal.signal(number, last)


def heeded(events: Iterable[T]) -> Generator[T]:
    """``events``, until one was asked to stop: a library that was being imported may have swallowed it (``except: pass``).

    Raises:
        Interrupted: it was.
    """
    for event in events:
        yield event
        if _asked:
            raise Interrupted
