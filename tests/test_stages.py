"""Every stage, end to end, on real digits: what it leaves, when it is done, and what happens to bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lotus.cli import main
from lotus.config import read
from lotus.stages.dry_run import forecast

ROOT = Path(__file__).resolve().parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
# The demo's own config, shortened until it takes seconds: small ViT, few epochs.
SHORT = [
    "model.args.embed_dim=32", "model.args.depth=2", "model.args.num_heads=2", "score.epochs=2", "score.seeds=1",
    "train.epochs=2", "finetune.epochs=1", "prune.calibration=128", "train.batch_size=128", "export.onnx=false",
    "export.latency_batch=8",
]  # fmt: skip


def lotus(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lotus", *words], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole short run, made once."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    done = lotus("run", DIGITS, f"folder={folder}", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    for name in ("data/train.beton", "data/val.beton", "signals.npz", "subset.npz", "trained/spec.json",
                 "pruned/spec.json", "final/model.safetensors", "results.json", "report.html", "log.jsonl",
                 "config.yaml", "versions.txt"):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    assert not list(finished.rglob("*.part"))
    assert not [path for path in (finished / "checkpoints").rglob("*") if path.is_file()], "gone when a stage is done"


@pytest.mark.slow
def test_the_results_add_up(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["kept"]["images"] == {"kept": round(0.5 * 1438), "of": 1438}
    for name in ("baseline", "final"):
        assert {"top1", "loss", "params", "macs", "images_seen", "train_seconds", "latency_ms"} <= set(results[name])
    assert results["final"]["macs"] <= 0.5 * results["baseline"]["macs"]
    assert results["final"]["macs"] > 0.35 * results["baseline"]["macs"], "hit, not overshot"
    assert results["baseline"]["images_seen"] == 2 * 1438, "nothing is dropped from an epoch"
    stages = {row["stage"]: row for row in results["ledger"]["stages"]}
    assert stages["baseline"]["image_forwards"] == 3 * 2 * 1438
    assert stages["score"]["image_forwards"] == 3 * 2 * 1438 + 1438


@pytest.mark.slow
def test_the_shipped_model_is_what_the_report_says(finished: Path) -> None:
    import torch

    import lotus
    from lotus.vit.cost import count

    model = lotus.load(finished / "final")
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    results = json.loads((finished / "results.json").read_text())
    assert count(model).params == sum(p.numel() for p in model.parameters()) == results["final"]["params"]
    told = lotus_json("evaluate", DIGITS, f"folder={finished}", *SHORT, "--json")
    assert told["top1"] == pytest.approx(results["final"]["top1"], abs=1e-6)
    assert told["outdated"] is False
    assert lotus_json("evaluate", str(finished), "--json") == told, "a run's folder says it all"


@pytest.mark.slow
def test_a_probe_records_the_images_as_they_are(tmp_path: Path) -> None:
    """What was recorded while it trained is what it says afterwards of the images, though the training mixes them."""
    from selection.signals import Signals

    done = lotus("score", DIGITS, f"folder={tmp_path}", "score.epochs=6", "train.mixup=0.8", "train.cutmix=1.0")
    assert done.returncode == 0, done.stdout + done.stderr
    signals = Signals.load(tmp_path / "signals.npz")
    labels = signals["labels"]
    says = (signals["errors"] + np.eye(10)[labels]).argmax(1)
    assert signals["correct"][0, -1].mean() > (says == labels).mean() - 0.1


def lotus_json(*words: str) -> dict:
    done = lotus(*words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_second_run_does_nothing_and_is_quick(finished: Path) -> None:
    began = time.perf_counter()
    done = lotus("run", DIGITS, f"folder={finished}", *SHORT)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 5
    assert "report.html" in done.stdout


@pytest.mark.slow
def test_a_lottery_redrawn_each_epoch_saves_what_it_says(finished: Path, tmp_path: Path) -> None:
    words = [DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT, "train.epochs=6", "baseline=false",
             f"select.ticket={finished / 'subset.npz'}", "train.redraw={name: infobatch, saving: 0.3}"]  # fmt: skip
    done = lotus("run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, seen = 6 * 719, 6 * 719 - round(0.3 * 6 * 719)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["kept"]["passes"] == {"kept": seen, "of": whole}
    assert results["trained"]["images_seen"] == seen
    stages = {row["stage"]: row for row in results["ledger"]["stages"]}
    assert stages["train"]["image_forwards"] == 3 * seen
    assert results["ledger"]["dense_macs"] == pytest.approx(stages["train"]["macs"] / (719 / 1438 * seen / whole))
    assert f"epoch 6: 719 of 719 images, {100 * (1 - seen / whole):.1f} % of all passes saved" in done.stdout
    assert "passes" in done.stdout.split("LOTUS  digits")[-1]
    assert "redrawn each epoch" in (tmp_path / "run" / "report.html").read_text()
    again = lotus("run", *words)
    assert again.returncode == 0, again.stderr
    assert "epoch 6" not in again.stdout, "done"


@pytest.mark.slow
def test_rs2_by_name_alone(finished: Path, tmp_path: Path) -> None:
    done = lotus("train", DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT,
                 f"select.ticket={finished / 'subset.npz'}", "train.redraw=rs2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "run" / "stages" / "train.json").read_text())["values"]
    assert (values["images_seen"], values["passes_of"]) == (2 * round(0.5 * 719), 2 * 719)


@pytest.mark.slow
def test_a_dry_run_names_what_would_run_and_writes_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    done = lotus("run", DIGITS, f"folder={finished}", *SHORT, "prune.keep.macs=0.6", "--dry-run", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "0.5 -> 0.6" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_a_dry_run_counts_every_width_that_a_search_tries():
    told = {}
    for width in ("auto", "search", "0.75"):
        rows = forecast(read(Path(DIGITS), [f"prune.width={width}", "folder=none"]))
        told[width] = next(row["image_forwards"] for row in rows if row["stage"] == "prune")
    assert told == {"auto": told["0.75"], "search": 6 * told["0.75"], "0.75": told["0.75"]}


@pytest.mark.slow
@pytest.mark.parametrize("asked", [["--again"], ["--from", "select"], []])
def test_what_is_refused_leaves_a_finished_run_as_it_is(finished: Path, asked: list[str]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    done = lotus("run", DIGITS, f"folder={finished}", *SHORT, *asked, "prune.keep.macs=0.001")
    assert done.returncode == 2
    assert "out of reach" in done.stderr
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


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
    assert "score" not in {row["stage"] for row in ledger["stages"]}, "this ticket's probe is not this run's"


@pytest.mark.slow
def test_data_that_went_are_written_again(finished: Path, tmp_path: Path) -> None:
    words = ["prepare", DIGITS, f"folder={tmp_path / 'run'}", *SHORT]
    assert lotus(*words).returncode == 0
    beton = tmp_path / "run" / "data" / "train.beton"
    whole = beton.read_bytes()
    for damage in (beton.unlink, lambda: beton.write_bytes(whole[:-200])):
        damage()
        done = lotus(*words)
        assert done.returncode == 0, done.stderr
        assert beton.stat().st_size == len(whole)


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
def test_one_probe_serves_every_score_and_every_policy(finished: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(finished: Path, tmp_path: Path, sent: int) -> None:
    words = ["train", DIGITS, f"data.folder={finished / 'data'}", *SHORT, "train.epochs=4", "train.save_minutes=0.001"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):  # the ticket is the same: scoring again would only take time
        words_here = [*words, f"folder={folder}", f"select.ticket={finished / 'subset.npz'}"]
        if folder == whole:
            assert lotus(*words_here).returncode == 0
            continue
        started = subprocess.Popen(
            [sys.executable, "-m", "lotus", *words_here], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        )  # fmt: skip
        deadline = time.time() + 120
        while not list((broken / "checkpoints").rglob("manifest.json")) and time.time() < deadline:
            assert started.poll() is None, started.stdout.read()  # type: ignore[union-attr]
            time.sleep(0.02)
        started.send_signal(sent)
        said, _ = started.communicate(timeout=60)
        assert started.returncode == (-9 if sent == signal.SIGKILL else 75), said
        again = lotus(*words_here)
        assert again.returncode == 0, again.stderr
    assert (whole / "trained" / "model.safetensors").read_bytes() == (
        broken / "trained" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["torchrun", "--nproc_per_node=2"], ["deepspeed", "--num_gpus=2"]])
def test_two_ranks_train_what_one_trains(finished: Path, tmp_path: Path, launcher: list[str]) -> None:
    from safetensors.numpy import load_file

    words = [DIGITS, f"data.folder={finished / 'data'}", *SHORT, f"select.ticket={finished / 'subset.npz'}",
             "train.mixup=0", "train.cutmix=0"]  # each rank mixes among its own images  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert lotus("train", *words, f"folder={one}").returncode == 0
    command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:]]
    command += ["--master_port", str(free_port()), "tools/train.py", *words, f"folder={two}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
             "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    a, b = (load_file(folder / "trained" / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-3, err_msg=name)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ------------------------------------------------------------------------------------------------------------- patches

PATCHES = {
    "input": ["train.patches.mode=input", "train.patches.keep=0.7"],
    "asked": [
        "train.patches={mode: input, keep: 0.7, score: attention}",
        "train.augment.crop=pad",
        "train.augment.pad=1",
    ],
    "evit": ["train.patches={mode: evit, keep: 0.7, at: [0, 1], evaluate: sparse}"],
    "drops": ["train.patches={mode: evit, keep: 0.7, fuse: false, ramp: 0.9, warmup: 0.1}"],
    "tome": ["train.patches={mode: tome, keep: 0.7, evaluate: sparse}"],
    "dropout": ["train.patches={mode: dropout, keep: 0.7}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHES)
def test_training_on_patches_counts_what_it_went_through(finished: Path, tmp_path: Path, name: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import lotus as library
    from lotus.config import read
    from lotus.vit.tokens import Tokens

    asked = [f"train.patches.model={finished / 'baseline'}"] if name == "asked" else []
    words = [*SHORT, *PATCHES[name], *asked, f"folder={tmp_path}", f"data.folder={finished / 'data'}",
             f"select.ticket={finished / 'subset.npz'}"]  # fmt: skip
    done = lotus("train", DIGITS, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "stages" / "train.json").read_text())
    model = library.load(tmp_path / "trained").train().requires_grad_(False)
    for module in model.modules():  # torch's counter does not see fused attention on the CPU
        if hasattr(module, "fused_attn"):
            module.fused_attn = False

    def counted(reduced: Tokens | None) -> float:
        if reduced is not None and reduced.settings.mode == "input":
            reduced.choose(torch.rand(1, 16))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 8, 8))
        return counter.get_total_flops() / 2

    images, patches = 719, read(DIGITS, words).train.patches
    per_epoch = [128] * 5 + [79]
    dense, total = counted(None), 0.0
    assert sum(per_epoch) == images
    with Tokens(model, patches) as reduced:
        for step, batch in enumerate(per_epoch * 2):
            reduced.schedule(step / 12)
            total += batch * counted(reduced)
    if name == "asked":
        total += 1438 * dense / 3  # the model that was asked is the dense one, a forward an image
        assert len(list((finished / "data").glob("patches-*.npz"))) == 1
    assert record["macs"] == pytest.approx(3 * total)
    assert record["macs"] < 0.97 * 3 * 2 * images * dense + (1438 * dense if name == "asked" else 0)
    assert record["values"]["patches"]["evaluated"] == patches.evaluate
    told = lotus_json("evaluate", DIGITS, *words, "--model", "trained", "--json")
    assert told["top1"] == pytest.approx(record["values"]["top1"], abs=1e-6)
    assert (told["macs"] < dense) == (patches.evaluate == "sparse")
    foreseen = lotus("train", DIGITS, *words, "--again", "--dry-run", COLUMNS="200")
    assert f"patches: {patches.mode}, keep 0.7, evaluated {patches.evaluate}" in foreseen.stdout
    assert si_of(record["macs"]) in foreseen.stdout or name in ("drops", "asked"), foreseen.stdout


def si_of(value: float) -> str:
    from lotus.report.numbers import si

    return si(value)


@pytest.mark.slow
def test_a_patch_ticket_alone_and_what_training_makes_of_it(finished: Path, tmp_path: Path) -> None:
    from PIL import Image

    shutil.copytree(finished / "data", tmp_path / "data", ignore=shutil.ignore_patterns("patches-*"))
    made = lotus_json("patches", str(tmp_path / "data"), "--score", "attention", "--model", str(finished / "baseline"),
                      "--keep", "0.5", "--picture", str(tmp_path / "sheet.png"), "--json")  # fmt: skip
    assert made["made"]
    assert (made["images"], made["kept"], made["of"], made["patch"]) == (1438, 8, 16, [2, 2])
    assert 0.5 < made["mass"] <= 1
    assert np.mean(made["mean_map"]) == pytest.approx(0.5, abs=0.01), "ranks"
    assert min(Image.open(tmp_path / "sheet.png").size) > 300
    words = [DIGITS, *SHORT, f"folder={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}",
             f"select.ticket={finished / 'subset.npz'}", "train.augment.flip=true"]  # fmt: skip
    again = lotus_json("patches", *words, "--score", "attention", "--model", str(finished / "baseline"), "--json")
    assert not again["made"]
    assert again["file"] == made["file"]
    done = lotus("train", *words, "train.patches={mode: input, keep: 0.5, score: attention}",
                 f"train.patches.model={finished / 'baseline'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "data").glob("patches-*.npz"))) == 1, "training takes the ticket that was made"
    random = lotus_json("patches", *words, "--score", "random", "--keep", "0.5", "--json")
    assert np.ptp(random["mean_map"]) < 0.1, "any patch alike"
    assert lotus("train", *words, "train.patches={mode: input, keep: 0.5, score: random, cached: true}").returncode == 0
    assert len(list((tmp_path / "data").glob("patches-*.npz"))) == 2, "training takes this one too"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([DIGITS, "--score", "attention"], "Name one that LOTUS wrote with --model FOLDER"),
        ([DIGITS, "--score", "contrst"], "Did you mean 'contrast'?"),
        ([DIGITS, "--score", "edges", "--model", "x"], "asks no model"),
        ([str(ROOT)], "neither a run nor prepared images"),
        ([DIGITS, "--keep", "0"], "lies in (0, 1]"),
        ([DIGITS, "--images", "0"], "--images: at least 1"),
    ],
)
def test_a_patch_ticket_that_cannot_be(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["patches", *words, f"folder={tmp_path / 'run'}"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "refused before anything is made"


@pytest.mark.slow
def test_a_joint_budget_probes_shares_out_and_is_told(finished: Path, tmp_path: Path) -> None:
    words = [DIGITS, *SHORT, f"folder={tmp_path}", f"data.folder={finished / 'data'}", "select.keep=1", "baseline=false",
             "train.batch_size=64", "train.patches={mode: dropout, keep: 0.5, joint: {buckets: 4}}"]  # fmt: skip
    foreseen = lotus("train", *words, "--dry-run", COLUMNS="200")
    assert foreseen.returncode == 0, foreseen.stderr
    assert "score" in foreseen.stdout, "the images are scored, though all of them train"
    done = lotus("train", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "stages" / "train.json").read_text())
    told = record["values"]["patches"]
    assert [one["keep"] for one in told["joint"]] == [4 / 16, 8 / 16, 12 / 16, 1]
    assert sum(one["images"] for one in told["joint"]) == 1438
    spent = sum(16 * one["keep"] * one["images"] for one in told["joint"])
    assert 0.5 * 16 * 1438 - 4 < spent <= 0.5 * 16 * 1438
    assert told["share"] == pytest.approx(spent / (16 * 1438))
    assert "joint budget: " in done.stdout
    assert si_of(record["macs"]) in foreseen.stdout, "foreseen to the patch"
    refused = lotus("train", *words, "score.patches={mode: dropout, keep: 0.5, joint: {}}")
    assert refused.returncode == 2
    assert "known only after this training" in refused.stderr


@pytest.mark.slow
def test_the_report_says_how_it_was_measured(finished: Path, tmp_path: Path) -> None:
    words = [*SHORT, *PATCHES["evit"], "baseline=false", "finetune.epochs=1", f"folder={tmp_path}",
             f"data.folder={finished / 'data'}", f"select.ticket={finished / 'subset.npz'}"]  # fmt: skip
    done = lotus("run", DIGITS, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["evaluated"]["patches"] == "sparse"
    assert results["evaluated"]["macs"] < results["final"]["macs"]
    tokens = results["kept"]["tokens"]
    assert tokens["kept"] < tokens["of"] == 17
    assert "evaluated sparse: on" in " ".join(done.stdout.split())
    page = (tmp_path / "report.html").read_text()
    assert "evaluated sparse: on" in page
    assert "by evit at keep 0.7; evaluated sparse" in page


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prune.kep=1"], "prune.kep: no such setting. Did you mean 'keep'?"),
        (["select.score=eltwon"], "select.score: there is no 'eltwon'"),
        (["select.pick=css"], "Did you mean 'ccs'?"),
        (["select.pick=ccs", "select.pick.bin=3"], "select.pick.bin: 'ccs' has no such setting. Did you mean 'bins'?"),
        (["select.score=memorization"], "Set score.subsets.runs=10"),
        (["select.score=tdds", "score.gradients=false"], "score.gradients: kl_step would be read. Turn it on"),
        (["prune.criterion=taylr"], "Did you mean 'taylor'?"),
        (["model.name=vit_tinny_patch16_224"], "Did you mean"),
        (["model.name=resnet18", "model.args={}"], "resnet18"),
        (["prune.keep.macs=0.001"], "0.001"),
        (["data.name=digit"], "Did you mean 'digits'?"),
        (["prune.criterion=gate", "train.sparsity.gates=false"], "train.sparsity.gates"),
        (["train.optimizer=adamww"], "Did you mean"),
        (["train.redraw=rs3"], "train.redraw: there is no 'rs3'. Did you mean 'rs2'?"),
        (["train.redraw=infobatch", "train.redraw.savings=0.3"], "Did you mean 'saving'?"),
        (["train.redraw=infobatch", "train.redraw.saving=0.9"], "can save"),
        (["train.redraw=infobatch", "train.redraw.keep=0.5"], "train.redraw.keep: 'infobatch' finds"),
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
        (["train.patches={mode: input, score: attention}"], "Give train.patches.model"),
        (["train.patches={mode: input, model: x}"], "asks no model"),
        (["train.patches={mode: input, score: ats, model: nowhere}"], "nowhere: there is no such folder"),
        (["train.patches={mode: input, score: ats, model: x, evaluate: sparse}"], "Evaluate dense"),
        (["train.patches={mode: evit, cached: true}"], "model and cached are settings of input"),
        (["train.patches={mode: dropout, keep: 1, joint: {}}"], "joint shares out what is left"),
        (["train.patches={mode: dropout, keep: 0.5, joint: {least: 0.6}}"], "joint.least is below keep"),
        (["train.patches={mode: dropout, joint: {bucket: 2}}"], "Did you mean 'buckets'?"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["run", DIGITS, f"folder={tmp_path / 'run'}", *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "signals.npz").exists()


@pytest.mark.parametrize("words", [["run"], ["run", "x.yaml", "--nope"], ["fly"], ["select", "s.npz"], []])
def test_wrong_words_exit_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["prun"], "prune"), (["run", DIGITS, "--from", "tran"], "train"), (["prune", "--rank", "pol"], "pool")],
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
        (["--score", "random", "--pick", "top_k", "--floor", "2", "--no-balance"], "--floor: 2.0 is no part"),
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


@pytest.mark.slow
def test_nan_in_the_loss_names_step_and_rate(finished: Path, tmp_path: Path) -> None:
    done = lotus("train", DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT,
                 f"select.ticket={finished / 'subset.npz'}", "train.lr=1e30", "train.clip=0")  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "step" in done.stderr
    assert "train.lr" in done.stderr or "learning rate" in done.stderr
    assert not (tmp_path / "run" / "trained").exists()


@pytest.mark.slow
def test_zeros_by_a_pattern_and_by_size_after_one_training(finished: Path, tmp_path: Path) -> None:
    import lotus as api
    from lotus.pruning import unstructured

    words = [DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT,
             f"select.ticket={finished / 'subset.npz'}", "train.sparsity.gates=false"]  # fmt: skip
    done = lotus("prune", *words, "prune={method: unstructured, keep: {weights: 0.5}, pattern: '2:4'}")
    assert done.returncode == 0, done.stdout + done.stderr
    model = api.load(tmp_path / "run" / "pruned")
    for name, mask in unstructured.zeros(model).items():
        assert (mask.view(-1, 4).sum(1) == 2).all(), name
    assert "as many MACs as before" in done.stdout
    # another budget is drawn from the training that stands, and is held through the fine-tune
    words.append("prune={method: unstructured, keep: {weights: 0.25}}")
    done = lotus("run", *words, "baseline=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train     begins" not in done.stdout
    stays, of = unstructured.counted(unstructured.zeros(api.load(tmp_path / "run" / "final")))
    assert stays == unstructured.kept_of(0.25, of)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["kept"]["weights"]["kept"] == stays
    assert results["final"]["macs"] == results["trained"]["macs"]
    told = lotus_json("evaluate", *words, "--json")
    assert told["top1"] == pytest.approx(results["final"]["top1"], abs=1e-6)
    for change, says in (
        ("train.sparsity.gates=true", "Set train.sparsity.gates=false"),
        ("finetune.optimizer=muon", "moves weights that were pruned"),
        (
            "prune={method: unstructured, weights: sparse_vit, keep: {weights: 0.5}, pattern: '2:4'}",
            "do not divide by 4",
        ),
        ("score.patches={mode: input, score: attention, model: baseline}", "the probe comes before the baseline"),
    ):
        refused = lotus("run", *words, change)
        assert refused.returncode == 2, refused.stdout
        assert says in refused.stderr
