"""Which images the runs of a memorization estimate train on."""

import itertools
from collections import Counter

import numpy as np
import pytest

from selection.errors import Refused
from selection.random_subsets import random_parts


@pytest.mark.parametrize(
    ("images", "runs", "part"),
    [(100, 10, 0.7), (101, 4, 0.75), (1437, 4, 0.75), (8, 2, 0.5), (50, 5, 0.2), (53, 33, 0.3), (10, 3, 2 / 3)],
)
def test_every_image_is_in_some_runs_and_out_of_others(images: int, runs: int, part: float) -> None:
    chosen = random_parts(images, runs, part, np.random.default_rng(3))
    assert chosen.shape == (runs, images)
    sizes = set(chosen.sum(1).tolist())
    assert len(sizes) == 1, "equally many each"
    assert abs(sizes.pop() - part * images) < 1
    times = chosen.sum(0)
    assert times.min() > 0
    assert times.max() < runs
    assert times.max() - times.min() <= 1
    again = random_parts(images, runs, part, np.random.default_rng(3))
    assert np.array_equal(chosen, again)


def test_any_set_is_as_likely_as_any_other() -> None:
    """Of each run by itself, also of those that are dealt from the end of one pack and the start of the next."""
    draws = 3000
    seen: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(4)]
    rng = np.random.default_rng(0)
    for _ in range(draws):
        for counter, own in zip(seen, random_parts(5, 4, 0.6, rng)):
            counter[tuple(np.flatnonzero(own).tolist())] += 1
    every = list(itertools.combinations(range(5), 3))
    for counter in seen:
        assert set(counter) == set(every)
        expected = draws / len(every)
        chi = sum((counter[own] - expected) ** 2 / expected for own in every)
        assert chi < 30, "nine degrees of freedom: above 30 once in 2,000"


@pytest.mark.parametrize(
    ("images", "runs", "part", "says"),
    [
        (100, 3, 0.7, "at least 4"),
        (100, 1, 0.5, "at least 2"),
        (100, 4, 1.0, "Say 0.7"),
        (1, 4, 0.7, "cannot be dealt"),
        (7, 2, 0.5, "Take a run more"),
    ],
)
def test_too_few_runs_or_images(images: int, runs: int, part: float, says: str) -> None:
    with pytest.raises(Refused, match=says):
        random_parts(images, runs, part, np.random.default_rng(0))
