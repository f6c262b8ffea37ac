"""Kill runs at random moments, start them again, and hold what they end with to a run that nobody disturbed.

    make soak KILLS=100        # or: python tools/soak.py --kills 100 --seed 3

Each run is a whole one on the digits, with its cut within the training. SIGKILL strikes its whole process group after a random time:
in imports, prepare, training, checkpoint writes, the cut, export, report. The same command follows, until the run is done; then
another begins. Every one must end with the weights, the plan and the figures of the undisturbed run, bit for bit, and leave nothing behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ["configs/digits.yaml", "model.args.depth=2", "train.epochs=6", "train.batch_size=128", "train.shrink.at=0.4",
            "prune.calibration=64", "baseline=false", "train.evaluate_every=2", "export.latency_batch=2"]  # fmt: skip
OF_THE_CLOCK = ("seconds", "latency", "images_per_second", "ledger", "device")
"""Parts of names in results.json that differ from run to run by nature."""


def main() -> int:
    """Returns 0 where every run ended as the undisturbed one."""
    options = _parse()
    chance = random.Random(options.seed)
    place = Path(options.out) if options.out else ROOT / "build" / "soak"
    if not options.out:
        shutil.rmtree(place, ignore_errors=True)
    elif place.is_dir() and any(place.iterdir()):
        raise SystemExit(f"--out {place}: something lies there. Name an empty or a new folder.")
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    began = time.monotonic()
    whole = place / "undisturbed"
    if (code := _run(whole, None)) != 0:
        raise SystemExit(f"The undisturbed run ends with exit code {code}: {whole.with_suffix('.log')}")
    lasts, wanted = time.monotonic() - began, what_it_left(whole)
    kills = runs = 0
    while kills < options.kills:
        folder, runs = place / f"killed-{runs}", runs + 1
        while (code := _run(folder, chance.uniform(0, lasts) if kills < options.kills else None)) != 0:
            if code != -signal.SIGKILL:
                raise SystemExit(f"After {kills} kills exit code {code}: {folder.with_suffix('.log')}")
            kills += 1
        if (found := what_it_left(folder)) != wanted:
            other = [name for name in wanted if found.get(name) != wanted[name]]
            raise SystemExit(f"After {kills} kills another run: {', '.join(other) or 'more files'} in {folder}")
        print(f"{kills}/{options.kills} kills, {runs} runs done, all alike", flush=True)
        shutil.rmtree(folder)
    left = set(os.listdir("/dev/shm")) - before if before else set()
    if left:
        raise SystemExit(f"Left in /dev/shm: {', '.join(sorted(left))}")
    print(
        f"{kills} kills, {runs} runs: weights, plans and figures as without, bit for bit ({time.monotonic() - began:.0f} s)"
    )
    if not options.out:
        shutil.rmtree(place)
    return 0


def _run(folder: Path, until: float | None) -> int:
    """The exit code of the run in ``folder``; with ``until`` it is killed after so many seconds, if it still runs."""
    words = [sys.executable, "-m", "lotus", "run", *SETTINGS, f"folder={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        run = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return run.wait(until)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            return run.wait()


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
