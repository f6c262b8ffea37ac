"""What becomes of a run when something goes wrong in the middle: a training that diverges, a file that is gone, a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from few import few

from lotus import run as runs
from lotus.cli import main
from lotus.config import read
from lotus.events import Evaluated
from lotus.stages.fit import check_sound
from lotus.stages.shelf import run_of
from selection import atomic_files
from selection.errors import Refused

ROOT = Path(__file__).resolve().parent.parent
WORDS = [str(ROOT / "configs" / "staged.yaml"), "select.keep=1", "train.epochs=1", "train.batch_size=256", "model.args.depth=1",
         "model.args.embed_dim=16", "model.args.num_heads=2", "finetune.epochs=1", "prune.calibration=64"]  # fmt: skip
WHOLE = [
    *WORDS[:1],
    "score.epochs=1",
    "score.seeds=1",
    "select.keep=0.5",
    *WORDS[2:],
    "export.onnx=false",
    "export.latency_batch=1",
]
DIVERGES = ["batch_size=719", "epochs=1", "lr=1e30", "optimizer=sgd", "clip=0", "warmup_epochs=0"]


class Disk:
    """Watches over what a power cut would leave below a folder: a file, or a name, that was not made to last is gone or empty after it.

    Caches elsewhere, such as numba's beside its functions, may be lost.
    """

    def __init__(self, below: Path) -> None:
        self._below = below.resolve()
        self.lost: list[str] = []
        self.lasts: dict[tuple[int, int], tuple[int, int]] = {}
        self._names: dict[Path, str] = {}
        self._real = os.fsync, os.replace

    def fsync(self, handle: Any) -> None:
        about = os.fstat(handle)
        self.lasts[about.st_dev, about.st_ino] = about.st_size, about.st_mtime_ns
        if stat.S_ISDIR(about.st_mode):
            self._names.pop(Path(os.readlink(f"/proc/self/fd/{handle}")), None)
        self._real[0](handle)

    def replace(self, new: Any, path: Any, **named: Any) -> None:
        new, path = Path(new), Path(path).absolute()
        if not path.parent.resolve().is_relative_to(self._below):
            return self._real[1](new, path, **named)
        for file in [new, *new.rglob("*")] if new.is_dir() else [new]:
            about = file.lstat()
            known = self.lasts.get((about.st_dev, about.st_ino))
            if stat.S_ISREG(about.st_mode) and about.st_nlink == 1 and known != (about.st_size, about.st_mtime_ns):
                self.lost.append(f"{path}: {file} came to its name before it would last")
        self._real[1](new, path, **named)
        self._names[path.parent.resolve()] = f"{path}: its name would not last"
        return None

    def left(self) -> list[str]:
        """What a power cut now would cost."""
        return self.lost + [text for folder, text in self._names.items() if folder.is_dir()]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, disk: Disk) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        patch.setattr(os, "replace", disk.replace)
        assert main(["finetune", *WORDS, f"folder={folder}"]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def told(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the name of a folder")
def test_a_power_cut_finds_whole_files_alone(trained: Path, disk: Disk) -> None:
    assert (trained / "finetune" / "model.safetensors").is_file()
    assert len(disk.lasts) > 20
    assert disk.left() == []


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
    check_sound(fitted(), "train", "train", evaluated=True)
    check_sound(fitted(loss=nan, top1=nan), "score", "score", evaluated=False)
    bad = [fitted(loss=nan), fitted(loss=float("inf")), fitted(top1=nan), fitted(state={"w": torch.tensor([1.0, nan])})]
    for one in bad:
        with pytest.raises(Refused, match=r"baseline: .*Lower train\.lr"):
            check_sound(one, "baseline", "train", evaluated=True)


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
                       ("log.jsonl", "pipe"), ("subset.npz", "folder"), ("gates.safetensors", "folder"),
                       ("stages/train.json", "folder"), ("stages/report.json", "pipe")]
)  # fmt: skip
def test_what_is_of_the_wrong_kind_is_refused_before_any_work(
    name: str, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    {"file": path.touch, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    before = sorted(os.listdir(folder))
    assert main(["finetune", *WORDS, f"folder={folder}"]) == 2
    says = capsys.readouterr().err
    assert f"{path}: is no " in says
    assert "Move it away" in says
    assert sorted(os.listdir(folder)) == before
    assert f"{path}: is no " in check_of(run_of(read(WORDS[0], [*WORDS[1:], f"folder={folder}"]))), "the doctor too"


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


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.ENOSPC, "Make room there"), (errno.EROFS, "Give this user the right to it"), (errno.EACCES, "Give this user the right to it"),
        (errno.EIO, "See to that disk"), (errno.ENOENT, None),
    ],
)  # fmt: skip
def test_a_disk_that_refuses_any_call_is_named_and_a_fault_of_ours_is_none_of_its(
    code: int, cure: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strikes(*_: Any) -> int:
        raise OSError(code, os.strerror(code), "runs/digits/pareto.json")

    monkeypatch.setattr("lotus.cli.config.settings", strikes)
    if cure is None:
        with pytest.raises(FileNotFoundError):
            main(["config"])
        return
    assert main(["config"]) == 2
    says = capsys.readouterr().err
    assert f"lotus: runs/digits/pareto.json: {os.strerror(code)}. {cure}" in says
    assert "same command goes on" in says


def test_the_disk_fills_in_the_middle_of_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has no room, a checkpoint has: it is saved, and the same command goes on to what an unbroken run leaves."""
    words = [*WORDS, "train.batch_size=16"]
    assert main(["train", *words, f"folder={tmp_path / 'whole'}"]) == 0
    real, lines = atomic_files.append, [0]

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


