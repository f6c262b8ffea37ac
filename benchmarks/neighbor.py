"""What a busy neighbor costs a training on the CPU. One command, one run, on a machine that does nothing else:

    python benchmarks/neighbor.py            # three models: at least 0.9 of the best alone, at most 3 times slower beside
    python benchmarks/neighbor.py --tiny     # seconds; only shows that it works

Each model trains in a process of its own, by a loop of ten lines, with every number of threads and both ways in which threads wait
for each other (spinning, which is OpenMP's default, and asleep, which is what ``lotus`` sets): first alone, then beside a process that this
script starts and that computes without end. ``lotus`` is the arm that a training chooses by itself. Figures are images a
second, medians over windows of half a second:

    alone     lotus / the best arm alone
    beside    the best arm alone / lotus beside the busy process
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # else selection.py of this folder is found first

MODELS = {
    # img_size, patch_size, embed_dim, depth, num_heads, batch
    "the demo's": (8, 2, 64, 4, 4, 32),
    "128 x 6 at 32 px": (32, 8, 128, 6, 4, 128),
    "DeiT-Ti at 224 px": (224, 16, 192, 12, 3, 64),
}
TINY = {"tiny": (8, 4, 32, 2, 2, 8)}
WAITS = {"spin": {}, "sleep": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}}
LEAST_ALONE, MOST_SLOWER = 0.9, 3.0
WINDOW = 0.5  # seconds


def main() -> int:
    """Run; 1 with ``--check`` where a figure is missed."""
    options = _parse()
    if options.arm:
        return _train(options)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    good, told = True, {}
    for name in options.models:
        arms = {
            (threads, wait): _measured(name, threads, wait, options)
            for wait in WAITS
            for threads in ({0, 1} if options.tiny else sorted({0, 1, cores}))
            # 0 is what a training of LOTUS chooses, and it sleeps
            if (threads > 0) == (wait == "spin") or (threads and not options.tiny)
        }
        mine = arms.pop((0, "sleep"))
        best = max([mine["alone"], *(one["alone"] for one in arms.values())])
        alone, slower = mine["alone"] / best, best / mine["beside"]
        good &= alone >= LEAST_ALONE and slower <= MOST_SLOWER
        told[name] = {
            "lotus": mine, "alone": alone, "slower": slower, **{f"{t} threads, {w}": one for (t, w), one in arms.items()}
        }  # fmt: skip
        if not options.json:
            _tell(name, told[name])
    if options.json:
        print(json.dumps({"good": good, "cores": cores, "models": told}))
    return 1 if options.check and not good else 0


def _measured(name: str, threads: int, wait: str, options: argparse.Namespace) -> dict[str, Any]:
    """Images a second alone and beside, of a process of its own: how threads wait is read when torch is imported."""
    words = [sys.executable, __file__, "--arm", name, "--threads", str(threads), "--seconds", str(options.seconds)]
    mine = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    environment = {key: value for key, value in os.environ.items() if key not in mine}
    done = subprocess.run(words, env=environment | WAITS[wait], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _train(options: argparse.Namespace) -> int:
    import torch
    import torch.nn.functional as F

    from lotus.config import Model
    from lotus.training import threads
    from lotus.training.distributed import World
    from lotus.vit.model import create

    side, patch, width, depth, heads, batch = (MODELS | TINY)[options.arm]
    args = {"img_size": side, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    torch.manual_seed(0)
    model = create(Model(name="vit_tiny_patch16_224", args=args), 10).train()
    if options.threads:
        torch.set_num_threads(options.threads)
    else:
        threads.take(model, batch, World())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))

    def speed(seconds: float) -> float:
        """Median over windows, of at least one step each."""
        found, end = [], time.perf_counter() + seconds
        while (began := time.perf_counter()) < end or not found:
            steps = 0
            while not steps or time.perf_counter() - began < WINDOW:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
            found.append(steps * batch / (time.perf_counter() - began))
        return statistics.median(found)

    speed(WINDOW)
    alone = speed(options.seconds)
    neighbor = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = speed(options.seconds)
    finally:
        neighbor.kill()
        neighbor.wait()
    print(json.dumps({"alone": alone, "beside": beside, "threads": torch.get_num_threads()}))
    return 0


def _tell(name: str, told: dict[str, Any]) -> None:
    print(name)
    for arm, one in told.items():
        if isinstance(one, dict):
            chosen = f" ({one['threads']} threads)" if arm == "lotus" else ""
            print(f"  {arm + chosen:24}{one['alone']:10.0f} images/s alone {one['beside']:10.0f} beside")
    print(f"  lotus alone / the best alone   {told['alone']:6.2f}    wanted: at least {LEAST_ALONE}")
    print(f"  the best alone / lotus beside  {told['slower']:6.2f}    wanted: at most {MOST_SLOWER:g}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS | TINY), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement; 10 by default")
    parser.add_argument("--tiny", action="store_true", help="a small model for a moment")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure is missed")
    parser.add_argument("--arm", choices=tuple(MODELS | TINY), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.models, options.seconds = list(TINY), 0.1
    return options


if __name__ == "__main__":
    raise SystemExit(main())
