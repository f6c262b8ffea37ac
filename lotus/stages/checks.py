"""What is refused before anything is done: settings that cannot work together, and what would only fail after an hour."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lotus import doctor
from lotus.config import Config
from lotus.run import Run
from lotus.stages.probe import has_batch_norms, proxy_model
from selection import lottery, methods, redraw
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.config import Patches


def check(config: Config, shelves: Sequence[ModuleType] = ()) -> None:
    """Refuse what can be known to fail before anything is done.

    Raises:
        Refused: an unknown method or option, with its place and the nearest right name.
    """
    from lotus.pruning import criteria
    from lotus.sparsity.gates import pressing
    from lotus.training import named
    from lotus.training.optim import make_schedule

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
    pressing(config.train.sparsity.penalty, shelves)
    for part, recipe in (("train", config.train), ("score", config.score), ("finetune", config.finetune)):
        linear = part == "score" and config.score.probe == "linear"  # whose heads go by our own schedules alone
        make_schedule(recipe, () if linear else shelves, place=part)
        named.check(recipe.guests, shelves, place=f"{part}.guests")
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


def look_ahead(config: Config) -> None:
    """Refuse now what would only fail after an hour: the machine, the model, the budget, the recipes."""
    import lotus.pruning
    from lotus.pruning import budget, convolve, latency, narrow
    from lotus.training.optim import make_optimizer
    from lotus.vit import anatomy
    from lotus.vit.cost import macs, outline
    from lotus.vit.model import create
    from lotus.vit.tokens import Tokens, risen
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
        multiple = 8 if wants.round == "auto" else wants.round
        if wants.inputs:
            anatomy.sites(model, inputs=True)
        keep = wants.keep.model_dump(exclude_none=True)
        if wants.keep.latency is not None:
            latency.timings(model)
        if wants.convolve is not None:
            convolve.refuse(model)
            convolve.check_reach(whole, wants.keep.macs or 1, round=multiple)
        elif wants.search is None:
            widths: tuple[float, ...] = (wants.stream,)
            if not wants.sizes:
                widths = narrow.tries(model, wants.width, keep, plain=not (wants.inputs or wants.branches))
            narrowest, least = min(widths), whole
            if narrowest < 1:
                least = outline(narrow.skeleton(model, narrow.channels(model, narrowest, multiple)))
            for budgets in (keep, *wants.more_sizes):
                budget.check_reach(
                    least,
                    budgets,
                    round=multiple,
                    split=wants.split,
                    inputs=wants.inputs,
                    branches=wants.branches if anatomy.is_vit(model) else False,
                    whole=whole.cost(),
                )
            if not wants.sizes:
                narrow.useful(model, widths, keep, multiple)
        elif wants.search.compare:
            anatomy.plain(model, "prune.search.compare")
        if wants.search is not None and wants.search.drop is None:
            least = whole
            if wants.stream < 1:
                least = outline(narrow.skeleton(model, narrow.channels(model, wants.stream, multiple)))
            budget.check_reach(least, keep, round=multiple, split=wants.split, branches=False, whole=whole.cost())
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
