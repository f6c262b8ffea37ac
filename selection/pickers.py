"""SHELF: one function a picker: which of n images stay, given what a score says of them.

A picker is handed one class at a time where classes are balanced (selection/lottery.py), else all images. It reads, by
parameter name:

* ``scores`` (n,) float64, higher = keep first, may hold +inf;
* ``ranking`` (n,) int64: the n rows, highest score first, ties in random order. Pickers do not sort scores themselves;
* ``budget``: how many rows it must return, 1 to n;
* ``keep``: the fraction of the whole data set that stays, in (0, 1];
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

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from selection import bounds
from selection.errors import Refused
from selection.facility import Way, represent
from selection.gradients import Gradients
from selection.neighbors import Cosine, NearGradients, nearest, unit
from selection.pursuit import Pursuit, descend
from selection.ranks import shuffled
from selection.ridge import taught
from selection.strata import ccs_cut, cut_off, finite, strata
from selection.submodular import FarthestFirst, GraphCut, LogDet, in_rounds

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


def top_k(ranking: Rows, budget: int) -> Rows:
    """The highest scores. For difficulty scores it is worse than chance where less than half stays (Zheng et al. 2023)."""
    return ranking[:budget]


def bottom(ranking: Rows, budget: int) -> Rows:
    """The lowest scores: of difficulty scores the easy images, which Sorscher et al. 2022 (arXiv 2206.14486) keep where data are few."""
    return ranking[len(ranking) - budget :]


def middle(ranking: Rows, budget: int, *, at: float = 0.5) -> Rows:
    """A stretch of the ranking. With the score ``moderate`` use ``top_k``; this does as much for any other.

    Args:
        ranking, budget: see the head of this file.
        at: where it lies, 0 (the highest scores) to 1 (the lowest).
    """
    bounds.number("middle", "at", at, 0, 1)
    first = round(at * (len(ranking) - budget))
    return ranking[first : first + budget]


def double_end(ranking: Rows, budget: int, keep: float, *, cut: float | None = None) -> Rows:
    """Drop the hardest, which may be mislabeled, and keep the hardest of the rest. Zheng et al. 2025, ELFS (arXiv 2406.04273).

    Args:
        ranking, budget, keep: see the head of this file.
        cut: fraction of the n images to drop; None: a third of the fraction that goes. (Where a tenth stays, the paper's grid search
            found 0.4 for CIFAR-10 and 0.3 for ImageNet.)

    Raises:
        Refused: a cut that leaves fewer images than are to stay.
    """
    dropped = cut_off("double_end", (1 - keep) / 3 if cut is None else cut, keep, len(ranking), budget)
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
        ranking: (n,) highest score first.
        labels: (n,).
        embeddings: (n, D).
        quotas: (C,) how many of each class, in the order of their labels; None: windows of the ranking of all.
        step: fraction of the images from one window to the next.
        ridge: of the regression; embeddings have length 1.
    """
    bounds.number("window", "step", step, 1e-6, 1)
    bounds.number("window", "ridge", ridge, 1e-12)
    classes, truth = np.unique(labels, return_inverse=True)
    stretches = [(ranking, budget)]
    if quotas is not None:
        stretches = [(ranking[truth[ranking] == place], int(quota)) for place, quota in enumerate(quotas)]
    found: list[tuple[int, float, int]] = []
    windows: list[Rows] = []
    for at in (*np.arange(0, 1 - budget / len(ranking), step), 1.0):
        firsts = [min(round(at * len(line)), len(line) - quota) for line, quota in stretches]
        rows = np.concatenate([line[at : at + quota] for (line, quota), at in zip(stretches, firsts, strict=True)])
        right, error = taught(embeddings, truth, len(classes), rows, ridge)
        found.append((-right, error, len(windows)))
        windows.append(rows)
    return windows[min(found)[2]]


