"""Images read where they lie, without a .beton: for a few thousand that are looked at once or twice.

B images of a batch, S side of the model's input.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lotus.data.pictures import Pixels
from lotus.data.source import Source
from lotus.data.torch_loader import view
from lotus.data.views import Look, View, parameters
from selection.errors import Refused, reason


def batches(
    source: Source, rows: npt.NDArray[np.int64], look: Look, *, batch: int = 64, damaged: dict[int, str] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized images (B, 3, S, S) and their labels (B,), in the order of ``rows``, each as evaluation looks at it.

    Args:
        source, rows, look, batch: which images, how they are looked at, and how many at once
        damaged: is told which rows cannot be read, and why; they do not come

    Raises:
        Refused: an image that cannot be read, where nobody is to be told; names it.
    """
    shift, scale = (torch.tensor(numbers, dtype=torch.float32).reshape(3, 1, 1) for numbers in (look.mean, look.std))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            shown = list(pool.map(lambda row: _seen(source, int(row), look, damaged), part))
            there = [one for one in shown if one is not None]
            if there:
                images = torch.from_numpy(np.stack(there)).permute(0, 3, 1, 2).float().div_(255)  # (B, S, S, 3) before
                labels = source.labels[[row for row, one in zip(part, shown, strict=True) if one is not None]]
                yield (images - shift) / scale, torch.from_numpy(labels)


def _seen(source: Source, row: int, how: View, damaged: dict[int, str] | None) -> Pixels | None:
    try:
        pixels = source.read(row)
    except Exception as error:  # whatever a damaged image makes its reader raise
        if damaged is not None:
            damaged[row] = reason(error)
            return None
        raise Refused(f"{source.name(row)}: cannot be read ({reason(error)}). Take it away.") from None
    return seen(pixels, how)


def seen(pixels: Pixels, how: View) -> Pixels:
    """A picture as evaluation looks at it: (S, S, 3)."""
    line = parameters(how, 0, [0], pixels.shape[:1], pixels.shape[1:2])[0]
    return view(pixels, line, how.size, np.zeros(3, dtype=np.uint8), how)
