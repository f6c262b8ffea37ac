"""What is known of a run before anything is done: what its stages' checks and forecasts are made from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Config, Model, Patches, Recipe
from lotus.shelves import known
from lotus.stage import TRAIN_FORWARDS
from selection import memory
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.data.catalog import Source
    from lotus.vit.anatomy import Dims

LOOK = ("data.normalize", "data.crop", "data.interpolation")
"""How images are shown to a model, which is a part of how it is trained and measured."""
Cost = tuple[float, float]
"""Image-forwards and MACs."""


class Ahead:
    """A config, with the models and data that follow from it; each is made when it is first asked for."""

    def __init__(self, config: Config, shelves: Sequence[ModuleType] = ()) -> None:
        self.config, self.shelves = config, known(shelves)
        self.spent = 0.0
        """MACs that the lottery is forecast to have cost, by the stages that were asked so far."""

    @cached_property
    def shape(self) -> nn.Module:
        """The dense ViT, to look at its shape: of ten classes, with no weights of anybody's."""
        from lotus.stages.given import shape_of

        return shape_of(self.config.model, classes=10)

    @cached_property
    def sources(self) -> tuple[Source, Source]:
        """Where training and validation images come from."""
        from lotus.data.dataset import open_data

        return open_data(self.config.data, self.shelves)

    @property
    def images(self) -> int:
        """To train on."""
        return len(self.sources[0].labels)

    @property
    def kept(self) -> int:
        """Of them, in the ticket that the training begins with."""
        return self.images if self.config.watches_itself else round(self.config.select.keep * self.images)

    @property
    def classes(self) -> int:
        return len(self.sources[0].classes)

    @cached_property
    def dense(self) -> nn.Module:
        """The ViT that is trained."""
        from lotus.stages.given import model_of

        return model_of(self.config.model, self.classes, names=self.sources[0].classes)

    @cached_property
    def macs(self) -> int:
        """Of an image in it."""
        from lotus.vit.cost import count

        return count(self.dense).macs

    def share(self, recipe: Recipe, place: str, model: nn.Module | None = None, images: int | None = None) -> float:
        """Fraction of a model's MACs that its training by ``recipe``, which stands at ``place``, spends on its patches, their schedule
        included: of ``model`` on ``images``, else of the dense one on the ticket."""
        from lotus.vit.cost import count

        if (patches := recipe.patches) is None or not recipe.epochs:
            return 1.0
        few = seen_before(recipe, self.kept if images is None else images, patches.until)
        whole = self.macs if model is None else count(model).macs
        return few * self.on_patches(patches, (0, few), model=model, place=f"{place}.patches") / whole + (1 - few)

    def on_patches(
        self,
        patches: Patches,
        part: tuple[float, float] = (0, 1),
        step: float = 0,
        model: nn.Module | None = None,
        dims: Sequence[Dims] | None = None,
        *,
        place: str = "train.patches",
    ) -> float:
        """MACs of the average image of the ticket in a part of a training on ``patches``, before all of them are seen again.

        Args:
            part: its begin and its end, as fractions of the training
            step: fraction of the training that an optimizer step is, at whose start it is settled how many patches stay
            model: that is trained; None: the dense one
            dims: widths of its blocks; None: as they are
            place: where ``patches`` stand
        """
        from lotus.vit.tokens import Tokens
        from selection.joint_budget import allot

        spent, moments, fewer = 0.0, 200, patches.model_copy(update={"until": 1.0})
        with Tokens(self.dense if model is None else model, fewer, place=place) as tokens:
            ends: list[tuple[float | None, float]] = [(None, 1.0)]
            if patches.joint is not None:  # by ranks: how many images a bucket has does not depend on what they score
                shared = allot(
                    np.arange(self.kept), patches=tokens.patches, keep=patches.keep, buckets=patches.joint.buckets,
                    least=patches.joint.least, place=f"{place}.joint",
                )  # fmt: skip
                level = np.bincount(shared.level, minlength=len(tokens.shares))
                ends = list(zip(tokens.shares, level / self.kept, strict=True))
            for moment in range(moments):
                for share, images in ends:
                    now = part[0] + (part[1] - part[0]) * (moment + 0.5) / moments
                    tokens.schedule(max(now - step / 2, 0), share)
                    spent += images * tokens.macs(dims=dims) / moments
        return spent


