"""Prune a model that LOTUS never trained: a timm name, its weights and a folder of images are enough.

``lotus prune --model NAME --weights FILE --data FOLDER prune.keep.macs=0.5``; in Python, :func:`lotus.prune` with batches of one's own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import OneCut
from lotus.events import Began, Ended, Event, Pruned, Said, Wrote, watched
from lotus.stages import given
from lotus.stages.cut import known_here, lottery, rounded
from selection.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lotus.config import Prune
    from lotus.data.source import Source

MADE_BY = "lotus prune --model"
"""Stands in what this command writes, which it alone writes over."""

Batches = Callable[[], Iterator[tuple["torch.Tensor", "torch.Tensor"]]]


@dataclass(frozen=True)
class Job:
    """What is to be pruned, and what is done with it."""

    page: OneCut
    out: str = "small"
    force: bool = False
    """Write over a model of LOTUS in ``out`` that was not made by this command."""
    evaluate: int = 5000
    """At most so many validation images are measured on, before and after; 0: none."""
    shelves: Sequence[ModuleType] = ()
    """Modules with criteria, or data sets, of the user's own."""


def prune(job: Job) -> Iterator[Event]:
    """Load, look at the images, cut, measure, write; yields what happens. The last event holds the plan and the figures.

    Raises:
        Refused: what the user can mend: a name, weights that do not fit, images, a budget out of reach.
    """
    import lotus.pruning
    from lotus import export
    from lotus.data.dataset import open_data
    from lotus.pruning import spec
    from lotus.pruning.measure import enough
    from lotus.pruning.study import criterion

    page, request = job.page, job.page.prune
    began = time.monotonic()
    _refuse_to_replace(Path(job.out), force=job.force)
    criterion(request, job.shelves)  # before the weights, which may have to be fetched
    yield Began(
        "prune", f"{page.model.name}, keep {', '.join(f'{what} {part:g}' for what, part in request.keep.asked.items())}"
    )
    model, about = _adopted(page)
    request = yield from _within_reach(model, request)
    train, val = open_data(page.data, job.shelves, learned=False)
    names = _names(model)
    labeled = len(train.classes) == model.num_classes and (not names or names == list(train.classes))
    if not labeled:
        yield Said("prune", _unlabeled(train.classes, model.num_classes, names), level="warning")
    request, table = yield from known_here(model, request)
    images = _Images(model, about, labeled, page.seed)
    looked_at = min(request.calibration or enough(model), len(train))
    shown = batches_of(images, train, looked_at)
    beside = lotus.pruning.Given(job.shelves, seed=page.seed)
    cut = yield from lottery(model, shown, request, images=looked_at, given=beside, table=table)
    for note in cut.notes:
        yield Said("prune", note)
    yield Pruned("prune", {**cut.before}, {**cut.after})
    told: dict[str, float] = {"images": looked_at}
    if job.evaluate:
        told |= yield from _compared(images, cut.model, val, job.evaluate)
    if labeled or names:
        about = {**about, "classes": names or list(train.classes)}
    lotus.pruning.save(cut.model, job.out, about={**about, "made_by": MADE_BY})
    yield Wrote("prune", str(job.out))
    held = export.native(cut.model)
    alone = [] if held is None else export.lines({**held, "file": spec.WEIGHTS}, Path(job.out))
    if held is None:
        yield Said(
            "prune", f"timm alone cannot load it: {export.why_not(cut.model)}, which its constructor cannot say."
        )
    yield Cut("prune", time.monotonic() - began, told, plan=cut.text(), out=str(job.out), alone=tuple(alone))


def _names(model: Any) -> list[str]:
    """What the classes of the weights are called, where their folder knows it."""
    names: Any = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if not isinstance(names, (list, tuple)) or len(names) != model.num_classes:
        return []
    return [str(name) for name in names]


def _unlabeled(classes: Sequence[str], told_apart: int, names: Sequence[str]) -> str:
    """What stands in for labels where those of the data are not the model's."""
    if not told_apart:
        return "The model has no classifier: its features count, not the data's classes, and what is measured is how alike they stay."
    differ = next((f": {one!r} where the data has {other!r}" for one, other in zip(names, classes) if one != other), "")
    known = f"the model tells {told_apart} apart{differ if len(classes) == told_apart else ''}"
    return (
        f"The data has {len(classes)} class{'es' if len(classes) > 1 else ''}, {known}: its own answers stand in for labels, and what "
        "is measured is how often the small model agrees with it."
    )


