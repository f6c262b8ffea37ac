"""Labels that are likely wrong, and pictures that lie far from all others.

Features are those of Coates, Lee and Ng (AISTATS 2011): whitened patches against centroids, rectified and summed over
quarters. A ridge regression on them says of each image what it would have said without that image, by a closed form; nothing is
trained twice. Of the probabilities confident learning (Northcutt, Jiang, Chuang 2021) makes a verdict.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lotus.inspect.look import SIDE

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

PATCH, STRIDE, CENTROIDS = 6, 2, 256
_BLOCK = 256
_RIDGE = 1e-3
"""Of the mean of the Gram matrix's diagonal."""


def features(small: npt.NDArray[np.uint8], seed: int = 0) -> Floats:
    """(N, 4 * centroids) of pictures (N, S, S, 3)."""
    rng = np.random.default_rng(seed)
    some = _patches(small[np.sort(rng.permutation(len(small))[:2000])]).reshape(-1, 3 * PATCH**2)
    some = some[rng.permutation(len(some))[:50_000]]
    mean = some.mean(0)
    values, vectors = np.linalg.eigh(np.cov(some - mean, rowvar=False))
    white = ((vectors / np.sqrt(np.maximum(values, 0) + 0.1)) @ vectors.T).astype(np.float32)
    centers = _centroids((some - mean) @ white, min(CENTROIDS, len(some)), rng)  # (K, 108)
    return np.concatenate([
        _pooled(_patches(small[at : at + _BLOCK]), mean.astype(np.float32), white, centers)
        for at in range(0, len(small), _BLOCK)
    ])  # fmt: skip


def left_out(x: Floats, labels: Rows, classes: int) -> Floats:
    """(N, C) probabilities of each image by a ridge regression on all others: the hat matrix's diagonal h gives the answer
    without image i as (f - h y) / (1 - h)."""
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1), np.float32)], 1)
    gram = (x.T @ x).astype(np.float64)
    inverse = np.linalg.inv(gram + _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)))
    target = np.eye(classes, dtype=np.float32)[labels]
    solved = (inverse @ (x.T @ target)).astype(np.float32)
    hat = np.einsum("nk,nk->n", x @ inverse.astype(np.float32), x)[:, None]
    scores = (x @ solved - hat * target) / np.maximum(1 - hat, 1e-3)
    sharp = min(np.geomspace(1, 64, 13), key=lambda by: _surprise(scores, labels, float(by)))
    return _softmax(scores * np.float32(sharp))


def confident(probabilities: npt.NDArray[np.floating], labels: Rows) -> tuple[Rows, Rows, Floats]:
    """Confident learning: images of which another class is said at least as surely as usual for that class.

    Returns:
        Rows of likely errors, the worst first; the likelier class of each; and of all images (N,) the normalized margin, the
        label's probability minus the highest other one, by which they are ranked: low is bad.
    """
    count, classes = probabilities.shape
    usual = np.array([
        probabilities[labels == label, label].mean() if (labels == label).any() else np.inf for label in range(classes)
    ])  # fmt: skip
    sure = np.where(probabilities >= usual, probabilities, -1.0)
    likely = sure.argmax(1)
    every = np.arange(count)
    others = np.array(probabilities, copy=True)
    others[every, labels] = -1
    margin = (probabilities[every, labels] - others.max(1)).astype(np.float32)
    wrong = np.flatnonzero((sure.max(1) >= 0) & (likely != labels))
    wrong = wrong[np.argsort(margin[wrong], kind="stable")]
    return wrong, likely[wrong], margin


def aum(margins: npt.NDArray[np.floating]) -> Floats:
    """Area under the margin (Pleiss et al., 2020): the mean over epochs of the label's logit minus the highest other one; of
    (S, E, N) watched margins (N,), low is bad."""
    return margins.astype(np.float32).mean((0, 1))


def far(x: Floats, count: int = 5) -> Floats:
    """(N,) how far each image lies from its ``count`` nearest others: one minus their mean cosine, in 32 principal components."""
    seen = (x - x.mean(0)) / (x.std(0) + 1e-6)
    _, vectors = np.linalg.eigh(seen.T @ seen)
    seen = seen @ vectors[:, -32:]
    seen /= np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-6)
    count = min(count, len(x) - 1)
    found = np.zeros(len(x), np.float32)
    for at in range(0, len(x) if count else 0, 1024):
        near = seen[at : at + 1024] @ seen.T
        near[np.arange(len(near)), np.arange(at, at + len(near))] = -2
        found[at : at + 1024] = 1 - np.partition(near, -count, axis=1)[:, -count:].mean(1)
    return found


def _patches(small: npt.NDArray[np.uint8]) -> Floats:
    """(N, P, 108) of even brightness and contrast."""
    seen = np.lib.stride_tricks.sliding_window_view(small, (PATCH, PATCH), (1, 2))[:, ::STRIDE, ::STRIDE]
    flat = seen.reshape(len(small), -1, 3 * PATCH**2).astype(np.float32)
    flat -= flat.mean(2, keepdims=True)
    return flat / np.sqrt(flat.var(2, keepdims=True) + 10)


def _centroids(white: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Spherical k-means, ten rounds."""
    centers = rng.standard_normal((count, white.shape[1])).astype(np.float32)
    for _ in range(10):
        centers /= np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-6)
        near = white @ centers.T
        nearest = near.argmax(1)
        strength = near[np.arange(len(white)), nearest]
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, white * strength[:, None])
        empty = ~np.isin(np.arange(count), nearest)
        sums[empty] = white[rng.integers(len(white), size=int(empty.sum()))]
        centers = sums
    return centers / np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-6)


def _pooled(patches: Floats, mean: Floats, white: Floats, centers: Floats) -> Floats:
    """How much of each centroid there is in each quarter: what is nearer than the mean, "triangle"."""
    count, side = len(patches), (SIDE - PATCH) // STRIDE + 1
    seen = (patches.reshape(-1, patches.shape[2]) - mean) @ white
    away = np.sqrt(np.maximum((seen**2).sum(1, keepdims=True) + 1 - 2 * (seen @ centers.T), 0))
    there = np.maximum(0, away.mean(1, keepdims=True) - away).reshape(count, side, side, -1)
    half = side // 2
    return np.concatenate([
        there[:, y, x].sum((1, 2)) for y in (slice(half), slice(half, None)) for x in (slice(half), slice(half, None))
    ], 1)  # fmt: skip


def _softmax(scores: Floats) -> Floats:
    raised = np.exp(scores - scores.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def _surprise(scores: Floats, labels: Rows, by: float) -> float:
    told = _softmax(scores * np.float32(by))[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(told, 1e-9)).mean())
