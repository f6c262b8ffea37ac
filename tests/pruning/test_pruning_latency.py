"""A budget in milliseconds: what the table predicts, and that no plan within it loses less."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vits import asks, tiny

import lotus.pruning
from lotus.pruning import budget, latency, program
from lotus.pruning.plan import Plan
from lotus.vit import anatomy, cost
from lotus.vit.anatomy import Dims
from selection.errors import Refused

pytestmark = pytest.mark.slow

OF = Dims(2, 24, 24, 32)
OUTLINE = cost.Outline(
    tokens=17, width=48, dims=(OF,) * 2, biases=(cost.Biases(),) * 2, fixed_params=3000, fixed_macs=40_000
)
TABLE = latency.Table(
    device="cpu",
    batch=8,
    dense=10.0,
    of=OF,
    heads=(1, 2),
    head_dims=(8, 16, 24),
    attention=((2.0, 1.7, 1.4), (1.2, 0.6, 0.0)),
    units=(8, 16, 32),
    mlp=(1.5, 1.0, 0.0),
)


def clock(model):
    """A machine on which widths add up: so much for a head's dimension, for a unit, and for the rest."""
    return 3.0 + sum(0.01 * b.heads * b.head_dim + 0.02 * b.heads + 0.004 * b.hidden for b in anatomy.blocks(model))


def draw(seed, outline=OUTLINE):
    rng = np.random.default_rng(seed)
    scores = dict[str, np.ndarray]()
    for i, (heads, qk, v, hidden, *_) in enumerate(outline.dims):
        scores |= {f"blocks.{i}.qk": rng.exponential(size=heads * qk), f"blocks.{i}.attn": rng.exponential(size=heads * v),
                   f"blocks.{i}.mlp": rng.exponential(size=hidden)}  # fmt: skip
    return scores


def lost(scores, dims):
    """Scores that go with the widths ``dims``, by sorting: the best heads, dimensions and units stay."""
    total = 0.0
    for i, (heads, qk_dim, v_dim, hidden, *_) in enumerate(dims):
        v = scores[f"blocks.{i}.attn"].reshape(OF.heads, OF.v_dim)
        qk = scores[f"blocks.{i}.qk"].reshape(OF.heads, OF.qk_dim)
        best = np.argsort(-v.sum(1), kind="stable")[:heads]
        kept = sum(np.sort(v[h])[::-1][:v_dim].sum() for h in best)
        total += v.sum() - kept + sum(np.sort(qk[h])[::-1][qk_dim:].sum() for h in best)
        total += np.sort(scores[f"blocks.{i}.mlp"])[::-1][hidden:].sum()
    return total


def planned(*model: Any, **bounds: Any) -> Plan:
    """What the program finds; refused where the table puts it out of reach."""
    found = program.attempt(*model, **bounds)
    if isinstance(found, str):
        raise Refused(found)
    return found


EVERY = [Dims(h, d, d, f) for h in (1, 2) for d in (8, 16, 24) for f in (8, 16, 24, 32)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.45, 1.0))
def test_no_plan_within_the_budget_loses_less(seed, keep):
    scores = draw(seed)
    limit = keep * TABLE.dense
    plans = list(itertools.product(EVERY, repeat=2))
    reach = [plan for plan in plans if TABLE.predict(plan) <= limit + 1e-9]
    if not reach:
        with pytest.raises(Refused, match=r"latency: .* is out of reach"):
            planned(OUTLINE, scores, asks({"latency": keep}), TABLE)
        return
    found = planned(OUTLINE, scores, asks({"latency": keep}), TABLE).dims
    assert TABLE.predict(found) <= limit + 1e-9
    # Times are rounded, by less than one step for each half of a block.
    slack = 4 * TABLE.dense / program.STEPS
    near = [lost(scores, plan) for plan in plans if TABLE.predict(plan) <= limit - slack]
    assert min(lost(scores, plan) for plan in reach) - 1e-9 <= lost(scores, found)
    assert not near or lost(scores, found) <= min(near) + 1e-9


