"""A budget of training: what is planned, that the ledger bills it, that a run goes on by it, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import DIGITS, lotus

from lotus.cli import main
from lotus.cli.planning import lines
from lotus.config import Config, read
from lotus.config.training_budget import Budget
from lotus.stages import course, plan_file, plan_table, planner, speed, train
from lotus.stages.ahead import Ahead
from lotus.stages.teacher import teacher_macs
from lotus.training import threads
from lotus.training.optim import make_optimizer
from selection.errors import Refused

OWN = ["train.epochs=12", "prune.calibration=128", "export.onnx=false", "export.latency_batch=8", "baseline=false"]
SHRINK = "budget.ways=[shrink]"
UNCUT = "train.teacher=uncut"


def planned(folder: Path, *words: str, **more: Any) -> planner.Plan:
    return planner.plan(read(DIGITS, [f"folder={folder}", *OWN, *words]), **more)


def at_pace(dense: float, slower: float = 1) -> speed.Tempo:
    """100 images a second in the dense model, twice as many in half of it."""
    return speed.Tempo(((dense / 2, slower / 200), (dense, slower / 100)), slower / 300 / dense)


def test_the_most_epochs_within_the_budget(tmp_path: Path) -> None:
    found = planned(tmp_path, "budget.train=0.33", SHRINK, "prune.keep.macs=0.5")
    assert (found["way"], found["keep"]) == ("shrink", 0.5)
    assert sum(row["share"] for row in found["parts"]) == pytest.approx(found["cost"])
    assert 0.28 < found["cost"] <= 0.33
    # by hand: a tenth of the training at 1, the rest at 0.5, and 128 images looked at, forwards and backwards and once to rotate
    n, dense = 1438, 3 * 12 * 1438
    assert found["cost"] == pytest.approx((3 * found["epochs"] * n * 0.55 + 4 * 128 + 1.5 * 359) / dense, rel=0.02)
    one_more = (3 * (found["epochs"] + 1) * n * 0.55 + 4 * 128 + 1.5 * 359) / dense
    assert one_more > 0.33 * 0.99


def test_what_is_planned_is_a_config_that_is_read_back(tmp_path: Path) -> None:
    config = read(DIGITS, [f"folder={tmp_path}", *OWN, "budget.train=0.33", SHRINK])
    resolved, found = planner.resolved(config)
    assert resolved.budget is None
    assert resolved.train.epochs == found["epochs"]
    assert resolved.train.shrink is not None
    assert resolved.train.shrink.at == plan_table.rule("scratch", 0.33).at
    assert (resolved.select.keep, resolved.finetune.epochs) == (1.0, 0)
    (tmp_path / "config.yaml").write_text(resolved.yaml())
    assert read(tmp_path).model_dump() == resolved.model_dump()


@pytest.mark.slow
def test_who_says_nothing_of_the_size_gets_the_table_s(tmp_path: Path) -> None:
    assert planned(tmp_path, "budget={train: 0.33, keep: measured}")["keep"] == plan_table.rule("scratch", 0.33).keep
    assert planned(tmp_path, "budget.train=0.33")["keep"] == 0.5  # the config says so


@pytest.mark.parametrize("way", ["shrink", "small", "dense"])
def test_each_way_costs_what_it_is_allowed(tmp_path: Path, way: str) -> None:
    found = planned(tmp_path, f"budget={{train: 0.4, ways: [{way}]}}")
    assert found["way"] == way
    assert 0.3 < found["cost"] <= 0.4
    assert found["expected"]["way"] == way


LESS = (
    "train.dynamic=rs2",
    "train.dynamic=infobatch",
    "train.guests=[{name: hardest, keep: 0.5}]",
    "train.patches={mode: dropout, keep: 0.5}",
    "train.teacher={name: resnet18}",
)
"""What changes the cost of a training by more than its model, epochs and patches."""


@pytest.mark.parametrize("words", LESS)
@pytest.mark.parametrize("way", ["shrink", "small", "dense"])
def test_a_plan_costs_what_its_stages_forecast(tmp_path: Path, way: str, words: str) -> None:
    """Of a teacher, of images and patches that are left out, in each way; and the budget is spent."""
    config = read(
        DIGITS, [f"folder={tmp_path}", *OWN, f"budget={{train: 0.9, ways: [{way}]}}", "train.sparsity={}", words]
    )
    budget = 0.9 if "teacher" not in words else 0.9 * teacher_share(config)
    config = config.model_copy(update={"budget": Budget(train=budget, ways=(way,))})
    found = planner.plan(config)
    assert found["way"] == way
    run = planner.run_of(planner.applied(config, found["settings"]))
    ahead = Ahead(run.config)
    forecast = sum((run.stages[name].forecast(ahead) or (0, 0))[1] for name in run.plan())
    assert sum(row["macs"] for row in found["parts"]) == pytest.approx(forecast)
    assert forecast <= budget * found["dense_macs"] * (1 + 1e-9)
    epoch = forecast / found["epochs"]
    assert forecast + 1.05 * epoch > budget * found["dense_macs"]
    rows = {row["part"]: row["macs"] for row in found["parts"]}
    assert (rows["teacher"] > 0) == ("teacher" in words)
    assert all(cost >= 0 for cost in rows.values())


def teacher_share(config: Config) -> float:
    """How much dearer an epoch of the dense model gets by the teacher."""
    return 1 + teacher_macs(config.train, Ahead(config)) / (3 * Ahead(config).macs)


def test_the_uncut_model_teaches_what_was_cut_alone(tmp_path: Path) -> None:
    found = planned(tmp_path, "budget.train=0.5", UNCUT, "prune.keep.macs=0.5", "train.sparsity={}", "train.shrink={}")
    rows = {row["part"]: row["macs"] for row in found["parts"]}
    # by hand: a third of a dense step for each image that comes after the cut, whose own step is half of one
    assert rows["teacher"] == pytest.approx(2 / 3 * rows["training, after the cut"], rel=0.03)


def test_given_weights_never_start_a_smaller_model() -> None:
    assert plan_table.possible("given", ("shrink", "small", "dense")) == ("shrink",)


def cell(
    way: Any, top1: float, cost: float = 0.3, seed: int = 0, data: str = "cifar10", keep: float = 0.3
) -> plan_table.Cell:
    return plan_table.Cell(data, "scratch", way, cost, seed, cost, 0.1 if way == "shrink" else None, keep, top1)


def measured(monkeypatch: pytest.MonkeyPatch, *cells: plan_table.Cell) -> None:
    monkeypatch.setattr(plan_table, "cells", lambda: cells)


def both(cost: float) -> dict[Any, float]:
    return {"shrink": cost, "small": cost}


@pytest.mark.parametrize(("shrink", "way"), [(70.0, "small"), (70.4, "small"), (70.5, "shrink"), (69.0, "small")])
def test_a_training_that_shrinks_has_to_be_half_a_point_ahead(
    monkeypatch: pytest.MonkeyPatch, shrink: float, way: str
) -> None:
    measured(monkeypatch, cell("shrink", shrink), cell("small", 70.0))
    found, why = plan_table.choose("scratch", both(0.3), 0.3)
    assert found == way
    assert f"{shrink:.2f} %" in why
    assert "70.00 %" in why
    assert ("has to be 0.5 points ahead" in why) == (way == "small")


def test_ways_are_compared_at_equal_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that cost more is ahead by no more than its cost is worth: 10 points a factor of 2."""
    measured(monkeypatch, cell("shrink", 70.0, 0.2), cell("small", 69.0, 0.18), cell("small", 79.0, 0.36))
    between = 69 + 10 * math.log2(0.2 / 0.18)
    small = plan_table.curve("cifar10", "scratch", "small", 0.3)
    assert plan_table.at_cost(small, 0.2) == pytest.approx(between)
    assert plan_table.choose("scratch", both(0.2), 0.3)[0] == "small"
    assert plan_table.at_cost(small, 5.0) == 79.0  # level beyond


