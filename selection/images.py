"""The images that a file of others is held to, and their rows by the numbers and paths of others. Nothing here opens images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from selection.errors import Refused

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Words:
    """What refusals call what a caller can say: arguments, unless the caller's users say them in another way."""

    arguments: Mapping[str, str] = field(default_factory=dict)
    """How each is called; those that are left out by their own names."""
    between: str = "="
    """What stands between an argument and its value."""
    names: str = "Say how they are called."
    """How the names of images come to be known, in a sentence."""

    def __call__(self, argument: str, value: object = "") -> str:
        called = self.arguments.get(argument, argument)
        return f"{called}{self.between}{value}" if value != "" else called


@dataclass(frozen=True, eq=False)
class Images:
    """What a file of others is held to."""

    total: int
    """Images that LOTUS counts: N."""
    fingerprint: str
    labels: Rows
    """(N,)"""
    classes: tuple[str, ...] = ()
    names: Sequence[str] | None = None
    """N paths, relative to the folder of all where there is one; None where images have none."""
    index: Rows | None = None
    """(N,) the number of each image as others count it: with those that LOTUS held out for validation or found damaged. None: ours."""
    counted: int = 0
    """How many others count; 0: N."""
    said: bool = False
    """Whether it was said that the file counts as ``index`` does, so that nothing in it speaks against it."""
    say: Words = Words()
    """What refusals call what can be said of a file that is held to these images."""
    root: str = ""
    """The folder that ``names`` are relative to, where it is at hand."""

    @property
    def numbers(self) -> Rows:
        return np.arange(self.total) if self.index is None else self.index

    @property
    def of(self) -> int:
        return self.counted or self.total


def by_number(path: Path, numbers: np.ndarray, images: Images, warnings: list[str]) -> Rows:
    """LOTUS' row of each number of others; -1 for those that it held out or found damaged.

    Args:
        path: what a refusal names
        numbers: (m,)
        images: of the data
        warnings: takes up a sentence about these

    Raises:
        Refused: a number that no image has, or numbers that may as well be rows.
    """
    outside = numbers[(numbers < 0) | (numbers >= images.of)]
    if len(outside):
        raise Refused(
            f"{path}: there is no image {outside[0]}; the {images.of} of this data are 0 to {images.of - 1}. It is of other data."
        )
    row = np.full(images.of, -1, np.int64)
    row[images.numbers] = np.arange(images.total)
    rows = row[numbers.astype(np.int64)]
    gone = int((rows < 0).sum())
    if gone and not images.said and numbers.max() < images.total:
        raise Refused(
            f"{path}: {gone} of its numbers are of images that are held out for validation, or damaged, and none is above "
            f"{images.total - 1}, the last row of those that train. So it may count these alone, as a ticket does that was exported with "
            f"{images.say('index', 'row')}. Say {images.say('index', 'row')} if it does, {images.say('index', 'source')} if it counts "
            "the data set as it comes."
        )
    if gone:
        warnings.append(f"{gone} of them are held out for validation, or damaged, and are left out")
    return rows


def by_path(path: Path, wanted: Sequence[str], images: Images, warnings: list[str]) -> Rows:
    """The row of each path; -1 for those that are no training images.

    Args:
        path: what a refusal names
        wanted: m paths
        images: of the data
        warnings: takes up a sentence about these

    Raises:
        Refused: names of images are not known, a name that several have, or paths of other data.
    """
    if images.names is None:
        raise Refused(f"{path}: names its images by path, and those of this data are not known. {images.say.names}")
    rows = rows_of(path, wanted, images.names).tolist()
    strange = [given for given, row in zip(wanted, rows, strict=True) if row < 0]
    if strange and images.of == images.total:
        raise Refused(f"{path}: {strange[0]}: no image of this data, and {len(strange) - 1} more. It is of other data.")
    if len(strange) == len(rows):
        raise Refused(f"{path}: none of its {len(rows)} paths is an image of this data, e.g. {strange[0]}.")
    if strange:
        warnings.append(f"{len(strange)} of them are no training images here (e.g. {strange[0]}) and are left out")
    return np.array(rows, np.int64)


def rows_of(path: Path, wanted: Iterable[str], names: Iterable[str]) -> Rows:
    """The row of each path: as it is, without the folders before, or by its last name where no two share one; else -1.

    Raises:
        Refused: a last name that several share.
    """
    whole = {posix(name): row for row, name in enumerate(names)}
    last: dict[str, int] = {}
    for name, row in whole.items():
        last[PurePosixPath(name).name] = -2 if PurePosixPath(name).name in last else row
    rows = []
    for given in wanted:
        parts = PurePosixPath(posix(given)).parts
        tails = ("/".join(parts[first:]) for first in range(len(parts)))
        row = next((whole[tail] for tail in tails if tail in whole), -1)
        if row < 0:
            row = last.get(parts[-1] if parts else "", -1)
        if row == -2:
            raise Refused(f"{path}: {given}: several images have this name. Write the class's folder before it.")
        rows.append(row)
    return np.array(rows, np.int64)


def posix(name: str) -> str:
    """A path as others may write it, with slashes and without ``./``."""
    name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


def check_once(path: Path, rows: Rows) -> None:
    """Hold rows to be distinct.

    Raises:
        Refused: they are not.
    """
    values, counts = np.unique(rows, return_counts=True)
    if len(values) < len(rows):
        raise Refused(f"{path}: row {values[counts > 1][0]} stands there {counts.max()} times. An image is kept once.")


def check_labels(path: Path, labels: np.ndarray, images: Images, rows: Rows, force: bool) -> list[str]:
    """Hold labels in a file, or names of classes, to those of the images.

    Returns:
        A sentence where ``force`` let pass what differs.

    Raises:
        Refused: they differ.
    """
    own = images.labels[rows]
    if labels.dtype.kind == "U":
        number = {name: str(label) for label, name in enumerate(images.classes)}
        labels, own = np.array([number.get(str(name), str(name)) for name in labels]), own.astype(str)
    wrong = int((labels != own).sum())
    if not wrong:
        return []
    told = f"{wrong} of {len(rows)} labels are not those of the images"
    if not force:
        raise Refused(
            f"{path}: {told}: another order or other data. Give the data that it is of; or {images.say('force')}, if only the "
            "classes are numbered otherwise, at the risk of a ticket of random images."
        )
    return [told]
