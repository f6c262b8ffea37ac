"""The way itself: a soup on parts of the ticket, by the fine-tune's recipe."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from torch import nn

from lotus.data import beton
from lotus.data.sample_plan import SamplePlan
from lotus.events import Event
from lotus.papers.soup.cook import Cooked, Supply, cook
from lotus.papers.soup.recipe import Soup
from lotus.papers.zeros import masks as zeros
from lotus.papers.zeros import one_shot
from lotus.stage import TRAIN_FORWARDS
from lotus.stages.context import CALIBRATION, Context
from lotus.stages.cut import Cutting, Uncut
from lotus.training.objective import Objective
from lotus.vit.model import image_size
from selection.subset import Subset


def simmer(uncut: Uncut, soup: Soup, *, sweep: bool) -> Cutting:
    """Beside the soup, what one shot at the same budget would reach is measured."""
    context, model, weights = uncut.context, uncut.model, soup.weights
    told: dict[str, Any] = (yield from one_shot.swept(uncut, weights)) if sweep else {}
    with one_shot.measuring(uncut) as measured:
        told["one_shot_top1"] = measured(one_shot.chosen(uncut, zeros.listed(model, weights)))["top1"]
    looks = (len(zeros.SWEEP) if sweep else 0) + 1
    forwards = looks * beton.Manifest.load(context.run.val_beton).n
    cooked = yield from _cook(context, model, Subset.load(context.run.ticket).rows, soup)
    zeros.put(model, cooked.masks)
    told["left"] = list(cooked.left)
    return one_shot.thinned(uncut, cooked.masks, weights, forwards + TRAIN_FORWARDS * cooked.images, told)


def _cook(context: Context, model: nn.Module, rows: np.ndarray, soup: Soup) -> Generator[Event, None, Cooked]:
    """Cook, by the fine-tune's recipe, on parts of the ticket; on all patches of an image."""
    run, config, recipe, manifest = context.run, context.config, context.config.finetune, context.manifest()
    keep = config.prune.keep.weights
    assert keep is not None

    @contextlib.contextmanager
    def batches(span: int, part: float, steps: int) -> Iterator[Iterator[Any]]:
        seed = config.seed + 5000 + span
        rng = np.random.default_rng([seed, CALIBRATION])
        some = np.sort(rng.choice(rows, size=max(1, round(part * len(rows))), replace=False))
        order = SamplePlan(some, seed=seed, batch_size=min(recipe.batch_size, len(some)), world=1, rank=0)
        with context.loader(
            run.train_beton, order, size=image_size(model), augment=recipe.augment, seed=seed
        ) as loader:
            endless = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
            yield itertools.islice(endless, steps)
            endless.close()

    return (
        yield from cook(
            model, keep, Supply(len(rows), batches), soup, stage="prune", recipe=recipe,
            objective=Objective(recipe, len(manifest.classes), config.seed), seed=config.seed,
        )
    )  # fmt: skip
