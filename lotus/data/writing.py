"""How a .beton is written: each image read and checked, the file read back, and its manifest last."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import time
import zlib
from array import array
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus import config, files
from lotus.data import format, pictures
from lotus.data.encoding import checked, encoded, moments, stored
from lotus.data.format import Beton, PlainWriter, Stored, TooLarge, Writer
from lotus.data.manifest import Manifest, checksum, frame, verified
from lotus.data.source import Source, without
from lotus.events import Event, Said, Step, Wrote
from selection.errors import Refused

_TRIED = 16  # images encoded to guess how large the file will be

_READ_BACK = 64  # images compared after writing

_EVERY = 0.5, 1000  # seconds, images: a sign of life after either


def settings(data: config.Data) -> dict[str, Any]:
    """The settings on which the file's bytes depend, and no others: the rest may change without a rewrite."""
    kept: dict[str, Any] = {"write": data.write, "max_side": data.max_side}
    if data.write != "raw":
        kept["jpeg_quality"] = data.jpeg_quality
    if data.write == "smart":
        kept["smart_threshold"] = data.smart_threshold
    if data.write == "proportion":
        kept["jpeg_share"] = data.jpeg_share
    return kept


Make = Callable[[Path, int, int], Writer]
"""A writer, given the file, how many images there are at most, and the size of a page."""

Choose = Callable[[config.Data, int], tuple[Make, str]]
"""A writer for so many images, and a sentence if the user should know."""


def plain(data: config.Data, images: int) -> tuple[Make, str]:
    """Our own writer, which needs nothing."""
    return PlainWriter, ""


def prepare(
    source: Source,
    file: str | os.PathLike[str],
    data: config.Data,
    *,
    choose: Choose = plain,
    anew: bool = False,
    stage: str = "prepare",
) -> Iterator[Event]:
    """Write ``source`` as ``file`` and its manifest, unless they stand already. Yields what happens.

    Each image is read and checked here before the writer sees it, the pages are written in this process, so that a
    fault is an exception and no worker can leave us waiting, under a name of its own; read back; and renamed.

    Args:
        choose: the writer, e.g. :func:`lotus.data.loader.writer`; asked once it is sure that something is written
        anew: write it even if it stands
        stage: the events' stage

    Raises:
        Refused: a damaged image (named; with ``data.damaged: skip`` it is left out and counted), no room on the disk; what
            ``choose`` refuses.
    """
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(
            f"{file.parent}: cannot be made ({error.strerror}). Give another place with data.folder=PATH."
        ) from None
    if not anew and _stands(source, file, data):
        yield Said(stage, f"{file}: unchanged, not written again")
        return
    claim = yield from _claim(file.parent, stage)
    try:
        files.tidy(file.parent)
        if not anew and _stands(source, file, data):
            yield Said(stage, f"{file}: written by another run just now")
            return
        yield from _write(source, file, data, stage, choose)
    finally:
        if claim is not None:
            os.close(claim)
    yield Wrote(stage, str(file))


def _stands(source: Source, file: Path, data: config.Data) -> bool:
    manifest = verified(file)
    return manifest is not None and (
        manifest.source == source.fingerprint
        and manifest.classes == source.classes
        and manifest.settings == settings(data)
        and (not manifest.skipped or data.damaged == "skip")
    )


