"""A contact sheet shows what is kept as it is, and what leaves dimmed, where it lies."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lotus.report.contact import dimmed, sheet


def test_what_leaves_is_pale_and_what_stays_is_untouched() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = (250, 10, 10)
    kept = np.array([[True, False], [False, True]])
    seen = np.asarray(dimmed(Image.fromarray(pixels), kept))
    assert (seen[:4, :4] == pixels[:4, :4]).all()
    assert (seen[4:, 4:] == 0).all()
    for part in (seen[4:, :4], seen[:4, 4:]):
        assert part.min() > 150, "pale"
        assert np.ptp(part.reshape(-1, 3), axis=1).max() < 12, "without color"
    white = np.full((8, 8, 3), 255, np.uint8)
    assert np.asarray(dimmed(Image.fromarray(white), ~kept))[0, 0].max() < 235, "to be told from white that stays"


def test_a_sheet_has_a_pair_an_image_and_a_map() -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    kept = np.zeros((5, 4, 4), bool)
    kept[:, 0] = True
    mean = np.linspace(0, 1, 16).reshape(4, 4)
    page = sheet(
        images, kept, ["a name that is much too long for the room below an image"] * 5, mean, ["Title", "line"]
    )
    smaller = sheet(images[:3], kept[:3], ["a class\nof two lines\x1b[2J"] * 3, mean, ["Title"])
    assert page.size[0] == smaller.size[0]
    assert page.size[1] > smaller.size[1]
    seen = np.asarray(page)
    assert seen[30, 30].astype(int).sum() > seen[150, 150].astype(int).sum(), "the map is dark where it is 1"
