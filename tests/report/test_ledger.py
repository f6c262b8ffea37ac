"""The ledger's arithmetic, and that its sentences are honest."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folder import STAGES

from lotus.report import ledger, numbers


def rows(**macs):
    return [
        {"stage": stage, "part": STAGES[stage].part, "seconds": 1.0, "image_forwards": 10, "macs": spent}
        for stage, spent in macs.items()
    ]


def test_a_ticket_that_pays_at_once():
    found = ledger.account(rows(score=20e9, baseline=100e9, train=50e9, prune=1e9, finetune=10e9), kept_share=0.5)
    assert found["dense_macs"] == 100e9
    assert found["lottery_macs"] == 81e9
    assert found["selection_macs"] == 20e9
    assert found["saved_macs_a_training"] == 50e9
    assert found["break_even_trainings"] == pytest.approx(0.4)
    assert "pays from the first training on" in found["verdict"]
    assert "0.81 x the computing of the dense training" in found["verdict"]


def test_a_selection_that_costs_more_than_it_saves_says_so_and_when_it_pays():
    found = ledger.account(rows(score=130e9, train=50e9), kept_share=0.5)
    assert found["dense_macs"] == 100e9  # without a baseline: by the same recipe on all images
    assert found["break_even_trainings"] == pytest.approx(2.6)
    assert "cost more than it saves: 130 G MACs once against 50 G a training" in found["verdict"]
    assert "3 or more trainings" in found["verdict"]
    assert "1.80 x" in found["verdict"]


def test_a_budget_is_told_as_the_fraction_that_it_was_asked_as():
    """A smaller model is no baseline of itself, and a plan's own dense training is shorter than the one of the budget."""
    alone = ledger.account(rows(train=30e9), kept_share=1.0, planned=100e9)
    assert (alone["dense_macs"], alone["saved_macs_a_training"]) == (100e9, 0)
    assert alone["verdict"].endswith(
        "took 0.30 x the computing of the dense training of which the budget is a fraction."
    )
    beside = ledger.account(rows(baseline=60e9, train=30e9), kept_share=1.0, planned=100e9)
    assert beside["dense_macs"] == 60e9
    told = "took 0.50 x the computing of the dense training, 0.30 x that of the one of which the budget is a fraction."
    assert beside["verdict"].endswith(told)


def test_the_headline_of_a_smaller_model_is_of_the_dense_one():
    small = {
        "kept": {"images": {"kept": 10, "of": 10}},
        "budget": {"way": "small", "dense_epochs": 20, "dense_model": {"macs": 200, "params": 50}},
        "train": {"top1": 97.0, "macs": 60},
        "finetune": {"top1": 97.0, "macs": 60, "params": 10},
        "ledger": {"dense_macs": 100e9, "lottery_macs": 30e9},
    }
    assert ledger.headline(small, STAGES) == (
        "At 0.30 x the computing of the dense training for 20 epochs, with 100 % of the images and 30 % of the MACs, LOTUS reaches a "
        "top-1 of 97.00 %."
    )
    assert [line.what for line in ledger.compared(small, STAGES)] == ["Parameters", "MACs an image"]
    assert ledger.side(small, STAGES) == "dense"


def test_the_edges():
    nothing_saved = ledger.account(rows(score=1e9, baseline=50e9, train=50e9), kept_share=0.9)
    assert nothing_saved["break_even_trainings"] is None
    assert "never pays" in nothing_saved["verdict"]
    free = ledger.account(rows(baseline=100e9, train=50e9), kept_share=0.5)
    assert free["break_even_trainings"] == 0
    assert "cost nothing and saves 50 G MACs a training" in free["verdict"]
    everything = ledger.account(rows(score=5e9, train=50e9), kept_share=1.0)
    assert "bought nothing" in everything["verdict"]
    assert ledger.account([], kept_share=0.5)["lottery_macs"] == 0


@given(st.floats(1, 1e18), st.floats(0, 1e18), st.floats(0.01, 1), st.one_of(st.none(), st.floats(1, 1e18)))
def test_the_verdict_never_flatters(train, score, kept, baseline):
    stages = rows(score=score, train=train, **({} if baseline is None else {"baseline": baseline}))
    found = ledger.account(stages, kept_share=kept)
    pays = found["break_even_trainings"]
    if kept < 1:
        assert ("never pays" in found["verdict"]) == (pays is None)
        assert ("more than it saves" in found["verdict"]) == (pays is not None and pays > 1)
    assert pays is None or math.isfinite(pays)


RESULTS: dict[str, Any] = {
    "baseline": {"top1": 98.6, "loss": 0.06, "params": 200_000, "macs": 4_000_000, "images_seen": 28_740,
                 "train_seconds": 20.0, "latency_ms": {"batch_1": 2.0, "batch_N": 30.0, "batch": 64, "device": "cpu", "dtype": "fp32"}},
    "train": {"top1": 98.0, "images_seen": 14_370, "train_seconds": 11.0},
    "finetune": {"top1": 97.9, "loss": 0.07, "params": 100_000, "macs": 1_960_000, "images_seen": 7_190,
              "train_seconds": 4.0, "latency_ms": {"batch_1": 1.9, "batch_N": 17.0, "batch": 64, "device": "cpu", "dtype": "fp32"}},
    "kept": {"images": {"kept": 718, "of": 1437}},
    "ledger": {"dense_macs": 3.4e11, "lottery_macs": 2.9e11},
}  # fmt: skip