def test_beyond_what_was_measured_of_both_the_nearest_cost_of_both_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(
        monkeypatch,
        cell("shrink", 70.0, 0.2),
        cell("shrink", 74.0, 0.3),
        cell("small", 60.0, 0.1),
        cell("small", 72.0, 0.3),
    )
    assert plan_table.choose("scratch", both(0.01), 0.3)[1].startswith(
        "on cifar10, at 0.2 of the dense training, a training"
    )
    assert "at 0.3 of the dense" in plan_table.choose("scratch", both(1), 0.3)[1]


def test_each_way_is_read_at_what_it_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the minutes that a training that shrinks spends on 0.2, a smaller model that is slower by the operation gets 0.1 done."""
    both_ways = [cell(way, top1, cost) for way in ("shrink", "small") for top1, cost in ((70.0, 0.1), (74.0, 0.2))]
    measured(monkeypatch, *both_ways)
    assert plan_table.choose("scratch", both(0.2), 0.3)[0] == "small"
    way, why = plan_table.choose("scratch", {"shrink": 0.2, "small": 0.1}, 0.3)
    assert way == "shrink"
    assert "at 0.2 of the dense training, a training that shrinks ends at 74.00 % and a smaller model" in why
    assert "from scratch at 0.1 at 70.00 %" in why


def test_seeds_are_averaged_and_images_with_measurements_of_their_own_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured(
        monkeypatch, cell("shrink", 70.0), cell("shrink", 72.0, seed=1), cell("small", 70.6), cell("shrink", 50.0, data="cifar100"),
        cell("small", 50.0, data="cifar100"),
    )  # fmt: skip
    assert plan_table.curve("cifar10", "scratch", "shrink", 0.3) == [(0.3, 71.0, 2)]
    assert plan_table.curve("mine", "scratch", "shrink", 0.3) == [(0.3, 71.0, 2)]
    assert plan_table.choose("scratch", both(0.3), 0.3, "mine")[0] == "small"
    assert (
        "on cifar100, at 0.3 of the dense training, a training that shrinks ends at 50.00 %"
        in plan_table.choose("scratch", both(0.3), 0.3, "cifar100")[1]
    )


def test_figures_of_two_data_sets_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, cell("shrink", 70.0), cell("small", 69.0), cell("small", 80.0, data="cifar100"))
    assert plan_table.choose("scratch", both(0.3), 0.3, "cifar100")[0] == "shrink"


def test_of_several_sizes_the_nearest_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, cell("shrink", 70.0), cell("shrink", 75.0, keep=0.498), cell("small", 70.0))
    assert plan_table.curve("cifar10", "scratch", "shrink", 0.5) == [(0.3, 75.0, 1)]
    assert plan_table.curve("cifar10", "scratch", "shrink", 0.25) == [(0.3, 70.0, 1)]


def test_nothing_measured_is_the_shrinking_training_s(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, cell("shrink", 70.0))
    assert plan_table.choose("scratch", both(0.3), 0.3) == ("shrink", "nothing else was measured")


def test_every_cell_can_be_read_and_each_start_has_its_ways() -> None:
    cells = plan_table.cells()
    assert all(one.cost > 0 and 0 < one.keep <= 1 and 0 < one.top1 < 100 for one in cells)
    assert {("scratch", way) for way in ("shrink", "small", "dense")} <= {(one.start, one.way) for one in cells}
    assert {("given", "shrink"), ("given", "dense")} <= {(one.start, one.way) for one in cells}
    assert len({(one.kind, one.seed) for one in cells}) == len(cells)


def test_cells_of_the_benchmark_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_table, "FILE", tmp_path / "measured.csv")
    (tmp_path / "measured.csv").write_text(",".join(plan_table.Cell._fields) + "\n")
    plan_table.cells.cache_clear()
    common = {
        "row": "cifar10",
        "images": 0,
        "budget": 0.17,
        "seed": 0,
        "cost": 0.18096,
        "macs": 0.29838,
        "top1": 71.333,
    }
    lines: list[dict[str, Any]] = [
        {**common, "arm": "lotus", "set": ["train.epochs=6", "train.shrink.at=0.0571"]},
        {**common, "arm": "dense", "set": ["model.weights=/x"]},
        {**common, "arm": "lotus-sides", "set": []},  # none of the planner's
        {**common, "arm": "narrow", "set": [], "images": 5000},  # a part of the images
        {**common, "arm": "narrow", "set": ["train.schedule=linear"]},  # another recipe
    ]
    try:
        assert plan_table.add(lines) == 2
        assert plan_table.add(lines) == 0
        assert plan_table.add([{**lines[0], "top1": 72.0}]) == 1  # anew
        assert plan_table.cells() == (
            plan_table.Cell("cifar10", "scratch", "shrink", 0.17, 0, 0.181, 0.0571, 0.298, 72.0),
            plan_table.Cell("cifar10", "given", "dense", 0.17, 0, 0.181, None, 0.298, 71.33),
        )
    finally:
        plan_table.cells.cache_clear()


def test_a_model_that_cannot_be_narrowed_shrinks(tmp_path: Path) -> None:
    swin = [
        "model=swin_tiny_patch4_window7_224",
        "model.args={img_size: 32, window_size: 2, embed_dim: 32, depths: [1, 1], num_heads: [2, 4]}",
    ]
    found = planned(tmp_path, "budget.train=0.5", "prune.keep.macs=0.6", *swin)
    assert found["way"] == "shrink"
    assert "narrower ViT" in found["why"]


@pytest.mark.parametrize(
    "words",
    [
        ["train.sparsity={}", "train.shrink={}", UNCUT],
        ["train.sparsity={}", "train.shrink={}", "score.proxy=self", "select.keep=0.5", "select.score=el2n", "train.mixup=0", "train.cutmix=0"],
        ["prune.keep={params: 0.5}"],
        ["prune.keep={macs: 0.5, params: 0.5}"],
        ["prune.keep={latency: 0.5}"],
    ],
    ids=["uncut", "self", "params", "both", "latency"],
)  # fmt: skip
def test_what_a_smaller_model_cannot_have_is_not_planned_by_one(tmp_path: Path, words: list[str]) -> None:
    """From scratch a tie is the small model's: without these words it would be one."""
    keep = [] if any("prune.keep" in word for word in words) else ["prune.keep.macs=0.35"]
    assert planned(tmp_path, "budget.train=0.4", "prune.keep.macs=0.35")["way"] == "small"
    images = "select" if "score.proxy=self" in words else "all"
    found = planned(tmp_path, f"budget={{train: 0.4, images: {images}}}", *keep, *words)
    assert found["way"] == "shrink"
    config = read(DIGITS, [*keep, *words])
    kept = plan_file.applied(config, found["settings"]).prune.keep.asked
    assert kept == found["ships"] == config.prune.keep.asked, "the size is met in the measure that is asked for"
    for measure, name in {"macs": "MACs", "params": "parameters", "latency": "latency"}.items():
        assert (f"of the {name}" in lines(found)[0]) == (measure in kept), "the plan promises nothing else"
    why = {
        UNCUT: "train.teacher=uncut",
        "score.proxy=self": "score.proxy=self",
        "prune.keep={latency: 0.5}": "prune.keep.latency",
    }
    said = next((why[word] for word in words if word in why), "prune.keep.params")
    assert found["why"] == f"only a cut does as {said} says"


