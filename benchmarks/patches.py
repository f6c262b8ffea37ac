"""What a training step with token pruning takes, beside one on all, and what it costs in accuracy. One command each, one run:

    python benchmarks/patches.py            # the figures: at keep 0.7 at most 0.78 of the dense step's time
    python benchmarks/patches.py --tiny     # seconds; only shows that it works
    python benchmarks/patches.py --accuracy --path data/cifar10.npz    # half an hour on one core

Trainings of the same ViT on the same images in memory (forward, backward, AdamW; no loader) take turns, a block of steps
each, in an order that rotates. The figures are medians over the blocks of what stands beside the dense block of the same
round, so that a machine that slows down slows down all. Beside each stands the share of the MACs, below which the time can
hardly fall.

``--accuracy`` trains a small ViT on 10,000 images of CIFAR-10, by ``lotus train``, for the same number of epochs on the patches
that each score keeps, three seeds each, and measures it on all patches of the 10,000 test images. What attention says is asked of
a dense model of another seed, trained once by the same recipe. Dense trainings of about as many MACs, in fewer epochs, are the
control. Each training is a row as it ends; the folder ``--work`` keeps them, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from lotus import stages
from lotus.config import Config, Model, Patches, check
from lotus.record import Record
from lotus.run import Run
from lotus.vit import patch_scores
from lotus.vit.cost import count
from lotus.vit.model import create
from lotus.vit.tokens import Tokens

CLASSES = 10
MOST = 0.78
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "input, contrast": {"mode": "input"},
    "input, told": {"mode": "input"},
    "evit, fused": {"mode": "evit"},
    "evit, dropped": {"mode": "evit", "fuse": False},
    "tome": {"mode": "tome"},
    "dropout": {"mode": "dropout"},
}
"""``told`` is a cached ticket: the scores are there, and nobody has to look."""


def main() -> int:
    """Run; 1 with ``--check`` where a figure is missed."""
    options = _parse()
    return _accuracy(options) if options.accuracy else _speed(options)


def _speed(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    shares, steps = {}, {}
    for name, settings in ARMS.items():
        torch.manual_seed(0)
        model = create(Model(name=options.model, args=options.args), CLASSES).to(device, dtype)
        tokens = None
        if settings is not None:
            score = patch_scores.contrast if name == "input, contrast" else None
            tokens = Tokens(model, Patches.model_validate({**settings, "keep": options.keep}), score)
        shares[name] = 1.0 if tokens is None else tokens.macs() / count(model).macs
        steps[name] = _training(model, tokens if name == "input, told" else None, options.batch, device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for block in range(options.blocks + 1):  # the first warms up and does not count
        turn = block % len(names)
        for name in names[turn:] + names[:turn]:
            _wait(device)
            began = time.perf_counter()
            for _ in range(options.steps):
                steps[name]()
            _wait(device)
            if block:
                seconds[name].append((time.perf_counter() - began) / options.steps)
    ratios = {
        name: statistics.median(one / dense for one, dense in zip(taken, seconds["dense"], strict=True))
        for name, taken in seconds.items()
    }
    found = {
        name: {"seconds": statistics.median(seconds[name]), "ratio": ratios[name], "macs": shares[name]}
        for name in names
    }
    if options.json:
        print(json.dumps({"keep": options.keep, "threads": torch.get_num_threads(), "arms": found}))
    else:
        print(f"{options.model} {options.args}, batch {options.batch}, keep {options.keep:g}, {options.precision}, "
              f"{device}, {torch.get_num_threads()} threads, {options.blocks} blocks of {options.steps} steps")  # fmt: skip
        print(f"{'':18}{'ms a step':>10}{'of dense':>10}{'of its MACs':>13}")
        for name, row in found.items():
            print(f"{name:18}{1000 * row['seconds']:10.1f}{row['ratio']:10.3f}{row['macs']:13.3f}")
        print(f"to be reached: at most {MOST} of the dense step's time")
    missed = [name for name in names if name != "dense" and ratios[name] > MOST]
    return 1 if options.check and missed else 0


# ---------------------------------------------------------------------------------------------------------- accuracy

PROXY = 1000
"""Seed of the dense model that is asked for its attention: none of those that are measured."""
SCORED: dict[str, dict[str, Any]] = {
    "dropout": {"mode": "dropout"},
    "contrast": {"mode": "input", "score": "contrast"},
    "edges": {"mode": "input", "score": "edges"},
    "attention": {"mode": "input", "score": "attention"},
    "random": {"mode": "input", "score": "random", "cached": True},
    "joint": {"mode": "input", "score": "random", "cached": True, "joint": {"buckets": 3, "least": 0.3}},
}
"""``joint``: as random, but hard images keep more, easy ones fewer; which are which says a short training that is not in the cost."""


def _accuracy(options: argparse.Namespace) -> int:
    """Train every arm with every seed; a row each as it ends, and then the table."""
    work, seeds, epochs = Path(options.work), range(options.seeds), options.epochs
    ticket = work / "pool" / "subset.npz"
    pool = {"score": "random", "pick": "ccs", "keep": options.pool}  # any images; both said, whatever the defaults are
    _done(_config(options, work / "pool", 0, epochs, select=pool), "select")
    recipe = functools.partial(_config, options, select={"ticket": str(ticket)})
    asked = _done(recipe(work / "proxy", PROXY, epochs), "train")
    print(f"asked for its attention: a dense model of seed {PROXY}, top-1 {asked.values['top1']:.2f}", flush=True)
    rows: dict[tuple[str, float], list[Record]] = {("dense", 1.0): []}
    for seed in seeds:
        rows["dense", 1.0].append(_row(recipe(work / f"dense-{seed}", seed, epochs), "dense", 1.0))
        for keep in options.keeps:
            for name in options.only or SCORED:
                patches = {**SCORED[name], "keep": keep}
                if name == "attention":
                    patches["model"] = str(work / "proxy" / "train")
                folder = work / f"{name}-{keep:g}-{seed}".replace(" ", "-")
                found = _row(recipe(folder, seed, epochs, patches=patches), name, keep)
                rows.setdefault((name, keep), []).append(found)
            spent = rows[next(iter(options.only or SCORED)), keep][-1].values["patches"]["train_macs"]
            few = max(1, round(epochs * spent / rows["dense", 1.0][-1].values["macs"]))
            found = _row(recipe(work / f"dense-{few}-epochs-{seed}", seed, few), f"dense, {few} epochs", keep)
            rows.setdefault((f"dense, {few} epochs", keep), []).append(found)
    _table(rows, options)
    return 0


def _config(options: argparse.Namespace, folder: Path, seed: int, epochs: int, *, select: dict[str, Any],
            patches: dict[str, Any] | None = None) -> Config:  # fmt: skip
    train = {
        "epochs": epochs, "batch_size": 64, "lr": 1e-3, "warmup_epochs": 1, "evaluate_every": 0, "sparsity": {"gates": False},
        "augment": {"flip": True} if options.tiny else {"crop": "pad", "pad": 4, "flip": True}, "patches": patches,
    }  # fmt: skip
    data = {"name": options.data, "path": options.path, "write": "raw", "folder": str(Path(options.work) / "data")}
    return check({
        "name": folder.name, "folder": str(folder), "seed": seed, "device": options.device, "baseline": False, "data": data,
        "model": {"name": "vit_tiny_patch16_224", "args": options.args}, "select": select, "train": train,
    })  # fmt: skip


def _done(config: Config, stage: str) -> Record:
    """The record of a stage, run now where it is not done yet."""
    for _ in stages.go(config, until=stage):
        pass
    record = Run(config).record(stage)
    assert record is not None
    return record


def _row(config: Config, name: str, keep: float) -> Record:
    record = _done(config, "train")
    told = f"{name:16} keep {keep:<4g} seed {config.seed} top-1 {record.values['top1']:6.2f}"
    print(f"{told} {record.values['train_seconds']:6.0f} s", flush=True)
    return record


def _table(rows: dict[tuple[str, float], list[Record]], options: argparse.Namespace) -> None:
    dense = rows["dense", 1.0]
    whole = statistics.mean(map(_spent, dense))
    found = []
    for (name, keep), records in rows.items():
        top1 = [record.values["top1"] for record in records]
        beside = [one - other.values["top1"] for one, other in zip(top1, dense, strict=True)]
        spent = statistics.mean(map(_spent, records))
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        found.append({"arm": name, "keep": keep, "top1": statistics.mean(top1), "spread": spread,
                      "beside_dense": statistics.mean(beside), "macs": spent / whole})  # fmt: skip
    if options.json:
        print(json.dumps({"epochs": options.epochs, "seeds": options.seeds, "rows": found}))
        return
    print(f"{options.args}, {options.epochs} epochs, {options.seeds} seeds, measured on all patches")
    print(f"{'':20}{'keep':>6}{'top-1':>8}{'+-':>6}{'beside dense':>14}{'MACs':>7}")
    for row in found:
        print(f"{row['arm']:20}{row['keep']:6g}{row['top1']:8.2f}{row['spread']:6.2f}{row['beside_dense']:+14.2f}"
              f"{row['macs']:7.2f}")  # fmt: skip


def _spent(record: Record) -> float:
    """MACs of the training's forward passes, without those of a model that is asked: one is asked once for all."""
    told = record.values
    return told["images_seen"] * told.get("patches", {}).get("train_macs", told["macs"])


