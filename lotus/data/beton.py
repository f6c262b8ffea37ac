"""A data set as a file: ``train.beton`` and, beside it, its manifest ``train.json``.

``prepare`` writes both, and the manifest last: a .beton is good when its manifest says so. FFCV itself would open a
half-written file as if it were whole, hang for ever when an image or the disk makes its writer fail, and read flipped
bytes without a word; here each of these is a refusal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lotus import config, files
from lotus.data import format, pictures, threads
from lotus.data.augment import uniform
from lotus.data.format import Beton, PlainWriter, Stored, TooLarge, Writer
from lotus.data.pictures import Pixels
from lotus.data.source import Source, digest
from lotus.events import Event, Said, Step, Wrote
from selection import regular
from selection.errors import Refused

FORMAT = 1
SAMPLE = 10_000
"""Images over which mean and standard deviation are taken."""

_CHECKSUM = 16  # bytes
_TRIED = 16  # images encoded to guess how large the file will be
_READ_BACK = 64  # images compared after writing
_BLOCK = 1 << 22  # pixels of which moments are taken at a time
_EVERY = 0.5, 1000  # seconds, images: a sign of life after either


@dataclass(frozen=True)
class Manifest:
    """What is known of a .beton. ``Manifest.load(file)`` is the check that the file is whole."""

    n: int
    classes: tuple[str, ...]
    fingerprint: str
    """Of the images that are in the file."""
    mean: tuple[float, float, float]
    """Of each channel, in 0..1, over a sample of the images."""
    std: tuple[float, float, float]
    size: tuple[int, int] | None
    """(H, W) of every image, or None where they differ."""
    skipped: tuple[dict[str, str], ...]
    """``name`` and ``reason`` of the damaged images that were left out."""
    settings: dict[str, Any]
    """How the pixels were stored."""
    source: str
    """Fingerprint of the data set it was made from."""
    bytes: int
    modified: int
    """The file's time of modification (ns): as long as it stands, the checksum need not be computed again."""
    checksum: str

    @staticmethod
    def path(file: str | os.PathLike[str]) -> Path:
        """Where the manifest of ``file`` lies."""
        return Path(file).with_suffix(".json")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Self:
        """The manifest of ``file``, which is checked against it.

        A file whose size and time are as they were is taken as whole; one that was copied or touched is read through
        once and its checksum compared.

        Raises:
            Refused: no manifest, an unreadable one, or a file that is not the one it speaks of.
        """
        file = Path(file)
        path = cls.path(file)
        if not file.exists():
            raise Refused(f"{file}: does not exist. Run prepare.")
        if not path.exists():
            raise Refused(f"{file}: no {path.name} beside it, so it is half-written or not from LOTUS. Run prepare.")
        try:
            regular.check(file)
            found = json.loads(regular.check(path).read_text(encoding="utf-8"))
            sealed = found.pop("digest", None)
            changed = sealed not in (None, files.digest(found))
            if found.pop("format") != FORMAT:
                raise Refused(f"{path}: written by another version of LOTUS. Run prepare again.")
            size = found["size"]
            manifest = cls(
                **found
                | {"classes": tuple(found["classes"]), "skipped": tuple(found["skipped"])}
                | {"mean": tuple(found["mean"]), "std": tuple(found["std"]), "size": tuple(size) if size else None}
            )
            manifest._check()
            if changed:
                raise Refused(f"{path}: has changed since it was written. Delete it and run prepare.")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused(f"{path}: not a manifest ({error}). Delete it and run prepare.") from None
        about = file.stat()
        if about.st_size != manifest.bytes:
            raise Refused(
                f"{file}: {about.st_size} bytes, but its manifest says {manifest.bytes}: it is cut off or was replaced. "
                "Delete it and run prepare."
            )
        if about.st_mtime_ns != manifest.modified:
            if checksum(file) != manifest.checksum:
                raise Refused(f"{file}: its bytes have changed since it was written. Delete it and run prepare.")
            manifest = dataclasses.replace(manifest, modified=about.st_mtime_ns)
            with contextlib.suppress(OSError):  # a read-only folder
                manifest.save(file)  # so that the next one need not read it through
        return manifest

    def _check(self) -> None:
        """Hold what was read to its kinds.

        Raises:
            ValueError: it is of another kind, or no number that a file can have.
        """
        counts = {"n": self.n, "bytes": self.bytes, "modified": self.modified}
        texts = {"fingerprint": self.fingerprint, "source": self.source, "checksum": self.checksum}
        for name, count in counts.items():
            if type(count) is not int or not 0 < count < 1 << 63:
                raise ValueError(f"{name} is {count!r:.40}")
        for name, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(f"{name} is {text!r:.40}")
        if not self.classes or not all(isinstance(name, str) for name in self.classes):
            raise ValueError("its classes are no names")
        for name, three in (("mean", self.mean), ("std", self.std)):
            if len(three) != 3 or not all(type(v) in (int, float) and 0 <= v <= 1 for v in three):
                raise ValueError(f"{name} is {three!r:.80}")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}")
        if self.size is not None and (len(self.size) != 2 or not all(type(side) is int for side in self.size)):
            raise ValueError(f"size is {self.size!r:.40}")
        if not isinstance(self.settings, dict) or not all(
            isinstance(entry, dict) and set(entry) == {"name", "reason"} for entry in self.skipped
        ):
            raise ValueError("settings or skipped are of another kind")

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the manifest of ``file``, whole or not at all."""
        with files.beside(self.path(file)) as beside, beside.open("w", encoding="utf-8") as opened:
            told = {"format": FORMAT, **dataclasses.asdict(self)}
            json.dump({**told, "digest": files.digest(told)}, opened, indent=1, ensure_ascii=False)


def verify(file: str | os.PathLike[str]) -> Manifest:
    """The manifest of ``file``, which is read through to its last pixel, once a process for as long as its size and times stand.

    Raises:
        Refused: it is not, byte for byte, what was written, whatever its time says.
    """
    manifest = Manifest.load(file)
    if files.digest_once(os.fspath(file), _CHECKSUM) != manifest.checksum:
        raise Refused(f"{file}: its bytes have changed since it was written. Delete it and run prepare.")
    return manifest


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
    found = _opened(os.fspath(file), about.st_mtime_ns, about.st_size)
    if len(found) != manifest.n:
        raise Refused(f"{file}: {len(found)} images, and its manifest says {manifest.n}. Delete it and run prepare.")
    if (highest := int(found.labels.max())) >= len(manifest.classes):
        raise Refused(
            f"{file}: a label of {highest}, and its manifest has {len(manifest.classes)} classes, counted from 0. "
            "Delete it and run prepare."
        )
    return found


@functools.lru_cache(maxsize=4)
def _opened(file: str, modified: int, size: int) -> Beton:
    return Beton(Path(file))


def part(file: str | os.PathLike[str], rows: npt.NDArray[np.int64], out: str | os.PathLike[str]) -> Manifest:
    """Write the images ``rows`` of a .beton as one of its own, with its manifest: what is stored of each is copied byte for byte.

    Mean and deviation are those of the whole, by which models of the whole normalise.

    Raises:
        Refused: no such row, it is the same file, or it cannot be written.
    """
    file, out = Path(file), Path(out)
    if file.resolve() == out.resolve():
        raise Refused(f"{out}: is the file that is read. Give another name.")
    whole, known = opened(file), Manifest.load(file)
    if Manifest.path(out).exists():
        try:
            Manifest.load(out)
        except Refused:
            raise Refused(
                f"{Manifest.path(out)}: stands where the manifest of {out.name} would go. Give another name."
            ) from None
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(whole):
        raise Refused(f"{file}: holds {len(whole)} images, and others are asked for, or none.")
    written = _Written()
    with _new(out) as beside:
        largest = int(whole.sizes[rows].max())
        small = int(whole.sizes[rows].sum()) <= 2 * format.USUAL_PAGE and largest <= format.SMALLEST_PAGE
        writer = PlainWriter(beside, len(rows), format.SMALLEST_PAGE if small else format.page_for(largest))
        try:
            for row in rows.tolist():
                stored = whole.payload(row)
                height, width = int(whole.heights[row]), int(whole.widths[row])
                writer.add(Stored(int(whole.modes[row]), height, width, stored.data), int(whole.labels[row]))
                written.labels.append(int(whole.labels[row]))
                written.checks.append(zlib.crc32(stored.data))
                written.sizes.add((height, width))
            writer.finish()
        finally:
            writer.abandon()
        _read_back(beside, written)
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
        )
    _tell(out, manifest)
    return manifest


def checksum(file: str | os.PathLike[str]) -> str:
    """Of the file's bytes; about a second a gigabyte."""
    return files.digest_of(os.fspath(file), size=_CHECKSUM)


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


