"""The manifest of a .beton: what is known of it, and the check that it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lotus import files
from lotus.data.format import Beton
from selection import regular
from selection.errors import Refused, reason

FORMAT = 1
_CHECKSUM = 16  # bytes
LARGE = 2_000_000_000  # bytes, which take some seconds to read


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
    frame: str = ""
    """Digest of all of the file but its pixels, whose checksums are in it; empty where they are not."""

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
        manifest = cls._found(Path(file))
        if isinstance(manifest, str):
            raise Refused(manifest)
        return manifest

    @classmethod
    def whole(cls, file: str | os.PathLike[str]) -> Self | None:
        """As :meth:`load`; None where that refuses."""
        manifest = cls._found(Path(file))
        return None if isinstance(manifest, str) else manifest

    @classmethod
    def _found(cls, file: Path) -> Self | str:
        """The manifest of ``file``, or what is wrong."""
        path = cls.path(file)
        if not file.exists():
            return f"{file}: does not exist. Run prepare."
        if not path.exists():
            return f"{file}: no {path.name} beside it, so it is half-written or not from LOTUS. Run prepare."
        try:
            regular.check(file)
            record = json.loads(regular.text(path))
            sealed = record.pop("digest", None)
            changed = sealed not in (None, files.digest(record))
            if record.pop("format") != FORMAT:
                return f"{path}: written by another version of LOTUS. Run prepare again."
            manifest = cls._of(record)
            if changed:
                return f"{path}: has changed since it was written. Delete it and run prepare."
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"{path}: not a manifest ({reason(error)}). Delete it and run prepare."
        about = file.stat()
        if about.st_size != manifest.bytes:
            return (
                f"{file}: {about.st_size} bytes, but its manifest says {manifest.bytes}: it is cut off or was replaced. "
                "Delete it and run prepare."
            )
        if about.st_mtime_ns != manifest.modified:
            if checksum(file) != manifest.checksum:
                return f"{file}: its bytes have changed since it was written. Delete it and run prepare."
            manifest = dataclasses.replace(manifest, modified=about.st_mtime_ns)
            with contextlib.suppress(OSError):  # a read-only folder
                manifest.save(file)  # so that the next one need not read it through
        return manifest

    @classmethod
    def _of(cls, told: dict[str, Any]) -> Self:
        """What JSON says, in its kinds.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        size = told["size"]
        names = ("classes", "skipped", "mean", "std")
        made = cls(**told | {name: tuple(told[name]) for name in names} | {"size": tuple(size) if size else None})
        made._check()
        return made

    def _check(self) -> None:
        """Hold what was read to its kinds.

        Raises:
            ValueError: it is of another kind, or no number that a file can have.
        """
        counts = {"n": self.n, "bytes": self.bytes, "modified": self.modified}
        texts = {"fingerprint": self.fingerprint, "source": self.source, "checksum": self.checksum, "frame": self.frame}
        sane = {
            **{name: type(count) is int and 0 < count < 1 << 63 for name, count in counts.items()},
            **{name: isinstance(text, str) for name, text in texts.items()},
            "classes": bool(self.classes) and all(isinstance(name, str) for name in self.classes),
            "mean": _parts(self.mean),
            "std": _parts(self.std) and min(self.std) > 0,
            "size": self.size is None or (len(self.size) == 2 and all(type(side) is int for side in self.size)),
            "settings": isinstance(self.settings, dict),
            "skipped": all(isinstance(one, dict) and set(one) == {"name", "reason"} for one in self.skipped),
        }
        for name, is_sane in sane.items():
            if not is_sane:
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}")

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the manifest of ``file``, whole or not at all."""
        with files.beside(self.path(file)) as beside, beside.open("w", encoding="utf-8") as opened:
            record = {"format": FORMAT, **dataclasses.asdict(self)}
            json.dump({**record, "digest": files.digest(record)}, opened, indent=1)  # in ASCII: a name may be no UTF-8


def verify(file: str | os.PathLike[str], *, through: bool = True) -> Manifest:
    """The manifest of ``file``, which is read through to its last pixel, once a process for as long as its size and times stand.

    Args:
        through: False passes over the pixels of a file above 2 GB that holds the checksum of each image, since whoever reads
            one holds it to that (:meth:`lotus.data.format.Beton.payload`)

    Raises:
        Refused: it is not, byte for byte, what was written, whatever its time says.
    """
    manifest = Manifest.load(file)
    brief = bool(manifest.frame) and manifest.bytes > LARGE and not through
    if not (frame(file) == manifest.frame if brief else _same(file, manifest)):
        raise Refused(f"{file}: its bytes have changed since it was written. Delete it and run prepare.")
    return manifest


def verified(file: str | os.PathLike[str]) -> Manifest | None:
    """As :func:`verify`; None where that refuses."""
    manifest = Manifest.whole(file)
    return manifest if manifest is not None and _same(file, manifest) else None


def _same(file: str | os.PathLike[str], manifest: Manifest) -> bool:
    return files.digest_once(os.fspath(file), _CHECKSUM) == manifest.checksum


def frame(file: str | os.PathLike[str]) -> str:
    """Digest of all of a .beton but its pixels; empty where it has no checksums of those.

    Raises:
        Refused: it is no .beton.
    """
    stored = Beton(Path(file))
    if stored.sums is None:
        return ""
    hashed = hashlib.blake2b(digest_size=_CHECKSUM)
    for part in (stored.data[: stored.pixels[0]], stored.data[stored.pixels[1] :]):
        hashed.update(part.data)
    return hashed.hexdigest()


def checksum(file: str | os.PathLike[str]) -> str:
    """Of the file's bytes; about a second a gigabyte."""
    return files.digest_of(os.fspath(file), size=_CHECKSUM)


def _parts(three: tuple[Any, ...]) -> bool:
    """Whether it is a number in 0..1 a channel."""
    return len(three) == 3 and all(type(number) in (int, float) and 0 <= number <= 1 for number in three)
