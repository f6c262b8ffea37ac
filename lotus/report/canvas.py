"""One drawing, two outlets: SVG for pages, PNG through Pillow for everything else. Colors go by name, from the report's palette."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lotus.report.names import escape
from selection.shown import shown

PALETTE = {
    "page": "#fbfaf8", "card": "#ffffff", "ink": "#22252b", "faint": "#6b7079", "grid": "#e9e7e2", "rule": "#dedbd4",
    "dense": "#7d8794", "lotus": "#b8467f", "pale": "#ece4e9", "away": "#cbc5cc",
}  # fmt: skip
"""The report's, by day."""
NIGHT = {
    "page": "#15171b", "card": "#1c1f24", "ink": "#e6e6e3", "faint": "#9aa0aa", "grid": "#2b2f36", "rule": "#343941",
    "dense": "#98a3b3", "lotus": "#e27aac", "pale": "#3a2f38", "away": "#4b4a52",
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

_FINE = 2  # PNG: pixels a unit
_SMOOTH = 2  # drawn so many times larger and shrunk: Pillow's shapes have hard edges


class Canvas:
    """Rectangles, lines, dots, words and images, in the order in which they were put there."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._svg: list[str] = []
        self._png: list[Callable[[ImageDraw.ImageDraw, Image.Image, float], None]] = []

    def rect(self, x: float, y: float, w: float, h: float, fill: str, *, edge: str = "", radius: float = 0) -> None:
        stroke = f' stroke="var(--{edge})"' if edge else ""
        self._svg.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}" rx="{radius:g}" '
            f'style="fill:var(--{fill})"{stroke}/>'
        )

        def paint(draw: ImageDraw.ImageDraw, image: Image.Image, s: float) -> None:
            if w > 0 and h > 0:
                outline = PALETTE[edge] if edge else None
                box = (x * s, y * s, max((x + w) * s - 1, x * s), max((y + h) * s - 1, y * s))
                draw.rounded_rectangle(box, radius * s, PALETTE[fill], outline, round(s))

        self._png.append(paint)

    def line(
        self, x1: float, y1: float, x2: float, y2: float, color: str, *, dash: bool = False, wide: float = 1
    ) -> None:
        dashes = ' stroke-dasharray="4 4"' if dash else ""
        self._svg.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{wide:g}" '
            f'style="stroke:var(--{color})"{dashes}/>'
        )

        def paint(draw: ImageDraw.ImageDraw, image: Image.Image, s: float) -> None:
            length = float(np.hypot(x2 - x1, y2 - y1))
            parts = np.arange(0, length, 8) / length if dash and length else np.zeros(1)
            for start in parts.tolist():
                end = min(1.0, start + 4 / length) if dash else 1.0
                at = [(x1 + part * (x2 - x1), y1 + part * (y2 - y1)) for part in (start, end)]
                draw.line([(a * s, b * s) for a, b in at], PALETTE[color], round(wide * s))

        self._png.append(paint)

    def dots(self, places: npt.NDArray[np.floating], radius: float, color: str) -> None:
        """Dots at (n, 2)."""
        circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>' for x, y in places.tolist())
        self._svg.append(f'<g style="fill:var(--{color})">{circles}</g>')

        def paint(draw: ImageDraw.ImageDraw, image: Image.Image, s: float) -> None:
            for x, y in places.tolist():
                draw.ellipse([(x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s], PALETTE[color])

        self._png.append(paint)

    def text(
        self, x: float, y: float, words: str, *, color: str = "ink", size: float = 12, anchor: str = "start", bold: bool = False
    ) -> None:  # fmt: skip
        """Words on the baseline ``y``."""
        weight = ' font-weight="600"' if bold else ""
        self._svg.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" style="fill:var(--{color})"'
            f"{weight}>{escape(words)}</text>"
        )

        def paint(draw: ImageDraw.ImageDraw, image: Image.Image, s: float) -> None:
            font = ImageFont.load_default(size * s)
            heavy = 0.025 * size * s if bold else 0
            where = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
            draw.text((x * s, y * s), _drawable(words), PALETTE[color], font, where, stroke_width=heavy)

        self._png.append(paint)

    def image(self, x: float, y: float, side: float, pixels: npt.NDArray[np.uint8], *, frame: str = "") -> None:
        """Pixels (H, W, 3) inside a square, small ones enlarged without smoothing, so that one sees what the model sees."""
        picture = Image.fromarray(pixels)
        if max(picture.size) > 2 * side:
            picture.thumbnail((int(2 * side), int(2 * side)), Image.Resampling.LANCZOS)
        scale = side / max(picture.size)
        w, h = picture.width * scale, picture.height * scale
        left, top = x + (side - w) / 2, y + (side - h) / 2
        out = io.BytesIO()
        picture.save(out, format="PNG")
        data = base64.b64encode(out.getvalue()).decode("ascii")
        self.rect(x - 2, y - 2, side + 4, side + 4, frame or "grid", radius=3)
        self._svg.append(
            f'<image x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{h:.1f}" style="image-rendering:pixelated" '
            f'href="data:image/png;base64,{data}"/>'
        )

        def paint(draw: ImageDraw.ImageDraw, image: Image.Image, s: float) -> None:
            size = max(1, round(w * s)), max(1, round(h * s))
            image.paste(picture.resize(size, Image.Resampling.NEAREST), (round(left * s), round(top * s)))

        self._png.append(paint)

    def svg(self, title: str, *, alone: bool = False) -> str:
        """The drawing as SVG; ``alone``: a file of its own, which brings its colors, for day and night."""
        told = escape(title)
        style, more = "", ""
        if alone:
            style = f"<style>svg{{{_variables(PALETTE)}font-family:{FONT}}}@media (prefers-color-scheme:dark){{svg{{{_variables(NIGHT)}}}}}</style>"
            more = f' xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}"'
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}"{more} role="img" aria-label="{told}"><title>{told}</title>'
            f"{style}{''.join(self._svg)}</svg>"
        )

    def png(self) -> bytes:
        scale = _FINE * _SMOOTH
        image = Image.new("RGB", (round(self.width * scale), round(self.height * scale)), PALETTE["page"])
        draw = ImageDraw.Draw(image)
        for paint in self._png:
            paint(draw, image, scale)
        image = image.resize((round(self.width * _FINE), round(self.height * _FINE)), Image.Resampling.BOX)
        out = io.BytesIO()
        image.save(out, format="PNG")
        return out.getvalue()


def _variables(palette: dict[str, str]) -> str:
    return "".join(f"--{name}:{color};" for name, color in palette.items())


def _drawable(words: str) -> str:
    """``words`` as far as the font that comes with Pillow has them; a class may be named in any script."""
    return "".join(letter if ord(letter) < 0x250 else "?" for letter in shown(words))
