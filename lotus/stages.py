"""The one place where everything meets: what each stage does with the run's folder.

A stage is a generator: it yields what happens and returns what it cost. Heavy packages are imported inside the stages,
so that a run whose stages are all done answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lotus import doctor
from lotus.config import Config, Recipe
from lotus.events import Began, Ended, Evaluated, Event, Pruned, Said, Skipped, Step, Wrote, watched
from lotus.run import BY_NAME, STAGES, Run, digest, lies, write_json, write_text
from selection import lottery, methods, npz, redraw
from selection.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lotus.config import Patches, Prune
    from lotus.data.beton import Manifest
    from lotus.data.tickets import Tickets
    from lotus.training.distributed import World
    from lotus.training.joint import Joint
    from lotus.training.loop import Fitted
    from lotus.training.soup import Cooked
    from lotus.vit.tokens import Tokens
    from selection.signals import Signals


T = TypeVar("T")

TRAIN_FORWARDS = 3
"""Training an image costs a forward pass and a backward of twice its size (measured: 2.99 forwards)."""

CALIBRATION = 7
"""Stream of chance for the choice of calibration images: no other draw shares it."""

PARTS = 8
"""Likewise for the parts of the images that ``score.subsets`` trains on."""

HELD_OUT = 11
"""Stream of chance for the images that a search is judged by."""

EVERY_RANK = ("score", "baseline", "train", "finetune")
"""Stages in which every rank works; the others are done by rank 0 while the rest wait."""


@dataclass(frozen=True)
class Outcome:
    """What a stage cost and measured."""

    image_forwards: float = 0.0
    macs: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    """Of training before it was last taken up again."""


@dataclass
class Shop:
    """What every stage has at hand."""

    run: Run
    world: World
    shelves: Sequence[ModuleType]
    anew: bool = False
    """The data too is to be written again, whatever stands."""

    @property
    def config(self) -> Config:
        return self.run.config

    def alone(self) -> Shop:
        """For a stage that one rank does while the others wait."""
        return dataclasses.replace(self, world=dataclasses.replace(self.world, rank=0, size=1))

    def manifest(self) -> Manifest:
        from lotus.data.beton import Manifest

        return Manifest.load(self.run.train_beton)


Making = Generator[Event, None, Outcome]


@dataclass(frozen=True)
class Price:
    """What a training spends beside images: how much an image costs, and what was asked before it."""

    macs: float
    """Of an image's forward pass; the mean over all of them where patches were left out on the way."""
    patches: Mapping[str, Any] = field(default_factory=dict)
    """What is told of the patches; empty where all were seen."""
    asked: int = 0
    """Images that another model was shown for its opinion of their patches."""
    asked_macs: float = 0.0


def plan(config: Config, until: str = "report") -> list[str]:
    """The stages that lead to ``until``, in order. The dense baseline is there for the report alone, unless it is asked."""
    names = [stage.name for stage in STAGES]
    names = names[: names.index(until) + 1]
    if not Run(config).asks_baseline and (not config.baseline or until != "report"):
        names.remove("baseline") if "baseline" in names else None
    if until != "score" and not Run(config).probed:
        names.remove("score") if "score" in names else None
    return names


def go(
    config: Config,
    *,
    until: str = "report",
    first: str | None = None,
    again: bool = False,
    shelves: Sequence[ModuleType] = (),
) -> Iterator[Event]:
    """Run every stage up to ``until`` that is not done, in order.

    Args:
        first: run again from this stage on.
        again: run every stage again.

    Raises:
        Refused: what the user can mend: the machine, the data, a setting, a budget.
        KeyboardInterrupt: stopped on request; what was trained so far is saved.
    """
    check(config, shelves)
    run, names = Run(config, _own(shelves)), plan(config, until)
    if first is not None and first not in names:
        raise Refused(f"--from {first}: this run has no such stage. It has: {', '.join(names)}.")
    asked = names if again else names[names.index(first) :] if first else []
    # Several ranks must take the same decisions, so they are joined before the first; one alone answers at once.
    shop = Shop(run, _world(config), shelves) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    lead = shop is None or shop.world.rank == 0
    with run.held() if lead else contextlib.nullcontext():
        if asked or any(run.why(name) for name in names):
            _look_ahead(config)
        _wait(shop)  # nobody changes what stands before everybody has looked
        if lead:
            run.settle()
            run.forget(asked)
        for name in names:
            _wait(shop)
            why = run.why(name)
            _wait(shop)  # nobody starts, and changes what stands, before everybody has looked
            if why is None:
                yield _logged(run, Skipped(name), lead)
                continue
            if shop is None:
                shop = Shop(run, _world(config), shelves)
            shop.anew = "prepare" in asked
            if lead:
                run.forget([name])
            yield _logged(run, Began(name, why), lead)
            began = time.perf_counter()
            if name in EVERY_RANK:
                outcome = yield from _make(name, shop, lead)
            elif lead:
                outcome = yield from _make(name, shop.alone(), lead)
            if lead:
                seconds = time.perf_counter() - began + outcome.earlier_seconds
                run.finish(
                    name,
                    seconds=seconds,
                    image_forwards=outcome.image_forwards,
                    macs=outcome.macs,
                    values=outcome.values,
                )
                shutil.rmtree(run.work(name), ignore_errors=True)
                yield _logged(run, Ended(name, seconds, _numbers(outcome.values)), lead)


def _make(name: str, shop: Shop, lead: bool) -> Making:
    """Carry out a stage, writing down what happens."""
    making = MAKERS[name](shop)
    while True:
        try:
            yield _logged(shop.run, next(making), lead)
        except StopIteration as stop:
            return stop.value


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


# ------------------------------------------------------------------------------------------------------------ stages


def prepare(shop: Shop) -> Making:
    from lotus.data import beton
    from lotus.data.source import open_data

    run, data = shop.run, shop.config.data
    here = lies(data.path)
    train, val = open_data(data, shop.shelves)
    for source, file in ((train, run.train_beton), (val, run.val_beton)):
        yield from beton.prepare(source, file, data, anew=shop.anew)
    manifest = shop.manifest()
    told = {"images": manifest.n, "classes": len(manifest.classes), "skipped": len(manifest.skipped)}
    made = digest([manifest.fingerprint, beton.Manifest.load(run.val_beton).fingerprint])
    return Outcome(values={**told, "fingerprint": made, "lies": here or lies(data.path)})


def score(shop: Shop) -> Making:
    """Probes, several seeds, each watched while it trains; and those on parts of the images."""
    from lotus.data import beton
    from selection.parts import random_parts
    from selection.signals import Signals

    run, config = shop.run, shop.config
    manifest, labels = shop.manifest(), beton.labels(run.train_beton)
    known: dict[str, np.ndarray] = {"labels": labels}
    if run.probed:  # refuse now what would be refused after the probe
        lottery.affordable(labels, config.select.keep, config.select.balance)
    if (wants := config.score.subsets) is not None:
        rng = np.random.default_rng([config.seed, PARTS])
        known["run_in"] = random_parts(manifest.n, wants.runs, wants.part, rng)
    making = _linear if config.score.probe == "linear" else _trained
    found, spent = yield from making(shop, labels, known.get("run_in"))
    if shop.world.rank == 0:
        Signals(known | found, classes=manifest.classes, fingerprint=manifest.fingerprint).save(run.signals)
        yield Wrote("score", str(run.signals))
    values = {"probe": config.score.probe, "epochs": config.score.epochs}
    values["seeds"] = config.score.heads if making is _linear else config.score.seeds
    return Outcome(spent.forwards, spent.macs, values, spent.earlier)


def select(shop: Shop) -> Making:
    from selection.lottery import select as draw
    from selection.subset import Subset

    run, wants, manifest = shop.run, shop.config.select, shop.manifest()
    if wants.ticket:
        subset = Subset.load(wants.ticket)
        subset.check(fingerprint=manifest.fingerprint, total=manifest.n, place=wants.ticket)
    else:
        drawn = draw(
            _signals(shop),
            score=wants.score,
            pick=wants.pick,
            keep=wants.keep,
            balance=wants.balance,
            seed=shop.config.seed,
            start=Subset.load(wants.start) if wants.start else None,
            max_memory=wants.max_memory,
            shelves=shop.shelves,
        )
        for warning in drawn.warnings:
            yield Said("select", warning, level="warning")
        subset = drawn.subset
    subset.save(run.ticket)
    yield Wrote("select", str(run.ticket))
    return Outcome(values={"kept": len(subset.rows), "of": subset.total})


def baseline(shop: Shop) -> Making:
    """The dense model on all images, by the same recipe: what everything is compared with."""
    run, config = shop.run, shop.config
    model = _new_model(shop, config.seed)
    fitted, price = yield from _fit(shop, "baseline", config.train, model, rows=np.arange(shop.manifest().n))
    yield from _keep(shop, "baseline", model, run.baseline)
    return _spent(fitted, price, model)


