"""Dynamic data pruning: what is known of the images while they train, and the draw, checked here.

>>> state = State(labels)
>>> for epoch in range(epochs):
...     drawn = epoch_subset(state, pick="infobatch", epoch=epoch, epochs=epochs, seed=0)
...     for rows, losses in train_on(drawn.rows, drawn.weights):
...         state.add(rows, losses)
...     state.end(epoch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selection import dynamic, methods, npz
from selection.choices import Choice, check_seed, resolve
from selection.errors import Refused

KIND, FORMAT = "the state of dynamic data pruning of LOTUS", 1
CURE = "Begin the training anew."

_STREAM = 0x10775
"""Keeps our chance apart from that of others with the same seed: the order of the images is drawn from (seed, epoch) too."""


class Seen(NamedTuple):
    """What one rank saw in an epoch. Whole numbers stay whole: no row number ever passes through a float."""

    rows: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float32]
    below: npt.NDArray[np.bool_]


class State:
    """What is known of n images while they train. Ready after each epoch for the next draw, and to be saved at any time.

    Attributes:
        loss: (n,) float32, when it was last seen; +inf: never.
        mean, variance: (n,) float32, running ones of the loss; +inf and 0: never seen.
        seen: (n,) int64, in how many epochs.
        last: (n,) int64, the epoch in which it was last seen; -1: never.
        below: (n,) bool, its loss was below the mean of its batch when it was last seen.
        passes: image passes so far, of those whose loss was finite.
        epochs: epochs that have ended.

    Args:
        labels: (n,).
        memory: how much of the running mean and variance an epoch leaves in place.
    """

    def __init__(self, labels: npt.ArrayLike, *, memory: float = 0.8) -> None:
        labels = np.asarray(labels)
        if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
            raise Refused(f"dynamic: labels are one whole number an image, not {labels.dtype} {labels.shape}.")
        if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not 0 <= memory < 1:
            raise Refused(f"dynamic: memory={memory!r} is no part from 0 to 1, and less than 1.")
        n = len(labels)
        self.labels = labels.astype(np.int64)
        self.memory = float(memory)
        self.loss = np.full(n, np.inf, np.float32)
        self.mean = np.full(n, np.inf, np.float32)
        self.variance = np.zeros(n, np.float32)
        self.seen = np.zeros(n, np.int64)
        self.last = np.full(n, -1, np.int64)
        self.below = np.zeros(n, bool)
        self.passes = 0
        self.epochs = 0
        self._now = np.full(n, np.nan, np.float32)  # of the epoch under way, NaN: not seen in it
        self._below = np.zeros(n, bool)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def saved(self) -> float:
        """The fraction of all image passes that was saved so far."""
        return 1 - self.passes / (self.epochs * len(self)) if self.epochs else 0.0

    def add(self, rows: npt.ArrayLike, losses: npt.ArrayLike) -> None:
        """Take in a batch: its rows and the loss of each, as it was before any weight. What is not finite counts as not seen.

        Raises:
            Refused: rows that there are not, or not one loss a row.
        """
        at, values = np.asarray(rows), np.asarray(losses, dtype=np.float32)
        if at.dtype.kind not in "iu" or at.ndim != 1 or values.shape != at.shape:
            raise Refused(
                f"dynamic: one loss a row is wanted, not rows {at.dtype} {at.shape} and losses {values.shape}."
            )
        if len(at) and (at.min() < 0 or at.max() >= len(self)):
            raise Refused(f"dynamic: rows {at.min()} to {at.max()}; the {len(self)} images are 0 to {len(self) - 1}.")
        good = np.isfinite(values)
        at, values = at[good], values[good]
        if len(at):
            self._now[at] = values
            self._below[at] = values < values.mean(dtype=np.float64)

    def pending(self) -> Seen:
        """What was seen since the last epoch ended, for the other ranks."""
        rows = np.flatnonzero(~np.isnan(self._now))
        return Seen(rows, self._now[rows], self._below[rows])

    def end(self, epoch: int, parts: Iterable[Seen] | None = None) -> None:
        """Close the epoch. A second call for the same one does nothing.

        Args:
            epoch: its number, from 0.
            parts: :meth:`pending` of all ranks, in the order of the ranks; None: there is this one only. A row that several
                ranks saw (padding) counts once.
        """
        if epoch < self.epochs:
            return
        for rows, losses, below in [self.pending()] if parts is None else parts:
            new = self.last[rows] != epoch
            rows, losses, below = rows[new], losses[new], below[new]
            first = self.seen[rows] == 0
            mean = np.where(first, losses, self.mean[rows])  # +inf is nothing to reckon with
            away = losses - mean
            self.variance[rows] = self.memory * self.variance[rows] + (1 - self.memory) * away**2
            self.mean[rows] = mean + (1 - self.memory) * away
            self.loss[rows] = losses
            self.below[rows] = below
            self.seen[rows] += 1
            self.last[rows] = epoch
            self.passes += len(rows)
        self.epochs = epoch + 1
        self._now[:] = np.nan
        self._below[:] = False

    def known(self) -> dict[str, npt.NDArray[Any]]:
        """What a method may read of the images, by name, not to be changed."""
        views = {name: getattr(self, name).view() for name in IMAGES}
        for view in views.values():
            view.setflags(write=False)
        return views

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All of it, for a checkpoint; the epoch under way included."""
        return {
            **{name: array.copy() for name, array in self.known().items()},
            "now": self._now.copy(),
            "now_below": self._below.copy(),
            "memory": np.array(self.memory),
            "passes": np.array(self.passes, np.int64),
            "epochs": np.array(self.epochs, np.int64),
        }

    @classmethod
    def of(cls, arrays: Mapping[str, npt.ArrayLike], *, place: str = "dynamic") -> State:
        """Take up what :meth:`arrays` gave.

        Raises:
            Refused: something is missing, or is not of the kind and size that it should be.
        """
        given = {name: np.asarray(array) for name, array in arrays.items()}
        if "labels" not in given or "memory" not in given or given["memory"].shape != ():
            raise Refused(f"{place}: no state of a lottery: labels or memory are missing. {CURE}")
        state = cls(given["labels"], memory=float(given["memory"]))
        for name, array in state.arrays().items():
            if name not in given or given[name].shape != array.shape or given[name].dtype != array.dtype:
                found = f"{given[name].dtype} {given[name].shape}" if name in given else "nothing"
                raise Refused(f"{place}.{name}: expected {array.dtype} {array.shape}, not {found}. {CURE}")
        for name in ("loss", "mean", "variance", "seen", "last", "below"):
            getattr(state, name)[:] = given[name]
        state._now[:], state._below[:] = given["now"], given["now_below"]
        state.passes, state.epochs = int(given["passes"]), int(given["epochs"])
        return state

    def save(self, path: str | Path) -> None:
        """Write all to an .npz, beside and renamed.

        Raises:
            Refused: it cannot be written there.
        """
        npz.write(path, self.arrays(), {}, kind=KIND, version=FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read what :meth:`save` wrote.

        Raises:
            Refused: the file is missing, cut short, damaged or foreign; names the path and the cure.
        """
        arrays, _ = npz.read(path, kind=KIND, version=FORMAT, cure=CURE)
        return cls.of(arrays, place=str(path))


@dataclass(frozen=True, eq=False)
class EpochSubset:
    """The images of one epoch."""

    rows: npt.NDArray[np.int64]
    """Sorted."""
    weights: npt.NDArray[np.float32]
    """Positive, in the order of ``rows``; they multiply losses, and their mean need not be 1: see selection/dynamic.py."""


IMAGES = ("loss", "mean", "variance", "seen", "last", "below", "labels")
READS = frozenset({*IMAGES, "epoch", "epochs", "budget", "seed", "rng"})
"""What a method may read (selection/dynamic.py says what it is)."""

HALF = 0.5
"""The fraction of the images in an epoch where nobody says ``keep``."""


def _resolved(
    pick: Choice, shelves: Iterable[ModuleType], place: str
) -> tuple[str, Callable[..., Any], dict[str, Any], float | None]:
    """Name, function and options of a choice, and ``saving`` where the method has no such setting but reads a budget."""

    def also(method: Callable[..., Any]) -> list[str]:
        """Two ways to say a budget; the second is a setting of a config's, an argument elsewhere."""
        if "budget" not in methods.reads(method):
            return []
        return ["saving", "keep"] if hasattr(pick, "keep") else ["saving"]

    options = dict(pick) if isinstance(pick, Mapping) else dict(getattr(pick, "options", None) or {})
    if "saving" not in options:
        return *resolve(dynamic, shelves, pick, place, also=also, here=READS), None
    saving = options.pop("saving")
    wanted = options.pop("name", None) or getattr(pick, "name", None)
    name, method, options = resolve(dynamic, shelves, {**options, "name": wanted}, place, also=also, here=READS)
    if "saving" in methods.settings(method):
        return name, method, {**options, "saving": saving}, None
    if saving is None:
        return name, method, options, None
    if "budget" not in methods.reads(method):
        raise Refused(
            f"{place}.saving: {name!r} finds the number of images itself and cannot be told what to save. Leave it out."
        )
    if isinstance(saving, bool) or not isinstance(saving, (int, float)) or not 0 <= saving < 1:
        raise Refused(f"{place}.saving: {saving!r} is no part from 0 to 1, and less than 1.")
    return name, method, options, float(saving)


def choose(
    *, pick: Choice, keep: float | None, epochs: int, shelves: Iterable[ModuleType] = (), place: str = "dynamic"
) -> float:
    """Check a choice before anything trains, by a draw of the first epoch over made-up images.

    Returns:
        The fraction of the images in an epoch, for :func:`epoch_subset`: ``keep``, what ``saving`` leaves, or half where both are None.

    Raises:
        Refused: see :func:`epoch_subset`; also a ``keep`` for a method that finds its own number, or beside a ``saving``.
    """
    shelves = list(shelves)
    name, method, options, saving = _resolved(pick, shelves, place)
    if keep is not None and (saving is not None or options.get("saving") is not None):
        raise Refused(f"{place}: keep and saving say the same thing twice. Leave one of them out.")
    if keep is not None and "budget" not in methods.reads(method):
        sets = [option for option in methods.settings(method) if option in ("saving", "prune", "drop")]
        cure = f" Set {place}.{' or '.join(sets)}." if sets else ""
        raise Refused(f"{place}.keep: {name!r} finds the number of images itself. Leave keep out.{cure}")
    keep = 1 - saving if saving is not None else HALF if keep is None else keep
    epoch_subset(
        State(np.arange(1000) % 10), pick=pick, epoch=0, epochs=epochs, keep=keep, shelves=shelves, place=place
    )
    return keep


def rehearse(*, pick: Choice, keep: float | None, epochs: int, shelves: Iterable[ModuleType] = ()) -> float:
    """The fraction of all image passes that a training would take, on made-up losses (exponential, the same in every epoch).

    Exact, but for whole images, for methods that read a budget and where ``saving`` is set; else a guess.
    """
    keep = choose(pick=pick, keep=keep, epochs=epochs, shelves=shelves)
    losses = np.random.default_rng(0).exponential(size=500)
    state = State(np.arange(len(losses)) % 10)
    for epoch in range(epochs):
        rows = epoch_subset(state, pick=pick, epoch=epoch, epochs=epochs, keep=keep, shelves=shelves).rows
        state.add(rows, losses[rows])
        state.end(epoch)
    return 1 - state.saved


def epoch_subset(
    state: State,
    *,
    pick: Choice,
    epoch: int,
    epochs: int,
    keep: float = 1.0,
    seed: int = 0,
    shelves: Iterable[ModuleType] = (),
    place: str = "dynamic",
) -> EpochSubset:
    """The images of epoch ``epoch`` (from 0) of ``epochs``. The same whenever it is called for the same state and seed.

    Args:
        state: what the epochs before said of each image.
        pick: a function of selection/dynamic.py. ``saving`` among its options is the fraction of all image passes of the training to
            save: a setting of the method, or, for those that read a budget alone, ``1 - keep``.
        keep: fraction of the images in an epoch, for those that read a budget.
        seed: everything random follows from it.
        shelves: modules with lotteries of the user's own; they win over ours.
        place: what a refusal names.

    Raises:
        Refused: no such method or option; a ``keep`` that is no fraction in (0, 1]; a method that does not return what it should.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise Refused(f"{place}.keep: {keep!r} is no fraction in (0, 1]. Say 0.3 for epochs of 30 % of the images.")
    seed = check_seed(seed)
    if not 0 <= epoch < epochs:
        raise Refused(f"{place}: there is no epoch {epoch} of {epochs}; they are 0 to {epochs - 1}.")
    name, method, options, saving = _resolved(pick, list(shelves), place)
    keep = keep if saving is None else 1 - saving
    own = int(np.random.SeedSequence([seed, _STREAM]).generate_state(1, np.uint64)[0])
    known: dict[str, Any] = {
        **state.known(),
        "epoch": int(epoch),
        "epochs": int(epochs),
        "budget": max(1, round(keep * len(state))),
        "seed": own,
        "rng": np.random.default_rng([own, int(epoch)]),
    }
    taken = methods.call(method, known, options, place=place)
    rows, weights = _checked(taken, len(state), f"{place} ({name})")
    order = np.argsort(rows)
    return EpochSubset(rows[order].astype(np.int64), weights[order].astype(np.float32))


def _checked(taken: Any, n: int, place: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """What a method gave for n images: rows and weights."""
    rows, weights = taken if isinstance(taken, tuple) else (taken, np.ones(np.size(taken)))
    rows, weights = np.asarray(rows), np.asarray(weights, np.float64)
    if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu" or len(np.unique(rows)) < len(rows):
        raise Refused(f"{place}: was to return distinct rows, at least one, and gave {rows.dtype} {rows.shape}.")
    if rows.min() < 0 or rows.max() >= n:
        raise Refused(f"{place}: was to return rows of 0 to {n - 1}, and gave {rows.min()} to {rows.max()}.")
    if weights.shape != rows.shape or not np.isfinite(weights).all() or weights.min() <= 0:
        raise Refused(f"{place}: was to return {len(rows)} positive weights.")
    return rows, weights
