"""Two hosts that share nothing but the network: two folders of this machine, each start of a launcher in its own."""

from __future__ import annotations

import shutil
import subprocess
import types
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import free_port, heard, launched
from running import ROOT, SHORT

from lotus.config import Config
from lotus.events import Began, Rewound
from lotus.run import Run
from lotus.stages import order
from lotus.stages.hosts import Hosts
from lotus.training.distributed import World
from selection.errors import Refused


def both(homes: list[Path], *words: str, deepspeed: bool = False) -> list[subprocess.CompletedProcess[str]]:
    """What the two starts of a launcher say."""
    port, started = free_port(), []
    for number, home in enumerate(homes):
        (home / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
        how = ["torchrun", "--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"]
        if deepspeed:
            how = ["deepspeed", "--hostfile=hosts", "--no_ssh", f"--node_rank={number}"]
        how += ["--master_addr=127.0.0.1", f"--master_port={port}", str(ROOT / "tools" / "run.py")]
        started.append(launched(*how, *words, home=home))
    said = heard(started, timeout=500)
    return [subprocess.CompletedProcess("", one.returncode, text) for one, text in zip(started, said, strict=True)]


@pytest.fixture
def homes(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "one", tmp_path / "two"]
    for home in found:
        home.mkdir()
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_shared_folder(homes: list[Path]) -> None:
    """Over DeepSpeed's launcher, from images to report; and again by torchrun from a host that was emptied, where one stage is left."""
    words = [
        str(ROOT / "configs" / "staged.yaml"),
        "folder=run",
        *SHORT,
        "baseline=false",
        "score.epochs=1",
        "train.epochs=1",
        "stages=[inspect]",
    ]
    done = both(homes, *words, deepspeed=True)
    assert [one.returncode for one in done] == [0, 0], done[0].stdout[-3000:] + done[1].stdout[-3000:]
    one, two = (home / "run" for home in homes)
    for name in (
        "data/train.beton",
        "inspect/delete.txt",
        "signals.npz",
        "subset.npz",
        "train/model.safetensors",
        "prune/spec.json",
        "report.html",
        "stages/report.json",
    ):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert not (two / "log.jsonl").exists(), "rank 0 speaks"
    shutil.rmtree(two)
    again = both(homes, *words, "finetune.lr=1e-4")
    assert [one.returncode for one in again] == [0, 0], again[0].stdout[-3000:] + again[1].stdout[-3000:]
    assert (one / "prune" / "spec.json").read_bytes() == (two / "prune" / "spec.json").read_bytes()


@pytest.mark.slow
def test_other_images_on_another_host_are_refused(homes: list[Path]) -> None:
    for home, color in zip(homes, (10, 200), strict=True):
        for name in ("a/0.bmp", "a/1.bmp", "b/0.bmp", "b/1.bmp"):
            (home / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            side = 8 if color == 10 or name != "b/1.bmp" else 9
            Image.fromarray(np.full((side, 8, 3), color, np.uint8)).save(home / "images" / name)
    words = [str(ROOT / "configs" / "staged.yaml"), "folder=run", "data.name=imagefolder", "data.path=images", *SHORT]
    done = both(homes, *words)
    assert all(one.returncode for one in done)
    assert "are not those of rank 0" in done[0].stdout
    assert not (homes[0] / "run" / "stages" / "prepare.json").exists()


def test_one_process_is_no_host_apart(tmp_path: Path) -> None:
    run = Run(Config(folder=str(tmp_path / "run")))
    with run.held():
        hosts = Hosts(run, World())
        assert not hosts.any
        assert not hosts.copies
        hosts.share()
        hosts.hold("prepare", lambda: "x")
        with pytest.raises(Refused, match="no"):
            hosts.together(lambda: (_ for _ in ()).throw(Refused("no")))
    assert not list((tmp_path / "run").glob(".seen-*"))


def test_a_host_apart_gets_the_checkpoint_that_a_rewind_goes_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 wrote it since the stage began; a process alone, or rank 0 while the others wait for it, has nobody to send it to."""
    for size, wanted in ((1, []), (2, ["sent"])):
        told: list[str] = []
        begins = iter([stops(), ends()])
        monkeypatch.setattr(order, "begun", lambda stage, context, begins=begins: next(begins))
        context: Any = types.SimpleNamespace(world=World(size=size), share=lambda told=told: told.append("sent"))
        making = order._make(types.SimpleNamespace(name="train"), context, False)  # type: ignore[arg-type]
        assert [str(event) for event in making]
        assert told == wanted


def stops() -> Iterator[Any]:
    raise Rewound("goes back")
    yield


def ends() -> Generator[Any, None, str]:
    return "done"
    yield


def test_what_a_training_needs_is_imported_before_its_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its first images it would be silence for more than two seconds."""
    told: list[str] = []
    monkeypatch.setattr("lotus.training.deepspeed_import.ready", lambda: told.append("ready"))
    context: Any = types.SimpleNamespace(run=None)
    making = order._carry_out(types.SimpleNamespace(name="train", every_rank=True), "not done yet", context, False)  # type: ignore[arg-type]
    assert isinstance(next(making), Began)
    assert told == ["ready"]
