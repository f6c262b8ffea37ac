"""SHELF: one function a policy: which of n images stay, given what a score says of them.

A picker is handed one class at a time where classes are balanced (selection/lottery.py), else all images. It reads, by
parameter name:

* ``scores`` (n,) float64, higher = keep first, may hold +inf;
* ``ranking`` (n,) int64: the n rows, highest score first, ties in random order. Pickers do not sort scores themselves;
* ``budget``: how many rows it must return, 1 to n;
* ``keep``: the part of the whole data set that stays, in (0, 1];
* ``rng``: the one source of chance;
* ``quotas`` (C,) int64: how many of each class, in the order of their labels, or None where classes are not balanced. A picker that reads
  it is handed all images at once, and keeps the quotas itself;
* ``start`` (s,) int64: rows that are in already, from a ticket to start from; at most ``budget`` of them, and often none. A
  picker that does not read it is handed the rows that are not in yet, and the smaller budget and quotas;
* any signal, of these n images, e.g. ``labels`` (n,), ``embeddings`` (n, D), ``errors`` (n, C), ``p_label`` (S, E, n).

It returns ``budget`` distinct rows in [0, n), or those and their positive weights. A weight is a number of images: 1 stands for
itself alone. Whoever calls a picker keeps ``budget`` within 1 and n, ``start`` within ``budget`` (selection/lottery.py does).

Those that look at the embeddings shuffle the images first, so that ties (duplicates, say) are broken by chance and not by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from selection.errors import Refused
from selection.gradients import EVERY, Gradients, Index, need_batches, need_products
from selection.memory import within
from selection.methods import check_choice
from selection.neighbors import Cosine, Kernel, NearGradients, nearest, slices, unit
from selection.submodular import (
    FacilityLocation,
    FarthestFirst,
    GraphCut,
    LogDet,
    SparseFacilityLocation,
    dense,
    in_rounds,
    lazy,
    need,
    need_sparse,
    neighborhood,
    stochastic,
)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Maximiser = Literal["auto", "lazy", "sparse", "stochastic"]

# Zheng et al. 2023, grid search on ImageNet-1k: the part cut off, by the part that is *not* kept. On CIFAR-10 they cut less
# (0, 0, 0.1, 0.1, 0.3), on CIFAR-100 more (0.1, 0.2, 0.2, 0.4, 0.5).
CCS_DROPPED = (0.3, 0.5, 0.7, 0.8, 0.9)
CCS_CUT = (0.0, 0.1, 0.2, 0.2, 0.3)

_LARGE = 1e-6 * float(np.finfo(np.float64).max)


def top_k(ranking: Rows, budget: int) -> Rows:
    """The highest scores. For difficulty scores it is worse than chance where less than half stays (Zheng et al. 2023)."""
    return ranking[:budget]


def bottom(ranking: Rows, budget: int) -> Rows:
    """The lowest scores: of difficulty scores the easy images, which Sorscher et al. 2022 (arXiv 2206.14486) keep where data are few."""
    return ranking[len(ranking) - budget :]


def middle(ranking: Rows, budget: int, *, at: float = 0.5) -> Rows:
    """A stretch of the ranking. With the score ``moderate`` use ``top_k``; this does as much for any other.

    Args:
        at: where it lies, 0 (the highest scores) to 1 (the lowest).
    """
    _number("middle", "at", at, 0, 1)
    first = round(at * (len(ranking) - budget))
    return ranking[first : first + budget]


def double_end(ranking: Rows, budget: int, keep: float, *, cut: float | None = None) -> Rows:
    """Drop the hardest, which may be mislabelled, and keep the hardest of the rest. Zheng et al. 2025, ELFS (arXiv 2406.04273).

    Args:
        cut: part of the n images to drop; None: a third of the part that goes. (Where a tenth stays, the paper's grid search
            found 0.4 for CIFAR-10 and 0.3 for ImageNet.)

    Raises:
        Refused: a cut that leaves fewer images than are to stay.
    """
    dropped = _dropped("double_end", (1 - keep) / 3 if cut is None else cut, keep, len(ranking), budget)
    return ranking[dropped : dropped + budget]


def window(
    ranking: Rows,
    labels: Rows,
    embeddings: Array,
    budget: int,
    quotas: Rows | None,
    *,
    step: float = 0.05,
    ridge: float = 1.0,
) -> Rows:
    """The stretch of the ranking that teaches a linear model most. Choi et al. 2024, Best Window Selection.

    Windows of ``budget`` images start at every ``step`` of the ranking. On each, a ridge regression of the one-hot labels on the
    embeddings is fitted; the one that tells most of *all* n images right wins, among equals the one with the least squared error.
    Where classes are balanced, a window is the same stretch of every class' own ranking.

    Args:
        quotas: (C,) how many of each class, in the order of their labels; None: windows of the ranking of all.
        step: part of the images from one window to the next.
        ridge: of the regression; embeddings have length 1.
    """
    _number("window", "step", step, 1e-6, 1)
    _number("window", "ridge", ridge, 1e-12, math.inf)
    classes, truth = np.unique(labels, return_inverse=True)
    stretches = [(ranking, budget)]
    if quotas is not None:
        stretches = [(ranking[truth[ranking] == place], int(quota)) for place, quota in enumerate(quotas)]
    found: list[tuple[int, float, int]] = []
    windows: list[Rows] = []
    for at in (*np.arange(0, 1 - budget / len(ranking), step), 1.0):
        firsts = [min(round(at * len(line)), len(line) - quota) for line, quota in stretches]
        rows = np.concatenate([line[at : at + quota] for (line, quota), at in zip(stretches, firsts, strict=True)])
        inside = _with_one(embeddings[rows]).astype(np.float64)
        sums = np.stack([inside[truth[rows] == place].sum(0) for place in range(len(classes))])  # (C, D + 1)
        weights = np.linalg.solve(inside.T @ inside + ridge * np.eye(inside.shape[1]), sums.T).astype(np.float32)
        right, error = 0, 0.0
        for part in slices(len(truth), embeddings.shape[1] + len(classes)):
            told, said = truth[part], _with_one(embeddings[part]) @ weights
            right += int((said.argmax(1) == told).sum())
            error += float((said**2).sum() - 2 * said[np.arange(len(told)), told].sum())
        found.append((-right, error, len(windows)))
        windows.append(rows)
    return windows[min(found)[2]]


def _with_one(embeddings: Array) -> npt.NDArray[np.float32]:
    """Embeddings of length 1, and a column of ones beside them."""
    return np.pad(unit(embeddings), ((0, 0), (0, 1)), constant_values=1.0)


def random(labels: Rows, budget: int, rng: np.random.Generator) -> Rows:
    """Any, all alike, whatever the score says. The bar for every other policy."""
    return rng.choice(len(labels), budget, replace=False)


def ccs(
    scores: Floats,
    ranking: Rows,
    budget: int,
    keep: float,
    rng: np.random.Generator,
    *,
    cut: float | None = None,
    bins: int = 50,
    binning: Literal["width", "quantile"] = "width",
) -> Rows:
    """Coverage-centric: drop the hardest, then draw evenly along the score. Zheng et al. 2023 (arXiv 2210.15809), alg. 1.

    1. Drop the ``cut * n`` highest scores (floor).
    2. Divide the rest into bins by score.
    3. Go through the bins from the smallest to the largest; each gives all it has, or an even share of what is still to be
       drawn (floor), whichever is less.
    4. Draw uniformly inside a bin.

    Args:
        scores: hardest first. +inf joins the hardest bin that is left.
        cut: part of the n images to drop as too hard; None: the published one for ImageNet, in between by interpolation.
        bins: number of strata; no more than the budget, for the floor of step 3 would leave the smallest with nothing.
        binning: ``"width"``: equally wide in score, the paper's; ``"quantile"``: equally many images, for scores with outliers.

    Raises:
        Refused: a cut that leaves fewer images than are to stay.
    """
    _count("ccs", "bins", bins, 1)
    dropped = _dropped("ccs", _ccs_cut(keep) if cut is None else cut, keep, len(scores), budget)
    rest = ranking[dropped:]
    bins = min(bins, budget)
    stratum = _strata(scores[rest], bins, binning)
    sizes = np.bincount(stratum, minlength=bins)
    chosen, left = [], budget
    for visited, bin_ in enumerate(np.argsort(sizes, kind="stable")):
        share = min(int(sizes[bin_]), left // (bins - visited))
        chosen.append(rng.choice(rest[stratum == bin_], share, replace=False))
        left -= share
    return np.concatenate(chosen)


def beta(
    scores: Floats,
    p_label: npt.NDArray[np.floating],
    budget: int,
    keep: float,
    rng: np.random.Generator,
    *,
    c_d: float = 4.0,
) -> Rows:
    """Draw by score times a Beta density that moves to easier images as fewer stay. Cho et al. 2025 (arXiv 2502.06905).

    P(i) is proportional to ``score_i * Beta(p_i; 16 - b, b)`` with ``b = 15 (1 - mu) (1 - r ** c_d)``, where p is the image's
    mean probability of its label, mu the mean of p over the ten highest scores and r the part that goes. Made for ``dual``.

    Args:
        scores: not negative; +inf counts as the highest finite one.
        p_label: (S, E, n).
        c_d: 4 for CIFAR (the authors' code), 11 for ImageNet.

    Raises:
        Refused: a negative score, which cannot be a probability.
    """
    if isinstance(c_d, bool) or not isinstance(c_d, (int, float)) or not 0 < c_d < np.inf:
        raise Refused(f"beta(c_d={c_d!r}): a positive number is wanted.")
    if scores.min() < 0:
        raise Refused(
            f"beta: draws in proportion to the score, and there is one of {scores.min():g}. Take dual, el2n, loss."
        )
    easy = p_label.mean(axis=(0, 1), dtype=np.float64)
    easy = easy.clip(1e-6, 1 - 1e-6)  # the density has poles at 0 and 1
    mu = easy[np.argpartition(-scores, min(10, len(scores)) - 1)[:10]].mean()
    b = 15 * (1 - mu) * (1 - (1 - keep) ** c_d)
    logs = np.log(np.maximum(_finite(scores), np.finfo(np.float64).tiny))
    logs += (15 - b) * np.log(easy) + (b - 1) * np.log1p(-easy)
    # The budget highest of log-weight plus Gumbel noise are a draw one by one without replacement, with no underflow.
    keys = logs + rng.gumbel(size=len(logs))
    return np.argpartition(-keys, budget - 1)[:budget]


def herding(embeddings: Array, budget: int, rng: np.random.Generator, start: Rows) -> Rows:
    """One by one the image that brings the mean of those taken nearest to the mean of all. Welling 2009.

    Image t + 1 is the *nearest* to ``(t + 1) mean - sum``, where the sum is over the t that are taken. One product of a matrix
    and a vector a pick.
    """
    order, chosen = _shuffled(len(embeddings), rng, start)
    features = embeddings[order].astype(np.float32)
    half = 0.5 * np.einsum("nd,nd->n", features, features)
    mean = features.mean(0, dtype=np.float64)
    rest = len(chosen) * mean - features[chosen].sum(0, dtype=np.float64)  # what the sum lacks
    half[chosen] = np.inf
    while len(chosen) < budget:
        rest += mean
        closeness = features @ rest.astype(np.float32)
        closeness -= half  # up to a constant, minus half the squared distance
        best = int(closeness.argmax())
        rest -= features[best]
        half[best] = np.inf
        chosen.append(best)
    return order[chosen]


def k_center(embeddings: Array, budget: int, rng: np.random.Generator, start: Rows) -> Rows:
    """The farthest from all that are taken, one by one, from the image nearest to the mean (or from a ticket) on.

    Sener and Savarese 2018 (arXiv 1708.00489), the greedy form: the largest distance to a taken image is at most twice what is
    possible. It seeks outliers. Of the distances, only the least for each image is kept. Nothing in it is drawn: the seed decides
    between equal distances alone, and several seeds tell no more than one.
    """
    order, chosen = _shuffled(len(embeddings), rng, start)
    greedy = FarthestFirst(embeddings[order].astype(np.float32))
    if not chosen:
        mean = greedy.features.mean(0, dtype=np.float64).astype(np.float32)
        chosen = [int((greedy.squares - 2 * (greedy.features @ mean)).argmin())]
    greedy.begin(np.array(chosen))
    return order[in_rounds(greedy, budget, chosen)]


def facility_location(
    embeddings: Array,
    budget: int,
    rng: np.random.Generator,
    start: Rows,
    *,
    maximiser: Maximiser = "auto",
    neighbors: int | None = None,
    epsilon: float = 0.05,
    max_memory: float = 0.5,
) -> Rows:
    """So that each image has one like it among those taken: the most of ``sum_i max_{j in S} (1 + cos_ij) / 2``.

    Args:
        maximiser: ``"lazy"``: exactly greedy, with all n^2 similarities in memory; ``"sparse"``: exactly greedy over the nearest
            neighbours of each image only; ``"stochastic"``: greedy among a random few; ``"auto"``: lazy where ``max_memory``
            allows, else sparse.
        neighbors: for sparse; None: 32, or twice ``n / budget`` where that is more, so that neighbourhoods overlap.
        epsilon: for stochastic: the part of the value that may be lost.
        max_memory: GB. What would take more is refused before it is begun.

    Raises:
        Refused: it does not fit; says what it takes, and the cure.
    """
    order, chosen = _shuffled(len(embeddings), rng, start)
    kernel = Cosine(embeddings[order])
    rows, _ = _represent("facility_location", kernel, budget, rng, chosen, maximiser, neighbors, epsilon, max_memory)
    return order[rows]


def graph_cut(embeddings: Array, budget: int, rng: np.random.Generator, start: Rows, *, coverage: float = 1.0) -> Rows:
    """Like all, and unlike one another: the most of ``coverage sum_i sum_{j in S} s_ij - sum_{j,l in S} s_jl``.

    With ``s = (1 + cos) / 2``. Exactly greedy; needs no matrix. The value can fall once more than half of the images are taken,
    unless ``coverage`` is at least 2 (Iyer et al. 2021, arXiv 2006.15412).
    """
    _number("graph_cut", "coverage", coverage, 0, math.inf)
    order, chosen = _shuffled(len(embeddings), rng, start)
    greedy = GraphCut(unit(embeddings[order]), float(coverage))
    greedy.begin(np.array(chosen, np.int64))
    return order[in_rounds(greedy, budget, chosen)]


def log_det(embeddings: Array, budget: int, rng: np.random.Generator, start: Rows, *, ridge: float = 1.0) -> Rows:
    """The largest volume: the most of ``log det(I + K / ridge)``, K the cosines among those taken.

    The most probable set of a determinantal point process, greedily (Chen et al. 2018, arXiv 1709.05135).

    Args:
        ridge: the less, the more a direction that is spanned already counts for nothing.
    """
    _number("log_det", "ridge", ridge, 1e-6, math.inf)
    order, chosen = _shuffled(len(embeddings), rng, start)
    greedy = LogDet(unit(embeddings[order]), float(ridge))
    greedy.begin(np.array(chosen, np.int64))
    return order[in_rounds(greedy, budget, chosen, group=128, most=1024)]


def d2(
    scores: Floats,
    ranking: Rows,
    embeddings: Array,
    budget: int,
    keep: float,
    rng: np.random.Generator,
    *,
    neighbors: int = 5,
    gamma_forward: float = 1.0,
    gamma_reverse: float = 0.1,
    cut: float | None = None,
) -> Rows:
    """Hard images from all over: scores spread along a graph of neighbours. Maharana et al. 2024 (arXiv 2310.07931).

    1. Each image adds its neighbours' scores to its own, times ``exp(-gamma_forward d)``.
    2. The highest is taken, and takes ``exp(-gamma_reverse d)`` times its score from its neighbours; again and again.

    d is the distance of embeddings of length 1. Scores count from the lowest, which is 0.

    Args:
        scores: hardest first; +inf counts as the highest finite one.
        neighbors, gamma_forward, gamma_reverse: the paper searches 1 to 15, and 0 to 1 for the last.
        cut: part of the n images to drop as too hard before; None: as in ``ccs``, which the authors' code combines it with.

    Raises:
        Refused: a cut that leaves fewer images than are to stay.
    """
    _count("d2", "neighbors", neighbors, 1)
    _number("d2", "gamma_forward", gamma_forward, 0, math.inf)
    _number("d2", "gamma_reverse", gamma_reverse, 0, math.inf)
    rest = ranking[_dropped("d2", _ccs_cut(keep) if cut is None else cut, keep, len(scores), budget) :]
    index, similar = nearest(Cosine(embeddings[rest]), min(neighbors + 1, len(rest)), rng)
    index, distances = index[:, 1:], np.sqrt(np.maximum(4 * (1 - similar[:, 1:]), 0))  # |a - b|^2 = 2 - 2 cos
    message = _finite(scores)[rest]
    message = message - message.min()
    message = message + (np.exp(-gamma_forward * distances) * message[index]).sum(1)
    share = np.exp(-gamma_reverse * distances)
    chosen = np.empty(budget, np.int64)
    for number in range(budget):
        best = int(message.argmax())
        message[index[best]] -= share[best] * message[best]
        message[best] = -np.inf
        chosen[number] = best
    return rest[chosen]


def craig(
    errors: Array,
    embeddings: Array,
    budget: int,
    rng: np.random.Generator,
    start: Rows,
    *,
    maximiser: Maximiser = "auto",
    neighbors: int | None = None,
    epsilon: float = 0.05,
    max_memory: float = 0.5,
) -> tuple[Rows, Floats]:
    """So that each image's gradient has one like it among those taken. Mirzasoleiman et al. 2020 (arXiv 1906.01827).

    Facility location over the distances of the head's gradients. The weight of an image is how many it stands for: those to
    which it is the nearest of all taken, itself included.

    Args:
        errors, embeddings: of which the gradient is the outer product; see selection/gradients.py.
        maximiser, neighbors, epsilon, max_memory: as of ``facility_location``.

    Raises:
        Refused: it does not fit into ``max_memory``; says what it takes, and the cure.
    """
    order, chosen = _shuffled(len(errors), rng, start)
    kernel = NearGradients(Gradients(errors[order], embeddings[order]), rng)
    rows, closest = _represent("craig", kernel, budget, rng, chosen, maximiser, neighbors, epsilon, max_memory)
    belongs = closest(rows)
    belongs[rows] = np.arange(budget)  # of two that are equal, each stands for itself
    return order[rows], np.bincount(belongs, minlength=budget).astype(np.float64)


def grad_match(
    errors: Array,
    embeddings: Array,
    budget: int,
    rng: np.random.Generator,
    *,
    ridge: float = 0.5,
    by: Literal["image", "batch"] = "image",
    batch: int = 32,
    at_once: int | None = None,
    max_memory: float = 0.5,
) -> tuple[Rows, Floats]:
    """Images and weights whose gradients add up to that of all. Killamsetty et al. 2021 (arXiv 2103.00123), algorithm 2.

    Orthogonal matching pursuit on ``|sum_i w_i g_i - sum of all|^2 + ridge |w|^2``: take what points most along what is missing,
    fit the weights of all that are taken, again; in the end fit them once more, none below 0. What then would weigh nothing
    weighs a hundredth of the mean: the budget is the budget.

    Args:
        errors, embeddings: of which the gradient is the outer product; see selection/gradients.py.
        by: ``"image"``, or ``"batch"``: whole random batches are taken, with one weight each (the paper's PB form).
        batch: images in one.
        at_once: how many are taken before the weights are fitted again; None: as many as make 300 fits.
        max_memory: GB, for the inner products among those taken.

    Raises:
        Refused: it does not fit into ``max_memory``; says what it takes, and the cure.
    """
    _number("grad_match", "ridge", ridge, 0, math.inf)
    _count("grad_match", "batch", batch, 1)
    if at_once is not None:
        _count("grad_match", "at_once", at_once, 1)
    check_choice(by, ("image", "batch"), place="grad_match(by)")
    n = len(errors)
    order = rng.permutation(n)
    if by == "batch":
        size = min(batch, budget)
        picks = math.ceil(budget / size)
        within(
            max_memory,
            need_batches(n, budget, size, errors.shape[1], embeddings.shape[1]),
            f"grad_match: the gradients of {n} images in batches of {size}",
            "Take larger batches, balance the classes",
        )
        parts = [order[first : first + size] for first in range(0, n, size)]
        if len(parts[-1]) < size and len(parts) > 1:  # a short one cannot be the whole of what is left to take
            parts[-2:] = [np.concatenate(parts[-2:])]
        matrix = np.stack([Gradients(errors[rows], embeddings[rows]).total().ravel() for rows in parts]).astype(
            np.float64
        )
        target = matrix.sum(0)
        picked, weights = _pursue(
            matrix @ target,
            lambda rows, columns: matrix[rows] @ matrix[columns].T,
            lambda rows, w, of: matrix[of] @ (w @ matrix[rows]),
            min(picks, len(parts)),
            ridge,
            at_once or 1,
        )
        rows = np.concatenate([parts[number] for number in picked])[:budget]
        return rows, np.repeat(weights, [len(parts[number]) for number in picked])[:budget]
    within(
        max_memory,
        need_products(budget),
        f"grad_match: the inner products of {budget} gradients",
        "Balance the classes, take by=batch",
    )
    gradients = Gradients(errors[order], embeddings[order])
    missing = gradients.total()
    if missing.size > n and need(n) <= max_memory:  # many classes: the products of all with all are less work
        inner = gradients.inner(EVERY)
        picked, weights = _pursue(
            inner.sum(1, dtype=np.float64),
            lambda rows, columns: inner[np.ix_(rows, columns)],
            lambda rows, w, of: inner[of][:, rows] @ w.astype(np.float32),
            budget,
            ridge,
            at_once or math.ceil(budget / 300),
        )
    else:
        picked, weights = _pursue(
            gradients.along(missing),
            lambda rows, columns: gradients.inner(rows, columns, dtype=np.float64),
            lambda rows, w, of: gradients.along(gradients.total(rows, w), of),
            budget,
            ridge,
            at_once or math.ceil(budget / 300),
        )
    return order[picked], weights


def glister(
    errors: Array,
    embeddings: Array,
    labels: Rows,
    budget: int,
    rng: np.random.Generator,
    *,
    step: float = 0.001,
    rounds: int = 100,
) -> Rows:
    """What lowers the loss most when it is trained on. Killamsetty et al. 2021 (arXiv 2012.10630), with the Taylor approximation.

    In each round the images whose gradients point most along that of the loss over all n are taken, the head makes the step of
    gradient descent that they stand for, and the gradient of the loss is computed anew. Without a validation set that loss is
    the training loss, as in the paper's variant.

    Args:
        errors, embeddings: of which the gradient is the outer product; see selection/gradients.py.
        step: of the head along one image's gradient: a learning rate over a batch size, 0.1 over 128.
        rounds: how often the gradient is computed anew.
    """
    _number("glister", "step", step, 0, math.inf)
    _count("glister", "rounds", rounds, 1)
    order = rng.permutation(len(errors))
    gradients = Gradients(errors[order], embeddings[order])
    onehot = (np.arange(len(order)), labels[order])
    probabilities = gradients.errors.copy()
    probabilities[onehot] += 1
    logits = np.log(np.maximum(probabilities, 1e-8))  # up to a constant an image, which softmax does not see
    direction = gradients.total()
    free = np.ones(len(order), bool)
    chosen: list[int] = []
    size = math.ceil(budget / rounds)
    while len(chosen) < budget:
        gain = np.where(free, gradients.along(direction), -np.inf)
        taken = _highest(gain, min(size, budget - len(chosen)))
        chosen.extend(taken.tolist())
        free[taken] = False
        logits -= gradients.features @ (step * gradients.total(taken)).T
        now = np.exp(logits - logits.max(1, keepdims=True))
        now /= now.sum(1, keepdims=True)
        now[onehot] -= 1
        direction = (gradients.features.T @ now).T
    return order[chosen]


def _shuffled(n: int, rng: np.random.Generator, start: Rows) -> tuple[Rows, list[int]]:
    """The rows in random order, and where those of ``start`` stand in it."""
    order = rng.permutation(n)
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    return order, place[np.asarray(start, np.int64)].tolist()


def _represent(
    method: str,
    kernel: Kernel,
    budget: int,
    rng: np.random.Generator,
    start: list[int],
    maximiser: Maximiser,
    neighbors: int | None,
    epsilon: float,
    max_memory: float,
) -> tuple[Rows, Callable[[Rows], Rows]]:
    """Facility location over ``kernel``: the rows, and a function that says which of them (its number) each image is nearest to."""
    check_choice(maximiser, get_args(Maximiser), place=f"{method}(maximiser)")
    _number(method, "epsilon", epsilon, 1e-6, 1 - 1e-6)
    _number(method, "max_memory", max_memory, 0, math.inf)
    if neighbors is not None:
        _count(method, "neighbors", neighbors, 1)
    n = len(kernel)
    if maximiser == "auto":
        maximiser = "lazy" if need(n) <= max_memory else "sparse"
    if maximiser == "lazy":
        what = f"{method}: the similarities of {n} images with one another"
        within(max_memory, need(n), what, "Take maximiser=sparse, balance the classes")
        similar = dense(kernel)
        rows = lazy(FacilityLocation(kernel, similar), budget, order=np.arange(n), start=start)
        return np.array(rows), lambda of: similar[of].argmax(0)
    if maximiser == "stochastic":
        matrix = dense(kernel) if need(n) <= max_memory else None
        rows = stochastic(FacilityLocation(kernel, matrix), budget, rng, epsilon=epsilon, start=start)
        return np.array(rows), lambda of: _closest(kernel, of, np.arange(n))
    k = neighborhood(n, budget, neighbors)
    what = f"{method}: the {k - 1} nearest of each of {n} images"
    within(max_memory, need_sparse(n, k), what, "Take fewer neighbors, maximiser=stochastic, balance the classes")
    index, similar = nearest(kernel, k, rng)
    greedy = SparseFacilityLocation(index, similar)
    greedy.begin(np.array(start, np.int64))
    rows = in_rounds(greedy, budget, list(start))

    def closest(of: Rows) -> Rows:
        number = np.full(n, -1)
        number[of] = np.arange(len(of))
        known = number[index] >= 0  # neighbours are in order, the most similar first
        found: Rows = number[index[np.arange(n), known.argmax(1)]]
        alone = np.flatnonzero(~known.any(1))
        found[alone] = _closest(kernel, of, alone)
        return found

    return np.array(rows), closest


def _closest(kernel: Kernel, of: Rows, rows: Rows) -> Rows:
    """The number in ``of`` of the one most similar to each of ``rows``."""
    found = np.empty(len(rows), np.int64)
    for part in slices(len(rows), len(of)):
        found[part] = kernel.block(rows[part], of).argmax(1)
    return found


def _pursue(
    aim: Array,
    inner: Callable[[Rows, Rows], Array],
    explained: Callable[[Rows, Array, Index], Array],
    budget: int,
    ridge: float,
    at_once: int,
) -> tuple[Rows, Floats]:
    """Orthogonal matching pursuit: ``budget`` rows and their weights, which are positive.

    Args:
        aim: inner product of each gradient with the target, (n,).
        inner: (rows, columns) -> their inner products.
        explained: (rows, weights, of) -> inner product of each gradient in ``of`` with that weighted sum.
        at_once: rows taken before the weights are fitted again.
    """
    aim = np.asarray(aim, np.float64)
    chosen = np.empty(0, np.int64)
    # Of the Cholesky factor of the inner products among those taken plus the ridge, the inverse; it grows by rows.
    inverse = np.zeros((budget, budget))
    solved = np.empty(0)  # that inverse times the aim of those taken
    weights = np.empty(0)
    missing = aim.copy()
    while len(chosen) < budget:
        missing[chosen] = -np.inf
        new = _highest(missing, min(at_once, budget - len(chosen)))
        have, then = len(chosen), len(chosen) + len(new)
        corner = inner(new, new).astype(np.float64)
        least = max(
            ridge, 1e-6 * float(np.diag(corner).mean()), 1e-12
        )  # duplicates make it singular where there is no ridge
        corner[np.diag_indices(len(new))] += least
        side = inverse[:have, :have] @ inner(chosen, new)  # (have, new)
        corner -= side.T @ side
        values, vectors = np.linalg.eigh(corner)
        root = (
            vectors / np.sqrt(np.maximum(values, 0.1 * least))
        ).T  # root^T root is the inverse; rounding cannot make it fail
        inverse[have:then, :have] = -root @ (side.T @ inverse[:have, :have])
        inverse[have:then, have:then] = root
        chosen = np.concatenate([chosen, new])
        grown = inverse[:then, :then]
        solved = np.concatenate([solved, grown[have:] @ aim[chosen]])
        weights = solved @ grown
        missing = aim - explained(chosen, weights, EVERY)
    del inverse, grown
    if weights.min() < 0:
        weights = _not_negative(weights, aim[chosen], lambda w: explained(chosen, w, chosen), ridge)
    mean = weights[weights > 0].mean() if (weights > 0).any() else 1.0
    return chosen, np.maximum(weights, 0.01 * mean)


def _not_negative(
    weights: Floats, aim: Floats, product: Callable[[Floats], Array], ridge: float, *, rounds: int = 1000
) -> Floats:
    """The weights >= 0 with the least ``w K w / 2 + ridge w w / 2 - aim w``, K through ``product``.

    Accelerated projected gradients with restarts (O'Donoghue and Candes 2015, arXiv 1204.3982).
    """
    steep = np.ones(len(weights)) / math.sqrt(len(weights))
    for _ in range(20):
        turned = product(steep)
        largest = float(np.linalg.norm(turned))
        if largest == 0:
            return np.maximum(weights, 0)
        steep = turned / largest
    rate = 1 / (1.05 * largest + ridge)
    now = ahead = np.maximum(weights, 0)
    speed = 1.0
    for _ in range(rounds):
        slope = product(ahead) + ridge * ahead - aim
        after = np.maximum(ahead - rate * slope, 0)
        moved = after - now
        if np.abs(moved).max() < 1e-7 * max(1e-12, after.max()):
            return after
        if float((ahead - after) @ moved) > 0:  # it has overshot
            speed, ahead = 1.0, after
        else:
            faster = (1 + math.sqrt(1 + 4 * speed**2)) / 2
            ahead = np.maximum(after + (speed - 1) / faster * moved, 0)
            speed = faster
        now = after
    return now


def _highest(values: Array, count: int) -> Rows:
    """The rows of the ``count`` highest values, highest first."""
    rows = np.argpartition(-values, count - 1)[:count]
    return rows[np.argsort(-values[rows], kind="stable")]


def _ccs_cut(keep: float) -> float:
    """The part to cut off that was published for the part kept."""
    return min(float(np.interp(1 - keep, CCS_DROPPED, CCS_CUT)), 1 - keep)


def _dropped(method: str, cut: Any, keep: float, n: int, budget: int) -> int:
    """How many images a cut drops."""
    if isinstance(cut, bool) or not isinstance(cut, (int, float)) or not 0 <= cut <= 1 - keep + 1e-9:
        raise Refused(f"{method}(cut={cut!r}): with keep={keep:g}, a part from 0 to {1 - keep:g} can be cut off.")
    # Where a small class is rounded up to its budget, the budget goes before the cut. 1e-9: 0.29 * 100 is 28.99...
    return min(int(cut * n + 1e-9), n - budget)


def _number(method: str, setting: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise Refused(f"{method}({setting}={value!r}): a number {limits} is wanted.")


def _count(method: str, setting: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise Refused(f"{method}({setting}={value!r}): a whole number of at least {least} is wanted.")


def _finite(scores: Floats) -> Floats:
    """``scores`` with +inf as the highest finite one (0 where there is none), and none so large that a sum of some overflows."""
    finite = scores[np.isfinite(scores)]
    return np.minimum(scores, finite.max() if len(finite) else 0.0).clip(-_LARGE, _LARGE)


def _strata(scores: Floats, bins: int, binning: str) -> Rows:
    """The bin in [0, bins) of each score, hardest bin first; ``scores`` come highest first."""
    check_choice(binning, ("width", "quantile"), place="ccs(binning)")
    if binning == "quantile":
        return np.arange(len(scores)) * bins // len(scores)
    easy = -_finite(scores)  # as the paper has it (AUM): the hardest lowest
    low, high = easy.min(), easy.max()
    if high == low:
        return np.zeros(len(scores), dtype=np.int64)
    binned: Rows = np.minimum(((easy - low) / (high - low) * bins).astype(np.int64), bins - 1)
    return binned