def prepare(
    source: Source, file: str | os.PathLike[str], data: config.Data, *, anew: bool = False, stage: str = "prepare"
) -> Iterator[Event]:
    """Write ``source`` as ``file`` and its manifest, unless they stand already. Yields what happens.

    Each image is read and checked here before the writer sees it, the pages are written in this process, so that a
    fault is an exception and no worker can leave us waiting, under a name of its own; read back; and renamed.

    Args:
        anew: write it even if it stands

    Raises:
        Refused: a damaged image (named; with ``data.damaged: skip`` it is left out and counted), no room on the disk,
            ``data.loader: ffcv`` where FFCV is not installed.
    """
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{file.parent}: cannot be made ({error.strerror}).") from None
    if not anew and _stands(source, file, data):
        yield Said(stage, f"{file}: unchanged, not written again")
        return
    claim = yield from _claim(file.parent, stage)
    try:
        files.tidy(file.parent)
        if not anew and _stands(source, file, data):
            yield Said(stage, f"{file}: written by another run just now")
            return
        yield from _write(source, file, data, stage)
    finally:
        if claim is not None:
            os.close(claim)
    yield Wrote(stage, str(file))


def _stands(source: Source, file: Path, data: config.Data) -> bool:
    try:
        manifest = verify(file)
    except Refused:
        return False
    return (
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
class _Written:
    """What was written so far."""

    labels: list[int] = dataclasses.field(default_factory=list)
    checks: list[int] = dataclasses.field(default_factory=list)  # CRC of each image's stored bytes
    sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    moments: list[npt.NDArray[np.float64]] = dataclasses.field(default_factory=list)  # (2, 3) a sampled image
    odd: dict[str, str] = dataclasses.field(default_factory=dict)  # by name: what is wrong beside its pixels


def _write(source: Source, file: Path, data: config.Data, stage: str) -> Iterator[Event]:
    make, note = _writer(data, len(source))
    if note:
        yield Said(stage, note, level="warning")
    needed = _check_room(source, file, data)
    page = format.USUAL_PAGE if needed > 2 * format.USUAL_PAGE else format.SMALLEST_PAGE
    with _new(file) as beside:
        while True:
            try:
                written = yield from _fill(source, file, beside, data, stage, make, page)
                break
            except TooLarge as error:
                page = format.page_for(error.needed)
                yield Said(
                    stage, f"{file.name}: an image of {error.needed / 1e6:.1f} MB; beginning again with larger pages"
                )
        _check_classes(source, written)
        _read_back(beside, written)
        moments = np.mean(written.moments, axis=0)
        deviation = np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 0))
        # Images of one colour have no deviation, and normalising divides by it.
        deviation = np.maximum(deviation, 1 / 255)
        fingerprint = source.fingerprint
        if written.skipped:
            fingerprint = digest(fingerprint, [entry["name"] for entry in written.skipped])
        about = beside.stat()
        manifest = Manifest(
            n=len(written.labels),
            classes=source.classes,
            fingerprint=fingerprint,
            mean=_three(moments[0]),
            std=_three(deviation),
            size=next(iter(written.sizes)) if len(written.sizes) == 1 else None,
            skipped=tuple(written.skipped),
            settings=settings(data),
            source=source.fingerprint,
            bytes=about.st_size,
            modified=about.st_mtime_ns,
            checksum=checksum(beside),
        )
    _tell(file, manifest)
    if written.odd:
        some, more = list(written.odd)[:3], len(written.odd) - 3
        names = ", ".join(some) + (f" and {more} more" if more > 0 else "")
        yield Said(stage, f"{file.name}: read, though {written.odd[some[0]]}: {names}", level="warning")
    if written.skipped:
        first = written.skipped[0]
        rest = (
            f" and {len(written.skipped) - 1} more, listed in {Manifest.path(file).name}" if written.skipped[1:] else ""
        )
        yield Said(stage, f"{file.name}: left out {first['name']} ({first['reason']}){rest}", level="warning")