def random(labels: Rows, budget: int, rng: np.random.Generator) -> Rows:
    """Any, all alike, whatever the score says. The bar for every other picker."""
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
        ranking, budget, keep, rng: see the head of this file.
        cut: fraction of the n images to drop as too hard; None: the published one for ImageNet, in between by interpolation.
        bins: number of strata; no more than the budget, for the floor of step 3 would leave the smallest with nothing.
        binning: ``"width"``: equally wide in score, the paper's; ``"quantile"``: equally many images, for scores with outliers.

    Raises:
        Refused: a cut that leaves fewer images than are to stay.
    """
    bounds.count("ccs", "bins", bins, 1)
    dropped = cut_off("ccs", ccs_cut(keep) if cut is None else cut, keep, len(scores), budget)
    rest = ranking[dropped:]
    bins = min(bins, budget)
    stratum = strata(scores[rest], bins, binning)
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
    mean probability of its label, mu the mean of p over the ten highest scores and r the fraction that goes. Made for ``dual``.

    Args:
        scores: not negative; +inf counts as the highest finite one.
        p_label: (S, E, n).
        budget, keep, rng: see the head of this file.
        c_d: 4 for CIFAR (the authors' code), 11 for ImageNet.

    Raises:
        Refused: a negative score, which cannot be a probability.
    """
    bounds.positive("beta", "c_d", c_d)
    if scores.min() < 0:
        raise Refused(
            f"beta: draws in proportion to the score, and there is one of {scores.min():g}. Take dual, el2n, loss, or the pick top_k."
        )
    easy = p_label.mean(axis=(0, 1), dtype=np.float64)
    easy = easy.clip(1e-6, 1 - 1e-6)  # the density has poles at 0 and 1
    mu = easy[np.argpartition(-scores, min(10, len(scores)) - 1)[:10]].mean()
    b = 15 * (1 - mu) * (1 - (1 - keep) ** c_d)
    logs = np.log(np.maximum(finite(scores), np.finfo(np.float64).tiny))
    logs += (15 - b) * np.log(easy) + (b - 1) * np.log1p(-easy)
    # The budget highest of log-weight plus Gumbel noise are a draw one by one without replacement, with no underflow.
    keys = logs + rng.gumbel(size=len(logs))
    return np.argpartition(-keys, budget - 1)[:budget]


def herding(embeddings: Array, budget: int, rng: np.random.Generator, start: Rows) -> Rows:
    """One by one the image that brings the mean of those taken nearest to the mean of all. Welling 2009.

    Image t + 1 is the *nearest* to ``(t + 1) mean - sum``, where the sum is over the t that are taken. One product of a matrix
    and a vector a pick.
    """
    order, chosen = shuffled(len(embeddings), rng, start)
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
    order, chosen = shuffled(len(embeddings), rng, start)
    greedy = FarthestFirst(embeddings[order].astype(np.float32))
    if not chosen:
        mean = greedy.features.mean(0, dtype=np.float64).astype(np.float32)
        chosen = [int((greedy.squares - 2 * (greedy.features @ mean)).argmin())]
    greedy.begin(np.array(chosen))
    return order[in_rounds(greedy, budget, chosen)]


def facility_location(
    embeddings: Array, budget: int, rng: np.random.Generator, start: Rows, *, way: Way = Way()
) -> Rows:
    """So that each image has one like it among those taken: the most of ``sum_i max_{j in S} (1 + cos_ij) / 2``.

    Args:
        embeddings: (n, D).
        budget, rng, start: see the head of this file.
        way: ``maximizer``, ``neighbors``, ``epsilon`` and ``max_memory``; see :class:`selection.facility.Way`.

    Raises:
        Refused: it does not fit; says what it takes, and the cure.
    """
    order, chosen = shuffled(len(embeddings), rng, start)
    kernel = Cosine(embeddings[order])
    rows, _ = represent("facility_location", kernel, budget, rng, chosen, way)
    return order[rows]


def graph_cut(embeddings: Array, budget: int, rng: np.random.Generator, start: Rows, *, coverage: float = 1.0) -> Rows:
    """Like all, and unlike one another: the most of ``coverage sum_i sum_{j in S} s_ij - sum_{j,l in S} s_jl``.

    With ``s = (1 + cos) / 2``. Exactly greedy; needs no matrix. The value can fall once more than half of the images are taken,
    unless ``coverage`` is at least 2 (Iyer et al. 2021, arXiv 2006.15412).
    """
    bounds.number("graph_cut", "coverage", coverage, 0)
    order, chosen = shuffled(len(embeddings), rng, start)
    greedy = GraphCut(unit(embeddings[order]), float(coverage))
    greedy.begin(np.array(chosen, np.int64))
    return order[in_rounds(greedy, budget, chosen)]


