"""What pruning itself costs: seconds of each step, and memory. One command, no data, no training (time knows no weights):

    python benchmarks/prune_cost.py            # ViT-S/16 at 224 px, the 512 images that LOTUS then looks at
    python benchmarks/prune_cost.py --embed-dim    # where cutting units alone goes too far, and a smaller embedding dimension is tried in vain
    python benchmarks/prune_cost.py --tiny     # seconds; only shows that it works

The images are noise, drawn a batch at a time while the clock is stopped. To be reached: 90 s on two cores, and no more memory at
the peak than twice the model's and the statistics', beyond what Python, torch and the model take before (a process of its own,
so that the peak is the pruning's alone). Activations of a few images, which are neither, are in the peak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

import lotus.pruning
from lotus.config import Model, as_request
from lotus.pruning import budget, compensate, measure, narrow, rotate, scoring, surgery
from lotus.vit.model import create, image_size

SECONDS, COPIES = 90.0, 2.0
STEPS: dict[str, tuple[Any, str]] = {
    "rotation: statistics": (rotate, "statistics"),
    "rotation": (rotate, "turns"),
    "gradients and moments": (measure, "measure"),
    "scores": (scoring, "score"),
    "plan": (budget, "fit_plan"),
    "cut": (surgery, "cut"),
    "compensation": (compensate, "carry_over"),
    "beside the dense model": (narrow, "apart"),
}


def main() -> int:
    """Run; 1 with ``--check`` where a figure is missed."""
    options = _parse()
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        found = alone.apply(_measured, (vars(options),))
    scale = options.of / found["images"] if options.of else 1.0
    total = sum(found["seconds"].values())
    passes = sum(found["seconds"][name] for name in ("rotation: statistics", "gradients and moments"))
    expected = total + (scale - 1) * passes
    most = COPIES * found["model"] + found["statistics"]
    if options.json:
        print(json.dumps({**found, "total": total, "expected": expected, "allowed": most}))
    else:
        print(
            f"{options.model} {options.args}, {found['side']} px, {found['images']} images, batch {options.batch}, {found['threads']} threads"
        )
        for name, seconds in found["seconds"].items():
            print(f"{name:24}{seconds:9.2f} s")
        print(f"{'in all':24}{total:9.2f} s of {SECONDS:g}")
        if options.of:
            print(f"{f'for {options.of} images, at this pace':40}{expected:9.2f} s")
        for name in ("model", "statistics", "before", "peak"):
            print(f"{name:24}{found[name] / 2**20:9.1f} MiB")
        print(f"{'the pruning itself':24}{(found['peak'] - found['before']) / 2**20:9.1f} MiB of {most / 2**20:.1f}")
    missed = expected > SECONDS or found["peak"] - found["before"] > most
    return 1 if options.check and missed else 0


def _measured(options: dict[str, Any]) -> dict[str, Any]:
    """Prune once, in this process, and tell what it took; bytes and seconds."""
    torch.manual_seed(0)
    model = create(Model(name=options["model"], args=options["args"]), 1000).eval()
    side, batch, taken = image_size(model), options["batch"], 0.0
    images = options["images"] or measure.enough(model)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal taken
        for start in range(0, images, batch):
            began, count = time.perf_counter(), min(batch, images - start)
            drawn = torch.randn(count, 3, side, side), torch.arange(start, start + count) % 1000
            taken += time.perf_counter() - began
            yield drawn

    seconds = dict.fromkeys(STEPS, 0.0)
    within = []

    def timed(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def call(*args: Any, **more: Any) -> Any:
            within.append(name)
            began, drawing = time.perf_counter(), taken
            try:
                return step(*args, **more)
            finally:
                within.pop()
                if not within:  # the statistics of a rotation are gathered by a measure of their own
                    seconds[name] += time.perf_counter() - began - (taken - drawing)

        return call

    for name, (module, function) in STEPS.items():
        setattr(module, function, timed(name, getattr(module, function)))
    with torch.inference_mode():
        model(torch.randn(1, 3, side, side))
    before = _peak()
    held = 0

    def weighed(*args: Any, **more: Any) -> measure.Measured:
        nonlocal held
        found = gone_through(*args, **more)
        arrays = [*found.gradients.values()]
        for moments in found.moments.values():
            arrays += [t for t in vars(moments).values() if isinstance(t, torch.Tensor)]
        held = max(held, sum(array.nbytes for array in arrays))
        return found

    gone_through = measure.measure
    measure.measure = weighed  # type: ignore[assignment]
    lotus.pruning.lottery(
        model, batches, as_request({"keep": {"macs": 0.5}, "embed_dim": "auto" if options["embed_dim"] else None})
    )
    peak = _peak()
    return {
        "seconds": seconds, "side": side, "images": images, "threads": torch.get_num_threads(), "before": before, "peak": peak, "statistics": held,
        "model": sum(weight.nbytes for weight in model.parameters()),
    }  # fmt: skip


def _peak() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--args", type=json.loads, default={}, help="JSON for timm.create_model")
    parser.add_argument("--images", type=int, help="calibration images; without it as many as LOTUS takes by itself")
    parser.add_argument("--of", type=int, default=0, help="also tell what so many images would take at this pace")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--embed-dim",
        action="store_true",
        help="try smaller embedding dimensions too, as is the default; noise never leaves it at all channels",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure is missed")
    parser.add_argument("--tiny", action="store_true", help="seconds; only shows that it works")
    options = parser.parse_args()
    if options.tiny:
        options.args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        options.images, options.batch, options.of = 16, 8, 32
    return options


if __name__ == "__main__":
    raise SystemExit(main())
