"""Budgets are hit within one rounding step, or refused with the reachable range."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vits import asks, batches, tiny

from lotus.pruning import prune, widths
from lotus.pruning.budget import fit_plan
from lotus.vit import cost
from lotus.vit.anatomy import Dims
from selection.errors import Refused

WIDE = cost.Outline(
    tokens=17,
    width=48,
    dims=(Dims(4, 16, 16, 192), Dims(4, 16, 16, 100), Dims(2, 24, 24, 192)),
    biases=(cost.Biases(),) * 3,
    fixed_params=3000,
    fixed_macs=40_000,
)


def draw(outline: cost.Outline, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = {}
    for i, (heads, qk, v, hidden, *_) in enumerate(outline.dims):
        scores[f"blocks.{i}.qk"] = rng.exponential(size=heads * qk)
        scores[f"blocks.{i}.attn"] = rng.exponential(size=heads * v)
        scores[f"blocks.{i}.mlp"] = rng.exponential(size=hidden)
    return scores


def named(refusal: Refused) -> float:
    """The least budget that a refusal says can be had."""
    found = re.search(r"Take ([0-9.]+) to 1", str(refusal))
    assert found is not None, refusal
    return float(found[1])


def one_more(plan, outline, round_, decouple_qk):
    """Costs of the plan with any one chunk put back."""
    dims = list(plan.dims)
    for i, (now, of) in enumerate(zip(plan.dims, outline.dims, strict=True)):
        grown = [
            now._replace(heads=min(now.heads + 1, of.heads)),
            now._replace(hidden=min((now.hidden // round_ + 1) * round_, of.hidden)),
        ]
        wider = {
            "qk_dim": min((now.qk_dim // round_ + 1) * round_, of.qk_dim),
            "v_dim": min((now.v_dim // round_ + 1) * round_, of.v_dim),
        }
        if decouple_qk:
            grown += [now._replace(**{name: width}) for name, width in wider.items()]
        else:
            grown.append(now._replace(**wider))
        for more in grown:
            if more != now:
                yield outline.cost([*dims[:i], more, *dims[i + 1 :]])


@given(
    keep=st.fixed_dictionaries({}, optional={"macs": st.floats(0.3, 1), "params": st.floats(0.3, 1)}).filter(bool),
    scope=st.sampled_from(["global", "per_type"]),
    seed=st.integers(0, 1000),
    round_=st.sampled_from([1, 4, 8]),
    decouple_qk=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_every_budget_is_hit_within_one_chunk(keep, scope, seed, round_, decouple_qk):
    plan = fit_plan(WIDE, draw(WIDE, seed), asks(keep, scope=scope, round=round_, decouple_qk=decouple_qk))
    dense, now = WIDE.cost(), plan.cost(WIDE)

    def holds(spent) -> bool:
        return all(getattr(spent, what) <= part * getattr(dense, what) for what, part in keep.items())

    assert holds(now)
    assert not any(holds(more) for more in one_more(plan, WIDE, round_, decouple_qk))
    for kept, of in zip(plan.dims, WIDE.dims, strict=True):
        assert all(k == o or k % round_ == 0 for k, o in zip(kept[1:4], of[1:4], strict=True))


@pytest.mark.parametrize("decouple_qk", [False, True])
def test_query_and_key_dimensions_stay_whole_under_qk_norm_in_what_is_reachable_too(decouple_qk):
    outline = dataclasses.replace(WIDE, whole_qk=(True, True, True))
    plan = fit_plan(outline, draw(outline, 0), asks({"macs": 0.4}, decouple_qk=decouple_qk))
    assert [kept.qk_dim for kept in plan.dims] == [16, 16, 24]
    assert ([kept.v_dim for kept in plan.dims] == [16, 16, 24]) != decouple_qk
    with pytest.raises(Refused, match="out of reach") as refusal:
        fit_plan(outline, draw(outline, 0), asks({"macs": 0.05}, decouple_qk=decouple_qk, sublayers=False))
    lowest = named(refusal.value)
    v = [8, 8, 8] if decouple_qk else [16, 16, 24]
    least = [Dims(1, of.qk_dim, v_dim, 8) for of, v_dim in zip(WIDE.dims, v, strict=True)]
    assert fit_plan(outline, draw(outline, 0), asks({"macs": lowest}, decouple_qk=decouple_qk)).dims == tuple(least)


@pytest.mark.parametrize("scope", ["global", "per_type"])
def test_keeping_all_is_the_full_plan(scope):
    plan = fit_plan(WIDE, draw(WIDE, 0), asks({"macs": 1, "params": 1.0}, scope=scope))
    assert plan.dims == WIDE.dims


@pytest.mark.parametrize("scope", ["global", "per_type"])
def test_the_range_that_is_named_can_be_had(scope):
    with pytest.raises(Refused, match=r"prune\.keep\.macs: 0\.05 .*reach") as refusal:
        fit_plan(WIDE, draw(WIDE, 0), asks({"macs": 0.05}, scope=scope, sublayers=False))
    lowest = named(refusal.value)
    plan = fit_plan(WIDE, draw(WIDE, 0), asks({"macs": lowest}, scope=scope))
    assert all(kept == Dims(1, 8, 8, 8) for kept in plan.dims)
    with pytest.raises(Refused, match="out of reach"):
        fit_plan(WIDE, draw(WIDE, 0), asks({"macs": lowest - 0.0005}, scope=scope, sublayers=False))


def test_where_query_and_key_dimensions_stay_whole_split_is_a_way_out():
    for kind, helps in (("eva02", True), ("vit", False)):
        outline = cost.outline(tiny(kind))
        for sublayers in (False, None):
            with pytest.raises(Refused, match="out of reach") as refused:
                fit_plan(outline, draw(outline, 0), asks({"macs": 0.01}, round=4, sublayers=sublayers))
            assert ("or prune.decouple_qk" in str(refused.value)) == helps
            with pytest.raises(Refused) as refused:
                fit_plan(
                    outline, draw(outline, 0), asks({"macs": 0.01}, round=4, sublayers=sublayers, decouple_qk=True)
                )
            assert "prune.decouple_qk" not in str(refused.value)


def test_narrow_heads_stay_whole():
    outline = cost.outline(tiny(embed_dim=12, num_heads=2))  # heads of 6, below a round of 8
    plan = fit_plan(outline, draw(outline, 0), asks({"macs": 0.7}))
    assert {kept.v_dim for kept in plan.dims} == {6}


def test_the_most_valuable_units_stay():
    scores = draw(WIDE, 3)
    plan = fit_plan(WIDE, scores, asks({"macs": 0.5}))
    for i, block in enumerate(plan.blocks):
        units = scores[f"blocks.{i}.mlp"]
        gone = np.setdiff1d(np.arange(len(units)), block.units)
        assert len(gone) == 0 or units[list(block.units)].min() >= units[gone].max()
        v = scores[f"blocks.{i}.attn"].reshape(block.of.heads, block.of.v_dim)
        worth = v.sum(axis=1)
        lost = np.setdiff1d(np.arange(block.of.heads), block.heads)
        assert len(lost) == 0 or worth[list(block.heads)].min() >= worth[lost].max()
        for head, kept in zip(block.heads, block.v, strict=True):
            cut = np.setdiff1d(np.arange(block.of.v_dim), kept)
            assert len(cut) == 0 or v[head, list(kept)].min() >= v[head, cut].max()


def test_pool_spares_a_block_that_matters_and_kind_only_compares_alike():
    scores = draw(WIDE, 0)
    scores["blocks.0.mlp"] = scores["blocks.0.mlp"] + 1000
    assert fit_plan(WIDE, scores, asks({"macs": 0.6})).dims[0].hidden == 192
    dear = {site: 1000 * v if site.endswith("mlp") else v for site, v in draw(WIDE, 0).items()}
    assert (
        fit_plan(WIDE, dear, asks({"macs": 0.7}, scope="per_type")).dims
        == fit_plan(WIDE, draw(WIDE, 0), asks({"macs": 0.7}, scope="per_type")).dims
    )


def test_kind_cuts_each_kind_to_the_same_share():
    outline = cost.Outline(17, 48, (Dims(8, 64, 64, 512),) * 4, (cost.Biases(),) * 4, 0, 0)
    plan = fit_plan(outline, draw(outline, 1), asks({"macs": 0.4}, scope="per_type"))
    heads = sum(d.heads - 1 for d in plan.dims) / (4 * 7)
    dims = sum(d.v_dim - 8 for d in plan.dims) / (4 * 56)
    units = sum(d.hidden - 8 for d in plan.dims) / (4 * 504)
    assert max(heads, dims, units) - min(heads, dims, units) < 0.08  # one head of 28, and what was put back


@pytest.mark.parametrize(("keep", "whole"), [(0.7, True), (0.45, True), (0.2, False)])
def test_uniform_keeps_every_block_alike_and_attention_whole_while_units_will_do(keep, whole):
    outline = cost.Outline(17, 64, (Dims(4, 16, 16, 256),) * 3, (cost.Biases(),) * 3, 0, 0)
    scores = draw(outline, 2)
    plan = fit_plan(outline, scores, asks({"macs": keep}, scope="uniform"))
    assert len(set(plan.dims)) == 1
    (dims, *_) = plan.dims
    assert (dims[:3] == (4, 16, 16)) == whole
    limit = keep * outline.cost().macs
    more = (
        dims._replace(hidden=dims.hidden + 8) if whole else dims._replace(qk_dim=dims.qk_dim + 8, v_dim=dims.v_dim + 8)
    )
    assert outline.cost(plan.dims).macs <= limit < outline.cost([more] * 3).macs
    for i, block in enumerate(plan.blocks):
        assert set(block.units) == set(np.argsort(-scores[f"blocks.{i}.mlp"])[: dims.hidden].tolist())


def test_greedy_finds_the_best_subset_where_brute_force_can_tell():
    # One block, only MLP units to choose, all chunks of one unit: the best of a size are those with the largest scores.
    outline = cost.Outline(5, 8, (Dims(1, 4, 4, 9),), (cost.Biases(),), 0, 0)
    scores = draw(outline, 7)
    plan = fit_plan(outline, scores, asks({"macs": 0.75}, round=4))
    kept = plan.blocks[0].units
    assert set(kept) == set(np.argsort(-scores["blocks.0.mlp"])[: len(kept)].tolist())


@pytest.mark.parametrize("keep", [0.6, 0.4])
def test_the_pool_keeps_nearly_what_exhaustive_search_would(keep):
    """Two blocks by heads, dimensions and units, every pair of widths tried. A unit's score is seldom in proportion to its MACs:
    by score alone, whatever it costs, a twelfth to a quarter of what the best plan keeps is lost on some draws."""
    outline = cost.Outline(17, 48, (Dims(4, 16, 16, 64),) * 2, (cost.Biases(),) * 2, 0, 0)
    ways = [Dims(h, d, d, f) for h in range(1, 5) for d in range(4, 17, 4) for f in range(4, 65, 4)]
    macs = [np.array([outline.block(i, dims).macs for dims in ways]) for i in range(2)]
    fits = macs[0][:, None] + macs[1] <= int(keep * outline.cost().macs)
    for seed in range(12):
        rng, scores = np.random.default_rng(seed), {}
        for i in range(2):  # without scores of query/key dimensions, so that what stays has one worth
            scores[f"blocks.{i}.attn"] = rng.exponential(size=64) * rng.uniform(0.2, 5)
            scores[f"blocks.{i}.mlp"] = rng.exponential(size=64) * rng.uniform(0.2, 5)

        def worth(i: int, dims: Dims, scores: dict = scores) -> float:
            v = -np.sort(-scores[f"blocks.{i}.attn"].reshape(4, 16), axis=1)
            best = v[np.argsort(-v.sum(axis=1))][: dims.heads, : dims.v_dim]
            return best.sum() - np.sort(-scores[f"blocks.{i}.mlp"])[: dims.hidden].sum()

        first, second = (np.array([worth(i, dims) for dims in ways]) for i in range(2))
        most = np.where(fits, first[:, None] + second, 0).max()
        plan = fit_plan(outline, scores, asks({"macs": keep}, round=4, sublayers=False))
        assert 0.975 * most <= sum(worth(i, dims) for i, dims in enumerate(plan.dims)) <= most + 1e-9


def test_a_head_is_worth_its_outputs_whatever_its_queries_are():
    """They go with it but act through its outputs alone, so only where dimensions go do they count."""
    scores = draw(WIDE, 4)
    block = widths.BlockWidths(0, WIDE, scores, asks(round=8))
    qk, v = (scores[f"blocks.0.{kind}"].reshape(4, 16) for kind in ("qk", "attn"))
    gone = {
        "heads": v.sum(axis=1).min(),
        "dims": sum(np.sort(rows, axis=1)[:, :8].sum() for rows in (qk, v)),
        "units": np.sort(scores["blocks.0.mlp"])[:8].sum(),
    }
    for kind, value in gone.items():
        assert block.chunk(kind, block.fewer(kind)).value == pytest.approx(value)
    dear = {**scores, "blocks.0.qk": 1000 * scores["blocks.0.qk"]}
    plans = [
        fit_plan(WIDE, one, asks({"macs": 0.5}, round=24)) for one in (scores, dear)
    ]  # heads are cut whole, or not
    assert plans[0].dims == plans[1].dims
    assert plans[0].dims[0].heads < 4


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({}, r"prune\.keep: say macs, params or latency"),
        (0.5, r"prune\.keep: .*0\.5.* prune\.keep\.macs=0\.5"),
        (None, r"prune\.keep: .*None.* prune\.keep\.macs"),
        ({"macs": None}, r"prune\.keep: say macs, params or latency"),
        ({"macs": 0}, "not 0"),
        ({"macs": 1.5}, "not 1.5"),
        ({"macs": "half"}, "not 'half'"),
        ({"macs": True}, "not True"),
        ({"mac": 0.5}, "Did you mean 'macs'"),
        ({"latncy": 0.5}, "Did you mean 'latency'"),
        ({"moons": 0.5}, "Here: macs, params, latency"),
    ],
)
def test_what_is_no_budget_is_refused(keep, message):
    with pytest.raises(Refused, match=message):
        prune(tiny(), [], keep)


def test_scores_that_do_not_fit_are_refused():
    good = draw(WIDE, 0)
    with pytest.raises(Refused, match=r"blocks\.1\.mlp: 99 scores for 100"):
        fit_plan(WIDE, {**good, "blocks.1.mlp": np.ones(99)}, asks({"macs": 0.5}))
    with pytest.raises(Refused, match=r"blocks\.1\.mlp: .*not finite"):
        fit_plan(WIDE, {**good, "blocks.1.mlp": np.full(100, np.nan)}, asks({"macs": 0.5}))
    with pytest.raises(Refused, match=r"blocks\.0\.attn: has no scores"):
        fit_plan(WIDE, {}, asks({"macs": 0.5}))
    with pytest.raises(Refused, match=r"prune\.scope"):
        fit_plan(WIDE, good, asks({"macs": 0.5}, scope="all"))
    with pytest.raises(Refused, match=r"prune\.round"):
        fit_plan(WIDE, good, asks({"macs": 0.5}, round=0))


def test_a_plan_for_vit_base_is_made_in_few_steps(monkeypatch: pytest.MonkeyPatch):
    """4,600 chunks: their number bounds the time, not a clock."""
    outline = cost.Outline(197, 768, (Dims(12, 64, 64, 3072),) * 12, (cost.Biases(),) * 12, 1_500_000, 116_000_000)
    steps = 0
    original = widths.BlockWidths.chunk

    def counted(*args):
        nonlocal steps
        steps += 1
        return original(*args)

    monkeypatch.setattr(widths.BlockWidths, "chunk", counted)
    plan = fit_plan(outline, draw(outline, 0), asks({"macs": 0.25}))
    assert 0.2498 < plan.cost(outline).macs / outline.cost().macs <= 0.25
    assert steps < 20_000


@pytest.mark.parametrize("ways", [{}, {"scope": "per_type"}, {"scope": "threshold"}, {"scope": "uniform"}, {"sublayers": True},
                                  {"in_channels": True}, {"decouple_qk": True}])  # fmt: skip
def test_what_is_excluded_stays_whole_and_the_rest_meets_the_budget(ways: dict) -> None:
    request = asks({"macs": 0.7}, exclude=["blocks.0", "*1.attn"], **ways)
    scores = draw(WIDE, 3)
    if ways.get("in_channels"):
        scores |= {
            f"blocks.{i}.{kind}": np.random.default_rng(i).random(48)
            for i in range(3)
            for kind in ("attn_in", "mlp_in")
        }
    found = fit_plan(WIDE, scores, request)
    assert found.dims[0] == WIDE.dims[0]
    assert found.dims[1]._replace(hidden=0, mlp_in=None) == WIDE.dims[1]._replace(hidden=0)
    assert found.cost(WIDE).macs <= 0.7 * WIDE.cost().macs


@pytest.mark.parametrize("ways", [{"sublayers": False}, {"sublayers": True}, {"sublayers": True, "in_channels": True}])
def test_what_is_excluded_limits_what_can_be_reached(ways: dict) -> None:
    request = asks({"macs": 0.01}, exclude=["*.attn", "blocks.2"], **ways)
    with pytest.raises(Refused, match="out of reach") as refusal:
        fit_plan(WIDE, draw(WIDE, 3), request)
    reach = named(refusal.value)
    whole = WIDE.cost()
    stays = sum(block.attn_macs for block in whole.blocks) + whole.blocks[2].mlp_macs + WIDE.fixed_macs
    assert reach >= stays / whole.macs - 1e-4


@pytest.mark.parametrize("ways", [{}, {"scope": "per_type"}, {"scope": "threshold"}, {"scope": "uniform"}, {"sublayers": True},
                                  {"decouple_qk": True}, {"round": 1}])  # fmt: skip
def test_no_sublayer_that_stays_is_thinner_than_is_said(ways: dict) -> None:
    """Where scores alone would empty a block."""
    scores = draw(WIDE, 3)
    scores |= {site: 1e-6 * found for site, found in scores.items() if site.startswith("blocks.1.")}
    free, held = (fit_plan(WIDE, scores, asks({"macs": 0.55}, **ways, **more)) for more in ({}, {"min_keep": 0.4}))
    assert held.cost(WIDE).macs <= 0.55 * WIDE.cost().macs
    step = ways.get("round", 8)
    for now, of in zip(held.dims, WIDE.dims, strict=True):
        for name in ("heads", "qk_dim", "v_dim", "hidden"):
            least = min(getattr(of, name), -(-math.ceil(0.4 * getattr(of, name)) // step) * step)
            least = math.ceil(0.4 * of.heads) if name == "heads" else least
            gone = ways.get("sublayers") and not (now.hidden if name == "hidden" else now.heads)
            assert getattr(now, name) >= (0 if gone else least), name
    if (
        ways.get("scope") != "uniform" and "sublayers" not in ways
    ):  # else block 1 is like the others, or gone as a whole
        assert free.dims != held.dims
        assert free.dims[1].hidden < 40 or free.dims[1].heads < 2 or free.dims[1].v_dim < 8


@pytest.mark.parametrize(
    ("exclude", "cure"),
    [(["*"], r"or name less in prune\.exclude\.$"), (["*.attn"], r"prune\.exclude, or take a smaller round")],
)
def test_what_excludes_too_much_is_told_so(exclude: list[str], cure: str) -> None:
    with pytest.raises(Refused, match=cure):
        fit_plan(WIDE, draw(WIDE, 3), asks({"macs": 0.01}, exclude=exclude, sublayers=True))


def test_min_keep_limits_what_can_be_reached_and_the_widths_that_a_clock_chooses() -> None:
    request = asks({"macs": 0.05}, min_keep=0.5, sublayers=False)
    with pytest.raises(Refused, match=r"prune\.keep\.macs: .*2 heads.*round or min_keep") as refusal:
        fit_plan(WIDE, draw(WIDE, 3), request)
    reach = named(refusal.value)
    least = fit_plan(WIDE, draw(WIDE, 3), asks({"macs": reach}, min_keep=0.5, sublayers=False))
    assert list(least.dims) == [Dims(2, 8, 8, 96), Dims(2, 8, 8, 56), Dims(1, 16, 16, 96)]
    block = widths.BlockWidths(1, WIDE, draw(WIDE, 3), request)
    assert block.choices() == ([2, 3, 4], [8, 16], [56, 64, 72, 80, 88, 96, 100])


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(Refused, match=r"prune\.exclude: 'block\.1' .*'blocks\.1'\?"):
        fit_plan(WIDE, draw(WIDE, 3), asks({"macs": 0.7}, exclude=["block.1"]))


def test_a_block_that_is_excluded_computes_what_it_did() -> None:
    model: Any = tiny()
    small: Any = prune(model, batches(), {"macs": 0.7}, exclude=["blocks.0"])
    x = torch.randn(2, 17, 48)
    torch.testing.assert_close(small.blocks[0](x), model.blocks[0](x), rtol=1e-3, atol=1e-3)
    assert small.blocks[1].mlp.fc1.out_features < model.blocks[1].mlp.fc1.out_features