def _claim(folder: Path, stage: str) -> Generator[Event, None, int | None]:
    """Wait until no other run writes in ``folder``. The lock goes with the process, however it ends."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    told = False
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            except BlockingIOError:
                if not told:
                    yield Said(stage, f"{folder}: another run is writing there; waiting for it")
                    told = True
                time.sleep(0.2)
            except OSError:  # a file system without locks
                os.close(handle)
                return None
    except BaseException:
        os.close(handle)
        raise


@dataclass
class Written:
    """What was written so far."""

    labels: array[int] = dataclasses.field(default_factory=lambda: array("q"))
    checks: array[int] = dataclasses.field(default_factory=lambda: array("q"))  # CRC of each image's stored bytes
    sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    moments: list[npt.NDArray[np.float64]] = dataclasses.field(default_factory=list)  # (2, 3) a sampled image
    odd: dict[str, str] = dataclasses.field(default_factory=dict)  # by name: what is wrong beside its pixels

    def add(self, stored: Stored, label: int) -> None:
        self.labels.append(label)
        self.checks.append(zlib.crc32(stored.data))
        self.sizes.add((stored.height, stored.width))


def _write(source: Source, file: Path, data: config.Data, stage: str, choose: Choose) -> Iterator[Event]:
    make, note = choose(data, len(source))
    if note:
        yield Said(stage, note, level="warning")
    needed = _check_room(source, file, data)
    page = format.USUAL_PAGE if needed > 2 * format.USUAL_PAGE else format.SMALLEST_PAGE
    with fresh(file) as beside:
        while True:
            try:
                written = yield from _fill(
                    source, file, data, stage, lambda page: make(beside, len(source), page), page
                )
                break
            except TooLarge as error:
                page = format.page_for(error.needed)
                yield Said(
                    stage, f"{file.name}: an image of {error.needed / 1e6:.1f} MB; beginning again with larger pages"
                )
        _check_classes(source, written)
        format.seal(beside, written.checks)
        read_back(beside, written)
        manifest = _described(source, data, beside, written)
    tell(file, manifest)
    yield from _warned(file, stage, written)


def _described(source: Source, data: config.Data, beside: Path, written: Written) -> Manifest:
    """The manifest of what was written."""
    means = np.mean(written.moments, axis=0)
    deviation = np.sqrt(np.maximum(means[1] - means[0] ** 2, 0))
    # Images of one color have no deviation, and normalizing divides by it.
    deviation = np.maximum(deviation, 1 / 255)
    about = beside.stat()
    return Manifest(
        n=len(written.labels),
        classes=source.classes,
        fingerprint=without(source.fingerprint, [entry["name"] for entry in written.skipped]),
        mean=_three(means[0]),
        std=_three(deviation),
        size=next(iter(written.sizes)) if len(written.sizes) == 1 else None,
        skipped=tuple(written.skipped),
        settings=settings(data),
        source=source.fingerprint,
        bytes=about.st_size,
        modified=about.st_mtime_ns,
        checksum=checksum(beside),
        frame=frame(beside),
    )


def _warned(file: Path, stage: str, written: Written) -> Iterator[Event]:
    """What was odd, and what was left out."""
    if written.odd:
        some, more = list(written.odd)[:3], len(written.odd) - 3
        names = ", ".join(some) + (f" and {more} more" if more > 0 else "")
        yield Said(stage, f"{file.name}: read, though {written.odd[some[0]]}: {names}", level="warning")
    if written.skipped:
        first, more = written.skipped[0], len(written.skipped) - 1
        rest = f" and {more} more, listed in {Manifest.path(file).name}" if more else ""
        yield Said(stage, f"{file.name}: left out {first['name']} ({first['reason']}){rest}", level="warning")


def _fill(
    source: Source, file: Path, data: config.Data, stage: str, make: Callable[[int], Writer], page: int
) -> Generator[Event, None, Written]:
    """All images into a file of such pages."""
    written, total = Written(), len(source)
    writer = make(page)
    began = then = time.perf_counter()
    last = 0
    try:
        for i, image in enumerate(encoded(source, data)):
            if image.notes:
                written.odd[source.name(i)] = image.notes[0]
            if image.stored is None:
                name, fault = source.name(i), image.fault
                if data.damaged == "fatal":
                    raise Refused(f"{name}: damaged image ({fault}). Mend or delete it, or set data.damaged: skip.")
                written.skipped.append({"name": name, "reason": fault})
            else:
                writer.add(image.stored, int(source.labels[i]))
                written.add(image.stored, int(source.labels[i]))
                if image.moments is not None:
                    written.moments.append(image.moments)
            now, done = time.perf_counter(), i + 1
            if now - then >= _EVERY[0] or done - last >= _EVERY[1] or done == total:
                yield Step(stage, done, total, "images", {"images_per_second": done / max(now - began, 1e-9)})
                then, last = now, done
        if not written.labels:
            raise Refused(
                f"{source.where}: all {total} images are damaged, the first for: {written.skipped[0]['reason']}."
            )
        if not written.moments:  # every sampled image was damaged, which is hardly ever
            bad = {entry["name"] for entry in written.skipped}
            written.moments.append(moments(source.read(next(i for i in range(total) if source.name(i) not in bad))))
        writer.finish()
    except OSError as error:
        raise _disk(error, file, f" after {len(written.labels)} of {total} images") from None
    finally:
        writer.abandon()
    return written


def _three(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    first, second, third = (round(float(value), 6) for value in values)
    return first, second, third


def _check_room(source: Source, file: Path, data: config.Data) -> int:
    """How many bytes the file will about have, judged by a few images; refused now, not after hours, if too many."""
    last = min(len(source), _TRIED) - 1 if source.streamed else len(source) - 1
    tried = np.unique(np.linspace(0, last, _TRIED).astype(int))
    sizes = [0]
    for i in tried:
        # A damaged image is told of when its turn comes.
        with contextlib.suppress(Exception):
            sizes.append(len(stored(pictures.fit(checked(source.read(int(i))), data.max_side), int(i), data).data))
    usual = sum(sizes) / max(1, len(sizes) - 1)
    needed = int(usual * len(source) * 1.02) + len(source) * (format.META.itemsize + format.PLACE.itemsize)
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise Refused(
            f"{file}: needs about {_bytes(needed)}, and {_bytes(free)} are free in {file.parent}. Make room, "
            "name another data.folder, or store less: data.max_side, data.write: jpg."
        )
    return needed


def _bytes(count: int) -> str:
    """Three digits, in the unit that leaves some before the point."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _check_classes(source: Source, written: Written) -> None:
    counts = np.bincount(written.labels, minlength=len(source.classes))
    gone = (counts == 0) & (np.bincount(source.labels, minlength=len(source.classes)) > 0)
    if gone.any() and not source.partial:
        name = source.classes[int(np.argmax(gone))]
        raise Refused(
            f"{source.where}: all images of class {name!r} are damaged, e.g. {written.skipped[0]['name']}. Delete them, and add "
            "others; lotus inspect lists them."
        )


