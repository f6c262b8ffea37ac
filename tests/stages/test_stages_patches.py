"""Trainings with token pruning, on real digits: what they cost, how they are measured, the patch ticket."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import DIGITS, ROOT, SHORT, lotus, lotus_json

from lotus.cli import main
from lotus.config import read
from lotus.data import patch_maps
from lotus.stages.dry_run import forecast
from lotus.watch import STOPPED

PATCHES = {
    "input": ["train.patches.mode=input", "train.patches.keep=0.7"],
    "asked": [
        "train.patches={mode: input, keep: 0.7, score: attention}",
        "train.augment.crop=pad",
        "train.augment.pad=1",
    ],
    "evit": ["train.patches={mode: evit, keep: 0.7, at: [0, 1], evaluate: sparse}"],
    "drops": ["train.patches={mode: evit, keep: 0.7, fuse: false, ramp: 0.9, warmup: 0.1}"],
    "tome": ["train.patches={mode: tome, keep: 0.7, evaluate: sparse}"],
    "dropout": ["train.patches={mode: dropout, keep: 0.7}"],
    "early": ["train.patches={mode: dropout, keep: 0.7, until: 0.7}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHES)
def test_training_on_patches_counts_what_it_went_through(finished: Path, tmp_path: Path, name: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import lotus as library
    from lotus.vit.tokens import Tokens

    asked = [f"train.patches.model={finished / 'baseline'}"] if name == "asked" else []
    words = [*SHORT, *PATCHES[name], *asked, f"folder={tmp_path}", f"data.folder={finished / 'data'}",
             f"select.ticket={finished / 'subset.npz'}"]  # fmt: skip
    done = lotus("train", DIGITS, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "stages" / "train.json").read_text())
    model = library.load(tmp_path / "train").train().requires_grad_(False)
    for module in model.modules():  # torch's counter does not see fused attention on the CPU
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False

    def counted(reduced: Tokens | None) -> float:
        if reduced is not None and reduced.settings.mode == "input":
            reduced.choose(torch.rand(1, 16))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 8, 8))
        return counter.get_total_flops() / 2

    images, patches = 719, read(DIGITS, words).train.patches
    per_epoch = [128] * 5 + [79]
    dense, total = counted(None), 0.0
    assert sum(per_epoch) == images
    with Tokens(model, patches) as reduced:
        for step, batch in enumerate(per_epoch * 2):
            reduced.schedule(step / 12)
            total += batch * counted(reduced)
    if name == "asked":
        total += 1438 * dense / 3  # the model that was asked is the dense one, a forward an image
        assert len(list((finished / "data").glob("patches-*.npz"))) == 1
    assert record["macs"] == pytest.approx(3 * total)
    assert record["macs"] < 0.97 * 3 * 2 * images * dense + (1438 * dense if name == "asked" else 0)
    assert record["values"]["patches"]["evaluated"] == patches.evaluate
    told = lotus_json("evaluate", DIGITS, *words, "--model", "train", "--json")
    assert told["top1"] == pytest.approx(record["values"]["top1"], abs=1e-6)
    assert (told["macs"] < dense) == (patches.evaluate == "sparse")
    foreseen = lotus("train", DIGITS, *words, "--again", "--dry-run", COLUMNS="200")
    until = " until 0.7" if name == "early" else ""
    assert f"patches: {patches.mode}, keep 0.7{until}, evaluated {patches.evaluate}" in foreseen.stdout
    assert si_of(record["macs"]) in foreseen.stdout or name in ("drops", "asked"), foreseen.stdout


@pytest.mark.slow
@pytest.mark.parametrize("until", [1, 0.5])
def test_a_proxy_on_fewer_patches_is_foreseen(finished: Path, tmp_path: Path, until: float) -> None:
    words = [*SHORT, f"folder={tmp_path}", f"data.folder={finished / 'data'}",
             f"score.patches={{mode: dropout, keep: 0.5, until: {until}}}"]  # fmt: skip
    (told,) = (row for row in forecast(read(DIGITS, words), until="score") if row["stage"] == "score")
    done = lotus("score", DIGITS, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "stages" / "score.json").read_text())
    assert told["macs"] == pytest.approx(record["macs"])
    assert told["image_forwards"] == record["image_forwards"]


def si_of(value: float) -> str:
    from lotus.report.numbers import si

    return si(value)


@pytest.mark.slow
def test_asking_for_patches_is_left_when_it_is_to_stop(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pass through all images, before the training that it is for."""
    shutil.copytree(finished / "data", tmp_path / "data", ignore=shutil.ignore_patterns("patches-*"))
    asked: list[Any] = []
    ranks = patch_maps.ranks

    def first(*given: Any) -> Any:
        asked.append(given)
        signal.raise_signal(signal.SIGTERM)
        return ranks(*given)

    monkeypatch.setattr(patch_maps, "ranks", first)
    words = [*SHORT, "train.patches={mode: input, keep: 0.7, score: contrast, cached: true}", f"folder={tmp_path / 'run'}",
             f"data.folder={tmp_path / 'data'}", f"select.ticket={finished / 'subset.npz'}", "--plain"]  # fmt: skip
    assert main(["train", DIGITS, *words]) == STOPPED
    assert len(asked) == 1
    assert "The same command goes on" in capsys.readouterr().err
    assert not list((tmp_path / "data").glob("patches-*"))


