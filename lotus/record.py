"""The record of a finished stage: what it was made with and from, what it left, and what has changed since."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lotus.files import digest, digest_of
from selection import regular

FORMAT = 2
"""Of a record. One of another is not read, so that its stage runs again."""
_UNSET: tuple[Any, ...] = (None, "", [], {})
_SEAL = "digest"
"""In the file of a record, of all the rest of it."""
SPEC, WEIGHTS = "spec.json", ".safetensors"
"""In the folder of a model: what it is, and how the names of its weights end."""


@dataclass(frozen=True)
class Record:
    """What stands of a finished stage: ``stages/NAME.json``, written last."""

    stage: str
    settings: dict[str, Any]
    made_from: dict[str, str]
    """Identity of each stage that it read from, and of each file that its settings name."""
    outputs: dict[str, int]
    """Size in bytes of each output, by its name: a folder that is moved is still done."""
    seconds: float
    image_forwards: float = 0.0
    """Forward passes of one image; training one image counts three."""
    macs: float = 0.0
    """Multiply-accumulates spent in those passes."""
    values: dict[str, Any] = field(default_factory=dict)
    """What it measured, e.g. ``top1``."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of each output in the run's folder; those among the images, which runs share, tell by themselves whether they are whole."""

    @property
    def identity(self) -> str:
        """Changes when the settings, what it was made from or the data change."""
        return digest([self.stage, self.settings, self.made_from, self.values.get("fingerprint")])

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Record | None:
        """The record that a file holds, or None where it is none that can be read, or not as it was written."""
        told = dict(stored)
        sealed = told.pop(_SEAL, None)
        if sealed not in (None, digest(told)) or told.pop("format", None) != FORMAT:
            return None
        try:
            record = cls(**told)
        except TypeError:
            return None
        kept = (record.settings, record.made_from, record.outputs, record.values, record.digests)
        return record if all(isinstance(part, dict) for part in kept) else None

    def sealed(self) -> dict[str, Any]:
        """What is written of it."""
        record = {"format": FORMAT, **vars(self)}
        return {**record, _SEAL: digest(json.loads(json.dumps(record)))}


def stored(file: Path) -> Mapping[str, Any]:
    """What the file of a record holds, whatever its format; nothing where it cannot be read."""
    try:
        record = json.loads(regular.text(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def written(config: Path) -> str:
    """The config that stands in a run's folder; empty where none can be read."""
    try:
        return regular.text(config)
    except (OSError, UnicodeDecodeError):
        return ""


def is_current(told: Mapping[str, Any]) -> bool:
    """Whether what a file holds is of today's format."""
    return told.get("format") == FORMAT


def filled(old: Any, default: Any) -> Any:
    """``old`` with what it lacks; what may hold any names (options, a method's) is as it is."""
    if not isinstance(old, dict) or not isinstance(default, dict) or not default:
        return old
    return {**default, **{name: filled(value, default.get(name)) for name, value in old.items()}}


def changes(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """``train.lr: 0.001 -> 0.0005`` for each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from changes(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    elif old != new:
        yield f"{place}: {worded(old)} -> {worded(new)}"


def worded(value: Any) -> str:
    """A setting in words, of at most 100 letters: ``none``, ``resnet18, pretrained true``, ``16, 24``; what is not set is left out."""
    if value in _UNSET:
        return "none"
    if isinstance(value, dict):
        named = [worded(value["name"])] if value.get("name") else []
        parts = named + [
            f"{name} {worded(one)}"
            for name, one in value.items()
            if name != "name" and one is not False and one not in _UNSET
        ]
        text = ", ".join(parts) or "none"
    elif isinstance(value, list):
        text = ", ".join(f"({told})" if ", " in (told := worded(one)) else told for one in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def content(path: str) -> str:
    """A hash of the file, or of the model in the folder, of LOTUS or of the hub, that a setting names; empty where none lies there."""
    place = Path(path)
    weights, other = place / f"model{WEIGHTS}", place / "pytorch_model.bin"
    hub = not (place / SPEC).is_file() and (place / "config.json").is_file()
    files: tuple[Path, ...] = (place,)
    if hub:
        files = (place / "config.json", weights if weights.is_file() else other)
    elif place.is_dir():
        files = (place / SPEC, weights)
    try:
        stands = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:
        return ""
    return _hashed(files, tuple(stands))


@functools.lru_cache(8)
def _hashed(files: tuple[Path, ...], stands: tuple[tuple[int, int], ...]) -> str:
    return digest_of(*files)
