"""How fast, how large and how good the pickers are, on made-up embeddings. Needs no training and no torch.

    python benchmarks/selection.py                  # every picker: 50,000 images, 384 wide, a tenth kept, over all classes at once
    python benchmarks/selection.py herding d2       # these only
    python benchmarks/selection.py --imagenet       # facility_location, k_center, craig: 1,281,167 images, class by class,
                                                    from a file of 3.5 GB
    python benchmarks/selection.py --value          # facility_location's value against exact greedy's, 5,000 images
    python benchmarks/selection.py --apricot        # the same problem as apricot-select (pip install apricot-select), 20,000 images
    python benchmarks/selection.py --gradients      # closed forms against gradients that are written out
    python benchmarks/selection.py --dynamic         # dynamic data pruning, at ImageNet's size

Every row is measured in a process of its own: seconds are of the picker alone (with --imagenet, of all that `lotus select` does,
reading the file included); peak memory is of the whole process, Python and the data included. Set OMP_NUM_THREADS to say how many cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from selection import dynamic, methods, pickers
from selection.dynamic_pruning import State, epoch_subset
from selection.gradients import Gradients
from selection.lottery import ranking, reads, select
from selection.neighbors import Cosine
from selection.signals import Signals

IMAGENET = 1_281_167, 1_000


def made_up(n: int, classes: int, width: int, *, seed: int = 0, error_classes: int | None = None) -> dict[str, Any]:
    """Signals of n images: embeddings in some 20 clusters a class, and predictions that follow from them."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, classes, n))
    cluster = labels * 20 + rng.integers(0, 20, n)
    middle = rng.standard_normal((classes, width), np.float32)[:, None] + 0.7 * rng.standard_normal(
        (classes, 20, width), np.float32
    )
    middle = middle.reshape(-1, width)
    columns = error_classes or classes
    heads = rng.standard_normal((columns, width), np.float32) / np.sqrt(width)
    embeddings = np.empty((n, width), np.float16)
    errors = np.empty((n, columns), np.float16)
    p_label = np.empty(n, np.float32)
    for first in range(0, n, 4096):
        rows = slice(first, min(n, first + 4096))
        x = middle[cluster[rows]] + 0.8 * rng.standard_normal((rows.stop - first, width), np.float32)
        z = 2 * x @ heads.T
        own = labels[rows] % columns
        z[np.arange(len(own)), own] += rng.gamma(2.0, 2.0, len(own))
        z = np.exp(z - z.max(1, keepdims=True))
        z /= z.sum(1, keepdims=True)
        p_label[rows] = z[np.arange(len(own)), own]
        z[np.arange(len(own)), own] -= 1
        embeddings[rows], errors[rows] = x, z
    return {
        "labels": labels,
        "embeddings": embeddings,
        "errors": errors,
        "p_label": p_label[None, None],
        "scores": (1 - p_label).astype(np.float64),
    }


def told(signals: dict[str, Any], budget: int, keep: float, seed: int = 0) -> dict[str, Any]:
    """What the lottery would tell a picker."""
    return {
        **signals,
        "ranking": ranking(signals["scores"], np.random.default_rng([seed, 1])),
        "budget": budget,
        "keep": keep,
        "quotas": None,  # over all classes at once
        "rng": np.random.default_rng([seed, 2]),
        "start": np.empty(0, np.int64),
    }


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def one(name: str, images: int, width: int, keep: float) -> dict[str, Any]:
    available = told(made_up(images, 10, width), round(keep * images), keep)
    picker = getattr(pickers, name)
    began = time.perf_counter()
    methods.call(picker, available, {}, place=name)
    return {"seconds": time.perf_counter() - began, "peak_gb": peak_gb()}


def imagenet(name: str, images: int, width: int, keep: float, file: str) -> dict[str, Any]:
    """As ``lotus select`` does it: the signals read from a file, then class by class."""
    began = time.perf_counter()
    signals = Signals.load(file, only=reads("random", name))
    read = time.perf_counter() - began
    subset = select(signals, score="random", pick=name, keep=keep).subset
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "peak_gb": peak_gb(),
        "note": f"{len(subset):,} taken; {read:.0f} s of it to read the file",
    }