HALVES = [
    [Dims(1, 8, 8, 32), Dims(1, 24, 24, 32), Dims(2, 16, 16, 32), OF],
    [OF._replace(hidden=units) for units in (8, 16, 32)],
]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.3, 1.0), macs=st.sampled_from([1.0, 0.75]))
def test_no_choice_of_measured_widths_within_the_budgets_loses_less(seed, keep, macs):
    """Losses of any kind, not even falling with the width; every choice is looked at."""
    rng = np.random.default_rng(seed)
    halves = [[program.Option(dims, float(rng.exponential())) for dims in half] for half in HALVES * 2]
    limit, whole, slack = keep * TABLE.dense, OUTLINE.cost().macs, 4 * TABLE.dense / program.STEPS
    lost, near = dict[Any, float](), list[float]()
    for one in itertools.product(*halves):
        dims = tuple(one[i].dims._replace(hidden=one[i + 1].dims.hidden) for i in (0, 2))
        if OUTLINE.cost(dims).macs <= macs * whole and TABLE.predict(dims) <= limit + 1e-9:
            lost[dims] = sum(option.loss for option in one)
            near += [lost[dims]] if TABLE.predict(dims) <= limit - slack else []
    try:
        found = tuple(program.allocate(OUTLINE, halves, asks({"latency": keep, "macs": macs}), TABLE))
    except Refused:
        assert not near
        return
    assert found in lost
    # A price on MACs finds the best plan for that price, which is no plan's better that costs no more.
    spent = OUTLINE.cost(found).macs
    rivals = [lost[dims] for dims in lost if macs == 1.0 or OUTLINE.cost(dims).macs <= spent]
    assert min(rivals) - 1e-9 <= lost[found]
    assert macs < 1 or not near or lost[found] <= min(near) + 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.45, 0.7))
def test_no_plan_within_a_larger_one_loses_less(seed, keep):
    scores = draw(seed)
    large = planned(OUTLINE, scores, asks({"latency": 0.8}), TABLE)
    small = planned(OUTLINE, scores, asks({"latency": keep}), TABLE, within=large.dims)
    limit, slack = keep * TABLE.dense, 4 * TABLE.dense / program.STEPS
    inside = [
        plan
        for plan in itertools.product(EVERY, repeat=2)
        if all(a <= b for one, other in zip(plan, large.dims) for a, b in zip(one[:4], other[:4]))
    ]
    assert small.dims in inside
    assert TABLE.predict(small.dims) <= limit + 1e-9
    near = [lost(scores, plan) for plan in inside if TABLE.predict(plan) <= limit - slack]
    assert not near or lost(scores, small.dims) <= min(near) + 1e-9
    for one, other in zip(small.blocks, large.blocks):
        assert set(one.outputs) <= set(other.outputs)
        assert set(one.units) <= set(other.units)
    filled = planned(OUTLINE, scores, asks({"latency": 0.8}), TABLE, least=small.dims)
    over = [plan for plan in itertools.product(EVERY, repeat=2)
            if all(a >= b for one, other in zip(plan, small.dims) for a, b in zip(one[:4], other[:4]))]  # fmt: skip
    assert filled.dims in over
    near = [lost(scores, plan) for plan in over if TABLE.predict(plan) <= 0.8 * TABLE.dense - slack]
    assert lost(scores, filled.dims) <= min(near, default=math.inf) + 1e-9


