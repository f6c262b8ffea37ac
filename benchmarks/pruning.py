"""Top-1 after a cut, ours beside every criterion, published systems and Torch-Pruning, from one checkpoint at equal MACs.

    python benchmarks/pruning.py MODEL --data cifar10 --path data/cifar10.npz --out runs/pruning      # the whole table
    python benchmarks/pruning.py MODEL --data cifar10 --path data/cifar10.npz --out runs/pruning      # again: goes on, or only prints
    python benchmarks/pruning.py MODEL --data cifar10 --path data/cifar10.npz --seeds 1 --finetune 0 --only ours "embed_dim 0.5"
    python benchmarks/pruning.py --model deit_small_patch16_224 --weights FILE --data IMAGENET_VAL      # beside published rows: one_shot.py

MODEL is a folder that LOTUS wrote (``runs/cifar10/baseline``), with the mean and standard deviation of its images in it. Each row of
the table is a way to cut, each column a fraction of the dense model's MACs (QK^T and AV counted) that stays:

    ours          what ``lotus.prune`` does by default: rotated heads, fisher, all units in one pool, affine; a smaller embedding dimension where that helps
    units alone   ours, with all channels of the stream; the rows below too
    decouple_qk   with query/key and value dimensions cut each for itself
    embed_dim W   after the residual stream was turned and cut to the fraction W of its channels
    sublayers     where whole sublayers may go; in_channels: where channels that a sublayer reads may
    VTP           gates at four sites learn with L1 for ``--search`` steps, the weights beside them; one threshold; nothing compensated.
                  Its published rates move no gate (docs/papers.md), so gates learn at 1e-2 here
    auto ratio    one ratio for attention and one for MLPs, searched for on 1,000 training images by agreement; magnitude, nothing compensated
    CP-ViT        one ratio for heads and patches
    SPViT         attention to convolutions, MLP units: nested gates learn for ``--search`` steps toward each budget, and are projected onto it
    the others    a criterion on the dimensions as they are, nothing compensated: what the literature does
    Torch-Pruning its own pruner (heads, head dimensions, MLP units and the residual width), where it is installed

Shown is top-1 on the validation images right after the cut and, with ``--finetune``, after so many steps of AdamW with the dense
model as teacher, the same images in the same order for all. Seeds change the calibration images, what is searched, and the fine-tune.
Every training and measurement is a process' own with one thread; ``--workers`` of them run at once.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two processes of one thread beat one of two

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else pruning.py of this folder is found first

import shared

import lotus.pruning
from lotus.config import Data, Patches, Prune, Sparsity, as_request
from lotus.data import unpacked, views
from lotus.data.dataset import open_data
from lotus.data.source import Source
from lotus.papers.cp_vit import sweep as cp_vit
from lotus.papers.spvit import project
from lotus.papers.spvit.nested_gates import NestedGates
from lotus.pruning import criteria, narrow, search, spec
from lotus.pruning.judge import Judge
from lotus.sparsity.gates import Gates
from lotus.vit import anatomy, cost
from lotus.vit.model import image_size
from lotus.vit.preprocessing import resizing
from lotus.vit.tokens import Tokens
from selection import atomic_files, methods
from selection.errors import Refused

Batches = list[tuple[Tensor, Tensor]]
Cuts = Callable[[float], "nn.Module | Tokened | str"]
"""What a model becomes at a fraction of its MACs, or why it does not."""


@dataclass
class Tokened:
    """A model that also leaves patches out, as long as ``tokens`` are on it."""

    model: nn.Module
    tokens: Tokens


@dataclass
class Bench:
    """What every way has, with one seed: the model, and images to look at and to train on."""

    told: argparse.Namespace
    seed: int
    dense: nn.Module
    show: Callable[[Source, np.ndarray], Batches]
    train: Source
    test: Batches
    whole: int
    """MACs of ``dense``."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        wanted, total = self.told.calibration, len(self.train)
        self.calibration = self.show(self.train, np.sort(rng.choice(total, size=min(wanted, total), replace=False)))
        self.held = np.sort(rng.choice(total, size=min(1000, total), replace=False))
        self._lessons = {
            what: rng.integers(total, size=(steps, self.told.batch))
            for what, steps in (("finetune", self.told.finetune), ("search", self.told.search))
        }

    def lessons(self, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of training images, each mirrored or not, the same at every call."""
        chance = torch.Generator().manual_seed(self.seed)
        for rows in self._lessons[what]:
            ((images, labels),) = self.show(self.train, rows)
            mirrored = torch.rand(len(images), 1, 1, 1, generator=chance).to(images.device) < 0.5
            yield torch.where(mirrored, images.flip(3), images), labels

    @functools.cached_property
    def taught(self) -> list[Tensor]:
        """What the dense model says of the fine-tune's images: probabilities softened by 2."""
        with torch.no_grad():
            return [(self.dense(images) / 2).softmax(1) for images, _ in self.lessons("finetune")]


Way = Callable[[Bench], Cuts]
"""A way to cut. What does not depend on the budget is done once."""


def main() -> int:
    told = _parse()
    try:
        if told.name:
            import one_shot

            return one_shot.main(told)
        return compare(told)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2


def compare(told: argparse.Namespace) -> int:
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    book = None
    if told.out:
        told.out.mkdir(parents=True, exist_ok=True)
        free = ("out", "only", "seeds", "workers", "json")
        setting = {name: str(value) for name, value in vars(told).items() if name not in free}
        book = told.out / f"rows-{shared.key(setting)}.jsonl"
        rows = {(row["way"], row["seed"]): row for row in shared.rows_of(book)}
    names = [name for name in ways() if not told.only or name in told.only]
    jobs = [(seed, name) for seed in range(told.seeds) for name in names]
    missing = [job for job in jobs if job[::-1] not in rows]
    with ProcessPoolExecutor(told.workers, mp_context=get_context("spawn")) as workers:
        running = [workers.submit(measure, told, seed, name) for seed, name in missing]
        for row in shared.as_they_end(running, book, _told):
            rows[row["way"], row["seed"]] = row
    found = [rows[name, seed] for name in names for seed in range(told.seeds)]
    print("\n".join(_table(found, told)))
    if told.json:
        atomic_files.write_json(told.json, {"model": str(told.model), "finetune": told.finetune, "rows": found})
    return 0


@functools.cache
def _bench(key: str, seed: int) -> Bench:
    told = argparse.Namespace(**json.loads(key))
    dense = lotus.pruning.load(Path(told.model)).to(told.device)
    train, val = open_data(Data(name=told.data, path=told.path))
    show = images_of(spec.read(Path(told.model)), image_size(dense), told)
    return Bench(told, seed, dense, show, train, show(val, np.arange(len(val))[: told.images]), macs(dense))


def measure(told: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    """One way with one seed, at every fraction of the MACs."""
    torch.set_num_threads(1)
    plain_told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(told).items()}
    bench = _bench(json.dumps(plain_told, sort_keys=True), seed)
    began = time.process_time()
    cuts = ways()[name](bench)
    cells = {f"{keep:g}": _cell(bench, cuts, keep) for keep in told.keep}
    return {"way": name, "seed": seed, "dense": top1(bench.dense, bench.test), "whole": bench.whole, "cells": cells,
            "seconds": time.process_time() - began}  # fmt: skip


def _cell(bench: Bench, cuts: Cuts, keep: float) -> dict[str, float] | str:
    """Top-1 right after the cut and after the fine-tune, and the fraction of the MACs; or why there is none."""
    small = cuts(keep)
    if isinstance(small, str):
        return small
    model = small.model if isinstance(small, Tokened) else small
    spent = small.tokens.macs(training=False) if isinstance(small, Tokened) else macs(model)
    if spent > keep * bench.whole + 1:
        return f"kept {spent / bench.whole:.3f} of the MACs instead of {keep}"
    cell = {"macs": spent / bench.whole, "cut": top1(model, bench.test)}
    if bench.told.finetune:
        cell["finetuned"] = top1(finetune(model, bench), bench.test)
    return cell


def _table(rows: list[dict[str, Any]], told: argparse.Namespace) -> Iterator[str]:
    """Mean and, of several seeds, standard deviation, in Markdown; a cell is right after the cut, then fine-tuned."""
    first = rows[0]
    yield (
        f"dense: {first['whole'] / 1e6:.1f} M MACs, top-1 {first['dense']:.2f} %; {told.calibration} calibration images, "
        f"{told.seeds} seeds, {told.finetune} steps of fine-tuning at batch {told.batch}, {told.search} of search"
    )
    yield ""
    yield "| top-1 at a fraction of the MACs | " + " | ".join(f"{keep:g}" for keep in told.keep) + " |"
    yield "| --- |" + " --- |" * len(told.keep)
    for name in dict.fromkeys(row["way"] for row in rows):
        line, why = [], ""
        for keep in told.keep:
            cells = [row["cells"][f"{keep:g}"] for row in rows if row["way"] == name]
            refused = [cell for cell in cells if isinstance(cell, str)]
            if refused:
                line.append("–")
                why = f" ({refused[0]})"
                continue
            line.append(
                " → ".join(_spread([cell[part] for cell in cells]) for part in ("cut", "finetuned") if part in cells[0])
            )
        yield f"| {name}{why} | " + " | ".join(line) + " |"
    yield ""
    yield f"{sum(row['seconds'] for row in rows) / 60:.0f} CPU minutes"


def _told(row: dict[str, Any]) -> str:
    return f"{row['way']}, seed {row['seed']}: {row['seconds']:.0f} CPU seconds"


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


# -------------------------------------------------------------------------------------------------------------- ways


def ways() -> dict[str, Way]:
    """Ours, published systems, every criterion of the shelf that needs no learned gates, and Torch-Pruning."""

    def ours(bench: Bench) -> Cuts:
        def cuts(keep: float) -> nn.Module | str:
            try:
                return lotus.pruning.lottery(
                    bench.dense,
                    bench.calibration,
                    as_request({"keep": {"macs": keep}}),
                    lotus.pruning.Given(seed=bench.seed),
                ).model
            except Refused as refusal:
                return str(refusal)

        return cuts

    def lottery(**settings: Any) -> Way:
        def way(bench: Bench) -> Cuts:
            request = as_request(settings)
            studied = lotus.pruning.study(bench.dense, bench.calibration, request, lotus.pruning.Given(seed=bench.seed))

            def cuts(keep: float) -> nn.Module | str:
                try:
                    return studied.draw(request.at({"macs": keep})).model
                except Refused as refusal:
                    return str(refusal)

            return cuts

        return way

    shelf = [name for name in methods.names(criteria) if "gates" not in methods.reads(getattr(criteria, name))]
    bare: dict[str, Any] = {"rotate": False, "compensate": "none"}
    return {
        "ours": ours,
        "units alone": lottery(),
        **{f"Torch-Pruning, {score}": functools.partial(torch_pruning, score) for score in ("magnitude", "taylor")},
        "VTP": vtp,
        "auto ratio": auto_ratio,
        "CP-ViT": fixed_ratio,
        "SPViT": spvit,
        **{name: lottery(criterion=name, **bare) for name in shelf},
        "fisher, affine, by index": lottery(rotate=False),
        "decouple_qk": lottery(decouple_qk=True),
        "sublayers": lottery(sublayers=True),
        "in_channels": lottery(in_channels=True),
        **{f"embed_dim {part:g}": functools.partial(narrowed, part) for part in narrow.GRID[1:]},
        **{f"{name}, within types": lottery(criterion=name, scope="per_type", **bare) for name in shelf},
    }


def narrowed(part: float, bench: Bench) -> Cuts:
    """Ours on a smaller embedding dimension."""
    found = narrow.statistics(bench.dense, bench.calibration)
    thin = narrow.narrow(bench.dense, found, narrow.channels(bench.dense, part, 8))
    request = Prune()
    studied = lotus.pruning.study(thin, bench.calibration, request, lotus.pruning.Given(seed=bench.seed))

    def cuts(keep: float) -> nn.Module | str:
        try:
            return studied.draw(request.at({"macs": keep}), whole=cost.count(bench.dense)).model
        except Refused as refusal:
            return str(refusal)

    return cuts


def vtp(bench: Bench) -> Cuts:
    """Gates at the four sites learn under L1, then one threshold for all (2104.08500)."""
    model = copy.deepcopy(bench.dense)
    settings = Sparsity(in_channels=True, penalty="subgradient", strength=1e-4, steer=False, lr=1e-2, start=0)
    gates = Gates(model, settings, target=None, device=bench.told.device)
    learn(model, gates, bench)
    values = {site: one.detach().clone() for site, one in gates.values.items()}
    bare = {"criterion": "gate", "rotate": False, "compensate": "none", "in_channels": True}
    request = as_request({**bare, "scope": "threshold", "decouple_qk": True, "round": 1})
    studied = lotus.pruning.study(gates.fold(model), bench.calibration, request, lotus.pruning.Given(gates=values))

    def cuts(keep: float) -> nn.Module | str:
        try:
            return studied.draw(request.at({"macs": keep})).model
        except Refused as refusal:
            return str(refusal)

    return cuts


def auto_ratio(bench: Bench) -> Cuts:
    """One ratio for attention and one for MLPs (PRAI 2023), of the magnitudes."""
    request = as_request({"criterion": "magnitude", "rotate": False, "compensate": "none", "search": {"grid": 0}})
    studied = lotus.pruning.study(bench.dense, bench.calibration, request)
    judge = Judge(bench.dense, bench.show(bench.train, bench.held), metric="agreement")

    def cuts(keep: float) -> nn.Module | str:
        try:
            return search.ratios(studied, judge, request.at({"macs": keep})).pruned.model
        except Refused as refusal:
            return str(refusal)

    return cuts


def fixed_ratio(bench: Bench) -> Cuts:
    """CP-ViT (2203.04570): the largest ratio within the budget."""
    scores = cp_vit.head_scores(bench.dense, bench.calibration)

    def cuts(keep: float) -> Tokened | str:
        patches = cost.outline(bench.dense).tokens - 1
        for stay in range(patches - 1, 0, -1):  # of the patches; between two of these the ratio changes heads alone
            part = stay / patches
            small = cp_vit.cut_heads(bench.dense, scores, part).eval()
            tokens = Tokens(small, Patches(mode="cumulative", keep=part, evaluate="sparse"))
            if tokens.macs(training=False) <= keep * bench.whole:
                return Tokened(small, tokens)
            tokens.remove()
        return "does not reach it: MLPs stay whole"

    return cuts


def spvit(bench: Bench) -> Cuts:
    """Attention to convolutions (2111.11802): a search for each budget; the original weights are cut by what the gates choose."""

    def cuts(keep: float) -> nn.Module | str:
        model, told = copy.deepcopy(bench.dense), bench.told
        gates = NestedGates(model, keep=keep, lr=5 / told.search, strength=30, seed=bench.seed, device=told.device)
        learn(model, gates, bench)
        try:
            choices = project.project(cost.outline(bench.dense), gates.by_block(), keep)
        except Refused as refusal:
            return str(refusal)
        small = project.convert(bench.dense, choices, gates.mixes())
        project.calibrate(small, bench.calibration)
        return small

    return cuts


def learn(model: nn.Module, gates: Gates | NestedGates, bench: Bench) -> None:
    """The weights by AdamW and the gates by a step of their own, for the steps of the search."""
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=5e-5, weight_decay=0.05)
    model.train()
    for step, (images, labels) in enumerate(bench.lessons("search"), 1):
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step(step / bench.told.search)
    model.eval()