# ------------------------------------------------------------------------------------------------------------- speed


def _training(
    model: nn.Module, told: Tokens | None, batch: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """One optimizer step after another on the same images."""
    model.train()
    embed: Any = model.patch_embed
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *embed.img_size, generator=draw).to(device, dtype)
    labels = torch.randint(CLASSES, (batch,), generator=draw).to(device)
    scores = torch.rand(batch, embed.num_patches, generator=draw).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def step() -> None:
        if told is not None:
            told.choose(scores)
        loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--args", type=json.loads, help="JSON for timm.create_model")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="of each arm in a block")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--accuracy", action="store_true", help="measure accuracy, not time")
    parser.add_argument("--data", default="cifar10", help="accuracy: a data set of the catalog (%(default)s)")
    parser.add_argument("--path", default="data/cifar10", help="accuracy: where it lies (%(default)s)")
    parser.add_argument("--work", default="runs/patches-accuracy", help="accuracy: folder of the runs (%(default)s)")
    parser.add_argument(
        "--pool", type=float, default=0.2, help="accuracy: fraction of the images that train (%(default)s)"
    )
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.7, 0.5], help="accuracy: parts of the patches")
    parser.add_argument("--epochs", type=int, default=6, help="accuracy (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="accuracy (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(SCORED), help="accuracy: only these, beside dense")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure is missed")
    parser.add_argument("--tiny", action="store_true", help="seconds; only shows that it works")
    options = parser.parse_args()
    if options.tiny:
        options.args = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
        options.batch, options.steps, options.blocks = 8, 2, 2
    if options.accuracy:
        options.args = options.args or {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
        if options.tiny:
            options.args = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
            options.data, options.path = "digits", ""
            options.pool, options.keeps, options.epochs, options.seeds = 0.2, [0.5], 1, 2
    options.args = options.args or {}
    return options


if __name__ == "__main__":
    raise SystemExit(main())
