"""What lies in folders of pictures and is none: each is named for what it is, with the cure."""

from __future__ import annotations

import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lotus.config import Data
from lotus.data import beton, folders, pictures
from lotus.data.catalog import imagefolder
from selection.errors import Refused

HEIC = b"\0\0\0\x18ftypheic" + bytes(200)


def png(width: int, height: int) -> bytes:
    """A black one that is packed into little."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    lines = b"".join(packer.compress(bytes((1 + width) * 100)) for _ in range(height // 100)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b'{"error": "gone"}', "download it again"),
        (HEIC, "HEIC, which nothing here reads; save it as JPEG"),
        (b"\0\0\0\x20ftypisom" + bytes(50), "a film"),
        (b"%PDF-1.7", "a PDF"),
        (bytes(range(200)), "no picture of a kind that is read here"),
    ],
)
def test_a_damaged_file_says_what_it_is(held: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(held)
    for way in (file, held):
        with pytest.raises(OSError, match=told) as found:
            pictures.read(way)
        assert "0x" not in str(found.value)  # no address of an object


def test_400_megapixels_are_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(png(20_000, 20_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match=r"400,000,000 pixels.*make it smaller"):
        pictures.read(tmp_path / "huge.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; its pixels alone are 400 MB


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_picture_under_a_wrong_ending_is_read(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", format=kind)
    assert np.abs(pictures.read(tmp_path / "a.jpg")[4, 4].astype(int) - (255, 0, 0)).max() < 12


def test_16_bits_in_either_order(tmp_path: Path) -> None:
    deep = np.array([[0, 257 * 100, 65535]])
    for mode, kind in (("I;16B", ">u2"), ("I;16", "<u2")):
        Image.frombytes(mode, (3, 1), deep.astype(kind).tobytes()).save(tmp_path / "deep.tif")
        assert pictures.read(tmp_path / "deep.tif")[0, :, 0].tolist() == [0, 100, 255]


def folder(root: Path) -> Path:
    for name in ("1", "2", "10", " lead"):
        (root / name).mkdir(parents=True)
        for row in range(2):
            Image.new("RGB", (8, 8), (40 * row, 80, 10)).save(root / name / f"{row}.png")
    (root / ".ipynb_checkpoints").mkdir()
    (root / "1/.ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(root / "1/.ipynb_checkpoints/0-checkpoint.png")
    os.symlink("../1/0.png", root / "2/link.png")
    os.symlink("..", root / "2/loop")
    os.symlink("../1", root / "10/other")
    return root


def test_odd_names_links_and_circles(tmp_path: Path) -> None:
    found = folders.folder(folder(tmp_path / "photos"))
    assert found.classes == (" lead", "1", "10", "2")  # as text, as torchvision has it
    assert np.bincount(found.labels).tolist() == [2, 2, 2, 3]  # a link to a picture counts, one to a folder does not


def test_pictures_that_nothing_here_reads(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos")
    assert folders.unread(root) == ""
    for name in ("1/a.HEIC", "2/b.heic", "2/c.cr2"):
        (root / name).write_bytes(HEIC)
    (root / "1/notes.txt").write_text("not one")
    assert folders.unread(root) == (
        f"2 .heic, 1 .cr2 passed over, e.g. {root}/1/a.HEIC: nothing here reads them. Save them as JPEG or PNG"
    )
    (root / "phone").mkdir()
    (root / "phone/d.heic").write_bytes(HEIC)
    with pytest.raises(Refused, match=r"'phone' is empty.*\.heic.*Save them as JPEG"):
        imagefolder(str(root))


def test_names_that_are_no_utf8_are_kept_and_written_down(tmp_path: Path) -> None:
    """As an archive of another system leaves them."""
    for place in (b"\xff\xfe", b"b"):
        home = os.fsencode(tmp_path) + b"/in/" + place
        os.makedirs(home)
        for name in (b"\xe9.png", b"e.png"):
            with open(home + b"/" + name, "wb") as file:
                file.write(png(100, 100))
    with open(os.fsencode(tmp_path) + b"/in/b/\xe8.png", "wb") as file:
        file.write(b"torn")
    train, _ = imagefolder(str(tmp_path / "in"), val_fraction=0.5)
    whole = folders.folder(tmp_path / "in")
    list(beton.prepare(whole, tmp_path / "x.beton", Data(damaged="skip")))
    told = beton.Manifest.load(tmp_path / "x.beton")
    assert told.classes == train.classes == ("b", "\udcff\udcfe")
    assert told.skipped[0]["name"].endswith("/b/\udce8.png")
