"""What a model learns from the images that each method chooses, at the same cost. One command, one table:

    python benchmarks/selection_accuracy.py CIFAR10.npz --out runs/selection_accuracy
    python benchmarks/selection_accuracy.py CIFAR10.npz --out runs/selection_accuracy      # again: goes on, or only prints

A small ViT is trained from scratch by ``lotus train``'s own code on a pool of images, with the same recipe, for every method, share and
seed. **Cost** is what a training on the share ``keep`` of the pool for ``--epochs`` epochs takes: a ticket goes through its
images that many times; ``rs2`` draws other images each epoch; ``infobatch`` runs fewer epochs than that and more than ``shorter``,
with the saving that brings it to the same number of image passes; ``shorter`` sees all images, for ``keep * epochs`` epochs. A
table beside it has the shares near 1 for the three that need no proxy: how much can be saved before accuracy falls.

A seed is a seed for all: of the proxy, of the draw, of the weights and of the order of the images. Each seed has a proxy of its own,
which all tickets of the seed share; its cost (``--proxy`` epochs on the pool) is *not* in the budget of the tickets, and is said.

Every training is a process' own with one thread; ``--workers`` of them run at once. Seconds are CPU seconds of the training, so that
what else the machine does changes them little.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two trainings of one thread beat one of two

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

import shared

TICKETS: dict[str, tuple[Any, Any]] = {
    "random": ("random", "random"),
    "el2n, top_k": ("el2n", "top_k"),
    "el2n, bottom": ("el2n", "bottom"),
    "aum, ccs": ("aum", "ccs"),
    "el2n, ccs": ("el2n", "ccs"),
    "dual, beta": ("dual", "beta"),
    "aum, d2": ("aum", "d2"),
    "facility_location": ("random", "facility_location"),
    "herding": ("random", "herding"),
    "k_center": ("random", "k_center"),
    "el2n, window": ("el2n", "window"),
}
"""Score and picker, with the settings that are theirs when nothing is said."""
EACH_EPOCH = ("rs2", "infobatch", "shorter")
NEAR_ONE = (0.85, 0.7)
ROWS = ("out", "workers", "json", "seeds", "keep", "near_one", "only")
"""Options that say which trainings there are, and change none of them."""
ANY_TO_SAVE = 6
"""Full epochs' worth of passes from which infobatch can save a third: its first epoch and its last eighth see all images."""


def main() -> int:
    """Run what has not run yet, then print."""
    options = _parse()
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    setting = {name: value for name, value in vars(options).items() if name not in ROWS}
    key = shared.key(setting)
    book = folder / f"runs-{key}.jsonl"
    done = {_name(row["method"], row["keep"], row["seed"]): row for row in shared.rows_of(book)}
    jobs = [job for job in _jobs(options) if _name(*job) not in done]
    if jobs:
        for stale in folder.glob(f"run-{key}-*"):  # of one that was killed
            shutil.rmtree(stale)
        shared.pool_of_images(options.data, options.pool, folder / f"pool-{options.pool}.npz")
        context = get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=context) as workers:
            proxies = {
                workers.submit(_proxy, options, folder, key, seed): seed for seed in sorted({s for *_, s in jobs})
            }
            for future in as_completed(proxies):
                print(f"seed {proxies[future]}: proxy, {future.result():.0f} CPU seconds", file=sys.stderr, flush=True)
            running = [workers.submit(_train, options, folder, key, *job) for job in jobs]
            for row in shared.as_they_end(running, book, _told):
                done[_name(row["method"], row["keep"], row["seed"])] = row
    rows = [done[_name(*job)] for job in _jobs(options)]
    print(json.dumps(rows) if options.json else "\n".join(_tables(rows, options)))
    return 0


def _jobs(options: argparse.Namespace) -> list[tuple[str, float, int]]:
    """Every (method, keep, seed): the first table of one seed after the other, then the second."""
    first = [(keep, (*TICKETS, *EACH_EPOCH)) for keep in options.keep]
    second = [*((keep, EACH_EPOCH) for keep in options.near_one), (1.0, ("shorter",))]
    return [
        (method, keep, seed)
        for table in (first, second)
        for seed in range(options.seeds)
        for keep, methods in table
        for method in methods
        if (method != "infobatch" or keep * options.epochs >= ANY_TO_SAVE)
        and (not options.only or method in options.only)
    ]


def _config(options: argparse.Namespace, folder: Path, run: Path, seed: int, **sections: Any) -> Any:
    from lotus import config

    recipe = {"epochs": options.epochs, "batch_size": options.batch, "lr": 1e-3, "weight_decay": 0.05,
              "augment": {"crop": "pad", "pad": 4, "flip": True}, "evaluate_every": 0, "sparsity": {"gates": False},
              "warmup_epochs": 0.1 * options.epochs, "save_minutes": 1000} | sections.pop("train", {})  # fmt: skip
    return config.check({
        "folder": str(run), "seed": seed, "baseline": False, "device": options.device,
        "data": {"name": "cifar10", "path": str(folder / f"pool-{options.pool}.npz"), "write": "raw", "workers": 1,
                 "folder": str(folder / f"images-{options.pool}")},
        "model": {"name": options.model, "args": options.args},
        "score": {"epochs": options.proxy, "seeds": 1},
        "train": recipe,
        "prune": {"keep": {"macs": 1.0}},  # not part of this
        **sections,
    })  # fmt: skip


def _go(config: Any, until: str) -> tuple[list[Any], float]:
    """The stages up to ``until``; their events, and the CPU seconds that they took."""
    import torch

    from lotus import stages

    torch.set_num_threads(1)
    began = time.process_time()
    events = list(stages.go(config, until=until))
    return events, time.process_time() - began


