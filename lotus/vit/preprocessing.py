"""How a model wants its pixels: what its weights were trained on says so, not the images of the day."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from selection.errors import Refused

Three = tuple[float, float, float]
_CONFIG = "config.json"


class Colors(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in 0 to 1."""

    mean: Three
    std: Three


def colors_of(name: str, weights: str, place: str = "model") -> Colors | None:
    """What published or given weights were trained on; None where nothing tells.

    Args:
        name: timm's name of the model, with its tag if it has one
        weights: a file or a folder; empty for timm's published ones. A ``config.json`` beside it, as the Hugging Face hub lays
            models out, tells; else timm's own table of ``name``

    Raises:
        Refused: a config.json whose numbers are none.
    """
    from lotus.vit.model import published

    path = Path(weights) if weights else None
    beside = None if path is None else (path if path.is_dir() else path.parent) / _CONFIG
    if beside is not None and beside.is_file():
        told = _told(beside, place)
    else:
        told = published(name)
    if "mean" not in told or "std" not in told:
        return None
    mean, std = (_three(told[part], f"{place}: {beside or name}: {part}") for part in ("mean", "std"))
    return Colors(mean, std)


def _told(file: Path, place: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise Refused(f"{place}: {file} is no JSON. Mend or remove it.") from None
    told = found.get("pretrained_cfg", found) if isinstance(found, dict) else {}
    return told if isinstance(told, dict) else {}


def _three(numbers: Any, place: str) -> Three:
    if (
        not isinstance(numbers, (list, tuple))
        or len(numbers) != 3
        or not all(type(one) in (int, float) and 0 <= one <= 1 for one in numbers)
    ):
        raise Refused(f"{place} is {numbers!r:.60}, not three numbers between 0 and 1. Mend it.")
    first, second, third = (float(one) for one in numbers)
    return first, second, third
