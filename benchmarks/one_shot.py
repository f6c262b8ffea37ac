"""Half of the MLP units, or of the query/key dimensions, gone in one shot, nothing trained: ours beside published figures.

    python benchmarks/pruning.py --model deit_small_patch16_224 --weights FILE --data IMAGENET_VAL
    python benchmarks/pruning.py --model deit_small_patch16_224 --weights FILE --data IMAGENET_VAL --calibrate IMAGENET_TRAIN --calibration 8192

    python benchmarks/pruning.py --model cifar100 --weights runs/cifar100/train --data cifar100.npz         # a folder that LOTUS wrote

IMAGENET_VAL is a folder of class folders, in the order of the model's classes, or an .npz of the catalog. Looked at are ``--calibration`` (8,192) images
of ``--calibrate``, else of IMAGENET_VAL itself, whose labels only ours reads; top-1 is of all of IMAGENET_VAL, or ``--images`` of it.

    ours       MLPs: fisher and affine; query/key: the whitened SVD of each head, as ``lotus.prune`` turns them
    DVBP+OB2C  Lee, Choo and Jeon 2026 (2608.17657): published of 8,192 and of 65,536 images
    VBP        Berisha, Mehnert and Condurache 2025 (2507.12988), as published there beside it
    CORP       Zhang and Yang 2026 (2602.05243), of query/key dimensions; its ranking is not made here

All cut as many MLP units, in one ranking over the blocks, or as many query/key dimensions of each head.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lotus.config import Data, as_request
from lotus.data import folders, unpacked
from lotus.data.dataset import open_data
from lotus.data.source import Source
from lotus.data.views import Look
from lotus.pruning import Given, spec, study
from lotus.pruning.plan import BlockPlan, Plan
from lotus.pruning.study import Study
from lotus.report.numbers import accuracy
from lotus.vit import anatomy
from lotus.vit import model as door
from lotus.vit.cost import count
from lotus.vit.preprocessing import preprocessing, resizing
from selection.errors import Refused

DEIT_T, DEIT_S, DEIT_B = "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"
PUBLISHED: dict[tuple[str, str], dict[str, str]] = {
    ("MLP units", "DVBP+OB2C"): {DEIT_T: "56.40; 57.60", DEIT_S: "70.25; 71.05", DEIT_B: "75.85; 76.27"},
    ("MLP units", "VBP"): {DEIT_T: "42.89; 42.75", DEIT_S: "66.03; 66.18", DEIT_B: "68.92; 69.37"},
    ("query/key dimensions", "CORP"): {DEIT_T: "64.25", DEIT_S: "72.49", DEIT_B: "80.80"},
}
"""Top-1 on ImageNet-1k; of the first two with 8,192 and with 65,536 images looked at (table 7 of 2608.17657)."""
_BARE: dict[str, Any] = {"rotate": False, "embed_dim": None, "exclude": ["*.attn"], "round": 1}
MLPS: dict[str, dict[str, Any]] = {
    "ours": {**_BARE, "criterion": "fisher"},
    "DVBP+OB2C": {
        **_BARE,
        "criterion": {"name": "denoised_variance", "ratio": 0.5, "weighted": False},
        "compensate": "denoised",
    },
    "VBP": {**_BARE, "criterion": {"name": "variance", "weighted": False}, "compensate": "mean"},
}
PART = 0.5
LOOKED_AT = 8192
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def main(told: argparse.Namespace) -> int:
    """Print a row a way, as it is measured."""
    model, about = _model(told.name, told.weights)
    model = model.to(told.device)
    test, looked_at = _images(model, about, told)
    name = told.name.partition(".")[0]
    print(
        f"{told.name}: {accuracy(*top1(model, test))} whole; {told.calibration or LOOKED_AT:,} images looked at, nothing trained\n"
    )
    print("| half of | way | MACs | top-1 | published | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for what, way, cut in ways(model, looked_at):
        began = time.perf_counter()
        small = cut()
        spent = time.perf_counter() - began
        known = PUBLISHED.get((what, way), {}).get(name, "")
        part = count(small).macs / count(model).macs
        print(f"| {what} | {way} | {part:.3f} | {accuracy(*top1(small, test))} | {known} | {spent:.0f} |", flush=True)
    for (what, way), rows in PUBLISHED.items():
        if way == "CORP":
            print(f"| {what} | {way} | | | {rows.get(name, '')} | |")
    return 0


def ways(model: nn.Module, batches: Batches) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """What goes, by which way, and what cuts it."""
    for way, settings in MLPS.items():
        yield "MLP units", way, lambda settings=settings: mlps(study(model, batches, as_request(settings), Given()))
    yield (
        "query/key dimensions",
        "ours",
        lambda: keys(study(model, batches, as_request({"decouple_qk": True, "embed_dim": None}), Given())),
    )


def mlps(studied: Study, part: float = PART) -> nn.Module:
    """Without the lowest of all MLP units."""
    blocks = anatomy.blocks(studied.model)
    scores = [studied.scores[f"{block.name}.mlp"] for block in blocks]
    every = np.concatenate(scores)
    stays = np.ones(len(every), bool)
    stays[np.argsort(every, kind="stable")[: round(part * len(every))]] = False
    plans = []
    for block, kept in zip(blocks, np.split(stays, np.cumsum([len(one) for one in scores])[:-1]), strict=True):
        units = np.flatnonzero(kept)
        best = np.array([int(studied.scores[f"{block.name}.mlp"].argmax())])  # a block without any is another thing
        plans.append(replace(BlockPlan.full(block.dims), units=tuple((units if len(units) else best).tolist())))
    return studied.cut(Plan(tuple(plans))).model


def keys(studied: Study, part: float = PART) -> nn.Module:
    """Without the lowest query/key dimensions of each head."""
    plans = []
    for block in anatomy.blocks(studied.model):
        whole = BlockPlan.full(block.dims)
        scores = studied.scores[f"{block.name}.qk"].reshape(whole.of.heads, whole.of.qk_dim)
        count_ = max(1, round((1 - part) * whole.of.qk_dim))
        kept = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :count_], axis=1)
        plans.append(replace(whole, qk=tuple(tuple(row) for row in kept.tolist())))
    return studied.cut(Plan(tuple(plans)), decouple_qk=True).model


@torch.no_grad()
def top1(model: nn.Module, batches: Batches) -> tuple[float, int]:
    """In percent, and of how many images."""
    right = seen = 0
    for images, labels in batches():
        right += int((model(images).argmax(1) == labels).sum())
        seen += len(labels)
    return 100 * right / seen, seen


def _model(name: str, weights: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what it wants of its images."""
    if not (Path(weights) / "spec.json").is_file():
        model, about = door.adopt(name, {}, weights)
        return model, {**about, "resize": about["interpolation"]}
    ours: Any = spec.load(weights)
    return ours, {**preprocessing(ours).about(), **spec.read(weights).get("about", {})}


