"""The stage ``inspect``: what ``lotus inspect`` finds in a run's images trains in no case, and is billed, told and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_inspect import digits, folder

from lotus import cli, ticket
from lotus.config import Config, check
from lotus.events import Began, Event, Said
from lotus.inspect import network
from lotus.stages import forecast, go, report, run_of
from lotus.stages.ahead import Ahead
from lotus.stages.shelf import check_asked
from selection.errors import Refused
from selection.subset import Subset

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def asked(place: Path, *stages: Any, **settings: Any) -> Config:
    page = {"folder": str(place), "device": "cpu", "model": {"args": TINY}, "baseline": False, **settings}
    return check({**page, "stages": [*stages]})


def begun(events: list[Event]) -> list[str]:
    return [event.stage for event in events if isinstance(event, Began)]


def kept(config: Config) -> set[str]:
    """The names of the ticket's images."""
    run = run_of(config)
    names = ticket.Data(str(run.folder), config, run.train_beton).images().names
    assert names is not None
    return {names[row] for row in Subset.load(run.ticket).rows.tolist()}


def test_what_is_found_trains_in_no_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = folder(tmp_path / "photos")
    data = {"path": str(photos), "damaged": "skip", "folder": str(tmp_path / "data")}
    plain, config = (
        asked(tmp_path / name, *stages, data=data) for name, stages in (("plain", ()), ("run", ("inspect",)))
    )
    assert "inspect" not in begun(list(go(plain, until="select")))
    assert begun(list(go(config, until="select"))) == ["prepare", "inspect", "select"]
    assert kept(plain) - kept(config) == {"a/z mirrored.png", "b/zz.jpg"}

    assert cli.main(["inspect", str(photos), "--out", str(tmp_path / "alone")]) == 0
    run = run_of(config)
    for name in ("delete.txt", "inspect.json"):
        assert (run.of("inspect") / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), (
            "as on the command line"
        )
    assert "z mirrored.png" in (run.of("inspect") / "inspect.html").read_text()
    capsys.readouterr()

    assert begun(list(go(config, until="select"))) == []
    (run.of("inspect") / "delete.txt").write_text("")
    assert begun(list(go(config, until="select"))) == ["inspect"], "the list is an output as any other"
    told = report.results(run)
    assert told["inspect"] == {
        "duplicates": 1,
        "leaks": 1,
        "damaged": 2,
        "left_out": 2,
        "by": ["duplicates", "leaks", "damaged"],
    }
    (section,) = (one for one in told["sections"] if one["stage"] == "inspect")
    assert ("leaks", "1", "left out") in section["rows"]
    (row,) = (row for row in told["ledger"]["stages"] if row["stage"] == "inspect")
    assert row["part"] == "choosing"
    assert row["seconds"] > 0
    assert row["macs"] == 0

    other = asked(tmp_path / "run", {"name": "inspect", "delete": ["leaks"]}, data=data)
    assert run_of(other).why("inspect") == "stages.inspect.delete: none -> leaks"
    assert begun(list(go(other, until="select"))) == ["inspect", "select"]
    assert kept(plain) - kept(other) == {"b/zz.jpg"}
    assert begun(list(go(plain, until="select"))) == [], "one that names no stage goes by what it was"


def test_one_that_was_stopped_begins_again_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotus.stages.inspect.MANY", 0.01)
    data = {"path": str(folder(tmp_path / "photos")), "damaged": "skip", "folder": str(tmp_path / "data")}
    whole, torn = (asked(tmp_path / name, "inspect", data=data) for name in ("whole", "torn"))
    told = [event.text for event in go(whole, until="select") if isinstance(event, Said) and event.level == "warning"]
    assert "2 of 42 images will not train: look at inspect.html whether they should" in told
    going = go(torn, until="select")
    assert any(isinstance(event, Said) and event.stage == "inspect" for event in going)
    going.close()  # type: ignore[attr-defined]
    assert not (tmp_path / "torn" / "inspect").exists(), "nothing half-written"
    list(go(torn, until="select"))
    for name in ("inspect/delete.txt", "inspect/inspect.json", "subset.npz"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_labels_are_judged_where_they_are_asked_for_and_billed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "EPOCHS", (1, 1))
    small, own = digits(150)
    np.savez(tmp_path / "digits.npz", x_train=small[:130], y_train=own[:130], x_test=small[130:], y_test=own[130:])
    data = {"name": "npz", "path": str(tmp_path / "digits.npz"), "folder": str(tmp_path / "data")}
    config = asked(tmp_path / "run", {"name": "inspect", "delete": ["labels"]}, data=data)
    (row,) = (row for row in forecast(config, until="select") if row["stage"] == "inspect")
    assert "wrong labels" in row["says"]
    list(go(config, until="select"))
    record = run_of(config).record("inspect")
    assert record is not None
    assert (record.image_forwards, record.macs) == network.cost(130, 10) == (row["image_forwards"], row["macs"])
    told = json.loads((tmp_path / "run/inspect/inspect.json").read_text())
    assert told["labels_judged_by"] == "network"
    gone = len(told["labels"])
    assert len(Subset.load(run_of(config).ticket)) == 130 - gone
    assert record.values["left_out"] == record.values["labels"] == gone


@pytest.mark.parametrize(
    ("stage", "settings", "says"),
    [
        ({"delete": ["twins"]}, {}, r"stages\.inspect\.delete.*twins"),
        ({"delete": "leaks"}, {}, r"stages\.inspect\.delete: a list, not 'leaks'"),
        ({"most": 0}, {}, r"stages\.inspect\.most: at least 1"),
        ({"mots": 9}, {}, r"stages\.inspect\.mots: 'inspect' has no such setting\. Did you mean 'most'"),
        ({}, {"data": {"name": "hf:a/b", "options": {"streaming": True}}}, r"stages\.inspect: .*streaming=false"),
        ({}, {"select": {"start": "mine.npz"}}, r"stages\.inspect: does not go with select\.start"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_done(
    tmp_path: Path, stage: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    config = asked(tmp_path, {"name": "inspect", **stage}, **settings)

    def ask() -> None:
        check_asked(config)
        run_of(config).stages["inspect"].check(Ahead(config))

    with pytest.raises(Refused, match=says):
        ask()


def test_pictures_that_are_gone_are_refused_with_their_place(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos")
    data = {"path": str(photos), "damaged": "skip", "folder": str(tmp_path / "data")}
    list(go(asked(tmp_path / "plain", data=data), until="select"))
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="photos"):
        list(go(asked(tmp_path / "run", "inspect", data=data), until="select"))
