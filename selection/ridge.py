"""What images teach a linear model: a ridge regression of one-hot labels on embeddings of length 1.

Legend: n images, C classes, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from selection.neighbors import slices, unit

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


def taught(embeddings: Array, labels: Rows, classes: int, rows: Rows, ridge: float) -> tuple[int, float]:
    """How many of all n images the regression on ``rows`` tells right, and its squared error on them, up to a constant.

    Args:
        embeddings: (n, D).
        labels: (n,) 0 to C - 1.
        classes: C.
        rows: (m,) to fit it on.
        ridge: what is added to the diagonal.
    """
    inside = _with_one(embeddings[rows]).astype(np.float64)
    sums = np.stack([inside[labels[rows] == place].sum(0) for place in range(classes)])  # (C, D + 1)
    weights = np.linalg.solve(inside.T @ inside + ridge * np.eye(inside.shape[1]), sums.T).astype(np.float32)
    right, error = 0, 0.0
    for part in slices(len(labels), embeddings.shape[1] + classes):
        told, said = labels[part], _with_one(embeddings[part]) @ weights
        right += int((said.argmax(1) == told).sum())
        error += float((said**2).sum() - 2 * said[np.arange(len(told)), told].sum())
    return right, error


def _with_one(embeddings: Array) -> npt.NDArray[np.float32]:
    """Embeddings of length 1, and a column of ones beside them."""
    return np.pad(unit(embeddings), ((0, 0), (0, 1)), constant_values=1.0)
