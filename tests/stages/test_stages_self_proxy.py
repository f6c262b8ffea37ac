"""``score.proxy: self`` in a run: no proxy is paid for, the bill is what was trained, and the forecast is the bill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from ranks import free_port, launched
from running import DIGITS, SHORT, lotus, strike, struck

from lotus.cli import main
from lotus.config import read
from lotus.stages import course
from lotus.stages.ahead import Ahead
from lotus.stages.dry_run import forecast
from lotus.stages.shelf import run_of
from selection.subset import Subset

OWN = [*SHORT, "train.epochs=5", "baseline=false", "train.shrink.at=0.3", "prune.keep.macs=0.35", "train.mixup=0", "train.cutmix=0",
       "score.proxy=self", "select.keep=0.5", "select.score=el2n", "select.pick=top_k", "train.sparsity={}"]  # fmt: skip
N = 1438


def test_no_stage_scores_and_all_train_until_the_cut() -> None:
    config = read(DIGITS, OWN)
    assert config.watches_itself
    assert "score" not in run_of(config).plan()
    ahead = Ahead(config)
    assert course.watched_epochs(config, N) == 2, "18 of 60 steps, in the second epoch of 12 steps"
    seen = [(piece.cuts, round(piece.images)) for piece in course.pieces(ahead)]
    assert seen == [(0, N + 6 * 128), (1, N - 6 * 128), (1, 3 * N // 2)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["train.shrink=null"],
            "score.proxy: self draws the ticket at the cut of a training that shrinks. Set train.shrink",
        ),
        (["train.dynamic=rs2"], "score.proxy: self says who trains, and so does train.dynamic"),
        (["train.mixup=0.2"], "Set train.mixup=0 and train.cutmix=0"),
        (["select.pick=k_center"], "select.score: embeddings would be read"),
        (["select.score=memorization"], "select.score: run_in, run_p_label would be read"),
        (["select.score=tdds", "score.gradients=false"], "select.score: kl_step would be read"),
        (["train.shrink.at=0.9"], "score.proxy: self draws the ticket after epoch 5 of 5"),
        (["train.shrink.at=0.1", "select.score=dual"], "score.proxy: self draws the ticket after epoch 1."),
        (["score.proxy=sef"], "Did you mean 'self'?"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["run", DIGITS, f"folder={tmp_path / 'run'}", *OWN, *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "data").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "own"
    done = lotus("run", DIGITS, f"folder={folder}", *OWN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the ticket is drawn from what was said so far: 719 images train on" in done.stdout
    return folder


@pytest.mark.slow
def test_the_bill_is_what_was_trained_and_was_forecast(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    rows = {row["stage"]: row for row in results["ledger"]["stages"]}
    assert "score" not in rows
    assert results["train"]["images_seen"] == 2 * N + 3 * 719
    assert results["kept"]["images"] == {"kept": 719, "of": N}
    (cut,) = results["train"]["cuts"]
    dense, small, val = cut["before"]["macs"], cut["after"]["macs"], 359
    first = N + 6 * 128
    trained = 3 * (first * dense + (2 * N + 3 * 719 - first) * small)
    assert rows["train"]["macs"] == pytest.approx(trained + (4 * 128 + val) * dense + val * small, rel=1e-9)
    assert results["ledger"]["dense_macs"] == pytest.approx(3 * 5 * N * dense, rel=0.2), (
        "estimated, the looks at the cut besides"
    )
    told = {row["stage"]: row for row in forecast(read(whole / "config.yaml"))}
    assert told["train"]["macs"] == pytest.approx(rows["train"]["macs"], rel=0.01)
    assert run_of(read(whole / "config.yaml")).is_done


@pytest.mark.slow
def test_images_that_shall_not_train_are_not_drawn(whole: Path, tmp_path: Path) -> None:
    """They were looked for among what was seen, and the training was lost at its cut."""
    (tmp_path / "gone.txt").write_text("\n".join(map(str, range(1500, 1600))), encoding="utf-8")
    words = [
        *OWN,
        f"data.folder={whole / 'data'}",
        f"folder={tmp_path / 'run'}",
        f"select.exclude={tmp_path / 'gone.txt'}",
    ]
    done = lotus("train", DIGITS, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    before, drawn = (Subset.load(tmp_path / "run" / name) for name in ("subset.npz", "own_subset.npz"))
    assert len(before.rows) < N
    assert set(drawn.rows) < set(before.rows)


@pytest.mark.slow
def test_what_was_recorded_serves_other_tickets(whole: Path, tmp_path: Path) -> None:
    done = lotus(
        "select",
        str(whole / "signals.npz"),
        "--score",
        "aum",
        "--pick",
        "top_k",
        "--keep",
        "0.3",
        "--out",
        str(tmp_path / "t.npz"),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_another_proxy_draws_the_ticket_anew(whole: Path) -> None:
    config = read(whole / "config.yaml", ["score.proxy=training", "select.score=random", "select.pick=random"])
    assert run_of(config).why("select") is not None
    assert run_of(read(whole / "config.yaml", ["select.keep=1"])).why("select") is not None


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    words = [*OWN, f"data.folder={whole / 'data'}", "train.save_minutes=0.001", f"folder={tmp_path}"]
    struck(["train", DIGITS, *words], signal.SIGKILL, (tmp_path / "own_subset.npz").exists)  # it is being drawn
    again = lotus("train", DIGITS, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    for name in ("train/model.safetensors", "own_subset.npz", "signals.npz"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_draw_and_cut_as_one_and_one_ends_what_they_began(whole: Path, tmp_path: Path) -> None:
    """Scored, drawn and cut by two, stopped in the middle of that epoch, and ended by one."""
    words = [DIGITS, f"folder={tmp_path}", f"data.folder={whole / 'data'}", *OWN, "train.save_minutes=0.0001"]
    two = launched("torchrun", "--nproc_per_node=2", f"--master_port={free_port()}", "tools/run.py", *words)
    said = strike(two, signal.SIGTERM, (tmp_path / "own_subset.npz").exists)  # it is being drawn
    assert not (tmp_path / "results.json").exists(), said
    done = lotus("run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on after step" in done.stdout
    ours, theirs = (json.loads((folder / "train" / "spec.json").read_text()) for folder in (tmp_path, whole))
    assert ours["blocks"] == theirs["blocks"]
    ticket, known = (Subset.load(folder / "own_subset.npz").rows for folder in (tmp_path, whole))
    assert ticket.tolist() == known.tolist()
    from safetensors.numpy import load_file

    found, expected = (load_file(folder / "train" / "model.safetensors") for folder in (tmp_path, whole))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=5e-3, err_msg=name)
