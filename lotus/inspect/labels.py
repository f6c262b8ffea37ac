"""Labels that are likely wrong, and pictures that lie far from all others.

Whoever judges gives each image a margin: how much more its label is believed than the best other one. How low is too low, only the
judge's own mistakes can tell. So a few labels are made wrong on purpose before it judges (as threshold samples are in Pleiss et
al., NeurIPS 2020): where these lie among all others lets one estimate how many are wrong, and of a list's head how much is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lotus.inspect import near

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

FEWEST = 100
"""Images below which no label is judged: a person looks through them sooner."""
PLANTED, BOUNDS = 0.02, (10, 500)
"""Fraction of the labels that are made wrong, and how many at least and at most."""
RIGHT = 0.6
"""Of a list this fraction is wrong indeed, or more, as far as the planted ones tell."""
STEADY, COUNTED = 0.2, 5
"""Fraction of the planted, and how many at least, from which on a count of them says something: the first few may lie anywhere."""
PLANTINGS, PLENTY = 9, 100
"""How often labels are planted where a judge costs little and fewer than this are planted at once: where ten lie is chance."""
RIDGE = 1e-3
"""Of the mean of the Gram matrix's diagonal."""


def plant(labels: Rows, classes: int, seed: int = 0) -> tuple[Rows, Rows]:
    """The labels with some of them wrong, and the rows of these. They are not judged."""
    rng = np.random.default_rng(seed)
    count = min(max(round(PLANTED * len(labels)), BOUNDS[0]), BOUNDS[1])
    rows = np.sort(rng.permutation(len(labels))[:count])
    told = labels.copy()
    told[rows] = (labels[rows] + rng.integers(1, classes, count)) % classes
    return told, rows


@dataclass(frozen=True, eq=False)
class Suspects:
    """Images whose label is likely wrong, the likeliest first."""

    rows: Rows
    share: float
    """Fraction of all labels that is estimated to be wrong."""
    found: float
    """Fraction of the planted wrong labels that would stand on the list."""


def suspects(margins: Floats, planted: Rows) -> Suspects:
    """Who lies low enough.

    With f(t) the fraction of the others, and r(t) that of the planted, whose margin is at most t: were a fraction e of the others
    wrong like the planted, f(t) >= e r(t) at every t. So e is at most the least f / r, and of the others below t a fraction of
    about e r(t) / f(t) is wrong (of pictures that are merely hard some are counted with them). The list ends where that falls below :data:`RIGHT`.
    """
    others = np.setdiff1d(np.arange(len(margins)), planted)
    order = others[np.argsort(margins[others], kind="stable")]
    cuts = np.sort(margins[planted])
    part = (np.arange(len(cuts)) + 1) / len(cuts)  # r at each planted margin
    below = np.searchsorted(margins[order], cuts, side="right")
    steady = part >= max(STEADY, min(COUNTED, len(cuts)) / len(cuts))
    ratio = np.maximum(below, 0.5) / len(order) / part
    share = float(ratio[steady].min())
    fits = np.flatnonzero(steady & (share >= RIGHT * ratio))
    last = int(fits[-1])
    return Suspects(order[: below[last]], share, float(part[last]))


def by_features(x: Floats, labels: Rows, classes: int) -> tuple[Floats, Floats, Suspects]:
    """Features (N, D) judge: probabilities (N, C), margins (N,), and whose label is suspect by more than half of the plantings."""
    probabilities = left_out(x, labels, classes)
    own, votes, lists = margins(probabilities, labels), np.zeros(len(labels), np.int64), list[Suspects]()
    while len(lists) < PLANTINGS:
        told, planted = plant(labels, classes, len(lists))
        lists.append(suspects(margins(left_out(x, told, classes), told), planted))
        votes[lists[-1].rows] += 1
        if len(planted) >= PLENTY:
            break
    rows = np.flatnonzero(2 * votes > len(lists))
    share, found = (float(np.median([getattr(one, name) for one in lists])) for name in ("share", "found"))
    return probabilities, own, Suspects(rows[np.argsort(own[rows], kind="stable")], share, found)


def left_out(x: Floats, labels: Rows, classes: int) -> Floats:
    """(N, C) probabilities of each image by a ridge regression on all others: the hat matrix's diagonal h gives the answer
    without image i as (f - h y) / (1 - h)."""
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1), np.float32)], 1)
    gram = (x.T @ x).astype(np.float64)
    inverse = np.linalg.inv(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)))
    target = np.eye(classes, dtype=np.float32)[labels]
    solved = (inverse @ (x.T @ target)).astype(np.float32)
    hat = np.einsum("nk,nk->n", x @ inverse.astype(np.float32), x)[:, None]
    scores = (x @ solved - hat * target) / np.maximum(1 - hat, 1e-3)
    sharp = min(np.geomspace(1, 64, 13), key=lambda by: _surprise(scores, labels, float(by)))
    return _softmax(scores * np.float32(sharp))


def margins(probabilities: Floats, labels: Rows) -> Floats:
    """(N,) log of the label's probability less that of the best other one; low is bad."""
    logs = np.log(np.maximum(probabilities, 1e-9))
    return np.asarray(logs[np.arange(len(labels)), labels] - _others(logs, labels).max(1), np.float32)


def likelier(probabilities: Floats, labels: Rows) -> Rows:
    """(N,) the best class but the label."""
    return np.asarray(_others(probabilities, labels).argmax(1), np.int64)


def aum(recorded: npt.NDArray[np.floating]) -> Floats:
    """Area under the margin (Pleiss et al., 2020): the mean over epochs of the label's logit minus the highest other one; of
    (S, E, N) watched margins (N,), low is bad."""
    return recorded.astype(np.float32).mean((0, 1))


def far(x: Floats, count: int = 5) -> Floats:
    """(N,) how far each image lies from its ``count`` nearest others: one minus their mean cosine, of standardized features."""
    seen = near.unit((x - x.mean(0)) / (x.std(0) + 1e-6))
    count = min(count, len(x) - 1)
    if count < 1:
        return np.zeros(len(x), np.float32)
    cells, found = near.Cells.of(seen), np.zeros(len(x), np.float32)
    for at in range(0, len(x), near.BLOCK):
        part = seen[at : at + near.BLOCK]
        first, second, cosine = cells.nearest(part, count + 1)
        apart = first + at != second
        sums = np.bincount(first[apart], cosine[apart], len(part))
        found[at : at + near.BLOCK] = 1 - sums / np.maximum(np.bincount(first[apart], minlength=len(part)), 1)
    return found


def _others(values: Floats, labels: Rows) -> Floats:
    """A copy in which the label's own is out of the question."""
    others = np.array(values, copy=True)
    others[np.arange(len(labels)), labels] = -np.inf
    return others


def _softmax(scores: Floats) -> Floats:
    raised = np.exp(scores - scores.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def _surprise(scores: Floats, labels: Rows, by: float) -> float:
    told = _softmax(scores * np.float32(by))[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(told, 1e-9)).mean())
