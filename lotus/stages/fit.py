"""A training, as several stages do it: from rows and a recipe to a trained model, its folder and what it cost."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Recipe, Train
from lotus.events import Event, Said, Wrote
from lotus.files import digest
from lotus.stage import TRAIN_FORWARDS, Outcome
from lotus.stages.context import Context
from lotus.stages.patches import PatchScores, fewer_tokens, joint_line, patch_scores, share_out, told_of_patches
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.config import Patches
    from lotus.data.beton import Manifest
    from lotus.data.sample_plan import SamplePlan
    from lotus.training.guests import Guest
    from lotus.training.loop import Fitted
    from lotus.training.patch_buckets import Joint
    from lotus.vit.preprocessing import Preprocessing
    from lotus.vit.tokens import Tokens


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
    beside: tuple[float, float] = (0.0, 0.0)
    """Image-forwards and MACs that guests spent beside the training's own passes, or spared of them."""
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


@dataclass(frozen=True)
class Task:
    """Which training of a run it is, and by which recipe."""

    stage: str
    recipe: Recipe
    place: str = ""
    """Where the recipe stands in the config; empty: under the stage's name."""
    seed: int | None = None
    """None: the run's."""
    part: str = ""
    """Which of the stage's trainings, where each is to be taken up by itself: the name of its folder within the stage's."""
    evaluate: bool = True
    """Measure it on the validation images."""
    own_guests: bool = False
    """The recipe is another's, and its guests and sides join nevertheless."""

    @property
    def where(self) -> str:
        return self.place or self.stage


def fit(
    context: Context, task: Task, model: nn.Module, images: Images, guests: Sequence[Guest] = ()
) -> Generator[Event, None, tuple[Fitted, Price]]:
    """Train ``model``; returns what came out and what it cost.

    Args:
        context: of the run
        task: which stage trains, by which recipe
        images: rows, weights and side of the images
        guests: who joins besides those that the recipe names

    Raises:
        Refused: also where it ended in weights or a loss that are not finite; nothing is kept of them.
    """
    from lotus.training import loop
    from lotus.training.average import MovingAverage
    from lotus.training.distributed import StopFlag
    from lotus.training.objective import Objective
    from lotus.training.spikes import LossSpikes
    from lotus.vit.model import image_size

    run, stage, recipe = context.run, task.stage, task.recipe
    seed = context.config.seed if task.seed is None else task.seed
    side = image_size(model) if images.side is None else images.side
    _set_drop_path(model, recipe)
    order = _order(context, recipe, images.rows, seed)
    if order.left_out:
        yield Said(
            stage,
            f"{order.left_out} of {len(images.rows):,} images sit each epoch out, others each time: {order.world} ranks share a step evenly",
        )
    joined = [*guests, *_own_guests(context, task, model, images, seed)]
    if recipe.ema:
        joined.append(MovingAverage(recipe.ema))
    if recipe.on_spike is not None and not any(isinstance(guest, LossSpikes) for guest in joined):
        joined.append(LossSpikes(8.0, 50, acts=True))
    with contextlib.ExitStack() as open_things:
        stop = open_things.enter_context(StopFlag())
        fewer = None
        if recipe.patches is not None:
            fewer = yield from _on_fewer(context, task, recipe.patches, model, images.rows, seed)
            joined.append(open_things.enter_context(fewer).guest)
        joined += _still(task)
        loader = open_things.enter_context(
            context.loader(run.train_beton, order, size=side, augment=recipe.augment, seed=seed, keep=True)
        )
        validation = None
        if task.evaluate:
            validation = open_things.enter_context(context.images(run.val_beton, None, recipe, model, keep=True))
        yield from _told_of_memory(context, task.stage, loader, validation)
        objective = Objective(recipe, len(context.manifest().classes), seed)
        data = loop.Data(loader, order, objective, validation, images.weights)
        key = digest([run.settings(stage), run.made_from(stage), seed])
        job = loop.Job(
            stage, run.work(stage) / task.part, key, context.world, place=task.where, stop=stop, shelves=context.shelves,
            named=_names(context),
        )  # fmt: skip
        fitted = yield from loop.fit(model, recipe, data, job, joined)
        check_sound(fitted, stage, task.where, evaluated=task.evaluate)
        told = {} if fewer is None else told_of_patches(fewer.patches, fewer.tokens, fewer.joint, images.rows)
    return fitted, _price(fitted, joined, side, fewer, told)


def _told_of_memory(context: Context, stage: str, *loaders: Any) -> Iterator[Event]:
    """Whether decoded images stay in memory."""
    from lotus.data import kept

    if not context.world.is_main or not context.config.data.keep_decoded:
        return
    for loader in loaders:
        if loader is not None and (text := kept.sentence(loader.beton, loader.kept)):
            yield Said(stage, text)


@dataclass(frozen=True)
class _Fewer(contextlib.AbstractContextManager["_Fewer"]):
    """A model on fewer tokens while this is entered, and how they are chosen."""

    patches: Patches
    tokens: Tokens
    scores: PatchScores
    joint: Joint | None

    @property
    def guest(self) -> Guest:
        from lotus.training.fewer import FewerPatches

        return FewerPatches(self.tokens, self.scores.tickets, self.joint)

    def __exit__(self, *fault: object) -> None:
        self.tokens.remove()


