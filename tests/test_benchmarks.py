"""Every benchmark runs from its one command; here at sizes at which its figures mean nothing."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import few

import lotus
from lotus.config import Model, read
from lotus.inspect import labels, network
from lotus.stages.dry_run import forecast
from lotus.vit.model import create
from lotus.watch import born

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark at a small size may change what it measures: here that is nobody else's."""
    for module, name in ((network, "SEEN"), (labels, "FEWEST")):
        monkeypatch.setattr(module, name, getattr(module, name))


SMALL = {
    "train_step.py": ["--tiny", "--evaluate"],
    "engine.py": ["--out", "OUT", "--tiny", "--parts", "help"],
    "optimizer_step.py": ["--tiny"],
    "muon_parts.py": ["-", "--out", "OUT", "--epochs", "1", "--parts", "first-adamw"],
    "neighbor.py": ["--tiny"],
    "scale.py": ["--out", "OUT", "--tiny", "--only", "prepare", "shards"],
    "gpu.py": ["--out", "OUT", "--device", "cpu", "--tiny", "--parts", "adamw"],
    "augment.py": ["--sides", "8", "--batch", "6", "--turns", "1"],
    "inspect_data.py": ["--tiny", "--images", "300", "--fractions", "0.1"],
    "loader.py": ["--images", "48", "--small-images", "256", "--batch", "16", "--turns", "1"],
    "selection.py": ["--images", "600"],
    "cheaper.py": [
        "-",
        "--out",
        "OUT",
        "--row",
        "digits",
        "--tiny",
        "--budgets",
        "0.1",
        "--seeds",
        "0",
        "--arms",
        "dense",
        "lotus",
    ],
    "regularize.py": [
        "DATA",
        "--out",
        "OUT",
        "--images",
        "40",
        "--keep",
        "0.5",
        "--seeds",
        "0",
        "--arms",
        "group",
        "--before",
        "1",
        "--after",
        "1",
    ],
    "patches.py": ["--tiny"],
    "proxies.py": ["--tiny"],
    "latency.py": ["--tiny"],
    "prune_cost.py": ["--tiny"],
    "papers.py": ["DATA", "--out", "OUT", "--images", "40", "--tiny", "--only", "vtp"],
    "pruning.py": [
        "MODEL",
        "--data",
        "cifar10",
        "--path",
        "DATA",
        "--out",
        "OUT",
        "--calibration",
        "20",
        "--images",
        "20",
        "--seeds",
        "2",
        "--batch",
        "10",
        "--finetune",
        "2",
        "--search",
        "2",
        "--keep",
        "0.6",
        "--workers",
        "1",
        "--only",
        "ours",
        "units alone",
        "VTP",
        "auto ratio",
        "CP-ViT",
        "SPViT",
        "taylor",
    ],
    "selection_accuracy.py": [
        "DATA",
        "--out",
        "OUT",
        "--pool",
        "40",
        "--epochs",
        "6",
        "--keep",
        "0.5",
        "--proxy",
        "2",
        "--seeds",
        "1",
        "--args",
        '{"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}',
    ],
}
MODES = {
    "patches.py --accuracy": ["--tiny", "--accuracy"],
    "selection.py --gradients": ["--gradients", "--images", "200"],
    "selection.py --value": ["--value", "--images", "300"],
    "selection.py --dynamic": ["--dynamic", "--images", "3000"],
    "pruning.py --model": ["--model", "tiny", "--weights", "MODEL", "--data", "DATA", "--device", "cpu"],
}
"""What else a benchmark does."""


def said(script: Path, words: list[str], folder: Path) -> str:
    """What a benchmark prints that is started in ``folder``, in this process: torch need not be imported anew."""
    out, code, threads = io.StringIO(), None, torch.get_num_threads()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words])
        patch.syspath_prepend(str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code
    torch.set_num_threads(threads)
    assert not code, out.getvalue()[-2000:]
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *MODES])
def test_it_runs(name: str, tmp_path: Path) -> None:
    draw, data = np.random.default_rng(0), tmp_path / "data.npz"
    sets = {f"x_{part}": draw.integers(0, 256, (60, 16, 16, 3), np.uint8) for part in ("train", "test")}
    np.savez(data, **sets, y_train=np.arange(60) % 4, y_test=np.arange(60) % 4)
    places = {"DATA": str(data), "OUT": str(tmp_path / "out"), "MODEL": str(tmp_path / "model")}
    if name.startswith("pruning.py"):
        args = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
        vit = create(Model(name="vit_tiny_patch16_224", args=args), 4).eval()
        lotus.save(vit, tmp_path / "model", about={"mean": [0.5] * 3, "std": [0.25] * 3})
    words = [places.get(word, word) for word in {**SMALL, **MODES}[name]]
    told = said(ROOT / "benchmarks" / name.split()[0], words, tmp_path)
    assert told.strip()
    assert "failed" not in told  # a row that fails does not stop the others