def imagenet_file(images: int, width: int, keep: float, file: str) -> dict[str, Any]:
    """Signals of so many images, in classes of ImageNet's size; the last layer's errors make most of it."""
    began = time.perf_counter()
    made = made_up(images, max(1, round(images * IMAGENET[1] / IMAGENET[0])), width)
    arrays = {name: made[name] for name in ("labels", "embeddings", "errors")}
    for array in arrays.values():
        array.setflags(write=False)
    Signals(arrays, fingerprint="made up").save(file)
    return {"seconds": time.perf_counter() - began, "peak_gb": peak_gb()}


def worth(matrix: np.ndarray, rows: np.ndarray) -> float:
    return float(matrix[:, rows].max(1).sum(dtype=np.float64))


def value(name: str, images: int, width: int, keep: float) -> dict[str, Any]:
    signals = made_up(images, 10, width)
    budget = round(keep * images)
    kernel = Cosine(signals["embeddings"])
    matrix = kernel.block(slice(None))
    cover, exact = np.zeros(images, np.float32), []
    for _ in range(budget):  # exact greedy to the letter: every gain, every time
        gains = np.concatenate(
            [np.maximum(matrix[part : part + 256] - cover, 0).sum(1) for part in range(0, images, 256)]
        )
        gains[exact] = -1
        exact.append(int(gains.argmax()))
        cover = np.maximum(cover, matrix[exact[-1]])
    available = told(signals, budget, keep)
    options = {} if name == "random" else {"maximizer": name}
    picker = pickers.random if name == "random" else pickers.facility_location
    began = time.perf_counter()
    rows = methods.call(picker, available, options, place=name)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "peak_gb": peak_gb(),
        "note": f"{worth(matrix, rows) / worth(matrix, np.array(exact)):.4f} of exact",
    }


def apricot(name: str, images: int, width: int, keep: float) -> dict[str, Any]:
    """Both from the same embeddings to the rows: apricot's similarity and ours are made inside."""
    signals = made_up(images, 10, width)
    budget = round(keep * images)
    if name == "apricot":
        try:
            from apricot import FacilityLocationSelection
        except ImportError:
            return {
                "seconds": float("nan"),
                "peak_gb": float("nan"),
                "note": "not installed: pip install apricot-select",
            }
        x = signals["embeddings"].astype(np.float32)
        began, cpu = time.perf_counter(), time.process_time()
        rows = np.asarray(FacilityLocationSelection(budget, metric="cosine", optimizer="lazy").fit(x).ranking)
    else:
        available = told(signals, budget, keep)
        began, cpu = time.perf_counter(), time.process_time()
        rows = methods.call(pickers.facility_location, available, {"maximizer": name, "max_memory": 4.0}, place=name)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    kernel = Cosine(signals["embeddings"])
    represented = sum(
        float(kernel.block(slice(first, first + 1024), rows).max(1).sum(dtype=np.float64))
        for first in range(0, images, 1024)
    )
    return {"seconds": seconds, "peak_gb": peak_gb(), "note": f"value {represented:.6g}; {cpu:.2f} s of CPU"}


def gradients(name: str, images: int, width: int, keep: float) -> dict[str, Any]:
    signals = made_up(images, 10, width)
    dtype = np.dtype(name).type
    errors, features = signals["errors"].astype(np.float64), signals["embeddings"].astype(np.float64)
    began = time.perf_counter()
    closed = Gradients(errors, features, dtype=dtype)
    norms, inner, total = closed.norms, closed.inner(slice(0, 200)), closed.total()
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    explicit = np.einsum("nc,nd->ncd", errors, np.c_[features, np.ones(images)]).reshape(images, -1)
    true_norms, true_inner = np.linalg.norm(explicit, axis=1), explicit[:200] @ explicit.T
    written_out = time.perf_counter() - began
    scale = np.outer(true_norms[:200], true_norms)
    worst = max(
        float(np.abs(norms / true_norms - 1).max()),
        float((np.abs(inner - true_inner) / scale).max()),
        float(np.abs(total.ravel() - explicit.sum(0)).max() / np.abs(explicit).sum(0).max()),
    )
    return {"seconds": seconds, "peak_gb": peak_gb(), "note": f"error {worst:.1e}; written out {written_out:.2f} s"}


