"""Penalties on attention: their values, which way they push, and their way into the loss."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lotus.config import read
from lotus.papers import sparse_vit
from lotus.papers.sparse_vit import attention_penalties as attention
from lotus.papers.sparse_vit import focus
from lotus.papers.sparse_vit.penalty import AttentionPenalty
from lotus.stage import Section
from lotus.stages import STAGES, check, run_of
from lotus.vit import anatomy
from selection import methods
from selection.errors import Refused

N = 7


def rows(seed: int = 0, size: float = 1.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return size * torch.randn(3, 2, N, N, generator=draw)


def vit() -> Any:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=4
    )
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_log_penalty_is_the_published_formula() -> None:
    probabilities = rows().softmax(-1)
    by_hand = [sum(math.log(1 + float(a) ** 2) for a in image.flatten()) / image.numel() for image in probabilities]
    torch.testing.assert_close(attention.log(probabilities), torch.tensor(by_hand))
    uniform, peaked = torch.full((1, 1, N, N), 1 / N), torch.eye(N)[None, None]
    assert float(attention.log(uniform)) == pytest.approx(math.log(1 + 1 / N**2))
    assert float(attention.log(peaked)) == pytest.approx(math.log(2) / N)


def test_entropy_by_hand_and_at_exact_zeros() -> None:
    probabilities = rows().softmax(-1)
    by_hand = [-sum(float(a) * math.log(a) for a in image.flatten()) / (2 * N) for image in probabilities]
    torch.testing.assert_close(attention.entropy(probabilities), torch.tensor(by_hand))
    assert float(attention.entropy(torch.eye(N)[None, None])) == 0
    assert float(attention.entropy(torch.full((1, 1, N, N), 1 / N))) == pytest.approx(math.log(N))


@pytest.mark.parametrize(("kind", "end"), [("log", 1 / N), ("entropy", 1.0)])
def test_log_pushes_rows_to_uniform_and_entropy_to_one_hot(kind: str, end: float) -> None:
    """The closed form: log(1 + a^2) is convex on [0, 1], so a row of sum 1 costs least when it is uniform."""
    logits = rows(size=1.5).requires_grad_()
    before = float(getattr(attention, kind)(logits.detach().softmax(-1)).mean())
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        getattr(attention, kind)(logits.softmax(-1)).mean().backward()
        optimizer.step()
    found = logits.detach().softmax(-1)
    assert float(getattr(attention, kind)(found).mean()) < before
    torch.testing.assert_close(found.amax(-1), torch.full((3, 2, N), end), atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", methods.names(attention))
@pytest.mark.parametrize("layers", ["last", "all"])
def test_the_penalty_is_that_of_timms_own_unfused_attention(kind: str, layers: str) -> None:
    model = vit().train()
    penalty = AttentionPenalty(model, kind, 0.3, layers)
    logits = model(IMAGES)
    found = penalty.of_images()

    oracle = vit().train()
    seen = []
    for block in oracle.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    assert torch.allclose(oracle(IMAGES), logits, atol=1e-5)
    wanted = [getattr(attention, kind)(one) for one in (seen[-1:] if layers == "last" else seen)]
    torch.testing.assert_close(found, 0.3 * torch.stack(wanted).mean(0))
    assert penalty.own_macs() == (1 if layers == "last" else 3) * 5 * 5 * 16, "H N^2 Q a block"
    assert penalty.summary()["attention"] == pytest.approx(float(found.detach().mean()) / 0.3)

    found.sum().backward()
    sum(0.3 * one for one in wanted).sum().div(len(wanted)).backward()
    for ours, theirs in zip(anatomy.blocks(model), anatomy.blocks(oracle), strict=True):
        assert (ours.qkv.weight.grad is None) == (theirs.qkv.weight.grad is None)
        if ours.qkv.weight.grad is not None:
            theirs_grad = theirs.qkv.weight.grad
            # Sums in two orders: of the size of the largest.
            torch.testing.assert_close(
                ours.qkv.weight.grad, theirs_grad, atol=1e-5 * float(theirs_grad.abs().max()), rtol=1e-4
            )


def test_it_is_there_in_training_alone_and_comes_off() -> None:
    model = vit().eval()
    penalty = AttentionPenalty(model)
    model(IMAGES)
    with pytest.raises(Refused, match="not every penalized block"):
        penalty.of_images()
    with torch.no_grad():
        model.train()(IMAGES)
    with pytest.raises(Refused):
        penalty.of_images()
    assert penalty.summary() == {}
    model(IMAGES)
    model(IMAGES[:2])  # nobody asked about the first
    assert len(penalty.of_images()) == 2
    penalty.leave()
    assert not any(module._forward_hooks for module in model.modules())


def test_focus_measures_what_it_says() -> None:
    model = vit()
    batches = [(IMAGES[:4], None), (IMAGES[4:], None)]
    found = focus.focus(model, batches)
    seen = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()(IMAGES)
    for where, chosen in (("last", seen[-1:]), ("all", seen)):
        every = torch.cat([one.flatten(0, 2) for one in chosen])  # (rows, N)
        assert found[where]["entropy"] == pytest.approx(float(-(every * every.log()).sum(1).mean()), rel=1e-4)
        assert found[where]["largest"] == pytest.approx(float(every.max(1).values.mean()), rel=1e-4)
        assert found[where]["above"] == pytest.approx(float((every > 0.1).float().mean()), rel=1e-4)


def told(kind: str, layers: str, **models: dict) -> str:
    run = SimpleNamespace(stages={stage.name: stage for stage in STAGES})
    found = {"attention": {"kind": kind, "layers": layers, "models": models}}
    section = sparse_vit.STAGE.tell(run, found)
    assert isinstance(section, Section)
    return section.text + " " + " ".join(" ".join(row) for row in section.rows)


def test_attention_is_told_for_what_it_became() -> None:
    one = {"entropy": 2.5, "largest": 0.2, "above": 0.3}
    spread = {"last": {**one, "entropy": 2.6}, "all": one}
    text = told("log", "last", start={"last": one, "all": one}, train=spread, baseline={"last": one, "all": one})
    assert "spread further than the dense baseline's: +0.1 nats" in text
    assert "2.600000" in text
    text = told("entropy", "all", train={"all": {**one, "entropy": 2.0}}, baseline={"all": one})
    assert "more peaked than the dense baseline's: \N{MINUS SIGN}0.5 nats" in text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{name: attention_penalty, kind: l1}", "train.guests.attention_penalty.kind: "),
        ("{name: attention_penalty, strength: -1}", "train.guests.attention_penalty.strength: Input should be greater"),
        ("{name: attention_penalti}", "Did you mean 'attention_penalty'?"),
    ],
)
def test_a_mistake_is_refused_with_place_and_cure(settings: str, says: str) -> None:
    with pytest.raises(Refused) as refusal:
        check(read(None, [f"train.guests=[{settings}]", "data.name=digits"]))
    assert says in str(refusal.value)


def test_it_is_measured_where_it_joined_and_nowhere_else() -> None:
    assert "attention" not in run_of(read(None, [])).stages
    plan = run_of(read(None, ["train.guests=[attention_penalty]"])).plan()
    assert plan.index("train") < plan.index("attention") < plan.index("report")
