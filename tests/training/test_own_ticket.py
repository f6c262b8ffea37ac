"""A training that is its own proxy: what it records is what a proxy would, the ticket is drawn once, and it goes on bit for bit."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from test_guests import FULL, Killed, kill, minutes
from tiny import CLASSES, ROWS, Outcome, recipe, same, shrinking, train, vit

from lotus.data.sample_plan import SamplePlan
from lotus.training.distributed import StopFlag
from lotus.training.dynamics import Recorder
from lotus.training.evaluation import Stopped
from lotus.training.guests import Position
from lotus.training.own_ticket import OwnTicket
from lotus.training.shrink import Shrink


def run(
    folder: Path,
    told: list[dict[str, np.ndarray]],
    more: dict[str, Any] | None = None,
    picking: Callable[[], object] = int,
    **rest: Any,
) -> Outcome:
    """Four epochs of thirteen micro-batches, seven steps each; cut after step 12, in the second, and then on the hardest half."""
    model = vit(0.2, patch=4)
    shrink: Shrink = shrinking(model, at=0.4)

    def draw(said: Any, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        picking()
        told.append(dict(said))
        hard = np.sort(np.argsort(-said["error_norm"].mean(0), kind="stable")[: ROWS // 2])
        return hard, np.linspace(0.5, 1.5, len(hard), dtype=np.float32)

    own = OwnTicket(Recorder(ROWS, 2, CLASSES, steps=True), draw, shrink.is_done)
    settings = recipe(**{**FULL, "mixup": 0, "cutmix": 0, "epochs": 4, "save_minutes": 0.5, **(more or {})})
    done = train(folder, settings, model=model, guests=[own, shrink], **rest)
    done.events.append(own)  # type: ignore[arg-type]
    return done


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, list[dict[str, np.ndarray]]]]:
    """The training of a layout that nobody killed, and what was told for its draw; made once."""

    @functools.cache
    def whole(layout: str) -> tuple[Outcome, list[dict[str, np.ndarray]]]:
        told: list[dict[str, np.ndarray]] = []
        return run(tmp_path_factory.mktemp("whole"), told, LAYOUTS[layout]), told

    return whole


LAYOUTS: dict[str, dict[str, Any]] = {"adamw": {"zero": 0}, "muon": {"zero": 1, "optimizer": "muon"}}


def test_what_is_seen_before_the_draw_is_all_and_after_it_the_ticket(wholes: Any) -> None:
    done, told = wholes("adamw")
    own = done.events[-1]
    assert isinstance(own, OwnTicket)
    assert own.rows is not None
    assert len(told) == 1, "drawn once"
    assert told[0]["loss"].shape == (2, ROWS)
    assert done.fitted.images_seen == 2 * ROWS + 2 * (ROWS // 2)


@pytest.mark.parametrize(("world", "left_out"), [(1, 0), (2, 1)])
def test_who_sat_out_is_told_and_not_in_the_ticket(world: int, left_out: int) -> None:
    """Of five rows two ranks share four; row 5 is not to train at all."""
    recorder, asked = Recorder(6, 1, CLASSES), []

    def draw(said: Any, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.append(unseen.tolist())
        assert all(np.isfinite(values).all() for values in said.values())
        assert said["loss"][0, 5] == np.float32(np.median(said["loss"][0, : 5 - left_out]))
        return np.array([0, 1]), np.ones(2, np.float32)

    own = OwnTicket(recorder, draw, lambda: True)
    ranks = SimpleNamespace(
        size=world,
        is_main=True,
        sum_=lambda x: x,
        from_main=lambda x: x,
        barrier=lambda **_: None,
        device=torch.device("cpu"),
    )
    own.attach(SimpleNamespace(world=ranks, plan=SamplePlan(np.arange(5), batch_size=4 * world, world=world)))  # type: ignore[arg-type]
    shown = torch.arange(5 - left_out)
    recorder.add(shown, torch.randn(len(shown), CLASSES, generator=torch.Generator().manual_seed(0)), shown % CLASSES)
    own.end_epoch(0)
    told = list(own.close_epoch(Position()))
    assert asked == [[4, 5] if left_out else [5]]
    assert ("1 of the images sat out, as 2 ranks share a step evenly" in told[-1]) == bool(left_out)


def test_it_records_what_a_watched_training_records(tmp_path: Path, wholes: Any) -> None:
    """The oracle is the recorder of a proxy in the same training, which is cut but loses nobody: its first two epochs."""
    _, told = wholes("adamw")
    model = vit(0.2, patch=4)
    settings = recipe(**{**FULL, "mixup": 0, "cutmix": 0, "epochs": 4, "save_minutes": 0.5, **LAYOUTS["adamw"]})
    watched = train(tmp_path / "watched", settings, model=model, guests=[shrinking(model, at=0.4)], watched=True)
    assert watched.recorder is not None
    for name, values in watched.recorder.signals().items():
        np.testing.assert_array_equal(told[0][name], values[:2], err_msg=name)


MOMENTS = {"watching": 5, "before the cut": 20, "cut": 24, "on the ticket": 36}
FAST = [("watching", "adamw"), ("cut", "muon")]


@pytest.mark.parametrize(("moment", "layout"), few(itertools.product(MOMENTS, LAYOUTS), FAST))
def test_a_killed_one_goes_on_bit_for_bit(tmp_path: Path, wholes: Any, moment: str, layout: str) -> None:
    whole, told = wholes(layout)
    after, more = MOMENTS[moment], LAYOUTS[layout]
    broken: list[dict[str, np.ndarray]] = []
    with pytest.raises(Killed):
        run(tmp_path / "broken", broken, more, at={after: kill}, clock=minutes())
    done = run(tmp_path / "broken", broken, more)
    assert same(done.fitted.state, whole.fitted.state)
    assert len(broken) in (1, 2), "once more where it was killed before it was saved"
    for name, values in told[0].items():
        np.testing.assert_array_equal(broken[-1][name], values, err_msg=name)
    assert done.fitted.images_seen == whole.fitted.images_seen


def test_a_picker_is_left_when_asked_to_stop_and_the_ticket_is_drawn_when_it_goes_on(
    tmp_path: Path, wholes: Any
) -> None:
    whole, told = wholes("adamw")
    again: list[dict[str, np.ndarray]] = []
    more = LAYOUTS["adamw"]

    def slow() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with StopFlag() as stop, pytest.raises(Stopped, match="saved"):
        run(tmp_path, [], more, slow, stop=stop)
    done = run(tmp_path, again, more)
    assert same(done.fitted.state, whole.fitted.state)
    assert done.fitted.images_seen == whole.fitted.images_seen
    for name, values in told[0].items():
        np.testing.assert_array_equal(again[0][name], values, err_msg=name)
