"""What a top-1 costs: trainings of one model, and of smaller ones, at several budgets, everything billed. One command:

    python benchmarks/cheaper.py CIFAR10.npz --out runs/cheaper                       # row cifar10, all arms; many hours
    python benchmarks/cheaper.py CIFAR10.npz --out runs/cheaper                       # again: goes on, or only prints
    python benchmarks/cheaper.py CIFAR100.npz --out runs/cheaper --row cifar100 --budgets 0.33 --arms dense lotus
    python benchmarks/cheaper.py CIFAR10.npz --out runs/cheaper --weights runs/cifar100/train --set train.lr=2e-3 --budgets 0.083
    python benchmarks/cheaper.py - --out runs/cheaper --row digits                    # minutes
    python benchmarks/cheaper.py CIFAR10.npz --out runs/short --images 5000 --budgets 0.33 1 --seeds 0   # 20 minutes

A cell is an arm at a budget from a seed. Cost is multiply-accumulates of all that was computed (a training step is three
forwards), as parts of the dense model's training for the textbook's epochs: 1 is arm *textbook* at budget 1. Arms:

* textbook: the dense model by AdamW at its usual rate and a cosine; adamw: at three times that rate
* dense: the dense model by the recipe of the config, without anything that is a lottery
* lotus: that, and cut on the way to ``KEEP`` of the MACs (``train.shrink``)
* narrow, shallow: from scratch, the largest narrower or shallower model within the MACs that *lotus* ships, by the recipe of *dense*
* others, each *dense* or *lotus* with one thing more, as ``ALONE`` says: what a lottery is worth alone

In ``--out`` lie the runs, ``cells.jsonl`` (a line a cell) and, for each row, ``ROW.svg`` and ``ROW.json`` with the curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

import shared

from lotus.config.reader import read
from lotus.report.compare import chart
from lotus.stages.ahead import Ahead
from lotus.stages.shelf import run_of
from lotus.vit.cost import macs
from lotus.vit.model import create, image_size
from selection import atomic_files

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (0.1, 0.17, 0.25, 0.33, 0.5, 1.0)
AT = 0.1
"""Fraction of the epochs before the cut, as near as whole epochs allow at a given cost."""
KEEP = 0.3
"""Fraction of the MACs that *lotus* ships."""
WARM_UP = 0.1
"""Fraction of the epochs, in every arm."""
TEXTBOOK = ["train.optimizer=adamw", "train.lr=0.001", "train.schedule=cosine", "train.shrink=null"]
COMMON = ("select.keep=1", "baseline=false", "train.evaluate_every=0", "train.sparsity.gates=false")
ARMS = ("textbook", "adamw", "dense", "lotus", "narrow", "shallow")
ALONE: dict[str, tuple[str, list[str]]] = {
    "lotus-half": ("lotus", ["prune.keep.macs=0.5"]),
    "lotus-sides": ("lotus", ["train.sides=[[0, 16], [0.15, 24], [0.5, 32]]"]),
    "lotus-average": ("lotus", ["train.guests=[late_average]"]),
    "lotus-ema": ("lotus", ["train.ema=0.998"]),
    "lotus-self": ("lotus", ["score.proxy=self", "select.keep=0.5", "select.score=el2n", "select.pick=top_k", "train.mixup=0", "train.cutmix=0"]),
    "lotus-infobatch": ("lotus", ["train.dynamic={name: infobatch, saving: 0.3}"]),
    "lotus-linear": ("lotus", ["train.schedule=linear"]),
    "lotus-patches": ("lotus", ["train.patches={mode: dropout, keep: 0.5}"]),
    "lotus-patches-early": ("lotus", ["train.patches={mode: dropout, keep: 0.5, until: 0.7}"]),
    "lotus-early": ("lotus", ["train.shrink.at=0.05"]),
    "lotus-sides-long": ("lotus", ["train.sides=[[0, 16], [0.3, 24], [0.6, 32]]"]),
    "lotus-steps": ("lotus", ["train.shrink={steps: [{at: 0.05, keep: {macs: 0.6}}, {at: 0.15}]}"]),
    "lotus-stable": ("lotus", ["train.shrink={until_stable: {}}"]),
    "lotus-taught": ("lotus", ["train.teacher=uncut"]),
    "lotus-taught-late": ("lotus", ["train.shrink.at=0.25", "train.teacher=uncut"]),
    "dense-gates": ("dense", ["train.sparsity.gates=true"]),
    "dense-warmup": ("dense", ["train.warmup_epochs=2"]),
    "dense-xavier": ("dense", ["model.start=xavier"]),
    "dense-mimetic": ("dense", ["model.start=mimetic"]),
    "textbook-mimetic": ("dense", [*TEXTBOOK, "model.start=mimetic"]),
    "dense-images": ("dense", ["select.keep=0.5", "score.epochs=3", "score.seeds=1"]),
    "dense-random": ("dense", ["select.keep=0.5", "select.score=random", "select.pick=random"]),
    "dense-infobatch": ("dense", ["train.dynamic={name: infobatch, saving: 0.3}"]),
    "dense-rs2": ("dense", ["train.dynamic={name: rs2, keep: 0.5}"]),
    "dense-hardest": ("dense", ["train.guests=[{name: hardest, keep: 0.5}]"]),
    "dense-average": ("dense", ["train.guests=[late_average]"]),
    "dense-ema": ("dense", ["train.ema=0.998"]),
    "dense-patches": ("dense", ["train.patches={mode: dropout, keep: 0.5}"]),
    "dense-patches-early": ("dense", ["train.patches={mode: dropout, keep: 0.5, until: 0.7}"]),
    "dense-sides": ("dense", ["train.sides=[[0, 16], [0.3, 24], [0.6, 32]]"]),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A data set, a model and the textbook's length of training."""

    config: str
    epochs: int
    more: tuple[str, ...] = ()


