"""Facility location over more images than one process holds: greedily in each shard, then greedily among what the shards took.

Mirzasoleiman et al. 2013, "Distributed Submodular Maximization" (GreeDi); Barbosa et al. 2015, "The Power of Randomization"
(RandGreeDi). What is promised: docs/scale.md. Each function works on one shard or one class and needs no other, so any engine
that has a ``map`` runs them.

Legend: n images of a shard, k of them taken, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selection import bounds, incoming
from selection.draws import PICK, QUOTAS
from selection.errors import Refused
from selection.facility import Way, represent
from selection.images import Words
from selection.neighbors import Cosine
from selection.shares import balance_of, quotas
from selection.signals import Signals
from selection.subset import Known, Subset

Rows = npt.NDArray[np.int64]
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""As the builtin ``map`` of one sequence: what an engine gives."""

_SPLIT = 4  # a stream of chance beside those of selection.draws


@dataclass(frozen=True)
class Sharded:
    """What is to be drawn.

    Attributes:
        keep: the fraction that stays, in (0, 1].
        shards: at least so many; files are cut into random parts until there are. 0: one a file.
        over: how many times its share each shard hands on, from 1. At the number of shards it is RandGreeDi to the letter.
        balance: see :func:`selection.shares.quotas`; False: all classes together.
        way: how it is maximized; see :class:`selection.facility.Way`.
        labels: of one file that has none, a file of them.
        say: what refusals call ``labels``.
    """

    keep: float
    shards: int = 0
    over: float = 2.0
    balance: bool | str = True
    seed: int = 0
    way: Way = Way()
    labels: str = ""
    say: Words = field(default_factory=Words)

    def check(self) -> None:
        """
        Raises:
            Refused: a setting that cannot be.
        """
        bounds.number("shards", "keep", self.keep, 0, 1)
        bounds.number("shards", "over", self.over, 1)
        bounds.count("shards", "shards", self.shards, 0)
        if not self.keep:
            raise Refused("shards(keep): 0 is no fraction in (0, 1].")
        self.way.check("facility_location")


class Held(NamedTuple):
    """What is known of a file's images beside their embeddings."""

    labels: Rows
    unlabeled: bool
    fingerprint: str
    classes: tuple[str, ...]
    names: tuple[str, ...] | None


class Part(NamedTuple):
    """A shard: a random part of a file's images, the ``number``-th of ``of``; and how many of each class it hands on at most."""

    file: str
    number: int
    of: int
    quotas: dict[int, float]
    asked: Sharded


class Candidates(NamedTuple):
    """What a shard hands on of a class, and how many of its images each stands for."""

    label: int
    rows: Rows
    embeddings: npt.NDArray[Any]
    stands: npt.NDArray[np.float64]


class Union(NamedTuple):
    """The candidates of a class, of all shards, and how many of them stay."""

    label: int
    budget: int
    embeddings: npt.NDArray[Any]
    stands: npt.NDArray[np.float64]
    asked: Sharded


def held(file_and_asked: tuple[str, Sharded]) -> Held:
    """Labels, fingerprint and names of a file's images.

    Raises:
        Refused: it cannot be read, or has no embeddings; see :func:`selection.incoming.read`.
    """
    given = _read(*file_and_asked)
    own = given.signals
    return Held(own["labels"], own.unlabeled, own.fingerprint, own.classes, given.names)


def first(part: Part) -> list[Candidates]:
    """Of each class in a shard, the images that represent it: ``over`` times its share."""
    signals = _read(part.file, part.asked).signals
    mine = _split(signals.images, part)
    labels = signals["labels"][mine] if part.asked.balance else np.zeros(len(mine), np.int64)
    embeddings = signals["embeddings"]
    found = []
    for label in np.unique(labels).tolist():
        rows = mine[labels == label]
        take = min(len(rows), math.ceil(part.quotas[label] * len(rows) * part.asked.over))
        chance = np.random.default_rng([part.asked.seed, PICK, label, part.number])
        kernel = Cosine(embeddings[rows])
        taken, closest = _represent(kernel, take, chance, part.asked.way)
        stands = np.bincount(closest(taken), minlength=take).astype(np.float64)
        found.append(Candidates(label, rows[taken], embeddings[rows[taken]], stands))
    return found


def second(union: Union) -> Rows:
    """Which of the candidates of a class stay: numbers in ``union``."""
    chance = np.random.default_rng([union.asked.seed, PICK, union.label])
    return _represent(Cosine(union.embeddings), union.budget, chance, union.asked.way, union.stands)[0]


