"""The picture of a ticket: scores with the cut, classes, a map of the embeddings, contact sheets. One .png, .svg or .html.

What is not known of the images (scores, embeddings, pixels) is left out, not faked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lotus.data.pictures import Pixels
from lotus.report import figures
from lotus.report.canvas import FONT, NIGHT, PALETTE, Canvas
from lotus.report.numbers import count, percent
from selection import atomic_files
from selection.errors import Refused
from selection.methods import nearest
from selection.subset import Subset

Rows = npt.NDArray[np.int64]

_WIDE, _EDGE, _GAP, _PAD = 1120, 32, 20, 20
_CARD = (_WIDE - 2 * _EDGE - _GAP) / 2
_INSIDE = _CARD - 2 * _PAD
_BARS = 20  # classes that are shown one by one
_ACROSS, _DOWN = 10, 2  # tiles of a strip
_POINTS = 3000  # of the map
_FITTED = 4000  # images that the map's axes are fitted on
_CLEAR = 0.9  # fraction of the images that a cut must tell right to be drawn as one


class Behind(Protocol):
    """What is at hand of the images: :class:`lotus.ticket.Data`."""

    @property
    def signals(self) -> Any: ...
    def reader(self) -> Callable[[int], Pixels] | None: ...


def write(path: str | Path, subset: Subset, data: Behind | None = None) -> None:
    """Draw a ticket into a file, by the ending of its name.

    Raises:
        Refused: another ending, or it cannot be written.
    """
    path = Path(path)
    check(path)
    drawn = draw(subset, data)
    title = f"A ticket: {count(len(subset))} of {count(subset.total)} images"
    if path.suffix == ".png":
        content = drawn.png()
    else:
        svg = drawn.svg(title, alone=True)
        content = (svg if path.suffix == ".svg" else _page(title, svg)).encode("utf-8", "replace")
    atomic_files.write_bytes(path, content)


def check(path: str | Path) -> None:
    """Before the work: whether a picture can be written there.

    Raises:
        Refused: another ending, or it cannot be.
    """
    path = Path(path)
    endings = (".png", ".svg", ".html")
    if path.suffix not in endings:
        raise Refused(f"--picture {path}: drawn are .png, .svg and .html.{nearest(path.suffix, endings)}")
    atomic_files.check(path)


@dataclass(frozen=True)
class _Card:
    """A part of the picture."""

    title: str
    tall: float
    paint: Callable[[Canvas, float, float], None]
    """Given the place of its left upper corner."""
    wide: bool = False
    """As wide as two."""


def draw(subset: Subset, data: Behind | None = None) -> Canvas:
    """The whole picture."""
    rows = _rows(subset, data)
    talls = [max(card.tall for card in row) + 2 * _PAD + 28 for row in rows]
    canvas = Canvas(_WIDE, 118.0 + sum(tall + _GAP for tall in talls) + _EDGE - _GAP)
    canvas.rect(0, 0, canvas.width, canvas.height, "page")
    _head(canvas, subset)
    top = 118.0
    for row, tall in zip(rows, talls, strict=True):
        for number, card in enumerate(row):
            x = _EDGE + number * (_CARD + _GAP)
            across = 2 * _CARD + _GAP if card.wide else _CARD
            canvas.rect(x, top, across, tall, "card", edge="rule", radius=10)
            canvas.text(x + _PAD, top + _PAD + 13, card.title, size=15, bold=True)
            card.paint(canvas, x + _PAD, top + _PAD + 28)
        top += tall + _GAP
    return canvas


def _rows(subset: Subset, data: Behind | None) -> list[list[_Card]]:
    """The cards, one or two in a row: what the scores, embeddings and labels tell, then the images themselves."""
    signals = data.signals if data is not None else None
    if signals is not None and signals.images != subset.total:
        signals = None
    cards = [*_scores_card(subset), *_map_card(subset, signals)]
    cards += _classes_card(subset, signals, wide=len(cards) % 2 == 0)  # alone in its row, it takes all of it
    rows = [cards[first : first + 2] for first in range(0, len(cards), 2)]
    read = data.reader() if data is not None else None
    sheets = [] if read is None else [_sheet_card(*sheet) for sheet in _sheets(subset, read)]
    if len(sheets) == 1 and rows and len(rows[-1]) == 1 and not rows[-1][0].wide:
        rows[-1] += sheets
    elif sheets:  # two are side by side
        rows.append(sheets)
    return rows


def _scores_card(subset: Subset) -> Iterator[_Card]:
    if subset.scores is not None and np.isfinite(subset.scores).any() and score_read(subset):
        values, name = subset.scores.astype(np.float64), score_name(subset)
        title = f"Scores by {name}" if name else "Scores"
        how = _named(subset.origin.get("pick", ""))
        more = "higher is kept first" if how == "top_k" else "higher is to the right"
        yield _Card(title, 272, lambda c, x, y: histogram(c, x, y, _INSIDE, 270, values, subset.rows, more))


def _map_card(subset: Subset, signals: Any) -> Iterator[_Card]:
    if signals is not None and "embeddings" in signals:
        places, kept = spread(signals["embeddings"], subset.rows)
        yield _Card("Where the images lie", 272, lambda c, x, y: scatter(c, x, y, _INSIDE, 270, places, kept))


def _classes_card(subset: Subset, signals: Any, *, wide: bool) -> Iterator[_Card]:
    labels = subset.labels if subset.labels is not None else signals["labels"] if signals is not None else None
    if labels is not None:
        bars = per_class(labels, subset.rows, subset.classes or (signals.classes if signals is not None else ()))
        column = -(-len(bars) // 2) if wide else len(bars)
        tall = 22 * column + 26
        yield _Card("Classes", tall, lambda c, x, y: classes(c, x, y, _INSIDE, bars, column), wide=wide)


def _head(canvas: Canvas, subset: Subset) -> None:
    canvas.text(_EDGE, 40, "LOTUS", color="lotus", size=14, bold=True)
    share = percent(len(subset) / subset.total)
    canvas.text(_EDGE, 74, f"{count(len(subset))} of {count(subset.total)} images kept, {share}", size=25, bold=True)
    origin = subset.origin
    parts = ("score",) * score_read(subset) + ("pick", "imported")
    told = [_named(origin[key]) for key in parts if key in origin]
    told += [f"seed {origin['seed']}"] if "seed" in origin else []
    balance = origin.get("balance")
    told += [f"classes balanced{f' ({balance})' if isinstance(balance, str) else ''}"] if balance else []
    told += [f"data {subset.fingerprint}"]
    canvas.text(_EDGE, 98, " · ".join(told), color="faint", size=13)


def _named(method: Any) -> str:
    return str(method.get("name", "")) if isinstance(method, dict) else str(method)


def score_read(subset: Subset) -> bool:
    """Whether a ticket's picker went by its scores, as far as it says."""
    return subset.origin.get("score_read") is not False


