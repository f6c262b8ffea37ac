"""A contact sheet of a patch ticket: images beside what of them is kept, what leaves dimmed, as one picture.

Shapes: M images shown, S side of an image in pixels, R x C patches of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from selection.shown import shown

Pixels = npt.NDArray[np.uint8]

_SIDE, _GAP, _MARGIN, _COLUMNS = 132, 14, 24, 3
_PAPER, _INK, _FAINT, _GONE = (252, 252, 250), (32, 34, 38), (112, 116, 122), (212, 214, 220)
_LOW, _HIGH = np.array([236, 238, 242.0]), np.array([18, 82, 148.0])  # of the map of means: rarely kept, kept first


def sheet(
    images: Pixels,
    kept: npt.NDArray[np.bool_],
    names: Sequence[str],
    mean: npt.NDArray[np.floating],
    lines: Sequence[str],
) -> Image.Image:
    """The picture: at the top ``lines`` beside the map of means, below them a pair an image.

    Args:
        images: (M, S, S, 3)
        kept: (M, R, C)
        names: a caption for each image
        mean: (R, C) of the asked model, in 0..1: the mean place of each patch, 1 where it always comes first
        lines: the first is the title
    """
    lines, names = [shown(text) for text in lines], [shown(name) for name in names]
    columns = min(_COLUMNS, len(images))
    pair, line = 2 * _SIDE + 4, 18
    rows = -(-len(images) // columns)
    words, title = ImageFont.load_default(13), ImageFont.load_default(18)
    wide = max(int(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text, title)) for text in lines) + _SIDE
    width = max(columns * pair + (columns - 1) * 2 * _GAP, wide + 2 * _GAP) + 2 * _MARGIN
    top = _MARGIN + _SIDE + 2 * _GAP
    page = Image.new("RGB", (width, top + rows * (_SIDE + line + _GAP) + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(page)
    page.paste(_heat(mean), (_MARGIN, _MARGIN))
    for number, text in enumerate(lines):
        at = (_MARGIN + _SIDE + 2 * _GAP, _MARGIN + 2 + number * 22 + (6 if number else 0))
        draw.text(at, text, _INK if number == 0 else _FAINT, title if number == 0 else words)
    for number, (pixels, stays, name) in enumerate(zip(images, kept, names, strict=True)):
        down, across = divmod(number, columns)
        x, y = _MARGIN + across * (pair + 2 * _GAP), top + down * (_SIDE + line + _GAP)
        whole = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        page.paste(whole, (x, y))
        page.paste(dimmed(whole, stays), (x + _SIDE + 4, y))
        draw.text((x, y + _SIDE + 2), _short(draw, name, words, pair), _FAINT, words)
    return page


def dimmed(image: Image.Image, kept: npt.NDArray[np.bool_]) -> Image.Image:
    """``image`` with the patches that are pruned pale and without color, but not white: skies are; ``kept``: (R, C)."""
    pixels = np.asarray(image, np.float32)
    gray = pixels.mean(2, keepdims=True)
    pale = np.array(_GONE, np.float32) * 0.82 + gray * 0.18
    mask = _cells(kept, pixels.shape[0], pixels.shape[1])[..., None]
    return Image.fromarray(np.where(mask, pixels, pale).round().clip(0, 255).astype(np.uint8))


def _heat(mean: npt.NDArray[np.floating]) -> Image.Image:
    span = float(mean.max() - mean.min()) or 1.0
    high = _cells((mean - mean.min()) / span, _SIDE, _SIDE)[..., None]
    return Image.fromarray((_LOW + (_HIGH - _LOW) * high).round().astype(np.uint8))


def _cells(values: npt.NDArray[np.generic], height: int, width: int) -> npt.NDArray[np.generic]:
    """(R, C) -> (height, width), each cell as large as any other to within a pixel."""
    rows, columns = values.shape
    return values[np.arange(height)[:, None] * rows // height, np.arange(width) * columns // width]


def _short(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, room: int) -> str:
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(text + "...", font) > room:
        text = text[:-1]
    return text + "..."
