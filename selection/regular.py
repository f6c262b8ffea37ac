"""Whether a name stands for a file at all: a pipe or a device has no end, and who opens it may wait for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


MOST = 1 << 29
"""Bytes of a text that LOTUS or DeepSpeed writes: whatever is larger is another file, or one of holes, which takes no room on a disk."""


def check(path: str | os.PathLike[str]) -> Path:
    """``path``, once it is sure to be a file, or a link to one.

    Raises:
        OSError: there is none, or something of another kind; ``strerror`` says what.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for fits, name in _KINDS if fits(mode)), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a file", os.fspath(path))
    return Path(path)


def bounded(path: str | os.PathLike[str], most: int = MOST) -> Path:
    """:func:`check` of one that has no more than ``most`` bytes.

    Raises:
        OSError: as :func:`check`, or it is larger.
    """
    if (size := os.stat(check(path)).st_size) > most:
        raise OSError(errno.EINVAL, f"{size:,} bytes, and {most:,} are the most that is read", os.fspath(path))
    return Path(path)


def text(path: str | os.PathLike[str], *, most: int = MOST, encoding: str = "utf-8", errors: str = "strict") -> str:
    """What is written in a file, once it is sure to be one, and no larger than ``most`` bytes.

    Raises:
        OSError: as :func:`bounded`.
        UnicodeDecodeError: it is no text in this encoding.
    """
    return bounded(path, most).read_text(encoding=encoding, errors=errors)