def torch_pruning(score: str, bench: Bench) -> Cuts:
    """Its pruner on a ViT as in its own example, with the ratio that meets the MACs, by bisection."""
    try:
        import torch_pruning as tp
    except ImportError:
        return lambda keep: "not installed: pip install torch-pruning"
    batches, whole = bench.calibration, bench.whole
    images, dense = batches[0][0][:1], copy.deepcopy(bench.dense)
    dense.zero_grad()
    if score == "taylor":
        for x, y in batches:
            functional.cross_entropy(dense(x), y, reduction="sum").backward()

    def at(ratio: float) -> nn.Module:
        model: Any = copy.deepcopy(dense)
        for weight, old in zip(model.parameters(), dense.parameters(), strict=True):
            weight.grad = None if old.grad is None else old.grad.clone()  # taylor reads it
        for block in anatomy.blocks(model):
            block.attn.fused_attn = False  # it cannot trace through the fused kernel
        importance = (
            tp.importance.GroupTaylorImportance if score == "taylor" else tp.importance.GroupMagnitudeImportance
        )()
        pruner = tp.pruner.BasePruner(
            model,
            images,
            importance=importance,
            global_pruning=True,
            isomorphic=True,  # without it, whole layers vanish
            pruning_ratio=ratio,
            ignored_layers=[model.head],
            num_heads={block.qkv: block.heads for block in anatomy.blocks(model)},
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio,
        )
        for group in pruner.step(interactive=True):
            group.prune()
        for module in model.blocks:
            attn = module.attn
            attn.num_heads = pruner.num_heads[attn.qkv]
            attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
            attn.attn_dim, attn.scale = attn.num_heads * attn.head_dim, attn.head_dim**-0.5
        model.zero_grad()
        return model.eval()

    def cuts(keep: float) -> nn.Module | str:
        low, high, best, why = 0.0, 0.99, None, f"does not reach {keep}"
        for _ in range(8):
            middle = (low + high) / 2
            try:
                model = at(middle)
                spent = macs(model)
            except Exception as error:  # its own, e.g. where no head is left in a block: a smaller ratio may do
                high, why = middle, f"fails at a ratio of {middle:.2f}: {type(error).__name__}: {error}"
                continue
            if spent <= keep * whole:
                high, best = middle, model
            else:
                low = middle
        return best if best is not None else why

    return cuts


