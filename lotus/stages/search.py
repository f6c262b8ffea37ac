"""Structured pruning by trying: a search for the widths of blocks, and SPViT's for those that become convolutions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Recipe
from lotus.events import Event, Said, Wrote, watched
from lotus.files import write_json
from lotus.stages.cut import Cut, Cutting, narrow_stream, study, timed
from lotus.stages.fit import Images, fit
from lotus.stages.shop import HELD_OUT, TRAIN_FORWARDS, Shop
from selection.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import nn


def search_widths(
    shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, multiple: int, table: Any
) -> Cutting:
    """By trying: rounds of study, search and, between two, a little training. Leaves search.json and pareto.json."""
    from lotus.pruning import cp_vit, search
    from lotus.vit.cost import count
    from selection.subset import Subset

    run, config, wants = shop.run, shop.config, shop.config.prune
    asks = wants.search
    assert asks is not None
    ticket = Subset.load(run.ticket)
    rng = np.random.default_rng([config.seed, HELD_OUT])
    rows = _held_out(ticket.rows, ticket.total, calibration, asks.images, rng)
    if len(rows) and np.isin(rows, ticket.rows).any():
        left = ticket.total - len(ticket.rows)
        cure = f"prune.search.images={left}, or a smaller select.keep" if left else "select.keep below 1 gives some"
        text = (
            f"some held-out images were trained on: the ticket leaves {left} out, and {asks.images} are wanted; {cure}"
        )
        yield Said("prune", text, level="warning")
    dense, whole = model, count(model)
    depth = len(whole.blocks)
    budget = wants.keep.model_dump(exclude_none=True)
    forwards = float(0)
    with shop.images(run.train_beton, rows, config.train, model) as held:
        judge = search.Judge(dense, lambda: held.epoch(0), asks.metric)
        forwards += judge.forwards
        log: list[dict[str, Any]] = []
        tried: list[search.Tried] = []
        model, looked, notes = yield from narrow_stream(shop, model, calibration, multiple)
        forwards += looked
        for number in range(asks.rounds):
            studied = yield from study(shop, model, gates if number == 0 else None, calibration)
            if table is not None:  # of the dense model, whatever earlier rounds left
                studied = dataclasses.replace(studied, beside=dense)
            now, part = count(model), (number + 1) / asks.rounds
            # Budgets fall by the same factor a round; what is allowed rises by the same step. Latency stays a part of the dense
            # model's, the others are of the present one's.
            keep = {
                what: min(1.0, share**part * (1 if what == "latency" else getattr(whole, what) / getattr(now, what)))
                for what, share in budget.items()
            }
            shared: dict[str, Any] = {
                "keep": keep if asks.drop is None else None,
                "drop": None if asks.drop is None else asks.drop * part,
                "round": multiple,
                "split": wants.split,
                "table": table,
            }
            if asks.kind == "ratios":
                grid = asks.grid if number == 0 else 0
                find, most = functools.partial(search.ratios, grid=grid), grid**2 + 55
            else:
                find, most = functools.partial(search.blocks, levels=asks.levels), 2 * asks.levels * depth + 10
            found = yield from watched(
                "prune",
                most,
                lambda progress: find(studied, judge, progress=progress, **shared),  # noqa: B023 - done before the next round
                unit="cuts tried, at most",
            )
            forwards += (studied.forwards + found.forwards) * now.macs / whole.macs
            log += [{"round": number, **one.record()} for one in found.tried]
            tried += found.tried
            model = found.drawn.model
            chosen = found.chosen
            yield Said(
                "prune",
                f"round {number + 1} of {asks.rounds}: {len(found.tried)} tried; of attention {chosen.attention:.2f} and of the "
                f"MLPs {chosen.mlp:.2f} of the MACs stay; {asks.metric} {chosen.worse:.4f}, held-out top-1 {chosen.top1:.2f} %",
            )
            if found.notes and number == 0:  # no recovery yet: it is the narrower stream that is too far already
                raise Refused(
                    f"prune.search.drop: {shared['drop']:g} is passed before any cut ({found.chosen.worse:.4f}). Raise it, or keep "
                    "more of the stream (prune.width)."
                )
            for note in found.notes:
                yield Said("prune", f"round {number + 1}: {note}", level="warning")
            if asks.recovery and number + 1 < asks.rounds:
                model, seen, taught = yield from _recover(shop, model, dense, ticket.rows, number)
                forwards += seen * (TRAIN_FORWARDS * chosen.macs / whole.macs + taught)
        small, after = model, count(model)
        theirs: list[dict[str, float]] = []
        if asks.compare:
            theirs = cp_vit.sweep(dense, lambda: held.epoch(0), judge, sorted(asks.compare, reverse=True))
            forwards += judge.images * sum(1 + row["macs"] / whole.macs for row in theirs)
        last = judge(small)
    best = search.pareto(tried)
    written = {
        "format": 1, "kind": asks.kind, "metric": asks.metric, "images": judge.images, "rounds": asks.rounds,
        "dense": {"macs": whole.macs, "params": whole.params, "top1": judge.dense.top1},
        "chosen": {"macs": after.macs, "params": after.params, "attention": chosen.attention, "mlp": chosen.mlp, **last._asdict()},
        "tried": log, "pareto": [one.record() for one in best], "cp_vit": theirs,
    }  # fmt: skip
    if theirs:
        points = [(row["macs"], row["top1"]) for row in theirs]
        points.append((whole.macs, judge.dense.top1))
        equal = cp_vit.macs_at(points, last.top1)
        close = cp_vit.macs_at([(row["macs"], -row["worse"]) for row in theirs] + [(whole.macs, 0.0)], -last.worse)
        written["equal"] = {"top1": last.top1, "cp_vit_macs": equal, "cp_vit_macs_same_metric": close}
        ratio = (
            f"{after.macs / equal:.4f} of its MACs"
            if equal
            else "it is not in the range of the ratios that were compared"
        )
        yield Said(
            "prune",
            f"CP-ViT with a fixed ratio at the same held-out top-1 ({last.top1:.2f} %), nothing fine-tuned: {ratio}",
        )
    write_json(run.folder / "search.json", written)
    write_json(run.folder / "pareto.json", written["pareto"])
    yield Wrote("prune", str(run.folder / "search.json"))
    more = yield from timed(shop, found.drawn)
    brief: dict[str, Any] = {name: written[name] for name in ("dense", "chosen", "equal", "cp_vit") if name in written}
    before = {"params": whole.params, "macs": whole.macs}
    cut = Cut(small, before, {"params": after.params, "macs": after.macs}, forwards, (*notes, *found.drawn.notes))
    told = {**brief, "kind": asks.kind, "metric": asks.metric, "tried": len(log), "images": judge.images}
    return cut, {"search": told, **more}


def _recover(
    shop: Shop, model: nn.Module, dense: nn.Module, ticket: np.ndarray, number: int
) -> Generator[Event, None, tuple[nn.Module, int, bool]]:
    """A little training after a round, by the fine-tune's recipe: the model, the images that it saw, and whether ``dense`` taught."""
    import copy

    from lotus.training.distill import Taught, make_distiller

    config, asks = shop.config, shop.config.prune.search
    assert asks is not None
    passes, images = _passes(asks.recovery, config.finetune.batch_size, len(ticket))
    off = {"epochs": passes, "warmup_epochs": 0.0, "patches": None, "compile": False, "ema": 0.0}
    recipe = config.finetune.model_copy(update=off)
    rng = np.random.default_rng([config.seed, HELD_OUT, number])
    rows = np.sort(rng.choice(ticket, size=images, replace=False))
    twin = copy.deepcopy(model)
    distiller = make_distiller(copy.deepcopy(dense), recipe, shop.world.device)
    fitted, _ = yield from fit(
        shop, "prune", recipe, model, Images(rows), [] if distiller is None else [Taught(distiller)], place="finetune",
        seed=config.seed + 1 + number, evaluate=False,
    )  # fmt: skip
    return fitted.load_into(twin).to(shop.world.device).eval(), fitted.images_seen, distiller is not None


