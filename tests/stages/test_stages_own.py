"""A stage of a user's own takes part in order, records, dry run, ledger and report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import DIGITS, SHORT, lotus

from lotus import stage_names
from lotus.cli.shared import load_shelves
from lotus.config import Config, Data, check
from lotus.data import beton
from lotus.data.dataset import open_data
from lotus.events import Said
from lotus.shelves import known
from lotus.stage import Stage, named
from lotus.stages import STAGES, run_of
from lotus.stages.context import Context
from lotus.stages.own_stage import begun
from lotus.stages.shelf import check_asked, passed_over
from selection.errors import Notice, Refused
from selection.subset import Subset

# What CONTRIBUTING would show: how far the confidence of the model that ships is from how often it is right.
CALIBRATION = """
import numpy as np
import torch

import lotus
from lotus.events import Step
from lotus.stage import Outcome, Section, Stage
from lotus.vit.cost import count

BINS = 10


def measure(context):
    run = context.run
    model = lotus.load(run.of("finetune")).to(context.world.device).eval()
    confidence, right = [], []
    with context.images(run.val_beton, None, context.config.finetune, model) as loader, torch.no_grad():
        for number, batch in enumerate(loader.epoch(0)):
            highest, label = model(batch.images).softmax(1).max(1)
            confidence.append(highest.cpu().numpy())
            right.append((label == batch.labels).cpu().numpy())
            yield Step("calibration", number + 1, number + 1, unit="batches")
    confidence, right = np.concatenate(confidence), np.concatenate(right)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = [(int(n), float(confidence[bins == b].mean()), float(right[bins == b].mean()))
            for b in range(BINS) if (n := (bins == b).sum())]
    error = sum(n * abs(sure - often) for n, sure, often in rows) / len(right)
    return Outcome(len(right), len(right) * count(model).macs, {"error": error, "rows": rows})


def tell(run, found):
    told = found["calibration"]
    return Section(
        "How sure it is", f"Expected calibration error {told['error']:.4f} <of the model that ships>.",
        ("images", "sure", "right"), tuple((str(n), f"{sure:.3f}", f"{often:.3f}") for n, sure, often in told["rows"]),
    )


def forecast(ahead):
    images = len(ahead.sources[1].labels)
    return images, images * ahead.macs * ahead.config.prune.keep.macs


STAGE = Stage("calibration", "measure how sure the model is", measure, settings=("seed",), after=("finetune",),
              forecast=forecast, tell=tell)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CALIBRATION)
    return tmp_path / "mine.py"


