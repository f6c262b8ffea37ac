"""All that is promised of speed on a CPU, in one command of at most eight minutes, on a machine that does nothing else:

    python benchmarks/engine.py --out runs/engine.json           # again: what has no figures yet, or failed, runs
    python benchmarks/engine.py --out runs/engine.json --tiny    # a minute; only shows that it works

    help         `lotus --help`, the median of five
    demo         a run of configs/digits.yaml as a user on a terminal sees it: seconds to the first word, and the longest silence
    first step   `deepspeed tools/train.py configs/digits.yaml` after that, when caches are warm: seconds to its first step
    second run   `lotus train` in a folder whose images stand: seconds to the first step; and of a run that is done, to its end
    32 px        benchmarks/train_step.py: the engine beside a bare loop, train.compile, evaluation beside training, loader stall
    224 px       the same of DeiT-Ti, fp32
    224 px bf16  the same in bf16

Each part is a process of its own with a limit. What is reached stands beside what is wanted; the rest is in OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from selection import atomic_files as files

ROOT = Path(__file__).resolve().parent.parent
WANTED: dict[str, tuple[str, float]] = {
    "help": ("at most", 0.5), "first word": ("at most", 2.0), "longest silence": ("at most", 2.0), "first step": ("at most", 15.0),
    "second run": ("at most", 5.0), "done before": ("at most", 5.0), "engine / bare": ("at least", 0.95), "stall": ("at most", 0.02),
    "evaluation / training": ("at least", 2.0),
}  # fmt: skip
SHORT = ["train.epochs=4", "baseline=false", "export.onnx=false"]
TINY = ["train.epochs=1", "model.args.depth=1", "model.args.embed_dim=32", "train.batch_size=256"]


def main() -> int:
    """Run what has no figures; 1 with ``--check`` where a goal is missed, and where a part failed."""
    options = _parse()
    out = Path(options.out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in _parts(Path(folder), options.tiny).items():
            if "figures" not in done.get(name, {}) and (not options.parts or name in options.parts):
                began = time.monotonic()
                try:
                    done[name] = {"figures": part()}
                except (subprocess.SubprocessError, TimeoutError, ValueError, LookupError) as fault:
                    done[name] = {"failed": f"{fault} {getattr(fault, 'stderr', '') or ''}"[-2000:]}
                done[name]["seconds"] = round(time.monotonic() - began, 1)
                files.write_json(out, done)
            _tell(name, done.get(name, {}))
    missed = [name for one in done.values() for name, value in one.get("figures", {}).items() if not _good(name, value)]
    return int(any("failed" in one for one in done.values()) or bool(options.check and missed))


def _parts(folder: Path, tiny: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    more = [*SHORT, *(TINY if tiny else [])]
    step = ["--compile", "--evaluate", *(["--tiny"] if tiny else ["--blocks", "9", "--steps", "5"])]
    large = ["--side", "224", "--patch", "16", "--width", "192", "--depth", "12", "--heads", "3", "--batch", "16", "--images", "64",
             "--blocks", "5", "--steps", "1", "--evaluate"]  # fmt: skip
    large = ["--tiny", "--evaluate"] if tiny else large
    return {
        "help": _help,
        "demo": lambda: _demo([*_lotus("run"), "configs/digits.yaml", f"folder={folder / 'demo'}", *more]),
        "first step": lambda: _first_step(folder, more),
        "second run": lambda: _second_run(folder, more),
        "32 px": lambda: _train_step(step, 200),
        "224 px": lambda: _train_step(large, 120),
        "224 px bf16": lambda: _train_step([*large, "--precision", "bf16"], 120),
    }


def _lotus(verb: str) -> list[str]:
    return [sys.executable, "-m", "lotus", verb]


def _help() -> dict[str, float]:
    def once() -> float:
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "lotus", "--help"],
            cwd=ROOT,
            env=_environment(),
            capture_output=True,
            check=True,
            timeout=30,
        )
        return time.monotonic() - began

    once()
    return {"help": statistics.median(once() for _ in range(5))}


def _demo(words: list[str]) -> dict[str, float]:
    """On a terminal of its own; what comes is looked at as it comes."""
    ours, theirs = pty.openpty()
    began = time.monotonic()
    process = subprocess.Popen(
        words, cwd=ROOT, env={**_environment(), "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    heard, first, silence, before = began, 0.0, 0.0, ""
    worst, tail = "", b""
    while True:
        if time.monotonic() - began > 150:
            process.kill()
            raise TimeoutError("the demo takes longer than 150 s")
        if select.select([ours], [], [], 0.5)[0]:
            try:
                said = os.read(ours, 65536)
            except OSError:  # it has ended
                break
            if not said:
                break
            now = time.monotonic()
            first = first or now - began
            if now - heard > silence:
                silence, worst = now - heard, before
            heard, tail = now, (tail + said)[-400:]
            before = tail.decode(errors="replace")
    os.close(ours)
    if process.wait():
        raise ValueError(f"the demo ends with {process.returncode}: {before}")
    return {"first word": first, "longest silence": silence, "before it": worst, "demo": time.monotonic() - began}  # type: ignore[dict-item]


def _first_step(folder: Path, more: list[str]) -> dict[str, float]:
    """By the launcher, once for the caches and once that counts."""
    found = 0.0
    for number in range(2):
        run = folder / f"launched-{number}"
        words = [
            str(Path(sys.executable).parent / "deepspeed"),
            "--num_gpus=1",
            "tools/train.py",
            "configs/digits.yaml",
        ]
        found = _until_step([*words, f"folder={run}", *more], run)
    return {"first step": found}


def _second_run(folder: Path, more: list[str]) -> dict[str, float]:
    run = folder / "again"
    words = [*_lotus("train"), "configs/digits.yaml", f"folder={run}", *more]
    subprocess.run(words, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True, timeout=120)
    began = time.monotonic()
    subprocess.run(words, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True, timeout=60)
    done = time.monotonic() - began
    return {"second run": _until_step([*words, "train.lr=1e-3"], run), "done before": done}


def _until_step(words: list[str], run: Path) -> float:
    """Seconds until a training's first step stands in its log."""
    log = run / "log.jsonl"
    before = log.stat().st_size if log.exists() else 0
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, cwd=ROOT, env=_environment(), stdout=said, stderr=subprocess.STDOUT)
        found = 0.0
        while process.poll() is None and time.monotonic() - began < 120:
            if not found and log.exists() and b'"event": "step", "stage": "train"' in log.read_bytes()[before:]:
                found = time.monotonic() - began
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
        said.seek(0)
        if process.wait() or not found:
            raise ValueError(f"exit code {process.returncode}: {said.read()[-1500:].decode(errors='replace')}")
    return found


