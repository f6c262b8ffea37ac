"""SHELF: dynamic data pruning, one function a method: which of n images train in the epoch to come, and how much each weighs.

It reads, by parameter name:

* what the state (selection/dynamic_pruning.py) knows of each image: ``loss``, ``mean``, ``variance``, ``seen``, ``last``, ``below``;
* ``labels`` (n,) int64;
* ``epoch``, counted from 0, and ``epochs``, how many there will be;
* ``budget``: how many images an epoch is to have, 1 to n (those that find their own number do not read it);
* ``rng``: the one source of chance, another each epoch; or ``seed``, for what must hold from epoch to epoch.

It returns distinct rows in [0, n), or those and their positive weights. A weight multiplies the loss of the image, and the mean
of a batch is over images, not over weights: 2 stands for two images of which one was left out.

No function changes what it is given: a draw can be made again, on any rank and after a resumption.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from selection import bounds
from selection.errors import Refused
from selection.ranks import highest, shares
from selection.strata import k_means

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

_LARGEST = float(np.finfo(np.float64).max)


def infobatch(
    loss: Array,
    epoch: int,
    epochs: int,
    rng: np.random.Generator,
    *,
    prune: float = 0.5,
    until: float = 0.875,
    saving: float | None = None,
) -> tuple[Rows, Floats]:
    """Leave out part of what is learned, and let the rest of it weigh more. Qin et al. 2024 (arXiv 2303.04947).

    Of the images whose loss is below the mean, the part ``prune`` is left out at random, and those that stay of them weigh
    ``1 / (1 - prune)``, so that the expected gradient is that of all images. The last epochs see all. An image that was never
    seen stays.

    The mean saves what it saves, 30 % perhaps where losses are skewed. With ``saving`` the lowest losses are not those below the
    mean but as many as it takes.

    Args:
        loss: (n,) when it was last seen; +inf: never.
        epoch, epochs, rng: see the head of this file.
        prune: fraction of the learned images that is left out.
        until: fraction of the epochs after which all images train; below 1 that is the last epoch at least.
        saving: fraction of all image passes of the training to save, to the image; None: what the mean gives. Epoch 0, which has no
            losses yet, and those after ``until`` save nothing, so the others save more; where that is more than ``prune`` of all
            images, ``prune`` is raised.

    Raises:
        Refused: a saving that cannot be had.
    """
    bounds.part("infobatch", "prune", prune)
    bounds.part("infobatch", "until", until, whole=True)
    images = len(loss)
    last = _until(until, epochs)  # the first epoch that sees all again
    known = np.flatnonzero(np.isfinite(loss))
    total = 0
    if saving is not None:  # refused in the first epoch, not in the second
        bounds.part("infobatch", "saving", saving)
        total = round(saving * epochs * images)
        if total > max(0, last - 1) * (images - 1):
            most = max(0, last - 1) * (images - 1) / (epochs * images)
            raise Refused(
                f"infobatch(saving={saving!r}): the first of the {epochs} epochs and those from {last} on (counted from 0) see "
                f"all images; the others can save {most:.4g} of all passes at most. Lower saving, or raise until."
            )
    weights = np.ones(images)
    if not 0 < epoch < last or not len(known):
        return np.arange(images), weights
    if saving is None:
        low = known[loss[known] < loss[known].mean(dtype=np.float64)]
        left_out = round(prune * len(low))
    else:
        left_out = total * epoch // (last - 1) - total * (epoch - 1) // (last - 1)
        count = max(left_out + 1, round(min(images, left_out / prune)) if prune else images)
        low = known[np.lexsort((rng.random(len(known)), loss[known]))[:count]]  # ties by chance
    left_out = min(left_out, len(low) - 1)  # one stays, to weigh for the others
    if left_out > 0:
        weights[low] = len(low) / (len(low) - left_out)
        weights[rng.choice(low, left_out, replace=False)] = 0
    rows = np.flatnonzero(weights)
    return rows, weights[rows]


def rs2(labels: Rows, epoch: int, budget: int, seed: int, *, replacement: bool = False) -> Rows:
    """Another random part each epoch. Okanovic et al. 2024 (arXiv 2305.18424). The bar for every other lottery, and free.

    Without replacement the epochs walk through one random order of all images after another: n epochs see each image ``budget``
    times, none a second time before all were seen once.

    Args:
        labels: (n,), of which only the number is read.
        epoch, seed: see the head of this file.
        replacement: draw each epoch anew, whatever the others had.
    """
    if not isinstance(replacement, bool):
        raise Refused(f"rs2(replacement={replacement!r}): true or false is wanted.")
    images = len(labels)
    if replacement:
        return np.random.default_rng([seed, epoch]).choice(images, budget, replace=False)
    if budget == images:
        return np.arange(images)
    first = epoch * budget  # place in the walks, one after another
    walk, begins, number = np.random.default_rng([seed, 0]).permutation(images), 0, 0
    while True:
        ends = begins + images
        if first + budget <= ends:
            return walk[first - begins : first - begins + budget]
        number += 1
        after = np.random.default_rng([seed, number]).permutation(images)
        # The epoch astride the two walks does not take an image from both.
        still = -ends % budget
        twice = np.zeros(images, bool)
        twice[walk[images - (budget - still) :] if still else walk[:0]] = True
        fresh = after[~twice[after]][:still]
        twice[:] = False
        twice[fresh] = True
        after = np.concatenate([fresh, after[~twice[after]]])
        if first < ends:
            return np.concatenate([walk[first - begins :], after[: first + budget - ends]])
        walk, begins = after, ends


def seta(
    loss: Array,
    seen: Array,
    epoch: int,
    epochs: int,
    rng: np.random.Generator,
    *,
    drop: float = 0.1,
    groups: int = 5,
    window: float = 0.9,
    until: float = 0.875,
    saving: float | None = None,
) -> Rows:
    """From easy to hard, again and again. Zhou et al. 2025 (arXiv 2503.13385).

    A random part ``drop`` is left out; the rest falls into groups by loss (k-means in one dimension), and a window over
    ``window * groups`` of them slides from the easiest to the hardest, one group an epoch. After ``until`` of the epochs only the
    random part is left out. An image that was never seen counts with the hardest.

    Args:
        seen: (n,) in how many epochs it was.
        epoch, epochs, rng: see the head of this file.
        saving: fraction of all image passes of the training to save, to the image; None: what drop and windows give. ``drop`` is then
            solved for, epoch by epoch, from what is still to be saved. Where windows alone would save more than all of it, some
            of the images outside come back, at random.
    """
    bounds.part("seta", "drop", drop)
    bounds.part("seta", "window", window, whole=True)
    bounds.part("seta", "until", until, whole=True)
    bounds.count("seta", "groups", groups)
    images = len(loss)
    known = np.isfinite(loss)
    if saving is not None:
        bounds.part("seta", "saving", saving)
        order = rng.permutation(images)
        inside = np.ones(images, bool)
        if epoch < _until(until, epochs) and known.any():
            inside = _in_window(np.where(known, loss, loss[known].max()).astype(np.float64), epoch, groups, window)
        left, now = _to_save(saving, seen, epoch, epochs)
        left_out = min(left, images - 1, max(now, images - int(inside.sum())))
        return order[np.argsort(~inside[order], kind="stable")][: images - left_out]
    stay = rng.permutation(images)[: max(1, images - round(drop * images))]
    if epoch >= _until(until, epochs) or not known.any():
        return stay
    return stay[_in_window(np.where(known, loss, loss[known].max())[stay].astype(np.float64), epoch, groups, window)]


def _in_window(values: Floats, epoch: int, groups: int, window: float) -> npt.NDArray[np.bool_]:
    """Which losses lie in seta's window of this epoch; all, where none does."""
    group = k_means(values, groups)
    width = max(1, round(window * groups))
    first = epoch % (groups - width + 1)
    inside = (group >= first) & (group < first + width)
    return inside if inside.any() else np.ones(len(values), bool)


