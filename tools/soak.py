"""Strike runs at random moments, start them again, and hold what they end with to a run that nobody disturbed.

    make soak KILLS=100        # or: python tools/soak.py --kills 100 --seed 3

Each run is a whole one on the digits, with its cut within the training. It is struck after a random time, or at a random one of all
moments at which the undisturbed run opens a file to write, renames or removes one: in prepare, training, checkpoint writes, the cut,
export, report. Most blows are SIGKILL, and ``--kills`` counts those; in between it is asked to stop (SIGTERM, SIGINT: it ends with
75 within ten seconds), or from that moment on the disk is full or may not be written to (it ends with 2, without a traceback). The
same command follows, until the run is done; then another begins. Every one must end with the weights, the plan and the figures of
the undisturbed run, bit for bit, and leave nothing behind.

This process imports LOTUS once and runs nothing; each attempt is a fork of it, which saves the seconds that imports take.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import importlib
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ["configs/digits.yaml", "model.args.depth=2", "model.args.embed_dim=32", "train.epochs=4", "train.batch_size=256", "train.shrink.at=0.4",
            "prune.calibration=64", "baseline=false", "train.evaluate_every=2", "train.save_minutes=0.01",
            "export.latency_batch=2", "export.onnx=false"]  # fmt: skip
OF_THE_CLOCK = ("seconds", "latency", "images_per_second", "ledger", "device")
"""Parts of names in results.json that differ from run to run by nature."""


class Blow(NamedTuple):
    """What strikes a run, and when: after some seconds, or at the so-many-th time that it is about to change a file."""

    signal: int = 0
    error: int = 0
    """Of every further change of a file."""
    seconds: float = float("inf")
    writes: int = 0

    @property
    def codes(self) -> tuple[int, ...]:
        """Exit codes that are right, beside 0 where it came too late."""
        if not self.error:
            return {0: (), signal.SIGKILL: (-signal.SIGKILL,)}.get(self.signal, (_STOPPED,))
        return _REFUSED, _STOPPED


_STOPPED, _REFUSED, _SLOW = 75, 2, 99
_PATIENCE = 10.0
"""Seconds, of this process alone, so that a busy machine is not blamed on it."""
FULL, LOCKED = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES)


def drawn(chance: random.Random, lasts: float, writes: int) -> Blow:
    """A blow: three of four are kills."""
    at = chance.randint(1, writes)
    if chance.random() < 0.75:
        return Blow(signal.SIGKILL, seconds=chance.uniform(0, lasts)) if at % 2 else Blow(signal.SIGKILL, writes=at)
    if at % 2:
        return Blow(chance.choice((signal.SIGTERM, signal.SIGINT)), writes=at)
    return Blow(error=chance.choice(FULL + LOCKED), writes=at)


def main() -> int:
    """Returns 0 where every run ended as the undisturbed one."""
    options = _parse()
    chance = random.Random(options.seed)
    place = Path(options.out) if options.out else ROOT / "build" / "soak"
    if not options.out:
        shutil.rmtree(place, ignore_errors=True)
    elif place.is_dir() and any(place.iterdir()):
        raise SystemExit(f"--out {place}: something lies there. Name an empty or a new folder.")
    before = shared_memory()
    _warm()
    began = time.monotonic()
    whole = place / "undisturbed"
    if (code := _run(whole, Blow())) != 0:
        raise SystemExit(f"The undisturbed run ends with exit code {code}: {whole.with_suffix('.log')}")
    lasts, wanted = time.monotonic() - began, what_it_left(whole)
    writes = int(whole.with_suffix(".writes").read_text())

    kills = blows = runs = 0
    while kills < options.kills:
        folder, runs = place / f"struck-{runs}", runs + 1
        while (blow := drawn(chance, lasts, writes) if kills < options.kills else Blow()) and _ends_by(folder, blow):
            blows, kills = blows + 1, kills + (blow.signal == signal.SIGKILL)
        if (found := what_it_left(folder)) != wanted:
            other = [name for name in wanted if found.get(name) != wanted[name]]
            raise SystemExit(f"After {blows} blows another run: {', '.join(other) or 'more files'} in {folder}")
        print(f"{kills}/{options.kills} kills, {blows} blows, {runs} runs done, all alike", flush=True)
        shutil.rmtree(folder)
    if left := left_in_shared_memory(before):
        raise SystemExit(f"Left in /dev/shm: {', '.join(sorted(left))}")
    print(
        f"{kills} kills among {blows} blows, {runs} runs: weights, plans and figures as without, bit for bit ({time.monotonic() - began:.0f} s)"
    )
    if not options.out:
        shutil.rmtree(place)
    return 0


def left_in_shared_memory(before: set[str], wait: float = 5) -> set[str]:
    """What has come into /dev/shm since ``before`` and stays, but for what another living process holds.

    Others that run meanwhile have segments and semaphores of their own there. One that was made a moment ago is mapped
    a moment later, hence the second look.
    """
    ends = time.monotonic() + wait
    while (left := _unheld(shared_memory() - before)) and time.monotonic() < ends:
        time.sleep(0.1)
    return left


def shared_memory() -> set[str]:
    """The names in /dev/shm."""
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


def _unheld(names: set[str]) -> set[str]:
    """Those of ``names`` whose inode no other process has mapped: a semaphore is mapped before it has its name."""
    held = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if names else ():
        if maps.parent.name != str(os.getpid()):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                held |= {line.split()[4] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    left = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if str(Path("/dev/shm", name).stat().st_ino) not in held:
                left.add(name)
    return left


def _ends_by(folder: Path, blow: Blow) -> bool:
    """Give the command once more; whether the blow ended it before it was done."""
    if (code := _run(folder, blow)) == 0:
        return False
    log = folder.with_suffix(".log")
    if code not in blow.codes or "Traceback" in log.read_text():
        raise SystemExit(f"Exit code {code} after {blow}: {log}")
    return True


def _warm() -> None:
    """Import all that a run imports."""
    os.chdir(ROOT)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import lotus

    for module in pkgutil.walk_packages(lotus.__path__, "lotus."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("deepspeed")


def _run(folder: Path, blow: Blow) -> int:
    """The exit code of the run in ``folder``, below zero the signal that ended it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        _attempt(folder, blow)
    ends = time.monotonic() + blow.seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= ends:
            ends = float("inf")
            os.kill(child, blow.signal)
        time.sleep(0.002)


