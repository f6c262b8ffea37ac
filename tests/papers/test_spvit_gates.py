"""Nested gates: what they compute, what they learn, and that their choice hits the budget exactly."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pruning"))
from tiny_vits import batches, pictures, tiny

from lotus.papers.spvit import project
from lotus.papers.spvit.nested_gates import NestedGates, nested, sampled
from lotus.papers.spvit.project import Choice
from lotus.vit import anatomy, cost
from lotus.vit.convolution import macs as conv_macs
from selection.errors import Refused


def gated(kind: str = "vit", keep: float = 0.5, **more) -> tuple[nn.Module, NestedGates]:
    model = tiny(kind)
    return model, NestedGates(model, **{"keep": keep, "lr": 0.05, "strength": 30.0, **more})


def levels(gates: NestedGates, model: nn.Module, chosen: list[int], units: list[torch.Tensor]) -> None:
    """Make theta say what is chosen: 1, 2, 3 for 1x1, 3x3, attention."""
    parts = []
    for level, open_ in zip(chosen, units):
        parts += [torch.tensor([1.0 if place < level else -1.0 for place in range(3)]), open_.float() * 2 - 1]
    gates.theta.copy_(torch.cat(parts))


@pytest.mark.parametrize("kind", ["vit", "registers", "pooled", "layerscale", "qk_norm"])
def test_what_the_gates_compute_is_what_is_cut(kind):
    """masked == cut: hard gates on the whole model against convolutions and smaller Linears."""
    rng = torch.Generator().manual_seed(0)
    for chosen in ([3, 3], [2, 1], [1, 3], [3, 2]):
        original, (model, gates) = tiny(kind), gated(kind)
        units = [torch.rand(192, generator=rng) < 0.4 for _ in range(2)]
        levels(gates, model, chosen, units)
        for block in model.blocks:
            nn.init.normal_(block.attn.paths.mix, std=0.02, generator=rng)
            for norm in (block.attn.paths.norm1, block.attn.paths.norm3):
                nn.init.normal_(norm.running_mean, std=0.1, generator=rng)
        choices = [
            Choice({1: 1, 2: 3, 3: 0}[level], tuple(open_.nonzero().flatten().tolist()))
            for level, open_ in zip(chosen, units)
        ]
        small = project.convert(original, choices, gates.mixes())
        for block, new in zip(model.blocks, anatomy.blocks(small, convolved=True)):
            if new.kernel:
                new.attn.norm.load_state_dict(block.attn.paths.norm(new.kernel).state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(pictures()), small(pictures()), atol=2e-5, rtol=1e-4)
        assert gates.open_macs() == pytest.approx(cost.count(small).macs / cost.count(original).macs, rel=1e-5)


def test_gates_come_off_without_a_trace():
    model, gates = gated()
    names = set(tiny().state_dict())
    assert set(model.state_dict()) > names
    gates.remove()
    assert set(model.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(model(pictures()), tiny()(pictures()))
    anatomy.blocks(model)
    cost.count(model)


def test_samples_are_bernoulli_and_their_gradient_is_the_relaxations():
    theta = torch.tensor([-1.0, 0.0, 1.5], requires_grad=True)
    rng = np.random.default_rng(0)
    u = torch.tensor(rng.random((20_000, 3)), dtype=torch.float32)
    noise = u.log() - (1 - u).log()
    drawn = sampled(theta.expand(20_000, 3), noise)
    assert set(drawn.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), theta.sigmoid(), atol=0.02, rtol=0)
    one = torch.tensor([0.3], requires_grad=True)
    sampled(one, torch.tensor([-0.7])).sum().backward()
    soft = torch.sigmoid(torch.tensor(0.3 - 0.7))
    assert one.grad == pytest.approx(float(soft * (1 - soft)))


@pytest.mark.parametrize("raw", list(itertools.product([0.0, 1.0], repeat=3)))
def test_gates_are_nested(raw):
    products = nested(torch.tensor(raw))
    assert products.tolist() == [raw[0], raw[0] * raw[1], raw[0] * raw[1] * raw[2]]
    assert products[0] >= products[1] >= products[2]


def test_the_pull_of_the_budget_against_finite_differences():
    """The gradient through sigmoid(g - 1/2) is that of the smooth MACs with hard gates in all other factors."""
    _, gates = gated(keep=0.3)
    rng = torch.Generator().manual_seed(1)
    gates.theta.copy_(torch.randn(len(gates.theta), generator=rng))
    theta = gates.theta.clone().requires_grad_()
    gates.share(theta).backward()
    assert theta.grad is not None
    outline, hard = cost.outline(tiny()), (gates.theta > 0).double()
    soft = (gates.theta.double().sigmoid() - 0.5).sigmoid()
    width, step = gates.widths[0], 1e-5
    for index in (0, 1, 2, 3, 7, width, width + 2, width + 9):
        shares = []
        for sign in (1, -1):
            moved = gates.theta.double().clone()
            moved[index] += sign * step
            value = hard + (moved.sigmoid() - 0.5).sigmoid() - soft
            shares.append(by_hand(outline, gates, value))
        assert float(theta.grad[index]) == pytest.approx((shares[0] - shares[1]) / (2 * step), rel=1e-3, abs=1e-7)


def by_hand(outline: cost.Outline, gates: NestedGates, value: torch.Tensor) -> float:
    """MACs as a part, out of the cost functions."""
    total: float = outline.cost().macs - sum(outline.block(i, one).macs for i, one in enumerate(outline.dims))
    patches = outline.tokens - 1
    for index, (part, dims) in enumerate(zip(value.split(gates.widths), outline.dims)):
        g0, g1, g2 = part[0], part[0] * part[1], part[0] * part[1] * part[2]
        one, three = (conv_macs(patches, 48, dims.v_dim, kernel) for kernel in (1, 3))
        whole = outline.block(index, dims)
        total = total + float(g0 * one + g1 * (three - one) + g2 * (whole.attn_macs - three))
        total = total + float(part[3:].sum()) * cost.mlp_macs(outline.tokens, 48, 1)
    return total / outline.cost().macs


def test_a_step_carries_the_gradient_of_the_leaves_to_theta():
    """Against autograd through the whole of it, without leaves in between; and two micro-batches add up."""
    model, gates = gated()
    data = batches(2)
    model.train()
    before = gates.theta.clone()
    for images, labels in data:
        nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
    leaves = torch.cat([leaf.grad.flatten() for pair in gates.leaves for leaf in pair])
    outputs = torch.cat([output.flatten() for pair in gates.graph for output in pair])
    (expected,) = torch.autograd.grad(outputs, gates.under, leaves, retain_graph=True)
    theta = before.clone().requires_grad_()
    (30.0 * (0.5 - gates.share(theta)) ** 2).backward()
    total = expected + theta.grad
    seen = list[Any]()
    gates.step(0.5, seen.append)
    torch.testing.assert_close(seen[0], leaves)
    # Adam's first step is lr times the sign.
    torch.testing.assert_close(gates.theta, before - 0.05 * total / (total.abs() + 1e-8), atol=1e-6, rtol=1e-4)
    assert all(leaf.grad is None for pair in gates.leaves for leaf in pair), "a new draw"


def test_the_gates_of_one_place_see_the_paths_difference():
    """dL/dg of attention's product is the loss' slope along MSA - conv3: by finite differences of the leaf."""
    model, gates = gated()
    model.double().train()
    for block in model.blocks:  # batch statistics change with nothing that is moved here
        block.attn.paths.eval()
    images, labels = pictures(4).double(), torch.tensor([0, 1, 2, 3])
    for gate in range(3):
        nn.functional.cross_entropy(model(images), labels).backward()
        leaf = gates.leaves[0][0]
        assert leaf.grad is not None
        slope, losses = float(leaf.grad[gate]), []
        gates.skip()
        for sign in (1, -1):
            with torch.no_grad():
                leaf[gate] += sign * 1e-3
                losses.append(float(nn.functional.cross_entropy(model(images), labels)))
                leaf[gate] -= sign * 1e-3
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=2e-2, abs=1e-5)


def test_search_goes_on_bit_for_bit_and_ranks_draw_alike():
    runs = []
    for broken in (False, True):
        model, gates = gated(seed=3)
        model.train()
        for step in range(4):
            if broken and step == 2:
                state, weights = gates.state(), model.state_dict()
                model, gates = gated(seed=3)
                model.load_state_dict(weights)
                model.train()
                gates.load_state(state)
            images, labels = batches(1)[0]
            nn.functional.cross_entropy(model(images), labels).backward()
            gates.step(step / 4)
        runs.append(gates.theta.clone())
    assert torch.equal(*runs)
    with pytest.raises(Refused, match="another model"):
        gates.load_state({"theta": torch.zeros(3)})


def test_the_budget_pulls_the_gates_to_it():
    _, gates = gated(keep=0.5, lr=0.02)
    gates.theta.add_(0.3 * torch.randn(len(gates.theta), generator=torch.Generator().manual_seed(0)))
    for step in range(300):
        gates.step(step / 300)  # no loss at all: what is left is the pull
    assert gates.open_macs() == pytest.approx(0.5, abs=0.03)
    assert set(gates.summary()) == {"zero_gates", "open_macs", "attention"}


# ----------------------------------------------------------------------------------------------------------- projected


def random_gates(model: nn.Module, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, generator=rng), torch.randn(one.hidden, generator=rng)) for one in anatomy.blocks(model)]


@pytest.mark.parametrize("round", [1, 8])
@pytest.mark.parametrize("keep", [1.0, 0.8, 0.55, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_projection_hits_the_budget_and_could_not_open_more(keep, seed, round):
    model = tiny()
    outline = cost.outline(model)
    gates = random_gates(model, seed)
    choices = project.project(outline, gates, keep, round=round)
    limit = keep * outline.cost().macs
    small = project.convert(model, choices, [torch.ones(3, 9)] * 2)
    spent = cost.count(small).macs
    assert spent <= limit
    assert all(len(choice.units) % round == 0 for choice in choices)
    room = limit - spent
    for choice in choices:
        if len(choice.units) < 192:
            assert cost.mlp_macs(17, 48, min(round, 192 - len(choice.units))) > room
    for (_, units), choice in zip(gates, choices):  # the most open units stay
        gone = sorted(set(range(192)) - set(choice.units))
        assert not gone or units[list(choice.units)].min() >= units[gone].max()
    if keep == 1.0:
        assert spent == outline.cost().macs


@pytest.mark.parametrize("seed", range(4))
def test_without_rounding_the_projection_is_one_threshold(seed):
    """Against trying every threshold: the highest that is within the budget, before what fits is put back."""
    model = tiny()
    outline, gates = cost.outline(model), random_gates(model, seed)
    keep = 0.6
    limit = keep * outline.cost().macs
    values = sorted({float(v) for attention, units in gates for v in (*attention.cummin(0).values, *units)})
    within: list[Choice] = []
    for threshold in values:
        choices = []
        for attention, units in gates:
            level = max(1, int((attention.cummin(0).values > threshold).sum()))
            stay = (units > threshold).nonzero().flatten().tolist() or [int(units.argmax())]
            choices.append(Choice({1: 1, 2: 3, 3: 0}[level], tuple(stay)))
        spent = outline.cost().macs
        for index, (choice, of) in enumerate(zip(choices, outline.dims)):
            path = conv_macs(16, 48, 16, choice.kernel) if choice.kernel else outline.block(index, of).attn_macs
            spent += path + cost.mlp_macs(17, 48, len(choice.units)) - outline.block(index, of).macs
        if spent <= limit:
            within = choices
            break
    assert within
    found = project.project(outline, gates, keep, round=1)
    rank = {0: 3, 3: 2, 1: 1}
    for mine, theirs in zip(found, within):  # it closes what the threshold closes, less what still fitted
        assert rank[mine.kernel] >= rank[theirs.kernel]
        assert set(mine.units) >= set(theirs.units)


def test_a_budget_out_of_reach_is_refused_with_the_least():
    model = tiny()
    outline = cost.outline(model)
    with pytest.raises(Refused, match="out of reach") as told:
        project.project(outline, random_gates(model, 0), 0.01)
    least = float(str(told.value).split("Take ")[1].split(" ")[0])
    assert project.project(outline, random_gates(model, 0), least)
    with pytest.raises(Refused, match="whole number"):
        project.project(outline, random_gates(model, 0), 0.5, round=0)


def test_a_convolution_dearer_than_attention_is_passed_over():
    model = tiny(num_heads=1)  # d = D: 10 D d patches is more than attention over so few tokens
    outline = cost.outline(model)
    assert conv_macs(16, 48, 48, 3) > outline.block(0, outline.dims[0]).attn_macs
    for seed in range(3):
        choices = project.project(outline, random_gates(model, seed), 0.4)
        assert all(choice.kernel != 3 for choice in choices)
