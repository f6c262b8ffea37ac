"""A run's folder, held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from selection.errors import Refused

_LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which is made where it is missing, for this process; made for nothing, it is gone afterwards.

    Raises:
        Refused: another run is at work in it, or it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _opened(folder / _LOCK)
    except OSError as error:
        raise Refused(f"{folder}: cannot be used ({error.strerror}). Give another with folder=PATH.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(
                f"{folder}: another run is at work in this folder. Wait for it, or give another with folder=PATH."
            ) from None
        try:
            yield
        finally:
            _leave_nothing(folder, made)


def _opened(path: Path) -> IO[bytes]:
    """To be held open for as long as the run. It empties nothing, follows no link, and waits at no pipe."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"its {_LOCK} is no file")
    return file


def _leave_nothing(folder: Path, made: Sequence[Path]) -> None:
    """Take the folders that were ``made`` away again where nothing came into them."""
    with contextlib.suppress(OSError):
        if made and os.listdir(folder) == [_LOCK]:
            (folder / _LOCK).unlink()
            for path in made:
                path.rmdir()