def dynamically(name: str, images: int, width: int, keep: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    state = State(rng.integers(0, 1_000, images))
    for epoch in range(2):
        state.add(np.arange(images), rng.gamma(1.0, 1.0, images))
        state.end(epoch)
    began = time.perf_counter()
    drawn = epoch_subset(state, pick=name, epoch=20, epochs=30, keep=0.5)
    return {
        "seconds": time.perf_counter() - began,
        "peak_gb": peak_gb(),
        "note": f"{len(drawn.rows) / images:.0%} drawn",
    }


TASKS: dict[str, tuple[Callable[..., dict[str, Any]], list[str], dict[str, Any]]] = {
    "pickers": (one, methods.names(pickers), {"images": 50_000, "width": 384, "keep": 0.1}),
    "imagenet": (
        imagenet,
        ["facility_location", "k_center", "craig"],
        {"images": IMAGENET[0], "width": 384, "keep": 0.1},
    ),
    "value": (value, ["lazy", "sparse", "stochastic", "random"], {"images": 5_000, "width": 384, "keep": 0.1}),
    "apricot": (apricot, ["apricot", "lazy", "sparse"], {"images": 20_000, "width": 384, "keep": 0.05}),
    "gradients": (gradients, ["float32", "float64"], {"images": 2_000, "width": 384, "keep": 0.1}),
    "dynamic": (dynamically, methods.names(dynamic), {"images": IMAGENET[0], "width": 0, "keep": 0.5}),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="measure these only")
    for task in TASKS:
        if task != "pickers":
            parser.add_argument(f"--{task}", action="store_true")
    parser.add_argument("--images", type=int, help="instead of the number in the issue")
    parser.add_argument("--keep", type=float)
    parser.add_argument("--file", help=argparse.SUPPRESS)  # of signals, that was made for this
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # measure one row in this process, and print it as JSON
    options = parser.parse_args(arguments)
    task = next((task for task in TASKS if task != "pickers" and getattr(options, task)), "pickers")
    function, names, settings = TASKS[task]
    settings = {**settings, **{k: v for k in ("images", "keep") if (v := getattr(options, k)) is not None}}
    if options.inside:
        if options.file:
            settings["file"] = options.file
        made = imagenet_file(**settings) if options.inside == "file" else function(options.inside, **settings)
        print(json.dumps(made))
        return
    unknown = sorted(set(options.names) - set(names))
    if unknown:
        parser.error(f"no {unknown[0]!r} here; there are {', '.join(names)}")
    print(f"{task}: {settings['images']:,} images, {settings['width']} wide, keep {settings['keep']:g}, "
          f"{os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads")  # fmt: skip
    print(f"{'':20} {'seconds':>9} {'peak GB':>9}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--images", str(settings["images"]), "--keep", str(settings["keep"])]
        if task != "pickers":
            command.append(f"--{task}")
        if (
            task == "imagenet"
        ):  # made in a process of its own: what a child is said to peak at is never below its parent's peak
            command += ["--file", str(Path(folder) / "signals.npz")]
            subprocess.run([*command, "--inside", "file"], stdout=subprocess.DEVNULL, check=True)
        for name in options.names or names:
            done = subprocess.run([*command, "--inside", name], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name:20} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            row = json.loads(done.stdout)
            print(f"{name:20} {row['seconds']:9.2f} {row['peak_gb']:9.2f}  {row.get('note', '')}", flush=True)


if __name__ == "__main__":
    main()