def select(files: Sequence[str], asked: Sharded, run: Map = map) -> tuple[Subset, incoming.Incoming]:
    """Draw exactly ``round(keep * N)`` of the images of all files, which count as one data set in the order they are named.

    Args:
        files: of embeddings, each with its labels.
        asked: how they are drawn.
        run: maps a function over a sequence, here or elsewhere.

    Returns:
        The ticket, and what is known of its images beside their embeddings.

    Raises:
        Refused: a file that cannot be read or has no embeddings, files whose classes differ, a budget below one image a class.
    """
    asked.check()
    if len(set(files)) < len(files):
        raise Refused("shards: a file is named twice. Name each once.")
    about = list(run(held, [(file, asked) for file in files]))
    signals = _as_one(files, about)
    quota, sizes = _budget(signals["labels"], asked)
    parts = max(1, math.ceil(asked.shards / len(files)))
    share = {label: quota[label] / sizes[label] for label in quota}
    jobs = [Part(file, number, parts, share, asked) for file in files for number in range(parts)]
    begins = dict(zip(files, np.cumsum([0, *[len(one.labels) for one in about]]).tolist()))
    handed = _handed(jobs, run, begins)
    places = {label: np.concatenate([rows for rows, _ in some]) for label, some in handed.items()}
    unions = [_union(label, quota[label], [one for _, one in some], asked) for label, some in handed.items()]
    taken = np.concatenate([places[of.label][chosen] for of, chosen in zip(unions, run(second, unions), strict=True)])
    told = f"{len(jobs)} shards handed on {sum(map(len, places.values())):,} images"
    return _ticket(taken, signals, asked, len(jobs)), incoming.Incoming(signals, _names(about), (told,))


def _handed(jobs: Sequence[Part], run: Map, begins: Mapping[str, int]) -> dict[int, list[tuple[Rows, Candidates]]]:
    """Of each class, what the shards hand on, with the rows of all files together."""
    handed: dict[int, list[tuple[Rows, Candidates]]] = {}
    for job, found in zip(jobs, run(first, jobs), strict=True):
        for one in found:
            handed.setdefault(one.label, []).append((one.rows + begins[job.file], one))
    return dict(sorted(handed.items()))


def _names(about: Sequence[Held]) -> tuple[str, ...] | None:
    """The names of the images of all files; None where one knows none."""
    return tuple(name for one in about for name in one.names or ()) if all(one.names for one in about) else None


def _ticket(taken: Rows, signals: Signals, asked: Sharded, shards: int) -> Subset:
    origin = {
        "score": {"name": "random"},
        "pick": {"name": "facility_location", "shards": shards, "over": asked.over},
        "balance": asked.balance,
        "seed": asked.seed,
    }
    known = Known(None if signals.unlabeled else signals["labels"], signals.classes)
    return Subset(
        taken, signals.images, fingerprint=signals.fingerprint, keep=float(asked.keep), origin=origin, known=known
    )


def _union(label: int, budget: int, candidates: Sequence[Candidates], asked: Sharded) -> Union:
    embeddings = np.concatenate([one.embeddings for one in candidates])
    return Union(label, budget, embeddings, np.concatenate([one.stands for one in candidates]), asked)


def _represent(
    kernel: Cosine, budget: int, chance: np.random.Generator, way: Way, stands: npt.NDArray[np.float64] | None = None
) -> tuple[Rows, Callable[[Rows], Rows]]:
    if budget == len(kernel):
        return np.arange(budget), lambda of: np.arange(budget)
    return represent("facility_location", kernel, budget, chance, [], way, stands)


def _read(file: str, asked: Sharded) -> incoming.Incoming:
    given = incoming.read(file, labels=asked.labels, only={"labels", "embeddings"}, say=asked.say)
    if "embeddings" not in given.signals:
        raise Refused(
            f"{file}: has no embeddings, and shards are compared by them. One number an image needs no shards."
        )
    return given


def _split(images: int, part: Part) -> Rows:
    """The rows of a part: each image is dealt to one of them, whichever by the seed."""
    dealt = np.random.default_rng([part.asked.seed, _SPLIT]).permutation(images)
    return np.sort(dealt[part.number :: part.of])


def _budget(labels: Rows, asked: Sharded) -> tuple[dict[int, int], dict[int, int]]:
    """How many images of each class stay, and how many there are; one class where they are not balanced."""
    share, budget = balance_of(asked.balance, "shards(balance)"), round(asked.keep * len(labels))
    if not share:
        labels = np.zeros(len(labels), np.int64)
    classes, sizes = np.unique(labels, return_counts=True)
    if budget < len(classes):
        raise Refused(
            f"shards(keep): {budget} of {len(labels)} images is fewer than {len(classes)} classes. Keep at least "
            f"{len(classes) / len(labels):.2g}, or do not balance the classes."
        )
    each = quotas(sizes, budget, np.random.default_rng([asked.seed, QUOTAS]), share or "fraction")
    names = classes.tolist()
    return dict(zip(names, each.tolist(), strict=True)), dict(zip(names, sizes.tolist(), strict=True))


def _as_one(files: Sequence[str], about: Sequence[Held]) -> Signals:
    """What is known of the images of all files but their embeddings.

    Raises:
        Refused: their classes differ.
    """
    for file, one in zip(files, about, strict=True):
        if one.classes != about[0].classes or one.unlabeled != about[0].unlabeled:
            raise Refused(f"{file}: has other classes than {files[0]}. Give each file the names of all, in one order.")
    together = hashlib.blake2b("\n".join(one.fingerprint for one in about).encode(), digest_size=12).hexdigest()
    return Signals(
        {"labels": np.concatenate([one.labels for one in about])},
        fingerprint=about[0].fingerprint if len(about) == 1 else together,
        classes=about[0].classes,
        place=files[0],
        unlabeled=about[0].unlabeled,
    )