def _train_step(words: list[str], limit: int) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/train_step.py", "--json", *words]
    told = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True, timeout=limit
    ).stdout
    found = json.loads(told.strip().splitlines()[-1])
    named = {"engine / bare": "ratio", "gates' share": "gates_share", "stall": "stall", "compiled / plain": "compiled",
             "evaluation / training": "evaluation"}  # fmt: skip
    figures = {name: found[key] for name, key in named.items() if key in found}
    return {**figures, "images_per_second": found["images_per_second"], "threads": found["threads"]}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}  # fmt: skip


def _good(name: str, value: Any) -> bool:
    if name not in WANTED:
        return True
    how, bound = WANTED[name]
    return bool(value <= bound if how == "at most" else value >= bound)


def _tell(name: str, one: dict[str, Any]) -> None:
    if "failed" in one:
        print(f"{name}: failed after {one['seconds']} s: {one['failed']}", flush=True)
    for figure, value in one.get("figures", {}).items():
        if isinstance(value, float):
            wanted = "wanted: {} {}".format(*WANTED[figure]) if figure in WANTED else ""
            missed = "" if _good(figure, value) else ", missed"
            print(f"{name:12} {figure:24}{value:8.3f}   {wanted}{missed}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, help="JSON of the figures; a second run goes on there")
    parser.add_argument("--parts", nargs="+", default=[], help="only these")
    parser.add_argument("--tiny", action="store_true", help="small settings; only shows that it works")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
