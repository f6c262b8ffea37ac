"""A whole run, end to end, on real digits: what it leaves, when it is done, what a dry run tells."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from running import DIGITS, SHORT, alone, lotus, lotus_json

from lotus.config import read
from lotus.events import Began, Said
from lotus.stages import go
from lotus.stages.dry_run import forecast


@pytest.mark.slow
def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    for name in ("data/train.beton", "data/val.beton", "signals.npz", "subset.npz", "train/spec.json",
                 "prune/spec.json", "finetune/model.safetensors", "results.json", "report.html", "log.jsonl",
                 "config.yaml", "versions.txt"):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    assert not list(finished.rglob("*.tmp"))
    assert not [path for path in (finished / "checkpoints").rglob("*") if path.is_file()], "gone when a stage is done"


@pytest.mark.slow
def test_the_results_add_up(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["kept"]["images"] == {"kept": round(0.5 * 1438), "of": 1438}
    for name in ("baseline", "finetune"):
        assert {"top1", "loss", "params", "macs", "images_seen", "train_seconds", "latency_ms"} <= set(results[name])
    assert results["finetune"]["macs"] <= 0.5 * results["baseline"]["macs"]
    assert results["finetune"]["macs"] > 0.35 * results["baseline"]["macs"], "hit, not overshot"
    assert results["baseline"]["images_seen"] == 2 * 1438, "nothing is dropped from an epoch"
    stages = {row["stage"]: row for row in results["ledger"]["stages"]}
    assert stages["baseline"]["image_forwards"] == 3 * 2 * 1438
    assert stages["score"]["image_forwards"] == 3 * 2 * 1438 + 1438


@pytest.mark.slow
def test_the_shipped_model_is_what_the_report_says(finished: Path) -> None:
    import torch

    import lotus
    from lotus.vit.cost import count

    model = lotus.load(finished / "finetune")
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    results = json.loads((finished / "results.json").read_text())
    assert count(model).params == sum(p.numel() for p in model.parameters()) == results["finetune"]["params"]
    told = lotus_json("evaluate", DIGITS, f"folder={finished}", *SHORT, "--json")
    assert told["top1"] == pytest.approx(results["finetune"]["top1"], abs=1e-6)
    assert told["outdated"] is False
    assert lotus_json("evaluate", str(finished), "--json") == told, "a run's folder says it all"


@pytest.mark.slow
def test_what_is_told_of_each_class_sums_up_to_the_whole(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    shipped, told = results["finetune"], results["accuracy"]
    right, of = (sum(row[name] for row in told["classes"]) for name in ("right", "of"))
    assert of == results["validation_images"]
    assert shipped["top1"] == pytest.approx(100 * right / of)
    each = [100 * row["right"] / row["of"] for row in told["classes"]]
    assert told["macro"] == pytest.approx(sum(each) / 10)
    assert [row["class"] for row in told["classes"]] == list("0123456789")
    dense = results["baseline"]["per_class"]
    assert told["dense_macro"] == pytest.approx(
        sum(100 * r / n for r, n in zip(dense["right"], dense["of"], strict=True)) / 10
    )
    page = (finished / "report.html").read_text()
    assert "Class by class" in page
    assert "Macro average of the classes" in page


@pytest.mark.slow
def test_a_training_on_balanced_classes(finished: Path, tmp_path: Path) -> None:
    """A fifth of the data, so that quick; the steps are as many as without."""
    words = [*SHORT, "select.keep=0.2", "select.balance=sqrt", "baseline=false", f"folder={tmp_path / 'run'}"]
    done = lotus("run", DIGITS, *words, "train.balance=equal")
    assert done.returncode == 0, done.stderr
    assert "validates on digits" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    whole = json.loads((finished / "results.json").read_text())
    kept = results["kept"]["images"]["kept"]
    assert kept == round(0.2 * results["kept"]["images"]["of"])
    assert results["train"]["images_seen"] == 2 * kept
    assert whole["train"]["images_seen"] == 2 * whole["kept"]["images"]["kept"]


@pytest.mark.slow
def test_where_everything_stays_nothing_is_looked_at(finished: Path, tmp_path: Path) -> None:
    """A plain fine-tune was billed for a calibration that chose nothing."""
    words = [f"data.folder={finished / 'data'}", *SHORT, "train.epochs=1", "select.keep=1", "prune.keep.macs=1"]
    row = next(row for row in forecast(read(DIGITS, words)) if row["stage"] == "prune")
    assert not row["image_forwards"]
    done = lotus("prune", DIGITS, f"folder={tmp_path}", *words)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "stages" / "prune.json").read_text())
    assert (record["image_forwards"], record["macs"]) == (0, 0)
    weights = [(tmp_path / stage / "model.safetensors").read_bytes() for stage in ("train", "prune")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_second_run_does_nothing_and_is_quick(finished: Path) -> None:
    before, began = os.times(), time.perf_counter()
    done = alone("run", DIGITS, f"folder={finished}", *SHORT)
    assert done.returncode == 0, done.stderr
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3
    assert time.perf_counter() - began < 30, "and waits for nothing, however busy the machine is"
    assert "report.html" in done.stdout


@pytest.mark.slow
def test_a_dry_run_names_what_would_run_and_writes_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    done = lotus("run", DIGITS, f"folder={finished}", *SHORT, "prune.keep.macs=0.6", "--dry-run", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "0.5 -> 0.6" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_a_dry_run_counts_every_width_that_a_search_tries():
    told = {}
    for width in ("auto", "search", "0.75"):
        rows = forecast(read(Path(DIGITS), [f"prune.embed_dim={width}", "folder=none"]))
        told[width] = next(row["image_forwards"] for row in rows if row["stage"] == "prune")
    images = read(Path(DIGITS)).prune.calibration
    assert told["0.75"] == told["auto"] + images, "it looks at the stream once more"
    assert told["search"] == 6 * told["auto"] + images + 6 * 2 * images, "and compares each with the model"


@pytest.mark.slow
@pytest.mark.parametrize("asked", [["--again"], ["--from", "select"], []])
def test_what_is_refused_leaves_a_finished_run_as_it_is(finished: Path, asked: list[str]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    done = lotus("run", DIGITS, f"folder={finished}", *SHORT, *asked, "prune.keep.macs=0.001")
    assert done.returncode == 2
    assert "out of reach" in done.stderr
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_data_that_went_are_written_again(finished: Path, tmp_path: Path) -> None:
    words = ["prepare", DIGITS, f"folder={tmp_path / 'run'}", *SHORT]
    assert lotus(*words).returncode == 0
    beton = tmp_path / "run" / "data" / "train.beton"
    whole = beton.read_bytes()
    for damage in (beton.unlink, lambda: beton.write_bytes(whole[:-200])):
        damage()
        done = lotus(*words)
        assert done.returncode == 0, done.stderr
        assert beton.stat().st_size == len(whole)


@pytest.mark.slow
def test_nan_in_the_loss_names_step_and_rate(finished: Path, tmp_path: Path) -> None:
    done = lotus("train", DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT,
                 f"select.ticket={finished / 'subset.npz'}", "train.lr=1e30", "train.clip=0")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "step" in done.stderr
    assert "train.lr" in done.stderr or "learning rate" in done.stderr
    assert not (tmp_path / "run" / "train").exists()


@pytest.mark.slow
def test_zeros_by_a_pattern_and_by_size_after_one_training(finished: Path, tmp_path: Path) -> None:
    import lotus as api
    from lotus.papers.zeros import masks as unstructured

    words = [DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT,
             f"select.ticket={finished / 'subset.npz'}", "train.sparsity.gates=false"]  # fmt: skip
    done = lotus("prune", *words, "prune={method: {name: unstructured, pattern: '2:4'}, keep: {weights: 0.5}}")
    assert done.returncode == 0, done.stdout + done.stderr
    model = api.load(tmp_path / "run" / "prune")
    for name, mask in unstructured.zeros(model).items():
        assert (mask.view(-1, 4).sum(1) == 2).all(), name
    assert "as many MACs as before" in done.stdout
    # another budget is drawn from the training that stands, and is held through the fine-tune
    words.append("prune={method: unstructured, keep: {weights: 0.25}}")
    done = lotus("run", *words, "baseline=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train     begins" not in done.stdout
    stays, of = unstructured.counted(unstructured.zeros(api.load(tmp_path / "run" / "finetune")))
    assert stays == unstructured.kept_of(0.25, of)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["kept"]["weights"]["kept"] == stays
    assert results["finetune"]["macs"] == results["train"]["macs"]
    told = lotus_json("evaluate", *words, "--json")
    assert told["top1"] == pytest.approx(results["finetune"]["top1"], abs=1e-6)
    for change, says in (
        ("train.sparsity.gates=true", "Set train.sparsity.gates=false"),
        ("finetune.optimizer=muon", "moves weights that were pruned"),
        (
            "prune={method: {name: unstructured, weights: sparse_vit, pattern: '2:4'}, keep: {weights: 0.5}}",
            "do not divide by 4",
        ),
        ("score.patches={mode: input, score: attention, model: baseline}", "the proxy comes before the baseline"),
    ):
        refused = lotus("run", *words, change)
        assert refused.returncode == 2, refused.stdout
        assert says in refused.stderr


def test_a_folder_of_an_older_lotus_runs_again_and_its_models_stay(tmp_path: Path) -> None:
    for name in ("trained", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text("{}")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "prepare.json").write_text('{"format": 1, "stage": "prepare"}')
    config = read(Path(DIGITS), [f"folder={tmp_path}"])
    said = [event for event in go(config, until="prepare") if isinstance(event, Said)]
    assert [event.level for event in said] == ["warning", "info"]
    assert said[1].text.startswith("validates on digits")
    assert "its stages run again. The models in final/, trained/ stay as they are." in said[0].text
    assert (tmp_path / "trained" / "spec.json").exists()
    assert [event for event in go(config, until="prepare") if isinstance(event, (Said, Began))] == []
