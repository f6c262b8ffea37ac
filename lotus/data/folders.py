"""Folders of pictures: ``CLASS/**/picture``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lotus.data import pictures
from lotus.data.source import Source, digest
from selection.errors import Refused
from selection.methods import nearest

TRAIN = ("train", "training")

VAL = ("val", "validation", "valid", "test")


def part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder in ``root`` that has one of ``names``, in small letters or capitals."""
    try:
        found = sorted(entry.name for entry in os.scandir(root) if entry.name.lower() in names and entry.is_dir())
    except OSError as error:
        raise Refused(f"{root}: cannot be listed ({error.strerror}).") from None
    if len(found) > 1:
        raise Refused(f"data.path: {root} has {' and '.join(found)}, which mean the same part. Keep one of them.")
    return root / found[0] if found else None


def folder(root: Path, classes: tuple[str, ...] | None = None) -> Source:
    """``root/CLASS/**/picture``; with ``classes`` given, no others are allowed, and some may be missing."""
    names = _classes(root, classes)
    known = classes or tuple(names)
    files: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    homes = {name: os.path.realpath(root / name) for name in names}
    for name in names:
        before = len(files)
        for file, size in _pictures(root / name, [home for other, home in homes.items() if other != name]):
            files.append(file)
            sizes.append(size)
        if len(files) == before and any(len(os.listdir(root / other)) for other in names):
            why = unread(root / name)
            raise Refused(
                f"{root / name}: class {name!r} is empty, no pictures in it. "
                + (f"{why}." if why else "Add some, or delete the folder.")
            )
        labels += [known.index(name)] * (len(files) - before)
    if not files:
        why = unread(root)
        raise Refused(f"{root}: no images in its {len(names)} class folders." + (f" {why}." if why else ""))
    relative = [os.path.relpath(file, root) for file in files]
    return Source(
        labels=np.array(labels, dtype=np.int64),
        classes=known,
        read=lambda i: pictures.read(files[i]),
        name=lambda i: files[i],
        fingerprint=digest(relative, np.array(sizes, dtype=np.int64), np.array(labels, dtype=np.int64), known),
        where=str(root),
        partial=classes is not None,
        root=str(root),
        note="" if classes is None else _validates(root, names, classes),
    )


def _validates(root: Path, names: list[str], classes: tuple[str, ...]) -> str:
    """What should be known of a folder that validates; empty where nothing should."""
    told = []
    if root.name.lower() == "test":
        told.append(f"{root} validates: what is chosen by it, or stopped by it, makes it no test any more")
    if missing := [name for name in classes if name not in names]:
        told.append(
            f"{root} has no pictures of {len(missing)} of train's classes, which are not measured: {_listed(missing)}"
        )
    return ". ".join(told)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def passed_over(root: str | Path) -> list[str]:
    """Files below ``root`` that are no pictures by their ending, sorted: they are in no class and in no part."""
    files = []
    for here, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() not in pictures.SUFFIXES:
                files.append(os.path.join(here, name))
    return files


def endings(files: Iterable[str]) -> dict[str, int]:
    """How many files have each ending, the commonest first."""
    return dict(Counter(os.path.splitext(file)[1].lower() or "no ending" for file in files).most_common())


def unread(root: str | Path) -> str:
    """A sentence on the pictures below ``root`` that nothing here reads, with the cure; empty where there is none."""
    files = [file for file in passed_over(root) if os.path.splitext(file)[1].lower() in pictures.UNREAD]
    if not files:
        return ""
    counts = ", ".join(f"{count:,} {ending}" for ending, count in endings(files).items())
    return f"{counts} passed over, e.g. {files[0]}: nothing here reads them. Save them as JPEG or PNG"


def _classes(root: Path, allowed: tuple[str, ...] | None) -> list[str]:
    """The folders of classes in ``root``, sorted.

    Raises:
        Refused: there is none, or one that is not allowed.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise Refused(f"{root}: cannot be listed ({error.strerror}).") from None
    if not names:
        raise Refused(f"{root}: no class folders. Pictures lie in one folder a class: {root.name}/CLASS/picture.jpg.")
    if allowed is not None:
        _check_names(root, names, allowed)
    return names


def _check_names(root: Path, names: list[str], allowed: tuple[str, ...]) -> None:
    """Hold the classes of a folder that validates to those of the one that trains: by their names.

    Raises:
        Refused: it has others.
    """
    strange = [name for name in names if name not in allowed]
    if not strange:
        return
    raise Refused(
        f"{root}: {len(strange)} of its {len(names)} classes are none of train's: {_listed(strange)}.{nearest(strange[0], allowed)} "
        f"Classes go by the names of their folders: name them as in train, or take them away. Train has: {_few(allowed)}."
    )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")


def _pictures(folder: Path, others: list[str]) -> Iterator[tuple[str, int]]:
    """Pictures below ``folder`` by name and their sizes in bytes, sorted; hidden folders (.ipynb_checkpoints) are passed by. Links
    to folders are followed once, and not at all to a folder that holds a class or lies in another: one of ``others``."""

    def foreign(below: str) -> bool:
        real = os.path.realpath(below)
        above = [os.path.realpath(folder), *others]
        return any(_inside(home, real) for home in above) or any(_inside(real, home) for home in others)

    seen: set[str] = set()
    for here, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link in a circle
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not (name.startswith(".") or foreign(os.path.join(here, name))))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in pictures.SUFFIXES and not name.startswith("."):
                file = os.path.join(here, name)
                try:
                    yield file, os.stat(file).st_size
                except OSError:
                    yield file, 0  # a link to nowhere: named as damaged when it is read


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
