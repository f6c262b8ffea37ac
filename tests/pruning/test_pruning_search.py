"""The search for ratios: against exhaustive search, on a toy that can be searched; and what it must never do."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vits import asks, batches, pictures, random_plan, tiny

from lotus.pruning import budget, latency, metrics, program, search, study, surgery, widths
from lotus.pruning.judge import Judge, Judged, macs_at
from lotus.pruning.plan import Plan
from lotus.pruning.search import Tried
from lotus.vit import anatomy, cost
from selection import methods
from selection.errors import Refused

pytestmark = pytest.mark.slow  # many models: every family by every law


class Toy:
    """Judges by widths alone: monotone, and known in closed form, so that every plan can be judged."""

    images, forwards = 1, 0

    def __init__(self, weights: tuple[float, float], power: float = 2.0, wobble: float = 0.0) -> None:
        self.weights, self.power, self.wobble = weights, power, wobble
        self.outline, self.known, self.asked = cost.outline(tiny()), dict[Any, Any](), 0

    def of(self, dims) -> float:
        if dims not in self.known:
            whole, now = self.outline.cost().blocks, self.outline.cost(dims).blocks
            gone = [
                1 - sum(getattr(block, name) for block in now) / sum(getattr(block, name) for block in whole)
                for name in ("attn_macs", "mlp_macs")
            ]
            bump = self.wobble * math.sin(40 * sum(gone))
            self.known[dims] = sum(weight * part**self.power for weight, part in zip(self.weights, gone)) + bump
        return self.known[dims]

    def __call__(self, model) -> Judged:
        self.asked += 1
        return Judged(self.of(tuple(block.dims for block in anatomy.blocks(model))), 0.0)


@pytest.fixture(scope="module")
def studied():
    return study(tiny(), batches(), asks(criterion="magnitude", rotate=False, compensate="none"))


def searched(kind, studied, judge, keep=None, *, drop=None, table=None, timer=None, **settings):
    asked = asks(keep, search={"kind": kind, "grid": 3, "levels": 3, "drop": drop}, **settings)
    return getattr(search, kind)(studied, judge, asked, table=table, timer=timer)


SEARCH = {kind: functools.partial(searched, kind) for kind in ("ratios", "blocks")}


@pytest.fixture(scope="module")
def every(studied):
    """All that two ratios, to 1/16, can ask for, and its MACs."""
    outline, steps = cost.outline(studied.dense), [step / 16 for step in range(17)]
    found = {
        budget.by_ratios(outline, studied.scores, asks(round=8), attention=a, mlp=m)
        for a, m in itertools.product(steps, steps)
    }
    return {dims: outline.cost(dims).macs for dims in found}


@pytest.mark.parametrize(("drop", "power"), [(0.05, 1.5), (0.3, 3.0), (0.9, 2.0)])
def test_bisection_gets_as_far_as_trying_everything(studied, every, drop, power):
    toy, whole = Toy((1.0, 0.6), power), cost.outline(studied.dense).cost().macs
    found = search.ratios(studied, toy, asks(round=8, search={"drop": drop, "grid": 0}))
    asked = toy.asked
    assert found.chosen.worse <= drop
    # Five directions and one step aside do not see every pair of ratios: within 4 % of the whole of the best pair.
    assert found.chosen.macs <= min(macs for dims, macs in every.items() if toy.of(dims) <= drop) + 0.04 * whole
    assert asked <= 5 * 7 + 2 + 2 * 7 + 1 < 17 * 17
    for part in (slice(0, 3), slice(3, 4)):  # and with one of the two as it is, the other gives no more
        tight = [
            macs
            for dims, macs in every.items()
            if toy.of(dims) <= drop and all(old[part] == new[part] for old, new in zip(found.chosen.dims, dims))
        ]
        assert found.chosen.macs <= min(tight, default=math.inf) + whole / 16


@pytest.mark.parametrize(("weights", "keep"), [((1.0, 0.01), 0.8), ((0.01, 1.0), 0.6), ((1.0, 1.0), 0.35)])
def test_a_budget_is_hit_and_split_as_well_as_can_be(studied, every, weights, keep):
    toy, outline = Toy(weights), cost.outline(studied.dense)
    found = search.ratios(studied, toy, asks(keep={"macs": keep}, round=8, search={"grid": 0}))
    limit = int(keep * outline.cost().macs)
    assert found.pruned.after["macs"] == found.chosen.macs <= limit
    assert found.chosen.dims == budget.fill(
        outline, studied.scores, asks({"macs": keep}, round=8), found.chosen.dims
    ), "full"
    best = min(toy.of(dims) for dims, macs in every.items() if macs <= limit)
    assert found.chosen.worse <= best + 0.03
    if weights[0] != weights[1]:  # what costs nothing goes first
        assert (found.chosen.attention < found.chosen.mlp) == (weights[0] < weights[1])


@pytest.mark.parametrize("kind", ["ratios", "blocks"])
def test_what_is_not_monotone_still_stays_within_what_is_allowed(studied, kind):
    toy = Toy((1.0, 1.0), wobble=0.1)
    found = SEARCH[kind](studied, toy, drop=0.2, round=8)
    assert found.chosen.worse <= 0.2
    assert found.chosen.macs == min(one.macs for one in found.tried if one.worse <= 0.2)


@pytest.mark.parametrize("kind", ["ratios", "blocks"])
def test_where_nothing_is_allowed_nothing_is_cut_and_that_is_said(studied, kind):
    """As after a recovery that moved the model: what the judge is asked of is another than the one it began with."""
    moved = tiny(seed=1)
    dense = cost.outline(studied.dense).dims
    found = SEARCH[kind](studied, Judge(moved, batches()), drop=1e-4, round=8)
    assert found.chosen.dims == dense
    assert found.chosen.worse > 1e-4
    assert found.notes
    assert "nothing is cut" in found.notes[0]
    torch.testing.assert_close(found.pruned.model(pictures()), studied.model(pictures()), atol=1e-4, rtol=1e-4)
    assert not SEARCH[kind](studied, Judge(studied.dense, batches()), drop=0.2, round=8).notes


@pytest.mark.parametrize("kind", ["ratios", "blocks"])
@pytest.mark.parametrize("keep", [0.7, 0.3])
def test_a_budget_is_hit_or_refused(studied, kind, keep):
    found = SEARCH[kind](studied, Judge(studied.dense, batches()), keep={"macs": keep}, round=8)
    outline = cost.outline(studied.dense)
    assert cost.count(found.pruned.model).macs == found.chosen.macs <= keep * outline.cost().macs
    assert found.chosen.dims == budget.fill(outline, studied.scores, asks({"macs": keep}, round=8), found.chosen.dims)
    with pytest.raises(Refused, match="out of reach"):
        SEARCH[kind](studied, Judge(studied.dense, batches()), keep={"macs": 0.01}, round=8)


def test_blocks_never_end_worse_than_the_scores_alone(studied):
    judge = Judge(studied.dense, batches())
    for keep in (0.8, 0.4):
        found = search.blocks(studied, judge, asks(keep={"macs": keep}, round=8))
        plain = studied.draw(asks({"macs": keep}, round=8)).model
        assert found.chosen.worse <= judge(plain).worse + 1e-6


def test_either_a_budget_or_a_drop(studied):
    judge = Judge(studied.dense, batches())
    for find in SEARCH.values():
        with pytest.raises(Refused, match=r"prune\.search\.drop: .*target"):
            find(studied, judge, keep={"macs": 0.5}, drop=0.1)
        with pytest.raises(Refused, match=r"prune\.search\.drop: .*greater than 0"):
            find(studied, judge, drop=0.0)
    with pytest.raises(Refused, match="no 'accuracy'"):
        Judge(studied.dense, batches(), "accuracy")
    with pytest.raises(Refused, match="no held-out image"):
        Judge(studied.dense, [])


def test_the_metrics_against_their_formulas():
    draw = torch.Generator().manual_seed(0)
    cut, dense = torch.randn(7, 4, generator=draw), torch.randn(7, 4, generator=draw)
    labels = torch.randint(4, (7,), generator=draw)
    p, q = dense.double().softmax(1), cut.double().softmax(1)
    for row in range(7):
        kl = sum(float(p[row, c]) * math.log(float(p[row, c] / q[row, c])) for c in range(4))
        assert metrics.divergence(cut, dense, labels)[row] == pytest.approx(kl, abs=1e-5)
        rise = -math.log(float(q[row, labels[row]])) + math.log(float(p[row, labels[row]]))
        assert metrics.loss(cut, dense, labels)[row] == pytest.approx(rise, abs=1e-5)
        assert metrics.agreement(cut, dense, labels)[row] == float(p[row].argmax() != q[row].argmax())


@pytest.mark.parametrize("metric", methods.names(metrics))
def test_the_dense_model_is_as_good_as_itself_and_is_asked_once(metric):
    model, data = tiny(), batches(3)
    judge = Judge(model, iter(data), metric)
    assert judge.images == judge.forwards == 24
    assert judge(model).worse == pytest.approx(0, abs=1e-6)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data)
    assert judge.dense.top1 == judge(model).top1 == pytest.approx(100 * right / 24)
    assert judge.forwards == 3 * 24
    assert judge(tiny(seed=5)).worse != 0


@pytest.mark.parametrize("decouple_qk", [False, True])
def test_less_of_a_ratio_lies_within_more_of_it(studied, decouple_qk):
    outline, scores = cost.outline(studied.dense), studied.scores
    rng = np.random.default_rng(0)
    for _ in range(6):
        (a, b), (m, n) = np.sort(rng.random((2, 2)), axis=1)
        small, large = (
            budget.best(
                outline,
                scores,
                budget.by_ratios(outline, scores, asks(round=8, decouple_qk=decouple_qk), attention=x, mlp=y),
            )
            for x, y in ((a, m), (b, n))
        )
        assert_within(small, large)
        spent, whole = outline.cost(large.dims).blocks, outline.cost().blocks
        for name, part in (("attn_macs", b), ("mlp_macs", n)):
            now, of = (sum(getattr(block, name) for block in blocks) for blocks in (spent, whole))
            floors = widths.floors(outline, asks(round=8))
            least = sum(getattr(outline.block(i, one), name) for i, one in enumerate(floors))
            assert now <= max(part * of + 0.5, least)


def assert_within(small: Plan, large: Plan) -> None:
    for one, other in zip(small.blocks, large.blocks, strict=True):
        assert set(one.units) <= set(other.units)
        assert set(one.outputs) <= set(other.outputs)
        assert set(one.queries) <= set(other.queries)


def test_nested_sizes_lie_in_one_another_and_hit_their_budgets(studied):
    keeps = [0.9, 0.7, 0.5, 0.3]
    drawn = studied.nested(asks(round=8), [{"macs": keep} for keep in keeps])
    outline = cost.outline(studied.dense)
    for keep, one in zip(keeps, drawn):
        assert one.after["macs"] <= keep * outline.cost().macs
        assert one.after["macs"] > (keep - 0.05) * outline.cost().macs
    for large, small in itertools.pairwise(drawn):
        assert_within(small.plan, large.plan)
    assert drawn[0].plan == studied.draw(asks({"macs": 0.9}, round=8)).plan
    with pytest.raises(Refused, match="largest to the smallest"):
        studied.nested(asks(), [{"macs": 0.5}, {"macs": 0.7}])


def test_the_hull_is_the_lower_convex_hull():
    rng = np.random.default_rng(1)
    for _ in range(50):
        points = [(float(x), float(y), i) for i, (x, y) in enumerate(rng.random((6, 2)))]
        corners = search.hull(points)
        slopes = [slope for slope, _ in corners]
        assert slopes == sorted(slopes)
        x, y, line = 0.0, 0.0, [(0.0, 0.0)]
        for slope, what in corners:
            new = points[what][0]
            y += slope * (new - x)
            x = new
            line.append((x, y))
            assert y == pytest.approx(points[what][1])
        for px, py, _ in points:  # no point lies below
            assert py >= np.interp(px, [a for a, _ in line], [b for _, b in line]) - 1e-9
        assert x == max(px for px, _, _ in points)
    assert search.hull([(1.0, -0.5, "a"), (2.0, 1.0, "b")]) == [(0.0, "a"), (1.0, "b")]


def test_largest_by_bisection():
    for edge in np.linspace(0, 0.999, 23):
        found = search.largest(functools.partial(operator.ge, edge), 0.0, 1.0, 1 / 64)
        assert edge - 1 / 64 <= found <= edge
    assert search.largest(lambda x: True, 0.0, 1.0, 1 / 64) == 1.0
    for edge in range(10):
        assert search.largest(functools.partial(operator.ge, edge), 0, 9, 1) == edge


def test_the_pareto_points():
    points = [
        Tried("grid", (), 0, 0, macs, 0, worse, 0) for macs, worse in ((5, 1.0), (4, 1.5), (4, 1.2), (3, 1.1), (2, 9))
    ]
    assert [(one.macs, one.worse) for one in search.pareto(points)] == [(5, 1.0), (3, 1.1), (2, 9)]


# ------------------------------------------------------------------------------------------------ budgets of latency


def pace(dims) -> float:
    """A machine on which widths add up."""
    return 1.0 + sum(0.01 * one.heads * one.v_dim + 0.02 * one.heads + 0.004 * one.hidden for one in dims)


def clock(model) -> float:
    return pace([block.dims for block in anatomy.blocks(model)])


def shared(model) -> float:
    """One on which the last savings of a block are worth less, which no sum of halves knows."""
    return 1.0 + sum(
        (0.01 * b.heads * b.head_dim + 0.02 * b.heads + 0.004 * b.hidden) ** 0.6 for b in anatomy.blocks(model)
    )


class Halves:
    """Judges by widths: each half of each block loses by a law of its own, and losses add up."""

    images, forwards = 1, 0

    def __init__(self, seed: int) -> None:
        self.rates = np.random.default_rng(seed).exponential(size=(2, 2))
        self.outline = cost.outline(tiny())

    def of(self, dims) -> float:
        pairs = zip(self.rates, self.outline.cost(dims).blocks, self.outline.cost().blocks)
        return sum(
            rates[0] * (1 - now.attn_macs / of.attn_macs) ** 2 + rates[1] * (1 - now.mlp_macs / of.mlp_macs) ** 1.5
            for rates, now, of in pairs
        )

    def __call__(self, model) -> Judged:
        return Judged(self.of(tuple(block.dims for block in anatomy.blocks(model))), 0.0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("keep", [0.8, 0.6, 0.5])
def test_blocks_lose_no_more_than_the_best_of_all_choices_within_a_latency(studied, seed, keep):
    judge, whole = Halves(seed), clock(studied.model)
    outline, scores = cost.outline(studied.dense), studied.scores
    table = latency.measure(studied.dense, 4, timer=clock, repeats=1)
    found = search.blocks(studied, judge, asks(keep={"latency": keep}, search={"levels": 4}), table=table, timer=clock)
    assert found.pruned.latency.measured == pytest.approx(clock(found.pruned.model) / whole)
    assert found.pruned.latency.measured <= keep * (1 + latency.CLOSE)
    assert found.pruned.latency.text() in found.pruned.notes
    halves = [
        {budget.of_block(outline, scores, asks(), index=index, part=part, share=1 - level / 4) for level in range(5)}
        for index in range(2)
        for part in ("attention", "mlp")
    ]
    choices = [tuple(one[i]._replace(hidden=one[i + 1].hidden) for i in (0, 2)) for one in itertools.product(*halves)]
    slack = 4 * table.dense / program.STEPS
    reach = [dims for dims in choices if pace(dims) <= keep * whole - slack]
    assert len(reach) > 10
    assert found.chosen.worse <= min(judge.of(dims) for dims in reach) + 1e-9
    plain = studied.draw(asks({"latency": keep}), table=table, timer=clock)
    assert found.chosen.worse <= judge(plain.model).worse


@pytest.mark.parametrize(("weights", "keep"), [((1.0, 0.01), 0.8), ((0.01, 1.0), 0.7), ((1.0, 1.0), 0.5)])
def test_ratios_split_a_latency_as_well_as_can_be(studied, every, weights, keep):
    toy, whole = Toy(weights), clock(studied.model)
    table = latency.measure(studied.dense, 4, timer=clock, repeats=1)
    found = search.ratios(studied, toy, asks(keep={"latency": keep}, search={"grid": 0}), table=table, timer=clock)
    assert found.pruned.latency.measured == pytest.approx(clock(found.pruned.model) / whole)
    assert found.pruned.latency.measured <= keep * (1 + latency.CLOSE)
    best = min(toy.of(dims) for dims in every if table.predict(dims) <= keep * table.dense)
    assert found.chosen.worse <= best + 0.03


@pytest.mark.parametrize("kind", ["ratios", "blocks"])
@pytest.mark.parametrize("wrong", [0.6, 1.5])
def test_what_a_search_tells_was_measured_however_wrong_the_table(studied, kind, wrong):
    table = latency.measure(studied.dense, 4, timer=shared, repeats=1)
    table = replace(table, together=tuple((alone, wrong * real) for alone, real in table.together))
    keep = {"latency": 0.8, "params": 0.75}
    find = functools.partial(SEARCH[kind], studied, Halves(1), table=table)
    found = find(keep=keep, timer=shared)
    assert found.pruned.latency.measured == pytest.approx(shared(found.pruned.model) / shared(studied.model))
    assert found.pruned.latency.measured <= 0.8 * (1 + latency.CLOSE)
    assert found.pruned.after["params"] <= 0.75 * found.pruned.before["params"]
    with pytest.raises(Refused, match=r"latency: 0\.1 is out of reach"):
        find(keep={"latency": 0.1}, timer=shared)
    away = SEARCH[kind](studied, Halves(1), keep=keep, table=replace(table, device="cuda:0")).pruned.latency
    assert away.measured is None
    assert away.predicted <= 0.8
    with pytest.raises(Refused, match=r"without prune\.decouple_qk"):
        find(keep=keep, decouple_qk=True)


def test_macs_at_equal_accuracy():
    points = [(10.0, 50.0), (20.0, 60.0), (15.0, 45.0), (40.0, 70.0)]
    assert macs_at(points, 55.0) == 15.0
    assert macs_at(points, 65.0) == 30.0
    assert macs_at(points, 49.0) is None
    assert macs_at(points, 71.0) is None


def test_widths_that_a_search_names_are_what_is_cut(studied):
    plan = random_plan(studied.dense, 4)
    outline = cost.outline(studied.dense)
    best = budget.best(outline, studied.scores, plan.dims)
    assert best.dims == plan.dims
    for index, one in enumerate(best.blocks):
        scores = studied.scores[f"blocks.{index}.mlp"]
        assert min(scores[list(one.units)]) >= max(np.delete(scores, list(one.units)), default=-math.inf)


# --------------------------------------------------------------------------------- beside sublayers, in_channels, parts gone


def reads(model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    wide = {"attn": 48, "mlp": 192, "qk": 48, "attn_in": 48, "mlp_in": 48}
    return {
        f"blocks.{i}.{site}": rng.exponential(size=count)
        for i in range(len(model.blocks))
        for site, count in wide.items()
    }


def test_nested_sizes_of_another_scope_are_refused_with_one_that_goes():
    model = tiny()
    outline, request = cost.outline(model), asks({"macs": 0.5}, scope="uniform")
    with pytest.raises(Refused, match=r"Set prune\.scope to global") as refusal:
        budget.fit_plan(outline, reads(model), request, within=outline.dims)
    named = str(refusal.value).rpartition(" ")[2].rstrip(".")
    assert asks({"macs": 0.5}, scope=named).scope == named


@pytest.mark.parametrize("sublayers", [None, True])
def test_nested_sizes_lie_in_one_another_where_inputs_and_sublayers_go(sublayers):
    model = tiny(depth=4)
    outline = cost.outline(model)
    keeps = [{"macs": part} for part in (0.7, 0.4, 0.2, 0.11, 0.09)]
    plans = list[Any]()
    for keep in keeps:
        within = plans[-1].dims if plans else None
        plans.append(
            budget.fit_plan(outline, reads(model), asks(keep, in_channels=True, sublayers=sublayers), within=within)
        )
    assert plans[0] == budget.fit_plan(outline, reads(model), asks(keeps[0], in_channels=True, sublayers=sublayers))
    for plan, keep in zip(plans, keeps):
        assert plan.cost(outline).macs <= keep["macs"] * outline.cost().macs
        assert cost.count(surgery.cut(model, plan)) == plan.cost(outline)
    assert any(not (block.heads and block.units) for block in plans[-1].blocks), "units alone cannot give so little"
    assert any(block.attn_in is not None for block in plans[1].blocks)
    every = set(range(48))
    for large, small in itertools.pairwise(plans):
        for one, other in zip(large.blocks, small.blocks):
            assert set(other.heads) <= set(one.heads)
            assert set(other.units) <= set(one.units)
            assert set(other.outputs) <= set(one.outputs)
            for name, there in (("attn_in", other.heads), ("mlp_in", other.units)):
                new, old = getattr(other, name), getattr(one, name)
                assert not there or set(every if new is None else new) <= set(every if old is None else old)


def test_a_search_goes_by_units_alone():
    model = tiny(depth=4)
    judge = Judge(model, batches())
    for find in (search.ratios, search.blocks):
        asked = asks({"macs": 0.5}, in_channels=True)
        with pytest.raises(Refused, match=r"prune\.in_channels: .*heads"):
            find(study(model, batches(), asked), judge, asked)
    studied = study(model, batches(), asks(criterion="magnitude", rotate=False, compensate="none"))
    assert studied.draw(asks({"macs": 0.09})).after["macs"] <= 0.09 * studied.draw(asks({"macs": 1.0})).after["macs"]
    for find in SEARCH.values():
        with pytest.raises(Refused, match=r"without prune\.search"):
            find(studied, judge, keep={"macs": 0.09})
        with pytest.raises(Refused, match=r"prune\.keep\.gates: .*fraction"):
            find(studied, judge, keep={"gates": 0.5})
    with pytest.raises(Refused, match="or all of latency"):
        studied.nested(asks(), [{"macs": 0.5}, {"latency": 0.5}])


@pytest.mark.parametrize("kind", ["ratios", "blocks"])
def test_a_model_that_lost_sublayers_can_be_searched(kind):
    full = Plan.full(tiny(depth=3))
    blocks = [replace(full.blocks[0], units=()), replace(full.blocks[1], heads=(), qk=(), v=()), full.blocks[2]]
    less = surgery.cut(tiny(depth=3), Plan(tuple(blocks)))
    studied = study(less, batches(), asks(criterion="cumulative_attention"))
    found = SEARCH[kind](studied, Judge(less, batches()), keep={"macs": 0.6}, round=8)
    assert cost.count(found.pruned.model).macs == found.chosen.macs <= 0.6 * cost.count(less).macs
    assert [(bool(d.heads), bool(d.hidden)) for d in found.chosen.dims] == [(True, False), (False, True), (True, True)]
