"""Runs side by side: what is said of each, and where its curve lies, against sums by hand."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lotus import cli
from lotus.report import compare


def run_of(folder: Path, *, cut: bool, top1: float) -> Path:
    """A finished run of 10 steps and two evaluations; cut to a quarter after step 2."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: made\n")
    train: dict[str, Any] = {"top1": top1, "macs": 25 if cut else 100, "params": 7, "steps": 10}
    if cut:
        train["cuts"] = [{"step": 2, "before": {"macs": 100}, "after": {"macs": 25}}]
    rows = [
        {"stage": "score", "part": "choosing", "seconds": 1.0, "macs": 50.0},
        {"stage": "baseline", "part": "dense", "seconds": 9.0, "macs": 1000.0},
        {"stage": "train", "part": "training", "seconds": 2.0, "macs": 400.0 if cut else 1000.0},
    ]
    ledger = {"stages": rows, "lottery_macs": 450.0 if cut else 1050.0}
    results = {"format": 2, "name": "made", "train": train, "finetune": train, "ledger": ledger}
    (folder / "results.json").write_text(json.dumps(results))
    events = [
        {"event": "evaluated", "stage": "train", "epoch": epoch, "values": {"top1": top, "images": 400}}
        for epoch, top in ((1, 40.0), (2, top1))
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_curve_lies_where_the_macs_were_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_of(tmp_path / "whole", cut=False, top1=50.0), run_of(tmp_path / "cut", cut=True, top1=80.0)]
    assert cli.main(["compare", *map(str, folders), "--json"]) == 0
    whole, cut = json.loads(capsys.readouterr().out)
    assert whole["course"] == [[550, 40], [1050, 50]]
    # Two steps at 100 and three at 25 are 275 of all 400.
    assert cut["course"] == [[50 + 275, 40], [450, 80]]
    assert whole["standard_error"] == pytest.approx(2.5)
    assert cut["standard_error"] == pytest.approx(2.0)
    assert (whole["seconds"], cut["macs"], cut["images"]) == (3.0, 25, 400)


def test_the_terminal_and_the_page_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_of(tmp_path / "<b>whole", cut=False, top1=50.0), run_of(tmp_path / "cut", cut=True, top1=80.0)]
    page = tmp_path / "page.html"
    assert cli.main(["compare", *map(str, folders), "--html", str(page)]) == 0
    told = capsys.readouterr().out
    cells: list[str] = []
    reader = HTMLParser()
    vars(reader)["handle_data"] = cells.append
    reader.feed(page.read_text())
    for word in ("80.00 ± 2.00", "0.43 x"):
        assert word in told
        assert word in cells
    assert "<b>" not in page.read_text()


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "no run is here"),
        (lambda folder: (folder / "results.json").unlink(), "no finished run"),
        (lambda folder: (folder / "results.json").write_text("{}"), "results.json"),
        (lambda folder: (folder / "results.json").write_text("["), "results.json"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, place: str) -> None:
    folder = run_of(tmp_path / "run", cut=False, top1=50.0)
    damage(folder)
    assert cli.main(["compare", str(folder)]) == 2
    said = capsys.readouterr().err
    assert place in said
    assert str(folder) in said


def test_runs_without_a_curve_are_drawn_as_points() -> None:
    row = compare.Row("a", 50.0, 0, 1, 1, 3.0, 1.0, ())
    assert "circle" in compare.draw([row]).svg("one")
