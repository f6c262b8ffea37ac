"""A ticket as a folder of its images, by class."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lotus import files
from lotus.data.pictures import Pixels
from lotus.data.source import Source
from selection.errors import Refused
from selection.exchange import Images
from selection.subset import Subset


def write(
    subset: Subset,
    images: Images,
    out: Path,
    *,
    source: Source | None,
    read: Callable[[int], Pixels] | None,
    copy: bool,
    where: str = "the data",
) -> str:
    """Images by class: links to their files, hard links or copies where the file system has none; pictures of those that are no files.

    Args:
        subset: the rows that are written
        images: of the data: labels, classes and names of files
        out: the folder to make; one that is there must be empty
        source: the data set, where its images are files
        read: row -> pixels
        copy: copies in place of links
        where: what a refusal calls the data

    Returns:
        What was written.

    Raises:
        Refused: something is there already, or there are no images at hand.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out}: is there and not empty. Give another place, or delete it.")
    put = _putting(images, source, read, copy)
    if put is None:
        raise Refused(
            f"{out}: needs the images, and {where} holds none. Say where they are: a run, a config or a folder."
        )
    labels = images.labels[subset.rows]
    folders = _class_folders(images.classes, int(labels.max()) + 1)
    kinds: dict[str, int] = {}
    with files.refusing(out), files.folder_beside(out) as beside:
        for label in np.unique(labels).tolist():
            (beside / folders[label]).mkdir(parents=True)
        for row, label in zip(subset.rows.tolist(), labels.tolist(), strict=True):
            way = put(row, beside / folders[label])
            kinds[way] = kinds.get(way, 0) + 1
    return f"{len(subset)} images in {len(set(labels.tolist()))} folders: {', '.join(f'{n} {way}' for way, n in kinds.items())}"


def _class_folders(classes: Sequence[str], count: int) -> list[str]:
    """A folder's name for each of ``count`` labels; numbered where two classes would share one."""
    folders = [_plain(classes[label] if label < len(classes) else str(label)) for label in range(count)]
    if len(set(folders)) < len(folders):
        folders = [f"{number:04d}-{name}" for number, name in enumerate(folders)]
    return folders


def _putting(
    images: Images, source: Source | None, read: Callable[[int], Pixels] | None, copy: bool
) -> Callable[[int, Path], str] | None:
    """What puts the image of a row into a folder, and says as what; None where no images are at hand."""
    names = images.names
    if source is not None and names is not None:
        root = Path(source.root)

        def link(row: int, home: Path) -> str:
            inside = Path(names[row]).parts
            # class/picture.jpg, whatever lies between; two of one name in folders of a class stay apart by theirs.
            name = "-".join(inside[1:]) if len(inside) > 1 else inside[0]
            return _link(root / names[row], home / name, copy)

        return link
    if read is None:
        return None

    def save(row: int, home: Path) -> str:
        from PIL import Image

        Image.fromarray(read(row)).save(home / f"{row:07d}.png")
        return "pictures"

    return save


def _link(file: Path, place: Path, copy: bool) -> str:
    if not file.is_file():
        raise Refused(f"{file}: is gone. Put it back, or prepare the data again and draw a new ticket.")
    tries: list[tuple[str, Callable[[], Any]]] = [
        ("links", lambda: place.symlink_to(file.resolve())),
        ("hard links", lambda: os.link(file.resolve(), place)),
        ("copies", lambda: shutil.copyfile(file, place)),
    ]
    for way, make in tries[2:] if copy else tries[:2]:
        try:
            make()
            return way
        except OSError:
            if copy:
                raise
    shutil.copyfile(file, place)
    return "copies"


def _plain(name: str) -> str:
    """A class's name as a folder's: it cannot lead elsewhere."""
    return re.sub(r"[^\w .,+()-]", "_", name).strip(" .") or "_"
