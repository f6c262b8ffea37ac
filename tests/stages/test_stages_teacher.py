"""A teacher of a training: found, held to the data's classes before anything is done, shown images its own way, and billed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from running import DIGITS, SHORT, lotus

from lotus import save
from lotus.cli import main
from lotus.config import Config, Finetune, Teacher, Train, read
from lotus.stage import of
from lotus.stages import baseline, run_of, teacher
from lotus.stages.dry_run import forecast
from lotus.stages.train import STAGE
from lotus.vit import cost
from lotus.vit.model import create
from selection.errors import Refused

TEN = tuple(str(digit) for digit in range(10))
CNN = "test_resnet"
"""A small CNN of timm's."""


def cnn(path: Path, classes: int = 10) -> Path:
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model(CNN, num_classes=classes).state_dict(), path)
    return path


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def words(finished: Path) -> list[str]:
    """A run on the images and the ticket of the short one, up to its training."""
    return [f"data.folder={finished / 'data'}", f"select.ticket={finished / 'subset.npz'}", *SHORT, "train.epochs=1",
            "train.sparsity.gates=false", "baseline=false"]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ who it is


def test_a_cnn_of_ones_own_teaches_and_is_as_it_was_saved(tmp_path: Path) -> None:
    file = cnn(tmp_path / "cnn.safetensors")
    model, pixels = teacher.load(Teacher(name=CNN, weights=str(file)), TEN, "train")
    images = torch.rand(3, 3, 64, 64)
    same = timm.create_model(CNN, num_classes=10)
    same.load_state_dict(safetensors.torch.load_file(file))
    assert torch.equal(model.eval()(images), same.eval()(images))
    assert list(pixels.mean) == list(timm.get_pretrained_cfg(CNN).mean)


