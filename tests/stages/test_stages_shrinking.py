"""A run whose training shrinks: what it leaves, bills, forecasts and tells; and what is refused before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import DIGITS, SHORT, lotus

from lotus.cli import main
from lotus.config import read
from lotus.stages.dry_run import forecast

OWN = [*SHORT, "train.epochs=4", "finetune.epochs=0", "train.shrink.at=0.25", "prune.keep.macs=0.35"]


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "shrunk"
    words = [f"data.folder={finished / 'data'}", f"select.ticket={finished / 'subset.npz'}"]
    done = lotus("run", DIGITS, f"folder={folder}", *words, *OWN)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if "cut after step 6, in epoch 1" in line]
    assert len(said) == 1
    assert "of the dense model's MACs stay" in said[0]
    return folder


@pytest.mark.slow
def test_what_ships_is_what_was_cut_in_the_training(shrunk: Path) -> None:
    results = json.loads((shrunk / "results.json").read_text())
    (cut,) = results["train"]["cuts"]
    assert cut["step"] == 6
    dense, small = cut["before"]["macs"], cut["after"]["macs"]
    assert 0.3 * dense < small <= 0.35 * dense
    assert results["baseline"]["macs"] == results["train"]["uncut"]["macs"] == dense
    for name in ("train", "prune", "finetune"):
        assert results[name]["macs"] == small
        assert results[name]["top1"] == results["train"]["top1"]
    weights = [(shrunk / name / "model.safetensors").read_bytes() for name in ("train", "prune", "finetune")]
    assert weights[0] == weights[1] == weights[2]
    assert results["kept"]["dimensions"]["macs"] == small / dense
    assert sum(block["of_hidden"] for block in results["kept"]["blocks"]) == 2 * 128
    assert [section["title"] for section in results["sections"]] == ["Cut in the training", "Class by class"]


@pytest.mark.slow
def test_the_ledger_bills_the_cut(shrunk: Path) -> None:
    results = json.loads((shrunk / "results.json").read_text())
    rows = {row["stage"]: row for row in results["ledger"]["stages"]}
    (cut,) = results["train"]["cuts"]
    dense, small, n, val = cut["before"]["macs"], cut["after"]["macs"], 719, 359
    before = 6 * 128 - (6 * 128 - n)  # an epoch of 719 images is six steps
    assert rows["train"]["image_forwards"] == 3 * 4 * n + 4 * 128 + 2 * val
    trained = 3 * (before * dense + (4 * n - before) * small)
    assert rows["train"]["macs"] == pytest.approx(trained + (4 * 128 + val) * dense + val * small, rel=1e-9)
    assert rows["prune"]["macs"] == rows["finetune"]["macs"] == 0
    assert results["ledger"]["lottery_macs"] == pytest.approx(rows["train"]["macs"])


@pytest.mark.slow
def test_it_was_forecast(shrunk: Path) -> None:
    config = read(shrunk / "config.yaml")
    told = {row["stage"]: row for row in forecast(config)}
    rows = {row["stage"]: row for row in json.loads((shrunk / "results.json").read_text())["ledger"]["stages"]}
    assert told["train"]["why"] is None
    for name in ("train", "prune", "finetune"):
        assert told[name]["macs"] == pytest.approx(rows[name]["macs"], rel=0.05)
        assert told[name]["image_forwards"] == pytest.approx(rows[name]["image_forwards"], rel=0.01)


@pytest.mark.slow
def test_a_fine_tune_may_follow_and_prune_settings_make_it_train_again(shrunk: Path, finished: Path) -> None:
    words = [f"data.folder={finished / 'data'}", f"select.ticket={finished / 'subset.npz'}", f"folder={shrunk}", *OWN]
    again = lotus("train", DIGITS, "--dry-run", *words, "prune.keep.macs=0.5")
    assert "prune.keep.macs" in again.stdout
    tuned = lotus("finetune", DIGITS, *words, "finetune.epochs=1", "finetune.lr=0.001")
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr


def test_what_is_not_set_follows() -> None:
    config = read(None, ["train.shrink={}"])
    assert (config.train.sparsity.gates, config.finetune.epochs, config.finetune.distill) == (False, 0, "none")
    assert read(None, ["train.shrink={}", "finetune.epochs=3"]).finetune.epochs == 3
    plain = read(None, [])
    assert (plain.train.shrink, plain.train.sparsity.gates, plain.finetune.epochs) == (None, False, 10)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.shrink.at=0"], "train.shrink.at"),
        (["train.shrink.at=1"], "train.shrink.at"),
        (["train.shrink.at=0.999"], "train.shrink.at: after 0.999 of 690 steps nothing is left to train"),
        (  # both are due at step 689, and one is made after each
            ["train.shrink.steps=[{at: 0.998, keep: {macs: 0.8}}, {at: 0.9984}]"],
            "train.shrink.steps.1.at: after 0.9984 of 690 steps nothing is left to train",
        ),
        (
            ["train.shrink={until_stable: {epochs: 3}, at: 0.1}"],
            "at 0.1 of 30, comes before one could have settled. Set train.shrink.at=0.14, or train.epochs=40.",
        ),
        (["train.shrink={until_stable: {epochs: 40}, at: 0.5}"], "could have settled. Set train.epochs=82."),
        (["train.shrink=false"], "train.shrink: a section, not False. Say train.shrink=null for none."),
        (["train.patches=0.5"], "train.patches: a section, not 0.5. Say train.patches.keep=0.5."),
        (["train.sides=[0, 4]"], "train.sides.0: a list, not 0. docs/settings.md has an example."),
        (["train.sides=[[0, 4], [0.97, 8]]"], "train.sides: a side is an epoch's, and none of 30 begins at 0.97"),
        (["train.shrink={}", "train.ema=0.9", "train.zero=3"], "train.ema: under ZeRO 3"),
        (["train.guests=[late_average]", "train.zero=3"], "train.guests: late_average: under ZeRO 3"),
        (["train.guests=[late_average]", "train.deepspeed=ZERO3"], "train.guests: late_average: under ZeRO 3"),
        (["train.shrink={}", "train.guests=[{name: hardest, keep: 0}]"], "train.guests.hardest.keep"),
        (["train.shrink={}", "train.schedule={name: wsd, decay: 2}"], "train.schedule.decay"),
        (["train.shrink.att=0.2"], "train.shrink.att: no such setting. Did you mean 'at'?"),
        (["train.shrink={}", "prune.keep.macs=1"], "Say how much stays, e.g. prune.keep.macs=0.35"),
        (["train.shrink={}", "prune.keep={}"], "prune.keep: say macs, params or latency"),
        (["train.shrink={}", "prune.keep.macs=0.001"], "0.001"),
        (
            ["train.shrink.steps=[{at: 0.1, keep: {macs: 0.01}}, {at: 0.2}]", "prune.keep.macs=0.005"],
            "prune.keep.macs: 0.01 is out of reach",
        ),
        (["train.shrink.steps=[{at: 0.1, keep: {macs: 0.5}}, {at: 0.2}]"], "each cut keeps less than the one before"),
        (["train.shrink.steps=[{at: 0.1, keep: {params: 0.7}}, {at: 0.2}]"], "in the measures of prune.keep"),
        (["train.shrink={}", "prune.search={kind: ratios}"], "prune.search: works on a model that is cut after"),
        (["train.shrink={}", "finetune.distill=soft"], "finetune.distill: the model before the cut"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    words = [word.replace("ZERO3", str(tmp_path / "zero3.json")) for word in words]
    assert main(["run", DIGITS, f"folder={tmp_path / 'run'}", "train.sparsity={}", *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "data").exists()
