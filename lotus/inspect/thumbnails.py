"""Every picture at 32 x 32 pixels, and those that cannot be read or were not looked at."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from lotus.data.source import Source
from selection.errors import reason

SIDE = 32


@dataclass(frozen=True, eq=False)
class Looked:
    """Pictures of a part of the data."""

    small: npt.NDArray[np.uint8]
    """(N, S, S, 3); a picture that cannot be read is black."""
    damaged: dict[int, str]
    """Row -> why it cannot be read."""


def look(source: Source, workers: int = 2) -> Looked:
    """Read every picture once. One full picture a thread is held at a time."""
    small = np.zeros((len(source), SIDE, SIDE, 3), np.uint8)
    damaged: dict[int, str] = {}

    def one(row: int) -> None:
        try:
            pixels = source.read(row)
        except Exception as error:  # a file from elsewhere may break its reader in any way
            damaged[row] = reason(error)
            return
        small[row] = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(len(source)), chunksize=64))
    return Looked(small, dict(sorted(damaged.items())))
