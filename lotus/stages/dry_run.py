"""What ``--dry-run`` tells: which stages would run, and what they would cost."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Config
from lotus.run import BY_NAME, Run
from lotus.stages.checks import check, look_ahead
from lotus.stages.probe import proxy_model
from lotus.stages.shop import TRAIN_FORWARDS, plan
from selection import dynamic_pruning

if TYPE_CHECKING:
    from torch import nn

    from lotus.config import Patches


def forecast(
    config: Config,
    *,
    until: str = "report",
    first: str | None = None,
    again: bool = False,
    shelves: Sequence[ModuleType] = (),
) -> list[dict[str, Any]]:
    """What ``--dry-run`` tells: a row a stage, with whether it would run, why, and what it would cost."""
    from lotus.data.dataset import open_data
    from lotus.pruning.measure import enough
    from lotus.pruning.narrow import GRID
    from lotus.vit.cost import count
    from lotus.vit.model import create

    check(config, shelves)
    look_ahead(config)
    run, names = Run(config, shelves), plan(config, until)
    train_source, val_source = open_data(config.data, shelves)
    n = len(train_source.labels)
    model = create(config.model, len(train_source.classes))
    macs = count(model).macs
    asked = n * _asked_macs(config.train.patches, macs)
    kept = round(config.select.keep * n)
    on_patches = _forecast_share(model, config.train.patches, kept)
    small = macs * (config.prune.keep.macs or 1)
    wants = config.train.redraw
    drawn = (
        dynamic_pruning.rehearse(pick=wants, keep=wants.keep, epochs=config.train.epochs, shelves=shelves)
        if wants
        else 1.0
    )
    teacher = macs if config.finetune.distill != "none" else 0
    probe = _forecast_probe(config, n, len(train_source.classes))
    looked_at = min(config.prune.calibration or enough(model), kept)
    calibration: float = (TRAIN_FORWARDS + config.prune.rotate) * looked_at
    searched, convolve = config.prune.search, config.prune.convolve
    if config.prune.method != "structured":
        calibration = _forecast_zeros(config, kept, len(val_source.labels))
    elif (
        searched is not None
    ):  # about: what is tried has half of the MACs, and how much is tried follows from what is found
        each = 8 * searched.levels * searched.rounds
        tries = searched.grid**2 + 40 * searched.rounds if searched.kind == "ratios" else each
        calibration = searched.rounds * calibration + round(searched.images * tries / 2)
    elif convolve is not None:
        calibration = 1.5 * TRAIN_FORWARDS * convolve.epochs * kept
    elif config.prune.width == "search":  # auto: at least the first of these
        calibration *= len(GRID)
    costs = {
        "score": probe,
        "baseline": _training(config.train.epochs * n, macs),
        "train": _and(
            _training(round(config.train.epochs * kept * drawn), macs * on_patches), (n if asked else 0, asked)
        ),
        "prune": (calibration, calibration * macs),
        "finetune": _training(
            config.finetune.epochs * kept, small * _forecast_share(model, config.finetune.patches, kept), teacher
        ),
    }
    says = {name: BY_NAME[name].says for name in names}
    if config.prune.method != "structured" and "prune" in says:
        says["prune"] = f"set weights to zero ({config.prune.method}), keep {config.prune.keep.weights:g}"
    for name, patches in (("train", config.train.patches), ("finetune", config.finetune.patches)):
        if patches is not None and name in says:
            says[name] += f", patches: {patches.mode}, keep {patches.keep:g}, evaluated {patches.evaluate}"
    rows: list[dict[str, Any]] = []
    dirty = False
    for name in names:
        told = again or (first in names and names.index(name) >= names.index(first))
        why = "asked for" if told else run.why(name)
        if why is None and dirty and any(row["why"] for row in rows if row["stage"] in run.after(name)):
            why = "what it reads is made again"
        dirty |= why is not None
        forwards, spent = costs.get(name, (0, 0))
        rows.append({"stage": name, "says": says[name], "why": why, "image_forwards": forwards, "macs": spent})
    return rows


def _forecast_probe(config: Config, n: int, classes: int) -> tuple[float, float]:
    """Image forwards and MACs of the score stage."""
    from lotus.training import linear
    from lotus.vit.cost import macs

    wants = config.score
    model, side = proxy_model(config, classes, loaded=False)
    timm_model: Any = model
    price, width = macs(model, side), int(timm_model.head_hidden_size)
    on_parts = wants.subsets.part * wants.subsets.runs * n if wants.subsets else 0.0
    if wants.probe == "linear":
        return float(n), n * price + linear.macs(wants.heads * n + on_parts, wants.epochs, width, classes)
    forwards = TRAIN_FORWARDS * wants.epochs * (wants.seeds * n + on_parts) + n
    forwards += wants.subsets.runs * n if wants.subsets else 0
    return forwards, forwards * price


def _forecast_share(model: nn.Module, patches: Patches | None, images: int) -> float:
    """Part of the dense model's MACs that a training of ``images`` on ``patches`` spends, its schedule included."""
    from lotus.vit.cost import count
    from lotus.vit.tokens import Tokens
    from selection.joint_budget import allot

    if patches is None:
        return 1.0
    spent, moments = 0.0, 200
    with Tokens(model, patches) as tokens:
        ends: list[tuple[float | None, float]] = [(None, 1.0)]
        if patches.joint is not None:  # by ranks alone: how many images a bucket has does not depend on what they score
            shared = allot(
                np.arange(images), patches=tokens.patches, keep=patches.keep, buckets=patches.joint.buckets,
                least=patches.joint.least, place="train.patches.joint",
            )  # fmt: skip
            ends = list(
                zip(tokens.shares, np.bincount(shared.level, minlength=len(tokens.shares)) / images, strict=True)
            )
        for moment in range(moments):
            for share, part in ends:
                tokens.schedule((moment + 0.5) / moments, share)
                spent += part * tokens.macs() / moments
    return spent / count(model).macs


def _asked_macs(patches: Patches | None, dense: float) -> float:
    """MACs of an image in the model that is asked about patches, ``dense`` in the run's own; 0 where there is none."""
    from lotus.pruning import spec

    if patches is not None and patches.model == "baseline":
        return dense
    return float(spec.read(patches.model)["cost"]["macs"]) if patches is not None and patches.model else 0.0


def _forecast_zeros(config: Config, kept: int, validation: int) -> float:
    """Image-forwards of unstructured pruning: what is measured, and what a soup trains."""
    from lotus.pruning.unstructured import SWEEP
    from lotus.training import soup

    wants = config.prune
    looks = (len(SWEEP) + 1 if wants.sweep else 1) * validation
    if wants.method != "soup" or wants.keep.weights is None:
        return looks
    own, each = soup.steps(wants.keep.weights, config.finetune.batch_size, wants.soup, kept)
    return looks + TRAIN_FORWARDS * config.finetune.batch_size * (own + each)


def _and(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _training(images: float, macs: float, teacher: float = 0) -> tuple[float, float]:
    return images * (TRAIN_FORWARDS + (1 if teacher else 0)), images * (TRAIN_FORWARDS * macs + teacher)