def test_what_a_plan_does_without_is_said(tmp_path: Path) -> None:
    words = [
        "budget.train=0.4",
        SHRINK,
        "finetune.epochs=3",
        "train.sparsity={}",
        "train.shrink={until_stable: {epochs: 1}, at: 0.4}",
    ]
    (aside,) = [note for note in planned(tmp_path, *words)["notes"] if "does without" in note]
    assert "without finetune.epochs, select.keep, train.shrink.until_stable, train.shrink.at;" in aside
    usual = planned(
        tmp_path,
        "budget.train=0.4",
        SHRINK,
        "train.sparsity={}",
        "train.shrink={at: 0.1}",
        "finetune.epochs=0",
        "select.keep=1",
    )
    assert not [note for note in usual["notes"] if "does without" in note]


def test_the_page_is_printed_from_the_table() -> None:
    """Else: python -m lotus.stages.plan_table > docs/measured.md"""
    docs = Path(__file__).resolve().parents[2] / "docs" / "measured.md"
    assert docs.read_text() == plan_table.markdown()


def test_minutes_are_met_by_the_pace_that_was_timed(tmp_path: Path) -> None:
    dense = Ahead(read(DIGITS)).macs
    tempo = at_pace(dense)
    found = planned(tmp_path, "budget.minutes=2", SHRINK, timed=lambda ahead: tempo)
    epochs, n = found["epochs"], 1438
    each = 0.1 / 100 + 0.9 / 200 + 0.05 / 100  # an image at the pace of its model, and what engine and loader add
    looked = (
        (4 * 128 + 359) / 300 + 359 / 600 + 7 * 359 / 600
    )  # forwards, before and after the cut, and each third epoch at most
    assert epochs * n * each < found["seconds"] <= 120
    assert found["seconds"] == pytest.approx(epochs * n * each + looked, rel=0.03)
    assert found["pace"] == {"images_per_second": [[dense / 2, 200.0], [dense, 100.0]]}


