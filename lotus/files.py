"""How LOTUS writes: all of :mod:`selection.atomic_files`, and what holds tensors. Needs torch where tensors are written or read alone."""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selection import regular
from selection.atomic_files import (
    append,
    beside,
    check,
    digest,
    digest_of,
    folder_beside,
    move,
    opened,
    recover,
    refusing,
    remove,
    tidy,
    whole,
    write_bytes,
    write_json,
    write_text,
)
from selection.errors import Refused, reason

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "append", "beside", "check", "digest", "digest_of", "digest_once", "folder_beside", "move", "opened", "put_tensors", "read_tensors", "recover",
    "refusing", "remove", "tidy", "whole", "write_bytes", "write_json", "write_tensors", "write_text",
]  # fmt: skip


def digest_once(path: str | Path, size: int = 12) -> str:
    """:func:`digest_of` of a file, which is read through once a process, for as long as its size and times stand.

    Raises:
        OSError: it cannot be read.
    """
    about = os.stat(path)
    return _digest_once(os.fspath(path), size, (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))


@functools.lru_cache(64)
def _digest_once(path: str, size: int, stands: tuple[int, ...]) -> str:
    return digest_of(path, size=size)


def put_tensors(tensors: Mapping[str, Any], file: Path) -> None:
    """As a .safetensors, into a folder that :func:`folder_beside` or :func:`beside` gave.

    Raises:
        OSError: it cannot be written, which safetensors tells by an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode & 0o777  # as the umask says; safetensors' own file is closed to all others
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"}
        )
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error)) from error
    file.chmod(mode)


def write_tensors(path: Path, tensors: Mapping[str, Any], cure: str = "") -> None:
    """Write ``tensors`` to ``path`` as a .safetensors.

    Raises:
        Refused: it cannot be written there; what stood there before still stands.
    """
    with whole(path, cure) as new:
        put_tensors(tensors, new)


def read_tensors(path: Path, cure: str) -> dict[str, Tensor]:
    """What :func:`write_tensors` wrote, on the CPU.

    Args:
        path: the .safetensors
        cure: how it comes back where it is gone or damaged

    Raises:
        Refused: it is missing, cut short, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(regular.check(path))
    except (OSError, MemoryError, SafetensorError) as error:
        raise Refused(f"{path}: cannot be read ({reason(error)}). {cure}") from None
