"""Prune a model that LOTUS never trained: a timm name, its weights and a folder of images are enough.

``lotus prune --model NAME --weights FILE --data FOLDER --keep macs=0.5``; in Python, :func:`lotus.prune` with batches of one's own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lotus.config import Data
from lotus.events import Began, Ended, Event, Pruned, Said, Wrote, watched
from selection.errors import Refused
from selection.methods import nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lotus.data.source import Source

MADE_BY = "lotus prune --model"
"""Stands in what this command writes, which it alone writes over."""

BUDGETS = ("macs", "params", "latency", "gates")

Batches = Callable[[], Iterator[tuple["torch.Tensor", "torch.Tensor"]]]


@dataclass(frozen=True)
class Job:
    """What is to be pruned, and how."""

    model: str
    """A timm name."""
    data: str
    """A folder of class folders (``train`` and ``val``, or one), or an .npz."""
    keep: Mapping[str, float]
    weights: str = ""
    """A .safetensors, a state dict of torch, or a folder that LOTUS wrote; empty: timm's published weights."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for timm.create_model."""
    out: str = "small"
    force: bool = False
    """Write over a model of LOTUS in ``out`` that was not made by this command."""
    criterion: str = "fisher"
    rank: Any = "pool"
    round: int | Literal["auto"] = 8
    rotate: bool = True
    split: bool = False
    compensate: Any = "affine"
    inputs: bool = False
    branches: bool | None = None
    width: Any = "auto"
    """The part of the stream's channels that stays, ``search`` or ``auto``; None: all."""
    calibration: int | None = None
    """Images that are looked at; None: 2,048, of large images 512."""
    evaluate: int = 5000
    """At most so many validation images are measured on, before and after; 0: none."""
    latency_batch: int = 64
    """Images in a forward pass that is timed, for a budget of latency."""
    seed: int = 0


def prune(job: Job) -> Iterator[Event]:
    """Load, look at the images, cut, measure, write; yields what happens. The last event holds the plan and the figures.

    Raises:
        Refused: what the user can mend: a name, weights that do not fit, images, a budget out of reach.
    """
    import torch

    import lotus.pruning
    from lotus import export
    from lotus.data.dataset import open_data
    from lotus.pruning import budget, latency, narrow, steps
    from lotus.pruning.measure import enough
    from lotus.pruning.spec import WEIGHTS
    from lotus.vit import cost
    from lotus.vit import model as door

    began = time.monotonic()
    _refuse_to_replace(Path(job.out), force=job.force)
    yield Began("prune", f"{job.model}, keep {', '.join(f'{what} {part:g}' for what, part in job.keep.items())}")
    model, about = door.adopt(job.model, job.args, job.weights)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    widths = narrow.tries(model, job.width, budget.check_keep(job.keep), plain=not (job.inputs or job.branches))
    multiple = job.round
    if multiple == "auto":
        multiple = latency.fast_multiple(model, job.latency_batch)
        yield Said("prune", f"Widths stay multiples of {multiple}: measured at batch {job.latency_batch}.")
    budget.check_round(multiple)
    if widths == (1.0,):  # before any image is read; a narrower stream may reach further
        budget.check_reach(
            cost.outline(model), job.keep, round=multiple, split=job.split, inputs=job.inputs, branches=job.branches
        )
    narrow.useful(model, widths, budget.check_keep(job.keep), multiple)
    if "latency" in job.keep and (job.rank != "pool" or job.split or job.inputs or job.branches or widths != (1.0,)):
        raise Refused("--keep latency: goes with --rank pool, and without --split, --inputs, --branches and --width.")
    if job.keep.get("gates", 1) < 1 and job.rank != "quantile":
        raise Refused(
            "--keep gates: a part of all units is what one threshold leaves. Add --rank quantile, or keep macs or params."
        )
    images = Data(name="npz" if job.data.endswith(".npz") else "imagefolder", path=job.data)
    train, val = open_data(images, learned=False)
    labelled = len(train.classes) == model.num_classes
    if not labelled:
        yield Said(
            "prune",
            f"The data has {len(train.classes)} class{'es' if len(train.classes) > 1 else ''}, the model tells {model.num_classes} apart: its own answers stand in for "
            "labels, and what is measured is how often the small model agrees with it.",
            level="warning",
        )
    table = None
    if "latency" in job.keep:
        table = yield from steps.table(model, job.latency_batch)
    looked_at = min(job.calibration or enough(model), len(train))
    calibration = _batches(job, model, about, train, looked_at, labelled)
    cut = yield from steps.lottery(
        model,
        calibration,
        job.keep,
        job,
        images=looked_at,
        criterion=job.criterion,
        round=multiple,
        seed=job.seed,
        table=table,
    )
    for note in cut.notes:
        yield Said("prune", note)
    yield Pruned("prune", {**cut.before}, {**cut.after})
    told: dict[str, float] = {"images": looked_at}
    if job.evaluate:
        if val.where.endswith(" (val)"):
            yield Said(
                "prune", "There is no val folder: a tenth was held out, which the model may have been trained on."
            )
        seen = _batches(job, model, about, val, job.evaluate, labelled)
        before, after = yield from watched("prune", 2 * min(job.evaluate, len(val)), lambda progress: _top1(
            (model, cut.model), seen, progress))  # fmt: skip
        told |= {"top1_before": before, "top1": after} if labelled else {"agreement": after}
    if labelled:
        about = {**about, "classes": list(train.classes)}
    lotus.pruning.save(cut.model, job.out, about={**about, "made_by": MADE_BY})
    yield Wrote("prune", str(job.out))
    held = export.native(cut.model)
    alone = [] if held is None else export.lines({**held, "file": WEIGHTS}, Path(job.out))
    if held is None:
        yield Said(
            "prune", f"timm alone cannot load it: {export.why_not(cut.model)}, which its constructor cannot say."
        )
    yield Cut("prune", time.monotonic() - began, told, plan=cut.text(), out=str(job.out), alone=tuple(alone))


