"""The settings of a soup."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lotus.config import Fraction

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
