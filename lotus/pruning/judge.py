"""How far a cut model is from the dense one, on fixed images that neither training nor calibration saw.

Of 2,000 images, accuracy has a standard error of half a point or more, which decides a bisection by chance; divergence and
loss have a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lotus.pruning import metrics
from selection.errors import Refused
from selection.methods import call, find, reads

_KEEP_BYTES = 1 << 28  # of held-out images that are kept in memory

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, C) logits, (B, C) of the dense model, (B,) labels -> (B,)."""


def measuring(name: str, shelves: Sequence[ModuleType] = (), *, place: str = "prune.search.metric") -> Measure:
    """A metric of :mod:`lotus.pruning.metrics`, or of the user's own.

    Raises:
        Refused: there is no such metric; it reads what is not here, or gives no number an image.
    """
    tried = {"logits": torch.eye(2), "dense": torch.eye(2), "labels": torch.arange(2)}
    method = find([metrics, *shelves], name, place=place, here=tried)
    names = reads(method)
    values = call(method, tried, {}, place=place)
    if not isinstance(values, Tensor) or values.shape != tried["labels"].shape:
        raise Refused(f"{place}: {name!r} gives no number an image. Return a tensor of shape (B,).")

    def measure(logits: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
        given = {"logits": logits, "dense": dense, "labels": labels}
        values: Tensor = method(*(given[name] for name in names))
        return values

    return measure


class Judged(NamedTuple):
    """What the held-out images say of a model."""

    worse: float
    """Mean of the metric: 0 is as the dense model."""
    top1: float
    """Per cent. Told, never searched by."""


class Judge:
    """Measures models beside the dense one, always on the same images.

    Attributes:
        images: how many held-out images there are
        forwards: image-forwards so far
    """

    def __init__(
        self,
        dense: nn.Module,
        batches: Iterable[Any] | Callable[[], Iterable[Any]],
        metric: str = "divergence",
        shelves: Sequence[ModuleType] = (),
    ) -> None:
        """
        Args:
            dense: The model to stay close to; it is asked once.
            batches: Of (images, labels), or a function that gives them again and again.
            metric: By its name in lotus/pruning/metrics.py, or in one of ``shelves``.

        Raises:
            Refused: no such metric, or no image.
        """
        self.metric = metric
        self._measure = measuring(metric, shelves)
        again = list(batches) if not callable(batches) and iter(batches) is batches else batches
        self._batches = again if callable(again) else lambda: again
        self._held: list[tuple[Tensor, Tensor]] | None = []
        self.forwards, self._dense, labels, size = 0, [], [], 0
        for images, answers, logits in self._through(dense):
            self._dense.append(logits)
            labels.append(answers)
            size += images.numel() * images.element_size()
            if size > _KEEP_BYTES:
                self._held = None
            if self._held is not None:
                self._held.append((images.clone(), answers))  # a loader's ring buffer is written over
        self.images = self.forwards
        if not self.images:
            raise Refused("prune.search: no held-out image came. Give some, e.g. 2,048.")
        right = sum(int((d.argmax(-1) == a).sum()) for d, a in zip(self._dense, labels, strict=True))
        self.dense = Judged(0.0, 100 * right / self.images)

    def __call__(self, model: nn.Module) -> Judged:
        worse = right = 0.0
        for (_, labels, logits), dense in zip(self._through(model), self._dense, strict=True):
            worse += float(self._measure(logits, dense, labels).double().sum())
            right += float((logits.argmax(-1) == labels).sum())
        return Judged(worse / self.images, 100 * right / self.images)

    def _through(self, model: nn.Module) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        where, training = next(model.parameters()), model.training
        model.eval()
        try:
            for batch in self._held or self._batches():
                images, labels = batch[0], batch[1].cpu().clone()
                with torch.no_grad():
                    logits = model(images.to(where.device, where.dtype)).float().cpu()
                self.forwards += len(images)
                yield images, labels, logits
        finally:
            model.train(training)


def macs_at(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """The MACs at which (MACs, how good; higher is better) points, joined by lines, first are as good as ``level``.

    Points that a cheaper one is as good as are passed over. None where all are better, or none is as good.
    """
    rising: list[tuple[float, float]] = []
    for macs, good in sorted(points):
        if not rising or good > rising[-1][1]:
            rising.append((macs, good))
    if not rising or not rising[0][1] <= level <= rising[-1][1]:
        return None
    return float(np.interp(level, [good for _, good in rising], [macs for macs, _ in rising]))
