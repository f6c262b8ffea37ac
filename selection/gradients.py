"""Gradients of the head, one an image, that are never written out.

The loss of image i has, by the weights and bias of the last layer, the gradient ``g_i = e_i (h_i, 1)^T``: an outer product of
the error ``e_i = softmax - onehot`` (C) and the features ``h_i`` (D). Its C (D + 1) numbers (385,000 for ImageNet-1k and
D = 384) follow from C + D of them, and so does all that a picker asks of it:

* ``|g_i|^2 = |e_i|^2 (|h_i|^2 + 1)``
* ``<g_i, g_j> = (e_i . e_j) (h_i . h_j + 1)``
* ``sum w_i g_i = E^T diag(w) (H, 1)``, a matrix (C, D + 1)
* ``<g_i, M> = e_i^T M (h_i, 1)``

Legend: n images, C classes, D width of the features.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from selection.memory import GB

Array = npt.NDArray[Any]
Index = npt.NDArray[np.int64] | slice

EVERY = slice(None)


class Gradients:
    """The gradients of n images.

    Args:
        errors: softmax minus one-hot label, (n, C).
        features: what the last layer reads, (n, D); the one for the bias is added here.
        dtype: single precision keeps inner products to about 1e-6 of ``|g_i| |g_j|``, double to 1e-15.
    """

    def __init__(self, errors: Array, features: Array, *, dtype: Any = np.float32) -> None:
        self.errors = np.ascontiguousarray(errors, dtype=dtype)
        self.features = np.ones((len(features), features.shape[1] + 1), dtype=dtype)
        self.features[:, :-1] = features
        self.squares = np.einsum("nc,nc->n", self.errors, self.errors) * np.einsum(
            "nd,nd->n", self.features, self.features
        )

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def norms(self) -> Array:
        """(n,)"""
        norms: Array = np.sqrt(self.squares)
        return norms

    def inner(self, rows: Index, columns: Index = EVERY, *, dtype: Any = None) -> Array:
        """``<g_i, g_j>``: (rows, columns); computed in ``dtype`` where that is said."""
        kind = dtype or self.errors.dtype

        def take(array: Array, index: Index) -> Array:
            return array[index].astype(kind, copy=False)

        products = take(self.errors, rows) @ take(self.errors, columns).T
        products *= take(self.features, rows) @ take(self.features, columns).T
        return products

    def squared_distances(self, rows: Index, columns: Index = EVERY) -> Array:
        """``|g_i - g_j|^2``, at least 0: (rows, columns)."""
        products = self.inner(rows, columns)
        products *= -2
        products += self.squares[rows][:, None]
        products += self.squares[columns]
        return np.maximum(products, 0, out=products)

    def total(self, rows: Index = EVERY, weights: Array | None = None) -> Array:
        """The sum of the gradients of ``rows``, each times its weight: (C, D + 1)."""
        errors = self.errors[rows]
        if weights is not None:
            errors = errors * weights[:, None].astype(errors.dtype)
        # Turned round: OpenBLAS takes ten times as long for few rows times many columns.
        total: Array = (self.features[rows].T @ errors).T
        return total

    def along(self, direction: Array, rows: Index = EVERY) -> Array:
        """``<g_i, direction>`` of each of ``rows``; ``direction``: (C, D + 1)."""
        turned = self.features[rows] @ direction.astype(self.errors.dtype).T
        products: Array = np.einsum("nc,nc->n", turned, self.errors[rows])
        return products

    def sketch(self, width: int, rng: np.random.Generator) -> Array:
        """(n, width) whose inner products are those of the gradients on average: a random projection, itself factorized."""
        left = rng.standard_normal((self.errors.shape[1], width)).astype(self.errors.dtype)
        right = rng.standard_normal((self.features.shape[1], width)).astype(self.errors.dtype)
        sketched: Array = (self.errors @ left) * (self.features @ right) / np.sqrt(width).astype(self.errors.dtype)
        return sketched


def need_products(count: int) -> float:
    """GB that the inner products of so many gradients with one another take, in double precision."""
    return 8 * count**2 / GB


def need_batches(n: int, budget: int, size: int, classes: int, width: int) -> float:
    """GB that the gradients of all batches of ``size`` take, with the inner products of those that are taken."""
    return 8 * (n / size) * classes * (width + 1) / GB + need_products(math.ceil(budget / size))
