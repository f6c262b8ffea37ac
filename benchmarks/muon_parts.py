"""Which weights Muon should move. One command, some minutes; what is done is kept, and the same command goes on:

    python benchmarks/muon_parts.py CIFAR10.npz --out runs/muon    # a dense ViT of 128 x 6, 10,000 images, 4 epochs
    python benchmarks/muon_parts.py - --out OUT --epochs 1         # the digits' model; only shows that it works

A training by the recipe of the config, in which the matrices that Muon moves are

* ours: as :func:`lotus.training.muon.matrices` says: all linear layers and the patch embedding, not the head; q, k and v apart
* first-adamw: without the patch embedding, which AdamW moves, as Muon's authors have it
* head-muon: with the head
* qkv-together: q, k and v of a block orthogonalized as the one matrix that they lie in
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

import shared

from lotus.training import muon
from selection import atomic_files

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, muon.Matrix]


def _first_adamw(model: Any, found: Found) -> Found:
    return {name: matrix for name, matrix in found.items() if not name.startswith("patch_embed.")}


def _head_muon(model: Any, found: Found) -> Found:
    rows, columns = model.head.weight.shape
    return {**found, "head.weight": muon.Matrix((rows, columns), (rows,))}


def _qkv_together(model: Any, found: Found) -> Found:
    return {name: muon.Matrix(matrix.shape, (matrix.shape[0],)) for name, matrix in found.items()}


PARTS: dict[str, Callable[[Any, Found], Found]] = {
    "ours": lambda model, found: found, "first-adamw": _first_adamw, "head-muon": _head_muon, "qkv-together": _qkv_together,
}  # fmt: skip


def main() -> int:
    """Train what has no line yet, then print."""
    options = _parse()
    if options.alone:
        return _alone(*options.alone)
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    book, pool = out / "cells.jsonl", out / f"images-{options.images}.npz"
    config, data = "configs/digits.yaml", []
    if options.data != "-":
        shared.pool_of_images(options.data, options.images, pool)
        config, data = "configs/cifar10.yaml", [f"data.path={pool}", "data.name=npz"]
    same = {"config": config, "images": options.images, "epochs": options.epochs}
    for seed in options.seeds:
        for part in options.parts:
            key = {**same, "part": part, "seed": seed}
            if not any(key.items() <= line.items() for line in shared.rows_of(book)):
                top1 = _run(out, key, [config, *data, f"data.folder={out / 'data'}"])
                atomic_files.append(book, json.dumps({**key, "top1": top1}))
                print(f"{part} seed {seed}: {top1:.2f}", file=sys.stderr, flush=True)
    print("\n".join(_table([one for one in shared.rows_of(book) if same.items() <= one.items()])))
    return 0


def _alone(part: str, *words: str) -> int:
    """``lotus WORDS`` with other matrices."""
    from lotus.cli import main as lotus

    ours = muon.matrices
    muon.matrices = lambda model: PARTS[part](model, ours(model))
    return lotus(list(words))


def _run(out: Path, key: dict[str, Any], data: list[str]) -> float:
    folder = out / f"{key['part']}-{key['seed']}-{shared.key(key)}"
    words = [
        sys.executable, __file__, "-", "--out", "-", "--alone", key["part"], "train", *data, f"folder={folder}", "train.shrink=null",
        "select.keep=1", "baseline=false", "train.evaluate_every=0", f"train.epochs={key['epochs']}", f"seed={key['seed']}",
    ]  # fmt: skip
    with Path(f"{folder}.log").open("a") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        code = subprocess.run(
            words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise SystemExit(f"exit code {code}; see {folder}.log: {' '.join(words)}")
    record = json.loads((folder / "stages" / "train.json").read_text())
    shutil.rmtree(folder)
    return float(record["values"]["top1"])


def _table(cells: list[dict[str, Any]]) -> Iterator[str]:
    yield "| Muon moves | top-1, a seed each | mean |"
    yield "| --- | --- | --- |"
    for part in PARTS:
        tops = [one["top1"] for one in sorted(cells, key=lambda one: int(one["seed"])) if one["part"] == part]
        if tops:
            yield f"| {part} | {', '.join(f'{top:.2f}' for top in tops)} | {statistics.fmean(tops):.2f} |"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an .npz with x_train, y_train, x_test, y_test; - for digits")
    parser.add_argument("--out", required=True, help="folder of the results; a second run goes on there")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--alone", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
