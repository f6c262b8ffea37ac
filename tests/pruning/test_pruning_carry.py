"""What an optimizer remembers, over a cut: against the gradients that autograd takes of the small model."""

from __future__ import annotations

import copy

import pytest
import torch
from few import few
from masking import masked
from tiny_vits import FAST, KINDS, NORMED, asks, batches, pictures, random_plan, tiny
from torch import Tensor, nn
from torch.nn import functional

from lotus.pruning import carry, rotate, study, surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, families

DTYPE = torch.float64
EVERY = [kind for kind in KINDS if kind not in NORMED]  # of which the masked model is the cut one's oracle


def gradients(model: nn.Module) -> dict[str, Tensor]:
    images = pictures(dtype=DTYPE)
    labels = torch.arange(len(images)) % 5
    model.eval().zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def turns(model: nn.Module) -> dict[str, rotate.Turns]:
    opened = families.opened(model)
    return rotate.turns(opened, rotate.statistics(opened, batches(dtype=DTYPE)))


def back(turned: dict[str, rotate.Turns]) -> dict[str, rotate.Turns]:
    """The turns that undo these."""
    return {
        name: rotate.Turns(
            None if qk is None else [rotate.Turn(one.second.T, one.first.T, one.singular) for one in qk],
            None if v is None else [rotate.Turn(one.second, one.first, one.singular) for one in v],
        )
        for name, (qk, v) in turned.items()
    }


def named(model: nn.Module, found: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for name, value in found.items()}


def close_to(carried: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    scale = max(1.0, *(float(value.abs().max()) for value in wanted.values()))
    torch.testing.assert_close({name: carried[name] for name in wanted}, wanted, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("kind", few(KINDS, lambda kind: kind in FAST))
def test_momentum_turns_as_the_gradient_of_the_turned_model(kind: str) -> None:
    model = tiny(kind, dtype=DTYPE)
    turned = turns(model)
    other = families.close(rotate.apply(families.opened(model), turned), model)
    before = copy.deepcopy(model.state_dict())
    found = carry.moments(model, named(model, gradients(model), "exp_avg"), Plan.full(model), turned)
    close_to({name.removesuffix("/exp_avg"): value for name, value in found.items()}, gradients(other))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", few(EVERY, lambda kind: kind in FAST))
def test_momentum_is_cut_as_the_gradient_of_the_cut_model(kind: str) -> None:
    """Of a dense model that computes what the small one computes: turned back from one whose units are silent."""
    model = tiny(kind, dtype=DTYPE)
    turned = turns(model)
    plan = random_plan(model, 1, decouple_qk=True)
    silent = masked(rotate.apply(families.opened(model), turned), plan)
    dense = families.close(rotate.apply(families.opened(silent), back(turned)), model)
    small = families.close(surgery.cut(rotate.apply(families.opened(dense), turned), plan), dense)
    images = pictures(dtype=DTYPE)
    with torch.no_grad():
        torch.testing.assert_close(small(images), dense(images), rtol=0, atol=1e-9)
    wanted = gradients(small)
    for block, before in zip(anatomy.blocks(small), anatomy.blocks(dense), strict=True):
        if before.biases == (True, False) and f"{block.name}.attn.qkv.bias" in wanted:
            inner = block.dims.heads * block.dims.qk_dim
            wanted[f"{block.name}.attn.qkv.bias"][inner : 2 * inner] = 0  # which the dense model does not have
    for key in ("exp_avg", "momentum_buffer"):
        found = carry.moments(dense, named(dense, gradients(dense), key), plan, turned)
        carried = {name.removesuffix(f"/{key}"): value for name, value in found.items()}
        assert carried.keys() == dict(small.named_parameters()).keys()
        close_to(carried, wanted)


def test_squares_are_selected_where_nothing_was_turned_and_forgotten_elsewhere_with_their_steps() -> None:
    model = tiny(dtype=DTYPE)
    plan = random_plan(model, 3, decouple_qk=True)
    grads = gradients(model)
    state = {
        **named(model, grads, "exp_avg"),
        **named(model, {name: value.square() for name, value in grads.items()}, "exp_avg_sq"),
        **named(model, {name: torch.tensor(7.0) for name in grads}, "step"),
    }
    found = carry.moments(model, state, plan, {})
    small = surgery.cut(model, plan)
    for name, weight in small.named_parameters():
        assert found[f"{name}/step"] == 7
        assert found[f"{name}/exp_avg"].shape == weight.shape
        # one gradient's square is the square of what its momentum becomes
        torch.testing.assert_close(found[f"{name}/exp_avg"].square(), found[f"{name}/exp_avg_sq"], rtol=1e-12, atol=0)
    turned = carry.moments(model, state, plan, turns(model))
    whole = {name.rpartition("/")[0] for name in turned}
    lost = {f"blocks.{i}.attn.{part}" for i in range(2) for part in ("qkv.weight", "qkv.bias", "proj.weight")}
    assert whole == dict(small.named_parameters()).keys() - lost
    assert all({f"{name}/{key}" for key in ("step", "exp_avg", "exp_avg_sq")} <= turned.keys() for name in whole)


def test_what_is_not_known_begins_anew() -> None:
    """Another optimizer's numbers, and a parameter that has none yet."""
    model = tiny(dtype=DTYPE)
    grads = gradients(model)
    del grads["blocks.0.attn.qkv.weight"], grads["head.bias"]
    state = {**named(model, grads, "exp_avg"), "norm.weight/pre_grad": torch.ones(48)}
    found = carry.moments(model, state, Plan.full(model), {})
    names = {name.rpartition("/")[0] for name in found}
    missing = {"blocks.0.attn.qkv.weight", "head.bias", "norm.weight"}
    assert names == dict(model.named_parameters()).keys() - missing


def test_names_move_up_where_a_block_is_gone() -> None:
    model = tiny(dtype=DTYPE, depth=3)
    of = anatomy.blocks(model)[0].dims
    plan = Plan((BlockPlan.full(of), BlockPlan(of, (), (), (), ()), BlockPlan.full(of)))
    grads = gradients(model)
    found = carry.moments(model, named(model, grads, "exp_avg"), plan, {})
    assert torch.equal(found["blocks.1.mlp.fc1.weight/exp_avg"], grads["blocks.2.mlp.fc1.weight"])
    assert "blocks.2.mlp.fc1.weight/exp_avg" not in found


def test_a_study_says_how_it_turned() -> None:
    model = tiny(dtype=DTYPE)
    asked = asks({"macs": 0.6}, embed_dim=None)
    found = study(model, batches(dtype=DTYPE), asked)
    drawn = found.draw(asked)
    assert drawn.turned is found.turned
    again = rotate.apply(model, drawn.turned)
    for name, value in found.dense.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not study(model, batches(dtype=DTYPE), asks({"macs": 0.6}, rotate=False)).turned
