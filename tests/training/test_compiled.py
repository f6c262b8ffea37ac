"""Compiled blocks: the same training within rounding, few graphs, and what they brought is told."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Outcome, minutes, recipe, shrinking, train, vit

from lotus.config import Sparsity
from lotus.events import Said, Step
from lotus.sparsity.gates import Gates
from lotus.training import compiled
from lotus.training.growing import GrowingPictures
from selection.errors import Refused


@pytest.fixture(autouse=True)
def anew() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def trained(folder: Path, clock: Any = time.perf_counter, **more: Any) -> Outcome:
    """With gates, growing pictures and a cut, that leaves blocks of unlike widths."""
    model = vit(patch=4, depth=3)
    gates = Gates(model, Sparsity(start=0.1), target=0.6) if not more.pop("cut", False) else None
    guests = [shrinking(model, at=0.5)] if gates is None else [GrowingPictures([(0, 8), (0.4, 12), (0.7, 16)])]
    return train(folder, recipe(epochs=3, zero=0, **more), model=model, gates=gates, guests=guests, clock=clock)


def alike(one: Outcome, other: Outcome) -> None:
    """But for the keys' biases, which change no attention: their gradients are rounding alone, and Adam makes steps of them."""
    for name, value in one.fitted.state.items():
        found, keys = other.fitted.state[name], name.endswith("qkv.bias")
        for number, (a, b) in enumerate(zip(found.chunk(3 if keys else 1), value.chunk(3 if keys else 1), strict=True)):
            if not (keys and number == 1):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert abs(one.fitted.loss - other.fitted.loss) < 1e-3


def told(outcome: Outcome) -> list[str]:
    return [event.text for event in outcome.events if isinstance(event, Said) and event.text.startswith("compiled")]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
def test_gates_growing_pictures_and_a_cut_train_the_same_by_few_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    """By torch's graphs alone, which take no compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    plain, limit = trained(tmp_path / "plain", cut=cut), torch._dynamo.config.recompile_limit
    done = trained(tmp_path / "compiled", cut=cut, compile=True)
    alike(plain, done)
    lines = [line for line in told(done) if "x the time" in line]
    assert len(lines) == (2 if cut else 1)
    assert all(" graph" in line for line in lines), lines
    assert not [event for event in done.events if isinstance(event, Said) and "beyond" in event.text]
    assert torch._dynamo.config.recompile_limit == limit
    counters = torch._dynamo.utils.counters
    assert 1 <= counters["stats"]["unique_graphs"] <= (4 * 3 + 1) * len(lines)
    assert not compiled.beyond()


@pytest.mark.slow
def test_what_is_compiled_later_is_told_after_its_epoch_and_what_is_not_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    later = told(trained(tmp_path / "compiled", compile=True, clock=minutes()))[1:]
    assert later
    assert all("more" in line and "graphs in all" in line for line in later), later
    torch._dynamo.reset()
    for name in ("_FEWEST", "_A_BLOCK"):  # of blocks that are traced again at each side
        monkeypatch.setattr(compiled, name, 0)
    events = trained(tmp_path / "bound", compile=True, clock=minutes()).events
    warned = [number for number, event in enumerate(events) if isinstance(event, Said) and event.level == "warning"]
    assert "beyond torch's bound" in events[warned[0]].text  # type: ignore[attr-defined]
    assert isinstance(events[warned[0] - 1], Step), "as soon as a step is told"


@pytest.mark.slow
def test_compiled_by_inductor_it_trains_the_same(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", recipe(epochs=1, zero=0), model=vit())
    alike(plain, train(tmp_path / "compiled", recipe(epochs=1, zero=0, compile=True), model=vit()))


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Refused, match=r"finetune\.compile: .*finetune\.compile=false"):
        compiled.Compiled(vit(), place="finetune")
