"""The prune stage where it searches, convolves or writes several sizes: end to end on digits, and what it refuses at once."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from in_process import lotus

from lotus import load, stages
from lotus.config import Config, read
from lotus.stages import checks, width_search
from selection.errors import Refused

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "data={name: digits, write: raw, max_side: 0}", "train.epochs=2", "train.batch_size=64", "finetune.epochs=1",
    "prune.calibration=128", "export.onnx=false", "export.latency_batch=8", "baseline=false",
    "model.args={img_size: 8, patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2}",
]  # fmt: skip


def run(config: str, folder: Path, *more: str) -> str:
    done = lotus("run", str(ROOT / "configs" / config), f"folder={folder}", *TINY, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def loaded(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.mark.slow
def test_ratios_are_searched_in_rounds_beside_cp_vit(tmp_path: Path) -> None:
    told = run("papers/auto_ratio.yaml", tmp_path / "run", "prune.search.images=200", "prune.search.grid=3",
               "prune.search.rounds=2", "prune.search.recovery=4", "prune.search.compare.keep=[0.7, 0.4]")  # fmt: skip
    assert "CP-ViT" in told
    found, results = loaded(tmp_path / "run" / "search.json"), loaded(tmp_path / "run" / "results.json")
    dense, chosen = found["dense"], found["chosen"]
    assert results["finetune"]["macs"] == chosen["macs"] < dense["macs"]
    rounds = {row["round"] for row in found["tried"]}
    assert rounds == {0, 1}
    first = [row for row in found["tried"] if row["round"] == 0]
    assert sum(row["how"] == "grid" for row in first) >= 5, "widths that come up again are not measured again"
    taken = min((row for row in first if row["worse"] <= 0.025), key=lambda row: (row["macs"], row["worse"]))
    for row in found["tried"]:  # nested: the second round cuts what the first has left
        if row["round"] == 1:
            for small, large in zip(row["blocks"], taken["blocks"]):
                assert all(small[name] <= large[name] for name in small)
    macs, worse = zip(*((row["macs"], row["worse"]) for row in found["pareto"]))
    assert list(macs) == sorted(macs, reverse=True)
    assert list(worse) == sorted(worse)
    assert loaded(tmp_path / "run" / "pareto.json") == found["pareto"]
    assert [row["keep"] for row in found["rows"]] == [0.7, 0.4]
    assert found["rows"][0]["macs"] > found["rows"][1]["macs"]
    assert results["prune"]["search"]["rows"] == found["rows"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What the search tried" in page
    assert "MACs at equal accuracy compared" in page
    prune = loaded(tmp_path / "run" / "stages" / "prune.json")
    assert prune["values"]["search"]["tried"] == len(found["tried"])
    assert prune["macs"] > found["images"] * dense["macs"]


@pytest.mark.slow
def test_a_recovery_that_leaves_the_dense_model_behind_ends_in_what_the_first_round_left(tmp_path: Path) -> None:
    """So long a recovery without a teacher moves even the uncut model some seven times further than is allowed; it goes through
    the ticket more than once."""
    told = run("papers/auto_ratio.yaml", tmp_path / "run", "select.keep=0.1", "finetune.lr=0.003", "finetune.distill=none",
               "prune.search.drop=0.005", "prune.search.images=100", "prune.search.grid=0", "prune.search.rounds=2",
               "prune.search.recovery=100", "prune.search.compare=null")  # fmt: skip
    assert "nothing is cut here" in " ".join(told.split())
    found = loaded(tmp_path / "run" / "search.json")
    rounds = [[row for row in found["tried"] if row["round"] == number] for number in (0, 1)]
    assert min(row["worse"] for row in rounds[1]) > 0.005
    left = min((row for row in rounds[0] if row["worse"] <= 0.0025), key=lambda row: (row["macs"], row["worse"]))
    assert found["chosen"]["macs"] == left["macs"] == rounds[1][0]["macs"]


@pytest.mark.slow
def test_a_budget_in_rounds_is_that_of_the_dense_model(tmp_path: Path) -> None:
    run("staged.yaml", tmp_path / "run", "score.epochs=1", "prune.search.images=100", "prune.search.grid=0",
        "prune.keep.macs=0.3", "prune.search.rounds=2", "prune.search.recovery=2", "train.sparsity.gates=false")  # fmt: skip
    found = loaded(tmp_path / "run" / "search.json")
    first = [row["macs"] for row in found["tried"] if row["round"] == 0 and row["how"] == "budget"]
    assert 0.48 * found["dense"]["macs"] < max(first) <= 0.3**0.5 * found["dense"]["macs"], "half of the way"
    assert 0.25 * found["dense"]["macs"] < found["chosen"]["macs"] <= 0.3 * found["dense"]["macs"]


@pytest.mark.parametrize(("steps", "batch", "images"), [(20, 64, 143), (200, 64, 1380), (4, 64, 1380), (3, 64, 10)])
def test_a_recovery_takes_its_steps_from_a_small_ticket_too(steps: int, batch: int, images: int) -> None:
    from lotus.data.sample_plan import SamplePlan

    passes, each = width_search.passes_for(steps, batch, images)
    assert each <= images
    taken = passes * SamplePlan(np.arange(each), batch_size=batch).steps()
    assert steps <= taken < steps + passes


@pytest.mark.slow
@pytest.mark.parametrize("more", [["prune.search.kind=blocks"], ["prune.search.kind=ratios", "prune.search.grid=0"]])
def test_a_searched_budget_is_hit(tmp_path: Path, more: list[str]) -> None:
    run("staged.yaml", tmp_path / "run", "score.epochs=1", "prune.search.images=200", "prune.keep.macs=0.6",
        "train.sparsity.gates=false", *more)  # fmt: skip
    found = loaded(tmp_path / "run" / "search.json")
    assert found["chosen"]["macs"] <= 0.6 * found["dense"]["macs"]
    assert found["chosen"]["macs"] > 0.45 * found["dense"]["macs"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["prune.search.kind=blocks", "prune.sizes=[0.3]"])
def test_the_stream_is_narrowed_first(tmp_path: Path, way: str) -> None:
    from lotus.vit import anatomy
    from lotus.vit.cost import count

    told = run("staged.yaml", tmp_path / "run", "score.epochs=1", "prune.embed_dim=0.75", "prune.keep.macs=0.5",
               "train.sparsity.gates=false", way)  # fmt: skip
    assert "Of the residual stream's 32 channels 24 stay, turned." in told
    dense = count(load(tmp_path / "run" / "train")).macs
    for folder, part in (("finetune", 0.5), *((("prune-0.3", 0.3),) if "sizes" in way else ())):
        small = load(tmp_path / "run" / folder)
        assert {block.width for block in anatomy.blocks(small)} == {24}
        assert 0.8 * part * dense < count(small).macs <= part * dense  # of the dense model's, not of the narrower one's
    assert loaded(tmp_path / "run" / "results.json")["kept"]["width"] == {"kept": 24, "of": 32}


@pytest.mark.slow
def test_several_sizes_out_of_one_training(tmp_path: Path) -> None:
    from lotus.vit import anatomy
    from lotus.vit.cost import count

    run("staged.yaml", tmp_path / "run", "score.epochs=1", "prune.sizes=[0.4, 0.8]")
    told = loaded(tmp_path / "run" / "stages" / "prune.json")["values"]["sizes"]
    models = [load(tmp_path / "run" / f"prune-{part}") for part in (0.8, 0.4)]
    dense = count(load(tmp_path / "run" / "train")).macs
    for model, part in zip(models, (0.8, 0.4)):
        assert count(model).macs == told[str(part)]["macs"] <= part * dense
    page = (tmp_path / "run" / "report.html").read_text()
    for part in (0.8, 0.4):
        assert f'<td data-label="folder">prune-{part}</td>' in page
        assert f'<td data-label="top-1, %">{told[str(part)]["top1"]:.2f}</td>' in page
    for large, small in itertools.pairwise([anatomy.blocks(model) for model in models]):
        assert all(a >= b for one, other in zip(large, small) for a, b in zip(one.dims[:4], other.dims[:4]))


def test_what_an_earlier_pruning_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    from lotus.stages.prune import clear

    for name in ("latency.json", "search.json", "pareto.json", "results.json"):
        (tmp_path / name).write_text("{}")
    for name in ("prune-0.4", "prune-0.35", "prune", "prune-notes"):
        (tmp_path / name).mkdir()
        if name != "prune-notes":
            (tmp_path / name / "spec.json").write_text("{}")
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prune", "prune-notes", "results.json"]


@pytest.mark.slow
def test_a_budget_of_latency_is_told_and_its_file_goes_with_it(tmp_path: Path) -> None:
    words = ["score.epochs=1", "prune.latency_batch=64", "train.sparsity.gates=false"]
    told = run("staged.yaml", tmp_path / "run", *words, "prune.keep={latency: 0.9}")
    kept = loaded(tmp_path / "run" / "results.json")["kept"]["latency"]
    assert kept["asked"] == 0.9
    assert kept["measured"] > 0
    assert f"measured {kept['measured']:.3f}" in told
    assert (tmp_path / "run" / "latency.json").exists()
    run("staged.yaml", tmp_path / "run", *words, "prune.keep={macs: 0.6}", "prune.embed_dim=0.75")
    assert not (tmp_path / "run" / "latency.json").exists()
    kept = loaded(tmp_path / "run" / "results.json")["kept"]
    assert kept["width"] == {"kept": 24, "of": 32}
    assert "latency" not in kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        ["prune.search.kind=blocks", "prune.search.images=100", "prune.search.rounds=2"],
        ["prune.search.kind=ratios", "prune.search.images=100", "prune.search.grid=0"],
        ["prune.sizes=[0.85, 0.95]"],
    ],
)
def test_a_budget_of_latency_is_searched_and_drawn_in_sizes(tmp_path: Path, way: list[str]) -> None:
    """By the clock: nothing is said of how exact it is while tests share the machine."""
    from lotus.pruning.latency import Table
    from lotus.vit.cost import count

    told = run("staged.yaml", tmp_path / "run", "score.epochs=1", "prune.latency_batch=64", "train.sparsity.gates=false",
               "prune.keep={latency: 0.9}", *way)  # fmt: skip
    values, results = (
        loaded(tmp_path / "run" / "stages" / "prune.json")["values"],
        loaded(tmp_path / "run" / "results.json"),
    )
    kept = results["kept"]["latency"]
    assert kept == values["latency"]
    assert kept["asked"] == 0.9
    assert f"measured {kept['measured']:.3f}" in told
    Table.from_json((tmp_path / "run" / "latency.json").read_text())
    if "sizes" in values:
        for part in (0.95, 0.85):
            assert values["sizes"][f"{part}"]["latency"]["measured"] > 0
            assert values["sizes"][f"{part}"]["latency"]["asked"] == part
        large, small = (count(load(tmp_path / "run" / f"prune-{part}")) for part in (0.95, 0.85))
        assert small.macs <= large.macs
    else:
        found = loaded(tmp_path / "run" / "search.json")
        assert found["chosen"]["macs"] == results["finetune"]["macs"] < found["dense"]["macs"]
        assert {row["round"] for row in found["tried"]} == ({0, 1} if "rounds" in way[-1] else {0})


def test_held_out_images_are_those_that_nothing_was_trained_on() -> None:
    rng = np.random.default_rng(0)
    ticket, calibration = np.arange(0, 80), np.arange(0, 40)
    rows = width_search.held_out(ticket, 100, calibration, 20, rng)
    assert set(rows) == set(range(80, 100))
    rows = width_search.held_out(ticket, 100, calibration, 30, rng)
    assert set(rows) > set(range(80, 100))
    assert len(rows) == len(set(rows)) == 30
    assert not set(rows) & set(calibration)
    rows = width_search.held_out(np.arange(50), 50, np.arange(50), 30, rng)  # nothing else is there
    assert len(rows) == 30


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["prune.sizes=[0.5]", "prune.search.kind=ratios"], "drawn by scores alone"),
        (["prune.sizes=[0.5]", "prune.scope=per_type"], "scope=global"),
        (["prune.search.kind=blocks", "prune.scope=threshold"], "scope=global"),
        (["prune.search.kind=blocks", "prune.embed_dim=search"], "a search of its own"),
        (["prune.sizes=[0.5]", "prune.embed_dim=search"], r"a search of its own.*sizes: \[\]"),
        (["prune.search.kind=blocks", "prune.in_channels=true"], "prune.in_channels: search chooses among heads"),
        (["prune.keep.latency=0.5", "prune.decouple_qk=true"], "without prune.decouple_qk"),
        (["prune.keep.latency=0.5", "prune.scope=per_type"], "scope=global"),
        (["prune.search.kind=ratios", "prune.method.name=convolve"], "prune.method=structured"),
        (["prune.sizes=[0.5]", "prune.method=soup", "prune.keep={weights: 0.5}"], "prune.method=structured"),
        (["prune.search.drop=0"], "prune.search.drop"),
        (["prune.search.drop=0.05"], "a target of its own"),
        (["prune.search.drop=0.05", "prune.keep={params: 0.5}"], "a target of its own"),
        (["prune.search.kid=ratios"], "Did you mean 'kind'"),
    ],
)
def test_settings_that_contradict_are_refused(overrides: list[str], match: str) -> None:
    with pytest.raises(Refused, match=match):
        read(ROOT / "configs" / "staged.yaml", overrides)


def test_an_allowed_drop_stands_without_a_budget(tmp_path: Path) -> None:
    """Written out and read again too, as a run's folder holds it."""
    for config in (
        read(ROOT / "configs" / "papers" / "auto_ratio.yaml", []),
        read(ROOT / "configs" / "staged.yaml", ["prune.search.drop=0.05", "prune.keep.macs=1"]),
    ):
        assert config.prune.keep.macs == 1
        (tmp_path / "config.yaml").write_text(config.yaml())
        assert read(tmp_path / "config.yaml", []).prune == config.prune
    back = read(ROOT / "configs" / "papers" / "auto_ratio.yaml", ["prune.search.drop=null", "prune.keep.macs=0.35"])
    assert back.prune.keep.macs == 0.35


