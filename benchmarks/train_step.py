"""What LOTUS costs beside a bare PyTorch loop. One command, one run:

    python benchmarks/train_step.py                     # the figures: ratio at least 0.95, gates at most 3 %
    python benchmarks/train_step.py --optimizer muon    # the same with the optimizer of the default configs
    python benchmarks/train_step.py --tiny              # seconds; only shows that it works

Trainings of the same ViT on the same images take turns, a block of steps each, in an order that rotates:

    bare         a loop of ten lines on float tensors in memory: the same optimizer, cross-entropy, nothing else
    lotus        engine, clipping, the finite check, gates with their penalty, and the loader on a .beton, augmenting
    no gates     the same without gates
    cut          the same as "no gates", of the model cut to ``--cut`` of its multiply-accumulates; only where that is asked for
    compiled     the same as "no gates", with ``train.compile``; only with ``--compile``
    evaluation   as many images as the others train on, measured on; only with ``--evaluate``: at least 2.0 times as fast as they train

The figures are medians over the blocks of what stands side by side in one block, so that a machine that slows down
slows down all three. ``stall`` is the part of the time of "no gates" for which it waited for images, wanted below 2 %. ``--clock cpu`` counts what the process computes in place of what the clock says, for a machine that
has other work.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

import lotus.pruning
from lotus.config import Augment, Data, Model, Sparsity, Train, as_request
from lotus.data import beton
from lotus.data.base import Batch
from lotus.data.loader import open_loader, writer
from lotus.data.sample_plan import SamplePlan
from lotus.data.source import Source
from lotus.data.views import Look
from lotus.sparsity.gates import Gates
from lotus.training.distributed import World, start
from lotus.training.engine import Engine
from lotus.training.evaluation import evaluate
from lotus.training.guests import Position
from lotus.training.lesson import Lesson
from lotus.training.objective import Objective
from lotus.training.optim import make_optimizer
from lotus.vit.cost import macs
from lotus.vit.model import create, image_size

CLASSES = 10
LEAST_RATIO, MOST_GATES, MOST_STALL, LEAST_EVALUATION = 0.95, 0.03, 0.02, 2.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], None]


def main() -> int:
    """Run; 1 with ``--check`` where a figure is missed."""
    options = _parse()
    torch.manual_seed(0)
    world = start(options.device)
    recipe = Train(
        optimizer=options.optimizer, batch_size=options.batch, zero=options.zero, precision=options.precision, epochs=10**6
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as loaders:
        source = _drawn(max(options.images, options.steps * options.batch), options.side)
        file = Path(folder) / "train.beton"
        for _ in beton.prepare(source, file, Data(write="raw", max_side=0), choose=writer):
            pass
        threads = torch.get_num_threads()
        lotus = functools.partial(_lotus, file=file, world=world, options=options, loaders=loaders)
        waited: list[float] = []
        arms: dict[str, Step] = {
            "bare": _bare(_vit(options), source, recipe, world),
            "lotus": lotus(_vit(options), recipe=recipe, gated=True),
            "no gates": lotus(_vit(options), recipe=recipe, waited=waited),
        }
        costs = dict.fromkeys(arms, _macs(_vit(options)))
        if options.cut:
            small = _cut(_vit(options), options.cut)
            costs["cut"] = _macs(small)
            arms["cut"] = lotus(small, recipe=recipe)
        if options.compile:
            costs["compiled"] = costs["bare"]
            arms["compiled"] = lotus(_vit(options), recipe=recipe.model_copy(update={"compile": True}))
        if options.evaluate:
            arms["evaluation"] = _evaluation(_vit(options), file, world, options, loaders)
        assert torch.get_num_threads() == threads, "a loader changed how many threads torch works with"
        seconds = _take_turns(arms, options.blocks, options.steps, world, CLOCKS[options.clock])
        # The first block warmed up, and each block is as long as another.
        stall = sum(waited[options.steps :]) / sum(seconds["no gates"])
    return _tell(options, seconds, threads, costs, stall)


def _take_turns(
    arms: dict[str, Step], blocks: int, steps: int, world: World, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each block of each arm; a first block warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for block in range(blocks + 1):
        for name in names[block % len(names) :] + names[: block % len(names)]:
            began = clock()
            for _ in range(steps):
                arms[name]()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if block:
                seconds[name].append(clock() - began)
    return seconds


def _bare(model: nn.Module, source: Source, recipe: Train, world: World) -> Step:
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    model = model.to(world.device, dtype).train()
    pixels = np.stack([source.read(row) for row in range(len(source.labels))])
    images = ((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25).contiguous()
    images, labels = images.to(world.device, dtype), torch.from_numpy(source.labels).to(world.device)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "muon":
        optimizer = make_optimizer(model, recipe)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, foreach=True)

    def order() -> Iterator[torch.Tensor]:
        while True:
            yield from torch.randperm(len(images)).split(recipe.batch_size)

    rows = order()

    def step() -> None:
        index = next(rows)
        loss = F.cross_entropy(model(images[index]).float(), labels[index], label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _lotus(
    model: nn.Module,
    *,
    file: Path,
    recipe: Train,
    world: World,
    options: argparse.Namespace,
    loaders: contextlib.ExitStack,
    gated: bool = False,
    waited: list[float] | None = None,
) -> Step:
    """``waited`` gets the seconds for which each step waited for its images."""
    manifest = beton.Manifest.load(file)
    plan = SamplePlan(np.arange(manifest.n), seed=0, batch_size=recipe.batch_size)
    look = Look(size=options.side, augment=Augment(crop="pad", flip=True), mean=manifest.mean, std=manifest.std)
    loader = open_loader(file, plan, look, device=world.device, kind=options.loader, workers=options.workers)
    loaders.callback(loader.close)
    gates = Gates(model, Sparsity(start=0), target=0.5, device=world.device) if gated else None
    engine = Engine(model, make_optimizer(model, recipe), recipe, world)
    engine.module.train()
    lesson = Lesson(engine, plan, Objective(recipe, CLASSES, 0))

    def epochs() -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1

    def fed(batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            if waited is not None:
                waited.append(time.perf_counter() - asked)
            yield batch

    batches, done = fed(epochs()), 0

    def step() -> None:
        nonlocal done
        lesson.give(batches, Position(step=done), 1)
        finite = engine.step(recipe.lr)
        done += 1
        if gates is not None and finite:
            gates.step(min(done / 10**4, 1.0))

    return step


def _evaluation(
    model: nn.Module, file: Path, world: World, options: argparse.Namespace, loaders: contextlib.ExitStack
) -> Step:
    """At the first of a block's steps all images of the block, at the others nothing."""
    manifest = beton.Manifest.load(file)
    rows = np.arange(options.steps * options.batch)
    look = Look(size=options.side, mean=manifest.mean, std=manifest.std)
    plan = SamplePlan.evaluation(rows, batch_size=options.batch)
    loader = open_loader(file, plan, look, device=world.device, kind=options.loader, workers=options.workers)
    loaders.callback(loader.close)
    recipe = Train(precision=options.precision, batch_size=options.batch)
    engine, done = Engine(model, make_optimizer(model, recipe), recipe, world), 0

    def step() -> None:
        nonlocal done
        if done % options.steps == 0:
            engine.module.eval()
            evaluate(engine.forward, loader, world)
        done += 1

    return step