@pytest.mark.parametrize(("slower", "way"), [(1.0, "small"), (3.0, "shrink")])
def test_in_minutes_a_slower_model_gets_less_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float, way: str
) -> None:
    monkeypatch.setattr(
        plan_table, "_cut_or_small", lambda data, cost, small, keep: ("small" if small > 0.6 * cost else "shrink", "")
    )
    dense = Ahead(read(DIGITS)).macs

    def timed(ahead: Ahead) -> speed.Tempo:
        return at_pace(dense, 1 if ahead.config.train.shrink else slower)

    found = planned(tmp_path, "budget.minutes=2", timed=timed)
    assert found["way"] == way
    assert found["pace"] == at_pace(dense, slower if way == "small" else 1).record()
    assert 60 < found["seconds"] <= 120


def test_the_pace_is_that_of_the_training_s_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = [], torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "worth", lambda model, images, most: before + 1)

    def step(*given: Any) -> tuple[float, float]:
        seen.append(torch.get_num_threads())
        return 1.0, 1.0

    monkeypatch.setattr(speed, "timed_step", step)
    speed.timer(Ahead(read(DIGITS, [f"folder={tmp_path}", *OWN, "device=cpu"])))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_the_pace_is_read_off_the_clock(tmp_path: Path) -> None:
    config = read(
        DIGITS, [f"folder={tmp_path}", *OWN, "device=cpu", "train.batch_size=8", "train.sparsity={}", "train.shrink={}"]
    )
    ticks = itertools.count(0.0, 0.5)  # each step takes half a second
    ahead = Ahead(config)
    tempo = speed.timer(ahead, clock=lambda: next(ticks))
    small = course.shapes_of(ahead)[1].macs()
    assert tempo == speed.Tempo(((small, 1 / 16), (ahead.macs, 1 / 16)), 1 / 16 / ahead.macs / 3)


