"""Linear heads that are trained at once, against torch training each by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lotus.config import Score, check
from lotus.data.sample_plan import SamplePlan
from lotus.training import linear_probe
from lotus.training.distributed import StopFlag, World
from lotus.training.dynamics import Recorder
from lotus.training.loop import Stopped
from lotus.training.optim import make_schedule
from selection import lottery, methods, scores
from selection.errors import Refused
from selection.random_subsets import random_parts
from selection.signals import Signals

N, D, C = 50, 12, 4  # batches of 16 and a tail of 2
SEEDS = [1000, 2000, 3000]


def recipe(**changed: Any) -> Score:
    settings = {"proxy": "linear_probe", "epochs": 3, "batch_size": 16, "lr": 0.03, "warmup_epochs": 0.5}
    return check({"score": {**settings, **changed}}).score


def data(seed: int = 0, n: int = N, d: int = D, signal: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % C
    return (torch.randn(n, d, generator=draw) + signal * F.one_hot(labels, d)).half(), labels


def last(making: Any, told: list[Any] | None = None) -> Any:
    """What a generator returns; ``told`` gets what it yields."""
    told = [] if told is None else told
    while True:
        try:
            told.append(next(making))
        except StopIteration as stop:
            return stop.value


def alone(
    seed: int, rows: np.ndarray, features: torch.Tensor, labels: torch.Tensor, asked: Score, recorder: Recorder | None
) -> nn.Linear:
    """One head by autograd and torch's own modules, a step at a time."""
    head = nn.Linear(features.shape[1], C)
    start = linear_probe.Heads(features.shape[1], C, [seed])
    with torch.no_grad():
        head.weight.copy_(start.weight[0])
        head.bias.zero_()
    kind: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[asked.optimizer]
    more: Any = {"momentum": 0.9, "nesterov": True} if asked.optimizer == "sgd" else {}
    groups = [
        {"params": [head.weight], "weight_decay": asked.weight_decay},
        {"params": [head.bias], "weight_decay": 0.0},
    ]
    optimizer = kind(groups, lr=asked.lr, **more)
    plan = SamplePlan(rows, seed=seed, batch_size=asked.batch_size)
    step = 0
    for epoch in range(asked.epochs):
        for index in torch.from_numpy(plan.order(epoch)).split(asked.batch_size):
            logits = head(features[index].float())
            if recorder is not None:
                recorder.add(index, logits, labels[index])
            loss = F.cross_entropy(logits, labels[index], label_smoothing=asked.smoothing, reduction="sum")
            optimizer.zero_grad()
            (loss / asked.batch_size).backward()
            if asked.clip:
                nn.utils.clip_grad_norm_(head.parameters(), asked.clip)
            for group in optimizer.param_groups:
                group["lr"] = make_schedule(asked)(step, plan.steps())[0]
            optimizer.step()
            step += 1
        if recorder is not None:
            recorder.end(epoch, World())
    return head