def score_name(subset: Subset) -> str:
    """The method that a ticket's scores are of; empty where it does not say."""
    return _named(subset.origin.get("score", ""))


# ---------------------------------------------------------------------------------------------------------- pictures


def histogram(
    canvas: Canvas, x: float, y: float, w: float, h: float, values: npt.NDArray[np.float64], rows: Rows, more: str = ""
) -> None:
    """Scores (N,), the kept rows lit; the cut where there is one. Those without bound are named below."""
    edges, everyone, chosen = figures.binned(values, rows, bins=44)
    left, bottom, wide, tall = x + 44, y + h - 40, w - 44, h - 44
    high = float(everyone.max()) * 1.05

    def across(value: float) -> float:
        return left + (value - edges[0]) / (edges[-1] - edges[0]) * wide

    for tick in figures.ticks(0, high, 4):
        at = bottom - tick / high * tall
        canvas.line(left, at, left + wide, at, "grid")
        canvas.text(left - 7, at + 4, figures.tick(tick), color="faint", size=11, anchor="end")
    for color, counts in (("away", everyone), ("lotus", chosen)):
        for number in np.flatnonzero(counts):
            a, b, up = across(edges[number]), across(edges[number + 1]), float(counts[number]) / high * tall
            canvas.rect(a + 0.5, bottom - up, max(b - a - 1, 0.5), up, color)
    canvas.line(left, bottom, left + wide, bottom, "rule")
    for tick in figures.ticks(float(edges[0]), float(edges[-1]), 6):
        canvas.text(across(tick), bottom + 16, figures.tick(tick), color="faint", size=11, anchor="middle")
    cut = cut_of(values, rows)
    if cut is not None:
        at = across(cut)
        canvas.line(at, bottom - tall, at, bottom, "ink", dash=True)
        side = "end" if at > left + 0.7 * wide else "start"
        canvas.text(at + (-6 if side == "end" else 6), bottom - tall + 10, f"cut {cut:.3g}", size=11, anchor=side)
    unbounded = int((~np.isfinite(values)).sum())
    more = f"{count(unbounded)} without bound are not shown" if unbounded else more
    _legend(canvas, left, y + h - 4, [("kept", "lotus"), ("left out", "away")], more)


