"""SHELF: what a unit is worth. Higher = keep first.

A unit is an MLP unit, a dimension of the attention's output (v), or a query/key dimension; a head is worth the sum of its
outputs. A criterion is called once a site and returns a score a unit, (U,). It may read:

    reads      (U, R) the rows that make the unit: of fc1 or v, with bias; of q for a query/key dimension
    writes     (U, W) the columns that the unit goes through: of fc2 or proj, LayerScale folded in; the rows of k
    gradients  (N, U) for each of N calibration images, the loss' derivative by a gate of 1 on the unit
    gates      (U,) the gate that training learned for the unit; query/key dimensions have none
    rng        a numpy Generator
    units      U

All are float64 numpy arrays. U units, N images.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Array = np.ndarray


def gate(gates: Array) -> Array:
    """How far the learned gate is open: |a| (VTP, Zhu et al. 2021, 2104.08500, section 3.2)."""
    return np.abs(gates)


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
    return into + out if combine == "sum" else (into * out) ** (1 / norm)


def taylor(gradients: Array, *, signed: bool = False) -> Array:
    """First-order change of the loss when the unit goes: mean over images of |dL/dg|.

    Molchanov et al. 2017 (1611.06440), equation 8; Michel et al. 2019 (1905.10650), equation 2. ``signed`` takes the absolute
    value after the mean, as a gradient of the whole batch does: near an optimum that measures noise.
    """
    return np.abs(gradients.mean(axis=0)) if signed else np.abs(gradients).mean(axis=0)


def fisher(gradients: Array) -> Array:
    """Second-order change of the loss when the unit goes: half the empirical Fisher information of its gate.

    Theis et al. 2018 (1801.05787), equation 8; Molchanov et al. 2019 (1906.10771), equation 8, a sample at a time.
    """
    return 0.5 * np.square(gradients).mean(axis=0)


def random(units: int, rng: np.random.Generator) -> Array:
    """Chance: the floor that any criterion should clear."""
    return rng.random(units)
