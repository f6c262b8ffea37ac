"""From nested gates to a model: the gates are projected onto the exact budget, and the original weights are cut and
turned into convolutions by them (SPViT, He et al. 2021, 2111.11802).

The paper takes the gates as they stand at the end of the search, and misses its target by what they missed it (6 G aimed at, 8.4 G
reached); here gates close or open in the order of their value until the budget is hit. Weights after the search are thrown away, as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lotus.papers.spvit import mixture
from lotus.pruning import surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, convolution, cost
from lotus.vit import model as door
from lotus.vit.anatomy import Dims
from lotus.vit.cost import Outline
from selection.errors import Refused


@dataclass(frozen=True)
class Choice:
    """What a block is to be."""

    kernel: int
    """Side of the convolution that its attention becomes; 0: it stays attention."""
    units: tuple[int, ...]
    """MLP units that stay."""


def project(outline: Outline, gates: Sequence[tuple[Tensor, Tensor]], keep: float, *, round: int = 8) -> list[Choice]:
    """The gates' choice within ``keep`` of the MACs: one threshold for all gates, by bisection over their order.

    A block's convolution that would cost more than its attention is passed over. What still fits is then opened again: chunks of
    ``round`` units and steps of attention, those with the most open gates first.

    Args:
        outline: of the dense model
        gates: of each block, (3,) for 1x1, 3x3 and attention, and (F,) for its MLP units; any rising function of their
            probabilities.

    Raises:
        Refused: a budget below the least: a 1x1 convolution and ``round`` units in every block.
    """
    limit = check_reach(outline, keep, round=round)
    states = [_State(outline, index, *pair, round) for index, pair in enumerate(gates)]
    # A gate is nested in those before it: it closes with the first of them.
    moves = sorted(
        (value, index, kind, place)
        for index, state in enumerate(states)
        for kind, values in (("attention", state.falls), ("unit", sorted(state.units.tolist())))
        for place, value in enumerate(values)
    )

    def spent(count: int) -> int:
        """MACs when the lowest ``count`` gates are closed."""
        for state in states:
            state.reset()
        for _, index, kind, _ in moves[:count]:
            states[index].close(kind)
        return _macs(outline, states)

    low, high = 0, len(moves)
    while low < high:
        middle = (low + high) // 2
        if spent(middle) <= limit:
            high = middle
        else:
            low = middle + 1
    now = spent(low)
    while True:
        more = [
            (value, -state.index, kind)
            for state in states
            for kind, value, price in state.opens()
            if now + price <= limit
        ]
        if not more:
            break
        _, index, kind = max(more)
        states[-index].open(kind)
        now = _macs(outline, states)
    return [state.choice() for state in states]


def check_reach(outline: Outline, keep: float, *, round: int = 8) -> int:
    """The budget in whole MACs; needs no gates, so that one can be refused before anything is trained.

    Raises:
        Refused: a budget below the least: a 1x1 convolution and ``round`` units in every block.
    """
    if type(round) is not int or round < 1:
        raise Refused(f"prune.round: must be a whole number from 1, not {round!r}.")
    if not 0 < keep <= 1:
        raise Refused(f"prune.keep.macs: the fraction that stays, above 0 and up to 1, not {keep!r}.")
    whole = outline.cost().macs
    states = [
        _State(outline, index, torch.zeros(3), torch.zeros(of.hidden), round) for index, of in enumerate(outline.dims)
    ]
    for state in states:
        state.path, state.closed = len(state.falls), state.of.hidden
    lowest, limit = _macs(outline, states), int(keep * whole)
    if lowest > limit:
        reach = -(-10000 * lowest // whole) / 10000
        raise Refused(
            f"prune.keep.macs: {keep:g} is out of reach. With a 1x1 convolution and {states[0].least} MLP units a block, "
            f"{reach:.4f} remains. Take {reach:.4f} to 1, or a smaller round."
        )
    return limit


def refuse(model: nn.Module) -> None:
    """Refuse a model whose attention cannot become convolution.

    Raises:
        Refused: it is of another family than the plain ViTs, has gated MLPs, or was cut in another way.
    """
    anatomy.plain(model, "prune.method")
    for block in anatomy.blocks(model):
        if block.glu:
            raise Refused(f"prune.method: {block.name} has a gated MLP, which has no gates here. Take prune.search.")
        if not (block.has_attn and block.has_mlp) or block.reads("attn") or block.reads("mlp"):
            raise Refused(
                f"prune.method: {block.name} lost a sublayer, or reads a part of the residual stream. Take the model from before that cut."
            )


def convert(model: nn.Module, choices: Sequence[Choice], mixes: Sequence[Tensor]) -> nn.Module:
    """A copy of ``model``, in eval mode, with the chosen convolutions, made of its own weights, and the chosen units.

    Args:
        choices: one a block, as :func:`project` makes them.
        mixes: (H, 9) scores Z of each block.

    Raises:
        Refused: choices for another model.
    """
    refuse(model)
    old = anatomy.blocks(model)
    if len(old) != len(choices):
        raise Refused(f"prune.method: {len(choices)} choices, the model has {len(old)} blocks.")
    full = [BlockPlan.full(block.dims) for block in old]
    plans = [
        BlockPlan(plan.of, plan.heads, plan.qk, plan.v, choice.units)
        for plan, choice in zip(full, choices, strict=True)
    ]
    small = surgery.cut(model, Plan(tuple(plans)))
    for block, before, choice, mix in zip(anatomy.blocks(small), old, choices, mixes, strict=True):
        if not choice.kernel:
            continue
        qkv, proj = before.qkv, before.proj
        parts = mixture.mixture(mix.to(qkv.weight), choice.kernel)
        weight, bias, out = mixture.combined(
            qkv.weight.detach(),
            None if qkv.bias is None else qkv.bias.detach(),
            proj.weight.detach(),
            parts,
            before.head_dim,
        )
        new = surgery.convolve(block, choice.kernel, before.head_dim, small)
        fresh = nn.BatchNorm2d(before.head_dim).to(weight)
        state = {
            "conv.weight": weight,
            "conv.bias": bias,
            "proj.weight": out,
            "proj.bias": None if proj.bias is None else proj.bias.detach().clone(),
            **{f"norm.{name}": value for name, value in fresh.state_dict().items()},
        }
        new.load_state_dict(
            {name: value.contiguous() for name, value in state.items() if value is not None}, assign=True
        )
    small.requires_grad_(True)
    door.remember(small, door.origin(model))
    return small.eval()


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Give the batch norms of the convolutions the statistics of these images, in place; returns how many there were.

    The mean over batches of each batch's mean and variance. A model without convolutions is left as it was.
    """
    norms = [block.attn.norm for block in anatomy.blocks(model, convolved=True) if block.kernel]
    if not norms:
        return 0
    where, images = next(model.parameters()), 0
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        for batch in batches:
            model(batch[0].to(where.device, where.dtype))
            images += len(batch[0])
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return images