def by_hand(folder: Path) -> float:
    """The same number, image by image."""
    import torch

    import lotus as library
    from lotus.data import beton

    manifest = beton.Manifest.load(folder / "data" / "train.beton")
    val = folder / "data" / "val.beton"
    labels = beton.labels(val)
    pixels = np.stack([beton.image(val, row) for row in range(len(labels))]) / 255
    images = torch.from_numpy((pixels - manifest.mean) / manifest.std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        chances = library.load(folder / "finetune").eval()(images).softmax(1).numpy()
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(chances, labels):
        bins.setdefault(min(int(row.max() * 10), 9), []).append((float(row.max()), bool(row.argmax() == label)))
    return sum(abs(sum(sure for sure, _ in one) - sum(right for _, right in one)) for one in bins.values()) / len(
        labels
    )


@pytest.mark.slow
def test_a_stage_of_ones_own_takes_part_in_everything(finished: Path, tmp_path: Path, mine: Path) -> None:
    words = ["run", DIGITS, f"folder={tmp_path / 'run'}", f"data.folder={finished / 'data'}", *SHORT, "baseline=false",
             f"select.ticket={finished / 'subset.npz'}", "--with", str(mine)]  # fmt: skip
    foreseen = lotus(*words, "--dry-run", COLUMNS="160")
    assert foreseen.returncode == 0, foreseen.stderr
    told = next(line for line in foreseen.stdout.splitlines() if "calibration" in line)
    assert "measure how sure the model is" in told
    assert "359" in told, "an image-forward for each validation image"
    done = lotus(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    (folder / "data").symlink_to(finished / "data")
    assert results["calibration"]["error"] == pytest.approx(by_hand(folder), abs=1e-4)
    rows = [row["stage"] for row in results["ledger"]["stages"]]
    assert rows.index("finetune") < rows.index("calibration") < rows.index("export")
    spent = {row["stage"]: row["macs"] for row in results["ledger"]["stages"]}
    assert spent["calibration"] > 0
    assert results["ledger"]["lottery_macs"] == sum(spent.values()) - spent["calibration"], (
        "it measures, and trains nothing"
    )
    assert f"How sure it is: Expected calibration error {results['calibration']['error']:.4f}" in " ".join(
        done.stdout.split()
    )
    page = (folder / "report.html").read_text()
    assert "<h2>How sure it is</h2>" in page
    assert "&lt;of the model that ships&gt;" in page, "text is shown as text"
    again = lotus(*words)
    assert "begins" not in again.stdout, again.stdout
    mine.write_text(mine.read_text().replace("BINS = 10", "BINS = 5"))
    changed = lotus(*words)
    assert [line.split()[0] for line in changed.stdout.splitlines() if "begins" in line] == ["calibration", "report"]
    assert "the file that calibration is in was changed" in changed.stdout
    without = lotus("run", str(folder))
    assert without.returncode == 0, without.stderr
    assert "begins" not in without.stdout, "a file that is not named changes nothing that stands"
    assert lotus("report", str(folder)).returncode == 0
    assert "<h2>How sure it is</h2>" in (folder / "report.html").read_text(), "what it told stands in the results"


def make(text: str, folder: Path) -> Path:
    (folder / "own.py").write_text(f"from lotus.stage import Outcome, Stage\ndef make(context):\n    yield\n{text}\n")
    return folder / "own.py"


def plan(file: Path, folder: Path, until: str | None = None) -> list[str]:
    config = check({"folder": str(folder / "run"), "data": {"name": "digits"}, "baseline": False})
    return run_of(config, load_shelves([str(file)])).plan(until)


def test_it_stands_behind_what_it_reads_and_before_what_reads_it(tmp_path: Path) -> None:
    file = make('A = Stage("look", "look", make, after=("prune",))', tmp_path)
    assert plan(file, tmp_path)[3:] == ["prune", "look", "finetune", "export", "report"]
    assert "look" not in plan(file, tmp_path, "finetune"), "nobody there reads it"
    file = make('A = Stage("mend", "mend", make, after=("train",), before=("prune",))', tmp_path)
    assert plan(file, tmp_path, "prune") == ["prepare", "select", "train", "mend", "prune"]
    file = make('A = Stage("mend", "mend", make, after=("finetune",), before=("export",), part="shipped")', tmp_path)
    run = run_of(check({"data": {"name": "digits"}}), load_shelves([str(file)]))
    assert named(run.stages, "shipped") == "mend", "who trains further leaves the model that ships"
    assert run.plan("export")[-2:] == ["mend", "export"]
    file = make('A = Stage("train", "mine", make, after=("select",), outputs=("train/spec.json",))', tmp_path)
    config = check({"folder": str(tmp_path / "run"), "data": {"name": "digits"}})
    run = run_of(config, load_shelves([str(file)]))
    assert list(run.stages) == list(run_of(config).stages)
    assert run.stages["train"].says == "mine", "it takes the place of ours"
    assert set(run.own("train")) == {"train"}
    assert not run.own("prune")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('A = Stage("look", "x", make, after=("prun",))', "Did you mean 'prune'"),
        ('A = Stage("look", "x", make, after=("finetune",), before=("train",))', "reads finetune, which comes after train"),
        ('A = Stage("ledger", "x", make)', "another name"),
        ('A = Stage("a/b", "x", make)', "another name"),
    ],
)  # fmt: skip
def test_one_that_cannot_stand_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=says):
        plan(make(text, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return Outcome()", r"'odd' gives a Outcome\. Write it as a generator: yield events, return an Outcome\.$"),
        ("yield 1 / 0", r"'odd' \(odd\): ZeroDivisionError: .* \(own\.py, line 5\)\.$"),
        ("yield 3", r"'odd' yields a int, which is no event\. "),
        ("yield from ()", r"'odd' returns a NoneType, not an Outcome\. "),
    ],
)
def test_one_that_goes_wrong_is_refused(body: str, says: str, tmp_path: Path) -> None:
    text = f"def odd(context):\n    {body}\nA = Stage('odd', 'x', odd)"
    (shelf,) = load_shelves([str(make(text, tmp_path))])
    context = SimpleNamespace(shelves=[shelf])
    with pytest.raises(Refused, match=r"^--with .*own\.py: the stage " + says):
        list(begun(shelf.A, context))  # type: ignore[arg-type]


