"""Small data sets, drawn here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lotus.config import Data
from lotus.data import beton
from lotus.data.pictures import Pixels
from lotus.data.source import Source


def drawn(i: int, height: int, width: int) -> Pixels:
    """A smooth picture with a sharp square: JPEG-like in one part, hard to resize in the other."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(6 * (x * np.cos(i + c) + y * np.sin(i + c)) + i) for c in range(3)]
    picture = (127.5 + 110 * np.stack(waves, axis=2)).astype(np.uint8)
    top, left = (7 * i) % max(1, height // 2), (11 * i) % max(1, width // 2)
    picture[top : top + height // 4, left : left + width // 4] = (40 * i % 256, 250, 90)
    return picture


def source(n: int, shape: Callable[[int], tuple[int, int]] = lambda i: (8, 8), classes: int = 3) -> Source:
    return Source(
        labels=np.arange(n) % classes,
        classes=tuple("abcdefgh"[:classes]),
        read=lambda i: drawn(i, *shape(i)),
        name=lambda i: f"drawn {i}",
        fingerprint=f"drawn{n}{shape(0)}{shape(1)}",
        where="drawn",
    )


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(source, **data settings)`` prepares a .beton and returns it."""

    def made(what: Source, name: str = "train", **settings: Any) -> Path:
        file = tmp_path / f"{name}.beton"
        list(beton.prepare(what, file, Data(**settings)))
        return file

    return made


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
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
        list(beton.prepare(source(70, shape), files[name], Data(write=write)))  # type: ignore[arg-type]
    yield files
