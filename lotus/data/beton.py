"""A data set as a file: ``train.beton`` and, beside it, its manifest ``train.json``.

``prepare`` writes both, and the manifest last: a .beton is good when its manifest says so. FFCV itself would open a
half-written file as if it were whole, hang for ever when an image or the disk makes its writer fail, and read flipped
bytes without a word; here each of these is a refusal.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lotus.data import format
from lotus.data.format import Beton, PlainWriter, Stored
from lotus.data.manifest import Manifest, checksum, frame, verify
from lotus.data.pictures import Pixels
from lotus.data.source import digest
from lotus.data.writing import Written, fresh, prepare, read_back, settings, tell
from selection.errors import Refused

__all__ = ["Manifest", "checksum", "image", "labels", "opened", "part", "prepare", "settings", "verify"]


def labels(file: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """(N,) labels of a .beton; without FFCV."""
    return opened(file).labels


def image(file: str | os.PathLike[str], row: int) -> Pixels:
    """Image ``row`` (H, W, 3) uint8 as it is stored; without FFCV."""
    return opened(file).image(int(row))


def opened(file: str | os.PathLike[str]) -> Beton:
    """The .beton itself, checked, and held to its manifest; kept open for the next call.

    Raises:
        Refused: it is not whole, or does not hold the images and classes of which its manifest speaks.
    """
    manifest = Manifest.load(file)
    about = os.stat(file)
    beton = _opened(os.fspath(file), about.st_mtime_ns, about.st_size)
    if len(beton) != manifest.n:
        raise Refused(f"{file}: {len(beton)} images, and its manifest says {manifest.n}. Delete it and run prepare.")
    if (highest := int(beton.labels.max())) >= len(manifest.classes):
        raise Refused(
            f"{file}: a label of {highest}, and its manifest has {len(manifest.classes)} classes, counted from 0. "
            "Delete it and run prepare."
        )
    return beton


@functools.lru_cache(maxsize=4)
def _opened(file: str, modified: int, size: int) -> Beton:
    return Beton(Path(file))


def part(file: str | os.PathLike[str], rows: npt.NDArray[np.int64], out: str | os.PathLike[str]) -> Manifest:
    """Write the images ``rows`` of a .beton as one of its own, with its manifest: what is stored of each is copied byte for byte.

    Mean and deviation are those of the whole, by which models of the whole normalize.

    Raises:
        Refused: no such row, it is the same file, or it cannot be written.
    """
    file, out = Path(file), Path(out)
    if file.resolve() == out.resolve():
        raise Refused(f"{out}: is the file that is read. Give another name.")
    whole, known = opened(file), Manifest.load(file)
    if Manifest.path(out).exists() and Manifest.whole(out) is None:
        raise Refused(f"{Manifest.path(out)}: stands where the manifest of {out.name} would go. Give another name.")
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(whole):
        raise Refused(f"{file}: holds {len(whole)} images, and others are asked for, or none.")
    written = Written()
    with fresh(out) as beside:
        largest = int(whole.sizes[rows].max())
        small = int(whole.sizes[rows].sum()) <= 2 * format.USUAL_PAGE and largest <= format.SMALLEST_PAGE
        writer = PlainWriter(beside, len(rows), format.SMALLEST_PAGE if small else format.page_for(largest))
        try:
            for row in rows.tolist():
                stored = Stored(
                    int(whole.modes[row]), int(whole.heights[row]), int(whole.widths[row]), whole.payload(row).data
                )
                writer.add(stored, int(whole.labels[row]))
                written.add(stored, int(whole.labels[row]))
            writer.finish()
        finally:
            writer.abandon()
        format.seal(beside, written.checks)
        read_back(beside, written)
        about = beside.stat()
        fingerprint = digest(known.fingerprint, rows)
        manifest = dataclasses.replace(
            known,
            n=len(rows),
            fingerprint=fingerprint,
            source=fingerprint,
            size=next(iter(written.sizes)) if len(written.sizes) == 1 else None,
            skipped=(),
            bytes=about.st_size,
            modified=about.st_mtime_ns,
            checksum=checksum(beside),
            frame=frame(beside),
        )
    tell(out, manifest)
    return manifest
