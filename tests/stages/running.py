"""A demo that takes seconds, and the command line in a process of its own: for the tests of whole stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from in_process import ROOT, lotus

DIGITS = str(ROOT / "configs" / "staged.yaml")
# The demo's own config, shortened until it takes seconds: small ViT, few epochs.
SHORT = [
    "model.args.embed_dim=32", "model.args.depth=2", "model.args.num_heads=2", "score.epochs=2", "score.seeds=1",
    "train.epochs=2", "finetune.epochs=1", "prune.calibration=128", "train.batch_size=128", "export.onnx=false",
    "export.latency_batch=8", "train.sparsity={}",
]  # fmt: skip


def struck(words: Sequence[str], sent: int, due: Callable[[], bool]) -> tuple[int, str]:
    """``lotus *words`` in a process that is sent a signal once it is ``due``: its exit code, and what it said."""
    started = subprocess.Popen(
        [sys.executable, "-m", "lotus", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = strike(started, sent, due)
    return started.returncode, said


def strike(started: subprocess.Popen[str], sent: int, due: Callable[[], bool]) -> str:
    """Send a signal to what runs once it is ``due``; returns what it said."""
    try:
        deadline = time.time() + 200
        while not due() and time.time() < deadline:
            assert started.poll() is None, started.communicate()[0]
            time.sleep(0.005)
        started.send_signal(sent)
        return started.communicate(timeout=60)[0]
    finally:
        started.kill()


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    """What :func:`lotus` does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lotus", *words], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def lotus_json(*words: str) -> dict:
    done = lotus(*words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