ROWS = {
    "cifar10": Row("cifar10", 12),
    "cifar100": Row("cifar100", 12),
    "patch4": Row("cifar10", 12, ("model.args.patch_size=4", "model.args.embed_dim=192")),
    "imagenette": Row("imagefolder", 20),
    "digits": Row("digits", 20),
}


def main() -> int:
    """Train what has no line yet, then print."""
    options = _parse()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    book, row = out / "cells.jsonl", ROWS[options.row]
    data = [] if options.data == "-" else [f"data.path={Path(options.data).resolve()}"]
    if options.images:
        pool = out / f"images-{options.images}.npz"
        shared.pool_of_images(options.data, options.images, pool)
        data = [f"data.path={pool}", "data.name=npz"]
    weights = Path(options.weights).resolve() if options.weights else None
    told = [
        "train.warmup_ratio=null",  # cells say it in epochs
        *row.more,
        *data,
        *options.set,
        *(["model.args.depth=4", "model.args.embed_dim=32"] if options.tiny else []),
    ]
    unit = Unit(ROOT / "configs" / f"{row.config}.yaml", told, row.epochs)
    wanted = [(arm, budget, seed) for seed in options.seeds for budget in options.budgets for arm in options.arms]
    began, done = time.monotonic(), 0
    for number, (arm, budget, seed) in enumerate(wanted, 1):
        settings = unit.settings(arm, budget)
        if weights and ALONE.get(arm, (arm, []))[0] in ("dense", "lotus"):
            settings.append(f"model.weights={weights}")
        key = {
            "row": options.row,
            "images": options.images,
            "from": weights.name if weights else "",
            "arm": arm,
            "budget": budget,
            "seed": seed,
            "set": [*options.set, *settings],
        }
        if any(all(line.get(name, "") == value for name, value in key.items()) for line in shared.rows_of(book)):
            continue
        cell = key | _train(out, row.config, key, [*told, *settings, f"seed={seed}"], unit)
        atomic_files.append(book, json.dumps(cell))
        done += 1
        left = (time.monotonic() - began) / done * (len(wanted) - number) / 60
        print(f"{number}/{len(wanted)}  {arm} {budget:g}: {cell['top1']:.2f} ({left:.0f} min left)", file=sys.stderr, flush=True)  # fmt: skip
    same = {"row": options.row, "images": options.images, "from": weights.name if weights else ""}
    cells = [one for one in shared.rows_of(book) if all(one.get(name, "") == value for name, value in same.items())]
    _draw(out / (f"{options.row}-from-weights" if weights else options.row), cells)
    print("\n".join(_table(cells)))
    return 0


