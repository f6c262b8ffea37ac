"""Who of several ranks is still there.

A collective does not tell: beside a rank that was killed it fails in words of its own, or waits where nobody listens any more;
beside one that is stopped it waits for hours. So each rank writes a sign of life into the run's folder, and looks at those of the
others. Files, since whoever keeps a store for all may be the one that is gone. Needs neither torch nor a network.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

from selection import atomic_files, regular
from selection.errors import Refused
from selection.shown import shown

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What a launcher leaves in the environment, of one process."""
STOPPED = 75  # sysexits' EX_TEMPFAIL: try again
_GOES_ON = "The same command goes on from the last checkpoint."
PATIENT = 5.0  # seconds for which a collective that failed looks for who is missing


class Lost(Exception):
    """Another rank is gone, or does not answer. The message names it and the way on."""

    def __init__(self, message: str, *, speaks: bool) -> None:
        """
        Args:
            speaks: whether this rank is the one that tells it; of several the first does
        """
        super().__init__(message)
        self.speaks = speaks

    def leave(self) -> NoReturn:
        """Tell it and end this process, in which nothing that waits for the others would end by itself."""
        if self.speaks:
            hidden = "\x1b[?25h" if sys.stderr.isatty() else ""  # a live page hides the cursor
            print(f"{hidden}lotus: {shown(str(self), lines=True)}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(STOPPED)


def placed() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this machine, as a launcher left them in the environment; 0 of 1 without one.

    Raises:
        Refused: they are no numbers, or no rank of so many.
    """
    told = {name: os.environ.get(name, usual) for name, usual in ALONE.items()}
    for name, value in told.items():
        if not _is_count(value):
            raise Refused(f"{name}={value!r} in the environment is no number. Unset it for one process.")
    rank, size, local = map(int, told.values())
    if rank >= size:
        raise Refused(
            f"RANK={rank} and WORLD_SIZE={size} in the environment: there is no such rank, they count from 0. Unset both for one "
            "process; torchrun and deepspeed set them."
        )
    return rank, size, local


def speaks() -> bool:
    """Whether this process is the one that tells: rank 0, and any that :func:`placed` refuses."""
    rank, size = (os.environ.get(name, ALONE[name]) for name in ("RANK", "WORLD_SIZE"))
    return not (_is_count(rank) and _is_count(size) and 0 < int(rank) < int(size))


def _is_count(value: str) -> bool:
    return value.isascii() and value.isdecimal()


def clear(folder: Path) -> None:
    """Remove the signs of life of an earlier run; one rank does, before any :class:`Watch` of the new one."""
    shutil.rmtree(folder, ignore_errors=True)


class Flag(Protocol):
    """Who knows of a wish to stop: :class:`lotus.training.distributed.StopFlag`, the class."""

    def now(self) -> Any:
        """What has a ``reason``, empty where nobody has asked; None where nobody could be."""

    def ask(self, reason: str) -> bool:
        """Ask whoever is at work to stop."""


class Watch:
    """Watches over the other ranks for as long as it is entered.

    One that is no more on this machine is missed at once, any other one after ``patience``. Whoever waits then in a collective
    cannot be woken: so a failure of the body becomes :class:`Lost`, and where the body does not fail the process is ended. A wish to
    stop goes to the others with the sign of life, since one of them may be at work that the rest wait for.
    """

    def __init__(
        self, folder: Path, rank: int, size: int, *, patience: float, every: float = 1.0, grace: float = 3.0,
        flag: Flag | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            folder: seen by every rank, or at least by those of this machine; made where it is missing
            patience: seconds for which a rank may give no sign of life
            every: seconds between two looks, where there are few ranks
            grace: seconds for the body to fail by itself
            flag: knows of this rank's wish to stop, and is told of another's; None: nobody is
        """
        self._flag = flag
        self._folder, self._rank, self._size, self._patience, self._grace = folder, rank, size, patience, grace
        self._every = min(max(every, size / 16), patience / 4)
        self._here = {"pid": os.getpid(), "born": born(os.getpid()), "system": _system(), "host": platform.node()}
        self._beat = 0
        self._silent: dict[int, float] = {}  # seconds since a sign of life, while this process itself was running
        self._last: dict[int, dict[str, Any]] = {}
        self._done = threading.Event()
        self._looks = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="lotus-watch-over-ranks", daemon=True)

    def __enter__(self) -> Watch:
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._done.set()
        self._thread.join()
        told = isinstance(error, (Refused, KeyboardInterrupt)) and str(error)
        why = "" if kind in (None, GeneratorExit) else told or repr(error)
        if isinstance(error, Exception) and not isinstance(error, Refused):
            waited = 0.0
            while not (lost := self.lost()) and waited < PATIENT:
                threading.Event().wait(0.1)
                waited += 0.1
            if lost:
                raise lost from None
        elif isinstance(error, KeyboardInterrupt) and not told and (lost := self.lost()):
            raise lost from None
        self._tell(left=True, why=why)

    def lost(self) -> Lost | None:
        """Who is missing now; None where nobody is."""
        with self._looks:
            said = {
                other: text for other in range(self._size) if other != self._rank and (text := self._missing(other))
            }
        if not said:
            return None
        here = [rank for rank in range(self._size) if rank not in said and not self._last.get(rank, {}).get("left")]
        return Lost(" ".join([*list(said.values())[:2], _GOES_ON]), speaks=here[0] == self._rank)

    def _run(self) -> None:
        while not self._done.wait(self._every):
            self._tell()
            for other in self._silent:
                self._silent[other] += self._every  # not by the clock: all of them may have been stopped together
            if (lost := self.lost()) and not self._done.wait(self._grace):
                lost.leave()

    def _sign(self, other: int) -> dict[str, Any] | None:
        """The newest sign of life of rank ``other``, or the one before where it cannot be read; None: none was ever seen."""
        before = self._last.get(other)
        try:
            now = json.loads(regular.text(self._folder / str(other)))
            known = isinstance(now, dict) and isinstance(now["pid"], int)
        except (OSError, ValueError, KeyError):
            known = False
        if not known:
            return before
        if before is None or now["beat"] != before["beat"]:
            self._silent[other] = 0.0
        self._last[other] = now
        return dict(now)

    def _missing(self, other: int) -> str:
        """What is to be said of rank ``other``; empty where it is there, has done its part, or was never seen."""
        now = self._sign(other)
        if now is None:
            return ""
        if self._flag is not None and now.get("asked") and not now["left"]:
            self._flag.ask(now["asked"])
        name = f"rank {other} (process {now['pid']} on {now['host']})"
        if now["left"]:
            return f"{name} has stopped: {now['why']}".rstrip() if now["why"] else ""
        if now["system"] and now["system"] == self._here["system"] and born(now["pid"]) != now["born"]:
            return f"{name} is gone."
        if self._silent[other] > self._patience:
            seconds = self._patience
            patience = f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
            return (
                f"{name} has not answered for {patience}: it is stopped, or its machine is gone. End it, or give it "
                "longer with rank_timeout=MINUTES."
            )
        return ""

    def _tell(self, *, left: bool = False, why: str = "") -> None:
        self._beat += 1
        wish = None if self._flag is None else self._flag.now()
        asked = wish.reason if wish else ""
        sign = {**self._here, "beat": self._beat, "left": left, "why": why[:500], "asked": asked}
        with contextlib.suppress(Refused, OSError):  # a full disk: the others have their patience, and the work goes on
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic_files.write_json(self._folder / str(self._rank), sign)