def _on_fewer(
    context: Context, task: Task, patches: Patches, model: nn.Module, rows: np.ndarray, seed: int
) -> Generator[Event, None, _Fewer]:
    """Puts ``model`` on fewer tokens: first scores the patches and shares them out, where that is asked for."""
    scores, joint = PatchScores(), None
    if patches.model or patches.cached:
        scores = yield from patch_scores(context, task.stage, patches, task.recipe, model, seed)
    if patches.joint is not None:
        joint = share_out(context, patches, model, seed, place=f"{task.where}.patches.joint")
        if context.world.is_main:
            yield Said(task.stage, joint_line(joint, rows))
    tokens = fewer_tokens(model, patches, context.shelves, place=f"{task.where}.patches")
    return _Fewer(patches, tokens, scores, joint)


def _price(fitted: Fitted, guests: Sequence[Guest], side: int, fewer: _Fewer | None, told: Mapping[str, Any]) -> Price:
    """What ``fitted`` spent: as it was counted in the training, else what its model spends now."""
    from lotus.vit.cost import macs

    if fitted.images_seen and fitted.macs:
        each = fitted.macs / fitted.images_seen
    else:
        each = macs(fitted.model, side) if fewer is None else float(fewer.tokens.macs())
    spent = each + sum(guest.own_macs() for guest in guests)
    bills = [guest.bill() for guest in guests]
    beside = sum(forwards for forwards, _ in bills), sum(macs for _, macs in bills)
    if fewer is None:
        return Price(spent, beside=beside)
    scores = fewer.scores
    return Price(spent, {**told, "train_macs": each}, scores.asked, scores.asked_macs, beside, scores.left)


def _names(context: Context) -> Callable[[np.ndarray], str]:
    """What is told of images by their rows: their files where the data set has files and is at hand, else the rows."""

    @functools.cache
    def files() -> Sequence[str] | None:
        from lotus.ticket import Data

        try:
            return Data("data", context.config, context.run.train_beton, shelves=context.shelves).images().names
        except Refused:
            return None

    def told(rows: np.ndarray) -> str:
        from lotus.training.spikes import by_rows

        known = files()
        return by_rows(rows) if known is None else ", ".join(known[row] for row in rows.tolist())

    return told


def check_sound(fitted: Fitted, stage: str, place: str, *, evaluated: bool) -> None:
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


def _own_guests(context: Context, task: Task, model: nn.Module, images: Images, seed: int) -> list[Guest]:
    """Those that the config names. They join the training whose recipe it is, and no other that goes by it."""
    from lotus.data import beton
    from lotus.training import named
    from lotus.training.balanced import BalancedClasses
    from lotus.training.growing import GrowingPictures

    recipe, own = task.recipe, task.own_guests or task.stage == task.where
    wanted, sides = (getattr(recipe, name, ()) if own else () for name in ("guests", "sides"))
    growing: list[Guest] = [GrowingPictures(sides)] if sides else []
    if (balance := getattr(recipe, "balance", "none")) != "none":
        growing.append(BalancedClasses(balance, beton.labels(context.run.train_beton), seed))
    if not wanted:
        return growing
    here = {
        "model": model, "recipe": recipe, "rows": images.rows, "labels": beton.labels(context.run.train_beton),
        "classes": len(context.manifest().classes), "seed": seed, "world": context.world,
    }  # fmt: skip
    return growing + named.chosen(wanted, here, context.shelves, place=f"{task.where}.guests")


def _still(task: Task) -> list[Guest]:
    """Who keeps parts of the model from learning; the last to join, since it is told by the others what an image costs."""
    from lotus.training.freeze import Frozen

    recipe = task.recipe
    if not (isinstance(recipe, Train) and recipe.holds_still):
        return []
    return [Frozen(recipe.freeze, recipe.probe_epochs / recipe.epochs, place=task.where)]


def keep_model(
    context: Context, stage: str, model: nn.Module, folder: Path, more: Mapping[str, Any] | None = None
) -> Iterator[Event]:
    """Write the model's folder, with what is needed to use it."""
    import lotus.pruning
    from lotus.stages.given import license_of

    if context.world.rank == 0:
        manifest = context.manifest()
        seen = _seen(context.preprocessing(), manifest, model)
        license_ = {"license": name} if (name := license_of(context.config.model)) else {}
        about = {"classes": manifest.classes, **seen, **license_, **(more or {})}
        lotus.pruning.save(model, folder, about=about)
        yield Wrote(stage, str(folder))


def _seen(pixels: Preprocessing, manifest: Manifest, model: nn.Module) -> dict[str, Any]:
    """How evaluation looks at the images: by area what is stored at the model's side is seen whole."""
    from lotus.vit.model import image_size

    how = pixels.interpolation
    whole = how == "area" and manifest.size is not None and min(manifest.size) <= image_size(model)
    timms = "bilinear" if how == "area" else how
    return {**pixels._replace(crop=1.0 if whole else pixels.crop, interpolation=timms).about(), "resize": how}


def outcome(fitted: Fitted, price: Price, model: nn.Module, more: Mapping[str, Any] | None = None) -> Outcome:
    """The cost of a training, and what it reached."""
    from lotus.vit.cost import count

    cost = count(model)
    forwards = TRAIN_FORWARDS * fitted.images_seen + price.asked + price.beside[0]
    spent = TRAIN_FORWARDS * fitted.images_seen * price.macs + price.asked_macs + price.beside[1]
    values = {
        "top1": fitted.top1, "loss": fitted.loss, "per_class": dict(fitted.per_class), "params": cost.params, "macs": cost.macs,
        "images_seen": fitted.images_seen, "train_seconds": fitted.seconds, "steps": fitted.steps, **(more or {}),
    }  # fmt: skip
    if price.patches:
        values["patches"] = dict(price.patches)
    return Outcome(forwards, spent, values, fitted.earlier_seconds, price.left)