def _macs(outline: Outline, states: Sequence[_State]) -> int:
    return outline.cost().macs - sum(outline.block(state.index, state.of).macs - state.macs() for state in states)


class _State:
    """A block on its way to a choice."""

    def __init__(self, outline: Outline, index: int, attention: Tensor, units: Tensor, round: int) -> None:
        self.index, self.outline, self.round = index, outline, round
        self.of: Dims = outline.dims[index]
        self.units = units.double()
        self.order = torch.argsort(-self.units, stable=True).tolist()
        self.least = min(round, self.of.hidden)
        values = torch.as_tensor(attention).double().cummin(0).values.tolist()  # as far open as the first before it
        whole = outline.block(index, self.of).attn_macs
        # From attention down, what is cheaper than the one before it; a step down is taken at the value of what it leaves.
        self.paths: list[tuple[int, int]] = [(0, whole)]
        self.falls: list[float] = []
        patches = outline.tokens - outline.prefix
        last = values[2]
        for kernel, value in ((3, values[1]), (1, values[0])):
            price = convolution.macs(patches, outline.width, self.of.v_dim, kernel)
            if price < self.paths[-1][1]:
                self.paths.append((kernel, price))
                self.falls.append(last)
                last = value
        self.falls = [max(self.falls[: place + 1]) for place in range(len(self.falls))]
        self.reset()

    def reset(self) -> None:
        self.path, self.closed, self.wide = 0, 0, 0

    def close(self, kind: str) -> None:
        if kind == "attention":
            self.path += 1
        else:
            self.closed += 1

    @property
    def hidden(self) -> int:
        """Units that stay: a multiple of ``round``, or all."""
        count = self.of.hidden - self.closed
        if count < self.of.hidden:
            count = max(self.least, count // self.round * self.round)
        return min(self.of.hidden, count + self.wide)

    def macs(self) -> int:
        return self.paths[self.path][1] + cost.mlp_macs(self.outline.tokens, self.outline.width, self.hidden)

    def opens(self) -> list[tuple[str, float, int]]:
        """(kind, value, price) of what could come back."""
        found = []
        if self.path:
            price = self.paths[self.path - 1][1] - self.paths[self.path][1]
            found.append(("attention", self.falls[self.path - 1], price))
        if self.hidden < self.of.hidden:
            after = min(self.of.hidden, self.hidden + self.round)
            value = float(self.units[self.order[self.hidden : after]].mean())
            found.append(("unit", value, cost.mlp_macs(self.outline.tokens, self.outline.width, after - self.hidden)))
        return found

    def open(self, kind: str) -> None:
        if kind == "attention":
            self.path -= 1
        else:
            self.wide += self.round

    def choice(self) -> Choice:
        return Choice(self.paths[self.path][0], tuple(sorted(int(i) for i in self.order[: self.hidden])))
