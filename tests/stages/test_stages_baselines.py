"""What all is compared with: the recipes of its kinds, what makes it run again, what it costs, and that it is taken up again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from running import DIGITS, ROOT, SHORT, lotus, struck

from lotus.config import Baseline, Train, read
from lotus.config.reader import check
from lotus.run import Run
from lotus.stages.baseline import STAGE, TEACHING, affordable, recipe, smaller
from lotus.stages.dry_run import forecast
from lotus.stages.shelf import run_of
from lotus.vit.cost import count
from lotus.vit.model import create
from selection.errors import Refused

SHRINKS = str(ROOT / "configs" / "digits.yaml")
LOTTERY = ["train.shrink.at=0.2", "train.guests=[{name: late_average, last: 0.3}, {name: attention_penalty}]"]


def run(*words: str) -> Run:
    return run_of(read(SHRINKS, words))


def settings(*words: str) -> dict:
    return run(*words).settings("baseline")


# ------------------------------------------------------------------------------------------------ settings and recipes


def test_it_is_written_in_a_word_where_that_says_it():
    for value, wanted, written in (
        (True, Baseline(), True), ("best", Baseline(), True), (False, None, False), (None, None, False),
        ("small", Baseline(name="small"), "small"),
        ({"name": "textbook", "epochs": 3}, Baseline(name="textbook", epochs=3), {"name": "textbook", "epochs": 3}),
    ):  # fmt: skip
        config = check({"baseline": value})
        assert config.baseline == wanted
        assert config.model_dump(mode="json")["baseline"] == written
        assert check({"baseline": written}) == config
    assert read(SHRINKS, ["baseline=small", "baseline.epochs=3"]).baseline == Baseline(name="small", epochs=3)
    assert read(SHRINKS, ["baseline=true", "baseline.epochs=3"]).baseline == Baseline(epochs=3)


def test_the_best_recipe_is_the_training_less_its_lotteries():
    config = read(SHRINKS, LOTTERY)
    best, train = recipe(config, 7), config.train
    assert (best.shrink, best.patches, best.dynamic, best.sides, best.sparsity.gates) == (None, None, None, (), False)
    assert [guest.name for guest in best.guests] == ["late_average"]
    lottery = {"epochs", "shrink", "patches", "dynamic", "sides", "sparsity", "guests"}
    assert best.epochs == 7
    assert best.model_dump(exclude=lottery) == train.model_dump(exclude=lottery)
    assert recipe(read(SHRINKS, [*LOTTERY, "baseline=small"]), 7) == best


def test_the_textbook_s_recipe_is_adamw_with_a_warm_up_and_a_cosine():
    config = read(SHRINKS, [*LOTTERY, "baseline=textbook", "train.schedule=linear"])
    plain = recipe(config, 20)
    assert recipe(read(SHRINKS, ["baseline=textbook", "train.ema=0.9"]), 20).ema == 0
    assert (plain.optimizer, plain.lr, plain.schedule.name, plain.min_lr, plain.ema) == (
        "adamw",
        1e-3,
        "cosine",
        1e-5,
        0,
    )
    assert plain.guests == ()
    assert plain.shrink is None
    assert plain.warmup_epochs == config.train.warmup_epochs == Train().warmup_epochs
    assert recipe(read(SHRINKS, ["baseline=textbook", "train.warmup_epochs=0"]), 20).warmup == 2
    assert (plain.mixup, plain.cutmix, plain.augment) == (config.train.mixup, config.train.cutmix, config.train.augment)


# ------------------------------------------------------------------------------------------------- what runs it again


def test_settings_of_standing_runs_are_what_they_were():
    """As they were when ``baseline`` was a truth value."""
    made = run("baseline=true")
    assert set(settings("baseline=true")) == {
        "train",
        "model",
        "data.normalize",
        "data.crop",
        "data.interpolation",
        "seed",
    }
    beside = {"save_minutes", "keep_checkpoints", "evaluate_every"}  # change nothing of the weights
    gone = {"sparsity", "dynamic", "shrink", "patches", "guests", *TEACHING, *beside}
    assert set(settings()["train"]) == set(Train.model_fields) - gone
    assert made.settings("report") == {"baseline": True}
    assert settings("baseline=best") == settings("baseline=true") == settings("baseline=null")


@pytest.mark.parametrize("kind", ["best", "textbook", "small"])
def test_of_its_own_length_it_does_not_depend_on_the_training_s(kind: str):
    own = [f"baseline={kind}", "baseline.epochs=5"]
    assert settings(*own) == settings(*own, "train.epochs=9")
    assert settings(*own) != settings(f"baseline={kind}", "baseline.epochs=6")
    assert settings(*own) != settings(*own, "train.mixup=0.9")


def test_the_textbook_does_not_depend_on_the_optimizer_of_the_training():
    assert settings("baseline=textbook") == settings("baseline=textbook", "train.optimizer=adamw", "train.lr=5e-4")
    assert settings("baseline=best") != settings("baseline=best", "train.lr=5e-4")


@pytest.mark.parametrize(
    ("stands", "words", "why"),
    [
        ({}, ["baseline=true"], None),
        ({}, ["baseline=textbook"], "baseline.name: best -> textbook"),
        ({"kind": "textbook", "epochs": 20}, ["baseline=best"], "baseline.name: textbook -> best"),
        ({"kind": "best", "epochs": 20}, ["baseline=best"], None),
        ({"kind": "best", "epochs": 30}, ["baseline=best"], "epochs of the baseline: 30 -> 20"),
        ({"kind": "best", "epochs": 20}, ["baseline.epochs=4"], "epochs of the baseline: 20 -> 4"),
        ({"kind": "best", "epochs": 4}, ["baseline.epochs=4", "train.epochs=9"], None),
        ({"kind": "small", "epochs": 55}, ["baseline=small"], None),
    ],
)
def test_another_kind_or_length_runs_it_again(stands: dict, words: list[str], why: str | None):
    assert STAGE.stale(read(SHRINKS, words), stands) == why


# ------------------------------------------------------------------------------------------------------ the small model


@pytest.mark.parametrize("keep", [0.1, 0.35, 0.5, 0.9])
def test_the_width_is_the_nearest_of_all_within_the_budget(keep: float):
    model = read(SHRINKS).model
    heads, thick = model.args["num_heads"], model.args["embed_dim"] // model.args["num_heads"]

    def macs(width: int, heads: int) -> int:
        args = {**model.args, "embed_dim": width, "num_heads": heads}
        return count(create(model.model_copy(update={"args": args}), 10)).macs

    fewer = [macs(h * thick, h) for h in range(1, heads + 1)]
    thinner = [macs(d * heads, heads) for d in range(1, thick + 1)]
    budget = keep * fewer[-1]
    of_fewer, of_all = (max((one for one in found if one <= budget), default=0) for found in (fewer, fewer + thinner))
    found = count(create(smaller(model, keep), 10)).macs
    assert found == (of_fewer if of_fewer >= 0.9 * budget else of_all)


def test_epochs_are_those_that_come_nearest_to_what_was_spent():
    for macs in (1.0, 29.0, 31.0, 44.0, 46.0, 1000.0):  # an epoch of 5 MACs forward is one of 15
        best = min(range(1, 100), key=lambda epochs: abs(macs - 15.0 * epochs))
        assert affordable(macs, 5.0) == best


def test_it_comes_after_the_lottery_and_its_dry_run_spends_what_that_costs(tmp_path: Path):
    rows = {row["stage"]: row for row in forecast(read(SHRINKS, [f"folder={tmp_path}", "baseline=small"]))}
    names = list(rows)
    assert names.index("finetune") < names.index("baseline") < names.index("export")
    lottery = sum(row["macs"] for name, row in rows.items() if name != "baseline")
    assert rows["baseline"]["macs"] == pytest.approx(lottery, rel=0.02)
    assert run("baseline=small").stages["baseline"].curve.course == "small, all images"


def test_a_model_of_no_one_width_is_refused_before_anything_runs():
    words = ["baseline=small", "model={name: swin_tiny_patch4_window7_224}"]
    with pytest.raises(Refused, match=r"baseline\.name: small .* baseline=best"):
        forecast(read(SHRINKS, words))


@pytest.mark.slow
def test_a_small_model_that_was_killed_ends_with_the_same_weights_for_what_the_lottery_cost(
    finished: Path, tmp_path: Path
) -> None:
    words = ["run", DIGITS, f"data.folder={finished / 'data'}", *SHORT, f"select.ticket={finished / 'subset.npz'}"]
    words += ["baseline=small", "train.save_minutes=0.001", "train.epochs=4"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = lotus(*words, f"folder={whole}")
    assert done.returncode == 0, done.stderr
    at_work = broken / "checkpoints" / "baseline"
    struck([*words, f"folder={broken}"], signal.SIGKILL, lambda: any(at_work.rglob("manifest.json")))
    assert not (broken / "stages" / "baseline.json").exists()
    assert lotus(*words, f"folder={broken}").returncode == 0
    models = [(folder / "baseline" / "model.safetensors").read_bytes() for folder in (whole, broken)]
    assert models[0] == models[1]
    results = json.loads((whole / "results.json").read_text())
    costs = {row["stage"]: row["macs"] for row in results["ledger"]["stages"]}
    assert costs["baseline"] == results["ledger"]["baseline_macs"]
    an_epoch = costs["baseline"] / results["baseline"]["epochs"]
    assert abs(costs["baseline"] - results["ledger"]["lottery_macs"]) <= 0.5 * an_epoch
    assert results["baseline"]["macs"] <= 0.5 * results["train"]["macs"]
    assert "the small model's" in results["ledger"]["verdict"]
    assert "latency_ms" not in results["baseline"]
