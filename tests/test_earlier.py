"""Another recipe in the folder of a run keeps what stood there, whole and under its names; one that is refused moves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lotus.config import check
from lotus.earlier import Earlier
from lotus.events import Event
from lotus.run import Run
from lotus.stage import Outcome, Stage, Work
from lotus.stages import order
from selection.errors import Refused

FAILS: dict[str, type[BaseException]] = {}


def stage(name: str, after: tuple[str, ...], *outputs: str, settings: tuple[str, ...] = ()) -> Stage:
    def make(context: Any) -> Work:
        run = context.run
        if name in FAILS:
            raise FAILS[name](f"{name} fails")
        for path in run.outputs(name).values():
            path.parent.mkdir(parents=True, exist_ok=True)
            epochs = f" of {run.config.train.epochs}, {run.config.finetune.epochs}" if run.after(name) else ""
            path.write_text(f"{name}{epochs}")
        yield from ()
        return Outcome()

    return Stage(name, name, make, settings=settings, after=after, outputs=outputs)


STAGES = (
    stage("images", (), "{data}/all.txt", settings=("data",)),
    stage("train", ("images",), "train/spec.json", "gates.txt", settings=("train.epochs",)),
    stage("tune", ("train",), "tune/spec.json", settings=("finetune.epochs",)),
    stage("page", ("tune",), "page.html"),
)


def run_of(folder: Path, train: int, tune: int) -> Run:
    config = check({"folder": str(folder), "train": {"epochs": train}, "finetune": {"epochs": tune}})
    return Run(config, STAGES)


def go(monkeypatch: pytest.MonkeyPatch, folder: Path, train: int, tune: int, **more: object) -> list[Event]:
    run = run_of(folder, train, tune)
    for name in ("check", "look_ahead"):
        monkeypatch.setattr(order, name, lambda *_: None)
    monkeypatch.setattr(order, "run_of", lambda *_: run)
    return list(order.go(run.config, **more))  # type: ignore[arg-type]


def texts(folder: Path) -> dict[str, str]:
    """What lies in a run's folder, its log, versions and what is kept aside."""
    left_out = {"log.jsonl", ".lock", "versions.txt", "config.yaml"}
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    found = {str(path.relative_to(folder)): path.read_text() for path in files}
    return {name: text for name, text in found.items() if not name.startswith(("earlier", "stages"))}


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    FAILS.clear()
    go(monkeypatch, tmp_path / "run", 1, 1)
    return tmp_path / "run"


def test_what_stood_is_kept_under_its_names(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = texts(done)
    events = go(monkeypatch, done, 2, 1)
    assert {name: text for name, text in before.items() if not name.startswith("data")} == texts(done / "earlier" / "1")
    assert texts(done)["train/spec.json"] == "train of 2, 1"
    assert "train, tune, page" in events[-1].text  # type: ignore[attr-defined]
    assert str(done / "earlier" / "1") in events[-1].text  # type: ignore[attr-defined]
    assert "epochs: 1" in (done / "earlier" / "1" / "config.yaml").read_text()
    kept = Run(check({"folder": str(done / "earlier" / "1"), "data": {"folder": str(done / "data")}}), STAGES)
    assert {name: kept.record(name) is not None for name in kept.stages} == {
        "images": False, "train": True, "tune": True, "page": True,
    }  # fmt: skip
    kept.check_whole(kept.stages)
    go(monkeypatch, done, 2, 5)  # the next one gets the next number, and what it did not touch stays
    assert set(texts(done / "earlier" / "2")) == {"tune/spec.json", "page.html"}
    assert texts(done)["train/spec.json"] == "train of 2, 1"


@pytest.mark.parametrize("asked", [{"again": True}, {"first": "train"}])
@pytest.mark.parametrize("epochs", [1, 2])
def test_what_is_asked_for_again_is_kept_where_it_is_another(
    asked: dict, epochs: int, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(monkeypatch, done, epochs, 1, **asked)
    assert (done / "earlier").exists() == (epochs == 2)
    if epochs == 2:
        assert set(texts(done / "earlier" / "1")) == {"train/spec.json", "gates.txt", "tune/spec.json", "page.html"}


def test_what_is_to_be_replaced_is(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(monkeypatch, done, 2, 1, replace=True)
    assert not (done / "earlier").exists()
    assert texts(done)["tune/spec.json"] == "tune of 2, 1"


def test_what_was_lost_is_made_again_and_nothing_of_it_kept(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (done / "gates.txt").unlink()
    go(monkeypatch, done, 1, 1)
    assert not (done / "earlier").exists()
    assert "gates.txt" in texts(done)


@pytest.mark.parametrize("asked", [{}, {"again": True}])
@pytest.mark.parametrize("fault", [Refused, KeyboardInterrupt, RuntimeError])
def test_what_did_not_come_about_changed_nothing(
    fault: type[BaseException], asked: dict, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, config = texts(done), (done / "config.yaml").read_text()
    FAILS["train"] = fault
    with pytest.raises(fault):
        go(monkeypatch, done, 2, 1, **asked)
    FAILS.clear()
    assert texts(done) == before
    assert not (done / "earlier").exists()
    if fault is Refused and not asked:
        assert (done / "config.yaml").read_text() == config
    if not asked:
        assert run_of(done, 1, 1).is_done


def test_what_came_about_before_a_refusal_stays(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAILS["tune"] = Refused
    with pytest.raises(Refused):
        go(monkeypatch, done, 2, 1)
    assert set(texts(done / "earlier" / "1")) == {"train/spec.json", "gates.txt"}
    assert texts(done)["train/spec.json"] == "train of 2, 1"
    assert texts(done)["tune/spec.json"] == "tune of 1, 1"
    assert "epochs: 2" in (done / "config.yaml").read_text()


def test_a_folder_that_cannot_be_made_is_refused(done: Path) -> None:
    (done / "earlier").write_text("no folder")
    with pytest.raises(Refused, match="earlier"):
        Earlier(run_of(done, 2, 1)).keep(["train"])
    assert (done / "train" / "spec.json").exists()
