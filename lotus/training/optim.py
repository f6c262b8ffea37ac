"""The optimiser of a recipe, and its learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn

from lotus.config import Recipe
from selection.errors import Refused
from selection.methods import nearest


def make_optimizer(model: nn.Module, recipe: Recipe, *, fused: bool | None = None) -> torch.optim.Optimizer:
    """timm's optimiser by name, over ``model``'s trainable parameters.

    Weight decay falls on matrices and kernels alone: not on biases, norms, class and register tokens or position
    embeddings. With ``recipe.layer_decay`` below 1 each group carries ``lr_scale`` (BEiT, 2106.08254, section A), which
    :func:`set_lr` honours.

    Args:
        fused: one kernel for all parameters; None takes it where the optimiser has it (a third of the time of a loop
            over tensors, on a CPU as well).

    Raises:
        Refused: no optimiser of this name, one whose package is missing, or one that needs second derivatives.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers

    place = "train.optimizer"
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


def lr_at(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Learning rate of optimiser step ``step``, counted from 0 over the whole training.

    W = warm-up steps, T = all steps. Linear up to the peak, which step W is the first to have; then half a cosine that
    reaches ``min_lr`` at step T, one after the last (SGDR, 1608.03983, eq. 5, without restarts). Step 0 is not wasted
    on a rate of zero: it has the peak / (W + 1). A ``min_lr`` above the peak counts as the peak.

    ``onecycle`` is torch's OneCycleLR with its defaults, whose rising part is the W warm-up steps.
    """
    if recipe.schedule == "onecycle":
        start = recipe.lr / _DIVIDE_FIRST
        return _one_cycle(step, steps_per_epoch, recipe, start, recipe.lr, start / _DIVIDE_LAST)
    warm = recipe.warmup_epochs * steps_per_epoch
    total = recipe.epochs * steps_per_epoch
    if step < warm:
        return recipe.lr * (step + 1) / (warm + 1)
    low = min(recipe.min_lr, recipe.lr)
    part = min(1.0, (step - warm) / (total - warm)) if total > warm else 1.0
    return low + 0.5 * (recipe.lr - low) * (1 + math.cos(math.pi * part))


# torch.optim.lr_scheduler.OneCycleLR: div_factor, final_div_factor, max_momentum, base_momentum.
_DIVIDE_FIRST, _DIVIDE_LAST = 25.0, 1e4
_CALM, _FAST = 0.95, 0.85


def momentum_at(step: int, steps_per_epoch: int, recipe: Recipe) -> float | None:
    """Momentum of an optimiser step, where the schedule moves it: ``onecycle``, against the learning rate (1803.09820)."""
    if recipe.schedule != "onecycle":
        return None
    return _one_cycle(step, steps_per_epoch, recipe, _CALM, _FAST, _CALM)


def _one_cycle(step: int, steps_per_epoch: int, recipe: Recipe, first: float, middle: float, last: float) -> float:
    """Half a cosine from ``first`` to ``middle``, which the last step of the warm-up has, and one on to ``last``, at the last step."""
    end = max(recipe.epochs * steps_per_epoch - 1, 0)
    turn = min(recipe.warmup_epochs * steps_per_epoch - 1, end)
    if step <= turn:
        return _cosine(first, middle, step / turn if turn > 0 else 1.0)
    return _cosine(middle, last, min(1.0, (step - turn) / (end - turn)) if end > turn else 1.0)


def _cosine(low: float, high: float, part: float) -> float:
    return high + (low - high) / 2 * (1 + math.cos(math.pi * part))
