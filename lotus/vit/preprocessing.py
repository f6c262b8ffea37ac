"""What a model wants of its images: the numbers that its weights were trained with, in one place for training and export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from torch import nn

Three = tuple[float, float, float]
MODES = ("center", "squash")
"""Of timm's modes of cropping; the third, ``border``, no ViT of timm has."""


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
    mode: str = "center"
    """timm's ``crop_mode``: ``squash`` where the shape of an image is given up for all of it."""

    def cfg(self) -> dict[str, Any]:
        """As a timm model's ``pretrained_cfg`` says it."""
        cfg: dict[str, Any] = {
            "mean": self.mean, "std": self.std, "interpolation": self.interpolation, "crop_pct": self.crop,
            "crop_mode": self.mode,
        }  # fmt: skip
        return cfg if self.side is None else {**cfg, "input_size": (3, self.side, self.side)}

    def about(self) -> dict[str, Any]:
        """As the folder of a model keeps it: JSON, of which :meth:`updated` makes this again."""
        return {
            "mean": list(self.mean), "std": list(self.std), "interpolation": self.interpolation, "crop": self.crop,
            "crop_mode": self.mode,
        }  # fmt: skip

    def updated(self, about: Mapping[str, Any]) -> Self:
        """This, with what a folder's ``about`` says otherwise; numbers that cannot be are passed over."""
        new: dict[str, Any] = {name: three for name in ("mean", "std") if (three := _three(about.get(name)))}
        crop: Any = about.get("crop")
        how = about.get("interpolation")
        if type(crop) in (int, float) and 0 < crop <= 1:
            new["crop"] = float(crop)
        if isinstance(how, str) and how:
            new["interpolation"] = how
        if about.get("crop_mode") in MODES:
            new["mode"] = about["crop_mode"]
        return self._replace(**new)


def preprocessing(model: nn.Module) -> Preprocessing:
    """What ``model`` wants, by its ``pretrained_cfg`` (a half and a half where it has none, as timm's ViTs have it) and, for
    the side, by itself: it may have been made for another one than its weights were."""
    held: Any = getattr(model, "pretrained_cfg", None) or {}
    cfg: Mapping[str, Any] = held if isinstance(held, Mapping) else held.to_dict()
    half = (0.5, 0.5, 0.5)
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    wanted = size if size is not None else (cfg.get("input_size") or (None, None))[-2:]
    return Preprocessing(
        _three(cfg.get("mean")) or half,
        _three(cfg.get("std")) or half,
        str(cfg.get("interpolation") or "bicubic"),
        float(cfg.get("crop_pct") or 0.875),
        int(wanted[0]) if wanted[0] is not None and wanted[0] == wanted[1] else None,
        mode if (mode := cfg.get("crop_mode")) in MODES else "center",
    )


def _three(numbers: Any) -> Three | None:
    """Three numbers in 0 to 1; None where it is anything else."""
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 3:
        return None
    if not all(type(one) in (int, float) and 0 <= one <= 1 for one in numbers):
        return None
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def resizing(about: Mapping[str, Any]) -> str:
    """How evaluation resizes for a model, by what its folder knows: ``area``, ``bilinear`` or ``bicubic``.

    What LOTUS trained was measured by area unless it says otherwise; timm has no such word, and is told the nearest.
    """
    how = about.get("resize", "area" if about.get("interpolation") == "bilinear" else about.get("interpolation"))
    return str(how) if how in ("area", "bilinear") else "bicubic"
