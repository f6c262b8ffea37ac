"""What is told while work goes on."""

from __future__ import annotations

from typing import Any

from lotus.events import watched


def test_work_that_goes_on_beyond_its_total_is_told_as_much_once_more():
    def work(progress):
        for done in (2, 4, 5, 9):
            progress(done)

    steps: list[Any] = list(watched("prune", 4, work))
    assert [(step.done, step.total) for step in steps] == [(2, 4), (4, 4), (5, 8), (9, 12)]
