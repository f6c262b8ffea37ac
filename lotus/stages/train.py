"""The stage ``train``: the lottery's training, on the ticket and under sparsity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lotus.config import Config, options
from lotus.files import write_tensors
from lotus.run import Run
from lotus.stage import Curve, Section, Stage, Work
from lotus.stages import course, self_proxy
from lotus.stages.ahead import (
    LOOK,
    Ahead,
    Cost,
    asked_of_patches,
    check_fit,
    check_recipe,
    check_runs,
    check_weights,
    patches_told,
    training,
)
from lotus.stages.baseline import is_asked
from lotus.stages.context import Context
from lotus.stages.fit import Images, Task, fit, keep_model, outcome
from lotus.stages.shrinking import check_cuts, cuts_told, forecast_looks, shrinking, tell_cuts
from lotus.stages.still import check_still, spared_forecast, still_told
from lotus.stages.teacher import check_teacher, taught, taught_told, teacher_files, teacher_forecast
from selection import dynamic_pruning

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from lotus.config import Dynamic, Patches
    from lotus.sparsity.gates import Gates
    from lotus.training.data_pruning import DynamicSelection


def train(context: Context) -> Work:
    """The lottery's training: on the ticket, or each epoch on what is drawn out of it, under sparsity."""
    from lotus.training.data_pruning import DynamicPruning
    from lotus.training.guests import Guest
    from lotus.training.regularize import EarlyBird, Gating
    from selection.subset import Subset

    run, config = context.run, context.config
    ticket = Subset.load(run.ticket)
    ticket.check(fingerprint=context.manifest().fingerprint, total=context.manifest().n)
    model = context.new_model()
    guests: list[Guest] = []
    gates = _gates(context, model) if config.train.sparsity.gates else None
    if gates is not None:
        guests += [Gating(gates), *([] if config.train.sparsity.early_bird is None else [EarlyBird(gates)])]
    if config.train.dynamic is not None:
        guests.append(DynamicPruning(_selection(context, config.train.dynamic, ticket.rows)))
    guests += taught(context, config.train, "train")
    shrink = None if config.train.shrink is None else shrinking(context, model, ticket.rows)
    guests += [] if shrink is None else [shrink]
    own = None
    if shrink is not None and config.watches_itself:
        own = self_proxy.choosing(context, len(ticket.rows), shrink.is_done)
        guests.append(own)
    images = Images(ticket.rows, ticket.spread())
    fitted, price = yield from fit(context, Task("train", config.train), model, images, guests)
    model = fitted.model
    more: dict[str, Any] = {}
    if config.train.dynamic is not None:
        more["passes_of"] = config.train.epochs * len(ticket.rows)
    if gates is not None:
        more["zero_gates"] = gates.summary()["zero_gates"]
        gates.fold(model)
        if context.world.rank == 0:
            write_tensors(run.gates, gates.values)
    if shrink is not None:
        more |= cuts_told(context, shrink, price)
    if own is not None:
        more |= self_proxy.recorded(own, len(ticket.rows), config.train.epochs)
    yield from keep_model(context, "train", model, run.of("train"))
    return outcome(fitted, price, model, more)


def _gates(context: Context, model: nn.Module) -> Gates:
    from lotus.sparsity.gates import Gates

    keep = context.config.prune.keep
    return Gates(
        model, context.config.train.sparsity, target=keep.macs, of_gates=keep.gates, device=context.world.device,
        shelves=context.shelves,
    )  # fmt: skip


def _selection(context: Context, dynamic: Dynamic, rows: np.ndarray) -> DynamicSelection:
    """What draws each epoch's images out of ``rows``."""
    from lotus.data import beton
    from lotus.training.data_pruning import DynamicSelection

    labels, config = beton.labels(context.run.train_beton), context.config
    return DynamicSelection(
        dynamic,
        rows=rows,
        labels=labels,
        epochs=config.train.epochs,
        seed=config.seed,
        shelves=context.shelves,
        place="train.dynamic",
    )


def _settings(config: Config) -> tuple[str, ...]:
    own: tuple[str, ...] = ("train", "model", "seed", *LOOK)
    if config.watches_itself:
        own = (*own, "select", "score.proxy", "score.gradients")  # it draws the ticket by them
    if config.train.shrink is not None:
        return (*own, "prune")  # it is cut by it
    return (
        (*own, "prune.keep.macs", "prune.keep.gates") if config.train.sparsity.gates else own
    )  # they are steered to it


def _check(ahead: Ahead) -> None:
    from lotus.training import growing

    check_runs("model", ahead.config.model)
    check_recipe("train", ahead.config.train, ahead.shape)
    check_weights("model", ahead.config.model)
    check_fit("model", ahead.config.model)
    growing.check(ahead.shape, ahead.config.train.sides, ahead.config.train.epochs, place="train.sides")
    check_teacher("train", ahead.config.train, ahead)
    check_still(ahead)
    if ahead.config.train.shrink is not None:
        check_cuts(ahead)
    if ahead.config.watches_itself:
        self_proxy.check(ahead)