@pytest.mark.parametrize(
    "changed",
    [{}, {"weight_decay": 0.3, "smoothing": 0.1, "clip": 0.2}, {"optimizer": "sgd", "weight_decay": 0.01}],
    ids=["plain", "every term", "sgd"],
)
def test_heads_at_once_are_heads_one_by_one(changed: dict[str, Any]) -> None:
    features, labels = data()
    asked = recipe(**changed)
    heads = linear_probe.Heads(D, C, SEEDS)
    plans = [SamplePlan(np.arange(N), seed=seed, batch_size=16) for seed in SEEDS]
    assert len(list(linear_probe.fit(heads, features, labels, plans, asked, clock=lambda: 0.0))) == 3, (
        "a sign of life an epoch"
    )
    whole = last(linear_probe.watched(features, labels, C, asked, seeds=SEEDS, gradients=True))
    assert not torch.allclose(heads.weight[0], heads.weight[1], atol=1e-2), "heads that differ"
    for number, seed in enumerate(SEEDS):
        recorder = Recorder(N, asked.epochs, C, steps=True)
        own = alone(seed, np.arange(N), features, labels, asked, recorder)
        torch.testing.assert_close(heads.weight[number], own.weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(heads.bias[number], own.bias, atol=1e-5, rtol=0)
        told = recorder.signals()
        assert set(whole) == {*told, "errors"}
        for name, values in told.items():
            assert whole[name][number].dtype == values.dtype
            np.testing.assert_allclose(
                whole[name][number].astype(float), values.astype(float), atol=2e-3, rtol=2e-3, err_msg=name
            )
        if number == 0:
            with torch.no_grad():
                expected = own(features.float()).softmax(1) - F.one_hot(labels, C)
            np.testing.assert_allclose(whole["errors"], expected.numpy(), atol=1e-3)


def test_a_head_does_not_know_who_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = data()
    whole = last(linear_probe.watched(features, labels, C, recipe(), seeds=SEEDS, gradients=True))
    monkeypatch.setattr(linear_probe, "AT_ONCE", 1)
    assert len(linear_probe.groups(3, N, C, recipe(), steps=True)) == 3
    told: list[Any] = []
    parted = last(linear_probe.watched(features, labels, C, recipe(), seeds=SEEDS, gradients=True), told)
    assert [(event.done, event.total) for event in told] == [(number + 1, 9) for number in range(9)]
    for name, values in parted.items():
        np.testing.assert_allclose(values.astype(float), whole[name].astype(float), atol=2e-3, rtol=2e-3, err_msg=name)


def test_what_is_recorded_serves_every_score_that_reads_a_proxy() -> None:
    features, labels = data()
    asked = recipe(epochs=4)
    run_in = random_parts(N, 3, 0.6, np.random.default_rng(0))
    found = last(linear_probe.watched(features, labels, C, asked, seeds=SEEDS, gradients=True))
    found["run_p_label"] = last(linear_probe.on_parts(features, labels, C, asked, run_in=run_in, seeds=[7, 8, 9]))
    found |= {"labels": labels.numpy(), "embeddings": features.numpy(), "run_in": run_in}
    signals = Signals(found, fingerprint="f", classes=("a", "b", "c", "d"))
    assert (signals.seeds, signals.epochs) == (3, 4)
    for name in set(methods.names(scores)) - {"given"}:  # which comes from elsewhere
        values = methods.call(getattr(scores, name), signals.available(), {}, place=name)
        assert values.shape == (N,), name
        assert len(lottery.select(signals, score=name, pick="top_k", keep=0.5).subset.rows) == 25


@pytest.mark.parametrize("correct", [False, True])
def test_memorization_by_its_definition(correct: bool) -> None:
    """Feldman and Zhang's equation 1, written out image by image over trainings one by one."""
    features, labels = data(d=80, signal=5)  # wide enough to learn any label by heart
    labels = labels.clone()
    labels[5] = (labels[5] + 1) % C
    asked = recipe(epochs=12)
    run_in = random_parts(N, 6, 0.7, np.random.default_rng(0))
    seeds = list(range(6))
    said = last(linear_probe.on_parts(features, labels, C, asked, run_in=run_in, seeds=seeds, correct=correct))
    heads = [alone(seed, np.flatnonzero(own), features, labels, asked, None) for seed, own in zip(seeds, run_in)]
    expected = np.zeros(N)
    for row in range(N):
        inside, outside = list[Any](), list[Any]()
        for head, own in zip(heads, run_in):
            with torch.no_grad():
                p = head(features[row].float()).softmax(0)
            value = float(p.argmax() == labels[row]) if correct else float(p[labels[row]])
            (inside if own[row] else outside).append(value)
        expected[row] = np.mean(inside) - np.mean(outside)
    found = scores.memorization(run_in, said)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert found[5] > 0.3 + np.median(found), "the wrong label can only be learned by heart"


def test_standardized_features() -> None:
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((400, 5)) * [1, 30, 1e-3, 0, 0] + [0, 100, 5e-3, 7.3, 0]).astype(np.float16)
    found = linear_probe.standardized(features)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found[:, :3].astype(float).mean(0), 0, atol=5e-3)
    np.testing.assert_allclose(found[:, :3].astype(float).std(0), 1, atol=5e-3)
    assert not found[:, 3:].any(), "what does not vary says nothing"


def test_a_wish_to_stop_and_a_rate_that_is_too_high() -> None:
    features, labels = data()
    with StopFlag() as stop:
        stop.set("asked to terminate")
        with pytest.raises(Stopped, match="features are kept"):
            last(linear_probe.watched(features, labels, C, recipe(), seeds=SEEDS, gradients=False, stop=stop))
    with pytest.raises(Refused, match=r"^linear probe: .*Lower lr"):
        last(
            linear_probe.watched(
                1e20 * features, labels, C, recipe(lr=1e30, optimizer="sgd"), seeds=SEEDS, gradients=False
            )
        )


@pytest.mark.parametrize("correct", [False, True])
def test_what_many_heads_give_their_labels(correct: bool) -> None:
    from lotus.training.dynamics import says

    p = torch.tensor([[[0.2, 0.8], [0.6, 0.4]], [[0.9, 0.1], [0.3, 0.7]]])
    expected = [[1.0, 1.0], [0.0, 0.0]] if correct else [[0.8, 0.6], [0.1, 0.3]]
    torch.testing.assert_close(says(p, torch.tensor([1, 0]), correct=correct), torch.tensor(expected))


def test_an_epoch_longer_than_a_second_shows_where_it_is():
    """By a clock of which each look takes 0.6 s: every second step of an epoch but its last, and the end of each."""
    features, labels = torch.randn(40, D), torch.arange(40) % C
    asked, now = recipe(epochs=2, batch_size=8), iter(range(1000))
    plans = [SamplePlan(np.arange(40), seed=0, batch_size=8)]
    heads = linear_probe.Heads(D, C, [0])
    signs = list(linear_probe.fit(heads, features, labels, plans, asked, clock=lambda: 0.6 * next(now)))
    places = [sign.values["epoch"] for sign in signs]
    assert places == sorted(set(places))
    assert {1.0, 2.0} < set(places)
    assert any(0 < place < 1 for place in places)
    assert any(1 < place < 2 for place in places)
    assert all(sign.done == int(place) and sign.total == 2 for sign, place in zip(signs, places, strict=True))
