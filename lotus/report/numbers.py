"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str = "") -> str:
    """Three figures with a decimal prefix: 17560000000 -> ``17.6 G``; below a thousand as it is."""
    for size, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{_three(value / size)} {prefix}{unit}"
    return f"{_three(value)} {unit}".rstrip()


def _three(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    """Whole, with thousands apart: ``28,740``."""
    return f"{value:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    """A share in [0, 1] in percent, without a bare ``.0``: ``50 %``."""
    text = f"{100 * share:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + " %"


def standard_error(top1: float, images: int) -> float:
    """Of a top-1 in percent that was measured on so many images, in points: sqrt(p (1 - p) / n)."""
    share = min(max(top1 / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / images)


def accuracy(top1: float, images: float | None = None) -> str:
    """``93.10 ± 0.80 % (n = 1,000)``: with its standard error, where it is known on how many images it was measured."""
    if not images:
        return f"{top1:.2f} %"
    return f"{top1:.2f} ± {standard_error(top1, int(images)):.2f} % (n = {images:,.0f})"


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 05 s``, ``2 h 14 min``, ``3 d 4 h``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def milliseconds(value: float) -> str:
    """``2.31 ms``."""
    return f"{_three(value)} ms"


def times(ratio: float) -> str:
    """``0.51 x``; three figures below 10."""
    return f"{ratio:.2f} x" if ratio < 9.995 else f"{ratio:.1f} x"


def listed(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