def _asked_macs(patches: Patches | None, dense: float) -> float:
    """MACs of an image in the model that is asked about patches, ``dense`` in the run's own; 0 where there is none."""
    from lotus.pruning import spec

    if patches is not None and patches.asks_baseline:
        return dense
    return float(spec.read(patches.model)["cost"]["macs"]) if patches is not None and patches.model else 0.0


def passes(ahead: Ahead) -> tuple[float, float, float]:
    """Images that the training goes through, repeats counted, but without those that ``dynamic`` and ``hardest`` leave out; MACs of the
    mean of their forward passes; and of the proxy of ``hardest`` for each."""
    recipe, drawn, gone = ahead.config.train, 1.0, course.pieces(ahead)
    if recipe.dynamic is not None:
        drawn = dynamic_pruning.rehearse(
            pick=recipe.dynamic, keep=recipe.dynamic.keep, epochs=recipe.epochs, shelves=ahead.shelves
        )
    whole = sum(piece.images for piece in gone)
    shown, own = _hardest(ahead)
    images = round(round(whole * drawn) * shown)
    return images, sum(piece.images * piece.macs for piece in gone) / whole, own / shown


def forecast(ahead: Ahead) -> Cost:
    """What the stage is going to cost."""
    settings, n = ahead.config.train, ahead.images
    asked = n * _asked_macs(settings.patches, ahead.macs)
    images, each, own = passes(ahead)
    beside = [(n if asked else 0, asked), teacher_forecast(settings, images, ahead)]
    if settings.shrink is not None:
        beside.append(forecast_looks(ahead))
    beside.append(spared_forecast(images, each + own, course.pieces(ahead)[0].macs, ahead))
    forwards, macs = training(images, each + own)
    return forwards + sum(one for one, _ in beside), macs + sum(one for _, one in beside)


def _hardest(ahead: Ahead) -> tuple[float, float]:
    """Fraction of the images that the guest ``hardest`` shows on, and MACs of its proxy for each that comes; all and none without it."""
    import numpy as np

    from lotus.data.sample_plan import SamplePlan
    from lotus.training.guest_shelf import hardest
    from lotus.training.hardest import proxy_of, stays
    from lotus.vit.cost import count

    recipe = ahead.config.train
    asked = next((guest for guest in recipe.guests if guest.name == hardest.__name__), None)
    if asked is None:
        return 1.0, 0.0
    told = options(hardest, asked.options, place=f"train.guests.{asked.name}")
    plan = SamplePlan(np.arange(ahead.kept), batch_size=recipe.batch_size, accumulate=recipe.accumulate)
    shown = sum(stays(told["keep"], size) for size in plan.sizes(0))
    return shown / ahead.kept, count(proxy_of(ahead.dense, ahead.classes, told["proxy"], seed=0)).macs


def _tell(run: Run, results: dict[str, Any]) -> Section | None:
    if "own_ticket" in results["train"]:
        results["kept"]["images"] = results["train"]["own_ticket"]
    if "passes_of" in results["train"]:  # of all times that an epoch could have shown an image of the ticket
        results["kept"]["passes"] = {"kept": results["train"]["images_seen"], "of": results["train"]["passes_of"]}
    return tell_cuts(results) if run.config.train.shrink is not None else None


def _outputs(config: Config) -> tuple[str, ...]:
    gates = ("gates.safetensors",) if config.train.sparsity.gates else ()
    return ("train/spec.json", *gates, *(("signals.npz", self_proxy.FILE) if config.watches_itself else ()))


def _says(config: Config) -> str:
    shrink = config.train.shrink
    how = "train on the ticket"
    if shrink is None:
        how += " under sparsity" if config.train.sparsity.gates else ""
    else:
        when = ", ".join(f"{one.at:g}" for one in shrink.cuts)
        how += f", cut at {when}" + (" at the latest" if shrink.until_stable is not None else "")
        how += ", then on the ticket that it draws itself" if config.watches_itself else ""
    return how + still_told(config.train) + taught_told(config.train) + patches_told(config.train.patches)


STAGE = Stage(
    "train",
    _says,
    train,
    settings=_settings,
    after=lambda config: ("select", "baseline") if is_asked(config) else ("select",),
    outputs=_outputs,
    every_rank=True,
    part="training",
    files=lambda config: {
        **asked_of_patches("train.patches", config.train.patches),
        "model.weights": config.model.weights,
        **teacher_files("train", config.train),
    },
    check=_check,
    forecast=forecast,
    measured_on=lambda config: config.train.patches,
    tell=_tell,
    curve=Curve("lotus", "on the ticket", "on the ticket"),
)