# ------------------------------------------------------------------------------------------- a byte that is not as it was


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a proxy and a baseline; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["run", *WHOLE, f"folder={folder}"]) == 0
    return folder


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path, at: float = 0.75) -> None:
    """Change one bit under the old size and time."""
    about, content = file.stat(), bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def refused(capsys: pytest.CaptureFixture[str], words: list[str], file: Path) -> str:
    """What the refusal says, which names the file and has a cure."""
    capsys.readouterr()
    assert main(words) == 2
    says = capsys.readouterr().err
    assert str(file) in says
    assert f"elete {file.parent}," in says if file.name == "spec.json" else "elete " in says
    return says


READ = [  # what is flipped, and the stage from which on it is read
    ("train/model.safetensors", "prune"), ("train/spec.json", "prune"), ("gates.safetensors", "prune"),
    ("prune/model.safetensors", "finetune"), ("finetune/model.safetensors", "export"),
    ("baseline/model.safetensors", "report"), ("signals.npz", "select"), ("subset.npz", "train"),
    ("data/train.beton", "finetune"), ("data/val.beton", "prune"), ("data/train.json", "train"),
    ("export/export.json", "report"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "stage"), few(READ, READ[1::3]))
def test_a_flipped_bit_is_found_before_it_is_read_and_its_cure_works(
    name: str, stage: str, whole: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WHOLE, f"folder={whole}"]
    flip(whole / name)
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    refused(capsys, ["run", *words, "--from", stage], whole / name)
    assert before == {path: path.read_bytes() for path in before}, "nothing is touched"
    shutil.rmtree((whole / name).parent) if name.endswith("spec.json") else (whole / name).unlink()
    assert main(["run", *words]) == 0
    if name != "export/export.json":  # which has times in it
        for model in ("train", "prune", "finetune", "baseline"):
            file = f"{model}/model.safetensors"
            assert (whole / file).read_bytes() == (finished / file).read_bytes()


