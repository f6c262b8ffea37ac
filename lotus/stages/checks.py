"""What is refused before anything is done: settings that cannot work together, and what would only fail after an hour."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from lotus import doctor
from lotus.config import Config
from lotus.run import Run
from lotus.stage import Stage
from lotus.stages.ahead import Ahead
from selection import lottery, methods, redraw
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.config import Patches


def check(config: Config, shelves: Sequence[ModuleType] = ()) -> None:
    """Refuse what can be known to fail before anything is done.

    Raises:
        Refused: an unknown method or option, with its place and the nearest right name.
    """
    from lotus.pruning import criteria

    wants = config.select
    lottery.choose(score=wants.score, pick=wants.pick, keep=wants.keep, shelves=shelves)
    if Run(config).probed:
        read = Run(config).reads(shelves)
        if config.score.subsets is None and (beyond := sorted(read & {"run_in", "run_p_label"})):
            raise Refused(
                f"score.subsets: {', '.join(beyond)} of runs on random parts of the images would be read. Set "
                "score.subsets.runs=10 (nearly free with score.probe=linear), or take another score."
            )
        if "given" in read:
            raise Refused(
                "select: given would be read, and no probe records it: it comes from elsewhere. Take another score, or draw the "
                "ticket from signals of your own: lotus select."
            )
        if not config.score.gradients and (missing := sorted(read & {"errors", "kl_step"})):
            raise Refused(f"score.gradients: {', '.join(missing)} would be read. Turn it on, or take another method.")
    if config.train.redraw is not None:
        again = config.train.redraw
        redraw.choose(pick=again, keep=again.keep, epochs=config.train.epochs, shelves=shelves, place="train.redraw")
    found = methods.find([criteria, *shelves], config.prune.criterion.name, place="prune.criterion")
    methods.check_settings(found, config.prune.criterion.options, place="prune.criterion")
    if config.prune.criterion.name == "gate" and not config.train.sparsity.gates:
        raise Refused(
            "prune.criterion: 'gate' reads gates, and train.sparsity.gates is off. Turn it on, or use fisher."
        )
    sparsity = config.train.sparsity
    if config.prune.criterion.name == "gate" and config.prune.inputs and not sparsity.inputs:
        raise Refused(
            "prune.inputs: 'gate' would read gates of inputs, and train.sparsity.inputs is off. Turn it on, or use fisher."
        )
    if sparsity.early_bird is not None and not (sparsity.gates and (config.prune.keep.macs or config.prune.keep.gates)):
        raise Refused(
            "train.sparsity.early_bird: draws masks of gates at a budget of MACs or gates. Turn gates on and set "
            "prune.keep.macs, or leave it out."
        )
    if config.prune.method != "structured" and config.train.sparsity.gates:
        raise Refused(
            f"prune.method: {config.prune.method} pruning cuts no dimension, and gates are for those. Set train.sparsity.gates=false."
        )
    if config.train.sparsity.attention is not None:
        if config.train.compile:
            raise Refused(
                "train.sparsity.attention: compiled blocks do not show their attention. Set train.compile=false."
            )
        if config.train.patches is not None and config.train.patches.mode == "tome":
            raise Refused(
                "train.sparsity.attention: tome's attention is weighted by merged patches. Take another train.patches.mode."
            )
    if config.score.patches is not None and config.score.patches.model == "baseline":
        raise Refused(
            "score.patches.model: the probe comes before the baseline. Give a folder written by LOTUS, or take contrast."
        )
    search, convolve = config.prune.search, config.prune.convolve
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (convolve or (search and search.recovery and search.rounds > 1)):
        raise Refused(
            f"prune.{'convolve' if convolve else 'search.recovery'}: trains inside of the prune stage, which one process does. Run "
            "`lotus prune` as one process, then go on with all."
        )
    if search and search.rounds > 1 and config.prune.criterion.name == "gate":
        raise Refused("prune.search.rounds: 'gate' knows the first round alone; take one round, or fisher.")
    if convolve:
        for place, bad in (
            ("train.sparsity.gates: are not read by", config.train.sparsity.gates),
            ("finetune.patches: cannot be left out of", config.finetune.patches),
        ):
            if bad:
                raise Refused(f"{place} prune.convolve. Turn them off.")
        if config.train.patches is not None and config.train.patches.evaluate == "sparse":
            raise Refused(
                "train.patches.evaluate: sparse leaves patches out, and prune.convolve needs all in their places. Evaluate dense."
            )
    for part, recipe in (("score", config.score), ("train", config.train), ("finetune", config.finetune)):
        if recipe.patches is not None:
            _check_patches(recipe.patches, f"{part}.patches", shelves)


def _check_patches(patches: Patches, place: str, shelves: Sequence[ModuleType]) -> None:
    from lotus.vit import saliency

    if patches.joint is not None and place == "score.patches":
        raise Refused(
            "score.patches.joint: what the images score is known only after this training. Set it in train.patches alone."
        )
    if patches.mode != "input":
        return
    asks = saliency.reads_a_model(patches.score, shelves, place=f"{place}.score")
    name = patches.score.name
    if asks and not patches.model:
        raise Refused(
            f"{place}.score: {name!r} reads a model. Give {place}.model, a folder written by LOTUS, or take contrast."
        )
    if not asks and patches.model:
        raise Refused(f"{place}.model: {name!r} reads the image alone and asks no model. Remove one of the two.")
    if (asks or patches.cached) and patches.evaluate == "sparse":
        raise Refused(
            f"{place}.evaluate: sparse: {name!r} is known of the training images alone. Evaluate dense, or take contrast."
        )


def look_ahead(config: Config, stages: Iterable[Stage], shelves: Sequence[ModuleType] = ()) -> None:
    """Refuse now what would only fail after an hour: the machine, the model, the budget, the recipes."""
    refusals = doctor.refusals()
    if refusals:
        raise Refused("\n".join(refusals))
    ahead = Ahead(config, shelves)
    for stage in stages:
        stage.check(ahead)