def seen_before(recipe: Recipe, images: int, at: float) -> float:
    """Fraction of what a training by ``recipe`` goes through that it has seen before its first step which begins at ``at``, a fraction
    of its steps, or later; of ``images`` an epoch."""
    steps = math.ceil(images / recipe.batch_size)
    done = math.ceil(at * recipe.epochs * steps - 1e-9)
    return min(1.0, (done // steps * images + done % steps * recipe.batch_size) / (recipe.epochs * images))


def training(images: float, macs: float, teacher: float = 0) -> Cost:
    """Of going through ``images`` in all, each of ``macs``, with what a ``teacher`` of so many takes."""
    return images * (TRAIN_FORWARDS + (1 if teacher else 0)), images * (TRAIN_FORWARDS * macs + teacher)


def check_recipe(place: str, recipe: Recipe, model: nn.Module) -> None:
    """Refuse what the recipe at ``place`` asks of ``model`` and cannot have."""
    import lotus.pruning
    from lotus.training.deepspeed_config import check_flat, check_stage, stage_of
    from lotus.training.optim import make_optimizer
    from lotus.vit import anatomy
    from lotus.vit.token_plan import risen
    from lotus.vit.tokens import Tokens

    optimizer = make_optimizer(model, recipe, place=place)
    if recipe.deepspeed and not Path(recipe.deepspeed).is_file():
        raise Refused(f"{place}.deepspeed: there is no file {recipe.deepspeed}.")
    stage = stage_of(recipe, place)
    check_stage(recipe, stage, place)
    check_flat(optimizer, recipe, stage, place)
    if recipe.patches is not None:
        Tokens(model, recipe.patches, place=f"{place}.patches").remove()
        depth = len(anatomy.blocks(model))
        if recipe.patches.mode == "cumulative" and not risen(depth - 2, depth):
            raise Refused(
                f"{place}.patches.mode: cumulative lets no patch go before the last of {depth} blocks. Take evit or input."
            )
        if recipe.patches.model and not recipe.patches.asks_baseline:
            lotus.pruning.load(recipe.patches.model)


def check_weights(place: str, model: Model) -> None:
    """Refuse weights that are not there."""
    if model.weights and not Path(model.weights).exists():
        raise Refused(
            f"{place}.weights: there is nothing at {model.weights}. Give a file of weights, or the folder of a model."
        )


def check_fit(place: str, model: Model) -> None:
    """Refuse weights that cannot be had or are another model's: they are loaded."""
    from lotus.stages.given import model_of

    if model.weights or model.pretrained:
        with warnings.catch_warnings(action="ignore"):  # said when the model is made to be trained
            model_of(model, classes=10, place=place)


def check_runs(place: str, model: Model) -> None:
    """Refuse a model that can be made and takes no image: tried on two of them, without memory."""
    import torch

    from lotus.vit.model import build, image_size, of_hub

    model, _ = of_hub(model, place)
    made = build(model.name, model.args, meta=True, place=place)
    side = image_size(made)
    try:
        made.train()(torch.empty(2, 3, side, side, device="meta"))
    except Exception as error:
        if "meta" in str(error).lower():  # it looks into tensors, which here have nothing inside
            return
        told = " ".join(str(error).split())
        raise Refused(
            f"{place}.args: {model.name} with {model.args} takes no images ({told}). Leave one out."
        ) from None


def check_batch(place: str, images: int, model: nn.Module, device: str) -> None:
    """Refuse a batch that cannot lie in memory at once: its pixels, and a block's input and hidden units."""
    import torch

    from lotus.vit.cost import outline
    from lotus.vit.model import image_size

    if device != "cpu" and torch.cuda.is_available():  # whose memory nobody here knows
        return
    shape = outline(model)
    numbers = 3 * image_size(model) ** 2 + shape.tokens * (2 * shape.width + max(one.hidden for one in shape.dims))
    memory.there(memory.size(4 * images * numbers), f"{place}: {images} images at once", "Take fewer.")


def patches_told(patches: Patches | None) -> str:
    """What a stage says of token pruning, behind what it does."""
    if patches is None:
        return ""
    until = f" until {patches.until:g}" if patches.until < 1 else ""
    return f", patches: {patches.mode}, keep {patches.keep:g}{until}, evaluated {patches.evaluate}"


def asked_of_patches(place: str, patches: Patches | None) -> dict[str, Any]:
    """The model of another run that ``place`` asks which patches matter, by the setting."""
    return {f"{place}.model": patches.model} if patches is not None and not patches.asks_baseline else {}