class Unit:
    """What the dense training of the textbook costs, and how long each arm trains for a part of it."""

    def __init__(self, file: Path, told: list[str], epochs: int) -> None:
        """
        Args:
            told: settings of every cell
            epochs: of the textbook
        """
        self.config, self.epochs, self._file, self._told = read(file, told), epochs, file, told
        self.dense = self._macs({})

    def settings(self, arm: str, budget: float) -> list[str]:
        """Of ``arm``, so that its training costs ``budget``, as near as whole epochs allow."""
        told, length = list(COMMON), budget * self.epochs
        if arm in ALONE:
            return self._alone(arm, length)
        if arm == "lotus":
            return [*told, *self._cut(length)]
        if arm in ("narrow", "shallow"):
            args, part = self._smaller(arm)
            told += [f"model.args.{name}={value}" for name, value in args.items()]
            return [*told, "train.shrink=null", *_long(length / part)]
        if arm in ("textbook", "adamw"):
            told += TEXTBOOK + (["train.lr=0.003"] if arm == "adamw" else [])
        return [*told, "train.shrink=null", *_long(length)]

    def _alone(self, arm: str, length: float) -> list[str]:
        """As *arm* is, with one thing more, for as many epochs as cost what ``length`` dense ones do."""
        base, more = ALONE[arm]
        plain = [
            "select.keep=1",
            *(["train.shrink=null"] if base == "dense" else [f"prune.keep.macs={KEEP}", f"train.shrink.at={AT}"]),
        ]
        some, twice = (self._cost([*plain, *_long(epochs), *more]) for epochs in (100, 200))
        once = 2 * some - twice  # what a proxy costs, however long the training is
        return [*COMMON, *plain, *_long((length - once) / (some - once) * 100), *more]

    def _cost(self, settings: list[str]) -> float:
        """Of a training, in epochs of the dense model: what its stages forecast."""
        config = read(self._file, [*self._told, *settings, "baseline=false"])
        ahead = Ahead(config)
        run = run_of(config)
        spent = sum((run.stages[name].forecast(ahead) or (0, 0))[1] for name in run.plan("train"))
        return spent / (3 * self.dense * ahead.images)

    def _cut(self, length: float) -> list[str]:
        epochs = max(round(length / (AT + (1 - AT) * KEEP)), 1)
        at = (length / epochs - KEEP) / (1 - KEEP)
        return [*_long(epochs), f"prune.keep.macs={KEEP}", f"train.shrink.at={min(max(at, 0.03), 0.5):.4f}"]

    def _smaller(self, arm: str) -> tuple[dict[str, int], float]:
        """Arguments of the largest model within ``KEEP``, and its part of the dense MACs."""
        args = self.config.model.args
        name, step = ("embed_dim", int(args["num_heads"])) if arm == "narrow" else ("depth", 1)
        sizes = range(int(args[name]) - step, 0, -step)
        for size in sizes:
            part = self._macs({name: size}) / self.dense
            if part <= KEEP:
                return {name: size}, part
        raise SystemExit(f"No model of {KEEP:g} of the MACs is {arm}er.")

    def _macs(self, changes: dict[str, Any]) -> int:
        model = create(self.config.model.model_copy(update={"args": {**self.config.model.args, **changes}}), 10)
        return macs(model, image_size(model))


