"""Who is near whom, in blocks: what is similar to what, k nearest neighbors, k-means. Never more than a block in memory.

Legend: n images, D width, k neighbors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from selection.gradients import EVERY, Gradients, Index

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

BLOCK = 2**23
"""Numbers in a block: 32 MB of single precision."""

EXACT = 10_000
"""Up to so many images, neighbors are found by comparing all with all; beyond, near lists only (see :func:`nearest`)."""

PROBES = 12
"""Lists that an image looks for its neighbors in, at least."""

RECALL, SAMPLE = 0.9, 200
"""The fraction of the neighbors that must be found, and the images that it is measured on."""

PAIRS = 1e10
"""Similarities that may be computed for the sake of :data:`RECALL`: all of 100,000 images."""


class Kernel(Protocol):
    """How similar images are."""

    most: float
    """How similar an image is to itself: more is not possible."""

    def __len__(self) -> int: ...

    def block(self, rows: Index, columns: Index = EVERY) -> Array:
        """Similarity, higher = more alike: (rows, columns) float32, owned by the caller."""

    def coordinates(self) -> Array:
        """(n, any) float32 in which what is similar is near; for the lists."""


class Cosine:
    """``(1 + cos) / 2`` of the embeddings: 0 to 1."""

    most = 1.0

    def __init__(self, embeddings: Array) -> None:
        self.unit = unit(embeddings)

    def __len__(self) -> int:
        return len(self.unit)

    def block(self, rows: Index, columns: Index = EVERY) -> Array:
        cosines = self.unit[rows] @ self.unit[columns].T
        cosines += 1
        cosines *= 0.5
        return cosines

    def coordinates(self) -> Array:
        return self.unit


class NearGradients:
    """Minus the distance of the gradients: 0 where they are equal."""

    most = 0.0

    def __init__(self, gradients: Gradients, rng: np.random.Generator) -> None:
        self.gradients, self.rng = gradients, rng

    def __len__(self) -> int:
        return len(self.gradients)

    def block(self, rows: Index, columns: Index = EVERY) -> Array:
        distances = self.gradients.squared_distances(rows, columns)
        np.sqrt(distances, out=distances)
        return np.negative(distances, out=distances)

    def coordinates(self) -> Array:
        return self.gradients.sketch(128, self.rng)


def unit(embeddings: Array) -> Array:
    """The embeddings at length 1, float32 (n, D); a zero stays zero."""
    features = np.array(embeddings, dtype=np.float32, order="C")
    norms = np.sqrt(np.einsum("nd,nd->n", features, features))
    features /= np.where(norms > 0, norms, 1)[:, None]
    return features


def slices(n: int, width: int) -> Iterator[slice]:
    """Consecutive parts of n rows, each of at most :data:`BLOCK` numbers where a row has ``width``."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def nearest(kernel: Kernel, k: int, rng: np.random.Generator, *, exact: int = EXACT) -> tuple[Array, Array]:
    """The k most similar images of each, itself first, most similar first.

    Up to ``exact`` images all are compared. Beyond, the images are put in lists around some ``sqrt(n)`` centers, and each is
    compared with those in the lists whose centers are nearest to its own list's: :data:`PROBES` of them, for n = 50,000 a
    twentieth of the work, or as many as it takes to find :data:`RECALL` of the neighbors of a sample. Where embeddings
    cluster, :data:`PROBES` lists find more than 99 in 100; of points with no clusters at all in 64 dimensions they would find
    a quarter, and eight in ten are looked through. Beyond :data:`PAIRS` similarities no lists are added, and a warning
    says what part is found.

    Args:
        kernel: of n images.
        k: 1 to n.
        rng: draws the centers and the sample.
        exact: see above.

    Returns:
        index (n, k) int32 and similarity (n, k) float32.
    """
    n = len(kernel)
    index, similar = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    groups = [(np.arange(n), np.arange(n))] if n <= exact else _lists(kernel, k, rng)
    for members, among in groups:
        for part in slices(len(members), len(among)):
            rows = members[part]
            whole = len(among) == n
            block = kernel.block(rows, EVERY if whole else among)
            own = rows if whole else np.searchsorted(among, rows)
            block[np.arange(len(rows)), own] = np.inf  # first, whatever rounding or a duplicate says
            columns, values = largest(block, k)
            values[:, 0] = kernel.most
            index[rows], similar[rows] = among[columns], values
    return index, similar


def largest(block: Array, k: int) -> tuple[Array, Array]:
    """Columns and values of the k largest of each row, largest first, the lower column first where they tie: (rows, k) each."""
    rows, width = block.shape
    if width > 16 * k:
        # The k-th largest of the maxima of many groups of columns bounds the k-th largest number from below, and few are above
        # it. Maxima go through the block at the speed of memory, which a partition does not.
        groups = 4 * k
        size = width // groups
        maxima = block[:, : groups * size].reshape(rows, size, groups).max(1)
        bar = np.partition(maxima, groups - k, axis=1)[:, groups - k]
    elif width > k:
        bar = np.partition(block, width - k, axis=1)[:, width - k]
    else:
        bar = np.full(rows, -np.inf, block.dtype)
    at = np.flatnonzero(block >= bar[:, None])
    row, column = np.divmod(at, width)
    # Value and column as one number, which sorts many times as fast as two keys do.
    count = np.bincount(row, minlength=rows)
    key = np.full((rows, count.max()), np.iinfo(np.int64).max)
    key[row, np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)] = (
        _falling(block.ravel()[at]) << 32 | column
    )
    key.sort(axis=1)
    found = key[:, :k] & 0xFFFFFFFF
    return found, np.take_along_axis(block, found, 1)