def test_the_table_compares_like_with_like():
    lines = {line.what: line for line in ledger.compared(RESULTS, STAGES)}
    assert lines["Top-1"][1:] == ("98.60 %", "97.90 %", "-0.70 points", False)
    assert lines["Parameters"].change == "0.50 x"
    assert lines["Images trained on, choosing aside"].lotus == "21,560"  # ticket and fine-tune together
    assert lines["Training, choosing aside"].lotus == "15 s"
    assert lines["Latency, batch of 64, cpu fp32"].change == "0.57 x"
    assert lines["MACs spent, choosing included"].change == "0.85 x"


def test_without_a_baseline_training_is_not_compared():
    without = {key: value for key, value in RESULTS.items() if key != "baseline"}
    lines = [line.what for line in ledger.compared(without, STAGES)]
    assert "Top-1" in lines
    assert not [line for line in lines if "raining" in line or "spent" in line]
    assert "its own model before the cut" in ledger.headline(without, STAGES)


def test_the_headline_is_one_sentence():
    assert ledger.headline(RESULTS, STAGES) == (
        "At 0.85 x the dense training's computing, with 50 % of the images and 49 % of the MACs, LOTUS reaches a top-1 of 97.90 %, 0.70 points below the dense model trained "
        "on all images; at a batch of 64 it is 1.76 x as fast."
    )
    told = ledger.headline({**RESULTS, "validation_images": 360}, STAGES)
    assert "LOTUS reaches a top-1 of 97.90 ± 0.76 % (n = 360), 0.70 points below" in told
    pruned = {**RESULTS, "kept": {**RESULTS["kept"], "passes": {"kept": 10_059, "of": 14_370}}}
    assert "with 50 % of the images, 70 % of their passes and 49 % of the MACs" in ledger.headline(pruned, STAGES)
    assert "level with" in ledger.headline({**RESULTS, "finetune": {**RESULTS["finetune"], "top1": 98.6}}, STAGES)
    assert ledger.headline({"finetune": {}}, STAGES) == "The model is done."


def test_numbers_read_well():
    assert [numbers.si(v) for v in (0, 12, 999, 999.9, 1234, 17.56e9, 2e12)] == [
        "0",
        "12",
        "999",
        "1 k",
        "1.23 k",
        "17.6 G",
        "2 T",
    ]
    assert [numbers.duration(v) for v in (0.42, 59.97, 185, 8040, 273600)] == [
        "0.4 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 14 min",
        "3 d 4 h",
    ]
    assert numbers.percent(0.5) == "50 %"
    assert numbers.percent(0.3333) == "33.3 %"
    assert numbers.listed(["a", "b", "c"]) == "a, b and c"


def test_a_dense_model_that_was_asked_is_a_part_of_the_cost():
    spent = rows(baseline=100e9, train=50e9, prune=1e9)
    assert ledger.account(spent, kept_share=1.0)["lottery_macs"] == 51e9
    asked = ledger.account(spent, kept_share=1.0, asks_dense=True)
    assert (asked["lottery_macs"], asked["dense_macs"]) == (151e9, 100e9)
    assert "1.51 x the computing" in asked["verdict"]


def test_a_difference_beyond_chance_is_one_of_two_standard_errors():
    found = ledger.compare_top1(60.0, 55.0, 400)  # by hand: sqrt(.6 * .4 / 400) and sqrt(.55 * .45 / 400)
    assert found["dense_error"] == pytest.approx(2.4495, abs=1e-4)
    assert found["lotus_error"] == pytest.approx(2.4875, abs=1e-4)
    assert not found["beyond_chance"]
    assert ledger.compare_top1(60.0, 55.0, 1600)["beyond_chance"]
    told = ledger.chance({**RESULTS, "validation_images": 359}, STAGES)
    assert "n = 359" in told
    assert "no difference beyond chance" in told


def test_a_small_model_is_billed_beside_the_dense_training():
    spent = [
        {"stage": "score", "part": "choosing", "seconds": 1.0, "image_forwards": 0, "macs": 10.0},
        {"stage": "train", "part": "training", "seconds": 1.0, "image_forwards": 0, "macs": 50.0},
        {"stage": "finetune", "part": "shipped", "seconds": 1.0, "image_forwards": 0, "macs": 20.0},
        {"stage": "baseline", "part": "dense", "seconds": 1.0, "image_forwards": 0, "macs": 40.0},
    ]
    told = ledger.account(spent, kept_share=0.5, small=True)
    # by hand: the dense training would take 50 / 0.5; the lottery took 10 + 50 + 20
    assert (told["dense_macs"], told["baseline_macs"], told["lottery_macs"]) == (100.0, 40.0, 80.0)
    assert told["saved_macs_a_training"] == 50.0
    assert told["verdict"].endswith("0.80 x the computing of the dense training and 2.00 x the small model's.")
    dense = ledger.account(spent, kept_share=0.5)
    assert (dense["dense_macs"], dense["baseline_macs"]) == (40.0, 40.0)
    assert ledger.account(spent[:3], kept_share=0.5)["baseline_macs"] is None


def test_against_a_small_model_the_page_says_so():
    small = {**RESULTS, "baseline": {**RESULTS["baseline"], "kind": "small"}}
    small["ledger"] = {**RESULTS["ledger"], "baseline_macs": RESULTS["ledger"]["lottery_macs"] / 2}
    told = ledger.headline(small, STAGES)
    assert told.startswith("At 2.00 x the small model's computing")
    assert "a small model trained from scratch" in told
    assert "of its MACs" in told
    assert "dense" not in told
    assert ledger.side(small, STAGES) == "small"
    assert ledger.side(RESULTS, STAGES) == "dense"
    line = next(line for line in ledger.compared(small, STAGES) if line.what.startswith("MACs spent"))
    assert line.change == "2.00 x"
