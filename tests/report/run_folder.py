"""A run's folder as the stages would leave it: real digits, invented measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lotus import config
from lotus.data import beton, catalog
from lotus.report import ledger
from lotus.stages.shelf import STAGES as ALL
from selection.lottery import select
from selection.signals import Signals

STAGES = {stage.name: stage for stage in ALL}
BLOCKS = [
    {"heads": 4, "of_heads": 4, "head_dim": 8, "of_head_dim": 16, "hidden": hidden, "of_hidden": 256}
    for hidden in (96, 152, 176, 88)
]


def results(name: str = "digits") -> dict:
    """A results.json."""
    latency = {"batch_1": 2.04, "batch_N": 31.2, "batch": 64, "device": "cpu", "dtype": "fp32"}
    dense = {"top1": 98.61, "loss": 0.591, "params": 203_000, "macs": 3_630_000, "images_seen": 28_740, "train_seconds": 21.4,
             "latency_ms": latency}  # fmt: skip
    costs = [
        {"stage": stage, "part": STAGES[stage].part, "seconds": seconds, "image_forwards": forwards, "macs": macs}
        for stage, seconds, forwards, macs in (
            ("prepare", 0.8, 0, 0), ("score", 13.1, 44_547, 1.62e11), ("select", 0.1, 0, 0), ("baseline", 22.0, 86_220, 3.13e11),
            ("train", 11.6, 43_080, 1.56e11), ("prune", 1.4, 2_872, 1.04e10), ("finetune", 6.2, 28_720, 6.4e10), ("export", 1.1, 0, 0),
        )
    ]  # fmt: skip
    return {
        "format": 2, "name": name, "device": "cpu",
        "baseline": dense,
        "train": {**dense, "top1": 97.78, "loss": 0.612, "images_seen": 14_360, "train_seconds": 11.2},
        "prune": {"top1": 96.94, "loss": 0.66, "params": 104_000, "macs": 1_800_000},
        "finetune": {"top1": 98.06, "loss": 0.604, "params": 104_000, "macs": 1_800_000, "images_seen": 7_180, "train_seconds": 5.9,
                  "latency_ms": {**latency, "batch_1": 1.83, "batch_N": 17.9}},
        "kept": {"images": {"kept": 718, "of": 1437}, "tokens": {"kept": 17, "of": 17},
                 "dimensions": {"macs": 0.496, "params": 0.512}, "blocks": BLOCKS},
        "ledger": ledger.account(costs, kept_share=718 / 1437),
    }  # fmt: skip


def log(stages: tuple[str, ...] = ("baseline", "train", "finetune")) -> list[dict]:
    """What log.jsonl holds of the trainings."""
    rng = np.random.default_rng(0)
    lines = list[dict[str, Any]]()
    for stage in stages:
        epochs = 10 if stage == "finetune" else 20
        lines.append({"event": "began", "stage": stage, "why": "not done yet"})
        for epoch in range(1, epochs + 1):
            done = epoch / epochs
            values = {"epoch": epoch, "loss": 2.3 * np.exp(-3 * done) + 0.5, "lr": 1e-3, "images_per_second": 2300.0}
            if stage == "train":
                open_macs = 1 if done < 0.5 else max(0.497, 1 - 1.4 * (done - 0.5))
                values |= {"zero_gates": 1.3 * (1 - open_macs), "lambda": 0.3, "open_macs": open_macs}
            lines.append(
                {
                    "event": "step",
                    "stage": stage,
                    "done": 10 * epoch,
                    "total": 10 * epochs,
                    "unit": "steps",
                    "values": values,
                }
            )
            start, end = {"baseline": (60, 98.6), "train": (48, 97.8), "finetune": (96.9, 98.1)}[stage]
            top1 = end - (end - start) * np.exp(-5 * done) + 0.25 * rng.standard_normal()
            lines.append({"event": "evaluated", "stage": stage, "epoch": epoch,
                          "values": {"top1": float(min(top1, 100)), "loss": float(2.2 * np.exp(-4 * done) + 0.58)}})  # fmt: skip
    return lines


def make(folder: Path) -> Path:
    settings = config.check(
        {
            "name": "digits",
            "data": {"name": "digits", "write": "raw"},
            "select": {"score": "el2n", "pick": "ccs", "keep": 0.5},
        }
    )
    train, _ = catalog.digits("")
    (folder / "data").mkdir()
    for _ in beton.prepare(train, folder / "data" / "train.beton", settings.data):
        pass
    manifest = beton.Manifest.load(folder / "data" / "train.beton")
    rng = np.random.default_rng(0)
    hard = np.minimum(rng.gamma(1.2, 0.22, (2, 5, manifest.n)), 1.4)
    signals = Signals(
        {"labels": train.labels, "error_norm": hard}, fingerprint=manifest.fingerprint, classes=manifest.classes
    )
    signals.save(folder / "signals.npz")
    select(signals, score="el2n", pick="ccs", keep=0.5).subset.save(folder / "subset.npz")
    (folder / "config.yaml").write_text(settings.yaml())
    (folder / "versions.txt").write_text("python 3.11\ntorch 2.15.0\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log()) + '{"event": "st')
    (folder / "results.json").write_text(json.dumps(results()))
    return folder
