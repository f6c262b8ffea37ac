"""A few kills in every test run; `make soak` has more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_are_killed_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools" / "soak.py"), "--kills", "20", "--out", str(tmp_path)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit" in done.stdout
