"""SHELF: one function a score. Higher = keep first, always; a direction is never a setting.

Positional parameters name the signals that a score reads (selection/signals.py); keyword-only ones are what a config may
set, with the published default. All give float64 (N,), averaged over seeds; +inf means before all others.

Legend: N images, S seeds, E epochs, D width of the embeddings, C classes, K runs; signals that were watched are (S, E, N).

Scores that look at the embeddings first put the images in an order that follows from the embeddings alone, so that what chance
there is in them (the start of k-means, say) falls to an image and not to its row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from selection import bounds
from selection.errors import Refused
from selection.methods import check_choice
from selection.neighbors import Cosine, assign, kmeans, nearest, slices, unit

Array = npt.NDArray[Any]
Scores = npt.NDArray[np.float64]


def random(labels: Array, *, seed: int = 0) -> Scores:
    """No preference: uniform in [0, 1). The bar for every other score."""
    return np.random.default_rng(seed).random(len(labels))


def given(given: Array) -> Scores:
    """A score from elsewhere, as ``lotus ticket import`` reads it: published ones, or those of other code. Nothing is computed."""
    return np.where(given >= np.finfo(np.float64).max, np.inf, given)


def el2n(error_norm: Array, *, epoch: int = 20, window: int = 1) -> Scores:
    """Norm of the error early in training. Paul, Ganguli and Dziugaite 2021 (arXiv 2107.07075).

    Args:
        error_norm: ||softmax - onehot||_2, (S, E, N).
        epoch: read at the end of this epoch, counted from 1 (the paper: 20 of 200); the last one of a shorter proxy.
        window: mean over so many epochs that end there. Zheng et al. 2023 on ImageNet: ``epoch=10, window=10``.
    """
    bounds.count("el2n", "epoch", epoch, 1)
    bounds.count("el2n", "window", window, 1)
    end = min(epoch, error_norm.shape[1])
    return _mean(error_norm[:, max(0, end - window) : end])


def forgetting(correct: Array) -> Scores:
    """How often it was known and then not. Toneva et al. 2019 (arXiv 1812.05159).

    An event is ``correct`` in one epoch and not in the next. As in the authors' code, a proxy that never learned the image
    counts E events, which is more than any that did can have; an image that no proxy ever learned has +inf.
    Counting such images as never *forgotten* would make the hardest ones the easiest.

    Args:
        correct: bool (S, E, N).
    """

    def of(correct: Array) -> Scores:
        events = (correct[:, :-1] & ~correct[:, 1:]).sum(axis=1).astype(np.float64)  # (S, N)
        learned = correct.any(axis=1)
        score: Scores = np.where(learned, events, correct.shape[1]).mean(axis=0)
        score[~learned.any(axis=0)] = np.inf
        return score

    return _in_parts(of, correct)


def aum(margin: Array, p_label: Array, p_other: Array, *, kind: Literal["logit", "probability"] = "logit") -> Scores:
    """Area under the margin, negated: a small area is a hard (or mislabeled) image. Pleiss et al. 2020 (arXiv 2001.10528).

    Args:
        margin: logit of the label minus the highest other one, (S, E, N).
        p_label: probability of the label, (S, E, N).
        p_other: highest other probability, (S, E, N).
        kind: ``"logit"``, the paper's, or ``"probability"``: the difference of the probabilities (Zheng et al. 2023).
    """
    check_choice(kind, ("logit", "probability"), place="aum(kind)")
    return -_mean(margin) if kind == "logit" else _mean(p_other) - _mean(p_label)


def loss(loss: Array, *, epochs: int = 1) -> Scores:
    """Cross-entropy at the end of the proxy. Coleman et al. 2020 (arXiv 1906.11829) call it the proxy's.

    Args:
        loss: nats, (S, E, N).
        epochs: mean over so many last epochs.
    """
    return _last("loss", loss, epochs)


def entropy(entropy: Array, *, epochs: int = 1) -> Scores:
    """Entropy of the prediction at the end of the proxy; reads no label. Coleman et al. 2020 (arXiv 1906.11829).

    Args:
        entropy: nats, (S, E, N).
        epochs: mean over so many last epochs.
    """
    return _last("entropy", entropy, epochs)


def margin(p_label: Array, p_other: Array, *, epochs: int = 1) -> Scores:
    """How near the label and its strongest rival are, ``-|p_label - p_other|``, at the end of the proxy.

    This is the negated margin of the two most probable classes (Coleman et al. 2020, arXiv 1906.11829) where the label is one
    of the two. Where it is not, the second of them was not recorded, and the label stands in for it.

    Args:
        p_label: probability of the label, (S, E, N).
        p_other: highest other probability, (S, E, N).
        epochs: mean over so many last epochs.
    """
    return -_in_parts(lambda p, other: _last("margin", np.abs(p - other), epochs), p_label, p_other)


def least_confidence(p_label: Array, p_other: Array, *, epochs: int = 1) -> Scores:
    """One minus the highest probability, at the end of the proxy; reads no label. Coleman et al. 2020 (arXiv 1906.11829).

    Args:
        p_label: probability of the label, (S, E, N).
        p_other: highest other probability, (S, E, N).
        epochs: mean over so many last epochs.
    """
    return 1 - _in_parts(lambda p, other: _last("least_confidence", np.maximum(p, other), epochs), p_label, p_other)


def dual(p_label: Array, *, window: int = 10) -> Scores:
    """Difficulty times uncertainty: mean over windows of ``std(p) (1 - mean(p))``. Cho et al. 2025 (arXiv 2502.06905).

    Args:
        p_label: probability of the label, (S, E, N); the paper: 30 epochs of 200 on CIFAR, 60 of 90 on ImageNet.
        window: epochs in a window; all of them in a shorter proxy.

    Raises:
        Refused: fewer than two epochs.
    """
    return _over_windows("dual", p_label, window, lambda p: p.std(axis=0, ddof=1) * (1 - p.mean(axis=0)))


def dyn_unc(p_label: Array, *, window: int = 10) -> Scores:
    """How much the probability of the label moves: mean over windows of its std. He et al. 2024 (arXiv 2306.05175).

    Args:
        p_label: probability of the label, (S, E, N).
        window: epochs in a window; all of them in a shorter proxy.

    Raises:
        Refused: fewer than two epochs.
    """
    return _over_windows("dyn_unc", p_label, window, lambda p: p.std(axis=0, ddof=1))


def tdds(kl_step: Array, *, epochs: int | None = None, window: int = 10, decay: float = 0.9) -> Scores:
    """How unevenly the prediction moves, late windows counting most. Zhang et al. 2024 (arXiv 2311.13613).

    In a window of J epochs the prediction makes J - 1 moves; R is the norm of what they differ from their mean by. The score is
    the sum over windows of ``R * decay * (1 - decay) ** (windows that follow)``.

    Args:
        kl_step: sum over classes of ``|p ln(p / p of the epoch before)|``, (S, E, N); the first epoch's is not read.
        epochs: read so many first epochs; None: all. The paper's pairs (epochs, window), where 30, 50, 70, 80, 90 % go:
            (90, 10), (70, 10), (60, 20), (20, 10), (10, 5).
        window: epochs in a window; all of them in a shorter proxy.

    Raises:
        Refused: fewer than three epochs, which make fewer than two moves.
    """
    if epochs is not None:
        bounds.count("tdds", "epochs", epochs, 3)
    bounds.count("tdds", "window", window, 3)
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay < 1:
        raise Refused(f"tdds(decay={decay!r}): a number between 0 and 1 is wanted.")
    moves = kl_step[:, 1:epochs]  # (S, T - 1, N)
    if moves.shape[1] < 2:
        raise Refused(
            "tdds: compares how a prediction moves, and needs three epochs for that. Watch three epochs or more, or take el2n."
        )
    length = min(window - 1, moves.shape[1])
    windows = moves.shape[1] - length + 1

    def of(moves: Array) -> Scores:
        total = np.zeros(moves.shape[2])
        for number in range(windows):
            inside = moves[:, number : number + length].astype(np.float64)
            uneven = np.sqrt(((inside - inside.mean(axis=1, keepdims=True)) ** 2).sum(axis=1))  # (S, N)
            total += uneven.mean(axis=0) * decay * (1 - decay) ** (windows - 1 - number)
        return total

    return _in_parts(of, moves)


def grand(error_norm: Array, embeddings: Array) -> Scores:
    """Norm of the loss's gradient by the head, at the end of the proxy. Paul, Ganguli and Dziugaite 2021 (arXiv 2107.07075).

    In closed form ``|softmax - onehot| sqrt(|h|^2 + 1)``: weights and bias of the last layer alone, where the paper takes all
    weights, early in training. (At the very start it says little of an image: Kirsch 2023, arXiv 2303.14753.)

    Args:
        error_norm: the last epoch of it, a mean over seeds, (S, E, N).
        embeddings: what the head reads, (N, D); they were recorded of the first seed alone.
    """
    squares = np.empty(len(embeddings))
    for part in slices(*embeddings.shape):
        squares[part] = (embeddings[part].astype(np.float64) ** 2).sum(axis=1)
    return _last("grand", error_norm, 1) * np.sqrt(squares + 1)


def memorization(run_in: Array, run_p_label: Array) -> Scores:
    """How much surer a model is of the image for having been trained on it. Feldman and Zhang 2020 (arXiv 2008.03703).

    The mean probability of its label over runs on random parts of the images that it was in, less that over runs it was not in.
    The paper takes 70 % of the images in each of 2,000 runs; what a few runs say is noisy. Runs that each leave out another part
    (four runs, a quarter each) settle every image with the fewest.

    Args:
        run_in: bool, (K, N).
        run_p_label: probability of the label, or 1 where it is right and 0 (the paper's), (K, N).

    Raises:
        Refused: an image that was in all runs, or in none.
    """
    times = run_in.sum(axis=0)
    lacking = np.flatnonzero((times == 0) | (times == len(run_in)))
    if len(lacking):
        raise Refused(
            f"memorization: {len(lacking)} images, row {lacking[0]} first, were in all of the {len(run_in)} runs or in none. "
            "Let each run leave out another part."
        )

    def of(run_in: Array, run_p_label: Array, times: Array) -> Scores:
        p = run_p_label.astype(np.float64)
        gained: Scores = (p * run_in).sum(axis=0) / times - (p * ~run_in).sum(axis=0) / (len(run_in) - times)
        return gained

    return _in_parts(of, run_in, run_p_label, times)


def moderate(embeddings: Array, labels: Array) -> Scores:
    """Neither typical nor odd: the median distance to the middle of the class comes first. Xia et al., ICLR 2023.

    The middle is the median, coordinate by coordinate. The distances of all images are ranked together; the score is one half
    less how far, in parts of N, the rank is from the middle one. ``top_k`` then keeps the central part, as the paper does.

    Args:
        embeddings: (N, D).
        labels: (N,).
    """
    distance = np.empty(len(labels))
    by_class = np.argsort(labels, kind="stable")
    for rows in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        inside = embeddings[rows]
        columns = (inside[:, some].astype(np.float64) for some in slices(inside.shape[1], len(rows)))
        middle = np.concatenate([np.median(some, axis=0) for some in columns])
        for part in slices(*inside.shape):
            distance[rows[part]] = np.sqrt(((inside[part].astype(np.float64) - middle) ** 2).sum(axis=1))
    order = np.sort(distance)
    below, up_to = np.searchsorted(order, distance, "left"), np.searchsorted(order, distance, "right")
    return 0.5 - np.abs((below + up_to) / (2 * len(labels)) - 0.5)  # equal distances share the mean of their ranks


def ssp(embeddings: Array, labels: Array, *, clusters: int | None = None, seed: int = 0) -> Scores:
    """Far from all prototypes: one minus the cosine to the nearest k-means center. Sorscher et al. 2022 (arXiv 2206.14486).

    Keep the far ones where data are plentiful; where they are few the paper keeps the near ones (the picker ``bottom``).

    Args:
        embeddings: (N, D); the paper takes self-supervised ones (SwAV).
        labels: only how many classes there are.
        clusters: None: as many as classes.
        seed: of the start of k-means.
    """
    if clusters is not None:
        bounds.count("ssp", "clusters", clusters, 1)
    order = _canonical(embeddings)
    features = unit(embeddings[order])
    count = min(len(features), clusters or len(np.unique(labels)))
    centers = unit(kmeans(features, count, np.random.default_rng(seed)))
    belongs = assign(features, centers)
    score = np.empty(len(order))
    for part in slices(*features.shape):
        cosines = (features[part].astype(np.float64) * centers[belongs[part]]).sum(axis=1)
        score[order[part]] = np.maximum(1 - cosines, 0)
    return score


def cal(errors: Array, labels: Array, embeddings: Array, *, neighbors: int = 10, seed: int = 0) -> Scores:
    """Unlike in prediction those it is like in features: contrastive active learning. Margatina et al. 2021 (arXiv 2109.03764).

    The mean over the nearest neighbors of the Kullback-Leibler divergence of the image's prediction from the neighbor's.

    Args:
        errors: softmax minus one-hot label, (N, C).
        labels: (N,), to have the softmax back.
        embeddings: (N, D), compared by cosine.
        neighbors: how many.
        seed: of the lists in which neighbors are looked for where there are more than 20,000 images.
    """
    bounds.count("cal", "neighbors", neighbors, 1)
    order = _canonical(embeddings)
    index, _ = nearest(Cosine(embeddings[order]), min(neighbors + 1, len(order)), np.random.default_rng(seed))
    p = errors[order].astype(np.float32)
    p[np.arange(len(order)), labels[order]] += 1
    p = np.maximum(p, 1e-7)
    logs = np.log(p)
    total = np.zeros(len(order))
    for part in slices(*p.shape):
        for other in index[part, 1:].T:
            total[part] += (p[other] * (logs[other] - logs[part])).sum(axis=1, dtype=np.float64)
    score = np.empty(len(order))
    score[order] = np.maximum(total, 0) / max(1, index.shape[1] - 1)
    return score


def zcore(
    embeddings: Array,
    *,
    draws: int | None = None,
    subspaces: int | None = None,
    neighbors: int = 64,
    exponent: float = 4.0,
    seed: int = 0,
) -> Scores:
    """Covers much and repeats little; reads no label and no training. Griffin, Marks and Corso 2024 (arXiv 2411.15349).

    Again and again: a point is drawn in two random dimensions, in each from the triangle of the least, the median and the highest
    value. The image nearest to it (L1) gains 1. Its neighbors lose 1 between them, in proportion to ``distance ** -exponent``; a
    duplicate loses it alone. In the end all is scaled to 0 to 1.

    The fast form: many points are drawn in each pair of dimensions, so that one tree serves them, and 64 neighbors are looked at,
    where the authors' code sorts all N for each point and takes 1,000. With the fourth power what comes after the 64th is worth
    about a hundredth. Their random starting value is left out: ties are broken by chance anyway.

    Args:
        embeddings: (N, D).
        draws: points in all; None: four an image, at most 1,000,000 (the paper's).
        subspaces: pairs of dimensions; None: one for 32 points, at most 500.
        neighbors: how many of an image lose.
        seed: of the points and the subspaces.
    """
    for setting, value in (("draws", draws), ("subspaces", subspaces), ("neighbors", neighbors)):
        if value is not None:
            bounds.count("zcore", setting, value, 1)
    bounds.number("zcore", "exponent", exponent, 0, 16)
    from sklearn.neighbors import KDTree  # late: a second to import

    rng = np.random.default_rng(seed)
    images, width = embeddings.shape
    order = _canonical(embeddings)
    draws = draws or min(4 * images, 1_000_000)
    subspaces = min(draws, subspaces or max(1, min(draws // 32, 500)))
    total = np.zeros(images)
    for number in range(subspaces):
        points = draws * (number + 1) // subspaces - draws * number // subspaces
        dims = rng.choice(width, min(2, width), replace=False)
        plane = embeddings[:, dims][order].astype(np.float64)
        low, mid, high = plane.min(axis=0), np.median(plane, axis=0), plane.max(axis=0)
        high = np.maximum(high, np.nextafter(low, np.inf))  # a dimension in which nothing differs
        tree = KDTree(plane, metric="manhattan")
        drawn = rng.triangular(low, mid, high, size=(points, len(dims)))
        found, counts = np.unique(tree.query(drawn, k=1, return_distance=False)[:, 0], return_counts=True)
        for part in slices(len(found), 4 * (neighbors + 1)):
            times = counts[part]
            distances, near = tree.query(plane[found[part]], k=min(neighbors + 1, images))
            hits, near, shares = _hit(distances, near, images, exponent)
            np.add.at(total, hits, times)
            np.subtract.at(total, near, shares * times[:, None])
    spread = total.max() - total.min()
    score = np.zeros(images)
    if spread > 0:
        score[order] = (total - total.min()) / spread
    return score


def _hit(distances: Array, near: Array, images: int, exponent: float) -> tuple[Array, Array, Array]:
    """Who gains 1, who loses by it, and how much: (m,), and twice (m, k). Of the k + 1 nearest to each of m images, itself among them."""
    hits = np.where(distances == 0, near, images).min(axis=1)  # of duplicates it is always the same one that gains
    distances[near == hits[:, None]] = -1  # the image itself comes first
    ranked = np.argsort(distances, axis=1, kind="stable")[:, 1:]
    distances, near = np.take_along_axis(distances, ranked, 1), np.take_along_axis(near, ranked, 1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        share = (distances[:, :1] / distances) ** exponent  # relative to the nearest, so that nothing overflows
        share /= share.sum(axis=1, keepdims=True)
    twin = (distances[:, :1] <= 0).any(axis=1)
    share[twin] = 0
    share[twin, :1] = 1
    return hits, near, share


def _canonical(embeddings: Array) -> npt.NDArray[np.int64]:
    """An order of the images that follows from their embeddings alone, whichever rows they stand in."""
    direction = np.random.default_rng(0).standard_normal(embeddings.shape[1])
    key = np.empty(len(embeddings))
    for part in slices(*embeddings.shape):
        # A sum along each row, and no matrix product: that rounds by where a row stands.
        key[part] = (embeddings[part].astype(np.float64) * direction).sum(axis=1)
    return np.argsort(key, kind="stable")


def _mean(watched: Array) -> Scores:
    """Over seeds and epochs, in double precision: (S, E, N) -> (N,)."""
    mean: Scores = watched.mean(axis=(0, 1), dtype=np.float64)
    return mean


def _in_parts(of: Callable[..., Scores], *watched: Array) -> Scores:
    """``of`` what was watched (any, N), of a fraction of the images after the other: none is scored by what is said of another."""
    score = np.empty(watched[0].shape[-1])
    for part in slices(len(score), max(one.size for one in watched) // len(score)):
        score[part] = of(*(one[..., part] for one in watched))
    return score


def _last(method: str, watched: Array, epochs: int) -> Scores:
    bounds.count(method, "epochs", epochs, 1)
    return _mean(watched[:, -epochs:])


def _over_windows(method: str, watched: Array, window: int, of: Callable[[Scores], Scores]) -> Scores:
    """Mean over seeds and all windows of successive epochs of ``of(window)``; ``of``: (J, N) -> (N,)."""
    bounds.count(method, "window", window, 2)
    seeds, epochs, _ = watched.shape
    if epochs < 2:
        raise Refused(
            f"{method}: measures how a prediction moves from epoch to epoch, and there is one. Watch two epochs or more, or take el2n."
        )
    length = min(window, epochs)
    starts = range(epochs - length + 1)

    def over(watched: Array) -> Scores:
        total = np.zeros(watched.shape[2])
        for seed in range(seeds):
            for start in starts:
                total += of(watched[seed, start : start + length].astype(np.float64))
        mean: Scores = total / (seeds * len(starts))
        return mean

    return _in_parts(over, watched)
