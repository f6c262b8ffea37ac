"""Dynamic data pruning in training: who is seen, what is remembered, what a loss is, and all of it after a kill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from ranks import two_ranks
from tiny import (
    CLASSES,
    ROWS,
    Batch,
    Hooked,
    Killed,
    Memory,
    ThatPrunes,
    kill,
    minutes,
    pictures,
    recipe,
    same,
    train,
    vit,
)

from lotus.config import check
from lotus.data.sample_plan import SamplePlan
from lotus.events import Said, Step
from lotus.training.distributed import StopFlag, World
from lotus.training.loop import Stopped
from selection.dynamic_pruning import EpochSubset
from selection.errors import Refused

INFOBATCH = {"name": "infobatch", "saving": 0.3}
FULL = {"ema": 0.9, "accumulate": 2, "mixup": 0.4, "cutmix": 1.0}
ALL = {"gated": True, "weighted": True, "drop_path": 0.2}


class Noting(Memory):
    """Writes down the rows that an epoch's batches had."""

    def __init__(self, plan: SamplePlan) -> None:
        super().__init__(plan)
        self.seen: dict[int, list[int]] = {}

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(epoch, skip):
            self.seen.setdefault(epoch, []).extend(batch.index.tolist())
            yield batch


def pruned(folder: Path, settings: Any, pick: Any, **more: Any) -> tuple[Any, ThatPrunes, Noting]:
    """A training whose epochs are drawn by ``pick``."""
    plan = SamplePlan(np.arange(ROWS), seed=5, batch_size=settings.batch_size, accumulate=settings.accumulate)
    dynamic, loader = ThatPrunes(pick, settings.epochs), Noting(plan)
    done = train(folder, settings, plan=plan, loader=loader, dynamic=dynamic, **more)
    return done, dynamic, loader