# ---------------------------------------------------------------------------------------------------- what all share


def finetune(small: nn.Module, bench: Bench) -> nn.Module:
    """AdamW on a cosine, half of the loss from the teacher's probabilities softened by 2."""
    told = bench.told
    small.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=told.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, told.lr, total_steps=told.finetune, pct_start=0.1)
    for (images, labels), soft in zip(bench.lessons("finetune"), bench.taught, strict=True):
        logits = small(images)
        taught = functional.kl_div((logits / 2).log_softmax(1), soft, reduction="batchmean") * 4
        loss = 0.5 * functional.cross_entropy(logits, labels) + 0.5 * taught
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return small.eval()


@torch.no_grad()
def top1(model: nn.Module, batches: Batches) -> float:
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def macs(model: nn.Module) -> int:
    """Counted by torch as the model runs, attention unfused, so that one count holds for all."""
    other: Any = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "fused_attn"):  # a block may have lost its attention
            module.fused_attn = False
    embed = other.patch_embed
    image = torch.zeros(1, embed.proj.in_channels, *embed.img_size, device=next(other.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        other(image)
    return counter.get_total_flops() // 2


def images_of(about: dict[str, Any], size: int, told: argparse.Namespace) -> Callable[[Source, np.ndarray], Batches]:
    """Reads rows of a data set as the model was evaluated on them: the middle, at its size, normalized as in its folder."""
    known = {"crop": views.CENTER, "interpolation": "bilinear", **about["about"]}
    mean, std = (torch.tensor(known[name]).view(3, 1, 1) for name in ("mean", "std"))
    look = views.View(
        size=size,
        crop=known["crop"],
        interpolation=resizing(known),
        crop_mode=known.get("crop_mode", "center"),
    )

    def tensors(source: Source, rows: np.ndarray) -> Batches:
        batches = []
        for part in np.array_split(rows, -(-len(rows) // told.batch)):
            shown = [unpacked.seen(source.read(int(row)), look).copy() for row in part]
            pictures = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in shown]
            images = (torch.stack(pictures).float() / 255 - mean) / std
            batches.append((images.to(told.device), torch.from_numpy(source.labels[part]).to(told.device)))
        return batches

    return tensors


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a folder that LOTUS wrote, with a trained ViT")
    parser.add_argument(
        "--model", dest="name", default="", help="in place of it a timm name, cut in one shot beside published figures"
    )
    parser.add_argument("--weights", default="", help="of --model: a file or folder")
    parser.add_argument("--calibrate", default="", help="of --model: a folder of images to look at (those of --data)")
    parser.add_argument(
        "--data", default="imagefolder", help="a data set of the catalog (%(default)s); of --model a folder of classes"
    )
    parser.add_argument("--path", default="", help="where it lies")
    parser.add_argument("--out", type=Path, help="folder of the rows; a second run goes on there")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25], help="parts of the MACs")
    parser.add_argument("--only", nargs="+", help="only these rows")
    parser.add_argument("--calibration", type=int, help="training images to score by (2000; of --model 8192)")
    parser.add_argument("--images", type=int, help="at most so many validation images (10,000; of --model all)")
    parser.add_argument("--finetune", type=int, default=100, help="steps of fine-tuning; 0: none (%(default)s)")
    parser.add_argument(
        "--search", type=int, default=150, help="steps in which VTP's and SPViT's gates learn (%(default)s)"
    )
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate of the fine-tune (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="repeats (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes at once, each with one thread (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    told = parser.parse_args()
    if bool(told.model) == bool(told.name):
        parser.error("give the folder of a model, or --model NAME")
    if told.model:
        told.calibration, told.images = told.calibration or 2000, told.images or 10_000
    return told


if __name__ == "__main__":
    sys.exit(main())
