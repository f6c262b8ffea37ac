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
    source: Source, rows: npt.NDArray[np.int64], look: Look, *, batch: int = 64
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized images (B, 3, S, S) and their labels (B,), in the order of ``rows``, each as evaluation looks at it.

    Raises:
        Refused: an image that cannot be read; names it.
    """
    shift, scale = (torch.tensor(numbers, dtype=torch.float32).reshape(3, 1, 1) for numbers in (look.mean, look.std))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            shown = np.stack(list(pool.map(lambda row: _seen(source, int(row), look), part)))  # (B, S, S, 3)
            images = torch.from_numpy(shown).permute(0, 3, 1, 2).float().div_(255)
            yield (images - shift) / scale, torch.from_numpy(source.labels[part])


def _seen(source: Source, row: int, how: View) -> Pixels:
    try:
        pixels = source.read(row)
    except Exception as error:  # whatever a damaged image makes its reader raise
        raise Refused(f"{source.name(row)}: cannot be read ({reason(error)}). Take it away.") from None
    return seen(pixels, how)


def seen(pixels: Pixels, how: View) -> Pixels:
    """A picture as evaluation looks at it: (S, S, 3)."""
    line = parameters(how, 0, [0], pixels.shape[:1], pixels.shape[1:2])[0]
    return view(pixels, line, how.size, np.zeros(3, dtype=np.uint8), how)
