"""Pictures of every kind come out as a person would see them."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from lotus.data import pictures

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    packed = io.BytesIO()
    picture.save(packed, kind, **options)  # type: ignore[arg-type]
    return packed.getvalue()


def test_grayscale_and_bilevel() -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(pictures.read(saved(Image.fromarray(gray))), np.repeat(gray[:, :, None], 3, 2))
    black = pictures.read(saved(Image.new("1", (4, 3), 1)))
    assert black.shape == (3, 4, 3)
    assert (black == 255).all()


def test_transparency_lies_over_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (*RED, 255)
    rgba[0, 1] = (*RED, 0)  # the hidden red must not show
    rgba[1, 0] = (0, 0, 0, 128)
    seen = pictures.read(saved(Image.fromarray(rgba)))
    assert seen[0, 0].tolist() == list(RED)
    assert seen[0, 1].tolist() == list(WHITE)
    assert seen[1, 0].tolist() == pytest.approx([127] * 3, abs=1)
    assert seen[1, 1].tolist() == list(WHITE)
    with_gray = pictures.read(saved(Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA")))
    assert with_gray[0].tolist() == [list(WHITE), [0, 0, 0]]


def png(row: bytes, depth: int, color: int, key: bytes) -> bytes:
    """A PNG of one row, of which the color ``key`` is transparent, written by the book (ISO 15948, 5 and 11)."""
    width = 8 * len(row) // (depth * {0: 1, 2: 3}[color])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    parts = (b"IHDR", head), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_gray_that_stands_for_nothing_is_white_at_every_depth(depth: int) -> None:
    most = 2**depth - 1
    values = [0, 1, most, 0] if depth == 1 else [0, most // 3, 2 * (most // 3), most]
    packed = sum(value << depth * (3 - i) for i, value in enumerate(values)) << (-4 * depth % 8)
    row = packed.to_bytes((4 * depth + 7) // 8, "big")
    for key in set(values):
        seen = pictures.read(png(row, depth, 0, struct.pack(">H", key)))[0, :4, 0]
        assert seen.tolist() == [255 if value == key else round(255 * value / most) for value in values]


@pytest.mark.parametrize(("depth", "form"), [(8, ">6B"), (16, ">6H")])
def test_a_color_that_stands_for_nothing_is_white_at_every_depth(depth: int, form: str) -> None:
    colors = (10, 20, 30, 40, 50, 60) if depth == 8 else (10007, 2000, 30000, 40000, 5000, 60000)
    key = struct.pack(">3H", *colors[:3])
    seen = pictures.read(png(struct.pack(form, *colors), depth, 2, key))[0]
    assert seen[0].tolist() == list(WHITE)
    assert seen[1].tolist() == [color >> (depth - 8) for color in colors[3:]]


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert pictures.read(saved(palette)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert pictures.read(saved(palette, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert pictures.read(saved(palette, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_a_transparent_color_of_rgb() -> None:
    assert pictures.read(saved(Image.new("RGB", (1, 1), RED), transparency=RED)).tolist() == [[[255, 255, 255]]]


def test_cmyk() -> None:
    ink = Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    for kind, tolerance in (("TIFF", 1), ("JPEG", 6)):
        seen = pictures.read(saved(ink, kind))
        assert np.abs(seen.reshape(-1, 3).astype(int) - (200, 30, 60)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    seen = pictures.read(saved(Image.fromarray(deep), kind))
    assert seen[0, :, 0].tolist() == [0, 1, 128, 255]
    assert seen.shape == (1, 4, 3)


def test_floats_between_zero_and_one_or_refused() -> None:
    assert pictures.read(saved(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF"))[0, :, 1].tolist() == [
        0,
        128,
        255,
    ]
    with pytest.raises(ValueError, match="what white is"):
        pictures.read(saved(Image.fromarray(np.array([[0, 700]], np.float32)), "TIFF"))


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (8, (1, 0))],
)
def test_exif_orientation(orientation: int, corner: tuple[int, int]) -> None:
    picture = Image.new("RGB", (40, 20), (0, 0, 0))
    picture.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = pictures.read(saved(picture, "JPEG", exif=exif, quality=95))
    assert seen.shape == ((20, 40, 3) if orientation < 5 else (40, 20, 3))
    rows, columns = (slice(3, 7) if at == 0 else slice(-7, -3) for at in corner)
    assert seen[rows, columns, 0].min() > 200


def test_damage_raises(tmp_path: Path) -> None:
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"no picture at all")):
        file = tmp_path / f"{name}.jpg"
        file.write_bytes(content)
        with pytest.raises((OSError, SyntaxError)):
            pictures.read(file)


def test_arrays() -> None:
    assert pictures.from_array(np.full((3, 4), 7, np.uint8)).tolist() == np.full((3, 4, 3), 7).tolist()
    assert pictures.from_array(np.full((3, 4, 1), 65535, np.uint16))[0, 0].tolist() == [255] * 3
    assert pictures.from_array(np.full((3, 4, 3), 32768, np.uint16)).max() == 128
    for wrong in (np.zeros((3, 4, 2), np.uint8), np.zeros((3, 4, 3), np.float32), np.zeros(5, np.uint8)):
        with pytest.raises(ValueError, match="expected"):
            pictures.from_array(wrong)


def test_fit_keeps_the_shape_and_never_enlarges() -> None:
    picture = np.full((300, 100, 3), 9, np.uint8)
    assert pictures.fit(picture, 150).shape == (150, 50, 3)
    assert pictures.fit(picture, 0) is picture
    assert pictures.fit(picture, 300) is picture
    assert pictures.fit(np.zeros((1000, 1, 3), np.uint8), 10).shape == (10, 1, 3)


# ------------------------------------------------------------------------------------------- what is no picture at all


def special(folder: Path, kind: str) -> Path:
    """A file by its name alone."""
    file = folder / "x.png"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(file))  # a socket's name is short
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    return file


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_has_no_end_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{kind}, not a file"):
        pictures.read(special(tmp_path, kind))


# -------------------------------------------------------------------------------------------------- odd and too large


def broken_exif(number: int = 0) -> bytes:
    """A JPEG whose EXIF names an entry beyond its end."""
    entry = b"\x0f\x01\x02\x00\xff\x00\x00\x00\xff\xff\x00\x00"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"
    return saved(Image.new("RGB", (8, 8), (number, 0, 0)), "JPEG", exif=exif)


def test_damaged_exif_is_noted_and_nobody_is_warned() -> None:
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pictures.watched(lambda pixels: None, notes):
            assert pictures.read(broken_exif()).shape == (8, 8, 3)
        assert pictures.read(broken_exif()).shape == (8, 8, 3)
    assert notes == ["their metadata (EXIF) are damaged"]


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_what_pillow_makes_of_it(orientation: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    packed = saved(picture, exif=exif)
    with Image.open(io.BytesIO(packed)) as again:
        assert np.array_equal(pictures.read(packed), np.asarray(ImageOps.exif_transpose(again)))


def test_other_warnings_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Image.open

    def noisy(*args: Any) -> Image.Image:
        warnings.warn("somebody else's", stacklevel=1)
        return real(*args)

    monkeypatch.setattr(Image, "open", noisy)
    with pytest.warns(UserWarning, match="somebody else's"):
        pictures.read(saved(Image.new("RGB", (4, 4))))


def test_large_pictures_take_turns() -> None:
    """Never more pixels at a time than there is room for, but one that alone has more."""
    room = pictures.Room(100)
    held, most, done, lock = 0, 0, [], threading.Lock()

    def work(pixels: int) -> None:
        nonlocal held, most
        with room.of(pixels):
            with lock:
                held += pixels
                most = max(most, held)
            time.sleep(0.002)
            with lock:
                held -= pixels
                done.append(pixels)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [10] * 40 + [70] * 8 + [300] + [10] * 40))
    assert len(done) == 89
    assert most == 300


@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_what_is_no_picture_is_told_without_an_address(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"^no picture"):
        pictures.read(b"no picture" if kind == "bytes" else tmp_path / "x.jpg")


def test_a_large_picture_is_not_passed_by() -> None:
    room, done = pictures.Room(100), []

    def begin(pixels: int) -> threading.Thread:
        def work() -> None:
            with room.of(pixels):
                done.append(pixels)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    with room.of(50):
        threads = [begin(300)]
        while len(threads) == 1 or not threads[-1].is_alive():  # small ones pass until it stands there and waits
            threads.append(begin(10))
            threads[-1].join(0.2)
        passed = len(done)
        threads += [begin(10) for _ in range(20)]
    for thread in threads:
        thread.join()
    assert done[passed] == 300
