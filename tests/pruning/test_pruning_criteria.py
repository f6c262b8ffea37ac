"""Laws that every criterion on the shelf keeps: a new one is tested the moment it exists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_vits import batches, tiny

from lotus.pruning import compensate as compensation
from lotus.pruning import criteria, measure, scoring
from selection import methods

UNITS, IMAGES, WIDTH = 12, 50, 7
SHELF = methods.names(criteria)
DRAWN = [name for name in SHELF if "rng" in methods.reads(getattr(criteria, name))]
READING = [name for name in SHELF if name not in DRAWN]


def known(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(IMAGES, UNITS)) @ rng.normal(size=(UNITS, UNITS))
    return {
        "covariance": np.cov(drawn.T, bias=True),
        "gain": rng.uniform(0.5, 2, size=UNITS),
        "read_squares": rng.exponential(size=(UNITS, WIDTH + 1)),
        "write_squares": rng.exponential(size=(UNITS, WIDTH)),
        "reads": rng.normal(size=(UNITS, WIDTH + 1)),
        "writes": rng.normal(size=(UNITS, WIDTH)),
        "gradients": rng.normal(size=(IMAGES, UNITS)),
        "gates": rng.uniform(0.1, 1, size=UNITS) * rng.choice([-1, 1], size=UNITS),
        "attention": rng.uniform(0.1, 1, size=(3, UNITS)),  # heads of one unit
        "units": UNITS,
        "images": IMAGES,
        "rng": np.random.default_rng(seed),
    }


def score(name: str, available: dict, **options) -> np.ndarray:
    return methods.call(getattr(criteria, name), available, options, place="test")


def test_the_shelf_holds_what_the_config_names():
    assert {
        "gate",
        "magnitude",
        "taylor",
        "fisher",
        "hessian",
        "variance",
        "denoised_variance",
        "obs",
        "random",
    } <= set(SHELF)


@pytest.mark.parametrize("name", SHELF)
def test_a_finite_score_a_unit_and_nothing_below_zero(name):
    scores = score(name, known())
    assert scores.shape == (UNITS,)
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()


@pytest.mark.parametrize("name", READING)
def test_a_unit_that_writes_nothing_goes_first(name):
    available = known()
    available["writes"][4] = 0  # so that its gate cannot move the loss
    available["gates"][4] = 0
    available["gradients"][:, 4] = 0
    available["attention"][:, 4] = 0
    available["gain"][4] = 0
    available["read_squares"][4] = 0  # so that no weight that makes it can move the loss either
    assert score(name, available).argmin() == 4


@pytest.mark.parametrize("name", READING)
def test_the_order_of_units_does_not_matter(name):
    available = known()
    order = np.random.default_rng(1).permutation(UNITS)
    rows = ("reads", "writes", "gates", "gain", "read_squares", "write_squares")
    turned = {**available, **{key: available[key][order] for key in rows}}
    turned["gradients"] = available["gradients"][:, order]
    turned["attention"] = available["attention"][:, order]
    turned["covariance"] = available["covariance"][np.ix_(order, order)]
    np.testing.assert_allclose(score(name, turned), score(name, available)[order])


@pytest.mark.parametrize("name", READING)
def test_more_of_everything_is_worth_more(name):
    available = known()
    for key in ("reads", "writes", "gates", "gain", "read_squares", "write_squares"):
        available[key][3] = 10 * np.abs(available[key]).max()
    available["gradients"][:, 3] = 10 * np.abs(available["gradients"]).max()
    available["attention"][:, 3] = 10 * available["attention"].max()
    available["covariance"][3] *= 100  # the unit itself, a hundred times
    available["covariance"][:, 3] *= 100
    assert score(name, available).argmax() == 3


def test_a_gate_is_as_open_as_it_is_far_from_zero():
    np.testing.assert_array_equal(criteria.gate(np.array([-2.0, 0.5, 0.0, -0.25])), [2, 0.5, 0, 0.25])


def test_heads_are_scored_by_their_attention_so_far():
    """Measured on a model: the largest entry of each row of softmax(QK^T), its mean, added up over the blocks."""
    model, data = tiny(), batches()
    found = measure.measure(model, data, gradients=False, moments="none", attention=True)
    scores = scoring.score(model, criteria.cumulative_attention, {}, measured=found)
    images, total = torch.cat([images for images, _ in data]), torch.zeros(3)
    for i, block in enumerate(model.blocks):
        kept = dict[str, Any]()
        hook = block.attn.qkv.register_forward_hook(lambda _, __, out, kept=kept: kept.update(qkv=out))
        with torch.no_grad():
            model(images)
        hook.remove()
        q, k, _ = kept["qkv"].reshape(len(images), -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        total = total + (q @ k.transpose(-2, -1) / 4).softmax(-1).amax(-1).mean((0, 2))
        np.testing.assert_allclose(scores[f"blocks.{i}.attn"].reshape(3, 16).sum(1), total, rtol=1e-5)
        assert scores[f"blocks.{i}.mlp"].sum() == pytest.approx(float(total.sum()), rel=1e-5)
        alone = criteria.cumulative_attention(np.stack([[1.0, 2, 3], [4, 5, 6]]), 6, accumulate=False)
    np.testing.assert_allclose(alone, [2, 2, 2.5, 2.5, 3, 3])


@pytest.mark.parametrize("name", DRAWN)
def test_chance_follows_the_seed(name):
    np.testing.assert_array_equal(score(name, known(5)), score(name, known(5)))
    assert (score(name, known(5)) != score(name, known(6))).any()


def test_magnitude_is_blind_to_scale_moved_across_the_unit():
    available = known()
    moved = {**available, "reads": available["reads"] * 4, "writes": available["writes"] / 4}
    np.testing.assert_allclose(score("magnitude", moved), score("magnitude", available))
    group = (available["reads"] ** 2).sum(1) + (available["writes"] ** 2).sum(1)
    np.testing.assert_allclose(score("magnitude", available, combine="sum"), group)
    group = np.abs(available["reads"]).sum(1) + np.abs(available["writes"]).sum(1)
    np.testing.assert_allclose(score("magnitude", available, combine="sum", norm=1), group)


def test_taylor_sees_gradients_that_cancel_over_the_images():
    available = known()
    available["gradients"][:, 0] = np.tile([3.0, -3.0], IMAGES // 2)
    assert score("taylor", available)[0] == 3
    assert score("taylor", available, signed=True)[0] == 0
    assert score("fisher", available)[0] == 4.5


def outputs_lost(x: np.ndarray, weight: np.ndarray, kept: list[int], compensate: compensation.Compensate) -> float:
    """Mean square of what a Linear's outputs lose, measured on the inputs themselves after a fold."""
    moments = compensation.Moments()
    moments.add(torch.from_numpy(x))
    bias = torch.zeros(len(weight), dtype=torch.float64)
    small, shift = compensation.fold(torch.from_numpy(weight), bias, kept, moments, compensate, ridge=0)
    assert shift is not None
    lost = x @ weight.T - (x[:, kept] @ small.numpy().T + shift.numpy())
    return float((lost**2).sum(axis=1).mean())


