"""The loop: resumed bit for bit, stopped cleanly, and never poisoned."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from ranks import two_ranks
from safetensors.torch import load_file
from tiny import (
    CURVES,
    LATE,
    PAIR,
    ROWS,
    Killed,
    Later,
    Memory,
    curved,
    gated,
    kill,
    minutes,
    pictures,
    recipe,
    same,
    train,
    vit,
)

from lotus.config import Sparsity
from lotus.data.sample_plan import SamplePlan
from lotus.events import Evaluated, Said, Step
from lotus.sparsity.gates import Gates
from lotus.training import loop
from lotus.training.book import Book
from lotus.training.checkpoint import Checkpoints
from lotus.training.distributed import StopFlag, World
from lotus.training.evaluation import evaluate_classes
from lotus.training.loop import Stopped, evaluate
from lotus.training.spikes import LossSpikes
from selection.errors import Refused
from tools.soak import left_in_shared_memory, shared_memory

# Everything that has a state: gates, moving average, drop path, mixing, accumulation, weights, a recorder.
FULL = {"ema": 0.9, "accumulate": 2, "mixup": 0.4, "cutmix": 1.0}
ALL = {"gated": True, "watched": True, "weighted": True, "drop_path": 0.2}
PARTS = 2 * (6 * 2 + 1)  # micro-batches of two epochs: six steps of two, and a tail of four images in one


def nan(losses: torch.Tensor) -> torch.Tensor:
    return losses * math.nan


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory):
    """The training that nobody interrupted, and which never saved inside an epoch."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("straight"), recipe(**FULL), **ALL)


def test_it_learns_and_tells(straight) -> None:
    steps = [event for event in straight.events if isinstance(event, Step)]
    evaluated = [event for event in straight.events if isinstance(event, Evaluated)]
    assert [event.epoch for event in evaluated] == [1, 2]
    assert steps[-1].done == steps[-1].total == 14
    assert {"epoch", "loss", "lr", "images_per_second", "zero_gates", "lambda", "open_macs"} <= set(steps[-1].values)
    fitted = straight.fitted
    assert (fitted.steps, fitted.epochs, fitted.images_seen) == (14, 2, 2 * ROWS)
    assert fitted.top1 == evaluated[-1].values["top1"] > 60
    assert same(dict(straight.model.state_dict()), fitted.state)
    vit().load_state_dict(fitted.state)  # strict: names and shapes fit a new model


@pytest.mark.parametrize(
    "kills",
    few([[0], [5], [6], [13], [14], [7, 4], [3, 1, 0, 9], [PARTS - 1]], [[5], [13], [3, 1, 0, 9]]),
    ids=["before the first step", "inside a step", "mid-epoch", "epoch edge", "after the edge", "twice in an epoch",
         "again and again", "at the last"],
)  # fmt: skip
def test_killed_and_started_again_ends_the_same(tmp_path: Path, straight, kills: list[int]) -> None:
    settings = recipe(**FULL, save_minutes=0.5)
    for after in kills:
        with pytest.raises(Killed):
            train(tmp_path, settings, at={after: kill}, clock=minutes(), **ALL)
    events: list = []
    done = train(tmp_path, settings, clock=minutes(), events=events, **ALL)
    assert same(done.fitted.state, straight.fitted.state)
    assert same(done.gates.state(), straight.gates.state())
    assert done.fitted.images_seen == 2 * ROWS
    assert done.fitted.steps == 14
    ends = [[e.values for e in run if isinstance(e, Evaluated)][-1] for run in (events, straight.events)]
    assert ends[0] == ends[1]
    for name, values in straight.recorder.signals().items():
        assert np.array_equal(done.recorder.signals()[name], values), name


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first = train(tmp_path, recipe(epochs=1))
    again = train(tmp_path, recipe(epochs=1))
    assert same(first.fitted.state, again.fitted.state)
    assert again.fitted.top1 == first.fitted.top1
    assert again.fitted.seconds == first.fitted.seconds
    assert [type(event) for event in again.events] == [Said]