@pytest.mark.parametrize("keep", [{"latency": 0.8, "macs": 0.6}, {"latency": 0.9, "params": 0.7}, {"latency": 0.7, "macs": 0.6, "params": 0.8}])  # fmt: skip
def test_several_budgets_hold_together(keep):
    scores = draw(3)
    found = planned(OUTLINE, scores, asks(keep), TABLE)
    assert TABLE.predict(found.dims) <= keep["latency"] * TABLE.dense + 1e-9
    for what in ("macs", "params"):
        if what in keep:
            assert getattr(found.cost(OUTLINE), what) <= keep[what] * getattr(OUTLINE.cost(), what)
    # The other budget costs something here, or the test would show nothing.
    alone = planned(OUTLINE, scores, asks({"latency": keep["latency"]}), TABLE)
    assert lost(scores, alone.dims) < lost(scores, found.dims)


def test_the_widths_are_multiples_and_the_best_units_stay():
    scores = draw(5)
    plan = planned(OUTLINE, scores, asks({"latency": 0.7}), TABLE)
    for i, block in enumerate(plan.blocks):
        assert block.dims.hidden % 8 == block.dims.v_dim % 8 == 0
        best = np.argsort(-scores[f"blocks.{i}.mlp"], kind="stable")[: block.dims.hidden]
        assert set(block.units) == set(best.tolist())


def test_everything_stays_when_everything_may():
    assert planned(OUTLINE, draw(1), asks({"latency": 1.0}), TABLE).dims == OUTLINE.dims


def test_a_table_of_another_model_is_refused():
    other = dataclasses.replace(OUTLINE, dims=(OF._replace(hidden=40),) * 2)
    with pytest.raises(Refused, match="other widths"):
        planned(other, draw(0, other), asks({"latency": 0.8}), TABLE)


def test_the_table_predicts_a_machine_on_which_widths_add_up():
    model = tiny(embed_dim=48, num_heads=2, depth=6)
    table = latency.measure(model, 4, timer=clock, repeats=1)
    of = anatomy.blocks(model)[0].dims
    assert table.dense == clock(model)
    assert table.predict([of] * 6) == pytest.approx(table.dense)
    plan = planned(cost.outline(model), draw_for(model), asks({"latency": 0.8}), table)
    small = lotus.pruning.surgery.cut(model, plan)
    assert len(set(plan.dims)) > 1
    assert table.predict(plan.dims) == pytest.approx(clock(small), rel=1e-9)


def draw_for(model):
    return draw(7, cost.outline(model))


