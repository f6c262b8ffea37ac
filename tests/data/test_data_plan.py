from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lotus.data.sample_plan import SamplePlan, checked_rows, cut
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
    assert n - len(seen) == n % whole % world == ranks[0].left_out, "at most world - 1 sit out"
    full = n // whole
    for step in range(full):
        per_rank = micro * accumulate
        together = np.concatenate([order[step * per_rank : (step + 1) * per_rank] for order in orders])
        assert set(together) == set(alone.order(epoch)[step * whole : (step + 1) * whole])
    assert sum(ranks[0].batches(epoch)) == len(list(cut(orders[0], micro)))
    one = SamplePlan(rows, seed=3, batch_size=whole, accumulate=accumulate)
    shared = [np.concatenate(parts) for parts in zip(*(cut(order, micro) for order in orders), strict=True)]
    for together, by_one in zip(shared, cut(one.order(epoch), one.micro), strict=False):
        assert set(together) <= set(by_one), "who is mixed with whom"
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


@given(
    sizes=st.lists(st.integers(4, 60), min_size=1, max_size=4),
    micro=st.integers(1, 7),
    world=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_step_is_of_one_group_on_every_rank(
    sizes: list[int], micro: int, world: int, accumulate: int, epoch: int
) -> None:
    n, whole = sum(sizes), micro * world * accumulate
    rows = np.random.default_rng(n).permutation(1000)[:n]
    group = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    of = dict(zip(rows.tolist(), group.tolist(), strict=True))
    ranks = [
        SamplePlan(rows, seed=3, batch_size=whole, world=world, rank=rank, accumulate=accumulate)
        for rank in range(world)
    ]
    alone = SamplePlan(rows, seed=3, batch_size=whole)
    for plan in (alone, *ranks):
        plan.take(rows, group)
    seen = np.concatenate([plan.order(epoch) for plan in ranks])
    assert len(np.unique(seen)) == len(seen), "each image once"
    assert n - len(seen) == sum(size % whole % world for size in sizes), "at most world - 1 of each group sit out"
    assert sorted(alone.order(epoch).tolist()) == sorted(rows.tolist())
    assert len({tuple(plan.sizes(epoch)) for plan in ranks}) == 1, "every rank has batches of the same sizes"
    assert groups(ranks[0], epoch) == groups(ranks[-1], epoch)
    assert sorted(groups(alone, epoch)) == sorted(g for g, size in enumerate(sizes) for _ in range(-(-size // whole)))
    pieces = [iter(np.split(plan.order(epoch), np.cumsum(plan.sizes(epoch))[:-1])) for plan in ranks]
    every = np.split(alone.order(epoch), np.cumsum(alone.sizes(epoch))[:-1])
    every = [together for together in every if len(together) >= world]  # a smaller one sits out
    for parts, asked, together in zip(ranks[0].batches(epoch), groups(ranks[0], epoch), every, strict=True):
        step = np.concatenate([next(mine) for mine in pieces for _ in range(parts)])
        assert {of[row] for row in step.tolist()} == {asked}
        assert set(step) <= set(together), "the images of a step do not depend on the ranks"
        assert len(together) - len(step) < world
    shared = {step.number: set(step.rows.tolist()) for step in ranks[0].dealt(epoch)}
    for one in alone.dealt(epoch):
        mine = set(one.rows.tolist())
        assert shared.get(one.number, set()) <= mine, "a step has one number, however many ranks there are"
        assert len(mine - shared.get(one.number, set())) < world


def groups(plan: SamplePlan, epoch: int) -> list[int]:
    return [step.group for step in plan.dealt(epoch)]


def test_groups_are_shuffled_among_each_other_and_anew_each_epoch() -> None:
    rows, group = np.arange(400), np.arange(400) % 2
    plan = SamplePlan(rows, seed=1, batch_size=8)
    plan.take(rows, group)
    assert groups(plan, 0) != groups(plan, 1)
    assert 10 < np.count_nonzero(np.diff(groups(plan, 0))) < 45, "neither in turns nor one after the other"
    assert not np.array_equal(plan.order(0), plan.order(1))
    plan.take(rows)
    assert np.array_equal(plan.order(4), SamplePlan(rows, seed=1, batch_size=8).order(4)), "without groups as ever"
    with pytest.raises(Refused, match=r"a group of 1 for 2 ranks.*fewer groups"):
        SamplePlan(rows, batch_size=8, world=2).take(rows, (rows == 7).astype(int))
