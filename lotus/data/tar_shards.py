"""WebDataset's shards: tar files in which the members of a sample stand side by side, under one key.

Nothing is unpacked: an index of where each picture lies is made from the tar's headers, and a picture is read from there. A
member's name is a key and never a path.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lotus.data import pictures, written_labels
from lotus.data.folders import TRAIN, VAL
from lotus.data.pictures import Pixels
from lotus.data.source import Source, digest
from selection import regular
from selection.errors import Refused, reason

_PICKLES = frozenset({"pyd", "pkl", "pickle", "pth", "pt"})
_MOST = 1_000_000  # shards of one pattern
_LABEL = 1 << 20  # bytes of a member that holds a label


def files(path: str) -> list[str]:
    """The shards that ``path`` stands for: one ``.tar``, a pattern (``{000..009}``, ``*``), or those of a folder; none where it is
    none of these.

    Raises:
        Refused: a range that runs backwards, or without end.
    """
    span = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if span:
        low, high = int(span[1]), int(span[2])
        if not low <= high < low + _MOST:
            raise Refused(f"data.path: {path}: {span[0]} is no range of at most {_MOST:,} shards.")
        width = len(span[1]) if span[1].startswith("0") else 0
        each = (f"{path[: span.start()]}{n:0{width}d}{path[span.end() :]}" for n in range(low, high + 1))
        return [file for one in each for file in files(one)]
    if os.path.isdir(path):
        return sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(".tar"))
    if any(sign in path for sign in "*?["):
        return sorted(glob.glob(path)) or [path]
    return [path] if path.endswith(".tar") else []


def parts(found: list[str]) -> tuple[list[str], list[str]]:
    """Those that train, and those that validate by a word in their names (``imagenet-val-03.tar``); one of them may be empty."""

    def says(file: str, words: tuple[str, ...]) -> bool:
        return not set(words).isdisjoint(re.split("[^a-z]+", os.path.basename(file).lower()))

    val = [file for file in found if says(file, VAL) and not says(file, TRAIN)]
    return [file for file in found if file not in set(val)], val


@dataclass
class _Index:
    """Where the picture of each sample lies."""

    files: list[str]
    keys: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    shard: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))

    def name(self, i: int) -> str:
        return f"{self.files[self.shard[i]]}:{self.keys[i]}"

    def read(self, i: int) -> Pixels:
        return pictures.read(_bytes(self.files[self.shard[i]], self.offset[i], self.size[i]))


def source(found: list[str], image: str, label: str, classes: tuple[str, ...], *, partial: bool = False) -> Source:
    """The samples of ``found``.

    Args:
        image: extension of the pictures; empty: the only member of a sample that is a picture by its extension
        label: extension of the labels, ``json.FIELD`` for a field of a JSON
        classes: see :func:`lotus.data.written_labels.numbered`
        partial: these are not all shards of the data: they need not show every class

    Raises:
        Refused: a shard that is missing, torn or compressed; a sample without picture or label; a pickle.
    """
    index, where = _Index(found), found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    for number, file in enumerate(found):
        for key, members in _samples(file):
            at = members[_picture(file, key, members, image)]
            index.told.append(_label(file, key, members, label))
            index.keys.append(key)
            index.shard.append(number)
            index.offset.append(at.offset_data)
            index.size.append(at.size)
    if not index.keys:
        raise Refused(f"{where}: no samples in it.")
    labels, classes = written_labels.numbered(index.told, classes, index.name)
    index.told = []
    return Source(
        labels=labels,
        classes=classes,
        read=index.read,
        name=index.name,
        fingerprint=digest(index.keys, np.asarray(index.shard), np.asarray(index.size), labels, classes),
        where=where,
        partial=partial,
    )


def _samples(file: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and members, by extension, of each sample."""
    key, members = "", dict[str, tarfile.TarInfo]()
    for member in _members(file):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or base.startswith("._"):  # hidden, as macOS adds them
            continue
        extension, own = extension.lower(), f"{folder}/{stem}".removeprefix("./").lstrip("/")
        if extension.rpartition(".")[2] in _PICKLES:
            raise Refused(
                f"{file}: {member.name} is a pickle, which could run code. Write the shard without such members."
            )
        if members and own != key:
            yield key, members
            members = {}
        if extension in members:
            raise Refused(f"{file}: {member.name} is there twice. Give each sample a key of its own.")
        key, members[extension] = own, member
    if members:
        yield key, members


def _members(file: str) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, by their headers.

    Raises:
        Refused: it is no tar, is not whole, or holds links or paths that lead out.
    """
    try:
        with regular.check(file).open("rb") as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            whole = os.fstat(opened.fileno()).st_size
            while (member := tar.next()) is not None:
                vars(tar)["members"].clear()  # it keeps them all
                if ".." in member.name.split("/") or member.name.startswith("/"):
                    raise Refused(
                        f"{file}: {member.name!r} leads out of the shard. Name its members without '..' and '/'."
                    )
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise Refused(
                        f"{file}: {member.name!r} is a link or no plain file, which is not followed. Store the file itself."
                    )
                yield member
            _check_end(file, opened, tar.offset)
    except tarfile.TarError as error:
        raise Refused(
            f"{file}: no tar that is whole ({error}). Write or download it again; gzip -d unpacks a compressed one."
        ) from None
    except OSError as error:
        raise Refused(f"data.path: {file}: {error.strerror or error}. Shards are files of this machine.") from None


def _check_end(file: str, opened: BinaryIO, at: int) -> None:
    """tarfile takes a damaged header, and a file cut between two members, for the end."""
    opened.seek(at)
    rest = opened.read(_LABEL)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        what = "is cut off" if not rest else "has a damaged header, or another tar after its end,"
        raise Refused(f"{file}: {what} at byte {at}. Write or download it again.")


def _picture(file: str, key: str, members: dict[str, tarfile.TarInfo], image: str) -> str:
    images = [
        one for one in members if one == image or (not image and f".{one.rpartition('.')[2]}" in pictures.SUFFIXES)
    ]
    if len(images) != 1:
        many = "several pictures" if images else f"no .{image}" if image else "no picture"
        raise Refused(
            f"{file}: {key} has {many}, but {', '.join(sorted(members))}. data.options.image names the extension."
        )
    return images[0]


def _label(file: str, key: str, members: dict[str, tarfile.TarInfo], label: str) -> str:
    extension, _, name = label.partition(".") if label.startswith("json.") else (label, "", "")
    if extension not in members:
        raise Refused(
            f"{file}: {key} has no label .{extension}, but {', '.join(sorted(members))}. Members of a sample stand side by "
            "side; data.options.label names the extension, json.FIELD a field of a JSON."
        )
    member = members[extension]
    try:
        if member.size > _LABEL:
            raise ValueError(f"{member.size:,} bytes")
        text = _bytes(file, member.offset_data, member.size).decode("utf-8").strip()
        value = json.loads(text)[name] if name else text
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"{file}: {member.name} says no label ({reason(error, 80)}).") from None
    if type(value) not in (int, str):
        raise Refused(f"{file}: {member.name} says no label, but a {type(value).__name__}.")
    return str(value).strip()


def _bytes(file: str, offset: int, size: int) -> bytes:
    with Path(file).open("rb") as opened:
        opened.seek(offset)
        data = opened.read(size)
    if len(data) < size:
        raise OSError("the shard is cut off")
    return data
