"""Images by their gradients: those that add up to that of all (orthogonal matching pursuit), those that lower the loss most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from selection import bounds
from selection.gradients import EVERY, Gradients, Index, need_batches, need_products
from selection.memory import within
from selection.methods import check_choice
from selection.ranks import highest
from selection.submodular import need

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pursuit:
    """How matching gradients are pursued: the settings of :func:`selection.pickers.grad_match`."""

    ridge: float = 0.5
    """What large weights cost."""
    by: Literal["image", "batch"] = "image"
    """``"image"``, or ``"batch"``: whole random batches are taken, with one weight each (the paper's PB form)."""
    batch: int = 32
    """Images in one."""
    at_once: int | None = None
    """How many are taken before the weights are fitted again; None: as many as make 300 fits."""
    max_memory: float = 0.5
    """GB, for the inner products among those taken."""

    def check(self) -> None:
        """Raises:
        Refused: a setting that cannot be.
        """
        bounds.number("grad_match", "ridge", self.ridge, 0)
        bounds.count("grad_match", "batch", self.batch, 1)
        if self.at_once is not None:
            bounds.count("grad_match", "at_once", self.at_once, 1)
        check_choice(self.by, ("image", "batch"), place="grad_match(by)")

    def find(self, errors: Array, embeddings: Array, order: Rows, budget: int) -> tuple[Rows, Floats]:
        """``budget`` images, and their weights.

        Args:
            errors, embeddings: (n, C) and (n, D), of which each gradient is the outer product.
            order: a permutation of the images: of equal ones, that which stands first in it; batches are taken along it.
            budget: how many of the n.

        Raises:
            Refused: a setting that cannot be, or it takes too much memory.
        """
        self.check()
        of = self._batches if self.by == "batch" else self._images
        return of(errors, embeddings, order, budget)

    def _images(self, errors: Array, embeddings: Array, order: Rows, budget: int) -> tuple[Rows, Floats]:
        """Taken one by one."""
        within(
            self.max_memory,
            need_products(budget),
            f"grad_match: the inner products of {budget} gradients",
            "Balance the classes, take by=batch",
        )
        at_once = self.at_once or math.ceil(budget / 300)
        gradients = Gradients(errors[order], embeddings[order])
        missing = gradients.total()
        if (
            missing.size > len(order) and need(len(order)) <= self.max_memory
        ):  # many classes: all products are less work
            inner = gradients.inner(EVERY)
            picked, weights = pursue(
                inner.sum(1, dtype=np.float64),
                lambda rows, columns: inner[np.ix_(rows, columns)],
                lambda rows, w, of: inner[of][:, rows] @ w.astype(np.float32),
                budget,
                self.ridge,
                at_once,
            )
        else:
            picked, weights = pursue(
                gradients.along(missing),
                lambda rows, columns: gradients.inner(rows, columns, dtype=np.float64),
                lambda rows, w, of: gradients.along(gradients.total(rows, w), of),
                budget,
                self.ridge,
                at_once,
            )
        return order[picked], weights

    def _batches(self, errors: Array, embeddings: Array, order: Rows, budget: int) -> tuple[Rows, Floats]:
        """Taken in whole batches, with one weight each."""
        n, size = len(order), min(self.batch, budget)
        within(
            self.max_memory,
            need_batches(n, budget, size, errors.shape[1], embeddings.shape[1]),
            f"grad_match: the gradients of {n} images in batches of {size}",
            "Take larger batches, balance the classes",
        )
        parts = [order[first : first + size] for first in range(0, n, size)]
        if len(parts[-1]) < size and len(parts) > 1:  # a short one cannot be the whole of what is left to take
            parts[-2:] = [np.concatenate(parts[-2:])]
        totals = [Gradients(errors[rows], embeddings[rows]).total().ravel() for rows in parts]
        matrix = np.stack(totals).astype(np.float64)
        picked, weights = pursue(
            matrix @ matrix.sum(0),
            lambda rows, columns: matrix[rows] @ matrix[columns].T,
            lambda rows, w, of: matrix[of] @ (w @ matrix[rows]),
            min(math.ceil(budget / size), len(parts)),
            self.ridge,
            self.at_once or 1,
        )
        rows = np.concatenate([parts[number] for number in picked])[:budget]
        return rows, np.repeat(weights, [len(parts[number]) for number in picked])[:budget]


def pursue(
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
        budget: how many of the n.
        ridge: of the least squares.
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
        new = highest(missing, min(at_once, budget - len(chosen)))
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


def _not_negative(weights: Floats, aim: Floats, product: Callable[[Floats], Array], ridge: float) -> Floats:
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
    for _ in range(1000):
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


def descend(gradients: Gradients, labels: Rows, budget: int, step: float, rounds: int) -> Rows:
    """``budget`` images, round by round those whose gradients point most along that of the loss over all; see
    :func:`selection.pickers.glister`.

    Args:
        gradients: of the n images; they are not changed.
        labels: (n,).
        budget: how many of the n.
        step: of the head along one image's gradient.
        rounds: how often the gradient is computed anew.
    """
    onehot = (np.arange(len(labels)), labels)
    probabilities = gradients.errors.copy()
    probabilities[onehot] += 1
    logits = np.log(np.maximum(probabilities, 1e-8))  # up to a constant an image, which softmax does not see
    direction = gradients.total()
    free = np.ones(len(labels), bool)
    chosen: list[int] = []
    size = math.ceil(budget / rounds)
    while len(chosen) < budget:
        gain = np.where(free, gradients.along(direction), -np.inf)
        taken = highest(gain, min(size, budget - len(chosen)))
        chosen.extend(taken.tolist())
        free[taken] = False
        logits -= gradients.features @ (step * gradients.total(taken)).T
        now = np.exp(logits - logits.max(1, keepdims=True))
        now /= now.sum(1, keepdims=True)
        now[onehot] -= 1
        direction = (gradients.features.T @ now).T
    return np.array(chosen)
