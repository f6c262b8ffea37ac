"""What of a covariance is noise: eigenvalues that a matrix of chance would have too (Lee, Choo and Jeon 2026, 2608.17657).

U units, N images. Tokens of an image are alike, so that images count as samples, not tokens (section 3.3.2 there).
"""

from __future__ import annotations

import functools
import math

import numpy as np

Array = np.ndarray
_POINTS = 20_001
"""At which the distribution is summed up."""


@functools.lru_cache(64)
def median_of_noise(ratio: float) -> float:
    """Median of the Marchenko-Pastur distribution of variance 1 (equation 16).

    Args:
        ratio: U / N. Above 1 some eigenvalues are 0 for want of samples, and the median is that of the others.
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # t = low + (high - low) (1 - cos angle) / 2 takes the roots at both ends out of the density sqrt((high - t)(t - low)) / t.
    angle = np.linspace(1e-9, math.pi, _POINTS)
    at = low + (high - low) * (1 - np.cos(angle)) / 2
    density = np.sin(angle) ** 2 / at
    mass = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return float(np.interp(mass[-1] / 2, mass, at))


def denoised(covariance: Array, images: int) -> Array:
    """(U, U) of the eigenvectors whose eigenvalue is above what noise reaches (equations 14 and 18 to 21).

    The noise's variance is read off the median eigenvalue, of those that are not 0, as Gavish and Donoho (2014) have it.
    """
    values, vectors = np.linalg.eigh(covariance)
    there = values[values > values[-1] * len(values) * np.finfo(np.float64).eps]
    if not len(there):
        return np.zeros_like(covariance)
    ratio = len(covariance) / images
    edge = np.median(there) / median_of_noise(ratio) * (1 + math.sqrt(ratio)) ** 2
    signal = values > edge
    found: Array = (vectors[:, signal] * values[signal]) @ vectors[:, signal].T
    return found
