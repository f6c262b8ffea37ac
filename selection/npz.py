"""Files of arrays that a kill cannot halve and that cannot run code: written beside and renamed, read without pickle."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selection import files
from selection.errors import Refused

ABOUT = "about"
_ZIP = b"PK\x03\x04"


def write(
    path: str | Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], *, kind: str, version: int
) -> None:
    """Write ``arrays`` and the JSON-ready ``about`` to ``path``; its folder is made where it is missing.

    Raises:
        Refused: it cannot be written there (no space, no permission); what stood there before still stands.
    """
    members: dict[str, Any] = dict(arrays)
    members[ABOUT] = np.array(json.dumps({"kind": kind, "format": version, **about}, sort_keys=True))
    with files.opened(path) as file:
        np.savez(file, **members)


def read(
    path: str | Path, *, kind: str, version: int, cure: str, made: str = "", only: Collection[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, read-only, and the ``about`` of a file that :func:`write` wrote.

    Args:
        cure: what to do about a file of this kind that is damaged or of a later format.
        made: where files of this kind come from. Said of one that is missing or of another kind, which may well be precious.
        only: the arrays to read, as far as they are there; None: all.

    Raises:
        Refused: not there, truncated, damaged, of another kind or a later format.
    """
    made = made or cure
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}). {made}") from error
    with file:
        if not _ZIP.startswith(file.read(len(_ZIP))):
            raise Refused(f"{path}: not {kind}, and no .npz at all, whatever its name. {made}")
        try:
            arrays, names = _members(file, only)
            about = json.loads(str(arrays.pop(ABOUT)[()])) if ABOUT in arrays else None
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
    with np.load(path, allow_pickle=False) as archive:
        return tuple(name for name in archive.files if name != ABOUT)


def _members(file: Any, only: Collection[str] | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays asked for, and the names of all that is inside. What has no ``about`` is foreign, maybe large, and not read."""
    file.seek(0)
    if file.read(len(_ZIP)) != _ZIP:
        raise ValueError("not an .npz file")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        names = list(archive.files)
        wanted = [name for name in names if only is None or name in only or name == ABOUT]
        arrays = {name: archive[name] for name in wanted} if ABOUT in names else {}
    foreign = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
    if foreign:
        raise ValueError(f"{foreign[0]!r} is no array")
    return arrays, names


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing in it"