def _attempt(folder: Path, blow: Blow) -> NoReturn:
    """In the fork: the run, from beginning to end."""
    os.setsid()
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    struck, count = _struck(folder, blow)
    from lotus.cli import main as lotus

    code = lotus(["run", *SETTINGS, f"folder={folder}"])
    if blow.signal and struck() and time.process_time() - struck() > _PATIENCE:
        code = _SLOW
    if blow == Blow():
        folder.with_suffix(".writes").write_text(str(count()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _struck(folder: Path, blow: Blow) -> tuple[Callable[[], float], Callable[[], int]]:
    """Strikes this process when its time has come; when that was, and how often it was about to change a file in ``folder``."""
    seen, when = 0, 0.0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, when
        takes = event in ("os.remove", "os.rmdir")  # which a full disk allows
        gives = event in ("os.rename", "os.mkdir", "os.truncate")
        gives |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not (takes or gives) or not str(arguments[0]).startswith(f"{folder}{os.sep}"):
            return
        seen += 1
        if not blow.writes or seen < blow.writes:
            return
        if blow.error and (gives or blow.error in LOCKED):
            raise OSError(blow.error, os.strerror(blow.error), str(arguments[0]))
        if blow.signal and seen == blow.writes:
            when = time.process_time()
            os.kill(os.getpid(), blow.signal)

    sys.addaudithook(look)
    return lambda: when, lambda: seen


def what_it_left(folder: Path) -> dict[str, Any]:
    """Weights, tickets and figures of a finished run by name, without what the clock says; files that are only half there too."""
    found: dict[str, Any] = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix in (".safetensors", ".npz", ".beton") and "checkpoints" not in file.parts
    }
    found |= {str(file.relative_to(folder)): "half-written" for file in folder.rglob("*.part")}
    return found | {"results.json": _steady(json.loads((folder / "results.json").read_text()))}


def _steady(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _steady(value) for name, value in told.items() if not any(part in name for part in OF_THE_CLOCK)}
    return [_steady(value) for value in told] if isinstance(told, list) else told


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--out", default="", help="folder of the runs, empty or new, which stays; else build/soak, which goes"
    )
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
