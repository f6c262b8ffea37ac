"""A model cut to one budget at several embedding dimensions (widths of its residual stream): the nearest to it is taken."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from lotus.config import Prune, as_request, reader, rules
from lotus.pruning import budget, latency, measure, narrow, unfit
from lotus.pruning.study import Given, Progress, Pruned, Study, beyond, criterion, rounded, study
from lotus.pruning.wrapping import Batches, Wrapped, passes_of
from lotus.vit import anatomy, cost
from selection import methods
from selection.errors import Refused

_SOME = 8
"""One in so many calibration images tries a smaller embedding dimension, and another one in so many tells how good it is; of
few images all do."""


def prune(
    model: nn.Module,
    batches: Batches,
    keep: Mapping[str, float],
    *,
    criterion: Any = "fisher",
    gates: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    shelves: Iterable[ModuleType] = (),
    **settings: Any,
) -> nn.Module:
    """A smaller model within the budget, in eval mode, on the model's device; the model itself is left as it was.

    Args:
        model: Any supported ViT, trained by LOTUS or not; also compiled, DataParallel, DistributedDataParallel (give each rank
            the same batches), or one inside of another module, as in ``nn.Sequential(normalize, vit)``: what comes back is
            wrapped alike. One without a classifier (``num_classes=0``) is cut by what its features lose, and asks for no labels.
        batches: Calibration data: tuples that begin with images and labels, or mappings of ``pixel_values`` and ``labels``,
            some 2,000 images; or a function that gives them.
            With ``rotate`` they are gone through twice; a plain iterator's are kept in memory until then.
        keep: ``macs``, ``params``, ``latency`` (on the model's device), or several, as fractions of the model's.
        criterion: A name from :mod:`lotus.pruning.criteria`, a mapping of ``name`` and its settings, or a function like those.
        gates: Learned gates by site, for the criterion ``gate``.
        seed: For the criterion ``random``.
        shelves: Modules with criteria of the user's own.
        settings: Further settings of the section ``prune`` of a config (:class:`lotus.config.Prune`), with the same defaults,
            such as ``scope``, ``round``, ``rotate``, ``compensate``, ``embed_dim``, ``exclude``; docs/settings.md has them all.

    Raises:
        Refused: a setting that there is not, or that does not go with another; a model that cannot be cut, a budget out of
            reach, calibration data that do not serve; says what would.
    """
    _check_arguments(settings)
    shelves = list(shelves)
    if callable(criterion):
        shelf, criterion = _shelf(criterion)
        shelves.append(shelf)
    keep = dict(keep) if isinstance(keep, Mapping) else keep
    request = as_request({"keep": keep, "criterion": criterion, **settings})
    rules.refuse(request, rules.CALLED, place="prune")
    if not isinstance(model, nn.Module):
        raise Refused(
            f"prune: a {type(model).__name__} is no model. Give one, e.g. of timm.create_model or lotus.load."
        )
    wrapped = Wrapped(model)
    if wrapped.hub is not None and request.embed_dim == "auto":  # its class has one width for all that is not a block
        request = request.model_copy(update={"embed_dim": None})
    pruned = lottery(wrapped.vit, wrapped.batches(batches), request, Given(shelves, gates, seed))
    return wrapped.around(pruned.model)


def _check_arguments(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are an argument of :func:`prune`, mistyped; those that are nothing at all the page refuses."""
    own = [name for name in inspect.signature(prune).parameters if name not in Prune.model_fields]
    for name in settings:
        near = methods.nearest(name, [*Prune.model_fields, *own])
        known = name in Prune.model_fields or f"prune.{name}" in reader.OLD
        if near and near == methods.nearest(name, own) and not known:
            raise Refused(f"lotus.prune: has no argument {name!r}.{near}")


def _shelf(function: Callable[..., np.ndarray]) -> tuple[ModuleType, str]:
    """A function of the user's own on a shelf of its own, and its name there."""
    name = getattr(function, "__name__", "").lstrip("_") or "criterion"
    if not inspect.isfunction(function):  # a partial, or an object that is called
        given = function

        @functools.wraps(given)
        def function(*args: Any, **options: Any) -> np.ndarray:
            return given(*args, **options)

    shelf = ModuleType(function.__module__)
    setattr(shelf, name, function)
    return shelf, name


def lottery(
    model: nn.Module,
    batches: Batches,
    request: Prune,
    given: Given = Given(),
    *,
    table: latency.Table | None = None,
    dense: nn.Module | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """As :func:`prune`, with all that came to light on the way.

    Args:
        model: As of :func:`prune`.
        batches: As of :func:`prune`.
        request: What to keep, and how.
        given: What a criterion has beside the model and the images.
        table: As of :meth:`Study.draw`.
        dense: What budgets are fractions of, where that is not the model, which was cut from it before.
        progress: Told the calibration images gone through so far, in all passes together.

    Raises:
        Refused: as :func:`prune`.
    """
    unfit.refuse_model(model)
    reads = methods.reads(criterion(request, given.shelves))
    rules.refuse(request, (*rules.ROWS, *rules.WITHOUT_A_RUN), place="prune", reads=reads)
    tries = narrow.tries(model, request)
    if all(part == 1 for part in (*request.keep.asked.values(), *tries)):  # then nothing is to be turned or folded
        request = request.model_copy(update={"rotate": False, "compensate": "none"})
    passes = passes_of(batches)
    request, notes = rounded(model, request, table)
    widths = narrow.useful(model, tries, request, whole=cost.count(dense or model))
    lot = _Lot(model, dense or model, passes, request, given, table)
    streams = _Streams(lot, progress)
    if request.embed_dim == "auto" and len(widths) > 1:
        streams.descend(widths)
    else:
        for channels in widths:
            drawn = streams.take(channels)
            if len(widths) > 1:
                streams.judge(channels, drawn, 1)
    best = streams.best()
    return dataclasses.replace(best, notes=(*notes, *best.notes))


@dataclass(frozen=True)
class _Lot:
    """What is the same for every width."""

    model: nn.Module
    dense: nn.Module
    """What budgets are parts of."""
    passes: Callable[[], Iterable[Any]]
    request: Prune
    given: Given
    table: latency.Table | None

    def study(self, start: nn.Module, passes: Callable[[], Iterable[Any]], progress: Progress | None) -> Study:
        return study(start, passes, self.request, self.given, progress=progress)

    def draw(self, studied: Study) -> Pruned:
        if self.dense is not self.model:
            studied = dataclasses.replace(studied, beside=self.dense)
        return studied.draw(self.request, whole=cost.count(self.dense), table=self.table)

    def out_of_reach(self, start: nn.Module) -> str:
        """Why the budget cannot be met from ``start``, which may have fewer channels; empty where it can."""
        request = self.request if anatomy.is_vit(start) else self.request.model_copy(update={"sublayers": False})
        return budget.out_of_reach(cost.outline(start), request, whole=cost.count(self.dense))


class _Streams:
    """A model cut to one budget at several widths of its stream, and how far each is from the model."""

    def __init__(self, lot: _Lot, progress: Progress | None) -> None:
        self.lot, self.model, self.passes, self.progress = lot, lot.model, lot.passes, progress
        self.wide = cost.outline(lot.model).width
        self.done = self.forwards = 0
        self.apart: dict[int, float] = {}
        """Width -> nats an image from the model."""
        self.drawn: dict[int, Pruned] = {}
        """By all images."""
        self._stream: dict[int, narrow.Statistics] = {}
        self._images = 0
        self._beyond = ""

    def descend(self, widths: Sequence[int]) -> None:
        """All channels; where that is too far from the model fewer, as long as that is nearer, tried with some of the images; and
        the last of those with all of them. Few images are all looked at each time."""
        drawn = self.take(widths[0])
        some = _SOME if self._count() >= measure.FEWEST else 1
        least, nearest = self.judge(widths[0], drawn, some), None
        if least <= narrow.CLOSE:
            return
        for channels in widths[1:]:
            apart = self.judge(channels, self.take(channels, some), some)
            if apart > least:
                break
            least, nearest = apart, channels
        if nearest is not None and some > 1:
            self.judge(nearest, self.take(nearest), some)

    def take(self, channels: int, every: int = 1) -> Pruned | None:
        """Cut with so many channels, as one in ``every`` image has it; None where the budget cannot be met so."""
        given = self.passes if every == 1 else functools.partial(_thinned, self.passes, every)
        start = self.model
        if channels < self.wide:
            if every not in self._stream:
                self._stream[every] = narrow.statistics(
                    self.model, unfit.checked(self.model, given)(), progress=beyond(self.progress, self.done)
                )
                self.done += self._stream[every].images
                self.forwards += self._stream[every].images
            start = narrow.narrow(self.model, self._stream[every], channels, compensate=self.lot.request.compensate)
        studied = self.lot.study(start, given, beyond(self.progress, self.done))
        self.done += (1 + studied.request.rotate) * studied.images
        self.forwards += studied.forwards
        if every == 1:
            self._images = studied.images
        self._beyond = self.lot.out_of_reach(start)
        if self._beyond:  # a smaller embedding dimension may do it
            return None
        drawn = self.lot.draw(studied)
        del studied  # or the next one's statistics would come on top of these
        if every == 1:
            self.drawn[channels] = drawn
        return drawn

    def judge(self, channels: int, drawn: Pruned | None, every: int) -> float:
        """How far it is from the model, infinite where there is none: by one in ``every`` image, others than a trial saw."""
        if drawn is None:
            return math.inf
        self.apart[channels], images = narrow.apart(self.model, drawn.model, _thinned(self.passes, every, every - 1))
        self.forwards += 2 * images
        return self.apart[channels]

    def _count(self) -> int:
        """How many images there are, which nothing may have read yet."""
        if not self._images:
            self._images = sum(len(images) for images, _ in measure.pairs(self.passes(), labeled=False))
        return self._images

    def best(self) -> Pruned:
        """The nearest of those by all images, with what was found on the way."""
        if not self.drawn:
            raise Refused(self._beyond)
        channels = min(self.drawn, key=lambda width: self.apart.get(width, 0.0))
        best, notes = self.drawn[channels], []
        if channels < self.wide:
            notes.append(f"Of the residual stream's {self.wide} channels {channels} stay, turned.")
        if len(self.apart) > 1:
            lines = ", ".join(f"{width}: {apart:.4f}" for width, apart in self.apart.items())
            notes.append(
                f"Embedding dimensions tried, and how far each is from the dense model (nats an image): {lines}."
            )
        return dataclasses.replace(best, forwards=self.forwards, notes=(*notes, *best.notes))


def _thinned(passes: Callable[[], Iterable[Any]], every: int, first: int = 0) -> Iterator[Any]:
    """The batches with one in ``every`` of their images, from number ``first`` on."""
    done = 0
    for batch in passes():
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        start, done = (first - done) % every, done + len(parts[0])
        if start < len(parts[0]):
            yield tuple(None if part is None else part[start::every] for part in parts[:2])
