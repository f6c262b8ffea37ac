"""What a training may cost: from it the planner makes the rest of the page (lotus/stages/planner.py)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lotus.config.section import Section

Strategy = Literal["shrink", "small", "dense"]
"""What a budget of training is spent on."""


class Budget(Section):
    """What the training may cost, everything billed: epochs, cut and size follow from it (docs/planning.md)."""

    train: float | None = Field(None, gt=0)
    """Fraction of the MACs of the dense training on all images for ``train.epochs`` epochs, with what is spent on proxy and calibration."""
    minutes: float | None = Field(None, gt=0)
    """Minutes of the training on this machine, in place of ``train``: a few steps of the dense and of the small model are timed."""
    ways: tuple[Strategy, ...] = ("shrink", "small", "dense")
    """What may be taken: a training that shrinks, a smaller model from scratch (never where weights are given), the dense model."""
    keep: Literal["prune", "measured"] = "prune"
    """How much stays: what ``prune.keep`` says, or what was measured to be best. Where the config says no ``prune.keep``: measured."""
    images: Literal["all", "select"] = "all"
    """all: no image is left out, and no proxy is paid for (at 0.7 of CIFAR-10 nearly all of what a run lost was the images left
    out: configs/cifar10.yaml); select: as ``select`` says."""
