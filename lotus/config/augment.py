"""What happens to a training image: crops, policies of random changes, erasing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lotus.config.section import Section
from selection.methods import nearest


def _thrice(value: Any) -> Any:
    return (value,) * 3 if isinstance(value, (int, float)) else value


class Auto(Section):
    """A policy of random changes to the pixels, in timm's words: ``rand-m9-n2-mstd0.5-inc1``, or the same as a section."""

    name: Literal["rand", "trivial", "3a"] = "rand"
    """rand: RandAugment; trivial: TrivialAugment, wide; 3a: DeiT III's 3-Augment (want ``color_jitter: 0.3`` with it)."""
    m: float = Field(10, ge=0)
    """rand: magnitude, 0 to ``mmax``."""
    n: int = Field(2, ge=1, le=16)
    """rand: operations one after another."""
    p: float = Field(0.5, ge=0, le=1)
    """rand: how often each of them is done."""
    mstd: float = Field(0, ge=0)
    """rand: standard deviation of the magnitude; above 100: evenly from 0 to ``m``."""
    mmax: float = Field(10, gt=0)
    """rand: the magnitude is cut off here."""
    inc: bool = False
    """rand: every operation is stronger the larger the magnitude."""
    t: Literal["", "3a", "3aw", "weights"] = ""
    """rand: another set of operations."""
    interpolation: Literal["", "nearest", "bilinear", "bicubic", "random"] = ""
    """How a turned image is read between pixels. random: bilinear or bicubic. Empty: random for rand, nearest for trivial."""

    @model_validator(mode="before")
    @classmethod
    def _written_short(cls, value: Any) -> Any:
        raw = {"name": value} if isinstance(value, str) else value
        if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
            return raw
        name, *parts = raw["name"].split("-")
        found: dict[str, Any] = {}
        for part in parts:
            split = re.fullmatch(r"(t)(\w+)" if part.startswith("t") else r"([a-z_]+)(\d+(?:\.\d+)?|\.\d+)", part)
            word = split[1] if split else part
            if split is None or word not in cls.model_fields:
                raise ValueError(
                    f"there is no {word!r}.{nearest(word, cls.model_fields)} It is written m9, n2, mstd0.5, inc1"
                )
            if word in found:
                raise ValueError(f"{word} is said twice")
            found[word] = split[2]
        return {**found, **raw, "name": name}

    @property
    def alien(self) -> str:
        """The first setting of rand that is set where the policy is another; empty: none."""
        names = [name for name in type(self).model_fields if name not in ("name", "interpolation")]
        changed = (name for name in names if getattr(self, name) != type(self).model_fields[name].default)
        return "" if self.name == "rand" else next(changed, "")

    @property
    def moves(self) -> bool:
        """Whether parts of the picture come to lie elsewhere."""
        return self.name == "trivial" or (self.name == "rand" and self.t != "3a")


class Augment(Section):
    """What happens to a training image. All parameters are a pure function of (seed, epoch, image index)."""

    crop: Literal["none", "pad", "resized"] = "none"
    """none: resize to the model's size; pad: shift by up to ``pad`` pixels; resized: random-resized crop."""
    pad: int = Field(4, ge=1)
    """Pixels of padding for ``crop: pad`` (filled with the image's mean color of the data set)."""
    scale: tuple[float, float] = (0.25, 1.0)
    """Area of a random-resized crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio (width over height) of a random-resized crop."""
    flip: bool = False
    """Mirror half of the images."""
    auto: Auto | None = None
    """A policy: ``rand-m9-n2-mstd0.5-inc1``, ``trivial`` or ``3a``; null: none."""
    color_jitter: Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(_thrice)] = (0, 0, 0)
    """Brightness, contrast and saturation change by up to so much, in random order, after ``auto``: a number, or three, or
    four with the hue's (at most 0.5). timm leaves it out beside rand; here it is done wherever it is set."""
    erase: float = Field(0, ge=0, le=1)
    """How often a box of the normalized image is erased: timm's reprob."""
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    """pixel: by noise, rand: by a color for each box, const: by the mean color. timm's remode."""
    erase_count: int = Field(1, ge=1, le=16)
    """At most so many boxes, smaller as they are more. timm's recount."""

    @property
    def jitter(self) -> tuple[float, float, float, float]:
        """``color_jitter`` of brightness, contrast, saturation and hue."""
        brightness, contrast, saturation, hue = (*self.color_jitter, 0.0)[:4]
        return brightness, contrast, saturation, hue

    @property
    def recolors(self) -> bool:
        """Whether something is done to the pixels besides cutting, mirroring and erasing."""
        return self.auto is not None or any(self.jitter)
