"""A run is a folder: what is done, why something has to be done, and who may work in it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lotus.cli.shared import load_shelves
from lotus.config import Train, check
from lotus.config.marks import Mark, marked
from lotus.events import Skipped, Wrote
from lotus.files import write_json, write_text
from lotus.record import worded
from lotus.run import Run
from lotus.stages import run_of
from lotus.stages.prepare import lies
from lotus.training import trackers
from selection import methods
from selection.errors import Refused

STAGES = tuple(run_of(check({})).stages.values())


def make(folder: Path, own: Path | None = None, **settings: object) -> Run:
    shelves = load_shelves([] if own is None else [str(own)])
    return run_of(check({"folder": str(folder), "data": {"name": "digits"}, **settings}), shelves)


def do(run: Run, *names: str, lies: str = "") -> None:
    for name in names:
        for path in run.outputs(name).values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        run.finish(name, seconds=1.0, values={"lies": lies} if name == "prepare" else None)


def test_a_finished_stage_is_done_and_its_paths_do_not_matter(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.why("prepare") == "not done yet"
    do(run, "prepare")
    assert make(tmp_path).why("prepare") is None
    assert make(tmp_path, train={"lr": 1}).why("prepare") is None, "a stage's own settings decide"


def test_a_folder_that_was_moved_is_still_done(tmp_path: Path) -> None:
    do(make(tmp_path / "here"), "prepare", "score", "select")
    (tmp_path / "here").rename(tmp_path / "there")
    assert [make(tmp_path / "there").why(name) for name in ("prepare", "score", "select")] == [None] * 3


@pytest.mark.parametrize("place", [".", "stages", "data", "elsewhere"])
def test_what_a_kill_left_is_taken_away_when_a_run_begins(tmp_path: Path, place: str) -> None:
    """Among the images too, whose manifest a run may write anew although prepare is done."""
    run = make(
        tmp_path / "run",
        **({"data": {"name": "digits", "folder": str(tmp_path / "run" / place)}} if place == "elsewhere" else {}),
    )
    left, own = (run.folder / place / name for name in (".val.json.3b5a79c9b0135550.part", ".mine.part"))
    for folder in (left, own):
        folder.mkdir(parents=True)
    with run.held():
        assert not left.exists()
        assert own.exists(), "which no file of ours is called"


def test_pictures_that_come_or_go_are_noticed(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "train" / "cat").mkdir(parents=True)
    before = lies(str(images))
    assert before == lies(str(images)) != ""
    (images / "train" / "cat" / "1.jpg").touch()
    assert lies(str(images)) != before
    assert lies("") == lies(str(tmp_path / "nothing")) == ""
    run = make(tmp_path / "run", data={"name": "imagefolder", "path": str(images)})
    do(run, "prepare", lies=lies(str(images)))
    assert run.why("prepare") is None
    (images / "train" / "cat" / "2.jpg").touch()
    assert run.why("prepare") == "the folder of images was changed"
    shutil.rmtree(images)
    assert run.why("prepare") is None, "what was prepared needs them no more"


def test_own_methods_that_change_are_noticed(tmp_path: Path) -> None:
    """By the stages that call one of them: the others stay done."""
    stages = ("prepare", "score", "select", "baseline", "train", "prune", "finetune", "export")
    request = {"select": {"keep": 0.5, "score": "mine"}, "train": {"dynamic": "mine_too"}}
    own, other = tmp_path / "own.py", tmp_path / "other.py"
    own.write_text("def mine(loss): return loss[0, -1]\n")
    other.write_text("def mine_too(labels): return labels\n")

    def run(*files: Path, **settings: object) -> Run:
        return Run(
            make(tmp_path, **{**request, **settings}).config, STAGES, load_shelves([str(file) for file in files])
        )

    do(run(own, other), *stages)
    assert [name for name in stages if run(own, other).why(name)] == []
    own.write_text("# better\n" + own.read_text())
    assert [name for name in stages if run(own, other).why(name)] == ["select"]
    assert run(own, other).why("select") == "--with: the file that select.score is in was changed, or is another"
    other.write_text("# better\n" + other.read_text())
    assert [name for name in stages if run(own, other).why(name)] == ["select", "train"]
    do(run(own, other), "select", "train", "prune", "finetune", "export")
    assert run(other, own).outdated(stages) == run().outdated(stages) == [], (
        "where no file is named, what stands is not older"
    )


def test_a_file_of_ones_own_that_no_stage_uses_makes_nothing_again(tmp_path: Path) -> None:
    stages = ("prepare", "score", "select", "baseline", "train", "prune", "finetune", "export")
    do(make(tmp_path), *stages)
    mine = tmp_path / "mine.py"
    mine.write_text("def mine(loss): return loss[0, -1]\n")
    assert [name for name in stages if Run(make(tmp_path).config, STAGES, load_shelves([str(mine)])).why(name)] == []
    mine.write_text("def dual(loss): return loss[0, -1]\n")
    assert [name for name in stages if Run(make(tmp_path).config, STAGES, load_shelves([str(mine)])).why(name)] == [
        "select"
    ], "ours"


def test_gates_do_not_concern_the_dense_baseline(tmp_path: Path) -> None:
    do(make(tmp_path), "prepare", "baseline", "score", "select", "train")
    other = make(tmp_path, train={"sparsity": {"gates": True}})
    assert other.why("baseline") is None
    assert "train.sparsity.gates" in str(other.why("train"))


def test_one_proxy_serves_every_ticket(tmp_path: Path) -> None:
    do(make(tmp_path, select={"keep": 0.5}), "prepare", "score", "select")
    other = make(tmp_path, select={"keep": 0.3, "score": "aum", "pick": "k_center"})
    assert other.why("score") is None
    assert other.why("select") is not None
    assert other.needs_proxy
    assert not make(tmp_path, select={"keep": 0.3, "score": "random", "pick": "random"}).needs_proxy
    assert not make(tmp_path, select={"keep": 0.3, "ticket": "t.npz"}).needs_proxy
    assert not make(tmp_path, select={"keep": 0.3, "score": "el2n", "pick": "random"}).needs_proxy, "reads no score"
    assert make(tmp_path, select={"keep": 0.3, "score": "random", "pick": "k_center"}).needs_proxy, "reads embeddings"
    assert not make(tmp_path).needs_proxy, "all images stay"


def test_why_names_the_setting_the_file_or_the_stage(tmp_path: Path) -> None:
    do(make(tmp_path), "prepare", "score", "select", "train")
    assert make(tmp_path, train={"lr": 0.5}).why("train") == "train.lr: 0.001 -> 0.5"
    assert "and 1 more" in str(make(tmp_path, train={"lr": 0.5, "clip": 3}).why("train"))
    run = make(tmp_path)
    run.outputs("select")["subset.npz"].write_text("longer than before")
    assert run.why("select") == "subset.npz was changed"
    run.outputs("select")["subset.npz"].unlink()
    assert run.why("select") == "subset.npz is gone"


@pytest.mark.parametrize("name", marked(Train, Mark.BESIDE, Mark.MEASURES))
@pytest.mark.parametrize("part", ["train", "score", "finetune"])
def test_a_setting_that_changes_nothing_of_what_is_left_makes_nothing_again(
    part: str, name: str, tmp_path: Path
) -> None:
    before = make(tmp_path)
    do(before, *before.stages)
    value = getattr(before.config.train, name) + 1
    after = make(tmp_path, **{part: {name: value}})
    assert [stage for stage in after.stages if after.why(stage)] == []
    assert after.settings(part) == before.settings(part), "a training that is half done is taken up"
    older = before.record(part)
    assert older is not None
    told = {**older.settings, part: {**older.settings[part], name: value}}  # it once was a part of the record
    write_json(tmp_path / "stages" / f"{part}.json", dataclasses.replace(older, settings=told).sealed())
    assert before.why(part) is None


def test_when_it_is_measured_counts_beside_a_guest_that_may_go_by_it(tmp_path: Path) -> None:
    settings = {"guests": [{"name": "loss_spikes"}], "evaluate_every": 1}
    do(make(tmp_path, train=settings), "train")
    assert make(tmp_path, train={**settings, "evaluate_every": 2}).why("train") == "train.evaluate_every: 1 -> 2"
    assert make(tmp_path, train={**settings, "save_minutes": 1}).why("train") is None


WATCHER = """
def diary(model, *, often: int = 3): ...
def heavier(model): ...
WATCHERS = ["diary"]
"""


@pytest.mark.parametrize("guest", ["wandb", {"name": "mlflow", "experiment": "mine"}, {"name": "diary", "often": 5}])
@pytest.mark.parametrize("part", ["train", "score", "finetune"])
def test_a_guest_that_only_watches_makes_nothing_again(part: str, guest: Any, tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine.py", tmp_path / "run"
    mine.write_text(WATCHER, encoding="utf-8")
    plain, watched, later = (
        {part: {"guests": guests}} for guests in (["hardest"], [guest, "hardest"], ["hardest", guest])
    )
    for first, then in ((plain, watched), (watched, plain), (watched, later)):
        before, after = (make(folder, mine, **words) for words in (first, then))
        do(before, *before.stages)
        assert [stage for stage in after.stages if after.why(stage)] == []
        assert after.settings(part) == before.settings(part), "a training that is half done is taken up"
    mine.write_text(WATCHER + "# told otherwise\n", encoding="utf-8")
    assert make(folder, mine, **watched).why(part) is None
    for other in ("late_average", "heavier"):
        changed = make(folder, mine, **{part: {"guests": [guest, "hardest", other]}})
        assert changed.why(part) == f"{part}.guests: hardest -> hardest, {other}"


def test_when_it_is_measured_does_not_count_beside_a_watcher(tmp_path: Path) -> None:
    do(make(tmp_path), "train")
    assert make(tmp_path, train={"guests": ["wandb"], "evaluate_every": 2}).why("train") is None


def test_a_guest_that_takes_the_place_of_a_watcher_counts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def wandb(model): ...\n", encoding="utf-8")
    do(make(tmp_path / "run"), "train")
    told = make(tmp_path / "run", tmp_path / "mine.py", train={"guests": ["wandb"]}).why("train")
    assert str(told).startswith("train.guests: none -> wandb")


def test_every_tracker_only_watches() -> None:
    assert set(trackers.WATCHERS) == set(methods.names(trackers))


def test_a_change_is_told_in_words(tmp_path: Path) -> None:
    do(make(tmp_path), "prepare", "score", "select", "baseline", "train")
    other = make(tmp_path, score={"model": {"name": "resnet18", "pretrained": True}}, train={"mixup": 0.5})
    told = other.why("score")
    assert told is not None
    assert told.startswith("score.model: none -> resnet18, pretrained true")
    assert not set(told) & set('{}[]"')
    assert worded([{"name": "a", "part": 0.7}, {"name": "b", "part": None}]) == "(a, part 0.7), b"
    assert worded({"a": False, "b": 0}) == "b 0"
    values: tuple[Any, ...] = (None, "", [], True, 0, "x" * 200)
    assert [worded(value) for value in values] == ["none"] * 3 + [
        "true",
        "0",
        "x" * 97 + "...",
    ]


def test_what_was_made_from_something_else_is_made_again(tmp_path: Path) -> None:
    do(make(tmp_path), "prepare", "score", "select", "train")
    other = make(tmp_path, select={"keep": 0.5})
    do(other, "select")
    assert other.why("train") == "select was done again"
    assert other.why("prepare") is None


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("select.ticket", "select"), ("select.start", "select"), ("model.weights", "train"), ("model.weights", "score"),
        ("score.model.weights", "score"), ("train.deepspeed", "train"), ("train.deepspeed", "score"), ("train.deepspeed", "baseline"),
    ],
)  # fmt: skip
def test_another_file_under_the_same_name_is_noticed(setting: str, stage: str, tmp_path: Path) -> None:
    """A ticket that was drawn again, weights that were trained on: the config is the same, what it names is not."""
    file = tmp_path / "file"
    file.write_bytes(b"one")
    section, *way = setting.split(".")
    named: object = str(file)
    for name in reversed(way):
        named = {name: named}
    run = make(tmp_path / "run", **{section: named})
    do(run, "prepare", "score", "select", "baseline", "train")
    assert run.why(stage) is None
    file.write_bytes(b"two")
    told = setting.replace("train", stage) if stage == "score" else setting  # which takes it from there
    assert run.why(stage) == f"the file in {told} was changed"
    file.write_bytes(b"one")
    assert run.why(stage) is None, "what counts is what is in the file"
    file.unlink()
    assert run.why(stage) is None, "what was made from it stands"


def test_a_proxy_of_its_own_model_does_not_read_the_runs_weights(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    run = make(tmp_path / "run", model={"weights": str(file)}, score={"model": {"name": "resnet18"}})
    do(run, "prepare", "score", "select", "train")
    file.write_bytes(b"two")
    assert run.why("score") is None
    assert run.why("train") == "the file in model.weights was changed"


def test_other_weights_of_the_model_that_is_asked_are_noticed(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    asked.mkdir()
    (asked / "spec.json").write_text("{}")
    (asked / "model.safetensors").write_bytes(b"one")
    patches = {"mode": "input", "score": "attention", "model": str(asked)}
    run = make(tmp_path / "run", train={"patches": patches}, select={"keep": 1.0})
    do(run, "prepare", "select", "train")
    assert [run.why(name) for name in ("select", "train")] == [None, None]
    (asked / "model.safetensors").write_bytes(b"two")
    assert run.why("train") == "the model in train.patches.model was changed"
    assert run.why("select") is None
    key = run.made_from("train")
    (asked / "model.safetensors").write_bytes(b"one")
    assert run.why("train") is None, "what counts is what is in the file"
    assert run.made_from("train") != key, "a checkpoint of the other weights is passed over"
    shutil.rmtree(asked)
    assert run.why("train") is None, "what is done needs it no more"


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_another_model_of_the_hub_in_the_same_folder_is_noticed(weights: str, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    asked.mkdir()
    for name in ("config.json", weights):
        (asked / name).write_bytes(b"one")
    run = make(tmp_path / "run", model={"weights": str(asked)})
    do(run, "prepare", "score", "select", "train")
    assert run.why("train") is None
    for name in ("config.json", weights):
        (asked / name).write_bytes(b"two")
        assert run.why("train") == "the model in model.weights was changed"
        (asked / name).write_bytes(b"one")
        assert run.why("train") is None


def test_a_joint_budget_of_patches_wants_the_proxy(tmp_path: Path) -> None:
    patches = {"mode": "dropout", "joint": {}}
    assert not make(tmp_path, select={"keep": 1.0}, train={"patches": {"mode": "dropout"}}).needs_proxy
    assert make(tmp_path, select={"keep": 1.0}, train={"patches": patches}).needs_proxy
    assert make(tmp_path, select={"ticket": "x.npz"}, train={"patches": patches}).needs_proxy
    assert not make(tmp_path, select={"keep": 1.0, "score": "random"}, train={"patches": patches}).needs_proxy


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    run = make(tmp_path)
    do(run, "prepare")
    of_ours = ("", "[]", '{"format": 2, "stage": "prepare"}')
    for text in (*of_ours, '{"format": 99}', '{"format": [], "stage": 1}'):
        (tmp_path / "stages" / "prepare.json").write_text(text)
        assert run.record("prepare") is None
        assert run.why("prepare") == ("prepare.json was damaged" if text in of_ours else "not done yet")


def test_every_stage_reads_from_earlier_ones_only() -> None:
    patches = {"mode": "input", "score": "attention", "model": "baseline"}
    for settings in ({}, {"train": {"patches": patches}}, {"select": {"keep": 0.5}}):
        run = make(Path("none"), **settings)
        names = list(run.stages)
        for name in names:
            assert all(names.index(other) < names.index(name) for other in run.after(name))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from lotus.config import check; from lotus.run import Run\n"
        f"with Run(check({{'folder': {str(tmp_path)!r}}})).held(): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Refused, match="another run is at work"), make(tmp_path).held():
            pass
    finally:
        other.communicate("")
    with make(tmp_path).held():
        pass


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_or_a_log_of_another_kind_touches_nothing_elsewhere(kind: str, tmp_path: Path) -> None:
    """A run's folder may come from elsewhere, with links in it."""
    (tmp_path / "mine").write_text("precious")
    for name in (".lock", "log.jsonl"):
        folder = tmp_path / f"run{name}"
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "mine") if kind == "link" else os.mkfifo(folder / name)
        run = Run(check({"folder": str(folder)}))
        with pytest.raises(Refused, match=f"{re.escape(str(folder))}.*(cannot be|is no file)"), run.held():
            run.write_event(Skipped("train"))
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path: Path) -> None:
    deep, there = tmp_path / "runs" / "mine", tmp_path / "there"
    there.mkdir()
    for folder in (deep, there):
        with pytest.raises(Refused, match="no images"), Run(check({"folder": str(folder)})).held():
            raise Refused("no images")
    assert not (tmp_path / "runs").exists()
    assert there.is_dir(), "it was there before"
    with Run(check({"folder": str(deep)})).held():
        (deep / "config.yaml").touch()
    assert (deep / "config.yaml").exists()


