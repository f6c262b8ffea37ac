"""Pictures of a run as inline SVG, drawn by hand: no plotting library, no script, nothing fetched.

Colors are classes that the page's style sheet defines for light and dark (``dense``, ``lotus``, ``tune``, ``pale``, ``ink``,
``faint``, ``grid``). Every picture has a title that a screen reader reads out.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lotus.report.names import escape
from lotus.report.numbers import count, percent, si

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 32, 44


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    style: str
    """Class of its color: ``dense``, ``lotus`` or ``tune``."""
    x: Sequence[float]
    y: Sequence[float]


class Point(NamedTuple):
    """A model in the picture of accuracy against cost."""

    name: str
    style: str
    macs: float
    top1: float


def curves(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    bounds: tuple[float | None, float | None] = (None, None),
    level: tuple[float, str] | None = None,
) -> str:
    """Lines over one pair of axes; empty without a point.

    Args:
        series: a line each; points that are not finite are left out
        title: what a reader who cannot see it is told
        x, y: what the axes show, with units
        bounds: lowest and highest y that make sense, e.g. 0 and 100 for percent; None leaves it open
        level: a dashed horizontal line, with its name
    """
    series = [_finite(one) for one in series]
    series = [one for one in series if len(one.x)]
    if not series:
        return ""
    across = [value for one in series for value in one.x]
    up = [value for one in series for value in one.y] + ([level[0]] if level else [])
    axes = _Axes(_span(across, (0, None), from_zero=True), _span(up, bounds), x, y)
    parts = [axes.draw()]
    if level:
        at = axes.y(level[0])
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="faint" x="{_LEFT + 6}" y="{at - 5:.1f}">{escape(level[1])}</text>')
    for one in series:
        points = [(axes.x(a), axes.y(b)) for a, b in zip(one.x, one.y, strict=True)]
        parts += _path(f"line {one.style}", points)
        parts += _dots(f"dot {one.style}", points if len(points) <= 40 else points[-1:], 2.5)
    return _svg(title, parts) + _legend([(one.name, one.style) for one in series])


def trade(points: Sequence[Point], *, title: str = "Top-1 against multiply-accumulates an image") -> str:
    """Models as dots: accuracy (percent) over cost (MACs an image), in the order in which one became the other."""
    points = [point for point in points if math.isfinite(point.macs) and math.isfinite(point.top1)]
    if not points:
        return ""
    high = max(point.macs for point in points)
    axes = _Axes((0.0, high * 1.12), _span([p.top1 for p in points], (0, 100), least=2.0), "MACs an image", "top-1, %")
    places = [(axes.x(p.macs), axes.y(p.top1)) for p in points]
    parts = [axes.draw()]
    parts += _path("mark", [place for point, place in zip(points, places, strict=True) if point.style != "dense"])
    taken: list[tuple[float, float, float]] = []
    for point, place in zip(points, places, strict=True):
        x, y, side = _beside(place, 6.2 * len(point.name), taken)
        parts += _dots(f"dot {point.style}", [place], 5)
        parts.append(f'<text class="ink" x="{x:.1f}" y="{y:.1f}" text-anchor="{side}">{escape(point.name)}</text>')
    return _svg(title, parts)


def _beside(
    place: tuple[float, float], wide: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float, str]:
    """Where a name stands beside its dot, and which end of it; it is noted in ``taken``: left, right, y of each name."""
    side = "end" if place[0] > _WIDTH * 0.6 else "start"
    x, y = place[0] + (-9 if side == "end" else 9), place[1] + 4
    left = x - wide if side == "end" else x
    # Names that would lie over one another go below their dots' line.
    while any(abs(y - there) < 13 and left < end and begin < left + wide for begin, end, there in taken):
        y += 13
    taken.append((left, left + wide, y))
    return x, y, side


def tried(
    points: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    others: Sequence[tuple[float, float]],
    *,
    y: str,
    chosen: tuple[float, float] | None = None,
    rival: str = "",
) -> str:
    """What a search measured, (MACs, how much worse) each: all of it, its Pareto points, and a rival's points, with its name."""
    every = [*points, *others, *([chosen] if chosen else [])]
    every = [point for point in every if all(math.isfinite(value) for value in point)]
    if not points or not every:
        return ""
    axes = _Axes((0.0, max(x for x, _ in every) * 1.05), _span([y for _, y in every], (None, None)), "MACs an image", y)
    parts = [axes.draw()]
    parts += _dots("pale", [(axes.x(a), axes.y(b)) for a, b in points], 3)
    for line, style in ((sorted(others), "dense"), (sorted(front), "lotus")):
        places = [(axes.x(a), axes.y(b)) for a, b in line]
        parts += _path(f"line {style}", places)
        parts += _dots(f"dot {style}", places, 2.5)
    if chosen:
        parts += _dots("dot tune", [(axes.x(chosen[0]), axes.y(chosen[1]))], 5)
    legend = [("tried", "pale"), ("nothing cheaper is as good", "lotus")]
    legend += [("taken", "tune")] if chosen else []
    legend += [(rival, "dense")] if others else []
    return _svg("What the search tried: distance from the dense model against MACs", parts) + _legend(legend)


