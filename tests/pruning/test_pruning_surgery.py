"""masked(full) == cut(small), for every kind of ViT and any plan."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from few import few
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import masked
from tiny_vits import FAST, KINDS, pictures, random_plan, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lotus.pruning import surgery
from lotus.pruning.plan import Plan
from lotus.vit import anatomy, cost, families
from lotus.vit.attention import SplitAttention
from selection.errors import Refused


def equal(a: nn.Module, b: nn.Module) -> None:
    images = pictures()
    with torch.no_grad():
        torch.testing.assert_close(a(images), b(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "seed"), few(itertools.product(KINDS, range(4)), lambda one: one[1] == 0))
def test_masked_equals_cut(kind, seed):
    model = tiny(kind)
    plan = random_plan(model, seed)
    small = surgery.cut(model, plan)
    full = masked(model, plan)
    equal(full, small)
    with torch.no_grad():
        assert (model(pictures()) - small(pictures())).abs().max() > 1e-2, "the cut must matter for the test to tell"


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=15, deadline=None)
def test_masked_equals_cut_for_any_plan(seed, decouple_qk):
    model = tiny("layerscale")
    plan = random_plan(model, seed, decouple_qk=decouple_qk)
    equal(masked(model, plan), surgery.cut(model, plan))


def test_the_full_plan_changes_nothing():
    model = tiny()
    small = surgery.cut(model, Plan.full(model))
    images = pictures()
    with torch.no_grad():
        assert torch.equal(model(images), small(images))


@pytest.mark.parametrize("fused", [True, False])
def test_a_cut_model_can_be_cut_again(fused):
    model = tiny()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    once = surgery.cut(model, random_plan(model, 1))
    again = random_plan(once, 2, decouple_qk=True)
    twice = surgery.cut(once, again)
    equal(masked(once, again), twice)
    thrice = random_plan(twice, 3, decouple_qk=True)
    equal(masked(twice, thrice), surgery.cut(twice, thrice))


@pytest.mark.parametrize("kind", few(KINDS, FAST))
def test_what_comes_out_is_timms_own_without_masks_or_hooks(kind):
    model = tiny(kind)
    plan = random_plan(model, 5)
    small = surgery.cut(model, plan)
    for block, before, dims in zip(anatomy.blocks(small), anatomy.blocks(model), plan.dims, strict=True):
        fills = dims.heads * dims.v_dim == before.width
        holds = dims.qk_dim == dims.v_dim and (fills or families.holds(type(before.attn)))
        assert type(block.attn) is (type(before.attn) if holds else SplitAttention)
        assert type(block.mlp) is type(before.mlp)
        assert block.dims == dims
        assert (block.heads, block.head_dim) == (dims.heads, dims.v_dim)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    assert not any(weight.is_meta for weight in small.parameters())
    assert type(small) is type(model)


def test_split_plans_get_an_attention_that_holds_them():
    model = tiny()
    plan = random_plan(model, 3, decouple_qk=True)
    small = surgery.cut(model, plan)
    kinds = [type(block.attn) for block in anatomy.blocks(small)]
    assert SplitAttention in kinds
    assert [block.dims for block in anatomy.blocks(small)] == list(plan.dims)


def test_a_timm_whose_attention_cannot_hold_a_cut_gets_ours(monkeypatch):
    model = tiny()
    plan = random_plan(model, 4)
    monkeypatch.setattr(families, "holds", lambda attention: False)
    small = surgery.cut(model, plan)
    assert any(isinstance(block.attn, SplitAttention) for block in small.blocks)
    equal(masked(model, plan), small)


def test_whether_a_class_can_hold_a_cut_is_tried():
    own: Any = type(tiny().blocks[0].attn)

    class Reshaping(own):
        def forward(self, x, attn_mask=None):  # as timm's did until it had attn_dim: proj reads the width
            return self.proj(self.qkv(x)[..., : x.shape[-1]].reshape(x.shape))

    attn = tiny().blocks[0].attn
    assert families.holds(type(attn)) == hasattr(attn, "attn_dim")
    assert not families.holds(Reshaping)


@pytest.mark.parametrize("kind", KINDS)
def test_an_opened_model_computes_what_it_did_and_closes_again(kind):
    model = tiny(kind)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    open_ = families.opened(model)
    assert all(block.is_open for block in anatomy.blocks(open_))
    assert (open_ is model) == all(block.is_open for block in anatomy.blocks(model))
    for block in anatomy.blocks(open_):
        assert block.qkv.out_features == block.heads * (2 * block.dims.qk_dim + block.dims.v_dim)
    for fused in (True, False):
        for module in (*model.modules(), *open_.modules()):
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        equal(model, open_)
    closed = families.close(open_, model)
    assert all(torch.equal(closed.state_dict()[name], tensor) for name, tensor in weights.items())
    assert closed.state_dict().keys() == weights.keys()
    equal(model, closed)


@pytest.mark.parametrize(("kind", "seed"), few(itertools.product(KINDS, range(2)), lambda one: one[1] == 0))
def test_split_attention_computes_what_any_family_does(kind, seed):
    """With as many query/key as value dimensions, and with fewer of the one."""
    model = tiny(kind)
    open_ = copy.deepcopy(families.opened(model))
    for block in anatomy.blocks(open_):
        ours = families.split(block, block.dims)
        ours.load_state_dict(block.attn.state_dict(), assign=True)
        block.module.attn = ours
    equal(model, open_)
    plan = random_plan(model, seed, decouple_qk=True)
    equal(masked(model, plan), surgery.cut(model, plan))


@pytest.mark.parametrize("kind", few(KINDS, FAST))
def test_the_cost_of_a_plan_is_that_of_the_model_it_makes(kind):
    model = tiny(kind)
    plan = random_plan(model, 9, decouple_qk=True)
    small = surgery.cut(model, plan).requires_grad_(False)
    predicted = plan.cost(model)
    assert predicted == cost.count(small)
    assert predicted.params == sum(weight.numel() for weight in small.parameters())
    for module in small.modules():
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False
    with FlopCounterMode(display=False) as counter:
        small(pictures(1))
    assert counter.get_total_flops() == 2 * predicted.macs


def test_the_model_is_left_as_it_was():
    model = tiny()
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = random_plan(model, 0)
    small: Any = surgery.cut(model, plan)
    masked(model, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not small.blocks[0].mlp.fc1.weight.requires_grad
    assert small.blocks[0].mlp.fc2.weight.requires_grad
    with torch.no_grad():  # nothing is shared
        for weight in small.parameters():
            weight.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_cut_model_trains():
    small = surgery.cut(tiny(), random_plan(tiny(), 2)).train()
    small(pictures()).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in small.parameters())


def test_qk_norm_keeps_its_query_and_key_dimensions():
    model = tiny("qk_norm")
    assert [block.qk_norm for block in anatomy.blocks(model)] == [True, True]
    with pytest.raises(Refused, match=r"blocks\.0: has qk-norm"):
        surgery.cut(model, random_plan([block.dims for block in anatomy.blocks(model)], 3))


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(Refused, match="the plan is for"):
        surgery.cut(tiny(), Plan.full(tiny(num_heads=4)))
