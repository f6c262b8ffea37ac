"""Features of the pictures that are there already, so that nothing has to be trained, and no torch imported, to judge labels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lotus.data.source import Source
from selection import images as held
from selection import incoming
from selection.errors import Refused

PLACE = "--features"


def of(file: str, train: Source) -> npt.NDArray[np.float32]:
    """(N, D) embeddings of the images of ``train`` out of a file that :mod:`selection.incoming` reads; nan where it has none of one.

    They go by their paths where the file has them, as ``lotus select --features MODEL PHOTOS`` leaves them; else by their order, that
    of the data set as it comes.

    Raises:
        Refused: it cannot be read, holds no embeddings, or those of other images.
    """
    told = incoming.read(file, only={"embeddings"})
    if "embeddings" not in told.signals:
        raise Refused(
            f"{PLACE} {file}: holds no embeddings. Make them: lotus select PHOTOS --features MODEL --pick k_center --keep 0.1."
        )
    every = told.signals["embeddings"].astype(np.float32)
    if told.names is None or not train.root:
        rows = _by_order(file, len(every), train)
    else:
        wanted = [os.path.relpath(train.name(row), train.root) for row in range(len(train))]
        rows = held.rows_of(Path(file), wanted, told.names)
        if (rows < 0).all():
            raise Refused(
                f"{PLACE} {file}: is of other pictures, e.g. {told.names[0]}, where these are called {wanted[0]}."
            )
    found = every[rows]
    found[rows < 0] = np.nan
    return found


def _by_order(file: str, count: int, train: Source) -> npt.NDArray[np.int64]:
    if count == len(train):
        return np.arange(count)
    if train.rows is not None and count == train.whole:
        return train.rows
    whole = f" ({train.whole:,} with those held out)" if train.rows is not None else ""
    raise Refused(
        f"{PLACE} {file}: has {count:,} rows and no paths, and there are {len(train):,} images for training{whole}. Save a row an image, or "
        "paths too."
    )
