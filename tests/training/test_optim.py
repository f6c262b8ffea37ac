"""The optimizer's groups, and the learning rate against timm's scheduler."""

from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from lotus.config import Recipe
from lotus.training.optim import USUAL, make_optimizer, make_schedule, set_lr, unusual
from selection.errors import Refused


def vit(**args):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=4, **args
    )


def test_weight_decay_falls_on_matrices_alone():
    model = vit(reg_tokens=2, init_values=1e-3)
    optimizer = make_optimizer(model, Recipe(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or name in ("cls_token", "pos_embed", "reg_token")
        assert decay[id(parameter)] == (0 if spared else 0.1), name


def test_layer_decay_scales_every_rate_that_is_set():
    model = vit()
    optimizer = make_optimizer(model, Recipe(lr=1.0, layer_decay=0.5))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    head, first, second, stem = (
        rates[id(p)]
        for p in (model.head.weight, model.blocks[0].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight, model.pos_embed)
    )
    assert head == 1
    assert stem < first < second < head
    assert second == 2 * first
    set_lr(optimizer, 0.1)
    again = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(again[key] == pytest.approx(rates[key] * 0.1) for key in rates)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "lookahead_adamw", "AdamW"])
def test_optimizers_step(name):
    model = vit()
    optimizer = make_optimizer(model, Recipe(optimizer=name, lr=1e-3))
    before = model.head.weight.clone()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


def test_fused_adamw_equals_the_loop_over_tensors():
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = vit()
        optimizer = make_optimizer(model, Recipe(lr=1e-3), fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(Refused, match=r"train\.optimizer: .*'adamww'.*'adamw'"):
        make_optimizer(vit(), Recipe(optimizer="adamww"))
    with pytest.raises(Refused, match="second derivatives"):
        make_optimizer(vit(), Recipe(optimizer="adahessian"))


@pytest.mark.parametrize("name", USUAL)
def test_a_rate_far_outside_the_usual_is_told(name):
    low, high = USUAL[name]
    make_optimizer(vit(), Recipe(optimizer=name))  # there is one of this name
    assert not any(unusual(Recipe(optimizer=name, lr=lr)) for lr in (low, high))
    for lr in (low / 2, high * 2):
        (told,) = unusual(Recipe(optimizer=name, lr=lr), "finetune")
        assert told == f"finetune.lr: {lr:g} is far outside what is usual for {name}, {low:g} to {high:g}"


def test_what_rates_are_told():
    assert unusual(Recipe(optimizer="muon", lr=0.02))
    assert unusual(Recipe(lr=0.1))
    assert unusual(Recipe(optimizer="muon", lr=3e-3, adamw_lr=0.1))[0].startswith("train.adamw_lr: 0.1")
    assert not unusual(Recipe(lr=1e-3, adamw_lr=0.1)), "muon's alone"
    assert not unusual(Recipe(optimizer="adabelief", lr=0.1)), "nothing is known of it"


@pytest.mark.parametrize(("warmup", "epochs", "steps"), [(2, 10, 7), (0, 3, 5), (1, 2, 1), (5, 20, 13)])
def test_lr_is_timms_cosine_with_a_warm_up(warmup, epochs, steps):
    recipe = Recipe(lr=3e-3, min_lr=2e-5, epochs=epochs, warmup_epochs=warmup)
    warm, total = warmup * steps, epochs * steps
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    oracle = CosineLRScheduler(
        optimizer,
        t_initial=total - warm,
        lr_min=recipe.min_lr,
        warmup_t=warm,
        warmup_lr_init=recipe.lr / (warm + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(total + 1):
        oracle.step_update(step)
        assert make_schedule(recipe)(step, steps)[0] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
    assert make_schedule(recipe)(total, steps)[0] == pytest.approx(recipe.min_lr)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 50), st.floats(0, 40, allow_nan=False), st.floats(0, 1e-2), st.floats(1e-6, 1)
)
def test_lr_rises_then_falls_within_its_bounds(epochs, steps, warmup, low, peak):
    recipe = Recipe(epochs=epochs, warmup_epochs=warmup, min_lr=low, lr=peak)
    schedule = make_schedule(recipe)
    rates = [schedule(step, steps)[0] for step in range(epochs * steps + 2)]
    top = rates.index(max(rates))
    assert all(0 < rate <= peak * (1 + 1e-12) or low == 0 for rate in rates)
    assert all(a <= b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b - 1e-15 for a, b in pairwise(rates[top:]))


@pytest.mark.parametrize(("warmup", "epochs", "steps"), [(0.16, 4, 50), (1, 3, 5), (2, 2, 7), (0.5, 6, 9)])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_onecycle_is_torchs_with_its_momentum(warmup, epochs, steps, name):
    recipe = Recipe(schedule="onecycle", lr=3e-3, epochs=epochs, warmup_epochs=warmup, optimizer=name)
    optimizer = make_optimizer(vit(), recipe)
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = (torch.optim.SGD if name == "momentum" else torch.optim.AdamW)([weight], lr=1.0, **({"momentum": 0.9} if name == "momentum" else {}))  # fmt: skip
    total = epochs * steps
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=recipe.lr, total_steps=total, pct_start=warmup * steps / total
    )
    for step in range(total):
        set_lr(optimizer, *make_schedule(recipe)(step, steps))
        for ours in optimizer.param_groups:
            group = theirs.param_groups[0]
            assert ours["lr"] == pytest.approx(group["lr"], rel=1e-9), step
            key = "momentum" if name == "momentum" else "betas"
            assert ours[key] == pytest.approx(group[key], rel=1e-9), step
        theirs.step()
        if step < total - 1:
            oracle.step()
    assert make_schedule(recipe)(total, steps)[0] == pytest.approx(recipe.lr / 25e4), "one too many stays at the end"
    assert make_schedule(Recipe())(0, steps)[1] is None, "a cosine leaves momentum alone"


def test_timms_momentum_is_torchs_sgd():
    models = [vit(), vit()]
    models[1].load_state_dict(models[0].state_dict())
    recipe = Recipe(optimizer="momentum", lr=1e-2, weight_decay=0)
    ours, theirs = make_optimizer(models[0], recipe), torch.optim.SGD(models[1].parameters(), lr=1e-2, momentum=0.9)
    for _ in range(3):
        for model, optimizer in zip(models, (ours, theirs)):
            optimizer.zero_grad()
            model(torch.ones(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(dict(models[0].named_parameters()), dict(models[1].named_parameters()))