def test_progress_counts_what_is_timed():
    model, told = tiny(embed_dim=48, num_heads=2, depth=2), list[Any]()
    latency.measure(model, 4, timer=clock, repeats=2, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == latency.timings(model, repeats=2)


def test_qk_norm_keeps_its_dimensions():
    model = tiny(embed_dim=48, num_heads=2, depth=2, qk_norm=True)
    table = latency.measure(model, 4, timer=clock, repeats=1)
    plan = planned(cost.outline(model), draw_for(model), asks({"latency": 0.85}), table)
    assert {dims.qk_dim for dims in plan.dims} == {24}


def test_a_model_that_is_cut_unevenly_is_refused():
    model = tiny(embed_dim=48, num_heads=2, depth=2)
    small = lotus.pruning.surgery.cut(model, budget.fit_plan(cost.outline(model), draw_for(model), asks({"macs": 0.7})))
    assert len({block.dims for block in anatomy.blocks(small)}) == 2
    with pytest.raises(Refused, match=r"blocks differ.*budget of macs"):
        latency.measure(small, 4, timer=clock)


def test_the_file():
    assert latency.Table.from_json(TABLE.to_json()) == TABLE
    short = {name: value for name, value in json.loads(TABLE.to_json()).items() if name != "mlp"}
    for text in ("[]", "{}", json.dumps(short), "no json"):
        with pytest.raises(Refused, match="no table of latencies"):
            latency.Table.from_json(text)


@pytest.mark.parametrize(("like", "expected"), [(32, 32), (16, 16), (1, 4)])
def test_the_fast_multiple_is_found(like, expected):
    """A machine that rounds widths up to tiles of ``like``."""
    model = tiny(embed_dim=48, num_heads=2, depth=2, mlp_ratio=8)

    def tiles(one):
        return sum(-(-b.hidden // like) * like * 0.01 for b in anatomy.blocks(one))

    assert latency.fast_multiple(model, 4, timer=tiles) == expected


def test_by_the_clock():
    """The whole way, with real timings: nothing is said of how exact they are while tests share the machine."""
    model = tiny(embed_dim=48, num_heads=2, depth=2)
    images = torch.randn(16, 3, *model.patch_embed.img_size)
    labels = torch.arange(16) % 4
    table = latency.measure(model, 16, repeats=1)
    drawn = lotus.pruning.lottery(model, [(images, labels)], asks({"latency": 0.95}), table=table)
    assert drawn.latency.asked == 0.95
    assert drawn.latency.measured > 0
    assert drawn.latency.text() in drawn.text()
    assert drawn.after["macs"] < drawn.before["macs"]
    assert drawn.model(images).shape == model(images).shape


def shared(model):
    """A machine on which the last savings of a block are worth less, and what is fixed is much: no sum of halves knows that."""
    return 2.0 + sum(
        (0.01 * b.heads * b.head_dim + 0.02 * b.heads + 0.004 * b.hidden) ** 0.6 for b in anatomy.blocks(model)
    )


@settings(max_examples=100, deadline=None)
@given(
    points=st.lists(st.tuples(st.floats(-1, 9), st.floats(-9, 9)), max_size=4),
    alone=st.floats(0, 20),
    scale=st.floats(0.6, 1.5),
)
def test_the_curve_rises_and_turns_back(points, alone, scale):
    """Whatever was measured: more saved alone is more in all, and what was corrected is predicted."""
    table = dataclasses.replace(TABLE, together=latency.curve(points))
    assert table.in_all(0) == 0
    assert table.in_all(alone + 1) > table.in_all(alone)
    assert table.alone(table.in_all(alone)) == pytest.approx(alone, abs=1e-9)
    dims = [OF._replace(hidden=8), OF]  # 1.5 ms alone
    part = 1 - scale * TABLE.in_all(1.5) / TABLE.dense
    assert dataclasses.replace(TABLE, together=((1.0, 1.0),)).corrected(dims, part).predict(dims) == pytest.approx(
        10 * part
    )


def test_whole_models_bend_the_sum_of_halves():
    """Where the last savings are worth less, the table says of each whole model that it timed what the clock said."""
    model = tiny(embed_dim=48, num_heads=2, depth=6)
    table = latency.measure(model, 4, timer=shared, repeats=1)
    of = anatomy.blocks(model)[0].dims
    slopes = {real / alone for alone, real in table.together}
    assert max(slopes) > 1.05 * min(slopes)
    for part in (0.75, 0.5, 0.25):
        dims = of._replace(qk_dim=round(part * 24), v_dim=round(part * 24), hidden=round(part * of.hidden))
        if dims.v_dim >= 8:
            assert table.predict([dims] * 6) == pytest.approx(shared(latency.like(model, dims)), rel=1e-6)
    least = Dims(1, 8, 8, 8)  # beyond all others: nothing is left to be guessed
    assert table.predict([least] * 6) == pytest.approx(shared(latency.like(model, least)), rel=1e-6)


@pytest.mark.parametrize("keep", [0.45, 0.5, 0.55])
def test_a_machine_that_answers_three_times_as_hard_as_the_table_says_is_pinned_from_both_sides(keep):
    """Scaling by the last plan alone swings ever further here: its slope at the answer is -1.4 to -1.7."""
    wide = dataclasses.replace(OUTLINE, dims=(OF._replace(hidden=512),) * 4, biases=(cost.Biases(),) * 4)
    table = dataclasses.replace(TABLE, of=wide.dims[0], units=(1, 512), mlp=(2.0, 0.0), attention=((0.4,) * 3, (0.0,) * 3), together=((1.0, 1.0),))  # fmt: skip
    scores, asked = draw(0, wide), []

    def take(plan):
        asked.append(min(1.0, max(0.05, 0.5 + 3 * (table.predict(plan.dims) / table.dense - 0.6))))
        return asked[-1]

    found = latency.settle(
        lambda now: program.attempt(wide, scores, asks({"latency": keep}, round=1), now),
        program.least_plan(wide, scores, asks(round=1), table), table, keep, take,
    )  # fmt: skip
    assert found.measured == pytest.approx(keep, rel=latency.CLOSE)
    assert max(asked) > keep > min(asked)  # it was met from both sides


@pytest.mark.parametrize("keep", [0.9, 0.85, 0.8])
@pytest.mark.parametrize("wrong", [0.6, 1.0, 1.5])
def test_what_is_measured_is_what_was_asked(keep, wrong):
    """However wrong the table, the plan is measured, and drawn again until it keeps the budget."""
    model = tiny(embed_dim=48, num_heads=2, depth=6)
    table = latency.measure(model, 4, timer=shared, repeats=1)
    table = dataclasses.replace(table, together=tuple((alone, wrong * real) for alone, real in table.together))
    studied = lotus.pruning.study(model, [], asks(criterion="magnitude", rotate=False, compensate="none"))
    drawn = studied.draw(asks({"latency": keep}), table=table, timer=shared)
    found = drawn.latency
    assert found.measured == pytest.approx(shared(drawn.model) / shared(model))
    assert found.measured == pytest.approx(keep, rel=2 * latency.CLOSE)  # half of a chunk of 8 units is as much here
    assert found.measured <= keep * (1 + latency.CLOSE)
    assert found.table.predict(drawn.plan.dims) == pytest.approx(shared(drawn.model))
    first = planned(cost.outline(model), studied.scores, asks({"latency": keep}), table)
    if wrong != 1.0:  # the table's own word would have missed it
        assert abs(shared(lotus.pruning.surgery.cut(model, first)) / shared(model) - keep) > latency.CLOSE * keep


@pytest.mark.parametrize("wrong", [0.6, 1.5])
def test_every_nested_size_is_measured_and_lies_within_the_larger(wrong):
    model = tiny(embed_dim=48, num_heads=2, depth=6)
    table = latency.measure(model, 4, timer=shared, repeats=1)
    table = dataclasses.replace(table, together=tuple((alone, wrong * real) for alone, real in table.together))
    studied = lotus.pruning.study(model, [], asks(criterion="magnitude", rotate=False, compensate="none"))
    keeps = [{"latency": 0.9}, {"latency": 0.85, "macs": 0.7}, {"latency": 0.8}]
    sizes = studied.nested(asks(), keeps, table=table, timer=shared)
    for size, keep in zip(sizes, keeps):
        assert size.latency.measured == pytest.approx(shared(size.model) / shared(model))
        assert 0.95 * keep["latency"] < size.latency.measured <= keep["latency"] * (1 + latency.CLOSE) or "macs" in keep
    assert sizes[1].after["macs"] <= 0.7 * sizes[1].before["macs"]
    assert sizes[0].plan == studied.draw(asks(keeps[0]), table=table, timer=shared).plan
    for large, small in itertools.pairwise(sizes):
        for one, other in zip(small.plan.blocks, large.plan.blocks):
            assert set(one.outputs) <= set(other.outputs)
            assert set(one.queries) <= set(other.queries)
            assert set(one.units) <= set(other.units)
    with pytest.raises(Refused, match="largest to the smallest"):
        studied.nested(asks(), [{"latency": 0.8}, {"latency": 0.9}], table=table, timer=shared)
    with pytest.raises(Refused, match="out of reach"):
        studied.nested(asks(), [{"latency": 0.8}, {"latency": 0.1}], table=table, timer=shared)
    assert [
        size.latency.measured
        for size in studied.nested(asks(), keeps[:1], table=dataclasses.replace(table, device="x"))
    ] == [None]


def test_a_model_that_was_cut_is_drawn_by_the_table_of_the_whole_one():
    """As the rounds of a search do: what is asked and measured is a part of the model that all began with."""
    whole = tiny(embed_dim=48, num_heads=2, depth=6)
    table = latency.measure(whole, 4, timer=shared, repeats=1)
    studied = lotus.pruning.study(whole, [], asks(criterion="magnitude", rotate=False, compensate="none"))
    cut = studied.draw(asks({"latency": 0.9}), table=table, timer=shared).model
    again = lotus.pruning.study(cut, [], asks(criterion="magnitude", rotate=False, compensate="none"))
    with pytest.raises(Refused, match="other widths"):
        again.draw(asks({"latency": 0.8}), table=table, timer=shared)
    again = dataclasses.replace(again, beside=whole)
    drawn = again.draw(asks({"latency": 0.8}), table=table, timer=shared)
    assert drawn.latency.measured == pytest.approx(shared(drawn.model) / shared(whole))
    assert 0.95 * 0.8 < drawn.latency.measured <= 0.8 * (1 + latency.CLOSE)


def test_nothing_is_refused_by_the_tables_word_alone():
    model = tiny(embed_dim=48, num_heads=2, depth=6)
    honest = latency.measure(model, 4, timer=clock, repeats=1)
    gloomy = dataclasses.replace(honest, together=((1.0, 0.1),))
    studied = lotus.pruning.study(model, [], asks(criterion="magnitude", rotate=False, compensate="none"))
    with pytest.raises(Refused, match="out of reach"):
        planned(cost.outline(model), studied.scores, asks({"latency": 0.8}), gloomy)
    assert studied.draw(asks({"latency": 0.8}), table=gloomy, timer=clock).latency.measured == pytest.approx(
        0.8, rel=0.02
    )
    smallest = clock(
        lotus.pruning.surgery.cut(model, program.least_plan(cost.outline(model), studied.scores, asks(), honest))
    )
    with pytest.raises(Refused, match=rf"{smallest / clock(model):.3f}\d of the dense"):
        studied.draw(asks({"latency": 0.3}), table=gloomy, timer=clock)


def test_a_table_of_another_device_is_taken_at_its_word():
    model = tiny(embed_dim=48, num_heads=2, depth=2)
    table = dataclasses.replace(latency.measure(model, 4, timer=clock, repeats=1), device="cuda:0")
    studied = lotus.pruning.study(model, [], asks(criterion="magnitude", rotate=False, compensate="none"))
    found = studied.draw(asks({"latency": 0.9}), table=table).latency
    assert found.measured is None
    assert found.predicted <= 0.9
    assert "not measured here" in found.text()


@pytest.mark.parametrize(("noise", "expected"), [((1.0, 1.0, 1.0), 0.5), ((1.0, 3.0, 0.2), 0.5)])
def test_timings_side_by_side_do_not_see_a_drifting_clock(noise, expected):
    pace = iter([each for each in noise for _ in range(2)])
    model = tiny(embed_dim=48, num_heads=2, depth=2)
    half = tiny(embed_dim=48, num_heads=2, depth=1)
    times = {id(model): 10.0, id(half): 5.0}
    assert latency.beside(model, half, 1, turns=3, timer=lambda one: next(pace) * times[id(one)]) == expected


@pytest.mark.parametrize("wrong", [{"scope": "per_type"}, {"decouple_qk": True}])
def test_what_does_not_go_with_it(wrong):
    model = tiny(embed_dim=48, num_heads=2, depth=2)
    batches = [(torch.randn(4, 3, *model.patch_embed.img_size), torch.arange(4) % 4)]
    with pytest.raises(Refused, match="goes with"):
        lotus.pruning.lottery(model, batches, asks({"latency": 0.9}, **wrong))