def _passes(steps: int, batch: int, images: int) -> tuple[int, int]:
    """How often to go through how many of ``images``, so that ``steps`` optimiser steps are taken; a few more where they do
    not fill the passes evenly."""
    passes = -(-steps * batch // images)
    each = -(-steps // passes)
    return passes, min(images, each * batch)


def _held_out(
    ticket: np.ndarray, total: int, calibration: np.ndarray, images: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows of training images to search by: first those that nothing was trained on, then those that did not calibrate."""
    outside = np.setdiff1d(np.arange(total), ticket)
    chosen = rng.choice(outside, size=min(images, len(outside)), replace=False)
    if len(chosen) < images:
        others = np.setdiff1d(ticket, calibration)
        others = others if len(others) else ticket
        more = rng.choice(others, size=min(images - len(chosen), len(others)), replace=False)
        chosen = np.concatenate([chosen, more])
    return np.sort(chosen)


def convolve_attention(shop: Shop, model: nn.Module, calibration: np.ndarray, multiple: int) -> Cutting:
    """SPViT: nested gates search on a copy, the original weights are cut and convolved by them. Leaves search.json."""
    import copy

    from lotus.pruning import convolve
    from lotus.sparsity.nested import NestedGates
    from lotus.training.regularize import Gating
    from lotus.vit.convolution import macs as conv_macs
    from lotus.vit.cost import count, outline
    from selection.subset import Subset

    run, config, wants = shop.run, shop.config, shop.config.prune
    asks, keep = wants.convolve, wants.keep.macs
    assert asks is not None
    assert keep is not None
    ticket = Subset.load(run.ticket)
    whole, shape = count(model), outline(model)
    searched = copy.deepcopy(model)
    gates = NestedGates(
        searched, keep=keep, lr=asks.gate_lr, strength=asks.strength, seed=config.seed, device=shop.world.device
    )
    train = {name: getattr(config.train, name) for name in Recipe.model_fields}
    changed = {
        "epochs": asks.epochs, "lr": asks.lr, "min_lr": min(config.train.min_lr, asks.lr), "warmup_epochs": 0.0,
        "patches": None, "compile": False, "ema": 0.0, "zero": min(1, config.train.zero), "evaluate_every": 0,
    }  # fmt: skip
    fitted, _ = yield from fit(
        shop, "prune", Recipe(**{**train, **changed}), searched, Images(ticket.rows, ticket.spread()), [Gating(gates)],
        place="train",
    )  # fmt: skip
    chances, mixes, reached = gates.by_block(), gates.mixes(), gates.open_macs()
    gates.remove()
    patches = shape.tokens - shape.prefix
    both = sum(conv_macs(patches, shape.width, one.v_dim, kernel) for one in shape.dims for kernel in (1, 3))
    choices = convolve.project(shape, chances, keep, round=multiple)
    small = convolve.convert(model, choices, mixes)
    with shop.images(run.train_beton, calibration, config.train, small) as loader:
        images = convolve.calibrate(small, loader.epoch(0))
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


def _list(values: torch.Tensor) -> list[float]:
    """Numbers for JSON, as short as float32 needs them."""
    return [round(float(value), 6) for value in values]
