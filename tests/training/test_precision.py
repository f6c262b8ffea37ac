"""``precision: auto``: bf16 where the device is faster in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from lotus.config import Finetune
from lotus.events import Said
from lotus.training import distributed, loop, precision
from lotus.training.distill import make_distiller
from lotus.training.distributed import World
from lotus.training.engine import Engine
from lotus.training.optim import make_optimizer
from lotus.training.precision import settled

CPU = torch.device("cpu")


def cpu_with(monkeypatch: pytest.MonkeyPatch, *, bf16: bool) -> None:
    monkeypatch.setattr(precision, "_multiplies_in_bf16", lambda: bf16)


@pytest.mark.parametrize("bf16", [False, True])
def test_auto_is_bf16_where_the_cpu_multiplies_in_it(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    cpu_with(monkeypatch, bf16=bf16)
    model, auto = tiny.vit(), tiny.recipe(precision="auto")
    assert settled(auto, model, "cpu").precision == ("bf16" if bf16 else "fp32")
    assert settled(auto, nn.Sequential(model, nn.BatchNorm1d(3)), "cpu").precision == "fp32"
    for asked in ("fp32", "bf16"):
        assert settled(tiny.recipe(precision=asked), model, "cpu").precision == asked


@pytest.mark.parametrize(("capability", "half"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_asked_for_its_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], half: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (settled(tiny.recipe(precision="auto"), tiny.vit(), "cuda").precision == "bf16") == half


@pytest.mark.parametrize(
    ("flags", "bf16"),
    [("fpu avx512f avx512_bf16 sse", True), ("fpu amx_bf16", True), ("fpu avx512f avx512_bf16x", False), (None, False)],
)
def test_a_cpu_is_asked_for_its_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None, bf16: bool
) -> None:
    told = tmp_path / "cpuinfo"
    if flags is not None:
        told.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    monkeypatch.setattr(precision, "_CPUINFO", told)
    precision._multiplies_in_bf16.cache_clear()
    try:
        assert precision._multiplies_in_bf16() == bf16
    finally:
        precision._multiplies_in_bf16.cache_clear()


def test_it_reaches_engine_and_teacher_and_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu_with(monkeypatch, bf16=True)
    auto = tiny.recipe(precision="auto", zero=0, epochs=1)
    model = tiny.vit()
    engine = Engine(model, make_optimizer(model, auto), auto, distributed.start("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    engine.release(engine.weights())
    taught = Finetune(precision="auto", distill="soft")
    distiller = make_distiller(tiny.vit(), taught, "cpu")
    assert distiller is not None
    assert distiller.dtype == torch.bfloat16
    events = tiny.train(tmp_path, auto).events
    assert any("bf16" in event.text for event in events if isinstance(event, Said))


class WithASlowOne(World):
    """Ranks on machines of their own, on one of which bf16 is slower."""

    def any(self, flag: object) -> bool:
        return True


def test_ranks_of_different_machines_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or one would send half of the bytes that another waits for."""
    cpu_with(monkeypatch, bf16=True)
    auto = tiny.recipe(precision="auto", zero=0, epochs=1)
    distributed.start("cpu")
    model, ranks = tiny.vit(), WithASlowOne()
    assert settled(auto, model, "cpu").precision == "bf16"
    assert settled(auto, model, "cpu", ranks).precision == "fp32"
    engine = Engine(model, make_optimizer(model, auto), auto, ranks)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    engine.release(engine.weights())
    asked: list[Any] = []

    def seen(*given: Any) -> Any:
        asked.append(given)
        return settled(*given)

    monkeypatch.setattr(loop, "settled", seen)
    tiny.train(tmp_path, auto)
    assert isinstance(asked[0][3], World)
