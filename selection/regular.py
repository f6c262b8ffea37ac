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