@pytest.mark.parametrize("name", ["train", "prune", "finetune", "baseline"])
def test_evaluate_and_export_find_a_flipped_weight_and_a_run_a_torn_one(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, file = [*WHOLE, f"folder={whole}"], whole / name / "model.safetensors"
    shutil.copytree(whole / name, tmp_path / "alone")
    flip(file)
    flip(tmp_path / "alone" / "model.safetensors")
    refused(capsys, ["evaluate", *words, "--model", name], file)
    refused(capsys, ["evaluate", *words, "--model", str(tmp_path / "alone")], tmp_path / "alone" / "model.safetensors")
    refused(capsys, ["export", str(tmp_path / "alone")], tmp_path / "alone" / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    assert run_of(read(words[0], words[1:])).why(name) == "model.safetensors was changed"


def test_evaluate_finds_a_pixel_that_changed(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(whole / "data" / "val.beton", at=0.1)
    refused(capsys, ["evaluate", *WHOLE, f"folder={whole}"], whole / "data" / "val.beton")


def test_images_that_changed_under_their_old_time_are_written_again_for_another_run(
    whole: Path, finished: Path, tmp_path: Path
) -> None:
    flip(whole / "data" / "train.beton", at=0.1)
    words = ["prepare", *WHOLE, f"folder={tmp_path / 'other'}", f"data.folder={whole / 'data'}"]
    assert main(words) == 0
    assert (whole / "data" / "train.beton").read_bytes() == (finished / "data" / "train.beton").read_bytes()


@pytest.mark.parametrize("verb", ["run", "report"])
def test_damaged_results_are_refused(verb: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [verb, *WHOLE, f"folder={whole}"] if verb == "run" else [verb, str(whole)]
    for damage in ("flipped", "no JSON"):
        file = whole / "results.json"
        flip(file) if damage == "flipped" else file.write_bytes(b"{" * file.stat().st_size)
        refused(capsys, words, file)
    file.unlink()
    assert main(["run", *WHOLE, f"folder={whole}"]) == 0


@pytest.mark.parametrize("at", [0.02, 0.3, 0.6, 0.98])
def test_a_flipped_record_is_named_and_its_stage_runs_again(
    at: float, whole: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(whole / "stages" / "select.json", at)
    capsys.readouterr()
    assert main(["run", *WHOLE, f"folder={whole}"]) == 0
    assert "select.json was damaged" in capsys.readouterr().out
    assert (whole / "subset.npz").read_bytes() == (finished / "subset.npz").read_bytes()


def test_a_finished_run_reads_through_no_file_and_loads_no_torch(finished: Path) -> None:
    code = (
        "import sys, builtins\n"
        "from lotus import files, run\n"
        "def never(*_, **__): raise AssertionError('read through')\n"
        "run.digest_once = lambda path: files.digest_once(path) if path.name == 'results.json' else never()\n"
        "from lotus.cli import main\n"
        f"code = main({['run', *WHOLE, f'folder={finished}']!r})\n"
        "heavy = {'torch', 'timm', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout


TOLD_ALONE = ("log.jsonl", "config.yaml", "versions.txt", "MODEL.md", "README.md", ".lock")
"""What no stage reads: nobody is misled by them but the eye. ``config.yaml`` is held to the stages' own settings."""


def check_of(run: runs.Run) -> str:
    """What ``lotus doctor RUN`` finds wrong, with its cure."""
    from lotus.stages.whole import run_checks

    return "\n".join(f"{check.name}: {check.found}. {check.cure}" for check in run_checks(run) if check.cure)


@pytest.mark.parametrize("how", few(["flipped", "cut off", "empty"], ["flipped"]))
def test_whatever_file_of_a_finished_run_changes_the_doctor_names_it(
    how: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of file that a run leaves, a checkpoint among them; and what nobody reads leads to no traceback."""
    import torch

    from lotus.training.checkpoint import Checkpoints

    Checkpoints(whole / "checkpoints" / "train", key="k").save({"weights": {"w": torch.ones(9)}}, {"step": 1})
    run, kinds = run_of(read(WHOLE[0], [*WHOLE[1:], f"folder={whole}"])), set()
    assert check_of(run) == ""
    for file in sorted(path for path in whole.rglob("*") if path.is_file()):
        content, about = file.read_bytes(), file.stat()
        if not content:
            continue
        flipped = bytes([*content[:-2], content[-2] ^ 1, content[-1]])
        changed = {"flipped": flipped, "cut off": content[:-9], "empty": b""}[how]
        file.write_bytes(changed)
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
        if file.name not in TOLD_ALONE:
            kinds.add(file.suffix)
            told = check_of(run)
            named = file.name if "checkpoints" not in file.parts else "checkpoints/train/000001"
            assert named in told, f"{file}: {told}"
            assert re.search(r"elete|To be done|passed over", told), told
        else:
            capsys.readouterr()
            assert main(["report", str(whole)]) in (0, 2), file
        file.write_bytes(content)
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert kinds == {".safetensors", ".json", ".npz", ".beton", ".html"}
    assert check_of(run) == ""


def test_a_page_that_is_written_again_is_whole(whole: Path) -> None:
    log = whole / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    before = (whole / "report.html").read_bytes()
    assert main(["report", str(whole)]) == 0
    assert (whole / "report.html").read_bytes() != before
    run = run_of(read(WHOLE[0], [*WHOLE[1:], f"folder={whole}"]))
    assert check_of(run) == ""
    assert run.outdated(run.plan()) == []


def test_a_log_of_which_any_byte_changed_tells_what_is_left_of_it(finished: Path, tmp_path: Path) -> None:
    """No digest holds it, since it grows: what a line says of itself is looked at."""
    from lotus.report import compare, html

    stages = run_of(read(WHOLE[0], [*WHOLE[1:], f"folder={finished}"])).stages
    folder, draw = tmp_path / "run", np.random.default_rng(0)
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("data", "*.npz"))
    content = (finished / "log.jsonl").read_bytes()
    lines = [line for line in content.splitlines() if b'"evaluated"' in line or b'"open_macs"' in line][:6]
    deep = b"[" * 100_000
    for _ in range(300):
        struck = bytearray(b"\n".join([*lines, deep]))
        for at in draw.integers(0, len(struck) - len(deep), 3):
            struck[at] ^= 1 << draw.integers(0, 8)
        (folder / "log.jsonl").write_bytes(struck)
        log = list(html.events(folder))
        for stage in stages:
            html.evaluations(log, stage)
            html.last_course(log, stage, "open_macs")
    compare.read(folder, stages)
    html.write(folder, stages)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": lambda path: path.mkdir(),
    "holes": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 42),  # takes no room, and has no end either
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_read_by_no_command(kind: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe would be waited at, a device read for ever."""
    words = [["report", str(whole)], ["doctor", str(whole)], ["compare", str(whole)], ["run", str(whole), "--dry-run"],
             ["run", *WHOLE, f"folder={whole}", "--dry-run"], *[["evaluate", str(whole)]] * (kind == "holes")]  # fmt: skip
    for name in ("stages/train.json", "log.jsonl", "versions.txt", "results.json", "plan.json", "train/spec.json",
                 "finetune/model.safetensors", "subset.npz", "config.yaml", "data/val.json", "search.json"):  # fmt: skip
        file = whole / name
        content = file.read_bytes() if file.exists() else b""
        file.unlink(missing_ok=True)
        KINDS[kind](file)
        model = [["verify", str(file.parent)]] if len(Path(name).parts) > 1 and file.parent.name != "stages" else []
        for each in [*words, *model]:
            assert main(each) in (0, 2), (name, each)
        file.rmdir() if file.is_dir() else file.unlink()
        if content:
            file.write_bytes(content)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("seconds", few([-86_400, 86_400], [86_400]))
def test_a_clock_that_is_set_makes_nothing_again(
    seconds: int, whole: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time
    for file in whole.rglob("*"):
        os.utime(file, (now() + seconds, now() + seconds))
    monkeypatch.setattr(time, "time", lambda: now() - 2 * seconds)
    assert main(["run", *WHOLE, f"folder={whole}"]) == 0
    assert main(["run", *WHOLE, f"folder={whole}", "--from", "report"]) == 0
    for name in ("train", "prune", "finetune", "baseline"):
        stands = json.loads((whole / "stages" / f"{name}.json").read_text())
        assert stands == json.loads((finished / "stages" / f"{name}.json").read_text()), name