def test_what_one_process_does_is_refused_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    spvit, ratios = (read(ROOT / "configs" / "papers" / f"{name}.yaml") for name in ("spvit", "auto_ratio"))
    stages.check(spvit)
    stages.check(ratios)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for config in (spvit, ratios):
        with pytest.raises(Refused, match="one process"):
            stages.check(config)


def look_ahead(config: Config) -> None:
    checks.look_ahead(config, stages.STAGES)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("papers/spvit.yaml", ["prune.keep.macs=0.01"]),
        ("staged.yaml", ["prune.sizes=[0.5, 0.001]"]),
        ("staged.yaml", ["prune.search.kind=ratios", "prune.keep.macs=0.05"]),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_anything_is_done(config: str, overrides: list[str]) -> None:
    small = "model.args={img_size: 8, patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2}"
    with pytest.raises(Refused, match="out of reach"):
        look_ahead(read(ROOT / "configs" / config, [small, *overrides]))


def test_a_latency_of_uneven_blocks_is_refused_before_anything_is_done() -> None:
    words = ["model.name=swin_tiny_patch4_window7_224", "model.pos_embed_std=null",
             "model.args={img_size: 32, patch_size: 2, embed_dim: 24, depths: [1, 1], num_heads: [1, 2], window_size: 4}"]  # fmt: skip
    with pytest.raises(Refused, match="blocks differ in width"):
        look_ahead(read(ROOT / "configs" / "staged.yaml", [*words, "prune.keep={latency: 0.9}"]))


