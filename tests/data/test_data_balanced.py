"""Balanced sampling: how often each class and each image comes in an epoch, and that both loaders can carry it out."""

from __future__ import annotations

import numpy as np
import pytest

from lotus.data.sample_plan import SamplePlan, balanced
from selection.errors import Refused

LABELS = np.repeat([3, 0, 7], (70, 25, 5))
ROOT = {"equal": np.array([1.0, 1.0, 1.0]), "sqrt": np.sqrt([25.0, 70.0, 5.0])}


@pytest.mark.parametrize("how", ROOT)
@pytest.mark.parametrize("epoch", range(5))
def test_each_class_comes_as_often_as_it_should(how: str, epoch: int) -> None:
    drawn = balanced(LABELS, how, seed=4, epoch=epoch)
    assert len(drawn) == len(LABELS)
    wanted = 100 * ROOT[how] / ROOT[how].sum()
    seen = [int((LABELS[drawn] == label).sum()) for label in (0, 3, 7)]
    assert sum(seen) == 100
    assert np.abs(np.array(seen) - wanted).max() < 1
    times = np.bincount(drawn, minlength=100)
    for label in (0, 3, 7):  # no image of a class comes twice as long as another has not come
        assert np.ptp(times[label == LABELS]) <= 1


def test_a_draw_is_a_function_of_seed_and_epoch() -> None:
    one = balanced(LABELS, "equal", seed=4, epoch=2)
    assert np.array_equal(one, balanced(LABELS, "equal", seed=4, epoch=2))
    assert not np.array_equal(one, balanced(LABELS, "equal", seed=4, epoch=3))
    assert not np.array_equal(one, balanced(LABELS, "equal", seed=5, epoch=2))


def test_every_image_of_a_large_class_comes_in_time() -> None:
    seen = np.unique(np.concatenate([balanced(LABELS, "equal", seed=0, epoch=epoch) for epoch in range(40)]))
    assert len(seen) == 100


def test_equal_classes_are_each_seen_once() -> None:
    assert balanced(np.tile(np.arange(4), 6), "sqrt", seed=0, epoch=0).tolist() == list(range(24))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_has_the_same_images_on_any_number_of_ranks(world: int) -> None:
    rows = np.arange(100)[balanced(LABELS, "equal", seed=0, epoch=1)]
    parts = []
    for rank in range(world):
        plan = SamplePlan(np.arange(100), seed=0, batch_size=20, world=world, rank=rank)
        plan.take(rows, repeats=True)
        parts.append(np.split(plan.order(1), 5))
    steps = [sorted(np.concatenate(step).tolist()) for step in zip(*parts, strict=True)]
    alone = SamplePlan(np.arange(100), seed=0, batch_size=20)
    alone.take(rows, repeats=True)
    assert steps == [sorted(step.tolist()) for step in np.split(alone.order(1), 5)]
    with pytest.raises(Refused, match="appears"):
        alone.take(rows)
