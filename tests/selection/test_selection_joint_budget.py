"""The joint budget: against the definition, tried factor by factor, and against every way to share that there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.errors import Refused
from selection.joint_budget import allot, levels


def by_factor(factor: float, images: int, patches: int, steps: np.ndarray) -> np.ndarray:
    """(N,) patches of each rank, by the definition."""
    wish = np.clip(factor * (np.arange(images) + 0.5) / images * patches, steps[0], patches)
    return steps[np.abs(wish[:, None] - steps).argmin(1)]


@given(
    images=st.integers(1, 40),
    patches=st.integers(4, 70),
    keep=st.floats(0.15, 0.98),
    buckets=st.integers(2, 6),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_it_is_the_largest_factor_that_the_budget_bears(
    images: int, patches: int, keep: float, buckets: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).permutation(images)
    steps = levels(patches, buckets, keep / 2)
    budget = round(keep * images * patches)
    if len(steps) < 2 or steps[0] * images >= budget:
        with pytest.raises(Refused, match="leaves nothing to share out"):
            allot(scores, patches=patches, keep=keep, buckets=buckets)
        return
    found = allot(scores, patches=patches, keep=keep, buckets=buckets)
    given_ = found.levels[found.level][np.argsort(scores)]
    assert (np.diff(given_) >= 0).all(), "no image gets less than an easier one"
    gap = int(np.diff(steps).max())
    assert budget - gap < found.total <= budget or found.total == images * patches
    low, high = 0.0, 2.0 * images  # bisection: the total never falls with the factor
    assert by_factor(high, images, patches, steps).sum() == images * patches
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if by_factor(middle, images, patches, steps).sum() <= budget else (low, middle)
    # On one side of the factor that bisection finds lies one allotment, on the other the next; ours is between them: of
    # images that rise at the very same factor as many do as the budget bears. A hair aside, since rounding may tell such
    # images apart.
    assert (by_factor(low * (1 - 1e-9), images, patches, steps) <= given_).all()
    assert (given_ <= by_factor(high * (1 + 1e-9), images, patches, steps)).all()


@pytest.mark.parametrize("keep", [0.4, 0.5, 0.7, 0.9])
def test_no_monotone_way_to_share_comes_nearer_by_a_whole_step(keep: float) -> None:
    """Every split of eight images over three levels."""
    images, patches = 8, 16
    found = allot(np.arange(images), patches=patches, keep=keep)
    budget = round(keep * images * patches)
    totals = [
        int(found.levels[np.repeat([0, 1, 2], np.diff([0, *ends, images]))].sum())
        for ends in itertools.combinations_with_replacement(range(images + 1), 2)
    ]
    best = max(total for total in totals if total <= budget)
    assert best - found.total < np.diff(found.levels).max()
    assert found.total in totals


def test_by_hand() -> None:
    """Four images wish for (2, 6, 10, 14) times the factor. The levels 4, 8, 12, 16 have their middles at 6, 10 and 14, so at
    factor 1 they get 4, 8, 12, 16: all of the budget of 0.625 * 4 * 16."""
    found = allot([0.3, -1.0, np.inf, 0.5], patches=16, keep=0.625, buckets=4, least=0.25)
    assert found.levels.tolist() == [4, 8, 12, 16]
    assert found.total == 40
    assert found.level.tolist() == [1, 0, 3, 2]


def test_ties_are_in_random_order_and_the_same_for_the_same_seed() -> None:
    one, other = (allot(np.zeros(100), patches=16, keep=0.5, seed=seed) for seed in (1, 2))
    assert one.total == other.total
    assert not np.array_equal(one.level, other.level)
    assert np.array_equal(one.level, allot(np.zeros(100), patches=16, keep=0.5, seed=1).level)
    assert not (np.diff(one.level) >= 0).all(), "not in the order of the rows"


def test_where_nothing_can_be_shared() -> None:
    with pytest.raises(Refused, match=r"train\.patches\.joint\.least: 0\.5 .*16 patches"):
        allot(np.arange(9), patches=16, keep=0.5, least=0.5, place="train.patches.joint")
    with pytest.raises(Refused, match="none of them NaN"):
        allot([0.0, np.nan], patches=16, keep=0.5)