def _fill(
    source: Source,
    file: Path,
    beside: Path,
    data: config.Data,
    stage: str,
    make: Callable[[Path, int, int], Writer],
    page: int,
) -> Generator[Event, None, _Written]:
    """All images into ``beside``."""
    written, total = _Written(), len(source)
    writer = make(beside, total, page)
    began = then = time.perf_counter()
    last = 0
    try:
        for i, (stored, moments, fault, notes) in enumerate(_encoded(source, data)):
            if notes:
                written.odd[source.name(i)] = notes[0]
            if stored is None:
                name = source.name(i)
                if data.damaged == "fatal":
                    raise Refused(f"{name}: damaged image ({fault}). Mend or delete it, or set data.damaged: skip.")
                written.skipped.append({"name": name, "reason": fault})
            else:
                label = int(source.labels[i])
                writer.add(stored, label)
                written.labels.append(label)
                written.checks.append(zlib.crc32(stored.data))
                written.sizes.add((stored.height, stored.width))
                if moments is not None:
                    written.moments.append(moments)
            now, done = time.perf_counter(), i + 1
            if now - then >= _EVERY[0] or done - last >= _EVERY[1] or done == total:
                yield Step(stage, done, total, "images", {"images_per_second": done / max(now - began, 1e-9)})
                then, last = now, done
        if not written.labels:
            raise Refused(
                f"{source.where}: all {total} images are damaged, the first for: {written.skipped[0]['reason']}."
            )
        if not written.moments:  # every sampled image was damaged, which is hardly ever
            written.moments.append(_moments(source.read(_first_good(source, written))))
        writer.finish()
    except OSError as error:
        raise _disk(error, file, f" after {len(written.labels)} of {total} images") from None
    finally:
        writer.abandon()
    return written


