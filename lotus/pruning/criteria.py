"""SHELF: what a unit is worth. Higher = keep first.

A unit is an MLP unit, a dimension of the attention's output (v), or a query/key dimension; a head is worth the sum of its
outputs. Where inputs may go too, a unit is also a channel that qkv or fc1 reads: made by its gain and bias in the norm, it goes
through its column of qkv or fc1. A criterion is called once a site and returns a score a unit, (U,). It may read:

    reads      (U, R) the rows that make the unit: of fc1 or v, with bias; of q for a query/key dimension
    writes     (U, W) the columns that the unit goes through: of fc2 or proj, LayerScale folded in; the rows of k
    gradients  (N, U) for each of N calibration images, the loss' derivative by a gate of 1 on the unit
    gates      (U,) the gate that training learned for the unit; query/key dimensions have none
    covariance (U, U) of the units over the calibration images: of what proj and fc2 read; for query/key dimensions, of what
               each adds to a logit, E[q q'] * E[k k'] element by element (0 between heads)
    gain       (U,) what a unit of variance adds to the mean square of what is written: the squared norm of the unit's column,
               LayerScale folded in; 1 for query/key dimensions, which add to a logit as they are
    read_squares, write_squares  (U, R), (U, W) mean over images of the squared derivative of the loss by each of ``reads``, ``writes``
    attention  (K, H) how much a query attends to the token that it attends to most, the mean over queries and images; of
               the blocks up to this one that have as many heads, this one last. Of attention's outputs alone: MLP units
               and inputs are then ranked by magnitude
    rng        a numpy Generator
    units      U
    images     N

All are float64 numpy arrays. U units, N images.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lotus.pruning.spectrum import denoised

Array = np.ndarray


def gate(gates: Array) -> Array:
    """How far the learned gate is open: |a| (VTP, Zhu et al. 2021, 2104.08500, section 3.2)."""
    found: Array = np.abs(gates)
    return found


def magnitude(
    reads: Array, writes: Array, *, norm: float = 2.0, combine: Literal["product", "sum"] = "product"
) -> Array:
    """Size of the weights around the unit.

    ``product``: norm of what makes the unit times norm of what it writes, so that a unit which writes nothing is worth
    nothing, and scaling one side up and the other down changes nothing. ``sum``: the coupled group's own norm to the power
    of ``norm``, as published for DepGraph (Fang et al. 2023, 2301.12900, equation 4).
    """
    into = (np.abs(reads) ** norm).sum(axis=1)
    out = (np.abs(writes) ** norm).sum(axis=1)
    found: Array = into + out if combine == "sum" else (into * out) ** (1 / norm)
    return found


def taylor(gradients: Array, *, signed: bool = False) -> Array:
    """First-order change of the loss when the unit goes: mean over images of |dL/dg|.

    Molchanov et al. 2017 (1611.06440), equation 8; Michel et al. 2019 (1905.10650), equation 2. ``signed`` takes the absolute
    value after the mean, as a gradient of the whole batch does: near an optimum that measures noise.
    """
    found: Array = np.abs(gradients.mean(axis=0)) if signed else np.abs(gradients).mean(axis=0)
    return found


def fisher(gradients: Array) -> Array:
    """Second-order change of the loss when the unit goes: half the empirical Fisher information of its gate.

    Theis et al. 2018 (1801.05787), equation 8; Molchanov et al. 2019 (1906.10771), equation 8, a sample at a time.
    """
    found: Array = 0.5 * np.square(gradients).mean(axis=0)
    return found


def hessian(reads: Array, writes: Array, read_squares: Array, write_squares: Array) -> Array:
    """Second-order change of the loss when each weight around the unit goes, the weights taken one by one: half the sum of w^2 h.

    Optimal brain damage (LeCun et al. 1990, equation 5) on the coupled group, with h the empirical Fisher information of a
    weight: the mean over images of its squared derivative, an image at a time.
    """
    found: Array = 0.5 * ((reads**2 * read_squares).sum(axis=1) + (writes**2 * write_squares).sum(axis=1))
    return found


def variance(covariance: Array, gain: Array, *, weighted: bool = True) -> Array:
    """What is lost when the unit stays at its mean: its variance, times what a unit of it adds to what is written.

    Without ``weighted`` the variance alone, as published (Berisha et al. 2025, 2507.12988, section 3.2).
    """
    spread = np.diag(covariance)
    return spread * gain if weighted else spread.copy()


def denoised_variance(
    covariance: Array, gain: Array, images: int, *, ratio: float = 0.5, weighted: bool = True
) -> Array:
    """As :func:`variance`, of which a part is what stays of it without the covariance's noise: (1 - p) var + p var without noise.

    DVBP (Lee, Choo and Jeon 2026, 2608.17657, equations 13 to 23; there unweighted, of MLPs alone); the weights that go with it
    are ``compensate: denoised``.

    Args:
        covariance, gain: see the head of this file
        images: how many the covariance was measured on
        ratio: p, the fraction of the units that goes
        weighted: times the gain, as :func:`variance` is
    """
    spread = (1 - ratio) * np.diag(covariance) + ratio * np.diag(denoised(covariance, images))
    return np.maximum(spread * gain if weighted else spread, 0)


def obs(covariance: Array, gain: Array, *, ridge: float = 1e-4) -> Array:
    """What is lost when the unit goes and all others make up for it as well as they can: gain / [C^-1]_uu.

    Optimal brain surgeon (Hassibi & Stork 1993, equation 5) with the squared error of the site's output as the loss; the change
    of weights that goes with it is ``compensate: affine``. ``ridge``: as a fraction of the mean variance, as there.
    """
    scale = np.diag(covariance).mean()
    if scale == 0:
        return np.zeros(len(gain))
    inverse = np.linalg.inv(covariance + ridge * scale * np.eye(len(covariance)))
    found: Array = gain / np.diag(inverse)
    return found


def cumulative_attention(attention: Array, units: int, *, accumulate: bool = True) -> Array:
    """How sharply the head attends, added up over the blocks so far (CP-ViT, Song et al. 2022, 2203.04570).

    The released code accumulates such maxima for patches; its heads are scored here in the same way. A head's score is
    shared out evenly among its outputs. Without ``accumulate`` that of its own block alone.
    """
    heads = attention.sum(axis=0) if accumulate else attention[-1]
    each = units // len(heads)
    return np.repeat(heads, each) / each


def random(units: int, rng: np.random.Generator) -> Array:
    """Chance: the floor that any criterion should clear."""
    return rng.random(units)
