"""What the recorder writes down, against the same in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import CLASSES, ROWS, Memory, pictures, vit
from torch import nn

from lotus.data.sample_plan import SamplePlan
from lotus.training.distributed import World
from lotus.training.dynamics import WATCHED, Recorder, last_layer, watch
from selection.errors import Refused
from selection.signals import VOCABULARY, Signals


def test_every_quantity_is_what_its_name_says() -> None:
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(40) % 5
    found = dict(zip(WATCHED, watch(logits, labels).numpy()))
    z, y = logits.double().numpy(), labels.numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    onehot = np.eye(5)[y]
    expected = {
        "p_other": np.where(onehot, -np.inf, p).max(1),
        "error_norm": np.linalg.norm(p - onehot, axis=1),
        "loss": -np.log(p[np.arange(40), y]),
        "entropy": -(p * np.log(p)).sum(1),
        "margin": z[np.arange(40), y] - np.where(onehot, -np.inf, z).max(1),
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_follows_from_it() -> None:
    """The probability of the label to a part in two thousand of its distance from one, and whether the label won."""
    logits = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) * 6
    labels = torch.arange(400) % 5
    recorder = Recorder(400, 1, 5)
    recorder.add(torch.arange(400), logits, labels)
    recorder.end(0, World())
    recorded = recorder.signals()
    assert sum(values.dtype.itemsize for values in recorded.values()) == 10  # bytes an image an epoch
    known = {"labels": labels.numpy()} | {name: values[None] for name, values in recorded.items()}
    signals = Signals(known, fingerprint="f", classes=tuple("abcde"))
    p = torch.softmax(logits.double(), 1).numpy()[np.arange(400), labels]
    found = signals["p_label"][0, 0].astype(np.float64)
    easy = p > 0.5
    np.testing.assert_allclose((1 - found)[easy], (1 - p)[easy], rtol=1e-3, atol=2e-7)
    np.testing.assert_allclose(found, p, rtol=6e-3, atol=1e-5)
    assert np.array_equal(signals["correct"][0, 0], (logits.argmax(1) == labels).numpy())
    rows = np.array([5, 2, 9])
    assert np.array_equal(signals.take("p_label", rows)[0, 0], found[rows].astype(np.float32))


def test_extreme_logits_stay_in_range() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [0.0, 0.0, 0.0]])
    recorder = Recorder(3, 1, 3)
    recorder.add(torch.arange(3), logits, torch.tensor([0, 0, 0]))
    recorder.end(0, World())
    known = {"labels": np.zeros(3, np.int64)} | {name: values[None] for name, values in recorder.signals().items()}
    signals = Signals(known, fingerprint="f", classes=("a", "b", "c"))
    assert signals["entropy"][0, 0, 2] == pytest.approx(np.log(3), rel=1e-3)
    assert signals["correct"][0, 0].tolist() == [True, False, False]  # of equals none is the highest


def filled(recorder: Recorder, epoch: int, rows: list[int], value: float) -> None:
    index = torch.tensor(rows)
    logits = torch.zeros(len(rows), 3)
    logits[:, 0] = value
    recorder.add(index, logits, torch.zeros(len(rows), dtype=torch.int64))
    recorder.end(epoch, World())


def test_rows_that_were_not_seen_keep_what_was_said_last() -> None:
    recorder = Recorder(4, 3, 3)
    filled(recorder, 0, [0, 1], 1.0)
    filled(recorder, 1, [1, 2], 2.0)
    filled(recorder, 2, [3, 0], 3.0)
    margin = recorder.signals()["margin"]
    assert margin.tolist() == [[1, 1, 2, 3], [1, 2, 2, 3], [3, 2, 2, 3]]


def test_a_row_that_never_came_is_refused() -> None:
    recorder = Recorder(4, 1, 3)
    filled(recorder, 0, [0, 1, 3], 1.0)
    with pytest.raises(Refused, match=r"row 2 first.*never seen"):
        recorder.signals()


def test_what_is_not_finite_counts_as_not_seen() -> None:
    recorder = Recorder(2, 2, 3)
    filled(recorder, 0, [0, 1], 1.0)
    filled(recorder, 1, [0, 1], float("nan"))
    assert recorder.signals()["margin"].tolist() == [[1, 1], [1, 1]]


def test_dtypes_are_the_vocabularys() -> None:
    recorder = Recorder(2, 1, 3)
    filled(recorder, 0, [0, 1], 1.0)
    for name, values in recorder.signals().items():
        assert values.shape == (1, 2)
        assert values.dtype == VOCABULARY[name].dtype


def test_how_far_a_prediction_moved() -> None:
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5, 4, generator=draw) * 2  # epochs, rows, classes
    recorder = Recorder(5, 3, 4, steps=True)
    for epoch in range(3):
        seen = [0, 1, 2, 3, 4] if epoch != 1 else [0, 1, 2]  # rows 3 and 4 miss the second
        for rows in (seen[:2], seen[2:]):
            recorder.add(torch.tensor(rows), logits[epoch, rows], torch.zeros(len(rows), dtype=torch.int64))
        recorder.end(epoch, World())
    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)

    def moved(now: int, before: int, row: int) -> float:
        return float(np.abs(p[now, row] * np.log(p[now, row] / p[before, row])).sum())

    expected = np.zeros((3, 5))
    for row in range(5):
        expected[1, row] = moved(1, 0, row) if row < 3 else 0
        expected[2, row] = moved(2, 1 if row < 3 else 0, row)
    np.testing.assert_allclose(recorder.signals()["kl_step"], expected, rtol=5e-3, atol=1e-3)


def test_state_in_the_middle_of_an_epoch() -> None:
    whole, torn = Recorder(6, 2, 3, steps=True), Recorder(6, 2, 3, steps=True)
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.tensor(rows), torch.randn(2, 3, generator=draw), torch.tensor([0, 2])) for rows in
               ([0, 1], [2, 3], [4, 5], [5, 0], [1, 4], [3, 2])]  # fmt: skip
    for number, batch in enumerate(batches):
        for recorder in (whole, torn):
            recorder.add(*batch)
        if number % 3 == 2:
            whole.end(number // 3, World())
            torn.end(number // 3, World())
            torn.end(number // 3, World())  # after a stop while evaluating
        state, torn = torn.state(World()), Recorder(6, 2, 3, steps=True)
        torn.load_state({name: value.clone() for name, value in state.items()}, World())
    for name, values in whole.signals().items():
        assert np.array_equal(torn.signals()[name], values), name


def test_one_class_is_nothing_to_watch() -> None:
    with pytest.raises(Refused, match="at least two"):
        Recorder(4, 1, 1)


def test_embeddings_are_what_the_head_reads() -> None:
    model, (images, labels) = vit(drop_path=0.5), pictures()
    model.train()
    loader = Memory(SamplePlan.evaluation(np.arange(ROWS), batch_size=8))
    whole = last_layer(model, loader, ROWS, World(), errors=True)
    found = whole["embeddings"]
    assert model.training
    assert found.shape == (ROWS, 32)
    assert found.dtype == np.float16
    model.eval()
    with torch.no_grad():
        logits = model.head(torch.from_numpy(found.astype(np.float32)))
        torch.testing.assert_close(logits, model(images), atol=5e-3, rtol=5e-3)
        p = model(images).softmax(1)
    assert logits.shape[1] == CLASSES
    p[torch.arange(ROWS), labels] -= 1
    np.testing.assert_allclose(whole["errors"], p.numpy(), atol=1e-3)


def test_rows_that_do_not_come_are_named() -> None:
    loader = Memory(SamplePlan.evaluation(np.arange(10), batch_size=8))
    with pytest.raises(Refused, match="42 rows, 10 first"):
        last_layer(vit(), loader, ROWS, World())
    with pytest.raises(Refused, match="timm model"):
        last_layer(nn.Linear(2, 2), loader, ROWS, World())
