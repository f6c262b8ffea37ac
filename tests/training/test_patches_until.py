"""Fewer patches for a part of the training, then all: the tokens of each step, what is billed of it and foreseen, and graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from few import few
from tiny import ROWS, patched, recipe

from lotus.stages.ahead import seen_before
from lotus.training import compiled
from lotus.vit.cost import count


@pytest.mark.parametrize("until", few([0.3, 0.45, 0.667, 0.96, 1], [0.45]))
def test_tokens_come_back_and_the_bill_is_the_forecast(tmp_path: Path, until: float) -> None:
    """Of 21 steps in three epochs, each beginning at a whole part of 21; the seventh, 14th and 21st have four images."""
    given, entered = recipe(epochs=3), list[int]()
    done, tokens, _ = patched(tmp_path, given, "dropout", joint=None, until=until, entered=entered)
    assert entered == [10 if step / 21 < until else 16 for step in range(21)]
    tokens.keep = tokens.settings.keep
    few_macs, all_macs = tokens.macs(), count(done.model).macs
    few_images = sum(4 if step % 7 == 6 else 8 for step in range(21) if step / 21 < until)
    assert done.fitted.macs == few_images * few_macs + (3 * ROWS - few_images) * all_macs
    assert seen_before(given, ROWS, until) == pytest.approx(few_images / (3 * ROWS))


@pytest.mark.slow
def test_all_patches_are_a_graph_more_and_no_endless_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    graphs = []
    for until in (1, 0.5):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        patched(tmp_path / str(until), recipe(epochs=3, compile=True), "dropout", joint=None, until=until)
        counters = torch._dynamo.utils.counters
        assert not compiled.beyond()
        assert not counters["graph_break"]
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] <= graphs[1] <= graphs[0] + 1
    torch._dynamo.reset()
