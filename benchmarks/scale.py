"""What a large data set takes of each stage, on made-up data: measured here, and what follows from it for larger ones.

    python benchmarks/scale.py --out runs/scale          # all parts, some 15 minutes of one core; goes on where it was stopped
    python benchmarks/scale.py --out runs/scale --only shards

Each part is measured in a process of its own and leaves its numbers in OUT/scale.json. Seconds are of one core, of all threads
together, whoever else is at work on the machine. docs/scale.md says what they mean.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

IMAGENET, CLASSES = 1_281_167, 1_000
SIZES = {"ImageNet-1k": 1_281_167, "ImageNet-21k": 14_197_122, "a billion": 1_000_000_000}
SHARDS = 10


def peak() -> float:
    """Bytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def shard(file: Path, images: int, side: int = 256) -> None:
    """Samples of WebDataset, JPEG of ``side`` pixels a side as a camera's: 50 pictures, over and over."""
    from PIL import Image

    rng, packed = np.random.default_rng(0), []
    for _ in range(50):
        rough = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        grain = np.asarray(rough, np.int16) + rng.normal(0, 6, (side, side, 3)).astype(np.int16)
        held = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(held, "JPEG", quality=90)
        packed.append(held.getvalue())
    with tarfile.open(file, "w") as tar:
        for number in range(images):
            for ending, content in (("jpg", packed[number % 50]), ("cls", str(number % 10).encode())):
                about = tarfile.TarInfo(f"{number:08d}.{ending}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))


def prepare(folder: Path, images: int) -> dict[str, float]:
    """A shard of JPEG, written as .beton on all cores that this process may use."""
    from lotus.config import Data
    from lotus.data import beton, loader
    from lotus.data.dataset import open_data

    tar = folder / "prepare.tar"
    shard(tar, images)
    data = Data(name="webdataset", path=str(tar))
    began = time.process_time()
    train, _ = open_data(data)
    indexed = time.process_time() - began
    began = time.process_time()
    for _ in beton.prepare(train, folder / "train.beton", data, choose=loader.writer):
        pass
    seconds, size = time.process_time() - began, (folder / "train.beton").stat().st_size
    for file in (tar, folder / "train.beton"):
        file.unlink()
    return {
        "images": len(train), "indexed_a_second": images / indexed, "images_a_second": len(train) / seconds, "bytes_an_image": size / len(train), "peak": peak(),
    }  # fmt: skip


def index(folder: Path, images: int) -> dict[str, float]:
    """What the index of shards holds of each image, and what a plan of training holds of each row."""
    from lotus.config import Data
    from lotus.data.dataset import open_data
    from lotus.data.sample_plan import SamplePlan

    tar = folder / "index.tar"
    shard(tar, images, side=8)
    tracemalloc.start()
    train, val = open_data(Data(name="webdataset", path=str(tar)))
    held = tracemalloc.get_traced_memory()[0] / (len(train) + len(val))
    tar.unlink()
    tracemalloc.reset_peak()
    before, rows = tracemalloc.get_traced_memory()[0], np.arange(IMAGENET)
    SamplePlan(rows, batch_size=1024).order(0)
    planned = (tracemalloc.get_traced_memory()[1] - before) / IMAGENET
    tracemalloc.stop()
    began = time.process_time()
    SamplePlan(rows, batch_size=1024).order(0)
    seconds = time.process_time() - began
    return {"images": images, "source_bytes_an_image": held, "plan_bytes_an_image": planned, "plan_seconds": seconds}


def scores(folder: Path, images: int) -> dict[str, float]:
    """The default ticket (dual, beta) from eight epochs of a proxy."""
    from selection.lottery import select
    from selection.signals import Signals

    rng = np.random.default_rng(0)
    labels = rng.integers(0, min(CLASSES, images // 100), images)
    p_label = rng.random((1, 8, images), np.float32)
    file = folder / "signals.npz"
    Signals({"labels": labels, "p_label": p_label}, fingerprint="made up").save(file)
    size = file.stat().st_size
    began = time.process_time()
    drawn = select(Signals.load(file), score="dual", pick="beta", keep=0.3).subset
    seconds = time.process_time() - began
    drawn.save(folder / "subset.npz")
    ticket = (folder / "subset.npz").stat().st_size
    file.unlink()
    return {
        "images": images, "seconds": seconds, "peak": peak(), "signals_bytes_an_image": size / images,
        "ticket_bytes_an_image": ticket / images,
    }  # fmt: skip


def clustered(images: int, classes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) in twenty clusters a class, and labels (N,)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    middle = rng.standard_normal((classes, 1, width), np.float32) + 0.7 * rng.standard_normal(
        (classes, 20, width), np.float32
    )
    found = np.empty((images, width), np.float16)
    for first in range(0, images, 65536):
        mine = labels[first : first + 65536]
        noise = rng.standard_normal((len(mine), width), np.float32)
        found[first : first + 65536] = middle[mine, rng.integers(0, 20, len(mine))] + 0.8 * noise
    return found, labels


def worth(embeddings: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> float:
    """The mean over all images of how well the one of ``rows`` in its class that is most like it represents it, 0 to 1."""
    from selection.neighbors import Cosine, slices

    total, taken = 0.0, np.isin(np.arange(len(labels)), rows)
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        kernel, among = Cosine(embeddings[members]), np.flatnonzero(taken[members])
        for part in slices(len(members), len(among)):
            total += float(kernel.block(part, among).max(1).sum(dtype=np.float64))
    return total / len(labels)


def by_shards(folder: Path, images: int, classes: int, width: int, keep: float = 0.1) -> dict[str, float]:
    """Facility location of the whole, and by shards: seconds and value."""
    from selection import shards
    from selection.lottery import select
    from selection.signals import Signals

    embeddings, labels = clustered(images, classes, width)
    signals = Signals({"labels": labels, "embeddings": embeddings}, fingerprint="made up")
    began = time.process_time()
    whole = select(signals, score="random", pick="facility_location", keep=keep).subset
    seconds = time.process_time() - began
    chance = select(signals, score="random", pick="random", keep=keep).subset
    dealt = np.array_split(np.random.default_rng(1).permutation(images), SHARDS)
    files = [folder / f"shard-{number}.npz" for number in range(SHARDS)]
    for file, rows in zip(files, dealt, strict=True):
        np.savez(file, embeddings=embeddings[rows], labels=labels[rows])
    spent: list[float] = []

    def timed(function: Callable[[Any], Any], items: Any) -> Any:
        for item in items:
            then = time.process_time()
            found = function(item)
            if function is shards.first:
                spent.append(time.process_time() - then)
            yield found

    began = time.process_time()
    subset, _ = shards.select([str(file) for file in files], shards.Sharded(keep), timed)
    sharded = time.process_time() - began
    for file in files:
        file.unlink()
    values = {
        "whole": worth(embeddings, labels, whole.rows), "sharded": worth(embeddings, labels, np.concatenate(dealt)[subset.rows]),
        "random": worth(embeddings, labels, chance.rows),
    }  # fmt: skip
    return {
        "images": images, "classes": classes, "width": width, "keep": keep, "shards": SHARDS, "seconds_whole": seconds,
        "seconds_sharded": sharded, "seconds_a_shard": float(np.mean(spent)), "peak": peak(), **values,
    }  # fmt: skip


PARTS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "prepare": lambda folder, less: prepare(folder, 8_000 // less),
    "prepare_few": lambda folder, less: prepare(folder, 2_000 // less),
    "index": lambda folder, less: index(folder, 50_000 // less),
    "scores": lambda folder, less: scores(folder, IMAGENET // less),
    "shards": lambda folder, less: by_shards(folder, IMAGENET // less, CLASSES // less, 128),
    "shards_unbalanced": lambda folder, less: by_shards(folder, 100_000 // less, 2, 64),
}
"""By name, given a folder and by how much less than all is to be made."""


def follows(found: dict[str, dict[str, float]]) -> list[str]:
    """What the parts that are there say of larger data sets, in proportion to the images."""
    lines = []
    for name, images in SIZES.items():
        told = []
        if "prepare" in found:
            one = found["prepare"]
            hours = images / one["images_a_second"] / 3600
            told.append(f".beton {images * one['bytes_an_image'] / 1e9:,.0f} GB, prepare {hours:,.1f} core hours")
        if "index" in found:
            one = found["index"]
            told.append(
                f"source {images * one['source_bytes_an_image'] / 1e9:,.1f} GB, plan {images * one['plan_bytes_an_image'] / 1e9:,.1f} GB of memory"
            )
        if "scores" in found:
            one = found["scores"]
            told.append(
                f"signals {images * one['signals_bytes_an_image'] / 1e9:,.1f} GB, ticket {images * one['seconds'] / one['images']:,.0f} s"
            )
        if "shards" in found:
            one = found["shards"]
            told.append(f"facility location {images * one['seconds_sharded'] / one['images'] / 3600:,.2f} core hours")
        lines.append(f"{name:14} {'; '.join(told)}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/scale", help="a folder for scale.json and what is made on the way")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    parser.add_argument("--tiny", action="store_true", help="a hundredth of the images: only shows that it works")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)  # one part in this process, printed as JSON
    options = parser.parse_args(arguments)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if options.inside:
        print(json.dumps(PARTS[options.inside](folder, 100 if options.tiny else 1)))
        return
    file = folder / "scale.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    for part in options.only or PARTS:
        if part not in found:
            command = [sys.executable, __file__, "--out", str(folder), "--inside", part, *["--tiny"] * options.tiny]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[part] = json.loads(done.stdout.strip().splitlines()[-1])
            file.write_text(json.dumps(found, indent=1))
        print(f"{part:18} " + ", ".join(f"{name} {value:,.4g}" for name, value in found[part].items()), flush=True)
    print("\nIn proportion:", *follows(found), sep="\n")


if __name__ == "__main__":
    main()
