"""Tickets on real digits: proxies, policies, a ticket from outside, dynamic data pruning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import DIGITS, ROOT, SHORT, lotus, lotus_json


@pytest.mark.slow
def test_a_proxy_records_the_images_as_they_are(tmp_path: Path) -> None:
    """What was recorded while it trained is what it says afterwards of the images, though the training mixes them."""
    from selection.signals import Signals

    done = lotus("score", DIGITS, f"folder={tmp_path}", "score.epochs=6", "train.mixup=0.8", "train.cutmix=1.0")
    assert done.returncode == 0, done.stdout + done.stderr
    signals = Signals.load(tmp_path / "signals.npz")
    labels = signals["labels"]
    says = (signals["errors"] + np.eye(10)[labels]).argmax(1)
    assert signals["correct"][0, -1].mean() > (says == labels).mean() - 0.1


@pytest.mark.slow
def test_dynamic_data_pruning_saves_what_it_says(finished: Path, tmp_path: Path) -> None:
    words = [DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT, "train.epochs=6", "baseline=false",
             f"select.ticket={finished / 'subset.npz'}", "train.dynamic={name: infobatch, saving: 0.3}"]  # fmt: skip
    done = lotus("run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, seen = 6 * 719, 6 * 719 - round(0.3 * 6 * 719)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["kept"]["passes"] == {"kept": seen, "of": whole}
    assert results["train"]["images_seen"] == seen
    stages = {row["stage"]: row for row in results["ledger"]["stages"]}
    assert stages["train"]["image_forwards"] == 3 * seen
    assert results["ledger"]["dense_macs"] == pytest.approx(stages["train"]["macs"] / (719 / 1438 * seen / whole))
    assert f"epoch 6: 719 of 719 images, {100 * (1 - seen / whole):.1f} % of all passes saved" in done.stdout
    assert "passes" in done.stdout.split("LOTUS  digits")[-1]
    assert "dynamic data pruning" in (tmp_path / "run" / "report.html").read_text()
    again = lotus("run", *words)
    assert again.returncode == 0, again.stderr
    assert "epoch 6" not in again.stdout, "done"


@pytest.mark.slow
def test_rs2_by_name_alone(finished: Path, tmp_path: Path) -> None:
    done = lotus("train", DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT,
                 f"select.ticket={finished / 'subset.npz'}", "train.dynamic=rs2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "run" / "stages" / "train.json").read_text())["values"]
    assert (values["images_seen"], values["passes_of"]) == (2 * round(0.5 * 719), 2 * 719)


@pytest.mark.slow
def test_a_ticket_from_outside_leaves_the_signals(finished: Path, tmp_path: Path) -> None:
    signals = (finished / "signals.npz").read_bytes()
    ticket = tmp_path / "ticket.npz"
    assert lotus("select", str(finished / "signals.npz"), "--keep", "0.2", "--out", str(ticket)).returncode == 0
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    words = [f"folder={folder}", *SHORT, f"select.ticket={ticket}"]
    missing = lotus("train", DIGITS, *words[:-1], "select.ticket=nope.npz")
    assert missing.returncode == 2
    assert "nope.npz" in missing.stderr
    done = lotus("run", DIGITS, *words)
    assert done.returncode == 0, done.stderr
    assert (folder / "signals.npz").read_bytes() == signals
    ledger = json.loads((folder / "results.json").read_text())["ledger"]
    assert "score" not in {row["stage"] for row in ledger["stages"]}, "this ticket's proxy is not this run's"


@pytest.mark.slow
def test_a_ticket_of_other_data_is_refused(finished: Path, tmp_path: Path) -> None:
    from selection.subset import Subset

    good = Subset.load(finished / "subset.npz")
    stranger = Subset(good.rows, good.total, fingerprint="another", weights=good.weights)
    stranger.save(tmp_path / "stranger.npz")
    done = lotus("train", DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT,
                 f"select.ticket={tmp_path / 'stranger.npz'}")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "ticket" in done.stderr
    assert not (tmp_path / "run" / "subset.npz").exists()


@pytest.mark.slow
def test_one_proxy_serves_every_score_and_every_policy(finished: Path) -> None:
    from selection import lottery, methods, pickers, scores
    from selection.signals import Signals

    signals = Signals.load(finished / "signals.npz")
    for score in methods.names(scores):
        if score not in ("memorization", "tdds", "given"):  # many runs; three epochs; from elsewhere
            drawn = lottery.select(signals, score=score, pick="top_k", keep=0.5)
            assert len(drawn.subset.rows) == 719, score
    for pick in methods.names(pickers):
        assert len(lottery.select(signals, score="el2n", pick=pick, keep=0.1).subset.rows) == 144, pick
    done = lotus("run", DIGITS, f"folder={finished}", *SHORT, "select.pick=craig", "--dry-run", COLUMNS="160")
    assert "select.pick" in next(line for line in done.stdout.splitlines() if line.strip().startswith("select"))
    assert "done" in next(line for line in done.stdout.splitlines() if line.strip().startswith("score"))


@pytest.mark.slow
def test_the_selection_command_needs_no_torch_and_no_run(finished: Path, tmp_path: Path) -> None:
    block = tmp_path / "torch.py"
    block.write_text("raise ImportError('torch must not be needed here')")
    out = tmp_path / "ticket.npz"
    done = subprocess.run(
        [sys.executable, "tools/select_subset.py", str(finished / "signals.npz"), "--score", "el2n", "--pick", "ccs",
         "--keep", "0.3", "--out", str(out), "--json"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kept"] == round(0.3 * 1438) == sum(row["kept"] for row in told["classes"])
    from selection.subset import Subset

    ticket = Subset.load(out)
    pruned = lotus_json(
        "select",
        str(finished / "signals.npz"),
        "--score",
        "el2n",
        "--pick",
        "ccs",
        "--prune",
        "0.7",
        "--json",
        "--out",
        str(out) + "2.npz",
    )
    assert pruned["kept"] == told["kept"]
    assert np.array_equal(Subset.load(str(out) + "2.npz").rows, ticket.rows)
    both = lotus("select", str(finished / "signals.npz"), "--prune", "0.7", "--keep", "0.3")
    assert both.returncode == 2
