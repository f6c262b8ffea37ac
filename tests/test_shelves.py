"""Shelves that are there without being named: ours, and those of installed packages; a config names none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lotus import shelves
from lotus.config import read
from selection.errors import Refused

ROOT = Path(__file__).resolve().parent.parent
SHELF = """
from lotus.way import Way

def make(uncut, *, part: float = 0.5):
    yield

WAY = Way("theirs", "cut it", make)
"""
LOOK = (
    "from lotus.config import read; from lotus.stages import check; "
    "check(read(None, ['data.name=digits', 'prune.method={name: theirs, part: 0.3}']))"
)


def installed(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A package with ``code`` as its shelf is on the path, with what an installer leaves; then a config names its way."""
    about = folder / "theirs-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[{shelves.GROUP}]\ntheirs = their_shelf\n")
    (folder / "their_shelf.py").write_text(code)
    path = os.pathsep.join([str(ROOT), str(folder)])
    words = [
        sys.executable,
        "-c",
        f"import sys; from selection.errors import Refused\ntry: {LOOK}\nexcept Refused as told: sys.exit(str(told))",
    ]
    return subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})


def test_an_installed_package_brings_a_shelf(tmp_path: Path) -> None:
    assert installed(tmp_path, SHELF).stderr == ""


def test_one_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    assert "their_shelf, which an installed package brings" in installed(tmp_path, "import nothing_of_that_name").stderr


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
