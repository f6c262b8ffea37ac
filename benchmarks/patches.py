"""What a training step on fewer patches takes, beside one on all. One command, one run:

    python benchmarks/patches.py            # the figures: at keep 0.7 at most 0.78 of the dense step's time
    python benchmarks/patches.py --tiny     # seconds; only shows that it works

Trainings of the same ViT on the same images in memory (forward, backward, AdamW; no loader) take turns, a block of steps
each, in an order that rotates. The figures are medians over the blocks of what stands beside the dense block of the same
round, so that a machine that slows down slows down all. Beside each stands the share of the MACs, below which the time can
hardly fall.
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
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from lotus.config import Model, Patches
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
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    shares, steps = {}, {}
    for name, wants in ARMS.items():
        torch.manual_seed(0)
        model = create(Model(name=options.model, args=options.args), CLASSES).to(device, dtype)
        tokens = None
        if wants is not None:
            score = patch_scores.contrast if name == "input, contrast" else None
            tokens = Tokens(model, Patches.model_validate({**wants, "keep": options.keep}), score)
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


def _training(
    model: nn.Module, told: Tokens | None, batch: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """One optimiser step after another on the same images."""
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
    parser.add_argument("--args", type=json.loads, default={}, help="JSON for timm.create_model")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="of each arm in a block")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure is missed")
    parser.add_argument("--tiny", action="store_true", help="seconds; only shows that it works")
    options = parser.parse_args()
    if options.tiny:
        options.args = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
        options.batch, options.steps, options.blocks = 8, 2, 2
    return options


if __name__ == "__main__":
    raise SystemExit(main())
