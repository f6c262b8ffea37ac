"""The way itself: nested gates search on a copy, the original weights are cut and convolved by them. Leaves search.json."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from lotus.config import Recipe
from lotus.events import Said, Wrote
from lotus.files import write_json
from lotus.papers.spvit import project
from lotus.papers.spvit.nested_gates import NestedGates
from lotus.stage import TRAIN_FORWARDS
from lotus.stages.context import Context
from lotus.stages.cut import Cut, Cutting, Uncut
from lotus.stages.fit import Images, Task, fit
from lotus.training.regularize import Gating
from lotus.vit.convolution import macs as conv_macs
from lotus.vit.cost import count, outline
from selection.subset import Subset


@dataclass(frozen=True)
class Search:
    """How it is searched; the settings of ``convolve``."""

    epochs: int
    lr: float
    gate_lr: float
    strength: float


def convolve(uncut: Uncut, asks: Search) -> Cutting:
    """Attention that becomes convolution, and MLP units that go."""
    context, model, request = uncut.context, uncut.model, uncut.request
    run, config, keep = context.run, context.config, request.keep.macs
    assert keep is not None  # a row of the rules
    ticket = Subset.load(run.ticket)
    whole, shape = count(model), outline(model)
    searched = copy.deepcopy(model)
    gates = NestedGates(
        searched, keep=keep, lr=asks.gate_lr, strength=asks.strength, seed=config.seed, device=context.world.device
    )
    task = Task("prune", _recipe(context, asks), place="train")
    fitted, _ = yield from fit(context, task, searched, Images(ticket.rows, ticket.spread()), [Gating(gates)])
    chances, mixes, reached = gates.by_block(), gates.mixes(), gates.open_macs()
    gates.remove()
    patches = shape.tokens - shape.prefix
    both = sum(conv_macs(patches, shape.width, one.v_dim, kernel) for one in shape.dims for kernel in (1, 3))
    choices = project.project(shape, chances, keep, round=request.multiple)
    small = project.convert(model, choices, mixes)
    with context.images(run.train_beton, uncut.calibration, config.train, small) as loader:
        images = project.calibrate(small, loader.epoch(0))
    after = count(small)
    kinds = ["attention" if choice.kernel == 0 else f"{choice.kernel}x{choice.kernel}" for choice in choices]
    written = {
        "format": 1, "kind": "convolve", "top1_while_searching": fitted.top1, "open_macs": reached,
        "attention": kinds, "units": [len(choice.units) for choice in choices],
        "gates": [_list(gate.sigmoid()) for gate, _ in chances], "unit_gates": [_list(u.sigmoid()) for _, u in chances],
    }  # fmt: skip
    write_json(run.folder / "search.json", written)
    yield Wrote("prune", str(run.folder / "search.json"))
    yield Said("prune", f"attention became {', '.join(kinds)}; the gates ended at {reached:.3f} of the MACs and were projected "
               f"to {after.macs / whole.macs:.3f}")  # fmt: skip
    forwards = TRAIN_FORWARDS * fitted.images_seen * (1 + both / whole.macs) + images * after.macs / whole.macs
    told = {"search": {name: written[name] for name in ("kind", "open_macs", "attention", "units")}}
    before = {"params": whole.params, "macs": whole.macs}
    notes = ["Batch norms of the convolutions took their statistics from the calibration images."] if images else []
    return Cut(small, before, {"params": after.params, "macs": after.macs}, forwards, notes), told


def _recipe(context: Context, asks: Search) -> Recipe:
    """That of the search: the training's, without what would be in the gates' way."""
    config = context.config
    train = {name: getattr(config.train, name) for name in Recipe.model_fields}
    changed: dict[str, Any] = {
        "epochs": asks.epochs, "lr": asks.lr, "min_lr": min(config.train.min_lr, asks.lr), "warmup_epochs": 0.0,
        "warmup_ratio": None, "zero": min(1, config.train.zero), "evaluate_every": 0,
    }  # fmt: skip
    return Recipe(**{**train, **Recipe.off_within(), **changed})


def _list(values: torch.Tensor) -> list[float]:
    """Numbers for JSON, as short as float32 needs them."""
    return [round(float(value), 6) for value in values]
