"""What is refused before anything is done: settings that cannot work together, and what would only fail after an hour."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lotus import doctor
from lotus.config import Config, Patches, rules
from lotus.run import Run
from lotus.stages.probe import has_batch_norms, proxy_model
from selection import lottery, methods, redraw
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn


def check(config: Config, shelves: Sequence[ModuleType] = ()) -> None:
    """Refuse what can be known to fail before anything is done: names of methods and their options, and the rows of
    lotus/config/rules.py with what only a run knows.

    Raises:
        Refused: an unknown method or option, or settings that do not go together, with the place and the cure.
    """
    from lotus.pruning import criteria
    from lotus.sparsity.gates import pressing
    from lotus.training import named
    from lotus.training.optim import make_schedule

    wants, again, criterion = config.select, config.train.redraw, config.prune.criterion
    lottery.choose(score=wants.score, pick=wants.pick, keep=wants.keep, shelves=shelves)
    if again is not None:
        redraw.choose(pick=again, keep=again.keep, epochs=config.train.epochs, shelves=shelves, place="train.redraw")
    pressing(config.train.sparsity.penalty, shelves)
    for part, recipe in (("train", config.train), ("score", config.score), ("finetune", config.finetune)):
        linear = part == "score" and config.score.probe == "linear"  # whose heads go by our own schedules alone
        make_schedule(recipe, () if linear else shelves, place=part)
        named.check(recipe.guests, shelves, place=f"{part}.guests")
    found = methods.find([criteria, *shelves], criterion.name, place="prune.criterion")
    methods.check_settings(found, criterion.options, place="prune.criterion")
    run, rows = Run(config), rules.of(shelves)
    known = {
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "recorded": frozenset(run.reads(shelves)) if run.probed else frozenset(),
        "reads": frozenset(methods.reads(found)),
    }
    for place, section in rules.sections(config):
        asks = _asks(section, place, shelves) if isinstance(section, Patches) else {}
        rules.refuse(section, rows, place=place, **known, **asks)


def _asks(patches: Patches, place: str, shelves: Sequence[ModuleType]) -> dict[str, bool]:
    """Whether the score of patches asks a model, where one enters."""
    from lotus.vit import saliency

    if patches.mode != "input":
        return {}
    return {"asks": saliency.reads_a_model(patches.score, shelves, place=f"{place}.score")}


def look_ahead(config: Config) -> None:
    """Refuse now what would only fail after an hour: the machine, the model, the budget, the recipes."""
    import lotus.pruning
    from lotus.pruning import budget, convolve, latency, narrow
    from lotus.training.optim import make_optimizer
    from lotus.vit import anatomy
    from lotus.vit.cost import macs, outline
    from lotus.vit.model import create
    from lotus.vit.token_plan import risen
    from lotus.vit.tokens import Tokens
    from selection.subset import Subset

    refusals = doctor.refusals()
    if refusals:
        raise Refused("\n".join(refusals))
    model = create(config.model.model_copy(update={"pretrained": False, "weights": ""}), classes=10)
    proxy = model
    if config.score.model is not None or config.score.side:
        proxy, side = proxy_model(config, 10, loaded=False)
        macs(proxy, side, place="score.model")
    if config.score.probe == "train" and config.score.precision == "bf16" and has_batch_norms(proxy):
        raise Refused(
            "score.precision: bf16 leaves the statistics of batch norms in fp32, and torch takes no such mixture. Set "
            "score.precision=fp32, or score.probe=linear."
        )
    if config.score.patches is not None:
        try:
            anatomy.supported(proxy)
        except Refused as refusal:
            raise Refused(f"score.patches: {refusal} Set score.patches=null.") from None
    if config.prune.method == "structured":
        wants, whole = config.prune, outline(model)
        if wants.round == "auto":
            wants = wants.model_copy(update={"round": 8})
        if wants.inputs:
            anatomy.sites(model, inputs=True)
        if wants.keep.latency is not None:
            latency.timings(model)
        if wants.convolve is not None:
            convolve.refuse(model)
            convolve.check_reach(whole, wants.keep.macs or 1, round=wants.multiple)
        elif wants.search is None:
            widths = (wants.stream,) if wants.sizes else narrow.tries(model, wants)
            narrowest, least = min(widths), whole
            if narrowest < 1:
                least = outline(narrow.skeleton(model, narrow.channels(model, narrowest, wants.multiple)))
            branches = wants.branches if anatomy.is_vit(model) else False
            for keep in (wants.keep.asked, *wants.more_sizes):
                budget.check_reach(least, wants.at(keep, branches=branches), whole=whole.cost())
            if not wants.sizes:
                narrow.useful(model, widths, wants)
        elif wants.search.compare:
            anatomy.plain(model, "prune.search.compare")
        if wants.search is not None and wants.search.drop is None:
            least = whole
            if wants.stream < 1:
                least = outline(narrow.skeleton(model, narrow.channels(model, wants.stream, wants.multiple)))
            budget.check_reach(least, wants.model_copy(update={"branches": False}), whole=whole.cost())
    else:
        _check_zeros(config, model)
    for name, recipe in (("train", config.train), ("score", config.score), ("finetune", config.finetune)):
        trained = proxy if name == "score" else model
        make_optimizer(trained, recipe, place=name)
        if recipe.deepspeed and not Path(recipe.deepspeed).is_file():
            raise Refused(f"{name}.deepspeed: there is no file {recipe.deepspeed}.")
        if recipe.patches is not None:
            Tokens(trained, recipe.patches).remove()
            depth = len(anatomy.blocks(trained))
            if recipe.patches.mode == "cumulative" and not risen(depth - 2, depth):
                raise Refused(
                    f"patches.mode: cumulative lets no patch go before the last of {depth} blocks. Take evit or input."
                )
            if recipe.patches.model not in ("", "baseline"):
                lotus.pruning.load(recipe.patches.model)
    for place, asked in (("model", config.model), ("score.model", config.score.model)):
        if asked is not None and asked.weights and not Path(asked.weights).exists():
            raise Refused(f"{place}.weights: there is nothing at {asked.weights}.")
    for file in (config.select.ticket, config.select.start):
        if file:
            Subset.load(file)


def _check_zeros(config: Config, model: nn.Module) -> None:
    """Refuse a pattern that does not fit the model, and a fine-tune that would move what was pruned."""
    from torch import nn

    from lotus.pruning import unstructured
    from lotus.training.optim import make_optimizer

    listed = unstructured.listed(model, config.prune.weights)
    if config.prune.pattern:
        unstructured.n_of_m(listed, *unstructured.pattern(config.prune.pattern))
    if config.finetune.epochs:
        small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        optimizer = make_optimizer(small, config.finetune.model_copy(update={"layer_decay": 1.0}), place="finetune")
        if not unstructured.keeps_zeros(optimizer):
            raise Refused(
                f"finetune.optimizer: {config.finetune.optimizer!r} moves weights that were pruned, since it does not work number "
                "by number. Take adamw."
            )
