"""What a cut saves on the clock, and how well it was predicted. One command, one run, no training (time knows no weights):

    python benchmarks/latency.py            # DeiT-Ti at 224 px, batch 32 and 1
    python benchmarks/latency.py --small    # a ViT of 128 x 6 with 8-pixel patches at 32 px, batch 256 and 1
    python benchmarks/latency.py --tiny     # seconds; only shows that it works

Dense and cut take turns; a figure is the median over the turns of what stands beside the dense model just before it. To be
reached: at the large batch a speed-up of at least (MACs ratio)^0.85; at batch 1 never slower than dense; latency within 10 %
of what was told when the plan was drawn. That is what lotus.pruning.latency measured then for a budget of latency, and for
other budgets, where nothing is measured, what its table predicts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

import lotus.pruning
from lotus.config import Model, as_request
from lotus.pruning import latency
from lotus.vit.model import create
from selection.errors import Refused

BUDGETS: list[dict[str, float]] = [
    *({"macs": keep} for keep in (0.7, 0.5, 0.35, 0.25)),
    *({"latency": keep} for keep in (0.7, 0.5, 0.35)),
]
POWER, EXACT = 0.85, 0.10


def main() -> int:
    """Run; 1 with ``--check`` where a figure is missed."""
    options = _parse()
    torch.manual_seed(0)
    dense = create(Model(name=options.model, args=options.args), 10).to(options.device).eval()
    table = latency.measure(dense, options.batch)
    multiple = latency.fast_multiple(dense, options.batch)
    request = as_request({"criterion": "magnitude", "rotate": False, "compensate": "none"})
    study = lotus.pruning.study(dense, [], request)
    cuts = []
    for keep in BUDGETS:
        try:
            cuts.append((keep, study.draw(request.at(keep), table=table)))
        except Refused as refusal:
            print(refusal, file=sys.stderr)
    large, one = (
        [latency.beside(dense, drawn.model, batch, turns=options.turns) for _, drawn in cuts]
        for batch in (options.batch, 1)
    )
    rows = [
        {
            "keep": keep,
            "macs": drawn.before["macs"] / drawn.after["macs"],
            "speedup": 1 / at_large,
            "wanted": (drawn.before["macs"] / drawn.after["macs"]) ** POWER,
            "predicted": table.predict(drawn.plan.dims) / table.dense,
            "told": None if drawn.latency is None else drawn.latency.measured,
            "measured": at_large,
            "batch_1": at_one,
        }
        for (keep, drawn), at_large, at_one in zip(cuts, large, one, strict=True)
    ]
    if options.json:
        print(
            json.dumps({"rows": rows, "round": multiple, "dense_ms": table.dense, "threads": torch.get_num_threads()})
        )
    else:
        _show(rows, table, multiple, options)
    missed = any(
        row["speedup"] < row["wanted"]
        or row["batch_1"] > 1
        or abs((row["told"] or row["predicted"]) / row["measured"] - 1) > EXACT
        for row in rows
    )
    return 1 if options.check and missed else 0


def _show(rows: list[dict[str, Any]], table: latency.Table, multiple: int, options: argparse.Namespace) -> None:
    print(f"{options.model} {options.args}, {options.device}, {torch.get_num_threads()} threads; dense {table.dense:.1f} ms "
          f"at batch {options.batch}; fast from multiples of {multiple} on")  # fmt: skip
    print(
        f"{'keep':16}{'MACs saved':>12}{'speed-up':>10}{'wanted':>8}{'predicted':>11}{'told':>8}{'measured':>10}{'batch 1':>9}"
    )
    for row in rows:
        keep = ", ".join(f"{what} {part:g}" for what, part in row["keep"].items())
        print(f"{keep:16}{row['macs']:11.2f}x{row['speedup']:9.2f}x{row['wanted']:7.2f}x{row['predicted']:11.3f}"
              f"{row['told'] or float('nan'):8.3f}{row['measured']:10.3f}{row['batch_1']:9.3f}")  # fmt: skip
    print("predicted, told, measured, batch 1: time as a fraction of the dense model's. Predicted by the table; told: measured when the plan "
          "was drawn, where latency was asked for; measured: again, afterwards.")  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--args", type=json.loads, default={}, help="JSON for timm.create_model")
    parser.add_argument("--batch", type=int, default=32, help="the large batch")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure is missed")
    parser.add_argument("--small", action="store_true", help="a ViT for CIFAR-10")
    parser.add_argument("--tiny", action="store_true", help="seconds; only shows that it works")
    options = parser.parse_args()
    if options.small:
        options.args = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
        options.batch = 256
    if options.tiny:
        options.args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        options.batch, options.turns = 4, 1
    return options


if __name__ == "__main__":
    raise SystemExit(main())