def widths(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each block keeps of its attention dimensions, and of its MLP units: bars inside the outlines of what was there."""
    if not blocks:
        return []
    attention = _bars(
        "Attention dimensions",
        [block["heads"] * block["head_dim"] for block in blocks],
        [block["of_heads"] * block["of_head_dim"] for block in blocks],
        [_heads_told(block) for block in blocks],
    )
    kept, of = ([block[name] for block in blocks] for name in ("hidden", "of_hidden"))
    return [attention, _bars("MLP units", kept, of, [""] * len(blocks))]


def _heads_told(block: Mapping[str, Any]) -> str:
    if block.get("kernel"):
        return f", {block['kernel']}x{block['kernel']} convolution"
    if block["heads"] == block["of_heads"]:
        return ""
    return f", {block['heads']} {'head' if block['heads'] == 1 else 'heads'}"


def _bars(name: str, kept: Sequence[int], of: Sequence[int], more: Sequence[str]) -> str:
    """A bar a block; the longest leaves room for the numbers beside it."""
    row, bar, left = 22, 12, 68
    most = max(*of, 1)
    told = [f"{count(now)} of {count(was)}{words}" for now, was, words in zip(kept, of, more, strict=True)]
    room = _WIDTH - left - 16 - 8 * max(map(len, told))  # they are larger on a narrow screen
    parts = [f'<text class="ink" x="{left}" y="18">{name}</text>']
    for place, (now, was, words) in enumerate(zip(kept, of, told, strict=True)):
        y = 32 + place * row
        parts.append(f'<text class="faint" x="{left - 8}" y="{y + 11}" text-anchor="end">block {place}</text>')
        for style, long in (("pale", was), ("fill lotus", now)):
            parts.append(
                f'<rect class="{style}" x="{left}" y="{y}" width="{room * long / most:.1f}" height="{bar}" rx="2"/>'
            )
        parts.append(f'<text class="faint" x="{left + room * was / most + 8:.1f}" y="{y + 11}">{words}</text>')
    return _svg(f"{name} kept in each block", parts, height=36 + row * len(kept))


def scores(values: npt.NDArray[np.floating], rows: npt.NDArray[np.integer], *, name: str) -> str:
    """Histogram of the scores (N,), the kept rows (K,) marked; scores without bound are left out and named."""
    finite = np.isfinite(values)
    if not finite.any():
        return ""
    edges, everyone, chosen = binned(values, rows, bins=40)
    axes = _Axes(
        (float(edges[0]), float(edges[-1])),
        (0.0, float(everyone.max()) * 1.05),
        f"{name}: higher is kept first",
        "images",
    )
    parts = [axes.draw()]
    for kind, counts in (("pale", everyone), ("fill lotus", chosen)):
        for number in np.flatnonzero(counts):
            left, right, top = axes.x(edges[number]), axes.x(edges[number + 1]), axes.y(float(counts[number]))
            parts.append(
                f'<rect class="{kind}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
                f'height="{_HEIGHT - _BOTTOM - top:.1f}"/>'
            )
    legend = [(f"in the ticket, {percent(len(rows) / len(values))}", "lotus"), ("left out", "pale")]
    if not finite.all():
        legend.append((f"{count((~finite).sum())} images without a bound are not shown", ""))
    return _svg(f"Scores of the images by {name}, with the ticket marked", parts) + _legend(legend)


def binned(
    values: npt.NDArray[np.floating], rows: npt.NDArray[np.integer], *, bins: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Edges of a histogram of the finite scores (N,), how many lie in each bin, and how many of the kept rows (K,)."""
    finite = np.isfinite(values)
    is_kept = np.zeros(len(values), bool)
    is_kept[rows] = True
    low, high = float(values[finite].min()), float(values[finite].max())
    if high - low <= 1e-9 * abs(high):
        half = max(0.5, 1e-3 * abs(high))
        low, high = low - half, high + half
    edges = np.linspace(low, high, bins + 1)
    return edges, np.histogram(values[finite], edges)[0], np.histogram(values[finite & is_kept], edges)[0]


def tile(pixels: npt.NDArray[np.uint8], side: int = 96) -> str:
    """An image (H, W, 3) as a data URI, no larger than ``side``. Small ones stay as they are: the page enlarges them
    without smoothing, so that one sees the pixels the model sees."""
    picture = Image.fromarray(pixels)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


class _Axes:
    """Two linear axes with round ticks."""

    def __init__(self, across: tuple[float, float], up: tuple[float, float], x_name: str, y_name: str) -> None:
        self._across, self._up, self._names = across, up, (x_name, y_name)

    def x(self, value: float) -> float:
        low, high = self._across
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._up
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def draw(self) -> str:
        floor, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = []
        for value in ticks(*self._up):
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{end}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="faint" x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{tick(value)}</text>')
        for value in ticks(*self._across, most=6):
            at = self.x(value)
            parts.append(f'<text class="faint" x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{tick(value)}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{end}" y1="{floor}" y2="{floor}"/>')
        middle = (_LEFT + end) / 2
        parts.append(
            f'<text class="faint" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(self._names[0])}</text>'
        )
        parts.append(f'<text class="faint" x="0" y="14">{escape(self._names[1])}</text>')
        return "".join(parts)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` + 1 round numbers (1, 2, 2.5 or 5 times a power of ten apart) from ``low`` to ``high``."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(part * power for part in (1, 2, 2.5, 5, 10) if span / (part * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick(value: float) -> str:
    """A number beside an axis."""
    return si(value).replace(" ", "") if abs(value) >= 1000 else f"{value:.4g}"


def _span(
    values: Sequence[float], bounds: tuple[float | None, float | None], *, from_zero: bool = False, least: float = 0.0
) -> tuple[float, float]:
    """Lowest and highest of an axis that shows ``values``: some air, but not beyond ``bounds``; never empty."""
    low, high = min(values), max(values)
    air = 0.08 * max(high - low, least, 1e-9 + 0.02 * abs(high))
    low, high = (0.0 if from_zero else low - air), high + (0 if from_zero else air)
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    if bounds[0] is not None:
        low = max(low, bounds[0])
    if bounds[1] is not None:
        high = min(high, bounds[1])
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _finite(one: Series) -> Series:
    pairs = [(a, b) for a, b in zip(one.x, one.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return one._replace(x=[a for a, _ in pairs], y=[b for _, b in pairs])


def _path(style: str, places: Sequence[tuple[float, float]]) -> list[str]:
    """A line through (x, y) of the picture, where there are two."""
    way = " L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    return [f'<path class="{style}" d="M{way}"/>'] if len(places) > 1 else []


def _dots(style: str, places: Sequence[tuple[float, float]], radius: float) -> list[str]:
    return [f'<circle class="{style}" cx="{a:.1f}" cy="{b:.1f}" r="{radius:g}"/>' for a, b in places]


def _svg(title: str, parts: Sequence[str], *, height: float = _HEIGHT) -> str:
    told = escape(title)
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{told}"><title>{told}</title>'
        f"{''.join(parts)}</svg>"
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    keys = "".join(
        f'<span class="key">{f"<i class={style!r}></i>" if style else ""}{escape(name)}</span>'
        for name, style in entries
    )
    return f'<p class="legend">{keys}</p>'