@pytest.mark.parametrize(("name", "how"), [("variance", "mean"), ("obs", "affine")])
def test_variance_and_obs_are_what_is_lost_when_the_unit_goes_and_is_made_up_for(name, how):
    """Brute force: every unit is taken out in turn, by the fold that the score presumes."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, UNITS)) @ rng.normal(size=(UNITS, UNITS)) + 5
    weight = rng.normal(size=(WIDTH, UNITS))
    available = {"covariance": np.cov(x.T, bias=True), "gain": (weight**2).sum(axis=0)}
    options = {"ridge": 0.0} if name == "obs" else {}
    lost = [outputs_lost(x, weight, [j for j in range(UNITS) if j != u], how) for u in range(UNITS)]
    np.testing.assert_allclose(score(name, available, **options), lost, rtol=1e-8)
    if name == "variance":
        np.testing.assert_allclose(score(name, available, weighted=False), x.var(axis=0))


def test_obs_of_units_without_variance():
    available = {"covariance": np.zeros((UNITS, UNITS)), "gain": np.ones(UNITS)}
    np.testing.assert_array_equal(score("obs", available), np.zeros(UNITS))
    available["covariance"][:3, :3] = 1  # three copies of one unit: any of them can go
    scores = score("obs", available)
    assert np.isfinite(scores).all()
    assert scores.max() < 1e-3
