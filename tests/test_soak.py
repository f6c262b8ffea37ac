"""A few kills in every test run; `make soak` has more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.soak import left_in_shared_memory, shared_memory

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


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="a system without /dev/shm")
def test_what_nobody_holds_is_left_and_what_another_holds_is_not() -> None:
    before, name = shared_memory(), f"lotus-test-{os.getpid()}"
    holds = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    file = Path("/dev/shm", name)
    file.write_bytes(bytes(4096))
    try:
        assert name in left_in_shared_memory(before, wait=0)
        with subprocess.Popen(
            [sys.executable, "-c", holds, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            assert name not in left_in_shared_memory(before, wait=0)
            other.communicate(b"\n")
        assert name in left_in_shared_memory(before, wait=0)
    finally:
        file.unlink()
