"""The optimiser of a recipe, and its learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lotus.config import Recipe
from lotus.training import schedules
from selection.errors import Refused
from selection.methods import call, find, nearest, reads


def make_optimizer(
    model: nn.Module, recipe: Recipe, *, fused: bool | None = None, place: str = "train"
) -> torch.optim.Optimizer:
    """timm's optimiser by name, over ``model``'s trainable parameters.

    Weight decay falls on matrices and kernels alone: not on biases, norms, class and register tokens or position
    embeddings. With ``recipe.layer_decay`` below 1 each group carries ``lr_scale`` (BEiT, 2106.08254, section A), which
    :func:`set_lr` honours.

    Args:
        fused: one kernel for all parameters; None takes it where the optimiser has it (a third of the time of a loop
            over tensors, on a CPU as well).
        place: where the recipe's settings stand, for a refusal to name them

    Raises:
        Refused: no optimiser of this name, one whose package is missing, or one that needs second derivatives.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers

    place = f"{place}.optimizer"
    name = recipe.optimizer.lower().removeprefix("lookahead_")
    try:
        info = get_optimizer_info(name)
    except ValueError:
        known = [str(one) for one in list_optimizers()]
        raise Refused(
            f"{place}: timm has no optimiser {recipe.optimizer!r}.{nearest(name, known)} Among its {len(known)}: adamw, sgd, "
            "lamb, lion, muon (timm.optim.list_optimizers() names all)."
        ) from None
    if info.second_order:
        raise Refused(f"{place}: {name!r} needs second derivatives, which the engine does not make. Try 'adamw'.")
    extra: dict[str, Any] = {}
    try:
        takes = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
        if "fused" in takes and fused is not False:
            extra["fused"] = True
        optimizer = create_optimizer_v2(
            model,
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
            **extra,
        )
    except (ImportError, AssertionError) as error:
        raise Refused(f"{place}: {name!r} cannot be made here ({error}). 'adamw' needs nothing more.") from None
    set_lr(optimizer, recipe.lr)  # timm leaves the scales to its scheduler
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None = None) -> None:
    """Give every group ``lr``, times its own ``lr_scale`` where layer decay gave it one.

    Args:
        momentum: also this momentum, or this first beta, where the optimiser has one; None leaves it
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if momentum is not None and "momentum" in group:
            group["momentum"] = momentum
        elif momentum is not None and "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])


Rate = tuple[float, float | None]
"""Learning rate of a step, and its momentum; None: the optimizer's own stays."""


def make_schedule(
    recipe: Recipe, shelves: Sequence[ModuleType] = (), *, place: str = "train"
) -> Callable[[int, int], Rate]:
    """The recipe's schedule, a function of :mod:`lotus.training.schedules` or of the user's own, by its name.

    Returns:
        (step, counted from 0 over the whole training; steps an epoch) -> learning rate and momentum. A ``min_lr`` above the
        peak counts as the peak.

    Raises:
        Refused: there is no such schedule, or it has no such setting, or it reads what is not here.
    """
    wants, where = recipe.schedule, f"{place}.schedule"
    method = find([schedules, *shelves], wants.name, place=where)
    known = {"peak": recipe.lr, "low": min(recipe.min_lr, recipe.lr)}
    # Called by the law of the shelves here, so that what would fail at the first step is refused now, and plainly from then on.
    call(method, {**known, "step": 0, "warm": recipe.warmup_epochs, "total": recipe.epochs}, wants.options, place=where)
    names = reads(method)

    def rate(step: int, steps_per_epoch: int) -> Rate:
        warm, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
        here = {**known, "step": step, "warm": warm, "total": total}
        found = method(*(here[name] for name in names), **wants.options)
        return found if isinstance(found, tuple) else (found, None)

    return rate
