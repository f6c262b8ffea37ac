"""A training, as several stages do it: from rows and a recipe to a trained model, its folder and what it cost."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Recipe
from lotus.events import Event, Said, Wrote
from lotus.files import digest
from lotus.stages.patches import fewer_tokens, joint_line, patch_scores, share_out, told_of_patches
from lotus.stages.shop import TRAIN_FORWARDS, Outcome, Shop
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.training.loop import Fitted


@dataclass(frozen=True)
class Price:
    """What a training spends beside images: how much an image costs, and what was asked before it."""

    macs: float
    """Of an image's forward pass; the mean over all of them where patches were left out on the way."""
    patches: Mapping[str, Any] = field(default_factory=dict)
    """What is told of the patches; empty where all were seen."""
    asked: int = 0
    """Images that another model was shown for its opinion of their patches."""
    asked_macs: float = 0.0
    left: tuple[Path, ...] = ()
    """Files that it read and that have to stand for as long as what came of it does."""


def fit(
    shop: Shop,
    stage: str,
    recipe: Recipe,
    model: nn.Module,
    *,
    rows: np.ndarray,
    weights: np.ndarray | None = None,
    gates: Any = None,
    penalty: Any = None,
    distiller: Any = None,
    recorder: Any = None,
    redrawing: Any = None,
    seed: int | None = None,
    evaluate: bool = True,
    side: int | None = None,
    place: str = "",
) -> Generator[Event, None, tuple[Fitted, Price]]:
    """Train ``model`` on ``rows`` by ``recipe``; returns what came out and what it cost.

    Args:
        place: where the settings of ``recipe`` stand; empty: the stage's name

    Raises:
        Refused: also where it ended in weights or a loss that are not finite; nothing is kept of them.
    """
    from lotus.data.plan import SamplePlan
    from lotus.training import loop
    from lotus.training.distributed import StopFlag
    from lotus.training.objective import Objective
    from lotus.vit.cost import macs
    from lotus.vit.model import image_size, set_drop_path

    run, world = shop.run, shop.world
    manifest = shop.manifest()
    seed = shop.config.seed if seed is None else seed
    patches = None if stage == "baseline" else recipe.patches
    side = image_size(model) if side is None else side
    with contextlib.nullcontext() if recipe.drop_path else contextlib.suppress(Refused):
        set_drop_path(model, recipe.drop_path)  # a probe of another kind has none that could be turned off
    order = SamplePlan(
        rows, seed=seed, batch_size=recipe.batch_size, world=world.size, rank=world.rank, accumulate=recipe.accumulate
    )
    folder = run.work(stage) / str(seed) if stage == "score" else run.work(stage)
    key = digest([run.settings(stage), run.made_from(stage), seed])
    with contextlib.ExitStack() as open_things:
        stop = open_things.enter_context(StopFlag())
        tickets, asked, asked_macs, left = None, 0, 0.0, tuple[Path, ...]()
        if patches is not None and (patches.model or patches.cached):
            tickets, asked, asked_macs, left = yield from patch_scores(shop, stage, patches, recipe, model, seed)
        joint = None
        if patches is not None and patches.joint is not None:
            joint = share_out(shop, patches, model, seed)
            if world.is_main:
                yield Said(stage, joint_line(joint, rows))
        tokens = None if patches is None else open_things.enter_context(fewer_tokens(model, patches, shop.shelves))
        loader = open_things.enter_context(
            shop.loader(run.train_beton, order, size=side, augment=recipe.augment, seed=seed)
        )
        validation = open_things.enter_context(shop.images(run.val_beton, None, recipe, model)) if evaluate else None
        fitted = yield from loop.fit(
            model,
            stage=stage,
            recipe=recipe,
            loader=loader,
            plan=order,
            validation=validation,
            objective=Objective(recipe, len(manifest.classes), seed),
            weights=weights,
            gates=gates,
            penalty=penalty,
            distiller=distiller,
            recorder=recorder,
            redrawing=redrawing,
            tokens=tokens,
            tickets=tickets,
            joint=joint,
            folder=folder,
            world=world,
            stop=stop,
            key=key,
        )
        _check_sound(fitted, stage, place or stage, evaluated=evaluate)
        told = {} if patches is None or tokens is None else told_of_patches(patches, tokens, joint, rows)
    if patches is None or tokens is None:
        return fitted, Price(macs(model, side))
    mean = fitted.macs / fitted.images_seen if fitted.images_seen else float(tokens.macs())
    return fitted, Price(mean, {**told, "train_macs": mean}, asked, asked_macs, left)


def _check_sound(fitted: Fitted, stage: str, place: str, *, evaluated: bool) -> None:
    """Refuse what a training left that diverged without that three steps in a row showed it."""
    import math

    import torch

    wrong = next((name for name, weight in fitted.state.items() if not torch.isfinite(weight).all()), "")
    if not wrong and not (evaluated and not (math.isfinite(fitted.loss) and math.isfinite(fitted.top1))):
        return
    what = f"{wrong} is not finite" if wrong else f"the loss on the validation images is {fitted.loss}"
    raise Refused(
        f"{stage}: the training ended diverged: {what}. What stood there before stands. Lower {place}.lr, or set {place}.clip=1 "
        f"and a longer {place}.warmup_epochs."
    )


def keep_model(
    shop: Shop, stage: str, model: nn.Module, folder: Path, more: Mapping[str, Any] | None = None
) -> Iterator[Event]:
    """Write the model's folder, with what is needed to use it."""
    import lotus.pruning

    if shop.world.rank == 0:
        manifest = shop.manifest()
        about = {"classes": manifest.classes, "mean": manifest.mean, "std": manifest.std, **(more or {})}
        lotus.pruning.save(model, folder, about=about)
        yield Wrote(stage, str(folder))


def outcome(
    fitted: Fitted, price: Price, model: nn.Module, more: Mapping[str, Any] | None = None, *, teacher_macs: int = 0
) -> Outcome:
    """The cost of a training, and what it reached."""
    from lotus.vit.cost import count

    cost = count(model)
    forwards = TRAIN_FORWARDS * fitted.images_seen + (fitted.images_seen if teacher_macs else 0)
    spent = fitted.images_seen * (TRAIN_FORWARDS * price.macs + teacher_macs)
    values = {
        "top1": fitted.top1, "loss": fitted.loss, "params": cost.params, "macs": cost.macs,
        "images_seen": fitted.images_seen, "train_seconds": fitted.seconds, "steps": fitted.steps, **(more or {}),
    }  # fmt: skip
    if price.patches:
        values["patches"] = dict(price.patches)
    return Outcome(forwards + price.asked, spent + price.asked_macs, values, fitted.earlier_seconds, price.left)
