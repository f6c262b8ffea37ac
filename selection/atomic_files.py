"""The one way to write: a file or a folder is whole under its name, or it is not there and what stood there stands.

It is made in a folder of ours beside its place, ``.NAME.<16 hex digits>.part``, which no file of a user's is called; made to last
(fsync); renamed; and the rename is made to last. Nothing else is ever removed. What a kill leaves, :func:`tidy` takes away. Here
too is the one hash, of anything that JSON can hold and of files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from selection import regular
from selection.errors import Refused

_PART = re.compile(r"\..*\.[0-9a-f]{16}\.part", re.DOTALL)
_OLDER = ".was-before"  # in a folder of ours: the folder that gives way, for the moment between two renames
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
_LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS)
_MANY = 1000  # files of a folder that are made to last one by one; beyond, all at once


# ------------------------------------------------------------------------------------------------------- whole or not


@contextlib.contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """A path of the same name to write a file to, which becomes ``path`` once the body is through.

    Raises:
        OSError: it cannot be written; what stood there before still stands.
    """
    path = _named(path)
    if (there := _mode(path)) is not None and not stat.S_ISREG(there):
        code = errno.EISDIR if stat.S_ISDIR(there) else errno.EINVAL
        raise OSError(code, "it is a folder" if stat.S_ISDIR(there) else "it is no plain file")
    with _part(path) as part:
        yield part / path.name
        _last(part / path.name)
        os.replace(part / path.name, path)
        _last_rename(path)


@contextlib.contextmanager
def folder_beside(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``path`` once the body is through.

    Args:
        replace: a folder that stands there and is not empty gives way; the caller has made sure that it may

    Raises:
        OSError: it cannot be written; what stood there before still stands.
    """
    path = _named(path)
    with _part(path) as part:
        new = part / path.name
        new.mkdir()
        yield new
        _last_all(new)
        try:
            os.replace(new, path)  # nothing there, or an empty folder
        except OSError as error:
            if not replace or not (error.errno in _TAKEN or path.is_dir()):  # a link to a folder gives way too
                raise
            _swap(new, path, part)
        _last_rename(path)


