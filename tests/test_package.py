"""What a package promises to those who install it."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import lotus
import selection

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "lotus/__init__.py"
    assert importlib.metadata.version("lotus-vit") == lotus.__version__
    assert f"version: {lotus.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_what_the_face_exports_can_be_listed() -> None:
    assert set(lotus.__all__) <= set(dir(lotus))
    assert {"prune", "save", "load", "verify", "Refused", "__version__"} <= set(dir(lotus))
    for package in (lotus, selection):
        rest = set(dir(package)) - {*package.__all__, "__version__"}
        assert all(f"{package.__name__}.{name}" in sys.modules for name in rest), rest
    for name in lotus.__all__:
        assert getattr(lotus, name).__doc__


def test_types_are_shipped() -> None:
    for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_the_license_is_whole() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License")
    assert all(f"\n   {number}. " in text for number in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_extra_is_pinned() -> None:
    """What `make` installs is what was tested."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()}
    extras = PROJECT["project"]["optional-dependencies"]
    for needed in (*PROJECT["project"]["dependencies"], *(one for extra in extras.values() for one in extra)):
        name = needed.split(">")[0].split("[")[0].lower()
        assert name in pinned, f"{name} has no version in constraints.txt"


def test_the_configs_are_shipped() -> None:
    """``lotus finetune FOLDER`` reads one of them; where the wheel puts them it is looked for (lotus.config.shipped)."""
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"configs": "lotus/configs"}
    assert (ROOT / "configs" / "finetune.yaml").is_file()