@pytest.mark.slow
def test_a_patch_ticket_alone_and_what_training_makes_of_it(finished: Path, tmp_path: Path) -> None:
    from PIL import Image

    shutil.copytree(finished / "data", tmp_path / "data", ignore=shutil.ignore_patterns("patches-*"))
    made = lotus_json("patches", str(tmp_path / "data"), "--score", "attention", "--model", str(finished / "baseline"),
                      "--keep", "0.5", "--picture", str(tmp_path / "sheet.png"), "--json")  # fmt: skip
    assert made["made"]
    assert (made["images"], made["kept"], made["of"], made["patch"]) == (1438, 8, 16, [2, 2])
    assert 0.5 < made["mass"] <= 1
    assert np.mean(made["mean_map"]) == pytest.approx(0.5, abs=0.01), "ranks"
    assert min(Image.open(tmp_path / "sheet.png").size) > 300
    words = [DIGITS, *SHORT, f"folder={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}",
             f"select.ticket={finished / 'subset.npz'}", "train.augment.flip=true"]  # fmt: skip
    again = lotus_json("patches", *words, "--score", "attention", "--model", str(finished / "baseline"), "--json")
    assert not again["made"]
    assert again["file"] == made["file"]
    done = lotus("train", *words, "train.patches={mode: input, keep: 0.5, score: attention}",
                 f"train.patches.model={finished / 'baseline'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "data").glob("patches-*.npz"))) == 1, "training takes the ticket that was made"
    random = lotus_json("patches", *words, "--score", "random", "--keep", "0.5", "--json")
    assert np.ptp(random["mean_map"]) < 0.1, "any patch alike"
    assert lotus("train", *words, "train.patches={mode: input, keep: 0.5, score: random, cached: true}").returncode == 0
    assert len(list((tmp_path / "data").glob("patches-*.npz"))) == 2, "training takes this one too"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([DIGITS, "--score", "attention"], "Name one that LOTUS wrote with --model FOLDER"),
        ([DIGITS, "--score", "contrst"], "Did you mean 'contrast'?"),
        ([DIGITS, "--score", "edges", "--model", "x"], "asks no model"),
        ([str(ROOT)], "neither a run nor prepared images"),
        ([DIGITS, "--keep", "0"], "lies in (0, 1]"),
        ([DIGITS, "--images", "0"], "--images: at least 1"),
    ],
)
def test_a_patch_ticket_that_cannot_be(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["patches", *words, f"folder={tmp_path / 'run'}"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "refused before anything is made"


@pytest.mark.slow
def test_a_joint_budget_asks_a_proxy_shares_out_and_is_told(finished: Path, tmp_path: Path) -> None:
    words = [DIGITS, *SHORT, f"folder={tmp_path}", f"data.folder={finished / 'data'}", "select.keep=1", "baseline=false",
             "train.batch_size=64", "train.patches={mode: dropout, keep: 0.5, joint: {buckets: 4}}"]  # fmt: skip
    foreseen = lotus("train", *words, "--dry-run", COLUMNS="200")
    assert foreseen.returncode == 0, foreseen.stderr
    assert "score" in foreseen.stdout, "the images are scored, though all of them train"
    done = lotus("train", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "stages" / "train.json").read_text())
    told = record["values"]["patches"]
    assert [one["keep"] for one in told["joint"]] == [4 / 16, 8 / 16, 12 / 16, 1]
    assert sum(one["images"] for one in told["joint"]) == 1438
    spent = sum(16 * one["keep"] * one["images"] for one in told["joint"])
    assert 0.5 * 16 * 1438 - 4 < spent <= 0.5 * 16 * 1438
    assert told["share"] == pytest.approx(spent / (16 * 1438))
    assert "joint budget: " in done.stdout
    assert si_of(record["macs"]) in foreseen.stdout, "foreseen to the patch"
    refused = lotus("train", *words, "score.patches={mode: dropout, keep: 0.5, joint: {}}")
    assert refused.returncode == 2
    assert "known only after this training" in refused.stderr


@pytest.mark.slow
def test_the_report_says_how_it_was_measured(finished: Path, tmp_path: Path) -> None:
    words = [*SHORT, *PATCHES["evit"], "baseline=false", "finetune.epochs=1", f"folder={tmp_path}",
             f"data.folder={finished / 'data'}", f"select.ticket={finished / 'subset.npz'}"]  # fmt: skip
    done = lotus("run", DIGITS, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["evaluated"]["patches"] == "sparse"
    assert results["evaluated"]["macs"] < results["finetune"]["macs"]
    tokens = results["kept"]["tokens"]
    assert tokens["kept"] < tokens["of"] == 17
    assert "evaluated sparse: on" in " ".join(done.stdout.split())
    page = (tmp_path / "report.html").read_text()
    assert "evaluated sparse: on" in page
    assert "by evit at keep 0.7; evaluated sparse" in page