def read_back(beside: Path, written: Written) -> None:
    """Compare the file with what went into it: every label, some images."""
    try:
        beton = Beton(beside)
    except Refused as error:
        raise OSError(errno.ENOSPC, f"not written whole ({error})") from None
    same = len(beton) == len(written.labels) and np.array_equal(beton.labels, written.labels)
    if same:
        some = np.random.default_rng(len(beton)).choice(len(beton), min(_READ_BACK, len(beton)), replace=False).tolist()
        for row in {0, len(beton) - 1, *some}:
            same &= zlib.crc32(beton.payload(row).data) == written.checks[row]
        for row in some[:4]:
            same &= beton.image(row).shape == (beton.heights[row], beton.widths[row], 3)
    if not same:
        raise OSError(errno.EIO, "what was read back is not what was written; the disk may be failing")


def _disk(error: OSError, file: Path, when: str = "") -> Refused:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Refused(f"{file}: no space left{when}. Make room in {file.parent}, or name another data.folder.")
    return Refused(f"{file}: cannot be written{when}: {error.strerror or error}.")


@contextlib.contextmanager
def fresh(file: Path) -> Iterator[Path]:
    """Where to write ``file``, which loses its old manifest with its old content: that must never stand beside a new file."""
    try:
        with files.beside(file) as beside:
            yield beside
            Manifest.path(file).unlink(missing_ok=True)
    except OSError as error:
        raise _disk(error, file) from None


def tell(file: Path, manifest: Manifest) -> None:
    try:
        manifest.save(file)
    except OSError as error:
        raise _disk(error, Manifest.path(file)) from None