def train(shop: Shop) -> Making:
    """The lottery's training: on the ticket, or each epoch on what is drawn out of it, under sparsity."""
    from lotus.data import beton
    from lotus.sparsity.attention import AttentionPenalty
    from lotus.sparsity.gates import Gates
    from lotus.training.redraw import Redrawing
    from selection.subset import Subset

    run, config = shop.run, shop.config
    ticket = Subset.load(run.ticket)
    ticket.check(fingerprint=shop.manifest().fingerprint, total=shop.manifest().n)
    model = _new_model(shop, config.seed)
    gates = penalty = None
    if config.train.sparsity.gates:
        keep = config.prune.keep
        gates = Gates(model, config.train.sparsity, target=keep.macs, of_gates=keep.gates, device=shop.world.device)
    if config.train.sparsity.attention is not None:
        penalty = AttentionPenalty(model, config.train.sparsity.attention)
    weights = np.zeros(ticket.total, np.float32)
    weights[ticket.rows] = ticket.weights
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
    fitted, price = yield from _fit(
        shop, "train", config.train, model,
        rows=ticket.rows, weights=weights, gates=gates, penalty=penalty, redrawing=redrawing,
    )  # fmt: skip
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
            _save_gates(run.gates, gates.values)
    yield from _keep(shop, "train", model, run.trained)
    return _spent(fitted, price, model, more)


def prune(shop: Shop) -> Making:
    from safetensors.torch import load_file

    import lotus.pruning
    from lotus.pruning import latency
    from lotus.training import loop
    from selection.subset import Subset

    run, config, wants = shop.run, shop.config, shop.config.prune
    if wants.method != "structured":
        return (yield from _thin(shop))
    model = lotus.pruning.load(run.trained).to(shop.world.device)
    gates = load_file(run.gates) if config.train.sparsity.gates else None
    rows = Subset.load(run.ticket).rows
    rng = np.random.default_rng([config.seed, CALIBRATION])
    calibration = np.sort(rng.choice(rows, size=min(wants.calibration, len(rows)), replace=False))
    table, multiple = None, wants.round
    if multiple == "auto":
        multiple = latency.fast_multiple(model, wants.latency_batch)
        yield Said("prune", f"Widths stay multiples of {multiple}: measured at batch {wants.latency_batch}.")
    if wants.keep.latency is not None:
        table = yield from watched(
            "prune",
            latency.timings(model),
            lambda progress: latency.measure(model, wants.latency_batch, progress=progress),
            unit="timings",
        )
        write_text(run.folder / "latency.json", table.to_json())
    if wants.search is not None:
        cut, more = yield from _searched(shop, model, gates, calibration, multiple)
    elif wants.convolve is not None:
        cut, more = yield from _convolved(shop, model, calibration, multiple)
    elif wants.sizes:
        cut, more = yield from _sizes(shop, model, gates, calibration, multiple)
    else:
        cut, more = yield from _drawn(shop, model, gates, calibration, multiple, table)
    for note in cut.notes:
        yield Said("prune", note)
    yield Pruned("prune", {**cut.before}, {**cut.after})
    with (
        _images(shop, run.val_beton, None, config.train, cut.model) as loader,
        _as_evaluated(cut.model, config.train.patches, shop.shelves) as tokens,
    ):
        measured = loop.evaluate(cut.model, loader, shop.world)
        patches = {} if tokens is None else {"patches": _told(config.train.patches, tokens)}
    yield Evaluated("prune", 0, measured)
    lotus.pruning.save(cut.model, run.pruned)
    yield Wrote("prune", str(run.pruned))
    spent = cut.forwards * cut.before["macs"]
    told = {"top1": measured["top1"], "loss": measured["loss"], **cut.after, **patches, **more}
    return Outcome(cut.forwards, spent, told)


def _passes(wants: Prune) -> int:
    """How often the calibration images are gone through."""
    from lotus.pruning import narrow

    tried = narrow.check_width(wants.width)
    return len(tried) * (1 + wants.rotate) + any(part < 1 for part in tried)


@dataclass(frozen=True)
class _Cut:
    """What the prune stage goes on with, however it came about."""

    model: nn.Module
    before: Mapping[str, int]
    after: Mapping[str, int]
    forwards: float
    """In units of the dense model's forward pass of an image, whatever was spent."""
    notes: Sequence[str]


Cutting = Generator[Event, None, tuple[_Cut, dict[str, Any]]]


def _drawn(shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, multiple: int, table: Any) -> Cutting:
    """By scores, to one budget."""
    import lotus.pruning

    config, wants = shop.config, shop.config.prune
    with _images(shop, shop.run.train_beton, calibration, config.train, model) as loader:
        drawn = yield from watched(
            "prune",
            len(calibration) * _passes(wants),
            lambda progress: lotus.pruning.lottery(
                model,
                lambda: loader.epoch(0),
                wants.keep.model_dump(exclude_none=True),
                criterion=wants.criterion.name,
                criterion_options=wants.criterion.options,
                shelves=shop.shelves,
                rank=wants.rank,
                round=multiple,
                rotate=wants.rotate,
                split=wants.split,
                compensate=wants.compensate,
                inputs=wants.inputs,
                branches=wants.branches,
                width=wants.width,
                gates=gates,
                seed=config.seed,
                table=table,
                progress=progress,
            ),
        )
    return _Cut(drawn.model, drawn.before, drawn.after, drawn.forwards, drawn.notes), {}


def _sizes(shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, multiple: int) -> Cutting:
    """By scores: measured once, cut to the budget and to all further sizes."""
    import lotus.pruning
    from lotus.training import loop

    run, wants = shop.run, shop.config.prune
    keep = wants.keep.model_dump(exclude_none=True)
    whole = all(part == 1 for part in (*keep.values(), *wants.sizes))  # then nothing is to be turned or folded
    studied = yield from _studied(shop, model, gates, calibration, whole=whole)
    shared: dict[str, Any] = {"round": multiple, "split": wants.split, "branches": wants.branches}
    drawn = studied.draw(keep, **shared)
    told: dict[str, Any] = {}
    budgets = sorted(wants.sizes, reverse=True)
    for part, small in zip(budgets, studied.nested([{"macs": part} for part in budgets], **shared), strict=True):
        with _images(shop, run.val_beton, None, shop.config.train, small.model) as loader:
            measured = loop.evaluate(small.model, loader, shop.world)
        folder = run.folder / f"pruned-{part:g}"
        lotus.pruning.save(small.model, folder)
        yield Wrote("prune", str(folder))
        yield Said("prune", f"{part:g} of the MACs: top-1 {measured['top1']:.2f} % right after the cut")
        told[f"{part:g}"] = {"keep": part, "top1": measured["top1"], "loss": measured["loss"], **small.after}
    return _Cut(drawn.model, drawn.before, drawn.after, drawn.forwards, drawn.notes), {"sizes": told}


def _studied(
    shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, *, whole: bool = False
) -> Generator[Event, None, Any]:
    """The model rotated, measured and scored; with ``whole`` nothing is to go, so nothing is turned or folded."""
    import lotus.pruning

    wants = shop.config.prune
    rotate = wants.rotate and not whole
    with _images(shop, shop.run.train_beton, calibration, shop.config.train, model) as loader:
        return (
            yield from watched(
                "prune",
                len(calibration) * (2 if rotate else 1),
                lambda progress: lotus.pruning.study(
                    model,
                    lambda: loader.epoch(0),
                    criterion=wants.criterion.name,
                    criterion_options=wants.criterion.options,
                    shelves=shop.shelves,
                    rotate=rotate,
                    compensate="none" if whole else wants.compensate,
                    inputs=wants.inputs,
                    gates=gates,
                    seed=shop.config.seed,
                    progress=progress,
                ),
            )
        )


