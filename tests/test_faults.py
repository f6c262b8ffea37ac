"""What becomes of a run when something goes wrong in the middle: a training that diverges, a file that is gone, a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lotus import run as runs
from lotus.cli import main
from lotus.config import read
from lotus.events import Evaluated
from lotus.stages.fit import _check_sound
from lotus.stages.shelf import run_of
from selection import files
from selection.errors import Refused

ROOT = Path(__file__).resolve().parent.parent
WORDS = [str(ROOT / "configs" / "digits.yaml"), "select.keep=1", "train.epochs=1", "train.batch_size=256", "model.args.depth=1",
         "model.args.embed_dim=16", "model.args.num_heads=2", "finetune.epochs=1", "prune.calibration=64"]  # fmt: skip
DIVERGES = ["batch_size=719", "epochs=1", "lr=1e30", "optimizer=sgd", "clip=0", "warmup_epochs=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["finetune", *WORDS, f"folder={folder}"]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def told(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("stage", "result", "place"), [("train", "train", "train"), ("finetune", "finetune", "finetune")]
)
def test_a_training_that_ends_diverged_replaces_nothing(
    stage: str, result: str, place: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = told(folder / result)
    for _ in range(2):
        capsys.readouterr()
        assert main([stage, *WORDS, f"folder={folder}", *(f"{place}.{word}" for word in DIVERGES)]) == 2
        says = capsys.readouterr().err
        assert f"lotus: {stage}: the training ended diverged" in says
        assert f"Lower {place}.lr" in says
    assert told(folder / result) == before
    for line in (folder / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the log"))


def test_any_number_that_is_none_is_seen() -> None:
    from types import SimpleNamespace

    import torch

    def fitted(**change: Any) -> Any:
        whole = {"state": {"w": torch.ones(2), "n": torch.tensor(3)}, "loss": 1.0, "top1": 50.0}
        return SimpleNamespace(**{**whole, **change})

    nan = float("nan")
    _check_sound(fitted(), "train", "train", evaluated=True)
    _check_sound(fitted(loss=nan, top1=nan), "score", "score", evaluated=False)
    bad = [fitted(loss=nan), fitted(loss=float("inf")), fitted(top1=nan), fitted(state={"w": torch.tensor([1.0, nan])})]
    for one in bad:
        with pytest.raises(Refused, match=r"baseline: .*Lower train\.lr"):
            _check_sound(one, "baseline", "train", evaluated=True)


@pytest.mark.parametrize("how", ["gone", "torn"])
@pytest.mark.parametrize("what", ["gates", "patches"])
def test_an_output_that_only_some_settings_leave_is_made_again(what: str, how: str, folder: Path) -> None:
    words = [*WORDS, f"folder={folder}"]
    if what == "patches":
        words += [
            "train.patches={mode: input, keep: 0.5, score: contrast, cached: true}",
            "train.patches.evaluate=dense",
        ]
        assert main(["train", *words]) == 0
    run = run_of(read(words[0], words[1:]))
    assert run.why("train") is None
    file = run.gates if what == "gates" else next(run.data.glob("patches-*.npz"))
    before = file.read_bytes()
    file.unlink() if how == "gone" else file.write_bytes(before[:-20])
    assert run.why("train") == f"{file.name} {'is gone' if how == 'gone' else 'was changed'}"
    assert main(["train", *words]) == 0
    assert run.why("train") is None
    assert len(file.read_bytes()) == len(before)
    assert what == "patches" or file.read_bytes() == before


def test_a_record_without_such_an_output_makes_it_again(folder: Path) -> None:
    run = run_of(read(WORDS[0], [*WORDS[1:], f"folder={folder}"]))
    file = folder / "stages" / "train.json"
    record = json.loads(file.read_text())
    assert run.why("train") is None
    assert record["outputs"].pop("gates.safetensors") > 0
    del record["digest"]  # as an older LOTUS left it
    file.write_text(json.dumps(record))
    assert run.why("train") == "gates.safetensors was not made then"


@pytest.mark.parametrize(
    ("name", "kind"), [("stages", "file"), ("checkpoints", "file"), ("export", "file"), ("log.jsonl", "folder"),
                       ("log.jsonl", "pipe"), ("subset.npz", "folder"), ("gates.safetensors", "folder")]
)  # fmt: skip
def test_what_is_of_the_wrong_kind_is_refused_before_any_work(
    name: str, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    {"file": path.touch, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    before = sorted(os.listdir(folder))
    assert main(["finetune", *WORDS, f"folder={folder}"]) == 2
    says = capsys.readouterr().err
    assert f"{path}: is no " in says
    assert "Move it away" in says
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("name", ["stages", "checkpoints", "log.jsonl"])
def test_a_report_where_something_is_of_the_wrong_kind_or_nothing_may_be_written(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, f"folder={folder}", "baseline=false", "export.onnx=false", "export.latency_batch=1"]
    assert main(["run", *words]) == 0
    page = (folder / "report.html").read_bytes()
    real = os.mkdir

    def locked(path: Any, *more: Any, **named: Any) -> None:
        if str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, "Read-only file system")
        real(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", locked)
        capsys.readouterr()
        assert main(["report", str(folder)]) == 2
    says = capsys.readouterr().err
    assert "report.html: cannot be written (Read-only file system)" in says
    assert "copy" in says
    assert (folder / "report.html").read_bytes() == page
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.mkdir() if name == "log.jsonl" else path.touch()
    assert main(["report", str(folder)]) == 0, "what it does not need, or can do without"


def test_the_disk_fills_in_the_middle_of_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has no room, a checkpoint has: it is saved, and the same command goes on to what an unbroken run leaves."""
    words = [*WORDS, "train.batch_size=16"]
    assert main(["train", *words, f"folder={tmp_path / 'whole'}"]) == 0
    real, lines = files.append, [0]

    def full(path: Any, line: str, cure: str = "") -> None:
        lines[0] += '"step"' in line and '"train"' in line
        if lines[0]:
            raise Refused(f"{path}: cannot be written (No space left on device). {cure}")
        real(path, line, cure)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "append", full)
        capsys.readouterr()
        assert main(["train", *words, f"folder={run}"]) == 2
    says = capsys.readouterr().err
    assert "log.jsonl: cannot be written (No space left on device). Make room there" in says
    assert f"saved to {run / 'checkpoints' / 'train'}" in says
    assert not (run / "train").exists()
    assert main(["train", *words, f"folder={run}"]) == 0
    assert (run / "train" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "train" / "model.safetensors"
    ).read_bytes()


def test_a_number_that_is_none_is_null_in_the_log(tmp_path: Path) -> None:
    run = run_of(read(WORDS[0], [*WORDS[1:], f"folder={tmp_path}"]))
    run.write_event(Evaluated("train", 1, {"loss": float("nan"), "top1": 9.0}))
    assert json.loads(run.log.read_text())["values"] == {"loss": None, "top1": 9.0}
