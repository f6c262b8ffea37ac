"""What a loader promises, and what both loaders share.

Letters: B images of a batch, S side of the model's input.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lotus.data import erasing, policies
from lotus.data.format import Beton
from lotus.data.kept import NOTHING, Kept
from lotus.data.pixel_ops import sent
from lotus.data.sample_plan import Rows, SamplePlan
from lotus.data.views import Look, Table, parameters


class Batch(NamedTuple):
    """Images with what belongs to them. The receiver owns it: nothing is a view of a buffer that is used again."""

    images: Tensor
    """(B, 3, S, S) float32, normalized, contiguous."""
    labels: Tensor
    """(B,) int64."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks a batch for
    """(B,) int64: row numbers, an image's name for ever."""


class Loader(Protocol):
    """Goes through the rows of a sample plan. A context manager; leaving it closes it."""

    kind: str
    """``ffcv`` or ``torch``."""
    plan: SamplePlan
    """Which rows, in which order."""

    def epoch(self, epoch: int, skip: int = 0, *, side: int | None = None, strength: float = 1.0) -> Iterator[Batch]:
        """The batches of an epoch, from number ``skip`` on: those before were gone through before a restart.

        Beginning another epoch, or :meth:`close`, ends this one.

        Args:
            epoch: its number, from 0, which the order and what is done to pixels follow from.
            side: S of this epoch; None: what the loader was opened with.
            strength: a factor, 0 to 1, of how strongly pixels are changed; see :func:`lotus.data.policies.changes`.
        """

    def close(self) -> None:
        """End the epoch under way and let go of the threads. May be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *fault: object) -> None: ...


class Raw(NamedTuple):
    """A batch as a loader's threads make it, on the CPU."""

    planes: Tensor
    """(B, 3, S, S): float32 and normalized where nothing more is done to bytes, else uint8."""
    labels: Tensor
    index: Tensor  # type: ignore[assignment]


_open: weakref.WeakSet[BaseLoader] = weakref.WeakSet()


class BaseLoader(ABC):
    """What both loaders share: the order, the table of augmentations, the device, and the end of things.

    Args:
        beton: the open file.
        plan: which rows, in which order.
        look: how its images are seen.
        device: where batches go. Elsewhere than on the CPU they are augmented and normalized there and travel as bytes.
        workers: threads that decode.
        kept: where decoded images stay.
    """

    kind = ""

    def __init__(
        self, beton: Beton, plan: SamplePlan, look: Look, device: torch.device, workers: int, kept: Kept = NOTHING
    ) -> None:
        self.kept = kept
        self.beton, self.plan, self.device, self.workers = beton, plan, device, workers
        self.look, self.augment = look, look.augment
        self.side = look.size  # of the epoch under way
        # float32 throughout, subtract then divide: the table and the device's arithmetic give the same bits.
        self._mean = np.asarray(look.mean, np.float32) * np.float32(255)
        self._std = np.asarray(look.std, np.float32) * np.float32(255)
        gray = np.arange(256, dtype=np.float32)
        self.in_bytes = device.type != "cpu" or (self.augment is not None and self.augment.recolors)
        if not self.in_bytes:
            self.levels: npt.NDArray[Any] = (gray - self._mean[:, None]) / self._std[:, None]  # (3, 256)
        else:
            self.levels = np.repeat(np.arange(256, dtype=np.uint8)[None], 3, axis=0)
        self.fill = np.clip(np.rint(self._mean), 0, 255).astype(np.uint8)  # beyond the border: the mean color
        self._live: Generator[Batch, None, None] | None = None
        self._closed = False
        _open.add(self)

    def epoch(self, epoch: int, skip: int = 0, *, side: int | None = None, strength: float = 1.0) -> Iterator[Batch]:
        """See :meth:`Loader.epoch`.

        Raises:
            ValueError: a negative epoch, ``skip`` beyond the epoch's end, no side, or a strength outside 0 to 1.
            RuntimeError: the loader is closed.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        self._end_epoch()
        sizes = self.plan.sizes(epoch) if epoch >= 0 else None
        if sizes is None or not 0 <= skip <= len(sizes):
            raise ValueError(f"no batch {skip} in epoch {epoch}")
        if (side is not None and side < 1) or not 0 <= strength <= 1:
            raise ValueError(f"a side of {side} and a strength of {strength}: not at least 1, and 0 to 1")
        self.side = self.look.size if side is None else side
        self._live = self._batches(epoch, self.plan.order(epoch)[sum(sizes[:skip]) :], sizes[skip:], strength)
        return self._live

    def close(self) -> None:
        self._end_epoch()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    @abstractmethod
    def _ahead(self, rows: Rows, table: Table, sizes: Sequence[int]) -> Generator[Raw, None, None]:
        """Batches of ``sizes`` of ``rows``, one after another, made ahead by threads that are gone when the generator is closed.

        ``table`` (len(rows), 7) goes with ``rows``, whose number is the sum of ``sizes``.
        """

    def _end_epoch(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.close()

    def _batches(self, epoch: int, rows: Rows, sizes: Sequence[int], strength: float) -> Generator[Batch, None, None]:
        if not len(rows):
            return
        high, wide = self.beton.heights[rows], self.beton.widths[rows]
        table = parameters(self.look, epoch, rows, high, wide, self.side)
        with closing(self._ahead(rows, table, sizes)) as ahead:
            for raw in ahead:
                yield self._delivered(raw, epoch, strength)

    def _delivered(self, raw: Raw, epoch: int, strength: float) -> Batch:
        """On the device, augmented and normalized. Here rather than in the threads, so that a GPU does it."""
        images, augment, rows = raw.planes, self.augment, raw.index.numpy()
        size, seed = self.look.size, self.look.seed
        if self.in_bytes:
            images = sent(images, self.device)
            if augment is not None and augment.recolors:
                made = policies.changes(augment, seed, epoch, rows, size=size, strength=strength)
                policies.change(images, made, fill=self.fill, size=size)
            images = images.to(torch.float32)
            images -= self._there[0]
            images /= self._there[1]
        if augment is not None and augment.erase:
            where = erasing.boxes(augment, seed, epoch, rows, self.side, strength=strength)
            erasing.erase(images, where, augment.erase_mode)
        return Batch(images, sent(raw.labels, self.device), sent(raw.index, self.device))

    @functools.cached_property
    def _there(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (3, 1, 1) each, on the device."""
        mean, std = (torch.from_numpy(numbers).to(self.device).view(3, 1, 1) for numbers in (self._mean, self._std))
        return mean, std

    def blank(self, count: int) -> Tensor:
        """Memory for ``count`` images (count, 3, S, S), of the kind that ``levels`` gives; new, so that it can be given away."""
        dtype = torch.uint8 if self.in_bytes else torch.float32
        return torch.empty((count, 3, self.side, self.side), dtype=dtype, pin_memory=self.device.type == "cuda")


@atexit.register
def _close_all() -> None:
    """An FFCV thread that is alive when the interpreter ends aborts the process (exit code 134)."""
    for loader in list(_open):
        loader.close()
