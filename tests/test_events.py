"""What is told while work goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lotus.config import Config
from lotus.events import Began, Ended, Step, watched
from lotus.run import Run


def test_work_that_goes_on_beyond_its_total_is_told_as_much_once_more():
    def work(progress):
        for done in (2, 4, 5, 9):
            progress(done)

    steps: list[Any] = list(watched("prune", 4, work))
    assert [(step.done, step.total) for step in steps] == [(2, 4), (4, 4), (5, 8), (9, 12)]


def test_the_log_is_a_table_to_pandas_in_one_line(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas", reason="the extra scale is not installed")
    run = Run(Config(folder=str(tmp_path)))
    told = [
        Began("train", "not done yet"),
        Step("train", 1, 2, values={"loss": 1.5, "lr": float("nan")}),
        Ended("train", 2.0),
    ]
    for event in told:
        run.write_event(event)
    log = pd.read_json(tmp_path / "log.jsonl", lines=True)
    assert log.event.tolist() == ["began", "step", "ended"]
    assert pd.json_normalize(log[log.event == "step"]["values"]).loss.tolist() == [1.5]