def test_a_part_that_hangs_or_says_no_figures_is_a_failed_one_and_leaves_no_process(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
    part, run = made["Part"], made["_run"]
    rank = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    words = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    found = run(part(["-c", words], 60), 2.0)
    assert found["failed"][-1] == "longer than 2 s"
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 20  # what is killed ends when it next has a core
    while born(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not born(pid), "the rank is left"
    for says in ("", "print('no JSON')"):
        assert run(part(["-c", says], 60), 60.0)["failed"][-1] == "its last line is no JSON"
    assert run(part(["-c", "print('{}')"], 60), 60.0)["figures"] == {}


def test_the_group_lasso_is_the_sum_over_the_units_that_a_cut_takes() -> None:
    """Against a loop over units; a group's gradient has the length of the strength, whatever the group's own length."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "group_lasso.py"))
    model = create(
        Model(
            name="vit_tiny_patch16_224",
            args={"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2},
        ),
        3,
    )
    guest, expected = made["group"](model, strength=0.5), 0.0
    for block in model.blocks:
        value = block.attn.qkv.weight[16:]
        for first, second in ((value, block.attn.proj.weight), (block.mlp.fc1.weight, block.mlp.fc2.weight)):
            for unit in range(len(first)):
                expected += float(torch.cat([first[unit], second[:, unit]]).detach().norm())
    losses = guest.losses(torch.zeros(4), None)
    assert losses.tolist() == pytest.approx([0.5 * expected] * 4, rel=1e-4)
    losses.mean().backward()
    fc1, fc2 = (dict(model.named_parameters())[f"blocks.1.mlp.{name}.weight"].grad for name in ("fc1", "fc2"))
    assert fc1 is not None
    assert fc2 is not None
    assert float(torch.cat([fc1[3], fc2[:, 3]]).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The benchmark's own unit of cost, on a few images of the side that its rows have."""
    draw, data = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "data.npz"
    sizes = {"train": 600, "test": 20}
    sets = {f"x_{part}": draw.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in sizes.items()}
    np.savez(data, **sets, **{f"y_{part}": np.arange(n) % 10 for part, n in sizes.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.syspath_prepend(str(ROOT))
        made = runpy.run_path(str(ROOT / "benchmarks" / "cheaper.py"))
    told = ["train.warmup_ratio=null", f"data.path={data}", f"folder={data.parent / 'run'}", "prune.calibration=10"]
    return made["Unit"](ROOT / "configs" / "cifar10.yaml", told, 12), told


ARMS = ("textbook", "adamw", "dense", "lotus", "narrow", "shallow")
ALONE = (
    "lotus-half", "lotus-sides", "lotus-average", "lotus-ema", "lotus-self", "lotus-infobatch", "lotus-linear", "lotus-patches",
    "dense-images", "dense-random", "dense-infobatch", "dense-rs2", "dense-hardest", "dense-average", "dense-ema", "dense-patches",
    "dense-sides", "lotus-early", "lotus-sides-long", "lotus-patches-early", "dense-patches-early", "lotus-steps", "lotus-stable",
    "lotus-taught", "lotus-taught-late",
    "dense-gates", "dense-warmup", "dense-xavier", "dense-mimetic", "textbook-mimetic",
)  # fmt: skip


@pytest.mark.parametrize("arm", few([*ARMS, *ALONE], ["textbook", "lotus", "narrow", "lotus-sides"]))
def test_each_arm_is_a_run_that_costs_its_budget(unit: Any, arm: str) -> None:
    """It parses, its stages refuse nothing, and what they forecast is the budget, as near as whole epochs come."""
    made, told = unit
    config = read(ROOT / "configs" / "cifar10.yaml", [*told, *made.settings(arm, 0.33)])
    rows = forecast(config, until="train")
    spent = sum(row["macs"] for row in rows) / (3 * made.dense * 600 * 12)
    trained = next(row["macs"] for row in rows if row["stage"] == "train")
    epoch = trained / config.train.epochs / (3 * made.dense * 600 * 12)
    assert spent == pytest.approx(0.33, abs=0.5 * epoch + 0.01)


def test_every_arm_is_tried(unit: Any) -> None:
    source = (ROOT / "benchmarks" / "cheaper.py").read_text(encoding="utf-8")
    assert set(re.findall(r'^    "((?:lotus|dense|textbook)-[\w-]+)": \(', source, re.MULTILINE)) == set(ALONE)


def commands() -> list[tuple[str, ...]]:
    """What the pages and the benchmarks' own heads say to type."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.py")]
    texts = [page.read_text("utf-8").replace("\\\n", " ") for page in pages]  # a line that goes on is one
    lines = [line for text in texts for line in re.findall(r"python (benchmarks/[^`#\n]+)", text)]
    return sorted({tuple(shlex.split(line)) for line in lines})


@pytest.mark.slow  # ten seconds, of imports
def test_every_command_that_is_written_down_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the benchmark's own parser, which ends with 2 where it is not."""
    understood = list[Any]()

    def stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        whole(parser, *given)
        understood.append(sys.argv)
        raise KeyboardInterrupt

    whole = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for script, *words in (found := commands()):
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(KeyboardInterrupt):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert len(understood) == len(found) > 20


def test_none_is_forgotten() -> None:
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == {
        *SMALL,
        "shared.py",
        "group_lasso.py",
        "one_shot.py",
    }