def test_one_that_is_right_gives_what_it_gives(tmp_path: Path) -> None:
    text = "from lotus.events import Said\ndef fine(context):\n    yield Said('fine', 'so')\n    return Outcome(3)\nA = Stage('fine', 'x', fine)"
    (shelf,) = load_shelves([str(make(text, tmp_path))])
    making = begun(shelf.A, SimpleNamespace(shelves=[shelf]))  # type: ignore[arg-type]
    assert next(making) == Said("fine", "so")
    with pytest.raises(StopIteration) as end:
        next(making)
    assert end.value.value.image_forwards == 3


def test_every_stage_of_ours_says_what_it_must() -> None:
    """A law: read from the stages, whichever there are."""
    assert [stage.name for stage in STAGES] == [*stage_names.STAGES], "each is called as its file is"
    run = run_of(check({"stages": [stage.name for stage in STAGES]}))
    stages = run.stages
    assert [*stages] == [*stage_names.STAGES], "all are there where all are named"
    for stage in stages.values():
        assert isinstance(stage, Stage)
        assert stage.name.isidentifier()
        assert stage.outputs
        assert not stage.excludes or stage.excludes in run.outputs(stage.name)
        if stage.curve is not None or stage.part in ("training", "shipped", "dense"):
            assert f"{stage.name}/spec.json" in run_of(check({})).outputs(stage.name), "its model lies under its name"
    parts = [stage.part for stage in stages.values()]
    for one in ("training", "shipped", "dense"):
        assert parts.count(one) == 1


def test_one_has_settings_of_its_own(tmp_path: Path) -> None:
    """The keyword-only parameters of what it does, which ``stages`` of a config says."""
    text = (
        "def look(context, *, bins: int = 10, by: str = 'class'):\n    yield from ()\n    return Outcome(values={'bins': bins})\n"
        "A = Stage('look', 'look', look, after=('prepare',), wanted=lambda config: config.asked('look') is not None)"
    )
    shelves = load_shelves([str(make(text, tmp_path))])

    def asked(*stages: object, **settings: object) -> Config:
        return check({"folder": str(tmp_path / "run"), "data": {"name": "digits"}, "stages": [*stages], **settings})

    assert "look" not in run_of(asked(), shelves).stages, "nobody asks for it"
    plain, five = asked("look"), asked({"name": "look", "bins": 5})
    run = run_of(five, shelves)
    assert run.settings("look")["stages.look"] == {"bins": 5}
    context = SimpleNamespace(shelves=shelves, config=five)
    making = begun(run.stages["look"], context)  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as end:
        next(making)
    assert end.value.value.values == {"bins": 5}
    assert run.stages["look"].options(plain) == {"bins": 10, "by": "class"}
    run.finish("look", seconds=0)
    assert run.why("look") is None
    assert run_of(plain, shelves).why("look") == "stages.look.bins: 5 -> none"
    check_asked(five, shelves)
    for wrong, says in [
        ({"name": "look", "bns": 5}, r"stages\.look\.bns: 'look' has no such setting\. Did you mean 'bins'"),
        ({"name": "look", "bins": "many"}, r"stages\.look\.bins: .*whole|stages\.look\.bins: .*integer"),
        ("lok", r"stages: there is no 'lok'\. Did you mean 'look'"),
        ({"name": "train", "bins": 5}, r"stages\.train\.bins: 'train' has no such setting"),
    ]:
        with pytest.raises(Refused, match=says):
            check_asked(asked(wrong), shelves)
    with pytest.raises(Refused, match=r"stages: 'look' is named twice"):
        check_asked(asked("look", {"name": "look", "bins": 5}), shelves)