def _images(model: Any, about: dict[str, Any], told: argparse.Namespace) -> tuple[Batches, Batches]:
    """What is measured on, and what is looked at."""
    root, other = Path(told.data), Path(told.calibrate or told.data)
    if root.suffix == ".npz":
        seen, val = open_data(Data(name="npz", path=told.data))
        return _batches(model, val, about, told.images), _batches(model, seen, about, told.calibration or LOOKED_AT)
    for flag, folder in (("--data", root), ("--calibrate", other)):
        if not folder.is_dir():
            raise Refused(f"{flag} {folder}: there is no such folder. Give a folder of class folders.")
    val = folders.folder(folders.part(root, folders.VAL) or root)
    seen = folders.folder(folders.part(other, folders.TRAIN) or other)
    if len(val.classes) != model.num_classes:
        raise Refused(
            f"--data {told.data}: has {len(val.classes)} classes, and {told.name} tells {model.num_classes} apart. Give a folder of "
            "those classes, in their order."
        )
    return _batches(model, val, about, told.images), _batches(model, seen, about, told.calibration or LOOKED_AT)


def _batches(model: nn.Module, source: Source, about: dict[str, Any], most: int | None) -> Batches:
    """The same images at every call, as timm's recipe for the weights has them: ``most`` that are drawn, or all."""
    rows = np.random.default_rng(0).permutation(len(source))[: most or len(source)]
    device = next(model.parameters()).device
    seen = {name: about[name] for name in ("mean", "std", "crop", "crop_mode")}
    look = Look(size=door.image_size(model), interpolation=resizing(about), **seen)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in unpacked.batches(source, np.sort(rows), look):
            yield images.to(device), labels.to(device)

    return batches
