"""Files of arrays that a kill cannot halve and that cannot run code: written beside and renamed, read without pickle."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from selection import atomic_files, memory, regular
from selection.errors import Refused

ABOUT = "about"
_ZIP = b"PK\x03\x04"
_NPY = b"\x93NUMPY"
_PACKED = 1100
"""Bytes that one of a packed file can unfold to, by the format's own limit of 1032."""


def write(
    path: str | Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], *, kind: str, version: int
) -> None:
    """Write ``arrays`` and the JSON-ready ``about`` to ``path``; its folder is made where it is missing.

    Raises:
        Refused: it cannot be written there (no space, no permission); what stood there before still stands.
    """
    members: dict[str, Any] = dict(arrays)
    members[ABOUT] = np.array(json.dumps({"kind": kind, "format": version, **about}, sort_keys=True))
    with atomic_files.opened(path) as file:
        np.savez(file, **members)


def read(
    path: str | Path, *, kind: str, version: int, cure: str, made: str = "", only: Collection[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, read-only, and the ``about`` of a file that :func:`write` wrote.

    Args:
        path: the file.
        kind: what it is to be, as a reader calls it.
        version: its format, from 1.
        cure: what to do about a file of this kind that is damaged or of a later format.
        made: where files of this kind come from. Said of one that is missing or of another kind, which may well be precious.
        only: the arrays to read, as far as they are there; None: all.

    Raises:
        Refused: not there, truncated, damaged, of another kind or a later format.
    """
    made = made or cure
    path = Path(path)
    try:
        file = regular.check(path).open("rb")
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}). {made}") from error
    with file:
        if not _ZIP.startswith(file.read(len(_ZIP))):
            raise Refused(f"{path}: not {kind}, and no .npz at all, whatever its name. {made}")
        try:
            arrays, names = _members(file, only)
            about = json.loads(str(arrays.pop(ABOUT)[()])) if ABOUT in arrays else None
        except Refused:
            raise
        # A file from elsewhere may break the zip, npy or JSON parser in more ways than can be listed.
        except Exception as error:
            raise Refused(f"{path}: damaged, cut short, or not {kind} ({error}). If it was: {cure}") from error
    if not isinstance(about, dict) or about.get("kind") != kind:
        found = about.get("kind") if isinstance(about, dict) else None
        raise Refused(f"{path}: not {kind}, but {found or f'a foreign .npz ({_few(names)})'}. {made}")
    if about.get("format") != version:
        raise Refused(
            f"{path}: {kind} of format {about.get('format')!r}, and this LOTUS reads format {version}. {cure}"
        )
    for array in arrays.values():
        array.setflags(write=False)
    return arrays, about


def names(path: str | Path) -> tuple[str, ...]:
    """The arrays of a file that :func:`read` has read, those included that it left unread."""
    return tuple(name for name in _names(path) if name != ABOUT)


def _members(file: Any, only: Collection[str] | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays asked for, and the names of all that is inside. What has no ``about`` is foreign, maybe large, and not read."""
    file.seek(0)
    if file.read(len(_ZIP)) != _ZIP:
        raise ValueError("not an .npz file")
    file.seek(0)
    names = _names(file)
    file.seek(0)
    wanted = None if only is None else {*only, ABOUT}
    return (arrays(file, wanted, what=str(file.name)) if ABOUT in names else {}), names


def arrays(
    file: Any, only: Collection[str] | None = None, *, what: str = "", mapped: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of an .npz from anywhere, once each is sure to have the bytes that it claims and all to fit into memory.

    Args:
        file: its path, or the open file.
        only: those to read, as far as they are there; None: all.
        what: its name, for messages.
        mapped: of a path, those that are not read where they lie in it as they are (np.savez), but mapped, for one part after another.

    Raises:
        Refused: they do not fit into memory.
        Exception: any other, where the file is damaged, or holds Python objects.
    """
    with np.load(file, allow_pickle=False) as archive:
        wanted = [name for name in archive.files if only is None or name in only]
        claimed = {name: _claimed(archive.zip, name) for name in wanted}
        lie = {
            name: found for name in wanted if name in mapped and (found := _lying(archive.zip, name, file)) is not None
        }
        needed = sum(size for name, size in claimed.items() if name not in lie)
        memory.there(memory.size(needed), what or str(file), "Take a part of it, or write it with np.savez, unpacked.")
        return {name: lie[name] if name in lie else _truthful(archive[name]) for name in wanted}


def _lying(archive: zipfile.ZipFile, name: str, path: str | Path) -> np.ndarray | None:
    """A member's array where it lies in the file; None where it is packed or holds nothing.

    Raises:
        ValueError: its bytes are not those that were written.
    """
    member = _member(archive, name)
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with archive.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(opened)
        header = opened.tell()
        while opened.read(1 << 22):  # to its end, where zipfile holds it to its checksum
            pass
    if not math.prod(shape) * dtype.itemsize:
        return None
    with regular.check(path).open("rb") as file:
        file.seek(member.header_offset + 26)
        after = sum(
            int.from_bytes(file.read(2), "little") for _ in range(2)
        )  # of its name, and of what else is told of it
    begins = member.header_offset + 30 + after + header
    return np.memmap(path, dtype, "r", begins, shape, "F" if fortran else "C")


def array(path: str | Path) -> np.ndarray:
    """The array of a .npy from anywhere; as :func:`arrays`."""
    with regular.check(path).open("rb") as file:
        claimed, start = _header(file)
        there = os.fstat(file.fileno()).st_size - start
        if claimed > there:
            raise ValueError(f"it claims {claimed} bytes of numbers and has {there}")
        memory.there(memory.size(claimed), str(path), "Take a part of it.")
        file.seek(0)
        return _truthful(np.lib.format.read_array(file, allow_pickle=False))


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    held = set(archive.namelist())
    return archive.getinfo(name if name in held and f"{name}.npy" not in held else f"{name}.npy")


def _claimed(archive: zipfile.ZipFile, name: str) -> int:
    """Bytes that a member's array takes."""
    member = _member(archive, name)
    with archive.open(member) as opened:
        if opened.read(len(_NPY)) != _NPY:
            raise ValueError(f"{name!r} is no array")
        opened.seek(0)
        claimed, start = _header(opened)
    if claimed > member.file_size - start or member.file_size > _PACKED * (member.compress_size + 1):
        raise ValueError(f"{name!r} claims {claimed} bytes, which are not there")
    return claimed


def _header(file: IO[bytes]) -> tuple[int, int]:
    """Of an opened .npy: the bytes of its array, one at least for each thing in it, and where they begin."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they are pickled")
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape of {shape}")
    return math.prod(shape) * max(1, dtype.itemsize), file.tell()


def _truthful(array: np.ndarray) -> np.ndarray:
    """Truth values are 0 or 1: numpy adds their bytes up to know how many are true."""
    return array.view(np.uint8) != 0 if array.dtype == np.bool_ and array.ndim else array


def _names(file: Any) -> list[str]:
    with np.load(file, allow_pickle=False) as archive:
        return list(archive.files)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing in it"