def test_what_one_lists_is_in_no_ticket(tmp_path: Path) -> None:
    text = "A = Stage('sift', 'sift', make, after=('prepare',), before=('select',), outputs=('gone.txt',), excludes='gone.txt')"
    shelves = load_shelves([str(make(text, tmp_path))])
    numbers = open_data(Data(name="digits"), ())[0].rows  # of the whole data set, by which lists count
    assert numbers is not None

    def write(file: Path, rows: Any) -> None:
        file.write_text("".join(f"{number}\n" for number in numbers[rows]))

    write(tmp_path / "mine.txt", [5, 6])
    page: dict[str, Any] = {
        "folder": str(tmp_path / "run"),
        "data": {"name": "digits"},
        "select": {"exclude": str(tmp_path / "mine.txt")},
    }
    for settings, gone in ({}, {5, 6, 900}), ({"keep": 1.0, "ticket": str(tmp_path / "own.npz")}, {6, 900}):
        page["select"] = {**page["select"], **settings}
        run = run_of(check(page), shelves)
        context = Context(run, SimpleNamespace(rank=0, size=1, is_main=True), known(shelves))  # type: ignore[arg-type]
        if not run.train_beton.is_file():
            list(begun(run.stages["prepare"], context))
        write(run.folder / "gone.txt", [6, 900])
        labels = beton.labels(run.train_beton)
        if settings:
            part = Subset(np.arange(6, 1000), len(labels), fingerprint=context.manifest().fingerprint)
            part.save(tmp_path / "own.npz")
        told = [event.text for event in begun(run.stages["select"], context) if isinstance(event, Said)]
        assert told[:2] == ["2 images are left out by select.exclude", "2 images are left out by sift"]
        rows = set(Subset.load(run.ticket).rows.tolist())
        wanted = set(range(6, 1000)) if settings else set(range(len(labels)))
        assert rows == wanted - gone
        assert set(run.after("select")) >= {"prepare", "sift"}
    write(run.folder / "gone.txt", slice(6, None))
    write(tmp_path / "mine.txt", slice(0, 7))
    with pytest.raises(Refused, match=r"^select\.exclude and sift: name all 1438 images"):
        list(begun(run.stages["select"], context))


def test_a_stage_that_nobody_reads_on_the_way_is_told(tmp_path: Path, mine: Path) -> None:
    shelves = load_shelves([str(mine)])
    config = check({"data": {"name": "digits"}, "folder": str(tmp_path), "stages": ["calibration", "inspect"]})
    run = run_of(config, shelves)
    assert passed_over(run, "train") == "stages: calibration: not read by train, and left to lotus run"
    assert passed_over(run, "prepare") == "stages: calibration, inspect: not read by prepare, and left to lotus run"
    assert passed_over(run, None) == ""


def test_a_stage_that_takes_the_place_of_another_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CALIBRATION.replace('"calibration", "measure', '"export", "measure'))
    with pytest.warns(Notice, match=r"mine\.py: the stage 'export' takes the place"):
        run_of(check({"data": {"name": "digits"}}), load_shelves([str(tmp_path / "mine.py")]))
