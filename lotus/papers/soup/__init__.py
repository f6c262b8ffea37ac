"""Instant soup (Jaiswal et al., 2306.10460): masks of copies that looked ahead, joined: ``prune.method: soup``.

It trains by ``finetune``'s recipe. LOTUS of 2024 (2405.00906) prunes so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lotus.config import Fraction
from lotus.papers.zeros import parts
from lotus.stage import TRAIN_FORWARDS
from lotus.way import Options, Way

if TYPE_CHECKING:
    from lotus.stages.ahead import Ahead
    from lotus.stages.cut import Cutting, Uncut

Whole = Annotated[int, Field(ge=1)]


def _make(
    uncut: Uncut,
    *,
    weights: Literal["linears", "sparse_vit"] = "linears",
    sweep: bool = False,
    step: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    rounds: Whole = 10,
    train: Fraction = 0.1,
    copies: Whole = 5,
    steps: Whole = 50,
    data: Fraction = 0.1,
    vary: Annotated[float, Field(ge=1)] = 2.0,
) -> Cutting:
    """
    Args:
        weights: which may become zero: the blocks' matrices, or also patch embedding, norms and classifier
        sweep: also measure the trained model at sparsities from 0 to 90 %, to see where accuracy breaks
        step: fraction of the weights left that a round lets go
        rounds: at most; they end as soon as less than 5 % of all weights are still to go, which then go by magnitude
        train: fraction of the ticket that the model is trained on before each round, and before the last weights go
        copies: that look ahead in a round
        steps: optimizer steps that a copy looks ahead
        data: fraction of the ticket that a copy draws its images from
        vary: a copy's learning rate and weight decay lie within this factor of the recipe's
    """
    from lotus.papers.soup.cook import Soup
    from lotus.papers.soup.way import simmer

    return (yield from simmer(uncut, Soup(step, rounds, train, copies, steps, data, vary, weights), sweep=sweep))


def _forecast(ahead: Ahead, options: Options) -> float:
    from lotus.papers.soup.cook import Soup, steps

    config, looks = ahead.config, parts.looks(ahead, options)
    if config.prune.keep.weights is None:
        return looks
    soup = Soup(**{name: options[name] for name in Soup.__dataclass_fields__})
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
