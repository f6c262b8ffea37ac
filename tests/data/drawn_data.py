"""Pictures and data sets that the tests draw themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lotus.data.pictures import Pixels
from lotus.data.source import Source

Make = Callable[..., Path]


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
