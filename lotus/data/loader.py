"""Which loader and which writer of a .beton: FFCV's where it is installed, else our own."""

from __future__ import annotations

import os
import warnings

import torch

from lotus.config import Data
from lotus.data import cores, kept
from lotus.data.base import BaseLoader, Loader
from lotus.data.beton import opened
from lotus.data.format import PlainWriter
from lotus.data.sample_plan import SamplePlan
from lotus.data.torch_loader import TorchLoader
from lotus.data.views import Look
from lotus.data.writing import Make
from selection.errors import Notice, Refused


def open_loader(
    file: str | os.PathLike[str],
    plan: SamplePlan,
    look: Look,
    *,
    device: str | torch.device = "cpu",
    kind: str = "auto",
    workers: int = 0,
    keep: bool = False,
) -> Loader:
    """A loader of ``file`` in the order of ``plan``, its images seen as ``look`` says.

    Args:
        device: where the batches are to lie.
        kind: ``ffcv``, ``torch``, or ``auto``: FFCV where it is installed, else the torch loader with a warning. Both
            give the same batches: to the last bit for raw images that need no resizing, within two gray levels where
            they are resized, and within what two JPEG decoders differ by.
        workers: threads that decode; 0: as many as this process may use.
        keep: JPEG images stay decoded in memory where it has room for all of the file; for one that is gone through again.

    Raises:
        Refused: the file is not whole, the plan's rows are not in it, or FFCV is asked for and not there.
    """
    beton = opened(file)
    if len(plan.rows) and int(plan.rows.max()) >= len(beton):
        raise Refused(f"{file}: row {int(plan.rows.max())} is asked for, but it holds {len(beton)} images, from 0.")
    if kind not in ("auto", "ffcv", "torch"):
        raise Refused(f"data.loader: {kind!r}. Here: auto, ffcv, torch.")
    made: type[BaseLoader] = TorchLoader
    if kind != "torch":
        try:
            from lotus.data.ffcv import FfcvLoader

            made = FfcvLoader
        except (ImportError, OSError) as error:
            if kind == "ffcv":
                raise Refused(
                    f"data.loader: ffcv is not here ({error}). Run lotus doctor, or set it to auto."
                ) from None
            _stand_in(str(error))
    held = kept.keep(beton, made.kind) if keep else kept.NOTHING
    return made(beton, plan, look, torch.device(device), cores.count(workers), held)


def writer(data: Data, images: int) -> tuple[Make, str]:
    """FFCV's writer, or ours where it cannot be had; and a sentence if the user should know. For :func:`lotus.data.writing.prepare`.

    Raises:
        Refused: ``data.loader: ffcv`` where FFCV is not installed.
    """
    if data.loader == "torch":
        return PlainWriter, ""
    try:
        from lotus.data.ffcv import FfcvWriter
    except (ImportError, OSError) as error:
        if data.loader == "ffcv":
            raise Refused(
                f"data.loader: ffcv is not here ({error}). Run lotus doctor, or set data.loader: auto."
            ) from None
        return PlainWriter, ""
    if not FfcvWriter.fits(images):
        return PlainWriter, "/dev/shm is too small for FFCV's writer; the same format is written without it"
    return FfcvWriter, ""


warned: set[str] = set()


def _stand_in(why: str) -> None:
    if why not in warned:
        warned.add(why)
        warnings.warn(
            f"FFCV is not here ({why}); the plain torch loader stands in. It gives the same batches, more slowly: FFCV is "
            "about 5 times as fast on CIFAR-10, 4.5 times on raw and 2.4 times on JPEG images of 224 pixels. Run lotus doctor.",
            Notice,
            stacklevel=3,
        )