@contextlib.contextmanager
def over(folder: Path, rank: int, size: int, patience: float, flag: Flag | None = None) -> Iterator[None]:
    """A :class:`Watch`, or nothing where there is one rank alone."""
    if size == 1:
        yield
        return
    with Watch(folder, rank, size, patience=patience, flag=flag):
        yield


_watched, _launcher_is_gone = threading.Event(), threading.Event()


def launcher_is_gone() -> bool:
    """Whether the SIGTERM that came was that of :func:`over_launcher`."""
    return _launcher_is_gone.is_set()


def over_launcher(every: float = 0.25) -> None:
    """Watch, from now on and once a process, over the launcher above it, and send this process SIGTERM when that is gone.

    DeepSpeed's runner does not pass SIGTERM on, and leaves its workers behind when it dies (DeepSpeed#4098). To be called as early
    as can be: of a launcher that is gone before, nothing is seen. Without one nothing is done.

    Args:
        every: seconds between two looks
    """
    above = _launchers()
    if above and not _watched.is_set():
        _watched.set()
        threading.Thread(target=_look, args=(above, every), name="lotus-launcher-watch", daemon=True).start()


def _look(above: list[tuple[int, str]], every: float) -> None:
    while os.getppid() == above[0][0] and all(born(pid) == when for pid, when in above):
        time.sleep(every)
    _launcher_is_gone.set()
    os.kill(os.getpid(), signal.SIGTERM)


def _launchers() -> list[tuple[int, str]]:
    """(pid, when it was born) of the launcher above this process and of DeepSpeed's runner above that; empty without one."""
    environment = os.environ
    # CROSS_SIZE is how deepspeed.launcher.launch is known, TORCHELASTIC_RUN_ID torchrun.
    if not {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"} & set(environment) or not Path("/proc/self/stat").exists():
        return []
    parent = os.getppid()
    above = [parent]
    if "CROSS_SIZE" in environment:
        try:
            runner = int(stat(parent)[1])
            if b"deepspeed" in Path(f"/proc/{runner}/cmdline").read_bytes():  # else a shell, which may well go
                above.append(runner)
        except (OSError, IndexError, ValueError):
            pass
    return [(pid, born(pid)) for pid in above]


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may hold spaces: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def born(pid: int) -> str:
    """When process ``pid`` began; empty where it is no more. A number that is given out again was born later."""
    try:
        fields = stat(pid)
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _system() -> str:
    """Of those who see the same processes; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
