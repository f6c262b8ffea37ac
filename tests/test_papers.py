"""Every published system in configs/papers/ runs end to end, on digits, tiny."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lotus.config import read

ROOT = Path(__file__).resolve().parent.parent
PAPERS = sorted((ROOT / "configs" / "papers").glob("*.yaml"))
TINY = [
    "data={name: digits, write: raw, max_side: 0}", "score.epochs=2", "score.seeds=1", "train.epochs=2", "train.batch_size=64",
    "prune.calibration=128", "export.onnx=false", "export.latency_batch=8",
    "model.args={img_size: 8, patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2}",
]  # fmt: skip
OWN = {
    "lotus_2024": ["prune.soup.steps=5", "finetune.epochs=1"],
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


@pytest.mark.slow
@pytest.mark.parametrize("file", PAPERS, ids=lambda file: file.stem)
def test_a_published_system_runs_end_to_end(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "run"
    own = OWN.get(file.stem, ["finetune.epochs=1"] if read(file).finetune.epochs else [])
    words = [sys.executable, "-m", "lotus", "run", str(file), f"folder={folder}", *TINY, *own]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["final"]["top1"] <= 100
    page = (folder / "report.html").read_text()
    config = read(file, [*TINY, *own])
    if config.prune.keep.weights is not None:
        kept = results["kept"]["weights"]
        assert kept["kept"] == kept["of"] - round((1 - config.prune.keep.weights) * kept["of"]), "the exact rate"
        assert kept["bytes"] < kept["of_bytes"], "zeros compress"
        assert results["final"]["macs"] == results["trained"]["macs"], "no MAC is saved, and none is claimed"
        assert "no MACs and no time are saved" in page
    if config.prune.sweep:
        assert len(results["sweep"]["top1"]) == len(results["sweep"]["sparsity"]) == 19
        assert "Essential sparsity" in page
    if config.train.sparsity.attention is not None:
        assert set(results["attention"]["models"]) == {"start", "trained", "baseline"}
        assert "How peaked attention is" in page
    if file.stem == "lotus_2024":
        rows = {row["stage"]: row["macs"] for row in results["ledger"]["stages"]}
        assert results["ledger"]["lottery_macs"] == sum(rows.values()), "the dense model that was asked is paid for"
        prune = json.loads((folder / "stages" / "prune.json").read_text())["values"]
        assert prune["left"] == sorted(prune["left"], reverse=True)
        assert prune["left"][-1] == 0.7
        assert results["kept"]["tokens"]["kept"] < results["kept"]["tokens"]["of"]
    again = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert not re.search(r"begins", again.stdout), "done, so nothing is done again"