def log_det(embeddings: Array, budget: int, rng: np.random.Generator, start: Rows, *, ridge: float = 1.0) -> Rows:
    """The largest volume: the most of ``log det(I + K / ridge)``, K the cosines among those taken.

    The most probable set of a determinantal point process, greedily (Chen et al. 2018, arXiv 1709.05135).

    Args:
        embeddings: (n, D).
        budget, rng, start: see the head of this file.
        ridge: the less, the more a direction that is spanned already counts for nothing.
    """
    bounds.number("log_det", "ridge", ridge, 1e-6)
    order, chosen = shuffled(len(embeddings), rng, start)
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
    """Hard images from all over: scores spread along a graph of neighbors. Maharana et al. 2024 (arXiv 2310.07931).

    1. Each image adds its neighbors' scores to its own, times ``exp(-gamma_forward d)``.
    2. The highest is taken, and takes ``exp(-gamma_reverse d)`` times its score from its neighbors; again and again.

    d is the distance of embeddings of length 1. Scores count from the lowest, which is 0.

    Args:
        scores: hardest first; +inf counts as the highest finite one.
        ranking, budget, keep, rng: see the head of this file.
        embeddings: (n, D).
        neighbors, gamma_forward, gamma_reverse: the paper searches 1 to 15, and 0 to 1 for the last.
        cut: fraction of the n images to drop as too hard before; None: as in ``ccs``, which the authors' code combines it with.

    Raises:
        Refused: a cut that leaves fewer images than are to stay.
    """
    bounds.count("d2", "neighbors", neighbors, 1)
    bounds.number("d2", "gamma_forward", gamma_forward, 0)
    bounds.number("d2", "gamma_reverse", gamma_reverse, 0)
    rest = ranking[cut_off("d2", ccs_cut(keep) if cut is None else cut, keep, len(scores), budget) :]
    index, similar = nearest(Cosine(embeddings[rest]), min(neighbors + 1, len(rest)), rng)
    index, distances = index[:, 1:], np.sqrt(np.maximum(4 * (1 - similar[:, 1:]), 0))  # |a - b|^2 = 2 - 2 cos
    message = finite(scores)[rest]
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
    errors: Array, embeddings: Array, budget: int, rng: np.random.Generator, start: Rows, *, way: Way = Way()
) -> tuple[Rows, Floats]:
    """So that each image's gradient has one like it among those taken. Mirzasoleiman et al. 2020 (arXiv 1906.01827).

    Facility location over the distances of the head's gradients. The weight of an image is how many it stands for: those to
    which it is the nearest of all taken, itself included.

    Args:
        errors, embeddings: of which the gradient is the outer product; see selection/gradients.py.
        budget, rng, start: see the head of this file.
        way: as of ``facility_location``.

    Raises:
        Refused: it does not fit into ``max_memory``; says what it takes, and the cure.
    """
    order, chosen = shuffled(len(errors), rng, start)
    kernel = NearGradients(Gradients(errors[order], embeddings[order]), rng)
    rows, closest = represent("craig", kernel, budget, rng, chosen, way)
    belongs = closest(rows)
    belongs[rows] = np.arange(budget)  # of two that are equal, each stands for itself
    return order[rows], np.bincount(belongs, minlength=budget).astype(np.float64)


def grad_match(
    errors: Array, embeddings: Array, budget: int, rng: np.random.Generator, *, pursuit: Pursuit = Pursuit()
) -> tuple[Rows, Floats]:
    """Images and weights whose gradients add up to that of all. Killamsetty et al. 2021 (arXiv 2103.00123), algorithm 2.

    Orthogonal matching pursuit on ``|sum_i w_i g_i - sum of all|^2 + ridge |w|^2``: take what points most along what is missing,
    fit the weights of all that are taken, again; in the end fit them once more, none below 0. What then would weigh nothing
    weighs a hundredth of the mean: the budget is the budget.

    Args:
        errors, embeddings: of which the gradient is the outer product; see selection/gradients.py.
        budget, rng: see the head of this file.
        pursuit: ``ridge``, ``by``, ``batch``, ``at_once`` and ``max_memory``; see :class:`selection.pursuit.Pursuit`.

    Raises:
        Refused: it does not fit into ``max_memory``; says what it takes, and the cure.
    """
    return pursuit.find(errors, embeddings, rng.permutation(len(errors)), budget)


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
        labels: (n,).
        budget, rng: see the head of this file.
        step: of the head along one image's gradient: a learning rate over a batch size, 0.1 over 128.
        rounds: how often the gradient is computed anew.
    """
    bounds.number("glister", "step", step, 0)
    bounds.count("glister", "rounds", rounds, 1)
    order = rng.permutation(len(errors))
    return order[descend(Gradients(errors[order], embeddings[order]), labels[order], budget, step, rounds)]
