"""Laws that every criterion on the shelf keeps: a new one is tested the moment it exists."""

from __future__ import annotations

import numpy as np
import pytest

from lotus.pruning import criteria
from selection import methods

UNITS, IMAGES, WIDTH = 12, 50, 7
SHELF = methods.names(criteria)
DRAWN = [name for name in SHELF if "rng" in methods.reads(getattr(criteria, name))]
READING = [name for name in SHELF if name not in DRAWN]


def known(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "reads": rng.normal(size=(UNITS, WIDTH + 1)),
        "writes": rng.normal(size=(UNITS, WIDTH)),
        "gradients": rng.normal(size=(IMAGES, UNITS)),
        "gates": rng.uniform(0.1, 1, size=UNITS),
        "units": UNITS,
        "rng": np.random.default_rng(seed),
    }


def score(name: str, available: dict, **options) -> np.ndarray:
    return methods.call(getattr(criteria, name), available, options, place="test")


def test_the_shelf_holds_what_the_config_names():
    assert {"gate", "magnitude", "taylor", "fisher", "random"} <= set(SHELF)


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
    assert score(name, available).argmin() == 4


@pytest.mark.parametrize("name", READING)
def test_the_order_of_units_does_not_matter(name):
    available = known()
    order = np.random.default_rng(1).permutation(UNITS)
    turned = {**available, **{key: available[key][order] for key in ("reads", "writes", "gates")}}
    turned["gradients"] = available["gradients"][:, order]
    np.testing.assert_allclose(score(name, turned), score(name, available)[order])


@pytest.mark.parametrize("name", READING)
def test_more_of_everything_is_worth_more(name):
    available = known()
    for key in ("reads", "writes", "gates"):
        available[key][3] = 10 * np.abs(available[key]).max()
    available["gradients"][:, 3] = 10 * np.abs(available["gradients"]).max()
    assert score(name, available).argmax() == 3


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


def test_taylor_sees_gradients_that_cancel_over_the_images():
    available = known()
    available["gradients"][:, 0] = np.tile([3.0, -3.0], IMAGES // 2)
    assert score("taylor", available)[0] == 3
    assert score("taylor", available, signed=True)[0] == 0
    assert score("fisher", available)[0] == 4.5
