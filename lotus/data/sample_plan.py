"""Who sees which image when: the sample plan owns the order. Both loaders ask it.

Letters: N images of the data set, K rows of the ticket, G images an optimizer step, of all ranks and parts together.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selection.errors import Refused

Rows = npt.NDArray[np.int64]

_BALANCED = 0xBA1  # a stream of chance of its own


def checked_rows(rows: npt.ArrayLike, *, empty: bool = False, repeats: bool = False) -> Rows:
    """``rows`` as int64, refused where a loader would stumble over them.

    FFCV reads foreign memory for a row out of range and hangs on a boolean mask, so nothing of that kind may pass.

    Raises:
        Refused: a boolean mask, not whole numbers, not one-dimensional, none at all, negative, twice the same (unless it may
            have ``repeats``).
    """
    array = np.asarray(rows)
    if array.dtype == np.bool_:
        raise Refused("rows: a boolean mask. Give row numbers: np.flatnonzero(mask).")
    if array.ndim != 1:
        raise Refused(f"rows: {array.ndim} dimensions of shape {array.shape}. Give one list of row numbers.")
    if array.size == 0:
        if empty:
            return np.zeros(0, np.int64)
        raise Refused("rows: none. A ticket keeps at least one image.")
    if not np.issubdtype(array.dtype, np.integer):
        raise Refused(f"rows: {array.dtype}. Give whole numbers.")
    if int(array.max()) > np.iinfo(np.int64).max or int(array.min()) < 0:
        raise Refused(f"rows: from {array.min()} to {array.max()}. Rows count from 0.")
    array = array.astype(np.int64)
    if not repeats and len(np.unique(array)) != len(array):
        values, counts = np.unique(array, return_counts=True)
        raise Refused(f"rows: {values[counts > 1][0]} appears {counts.max()} times. Each image goes once an epoch.")
    return array


class Step(NamedTuple):
    """An optimizer step of all ranks."""

    number: int
    """In its epoch, from 0: the same for any number of ranks, of which many make no step of rows too few to share."""
    group: int
    rows: Rows
    """(K,) of all ranks."""
    parts: int
    """Micro-batches in which each rank goes through it: ``accumulate``, and maybe fewer where a group or the epoch ends."""


class SamplePlan:
    """The order of training: a fresh permutation every epoch, the same optimizer steps for any number of ranks.

    The global order of epoch ``e`` is a permutation keyed by ``SeedSequence([seed, e])``. Optimizer step ``s`` takes its
    rows ``[s G, (s + 1) G)``; part ``a`` of rank ``r`` is the slice number ``a * world + r`` of them. So the *set* of
    images of a step does not depend on ``world`` or ``accumulate``. What is left over at the end is a last, smaller step,
    of which every rank takes equally many rows; the at most ``world - 1`` others sit this epoch out.

    With ``groups`` a step is of one group alone: each group is cut into steps by itself, with a smaller one at its end, and
    the steps of all groups are then shuffled. At most ``world - 1`` rows of each group sit an epoch out.

    Args:
        rows: (K,) row numbers, each once.
        batch_size: G.
        world: number of ranks.
        rank: this one, from 0.
        accumulate: parts in which a rank goes through its share of a step.
        shuffle: ``False`` keeps the order of ``rows`` in every epoch.

    Raises:
        Refused: rows that are no rows, a batch that does not divide, fewer rows than ranks.
    """

    def __init__(
        self,
        rows: npt.ArrayLike,
        *,
        seed: int = 0,
        batch_size: int,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        shuffle: bool = True,
    ) -> None:
        if world < 1 or not 0 <= rank < world:
            raise Refused(f"rank {rank} of {world}: ranks count from 0 to world - 1.")
        if accumulate < 1:
            raise Refused(f"accumulate: {accumulate}. It is at least 1.")
        parts = world * accumulate
        if batch_size < 1 or batch_size % parts:
            raise Refused(
                f"batch_size: {batch_size} images cannot be dealt out evenly to {world} ranks x {accumulate} parts. "
                f"Take a multiple of {parts}."
            )
        self.seed, self.batch_size, self.world, self.rank = seed, batch_size, world, rank
        self.accumulate, self.shuffle = accumulate, shuffle
        self.take(rows)

    @classmethod
    def evaluation(cls, rows: npt.ArrayLike, *, batch_size: int, world: int = 1, rank: int = 0) -> SamplePlan:
        """In order, each row once over all ranks: rank ``r`` takes ``rows[r::world]``. Nothing repeated, nothing dropped.

        ``batch_size`` is, as in training, what all ranks go through at once; a rank takes its share, rounded up.
        """
        return _Evaluation(rows, batch_size=batch_size, world=world, rank=rank)

    def take(self, rows: npt.ArrayLike, groups: npt.ArrayLike | None = None, *, repeats: bool = False) -> None:
        """Go through these rows from now on. A loader asks for its order when an epoch begins, and so nothing is compiled anew.

        Args:
            rows: (K,) of the data set
            groups: (K,) from 0, the group of each row; None: they are one
            repeats: a row may stand there several times

        Raises:
            Refused: see the class; fewer rows of a group than ranks.
        """
        rows = checked_rows(rows, repeats=repeats)
        if len(rows) < self.world:
            raise Refused(f"rows: {len(rows)} for {self.world} ranks. Keep more images, or start fewer ranks.")
        if groups is not None:
            groups = np.asarray(groups, np.int64)
            if groups.shape != rows.shape:
                raise ValueError(f"{len(rows)} rows, and groups of shape {groups.shape}")
            few = min(size for size in np.bincount(groups) if size)
            if few < self.world:
                raise Refused(
                    f"rows: a group of {few} for {self.world} ranks. Make fewer groups (joint.buckets), or start "
                    "fewer ranks."
                )
        self.rows, self._groups = rows, groups
        self._dealt: tuple[int, list[Step]] | None = None

    @property
    def micro(self) -> int:
        """Images that a rank goes through at once, at most."""
        return self.batch_size // (self.world * self.accumulate)

    @property
    def left_out(self) -> int:
        """Rows that sit each epoch out, others each time, where they are one group."""
        return len(self.rows) % self.world

    def order(self, epoch: int) -> Rows:
        """This rank's rows in epoch ``epoch``, in order. They are gone through in pieces of :meth:`sizes`."""
        return np.concatenate([self._share(step.rows) for step in self.dealt(epoch)])

    def sizes(self, epoch: int) -> list[int]:
        """Images of each micro-batch of this rank: :attr:`micro`, and fewer where a group, or the epoch, ends."""
        sizes: list[int] = []
        for step in self.dealt(epoch):
            full, rest = divmod(len(step.rows) // self.world, self.micro)
            sizes += [self.micro] * full + [rest] * (rest > 0)
        return sizes

    def batches(self, epoch: int = 0) -> list[int]:
        """Micro-batches of each optimizer step of the epoch."""
        return [step.parts for step in self.dealt(epoch)]

    def steps(self, epoch: int = 0) -> int:
        """Optimizer steps of an epoch."""
        return len(self.batches(epoch))

    def dealt(self, epoch: int) -> list[Step]:
        """The optimizer steps of the epoch; of each, every rank has equally many rows."""
        if self._dealt is not None and self._dealt[0] == epoch:
            return self._dealt[1]
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        places = rng.permutation(len(self.rows)) if self.shuffle else np.arange(len(self.rows))
        rows = self.rows[places]
        groups = np.zeros(len(rows), np.int64) if self._groups is None else self._groups[places]
        steps: list[tuple[int, Rows]] = []
        for group in np.unique(groups).tolist():
            mine = rows[groups == group] if self._groups is not None else rows
            steps += [(group, piece) for piece in cut(mine, self.batch_size)]
        if self.shuffle and self._groups is not None:
            steps = [steps[place] for place in rng.permutation(len(steps))]
        even = [(group, piece[: len(piece) - len(piece) % self.world]) for group, piece in steps]
        parts = [ceil(len(piece) // self.world / self.micro) for _, piece in even]
        dealt = [Step(number, *one, many) for number, (one, many) in enumerate(zip(even, parts, strict=True)) if many]
        self._dealt = epoch, dealt
        return dealt

    def _share(self, rows: Rows) -> Rows:
        """This rank's part of a step: of each micro-batch of all ranks its slice, so that who is mixed with whom does not depend on
        how many ranks there are."""
        at_once = self.world * self.micro
        pieces = (rows[at : at + at_once] for at in range(0, len(rows), at_once))
        return np.concatenate([piece.reshape(self.world, -1)[self.rank] for piece in pieces])


class _Evaluation(SamplePlan):
    def __init__(self, rows: npt.ArrayLike, *, batch_size: int, world: int, rank: int) -> None:
        checked = checked_rows(rows, empty=True)
        share = max(1, ceil(batch_size / world))
        # The parent's checks are about equal shares, which evaluation does not need: rows may be fewer than ranks.
        super().__init__(np.arange(world), batch_size=share * world, world=world, rank=rank, shuffle=False)
        self.rows = checked

    def order(self, epoch: int) -> Rows:
        return self.rows[self.rank :: self.world]

    def sizes(self, epoch: int) -> list[int]:
        return [len(piece) for piece in cut(self.order(epoch), self.micro)]

    def batches(self, epoch: int = 0) -> list[int]:
        return [1] * len(self.sizes(epoch))


def balanced(labels: npt.ArrayLike, how: str, *, seed: int, epoch: int) -> Rows:
    """K of the K rows of an epoch, so that each class is seen as often as any other, or by the root of its size.

    A class whose share is larger than it comes in whole rounds, and a random part of it once more. A function of seed and epoch
    alone. Letters: C classes that there are.

    Args:
        labels: (K,) of the rows
        how: ``"equal"``: K / C of each class; ``"sqrt"``: by the root of its size, as Mahajan et al. 2018 (arXiv 1805.00932)
        seed: of the plan
        epoch: from 0

    Returns:
        (K,) places in ``labels``, sorted, some of them several times.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch, _BALANCED]))
    _, of, sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    weights = np.ones(len(sizes)) if how == "equal" else np.sqrt(sizes)
    wanted = len(of) * weights / weights.sum()
    shares = np.floor(wanted + 1e-9).astype(np.int64)
    behind = np.lexsort((rng.random(len(sizes)), -np.round(wanted - shares, 6)))  # ties by chance
    shares[behind[: len(of) - int(shares.sum())]] += 1
    drawn = []
    for rows, share in zip(
        np.split(np.argsort(of, kind="stable"), np.cumsum(sizes)[:-1]), shares.tolist(), strict=True
    ):
        rounds, rest = divmod(share, len(rows))
        drawn += [np.tile(rows, rounds), rng.choice(rows, rest, replace=False)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def cut(rows: Rows, size: int) -> Iterable[Rows]:
    """``rows`` in pieces of ``size``; the last may be smaller."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