def cut_of(values: npt.NDArray[np.floating], rows: Rows) -> float | None:
    """The score that best parts what is kept from what is not; None where none does (a picker that draws all along the score)."""
    order = np.argsort(values, kind="stable")
    kept = np.zeros(len(values), bool)
    kept[rows] = True
    inside = np.concatenate([[0], np.cumsum(kept[order])])  # kept among the lowest i
    lowest = np.arange(len(values) + 1)
    right = (lowest - inside) + (len(rows) - inside)  # those above the cut are kept, those below are not
    at = int(np.maximum(right, len(values) - right).argmax())
    if not 0 < at < len(values) or max(right[at], len(values) - right[at]) < _CLEAR * len(values):
        return None
    low, high = float(values[order[at - 1]]), float(values[order[at]])
    return (low + high) / 2 if np.isfinite(low) and np.isfinite(high) else low if np.isfinite(low) else None


def per_class(labels: Rows, rows: Rows, names: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """(name, kept, of) of each class; of many, those of which the least and the most is kept, and one line for the rest."""
    size = max(len(names), int(labels.max()) + 1)
    kept, of = np.bincount(labels[rows], minlength=size), np.bincount(labels, minlength=size)
    bars = [(names[c] if c < len(names) else str(c), int(kept[c]), int(of[c])) for c in range(size) if of[c]]
    if len(bars) <= _BARS:
        return bars
    bars.sort(key=lambda bar: bar[1] / bar[2])
    few = _BARS // 2
    rest = bars[few:-few]
    line = (f"{count(len(rest))} more", sum(k for _, k, _ in rest), sum(n for _, _, n in rest))
    return [*bars[:few], line, *bars[-few:]]


def classes(
    canvas: Canvas, x: float, y: float, w: float, bars: list[tuple[str, int, int]], column: int | None = None
) -> None:
    """A bar a class: how many there are, and how many stay; ``column`` of them below one another."""
    column = column or len(bars)
    most = max(of for name, _, of in bars if not name.endswith(" more"))
    room = w - 110 - 130
    for number, (name, kept, of) in enumerate(bars):
        left, top = x + number // column * (_CARD + _GAP), y + 22 * (number % column)
        length = room * min(of / most, 1)
        canvas.text(left + 100, top + 12, _short(name, 15), color="faint", anchor="end")
        canvas.rect(left + 110, top + 2, length, 13, "away", radius=2)
        canvas.rect(left + 110, top + 2, length * kept / of, 13, "lotus", radius=2)
        told = f"{count(kept)} of {count(of)}, {percent(kept / of, 0)}"
        canvas.text(left + 118 + length, top + 12, told, color="faint", size=11)
    _legend(canvas, x + 110, y + 22 * column + 16, [("kept", "lotus"), ("left out", "away")], "")


def in_report(
    labels: Rows, rows: Rows, names: tuple[str, ...], embeddings: npt.NDArray[np.floating] | None
) -> list[tuple[str, str]]:
    """Heading and SVG of what the report of a run shows of its ticket, beside scores and sheets."""
    bars = per_class(labels, rows, names)
    drawn = Canvas(_INSIDE, 22 * len(bars) + 26)
    classes(drawn, 0, 0, _INSIDE, bars)
    pictures = [("Classes", drawn.svg("Images kept of each class"))]
    if embeddings is not None:
        places, kept = spread(embeddings, rows)
        drawn = Canvas(_INSIDE, 290)
        scatter(drawn, 0, 0, _INSIDE, 286, places, kept)
        pictures.append(("Where the images lie", drawn.svg("Map of the images, those of the ticket lit")))
    return pictures


def spread(embeddings: npt.NDArray[np.floating], rows: Rows) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Places (n, 2) in [0, 1] of a sample of the images along the two directions in which they differ most, and which are kept."""
    rng = np.random.default_rng(0)
    total = len(embeddings)
    some = np.sort(rng.permutation(total)[: max(_FITTED, _POINTS)])
    features = embeddings[some].astype(np.float64)
    features -= features.mean(0)
    _, _, axes = np.linalg.svd(features[:_FITTED], full_matrices=False)
    shown = rng.permutation(len(some))[:_POINTS]
    places = features[shown] @ axes[:2].T
    if places.shape[1] < 2:
        places = np.column_stack([places[:, 0], np.zeros(len(places))])
    low, high = np.quantile(places, 0.005, axis=0), np.quantile(places, 0.995, axis=0)
    places = ((places - low) / np.where(high > low, high - low, 1)).clip(0, 1)
    kept = np.zeros(total, bool)
    kept[rows] = True
    return places, kept[some[shown]]


def scatter(
    canvas: Canvas, x: float, y: float, w: float, h: float, places: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]
) -> None:
    """The map: what is left out, and over it what is kept."""
    at = np.column_stack([x + 6 + places[:, 0] * (w - 12), y + 4 + (1 - places[:, 1]) * (h - 34)])
    radius = 2.6 if len(at) <= 1500 else 1.9
    canvas.dots(at[~kept], radius, "away")
    canvas.dots(at[kept], radius, "lotus")
    more = "the two directions in which the embeddings differ most"
    _legend(canvas, x, y + h - 4, [("kept", "lotus"), ("left out", "away")], more)


def _sheets(subset: Subset, read: Callable[[int], Pixels]) -> list[tuple[str, list[tuple[str, list[Pixels]]], str]]:
    """Kept and left out: title, strips of tiles, frame. Highest and lowest scores and those at the cut; without scores, any."""
    sheets = []
    size = _ACROSS * _DOWN
    values = subset.scores
    cut = None if values is None else cut_of(values, subset.rows)
    for title, rows, frame in (("Kept", subset.rows, "lotus"), ("Left out", subset.complement, "away")):
        if not len(rows):
            continue
        if values is None or not np.ptp(np.where(np.isfinite(values), values, 0)):
            some = np.random.default_rng(0).permutation(rows)[: 2 * size]
            chosen = [("any of them", some)]
        else:
            ordered = rows[np.argsort(-values[rows], kind="stable")]
            if cut is None:
                middle, name = max(0, len(ordered) // 2 - size // 2), "the middle"
            else:
                beside = int(np.searchsorted(-values[ordered], -cut))
                middle, name = max(0, min(beside - size // 2, len(ordered) - size)), "at the cut"
            chosen = [("highest scores", ordered[:size])]
            if len(ordered) > 2 * size:
                chosen.append((name, ordered[middle : middle + size]))
            if len(ordered) > size:
                chosen.append(("lowest scores", ordered[::-1][: min(size, len(ordered) - size)]))
        try:
            strips = [(name, [read(row) for row in some.tolist()]) for name, some in chosen]
        except (Refused, OSError):
            return []
        sheets.append((title, strips, frame))
    return sheets


def _sheet_card(title: str, strips: list[tuple[str, list[Pixels]]], frame: str) -> _Card:
    side = (_INSIDE - 6 * (_ACROSS - 1)) / _ACROSS
    talls = [26 + (side + 6) * -(-len(tiles) // _ACROSS) + 8 for _, tiles in strips]

    def paint(canvas: Canvas, x: float, y: float) -> None:
        for (name, tiles), tall in zip(strips, talls, strict=True):
            canvas.text(x, y + 12, name, color="faint")
            for number, pixels in enumerate(tiles):
                down, across = divmod(number, _ACROSS)
                canvas.image(x + across * (side + 6), y + 26 + down * (side + 6), side, pixels, frame=frame)
            y += tall

    return _Card(title, sum(talls), paint)


def _legend(canvas: Canvas, x: float, y: float, entries: list[tuple[str, str]], more: str) -> None:
    for name, color in entries:
        canvas.rect(x, y - 9, 10, 10, color, radius=3)
        canvas.text(x + 15, y, name, color="faint", size=11)
        x += 30 + 6 * len(name)
    canvas.text(x, y, more, color="faint", size=11)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _page(title: str, svg: str) -> str:
    day = "".join(f"--{name}:{color};" for name, color in PALETTE.items())
    night = "".join(f"--{name}:{color};" for name, color in NIGHT.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{title}</title><style>:root{{color-scheme:light dark;{day}}}@media (prefers-color-scheme:dark){{:root{{{night}}}}}"
        f"body{{margin:0;background:var(--page);font-family:{FONT}}}svg{{display:block;margin:0 auto;max-width:100%;height:auto}}"
        f"</style></head><body>{svg}</body></html>\n"
    )