def _drawn(count: int, side: int) -> Source:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Source(
        labels=np.arange(count) % CLASSES,
        classes=tuple(f"class {number}" for number in range(CLASSES)),
        read=lambda row: pixels[row],
        name=lambda row: f"drawn {row}",
        fingerprint=f"drawn {count} {side}",
    )


def _vit(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    args = {
        "img_size": options.side, "patch_size": options.patch, "embed_dim": options.width, "depth": options.depth,
        "num_heads": options.heads,
    }  # fmt: skip
    return create(Model(name="vit_tiny_patch16_224", args=args), CLASSES)


def _cut(model: nn.Module, keep: float) -> nn.Module:
    """``model`` with ``keep`` of its multiply-accumulates; which units go makes no difference to the time."""
    request = as_request({"criterion": "magnitude", "rotate": False, "compensate": "none", "keep": {"macs": keep}})
    return lotus.pruning.study(model, [], request).draw(request).model


def _macs(model: nn.Module) -> int:
    return macs(model, image_size(model))


def _tell(
    options: argparse.Namespace, seconds: dict[str, list[float]], threads: int, costs: dict[str, int], stall: float
) -> int:
    images = options.steps * options.batch
    speed = {name: images / statistics.median(taken) for name, taken in seconds.items()}
    # A step is three forwards, a MAC is two.
    flops = {name: 6 * costs[name] * value / 1e12 for name, value in speed.items() if name in costs}
    ratio = statistics.median(bare / lotus for bare, lotus in zip(seconds["bare"], seconds["lotus"], strict=True))
    gates = statistics.median(1 - off / on for on, off in zip(seconds["lotus"], seconds["no gates"], strict=True))
    more = {
        name: statistics.median(off / on for on, off in zip(seconds[name], seconds["no gates"], strict=True))
        for name in ("compiled", "evaluation")
        if name in seconds
    }
    good = ratio >= LEAST_RATIO and gates <= MOST_GATES and stall <= MOST_STALL
    good &= more.get("evaluation", LEAST_EVALUATION) >= LEAST_EVALUATION
    if options.json:
        told = {
            "images_per_second": speed, "teraflops": flops, "macs": costs, "ratio": ratio, "gates_share": gates, "stall": stall,
            **more, "good": good, "seconds": seconds,
        }  # fmt: skip
        print(json.dumps({**told, "settings": vars(options), "threads": threads, "torch": torch.__version__}))
    else:
        print(f"ViT {options.width} x {options.depth}, {options.patch}-pixel patches of {options.side}, batch {options.batch}, "
              f"{options.precision}, {options.optimizer}, ZeRO {options.zero}, {threads} threads, {options.blocks} blocks of {options.steps} steps")  # fmt: skip
        for name, value in speed.items():
            told = f" {flops[name]:9.3f} TFLOP/s" if name in flops else ""
            print(f"  {name:10}{value:10.1f} images/s{told}")
        print(f"  lotus / bare    {ratio:6.3f}    wanted: at least {LEAST_RATIO:.2f}")
        print(f"  gates' share    {gates:6.1%}    wanted: at most {MOST_GATES:.0%}")
        print(f"  stall           {stall:6.1%}    wanted: at most {MOST_STALL:.0%}")
        for name, value in more.items():
            told = "without" if name == "compiled" else f"training; wanted: at least {LEAST_EVALUATION}"
            print(f"  {name:16}{value:6.2f} times as fast as {told}")
    return 1 if options.check and not good else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, value in (("width", 128), ("depth", 6), ("heads", 4), ("patch", 8), ("side", 32), ("batch", 128),
                        ("images", 8192), ("blocks", 15), ("steps", 10), ("zero", 1), ("workers", 0)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{value} by default")
    parser.add_argument(
        "--cut", type=float, default=0.0, help="also the model cut to this fraction of its MACs; 0: not"
    )
    parser.add_argument("--compile", action="store_true", help="also with train.compile")
    parser.add_argument("--evaluate", action="store_true", help="also the speed of an evaluation")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--loader", choices=("auto", "ffcv", "torch"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: as torch finds them")
    parser.add_argument("--tiny", action="store_true", help="small settings that take seconds")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure is missed")
    options = parser.parse_args()
    if options.tiny:
        small = {"width": 32, "depth": 2, "heads": 2, "side": 16, "batch": 16, "images": 64, "blocks": 3, "steps": 2}
        vars(options).update(small)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
