"""Compensation against its oracles: least squares, and the closed forms of the surgeon's brain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lotus.pruning import compensate
from lotus.pruning.compensate import Moments, fold

KEPT = [0, 2, 3, 6]
GONE = [1, 4, 5, 7]


def drawn(rows: int = 400, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with means of their own, (rows, width) float64."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return torch.randn(rows, width, generator=draw, dtype=torch.float64) @ mix + 3 * torch.randn(
        width, generator=draw, dtype=torch.float64
    )


def moments(x: torch.Tensor, parts: int = 3) -> Moments:
    found = Moments()
    for part in x.tensor_split(parts):
        found.add(part)
    return found


def layer(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(5, 8, generator=draw, dtype=torch.float64), torch.randn(5, generator=draw, dtype=torch.float64)


def error(x: torch.Tensor, small: tuple) -> float:
    weight, bias = layer()
    want = x @ weight.T + bias
    got = x[:, KEPT] @ small[0].T + (0 if small[1] is None else small[1])
    return float((want - got).square().sum())


def test_streamed_moments_are_those_of_all_vectors():
    x = drawn() + 100  # far from zero: sums of squares alone would lose digits
    found = moments(x, parts=7)
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(x.T, correction=0))
    tokens = Moments()
    tokens.add(x.reshape(20, 20, 8))
    torch.testing.assert_close(tokens.covariance, found.covariance)
    single = moments(x.float(), parts=7)
    torch.testing.assert_close(single.covariance, found.covariance, rtol=1e-4, atol=1e-4)


def test_affine_is_the_least_squares_fit_of_the_outputs():
    x = drawn()
    weight, bias = layer()
    target = x @ weight.T + bias
    design = torch.cat((x[:, KEPT], torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
    best = torch.linalg.lstsq(design, target).solution.T  # (5, 4 + 1)
    new_weight, new_bias = fold(weight, bias, KEPT, moments(x), "affine", ridge=0)
    torch.testing.assert_close(new_weight, best[:, :-1])
    torch.testing.assert_close(new_bias, best[:, -1])


def test_affine_is_the_group_update_of_optimal_brain_surgeon():
    x = drawn()
    weight, bias = layer()
    inverse = torch.linalg.inv(torch.cov(x.T, correction=0))
    step = -weight[:, GONE] @ torch.linalg.inv(inverse[GONE][:, GONE]) @ inverse[GONE]
    surgeon = (weight + step)[:, KEPT]
    torch.testing.assert_close(fold(weight, bias, KEPT, moments(x), "affine", ridge=0)[0], surgeon)


def test_affine_beats_mean_beats_none():
    x = drawn()
    weight, bias = layer()
    none, mean, affine = (error(x, fold(weight, bias, KEPT, moments(x), how)) for how in ("none", "mean", "affine"))
    assert affine < mean < none


def test_the_mean_is_the_affine_fold_where_nothing_can_be_predicted():
    x = drawn()
    weight, bias = layer()
    mean = fold(weight, bias, KEPT, moments(x), "mean")
    stiff = fold(weight, bias, KEPT, moments(x), "affine", ridge=1e12)
    torch.testing.assert_close(mean[0], weight[:, KEPT])
    torch.testing.assert_close(mean[1], bias + weight[:, GONE] @ x.mean(0)[GONE])
    torch.testing.assert_close(stiff, mean)


def test_without_a_bias_the_fold_goes_through_the_origin():
    x = drawn()
    weight, _ = layer()
    best = torch.linalg.lstsq(x[:, KEPT], x @ weight.T).solution.T
    new_weight, none = fold(weight, None, KEPT, moments(x), "affine", ridge=0)
    assert none is None
    torch.testing.assert_close(new_weight, best)
    assert torch.equal(fold(weight, None, KEPT, moments(x), "mean")[0], weight[:, KEPT])


def test_constant_units_are_carried_exactly_by_their_mean():
    x = drawn()
    x[:, GONE] = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=x.dtype)
    weight, bias = layer()
    for how in ("mean", "affine"):
        assert error(x, fold(weight, bias, KEPT, moments(x), how)) < 1e-16


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_dead_and_duplicate_units_do_not_break_the_solve(ridge):
    x = drawn()
    x[:, 2] = 0
    x[:, 3] = x[:, 0]
    weight, bias = layer()
    new_weight, new_bias = fold(weight, bias, KEPT, moments(x), "affine", ridge=ridge)
    assert new_weight.isfinite().all()
    assert error(x, (new_weight, new_bias)) < error(x, fold(weight, bias, KEPT, moments(x), "mean"))
    dead = fold(weight, bias, KEPT, moments(torch.zeros_like(x)), "affine", ridge=ridge)
    torch.testing.assert_close(dead, (weight[:, KEPT], bias))


def test_apply_writes_in_place_and_keeps_the_dtype():
    dense = nn.Linear(8, 5).bfloat16()
    small = nn.Linear(4, 5).bfloat16()
    compensate.apply(small, dense, KEPT, moments(drawn()), "affine")
    assert small.weight.dtype == torch.bfloat16
    assert small.weight.isfinite().all()
    nothing = nn.Linear(4, 5).bfloat16()
    compensate.apply(nothing, dense, KEPT, None, "none")
    assert torch.equal(nothing.weight, dense.weight[:, KEPT])


def test_a_covariance_that_is_worked_out_in_pieces_is_whole():
    """More units than go through at once, in uneven batches: numpy's covariance, and symmetric."""
    x = torch.randn(90, 600, generator=torch.Generator().manual_seed(0)).cumsum(1) + 5
    moments = Moments()
    for part in x.split(37):
        moments.add(part)
    found = moments.covariance
    torch.testing.assert_close(found.numpy(), np.cov(x.double().numpy().T, bias=True), rtol=1e-4, atol=1e-3)
    assert torch.equal(found, found.T)
