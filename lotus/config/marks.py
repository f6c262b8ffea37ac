"""What a setting is about, said once, where it is declared: ``mixup: Annotated[float, Mark.BLURS] = Field(0, ge=0)``.

Rules, inheritance and stages ask for the settings with a mark, and keep no list of names: a new one is known to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel


class Mark(Enum):
    """What a setting may be about. One of which the rules are told has an example beside its default: ``Field(0, examples=[0.2])``."""

    BLURS = "stands between an image and what the model says of it: off where images are scored"
    ADDS = "what a training is given on top, which a proxy goes without where it is not set there"
    LENGTH = "how long a training is and begins, which each says for itself"
    RATE = "how large its steps are, which a fine-tune says for itself"
    SHARED = "of the ticket's training, and as it is there for a fine-tune too"
    OF_TRAINING = "of what sees an image more than once, as a linear probe does not"
    OF_GATES = "does nothing where no gates learn"
    BY_SCORES = "of a cut by scores, and of no other way to prune"
    BESIDE = "changes nothing of what is left: a training that stands, finished or half-way, stays what it is"
    MEASURES = (
        "when it is measured: likewise, where no guest may go by what is measured (one that only watches does not)"
    )
    FILE = "names a file: what is in it counts as well as its name"
    OFF_WITHIN = "off, which it is by default, in a short training within another stage: a search, gates that learn"


def marked(section: type[BaseModel], *marks: Mark) -> tuple[str, ...]:
    """The settings of ``section`` with any of these marks, in its order."""
    return tuple(name for name, field in section.model_fields.items() if any(mark in field.metadata for mark in marks))


def that_count(page: BaseModel, settings: Mapping[str, Any], watches: Callable[[str], bool]) -> dict[str, Any]:
    """What a stage's result depends on.

    Args:
        page: of the config
        settings: by their place (``train``, ``prune.keep.macs``), as numbers, texts, lists and dicts; perhaps older ones
        watches: whether a guest of this name changes nothing

    Returns:
        ``settings`` without those that are :attr:`Mark.BESIDE`, guests that only watch, and :attr:`Mark.MEASURES` where that makes no
        difference.
    """
    return {place: _counting(_at(page, place), value, watches) for place, value in settings.items()}


def that_name_files(page: BaseModel, places: Iterable[str]) -> dict[str, str]:
    """The files that settings marked :attr:`Mark.FILE` name, by the setting.

    Args:
        page: of the config
        places: of the parts that are looked at, as ``train``; such as say what they leave out (``-train.sparsity``) have none
    """
    parts = {place: _at(page, place) for place in places if not place.startswith("-")}
    sections = {place: part for place, part in parts.items() if isinstance(part, BaseModel)}
    return {
        f"{place}.{name}": getattr(part, name)
        for place, part in sections.items()
        for name in marked(type(part), Mark.FILE)
    }


def _at(part: Any, place: str) -> Any:
    for name in place.split("."):
        part = getattr(part, name, None)
    return part


def _counting(part: Any, dump: Any, watches: Callable[[str], bool]) -> Any:
    if not isinstance(part, BaseModel) or not isinstance(dump, dict):
        return dump
    if dump.get("guests"):
        names = [one["name"] if isinstance(one, dict) else one for one in dump["guests"]]
        dump = {**dump, "guests": [one for one, name in zip(dump["guests"], names, strict=True) if not watches(name)]}
    idle = marked(type(part), Mark.BESIDE, *(() if dump.get("guests") else (Mark.MEASURES,)))
    return {
        name: _counting(getattr(part, name, None), value, watches) for name, value in dump.items() if name not in idle
    }
