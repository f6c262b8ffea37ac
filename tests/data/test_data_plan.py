from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotus.data.plan import SamplePlan, checked_rows, cut
from selection.errors import Refused


@given(
    n=st.integers(4, 200),
    micro=st.integers(1, 9),
    world=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    epoch=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_steps_see_the_same_images_for_any_world(n: int, micro: int, world: int, accumulate: int, epoch: int) -> None:
    rows = np.random.default_rng(n).permutation(1000)[:n]
    whole = micro * world * accumulate
    alone = SamplePlan(rows, seed=3, batch_size=whole)
    ranks = [
        SamplePlan(rows, seed=3, batch_size=whole, world=world, rank=rank, accumulate=accumulate)
        for rank in range(world)
    ]
    orders = [plan.order(epoch) for plan in ranks]
    seen = np.concatenate(orders)
    assert len(np.unique(seen)) == len(seen), "disjoint"
    assert len({len(order) for order in orders}) == 1, "every rank has the same share"
    assert n - len(seen) == n % whole % world, "at most world - 1 sit out"
    full = n // whole
    for step in range(full):
        per_rank = micro * accumulate
        together = np.concatenate([order[step * per_rank : (step + 1) * per_rank] for order in orders])
        assert set(together) == set(alone.order(epoch)[step * whole : (step + 1) * whole])
    assert sum(ranks[0].batches(epoch)) == len(list(cut(orders[0], micro)))
    assert ranks[0].steps(epoch) == full + (n % whole >= world)
    assert ranks[0].micro == micro


def test_an_epoch_is_a_pure_function_of_its_key() -> None:
    plan = SamplePlan(np.arange(50), seed=1, batch_size=10)
    assert np.array_equal(plan.order(4), SamplePlan(np.arange(50), seed=1, batch_size=10).order(4))
    assert not np.array_equal(plan.order(4), plan.order(5))
    assert not np.array_equal(plan.order(1), SamplePlan(np.arange(50), seed=2, batch_size=10).order(0)), (
        "no seed + epoch"
    )
    assert np.array_equal(np.sort(plan.order(4)), np.arange(50))
    still = SamplePlan([5, 3, 9], batch_size=2, shuffle=False)
    assert still.order(7).tolist() == [5, 3, 9]


@given(n=st.integers(0, 60), world=st.integers(1, 5), batch=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_evaluation_repeats_nothing_and_drops_nothing(n: int, world: int, batch: int) -> None:
    rows = np.arange(n) * 2
    plans = [SamplePlan.evaluation(rows, batch_size=batch, world=world, rank=rank) for rank in range(world)]
    seen = np.concatenate([plan.order(0) for plan in plans])
    assert sorted(seen.tolist()) == rows.tolist()
    assert all(plan.steps() == len(list(cut(plan.order(0), plan.micro))) for plan in plans)
    assert SamplePlan.evaluation(rows, batch_size=batch).order(3).tolist() == rows.tolist()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "at least one"),
        ([1, 2, 1], "appears 2 times"),
        ([-1, 2], "count from 0"),
        ([True, False, True], "flatnonzero"),
        ([0.5, 1.0], "whole numbers"),
        ([[1, 2]], "one list"),
    ],
)
def test_rows_that_a_loader_would_stumble_over(rows: list[object], says: str) -> None:
    with pytest.raises(Refused, match=says):
        checked_rows(np.array(rows))
    with pytest.raises(Refused, match=says):
        SamplePlan(np.array(rows), batch_size=2)


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"batch_size": 10, "world": 3}, "multiple of 3"),
        ({"batch_size": 0}, "multiple of 1"),
        ({"batch_size": 12, "world": 2, "accumulate": 4}, "multiple of 8"),
        ({"batch_size": 8, "world": 2, "rank": 2}, "rank 2 of 2"),
        ({"batch_size": 8, "world": 8}, "fewer ranks"),
        ({"batch_size": 8, "accumulate": 0}, "at least 1"),
    ],
)
def test_shares_that_do_not_work_out(settings_: dict[str, int], says: str) -> None:
    with pytest.raises(Refused, match=says):
        SamplePlan(np.arange(5), **settings_)
