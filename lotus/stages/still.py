"""A training in which parts of the model do not learn, or not at first: checked, forecast and told."""

from __future__ import annotations

from lotus.config import Train
from lotus.stages.ahead import Ahead, Cost


def check_still(ahead: Ahead) -> None:
    """Refuse names of parts that are none, and a model of which nothing is left to learn."""
    from lotus.training.freeze import Frozen, frozen

    recipe = ahead.config.train
    if recipe.freeze:
        frozen(ahead.shape, recipe.freeze, place="train.freeze")
        guest = Frozen(recipe.freeze)
        guest.equip(ahead.shape)
        guest.leave()


def spared_forecast(images: float, each: float, before: float, ahead: Ahead) -> Cost:
    """What is not spent in the stage ``train`` since parts of the model do not learn: below zero.

    Args:
        images: that the training goes through, repeats counted
        each: MACs of the mean image, over the cuts of a training that shrinks
        before: of an image before the first cut
        ahead: what is known of the run before it
    """
    recipe = ahead.config.train
    if not recipe.holds_still:
        return 0.0, 0.0
    return spared_of(recipe, images, before, ahead, each / before)


def spared_of(recipe: Train, images: float, macs: float, ahead: Ahead, share: float = 1.0) -> Cost:
    """Likewise of any training by ``recipe``.

    Args:
        images: that the training goes through, repeats counted
        macs: of an image before a cut
        ahead: what is known of the run before it
        share: fraction of them that the mean image of the training takes
    """
    from lotus.training.freeze import Frozen, spared

    model, parts = ahead.dense, []
    for probe in (1.0, 0.0):
        guest = Frozen(recipe.freeze, probe)
        guest.equip(model)
        parts.append(spared(model))
        guest.leave()
    alone = recipe.probe_epochs / recipe.epochs
    rest = max(0.0, share - alone)  # of the MACs, where the cut comes after the head has learned alone
    forwards = images * (alone * parts[0] + (1 - alone) * parts[1])
    return -forwards, -images * macs * (alone * parts[0] + rest * parts[1])


def still_told(recipe: Train) -> str:
    """What a stage says of it, behind what it does."""
    told = f", the head alone for {recipe.probe_epochs:g} epochs first" if recipe.probe_epochs else ""
    return told + (f", frozen: {', '.join(recipe.freeze)}" if recipe.freeze else "")