def test_rs2_sees_half_each_epoch_and_all_after_two(tmp_path: Path) -> None:
    done, _, loader = pruned(tmp_path, recipe(epochs=4), {"name": "rs2", "keep": 0.5})
    assert {epoch: len(set(rows)) for epoch, rows in loader.seen.items()} == dict.fromkeys(range(4), ROWS // 2)
    for first in (0, 2):
        assert set(loader.seen[first]) | set(loader.seen[first + 1]) == set(range(ROWS))
    assert done.fitted.images_seen == 4 * ROWS // 2
    assert done.fitted.steps == 4 * math.ceil(ROWS // 2 / 8)
    said = [event.text for event in done.events if isinstance(event, Said)]
    assert said == [f"epoch {epoch}: 26 of 52 images, 50.0 % of all passes saved" for epoch in (1, 2, 3, 4)]


def test_infobatch_saves_thirty_per_cent_and_learns(tmp_path: Path) -> None:
    done, dynamic, loader = pruned(tmp_path, recipe(epochs=8), INFOBATCH)
    assert done.fitted.images_seen == 8 * ROWS - round(0.3 * 8 * ROWS)
    assert sum(map(len, loader.seen.values())) == done.fitted.images_seen
    assert len(loader.seen[0]) == len(loader.seen[7]) == ROWS
    assert dynamic.saved(done.fitted.images_seen, 8) == pytest.approx(0.3, abs=1 / (8 * ROWS))
    assert [event.text for event in done.events if isinstance(event, Said)][-1].endswith(" 30.0 % of all passes saved")
    assert done.fitted.top1 > 60


def test_a_loss_is_taken_before_weights_of_the_mixed_image_against_its_mixed_target(tmp_path: Path) -> None:
    """Against the model at its start, by the definition: the step is too small to move it."""
    still = recipe(epochs=1, optimizer="sgd", lr=1e-30, warmup_epochs=0, weight_decay=0, clip=0, zero=0, mixup=0.4, cutmix=1.0)  # fmt: skip
    _, dynamic, loader = pruned(tmp_path, still, "repb", weighted=True)
    found = dynamic.known()
    model, (images, labels) = vit(), pictures()
    mixing, order = Hooked(still), loader.plan.order(0)
    for number, start in enumerate(range(0, ROWS, 8)):
        rows = order[start : start + 8]
        shown, targets = mixing.mix(images[rows], labels[rows], epoch=0, step=number)
        assert not torch.equal(shown, images[rows])
        torch.testing.assert_close(targets.sum(1), torch.ones(len(rows)))
        with torch.no_grad():
            losses = -(targets * model(shown).log_softmax(1)).sum(1).numpy()
        np.testing.assert_allclose(found["loss"][rows], losses, rtol=1e-4)
        assert np.array_equal(found["below"][rows], found["loss"][rows] < found["loss"][rows].astype(float).mean())


class Always(ThatPrunes):
    """All rows, each with the same weight."""

    def __init__(self, weight: float, epochs: int) -> None:
        super().__init__("repb", epochs)
        self.weight = weight

    def draw(self, epoch: int) -> EpochSubset:
        return EpochSubset(self.rows, np.full(ROWS, self.weight, np.float32))


def test_weights_multiply_the_loss_and_the_tickets_own(tmp_path: Path) -> None:
    ticket = np.linspace(0.5, 1.5, ROWS, dtype=np.float32)
    whole = train(tmp_path / "a", recipe(clip=0), weights=2.5 * ticket)
    drawn = train(tmp_path / "b", recipe(clip=0), weights=ticket, dynamic=Always(2.5, 2))
    for name, value in whole.fitted.state.items():
        torch.testing.assert_close(drawn.fitted.state[name], value, atol=1e-5, rtol=1e-4)
    plain = train(tmp_path / "c", recipe(clip=0))
    assert same(plain.fitted.state, train(tmp_path / "d", recipe(clip=0), dynamic=Always(1, 2)).fitted.state)


def test_rows_outside_the_ticket_are_never_drawn(tmp_path: Path) -> None:
    rows = np.arange(1, ROWS, 2)
    plan = SamplePlan(rows, seed=5, batch_size=8)
    dynamic, loader = ThatPrunes({"name": "orderdp", "keep": 0.5}, 3, rows=rows), Noting(plan)
    train(tmp_path, recipe(epochs=3), plan=plan, loader=loader, dynamic=dynamic)
    for seen in loader.seen.values():
        assert len(seen) == 13
        assert set(seen) <= set(rows.tolist())
    assert dynamic.known()["seen"].sum() == 39


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    return pruned(tmp_path_factory.mktemp("straight"), recipe(epochs=4, **FULL), INFOBATCH, **ALL)


@pytest.mark.parametrize("kills", few([[5], [21, 2], [30, 3]], [[21, 2]]), ids=["first epoch", "twice", "late"])
def test_killed_and_started_again_ends_the_same(tmp_path: Path, straight, kills: list[int]) -> None:
    settings = recipe(epochs=4, **FULL, save_minutes=0.5)
    for after in kills:
        with pytest.raises(Killed):
            pruned(tmp_path, settings, INFOBATCH, at={after: kill}, clock=minutes(), **ALL)
    done, dynamic, loader = pruned(tmp_path, settings, INFOBATCH, clock=minutes(), **ALL)
    assert same(done.fitted.state, straight[0].fitted.state)
    assert same(done.gates.state(), straight[0].gates.state())
    assert done.fitted.images_seen == straight[0].fitted.images_seen == 4 * ROWS - round(0.3 * 4 * ROWS)
    for name, values in straight[1].known().items():
        np.testing.assert_array_equal(dynamic.known()[name], values, err_msg=name)  # NaN is like NaN
    for epoch, rows in loader.seen.items():  # of the first, only what the others had left
        assert straight[2].seen[epoch][-len(rows) :] == rows
    lasts = [[e for e in run.events if isinstance(e, Step)][-1] for run in (done, straight[0])]
    assert lasts[0].values["lr"] == lasts[1].values["lr"]
    assert lasts[0].done == lasts[0].total == lasts[1].total


def test_stopped_while_evaluating_the_epoch_is_not_drawn_anew(tmp_path: Path, straight) -> None:
    class Interrupting(Memory):
        def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
            stop.set("interrupted")
            return super().epoch(epoch, skip)

    for _ in range(3):
        stop = StopFlag()
        validation = Interrupting(SamplePlan.evaluation(np.arange(ROWS), batch_size=8))
        with pytest.raises(Stopped):
            pruned(tmp_path, recipe(epochs=4, **FULL), INFOBATCH, validation=validation, stop=stop, **ALL)
    done, dynamic, _ = pruned(tmp_path, recipe(epochs=4, **FULL), INFOBATCH, **ALL)
    assert same(done.fitted.state, straight[0].fitted.state)
    assert np.array_equal(dynamic.known()["seen"], straight[1].known()["seen"])


def test_the_learning_rate_follows_the_steps_really_taken(tmp_path: Path) -> None:
    """Each epoch goes through an equal part of the schedule, in as many steps as it has; the last step is the end."""
    settings = recipe(epochs=6, warmup_epochs=1.5)
    done, _, loader = pruned(tmp_path, settings, {"name": "selective_backprop", "keep": 0.2}, clock=minutes())
    steps = [math.ceil(len(loader.seen[epoch]) / 8) for epoch in range(6)]
    assert steps == [7, 7, 7, 2, 2, 2]
    expected = []
    for epoch, count in enumerate(steps):
        for step in range(count):
            gone, warm = epoch + step / count, 1.5
            if gone < warm:
                expected.append(3e-3 * (gone * count + 1) / (warm * count + 1))
            else:
                expected.append(1e-5 + 0.5 * (3e-3 - 1e-5) * (1 + math.cos(math.pi * (gone - warm) / (6 - warm))))
    told = [event for event in done.events if isinstance(event, Step)]
    np.testing.assert_allclose([event.values["lr"] for event in told], expected, rtol=1e-9)
    assert [event.done for event in told] == list(range(1, 28))
    assert [event.total for event in told] == [42] * 21 + [27] * 6


def test_a_loss_that_is_not_finite_is_not_remembered(tmp_path: Path) -> None:
    done, dynamic, loader = pruned(tmp_path, recipe(), "infobatch", at={1: lambda losses: losses * math.nan})
    assert np.isfinite(done.fitted.state["head.weight"]).all()
    assert np.isfinite(dynamic.known()["loss"]).all()  # seen in the second epoch
    assert (dynamic.known()["seen"][loader.seen[0][8:16]] == 1).all()
    assert len(loader.seen[1]) >= ROWS // 2


def test_another_ranks_share_of_none_is_refused(tmp_path: Path) -> None:
    plan = SamplePlan(np.arange(ROWS), batch_size=8, world=4)
    with pytest.raises(Refused, match="3 for 4 ranks"):
        plan.take(np.arange(3))
    assert len(plan.rows) == ROWS


def test_a_state_of_other_images_is_refused() -> None:
    one, other = ThatPrunes("rs2", 2), ThatPrunes("rs2", 2, rows=np.arange(0, ROWS, 2))
    with pytest.raises(Refused, match="other images"):
        other.load_state(one.state(World()), World())


def test_the_setting_is_typed_and_the_baseline_has_none() -> None:
    assert check({}).train.dynamic is None
    settings = check({"train": {"dynamic": {"name": "infobatch", "saving": 0.3}}})
    assert (settings.train.dynamic.name, settings.train.dynamic.options, settings.train.dynamic.keep) == ("infobatch", {"saving": 0.3}, None)  # fmt: skip
    assert check({"train": {"dynamic": "rs2"}}).train.dynamic.name == "rs2"
    assert not hasattr(settings.score, "dynamic")
    assert not hasattr(settings.finetune, "dynamic")
    with pytest.raises(Refused, match=r"train\.dynamic\.keep"):
        check({"train": {"dynamic": {"name": "rs2", "keep": 1.5}}})


@pytest.mark.slow
def test_two_ranks_draw_the_same_and_share_it(tmp_path: Path) -> None:
    """Two processes over gloo: disjoint rows whose union is the draw; afterwards both know what both saw."""
    with pytest.raises(Killed):
        pruned(tmp_path / "begun", recipe(epochs=4, save_minutes=0.5), INFOBATCH, at={9: kill}, clock=minutes())
    alone = pruned(tmp_path / "alone", recipe(epochs=4), INFOBATCH)[1].known()
    two_ranks(Path(__file__).parent / "tiny.py", tmp_path, "dynamic", timeout=280)
    for name in ("whole", "begun"):
        one, other = (np.load(tmp_path / f"{name}-{rank}.npz") for rank in range(2))
        for key in alone:
            np.testing.assert_array_equal(one[f"known/{key}"], other[f"known/{key}"], err_msg=key)
        first = 0 if name == "whole" else 1
        for epoch in range(4):
            drawn = [set(file[f"drawn/{epoch}"].tolist()) for file in (one, other)]
            assert drawn[0] == drawn[1]
            if epoch < first + (name == "begun"):
                continue  # begun elsewhere: not all of it was seen here
            seen = [set(file[f"seen/{epoch}"].tolist()) for file in (one, other)]
            assert not seen[0] & seen[1]
            left = drawn[0] - seen[0] - seen[1]
            assert len(left) == len(drawn[0]) % 8 % 2, "an odd one out of a tail that two cannot share"
            assert len(seen[0]) == len(seen[1])
        assert one["known/seen"].dtype == np.int64
        assert (one["known/seen"] >= 1).all()
        assert one["known/seen"].sum() == pytest.approx(alone["seen"].sum(), abs=4)
        first_epoch = np.abs(one["known/mean"] - alone["mean"])
        assert np.median(first_epoch) < 0.2


def test_classes_of_the_pictures_are_what_rcap_balances(tmp_path: Path) -> None:
    _, _, loader = pruned(tmp_path, recipe(epochs=2), {"name": "rcap", "keep": 0.5})
    assert len(loader.seen[1]) == 26
    assert {row % CLASSES for row in loader.seen[1]} == set(range(CLASSES))
