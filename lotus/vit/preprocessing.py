"""How a model wants its pixels: what its weights were trained on says so, not the images of the day."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import nn

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


class Preprocessing(NamedTuple):
    """How an image becomes the input of a model; timm's words in its :meth:`cfg`."""

    mean: Three
    """Of each channel, for pixels in 0 to 1."""
    std: Three
    """Likewise."""
    interpolation: str = "bicubic"
    """How it was resized when the weights were made."""
    crop: float = 0.875
    """Fraction of the shorter side that evaluation looks at (timm's ``crop_pct``)."""
    side: int | None = None
    """Of the square input, in pixels; None: any."""

    def cfg(self) -> dict[str, Any]:
        """As a timm model's ``pretrained_cfg`` says it."""
        told: dict[str, Any] = {
            "mean": self.mean, "std": self.std, "interpolation": self.interpolation, "crop_pct": self.crop,
        }  # fmt: skip
        return told if self.side is None else {**told, "input_size": (3, self.side, self.side)}

    def about(self) -> dict[str, Any]:
        """As the folder of a model keeps it: JSON, of which :meth:`told` makes this again."""
        return {"mean": list(self.mean), "std": list(self.std), "interpolation": self.interpolation, "crop": self.crop}

    def told(self, about: Mapping[str, Any]) -> Self:
        """This, with what a folder's ``about`` says otherwise; numbers that cannot be are passed over."""
        new: dict[str, Any] = {name: three for name in ("mean", "std") if (three := _numbers(about.get(name)))}
        crop: Any = about.get("crop")
        how: Any = about.get("interpolation")
        if type(crop) in (int, float) and 0 < crop <= 1:
            new["crop"] = float(crop)
        if isinstance(how, str) and how:
            new["interpolation"] = how
        return self._replace(**new)


def preprocessing(model: nn.Module) -> Preprocessing:
    """What ``model`` wants, by its ``pretrained_cfg`` (a half and a half where it has none, as timm's ViTs have it) and, for
    the side, by itself: it may have been made for another one than its weights were."""
    held: Any = getattr(model, "pretrained_cfg", None) or {}
    cfg: Mapping[str, Any] = held if isinstance(held, Mapping) else held.to_dict()
    half = (0.5, 0.5, 0.5)
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    wanted: Any = size if size is not None else (cfg.get("input_size") or (None, None))[-2:]
    return Preprocessing(
        _numbers(cfg.get("mean")) or half,
        _numbers(cfg.get("std")) or half,
        str(cfg.get("interpolation") or "bicubic"),
        float(cfg.get("crop_pct") or 0.875),
        int(wanted[0]) if wanted[0] and wanted[0] == wanted[1] else None,
    )


def _numbers(numbers: Any) -> Three | None:
    """Three numbers in 0 to 1; None where it is anything else."""
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 3:
        return None
    if not all(type(one) in (int, float) and 0 <= one <= 1 for one in numbers):
        return None
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))