def _searched(shop: Shop, model: nn.Module, gates: Any, calibration: np.ndarray, multiple: int) -> Cutting:
    """By trying: rounds of study, search and, between two, a little training. Leaves search.json and pareto.json."""
    import copy

    from lotus.pruning import cp_vit, search
    from lotus.training.distill import make_distiller
    from lotus.vit.cost import count
    from selection.subset import Subset

    run, config, wants = shop.run, shop.config, shop.config.prune
    asks = wants.search
    assert asks is not None
    ticket = Subset.load(run.ticket)
    rng = np.random.default_rng([config.seed, HELD_OUT])
    rows = _held_out(ticket.rows, ticket.total, calibration, asks.images, rng)
    if len(rows) and np.isin(rows, ticket.rows).any():
        text = (
            "the held-out images were trained on, since the ticket leaves too few out: select.keep below 1 gives some"
        )
        yield Said("prune", text, level="warning")
    dense, whole = model, count(model)
    depth = len(whole.blocks)
    budget = wants.keep.model_dump(exclude_none=True)
    forwards = float(0)
    with _images(shop, run.train_beton, rows, config.train, model) as held:
        judge = search.Judge(dense, lambda: held.epoch(0), asks.metric)
        forwards += judge.forwards
        log: list[dict[str, Any]] = []
        front: list[tuple[int, search.Tried]] = []
        for number in range(asks.rounds):
            studied = yield from _studied(shop, model, gates if number == 0 else None, calibration)
            now, part = count(model), (number + 1) / asks.rounds
            # MACs fall by the same factor a round; what is allowed rises by the same step.
            keep = {
                what: min(1.0, share**part * getattr(whole, what) / getattr(now, what))
                for what, share in budget.items()
            }
            shared: dict[str, Any] = {
                "keep": keep if asks.drop is None else None,
                "drop": None if asks.drop is None else asks.drop * part,
                "round": multiple,
                "split": wants.split,
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
            front += [(number, one) for one in found.tried]
            model = found.drawn.model
            chosen = found.chosen
            yield Said(
                "prune",
                f"round {number + 1} of {asks.rounds}: {len(found.tried)} tried; of attention {chosen.attention:.2f} and of the "
                f"MLPs {chosen.mlp:.2f} of the MACs stay; {asks.metric} {chosen.worse:.4f}, held-out top-1 {chosen.top1:.2f} %",
            )
            if asks.recovery and number + 1 < asks.rounds:
                recipe = config.finetune.model_copy(
                    update={"epochs": 1, "warmup_epochs": 0.0, "patches": None, "compile": False, "ema": 0.0}
                )
                some = np.sort(
                    np.random.default_rng([config.seed, HELD_OUT, number]).choice(
                        ticket.rows, size=min(len(ticket.rows), asks.recovery * recipe.batch_size), replace=False
                    )
                )
                twin = copy.deepcopy(model)
                distiller = make_distiller(copy.deepcopy(dense), recipe, shop.world.device)
                fitted, _ = yield from _fit(
                    shop,
                    "prune",
                    recipe,
                    model,
                    rows=some,
                    distiller=distiller,
                    seed=config.seed + 1 + number,
                    evaluate=False,
                )
                model = fitted.load_into(twin).to(shop.world.device).eval()
                seen = fitted.images_seen
                forwards += seen * (TRAIN_FORWARDS * chosen.macs / whole.macs + (distiller is not None))
        small, after = model, count(model)
        theirs: list[dict[str, float]] = []
        if asks.compare:
            theirs = cp_vit.sweep(dense, lambda: held.epoch(0), judge, sorted(asks.compare, reverse=True))
            forwards += judge.images * sum(1 + row["macs"] / whole.macs for row in theirs)
        last = judge(small)
    best = search.pareto(one for _, one in front)
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
    brief = {name: written[name] for name in ("chosen", "equal") if name in written}
    before = {"params": whole.params, "macs": whole.macs}
    cut = _Cut(small, before, {"params": after.params, "macs": after.macs}, forwards, found.drawn.notes)
    return cut, {
        "search": {**brief, "kind": asks.kind, "metric": asks.metric, "tried": len(log), "images": judge.images}
    }


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


def _convolved(shop: Shop, model: nn.Module, calibration: np.ndarray, multiple: int) -> Cutting:
    """SPViT: nested gates search on a copy, the original weights are cut and convolved by them. Leaves search.json."""
    import copy

    from lotus.pruning import convolve
    from lotus.sparsity.nested import NestedGates
    from lotus.vit.convolution import macs as conv_macs
    from lotus.vit.cost import count, outline
    from selection.subset import Subset

    run, config, wants = shop.run, shop.config, shop.config.prune
    asks, keep = wants.convolve, wants.keep.macs
    assert asks is not None
    assert keep is not None
    ticket = Subset.load(run.ticket)
    weights = np.zeros(ticket.total, np.float32)
    weights[ticket.rows] = ticket.weights
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
    fitted, _ = yield from _fit(
        shop, "prune", Recipe(**{**train, **changed}), searched, rows=ticket.rows, weights=weights, gates=gates
    )
    chances, mixes, reached = gates.by_block(), gates.mixes(), gates.open_macs()
    gates.remove()
    patches = shape.tokens - shape.prefix
    both = sum(conv_macs(patches, shape.width, one.v_dim, kernel) for one in shape.dims for kernel in (1, 3))
    choices = convolve.project(shape, chances, keep, round=multiple)
    small = convolve.convert(model, choices, mixes)
    with _images(shop, run.train_beton, calibration, config.train, small) as loader:
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
    return _Cut(small, before, {"params": after.params, "macs": after.macs}, forwards, notes), told


def _list(values: torch.Tensor) -> list[float]:
    """Numbers for JSON, as short as float32 needs them."""
    return [round(float(value), 6) for value in values]


def _thin(shop: Shop) -> Making:
    """Unstructured pruning: weights become zeros."""
    import lotus.pruning
    from lotus.pruning import unstructured
    from lotus.training import loop
    from lotus.vit.cost import count
    from selection.subset import Subset

    run, config, wants = shop.run, shop.config, shop.config.prune
    keep = wants.keep.weights
    assert keep is not None  # the config's own check
    model = lotus.pruning.load(run.trained).to(shop.world.device)
    cost, listed = count(model), unstructured.listed(model, wants.weights)
    told: dict[str, Any] = {}
    forwards = 0.0
    with (
        _images(shop, run.val_beton, None, config.train, model) as loader,
        _as_evaluated(model, config.train.patches, shop.shelves) as tokens,
    ):
        whole = {name: weight.detach().clone() for name, weight in listed.items()}

        def measured(masks: Mapping[str, torch.Tensor]) -> dict[str, float]:
            nonlocal forwards
            unstructured.put(model, masks)
            found = loop.evaluate(model, loader, shop.world)
            for name, weight in whole.items():
                listed[name].data.copy_(weight)
            forwards += found["images"]
            return found

        if wants.sweep:
            found = []
            for number, sparsity in enumerate(unstructured.SWEEP):
                found.append(measured(unstructured.magnitude(whole, 1 - sparsity))["top1"])
                yield Step("prune", number + 1, len(unstructured.SWEEP), unit="sparsities measured")
            knee = unstructured.knee(unstructured.SWEEP, found)
            told["sweep"] = {"sparsity": list(unstructured.SWEEP), "top1": found, "knee": knee}
            yield Said("prune", _essential(knee))
        masks = (
            unstructured.n_of_m(whole, *unstructured.pattern(wants.pattern))
            if wants.pattern
            else unstructured.magnitude(whole, keep)
        )
        one_shot = measured(masks)
        patches = {} if tokens is None else {"patches": _told(config.train.patches, tokens)}
    spent, values = forwards * cost.macs, one_shot
    if wants.method == "soup":
        told["one_shot_top1"] = one_shot["top1"]
        cooked = yield from _soup(shop, model, Subset.load(run.ticket).rows)
        masks = cooked.masks
        told["left"] = list(cooked.left)
        forwards += TRAIN_FORWARDS * cooked.images
        spent += TRAIN_FORWARDS * cooked.images * cost.macs
        with (
            _images(shop, run.val_beton, None, config.train, model) as loader,
            _as_evaluated(model, config.train.patches, shop.shelves),
        ):
            values = loop.evaluate(model, loader, shop.world)
    unstructured.put(model, masks)
    stays, of = unstructured.counted(masks)
    yield Said("prune", f"{of - stays:,} of {of:,} weights are zeros now. The model computes as many MACs as before.")
    yield Evaluated("prune", 0, values)
    lotus.pruning.save(model, run.pruned, about={"zeros": {"list": wants.weights, "kept": stays, "of": of}})
    yield Wrote("prune", str(run.pruned))
    told |= {"top1": values["top1"], "loss": values["loss"], "params": cost.params, "macs": cost.macs}
    return Outcome(forwards, spent, {**told, "weights": {"kept": stays, "of": of}, **patches})


def _essential(knee: float | None) -> str:
    if knee is None:
        return "essential sparsity: no knee was seen up to 90 %; one-shot magnitude never lost more than 1 point."
    return f"essential sparsity {100 * knee:.0f} %: the last before one-shot magnitude loses more than 1 point."


def _soup(shop: Shop, model: nn.Module, rows: np.ndarray) -> Generator[Event, None, Cooked]:
    """Cook, by the fine-tune's recipe, on parts of the ticket; on all patches of an image."""
    from lotus.data.loader import open_loader
    from lotus.data.plan import SamplePlan
    from lotus.training.objective import Objective
    from lotus.training.soup import cook
    from lotus.vit.model import image_size

    run, config, recipe, manifest = shop.run, shop.config, shop.config.finetune, shop.manifest()
    keep = config.prune.keep.weights
    assert keep is not None

    @contextlib.contextmanager
    def batches(span: int, part: float, steps: int) -> Iterator[Iterator[Any]]:
        seed = config.seed + 5000 + span
        rng = np.random.default_rng([seed, CALIBRATION])
        some = np.sort(rng.choice(rows, size=max(1, round(part * len(rows))), replace=False))
        order = SamplePlan(some, seed=seed, batch_size=min(recipe.batch_size, len(some)), world=1, rank=0)
        with open_loader(
            run.train_beton, order, size=image_size(model), augment=recipe.augment, mean=manifest.mean, std=manifest.std,
            seed=seed, device=shop.world.device, kind=shop.config.data.loader, workers=shop.config.data.workers,
        ) as loader:  # fmt: skip
            endless = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
            yield itertools.islice(endless, steps)
            endless.close()

    return (
        yield from cook(
            model, keep, batches, stage="prune", recipe=recipe, settings=config.prune.soup, weights=config.prune.weights,
            objective=Objective(recipe, len(manifest.classes), config.seed), images=len(rows), seed=config.seed,
        )
    )  # fmt: skip


def finetune(shop: Shop) -> Making:
    import lotus.pruning
    from lotus.pruning import unstructured
    from lotus.training.distill import make_distiller
    from lotus.vit.cost import count
    from selection.subset import Subset

    run, recipe = shop.run, shop.config.finetune
    model = lotus.pruning.load(run.pruned)
    if recipe.epochs == 0:
        if shop.world.rank == 0:
            lotus.pruning.save(model, run.final)
        return Outcome(values={**(run.record("prune").values), "images_seen": 0, "train_seconds": 0.0})  # type: ignore[union-attr]
    ticket = Subset.load(run.ticket)
    weights = np.zeros(ticket.total, np.float32)
    weights[ticket.rows] = ticket.weights
    teacher = lotus.pruning.load(run.trained)
    distiller = make_distiller(teacher, recipe, shop.world.device)
    teacher_macs = count(teacher).macs if distiller is not None else 0
    wants = shop.config.prune
    masks = {} if wants.method == "structured" else unstructured.zeros(model, wants.weights)
    with unstructured.held(model, masks):
        fitted, price = yield from _fit(
            shop, "finetune", recipe, model, rows=ticket.rows, weights=weights, distiller=distiller
        )
    more: dict[str, Any] = {}
    if masks:
        unstructured.check(model, masks)
        more["weights"] = dict(zip(("kept", "of"), unstructured.counted(masks), strict=True))
    yield from _keep(
        shop, "finetune", model, run.final, {"zeros": {"list": wants.weights, **more["weights"]}} if masks else {}
    )
    return _spent(fitted, price, model, more, teacher_macs=teacher_macs)


def export(shop: Shop) -> Making:
    import lotus.pruning
    from lotus.export import export as send
    from lotus.export import lines
    from lotus.vit import cost

    run, wants, device = shop.run, shop.config.export, shop.world.device
    model = lotus.pruning.load(run.final)
    sent = send(model, run.export, onnx=wants.onnx)
    for note in sent["notes"]:
        yield Said("export", note)
    for line in lines(sent["timm"], run.export):
        yield Said("export", line)
    latency = {}
    for number, (name, folder) in enumerate((("dense", run.trained), ("final", run.final))):
        timed = lotus.pruning.load(folder).to(device)
        latency[name] = {
            "batch_1": cost.latency(timed, 1, device=device),
            "batch_N": cost.latency(timed, wants.latency_batch, device=device),
            "batch": wants.latency_batch,
            "device": str(device),
            "dtype": "fp32",
        }
        yield Step("export", number + 1, 2, unit="models timed")
    tokens = cost.outline(model).tokens
    write_json(run.export / "export.json", {**sent, "latency_ms": latency})
    yield Wrote("export", str(run.export))
    return Outcome(values={"latency_ms": latency, "tokens": tokens})


def report(shop: Shop) -> Making:
    from lotus.report import html

    found = results(shop.run)
    if "weights" in found["kept"]:
        from lotus.pruning.unstructured import compressed

        sizes = [compressed(folder / "model.safetensors") for folder in (shop.run.trained, shop.run.final)]
        found["kept"]["weights"] |= {"bytes": sizes[1], "of_bytes": sizes[0]}
    if shop.config.train.sparsity.attention is not None:
        found["attention"] = _focused(shop)
    write_json(shop.run.results, found)
    yield Wrote("report", str(shop.run.results))
    html.write(shop.run.folder)
    yield Wrote("report", str(shop.run.report))
    return Outcome()


LOOKED_AT = 512
"""Validation images on which attention is measured."""


def _focused(shop: Shop) -> dict[str, Any]:
    """How peaked attention was before training, is after it, and is in the dense baseline, which saw no penalty."""
    import lotus.pruning
    from lotus.data import beton
    from lotus.sparsity.focus import focus

    run, config = shop.run, shop.config
    models = {"start": _new_model(shop, config.seed), "trained": lotus.pruning.load(run.trained)}
    if "baseline" in plan(config):
        models["baseline"] = lotus.pruning.load(run.baseline)
    rows = np.arange(min(LOOKED_AT, beton.Manifest.load(run.val_beton).n))
    found: dict[str, Any] = {}
    for name, model in models.items():
        with _images(shop, run.val_beton, rows, config.train, model) as loader:
            found[name] = focus(model, loader.epoch(0), shop.world.device)
    settings = config.train.sparsity.attention
    return {"kind": settings.kind, "layers": settings.layers, "models": found} if settings else {}


MAKERS: dict[str, Callable[[Shop], Making]] = {
    "prepare": prepare,
    "score": score,
    "select": select,
    "baseline": baseline,
    "train": train,
    "prune": prune,
    "finetune": finetune,
    "export": export,
    "report": report,
}
assert list(MAKERS) == list(BY_NAME)


# ------------------------------------------------------------------------------------------------ what stages share


@dataclass(frozen=True)
class Spent:
    """What a part of the scoring cost, in this sitting or an earlier one."""

    forwards: float = 0.0
    macs: float = 0.0
    earlier: float = 0.0
    """Seconds before this sitting."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.forwards + other.forwards, self.macs + other.macs, self.earlier + other.earlier)


Probed = Generator[Event, None, tuple[dict[str, np.ndarray], Spent]]


def _trained(shop: Shop, labels: np.ndarray, run_in: np.ndarray | None) -> Probed:
    """Short trainings that are watched, and those on parts of the images."""
    config = shop.config
    told: list[dict[str, np.ndarray]] = []
    found: dict[str, np.ndarray] = {}
    total = Spent()
    for number in range(config.score.seeds):
        signals, spent = yield from _probe(shop, _probe_seed(config, number), embed=number == 0)
        found |= {name: signals.pop(name) for name in ("embeddings", "errors") if name in signals}
        told.append(signals)
        total += spent
    found |= {name: np.stack([one[name] for one in told]) for name in told[0]}
    if run_in is not None:
        said = []
        for number, inside in enumerate(run_in):
            seed = _probe_seed(config, config.score.seeds + number)
            signals, spent = yield from _probe(shop, seed, rows=np.flatnonzero(inside))
            said.append(signals["run_p_label"])
            total += spent
        found["run_p_label"] = np.stack(said)
    return found, total


def _probe_seed(config: Config, number: int) -> int:
    """No probe starts where the real training starts."""
    return config.seed + 1000 * (number + 1)


def _probe(shop: Shop, seed: int, *, rows: np.ndarray | None = None, embed: bool = False) -> Probed:
    """One short training: on all images, watched (E, N), with the last layer's (N, D), (N, C) where ``embed``; or on ``rows``,
    and what it says of every image in the end (N,). One that is done is not done again when the stage is taken up."""
    from lotus.training import probe

    run, config, manifest, world = shop.run, shop.config, shop.manifest(), shop.world
    file, key = run.work("score") / f"{seed}.npz", digest([run.settings("score"), run.made_from("score"), seed])
    known = _recalled(file, key)
    world.barrier()  # nobody writes it before everybody has looked
    if known is not None:
        return known
    began = time.perf_counter()
    model, side = _probe_model(shop, seed)
    every = np.arange(manifest.n)
    _check_batches(model, manifest.n if rows is None else len(rows), config.score, world)
    recorder = None
    if rows is None:
        recorder = probe.Recorder(manifest.n, config.score.epochs, len(manifest.classes), steps=config.score.gradients)
    fitted, price = yield from _fit(
        shop, "score", config.score, model, rows=every if rows is None else rows, recorder=recorder, seed=seed,
        evaluate=False, side=side,
    )  # fmt: skip
    for buffer in model.buffers():  # what batch norms saw, each rank of its own images
        if buffer.is_floating_point():
            world.mean_(buffer)
    found: dict[str, Any] = {} if recorder is None else recorder.signals()
    forwards = TRAIN_FORWARDS * fitted.images_seen
    macs = forwards * price.macs
    if embed or rows is not None:
        model = model.to(world.device)
        with _images(shop, run.train_beton, None, config.score, model, side=side) as loader:
            if rows is None:
                found |= probe.last_layer(model, loader, manifest.n, world, errors=config.score.gradients)
            else:
                correct = config.score.subsets is not None and config.score.subsets.record == "correct"
                found["run_p_label"] = probe.label_probability(model, loader, manifest.n, world, correct=correct)
        forwards += manifest.n
        macs += manifest.n * _macs(shop, model, side)
    spent = Spent(forwards, macs, time.perf_counter() - began + fitted.earlier_seconds)
    if world.rank == 0:
        _remember(file, key, found, spent)
        shutil.rmtree(run.work("score") / str(seed), ignore_errors=True)
    return found, dataclasses.replace(spent, earlier=fitted.earlier_seconds)


def _batch_norms(model: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _check_batches(model: nn.Module, images: int, recipe: Recipe, world: World) -> None:
    """Refuse a batch of one image where the model has batch norms, which know no variance of it."""
    if not _batch_norms(model):
        return
    parts = world.size * recipe.accumulate
    micro, tail = recipe.batch_size // parts, images % recipe.batch_size // world.size
    if 1 in (micro, tail % max(micro, 1)):
        raise Refused(
            f"score.batch_size: {recipe.batch_size} leaves a batch of one image, of which a batch norm knows no variance. "
            "Take another."
        )


def _linear(shop: Shop, labels: np.ndarray, run_in: np.ndarray | None) -> Probed:
    """Heads on frozen features, watched, and those on parts of the images. Rank 0 trains them: it takes seconds."""
    import torch

    from lotus.training import linear
    from lotus.training.distributed import StopFlag

    wants, classes, device = shop.config.score, len(shop.manifest().classes), shop.world.device
    embeddings, spent = yield from _features(shop)
    found: dict[str, Any] = {"embeddings": linear.standardised(embeddings)}
    images, width = embeddings.shape
    trained = wants.heads * images + (0 if run_in is None else int(run_in.sum()))
    spent += Spent(macs=linear.macs(trained, wants.epochs, width, classes))
    if shop.world.rank:
        return found, spent
    features, own = torch.from_numpy(found["embeddings"]).to(device), torch.from_numpy(labels).to(device)
    with StopFlag() as stop:
        seeds = [_probe_seed(shop.config, number) for number in range(wants.heads)]
        found |= yield from linear.watched(
            features, own, classes, wants, seeds=seeds, gradients=wants.gradients, stop=stop
        )
        if run_in is not None and wants.subsets is not None:
            seeds = [_probe_seed(shop.config, wants.heads + number) for number in range(len(run_in))]
            correct = wants.subsets.record == "correct"
            found["run_p_label"] = yield from linear.on_parts(
                features, own, classes, wants, run_in=run_in, seeds=seeds, correct=correct, stop=stop
            )
    return found, spent


def _features(shop: Shop) -> Generator[Event, None, tuple[np.ndarray, Spent]]:
    """What the head of the frozen model reads of every image (N, D), computed once and kept in the run's folder."""
    from lotus.training import probe
    from lotus.training.distributed import StopFlag

    run, config, manifest, world = shop.run, shop.config, shop.manifest(), shop.world
    wants = config.score.model or config.model
    key = digest([
        manifest.fingerprint, wants.model_dump(), _weights_hash(wants), config.score.side, config.model.model_dump(),
        config.score.precision, config.seed,
    ])  # fmt: skip
    known = _recalled(run.features, key)
    world.barrier()  # nobody writes it before everybody has looked
    if known is not None:
        return known[0]["embeddings"], known[1]
    began = time.perf_counter()
    model, side = _probe_model(shop, _probe_seed(config, 0))
    model = model.to(world.device)
    if world.rank == 0 and not wants.pretrained and not wants.weights:
        cure = "Give score.model.weights or score.model.pretrained for better ones, or take score.probe=train."
        yield Said("score", f"the features are of a model that has not learned anything yet. {cure}", "warning")
    with StopFlag() as stop, _images(shop, run.train_beton, None, config.score, model, side=side) as loader:
        reading = probe.features(model, loader, manifest.n, world, bf16=config.score.precision == "bf16")
        embeddings = yield from _steps(reading, -(-manifest.n // world.size), world, stop)
    spent = Spent(manifest.n, float(manifest.n) * _macs(shop, model, side), time.perf_counter() - began)
    if world.rank == 0:
        _remember(run.features, key, {"embeddings": embeddings}, spent)
        yield Wrote("score", str(run.features))
    return embeddings, dataclasses.replace(spent, earlier=0.0)


def _steps(reading: Generator[int, None, T], total: int, world: World, stop: Any) -> Generator[Event, None, T]:
    """What ``reading`` returns; on the way its progress, and a wish to stop is heard."""
    from lotus.training.loop import Stopped

    while True:
        try:
            done = next(reading)
        except StopIteration as end:
            result: T = end.value
            return result
        if stop:
            raise Stopped(
                f"score: stopped ({stop.reason}) after {done:,} images. The same command begins this pass again."
            )
        if world.rank == 0:
            yield Step("score", done, total, unit="images")


def _weights_hash(wants: Any) -> str:
    """Of the file from which a model's weights come; empty where there is none."""
    if not wants.weights:
        return ""
    path = Path(wants.weights)
    try:
        with open(path / "model.safetensors" if path.is_dir() else path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError:
        return ""  # refused with its reason where it is loaded


_KEPT = "what the score stage keeps"


def _remember(file: Path, key: str, arrays: Mapping[str, np.ndarray], spent: Spent) -> None:
    npz.write(file, arrays, {"key": key, "spent": dataclasses.asdict(spent)}, kind=_KEPT, version=1)


def _recalled(file: Path, key: str) -> tuple[dict[str, np.ndarray], Spent] | None:
    """What :func:`_remember` wrote with the same key; None where nothing, something else or half of it stands."""
    try:
        arrays, about = npz.read(file, kind=_KEPT, version=1, cure="")
        return (arrays, Spent(**about["spent"])) if about["key"] == key else None
    except (Refused, KeyError, TypeError):
        return None


def _probe_model(shop: Shop, seed: int) -> tuple[nn.Module, int]:
    """What is probed, the same start for the same seed, and the side of the images that it reads."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _proxy(shop.config, len(shop.manifest().classes))


def _proxy(config: Config, classes: int, *, loaded: bool = True) -> tuple[nn.Module, int]:
    """The model of the probe and the side of the images that it reads; without ``loaded``, only its shape is right."""
    from lotus.vit import model as door

    wants, place = (config.model, "model") if config.score.model is None else (config.score.model, "score.model")
    if not loaded:
        wants = wants.model_copy(update={"pretrained": False, "weights": ""})
    made = door.proxy(wants, classes, place=place)
    own = config.model.model_copy(update={"pretrained": False, "weights": ""})
    with door.without_memory():
        asked = config.score.side or door.side(made, 0) or door.image_size(door.create(own, classes))
    side = door.side(made, asked)
    if config.score.side and config.score.side != side:
        raise Refused(
            f"score.side: {config.score.side}, but this model reads images of {side} pixels alone. Remove it, and set "
            f"{place}.args.img_size where the model takes it."
        )
    return made, side


def _macs(shop: Shop, model: nn.Module, side: int) -> int:
    from lotus.vit.cost import macs

    return macs(model, side, place="model" if shop.config.score.model is None else "score.model")


def _fit(
    shop: Shop,
    stage: str,
    recipe: Recipe,
    model: nn.Module,
    *,
    rows: np.ndarray,
    weights: np.ndarray | None = None,
    gates: Any = None,
    penalty: Any = None,
    distiller: Any = None,
    recorder: Any = None,
    redrawing: Any = None,
    seed: int | None = None,
    evaluate: bool = True,
    side: int | None = None,
) -> Generator[Event, None, tuple[Fitted, Price]]:
    """Train ``model`` on ``rows`` by ``recipe``; returns what came out and what it cost."""
    from lotus.data.loader import open_loader
    from lotus.data.plan import SamplePlan
    from lotus.training import loop
    from lotus.training.distributed import StopFlag
    from lotus.training.objective import Objective
    from lotus.vit.cost import macs
    from lotus.vit.model import image_size, set_drop_path

    run, world = shop.run, shop.world
    manifest = shop.manifest()
    seed = shop.config.seed if seed is None else seed
    patches = None if stage == "baseline" else recipe.patches
    side = image_size(model) if side is None else side
    with contextlib.nullcontext() if recipe.drop_path else contextlib.suppress(Refused):
        set_drop_path(model, recipe.drop_path)  # a probe of another kind has none that could be turned off
    order = SamplePlan(
        rows, seed=seed, batch_size=recipe.batch_size, world=world.size, rank=world.rank, accumulate=recipe.accumulate
    )
    folder = run.work(stage) / str(seed) if stage == "score" else run.work(stage)
    key = digest([run.settings(stage), run.made_from(stage), seed])
    with contextlib.ExitStack() as open_things:
        stop = open_things.enter_context(StopFlag())
        tickets, asked, asked_macs = None, 0, 0.0
        if patches is not None and (patches.model or patches.cached):
            tickets, asked, asked_macs = yield from _tickets(shop, stage, patches, recipe, model, seed)
        joint = None
        if patches is not None and patches.joint is not None:
            joint = _joint(shop, patches, model, seed)
            if world.is_main:
                yield Said(stage, _told_of(joint, rows))
        tokens = None if patches is None else open_things.enter_context(_tokens(model, patches, shop.shelves))
        loader = open_things.enter_context(
            open_loader(
                run.train_beton,
                order,
                size=side,
                augment=recipe.augment,
                mean=manifest.mean,
                std=manifest.std,
                seed=seed,
                device=world.device,
                kind=shop.config.data.loader,
                workers=shop.config.data.workers,
            )
        )
        validation = open_things.enter_context(_images(shop, run.val_beton, None, recipe, model)) if evaluate else None
        fitted = yield from loop.fit(
            model,
            stage=stage,
            recipe=recipe,
            loader=loader,
            plan=order,
            validation=validation,
            objective=Objective(recipe, len(manifest.classes), seed),
            weights=weights,
            gates=gates,
            penalty=penalty,
            distiller=distiller,
            recorder=recorder,
            redrawing=redrawing,
            tokens=tokens,
            tickets=tickets,
            joint=joint,
            folder=folder,
            world=world,
            stop=stop,
            key=key,
        )
        told = {} if patches is None or tokens is None else _told(patches, tokens, joint, rows)
    if patches is None or tokens is None:
        return fitted, Price(macs(model, side))
    mean = fitted.macs / fitted.images_seen if fitted.images_seen else float(tokens.macs())
    return fitted, Price(mean, {**told, "train_macs": mean}, asked, asked_macs)


def _tokens(model: nn.Module, patches: Patches, shelves: Sequence[ModuleType]) -> Any:
    """Puts ``model`` on fewer tokens while it is entered."""
    from lotus.vit import saliency
    from lotus.vit.tokens import Tokens

    alone = patches.mode == "input" and not patches.model and not patches.cached
    return Tokens(model, patches, saliency.of_images(patches.score, shelves) if alone else None)


def _told(patches: Any, tokens: Tokens, joint: Joint | None = None, rows: np.ndarray | None = None) -> dict[str, Any]:
    """What is recorded of a training on fewer patches: shares are of the tokens that the average block's MLP sees."""
    found = {
        "mode": patches.mode,
        "keep": patches.keep,
        "share": tokens.share(),
        "evaluated": patches.evaluate,
        "evaluated_share": tokens.share(training=False),
        "evaluated_macs": tokens.macs(training=False),
    }
    if joint is None or rows is None:
        return found
    images = np.bincount(joint.groups(rows), minlength=len(tokens.shares)).tolist()
    seen = []
    for share in tokens.shares:
        tokens.schedule(1.0, share)
        seen.append(tokens.share())
    found["share"] = float(np.average(seen, weights=images))
    found["joint"] = [{"keep": keep, "images": count} for keep, count in zip(tokens.shares, images, strict=True)]
    return found


def _joint(shop: Shop, patches: Patches, model: nn.Module, seed: int) -> Joint:
    """Shares out the patches by what ``select.score`` says of each image."""
    from lotus.training.joint import Joint

    scores = lottery.scored(_signals(shop), score=shop.config.select.score, seed=shop.config.seed, shelves=shop.shelves)
    count: Any = model.patch_embed.num_patches  # type: ignore[union-attr]
    return Joint(scores, patches, patches=count, seed=seed)


def _told_of(joint: Joint, rows: np.ndarray) -> str:
    found = joint.allot(rows)
    parts = [f"{images:,} images on {count}" for images, count in zip(np.bincount(found.level), found.levels) if images]
    whole = len(rows) * int(found.levels[-1])
    return f"joint budget: {', '.join(parts)} of {found.levels[-1]} patches, {100 * found.total / whole:.2f} % of all"


def _signals(shop: Shop) -> Signals:
    """What the probe left; labels alone where nothing else is read."""
    from lotus.data import beton
    from selection.signals import Signals

    if shop.run.probed:
        return Signals.load(shop.run.signals, only=shop.run.reads(shop.shelves))
    manifest = shop.manifest()
    known = {"labels": beton.labels(shop.run.train_beton)}
    return Signals(known, classes=manifest.classes, fingerprint=manifest.fingerprint)


def _as_evaluated(model: nn.Module, patches: Patches | None, shelves: Sequence[ModuleType]) -> Any:
    """``model`` on as few tokens as it is measured on."""
    if patches is None or patches.evaluate == "dense":
        return contextlib.nullcontext()
    return _tokens(model, patches, shelves)


def _tickets(
    shop: Shop, stage: str, patches: Patches, recipe: Recipe, model: nn.Module, seed: int
) -> Generator[Event, None, tuple[Tickets, int, float]]:
    """The scores of the patches of all training images as ``model`` sees them; and how many images a model was shown for it
    now, at how many MACs."""
    from lotus.data import tickets
    from lotus.data.format import Beton
    from lotus.vit.cost import count
    from lotus.vit.model import image_size

    file, asked, made = yield from _patch_file(shop, stage, patches, recipe, model)
    maps, size = tickets.load(file, fingerprint=shop.manifest().fingerprint)
    stored = Beton(shop.run.train_beton)
    patch: Any = model.patch_embed.patch_size  # type: ignore[union-attr]
    found = tickets.Tickets(
        maps, stored.heights, stored.widths, asked=size, size=image_size(model), patch=tuple(patch),
        augment=recipe.augment, seed=seed,
    )  # fmt: skip
    if asked is None or not made:
        return found, 0, 0.0
    return found, len(maps), float(len(maps) * count(asked).macs)


def _patch_file(
    shop: Shop, stage: str, patches: Patches, recipe: Recipe, model: nn.Module
) -> Generator[Event, None, tuple[Path, nn.Module | None, bool]]:
    """The file of the patches' scores, made once and kept beside the .beton; the model that is asked, and whether it was now.

    Where the score reads the image alone, it is cut into patches as ``model`` cuts it.
    """
    import lotus.pruning
    from lotus.data import tickets
    from lotus.vit import saliency
    from lotus.vit.model import image_size

    run, manifest = shop.run, shop.manifest()
    folder = run.baseline if patches.model == "baseline" else Path(patches.model)
    asked = lotus.pruning.load(folder) if patches.model else None
    looks: Any = model if asked is None else asked
    if asked is not None:
        by = hashlib.blake2b((folder / "model.safetensors").read_bytes(), digest_size=12).hexdigest()
    else:
        reads = saliency.reads(patches.score, shop.shelves)
        by = digest([image_size(model), list(looks.patch_embed.patch_size), shop.config.seed if "rng" in reads else 0])
    own = [_own(shop.shelves)] if shop.shelves else []
    file = run.data / f"patches-{digest([manifest.fingerprint, patches.score.model_dump(), by, *own])}.npz"
    made = not file.exists()
    shop.world.barrier()  # nobody makes it before everybody has looked
    if shop.world.rank == 0 and made:
        side = looks.patch_embed.grid_size
        maps, mass, done = np.zeros((manifest.n, *side), np.uint8), tickets.Mass(int(np.prod(side))), 0
        with _images(shop.alone(), run.train_beton, None, recipe, looks) as loader:
            if asked is not None:
                asked = asked.to(shop.world.device)
                scored = saliency.by_model(patches.score, asked, loader.epoch(0), shop.shelves)
            else:
                patch = tuple(looks.patch_embed.patch_size)
                scored = saliency.by_images(patches.score, patch, loader.epoch(0), shop.shelves, seed=shop.config.seed)
            for rows, scores in scored:
                maps[rows.numpy()] = tickets.ranks(scores).view(-1, *side).numpy()
                mass.add(scores)
                done += len(rows)
                yield Step(stage, done, manifest.n, unit="images asked for their patches")
        tickets.save(file, maps, size=image_size(looks), fingerprint=manifest.fingerprint, mass=mass.curve())
        yield Wrote(stage, str(file))
    shop.world.barrier()
    return file, asked, made


def _images(
    shop: Shop, file: Path, rows: np.ndarray | None, recipe: Recipe, model: nn.Module, *, side: int | None = None
) -> Any:
    """A loader that goes through ``rows`` (all, for None) once, in order, without augmentation."""
    from lotus.data import beton
    from lotus.data.loader import open_loader
    from lotus.data.plan import SamplePlan
    from lotus.vit.model import image_size

    manifest, world = shop.manifest(), shop.world
    if rows is None:
        rows = np.arange(beton.Manifest.load(file).n)
    order = SamplePlan.evaluation(rows, batch_size=recipe.batch_size, world=world.size, rank=world.rank)
    return open_loader(
        file, order, size=image_size(model) if side is None else side, augment=None, mean=manifest.mean, std=manifest.std,
        seed=shop.config.seed, device=world.device, kind=shop.config.data.loader, workers=shop.config.data.workers,
    )  # fmt: skip


def _new_model(shop: Shop, seed: int) -> nn.Module:
    """The dense ViT of the config, the same start for the same seed."""
    import torch

    from lotus.vit.model import create

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create(shop.config.model, len(shop.manifest().classes))


def _keep(
    shop: Shop, stage: str, model: nn.Module, folder: Path, more: Mapping[str, Any] | None = None
) -> Iterator[Event]:
    """Write the model's folder, with what is needed to use it."""
    import lotus.pruning

    if shop.world.rank == 0:
        manifest = shop.manifest()
        about = {"classes": manifest.classes, "mean": manifest.mean, "std": manifest.std, **(more or {})}
        lotus.pruning.save(model, folder, about=about)
        yield Wrote(stage, str(folder))


def _save_gates(file: Path, gates: Mapping[str, torch.Tensor]) -> None:
    """What the gates learned, for the criterion that reads it; the model has them folded in."""
    from safetensors.torch import save_file

    beside = file.with_name(f".{file.name}.tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in gates.items()}, beside)
    os.replace(beside, file)


def _spent(
    fitted: Fitted, price: Price, model: nn.Module, more: Mapping[str, Any] | None = None, *, teacher_macs: int = 0
) -> Outcome:
    """The cost of a training, and what it reached."""
    from lotus.vit.cost import count

    cost = count(model)
    forwards = TRAIN_FORWARDS * fitted.images_seen + (fitted.images_seen if teacher_macs else 0)
    spent = fitted.images_seen * (TRAIN_FORWARDS * price.macs + teacher_macs)
    values = {
        "top1": fitted.top1, "loss": fitted.loss, "params": cost.params, "macs": cost.macs,
        "images_seen": fitted.images_seen, "train_seconds": fitted.seconds, "steps": fitted.steps, **(more or {}),
    }  # fmt: skip
    if price.patches:
        values["patches"] = dict(price.patches)
    return Outcome(forwards + price.asked, spent + price.asked_macs, values, fitted.earlier_seconds)


def _own(shelves: Sequence[ModuleType]) -> str:
    """Changes when the user's own methods do; empty without any."""
    files = [Path(str(shelf.__file__)).read_text(encoding="utf-8") for shelf in shelves if shelf.__file__]
    return digest(files) if files else ""


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


# ------------------------------------------------------------------------------------------------- ranks and machine


def _world(config: Config) -> World:
    from lotus.training.distributed import start

    return start(config.device)


def _wait(shop: Shop | None) -> None:
    if shop is not None:
        shop.world.barrier()


def _logged(run: Run, event: Event, lead: bool) -> Event:
    if lead:
        run.write_event(event)
    return event


def _look_ahead(config: Config) -> None:
    """Refuse now what would only fail after an hour: the machine, the model, the budget, the recipes."""
    import lotus.pruning
    from lotus.pruning import budget, convolve, narrow
    from lotus.training.optim import make_optimizer
    from lotus.vit import anatomy
    from lotus.vit.cost import macs, outline
    from lotus.vit.model import create
    from lotus.vit.tokens import Tokens
    from selection.subset import Subset

    refusals = doctor.refusals()
    if refusals:
        raise Refused("\n".join(refusals))
    model = create(config.model.model_copy(update={"pretrained": False, "weights": ""}), classes=10)
    proxy = model
    if config.score.model is not None or config.score.side:
        proxy, side = _proxy(config, 10, loaded=False)
        macs(proxy, side, place="score.model")
    if config.score.probe == "train" and config.score.precision == "bf16" and _batch_norms(proxy):
        raise Refused(
            "score.precision: bf16 leaves the statistics of batch norms in fp32, and torch takes no such mixture. Set "
            "score.precision=fp32, or score.probe=linear."
        )
    if config.score.drop_path or config.score.patches is not None:
        what, off = ("drop_path", "0") if config.score.drop_path else ("patches", "null")
        try:
            anatomy.supported(proxy)
        except Refused as refusal:
            raise Refused(f"score.{what}: {refusal} Set score.{what}={off}.") from None
    if config.prune.method == "structured":
        wants, whole = config.prune, outline(model)
        multiple = 8 if wants.round == "auto" else wants.round
        if wants.inputs:
            anatomy.sites(model, inputs=True)
        keep = wants.keep.model_dump(exclude_none=True)
        if wants.convolve is not None:
            convolve.refuse(model)
            convolve.check_reach(whole, wants.keep.macs or 1, round=multiple)
        elif wants.search is None:
            narrowest = min(narrow.check_width(wants.width))
            least = whole
            if narrowest < 1:
                least = outline(narrow.skeleton(model, narrow.channels(model, narrowest, multiple)))
            for budgets in (keep, *({"macs": part} for part in wants.sizes)):
                budget.check_reach(
                    least,
                    budgets,
                    round=multiple,
                    split=wants.split,
                    inputs=wants.inputs,
                    branches=wants.branches if anatomy.is_vit(model) else False,
                    whole=whole.cost(),
                )
        elif wants.search.compare:
            anatomy.plain(model, "prune.search.compare")
        if wants.search is not None and wants.search.drop is None:
            budget.check_reach(whole, keep, round=multiple, split=wants.split, branches=False)
    else:
        _check_zeros(config, model)
    for name, recipe in (("score", config.score), ("train", config.train), ("finetune", config.finetune)):
        trained = proxy if name == "score" else model
        make_optimizer(trained, recipe)
        if recipe.deepspeed and not Path(recipe.deepspeed).is_file():
            raise Refused(f"{name}.deepspeed: there is no file {recipe.deepspeed}.")
        if recipe.patches is not None:
            Tokens(trained, recipe.patches).remove()
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
        optimizer = make_optimizer(small, config.finetune.model_copy(update={"layer_decay": 1.0}))
        if not unstructured.keeps_zeros(optimizer):
            raise Refused(
                f"finetune.optimizer: {config.finetune.optimizer!r} moves weights that were pruned, since it does not work number "
                "by number. Take adamw."
            )


# ------------------------------------------------------------------------------------- what is told, before and after


def results(run: Run) -> dict[str, Any]:
    """results.json, out of the records of the stages."""
    from lotus.report import ledger

    records = {name: record for name in plan(run.config) if (record := run.record(name)) is not None}
    final, latency = records["finetune"], records["export"].values["latency_ms"]
    dense = records["train"].values
    spec = [json.loads((folder / "spec.json").read_text(encoding="utf-8")) for folder in (run.trained, run.final)]
    kernels = spec[1].get("convolutions", {})
    found: dict[str, Any] = {
        "format": 1,
        "name": run.config.name,
        "device": latency["dense"]["device"],
        "trained": {**dense, "latency_ms": latency["dense"]},
        "after_prune": records["prune"].values,
        "final": {**final.values, "latency_ms": latency["final"]},
        "kept": {
            "images": {"kept": records["select"].values["kept"], "of": records["select"].values["of"]},
            "tokens": _tokens_kept(records["export"].values["tokens"], dense.get("patches")),
            "dimensions": {
                "macs": final.values["macs"] / dense["macs"],
                "params": final.values["params"] / dense["params"],
            },
            "blocks": [
                {
                    "heads": new["heads"],
                    "of_heads": old["heads"],
                    "head_dim": new["v_dim"],
                    "of_head_dim": old["v_dim"],
                    "hidden": new["hidden"],
                    "of_hidden": old["hidden"],
                    **({"kernel": kernels[str(place)]} if str(place) in kernels else {}),
                }
                for place, (old, new) in enumerate(zip(spec[0]["blocks"], spec[1]["blocks"]))
            ],
        },
    }
    measured = final.values.get("patches") or {"evaluated": "dense"}
    found["evaluated"] = {
        "patches": measured["evaluated"],
        "share": measured.get("evaluated_share", 1.0),
        "macs": measured.get("evaluated_macs", final.values["macs"]),
    }
    if "weights" in final.values:
        found["kept"]["weights"] = {**final.values["weights"], "list": run.config.prune.weights}
        found["sweep"] = records["prune"].values.get("sweep")
    has_baseline = "baseline" in records  # the plan knows whether it takes part
    if has_baseline:
        found["baseline"] = {**records["baseline"].values, "latency_ms": latency["dense"]}
    costs = [
        {"stage": name, "seconds": record.seconds, "image_forwards": record.image_forwards, "macs": record.macs}
        for name, record in records.items()
        if name != "report" and (name != "baseline" or has_baseline)
    ]
    images = found["kept"]["images"]
    share = images["kept"] / images["of"]
    if run.config.train.redraw is not None:  # of all times that an epoch could have shown an image of the ticket
        found["kept"]["passes"] = {"kept": dense["images_seen"], "of": dense["passes_of"]}
        share *= dense["images_seen"] / dense["passes_of"]
    found["ledger"] = ledger.account(costs, kept_share=share, asks_baseline=run.asks_baseline)
    return found


def _tokens_kept(tokens: int, patches: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the report tells of the patches that the lottery's training went through."""
    if not patches:
        return {"kept": tokens, "of": tokens}
    told = {name: patches[name] for name in ("mode", "keep", "evaluated", "train_macs", "joint") if name in patches}
    return {"kept": round(patches["share"] * tokens), "of": tokens, **told}


def forecast(
    config: Config,
    *,
    until: str = "report",
    first: str | None = None,
    again: bool = False,
    shelves: Sequence[ModuleType] = (),
) -> list[dict[str, Any]]:
    """What ``--dry-run`` tells: a row a stage, with whether it would run, why, and what it would cost."""
    from lotus.data.source import open_data
    from lotus.vit.cost import count
    from lotus.vit.model import create

    check(config, shelves)
    _look_ahead(config)
    run, names = Run(config, _own(shelves)), plan(config, until)
    train_source, val_source = open_data(config.data)
    n = len(train_source.labels)
    model = create(config.model, len(train_source.classes))
    macs = count(model).macs
    asked = n * _asked_macs(config.train.patches, macs)
    kept = round(config.select.keep * n)
    on_patches = _forecast_share(model, config.train.patches, kept)
    small = macs * (config.prune.keep.macs or 1)
    wants = config.train.redraw
    drawn = redraw.rehearse(pick=wants, keep=wants.keep, epochs=config.train.epochs, shelves=shelves) if wants else 1.0
    teacher = macs if config.finetune.distill != "none" else 0
    probe = _forecast_probe(config, n, len(train_source.classes))
    calibration: float = (TRAIN_FORWARDS + config.prune.rotate) * min(config.prune.calibration, kept)
    searched, convolve = config.prune.search, config.prune.convolve
    if config.prune.method != "structured":
        calibration = _forecast_zeros(config, kept, len(val_source.labels))
    elif (
        searched is not None
    ):  # about: what is tried has half of the MACs, and how much is tried follows from what is found
        each = 8 * searched.levels * searched.rounds
        tries = searched.grid**2 + 40 * searched.rounds if searched.kind == "ratios" else each
        calibration = searched.rounds * calibration + round(searched.images * tries / 2)
    elif convolve is not None:
        calibration = 1.5 * TRAIN_FORWARDS * convolve.epochs * kept
    costs = {
        "score": probe,
        "baseline": _training(config.train.epochs * n, macs),
        "train": _and(
            _training(round(config.train.epochs * kept * drawn), macs * on_patches), (n if asked else 0, asked)
        ),
        "prune": (calibration, calibration * macs),
        "finetune": _training(
            config.finetune.epochs * kept, small * _forecast_share(model, config.finetune.patches, kept), teacher
        ),
    }
    says = {name: BY_NAME[name].says for name in names}
    if config.prune.method != "structured" and "prune" in says:
        says["prune"] = f"set weights to zero ({config.prune.method}), keep {config.prune.keep.weights:g}"
    for name, patches in (("train", config.train.patches), ("finetune", config.finetune.patches)):
        if patches is not None and name in says:
            says[name] += f", patches: {patches.mode}, keep {patches.keep:g}, evaluated {patches.evaluate}"
    rows: list[dict[str, Any]] = []
    dirty = False
    for name in names:
        told = again or (first in names and names.index(name) >= names.index(first))
        why = "asked for" if told else run.why(name)
        if why is None and dirty and any(row["why"] for row in rows if row["stage"] in run.after(name)):
            why = "what it reads is made again"
        dirty |= why is not None
        forwards, spent = costs.get(name, (0, 0))
        rows.append({"stage": name, "says": says[name], "why": why, "image_forwards": forwards, "macs": spent})
    return rows


def _forecast_probe(config: Config, n: int, classes: int) -> tuple[float, float]:
    """Image forwards and MACs of the score stage."""
    from lotus.training import linear
    from lotus.vit.cost import macs

    wants = config.score
    model, side = _proxy(config, classes, loaded=False)
    timm_model: Any = model
    price, width = macs(model, side), int(timm_model.head_hidden_size)
    on_parts = wants.subsets.part * wants.subsets.runs * n if wants.subsets else 0.0
    if wants.probe == "linear":
        return float(n), n * price + linear.macs(wants.heads * n + on_parts, wants.epochs, width, classes)
    forwards = TRAIN_FORWARDS * wants.epochs * (wants.seeds * n + on_parts) + n
    forwards += wants.subsets.runs * n if wants.subsets else 0
    return forwards, forwards * price


def _forecast_share(model: nn.Module, patches: Patches | None, images: int) -> float:
    """Part of the dense model's MACs that a training of ``images`` on ``patches`` spends, its schedule included."""
    from lotus.vit.cost import count
    from lotus.vit.tokens import Tokens
    from selection.joint import allot

    if patches is None:
        return 1.0
    spent, moments = 0.0, 200
    with Tokens(model, patches) as tokens:
        ends: list[tuple[float | None, float]] = [(None, 1.0)]
        if patches.joint is not None:  # by ranks alone: how many images a bucket has does not depend on what they score
            shared = allot(
                np.arange(images), patches=tokens.patches, keep=patches.keep, buckets=patches.joint.buckets,
                least=patches.joint.least, place="train.patches.joint",
            )  # fmt: skip
            ends = list(
                zip(tokens.shares, np.bincount(shared.level, minlength=len(tokens.shares)) / images, strict=True)
            )
        for moment in range(moments):
            for share, part in ends:
                tokens.schedule((moment + 0.5) / moments, share)
                spent += part * tokens.macs() / moments
    return spent / count(model).macs


def _asked_macs(patches: Patches | None, dense: float) -> float:
    """MACs of an image in the model that is asked about patches, ``dense`` in the run's own; 0 where there is none."""
    from lotus.pruning import spec

    if patches is not None and patches.model == "baseline":
        return dense
    return float(spec.read(patches.model)["cost"]["macs"]) if patches is not None and patches.model else 0.0


def _forecast_zeros(config: Config, kept: int, validation: int) -> float:
    """Image-forwards of unstructured pruning: what is measured, and what a soup trains."""
    from lotus.pruning.unstructured import SWEEP
    from lotus.training import soup

    wants = config.prune
    looks = (len(SWEEP) + 1 if wants.sweep else 1) * validation
    if wants.method != "soup" or wants.keep.weights is None:
        return looks
    own, each = soup.steps(wants.keep.weights, config.finetune.batch_size, wants.soup, kept)
    return looks + TRAIN_FORWARDS * config.finetune.batch_size * (own + each)


def _and(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _training(images: float, macs: float, teacher: float = 0) -> tuple[float, float]:
    return images * (TRAIN_FORWARDS + (1 if teacher else 0)), images * (TRAIN_FORWARDS * macs + teacher)


def patch_ticket(
    config: Config,
    *,
    score: str = "",
    model: str = "",
    keep: float | None = None,
    prepared: bool = False,
    picture: Path | None = None,
    shown: int = 12,
    shelves: Sequence[ModuleType] = (),
) -> Generator[Event, None, dict[str, Any]]:
    """Make the patches' scores of a run's images, or find them made, and tell what is in them.

    Args:
        score: instead of that in ``train.patches``, without options
        model: likewise, the folder of the model to ask
        keep: likewise
        prepared: the .beton in ``data.folder`` is all that there is: do not look at what it was made from
        picture: a contact sheet of ``shown`` images goes there

    Raises:
        Refused: an unknown score; a model that is missing or not asked; no images.
    """
    from lotus.config import Method, Patches
    from lotus.data import tickets
    from lotus.vit import saliency, tokens
    from lotus.vit.model import create

    own = config.train.patches
    wants = own if own is not None and own.mode == "input" else Patches(mode="input", keep=own.keep if own else 0.7)
    method = Method(name=score) if score else wants.score
    asks = saliency.reads_a_model(method, shelves, place="--score")
    ask = model or (wants.model if asks else "")
    if asks and not ask:
        raise Refused(f"--score {method.name}: it reads a model. Name one that LOTUS wrote with --model FOLDER.")
    if not asks and ask:
        raise Refused(f"--model {ask}: {method.name!r} reads the image alone and asks no model. Leave it out.")
    share = wants.keep if keep is None else keep
    if not 0 < share <= 1:
        raise Refused(f"--keep: the part that stays lies in (0, 1], not {share:g}.")
    if not prepared:
        yield from go(config, until="prepare", shelves=shelves)
    shop = Shop(Run(config), _world(config), shelves).alone()
    wants = wants.model_copy(update={"score": method, "model": ask, "cached": not asks, "keep": share})
    manifest = shop.manifest()
    plain = config.model.model_copy(update={"pretrained": False, "weights": ""})
    trained: Any = create(plain, len(manifest.classes)) if not (prepared and ask) else None
    if trained is None:  # no config says which model will train: one cut into patches like the one that is asked
        import lotus.pruning

        trained = lotus.pruning.load(ask)
    file, _, made = yield from _patch_file(shop, "patches", wants, config.train, trained)
    maps, asked = tickets.load(file, fingerprint=manifest.fingerprint)
    mass = tickets.load_mass(file)
    count = int(trained.patch_embed.num_patches)
    mean = maps.mean(0) / 255
    stays = tokens.kept(count, share)
    told = {
        "file": str(file), "made": made, "score": method.name, "model": ask, "images": len(maps), "keep": share,
        "kept": stays, "of": count, "patch": list(trained.patch_embed.patch_size), "mean_map": mean.round(4).tolist(),
        "mass": None if mass is None else float(mass[tokens.kept(len(mass), share) - 1]),
    }  # fmt: skip
    if picture is not None:
        _draw_ticket(shop, told, maps, asked, trained, picture, shown)
        yield Wrote("patches", str(picture))
        told["picture"] = str(picture)
    return told


def _draw_ticket(
    shop: Shop, told: Mapping[str, Any], maps: np.ndarray, asked: int, trained: Any, picture: Path, shown: int
) -> None:
    """The contact sheet: images of as many classes as there is room for, as the model that trains will see them unaugmented."""
    import torch

    from lotus.data import beton, tickets
    from lotus.data.format import Beton
    from lotus.report import contact
    from lotus.vit import tokens
    from lotus.vit.model import image_size

    run, manifest, size = shop.run, shop.manifest(), image_size(trained)
    labels, stored = beton.labels(run.train_beton), Beton(run.train_beton)
    rng = np.random.default_rng(shop.config.seed)
    mixed = rng.permutation(len(labels))
    turn = np.zeros(len(labels), np.int64)  # how many of its class come before an image
    for label in np.unique(labels):
        mine = mixed[labels[mixed] == label]
        turn[mine] = np.arange(len(mine))
    rows = np.sort(np.lexsort((labels, turn))[:shown])
    held = tickets.Tickets(
        maps, stored.heights, stored.widths, asked=asked, size=size, patch=tuple(told["patch"]),
        augment=None, seed=0,
    )  # fmt: skip
    scores = held.pooled(held.seen(torch.from_numpy(rows), 0))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, tokens.top(scores, told["kept"]), True)
    with _images(shop, run.train_beton, rows, shop.config.train, trained) as loader:
        shades = torch.cat([batch.images.cpu() for batch in loader.epoch(0)]).permute(0, 2, 3, 1).numpy()
    images = ((shades * manifest.std + manifest.mean) * 255).round().clip(0, 255).astype(np.uint8)
    grid = tuple(trained.patch_embed.grid_size)
    by = f"{told['score']} of {told['model']}" if told["model"] else told["score"]
    lines = [
        f"Patches by {by}",
        f"keep {told['keep']:g}: {told['kept']} of {told['of']} patches of {told['patch'][0]} x {told['patch'][1]} pixels",
        f"{told['images']:,} images; the kept part has {100 * told['mass']:.1f} % of the score" if told["mass"] else "",
        "On the left, the mean over all images: the darker, the sooner kept.",
    ]
    names = [f"{manifest.classes[labels[row]]}, row {row}" for row in rows]
    drawn = contact.sheet(
        images, kept.view(-1, *grid).numpy(), names, maps.mean(0) / 255, [line for line in lines if line]
    )
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(picture)
    except (OSError, ValueError) as error:
        raise Refused(f"{picture}: cannot be written ({error}). Give a file like patches.png.") from None


def evaluate_model(config: Config, which: str, shelves: Sequence[ModuleType] = ()) -> dict[str, float]:
    """Measure a model of the run (baseline, trained, pruned, final) or of any folder on the validation images; one of the
    run dense or sparse as its training was to be evaluated (``patches.evaluate``).

    Raises:
        Refused: no such model, or no validation images yet.
    """
    import lotus.pruning
    from lotus.training import loop
    from lotus.vit.cost import count

    run = Run(config)
    folder = {"baseline": run.baseline, "trained": run.trained, "pruned": run.pruned, "final": run.final}.get(which)
    model = lotus.pruning.load(folder or Path(which))
    shop = Shop(run, _world(config), shelves)
    classes = len(shop.manifest().classes)
    if model.num_classes != classes:
        raise Refused(f"--model {which}: it tells {model.num_classes} classes apart, and the data has {classes}.")
    patches = {
        "trained": config.train.patches,
        "pruned": config.train.patches,
        "final": config.finetune.patches if config.finetune.epochs else config.train.patches,
    }.get(which)
    model = model.to(shop.world.device)
    cost = count(model)
    with (
        _images(shop, run.val_beton, None, config.train, model) as loader,
        _as_evaluated(model, patches, shelves) as tokens,
    ):
        measured = loop.evaluate(model, loader, shop.world)
        macs = cost.macs if tokens is None else tokens.macs(training=False)
    return {**measured, "params": cost.params, "macs": macs}
