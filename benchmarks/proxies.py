"""Whether a linear probe on frozen features ranks images as a short training does. One command, one run:

    python benchmarks/proxies.py CIFAR10.npz          # 5,000 images, 5 CPU minutes
    python benchmarks/proxies.py --tiny               # scikit-learn's digits; only shows that it works

An .npz has x_train, y_train. Every score is computed from each proxy's signals. The table holds Spearman's rank correlation:
between two trainings that differ by their seed, which nothing can be expected to beat by much, and between each linear probe and
these two (the mean). The features are of a small ViT, since pretrained ones are not at hand here:

    random        as it starts
    own           after a few epochs on the same images
    other         after as many epochs as the training has, on other images of the same data set

Below the scores stands what each cost, in passes of a model over the images: forward 1, forward and backward 3.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from lotus import stages
from lotus.config import check
from lotus.run import Run
from selection import methods, scores
from selection.signals import Signals

WARM = 3
"""Epochs of the model whose features are called "own"."""


def main() -> None:
    options = _parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        found = proxies(options, folder)
    first, second = found["trained"], found["trained again"]
    linear = {name: run for name, run in found.items() if name not in ("trained", "trained again")}
    print(f"{'':18}{'two trainings':>14}" + "".join(f"{name:>10}" for name in linear))
    for name in methods.names(scores):
        if name == "random":
            continue
        given = [values(signals, name) for signals in (first, second, *linear.values())]
        if any(value is None for value in given):
            continue
        a, b, *others = given
        row = [spearman(a, b), *((spearman(a, c) + spearman(b, c)) / 2 for c in others)]
        print(f"{name:18}{row[0]:14.2f}" + "".join(f"{value:10.2f}" for value in row[1:]))
    right = [signals["correct"][0, -1].mean() for signals in (first, *linear.values())]
    print(f"{'right at the end':18}{right[0]:14.2f}" + "".join(f"{value:10.2f}" for value in right[1:]))
    cost = {name: passes[0] for name, passes in COSTS.items()}
    print(f"{'passes':18}{cost['trained']:14.0f}" + "".join(f"{cost[name]:10.0f}" for name in linear))


COSTS: dict[str, tuple[float]] = {}


def proxies(options: argparse.Namespace, folder: Path) -> dict[str, Signals]:
    """Signals by the name of the proxy; trainings that features come from are made on the way."""
    data, other = _data(options, folder)
    subsets = {"runs": options.runs, "fraction": 0.5} if options.runs else None
    train = {"epochs": options.epochs, "batch_size": 128, "lr": 1e-3, "evaluate_every": 0, "sparsity": {"gates": False}}

    def made(name: str, until: str, seed: int = 0, **more: Any) -> Run:
        settings: dict[str, Any] = {"data": data, "model": options.model, "seed": seed, "train": train, "device": "cpu"}
        config = check({**settings, "folder": str(folder / name), **more})
        for event in stages.go(config, until=until):
            if type(event).__name__ == "Ended":
                print(f"# {name}: {event.stage}", file=sys.stderr, flush=True)
        return Run(config)

    def passes(run: Run, stage: str) -> float:
        record = json.loads((run.folder / "stages" / f"{stage}.json").read_text())
        return float(record["image_forwards"])

    images = 1.0

    def recorded(name: str, before: float = 0.0, **more: Any) -> Signals:
        nonlocal images
        run = made(name, "score", **more)
        signals = Signals.load(run.signals)
        images = signals.images
        COSTS[name] = ((before + passes(run, "score")) / images,)
        return signals

    short = {"epochs": options.epochs, "seeds": 1, "subsets": subsets}
    heads = {"proxy": "linear_probe", "subsets": subsets}
    found = {
        "trained": recorded("trained", score=short),
        "trained again": recorded("trained again", seed=77, score=short),
    }
    found["random"] = recorded("random", score=heads)
    own = made("own-model", "train", seed=5, train={**train, "epochs": WARM})
    weights = {"model": {"weights": str(own.of("train"))}}
    found["own"] = recorded("own", passes(own, "train"), score={**heads, **weights})
    if other:
        far = made("other-model", "train", seed=6, data=other)
        weights = {"model": {"weights": str(far.of("train"))}}
        found["other"] = recorded("other", passes(far, "train"), score={**heads, **weights})
    return found


def values(signals: Signals, name: str) -> np.ndarray | None:
    """What a score gives; None where the proxy did not record what it reads."""
    method = getattr(scores, name)
    if any(read not in signals for read in methods.reads(method)):
        return None
    return np.asarray(methods.call(method, signals.available(), {}, place=name))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks, equal values sharing the mean of theirs."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def _data(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if options.tiny:
        return {"name": "digits", "write": "raw"}, None
    with np.load(options.data, allow_pickle=False) as whole:
        x, y = whole["x_train"], whole["y_train"].reshape(-1)
        test = {"x_test": whole["x_test"][:500], "y_test": whole["y_test"][:500]}
    order = np.random.default_rng(0).permutation(len(y))
    made = []
    for number in range(2):
        rows = np.sort(order[number * options.images : (number + 1) * options.images])
        path = folder / f"images-{number}.npz"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, x_train=x[rows], y_train=y[rows], **test)
        made.append({"name": "npz", "path": str(path), "write": "raw"})
    return made[0], made[1]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="?", help="an .npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=8, help="of the short training")
    parser.add_argument("--runs", type=int, default=2, help="on halves of the images, for memorization; 0: none")
    parser.add_argument("--folder", help="keep the runs here")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not options.data:
        parser.error("give an .npz, or --tiny")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    if options.tiny:
        args |= {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
        options.epochs = 3
    options.model = {"name": "vit_tiny_patch16_224", "args": args}
    return options


if __name__ == "__main__":
    main()
