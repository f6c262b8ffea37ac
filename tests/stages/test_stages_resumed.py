"""A training that is stopped and taken up again, or that two ranks do, ends where one that was not does."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from ranks import free_port, heard, launched
from running import DIGITS, SHORT, lotus, struck

from selection.signals import Signals
from selection.subset import Subset


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
    code, said = struck(
        [*words, f"folder={broken}"], sent, lambda: any((broken / "checkpoints").rglob("manifest.json"))
    )
    assert code == (-9 if sent == signal.SIGKILL else 75), said
    again = lotus(*words, f"folder={broken}")
    assert again.returncode == 0, again.stderr
    assert (whole / "train" / "model.safetensors").read_bytes() == (broken / "train" / "model.safetensors").read_bytes()


def ends_well(launcher: str, *words: str) -> None:
    """Two processes of a launcher."""
    started = launched(launcher, f"--master_port={free_port()}", *words)
    (said,) = heard([started])
    assert started.returncode == 0, said[-3000:]


def same_weights(one: Path, two: Path, far: float) -> None:
    from safetensors.numpy import load_file

    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=far, err_msg=name)


@pytest.mark.slow
def test_two_ranks_run_what_one_runs(finished: Path, tmp_path: Path) -> None:
    """Scored, drawn, trained with mixup and CutMix, calibrated, cut and fine-tuned by two: as by one, within rounding."""
    words = [DIGITS, f"data.folder={finished / 'data'}", f"folder={tmp_path}", *SHORT]
    ends_well("torchrun", "--nproc_per_node=2", "tools/run.py", *words)
    told, known = (Signals.load(folder / "signals.npz") for folder in (tmp_path, finished))
    for name in known.recorded:
        np.testing.assert_allclose(told[name], known[name], atol=5e-3, err_msg=name)
    ticket, expected = (Subset.load(folder / "subset.npz") for folder in (tmp_path, finished))
    assert ticket.rows.tolist() == expected.rows.tolist()
    same_weights(tmp_path / "train", finished / "train", 1e-2)
    for stage in ("prune", "finetune"):
        cut, wanted = (json.loads((folder / stage / "spec.json").read_text()) for folder in (tmp_path, finished))
        assert cut["blocks"] == wanted["blocks"]


@pytest.mark.slow
def test_deepspeeds_launcher_trains_what_one_trains(finished: Path, tmp_path: Path) -> None:
    words = [DIGITS, f"data.folder={finished / 'data'}", *SHORT, f"select.ticket={finished / 'subset.npz'}"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert lotus("train", *words, f"folder={one}").returncode == 0
    ends_well("deepspeed", "--num_gpus=2", "tools/train.py", *words, f"folder={two}")
    same_weights(one / "train", two / "train", 1e-2)
