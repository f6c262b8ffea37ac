"""SPViT's way in a run: end to end on digits, and what it refuses at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_search_stage import ROOT, loaded, run

from lotus import stages
from lotus.config import read
from selection.errors import Refused


@pytest.mark.slow
def test_attention_becomes_convolution(tmp_path: Path) -> None:
    import torch

    import lotus
    from lotus.vit.cost import count

    # A strong pull and quick gates, so that in 46 steps some attention is let go.
    run(
        "papers/spvit.yaml",
        tmp_path / "run",
        "prune.method.epochs=2",
        "prune.method.gate_lr=0.1",
        "prune.keep.macs=0.4",
    )
    found, results = loaded(tmp_path / "run" / "search.json"), loaded(tmp_path / "run" / "results.json")
    assert 0.3 * results["train"]["macs"] < results["finetune"]["macs"] <= 0.4 * results["train"]["macs"]
    assert set(found["attention"]) <= {"attention", "3x3", "1x1"}
    assert set(found["attention"]) != {"attention"}
    model = lotus.load(tmp_path / "run" / "finetune")
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert count(model).macs == results["finetune"]["macs"]
    kinds = [f"{k}x{k}" if (k := row.get("kernel")) else "attention" for row in results["kept"]["blocks"]]
    assert kinds == found["attention"]
    assert "convolution" in (tmp_path / "run" / "report.html").read_text()


WAY = "prune.method={name: convolve, epochs: 2}"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["prune.keep={params: 0.5}"], "prune.keep: convolve aims at a budget in macs"),
        (["prune.keep.params=0.5"], "nothing else"),
        (["prune.keep.latency=0.5"], "budget in macs"),
        (["prune.decouple_qk=true"], "MLP units alone"),
        (["prune.sublayers=true"], "prune.sublayers: convolve cuts MLP units alone"),
        (["prune.embed_dim=0.5"], "keeps the embedding dimension"),
        (["prune.method.epoch=2"], "Did you mean 'epochs'"),
        (["prune.method.epochs=0"], r"prune\.method\.epochs: .*equal to 1, not 0"),
        (["prune.method.lr=true"], r"prune\.method\.lr: expected a number, not True"),
        (["train.sparsity.gates=true"], r"train\.sparsity\.gates"),
        (["train.patches={mode: evit, keep: 0.7, evaluate: sparse}", "finetune.patches=null"], "Evaluate dense"),
    ],
)
def test_settings_that_contradict_are_refused(overrides: list[str], match: str) -> None:
    words = ["train.sparsity.gates=false", WAY, *overrides]
    with pytest.raises(Refused, match=match):
        stages.check(read(ROOT / "configs" / "staged.yaml", words))
