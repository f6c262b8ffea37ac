"""The published system of Vision Transformer Pruning, end to end, on digits at tiny size; and its config as it is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from in_process import lotus
from safetensors.torch import load_file

from lotus import config, stages

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "configs" / "papers"
TINY = ["data={name: digits, write: raw}", "model.args={img_size: 8, patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2}",
        "train.batch_size=128", "train.evaluate_every=0"]  # fmt: skip
SHORT = [*TINY, "train.epochs=3", "train.augment={crop: none, flip: false}", "prune.calibration=256", "finetune.epochs=1",
         "export.onnx=false", "export.latency_batch=8"]  # fmt: skip


def run(*words: str) -> None:
    done = lotus(*words)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["vtp", "vtp_proximal"])
def test_the_config_is_what_its_first_lines_say(name: str) -> None:
    page = config.read(PAPERS / f"{name}.yaml")
    stages.check(page)
    assert page.train.sparsity.in_channels
    assert page.prune.in_channels
    assert (page.prune.scope, page.prune.keep.gates) == ("threshold", 0.6)
    text = (PAPERS / f"{name}.yaml").read_text()
    assert f"lotus run configs/papers/{name}.yaml" in text
    assert yaml.safe_load(text)["model"]["weights"] == "runs/cifar10-dense/train"
    if name == "vtp":
        gates = page.train.sparsity
        assert (gates.penalty.name, gates.strength, gates.lr, gates.steer) == ("subgradient", 1e-4, 6.25e-6, False)
        assert (page.train.lr, page.train.epochs, page.finetune.epochs) == (6.25e-6, 100, 100)
        assert page.finetune.distill == "none"


@pytest.mark.slow
def test_both_forms_run_from_a_dense_model_to_a_smaller_one(tmp_path: Path) -> None:
    run("train", str(ROOT / "configs" / "staged.yaml"), f"folder={tmp_path / 'dense'}", *TINY, "select.keep=1", "train.epochs=4",
        "train.sparsity.gates=false", "score.epochs=1", "score.seeds=1")  # fmt: skip
    kept = {}
    for name, more in (
        ("vtp", []),
        ("vtp_proximal", ["train.sparsity.lr=0.05", "train.epochs=10", "train.batch_size=64"]),
    ):
        folder = tmp_path / name
        run("run", str(PAPERS / f"{name}.yaml"), f"folder={folder}", f"model.weights={tmp_path / 'dense' / 'train'}",
            f"data.folder={tmp_path / 'dense' / 'data'}", *SHORT, *more)  # fmt: skip
        gates = load_file(folder / "gates.safetensors")
        sites = {site.rpartition(".")[2] for site in gates}
        assert sites == {"attn_in", "attn", "mlp_in", "mlp"}
        rows = json.loads((folder / "finetune" / "spec.json").read_text())["blocks"]
        assert all(row["qk_dim"] == 16 for row in rows), "queries and keys keep their dimensions"
        left = sum(row["heads"] * row["v_dim"] + row["hidden"] for row in rows if row["heads"])
        left += sum(len(row.get(f"{of}_in", range(32))) for row in rows for of in ("attn", "mlp"))
        every = sum(len(one) for one in gates.values())
        assert left == pytest.approx(0.6 * every, abs=len(rows) * 2)
        kept[name] = sum(int((one == 0).sum()) for one in gates.values()) / every
        results = json.loads((folder / "results.json").read_text())
        assert results["finetune"]["macs"] < results["train"]["macs"]
    assert kept["vtp"] == 0, "a subgradient of these hyper-parameters closes nothing"
    assert 0.39 <= kept["vtp_proximal"] <= 0.42, "a proximal step does, up to the budget"