@pytest.mark.slow
def test_a_folder_of_lotus_teaches_a_cut_one_too_and_says_how_it_wants_its_images(finished: Path) -> None:
    names = json.loads((finished / "finetune" / "spec.json").read_text())["about"]["classes"]
    for name in ("baseline", "finetune"):
        model, pixels = teacher.load(Teacher(weights=str(finished / name)), names, "train")
        about = json.loads((finished / name / "spec.json").read_text())["about"]
        assert list(pixels.mean) == about["mean"]
        assert cost.count(model).macs == results(finished)[name]["macs"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("nowhere/model.pth", "train.teacher: there is nothing at nowhere/model.pth."),
        ("resnt18", "train.teacher.name: timm has no model 'resnt18'. Did you mean 'resnet18'?"),
        (
            "resnet18.a1_in1k",
            "train.teacher: resnet18.a1_in1k tells 1000 classes apart, the data has 10. Take a teacher",
        ),
        ("vit_tiny_patch16_224.augreg_in21k", "tells 21843 classes apart, the data has 10"),
        ("{name: test_resnet, weights: CNN7}", "cnn.safetensors tells 7 classes apart, the data has 10"),
        ("CNN7", "does not say which model it is of. Say {name: NAME, weights: "),
        ("{name: vit_tiny_patch16_224, weights: CNN10}", "has no classifier where vit_tiny_patch16_224 has one"),
        ("FOLDER", "knows other classes than the data, or in another order: 'nine' where the data has '9'"),
        ("{name: test_resnet, weights: CNN10, args: {depth: 3}}", "train.teacher.args.depth"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, says: str
) -> None:
    for name, classes in (("CNN7", 7), ("CNN10", 10)):
        if name in asked:
            asked = asked.replace(name, str(cnn(tmp_path / "cnn.safetensors", classes)))
    if asked == "FOLDER":
        asked = str(tmp_path / "model")
        about = {"classes": [*TEN[:9], "nine"], "mean": [0.5] * 3, "std": [0.25] * 3}
        save(create(read(DIGITS, SHORT).model, 10), asked, about=about)
    folder = tmp_path / "run"
    assert main(["run", DIGITS, f"folder={folder}", f"train.teacher={asked}"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (folder / "data").exists()


def test_the_fine_tunes_teacher_is_checked_where_it_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", DIGITS, f"folder={tmp_path / 'run'}", "finetune.teacher=resnet18.a1_in1k"]
    assert main(words) == 2
    assert "finetune.teacher: resnet18.a1_in1k tells 1000 classes apart" in " ".join(capsys.readouterr().err.split())
    assert main([*words, "finetune.epochs=0", "--dry-run"]) == 0


def test_who_teaches_by_default() -> None:
    config = read(None, [])
    assert (config.train.taught_by, config.finetune.taught_by) == (None, Teacher(name="uncut"))
    assert read(None, ["finetune.teacher=none"]).finetune.taught_by is None
    assert read(None, ["train.teacher=resnet18", "train.teacher_weight=0"]).train.taught_by is None
    assert read(None, ["train.teacher=resnet18"]).finetune.teacher == Finetune().teacher, "it is not inherited"
    shrunk = read(None, ["train.shrink={}", "finetune.epochs=2", "finetune.teacher=resnet18"])
    assert shrunk.finetune.taught_by == Teacher(name="resnet18")
    assert Config().key("train") == Config(train=Train(teacher="none")).key("train")


# ------------------------------------------------------------------------------------------------ what it costs


@pytest.mark.slow
def test_the_ledger_bills_a_cnn_by_what_torch_counts(tmp_path: Path, words: list[str]) -> None:
    file = cnn(tmp_path / "cnn.safetensors")
    folder = tmp_path / "run"
    asked = [*words, f"folder={folder}", f"train.teacher={{name: {CNN}, weights: {file}}}", "train.epochs=2"]
    told = {row["stage"]: row for row in forecast(read(DIGITS, asked))}["train"]
    done = lotus("train", DIGITS, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"taught by {file}" in of(STAGE.says, read(DIGITS, asked))
    record = json.loads((folder / "stages" / "train.json").read_text())
    n, own = record["values"]["images_seen"], record["values"]["macs"]
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        timm.create_model(CNN, num_classes=10).eval()(torch.zeros(1, 3, 8, 8))
    theirs = counter.get_total_flops() // 2
    assert record["image_forwards"] == 4 * n
    assert record["macs"] == pytest.approx(n * (3 * own + theirs), rel=1e-9)
    assert told["macs"] == pytest.approx(record["macs"], rel=1e-3)
    cnn(file, 10)  # written again, the same: it stands
    assert run_of(read(DIGITS, asked)).why("train") is None
    safetensors.torch.save_file(timm.create_model(CNN, num_classes=10).state_dict(), file)
    assert run_of(read(DIGITS, asked)).why("train") == "the file in train.teacher was changed"


@pytest.mark.slow
def test_the_uncut_model_teaches_and_is_billed_after_the_cut_alone(tmp_path: Path, words: list[str]) -> None:
    folder = tmp_path / "run"
    asked = [*words, f"folder={folder}", "train.epochs=4", "train.shrink={at: 0.25, evaluate: false}", "prune.keep.macs=0.35",
             "train.teacher=uncut"]  # fmt: skip
    told = {row["stage"]: row for row in forecast(read(DIGITS, asked))}["train"]
    done = lotus("train", DIGITS, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "stages" / "train.json").read_text())
    (cut,) = record["values"]["cuts"]
    dense, small, n = cut["before"]["macs"], cut["after"]["macs"], record["values"]["images_seen"]
    before = n // 4  # an epoch, as 6 steps are
    assert record["image_forwards"] == 3 * n + 4 * 128 + (n - before)
    trained = 3 * (before * dense + (n - before) * small) + (n - before) * dense
    assert record["macs"] == pytest.approx(trained + 4 * 128 * dense, rel=1e-9)
    assert told["macs"] == pytest.approx(record["macs"], rel=0.03)


@pytest.mark.slow
def test_the_baseline_has_the_teacher_that_is_part_of_the_recipe(tmp_path: Path, finished: Path) -> None:
    def why(*more: str) -> str | None:
        asked = [*SHORT, f"folder={finished}", *more]
        return {row["stage"]: row for row in forecast(read(DIGITS, asked))}["baseline"]["why"]

    file = cnn(tmp_path / "cnn.safetensors")
    assert why() is None
    assert why("train.teacher=uncut", "train.shrink={}") is None, "the cut's own teacher is no part of it"
    assert "train.teacher" in str(why(f"train.teacher={{name: {CNN}, weights: {file}}}"))
    taught, alone = (read(DIGITS, words) for words in ([f"train.teacher={{name: {CNN}, weights: {file}}}"], []))
    left = {"kind": "best", "epochs": taught.train.epochs, "taught": baseline.teaching(taught)}
    assert baseline.STAGE.stale(taught, left) is None
    assert "-> none" in str(baseline.STAGE.stale(alone, left)), "one that was taught does not stand for one that is not"


def test_the_place_is_named() -> None:
    with pytest.raises(Refused, match=r"^finetune\.teacher: resnet18 .*1000 classes"):
        teacher.load(Teacher(name="resnet18"), TEN, "finetune")