def _proxy(options: argparse.Namespace, folder: Path, key: str, seed: int) -> float:
    """Watch one short training; its signals serve every ticket of the seed."""
    run = folder / f"proxy-{key}-{seed}"
    file = folder / f"signals-{key}-{seed}.npz"
    if file.exists():
        return 0.0
    with _alone(folder):  # the first writes the images
        _go(_config(options, folder, run, seed), "prepare")
    config = _config(options, folder, run, seed, select={"score": "el2n", "pick": "top_k", "keep": 0.5})
    seconds = _go(config, "score")[1]
    (run / "signals.npz").rename(file)
    shutil.rmtree(run)
    return seconds


def _train(options: argparse.Namespace, folder: Path, key: str, method: str, keep: float, seed: int) -> dict[str, Any]:
    """One training at the cost of ``keep``."""
    from lotus import stages
    from lotus.events import Evaluated
    from lotus.run import Run
    from selection.lottery import select
    from selection.signals import Signals

    run = folder / f"run-{key}-{os.getpid()}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    settings: dict[str, Any] = {}
    if method in TICKETS:
        score, pick = TICKETS[method]
        signals = Signals.load(folder / f"signals-{key}-{seed}.npz")
        began = time.process_time()
        select(signals, score=score, pick=pick, keep=keep, seed=seed).subset.save(run / "ticket.npz")
        chosen = time.process_time() - began
        settings["select"] = {"ticket": str(run / "ticket.npz")}
    else:
        chosen = 0.0
        settings["train"] = _each_epoch(method, keep, options.epochs)
    config = _config(options, folder, run, seed, **settings)
    events, seconds = _go(config, "train")
    top1 = [event.values["top1"] for event in events if isinstance(event, Evaluated)][-1]
    record = Run(config).record("train")
    assert record is not None
    passes = record.image_forwards / stages.TRAIN_FORWARDS
    shutil.rmtree(run)
    return {"method": method, "keep": keep, "seed": seed, "top1": 100 * top1 if top1 <= 1 else top1, "passes": passes,
            "seconds": seconds, "choosing": chosen}  # fmt: skip


def _each_epoch(method: str, keep: float, epochs: int) -> dict[str, Any]:
    """The recipe's settings that make a training without a ticket cost what ``keep`` costs."""
    if method == "rs2":
        return {"dynamic": {"name": "rs2", "keep": keep}} if keep < 1 else {}
    if method == "shorter":
        number = round(keep * epochs)
        return {"epochs": number, "warmup_epochs": 0.1 * number}
    number = min(epochs, math.ceil(keep * epochs / 0.7))  # infobatch, at a saving of at most 0.3
    saving = round(1 - keep * epochs / number, 6)
    return {"epochs": number, "warmup_epochs": 0.1 * number, "dynamic": {"name": "infobatch", "saving": saving}}


class _alone:
    """One process at a time."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / ".lock").open("w")

    def __enter__(self) -> None:
        import fcntl

        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *fault: object) -> None:
        self._file.close()


def _tables(rows: list[Mapping[str, Any]], options: argparse.Namespace) -> Iterator[str]:
    """Mean and standard deviation over the seeds, in Markdown."""
    cells: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["keep"]), []).append(row["top1"])
    passes = {
        keep: statistics.mean(row["passes"] for row in rows if row["keep"] == keep)
        for keep in {r["keep"] for r in rows}
    }
    yield (f"{options.model} {options.args}, a pool of {options.pool:,} images, {options.epochs} epochs at batch {options.batch}, "
           f"{options.seeds} seeds: top-1, mean ± standard deviation")  # fmt: skip
    if ("shorter", 1.0) in cells:
        yield f"all images, {options.epochs} epochs: {_cell(cells['shorter', 1.0])}"
    for keeps, methods in ((options.keep, (*TICKETS, *EACH_EPOCH)), (options.near_one, EACH_EPOCH)):
        if not set(keeps) <= set(passes):  # none of the rows is in this table
            continue
        yield ""
        yield "| method | " + " | ".join(f"keep {keep:g} ({passes[keep]:,.0f} passes)" for keep in keeps) + " |"
        yield "| --- |" + " --- |" * len(keeps)
        for method in (each for each in methods if not options.only or each in options.only):
            yield f"| {method} | " + " | ".join(_cell(cells.get((method, keep))) for keep in keeps) + " |"
    yield ""
    cpu = sum(row["seconds"] for row in rows)
    yield f"{len(rows)} trainings, {cpu / 60:.0f} CPU minutes: {cpu / 60 / 2:.0f} minutes on two cores; proxies of {options.proxy} epochs not counted"


def _cell(values: list[float] | None) -> str:
    if values is None:
        return "cannot"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def _name(method: str, keep: float, seed: int) -> str:
    return f"{method}/{keep:g}/{seed}"


def _told(row: Mapping[str, Any]) -> str:
    return f"{row['method']}, keep {row['keep']:g}, seed {row['seed']}: {row['top1']:.2f}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an .npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--out", required=True, help="folder of the results; a second run goes on there")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, each with one thread")
    parser.add_argument("--pool", type=int, default=10_000, help="images to choose from")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--proxy", type=int, default=10, help="epochs of the proxy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*TICKETS, *EACH_EPOCH], metavar="ROW", help="only these rows")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--near-one", type=float, nargs="+", default=list(NEAR_ONE))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--args", type=json.loads, help="JSON for timm.create_model",
                        default={"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3})  # fmt: skip
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