def test_a_run_name_cannot_leave_its_place() -> None:
    assert Run(check({"name": "../../etc/x"})).folder == Path("runs/etc-x")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    write_text(file, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Refused, match="No space left on device"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_log_is_one_event_a_line(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.write_event(Wrote("prepare", "a"))
    run.write_event(Wrote("prepare", "b"))
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert [line["path"] for line in lines] == ["a", "b"]
    assert all(line["event"] == "wrote" and line["time"] > 0 for line in lines)


def test_a_setting_that_is_newer_than_a_record_had_its_default(tmp_path: Path) -> None:
    do(make(tmp_path), "prepare", "score", "select")
    for stage, names in (("train", ("schedule", "guests")), ("prune", ("method", "search"))):
        do(make(tmp_path), stage)
        file = tmp_path / "stages" / f"{stage}.json"
        record = json.loads(file.read_text())
        for name in names:
            *way, last = name.split(".")
            inside = record["settings"][stage]
            for step in way:
                inside = inside[step]
            del inside[last]
        del record["digest"]  # as an older LOTUS left it
        file.write_text(json.dumps(record))
    assert [make(tmp_path).why(stage) for stage in ("train", "prune")] == [None, None]
    other = make(tmp_path, train={"schedule": "onecycle"})
    assert other.why("train") == "train.schedule: cosine -> onecycle"


def test_the_baseline_is_read_by_the_training_that_asks_it(tmp_path: Path) -> None:
    asks = {"baseline": False, "train": {"patches": {"mode": "input", "score": "attention", "model": "baseline"}}}
    run = make(tmp_path, **asks)
    assert run.after("train") == ("select", "baseline")
    assert run.plan() == make(tmp_path, **{**asks, "baseline": True}).plan()
    assert "baseline" in run.plan("train")
    assert "baseline" not in run.plan("select")
    do(run, "prepare", "score", "select", "baseline", "train")
    assert run.why("train") is None
    run.finish("baseline", seconds=1.0, values={"fingerprint": "another"})
    assert run.why("train") == "baseline was done again"
    assert make(tmp_path).after("train") == ("select",)


def test_a_soup_depends_on_the_recipe_that_it_trains_by(tmp_path: Path) -> None:
    for method, why in (("soup", "finetune.lr: 0.001 -> 0.5"), ("unstructured", None)):
        request = {"prune": {"method": method, "keep": {"weights": 0.5}}}
        run = make(tmp_path / method, **request, finetune={"lr": 0.001})
        do(run, "prepare", "score", "select", "train", "prune")
        assert make(tmp_path / method, **request, finetune={"lr": 0.5}).why("prune") == why


def test_a_training_without_gates_does_not_depend_on_the_budget(tmp_path: Path) -> None:
    gated = {"train": {"sparsity": {"gates": True}}}
    do(make(tmp_path), "prepare", "score", "select", "train")
    assert make(tmp_path, prune={"keep": {"macs": 0.3}}).why("train") is None
    assert "train.sparsity.gates" in str(make(tmp_path, **gated, prune={"keep": {"macs": 0.3}}).why("train"))
    do(make(tmp_path / "gated", **gated), "prepare", "score", "select", "train")
    assert (
        make(tmp_path / "gated", **gated, prune={"keep": {"macs": 0.3}}).why("train") == "prune.keep.macs: 0.5 -> 0.3"
    )


def test_a_budget_of_latency_trains_nothing_again(tmp_path: Path) -> None:
    do(make(tmp_path), "prepare", "score", "select", "train")
    assert make(tmp_path, prune={"keep": {"macs": 0.5, "latency": 0.6}}).why("train") is None


def test_what_is_older_than_what_it_was_made_from_is_known(tmp_path: Path) -> None:
    names = ("prepare", "score", "select", "baseline", "train", "prune", "finetune", "export", "report")
    do(make(tmp_path), *names)
    assert make(tmp_path).outdated(names) == []
    other = make(tmp_path, prune={"keep": {"macs": 0.3}})
    do(other, "train")
    assert other.outdated(names) == ["prune", "finetune", "export", "report"]
    do(other, "prune")
    assert other.outdated(names) == ["finetune", "export", "report"]
    assert other.outdated(names[:6]) == []


def test_what_an_older_lotus_left_runs_again_and_its_models_stay(tmp_path: Path) -> None:
    run = make(tmp_path)
    do(run, "prepare", "score", "select", "train")
    assert not run.is_older
    for name in ("trained", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").touch()
    file = tmp_path / "stages" / "train.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    assert run.why("train") == "not done yet"
    assert run.is_older
    assert run.strangers() == ["final", "trained"]


def test_gates_are_an_output_where_they_are_trained(tmp_path: Path) -> None:
    run = make(tmp_path, train={"sparsity": {"gates": True}})
    do(run, "prepare", "score", "select", "train")
    run.gates.unlink()
    assert run.why("train") == "gates.safetensors is gone"
    assert run.gates not in make(tmp_path).outputs("train").values()


def test_the_plan_is_what_leads_to_a_stage(tmp_path: Path) -> None:
    run = make(tmp_path)
    every = [stage.name for stage in STAGES]
    assert make(tmp_path, select={"keep": 0.5}).plan() == every
    assert run.plan() == [name for name in every if name != "score"]
    assert run.plan("score") == ["prepare", "score"]
    assert run.plan("baseline") == ["prepare", "baseline"]
    assert run.plan("export") == ["prepare", "select", "train", "prune", "finetune", "export"]
    assert "baseline" not in make(tmp_path, baseline=False).plan()
