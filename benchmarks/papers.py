"""The published systems' configs as they stand, every epoch of them, on a part of CIFAR-10, and ours beside each. One command:

    python benchmarks/papers.py CIFAR10.npz --out runs/papers                    # six configs; hours
    python benchmarks/papers.py CIFAR10.npz --out runs/papers --only spvit vtp   # these
    python benchmarks/papers.py CIFAR10.npz --out runs/papers                    # again: goes on, or only prints

Each row is what ``lotus run configs/papers/NAME.yaml`` reaches with the first images of each class as its training images and all test
images. *Ours* is ``configs/cifar10.yaml`` on all of these images, by the systems' AdamW and with the cut after the training, without gates, cut to the MACs that the system reached
(half, where it cuts none), and fine-tuned for as many epochs as the system (five, where it has none). Where a system trains a dense model on while its gates learn (VTP), ours has that very training too, without gates.
Computing is all that was spent on training, searching and asking, the dense model's that VTP and ours start from included. All start
from the same seed; one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

import shared

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS: dict[str, list[str]] = {
    "vtp": ["model.weights={dense}"],
    "sparse_vit": [],
    "spvit": [],
    "vtp_proximal": ["model.weights={dense}"],
    "auto_ratio": ["prune.search.images={held_out}"],
    "lotus_2024": [],
}
"""What each config is told beside the data; the longest first."""
TRAIN_ON = ("vtp", "vtp_proximal")
"""Those that start from the dense model, and train it on."""
OURS = [
    "select.keep=1", "baseline=false", "train.shrink=null", "train.epochs=12",
    "train.optimizer=adamw", "train.lr=1e-3", "train.warmup_ratio=null", "train.warmup_epochs=2", "prune.keep.macs=0.5", "finetune.epochs=5",
]  # fmt: skip
HALF = 0.5
"""Fraction of the MACs at which ours stands beside a system that cuts none."""
TINY = {
    "": ["train.epochs=1", "train.warmup_epochs=0", "train.evaluate_every=0", "prune.calibration=20", "export.latency_batch=4"],
    "fine": ["finetune.epochs=1"],
    "spvit": ["prune.method.epochs=1"],
    "auto_ratio": ["prune.search.grid=2", "prune.search.rounds=1", "prune.search.recovery=1", "prune.search.compare.keep=[0.5]"],
    "lotus_2024": ["prune.method.steps=1"],
}  # fmt: skip


def main() -> int:
    """Run what has not run yet, then print."""
    options = _parse()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = out / f"images-{options.images}.npz"
    shared.pool_of_images(options.data, options.images, data)
    dense = out / "dense"
    tiny = TINY[""] if options.tiny else []
    fine = TINY["fine"] if options.tiny else []
    _lotus(out, "dense", "train", "cifar10", data, [*OURS, *tiny])

    def both(name: str) -> None:
        """A system, then ours at its MACs."""
        known = {"dense": dense / "train", "held_out": round(0.04 * options.images)}
        told = [each.format(**known) for each in SYSTEMS[name]]
        shortened = [*tiny, *(fine if name != "sparse_vit" else []), *TINY.get(name, [])] if options.tiny else []
        _lotus(out, name, "run", f"papers/{name}", data, [*told, *shortened])
        part = _results(out / name)["kept"]["dimensions"]["macs"]
        ours = out / f"ours-{name}"
        keep = round(part, 4) if part < 1 else HALF
        if name in TRAIN_ON:
            here = ["train.sparsity={gates: false}", f"prune={{keep: {{macs: {keep}}}}}"]
            _lotus(out, ours.name, "run", f"papers/{name}", data, [*told, *here, *shortened])
            return
        if not ours.exists():
            shutil.copytree(dense, ours)  # its training serves all
        epochs = yaml.safe_load((out / name / "config.yaml").read_text())["finetune"]["epochs"]
        mine = [*OURS, f"prune.keep.macs={keep}", *([f"finetune.epochs={epochs}"] if epochs else []), *tiny, *fine]
        _lotus(out, ours.name, "run", "cifar10", data, mine)

    with ThreadPoolExecutor(options.workers) as pool:
        for done in [pool.submit(both, name) for name in options.only or SYSTEMS]:
            done.result()
    print("\n".join(_table(out, dense, options.only or list(SYSTEMS))))
    return 0


def _lotus(out: Path, name: str, verb: str, config: str, data: Path, told: list[str]) -> None:
    """One verb of the command line, its output in a file; what is done is not done again."""
    words = [sys.executable, "-m", "lotus", verb, str(ROOT / "configs" / f"{config}.yaml"), f"data.path={data}",
             f"data.folder={out / 'images'}", f"folder={out / name}", *told]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    print(f"{name}: {' '.join(words[2:])}", file=sys.stderr, flush=True)
    with (out / f"{name}.log").open("a") as log:
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        last = (out / f"{name}.log").read_text().strip().splitlines()[-12:]
        raise SystemExit("\n".join([f"{name}: exit code {code}. {out / f'{name}.log'} ends:", *last]))


def _results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def _table(out: Path, dense: Path, names: list[str]) -> Iterator[str]:
    base = json.loads((dense / "stages" / "train.json").read_text())
    yield f"dense, from which VTP and ours start: {base['values']['top1']:.2f}; its training is 1 of computing"
    yield ""
    yield "| system | trained | after the cut | final | MACs | computing | ours at these MACs: after the cut | final | MACs | computing |"
    yield "| --- |" + " --- |" * 9
    for name in names:
        cells = [name]
        for folder in (out / name, out / f"ours-{name}"):
            found = _results(folder)
            spent = found["ledger"]["lottery_macs"] / base["macs"] + (name in TRAIN_ON)
            tops = [found[stage]["top1"] for stage in ("train", "prune", "finetune")][folder.name != name :]
            part = found["kept"]["dimensions"]["macs"]
            cells += [*(f"{top:.2f}" for top in tops), f"{part:.3f}", f"{spent:.1f}"]
        yield f"| {' | '.join(cells)} |"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an .npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--out", required=True, help="folder of the runs; a second run goes on there")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), metavar="NAME", help=", ".join(SYSTEMS))
    parser.add_argument("--workers", type=int, default=1, help="systems at once, each with one thread")
    parser.add_argument("--tiny", action="store_true", help="an epoch of everything; only shows that it works")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