def test_other_settings_begin_anew(tmp_path: Path) -> None:
    train(tmp_path, recipe(epochs=1))
    again = train(tmp_path, recipe(epochs=1), key="other")
    said = [event.text for event in again.events if isinstance(event, Said)]
    assert len(said) == 1
    assert "made with other settings" in said[0]
    assert any(isinstance(event, Step) for event in again.events)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, recipe(epochs=1))
    with pytest.raises(Refused, match=r"of another model: .*Remove .*checkpoints"):
        train(tmp_path, recipe(epochs=1), model=vit(width=48))


@pytest.mark.parametrize(
    ("tensors", "state"), [({}, {"micro": 3}), ({"average": {}}, {}), ({"recorder": {"said": torch.ones(1)}}, {})],
    ids=["of the loop", "of a guest", "of another"],
)  # fmt: skip
def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, tensors: Any, state: Any) -> None:
    train(tmp_path, recipe(epochs=1, ema=0.9), watched=True)
    points = Checkpoints(tmp_path / "checkpoints", key="k")
    found, _ = points.latest()
    assert found is not None
    points.save({**found.tensors, **tensors}, {**found.state, **state})
    with pytest.raises(Refused, match=r"000002: another version has written it.*Remove .*checkpoints, and"):
        train(tmp_path, recipe(epochs=1, ema=0.9), watched=True)


@pytest.mark.parametrize("zero", few([0, 1], [1]))
def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path: Path, zero: int) -> None:
    done = train(tmp_path, recipe(zero=zero, ema=0.9), at={3: nan, 4: nan}, gated=True)
    said = [event.text for event in done.events if isinstance(event, Said)]
    assert [text.split(":")[0].split(",")[0] for text in said] == ["step 4", "step 5"]
    assert all("learning rate" in text for text in said)
    assert all(value.isfinite().all() for value in done.fitted.state.values())
    assert all(value.isfinite().all() for value in done.gates.values.values())
    assert all(math.isfinite(e.values["loss"]) for e in done.events if isinstance(e, Step))
    assert done.fitted.steps == 14


@pytest.mark.parametrize("zero", few([0, 1], [0]))
def test_three_in_a_row_end_it_and_the_last_good_checkpoint_stays(tmp_path: Path, zero: int) -> None:
    events: list = []
    with pytest.raises(Refused, match=r"not finite at step 12.*Lower train\.lr"):
        train(tmp_path, recipe(zero=zero), at={9: nan, 10: nan, 11: nan}, events=events)
    assert sum("not finite" in event.text for event in events if isinstance(event, Said)) == 3
    kept, _ = Checkpoints(tmp_path / "checkpoints", key="k").latest()
    assert kept is not None
    assert kept.state["step"] == 7  # the end of the first epoch
    assert all(value.isfinite().all() for value in kept.tensors["weights"].values())


def test_the_learning_rate_waits_for_steps_that_move(tmp_path: Path) -> None:
    rates = {}
    for name, at in (("clean", {}), ("skipped", {0: nan})):
        done = train(tmp_path / name, recipe(epochs=1), at=at, clock=minutes())
        rates[name] = [event.values["lr"] for event in done.events if isinstance(event, Step)]
    assert rates["skipped"][1:] == rates["clean"][:-1]


