"""Shelves that are there without being named: ours, and those of installed packages; a config names none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lotus import shelves
from lotus.config import read
from selection.errors import Refused

SHELF = """
from lotus.way import Way

def make(uncut, *, part: float = 0.5):
    yield

WAY = Way("theirs", "cut it", make)
"""


@pytest.fixture
def looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """What is refused of a config that names the way of a package whose shelf is ``code``; empty where nothing is.

    The package is on the path, with what an installer leaves.
    """
    from lotus.stages import check

    def look(code: str) -> str:
        about = tmp_path / "theirs-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
        (about / "entry_points.txt").write_text(f"[{shelves.GROUP}]\ntheirs = their_shelf\n")
        (tmp_path / "their_shelf.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        shelves.installed.cache_clear()
        try:
            check(read(None, ["data.name=digits", "prune.method={name: theirs, part: 0.3}"]))
        except Refused as refusal:
            return str(refusal)
        return ""

    yield look
    shelves.installed.cache_clear()
    sys.modules.pop("their_shelf", None)


def test_an_installed_package_brings_a_shelf(looked: Callable[[str], str]) -> None:
    assert looked(SHELF) == ""


def test_one_that_cannot_be_imported_is_named(looked: Callable[[str], str]) -> None:
    assert "their_shelf, which an installed package brings" in looked("import nothing_of_that_name")


def test_the_published_systems_are_found_wherever_lotus_lies() -> None:
    there = {shelf.__name__.rpartition(".")[2] for shelf in shelves.installed()}
    assert {"cp_vit", "soup", "sparse_vit", "spvit", "zeros"} <= there


def test_the_users_own_file_wins() -> None:
    from types import ModuleType

    from lotus.stages import ways
    from lotus.way import Way

    mine = ModuleType("mine")
    mine.WAY = Way("soup", "mine", lambda uncut, *, salt=1: None)  # type: ignore[attr-defined]
    wants = read(None, ["prune.method={name: soup, salt: 2}"]).prune
    assert ways.chosen(wants, shelves.known([mine]))[1] == {"salt": 2}
    with pytest.raises(Refused, match=r"prune\.method\.salt: .*has no such setting"):
        ways.chosen(wants, shelves.known())


@pytest.mark.parametrize("name", ["os", "their_shelf:WAY", "lotus.papers.soup", "../mine.py"])
def test_a_config_never_names_a_module(name: str) -> None:
    from lotus.stages import check

    with pytest.raises(Refused, match=r"prune\.method: there is no "):
        check(read(None, ["data.name=digits", f"prune.method={name!r}"]))
    with pytest.raises(Refused, match="with: no such setting"):
        read(None, [f"with=[{name!r}]"])
