"""What a training will go through, before anything is done: which part of its images at which size of the model and of the pictures.

The dry run, the planner and its clock go over these pieces. They are of the MACs that the guests of the training will count
(:mod:`lotus.training.growing`, ``fewer``, ``shrink``), so that a forecast is within a hundredth of the bill.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Config, Prune
from lotus.stages.ahead import Ahead, seen_before

if TYPE_CHECKING:
    from torch import nn

    from lotus.pruning import Plan
    from lotus.vit.anatomy import Dims
    from lotus.vit.cost import Outline

DRAWS = 9
"""Plans of scores by chance: what a cut leaves is their middle one, at the cost of their mean."""


SETTLED = 100
"""Steps of a training after which its blocks are as unlike as they will be, about."""

_BETWEEN = ("evit", "tome", "cumulative")
"""Ways to leave patches out that need both sublayers of each block."""


def request_of(config: Config) -> Prune:
    """What the last cut is to: ``prune``, with all channels where nothing is said of them, and whole blocks where patches are
    pruned between attention and MLP."""
    request, patches = config.prune, config.train.patches
    changes: dict[str, Any] = {"embed_dim": None} if request.embed_dim == "auto" else {}
    if patches is not None and patches.mode in _BETWEEN:
        changes["sublayers"] = False
    return request.model_copy(update=changes)


@dataclass(frozen=True)
class Piece:
    """A part of a training in which nothing changes but, slowly, its tokens."""

    part: float
    """Fraction of the training."""
    images: float
    """That it goes through."""
    macs: float
    """Of an image's forward pass."""
    cuts: int
    """How often the model was cut before."""
    side: int | None
    """Of the pictures, in pixels; None: the model's own."""


@dataclass(frozen=True)
class Shape:
    """A model as it will be left by a cut."""

    model: nn.Module
    """Of its width."""
    plan: Plan | None = None
    """The cut; None: there is none, or its widths are not known."""
    factor: float = 1.0
    """What it costs of that: a cut whose widths are not known ends a little higher or lower."""

    @property
    def dims(self) -> tuple[Dims, ...] | None:
        """The widths of its blocks; None: as they are."""
        return None if self.plan is None else self.plan.dims

    def macs(self, side: int | None = None) -> float:
        """Of an image's forward pass."""
        from lotus.vit.cost import outline

        return self.factor * outline(self.model, side).cost(self.dims).macs

    def built(self) -> nn.Module | None:
        """Such a model, to be tried; None where it is not known, or has no weights."""
        from lotus.pruning import surgery
        from lotus.vit import families

        if (self.plan is None and self.factor != 1) or next(self.model.parameters()).is_meta:
            return None
        model = copy.deepcopy(self.model)
        return model if self.plan is None else families.close(surgery.cut(families.opened(model), self.plan), model)


def pieces(ahead: Ahead) -> list[Piece]:
    """The training ``train``, in order. What dynamic data pruning will leave out is not in it."""
    config, recipe, shapes = ahead.config, ahead.config.train, shapes_of(ahead)
    cuts = [] if recipe.shrink is None else [seen_before(recipe, ahead.kept, one.at) for one in recipe.shrink.cuts]
    # a side is an epoch's: the first one that is not before its part
    sides = [(math.ceil(step[0] * recipe.epochs - 1e-9) / recipe.epochs, int(step[1])) for step in recipe.sides]
    drawn = watched_epochs(config, ahead.kept) / recipe.epochs if config.watches_itself else 1.0
    ticket = round(config.select.keep * ahead.images)
    thin = 0.0  # until then some patches are left out
    if recipe.patches is not None and (thin := seen_before(recipe, ahead.kept, recipe.patches.until)) > drawn:
        thin = seen_before(recipe, ticket, recipe.patches.until)
    marks = {0.0, 1.0, drawn, thin, *cuts, *(start for start, _ in sides)}
    found = []
    for begin, end in itertools.pairwise(sorted(mark for mark in marks if mark <= 1)):
        shape = shapes[number := sum(cut <= begin for cut in cuts)]
        side = next((side for start, side in reversed(sides) if start <= begin), None)
        macs = shape.macs(side)
        if recipe.patches is not None and begin < thin:
            step = 1 / (recipe.epochs * steps_of(config, ahead.kept))
            macs = shape.factor * ahead.on_patches(recipe.patches, (begin, end), step, shape.model, shape.dims)
        each = ahead.kept if begin < drawn else ticket
        found.append(Piece(end - begin, (end - begin) * recipe.epochs * each, macs, number, side))
    return found


