"""Every benchmark runs from its one command; here at sizes at which its figures mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "train_step.py": ["--tiny"],
    "loader.py": ["--images", "48", "--small-images", "256", "--batch", "16", "--turns", "1"],
    "selection.py": ["herding", "k_center", "--images", "600"],
    "patches.py": ["--tiny"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *SMALL[name]],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip()


def test_none_is_forgotten() -> None:
    """The pruner's wants a trained model, which takes longer than a test may."""
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == {*SMALL, "pruning.py"}
