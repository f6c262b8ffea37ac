"""Small data sets, drawn here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drawn_data import Make, source

from lotus.config import Data
from lotus.data import beton
from lotus.data import loader as loaders
from lotus.data.source import Source


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(source, **data settings)`` prepares a .beton and returns it."""

    def made(what: Source, name: str = "train", **settings: Any) -> Path:
        file = tmp_path / f"{name}.beton"
        list(beton.prepare(what, file, Data(**settings), choose=loaders.writer))
        return file

    return made


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared files that tests only read: 70 images of 12 x 12, and of mixed sizes, raw, JPEG and both."""
    folder = tmp_path_factory.mktemp("stored")

    def mixed(i: int) -> tuple[int, int]:
        return (16, 16) if i % 4 == 0 else (11 + 3 * i % 29, 14 + 5 * i % 31)

    files = {}
    for name, shape, write in (
        ("square", lambda i: (12, 12), "raw"),
        ("mixed", mixed, "raw"),
        ("jpeg", lambda i: (40 + i % 3, 48), "jpg"),
        ("both", mixed, "proportion"),
    ):
        files[name] = folder / f"{name}.beton"
        list(beton.prepare(source(70, shape), files[name], Data(write=write), choose=loaders.writer))  # type: ignore[arg-type]
    return files
