"""Unstructured pruning: weights become zeros, in one shot or by a soup."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.events import Evaluated, Event, Said, Step, Wrote
from lotus.stage import TRAIN_FORWARDS, Outcome, Work
from lotus.stages.context import CALIBRATION, Context
from lotus.stages.patches import as_evaluated, told_of_patches

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lotus.training.soup import Cooked


def zero_weights(context: Context) -> Work:
    """Unstructured pruning: weights become zeros."""
    import lotus.pruning
    from lotus.pruning import unstructured
    from lotus.training import loop
    from lotus.vit.cost import count
    from selection.subset import Subset

    run, config, request = context.run, context.config, context.config.prune
    keep = request.keep.weights
    assert keep is not None  # the config's own check
    model = lotus.pruning.load(run.of("train")).to(context.world.device)
    cost, listed = count(model), unstructured.listed(model, request.weights)
    told: dict[str, Any] = {}
    forwards = 0.0
    with (
        context.images(run.val_beton, None, config.train, model) as loader,
        as_evaluated(model, config.train.patches, context.shelves) as tokens,
    ):
        whole = {name: weight.detach().clone() for name, weight in listed.items()}

        def measured(masks: Mapping[str, torch.Tensor]) -> dict[str, float]:
            nonlocal forwards
            unstructured.put(model, masks)
            found = loop.evaluate(model, loader, context.world)
            for name, weight in whole.items():
                listed[name].data.copy_(weight)
            forwards += found["images"]
            return found

        if request.sweep:
            found = []
            for number, sparsity in enumerate(unstructured.SWEEP):
                found.append(measured(unstructured.magnitude(whole, 1 - sparsity))["top1"])
                yield Step("prune", number + 1, len(unstructured.SWEEP), unit="sparsities measured")
            knee = unstructured.knee(unstructured.SWEEP, found)
            told["sweep"] = {"sparsity": list(unstructured.SWEEP), "top1": found, "knee": knee}
            yield Said("prune", _essential(knee))
        masks = (
            unstructured.n_of_m(whole, *unstructured.pattern(request.pattern))
            if request.pattern
            else unstructured.magnitude(whole, keep)
        )
        one_shot = measured(masks)
        patches = {} if tokens is None else {"patches": told_of_patches(config.train.patches, tokens)}
    spent, values = forwards * cost.macs, one_shot
    if request.method == "soup":
        told["one_shot_top1"] = one_shot["top1"]
        cooked = yield from _soup(context, model, Subset.load(run.ticket).rows)
        masks = cooked.masks
        told["left"] = list(cooked.left)
        forwards += TRAIN_FORWARDS * cooked.images
        spent += TRAIN_FORWARDS * cooked.images * cost.macs
        with (
            context.images(run.val_beton, None, config.train, model) as loader,
            as_evaluated(model, config.train.patches, context.shelves),
        ):
            values = loop.evaluate(model, loader, context.world)
    unstructured.put(model, masks)
    stays, of = unstructured.counted(masks)
    yield Said("prune", f"{of - stays:,} of {of:,} weights are zeros now. The model computes as many MACs as before.")
    yield Evaluated("prune", 0, values)
    lotus.pruning.save(model, run.of("prune"), about={"zeros": {"list": request.weights, "kept": stays, "of": of}})
    yield Wrote("prune", str(run.of("prune")))
    told |= {"top1": values["top1"], "loss": values["loss"], "params": cost.params, "macs": cost.macs}
    return Outcome(forwards, spent, {**told, "weights": {"kept": stays, "of": of}, **patches})


def _essential(knee: float | None) -> str:
    if knee is None:
        return "essential sparsity: no knee was seen up to 90 %; one-shot magnitude never lost more than 1 point."
    return f"essential sparsity {100 * knee:.0f} %: the last before one-shot magnitude loses more than 1 point."


def _soup(context: Context, model: nn.Module, rows: np.ndarray) -> Generator[Event, None, Cooked]:
    """Cook, by the fine-tune's recipe, on parts of the ticket; on all patches of an image."""
    from lotus.data.sample_plan import SamplePlan
    from lotus.training.objective import Objective
    from lotus.training.soup import cook
    from lotus.vit.model import image_size

    run, config, recipe, manifest = context.run, context.config, context.config.finetune, context.manifest()
    keep = config.prune.keep.weights
    assert keep is not None

    @contextlib.contextmanager
    def batches(span: int, part: float, steps: int) -> Iterator[Iterator[Any]]:
        seed = config.seed + 5000 + span
        rng = np.random.default_rng([seed, CALIBRATION])
        some = np.sort(rng.choice(rows, size=max(1, round(part * len(rows))), replace=False))
        order = SamplePlan(some, seed=seed, batch_size=min(recipe.batch_size, len(some)), world=1, rank=0)
        with context.loader(
            run.train_beton, order, size=image_size(model), augment=recipe.augment, seed=seed
        ) as loader:
            endless = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
            yield itertools.islice(endless, steps)
            endless.close()

    return (
        yield from cook(
            model, keep, batches, stage="prune", recipe=recipe, settings=config.prune.soup, weights=config.prune.weights,
            objective=Objective(recipe, len(manifest.classes), config.seed), images=len(rows), seed=config.seed,
        )
    )  # fmt: skip
