"""Every benchmark runs from its one command; here at sizes at which its figures mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "train_step.py": ["--tiny"],
    "loader.py": ["--images", "48", "--small-images", "256", "--batch", "16", "--turns", "1"],
    "selection.py": ["herding", "k_center", "--images", "600"],
    "patches.py": ["--tiny"],
    "probes.py": ["--tiny"],
    "latency.py": ["--tiny"],
    "prune_cost.py": ["--tiny"],
    "selection_accuracy.py": [
        "DATA",
        "--out",
        "OUT",
        "--pool",
        "40",
        "--epochs",
        "6",
        "--keep",
        "0.5",
        "--probe",
        "2",
        "--seeds",
        "1",
        "--args",
        '{"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}',
    ],
}
MODES = {"patches.py --accuracy": ["--tiny", "--accuracy"]}
"""What else a benchmark does."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *MODES])
def test_it_runs(name: str, tmp_path: Path) -> None:
    draw, data = np.random.default_rng(0), tmp_path / "data.npz"
    sets = {f"x_{part}": draw.integers(0, 256, (60, 16, 16, 3), np.uint8) for part in ("train", "test")}
    np.savez(data, **sets, y_train=np.arange(60) % 4, y_test=np.arange(60) % 4)
    words = [{"DATA": str(data), "OUT": str(tmp_path / "out")}.get(word, word) for word in {**SMALL, **MODES}[name]]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name.split()[0]), *words],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip()


def test_none_is_forgotten() -> None:
    """The pruner's wants a trained model, which takes longer than a test may."""
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == {*SMALL, "pruning.py"}
