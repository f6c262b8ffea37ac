"""The .beton format (FFCV's version 2), read and written with numpy alone.

A file is a header, a description of each field, a row of metadata an image, pages of pixel data, and a table that says
where in the pages each image lies. LOTUS keeps three fields: ``image``, ``label``, ``index``. Between pages and table it puts
what FFCV passes over: :data:`SUMS`, and the CRC-32 of each stored image, to which the image is held when it is first read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from lotus.data import pictures
from lotus.data.pictures import Pixels
from selection import regular
from selection.errors import Refused

VERSION = 2
JPEG, RAW = 0, 1
"""How an image's pixels are stored (its ``mode``)."""

FIELDS = ("image", "label", "index")
TYPES = (2, 1, 1)  # FFCV's numbers for an RGB image and an int64

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("images", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", (1024,))], align=True)
PICTURE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
META = np.dtype([("image", PICTURE), ("label", "<i8"), ("index", "<i8")], align=True)
PLACE = np.dtype([("row", "<u8"), ("pointer", "<u8"), ("size", "<u8")])

START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
"""Where the metadata begin."""

SUMS = b"LOTUSCRC"
"""Before the checksums, which are (N,) little-endian uint32."""

MOST_CLASSES = 1 << 31
_PIECE = 1 << 16  # rows of metadata that are read at a time

SMALLEST_PAGE = 1 << 21
USUAL_PAGE = 1 << 23
LARGEST_PAGE = 1 << 31


@dataclass(frozen=True)
class Stored:
    """An image as it goes into the file."""

    mode: int
    height: int
    width: int
    data: bytes | memoryview


class TooLarge(Exception):
    """An image needs a larger page: ``needed`` bytes."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"{needed} bytes do not fit a page")
        self.needed = needed


def page_for(needed: int) -> int:
    """The page size for images of up to ``needed`` bytes: a power of two, at least 8 MiB."""
    page = max(USUAL_PAGE, 1 << (needed - 1).bit_length())
    if page > LARGEST_PAGE:
        raise Refused(f"An image of {needed / 1e9:.1f} GB does not fit a .beton. Set data.max_side or data.write: jpg.")
    return page


class Writer(Protocol):
    """Writes one file, an image after another. Every method may raise OSError, e.g. when the disk is full."""

    def add(self, picture: Stored, label: int) -> None:
        """Append an image. Its row number is how many came before it. Raises TooLarge."""

    def finish(self) -> None:
        """Complete the file and close it."""

    def abandon(self) -> None:
        """Let go of everything; the file is rubbish. May be called after :meth:`finish`, and then does nothing."""


class PlainWriter:
    """The format written by numpy, where FFCV cannot be installed. FFCV reads it like its own.

    Args:
        capacity: at most so many images.
    """

    def __init__(self, file: Path, capacity: int, page: int = USUAL_PAGE) -> None:
        self._page, self._buffer, self._filled = page, bytearray(page), 0
        self._meta = np.zeros(capacity, META)
        self._places = np.zeros(capacity, PLACE)
        self._count = 0
        self._at = -(-(START + self._meta.nbytes) // page) * page  # of the page being filled
        self._file: BinaryIO | None = file.open("wb")
        self._file.truncate(self._at)
        self._file.seek(self._at)

    def add(self, picture: Stored, label: int) -> None:
        size = len(picture.data)
        if size > self._page:
            raise TooLarge(size)
        if self._filled + size > self._page:
            self._flush()
        pointer = self._at + self._filled
        self._buffer[self._filled : self._filled + size] = picture.data
        self._filled += size
        row = self._count
        self._meta[row] = ((picture.mode, picture.width, picture.height, pointer), label, row)
        self._places[row] = (row, pointer, size)
        self._count += 1

    def finish(self) -> None:
        assert self._file is not None
        self._flush()
        header, fields = head(self._page, self._count, self._at)
        self._file.write(self._places[: self._count].tobytes())
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._meta[: self._count].tobytes())
        self.abandon()

    def abandon(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _flush(self) -> None:
        if self._filled:
            assert self._file is not None
            self._buffer[self._filled :] = bytes(self._page - self._filled)
            self._file.write(self._buffer)
            self._at += self._page
            self._filled = 0


def head(page: int, images: int, table: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    """The header and the field descriptions."""
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, len(FIELDS), page, images, table)
    fields = np.zeros(len(FIELDS), FIELD)
    for field, name, kind in zip(fields, FIELDS, TYPES, strict=True):
        field["type"] = kind
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), "<u1")
    return header, fields


def seal(file: Path, sums: Sequence[int]) -> None:
    """Put the checksums of the images into a finished file, before its table.

    Args:
        file: a finished .beton
        sums: (N,) the CRC-32 of what is stored of each

    Raises:
        OSError: it cannot be written.
    """
    block = SUMS + np.asarray(sums, "<u4").tobytes()
    with file.open("r+b") as opened:
        header = np.fromfile(opened, HEADER, count=1)
        at = int(header["table"][0])
        opened.seek(at)
        places = opened.read()
        header["table"] = at + len(block)
        opened.seek(at)
        opened.write(block + places)
        opened.seek(0)
        opened.write(header.tobytes())


class Beton:
    """An open .beton: columns in memory, pixels mapped from the file. Everything in it has been checked to lie inside.

    Attributes:
        modes, heights, widths, pointers, sizes: (N,) of each stored image; ``sizes`` in bytes.
        labels, index: (N,) int64.
        data: (bytes,) uint8, the whole file, mapped (copy on write; nothing writes).
        sums: (N,) uint32, the CRC-32 of each stored image; None in a file of an older LOTUS.
        pixels: where the pages begin and end, in bytes; all else of the file has been read.

    Raises:
        Refused: it is no .beton of ours, or parts of it are missing or make no sense.
    """

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        try:
            total = os.path.getsize(regular.check(self.file))
            header = np.fromfile(self.file, HEADER, count=1)
        except OSError as error:
            raise Refused(f"{file}: cannot be read ({error.strerror}). Run prepare.") from None
        if len(header) != 1 or header["version"][0] != VERSION or header["fields"][0] != len(FIELDS):
            raise self._broken("it is no .beton of LOTUS")
        described = np.fromfile(self.file, FIELD, count=len(FIELDS), offset=HEADER.itemsize)
        if not np.array_equal(described["name"], head(0, 0, 0)[1]["name"]) or list(described["type"]) != list(TYPES):
            raise self._broken("it has other fields than image, label, index")
        images, table = int(header["images"][0]), int(header["table"][0])  # Python's own: they do not overflow
        pages = START + images * META.itemsize
        if images == 0 or table < pages or table + images * PLACE.itemsize != total:
            raise self._broken(f"it is cut off or half-written ({total} bytes for {images} images)")
        self._counted(images)
        meta = np.fromfile(self.file, META, count=images, offset=START)
        places = np.fromfile(self.file, PLACE, count=images, offset=table)
        picture = meta["image"]
        self.modes = np.ascontiguousarray(picture["mode"])
        self.heights = picture["height"].astype(np.int64)
        self.widths = picture["width"].astype(np.int64)
        self.labels = np.ascontiguousarray(meta["label"])
        self.index = np.ascontiguousarray(meta["index"])
        if not np.array_equal(np.sort(places["row"]), np.arange(images, dtype=np.uint64)):
            raise self._broken("its table does not name each image once")
        pointers, sizes = picture["pointer"].astype(np.uint64), np.zeros(images, np.uint64)
        sizes[places["row"].astype(np.int64)] = places["size"]
        # Nothing is added to what the file says, since 64 bits may not hold the sum: table - pointer is at least 0 where
        # the pointer is before the table, and elsewhere it does not count.
        inside = (pointers >= pages) & (pointers <= table) & (sizes > 0) & (sizes <= table - pointers)
        self.pointers, self.sizes = pointers.astype(np.int64), sizes.astype(np.int64)
        raw = self.modes == RAW
        area = self.heights * self.widths  # of 16 bits each
        whole = ~raw | (self.sizes == 3 * area)
        sane = (raw | (self.modes == JPEG)) & (area > 0) & (area <= pictures.MAX_PIXELS)
        if not (inside & whole & sane).all():
            raise self._broken("its metadata point to the wrong places")
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= MOST_CLASSES:
            raise self._broken(f"its labels go from {self.labels.min()} to {self.labels.max()}")
        self.data: npt.NDArray[np.uint8] = np.asarray(np.memmap(self.file, np.uint8, mode="c"))
        begin = table - len(SUMS) - 4 * images
        sealed = begin >= pages and self.data[begin : begin + len(SUMS)].tobytes() == SUMS
        self.sums = self.data[begin + len(SUMS) : table].view("<u4").copy() if sealed else None
        self.pixels = pages, begin if sealed else table
        self._held = np.zeros(images, np.bool_)  # those that are what was written

    def __len__(self) -> int:
        return len(self.labels)

    def payload(self, row: int) -> npt.NDArray[np.uint8]:
        """What is stored of image ``row``: raw pixels or a JPEG.

        Raises:
            Refused: it is not what was written.
        """
        start = self.pointers[row]
        stored = self.data[start : start + self.sizes[row]]
        if self.sums is not None and not self._held[row]:
            if zlib.crc32(stored.data) != self.sums[row]:
                raise damaged(self.file, row, "its bytes have changed since it was written")
            self._held[row] = True
        return stored

    def hold(self, rows: npt.ArrayLike) -> None:
        """Hold what is stored of ``rows`` to its checksums, for whoever reads the file by itself; see :meth:`payload`."""
        rows = np.asarray(rows)
        for row in rows[~self._held[rows]].tolist():
            self.payload(row)

    def image(self, row: int) -> Pixels:
        """Image ``row`` (H, W, 3), decoded; not a view.

        Raises:
            Refused: its JPEG is damaged.
        """
        if not 0 <= row < len(self):
            raise Refused(f"{self.file}: there is no image {row}; it holds {len(self)}, counted from 0.")
        stored = self.payload(row)
        shape = self.heights[row], self.widths[row], 3
        if self.modes[row] == RAW:
            return stored.reshape(shape).copy()
        try:
            pixels = pictures.unjpeg(stored.data)
        except Exception as error:
            raise damaged(self.file, row, str(error)) from None
        if pixels.shape != shape:
            raise damaged(self.file, row, f"it is {pixels.shape[1]} x {pixels.shape[0]}, not {shape[1]} x {shape[0]}")
        return pixels

    def _counted(self, images: int) -> None:
        """Go through the metadata in small pieces before any memory is taken for them: each row has its own number, and
        a file of holes, which may claim any number of images and take no room, has not.
        """
        for start in range(0, images, _PIECE):
            count = min(_PIECE, images - start)
            rows = np.fromfile(self.file, META, count=count, offset=START + start * META.itemsize)["index"]
            if not np.array_equal(rows, np.arange(start, start + count)):
                raise self._broken("its metadata point to the wrong places")

    def _broken(self, why: str) -> Refused:
        return Refused(f"{self.file}: {why}. Delete it and run prepare.")


def damaged(file: Path, row: int, why: str) -> Refused:
    """The refusal for an image that does not decode although the file passed its checks."""
    return Refused(f"{file}: image {row} is damaged ({why}). Delete the file and run prepare.")
