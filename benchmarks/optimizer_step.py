"""What fraction of a training step the optimizer takes. One command, one run:

    python benchmarks/optimizer_step.py            # the figure: Muon at most 15 % of a step of the ViT 128 x 6
    python benchmarks/optimizer_step.py --width 384 --depth 12 --heads 6 --patch 16 --side 224 --batch 256 --most 0.02
    python benchmarks/optimizer_step.py --tiny     # seconds; only shows that it works

AdamW and Muon train the same ViT through the engine on images that lie in memory, a block of steps each, in turns. Timed
are the whole step, forward and backward included, and of it what torch's hooks before and after the optimizer enclose:
the orthogonalization, the momentum and the moving of weights, and what of it ZeRO calls more than once. Told are medians
over all steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from lotus.config import Model, Train
from lotus.training.distributed import World, start
from lotus.training.engine import Engine
from lotus.training.optim import make_optimizer
from lotus.vit.model import create

CLASSES = 10
RATES = {"adamw": 1e-3, "muon": 3e-3}
Step = Callable[[], tuple[float, float]]


def main() -> int:
    """Run; 1 with ``--check`` where the figure is missed."""
    options = _parse()
    world = start(options.device)
    steps = {name: _training(name, options, world) for name in RATES}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in RATES}
    for block in range(options.blocks + 1):
        for name, step in steps.items():
            taken = [step() for _ in range(options.steps)]
            if block:  # the first one warms up
                seconds[name] += taken
    return _tell(options, seconds)


def _training(name: str, options: argparse.Namespace, world: World) -> Step:
    """A step of a training by optimizer ``name``: its seconds, and those of the optimizer."""
    torch.manual_seed(0)
    args = {
        "img_size": options.side, "patch_size": options.patch, "embed_dim": options.width, "depth": options.depth,
        "num_heads": options.heads,
    }  # fmt: skip
    model = create(Model(name="vit_tiny_patch16_224", args=args), CLASSES)
    recipe = Train(
        batch_size=options.batch, zero=options.zero, precision=options.precision, optimizer=name, lr=RATES[name]
    )
    optimizer = make_optimizer(model, recipe)
    clock, spent = _clock(world), [0.0]

    def before(*_: Any) -> None:
        spent[0] -= clock()

    def after(*_: Any) -> None:
        spent[0] += clock()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    engine = Engine(model, optimizer, recipe, world)
    engine.module.train()
    images = torch.randn(options.batch, 3, options.side, options.side, device=world.device)
    labels = torch.arange(options.batch, device=world.device) % CLASSES

    def step() -> tuple[float, float]:
        spent[0], began = 0.0, clock()
        engine.backward(F.cross_entropy(engine.forward(images).float(), labels, label_smoothing=recipe.smoothing))
        engine.step(recipe.lr)
        return clock() - began, spent[0]

    return step


def _clock(world: World) -> Callable[[], float]:
    def clock() -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _tell(options: argparse.Namespace, seconds: dict[str, list[tuple[float, float]]]) -> int:
    shares = {name: statistics.median(own / whole for whole, own in taken) for name, taken in seconds.items()}
    steps = {name: statistics.median(whole for whole, _ in taken) for name, taken in seconds.items()}
    good = shares["muon"] <= options.most
    if options.json:
        told = {"share": shares, "seconds_a_step": steps, "good": good, "settings": vars(options)}
        print(json.dumps({**told, "threads": torch.get_num_threads(), "torch": torch.__version__}))
    else:
        print(f"ViT {options.width} x {options.depth}, {options.patch}-pixel patches of {options.side}, batch {options.batch}, "
              f"{options.precision}, ZeRO {options.zero}, {torch.get_num_threads()} threads, {options.blocks * options.steps} steps each")  # fmt: skip
        for name, share in shares.items():
            print(f"  {name:6}{1000 * steps[name]:9.1f} ms a step, of which the optimizer {share:6.1%}")
        print(f"  wanted: at most {options.most:.0%} with Muon")
    return 1 if options.check and not good else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, value in (("width", 128), ("depth", 6), ("heads", 4), ("patch", 8), ("side", 32), ("batch", 128),
                        ("blocks", 10), ("steps", 10), ("zero", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{value} by default")
    parser.add_argument("--most", type=float, default=0.15, help="largest share that is wanted of Muon")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: as torch finds them")
    parser.add_argument("--tiny", action="store_true", help="small settings that take seconds")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the figure is missed")
    options = parser.parse_args()
    if options.tiny:
        vars(options).update({"width": 32, "depth": 2, "heads": 2, "side": 16, "batch": 16, "blocks": 2, "steps": 2})
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