def test_a_width_below_the_budget_is_refused_before_anything_is_done() -> None:
    words = ["model.args={img_size: 8, patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2}", "prune.embed_dim=0.25"]
    with pytest.raises(Refused, match=r"prune\.embed_dim: 8 of 32"):
        look_ahead(read(ROOT / "configs" / "staged.yaml", [*words, "prune.keep={macs: 0.9}"]))


def test_a_search_that_recovers_is_done_again_with_another_fine_tune() -> None:
    from lotus.stages import run_of

    config = ROOT / "configs" / "papers" / "auto_ratio.yaml"
    assert "finetune" in run_of(read(config, [])).settings("prune")
    assert "finetune" not in run_of(read(config, ["prune.search.recovery=0"])).settings("prune")


def test_macs_at_equal_accuracy_stand_beside_a_rival() -> None:
    found = {
        "kind": "ratios", "metric": "divergence", "tried": 9, "images": 2000, "rival": "CP-ViT",
        "dense": {"macs": 3_630_000, "params": 203_000, "top1": 97.5},
        "chosen": {"macs": 726_000, "params": 60_000, "attention": 0.3, "mlp": 0.1, "worse": 0.05, "top1": 96.25},
        "rows": [{"name": "70 %", "macs": 2_904_000.0, "worse": 0.04, "top1": 97.0}, {"name": "40 %", "macs": 1_452_000.0, "worse": 0.5, "top1": 91.0}],
        "equal": {"top1": 96.25, "macs": 2_420_000.0, "macs_same_metric": None},
    }  # fmt: skip
    section = width_search.compared(found)
    assert section is not None
    assert section.title == "Beside CP-ViT"
    assert ("70 %", "2.9 M", "80 %", "97.00", "0.0400") in section.rows
    assert ("searched", "726 k", "20 %", "96.25", "0.0500") in section.rows
    assert (
        "at the same held-out top-1, 96.25 ± 0.42 % (n = 2,000), the searched cut takes 30 % of its MACs (2.42 M)"
        in section.text
    )
    assert "at the same divergence CP-ViT has no MACs to compare with" in section.text
    assert width_search.compared({}) is None
    assert width_search.compared({key: found[key] for key in ("kind", "chosen")}) is None