def test_sigterm_saves_and_stops(tmp_path: Path, straight) -> None:
    def terminate(losses: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return losses

    before = signal.getsignal(signal.SIGTERM)
    with (
        StopFlag() as stop,
        pytest.raises(Stopped, match=r"step 5 of 14.*000001"),
    ):
        train(tmp_path, recipe(**FULL), at={8: terminate}, stop=stop, **ALL)
    assert signal.getsignal(signal.SIGTERM) is before
    assert same(train(tmp_path, recipe(**FULL), **ALL).fitted.state, straight.fitted.state)


def test_stopping_while_evaluating_loses_nothing(tmp_path: Path, straight) -> None:
    class Interrupting(Memory):
        def epoch(self, epoch, skip=0):
            stop.set("interrupted")
            return super().epoch(epoch, skip)

    stop = StopFlag()
    validation = Interrupting(SamplePlan.evaluation(np.arange(ROWS), batch_size=8))
    with pytest.raises(Stopped, match="after step 7 of 14"):
        train(tmp_path, recipe(**FULL), validation=validation, stop=stop, **ALL)
    assert validation.open == 0
    done = train(tmp_path, recipe(**FULL), **ALL)
    assert [event.epoch for event in done.events if isinstance(event, Evaluated)] == [1, 2]
    assert same(done.fitted.state, straight.fitted.state)


def test_loaders_and_hooks_are_let_go_however_it_ends(tmp_path: Path) -> None:
    model = vit()
    loader = Memory(SamplePlan(np.arange(ROWS), seed=5, batch_size=8))
    with pytest.raises(Killed):
        train(tmp_path, recipe(), at={2: kill}, model=model, loader=loader)
    assert loader.open == 0
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    model(torch.zeros(1, 3, 16, 16)).sum().backward()


def test_events_come_four_times_a_second_at_most(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    done = train(tmp_path, recipe(), clock=clock)
    assert 1 < sum(isinstance(event, Step) for event in done.events) < now[0] * 4 + 2
    assert done.fitted.seconds < now[0]


def test_no_validation_no_figure(tmp_path: Path) -> None:
    done = train(tmp_path, recipe(epochs=1), validation=None)
    assert math.isnan(done.fitted.top1)
    again = train(tmp_path, recipe(epochs=1), validation=None)
    assert same(done.fitted.state, again.fitted.state)


@pytest.mark.parametrize("every", [0, 2, 3])
def test_evaluated_as_asked_and_after_the_last(tmp_path: Path, every: int) -> None:
    done = train(tmp_path, recipe(epochs=5, evaluate_every=every))
    epochs = [event.epoch for event in done.events if isinstance(event, Evaluated)]
    assert epochs == {0: [5], 2: [2, 4, 5], 3: [3, 5]}[every]


def test_rows_that_count_nothing_teach_nothing(tmp_path: Path) -> None:
    done = train(tmp_path, recipe(epochs=1, weight_decay=0), weights=np.zeros(ROWS, np.float32))
    start = vit().state_dict()
    assert same(done.fitted.state, dict(start))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_tail_weighs_as_much_an_image_as_the_rest(tmp_path: Path, accumulate: int) -> None:
    """52 rows in batches of 64: one step, all tail, in which each image weighs 1/64 as it would in a whole batch."""
    settings = recipe(
        epochs=1, batch_size=64, accumulate=accumulate, optimizer="sgd", lr=1e-2, warmup_epochs=0, weight_decay=0, clip=0,
        zero=0,
    )  # fmt: skip
    moved = train(tmp_path, settings).fitted.state
    model, (images, labels) = vit(), pictures()
    loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum", label_smoothing=0.1) / 64
    loss.backward()
    for name, p in model.named_parameters():
        step = -1e-2 * 1.9 * p.grad  # timm's SGD: Nesterov, momentum 0.9
        torch.testing.assert_close(moved[name] - p.detach(), step, atol=1e-6, rtol=1e-3)


def test_evaluation_counts_exactly() -> None:
    model, (images, labels) = vit(drop_path=0.5), pictures()
    model.train()
    with torch.no_grad():
        logits = model.eval()(images)
    model.train()
    found = evaluate(model, Memory(SamplePlan.evaluation(np.arange(ROWS), batch_size=8)), World())
    assert model.training
    assert found["images"] == ROWS
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert found["top5"] == 100  # of three classes
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    told = evaluate_classes(model, Memory(SamplePlan.evaluation(np.arange(ROWS), batch_size=8)), World())[1]
    right = [int(((logits.argmax(1) == labels) & (labels == one)).sum()) for one in range(3)]
    assert told == {"right": right, "of": [int((labels == one).sum()) for one in range(3)]}
    each = [100 * r / n for r, n in zip(right, told["of"], strict=True) if n]
    assert found["macro"] == pytest.approx(sum(each) / len(each))
    with pytest.raises(Refused, match="no image"):
        evaluate(model, Memory(SamplePlan.evaluation(np.arange(0), batch_size=8)), World())


LAYOUTS = few([{"zero": 2}, {"zero": 3, "ema": 0.0}, {"precision": "bf16"}], [{"zero": 2}])


@pytest.mark.parametrize("changed", LAYOUTS, ids=str)
def test_every_layout_goes_on_exactly(tmp_path: Path, changed: dict) -> None:
    settings = recipe(**{**FULL, "save_minutes": 0.5, **changed})
    whole = train(tmp_path / "whole", settings, **ALL)
    with pytest.raises(Killed):
        train(tmp_path / "torn", settings, at={8: kill}, clock=minutes(), **ALL)
    torn = train(tmp_path / "torn", settings, **ALL)
    assert same(whole.fitted.state, torn.fitted.state)
    assert same(whole.gates.state(), torn.gates.state())
    assert same(dict(whole.model.state_dict()), whole.fitted.state)
    assert whole.fitted.top1 > 50


@pytest.mark.slow
def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    """Two processes over gloo, without a compiler on the PATH: a whole training, and the rest of one begun here."""
    whole = train(tmp_path / "alone", recipe(ema=0.9), **PAIR)
    with pytest.raises(Killed):
        train(tmp_path / "begun", recipe(ema=0.9, save_minutes=0.5), at={5: kill}, clock=minutes(), **PAIR)
    shm = shared_memory()
    spoken = two_ranks(
        Path(__file__).parent / "tiny.py", tmp_path, timeout=120, base={"PATH": "/nonexistent", "HOME": str(tmp_path)}
    )
    assert spoken == ["", ""]
    assert not left_in_shared_memory(shm)
    assert not (tmp_path / ".cache" / "torch_extensions").exists()
    for name in ("whole", "begun"):
        found = load_file(tmp_path / f"{name}.safetensors")
        for key, value in whole.fitted.state.items():
            torch.testing.assert_close(found[f"w/{key}"], value, atol=2e-4, rtol=1e-3)
        for key, value in whole.gates.values.items():
            torch.testing.assert_close(found[f"g/{key}"], value.detach(), atol=1e-4, rtol=1e-4)
        for key, value in whole.recorder.signals().items():
            torch.testing.assert_close(found[f"s/{key}"].numpy(), value.astype(np.float32), atol=5e-3, rtol=5e-3)
        assert float(found["v/top1"]) == pytest.approx(whole.fitted.top1, abs=2.1)


@pytest.mark.slow
def test_gates_of_two_ranks_are_those_of_one_under_every_zero(tmp_path: Path) -> None:
    alone = gated(tmp_path / "alone", 0).gates
    assert alone is not None
    closed = sum(int((value == 0).sum()) for value in alone.values.values())
    every = sum(value.numel() for value in alone.values.values())
    assert 0.1 * every < closed < 0.9 * every
    two_ranks(
        Path(__file__).parent / "tiny.py",
        tmp_path,
        "gated",
        timeout=300,
        base={"PATH": "/nonexistent", "HOME": str(tmp_path)},
    )
    for zero, rank in itertools.product((1, 2, 3), range(2)):
        found = load_file(tmp_path / f"{zero}-{rank}.safetensors")
        assert found.keys() == alone.values.keys()
        for site, value in alone.values.items():
            torch.testing.assert_close(found[site], value.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_losses_of_every_step_of_two_ranks_are_those_of_one_of_twice_the_batch(tmp_path: Path) -> None:
    """Watched, cut on the way and taught, under every stage of ZeRO: each loss within 1e-5, and the weights in the end too."""
    two_ranks(Path(__file__).parent / "tiny.py", tmp_path, "curves", timeout=500)
    for name in CURVES:
        one, told = curved(tmp_path / f"one-{name}", name)
        found = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2)]
        curve = found[0].pop("curve") + found[1].pop("curve")
        assert len(told) == 14
        assert curve[:, 1].tolist() == told[:, 1].tolist(), "images"
        torch.testing.assert_close(curve[:, 0] / curve[:, 1], told[:, 0] / told[:, 1], rtol=1e-5, atol=0, msg=name)
        assert abs(float(told[-1, 0] / told[-1, 1] - told[0, 0] / told[0, 1])) > 0.01, "it moves"
        for weights in found:
            torch.testing.assert_close(weights, one.fitted.state, rtol=0, atol=1e-5)


def test_state_json_is_for_people(tmp_path: Path) -> None:
    train(tmp_path, recipe(epochs=1))
    folder = sorted((tmp_path / "checkpoints").iterdir())[-1]
    state = json.loads((folder / "state.json").read_text())["state"]
    assert state["epoch"] == 1
    assert state["step"] == state["applied"] == 7
    assert state["images"] == ROWS


def test_the_averaged_weights_are_what_is_measured(tmp_path: Path) -> None:
    done = train(tmp_path, recipe(epochs=2, ema=0.5))
    plain = train(tmp_path / "plain", recipe(epochs=2))
    assert not same(done.fitted.state, plain.fitted.state)
    model = vit()
    done.fitted.load_into(model)
    found = evaluate(model, Memory(SamplePlan.evaluation(np.arange(ROWS), batch_size=8)), World())
    assert found["top1"] == done.fitted.top1
    assert found["loss"] == pytest.approx(done.fitted.loss, rel=1e-6)


def test_the_moving_average_is_the_textbook_one(tmp_path: Path) -> None:
    """Against the same recursion over the weights that checkpoints at every step saw."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watching(Checkpoints):
        def save(self, tensors, state):
            seen.append({name: value.clone() for name, value in tensors["weights"].items()})
            return super().save(tensors, state)

    import lotus.training.loop as loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Checkpoints", Watching)
        done = train(tmp_path, recipe(epochs=1, ema=0.7, save_minutes=0.01), clock=minutes())
    average = dict(vit().state_dict())
    for step, weights in enumerate(seen[:7], start=1):
        decay = min(0.7, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    for name, value in done.fitted.state.items():
        torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", few(["dropout", "evit", "tome", "cumulative", "input"], ["evit"]))
def test_fewer_patches_resume_bit_for_bit_and_are_counted(tmp_path: Path, mode: str) -> None:
    from lotus.config import Patches
    from lotus.vit.patch_scores import contrast
    from lotus.vit.tokens import Tokens

    settings = recipe(**FULL, save_minutes=0.5)
    patches = Patches.model_validate({"mode": mode, "keep": 0.5, "warmup": 0.2, "ramp": 0.5})

    def run(folder: Path, **more):
        model = vit(0.2)
        with Tokens(model, patches, contrast if mode == "input" else None) as tokens:
            try:
                return train(folder, settings, model=model, tokens=tokens, **ALL, **more), tokens
            finally:
                tokens.remove()

    whole, tokens = run(tmp_path / "whole")
    for after in (3, 9):
        with pytest.raises(Killed):
            run(tmp_path / "broken", at={after: kill}, clock=minutes())
    again, _ = run(tmp_path / "broken", clock=minutes())
    assert same(whole.fitted.state, again.fitted.state)
    assert whole.fitted.top1 == again.fitted.top1
    spent = 0
    for step in range(14):
        tokens.schedule(step / 14)
        spent += tokens.macs() * (8 if step % 7 < 6 else 4)
    assert whole.fitted.macs == again.fitted.macs == spent
    dense = train(tmp_path / "dense", settings, model=vit(0.2), **ALL)
    assert not same(dense.fitted.state, whole.fitted.state)
    assert dense.fitted.macs == 0
    shares = [event.values["patches"] for event in whole.events if isinstance(event, Step)]
    assert shares[-1] == tokens.share() < 1


def test_a_search_ends_when_the_masks_have_settled(tmp_path: Path) -> None:
    """Two distances below epsilon take three masks; what was ended is ended, also for whoever comes back to it."""

    def early(folder: Path) -> Any:
        model = vit()
        gates = Gates(model, Sparsity(start=0, early_bird={"epsilon": 0.999, "epochs": 2}), target=0.5)
        return train(folder, recipe(epochs=6, evaluate_every=0), model=model, gates=gates)

    done = early(tmp_path)
    assert done.fitted.epochs == 3
    assert done.fitted.images_seen == 3 * ROWS
    told = [event for event in done.events if isinstance(event, Said)]
    assert "the masks have settled" in told[-1].text
    assert [event.epoch for event in done.events if isinstance(event, Evaluated)] == [3], "the last epoch is measured"
    again = early(tmp_path)
    assert again.fitted.epochs == 3
    assert same(again.fitted.state, done.fitted.state)


@pytest.mark.parametrize(("optimizer", "often"), [("adamw", True), ("muon", False)])
def test_what_a_gpu_is_asked_later_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, often: bool
) -> None:
    """Also where steps of which nobody knows yet are followed by the end of an epoch, by a checkpoint, or by their third."""
    asked = recipe(**{**FULL, "accumulate": 1}, zero=0, optimizer=optimizer)
    with_it = {"watched": True, "weighted": True, "drop_path": 0.2}
    LATE.clear()
    saved: list[tuple[int, int, int]] = []
    save = Book.save

    def noting(book: Book, at: Any, engine: Any) -> Path:
        saved.append((at.step, at.applied, at.failed))
        return save(book, at, engine)

    monkeypatch.setattr(Book, "save", noting)
    at = {3: nan, 4: nan, 6: nan, 9: nan}  # the seventh step is the first epoch's last
    found = []
    for name in ("at once", "later"):
        if name == "later":
            monkeypatch.setattr(loop, "Engine", Later)
        if often:
            with_it["clock"] = minutes()
        found.append(train(tmp_path / name, asked, at=at, guests=[] if often else [LossSpikes(8.0, 50)], **with_it))
        events: list = []
        with pytest.raises(Refused, match=r"not finite at step 12"):
            train(tmp_path / f"{name}, to the end", asked, at={9: nan, 10: nan, 11: nan}, events=events, **with_it)
        assert sum("not finite" in event.text for event in events if isinstance(event, Said)) == 3
    one, other = found
    assert [event.text for event in one.events if isinstance(event, Said)] == [
        event.text for event in other.events if isinstance(event, Said)
    ]
    for name, value in one.fitted.state.items():
        torch.testing.assert_close(other.fitted.state[name], value, rtol=1e-5, atol=1e-6, msg=name)
    files = [sorted((tmp_path / name / "checkpoints").iterdir())[-1] / "state.json" for name in ("at once", "later")]
    states = [json.loads(file.read_text())["state"] for file in files]
    assert states[0]["applied"] == states[1]["applied"] == 10
    assert [state["failed"] for state in states] == [0, 0]
    waits = LATE[0]
    assert len(waits) == 14
    assert set(waits) <= {0, 1}
    assert often or waits.count(1) >= 8, "not at the end of an epoch, nor where a loss is told"
    assert saved[: len(saved) // 2] == saved[len(saved) // 2 :]
    if often:
        told = [[event.values["loss"] for event in done.events if isinstance(event, Step)] for done in found]
        assert np.isfinite(told).all()
        np.testing.assert_allclose(told[0], told[1], rtol=1e-5)
