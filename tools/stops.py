"""Ask a run to stop, in every stage and from every side, and look at what is left: ``python tools/stops.py``

A run comes to a stage; then SIGTERM or SIGINT goes to its process, to the launcher above it, to DeepSpeed's runner above that, to the
whole group, or to one of two ranks. Each time every process of it has to be gone within ten seconds, without those for which its
threads waited for a core that others had; each rank has to end with 75 (before
the first stage, while it is being imported, also by the signal itself or with Python's own words), without a traceback; a training has to have written a checkpoint
since; and neither a process nor anything in /dev/shm may be left. A launcher's own exit code is the launcher's.

    python tools/stops.py                                           # all, half an hour of two cores; goes on where it was stopped
    python tools/stops.py --starts alone --stages train prune       # some

Each attempt is a line of OUT/stops.jsonl; the table on standard output is that of docs/reliability.md. Ends with 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where lotus need not be installed

from tools.soak import left_in_shared_memory, shared_memory

ROOT = Path(__file__).resolve().parent.parent
MARK = "LOTUS_STOPS"
"""In the environment of all that an attempt starts: where its ranks write down what becomes of them."""
SECONDS = 10.0
SMALL = [
    "configs/staged.yaml", "model.args.embed_dim=32", "model.args.depth=2", "model.args.num_heads=2", "score.epochs=2", "train.epochs=2",
    "finetune.epochs=1", "train.batch_size=64", "train.sparsity={}", "export.latency_batch=8", "device=cpu",
]  # fmt: skip


class Moment(NamedTuple):
    """When a stage is struck, and what makes it last until then."""

    event: str
    """Of log.jsonl; empty: as soon as every rank is a process."""
    stage: str
    words: tuple[str, ...] = ()
    trains: bool = False
    """There has to be a checkpoint of it."""


STAGES = {
    "start": Moment("", "prepare"),
    "prepare": Moment("began", "prepare", ("data.name=npz", "data.path=IMAGES")),
    "inspect": Moment("began", "inspect", ("stages=[inspect]",)),
    "score": Moment("step", "score", ("score.epochs=2000",), trains=True),
    "select": Moment("began", "select", ("select.keep=0.4",)),
    "baseline": Moment("step", "baseline", ("baseline={name: best, epochs: 2000}",), trains=True),
    "train": Moment("step", "train", ("baseline=false", "train.epochs=2000"), trains=True),
    "train, its cut": Moment(
        "evaluated", "train", ("baseline=false", "train.epochs=400", "train.shrink.at=0.0025", "finetune.epochs=0"), trains=True
    ),
    "prune": Moment("began", "prune", ("prune.calibration=800",)),
    "finetune": Moment("step", "finetune", ("finetune.epochs=2000",), trains=True),
    "export": Moment("began", "export", ("export.latency_batch=16",)),
    "report": Moment("began", "report", ("seed=0",)),
}  # fmt: skip
STARTS = {
    "alone": ("process",),
    "deepspeed, a rank": ("runner", "launcher", "group"),
    "deepspeed, two ranks": ("runner", "launcher", "group", "rank 1"),
    "torchrun, two ranks": ("launcher", "group", "rank 1"),
}
SIGNALS = {"TERM": signal.SIGTERM, "INT": signal.SIGINT}


def main() -> int:
    """Returns 0 where everything stopped as it is promised."""
    if MARK in os.environ:
        return _rank(Path(os.environ[MARK]))
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's job in the background leaves it deaf, and its children
    options = _parse()
    place = Path(options.out).resolve()
    place.mkdir(parents=True, exist_ok=True)
    book = place / "stops.jsonl"
    done = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    known = {(one["start"], one["stage"], one["target"], one["signal"]) for one in done}
    for start, stage, target, sent in _asked(options):
        if (start, stage, target, sent) in known:
            continue
        found = _attempt(place, start, stage, target, sent)
        told = {"start": start, "stage": stage, "target": target, "signal": sent, **found}
        done.append(told)
        with book.open("a") as lines:
            print(json.dumps(told), file=lines)
        print(
            f"{start}, {stage}, SIG{sent} to {target}: {found['seconds']:.1f} s {found['wrong'] or ''}",
            file=sys.stderr,
            flush=True,
        )
    print(*_table(done), sep="\n")
    return int(any(one["wrong"] for one in done))


def _asked(options: argparse.Namespace) -> Iterator[tuple[str, str, str, str]]:
    for start in options.starts:
        for stage in options.stages:
            for target in STARTS[start]:
                for sent in options.signals:
                    yield start, stage, target, sent


def _rank(told: Path) -> int:
    """A rank of the run: as ``tools/run.py``, and its exit code is written down."""
    from lotus.cli import main as lotus  # a runner that died before could not be missed by anybody
    from lotus.cli.stopping import asked_once

    asked_once()
    name = os.environ.get("RANK", "0")
    (told / f"{name}.begun").write_text(f"{os.getpid()} {os.getppid()}")
    (told / f"{name}.begun").rename(told / f"{name}.pid")
    leave = os._exit

    def ended(code: int) -> None:
        (told / f"{name}.ended").write_text(str(code))
        (told / f"{name}.ended").rename(told / f"{name}.code")

    def leaving(code: int) -> None:
        ended(code)
        leave(code)

    os._exit = leaving  # type: ignore[assignment]  # one that cannot wait for the others ends so
    code = lotus(["run", *sys.argv[1:]])
    ended(code)
    return code


def _attempt(place: Path, start: str, stage: str, target: str, sent: str) -> dict[str, Any]:
    """Start, strike, look; the seconds until all of it was gone, the exit codes, and what was wrong."""
    moment, run, told = STAGES[stage], place / "run", place / "told"
    _restore(place, run)
    shutil.rmtree(told, ignore_errors=True)
    told.mkdir()
    began_at = _size(run / "log.jsonl")
    if stage in ("start", "prepare"):
        shutil.rmtree(run)
        began_at = 0
    before, output = shared_memory(), place / "output.txt"
    words = [*SMALL, f"folder={run}", *moment.words]
    if stage == "prepare":
        words = [word.replace("IMAGES", str(_images(place))) for word in words]
    with output.open("w") as said:
        process = subprocess.Popen(
            [*_command(start), str(Path(__file__).resolve()), *words, "--plain", "--from", moment.stage], cwd=ROOT, stdout=said,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, MARK: str(told), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
                 "GLOO_SOCKET_IFNAME": "lo", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
    ranks = 2 if "two" in start else 1
    try:
        if not _reached(moment, run / "log.jsonl", began_at, told, ranks, process):
            return {"seconds": 0.0, "codes": {}, "wrong": f"it did not come to {stage}: {output.read_text()[-1500:]}"}
        struck, clock, queued = time.time(), time.monotonic(), _queued(_marked(told))
        _strike(process, told, target, SIGNALS[sent])
        waited = 0.0
        while (left := _marked(told)) and time.monotonic() - clock < 180:
            process.poll()
            waited = max(waited, *(now - queued.get(task, 0.0) for task, now in _queued(left).items()), 0.0)
            time.sleep(0.02)
        seconds = max(0.0, time.monotonic() - clock - waited)
        wrong = _faults(moment, stage, told, ranks, output, run, struck)
        wrong += [f"{len(left)} processes are left"] if left else []
        wrong += [f"longer than {SECONDS:g} s"] if seconds > SECONDS else []
    finally:
        for pid in _marked(told):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    wrong += [f"left in /dev/shm: {name}" for name in sorted(left_in_shared_memory(before, wait=1))]
    codes = {file.stem: int(file.read_text()) for file in sorted(told.glob("*.code"))}
    return {"seconds": seconds, "codes": codes, "outer": process.returncode, "wrong": "; ".join(wrong)}


def _faults(moment: Moment, stage: str, told: Path, ranks: int, output: Path, run: Path, struck: float) -> list[str]:
    """What is wrong with how it ended."""
    wrong, said = [], output.read_text()
    # The last two stages are short: where all is done before the launcher's end is noticed, that is as well.
    page = run / "report.html"
    done = stage in ("export", "report") and page.exists() and page.stat().st_mtime > struck
    for rank in range(ranks):
        code = told / f"{rank}.code"
        found = code.read_text() if code.exists() else "the signal's"
        rank_done = done or (stage == "report" and rank > 0)  # which the first alone writes
        if found != "75" and not (stage == "start" and found == "the signal's") and not (rank_done and found == "0"):
            wrong.append(f"rank {rank} ended with {found}")
    if stage != "start" and (ours := f'  File "{ROOT}') in said:  # a launcher that is interrupted shows where in itself
        wrong.append("a traceback: " + said[said.index(ours) :][:600])
    if moment.trains:
        stamps = [file.stat().st_mtime for file in (run / "checkpoints").rglob("manifest.json")]
        if max(stamps, default=0.0) < struck - 0.1:
            wrong.append("no checkpoint was written")
    return wrong


def _strike(process: subprocess.Popen[bytes], told: Path, target: str, number: int) -> None:
    first, above = map(int, (told / "0.pid").read_text().split())
    if target == "group":
        os.killpg(process.pid, number)
    elif target.startswith("rank"):
        os.kill(int((told / f"{target.split()[1]}.pid").read_text().split()[0]), number)
    else:
        os.kill({"process": first, "launcher": above, "runner": process.pid}[target], number)


def _reached(
    moment: Moment, log: Path, began_at: int, told: Path, ranks: int, process: subprocess.Popen[bytes]
) -> bool:
    """Wait until the log says so, at most ten minutes."""
    until = time.monotonic() + 600
    while time.monotonic() < until and process.poll() is None:
        if len(list(told.glob("*.pid"))) == ranks and (not moment.event or _logged(log, began_at, moment)):
            return True
        time.sleep(0.005)
    return False


def _logged(log: Path, began_at: int, moment: Moment) -> bool:
    if _size(log) <= began_at:
        return False
    with log.open("rb") as lines:
        lines.seek(began_at)
        events = [json.loads(line) for line in lines.read().splitlines() if line.endswith(b"}")]
    return any(one["event"] == moment.event and one.get("stage") == moment.stage for one in events)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _marked(told: Path) -> list[int]:
    """Processes of the attempt that live: those with its mark in their environment."""
    found, mark = [], f"{MARK}={told}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def _queued(pids: list[int]) -> dict[str, float]:
    """Seconds for which each thread has waited for a core, which on a machine that does nothing else it would have had."""
    found = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                found[task.parent.name] = int(task.read_text().split()[1]) / 1e9
            except (OSError, IndexError):
                continue
    return found


def _command(start: str) -> list[str]:
    if start == "alone":
        return [sys.executable]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks, folder = (2 if "two" in start else 1), Path(sys.executable).parent
    if start.startswith("deepspeed"):
        return [str(folder / "deepspeed"), f"--num_gpus={ranks}", f"--master_port={port}"]
    return [str(folder / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={port}"]


def _restore(place: Path, run: Path) -> None:
    """The finished run from which each attempt goes on."""
    base = place / "base"
    if not base.exists():
        shutil.rmtree(run, ignore_errors=True)
        words = [sys.executable, "-m", "lotus", "run", *SMALL, f"folder={run}", "--quiet"]
        subprocess.run(words, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        run.rename(base)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)


def _images(place: Path) -> Path:
    """Enough of them that writing takes seconds."""
    file = place / "images.npz"
    if not file.exists():
        pixels = np.random.default_rng(0).integers(0, 256, (60_000, 16, 16, 3), np.uint8)
        np.savez(file, x_train=pixels, y_train=np.arange(60_000) % 10, x_test=pixels[:600], y_test=np.arange(600) % 10)
    return file


def _table(done: list[dict[str, Any]]) -> Iterator[str]:
    """Of each stage and start the longest of all targets and signals, in seconds."""
    starts = [start for start in STARTS if any(one["start"] == start for one in done)]
    yield "| " + " | ".join(["stage", *starts]) + " |"
    yield "| " + " | ".join(["---"] * (1 + len(starts))) + " |"
    for stage in STAGES:
        cells = []
        for start in starts:
            mine = [one for one in done if (one["start"], one["stage"]) == (start, stage)]
            failed = sum(bool(one["wrong"]) for one in mine)
            cells.append(
                (f"{max(one['seconds'] for one in mine):.1f}" if mine else "")
                + (f", {failed} failed" if failed else "")
            )
        if any(cells):
            yield "| " + " | ".join([stage, *cells]) + " |"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "build" / "stops"), help="a folder of its own, which stays")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
