"""TensorBoard files say what the events said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lotus.events import Began, Evaluated, Step
from lotus.report.board import Board
from selection.errors import Refused


def test_scalars_are_those_of_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Board(tmp_path) as board:
        board.show(Began("train", "not done yet"))
        board.show(Step("train", 3, 10, values={"loss": 1.5, "lr": 0.25}))
        board.show(Step("train", 7, 10, values={"loss": 0.5}))
        board.show(Evaluated("train", 1, {"top1": 62.5}))
    told = EventAccumulator(str(tmp_path / "train"))
    told.Reload()
    assert [(scalar.step, scalar.value) for scalar in told.Scalars("train/loss")] == [(3, 1.5), (7, 0.5)]
    assert [(scalar.step, scalar.value) for scalar in told.Scalars("validation/top1")] == [(1, 62.5)]


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install 'lotus-vit\[tensorboard\]'"):
        Board(tmp_path)
