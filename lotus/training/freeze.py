"""Parts of a model that stay as they are given, and a head that learns alone first (linear probing, 2202.10054).

What is frozen asks for no gradient before the optimizer is made, so that it has no state there; and where nothing at or below a
part learns, autograd does not go back through it. What is spared is taken off the bill.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lotus.training.guests import Guest, Position, Seen, Training
from lotus.vit import anatomy, cost
from lotus.vit.parts import gone, places
from lotus.vit.weights import HEADS
from selection.errors import Refused
from selection.methods import nearest

if TYPE_CHECKING:
    from lotus.events import Event
    from lotus.training.finite import Answer

STEM = ("patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre")
"""What makes tokens of an image, all of which ``patch_embed`` means: with positions that learn nothing below a block is frozen."""
_ATTENTION = ("attn", "norm1", "ls1", "gamma_1")
_HEADS = tuple(f"{head}." for head in HEADS)


class Frozen(Guest):
    """Keeps parts of the model as they are, and all but the head for the first part of the training."""

    name = "frozen"

    def __init__(self, patterns: Sequence[str], probe: float = 0.0, *, place: str = "train") -> None:
        """
        Args:
            patterns: of names, as :func:`frozen` reads them
            probe: fraction of the training in which the head learns alone
            place: of the recipe, as in "train"
        """
        self._patterns, self._probe, self._place = tuple(patterns), probe, place
        self._open = probe <= 0
        self._names: set[str] = set()
        self._model: nn.Module | None = None
        self._bill = [0.0, 0.0]
        self._macs = self._now = self._spared = 0.0
        self._images = 0

    def equip(self, model: nn.Module) -> None:
        """
        Raises:
            Refused: nothing is left to learn.
        """
        asked = set(frozen(model, self._patterns))
        if not self._open:
            asked |= {name for name, _ in model.named_parameters() if not name.startswith(_HEADS)}
        parameters = dict(model.named_parameters())
        self._names = {name for name in asked if parameters[name].requires_grad}
        if all(name in self._names for name, weight in parameters.items() if weight.requires_grad):
            raise Refused(f"{self._place}.freeze: nothing is left to learn. Leave out the head, or a part of it.")
        for name in self._names:
            parameters[name].requires_grad_(False)
        self._model, self._macs, self._spared = model, cost.count(model).macs, spared(model)

    def attach(self, training: Training) -> None:
        self._training = training

    def detach(self) -> None:
        if self._model is not None:
            for name, weight in self._model.named_parameters():
                if name in self._names:
                    weight.requires_grad_(True)
            self._model = None

    def leave(self) -> None:
        self.detach()

    def due(self, at: Position, progress: float) -> bool:
        return not self._open and progress >= self._probe - 1e-9

    def replace(self, model: nn.Module, moments: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Tensor]]:
        self._open = True
        return model, moments

    def replaced(self, at: Position) -> Iterable[Event]:
        from lotus.events import Said

        rest = f" but {', '.join(self._patterns)}" if self._patterns else ""
        yield Said(
            self._training.stage, f"the head has learned alone for {at.step:,} steps; from here on all{rest} learns"
        )

    def rebuilt(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        self._open = bool(state["open"]) if state else self._open
        return model

    def state(self) -> dict[str, Tensor]:
        return {"open": torch.tensor(self._open), "bill": torch.tensor(self._bill, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._bill = state["bill"].tolist()

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        self._images += len(losses) * self._training.world.size
        return losses

    def macs(self, macs: float) -> float:
        self._now = macs or self._macs
        return macs

    def after_step(self, at: Position, progress: float, finite: bool | Answer) -> None:
        spared = self._images * self._spared
        self._bill, self._images = [self._bill[0] - spared, self._bill[1] - spared * self._now], 0

    def bill(self) -> tuple[float, float]:
        return self._bill[0], self._bill[1]


def frozen(model: nn.Module, patterns: Sequence[str], *, place: str = "") -> list[str]:
    """The parameters that ``patterns`` name: parts with all that is in them, ``blocks.0-3`` for a row of them, * for anything.

    Blocks go by the numbers that they had before a cut.

    Args:
        model: that trains
        place: where the patterns stand, as in "train.freeze": one that matches nothing is then refused; empty: it is passed over

    Raises:
        Refused: with the nearest name.
    """
    numbers = places(model) if anatomy.is_vit(model) else []
    names = {name: _before_the_cut(name, numbers) for name, _ in model.named_parameters()}
    found: set[str] = set()
    for pattern in patterns:
        wanted = list(_spelled(pattern))
        mine = {name for name, first in names.items() if any(_in(first, one) for one in wanted)}
        row = pattern != STEM[0] and len(wanted) > 1 and not gone(model)
        lacks = [one for one in wanted if row and not any(_in(first, one) for first in names.values())]
        if place and mine and lacks:
            raise Refused(
                f"{place}: {pattern!r} names {lacks[0]}, which the model does not have. End the row before it."
            )
        if place and not mine:
            parts = sorted({".".join(name.split(".")[:2]) for name in names.values()} | {"patch_embed", "head"})
            raise Refused(
                f"{place}: {pattern!r} matches nothing.{nearest(pattern, parts)} Parts are patch_embed, blocks.0, blocks.0-3, "
                "blocks.0.attn, norm, head and what else the model has; * stands for anything."
            )
        found |= mine
    return [name for name in names if name in found]


def _spelled(pattern: str) -> Iterator[str]:
    """``blocks.0-3.attn`` as blocks.0.attn, ...; ``patch_embed`` as all that makes tokens."""
    row = re.fullmatch(r"(.*\.)?(\d{1,4})-(\d{1,4})(\..*)?", pattern)
    if row:
        for number in range(int(row[2]), int(row[3]) + 1):
            yield f"{row[1] or ''}{number}{row[4] or ''}"
    elif pattern == STEM[0]:
        yield from STEM
    else:
        yield pattern


def _in(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _before_the_cut(name: str, numbers: Sequence[int]) -> str:
    first, _, rest = name.partition(".")
    number, _, below = rest.partition(".")
    return f"blocks.{numbers[int(number)]}.{below}" if numbers and first == "blocks" else name


def spared(model: nn.Module) -> float:
    """How many of the three forwards that training an image counts are not done, for what asks for no gradient in ``model``.

    A part of which nothing learns, nor of what comes before it, is gone through forward alone: two of three. One that is frozen
    while something before it learns passes a gradient on, but makes none for its own weights: one of three, of its linear layers.
    """
    total, learns = 0.0, False
    for weights, macs, linear in _parts(model):
        learns = learns or any(weight.requires_grad for weight in weights)
        if not any(
            weight.requires_grad for weight in weights if weight.ndim > 1
        ):  # vectors cost nothing that is counted
            total += linear if learns else 2 * macs
    return total / cost.count(model).macs


def _parts(model: nn.Module) -> Iterator[tuple[list[nn.Parameter], int, int]]:
    """The parts of a model in the order in which an image goes through them: parameters, MACs, and those of their linear layers."""
    whole, each = cost.outline(model), anatomy.blocks(model, convolved=True)
    inside = {id(weight) for block in each for weight in block.module.parameters()}
    stem = [weight for name, weight in model.named_parameters() if name.startswith(STEM)]
    rest = [
        weight for name, weight in model.named_parameters() if not name.startswith(STEM) and id(weight) not in inside
    ]
    embed: Any = model.patch_embed
    stem_macs = int(embed.num_patches) * embed.proj.weight.numel()
    yield stem, stem_macs, stem_macs
    for index, (block, spent) in enumerate(zip(each, whole.cost().blocks, strict=True)):
        own = list(block.module.named_parameters())
        attention = [weight for name, weight in own if name.startswith(_ATTENTION)]
        mlp = [weight for name, weight in own if not name.startswith(_ATTENTION)]
        tokens, (heads, qk_dim, v_dim, *_) = whole.kind(index).attended or whole.tokens, whole.dims[index]
        linear = max(0, spent.attn_macs - cost.products(tokens, heads, qk_dim, v_dim))
        yield attention, spent.attn_macs, linear
        yield mlp, spent.mlp_macs, spent.mlp_macs
    yield rest, whole.fixed_macs - stem_macs, whole.fixed_macs - stem_macs
