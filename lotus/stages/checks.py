"""What is refused before anything is done: settings that cannot work together, and what would only fail after an hour."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType

from lotus import doctor
from lotus.config import Config, Patches, Recipe, Train, rules
from lotus.config.idle import idle
from lotus.run import Run
from lotus.shelves import known
from lotus.stage import Stage
from lotus.stages import ways
from lotus.stages.ahead import Ahead
from lotus.stages.shelf import check_asked
from selection import dynamic_pruning, lottery, methods
from selection.errors import Notice, Refused


def check(config: Config, shelves: Sequence[ModuleType] = ()) -> None:
    """Refuse what can be known to fail before anything is done: names of methods and their options, and the rows of
    lotus/config/rules.py with what only a run knows. Settings without effect are told.

    Raises:
        Refused: an unknown method or option, or settings that do not go together, with the place and the cure.
    """
    from lotus.pruning.judge import measuring
    from lotus.pruning.study import criterion
    from lotus.sparsity.gates import pressing
    from lotus.training import named
    from lotus.training.optim import make_schedule

    check_asked(config, shelves)
    shelves = known(shelves)
    settings, again = config.select, config.train.dynamic
    lottery.choose(score=settings.score, pick=settings.pick, keep=settings.keep, shelves=shelves)
    if again is not None:
        dynamic_pruning.choose(
            pick=again, keep=again.keep, epochs=config.train.epochs, shelves=shelves, place="train.dynamic"
        )
    pressing(config.train.sparsity.penalty, shelves)
    recipes = [(place, recipe) for place, recipe in rules.sections(config) if isinstance(recipe, Recipe)]
    for place, recipe in sorted(recipes, key=lambda one: not isinstance(one[1], Train)):  # the others take from it
        make_schedule(recipe, shelves if recipe.own_schedule else (), place=place)
        named.check(getattr(recipe, "guests", ()), shelves, place=f"{place}.guests")
    if config.prune.search is not None:
        measuring(config.prune.search.metric, shelves)
    found = criterion(config.prune, shelves)
    ways.check(config.prune, shelves)
    run, rows = Run(config), rules.of(shelves)
    facts = {
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "recorded": frozenset(run.reads(shelves)) if run.needs_proxy else frozenset(),
        "reads": frozenset(methods.reads(found)),
    }
    for place, section in rules.sections(config):
        asks = _asks(section, place, shelves) if isinstance(section, Patches) else {}
        rules.refuse(section, rows, place=place, **facts, **asks)
    for text in idle(config):
        warnings.warn(text, Notice, stacklevel=2)


def _asks(patches: Patches, place: str, shelves: Sequence[ModuleType]) -> dict[str, bool]:
    """Whether the score of patches asks a model, where one enters."""
    from lotus.vit import saliency

    if patches.mode != "input":
        return {}
    return {"asks": saliency.reads_a_model(patches.score, shelves, place=f"{place}.score")}


def notice(recipe: Recipe, place: str = "train") -> None:
    """Warn of a peak rate far outside what is usual, and of one that is never reached: a dry run tells what the training would."""
    from lotus.training.optim import unusual

    for text in unusual(recipe, place):
        warnings.warn(text, Notice, stacklevel=2)
    if recipe.warmup >= recipe.epochs:
        text = f"{place}.warmup_epochs: the rate rises for {recipe.warmup:g} epochs, and there are {recipe.epochs}"
        warnings.warn(text, Notice, stacklevel=2)


def look_ahead(config: Config, stages: Iterable[Stage], shelves: Sequence[ModuleType] = ()) -> None:
    """Refuse now what would only fail after an hour: the machine, the model, the budget, the recipes."""
    refusals = doctor.refusals()
    if refusals:
        raise Refused("\n".join(refusals))
    ahead = Ahead(config, shelves)
    for stage in stages:
        stage.check(ahead)