def _to_save(saving: float, seen: Array, epoch: int, epochs: int) -> tuple[int, int]:
    """Image passes that are still to be saved, and this epoch's part of them where all that follow have the same."""
    left = max(0, round(saving * epochs * len(seen)) - (epoch * len(seen) - int(seen.sum())))
    return left, -(-left // (epochs - epoch))


def repb(
    below: Array,
    last: Array,
    seen: Array,
    epoch: int,
    epochs: int,
    rng: np.random.Generator,
    *,
    drop: float = 0.5,
    saving: float | None = None,
) -> tuple[Rows, Floats]:
    """Judge an image within its batch, and let it weigh by how rarely it came. RePB, ICLR 2026.

    What was below the mean of its batch is left out of the next epoch with the probability ``drop``; what was left out comes back
    with the probability ``1 - drop``. An image weighs the epochs so far over those that it was in, this one included. A loss is
    never compared with one of another time. The mean of the weights is above 1, and so the steps are longer.

    Args:
        below: its loss was below the mean of its batch when it was last seen.
        last: the epoch in which it was last seen, -1: never.
        seen: in how many epochs it was.
        epoch, epochs, rng: see the head of this file.
        saving: fraction of all image passes of the training to save, to the image, as far as those below their batch's mean allow;
            None: what ``drop`` gives. Epoch by epoch as many of these, and of those left out before, sit out as are still to be
            saved: ``drop`` is solved for.
    """
    bounds.part("repb", "drop", drop)
    if saving is not None:
        bounds.part("repb", "saving", saving)
        may = np.flatnonzero((below & (last >= 0)) | ((last < epoch - 1) & (last >= 0)))
        _, now = _to_save(saving, seen, epoch, epochs)
        stays = np.ones(len(seen), bool)
        stays[rng.choice(may, min(now, len(may), len(seen) - 1), replace=False)] = False
        rows = np.flatnonzero(stays)
        return rows, (epoch + 1) / (np.minimum(seen[rows], epoch) + 1.0)
    chance = rng.random(len(seen))
    was_in = (last == epoch - 1) | (last < 0)
    stays = np.where(was_in, ~(below & (last >= 0) & (chance < drop)), chance >= drop)
    rows = np.flatnonzero(stays) if stays.any() else np.arange(len(seen))
    return rows, (epoch + 1) / (np.minimum(seen[rows], epoch) + 1.0)


def orderdp(loss: Array, budget: int, rng: np.random.Generator, *, take: float = 0.6) -> Rows:
    """The hardest of a random pool. OrderDP, ICLR 2026.

    Args:
        loss: when it was last seen; +inf, never seen, counts as hardest.
        budget, rng: see the head of this file.
        take: fraction of the pool that trains; the pool has ``budget / take`` images, or all.
    """
    bounds.part("orderdp", "take", take, whole=True, least=1e-9)
    pool = rng.choice(len(loss), min(len(loss), round(budget / take)), replace=False)
    return pool[highest(loss[pool], budget)]


def rcap(
    loss: Array,
    labels: Rows,
    last: Array,
    epoch: int,
    budget: int,
    rng: np.random.Generator,
    *,
    temperature: float = 2.0,
) -> Rows:
    """Classes by what is left to learn in them, images in a class by their loss. Hassan et al., UAI 2025.

    Within a class an image is drawn in proportion to ``exp(loss / temperature)``, without replacement, the loss clipped at ln C.
    A class gets a share in proportion to the root of its size times the importance (those proportions, added up) that the images
    of the last epoch had, and at least one image while the budget has one for each: without it a class that was once left out
    would have no importance, and never come back.

    Args:
        loss: when it was last seen; +inf, never seen, counts as ln C.
        labels: (n,), of C classes.
        last: the epoch in which it was last seen.
        epoch, budget, rng: see the head of this file.
    """
    bounds.positive("rcap", "temperature", temperature)
    classes, of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    top = math.log(max(2, len(classes)))
    importance = np.exp(np.clip(loss.astype(np.float64), 0, top) / temperature)
    importance /= np.bincount(of, importance)[of]  # 1 a class
    recent = (last == epoch - 1) if epoch and (last == epoch - 1).any() else np.ones(len(loss), bool)
    left = np.bincount(of[recent], importance[recent], minlength=len(classes))
    least = int(budget >= len(classes))
    quotas = least + shares(np.sqrt(left * sizes / len(loss)), sizes - least, budget - least * len(classes))
    # Gumbel keys: the highest are a draw one by one without replacement.
    keys = np.log(importance) + rng.gumbel(size=len(loss))
    order = np.lexsort((-keys, of))
    rank = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[of[order]]
    return order[rank < quotas[of[order]]]


def ucb(mean: Array, variance: Array, budget: int, rng: np.random.Generator, *, confidence: float = 1.0) -> Rows:
    """The highest loss that may be: its running mean plus ``confidence`` deviations. Raju et al. 2021 (arXiv 2111.12621).

    Args:
        mean, variance: running ones of the loss; a mean of +inf, never seen, comes first.
        budget, rng: see the head of this file.
    """
    bounds.number("ucb", "confidence", confidence, 0, _LARGEST)
    shuffled = rng.permutation(len(mean))
    bound = mean[shuffled] + confidence * np.sqrt(variance[shuffled])
    return shuffled[highest(bound, budget)]


def selective_backprop(
    loss: Array,
    epoch: int,
    epochs: int,
    budget: int,
    rng: np.random.Generator,
    *,
    start: float = 0.5,
    end: float = 0.9,
    saving: float | None = None,
) -> Rows:
    """The likelier the higher its loss ranks. Jiang et al. 2019 (arXiv 1910.00762).

    An image is drawn, without replacement, in proportion to ``rank ** (n / budget - 1)``, its rank from 0 (the lowest loss) to 1.
    The ranks are those of the losses that were last seen, where the paper spends a forward pass on new ones.

    Args:
        loss: +inf, never seen, ranks highest.
        epoch, epochs, rng: see the head of this file.
        start, end: parts of the epochs between which it draws; else all images train (Composer's defaults).
        saving: fraction of all image passes of the training to save, to the image, by the epochs between; None: what ``budget`` gives.

    Raises:
        Refused: a saving that cannot be had.
    """
    bounds.part("selective_backprop", "start", start, whole=True)
    bounds.part("selective_backprop", "end", end, whole=True)
    images = len(loss)
    first, last = _after(start, epochs), _after(end, epochs)
    if saving is not None:
        bounds.part("selective_backprop", "saving", saving)
        total, between = round(saving * epochs * images), max(0, last - first)
        if total > between * (images - 1):
            raise Refused(
                f"selective_backprop(saving={saving!r}): only the epochs {first} to {last - 1} (counted from 0) draw; they can "
                f"save {between * (images - 1) / (epochs * images):.4g} of all passes at most. Lower saving, or widen start and end."
            )
        if first <= epoch < last:
            budget = images - (total * (epoch + 1 - first) // between - total * (epoch - first) // between)
    if not first <= epoch < last:
        return np.arange(images)
    order = np.lexsort((rng.random(images), loss))  # lowest first, ties by chance
    ranks = (np.arange(images) + 0.5) / images
    keys = (images / budget - 1) * np.log(ranks) + rng.gumbel(size=images)
    return order[highest(keys, budget)]


def _after(part: float, epochs: int) -> int:
    """The first epoch that begins when ``part`` of the epochs are over; 0.55 of 20 is 11, whatever the last bit says."""
    return math.ceil(part * epochs - 1e-9)


def _until(part: float, epochs: int) -> int:
    """The epochs that ``part`` of them is, rounded down, so that a short training too has an end unlike the rest."""
    return math.floor(part * epochs + 1e-9)