def test_in_bf16_a_step_is_timed_as_the_engine_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in bf16, and the optimizer moves fp32 weights; autocast would cast them anew, and leave half of the model in fp32."""
    seen: set[Any] = set()

    def made(model: torch.nn.Module, recipe: Any) -> Any:
        found = make_optimizer(model, recipe)
        block = model.blocks[0]  # type: ignore[index]
        block.register_forward_pre_hook(
            lambda _, given: seen.add(("forward", given[0].dtype, block.norm1.weight.dtype))
        )
        step = found.step

        def moves() -> None:
            kinds = {(p.dtype, p.grad.dtype) for p in model.parameters() if p.grad is not None}
            seen.update(("step", *kind) for kind in kinds)
            step()

        monkeypatch.setattr(found, "step", moves)
        return found

    monkeypatch.setattr("lotus.training.optim.make_optimizer", made)
    ticks = itertools.count(0.0, 0.5)
    config = read(DIGITS, [f"folder={tmp_path}", *OWN, "device=cpu", "train.batch_size=8", "train.precision=bf16"])
    speed.timer(Ahead(config), clock=lambda: next(ticks))
    assert seen == {("forward", torch.bfloat16, torch.bfloat16), ("step", torch.float32, torch.float32)}


@pytest.mark.parametrize(
    ("words", "least"),
    [
        (["train.sides=[[0, 4], [0.5, 8]]"], 4),  # the small model sees small pictures in no epoch
        (["train.patches={mode: dropout, keep: 0.5}"], None),
        (["train.patches={mode: dropout, keep: 0.5, until: 0.7}"], None),
        (["train.patches={mode: input, keep: 0.5, score: contrast}"], None),
    ],
)
def test_smaller_pictures_and_fewer_tokens_are_timed(tmp_path: Path, words: list[str], least: int | None) -> None:
    config = read(
        DIGITS,
        [
            f"folder={tmp_path}",
            *OWN,
            "device=cpu",
            "train.batch_size=8",
            "train.sparsity={}",
            "train.shrink={}",
            *words,
        ],
    )
    ahead, ticks = Ahead(config), itertools.count(0.0, 0.5)
    (low, _), (high, _) = speed.timer(ahead, clock=lambda: next(ticks)).points
    pieces = [piece.macs for piece in course.pieces(ahead)]
    assert low <= min(pieces) * 1.02
    assert high >= max(pieces) * 0.98


def test_between_what_was_timed_the_pace_is_a_straight_line() -> None:
    tempo = speed.Tempo(((100.0, 2.0), (300.0, 4.0)), 0.01)
    assert [tempo.of(macs) for macs in (50, 100, 200, 300, 600)] == [2, 2, 3, 4, 8]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["budget={}"], "say budget.train or budget.minutes"),
        (["budget.train=0.3", "budget.minutes=5"], "one of the two"),
        (["budget.train=0"], "budget.train"),
        (["budget.trian=0.3"], "budget.trian: no such setting. Did you mean 'train'?"),
        (["budget={train: 0.3, ways: []}"], "budget.ways: say at least one of"),
        (
            ["budget.train=0.001", SHRINK],
            "budget.train: 0.001 of the dense training is less than one epoch costs: 0.",
        ),
        (["budget.train=0.001", SHRINK], ", of which proxy and calibration are 0."),
        (["budget.train=0.03"], "is less than one epoch costs: 0."),
        (
            ["budget={train: 0.4, ways: [small, dense]}", "train.sparsity={}", "train.shrink={}", UNCUT],
            "budget.ways: train.teacher=uncut wants a training that shrinks",
        ),
        (
            ["budget={train: 0.4, ways: [small]}", "prune.keep={params: 0.5}"],
            "budget.ways: a smaller model is one of so many MACs",
        ),
        (["budget.train=0.3", "prune.keep.macs=1"], "prune.keep.macs: all is to stay"),
        (
            ["budget.train=0.3", "prune.keep.macs=1", "train.sparsity={}", "train.shrink={}"],
            "or set budget.ways=[dense]",
        ),
        ([], "budget: nothing says what the training may cost"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", DIGITS, f"folder={tmp_path}", *OWN, *words]) == 2
    assert says in capsys.readouterr().err


def test_what_is_offered_instead_can_be_met(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"Give at least budget\.train=") as refused:
        planned(tmp_path, "budget.train=0.001")
    least = str(refused.value).partition("budget.train=")[2].split(",")[0].removesuffix(".")
    assert planned(tmp_path, f"budget.train={least}")["epochs"] == 1


def test_a_smaller_model_that_would_do_is_offered(tmp_path: Path) -> None:
    for words, offered in (
        (["budget.train=0.05"], True),
        (["budget.train=0.001"], False),
        (["budget.train=0.05", "prune.keep={params: 0.5}"], False),
    ):
        with pytest.raises(Refused) as refused:
            planned(tmp_path, SHRINK, *words)
        assert ("set budget.ways=[small]" in str(refused.value)) == offered
    assert planned(tmp_path, "budget={train: 0.05, ways: [small]}")["epochs"] >= 1


def test_what_costs_nothing_any_more_is_not_offered(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"or set train\.shrink\.evaluate=false"):
        planned(tmp_path, "budget.train=0.001", SHRINK)
    with pytest.raises(Refused) as refused:
        planned(tmp_path, "budget.train=0.001", SHRINK, "train.shrink.evaluate=false", "train.sparsity={}")
    assert "evaluate" not in str(refused.value)


def test_all_may_stay_where_the_dense_model_is_asked_for(tmp_path: Path) -> None:
    words = ["prune.keep.macs=1", "train.sparsity={}", "train.shrink={}"]
    found = planned(tmp_path, "budget={train: 0.5, ways: [dense]}", *words)
    assert (found["way"], found["keep"]) == ("dense", 1.0)
    with pytest.raises(Refused, match="keeps everything"):
        read(DIGITS, words)


def test_a_plan_says_what_it_leaves_out(tmp_path: Path) -> None:
    small = planned(
        tmp_path, "budget={train: 0.4, ways: [small], images: select}", "baseline=textbook", "select.keep=1"
    )
    assert any("a smaller model has no baseline" in note for note in small["notes"])
    assert any("leaves no image out" in note for note in small["notes"])
    dense = planned(tmp_path, "budget={train: 0.4, ways: [dense]}", "baseline=textbook")
    assert not any("a smaller model has no baseline" in note for note in dense["notes"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.lr=3"], "train.lr: 3 is far outside what is usual"),
        (["train.warmup_epochs=50"], "train.warmup_epochs: the rate rises for 50 epochs, and there are 12"),
    ],
)
def test_a_dry_run_warns_as_the_training_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["run", DIGITS, f"folder={tmp_path / 'run'}", *OWN, "--dry-run"]) == 0
    assert says not in "".join(capsys.readouterr())
    assert main(["run", DIGITS, f"folder={tmp_path / 'run'}", *OWN, *words, "--dry-run"]) == 0
    assert says in "".join(capsys.readouterr())


def test_too_few_minutes_are_refused_with_those_of_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"budget\.minutes: an epoch takes"):
        planned(tmp_path, "budget.minutes=0.1", timed=lambda ahead: at_pace(ahead.macs, 100))


@pytest.mark.parametrize("words", LESS)
def test_minutes_know_teachers_and_images_left_out(tmp_path: Path, words: str) -> None:
    """At a pace that is a straight line through zero, seconds are MACs."""
    dense = Ahead(read(DIGITS)).macs
    pace = speed.Tempo(((dense / 1000, 1 / 100_000), (dense, 1 / 100)), 1 / 300 / dense)
    config = read(DIGITS, [f"folder={tmp_path}", *OWN, "train.evaluate_every=0", "train.sparsity={}", words])
    ahead = Ahead(config)
    images, evaluated = train.passes(ahead)[0], 359 / 300
    assert pace.seconds(ahead) == pytest.approx(
        train.forecast(ahead)[1] / 300 / dense + speed.ADDED / 100 * images + evaluated, rel=0.01
    )


def test_several_ranks_are_not_timed(tmp_path: Path) -> None:
    config = read(DIGITS, [f"folder={tmp_path}", *OWN, "budget.minutes=2"])
    with pytest.raises(Refused, match=r"budget\.minutes: several processes"):
        planner.resolved(config, ranks=2)


@pytest.mark.slow
def test_a_plan_that_stands_is_not_made_again(tmp_path: Path) -> None:
    config = read(DIGITS, [f"folder={tmp_path}", *OWN, "budget.minutes=2"])
    first = planner.resolved(config, timed=lambda ahead: at_pace(ahead.macs))
    planner.write(planner.run_of(config), first[1])
    again = planner.resolved(config, timed=lambda ahead: pytest.fail("timed again"))
    assert again[0] == first[0]
    other = config.model_copy(update={"budget": Budget(train=0.3)})
    assert planner.resolved(other)[1]["budget"] == {"train": 0.3, "minutes": None}


@pytest.mark.slow
def test_the_ledger_bills_what_was_planned_and_the_run_goes_on_by_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [DIGITS, f"folder={folder}", *OWN, "train.batch_size=128", "prune.keep.macs=0.5", SHRINK]
    shown = lotus("run", *words, "budget.train=0.33", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "a training that shrinks" in shown.stdout
    assert not folder.exists()
    done = lotus("run", *words, "budget.train=0.33")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((folder / "plan.json").read_text())
    ledger = json.loads((folder / "results.json").read_text())["ledger"]
    assert ledger["lottery_macs"] == pytest.approx(sum(row["macs"] for row in told["parts"]), rel=0.01)
    again = lotus("run", *words, "budget.train=0.33", "--plain")
    assert again.returncode == 0, again.stderr
    assert "begins" not in again.stdout
    for verb, words_more in (("run", ["budget.train=0.5"]), ("plan", ["budget.train=0.33"])):
        refused = lotus(verb, *words, *words_more)
        assert refused.returncode == 2
        assert "a training that is finished" in refused.stderr
        assert "folder=PATH" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["small", "dense"])
def test_the_other_ways_run_and_are_billed_as_planned(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "run"
    done = lotus(
        "run", DIGITS, f"folder={folder}", *OWN, "train.batch_size=128", f"budget={{train: 0.2, ways: [{way}]}}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((folder / "plan.json").read_text())
    ledger = json.loads((folder / "results.json").read_text())["ledger"]
    assert ledger["lottery_macs"] == pytest.approx(sum(row["macs"] for row in told["parts"]), rel=0.01)