_Encoded = tuple[Stored | None, npt.NDArray[np.float64] | None, str, list[str]]


class _InTurn:
    """Room for what is decoded and not yet written, handed out so that the image whose turn it is to be written always gets in.

    Args:
        most: pixels, apart from those of that image.
    """

    def __init__(self, most: int) -> None:
        self._most, self._next = most, 0
        self._held: dict[int, int] = {}
        self._changed = threading.Condition()

    def enter(self, number: int, pixels: int) -> None:
        """Wait until ``pixels`` of image ``number`` have room."""
        with self._changed:
            self._changed.wait_for(lambda: number <= self._next or sum(self._held.values()) + pixels <= self._most)
            self._held[number] = pixels

    def leave(self, number: int) -> None:
        """Image ``number`` is written, or nobody waits for it any more."""
        with self._changed:
            self._held.pop(number, None)
            self._next = number + 1
            self._changed.notify_all()


def _encoded(source: Source, data: config.Data) -> Iterator[_Encoded]:
    """Each image ready to be written, in order, with its moments where it is in the sample; or why it cannot be; and what was
    noted of it."""
    total = len(source)
    # Row i is in the sample where the running count i * SAMPLE / N passes a whole number: evenly spread.
    sampled = np.diff(np.arange(total + 1) * min(SAMPLE, total) // total) > 0
    room = _InTurn(pictures.AT_ONCE)

    def one(i: int) -> _Encoded:
        notes: list[str] = []
        try:
            with pictures.watched(lambda pixels: room.enter(i, pixels), notes):
                pixels = pictures.fit(_checked(source.read(i)), data.max_side)
            return _stored(pixels, i, data), _moments(pixels) if sampled[i] else None, "", notes
        except Exception as error:  # a damaged picture can raise anything
            return None, None, " ".join(f"{type(error).__name__}: {error}".split()), notes

    workers = threads.count(data.workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lotus-prepare")
    pending: deque[Future[_Encoded]] = deque()
    try:
        for i in range(total + 8 * workers):
            if i < total:
                pending.append(pool.submit(one, i))
            if pending and i >= 8 * workers:
                yield pending.popleft().result()
                room.leave(i - 8 * workers)
    finally:
        room.leave(total)  # whoever still waits for room gets it
        pool.shutdown(wait=True, cancel_futures=True)


def _checked(pixels: Pixels) -> Pixels:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"{pixels.shape} of {pixels.dtype}, expected (H, W, 3) of uint8")
    if min(pixels.shape) < 1 or max(pixels.shape) > pictures.MAX_SIDE:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels; a side is 1 to {pictures.MAX_SIDE}")
    if pixels.shape[0] * pixels.shape[1] > pictures.MAX_PIXELS:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels; at most {pictures.MAX_PIXELS:,} are stored")
    return pixels


def _stored(pixels: Pixels, row: int, data: config.Data) -> Stored:
    """An image as raw pixels or JPEG, as ``data.write`` says."""
    packed = data.write == "jpg"
    if data.write == "smart":
        packed = pixels.nbytes > data.smart_threshold
    elif data.write == "proportion":
        packed = bool(uniform(0, 0, np.array([row], np.uint64), stream=1 << 20)[0] < data.jpeg_share)
    height, width = pixels.shape[:2]
    if packed:
        return Stored(format.JPEG, height, width, pictures.jpeg(pixels, data.jpeg_quality))
    return Stored(format.RAW, height, width, np.ascontiguousarray(pixels).data.cast("B"))


def _moments(pixels: Pixels) -> npt.NDArray[np.float64]:
    """(2, 3): mean and mean square of each channel, in 0..1. Every image weighs the same, whatever its size."""
    flat = pixels.reshape(-1, 3)
    sums = np.zeros((2, 3))
    for start in range(0, len(flat), _BLOCK):
        part = flat[start : start + _BLOCK] / 255.0
        share = len(part) / len(flat)  # 1 where there is one part
        sums += share * np.stack([part.mean(axis=0), (part * part).mean(axis=0)])
    return sums


def _first_good(source: Source, written: _Written) -> int:
    bad = {entry["name"] for entry in written.skipped}
    return next(i for i in range(len(source)) if source.name(i) not in bad)


def _three(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    first, second, third = (round(float(value), 6) for value in values)
    return first, second, third


def _writer(data: config.Data, images: int) -> tuple[Callable[[Path, int, int], Writer], str]:
    """FFCV's writer, or ours where it cannot be had; and a sentence if the user should know."""
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


def _check_room(source: Source, file: Path, data: config.Data) -> int:
    """How many bytes the file will about have, judged by a few images; refused now, not after hours, if too many."""
    tried = np.unique(np.linspace(0, len(source) - 1, _TRIED).astype(int))
    sizes = [0]
    for i in tried:
        # A damaged image is told of when its turn comes.
        with contextlib.suppress(Exception):
            sizes.append(len(_stored(pictures.fit(_checked(source.read(int(i))), data.max_side), int(i), data).data))
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


def _check_classes(source: Source, written: _Written) -> None:
    counts = np.bincount(written.labels, minlength=len(source.classes))
    gone = (counts == 0) & (np.bincount(source.labels, minlength=len(source.classes)) > 0)
    if gone.any() and not source.partial:
        name = source.classes[int(np.argmax(gone))]
        raise Refused(f"{source.where}: all images of class {name!r} are damaged, e.g. {written.skipped[0]['name']}.")


def _read_back(beside: Path, written: _Written) -> None:
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
def _new(file: Path) -> Iterator[Path]:
    """Where to write ``file``, which loses its old manifest with its old content: that must never stand beside a new file."""
    try:
        with files.beside(file) as beside:
            yield beside
            Manifest.path(file).unlink(missing_ok=True)
    except OSError as error:
        raise _disk(error, file) from None


def _tell(file: Path, manifest: Manifest) -> None:
    try:
        manifest.save(file)
    except OSError as error:
        raise _disk(error, Manifest.path(file)) from None
