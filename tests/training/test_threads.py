"""How many threads a training computes with: a matter of the model and the machine, not of the hour."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from lotus.config import Model
from lotus.data import cores
from lotus.training import threads
from lotus.training.checkpoint import Checkpoints
from lotus.training.distributed import World
from lotus.vit.model import create

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has said how many, and the machine has four cores."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "count", lambda workers=0: workers or 4)
    yield
    torch.set_num_threads(before)


def test_a_small_model_has_one_and_a_large_one_all() -> None:
    demo = create(Model(name="vit_tiny_patch16_224", args={"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}), 10)  # fmt: skip
    deit = create(Model(name="vit_tiny_patch16_224"), 10)
    assert threads.worth(demo, 32, 4) == 1
    assert threads.worth(deit, 64, 4) == 4
    wider = create(Model(name="vit_tiny_patch16_224", args={"img_size": 8, "patch_size": 2, "embed_dim": 96, "depth": 4, "num_heads": 4}), 10)  # fmt: skip
    assert threads.worth(wider, 32, 4) == 2, "from some 60 million multiply-accumulates a block on"
    assert [threads.worth(demo, images, 4) for images in (32, 256, 4096)] == sorted(
        threads.worth(demo, images, 4) for images in (32, 256, 4096)
    )
    assert threads.worth(torch.nn.Linear(2, 2), 1, 4) == 4, "a model that nobody can count has all of them"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.take(tiny.vit(), 8, World()) == 3
    assert torch.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.take(tiny.vit(), 8, World(device=torch.device("cuda")))
    assert torch.get_num_threads() == 3, "a GPU computes"
    threads.take(tiny.vit(), 8, World())
    assert torch.get_num_threads() == 1


def test_a_training_goes_on_with_as_many_as_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of sums has other last digits: what is resumed on a machine of other cores goes on as it was."""
    torch.set_num_threads(3)
    monkeypatch.setattr(threads, "A_THREAD", 1.0)
    with pytest.raises(tiny.Killed):
        tiny.train(tmp_path, tiny.recipe(epochs=2), at={9: tiny.kill})
    assert torch.get_num_threads() == 3, "it gives them back"
    found, _ = Checkpoints(tmp_path / "checkpoints", key="k").latest()
    assert found is not None
    assert found.state["threads"] == 4
    monkeypatch.setattr(cores, "count", lambda workers=0: workers or 2)
    seen: list[int] = []

    def look(losses: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return losses

    tiny.train(tmp_path, tiny.recipe(epochs=2), at={0: look})
    assert seen == [4]


def test_a_command_lets_threads_sleep() -> None:
    """Where nobody has said how they are to wait, and before torch is imported."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    given: tuple[dict[str, str], ...] = ({}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"})
    code = f"""
import contextlib, os, sys, lotus.cli
for given in {given}:
    os.environ.update(given)
    with contextlib.redirect_stdout(None):
        lotus.cli.main(["config"])
    print([os.environ.pop(name, None) for name in {names}], "torch" in sys.modules)
"""
    bare = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**bare, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "['PASSIVE', '1000', None] False", "[None, '5', None] False", "['ACTIVE', None, None] False"
    ]  # fmt: skip