def _refuse_to_replace(out: Path, *, force: bool) -> None:
    """A model may be days of training: this command writes over its own models alone, and with ``force`` over others of LOTUS.

    Raises:
        Refused: something else is there, or nothing can be written; before any work is done.
    """
    from lotus.pruning import spec

    try:  # a folder beside it is what the model is written to first
        near = next(parent for parent in out.absolute().parents if parent.exists())
        tempfile.TemporaryDirectory(dir=near).cleanup()
    except OSError as error:
        raise Refused(f"--out {out}: cannot be written ({error.strerror or error}). Give another folder.") from None
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        own = spec.read(out).get("about", {}).get("made_by") == MADE_BY
    except Refused:
        raise Refused(
            f"--out {out}: there is something there that is no model of LOTUS. Give another folder."
        ) from None
    if not spec.ours(out):
        raise Refused(f"--out {out}: beside a model there are files that LOTUS did not write. Give another folder.")
    if not own and not force:
        raise Refused(
            f"--out {out}: there is a model there that this command did not make. Give another folder, or --force to write over it."
        )


@dataclass(frozen=True)
class Cut(Ended):
    """The end, with what to show."""

    plan: str = ""
    """The table of what stays."""
    out: str = ""
    alone: tuple[str, ...] = ()
    """The lines that load it without LOTUS, where timm can hold the widths."""


def _batches(job: Job, model: Any, about: Mapping[str, Any], source: Source, most: int, labelled: bool) -> Batches:
    """The same images each time it is called: ``most`` of ``source``, drawn by the seed."""
    import torch

    from lotus.data import unpacked
    from lotus.vit.model import image_size

    size = image_size(model)
    rows = np.sort(np.random.default_rng(job.seed).choice(len(source), size=min(most, len(source)), replace=False))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = next(model.parameters()).device
        for images, labels in unpacked.batches(source, rows, size, mean=about["mean"], std=about["std"]):
            images, labels = images.to(device), labels.to(device)
            if not labelled:
                training = model.training
                with torch.no_grad():
                    labels = model.eval()(images).argmax(dim=1)
                model.train(training)
            yield images, labels

    return batches


def _top1(models: tuple[nn.Module, nn.Module], batches: Batches, progress: Callable[[int], None]) -> list[float]:
    """Per cent of the images that each model gets right."""
    import torch

    right, seen = [0] * len(models), 0
    for model in models:
        model.eval()
    with torch.no_grad():
        for images, labels in batches():
            for number, model in enumerate(models):
                right[number] += int((model(images).argmax(dim=1) == labels).sum())
            seen += len(images)
            progress(len(models) * seen)
    if not seen:
        raise Refused("--evaluate: there is no image to measure on. Take --evaluate 0.")
    return [100 * count / seen for count in right]


def budgets(given: Iterable[tuple[str, str]]) -> dict[str, float]:
    """``[("macs", "0.5")]`` -> ``{"macs": 0.5}``.

    Raises:
        Refused: no such budget, one that is there twice, or no number.
    """
    found: dict[str, float] = {}
    for what, part in given:
        place = f"--keep {what}={part}"
        if what in found:
            raise Refused(f"{place}: there is a --keep {what} already. Give one of them.")
        if what not in BUDGETS:
            raise Refused(f"{place}: there is no budget {what!r}.{nearest(what, BUDGETS)} Here: {', '.join(BUDGETS)}.")
        try:
            found[what] = float(part)
        except ValueError:
            raise Refused(f"{place}: write a part, e.g. --keep macs=0.5.") from None
    return found
