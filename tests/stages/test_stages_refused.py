"""Bad input is refused before anything is done, with its place and its cure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import DIGITS

from lotus.cli import main


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prune.kep=1"], "prune.kep: no such setting. Did you mean 'keep'?"),
        (["select.score=eltwon"], "select.score: there is no 'eltwon'"),
        (["select.pick=css"], "Did you mean 'ccs'?"),
        (["select.pick=ccs", "select.pick.bin=3"], "select.pick.bin: 'ccs' has no such setting. Did you mean 'bins'?"),
        (["select.score=memorization"], "Set score.subsets.runs=10"),
        (["select.score=tdds", "score.gradients=false"], "score.gradients: errors or kl_step would be read"),
        (["prune.criterion=taylr"], "Did you mean 'taylor'?"),
        (["model.name=vit_tinny_patch16_224"], "Did you mean"),
        (["model.name=resnet18", "model.args={}"], "resnet18"),
        (["prune.keep.macs=0.001"], "0.001"),
        (["data.name=digit"], "Did you mean 'digits'?"),
        (["prune.criterion=gate", "train.sparsity.gates=false"], "train.sparsity.gates"),
        (["train.optimizer=adamww"], "Did you mean"),
        (["train.dynamic=rs3"], "train.dynamic: there is no 'rs3'. Did you mean 'rs2'?"),
        (["train.dynamic=infobatch", "train.dynamic.savings=0.3"], "Did you mean 'saving'?"),
        (["train.dynamic=infobatch", "train.dynamic.saving=0.9"], "can save"),
        (["train.dynamic=infobatch", "train.dynamic.keep=0.5"], "train.dynamic.keep: 'infobatch' finds"),
        (["train.patches.mode=evi"], "train.patches.mode"),
        (["train.patches.kep=1"], "train.patches.kep: no such setting. Did you mean 'keep'?"),
        (["train.patches.at=[9]"], "patches.at: there is no block 9"),
        (["train.patches={mode: tome, keep: 0.01}"], "patches.keep: 0.01 cannot be reached"),
        (["train.patches={mode: dropout, evaluate: sparse}"], "evaluate: dense"),
        (["train.patches={mode: input, score: contrst}"], "Did you mean 'contrast'?"),
        (
            ["train.patches={mode: cumulative, keep: 0.5}", "model.args.depth=2"],
            "lets no patch go before the last of 2 blocks",
        ),
        (["finetune.patches={mode: tome, keep: 0.01}"], "lotus: finetune.patches.keep: 0.01 cannot be reached"),
        (["finetune.patches={mode: evit, at: [9]}"], "lotus: finetune.patches.at: there is no block 9"),
        (
            ["finetune.patches={mode: evit}", "model.args.patch_drop_rate=0.1"],
            "finetune.patches: the model drops patches by itself, by its argument patch_drop_rate",
        ),
        (
            ["train.shrink=null", "model=swin_tiny_patch4_window7_224", "finetune.patches={keep: 0.5, mode: tome}"],
            "finetune.patches: is for timm's plain ViTs",
        ),
        (["train.patches={mode: input, score: attention}"], "Give train.patches.model"),
        (["train.patches={mode: input, model: x}"], "asks no model"),
        (["train.patches={mode: input, score: ats, model: nowhere}"], "nowhere: there is no such folder"),
        (["train.patches={mode: input, score: ats, model: x, evaluate: sparse}"], "Evaluate dense"),
        (["train.patches={mode: evit, cached: true}"], "model and cached are settings of input"),
        (["train.patches={mode: dropout, keep: 1, joint: {}}"], "train.patches.joint: shares out what is left"),
        (
            ["train.patches={mode: dropout, keep: 0.5, joint: {least: 0.6}}"],
            "train.patches.joint.least: lies below train.patches.keep",
        ),
        (["train.patches={mode: dropout, joint: {bucket: 2}}"], "Did you mean 'buckets'?"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["run", DIGITS, f"folder={tmp_path / 'run'}", *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "signals.npz").exists()


def test_a_setting_without_effect_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"folder={tmp_path / 'run'}", "train.optimizer=adamw", "train.adamw_lr=0.002"]
    assert main(["run", DIGITS, *words, "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("train.adamw_lr changes nothing: only muon leaves something to AdamW") == 1


def test_a_stage_that_is_not_there_is_told_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", DIGITS, f"folder={tmp_path / 'run'}", "--from", "tran"]) == 2
    assert "--from tran: this run has no such stage. Did you mean 'train'?" in capsys.readouterr().err
    assert main(["evaluate", DIGITS, f"folder={tmp_path / 'run'}", "--model", "trained"]) == 2
    assert "--model trained: no such folder. Give baseline, train, prune, finetune, or" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["run"], ["run", "x.yaml", "--nope"], ["fly"], ["select", "s.npz", "--keep"], []])
def test_wrong_words_exit_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["prun"], "prune"), (["ticket", "expor"], "export")],
)
def test_a_choice_that_is_mistyped_is_told_with_the_nearest(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert f" Did you mean {meant!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--score", "eln2"], "--score: there is no 'eln2'. Did you mean 'el2n'?"),
        (["--pick", "herdin"], "--pick: there is no 'herdin'. Did you mean 'herding'?"),
        (["--pick", "ccs", "--set", "pick.bin=3"], "--set pick.bin: 'ccs' has no such setting. Did you mean 'bins'?"),
        (["--score", "loss", "--set", "score.epoch=3"], "--set score.epoch: 'loss' has no such setting."),
        (["--score", "memorization"], "--score: 'memorization' reads run_in, run_p_label, which is not here. "),
        (["--score", "memorization"], "lotus score CONFIG score.subsets.runs=10"),
        (["--score", "cal"], "lotus score CONFIG score.gradients=true"),
        (["--score", "loss", "--pick", "herding"], "--pick: 'herding' reads embeddings, which is not here."),
        (["--score", "random", "--pick", "top_k", "--floor", "0.5"], "--floor: every class keeps its share already. Set --no-balance"),
        (["--score", "random", "--pick", "top_k", "--floor", "2", "--no-balance"], "--floor: 2.0 is no fraction"),
        (["--prune", "0.96"], "--prune 0.96: 1 of 20 images is fewer than the 2 classes."),
        (["--prune", "0.96"], "or set --no-balance."),
        (["--keep", "0.01"], "--keep: 0.01 of 20 images is none."),
        (["--score", "loss", "--pick", "top_k", "--max-memory", "1kb"], "--score (loss), for 20 images at once: "),
        (["--score", "loss", "--pick", "top_k", "--max-memory", "1kb"], "or set --max-memory="),
        (["--score", "random", "--pick", "top_k", "--start", "START"], "--start: it has 8 of 10 images (class 0, "),
    ],
)  # fmt: skip
def test_select_speaks_of_what_was_typed(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from selection.lottery import select
    from selection.signals import Signals

    known = Signals({"labels": np.arange(20) % 2, "loss": np.ones((1, 3, 20))}, fingerprint="f")
    known.save(tmp_path / "s.npz")
    select(known, score="random", pick="random", keep=0.8).subset.save(tmp_path / "start.npz")
    words = [str(tmp_path / "start.npz") if word == "START" else word for word in words]
    budget = [] if {"--keep", "--prune"} & set(words) else ["--keep", "0.5"]
    assert main(["select", str(tmp_path / "s.npz"), *budget, *words]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert "select." not in told


def test_no_such_signals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", str(tmp_path / "none.npz"), "--keep", "0.5"]) == 2
    assert "none.npz" in capsys.readouterr().err
    for keep in ("0", "1.5"):
        assert main(["select", str(tmp_path / "none.npz"), "--keep", keep]) == 2
    with pytest.raises(SystemExit):
        main(["select", "x.npz", "--keep", "half"])


def test_a_select_of_what_is_no_signals_leaves_the_users_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "mine.npz", x_train=np.zeros((2, 4, 4)), y_train=np.arange(2))
    assert main(["select", str(tmp_path / "mine.npz"), "--keep", "0.5"]) == 2
    told = capsys.readouterr().err
    assert "x_train, y_train" in told
    assert "signals.npz in the run's folder" in told
    assert "Remove" not in told


def test_the_part_that_goes_leaves_a_part_without_a_tail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from selection.signals import Signals

    Signals({"labels": np.arange(20) % 2}, fingerprint="f").save(tmp_path / "s.npz")
    words = ["select", str(tmp_path / "s.npz"), "--score", "random", "--pick", "random", "--prune", "0.7", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == 0.3
