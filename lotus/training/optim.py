"""The optimizer of a recipe, and its learning rate as a pure function of the step."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lotus.config import Recipe, options
from lotus.training import muon, schedules
from selection.errors import Refused
from selection.methods import blamed, call, find, is_ours, nearest, reads

USUAL = {
    "adamw": (1e-5, 1e-2), "nadamw": (1e-5, 1e-2), "adam": (1e-5, 1e-2), "muon": (1e-4, 1e-2), "lion": (1e-6, 2e-3),
    "lamb": (1e-4, 3e-2), "sgd": (1e-4, 5.0), "momentum": (1e-4, 5.0),
}  # fmt: skip
"""Peak rates within which published recipes for ViTs lie, with a margin of three. Muon's are AdamW's, since its updates
are scaled to the same size (2502.16982, section 2.2); the 0.02 of its authors goes with another scale."""


def unusual(recipe: Recipe, place: str = "train") -> list[str]:
    """A sentence for each peak rate that is far outside what is usual for its optimizer.

    Args:
        recipe: that names optimizer and rates
        place: of the recipe, as in "train"
    """
    name = recipe.optimizer.lower()
    asked = [("lr", name, recipe.lr)]
    if name == "muon" and recipe.adamw_lr is not None:
        asked.append(("adamw_lr", "adamw", recipe.adamw_lr))
    return [
        f"{place}.{key}: {rate:g} is far outside what is usual for {one}, {USUAL[one][0]:g} to {USUAL[one][1]:g}"
        for key, one, rate in asked
        if one in USUAL and not USUAL[one][0] <= rate <= USUAL[one][1]
    ]


def make_optimizer(
    model: nn.Module, recipe: Recipe, *, fused: bool | None = None, place: str = "train"
) -> torch.optim.Optimizer:
    """timm's optimizer by name, over ``model``'s trainable parameters; ``muon`` is ours (:mod:`lotus.training.muon`).

    Weight decay falls on matrices and kernels alone: not on biases, norms, class and register tokens or position
    embeddings. With ``recipe.layer_decay`` below 1 each group carries ``lr_scale`` (BEiT, 2106.08254, section A), which
    :func:`set_lr` honors.

    Args:
        fused: one kernel for all parameters; None takes it where the optimizer has it (a third of the time of a loop
            over tensors, on a CPU as well).
        place: where the recipe's settings stand, for a refusal to name them

    Raises:
        Refused: no optimizer of this name, one whose package is missing, one that needs second derivatives, or muon for a
            model without matrices.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers

    if recipe.optimizer.lower() == "muon":
        groups = _groups(model, recipe)
        made = muon.make(
            model, groups, lr=recipe.lr, adamw_lr=recipe.adamw_lr, place=place, fused=fused is not False,
            half=recipe.precision == "bf16",
        )  # fmt: skip
        set_lr(made, recipe.lr)
        return made
    place = f"{place}.optimizer"
    name = recipe.optimizer.lower().removeprefix("lookahead_")
    try:
        info = get_optimizer_info(name)
    except ValueError:
        known = [str(one) for one in list_optimizers()]
        raise Refused(
            f"{place}: timm has no optimizer {recipe.optimizer!r}.{nearest(name, known)} Among its {len(known)}: adamw, sgd, "
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


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """timm's groups of one weight decay and one ``lr_scale`` each."""
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    spared: set[str] = getattr(model, "no_weight_decay", set)()
    if recipe.layer_decay < 1:
        return param_groups_layer_decay(
            model, recipe.weight_decay, no_weight_decay_list=spared, layer_decay=recipe.layer_decay
        )
    return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None = None) -> None:
    """Give every group ``lr``, times its own ``lr_scale`` where layer decay gave it one.

    Args:
        optimizer: of which all groups change, in place
        momentum: also this momentum, or this first beta, where the optimizer has one; None leaves it
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if momentum is not None and "momentum" in group:
            group["momentum"] = momentum
        elif momentum is not None and "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])


Rate = tuple[float, float | None]
"""Learning rate of a step, and its momentum; None: the optimizer's own stays."""

SCHEDULE_READS = ("step", "warm", "total", "peak", "low")
"""What a schedule may read (lotus/training/schedules.py says what it is)."""


def make_schedule(
    recipe: Recipe, shelves: Sequence[ModuleType] = (), *, place: str = "train"
) -> Callable[[int, int], Rate]:
    """The recipe's schedule, a function of :mod:`lotus.training.schedules` or of the user's own, by its name.

    Returns:
        (step, counted from 0 over the whole training; steps an epoch) -> learning rate and momentum. A ``min_lr`` above the
        peak counts as the peak.

    Raises:
        Refused: there is no such schedule, or it has no such setting, or a value is none that it can have, or it reads what is not here.
    """
    settings, where = recipe.schedule, f"{place}.schedule"
    method = find([schedules, *shelves], settings.name, place=where, here=SCHEDULE_READS)
    known, own = (
        {"peak": recipe.lr, "low": min(recipe.min_lr, recipe.lr)},
        options(method, settings.options, place=where),
    )
    # Called by the law of the shelves here, so that what would fail at the first step is refused now, and plainly from then on.
    begun = {**known, "step": 0, "warm": recipe.warmup, "total": recipe.epochs}
    first = call(method, begun, own, place=where)
    _checked(first, 0, settings.name, where)
    names, ours = reads(method), is_ours(method)

    def rate(step: int, steps_per_epoch: int) -> Rate:
        warm, total = recipe.warmup * steps_per_epoch, recipe.epochs * steps_per_epoch
        here = {**known, "step": step, "warm": warm, "total": total}
        with contextlib.nullcontext() if ours else blamed(method, place=f"{where} at step {step}"):
            rates = method(*(here[name] for name in names), **own)
        return _checked(rates, step, settings.name, where)

    return rate


def _checked(found: Any, step: int, name: str, place: str) -> Rate:
    """What a schedule gave.

    Raises:
        Refused: that is no rate.
    """
    lr, momentum = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(lr, (int, float)) or not isinstance(momentum, (int, float, type(None))) or not 0 <= lr < math.inf:
        raise Refused(
            f"{place}: {name!r} gave {found!r} for step {step}. Return a learning rate, 0 or above, or one and a momentum."
        )
    return lr, momentum
