"""Any picture file as RGB: the one place where pixels of foreign origin are understood."""

from __future__ import annotations

import io
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from selection import regular

Pixels = npt.NDArray[np.uint8]

# In blocks so large that glibc gives them back when freed. Of Pillow's own, of 16 MB, each thread keeps those of its largest picture.
if "PILLOW_BLOCK_SIZE" not in os.environ:
    Image.core.set_block_size(512 << 20)

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
     ".tga", ".jp2", ".avif"}
)  # fmt: skip
"""Files that count as pictures in a folder, by the end of their name in lower case."""

UNREAD = frozenset(
    {".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".psd", ".svg"}
)
"""Files that are pictures to their owner, by their ending, and that nothing here reads."""

MAX_SIDE = 65535
"""A .beton keeps a side in 16 bits."""

MAX_PIXELS = 178_956_970
"""Of one picture: what Pillow opens at most, before it takes a file for a bomb."""

AT_ONCE = 128_000_000
"""Pixels that are decoded at a time, by all threads together, beside a picture that alone has more: about a gigabyte."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What makes a picture upright, by its EXIF orientation."""


class Room:
    """Pixels that may be held at once. Who comes first is served first, and one that asks for more than there is, alone."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + pixels <= self._most)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


_SMALL = 1 << 26  # bytes of a file that is read in one go
_room = Room(AT_ONCE)
_thread = threading.local()
_quiet = threading.Lock()


@contextmanager
def watched(room: Callable[[int], object], notes: list[str]) -> Iterator[None]:
    """What this thread reads inside asks ``room`` for its pixels before it decodes them, and notes what it finds odd."""
    _thread.watch = room, notes
    try:
        yield
    finally:
        del _thread.watch


def read(file: str | os.PathLike[str] | bytes) -> Pixels:
    """The picture as (H, W, 3) uint8 RGB, upright, as a person would see it.

    * EXIF orientation is carried out; damaged EXIF is passed over, and noted where somebody is :func:`watched`.
    * Transparency is laid over white: what has transparency (logos, cut-outs, web graphics) was drawn for a white page,
      and the color stored under transparent pixels is arbitrary.
    * 16 bits a channel are scaled to 8 (65535 is white), not cut off.
    * Grayscale, palette, CMYK and YCbCr become RGB. Of an animation the first frame is taken.

    Raises:
        Exception: whatever Pillow raises for a damaged file (OSError, SyntaxError, ValueError, ...); OSError for a pipe or a
            device, on which it would wait.
    """
    ask, notes = getattr(_thread, "watch", (None, []))
    if not isinstance(file, bytes) and os.path.islink(file) and not os.path.exists(file):
        raise OSError("a link to nowhere; mend it, or take it away")
    if not isinstance(file, bytes) and regular.check(file).stat().st_size <= _SMALL:
        file = Path(file).read_bytes()  # nobody else waits for this disk below
    with _silenced(notes):
        opened = _opened(file)
    with opened as picture:
        pixels = picture.width * picture.height
        if ask is None:
            with _room.of(pixels):
                return _decoded(picture, notes)
        ask(pixels)
        return _decoded(picture, notes)


_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyphei", "HEIC, which nothing here reads; save it as JPEG or PNG"),
    (4, b"ftypmif1", "HEIC, which nothing here reads; save it as JPEG or PNG"),
    (4, b"ftyp", "a film or another picture of phones, which nothing here reads"),
    (0, b"%PDF", "a PDF"), (0, b"PK\3\4", "an archive (zip)"), (0, b"8BPS", "a Photoshop file; save it as JPEG or PNG"),
    (0, b"\xff\x0a", "JPEG XL, which nothing here reads; save it as JPEG or PNG"),
)  # fmt: skip
"""What may lie under a picture's ending: where its bytes stand, the bytes, what it is."""


def _opened(file: str | os.PathLike[str] | bytes) -> Image.Image:
    """
    Raises:
        OSError: it is no picture, or one that is too large; says what it is.
    """
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except Image.DecompressionBombError as error:
        count = next((int(word) for word in re.findall(r"\d+", str(error))), 0)
        raise OSError(
            f"{count:,} pixels, more than the {MAX_PIXELS:,} that are opened at most; make it smaller"
        ) from None
    except UnidentifiedImageError:
        head = _head(file)
        text = head.lstrip().lower()
        if not head:
            raise OSError("an empty file, of 0 bytes") from None
        if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"{")):
            raise OSError("a text (a web page?), no picture; download it again") from None
        known = next((what for at, mark, what in _OTHERS if head[at:].startswith(mark)), "")
        raise OSError(known or "no picture of a kind that is read here, or a damaged one") from None