def steps_of(config: Config, images: int) -> int:
    """Optimizer steps of an epoch."""
    return math.ceil(images / config.train.batch_size)


def watched_epochs(config: Config, images: int) -> int:
    """Epochs until the ticket is drawn, for a training that is its own proxy: to the end of that in which the last cut is."""
    shrink, steps = config.train.shrink, steps_of(config, images)
    assert shrink is not None, "lotus/config/rules.py"
    return math.ceil(math.ceil(shrink.cuts[-1].at * config.train.epochs * steps - 1e-9) / steps)


def shapes_of(ahead: Ahead) -> list[Shape]:
    """The dense model, and what each cut leaves of it."""
    shrink, dense = ahead.config.train.shrink, ahead.dense
    found = [Shape(dense)]
    for one in () if shrink is None else shrink.cuts:
        request = request_of(ahead.config)
        asked = request if one.keep is None else request.at(one.keep.asked, embed_dim=None)
        steps = one.at * ahead.config.train.epochs * steps_of(ahead.config, ahead.kept)
        given = ahead.config.model.weights or ahead.config.model.pretrained
        found.append(left_of(dense, asked, 1.0 if given else min(1.0, steps / SETTLED)))
    return found


def left_of(dense: nn.Module, request: Prune, learned: float = 1.0) -> Shape:
    """What a cut as ``request`` asks leaves of ``dense``: budgets are met from below, by up to a chunk of units, which is a hundredth of
    a model of two blocks. Of a budget of latency its part stands for that of the MACs.

    Args:
        learned: 0 to 1, how far the model has gone on the way to where it knows which blocks it needs
    """
    from lotus.pruning import narrow
    from lotus.vit.cost import outline

    asked = request.keep.asked
    if request.round == "auto":
        request = request.model_copy(update={"round": 8})
    model, whole = dense, outline(dense)
    if request.embed_fraction < 1:
        model = narrow.skeleton(dense, narrow.channels(dense, request.embed_fraction, request.multiple))
    found = _landing(outline(model), whole, request, round(learned, 1)) if asked.keys() <= {"macs", "params"} else None
    if found is None:
        return Shape(dense, factor=asked.get("macs", min(asked.values())))
    return Shape(model, *found)


@functools.lru_cache(64)
def _landing(outline: Outline, whole: Outline, request: Prune, learned: float) -> tuple[Plan, float] | None:
    """A cut whose scores are unknown, and what a cut costs of it on average; None where the budget is out of reach.

    The middle one of some draws: which chunks go last is the scores' choice, and with it how far below the budget it ends. Which
    blocks lose most matters where later ones see fewer tokens: a unit of fisher's is worth 1 / n in the n-th block, as was seen of
    ViTs from scratch, and nearly as much in all at first (of other criteria none was looked at, and blocks are alike).
    """
    from lotus.pruning import budget

    if budget.out_of_reach(outline, request, whole=whole.cost()):
        return None
    drawn = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        scores: dict[str, np.ndarray] = {}
        for block, dims in enumerate(outline.dims):
            sites = {"attn": dims.heads * dims.v_dim, "mlp": dims.hidden}
            if request.in_channels:
                sites |= {"attn_in": outline.width, "mlp_in": outline.width}
            worth = (block + 1) ** -learned if request.criterion.name == "fisher" else 1.0
            scores |= {f"blocks.{block}.{site}": worth * rng.exponential(size=size) for site, size in sites.items()}
        drawn.append(budget.fit_plan(outline, scores, request, whole=whole.cost()))
    costs = [outline.cost(plan.dims).macs for plan in drawn]
    middle = sorted(range(DRAWS), key=lambda number: costs[number])[DRAWS // 2]
    return drawn[middle], sum(costs) / DRAWS / costs[middle]
