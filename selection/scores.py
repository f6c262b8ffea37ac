"""SHELF: one function a score. Higher = keep first, always; a direction is never a setting.

Positional parameters name the signals that a score reads (selection/signals.py); keyword-only ones are what a config may
set, with the published default. All give float64 (N,), averaged over seeds; +inf means before all others.

Legend: N images, S seeds, E epochs; signals that were watched are (S, E, N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from selection.errors import Refused

Array = npt.NDArray[Any]
Scores = npt.NDArray[np.float64]


def random(labels: Array, *, seed: int = 0) -> Scores:
    """No preference: uniform in [0, 1). The bar for every other score."""
    return np.random.default_rng(seed).random(len(labels))


def el2n(error_norm: Array, *, epoch: int = 20, window: int = 1) -> Scores:
    """Norm of the error early in training. Paul, Ganguli and Dziugaite 2021 (arXiv 2107.07075).

    Args:
        error_norm: ||softmax - onehot||_2, (S, E, N).
        epoch: read at the end of this epoch, counted from 1 (the paper: 20 of 200); the last one of a shorter probe.
        window: mean over so many epochs that end there. Zheng et al. 2023 on ImageNet: ``epoch=10, window=10``.
    """
    _whole("el2n", "epoch", epoch, 1)
    _whole("el2n", "window", window, 1)
    end = min(epoch, error_norm.shape[1])
    return _mean(error_norm[:, max(0, end - window) : end])


def forgetting(correct: Array) -> Scores:
    """How often it was known and then not. Toneva et al. 2019 (arXiv 1812.05159).

    An event is ``correct`` in one epoch and not in the next. As in the authors' code, a probe that never learned the image
    counts E events, which is more than any that did can have; an image that no probe ever learned has +inf.
    Counting such images as never *forgotten* would make the hardest ones the easiest.

    Args:
        correct: bool (S, E, N).
    """
    events = (correct[:, :-1] & ~correct[:, 1:]).sum(axis=1).astype(np.float64)  # (S, N)
    learned = correct.any(axis=1)
    score = np.where(learned, events, correct.shape[1]).mean(axis=0)
    score[~learned.any(axis=0)] = np.inf
    return score


def aum(margin: Array, p_label: Array, p_other: Array, *, kind: str = "logit") -> Scores:
    """Area under the margin, negated: a small area is a hard (or mislabelled) image. Pleiss et al. 2020 (arXiv 2001.10528).

    Args:
        margin: logit of the label minus the highest other one, (S, E, N).
        p_label: probability of the label, (S, E, N).
        p_other: highest other probability, (S, E, N).
        kind: ``"logit"``, the paper's, or ``"probability"``: the difference of the probabilities (Zheng et al. 2023).
    """
    if kind == "logit":
        return -_mean(margin)
    if kind == "probability":
        return _mean(p_other) - _mean(p_label)
    raise Refused(f"aum(kind={kind!r}): a margin is of 'logit' or 'probability'.")


def loss(loss: Array, *, epochs: int = 1) -> Scores:
    """Cross-entropy at the end of the probe. Coleman et al. 2020 (arXiv 1906.11829) call it the proxy's.

    Args:
        loss: nats, (S, E, N).
        epochs: mean over so many last epochs.
    """
    return _last("loss", loss, epochs)


def entropy(entropy: Array, *, epochs: int = 1) -> Scores:
    """Entropy of the prediction at the end of the probe; reads no label. Coleman et al. 2020 (arXiv 1906.11829).

    Args:
        entropy: nats, (S, E, N).
        epochs: mean over so many last epochs.
    """
    return _last("entropy", entropy, epochs)


def margin(p_label: Array, p_other: Array, *, epochs: int = 1) -> Scores:
    """How near the label and its strongest rival are, ``-|p_label - p_other|``, at the end of the probe.

    This is the negated margin of the two most probable classes (Coleman et al. 2020, arXiv 1906.11829) where the label is one
    of the two. Where it is not, the second of them was not recorded, and the label stands in for it.

    Args:
        p_label: probability of the label, (S, E, N).
        p_other: highest other probability, (S, E, N).
        epochs: mean over so many last epochs.
    """
    return -_last("margin", np.abs(p_label - p_other), epochs)


def least_confidence(p_label: Array, p_other: Array, *, epochs: int = 1) -> Scores:
    """One minus the highest probability, at the end of the probe; reads no label. Coleman et al. 2020 (arXiv 1906.11829).

    Args:
        p_label: probability of the label, (S, E, N).
        p_other: highest other probability, (S, E, N).
        epochs: mean over so many last epochs.
    """
    return 1 - _last("least_confidence", np.maximum(p_label, p_other), epochs)


def dual(p_label: Array, *, window: int = 10) -> Scores:
    """Difficulty times uncertainty: mean over windows of ``std(p) (1 - mean(p))``. Cho et al. 2025 (arXiv 2502.06905).

    Args:
        p_label: probability of the label, (S, E, N); the paper: 30 epochs of 200 on CIFAR, 60 of 90 on ImageNet.
        window: epochs in a window; all of them in a shorter probe.

    Raises:
        Refused: fewer than two epochs.
    """
    return _over_windows("dual", p_label, window, lambda p: p.std(axis=0, ddof=1) * (1 - p.mean(axis=0)))


def dyn_unc(p_label: Array, *, window: int = 10) -> Scores:
    """How much the probability of the label moves: mean over windows of its std. He et al. 2024 (arXiv 2306.05175).

    Args:
        p_label: probability of the label, (S, E, N).
        window: epochs in a window; all of them in a shorter probe.

    Raises:
        Refused: fewer than two epochs.
    """
    return _over_windows("dyn_unc", p_label, window, lambda p: p.std(axis=0, ddof=1))


def _mean(watched: Array) -> Scores:
    """Over seeds and epochs, in double precision: (S, E, N) -> (N,)."""
    return watched.mean(axis=(0, 1), dtype=np.float64)


def _last(method: str, watched: Array, epochs: int) -> Scores:
    _whole(method, "epochs", epochs, 1)
    return _mean(watched[:, -epochs:])


def _over_windows(method: str, watched: Array, window: int, of: Callable[[Scores], Scores]) -> Scores:
    """Mean over seeds and all windows of successive epochs of ``of(window)``; ``of``: (J, N) -> (N,)."""
    _whole(method, "window", window, 2)
    seeds, epochs, images = watched.shape
    if epochs < 2:
        raise Refused(
            f"{method}: measures how a prediction moves from epoch to epoch, and there is one. Set score.epochs=2 or more."
        )
    length = min(window, epochs)
    starts = range(epochs - length + 1)
    total = np.zeros(images)
    for seed in range(seeds):
        for start in starts:
            total += of(watched[seed, start : start + length].astype(np.float64))
    return total / (seeds * len(starts))


def _whole(method: str, setting: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise Refused(f"{method}({setting}={value!r}): a whole number of at least {least} is wanted.")