def _falling(values: Array) -> Array:
    """Whole numbers (int64, in 32 bits) that fall as ``values`` (float32, not nan) rise: the bits of a float are in order but for the sign."""
    bits = (values + np.float32(0)).view(np.int32)  # minus zero is zero
    return ~(bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64)


def kmeans(points: Array, k: int, rng: np.random.Generator, *, rounds: int = 20, spread: bool = True) -> Array:
    """Centers (k, D) float32: Lloyd's algorithm on a sample of at most 64 k points, from k-means++ (or any k of them).

    Args:
        points: (n, D).
        k: how many centers.
        rng: draws the sample and where they start.
        rounds: at most; fewer where nothing moves any more.
        spread: start from k-means++ (Arthur and Vassilvitskii 2007), on at most 32,000 of them.
    """
    n = len(points)
    sample = points if n <= 64 * k else points[np.sort(rng.choice(n, 64 * k, replace=False))]
    sample = sample.astype(np.float32, copy=False)
    if spread:
        few = sample if len(sample) <= 32_000 else sample[rng.choice(len(sample), 32_000, replace=False)]
        centers = few[_plus_plus(few, k, rng)]
    else:
        centers = sample[rng.choice(len(sample), k, replace=False)]
    before = None
    for _ in range(rounds):
        belongs = assign(sample, centers)
        if before is not None and np.array_equal(belongs, before):
            break
        before = belongs
        order = np.argsort(belongs, kind="stable")
        filled, first = np.unique(belongs[order], return_index=True)
        parts = np.split(sample[order], first[1:])
        centers[filled] = [
            part.mean(0) for part in parts
        ]  # an empty one stays where it is; reduceat takes four times as long
    return centers


def assign(points: Array, centers: Array) -> Rows:
    """The nearest center of each point: (n,)."""
    half = 0.5 * np.einsum("kd,kd->k", centers, centers)
    found = np.empty(len(points), np.int64)
    for part in slices(len(points), len(centers)):
        closeness = points[part].astype(np.float32, copy=False) @ centers.T
        closeness -= half
        found[part] = closeness.argmax(1)
    return found


def _lists(kernel: Kernel, k: int, rng: np.random.Generator) -> Iterator[tuple[Rows, Rows]]:
    """(members, among): the images of a list, and all those that they are compared with, sorted, at least k."""
    points = kernel.coordinates()
    count = int(np.sqrt(len(points)))
    centers = kmeans(points, count, rng, rounds=3, spread=False)
    belongs = assign(points, centers)
    members = np.split(np.argsort(belongs, kind="stable"), np.cumsum(np.bincount(belongs, minlength=count))[:-1])
    sizes = np.array([len(rows) for rows in members])
    half = 0.5 * np.einsum("kd,kd->k", centers, centers)
    near = np.argsort(half - centers @ centers.T, axis=1, kind="stable")  # lists, nearest first
    least = _probes(kernel, k, belongs, near, rng)
    for number, rows in enumerate(members):
        if len(rows):
            probes = max(least, int(np.searchsorted(np.cumsum(sizes[near[number]]), k)) + 1)
            lists = {number, *near[number][:probes].tolist()}
            yield rows, np.sort(np.concatenate([members[other] for other in lists]))


def _probes(kernel: Kernel, k: int, belongs: Rows, near: Rows, rng: np.random.Generator) -> int:
    """How many lists each image must look in: counted from the true neighbors of a sample.

    Args:
        belongs: the list of each image, (n,).
        near: of each list all lists, the nearest first.
    """
    n, lists = len(belongs), len(near)
    rows = rng.choice(n, min(SAMPLE, n), replace=False)
    place = np.empty_like(near)  # of each list in the order of another
    np.put_along_axis(place, near, np.broadcast_to(np.arange(lists), near.shape), 1)
    found = [np.zeros(0, np.int64)]
    for part in slices(len(rows) if k > 1 else 0, n):
        block = kernel.block(rows[part])
        block[np.arange(len(block)), rows[part]] = -np.inf  # itself is always found
        columns, _ = largest(block, k - 1)
        found.append(place[belongs[rows[part]][:, None], belongs[columns]].ravel())
    needed = np.sort(np.concatenate(found))  # lists before the one that a neighbor lies in
    if not len(needed):
        return PROBES
    wanted = max(PROBES, int(needed[math.ceil(RECALL * len(needed)) - 1]) + 1)
    allowed = max(PROBES, int(PAIRS / n**2 * lists))
    if wanted > allowed:
        warnings.warn(
            f"nearest: of the {k - 1} neighbors of each of {n} images some {np.mean(needed < allowed):.0%} are found: they do not "
            "cluster. Balance the classes, and each is searched through in turn.",
            stacklevel=2,
        )
    return min(wanted, allowed)


def _plus_plus(points: Array, k: int, rng: np.random.Generator) -> Rows:
    """k-means++: each next one by the squared distance to the nearest so far."""
    squares = np.einsum("nd,nd->n", points, points)
    chosen = [int(rng.integers(len(points)))]
    near = np.full(len(points), np.inf, np.float32)
    for _ in range(k - 1):
        last = chosen[-1]
        np.minimum(near, squares + squares[last] - 2 * (points @ points[last]), out=near)
        near[near < 1e-6 * squares] = 0  # rounding, at a duplicate
        weight = np.cumsum(near, dtype=np.float64)
        if weight[-1] > 0:
            chosen.append(
                int(np.searchsorted(weight, rng.random() * weight[-1], side="right").clip(0, len(points) - 1))
            )
        else:  # fewer points that differ than centers
            chosen.append(int(rng.integers(len(points))))
    return np.array(chosen)