def _adopted(page: OneCut) -> tuple[Any, dict[str, Any]]:
    """The model on the device, and what is known of the images that it wants."""
    import torch

    import lotus.pruning
    from lotus.pruning import spec
    from lotus.vit import model as door
    from lotus.vit.preprocessing import preprocessing

    asked = page.model
    beside = spec.images_of(Path(asked.weights)) if asked.weights else {}
    if given.is_ours(asked):  # cut or not, it says itself what it is
        whole: Any = lotus.pruning.load(asked.weights)
        about = {**preprocessing(whole).about(), "resize": whole.pretrained_cfg["resize"]}
        model = given.model_of(asked, whole.num_classes).eval()
    else:
        model, about = door.adopt(asked.name, asked.args, asked.weights)
        about = {"resize": "bilinear" if about["interpolation"] == "bilinear" else "bicubic", **about}
    name = given.license_of(asked.model_copy(update={"pretrained": not asked.weights}))
    license_ = {"license": name} if name else {}
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), {**about, **beside, **license_}


def _within_reach(model: nn.Module, request: Prune) -> Generator[Event, None, Prune]:
    """Refuse, before any image is read, what cannot be met. Returns ``request`` with a whole number for ``round``."""
    from lotus.pruning import budget, narrow
    from lotus.vit import anatomy, cost

    request = yield from rounded(model, request)
    widths = narrow.tries(model, request)
    if widths == (1.0,):  # a smaller embedding dimension may reach further
        sublayers = request.sublayers if anatomy.is_vit(model) else False
        budget.check_reach(cost.outline(model), request.model_copy(update={"sublayers": sublayers}))
    narrow.useful(model, widths, request)
    return request


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


@dataclass(frozen=True)
class _Images:
    """How a model is shown images, and which are drawn."""

    model: Any
    about: Mapping[str, Any]
    """What is known of the images that it wants."""
    labeled: bool
    """Whether the data's labels are the model's; else its own answers stand in."""
    seed: int


def batches_of(images: _Images, source: Source, most: int) -> Batches:
    """The same images each time it is called: ``most`` of ``source``, drawn by the seed."""
    import torch

    from lotus.data import unpacked
    from lotus.data.views import Look
    from lotus.vit.model import image_size
    from lotus.vit.preprocessing import resizing

    model, about = images.model, images.about
    look = Look(
        size=image_size(model),
        mean=about["mean"],
        std=about["std"],
        crop=about["crop"],
        interpolation=resizing(about),
        crop_mode=about.get("crop_mode", "center"),
    )
    rows = np.sort(np.random.default_rng(images.seed).choice(len(source), size=min(most, len(source)), replace=False))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = next(model.parameters()).device
        for x, labels in unpacked.batches(source, rows, look):
            x, labels = x.to(device), labels.to(device)
            if not images.labeled:
                training = model.training
                with torch.no_grad():
                    labels = model.eval()(x).argmax(dim=1)
                model.train(training)
            yield x, labels

    return batches


def _compared(images: _Images, small: nn.Module, val: Source, most: int) -> Generator[Event, None, dict[str, float]]:
    """What the model and ``small`` reach on at most so many of the validation images."""
    if val.where.endswith(" (val)"):
        yield Said("prune", "There is no val folder: a tenth was held out, which the model may have been trained on.")
    if val.note:
        yield Said("prune", val.note, level="warning")
    seen, passes = batches_of(images, val, most), 2 * min(most, len(val))
    if not images.model.num_classes:  # a backbone tells no classes apart
        alike = yield from watched("prune", passes, lambda progress: _likeness(images.model, small, seen, progress))
        return {"likeness": alike}
    before, after = yield from watched("prune", passes, lambda progress: _top1((images.model, small), seen, progress))
    n = min(most, len(val))
    return (
        {"top1_before": before, "top1": after, "measured_on": n}
        if images.labeled
        else {"agreement": after, "measured_on": n}
    )


def _likeness(model: nn.Module, small: nn.Module, batches: Batches, progress: Callable[[int], None]) -> float:
    """The mean cosine between what both make of each image."""
    import torch

    alike, seen = 0.0, 0
    with torch.no_grad():
        for images, _ in batches():
            both = [part.eval()(images).flatten(1) for part in (model, small)]
            alike += float(torch.cosine_similarity(*both).sum())
            seen += len(images)
            progress(2 * seen)
    if not seen:
        raise Refused("--evaluate: there is no image to measure on. Take --evaluate 0.")
    return alike / seen


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
