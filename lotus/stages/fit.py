"""A training, as several stages do it: from rows and a recipe to a trained model, its folder and what it cost."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Recipe
from lotus.events import Event, Said, Wrote
from lotus.files import digest
from lotus.stage import TRAIN_FORWARDS, Outcome
from lotus.stages.context import Context
from lotus.stages.patches import fewer_tokens, joint_line, patch_scores, share_out, told_of_patches
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.data.sample_plan import SamplePlan
    from lotus.training.guests import Guest
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


@dataclass(frozen=True)
class Images:
    """What a training goes through."""

    rows: np.ndarray
    """(K,) of the data set."""
    weights: np.ndarray | None = None
    """(N,) what each row of the data set counts in the loss; None for 1 each."""
    side: int | None = None
    """In pixels; None: the model's own."""


def fit(
    context: Context,
    stage: str,
    recipe: Recipe,
    model: nn.Module,
    images: Images,
    guests: Sequence[Guest] = (),
    *,
    place: str = "",
    seed: int | None = None,
    evaluate: bool = True,
) -> Generator[Event, None, tuple[Fitted, Price]]:
    """Train ``model`` by ``recipe``; returns what came out and what it cost.

    Args:
        guests: who joins besides those that the recipe names
        place: where ``recipe`` stands in the config; empty: under the stage's name
        seed: of this training; None: the run's
        evaluate: measure it on the validation images

    Raises:
        Refused: also where it ended in weights or a loss that are not finite; nothing is kept of them.
    """
    from lotus.training import loop
    from lotus.training.average import MovingAverage
    from lotus.training.distributed import StopFlag
    from lotus.training.fewer import FewerPatches
    from lotus.training.objective import Objective
    from lotus.vit.cost import macs
    from lotus.vit.model import image_size

    run, world, place = context.run, context.world, place or stage
    seed = context.config.seed if seed is None else seed
    patches = None if stage == "baseline" else recipe.patches
    side = image_size(model) if images.side is None else images.side
    _set_drop_path(model, recipe)
    order = _order(context, recipe, images.rows, seed)
    joined = [*guests, *_own_guests(context, stage, place, recipe, model, images, seed)]
    if recipe.ema:
        joined.append(MovingAverage(recipe.ema))
    with contextlib.ExitStack() as open_things:
        stop = open_things.enter_context(StopFlag())
        tickets, asked, asked_macs, left = None, 0, 0.0, tuple[Path, ...]()
        if patches is not None and (patches.model or patches.cached):
            tickets, asked, asked_macs, left = yield from patch_scores(context, stage, patches, recipe, model, seed)
        joint = None
        if patches is not None and patches.joint is not None:
            joint = share_out(context, patches, model, seed, place=f"{place}.patches.joint")
            if world.is_main:
                yield Said(stage, joint_line(joint, images.rows))
        tokens = None if patches is None else open_things.enter_context(fewer_tokens(model, patches, context.shelves))
        if tokens is not None:
            joined.append(FewerPatches(tokens, tickets, joint))
        loader = open_things.enter_context(
            context.loader(run.train_beton, order, size=side, augment=recipe.augment, seed=seed)
        )
        validation = open_things.enter_context(context.images(run.val_beton, None, recipe, model)) if evaluate else None
        objective = Objective(recipe, len(context.manifest().classes), seed)
        data = loop.Data(loader, order, objective, validation, images.weights)
        folder = run.work(stage) / str(seed) if stage == "score" else run.work(stage)
        key = digest([run.settings(stage), run.made_from(stage), seed])
        job = loop.Job(stage, folder, key, world, place=place, stop=stop, shelves=context.shelves)
        fitted = yield from loop.fit(model, recipe, data, job, joined)
        _check_sound(fitted, stage, place, evaluated=evaluate)
        told = {} if patches is None or tokens is None else told_of_patches(patches, tokens, joint, images.rows)
    counted = fitted.macs / fitted.images_seen if fitted.images_seen and fitted.macs else None
    beside = sum(guest.own_macs() for guest in joined)
    if patches is None or tokens is None:
        return fitted, Price((macs(fitted.model, side) if counted is None else counted) + beside)
    mean = float(tokens.macs()) if counted is None else counted
    return fitted, Price(mean + beside, {**told, "train_macs": mean}, asked, asked_macs, left)


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


def _set_drop_path(model: nn.Module, recipe: Recipe) -> None:
    from lotus.vit import anatomy
    from lotus.vit.model import set_drop_path

    if recipe.drop_path or not anatomy.why_not(model, convolved=True):  # a proxy of another kind has none to turn off
        set_drop_path(model, recipe.drop_path)


def _order(context: Context, recipe: Recipe, rows: np.ndarray, seed: int) -> SamplePlan:
    from lotus.data.sample_plan import SamplePlan

    return SamplePlan(
        rows, seed=seed, batch_size=recipe.batch_size, world=context.world.size, rank=context.world.rank,
        accumulate=recipe.accumulate,
    )  # fmt: skip


def _own_guests(
    context: Context, stage: str, place: str, recipe: Recipe, model: nn.Module, images: Images, seed: int
) -> list[Guest]:
    """Those that the config names. They join the training whose recipe it is, and no other that goes by it."""
    from lotus.data import beton
    from lotus.training import named
    from lotus.training.growing import GrowingPictures

    joins = stage in (place, "baseline")  # whose recipe keeps only what is no lottery
    wanted, sides = (getattr(recipe, name, ()) if joins else () for name in ("guests", "sides"))
    growing: list[Guest] = [GrowingPictures(sides)] if sides else []
    if not wanted:
        return growing
    here = {
        "model": model, "recipe": recipe, "rows": images.rows, "labels": beton.labels(context.run.train_beton),
        "classes": len(context.manifest().classes), "seed": seed, "world": context.world,
    }  # fmt: skip
    return growing + named.chosen(wanted, here, context.shelves, place=f"{place}.guests")


def keep_model(
    context: Context, stage: str, model: nn.Module, folder: Path, more: Mapping[str, Any] | None = None
) -> Iterator[Event]:
    """Write the model's folder, with what is needed to use it."""
    import lotus.pruning

    if context.world.rank == 0:
        manifest = context.manifest()
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
