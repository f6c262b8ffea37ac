"""Instant soup (Jaiswal et al., 2306.10460): masks of copies that looked ahead, joined: ``prune.method: soup``.

It trains by ``finetune``'s recipe. LOTUS of 2024 (2405.00906) prunes so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lotus.config import Fraction
from lotus.papers.zeros import parts
from lotus.stage import TRAIN_FORWARDS
from lotus.way import Options, Way
from selection import methods

if TYPE_CHECKING:
    from lotus.stages.ahead import Ahead
    from lotus.stages.cut import Cutting, Uncut

Whole = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Soup:
    """How it is cooked."""

    step: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the weights left that a round lets go."""
    rounds: Whole = 10
    """At most; they end as soon as less than 5 % of all weights are still to go, which then go by magnitude."""
    train: Fraction = 0.1
    """Fraction of the ticket that the model is trained on before each round, and before the last weights go."""
    copies: Whole = 5
    """That look ahead in a round."""
    steps: Whole = 50
    """Optimizer steps that a copy looks ahead."""
    data: Fraction = 0.1
    """Fraction of the ticket that a copy draws its images from."""
    vary: Annotated[float, Field(ge=1)] = 2.0
    """A copy's learning rate and weight decay lie within this factor of the recipe's."""
    weights: Literal["linears", "sparse_vit"] = "linears"
    """Which may become zero: the blocks' matrices, or also patch embedding, norms and classifier."""


def _make(uncut: Uncut, *, soup: Soup = Soup(), sweep: bool = False) -> Cutting:
    """
    Args:
        soup: how it is cooked
        sweep: also measure the trained model at sparsities from 0 to 90 %, to see where accuracy breaks
    """
    from lotus.papers.soup.way import simmer

    return (yield from simmer(uncut, soup, sweep=sweep))


def _forecast(ahead: Ahead, options: Options) -> float:
    from lotus.papers.soup.cook import steps

    config, looks = ahead.config, parts.looks(ahead, options)
    if config.prune.keep.weights is None:
        return looks
    soup: Soup = methods.arguments(_make, options)["soup"]
    own, each = steps(config.prune.keep.weights, config.finetune.batch_size, soup, ahead.kept)
    return looks + TRAIN_FORWARDS * config.finetune.batch_size * (own + each)


WAY = Way(
    "soup",
    parts.says,
    _make,
    settings=("finetune",),
    cuts=False,
    check=parts.check,
    forecast=_forecast,
    hold=parts.hold,
    tell=parts.tell,
)

RULES = parts.rules("soup")