def _long(epochs: float) -> list[str]:
    """A training of so many epochs, in the first tenth of which the rate rises."""
    whole = max(round(epochs), 1)
    return [f"train.epochs={whole}", f"train.warmup_epochs={WARM_UP * whole:g}"]


def _train(out: Path, config: str, key: dict[str, Any], settings: Sequence[str], unit: Unit) -> dict[str, Any]:
    """Run the stages up to ``train`` in a folder of the cell's own, and tell what came out; only records and logs stay."""
    folder = out / key["row"] / f"{key['arm']}-{key['budget']:g}-{key['seed']}-{shared.key(key)}"
    folder.parent.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "lotus", "train", f"configs/{config}.yaml", f"folder={folder}",
             f"data.folder={out / key['row'] / 'data'}", *settings]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path(f"{folder}.log").open("a") as log:
        code = subprocess.run(
            words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise SystemExit(f"exit code {code}; see {folder}.log: {' '.join(words)}")
    records = [json.loads(file.read_text()) for file in (folder / "stages").glob("*.json")]
    train = next(one for one in records if one["stage"] == "train")
    images = next(one for one in records if one["stage"] == "prepare")["values"]["images"]
    for heavy in ("checkpoints", "data"):
        shutil.rmtree(folder / heavy, ignore_errors=True)
    spent = sum(one["macs"] for one in records)
    return {
        "top1": train["values"]["top1"],
        "cost": spent / (3 * unit.dense * unit.epochs * images),
        "macs": train["values"]["macs"] / unit.dense,
        "seconds": sum(one["seconds"] for one in records if one["stage"] != "prepare"),
        "epochs": int(next(one.split("=")[1] for one in settings if one.startswith("train.epochs="))),
    }


def _grouped(cells: Sequence[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for one in cells:
        groups.setdefault((one["arm"], one["budget"]), []).append(one)
    return dict(sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])))


def _table(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| arm | budget | cost | epochs | MACs shipped | top-1 | standard deviation | n | seconds |"
    yield "| --- |" + " --- |" * 8
    for (arm, budget), group in _grouped(cells).items():
        tops = [one["top1"] for one in group]
        spread = f"{statistics.stdev(tops):.2f}" if len(tops) > 1 else "-"
        mean = {name: statistics.fmean(one[name] for one in group) for name in ("cost", "macs", "seconds", "epochs")}
        yield (
            f"| {arm} | {budget:g} | {mean['cost']:.3f} | {mean['epochs']:.0f} | {mean['macs']:.3f} "
            f"| {statistics.fmean(tops):.2f} | {spread} | {len(tops)} | {mean['seconds']:.0f} |"
        )


def _draw(place: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Top-1 over cost, a curve an arm, as JSON and a picture."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for (arm, _), group in _grouped(cells).items():
        point = (statistics.fmean(one["cost"] for one in group), statistics.fmean(one["top1"] for one in group))
        curves.setdefault(arm, []).append(point)
    atomic_files.write_json(place.with_suffix(".json"), curves)
    drawn = {arm: sorted(curve) for arm, curve in curves.items()}
    canvas = chart(drawn, x="cost, in dense trainings of the textbook", y=f"{place.name}: top-1, %")
    atomic_files.write_text(place.with_suffix(".svg"), canvas.svg(f"Top-1 over cost, {place.name}", alone=True))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an .npz with x_train, y_train, x_test, y_test; a folder of images; - for digits")
    parser.add_argument("--out", required=True, help="folder of the results; a second run goes on there")
    parser.add_argument("--row", choices=list(ROWS), default="cifar10")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *ALONE], default=list(ARMS), metavar="ARM", help=", ".join([*ARMS, *ALONE]))  # fmt: skip
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=0, help="training images; 0: all")
    parser.add_argument(
        "--weights", default="", help="a file or folder that dense and lotus start from; the others from scratch"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every cell")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; only shows that it works")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
