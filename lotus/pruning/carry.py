"""What an optimizer remembers, carried over a cut, where that is exact.

Momentum is linear in the gradient, and a cut is linear in the weights: of what computes the same function, W' = T W has the
gradient T^-T grad. So momentum goes the weights' own way, through the dual of each turn and the selection of rows and columns,
with queries, which a cut multiplies, divided. The mean of squared gradients can be selected, not turned: a parameter of which
some was turned forgets all that it has, its count of steps too.

Closed-form compensation changes what a Linear that reads less is, not how it depends on what it still reads: its gradient is the
selection of the one before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lotus.pruning import rotate, surgery
from lotus.pruning.plan import Plan
from lotus.vit import families

LINEAR = frozenset(("exp_avg", "momentum_buffer"))
"""What torch and timm call a mean of gradients."""
SQUARES = frozenset(("exp_avg_sq", "max_exp_avg_sq"))
"""And one of their squares."""


def moments(
    model: nn.Module, found: Mapping[str, Tensor], plan: Plan, turned: Mapping[str, rotate.Turns]
) -> dict[str, Tensor]:
    """What the optimizer of the small model is to remember; what is not in it begins anew.

    Args:
        model: before the cut
        found: as ``PARAMETER/KEY``, :meth:`lotus.training.engine.Engine.moments`. A tensor without dimensions counts something.
        plan: by which it was cut
        turned: how its heads were turned before
    """
    by_key: dict[str, dict[str, Tensor]] = {}
    for where, value in found.items():
        name, _, key = where.rpartition("/")
        by_key.setdefault(key, {})[name] = value
    there: dict[str, set[str]] = {}
    small: dict[str, dict[str, Tensor]] = {}
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    for key, values in by_key.items():
        ones = {name: torch.ones(shapes[name]) for name in values}
        for name in _through(model, ones, plan, {}, power=0):
            there.setdefault(name, set()).add(key)
        for name, value in _carried(model, key, values, plan, turned).items():
            small.setdefault(name, {})[key] = value
    return {
        f"{name}/{key}": value
        for name, held in small.items()
        if held.keys() == there.get(name, set())
        for key, value in held.items()
    }


def _carried(
    model: nn.Module, key: str, values: Mapping[str, Tensor], plan: Plan, turned: Mapping[str, rotate.Turns]
) -> dict[str, Tensor]:
    """Of the small model's parameters, where it can be said."""
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    counts = {name: value for name, value in values.items() if value.ndim == 0 and shapes[name]}
    if counts:
        dtype = next(iter(counts.values())).dtype
        wide = {name: value.double().expand(shapes[name]) for name, value in counts.items()}
        return {name: one.max().to(dtype) for name, one in _through(model, wide, plan, {}, power=0).items()}
    if key in LINEAR:
        return _through(model, values, plan, rotate.dual(turned), power=-1)
    if key in SQUARES:
        return _through(model, values, plan, turned, power=-2)
    return {}


def _through(
    model: nn.Module, values: Mapping[str, Tensor], plan: Plan, turned: Mapping[str, rotate.Turns], *, power: int
) -> dict[str, Tensor]:
    """``values`` of parameters as a cut would have them as weights; without those that come from something unknown.

    Args:
        power: of queries, as of :func:`lotus.pruning.surgery.cut`. -2: what is turned becomes unknown.
    """
    holder = copy.deepcopy(model)
    for name, weight in holder.named_parameters():
        value = values.get(name)
        unknown = torch.full(weight.shape, torch.nan, device=weight.device)
        weight.data = unknown if value is None else value.to(weight.device, copy=True)
    opened = families.opened(holder)
    dense = rotate.apply(opened, turned)
    if power == -2:
        same = {id(weight) for weight in opened.parameters()}
        for weight in dense.parameters():
            if id(weight) not in same:
                weight.data = torch.full_like(weight, torch.nan)
    small = families.close(surgery.cut(dense, plan, power=power), holder)
    found = {name: weight.detach() for name, weight in small.named_parameters()}
    return {name: value.cpu().contiguous() for name, value in found.items() if not value.isnan().any()}
