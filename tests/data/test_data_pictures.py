"""Pictures of every kind come out as a person would see them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lotus.data import pictures

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    packed = io.BytesIO()
    picture.save(packed, kind, **options)  # type: ignore[arg-type]
    return packed.getvalue()


def test_greyscale_and_bilevel() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(pictures.read(saved(Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, 2))
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
    with_grey = pictures.read(saved(Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA")))
    assert with_grey[0].tolist() == [list(WHITE), [0, 0, 0]]


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert pictures.read(saved(palette)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert pictures.read(saved(palette, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert pictures.read(saved(palette, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_a_transparent_colour_of_rgb() -> None:
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