def _head(file: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(file, bytes):
        return file[:512]
    with open(file, "rb") as opened:
        return opened.read(512)


def _decoded(picture: Image.Image, notes: list[str]) -> Pixels:
    _scale_key(picture)
    picture.load()
    with _silenced(notes):
        turn = _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return rgb(picture if turn is None else picture.transpose(turn))


_KEYS: dict[str, Callable[[int], int]] = {
    "L;2": lambda key: 85 * key,
    "L;4": lambda key: 17 * key,
    "RGB;16B": lambda key: key >> 8,
}
"""What Pillow does to the numbers of a PNG, by how they are stored, and not to the one that stands for transparency. (Of 16 bits a
channel it drops the lower 8, so that the nearest neighbors of that color become transparent with it.)"""


def _scale_key(picture: Image.Image) -> None:
    """Before it is decoded: let the color that is transparent be one that its pixels can have."""
    key, tiles = picture.info.get("transparency"), getattr(picture, "tile", None)
    scale = _KEYS.get(str(tiles[0][3])) if picture.format == "PNG" and tiles else None
    if scale is not None and key is not None:
        picture.info["transparency"] = scale(key) if isinstance(key, int) else tuple(map(scale, key))


@contextmanager
def _silenced(notes: list[str]) -> Iterator[None]:
    """Pillow warns of no file by name, and of each several times: that is noted once, and not said. Python's warnings are of
    the whole process; so this is short, one thread after another, and what others say meanwhile is said afterwards.
    """
    with _quiet, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    for warning in heard:
        if f"{os.sep}PIL{os.sep}" not in warning.filename:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif not notes and not issubclass(warning.category, Image.DecompressionBombWarning):  # large is no fault
            notes.append("their metadata (EXIF) are damaged")


def rgb(picture: Image.Image) -> Pixels:
    """A Pillow image of any mode as (H, W, 3) uint8 RGB; see :func:`read`."""
    if picture.mode.startswith(("I", "F")):
        deep = np.asarray(picture)
        pixels = _deep(deep)
        if (key := picture.info.get("transparency")) is not None:
            pixels[deep == key] = 255
        return pixels
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def from_array(array: npt.NDArray[np.generic]) -> Pixels:
    """Pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), of 8 or 16 bits, as (H, W, 3) uint8 RGB.

    Raises:
        ValueError: another shape or another kind of number.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"pixels of shape {array.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint16:
        array = _scaled(array)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels of type {array.dtype}, expected uint8 or uint16")
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array, dtype=np.uint8)
    return rgb(Image.fromarray(np.ascontiguousarray(array)))


def fit(pixels: Pixels, max_side: int) -> Pixels:
    """``pixels`` with no side longer than ``max_side`` (0: as they are); Lanczos, which is antialiased."""
    height, width = pixels.shape[:2]
    if max_side == 0 or max(height, width) <= max_side:
        return pixels
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def middle(pixels: Pixels, side: int, crop: float, how: str, mode: str = "center") -> Pixels:
    """(S, S, 3) as timm's transform of evaluation sees a picture, to the last bit: its shorter side resized to S / ``crop``, of that
    the middle.

    Args:
        pixels: (H, W, 3) uint8
        side: S
        crop: in (0, 1]
        how: timm's word for the filter, bicubic where it is none of Pillow's
        mode: timm's word, ``squash`` where both sides become S / ``crop``
    """
    height, width = pixels.shape[:2]
    short, shorter = math.floor(side / crop), min(height, width)
    alike = mode == "squash"
    tall, wide = (short if alike or length == shorter else int(short * length / shorter) for length in (height, width))
    known = Image.Resampling.__members__
    seen = Image.fromarray(pixels)
    if (height, width) != (tall, wide):
        seen = seen.resize((wide, tall), known.get(how.upper(), Image.Resampling.BICUBIC))
    top, left = (round((length - side) / 2) for length in (tall, wide))
    return np.asarray(seen.crop((left, top, left + side, top + side)))


def jpeg(pixels: Pixels, quality: int) -> bytes:
    """``pixels`` as a JPEG."""
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=quality)
    return packed.getvalue()


def unjpeg(packed: bytes | memoryview) -> Pixels:
    """The pixels (H, W, 3) of a JPEG that :func:`jpeg` made.

    Raises:
        OSError: it is damaged.
    """
    with Image.open(io.BytesIO(packed), formats=("JPEG",)) as picture:
        return np.array(picture.convert("RGB"))


def _deep(array: npt.NDArray[np.generic]) -> Pixels:
    """Grayscale of 16 bits, or of 32 that hold 8 or 16, or floats from 0 to 1."""
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError("floating-point pixels that are not all from 0 to 1; nobody can tell what white is")
        gray = np.rint(array * 255).astype(np.uint8)
    else:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise ValueError(f"grayscale from {low} to {high}, expected 16 bits: 0 to 65535")
        # Pillow opens some 16-bit files as 32-bit whole numbers; 8-bit files it never does.
        gray = _scaled(array.astype(np.uint16))
    return np.repeat(gray[:, :, None], 3, axis=2)


def _scaled(array: npt.NDArray[np.generic]) -> Pixels:
    """16 bits to 8: round(255 v / 65535)."""
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
