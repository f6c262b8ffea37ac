"""What is seen while a run goes on.

Where there is a terminal, a bar shows the stage at work and each finished stage leaves one line. Elsewhere (a file, a
pipe, a batch system's log) come plain lines: when a stage begins, every ten seconds, after each evaluation, when it
ends. ``--quiet`` leaves warnings, ``--json`` makes a line of JSON of each event. Only rank 0 makes a listener.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table

from lotus.events import Began, Ended, Evaluated, Event, Pruned, Said, Skipped, Step, sound
from lotus.report import lines
from lotus.report.lines import Progress
from lotus.report.numbers import count, duration
from lotus.report.terminal import Text, can_write, standard_output
from selection.shown import shown

_PLAIN_EVERY = 10.0  # seconds between two plain lines of a stage
_DRAW_EVERY = 0.1  # seconds between two frames of the live display
_LONG = 30.0  # seconds of a run, after which it is worth telling when all of it ends


class Terminal:
    """Shows events as they come. A context manager, so that the cursor comes back whatever happens."""

    def __init__(
        self,
        console: Console | None = None,
        plain: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        ahead: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """
        Args:
            plain: lines only, or, with False, the live display; None asks the console whether it is a terminal
            clock: seconds, from any start
            ahead: MACs that each stage of the run is forecast to take; asked once, of a run that takes longer
        """
        self.console = console or standard_output()
        self.plain = (not self.console.is_terminal or self.console.is_dumb_terminal) if plain is None else plain
        self._clock = clock
        self._live: Live | None = None
        self._drawn = self._told = -math.inf
        self._stage = Progress("", clock())
        self._ahead, self._began = ahead, clock()
        self._costs: dict[str, float] = {}
        self._over: set[str] = set()  # stages that are done

    def __enter__(self) -> Terminal:
        if not self.plain:
            # Without rich's refreshing thread: loaders fork, and a fork may catch a thread holding a lock.
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None

    def show(self, event: Event) -> None:
        """Take note of one event. Kinds that say nothing to people (files written) pass in silence."""
        now = self._clock()
        if isinstance(event, Began | Step | Evaluated):
            self._follow(event, now)
        elif isinstance(event, Pruned):
            self._line(event.stage, lines.cut(event.before, event.after), mark="·")
        elif isinstance(event, Said):
            warning = event.level != "info"
            self._line(event.stage, event.text, mark="!" if warning else "·", style="yellow" if warning else "")
        elif isinstance(event, Skipped):
            self._over.add(event.stage)
            self._line(event.stage, event.why, mark="-", style="dim")
        elif isinstance(event, Ended):
            self._over.add(event.stage)
            self._stage = Progress("", now)
            told = lines.reached(event.values)
            self._line(event.stage, f"{duration(event.seconds)}{f'  {told}' if told else ''}", mark="✓", style="green")
        self._draw(now, at_once=isinstance(event, (Began, Ended)))

    def _follow(self, event: Began | Step | Evaluated, now: float) -> None:
        """How far the stage at work is: the live display shows it, plain lines tell of it now and then."""
        if isinstance(event, Began):
            self._stage = Progress(event.stage, now, event.why)
            told = f"begins ({event.why})"
        elif isinstance(event, Step):
            self._stage.step(event, now)
            self._look_ahead(now)
            if now - self._told < _PLAIN_EVERY:
                return
            told = self._stage.sentence(now)
        else:
            # The loss that is shown while training is the training loss.
            self._stage.values |= {name: value for name, value in event.values.items() if name != "loss"}
            told = f"epoch {event.epoch}: {lines.measured(event.values)}"
        if self.plain:
            self._told = now
            self._line(event.stage, told)

    def _look_ahead(self, now: float) -> None:
        """What is to come after this stage, in its own time."""
        if self._ahead is not None and now - self._began >= _LONG:
            self._costs, self._ahead = dict(self._ahead()), None
        own = self._costs.get(self._stage.name, 0.0)
        rest = sum(cost for name, cost in self._costs.items() if name not in self._over and name != self._stage.name)
        self._stage.rest = rest / own if own else 0.0

    def _line(self, stage: str, text: str, *, mark: str = " ", style: str = "") -> None:
        mark = mark if can_write(self.console, mark) else "*"
        if self.plain:
            # One event, one line, however narrow the log: it is read by grep too.
            self.console.print(Text(f"{mark} {stage:<9} {' '.join(text.split())}"), soft_wrap=True)
        else:
            line = Table.grid(padding=(0, 1))
            line.add_row(
                Text(mark, style),
                Text(f"{stage:<9}", "bold" if style != "dim" else "dim"),
                Text(text, style if style != "green" else ""),
            )
            self.console.print(line)

    def _draw(self, now: float, *, at_once: bool) -> None:
        if self._live is None or (now - self._drawn < _DRAW_EVERY and not at_once):
            return
        self._drawn = now
        self._live.update(_picture(self._stage, now), refresh=True)


def _picture(stage: Progress, now: float) -> Group | str:
    if not stage.name:
        return ""
    line = Table.grid(padding=(0, 1))
    line.add_column(width=1)
    line.add_column(width=9, no_wrap=True)
    line.add_column(width=24)
    line.add_column(no_wrap=True)
    bar = ProgressBar(
        total=stage.total or None, completed=stage.done, width=24, pulse=not stage.total, animation_time=now
    )
    done = f"{count(stage.done)}/{count(stage.total)}" if stage.total else duration(now - stage.began)
    line.add_row("", Text(stage.name, "bold cyan"), bar, Text(done))
    facts = Text("  ".join(stage.facts(now)), "dim")
    return Group(line, Padding(facts, (0, 0, 0, 12))) if facts.plain else Group(line)


class Quiet:
    """Warnings alone, on standard error."""

    def show(self, event: Event) -> None:
        if isinstance(event, Said) and event.level != "info":
            print(f"! {event.stage}: {shown(event.text)}", file=sys.stderr, flush=True)


class JsonLines:
    """Each event as a line of JSON on standard output, as in log.jsonl."""

    def show(self, event: Event) -> None:
        told = {"time": round(time.time(), 3), **event.record()}
        print(json.dumps(sound(told), allow_nan=False), flush=True)
