"""Does sparsity regularization before the cut pay after it? Two trainings, one on each side of a cut, everything else equal:

    python benchmarks/regularize.py CIFAR10.npz --out runs/regularize     # an hour of one core; the same command goes on
    python benchmarks/regularize.py CIFAR10.npz --out runs/regularize --keep 0.35 --seeds 0 --arms none group

The dense model is trained for ``--before`` epochs, cut to ``keep`` of its MACs, and the small model goes on for ``--after``
epochs by the same recipe (Muon, no teacher). What differs is the first part alone:

* none: nothing
* proximal, subgradient: gates under L1 (``train.sparsity``), lambda steered to ``keep``, the cut by what the gates say
* proximal-fisher: the same gates, the cut by the Fisher information as in *none*
* group, group-strong: a group lasso over the units that the cut takes (benchmarks/group_lasso.py)

Top-1 after the whole, in percent, on all validation images. ``cells.jsonl`` in ``--out`` has a line a cell.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

import shared

from selection import atomic_files

ROOT = Path(__file__).resolve().parent.parent
GATES = "train.sparsity.gates=true"
ARMS: dict[str, list[str]] = {
    "none": [],
    "proximal": [GATES, "train.sparsity.penalty=proximal", "prune.criterion=gate"],
    "proximal-fisher": [GATES, "train.sparsity.penalty=proximal"],
    "subgradient": [GATES, "train.sparsity.penalty=subgradient", "prune.criterion=gate"],
    "group": ["train.guests=[group]"],
    "group-strong": ["train.guests=[{name: group, strength: 0.001}]"],
}
RECIPE = [
    "train.shrink=null", "baseline=false", "select.keep=1", "train.evaluate_every=0", "prune.criterion=fisher",
    "finetune.lr=3e-3", "finetune.warmup_epochs=0.2", "finetune.teacher=none", "finetune.evaluate_every=0",
]  # fmt: skip


def main() -> int:
    """Run what has no line yet, then print."""
    options = _parse()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    book, pool = out / "cells.jsonl", out / f"images-{options.images}.npz"
    shared.pool_of_images(options.data, options.images, pool)
    same = {"images": options.images, "before": options.before, "after": options.after}
    for seed in options.seeds:
        for keep in options.keep:
            for arm in options.arms:
                key = {**same, "arm": arm, "keep": keep, "seed": seed, "set": ARMS[arm]}
                if not any(
                    all(line.get(name) == value for name, value in key.items()) for line in shared.rows_of(book)
                ):
                    cell = {**key, **_run(out, pool, key)}
                    atomic_files.append(book, json.dumps(cell))
                    print(f"{arm} {keep:g} seed {seed}: {cell['top1']:.2f}", file=sys.stderr, flush=True)
    print("\n".join(_table([one for one in shared.rows_of(book) if all(one[name] == same[name] for name in same)])))
    return 0


def _run(out: Path, pool: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Train, cut, go on, in a folder of the cell's own, of which the log stays."""
    folder = out / f"{key['arm']}-{key['keep']:g}-{key['seed']}-{shared.key(key)}"
    words = [
        sys.executable, "-m", "lotus", "finetune", "configs/cifar10.yaml", f"folder={folder}", f"data.path={pool}",
        "data.name=npz", f"data.folder={out / 'data'}", *RECIPE, f"train.epochs={key['before']}",
        f"finetune.epochs={key['after']}", f"prune.keep.macs={key['keep']}", f"seed={key['seed']}", *key["set"],
        "--with", str(ROOT / "benchmarks" / "group_lasso.py"),
    ]  # fmt: skip
    with Path(f"{folder}.log").open("a") as log:
        code = subprocess.run(
            words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode  # fmt: skip
    if code:
        raise SystemExit(f"exit code {code}; see {folder}.log: {' '.join(words)}")
    told = {
        name: json.loads((folder / "stages" / f"{name}.json").read_text()) for name in ("train", "prune", "finetune")
    }
    shutil.rmtree(folder)
    return {
        "top1": told["finetune"]["values"]["top1"],
        "before_cut": told["train"]["values"]["top1"],
        "after_cut": told["prune"]["values"]["top1"],
        "macs": sum(one["macs"] for one in told.values()),
    }


def _table(cells: list[dict[str, Any]]) -> Iterator[str]:
    yield "| before the cut | MACs that stay | top-1 before | right after | in the end | standard deviation | n |"
    yield "| --- |" + " --- |" * 6
    for keep in sorted({one["keep"] for one in cells}, reverse=True):
        for arm in ARMS:
            group = [one for one in cells if one["arm"] == arm and one["keep"] == keep]
            if group:
                before, right, ends = (
                    [one[name] for one in group] for name in ("before_cut", "after_cut", "top1")
                )  # fmt: skip
                spread = f"{statistics.stdev(ends):.2f}" if len(ends) > 1 else "-"
                means = " | ".join(f"{statistics.fmean(one):.2f}" for one in (before, right, ends))
                yield f"| {arm} | {keep:g} | {means} | {spread} | {len(ends)} |"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an .npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--out", required=True, help="folder of the results; a second run goes on there")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.35, 0.25], help="fractions of the MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--before", type=int, default=3, help="epochs of the dense model")
    parser.add_argument("--after", type=int, default=6, help="epochs of what stays")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
