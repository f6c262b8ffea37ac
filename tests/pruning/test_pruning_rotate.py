"""Rotation against its oracles: nothing changes before a cut, and no cut of as many dimensions is better after it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from masking import masked
from tiny_vits import PLAIN, asks, batches, pictures, random_plan, tiny
from torch import nn

from lotus.pruning import Given, lottery, prune, rotate, spec, surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy

DIM, WIDTH = 6, 9


def turned(model: nn.Module, data=None, **which) -> Any:
    return rotate.apply(model, rotate.turns(model, rotate.statistics(model, data or batches()), **which))


def moment(seed: int, dim: int = DIM) -> torch.Tensor:
    """A second moment far from white."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=draw, dtype=torch.float64)
    return mix @ torch.diag(torch.logspace(0, -3, dim, dtype=torch.float64)) @ mix.T


def leading(of, count: int) -> BlockPlan:
    """The first ``count`` query/key and value dimensions of every head, and all else."""
    rows = tuple(tuple(range(count)) for _ in range(of.heads))
    return BlockPlan(of, tuple(range(of.heads)), rows, rows, tuple(range(of.hidden)))


def seen(model: nn.Module, images: torch.Tensor, index: int = 0) -> dict[str, torch.Tensor]:
    """q, k (B, H, N, Q) and the inputs of proj (B, N, H V) of a block."""
    block, found = anatomy.blocks(model)[index], dict[str, Any]()
    heads, qk, _, _ = block.dims[:4]
    hooks = [
        block.qkv.register_forward_hook(lambda _, __, out: found.update(qkv=out)),
        block.proj.register_forward_pre_hook(lambda _, args: found.update(o=args[0])),
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    q, k = (
        part.unflatten(-1, (heads, qk)).transpose(1, 2)
        for part in found["qkv"][..., : 2 * heads * qk].split(heads * qk, dim=-1)
    )
    return {"q": q, "k": k, "o": found["o"]}


# ------------------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("kind", PLAIN)
def test_a_rotated_model_computes_what_the_model_computes(kind):
    model = tiny(kind)
    before = copy.deepcopy(model.state_dict())
    other = turned(model)
    images = pictures(seed=3)  # others than those it was rotated by
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=0, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (other.blocks[0].attn.proj.weight - model.blocks[0].attn.proj.weight).abs().max() > 0.1
    assert other.blocks[0].mlp.fc1.weight is model.blocks[0].mlp.fc1.weight, "what is not turned is not copied"


@pytest.mark.parametrize(("kind", "seed"), few(itertools.product(PLAIN, range(2)), lambda one: one[1] == 0))
def test_masked_equals_cut_in_the_rotated_basis(kind, seed):
    other = turned(tiny(kind))
    plan = random_plan(other, seed)
    with torch.no_grad():
        small = surgery.cut(other, plan)(pictures())
        torch.testing.assert_close(masked(other, plan)(pictures()), small, rtol=0, atol=1e-5)


def test_one_of_two_can_be_turned_alone():
    model = tiny()
    only_values, only_keys = turned(model, qk=False), turned(model, v=False)
    old, inner = model.blocks[0].attn, 48
    assert torch.equal(only_values.blocks[0].attn.qkv.weight[: 2 * inner], old.qkv.weight[: 2 * inner])
    assert not torch.equal(only_values.blocks[0].attn.proj.weight, old.proj.weight)
    assert torch.equal(only_keys.blocks[0].attn.qkv.weight[2 * inner :], old.qkv.weight[2 * inner :])
    assert torch.equal(only_keys.blocks[0].attn.proj.weight, old.proj.weight)


def test_split_heads_can_be_turned_again():
    model = tiny()
    of = anatomy.blocks(model)[0].dims
    qk, v = (tuple(tuple(range(count)) for _ in range(3)) for count in (10, 7))
    once = surgery.cut(turned(model), Plan((BlockPlan(of, (0, 1, 2), qk, v, tuple(range(of.hidden))),) * 2))
    with torch.no_grad():
        torch.testing.assert_close(turned(once)(pictures()), once(pictures()), rtol=0, atol=1e-5)


def test_directions_that_calibration_never_saw_are_kept_too():
    """Two images of five tokens, heads of sixteen dimensions: most directions have no variance."""
    model = tiny(img_size=16)
    few = [(pictures(2)[..., :16, :16], torch.zeros(2, dtype=torch.long))]
    other = turned(model, few)
    images = pictures(seed=4)[..., :16, :16]
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_models_dtype_is_kept(dtype):
    other = turned(tiny(dtype=dtype), batches(dtype=dtype))
    assert {weight.dtype for weight in other.parameters()} == {dtype}


def test_a_frozen_weight_stays_frozen():
    model = tiny()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    attn = turned(model).blocks[0].attn
    assert not attn.qkv.weight.requires_grad
    assert attn.proj.weight.requires_grad


# ---------------------------------------------------------------------------------------------- Eckart and Young


def logits_lost(queries: torch.Tensor, keys: torch.Tensor, form: torch.Tensor) -> float:
    """Mean square of q' (I - form) k, in numpy: trace of (I - M) Gk (I - M)' Gq."""
    gone = np.eye(len(form)) - form.numpy()
    return float(np.trace(gone @ keys.numpy() @ gone.T @ queries.numpy()))


@pytest.mark.parametrize("rank", range(DIM + 1))
def test_logits_lose_the_tail_of_the_singular_values_and_no_form_loses_less(rank):
    gq, gk = moment(0), moment(1)
    turn = rotate.queries_keys(gq, gk)
    form = turn.first[:rank].T @ turn.second[:rank]  # q' form k
    # the bound, by Cholesky factors and numpy instead of symmetric roots and torch
    a, b = np.linalg.cholesky(gq.numpy()), np.linalg.cholesky(gk.numpy())
    tail = np.linalg.svd(a.T @ b, compute_uv=False)[rank:]
    scale = np.trace(gq.numpy() @ gk.numpy())
    assert logits_lost(gq, gk, form) == pytest.approx(float((tail**2).sum()), rel=1e-3, abs=1e-5 * scale)
    np.testing.assert_allclose(turn.singular[rank:], tail, rtol=1e-3, atol=1e-5 * float(turn.singular[0]))
    draw = torch.Generator().manual_seed(rank)
    for _ in range(20):  # any other form of this rank
        x, y = (torch.randn(rank, DIM, generator=draw, dtype=torch.float64) for _ in range(2))
        assert logits_lost(gq, gk, x.T @ y) >= logits_lost(gq, gk, form) - 1e-5 * scale


@pytest.mark.parametrize("rank", range(1, DIM))
def test_logits_never_lose_more_than_by_the_best_choice_of_indices(rank):
    for seed in range(10):
        gq, gk = moment(seed), moment(100 + seed)
        turn = rotate.queries_keys(gq, gk)
        mine = logits_lost(gq, gk, turn.first[:rank].T @ turn.second[:rank])
        for kept in itertools.combinations(range(DIM), rank):
            form = torch.zeros(DIM, DIM, dtype=torch.float64)
            form[list(kept), list(kept)] = 1
            assert mine <= logits_lost(gq, gk, form) + 1e-5 * float(torch.trace(gq @ gk))


@pytest.mark.parametrize("rank", range(DIM + 1))
def test_outputs_lose_the_tail_and_never_more_than_by_indices_with_the_best_compensation(rank):
    for seed in range(5):
        spread = moment(seed)
        weight = torch.randn(WIDTH, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        turn = rotate.values(spread, weight)

        def lost(new: np.ndarray, spread=spread, weight=weight) -> float:
            gone = weight.numpy() - new
            return float(np.trace(gone @ spread.numpy() @ gone.T))

        mine = lost((weight @ turn.second[:, :rank] @ turn.first[:rank]).numpy())
        root = np.linalg.cholesky(spread.numpy())
        tail = np.linalg.svd(weight.numpy() @ root, compute_uv=False)[rank:]
        whole = lost(np.zeros((WIDTH, DIM)))
        assert mine == pytest.approx(float((tail**2).sum()), rel=1e-3, abs=1e-5 * whole)
        for kept in map(list, itertools.combinations(range(DIM), rank)):
            s = spread.numpy()
            best = np.zeros((WIDTH, DIM))  # least squares: W C[:, S] C[S, S]^-1 on the kept
            best[:, kept] = weight.numpy() @ s[:, kept] @ np.linalg.inv(s[np.ix_(kept, kept)]) if kept else 0
            assert mine <= lost(best) + 1e-5 * whole


@pytest.mark.parametrize("width", [2, DIM, WIDTH])
def test_a_change_of_basis_can_be_undone_whatever_the_shapes(width):
    weight = torch.randn(width, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[:, 3] = 0  # proj does not read this one
    turn = rotate.values(moment(0), weight)
    torch.testing.assert_close(weight @ turn.second @ turn.first, weight, rtol=1e-6, atol=1e-6)
    assert turn.first.isfinite().all()
    if width < DIM:
        assert turn.singular[width:].max() < 1e-6 * turn.singular[0]
    turn = rotate.queries_keys(moment(1), moment(2))
    torch.testing.assert_close(turn.first.T @ turn.second, torch.eye(DIM, dtype=torch.float64), rtol=0, atol=1e-6)


def test_statistics_are_those_of_all_tokens_and_keys_are_taken_about_their_image():
    model, data = tiny(dtype=torch.float64), batches(2, 3, torch.float64)
    found = rotate.statistics(model, data)["blocks.0"]
    assert found.logits.images == 6
    q, k, o = seen(model, torch.cat([x for x, _ in data])).values()
    flat = q.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(found.logits.queries, flat.mT @ flat / flat.shape[1])
    flat = (k - k.mean(dim=2, keepdim=True)).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(found.logits.keys, flat.mT @ flat / flat.shape[1])
    torch.testing.assert_close(found.outputs.covariance, torch.cov(o.flatten(0, 1).T, correction=0))


def test_in_the_rotated_basis_dimensions_are_uncorrelated_and_fall():
    model, data = tiny("layerscale", dtype=torch.float64), batches(4, 8, torch.float64)
    other = turned(model, data)
    q, k, o = seen(other, torch.cat([x for x, _ in data])).values()
    proj = other.blocks[0].attn.proj.weight * other.blocks[0].ls1.gamma[:, None]
    for head in range(3):
        energies = []
        for x in (q[:, head], k[:, head] - k[:, head].mean(dim=1, keepdim=True)):
            x = x.flatten(0, 1)
            gram = x.T @ x
            assert (gram - gram.diagonal().diag()).abs().max() < 1e-6 * gram.diagonal().max()
            energies.append(gram.diagonal())
        assert (energies[0] * energies[1]).diff().max() <= 0
        part = slice(head * 16, head * 16 + 16)
        spread = torch.cov(o.flatten(0, 1).T, correction=0)[part, part]
        assert (spread - spread.diagonal().diag()).abs().max() < 1e-6 * spread.diagonal().max()
        columns = proj[:, part].T @ proj[:, part]
        assert (columns - columns.diagonal().diag()).abs().max() < 1e-6 * columns.diagonal().max()
        assert (spread.diagonal() * columns.diagonal()).diff().max() <= 0


def test_what_softmax_does_not_see_weighs_nothing():
    """A huge constant in the keys, as a bias gives, is no reason to keep a direction: attention is the same without it."""
    model, data = tiny(dtype=torch.float64), batches(dtype=torch.float64)
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.blocks[0].attn.qkv.bias[48:96] += 50 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    cuts = []
    for one in (model, shifted):
        other = turned(one, data)
        plan = Plan(tuple(leading(block.dims, 6) for block in anatomy.blocks(other)))
        with torch.no_grad():
            cuts.append(surgery.cut(other, plan)(pictures(dtype=torch.float64)))
            torch.testing.assert_close(shifted(pictures(dtype=torch.float64)), model(pictures(dtype=torch.float64)))
    torch.testing.assert_close(cuts[0], cuts[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "layerscale", "registers", "no_bias"])
def test_a_cut_of_heads_is_closer_rotated_than_by_index(kind):
    """On the calibration images and on others, the error in what the first block's attention writes."""
    model, data = tiny(kind), batches(6)
    x = torch.cat([images for images, _ in data])
    for images in (x, pictures(16, seed=77)):
        written = dict[str, Any]()
        for name, one in (("dense", model), ("index", model), ("rotated", turned(model, data))):
            small = one
            if name != "dense":
                small = surgery.cut(one, Plan(tuple(leading(block.dims, 8) for block in anatomy.blocks(one))))
            with (
                small.blocks[0].attn.register_forward_hook(
                    lambda _, __, out, name=name, written=written: written.update({name: out})
                ),
                torch.no_grad(),
            ):
                small(images)
        errors = {name: float((written[name] - written["dense"]).square().mean()) for name in ("index", "rotated")}
        assert errors["rotated"] < 0.5 * errors["index"]


# ------------------------------------------------------------------------------------------------------ in the pruner


def test_it_is_the_default_and_changes_the_cut():
    model, data = tiny(), batches()
    drawn = lottery(model, data, asks({"macs": 0.5}, criterion="fisher", embed_dim=None))
    other = turned(model, data)
    by_hand = lottery(other, data, asks({"macs": 0.5}, criterion="fisher", rotate=False, embed_dim=None))
    assert drawn.plan == by_hand.plan
    with torch.no_grad():
        torch.testing.assert_close(drawn.model(pictures()), by_hand.model(pictures()), rtol=0, atol=1e-6)
        plain = prune(model, data, {"macs": 0.5}, criterion="fisher", rotate=False, embed_dim=None)
        assert (plain(pictures()) - drawn.model(pictures())).abs().max() > 1e-2
    assert drawn.images == by_hand.images == 24
    assert (drawn.forwards, by_hand.forwards) == (4 * 24, 3 * 24)
    assert drawn.notes == ()


def test_learned_gates_stay_on_their_dimensions_and_the_plan_says_so():
    model = tiny()
    learned = {site: torch.rand(linear.in_features) for site, linear in anatomy.sites(model).items()}
    drawn = lottery(model, batches(), asks({"macs": 0.5}, criterion="gate"), Given(gates=learned))
    assert "learned gate" in drawn.text()
    kept = drawn.plan.blocks[0].v[0]
    scores = learned["blocks.0.attn"].reshape(3, 16)[drawn.plan.blocks[0].heads[0]]
    assert set(kept) == set(scores.argsort(descending=True)[: len(kept)].tolist())


@pytest.mark.parametrize("decouple_qk", [False, True])
def test_qk_norm_keeps_queries_and_keys_as_they_are_and_the_plan_says_so(decouple_qk, tmp_path):
    model, data = tiny("qk_norm"), batches()
    other = turned(model, data)
    assert torch.equal(other.blocks[0].attn.qkv.weight[:96], model.blocks[0].attn.qkv.weight[:96])
    assert not torch.equal(other.blocks[0].attn.qkv.weight[96:], model.blocks[0].attn.qkv.weight[96:])
    drawn = lottery(model, data, asks({"macs": 0.45}, criterion="fisher", decouple_qk=decouple_qk))
    assert "qk-norm" in drawn.text()
    assert all(dims.qk_dim == 16 for dims in drawn.plan.dims)
    assert any(dims.v_dim < 16 for dims in drawn.plan.dims) == decouple_qk
    with torch.no_grad():
        assert torch.equal(spec.load(spec.save(drawn.model, tmp_path / "small"))(pictures()), drawn.model(pictures()))


def test_a_plan_in_words():
    drawn = lottery(tiny(), batches(), asks({"macs": 0.5}))
    first, *rows = drawn.text().splitlines()
    assert first.split() == ["block", "heads", "q/k", "v", "MLP", "units"]
    dims = drawn.plan.dims[1]
    assert rows[1].split() == ["1", f"{dims.heads}/3", f"{dims.qk_dim}/16", f"{dims.v_dim}/16", f"{dims.hidden}/192"]
    assert f"{drawn.after['macs']:,} of {drawn.before['macs']:,}" in rows[2]


def test_query_and_value_dimensions_may_differ_in_number():
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:  # logits of one direction only: the rest of q and k is worth nothing
            block.attn.qkv.weight[:48].reshape(3, 16, 48)[:, 1:] *= 1e-3
            block.attn.qkv.bias[:48].reshape(3, 16)[:, 1:] *= 1e-3
    drawn = lottery(model, batches(), asks({"macs": 0.7}, criterion="fisher", decouple_qk=True, round=4))
    assert drawn.after["macs"] <= 0.7 * drawn.before["macs"]
    assert any(dims.qk_dim < dims.v_dim for dims in drawn.plan.dims)
    same = lottery(model, batches(), asks({"macs": 0.7}, criterion="fisher", round=4))
    assert all(dims.qk_dim == dims.v_dim for dims in same.plan.dims)
