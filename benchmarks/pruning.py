"""Top-1 after a cut, ours beside every criterion and Torch-Pruning, from one checkpoint at equal MACs.

    python benchmarks/pruning.py MODEL --data cifar10 --path data/cifar10.npz
    python benchmarks/pruning.py MODEL --data cifar10 --path data/cifar10.npz --finetune 500 --seeds 3

MODEL is a folder that LOTUS wrote (``runs/cifar10/baseline``), with the mean and standard deviation of its images in it. Each row of
the table is a way to cut, each column a part of the dense model's MACs (QK^T and AV counted) that stays:

    ours          what ``lotus.prune`` does by default with ``criterion="fisher"``: rotated heads, all units in one pool, affine
    split         the same, with query/key and value dimensions cut each for itself
    width W       the same, after the stream was turned and cut to the part W of its channels
    branches      the same, where whole branches may go; inputs: where channels that a branch reads may
    the others    a criterion on the dimensions as they are, nothing compensated: what the literature does
    Torch-Pruning its own pruner (heads, head dimensions, MLP units and the residual width), where it is installed

Shown is top-1 on the validation images right after the cut and, with ``--finetune``, after so many steps of AdamW with the dense
model as teacher, the same for all. Seeds change the calibration images and the fine-tune.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else pruning.py of this folder is found first

import lotus.pruning
from lotus.config import Data
from lotus.data import augment, plain
from lotus.data.source import Source, open_data
from lotus.pruning import criteria, narrow, spec
from lotus.vit import anatomy, cost
from lotus.vit.model import image_size
from selection import methods
from selection.errors import Refused

Batches = list[tuple[Tensor, Tensor]]
Cuts = Callable[[float], nn.Module | str]
"""What a model becomes at a part of its MACs, or why it does not."""
Way = Callable[[nn.Module, Batches, int], Cuts]
"""A way to cut: from the model, calibration images and a seed. What does not depend on the budget is done once."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that LOTUS wrote, with a trained ViT")
    parser.add_argument("--data", default="imagefolder", help="a data set of the catalog (%(default)s)")
    parser.add_argument("--path", default="", help="where it lies")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25], help="parts of the MACs")
    parser.add_argument("--only", nargs="+", help="only these rows")
    parser.add_argument("--calibration", type=int, default=2000, help="training images to score by (%(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="at most so many validation images (%(default)s)")
    parser.add_argument("--finetune", type=int, default=0, help="steps of fine-tuning (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="its peak learning rate (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="repeats (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    told = parser.parse_args()
    try:
        return compare(told)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2


def compare(told: argparse.Namespace) -> int:
    dense = lotus.pruning.load(told.model).to(told.device)
    train, val = open_data(Data(name=told.data, path=told.path))
    show = images_of(spec.read(told.model), image_size(dense), told)
    test = show(val, np.arange(len(val))[: told.images])
    whole, before = macs(dense), top1(dense, test)
    print(f"dense: {whole / 1e6:.1f} M MACs, top-1 {before:.2f} % of {sum(len(y) for _, y in test):,} images")
    print(f"{told.calibration} calibration images, {told.seeds} seeds, {told.finetune} steps of fine-tuning\n")
    heads = "".join(f"{f'{keep:g}':>{16 if told.finetune else 9}}" for keep in told.keep)
    print(f"{'top-1 at a part of the MACs':34}{heads}")
    rows: list[dict[str, Any]] = []
    for name, way in ways().items():
        if told.only and name not in told.only:
            continue
        print(f"{name:34}", end="", flush=True)
        found: dict[float, list[Any]] = {keep: [] for keep in told.keep}
        for seed in range(told.seeds):
            rng = np.random.default_rng(seed)
            chosen = np.sort(rng.choice(len(train), size=min(told.calibration, len(train)), replace=False))
            cuts = way(dense, show(train, chosen), seed)
            for keep in told.keep:
                found[keep].append(one(dense, cuts(keep), keep, rng, train, show, test, whole, told))
        for keep, ends in found.items():
            refused = [end for end in ends if isinstance(end, str)]
            if refused:
                print(f"  {refused[0]}", end="")
                break
            right, after, share = (statistics.fmean(end[part] for end in ends) for part in range(3))
            rows.append({"way": name, "keep": keep, "macs": share, "cut": right, "finetuned": after, "seeds": ends})
            print(f"{right:9.2f}" + (f" {after:6.2f}" if told.finetune else ""), end="")
        print(flush=True)
    if told.json:
        about = {"model": str(told.model), "dense": before, "macs": whole, "finetune": told.finetune}
        told.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return 0


def one(
    dense: nn.Module,
    small: nn.Module | str,
    keep: float,
    rng: np.random.Generator,
    train: Source,
    show: Callable[[Source, np.ndarray], Batches],
    test: Batches,
    whole: int,
    told: argparse.Namespace,
) -> tuple[float, float, float] | str:
    """Top-1 right after the cut and after the fine-tune, and the part of the MACs; or why there is none."""
    if isinstance(small, str):
        return small
    share = macs(small) / whole
    if share > keep + 1e-6:
        return f"kept {share:.3f} of the MACs instead of {keep}"
    right = after = top1(small, test)
    if told.finetune:
        rows = rng.integers(len(train), size=told.finetune * told.batch)
        lessons = (show(train, part)[0] for part in rows.reshape(told.finetune, told.batch))
        after = top1(finetune(small, dense, lessons, told), test)
    return right, after, share


def ways() -> dict[str, Way]:
    """Ours, every criterion of the shelf that needs no learned gates, and Torch-Pruning."""

    def lottery(settings: dict[str, Any], **drawing: Any) -> Way:
        def way(dense: nn.Module, batches: Batches, seed: int) -> Cuts:
            studied = lotus.pruning.study(dense, batches, seed=seed, **settings)
            return lambda keep: studied.draw({"macs": keep}, **drawing).model

        return way

    found = {
        "ours": lottery({"criterion": "fisher"}),
        "split": lottery({"criterion": "fisher"}, split=True),
        **{f"width {part:g}": functools.partial(narrowed, part) for part in (0.875, 0.75, 0.625, 0.5)},
        "branches": lottery({"criterion": "fisher"}, branches=True),
        "inputs": lottery({"criterion": "fisher", "inputs": True}),
        "fisher, affine, by index": lottery({"criterion": "fisher", "rotate": False}),
    }
    for name in methods.names(criteria):
        if "gates" not in methods.reads(getattr(criteria, name)):
            plain_ = {"criterion": name, "rotate": False, "compensate": "none"}
            found[name] = lottery(plain_)
            found[f"{name}, within kinds"] = lottery(plain_, rank="kind")
    for score in ("magnitude", "taylor"):
        found[f"Torch-Pruning, {score}"] = functools.partial(torch_pruning, score)
    return found


def narrowed(part: float, dense: nn.Module, batches: Batches, seed: int) -> Cuts:
    """Ours on a narrower stream."""
    found = narrow.statistics(dense, batches)
    thin = narrow.narrow(dense, found, narrow.channels(dense, part, 8))
    studied = lotus.pruning.study(thin, batches, criterion="fisher", seed=seed)

    def cuts(keep: float) -> nn.Module | str:
        try:
            return studied.draw({"macs": keep}, whole=cost.count(dense)).model
        except Refused as refusal:
            return str(refusal)

    return cuts


def torch_pruning(score: str, dense: nn.Module, batches: Batches, seed: int) -> Cuts:
    """Its pruner on a ViT as in its own example, with the ratio that meets the MACs, by bisection."""
    try:
        import torch_pruning as tp
    except ImportError:
        return lambda keep: "not installed: pip install torch-pruning"
    images, whole = batches[0][0][:1], macs(dense)
    dense = copy.deepcopy(dense)
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
        low, high, best = 0.0, 0.99, None
        for _ in range(8):
            middle = (low + high) / 2
            try:
                model = at(middle)
                spent = macs(model)
            except Exception as error:  # its own
                return f"fails at a ratio of {middle:.2f}: {type(error).__name__}: {error}"
            if spent <= keep * whole:
                high, best = middle, model
            else:
                low = middle
        return best if best is not None else f"does not reach {keep}"

    return cuts


def finetune(small: nn.Module, teacher: nn.Module, lessons: Any, told: argparse.Namespace) -> nn.Module:
    """AdamW on a cosine, flips, half of the loss from the teacher's probabilities softened by 2."""
    steps = told.finetune
    optimizer = torch.optim.AdamW(small.parameters(), lr=told.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, told.lr, total_steps=steps, pct_start=0.1)
    small.requires_grad_(True).train()
    torch.manual_seed(0)
    for images, labels in lessons:
        images = torch.where((torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5), images.flip(3), images)
        with torch.no_grad():
            soft = (teacher(images) / 2).softmax(1)
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
    for block in other.blocks:
        block.attn.fused_attn = False
    embed = other.patch_embed
    image = torch.zeros(1, embed.proj.in_channels, *embed.img_size, device=next(other.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        other(image)
    return counter.get_total_flops() // 2


def images_of(about: dict[str, Any], size: int, told: argparse.Namespace) -> Callable[[Source, np.ndarray], Batches]:
    """Reads rows of a data set as the model was evaluated on them: the middle, at its size, normalised as in its folder."""
    mean, std = (torch.tensor(about["about"][name]).view(3, 1, 1) for name in ("mean", "std"))
    fill = np.zeros(3, np.uint8)  # nothing is shifted in evaluation

    def tensors(source: Source, rows: np.ndarray) -> Batches:
        batches = []
        for part in np.array_split(rows, -(-len(rows) // told.batch)):
            pictures = []
            for row in part:
                pixels = source.read(int(row))
                sides = np.array([pixels.shape[0]]), np.array([pixels.shape[1]])
                line = np.concatenate([augment.centre(*sides, size)[0], [0, 0, 0]]).astype(np.int32)
                pictures.append(torch.from_numpy(plain.view(pixels, line, size, fill).copy()).permute(2, 0, 1))
            images = (torch.stack(pictures).float() / 255 - mean) / std
            batches.append((images.to(told.device), torch.from_numpy(source.labels[part]).to(told.device)))
        return batches

    return tensors


if __name__ == "__main__":
    sys.exit(main())
