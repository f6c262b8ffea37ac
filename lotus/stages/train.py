"""The three trainings of a run: the dense ``baseline``, ``train`` on the ticket, ``finetune`` of what was pruned."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lotus.files import write_tensors
from lotus.stages.fit import Images, fit, keep_model, outcome
from lotus.stages.shop import Making, Outcome, Shop


def baseline(shop: Shop) -> Making:
    """The dense model on all images, by the same recipe: what everything is compared with."""
    run, config = shop.run, shop.config
    model = shop.new_model()
    images = Images(np.arange(shop.manifest().n))
    fitted, price = yield from fit(shop, "baseline", config.train, model, images, place="train")
    yield from keep_model(shop, "baseline", model, run.baseline)
    return outcome(fitted, price, model)


def train(shop: Shop) -> Making:
    """The lottery's training: on the ticket, or each epoch on what is drawn out of it, under sparsity."""
    from lotus.data import beton
    from lotus.sparsity.attention_penalty import AttentionPenalty
    from lotus.sparsity.gates import Gates
    from lotus.training.guests import Guest
    from lotus.training.redrawing import Redrawing, Redrawn
    from lotus.training.regularize import EarlyBird, Gating, Penalized
    from selection.subset import Subset

    run, config = shop.run, shop.config
    ticket = Subset.load(run.ticket)
    ticket.check(fingerprint=shop.manifest().fingerprint, total=shop.manifest().n)
    model = shop.new_model()
    guests: list[Guest] = []
    gates = penalty = None
    if config.train.sparsity.gates:
        keep = config.prune.keep
        gates = Gates(
            model, config.train.sparsity, target=keep.macs, of_gates=keep.gates, device=shop.world.device,
            shelves=shop.shelves,
        )  # fmt: skip
        guests.append(Gating(gates))
        if config.train.sparsity.early_bird is not None:
            guests.append(EarlyBird(gates))
    if config.train.sparsity.attention is not None:
        penalty = AttentionPenalty(model, config.train.sparsity.attention)
        guests.append(Penalized(penalty))
    redrawing = None
    if config.train.redraw is not None:
        redrawing = Redrawing(
            config.train.redraw,
            rows=ticket.rows,
            labels=beton.labels(run.train_beton),
            epochs=config.train.epochs,
            seed=config.seed,
            shelves=shop.shelves,
        )
        guests.append(Redrawn(redrawing))
    fitted, price = yield from fit(
        shop, "train", config.train, model, Images(ticket.rows, ticket.spread()), guests
    )  # fmt: skip
    model = fitted.model
    if penalty is not None:
        price = dataclasses.replace(price, macs=price.macs + penalty.macs())
        penalty.remove()
    more: dict[str, Any] = {}
    if redrawing is not None:
        more["passes_of"] = config.train.epochs * len(ticket.rows)
    if gates is not None:
        more["zero_gates"] = gates.summary()["zero_gates"]
        gates.fold(model)
        if shop.world.rank == 0:
            write_tensors(run.gates, gates.values)
        price = dataclasses.replace(price, left=(*price.left, run.gates))
    yield from keep_model(shop, "train", model, run.trained)
    return outcome(fitted, price, model, more)


def finetune(shop: Shop) -> Making:
    import lotus.pruning
    from lotus.pruning import unstructured
    from lotus.training.distill import Taught, make_distiller
    from lotus.vit.cost import count
    from selection.subset import Subset

    run, recipe = shop.run, shop.config.finetune
    model = lotus.pruning.load(run.pruned)
    if recipe.epochs == 0:
        if shop.world.rank == 0:
            lotus.pruning.save(model, run.final)
        return Outcome(values={**(run.record("prune").values), "images_seen": 0, "train_seconds": 0.0})  # type: ignore[union-attr]
    ticket = Subset.load(run.ticket)
    teacher = lotus.pruning.load(run.trained)
    distiller = make_distiller(teacher, recipe, shop.world.device)
    teacher_macs = count(teacher).macs if distiller is not None else 0
    wants = shop.config.prune
    masks = {} if wants.method == "structured" else unstructured.zeros(model, wants.weights)
    with unstructured.held(model, masks):
        guests = [] if distiller is None else [Taught(distiller)]
        fitted, price = yield from fit(
            shop, "finetune", recipe, model, Images(ticket.rows, ticket.spread()), guests
        )  # fmt: skip
    model = fitted.model
    more: dict[str, Any] = {}
    if masks:
        unstructured.check(model, masks)
        more["weights"] = dict(zip(("kept", "of"), unstructured.counted(masks), strict=True))
    yield from keep_model(
        shop, "finetune", model, run.final, {"zeros": {"list": wants.weights, **more["weights"]}} if masks else {}
    )
    return outcome(fitted, price, model, more, teacher_macs=teacher_macs)