@contextlib.contextmanager
def refusing(path: str | Path, cure: str = "") -> Iterator[None]:
    """Turns an ``OSError`` of the body into the refusal of ``path``.

    Args:
        cure: what to do; empty: what the error asks for

    Raises:
        Refused: the body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        usual = "Give another place."
        if error.errno in _FULL:
            usual = "Make room there, or give another place."
        elif error.errno in _LOCKED:
            usual = "Make it writable, or give another place."
        raise Refused(f"{path}: cannot be written ({error.strerror or error}). {cure or usual}") from error


@contextlib.contextmanager
def disk_faults_refused() -> Iterator[None]:
    """Turns an ``OSError`` by a disk that is full or broken, or by rights that are missing, into the refusal of the file that it
    names, wherever in the body it was raised: at a removal, too.

    Raises:
        Refused: the body raised one.
    """
    try:
        yield
    except OSError as error:
        cures = {
            **dict.fromkeys(_FULL, "Make room there"),
            **dict.fromkeys(_LOCKED, "Give this user the right to it"),
            errno.EIO: "See to that disk",
        }
        if error.filename is None or error.errno not in cures:
            raise
        path = os.fsdecode(error.filename)
        raise Refused(f"{path}: {error.strerror}. {cures[error.errno]}; then the same command goes on.") from error


@contextlib.contextmanager
def whole(path: str | Path, cure: str = "") -> Iterator[Path]:
    """:func:`beside`, with refusals.

    Raises:
        Refused: it cannot be written there; what stood there before still stands.
    """
    with refusing(path, cure), beside(path) as new:
        yield new


@contextlib.contextmanager
def opened(path: str | Path, cure: str = "") -> Iterator[IO[bytes]]:
    """:func:`whole`, as an open file."""
    with whole(path, cure) as new, open(new, "xb") as file:
        yield file


def write_bytes(path: str | Path, content: bytes, cure: str = "") -> None:
    """Write ``content`` to ``path``; its folder is made where it is missing.

    Raises:
        Refused: it cannot be written there; what stood there before still stands.
    """
    with opened(path, cure) as file:
        file.write(content)


def write_text(path: str | Path, text: str, cure: str = "") -> None:
    """:func:`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"), cure)


def write_json(path: str | Path, value: Any, cure: str = "") -> None:
    """:func:`write_text` of a value.

    Raises:
        Refused: also where a number in it is infinite or none, which JSON does not know.
    """
    if where := _unsound(value):
        raise Refused(f"{path}: not written, as {where}, which JSON cannot hold. Something diverged before.")
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", cure)


def append(path: str | Path, line: str, cure: str = "") -> None:
    """Put ``line`` at the end of ``path``: all of it, or, where there is no room, nothing. What a kill cut off before stays a
    line of its own.

    Raises:
        Refused: it cannot be written there.
    """
    content = line.encode("utf-8") + b"\n"
    with refusing(path, cure):
        if os.path.islink(path):  # in a folder from elsewhere it may lead to any file of the user's
            raise OSError(errno.ELOOP, "it is a link")
        if (there := _mode(Path(path))) is not None and not stat.S_ISREG(there):
            raise OSError(errno.EINVAL, "it is no plain file")
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                content = b"\n" + content
            try:
                while content:
                    content = content[os.write(handle, content) :]
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


def check(path: str | Path) -> None:
    """Before the work: whether a file can be written there. Nothing is made.

    Raises:
        Refused: it is a folder, or lies in none that can be written to.
    """
    path = Path(path)
    folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise Refused(f"{path}: cannot be written ({folder} is no folder that can be written to). Give another place.")
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no plain file"
        raise Refused(f"{path}: cannot be written (it is {kind}). Give another place.")


# ------------------------------------------------------------------------------------------------- what a kill leaves


def tidy(folder: str | Path) -> None:
    """Take away what killed processes of ours left in ``folder``; what one is at work on stays. A folder that was giving way to a
    newer one in that moment is put back."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in filter(_PART.fullmatch, names):
        part = Path(folder) / name
        with contextlib.suppress(OSError), _locked(part) as idle:  # gone by now, or not ours to take away: it stays
            if idle:
                for older in (part / _OLDER).glob("*"):
                    recover(Path(folder) / older.name)
                shutil.rmtree(part)


def recover(path: str | Path) -> None:
    """Put the folder ``path`` back where a kill fell between the two renames that replace it."""
    path = Path(path)
    if os.path.lexists(path):
        return
    with contextlib.suppress(OSError):  # no such folder, or none that may be changed: it is missing, as before
        for name in filter(_PART.fullmatch, os.listdir(path.parent)):
            older = path.parent / name / _OLDER / path.name
            if older.is_dir():
                os.replace(older, path)
                return


def remove(folder: str | Path) -> None:
    """Remove a folder of ours: half of it never bears its name. Where that cannot be, it stays.

    Raises:
        OSError: nothing may be changed there.
    """
    folder = _named(folder)
    with _part(folder) as part:
        os.replace(folder, part / folder.name)


# --------------------------------------------------------------------------------------------------------------- hash


def move(path: str | Path, there: str | Path) -> None:
    """Give a file or folder another name on the same disk, whose folder is there; lasting."""
    os.replace(path, there)
    for folder in {Path(path).parent, Path(there).parent}:
        _last_rename(folder / "_")


def digest(value: Any, size: int = 12) -> str:
    """Short hash, of ``size`` bytes, of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=size).hexdigest()


def digest_of(*paths: str | Path, size: int = 12, sha256: bool = False) -> str:
    """Hash of the bytes of files, one after the other; about a second a gigabyte.

    Args:
        size: of the BLAKE2b hash in bytes; of 32, as ``b2sum -l 256`` prints it
        sha256: that, as ``sha256sum`` prints it, instead

    Raises:
        OSError: one cannot be read.
    """
    hashed = hashlib.sha256() if sha256 else hashlib.blake2b(digest_size=size)
    for path in paths:
        with open(regular.check(path), "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    return hashed.hexdigest()


# --------------------------------------------------------------------------------------------------------------- parts


def _named(path: str | Path) -> Path:
    """With a name of its own: ``.`` and ``..`` have none."""
    path = Path(path)
    return path if path.name not in ("", "..") else path.resolve()


def _mode(path: Path) -> int | None:
    """Kind and permissions of what lies there; None where nothing does."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A new folder of ours beside ``path``, locked while it is needed, and gone afterwards with all that is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = os.fsdecode(os.fsencode(path.name)[:200])  # a name has at most 255 bytes
    part = path.with_name(f".{short}.{secrets.token_hex(8)}.part")
    part.mkdir()
    try:
        with _locked(part):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[bool]:
    """Holds a folder of ours, as far as the file system knows locks; whether that could be."""
    handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _swap(new: Path, path: Path, part: Path) -> None:
    """Rename ``new`` to ``path``, where a folder stands; others may do the same just now, and the last one wins."""
    older = part / _OLDER / path.name
    older.parent.mkdir()
    for tries in range(1000, -1, -1):
        with contextlib.suppress(FileNotFoundError):  # somebody else has it aside
            os.replace(path, older)
        try:
            os.replace(new, path)
            return
        except BaseException as error:
            if not (isinstance(error, OSError) and error.errno in _TAKEN and tries):
                if os.path.lexists(older):
                    os.replace(older, path)
                raise
        shutil.rmtree(older, ignore_errors=True)  # what somebody else has put there is newer


def _last(path: Path) -> None:
    """Make a file, or the names in a folder, last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _last_rename(path: Path) -> None:
    """Make the new name last. It stands already, so that no fault may be told as if it did not."""
    with contextlib.suppress(OSError):  # a folder that may not be read, a file system that knows no fsync of one
        _last(path.parent)


def _last_all(folder: Path) -> None:
    """Make a folder with all that is in it last; hard links share a file that lasts already."""
    inside = [(Path(where), names) for where, _, names in os.walk(folder)]
    files = [where / name for where, names in inside for name in names]
    if len(files) > _MANY:
        os.sync()
        return
    for path in files:
        about = path.lstat()
        if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
            _last(path)
    for where, _ in inside:
        _last_rename(where / "any")


def _unsound(value: Any, place: str = "") -> str:
    """``model.loss is nan``: the first number that JSON does not know; empty where there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place or 'it'} is {value}"
    inside = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    return next(filter(None, (_unsound(one, f"{place}.{name}".strip(".")) for name, one in inside)), "")
