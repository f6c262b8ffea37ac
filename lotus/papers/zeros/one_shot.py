"""Weights become zeros in one shot; what is common to all that make zeros."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lotus.config import Recipe
from lotus.data import beton
from lotus.events import Event, Said, Step
from lotus.papers.zeros import masks as zeros
from lotus.papers.zeros.masks import Masks, Weights
from lotus.stages.cut import Cut, Cutting, Uncut
from lotus.stages.patches import as_evaluated
from lotus.training import loop
from lotus.training.guests import Guest
from lotus.training.optim import make_optimizer
from lotus.vit.cost import count
from selection.errors import Refused


def one_shot(uncut: Uncut, *, weights: Weights, pattern: str, sweep: bool) -> Cutting:
    """The smallest weights become zeros at once."""
    listed = zeros.listed(uncut.model, weights)
    told = (yield from swept(uncut, weights)) if sweep else {}
    masks = chosen(uncut, listed, pattern)
    zeros.put(uncut.model, masks)
    looks = (len(zeros.SWEEP) if sweep else 0) + 1  # the stage itself looks once
    forwards = looks * beton.Manifest.load(uncut.context.run.val_beton).n
    return thinned(uncut, masks, weights, forwards, told)


def chosen(uncut: Uncut, listed: Mapping[str, nn.Parameter], pattern: str = "") -> dict[str, torch.Tensor]:
    """The masks of one shot at the budget, or of a pattern."""
    keep = uncut.request.keep.weights
    assert keep is not None  # a row of the rules
    return zeros.n_of_m(listed, *zeros.pattern(pattern)) if pattern else zeros.magnitude(listed, keep)


def swept(uncut: Uncut, weights: Weights) -> Generator[Event, None, dict[str, Any]]:
    """Top-1 of the trained model at sparsities from 0 to 90 %, of which the model is none the wiser."""
    listed = zeros.listed(uncut.model, weights)
    found = []
    with measuring(uncut) as measured:
        for number, sparsity in enumerate(zeros.SWEEP):
            found.append(measured(zeros.magnitude(listed, 1 - sparsity))["top1"])
            yield Step("prune", number + 1, len(zeros.SWEEP), unit="sparsities measured")
    knee = zeros.knee(zeros.SWEEP, found)
    yield Said("prune", essential(knee))
    return {"sweep": {"sparsity": list(zeros.SWEEP), "top1": found, "knee": knee}}


@contextlib.contextmanager
def measuring(uncut: Uncut) -> Iterator[Callable[[Masks], dict[str, float]]]:
    """What tells how good the model is under masks; its weights are afterwards what they were."""
    context, model = uncut.context, uncut.model
    parameters = dict(model.named_parameters())
    with (
        context.images(context.run.val_beton, None, context.config.train, model) as loader,
        as_evaluated(model, context.config.train.patches, context.shelves),
    ):

        def measured(masks: Masks) -> dict[str, float]:
            before = {name: parameters[name].detach().clone() for name in masks}
            zeros.put(model, masks)
            values = loop.evaluate(model, loader, context.world)
            for name, weight in before.items():
                parameters[name].data.copy_(weight)
            return values

        yield measured


def thinned(
    uncut: Uncut, masks: Masks, weights: Weights, forwards: float, told: Mapping[str, Any]
) -> tuple[Cut, dict[str, Any]]:
    """What the stage goes on with, given a model that ``masks`` were put on."""
    cost = count(uncut.model)
    before = {"params": cost.params, "macs": cost.macs}
    stays, of = zeros.counted(masks)
    note = f"{of - stays:,} of {of:,} weights are zeros now. The model computes as many MACs as before."
    about = {"zeros": {"list": weights, "kept": stays, "of": of}}
    return Cut(uncut.model, before, before, forwards, (note,), about), {**told, "weights": {"kept": stays, "of": of}}


def essential(knee: float | None) -> str:
    """A knee, in words."""
    if knee is None:
        return "essential sparsity: no knee was seen up to 90 %; one-shot magnitude never lost more than 1 point."
    return f"essential sparsity {100 * knee:.0f} %: the last before one-shot magnitude loses more than 1 point."


class Holding(Guest):
    """A guest of the fine-tune: what was pruned gets no gradient, and so stays zero."""

    name = "zeros"

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self._weights, self._masks = weights, zeros.zeros(model, weights)
        # Now, and not once the engine is there: a gradient is masked before the ranks' are added up.
        self._holding = zeros.held(model, self._masks)
        self._holding.__enter__()

    def leave(self) -> None:
        self._holding.__exit__(None, None, None)

    def left(self, model: nn.Module) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """How many weights of how many stayed.

        Raises:
            Refused: one that was pruned has moved.
        """
        zeros.check(model, self._masks)
        stays, of = zeros.counted(self._masks)
        return {"weights": {"kept": stays, "of": of}}, {"zeros": {"list": self._weights, "kept": stays, "of": of}}


def check_stays(recipe: Recipe) -> None:
    """Refuse a fine-tune by ``recipe`` that would move what was pruned."""
    small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = make_optimizer(small, recipe.model_copy(update={"layer_decay": 1.0}), place="finetune")
    if not zeros.keeps_zeros(optimizer):
        raise Refused(
            f"finetune.optimizer: {recipe.optimizer!r} moves weights that were pruned, since it does not work number by "
            "number. Take adamw."
        )
