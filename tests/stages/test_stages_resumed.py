"""A training that is stopped and taken up again, or that two ranks do, ends where one that was not does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import free_port
from running import DIGITS, ROOT, SHORT, lotus


@pytest.fixture(scope="module")
def words(finished: Path) -> list[str]:
    """A training on the ticket of the short run: scoring again would only take time."""
    return ["train", DIGITS, f"data.folder={finished / 'data'}", *SHORT, "train.epochs=4", "train.save_minutes=0.001",
            f"select.ticket={finished / 'subset.npz'}"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert lotus(*words, f"folder={folder}").returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(
    whole: Path, words: list[str], tmp_path: Path, sent: int
) -> None:
    broken = tmp_path / "broken"
    started = subprocess.Popen(
        [sys.executable, "-m", "lotus", *words, f"folder={broken}"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not list((broken / "checkpoints").rglob("manifest.json")) and time.time() < deadline:
        assert started.poll() is None, started.stdout.read()  # type: ignore[union-attr]
        time.sleep(0.02)
    started.send_signal(sent)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == (-9 if sent == signal.SIGKILL else 75), said
    again = lotus(*words, f"folder={broken}")
    assert again.returncode == 0, again.stderr
    assert (whole / "train" / "model.safetensors").read_bytes() == (broken / "train" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["torchrun", "--nproc_per_node=2"], ["deepspeed", "--num_gpus=2"]])
def test_two_ranks_train_what_one_trains(finished: Path, tmp_path: Path, launcher: list[str]) -> None:
    from safetensors.numpy import load_file

    alike = [DIGITS, f"data.folder={finished / 'data'}", *SHORT, f"select.ticket={finished / 'subset.npz'}",
             "train.mixup=0", "train.cutmix=0"]  # each rank mixes among its own images  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert lotus("train", *alike, f"folder={one}").returncode == 0
    command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:]]
    command += ["--master_port", str(free_port()), "tools/train.py", *alike, f"folder={two}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
             "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    a, b = (load_file(folder / "train" / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-3, err_msg=name)
