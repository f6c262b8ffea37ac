"""The score stage with each of its proxies, on real digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lotus import stages
from lotus.cli import main
from lotus.config import read
from lotus.events import Said
from lotus.stages import proxy
from lotus.training.distributed import World
from selection import lottery, methods, pickers, scores
from selection.errors import Refused
from selection.signals import Signals
from selection.subset import Subset

DIGITS = str(Path(__file__).resolve().parent.parent / "configs" / "staged.yaml")
SMALL = ["model.args.embed_dim=32", "model.args.depth=2", "model.args.num_heads=2", "train.batch_size=128"]
N = 1438


def run(until: str, folder: Path, *words: str) -> list[str]:
    """Every stage up to ``until``; what was said on the way."""
    events = stages.go(read(DIGITS, [f"folder={folder}", *SMALL, *words]), until=until)
    return [event.text for event in events if isinstance(event, Said)]


def record(folder: Path, stage: str = "score") -> dict[str, Any]:
    return json.loads((folder / "stages" / f"{stage}.json").read_text())


def test_a_linear_probe_serves_every_score_and_picker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score.proxy=linear_probe", "score.heads=3", "score.epochs=4", "score.lr=0.03", "score.subsets={runs: 5, fraction: 0.6}",
             "select={score: memorization, pick: top_k, keep: 0.5}"]  # fmt: skip
    assert any("has not learned anything yet" in text for text in run("select", tmp_path, *words))
    signals = Signals.load(tmp_path / "signals.npz")
    assert (signals.seeds, signals.epochs, signals.images) == (3, 4, N)
    assert signals["correct"][:, -1].mean() > 0.3, "the heads learn, though the features are of no training"
    for name in set(methods.names(scores)) - {"given"}:  # which comes from elsewhere
        assert len(lottery.select(signals, score=name, pick="top_k", keep=0.5).subset.rows) == N // 2, name
    for pick in methods.names(pickers):
        assert len(lottery.select(signals, score="el2n", pick=pick, keep=0.02).subset.rows) == 29, pick

    assert signals["run_in"].sum(1).tolist() == [N - 576] * 5  # 0.4 of them, rounded up, are left out
    inside, p = signals["run_in"], signals["run_p_label"].astype(float)
    expected = [np.mean(p[inside[:, row], row]) - np.mean(p[~inside[:, row], row]) for row in range(N)]
    assert np.mean(expected) > 0, "surer of what was trained on"
    ticket = Subset.load(tmp_path / "subset.npz").rows
    for label in range(10):  # the same fraction of every class
        rows = np.flatnonzero(signals["labels"] == label)
        kept = np.isin(rows, ticket)
        assert np.array(expected)[rows][kept].min() >= np.array(expected)[rows][~kept].max() - 1e-9

    # The ledger: one pass through the model, made once; the heads' MACs on top.
    made = (tmp_path / "features.npz").stat().st_mtime_ns
    first = record(tmp_path)
    assert first["image_forwards"] == N
    heads = 2 * 4 * 32 * 10 * (3 * N + 5 * (N - 576))
    run("score", tmp_path, *words[:1], "score.heads=2", "score.epochs=3")
    again = record(tmp_path)
    assert (tmp_path / "features.npz").stat().st_mtime_ns == made, "features are made once"
    assert again["image_forwards"] == N, "and counted, whoever made them"
    assert first["macs"] - again["macs"] == heads - 2 * 3 * 32 * 10 * 2 * N
    assert Signals.load(tmp_path / "signals.npz").seeds == 2
    run("score", tmp_path, *words[:1], "score.heads=2", "score.epochs=3", "model.args.depth=1")
    assert (tmp_path / "features.npz").stat().st_mtime_ns != made, "another model has others"

    capsys.readouterr()
    words = ["score.proxy=linear_probe", "score.heads=2", "score.epochs=3", "model.args.depth=1"]
    assert main(["score", DIGITS, f"folder={tmp_path}", *SMALL, *words, "--again", "--dry-run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["score"])
    assert "1,438" in line.replace("1.4 k", "1,438").replace("1.44 k", "1,438")


@pytest.mark.slow
def test_a_convolutional_model_as_the_proxy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score.model=test_resnet", "score.epochs=3", "score.seeds=1", "score.lr=5e-3", "score.side=16",
             "score.subsets={runs: 2, fraction: 0.5, record: correct}"]  # fmt: skip
    run("select", tmp_path, *words, "select={score: memorization, pick: ccs, keep: 0.3}")
    signals = Signals.load(tmp_path / "signals.npz")
    assert signals["correct"][0, -1].mean() > 0.5
    assert set(np.unique(signals["run_p_label"])) == {0, 1}
    trained = record(tmp_path)
    assert trained["image_forwards"] == 3 * 3 * N + N + 2 * (3 * 3 * N // 2 + N)
    assert not list((tmp_path / "checkpoints").rglob("*.npz"))

    weights = tmp_path / "proxy.safetensors"
    import torch
    from safetensors.torch import save_file

    from lotus.config import Model
    from lotus.vit.cost import macs
    from lotus.vit.model import proxy

    torch.manual_seed(3)
    net = proxy(Model(name="test_resnet"), 10)
    save_file(net.state_dict(), weights)
    assert trained["macs"] == trained["image_forwards"] * macs(net, 16)
    words = [
        "score.proxy=linear_probe",
        "score.heads=2",
        "score.epochs=2",
        f"score.model={{name: test_resnet, weights: {weights}}}",
    ]
    run("score", tmp_path, *words)
    made = (tmp_path / "features.npz").stat().st_mtime_ns
    assert Signals.load(tmp_path / "signals.npz")["embeddings"].shape == (N, net.head_hidden_size)
    save_file({name: value + 0.5 for name, value in net.state_dict().items()}, weights)
    run("score", tmp_path, *words, "score.heads=3")
    assert (tmp_path / "features.npz").stat().st_mtime_ns != made, "other weights under the same name are noticed"


@pytest.mark.slow
def test_a_stage_that_was_stopped_keeps_the_proxies_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["score.epochs=2", "score.seeds=2", "score.subsets={runs: 2, fraction: 0.5}"]
    run("score", tmp_path / "whole", *words, f"data.folder={tmp_path / 'data'}")
    made, one = [], proxy.fit

    def fit(*given: Any, **more: Any) -> Any:
        made.append(given[1].seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        return one(*given, **more)

    monkeypatch.setattr(proxy, "fit", fit)
    torn = ["score", DIGITS, f"folder={tmp_path / 'torn'}", *SMALL, *words, f"data.folder={tmp_path / 'data'}"]
    assert main(torn) != 0
    assert main(torn) == 0
    assert made == [1000, 2000, 3000, 3000, 4000], "the first two are not trained again"
    a, b = (Signals.load(tmp_path / name / "signals.npz") for name in ("whole", "torn"))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    whole, torn_record = record(tmp_path / "whole"), record(tmp_path / "torn")
    assert whole["macs"] == torn_record["macs"]
    assert whole["image_forwards"] == torn_record["image_forwards"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["select.score=memorization"], "Set score.subsets.runs=10"),
        (["score.model=resnet81"], "score.model.name: timm has no model 'resnet81'"),
        (["score.model.weights=none.safetensors"], "score.model.weights: there is nothing at none.safetensors"),
        (["score.side=16"], "score.side: 16, but this model reads images of 8 pixels alone. Remove it"),
        (["score.model=resnet10t", "score.patches.mode=evit"], "Set score.patches=null"),
        (["score.model=resnet10t", "train.precision=bf16"], "Set score.precision=fp32, or score.proxy=linear_probe"),
        (["score={proxy: linear_probe, accumulate: 2}"], "score.accumulate: a setting of a training"),
    ],
)
def test_a_proxy_that_cannot_be_is_refused_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["score", DIGITS, f"folder={tmp_path / 'run'}", *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()


def test_weights_that_do_not_fit_the_proxy_are_refused_before_the_images_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "a.safetensors")
    words = [f"score.model.weights={tmp_path / 'a.safetensors'}", "score.model.name=resnet18"]
    assert main(["score", DIGITS, f"folder={tmp_path / 'run'}", *words]) == 2
    assert "score.model.weights" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()


def test_an_image_that_no_epoch_would_show_is_refused_before_the_proxy() -> None:
    proxy.check_seen(8, 1, World(size=2))
    proxy.check_seen(9, 2, World(size=2))
    with pytest.raises(
        Refused, match=r"^score\.epochs: of 9 images 1 would be in no epoch, since 2 ranks .* Take 2\.$"
    ):
        proxy.check_seen(9, 1, World(size=2))
