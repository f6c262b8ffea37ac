"""Every published system in configs/papers/ runs end to end, on digits, tiny."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from in_process import lotus

from lotus import shelves
from lotus.config import Config, read
from lotus.stages import ways

ROOT = Path(__file__).resolve().parents[2]
PAPERS = sorted((ROOT / "configs" / "papers").glob("*.yaml"))
TINY = [
    "data={name: digits, write: raw, max_side: 0}", "score.epochs=2", "score.seeds=1", "train.epochs=2", "train.batch_size=64",
    "prune.calibration=128", "export.onnx=false", "export.latency_batch=8",
    "model.args={img_size: 8, patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2}",
]  # fmt: skip
OWN = {
    "lotus_2024": ["prune.method.steps=5", "finetune.epochs=1"],
    "vtp": ["model.weights=", "finetune.epochs=1"],  # from a dense model: tests/test_papers_vtp.py
    "vtp_proximal": ["model.weights=", "finetune.epochs=1"],
}
"""What else makes one of them tiny."""


@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_a_published_system_names_its_source_and_its_deviations(file: Path) -> None:
    read(file)
    lines = file.read_text().splitlines()
    head = "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert lines[0].startswith(f"# lotus run configs/papers/{file.name}")
    assert "eviation" in head, "named in its first lines"
    assert (ROOT / "docs" / "papers.md").is_file()


def named(stem: str, *overrides: str) -> Config:
    """The config of a system; each override must stand in its first lines as the way to undo a deviation."""
    file = ROOT / "configs" / "papers" / f"{stem}.yaml"
    text = file.read_text()
    for override in overrides:
        assert override in text, f"{stem}: {override} is not named"
    return read(file, list(overrides))


def settings(page: Config) -> Mapping[str, Any]:
    """Of the way to prune."""
    return ways.chosen(page.prune, shelves.installed())[1]


def test_spvit_is_as_published() -> None:
    page = named("spvit")
    search, tune = settings(page), page.finetune
    assert (search["epochs"], search["lr"], search["strength"]) == (10, 5e-5, 30)
    assert (tune.distill, tune.teacher_weight, tune.min_lr) == ("hard", 0.5, 1e-5)
    assert (page.train.mixup, page.train.cutmix, tune.mixup, tune.cutmix) == (0, 0, 0, 0), "a named deviation"
    assert tune.lr == pytest.approx(1e-3 / 3), "a named deviation"
    whole = named("spvit", "prune.method.gate_lr=1e-3", "prune.method.lr=1.25e-5", "finetune.lr=5e-5", "train.mixup=0.8",
                  "train.cutmix=1")  # fmt: skip
    assert settings(whole)["gate_lr"] == 1e-3
    assert settings(whole)["lr"] == 5e-5 * whole.train.batch_size / 512
    assert (whole.finetune.lr, whole.finetune.min_lr) == (5e-5, 1e-5)
    assert (whole.finetune.mixup, whole.finetune.cutmix) == (0.8, 1), "the recipe is handed on"


def test_sparse_vit_is_as_published() -> None:
    page = named("sparse_vit")
    train, (attention,) = page.train, page.train.guests
    assert attention.name == "attention_penalty"
    assert tuple(attention.options[name] for name in ("kind", "strength", "layers")) == ("log", 0.01, "last")
    assert (train.epochs, train.batch_size, train.optimizer, train.schedule.name, train.lr) == (
        20,
        16,
        "momentum",
        "onecycle",
        1e-3,
    )
    assert round(train.warmup_epochs * 3125) == 500, "rising steps"
    assert (train.weight_decay, train.augment.flip, train.augment.crop) == (1e-4, True, "none")
    assert (page.prune.keep.weights, settings(page)["weights"], page.finetune.epochs) == (0.9, "sparse_vit", 0)
    head = (ROOT / "configs" / "papers" / "sparse_vit.yaml").read_text()
    assert "Faithful" in head
    assert "normalize to 0.5" not in head


def test_the_ratios_are_searched_as_published() -> None:
    page = named(
        "auto_ratio",
        "prune.criterion=magnitude",
        "prune.rotate=false",
        "prune.compensate=none",
        "prune.search.metric=agreement",
    )
    search = page.prune.search
    assert search is not None
    assert (search.kind, search.metric, page.prune.criterion.name, page.prune.compensate) == (
        "ratios",
        "agreement",
        "magnitude",
        "none",
    )
    assert search.rounds > 1
    assert search.grid
    assert search.recovery
    assert search.compare is not None
    assert search.compare.name == "cp_vit"
    assert min(search.compare.options["keep"]) < 0.5 < max(search.compare.options["keep"])


def test_lotus_2024_is_as_published() -> None:
    page = named("lotus_2024")
    assert page.train.patches is not None
    assert (page.train.patches.mode, page.train.patches.keep) == ("input", 0.9)
    assert (page.prune.method.name, page.prune.keep.weights, settings(page)["sweep"]) == ("soup", 0.7, True)
    assert settings(page)["step"] == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_a_published_system_runs_end_to_end(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "run"
    own = OWN.get(file.stem, ["finetune.epochs=1"] if read(file).finetune.epochs else [])
    words = ["run", str(file), f"folder={folder}", *TINY, *own]
    done = lotus(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["finetune"]["top1"] <= 100
    page = (folder / "report.html").read_text()
    config = read(file, [*TINY, *own])
    if config.prune.keep.weights is not None:
        kept = results["kept"]["weights"]
        assert kept["kept"] == kept["of"] - round((1 - config.prune.keep.weights) * kept["of"]), "the exact rate"
        assert kept["bytes"] < kept["of_bytes"], "zeros compress"
        assert results["finetune"]["macs"] == results["train"]["macs"], "no MAC is saved, and none is claimed"
        assert "no MACs and no time are saved" in page
    if config.prune.method.options.get("sweep"):
        assert len(results["prune"]["sweep"]["top1"]) == len(results["prune"]["sweep"]["sparsity"]) == 19
        assert "Essential sparsity" in page
    if config.train.guests:
        assert set(results["attention"]["models"]) == {"start", "train", "baseline"}
        assert "How peaked attention is" in page
    if file.stem == "lotus_2024":
        rows = {row["stage"]: row["macs"] for row in results["ledger"]["stages"]}
        assert results["ledger"]["lottery_macs"] == sum(rows.values()), "the dense model that was asked is paid for"
        prune = json.loads((folder / "stages" / "prune.json").read_text())["values"]
        assert prune["left"] == sorted(prune["left"], reverse=True)
        assert prune["left"][-1] == 0.7
        assert results["kept"]["tokens"]["kept"] < results["kept"]["tokens"]["of"]
    again = lotus(*words)
    assert again.returncode == 0, again.stderr
    assert not re.search(r"begins", again.stdout), "done, so nothing is done again"
