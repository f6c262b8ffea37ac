"""A run is a folder. All its paths stand here, and so does what is done and what is not.

A stage is done when its record stands, its outputs stand with the sizes they were written with, its settings are
unchanged, and so is what it was made from. Nothing here needs torch: a finished run answers at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import math
import operator
import os
import platform
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from lotus.config import Config, Method, Section
from lotus.events import Event
from lotus.files import append, digest, digest_of, tidy, write_json, write_text
from selection import lottery, methods
from selection.errors import Refused

FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """What a stage depends on and what it leaves."""

    name: str
    settings: tuple[str, ...]
    """Parts of the config (``"train"``, ``"prune.keep.macs"``) that change what it makes, less those with a minus before them."""
    after: tuple[str, ...]
    """Stages whose outputs it reads."""
    outputs: tuple[str, ...]
    """What it leaves, relative to the run's folder; a folder is named by the file that is written last in it."""
    says: str
    """What it does, for people."""


# How pixels are decoded (data.loader, data.workers) and where they lie (data.folder) change no result of a stage.
_PIXELS = tuple(f"data.{name}" for name in ("name", "path", "options", "write", "max_side", "jpeg_quality"))
_PIXELS += tuple(f"data.{name}" for name in ("smart_threshold", "jpeg_share", "damaged"))

STAGES: tuple[Stage, ...] = (
    Stage("prepare", _PIXELS, (), ("{data}/train.json", "{data}/train.beton", "{data}/val.json", "{data}/val.beton"),
          "write the images as .beton files"),
    Stage("score", ("score", "model", "seed"), ("prepare",), ("signals.npz",), "probe the images: watch what is said of each"),
    Stage("select", ("select", "seed"), ("prepare", "score"), ("subset.npz",), "draw the ticket: the images worth training on"),
    Stage("baseline", ("train", "-train.sparsity", "-train.redraw", "-train.patches", "-train.guests", "model", "seed"), ("prepare",),
          ("baseline/spec.json",),
          "train the dense model on all images, to compare with"),
    Stage("train", ("train", "model", "seed", "prune.keep.macs", "prune.keep.gates"), ("select",), ("trained/spec.json",),
          "train on the ticket under sparsity"),
    Stage("prune", ("prune", "seed"), ("train",), ("pruned/spec.json",), "cut what is not worth keeping"),
    Stage("finetune", ("finetune", "seed"), ("prune",), ("final/spec.json",), "recover, taught by the unpruned model"),
    Stage("export", ("export",), ("finetune",), ("export/export.json",), "leave the house: timm, ONNX, latency"),
    Stage("report", ("baseline",), ("export", "baseline"), ("results.json", "report.html"), "say what it cost"),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}
_MODEL = "patches.model"
_DATA = "{data}/"
_ROOM = "Make room there, or make it writable; the same command goes on."
_OWN = "--with"


@dataclass(frozen=True)
class Record:
    """What stands of a finished stage: ``stages/NAME.json``, written last."""

    stage: str
    settings: dict[str, Any]
    made_from: dict[str, str]
    """Identity of each stage that it read from, and of the model that it asked about patches."""
    outputs: dict[str, int]
    """Size in bytes of each output, by its name in :data:`STAGES`: a folder that is moved is still done."""
    seconds: float
    image_forwards: float = 0.0
    """Forward passes of one image; training one image counts three."""
    macs: float = 0.0
    """Multiply-accumulates spent in those passes."""
    values: dict[str, Any] = field(default_factory=dict)
    """What it measured, e.g. ``top1``."""

    @property
    def identity(self) -> str:
        """Changes when the settings, what it was made from or the data change."""
        return digest([self.stage, self.settings, self.made_from, self.values.get("fingerprint")])


class Run:
    """The folder of a run."""

    def __init__(self, config: Config, shelves: Sequence[ModuleType] = ()) -> None:
        """
        Args:
            shelves: files of the user's own (``--with``), by which the stages that call a method of theirs were done
        """
        self.config = config
        # As they are now: an editor may be at work on them while the run is.
        texts = [Path(shelf.__file__).read_text(encoding="utf-8") if shelf.__file__ else "" for shelf in shelves]
        self._own = [(methods.names(shelf), digest(text)) for shelf, text in zip(shelves, texts, strict=True)]
        name = re.sub(r"[^\w.-]+", "-", config.name or "run").strip("-.") or "run"
        self.folder = Path(config.folder) if config.folder else Path("runs") / name
        self.data = Path(config.data.folder) if config.data.folder else self.folder / "data"
        self.train_beton = self.data / "train.beton"
        self.val_beton = self.data / "val.beton"
        self.signals = self.folder / "signals.npz"
        self.features = self.folder / "features.npz"
        self.ticket = self.folder / "subset.npz"
        self.baseline = self.folder / "baseline"
        self.trained = self.folder / "trained"
        self.gates = self.folder / "gates.safetensors"
        self.pruned = self.folder / "pruned"
        self.final = self.folder / "final"
        self.export = self.folder / "export"
        self.results = self.folder / "results.json"
        self.report = self.folder / "report.html"
        self.log = self.folder / "log.jsonl"

    def work(self, stage: str) -> Path:
        """Where a stage keeps what it needs to resume; gone once the stage is done."""
        return self.folder / "checkpoints" / stage

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            Refused: another run is at work in it, or it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - held open for as long as the run
        except OSError as error:
            raise Refused(f"{self.folder}: cannot be used ({error.strerror}). Give another with folder=PATH.") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Refused(
                    f"{self.folder}: another run is at work in this folder. Wait for it, or give another with folder=PATH."
                ) from None
            self._check_kinds()
            for folder in (self.folder, self.folder / "stages", self.export):
                tidy(folder)
            yield

    def _check_kinds(self) -> None:
        """Refuse a file where the run has a folder, and the other way round, before any work is done."""
        folders = [self.folder / "stages", self.folder / "checkpoints", self.export]
        files = [self.log, self.signals, self.features, self.ticket, self.gates, self.results, self.report]
        for path, kind in [*((path, "folder") for path in folders), *((path, "file") for path in files)]:
            if path.exists() and not (path.is_dir() if kind == "folder" else path.is_file()):
                raise Refused(
                    f"{path}: is no {kind}, and the run has one there. Move it away, or give another folder=PATH."
                )

    def settle(self) -> None:
        """Write down what this run is: the resolved config and the versions it runs on."""
        write_text(self.folder / "config.yaml", self.config.yaml())
        write_text(self.folder / "versions.txt", versions())

    # ------------------------------------------------------------------------------------------------ what is done

    def record(self, stage: str) -> Record | None:
        """The record of ``stage``, or None where there is none that can be read."""
        try:
            stored = json.loads((self.folder / "stages" / f"{stage}.json").read_text(encoding="utf-8"))
            if stored.pop("format") != FORMAT:
                return None
            record = Record(**stored)
            kept = (record.settings, record.made_from, record.outputs, record.values)
            return record if all(isinstance(part, dict) for part in kept) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def outputs(self, stage: str) -> dict[str, Path]:
        """Where each output of ``stage`` lies, by its name."""
        return {name: self._place(name) for name in BY_NAME[stage].outputs}

    def _place(self, output: str) -> Path:
        """Where an output lies; its name begins with ``{data}`` for the folder of the images, else with that of the run."""
        return self.data / output.removeprefix(_DATA) if output.startswith(_DATA) else self.folder / output

    def _name(self, path: Path) -> str:
        """The name of an output, by which :meth:`_place` finds it."""
        return _DATA + path.name if path.parent == self.data else str(path.relative_to(self.folder))

    def settings(self, stage: str) -> dict[str, Any]:
        """The part of the config that ``stage`` depends on."""
        own = self.own(stage)
        return self._settings(stage, self.config) | ({_OWN: own} if own else {})

    def own(self, stage: str) -> dict[str, str]:
        """The text of the user's own files that ``stage`` calls a method of, as a hash, by the setting that names the method."""
        left_out = {part.removeprefix("-") for part in self._parts(stage) if part.startswith("-")}
        named = [pair for part in self._parts(stage) if not part.startswith("-")
                 for pair in _named(functools.reduce(getattr, part.split("."), self.config), part, left_out)]  # fmt: skip
        if stage == "prepare":
            named.append(("data.name", self.config.data.name))
        return {place: text for place, name in named if (text := self.own_text(name))}

    def own_text(self, method: str) -> str:
        """The text of the user's own file that has ``method``, as a hash; empty where none has."""
        return next((text for names, text in reversed(self._own) if method in names), "")  # the last one wins

    def _settings(self, stage: str, config: Config) -> dict[str, Any]:
        dump = config.model_dump(mode="json")
        found: dict[str, Any] = {}
        for part in self._parts(stage):
            *way, last = part.removeprefix("-").split(".")
            if part.startswith("-"):
                functools.reduce(operator.getitem, way, found).pop(last)
            else:
                found[part] = functools.reduce(operator.getitem, [*way, last], dump)
        return found

    def _parts(self, stage: str) -> tuple[str, ...]:
        """Parts of the config that ``stage`` depends on in this run."""
        parts = BY_NAME[stage].settings
        if stage == "train" and not self.config.train.sparsity.gates:  # it is gates that are steered to the budget
            return tuple(part for part in parts if not part.startswith("prune.keep"))
        prune = self.config.prune
        recovers = prune.search is not None and prune.search.recovery > 0
        if stage == "prune" and (prune.method == "soup" or recovers):  # it trains by this recipe
            return (*parts, "finetune")
        return parts

    @property
    def asks_baseline(self) -> bool:
        """Whether the lottery asks the run's own dense model which patches matter, so that it is more than a comparison."""
        recipes = (self.config.train, self.config.finetune)
        return any(recipe.patches is not None and recipe.patches.model == "baseline" for recipe in recipes)

    def after(self, stage: str) -> tuple[str, ...]:
        """Stages whose outputs ``stage`` reads."""
        return BY_NAME[stage].after + (("baseline",) if stage == "train" and self.asks_baseline else ())

    @property
    def probed(self) -> bool:
        """Whether the ticket is drawn, or patches are shared out, by what a probe tells. One serves every score and policy."""
        return bool(self.reads())

    def reads(self, shelves: Sequence[ModuleType] = ()) -> set[str]:
        """The signals of a probe that the ticket and a joint budget of patches are made from."""
        wants, found = self.config.select, set[str]()
        if not wants.ticket and wants.keep < 1:
            found |= lottery.reads(wants.score, wants.pick, shelves)
        if any(recipe.patches and recipe.patches.joint for recipe in (self.config.train, self.config.finetune)):
            found |= lottery.reads(wants.score, "random", shelves)
        return found

    def made_from(self, stage: str) -> dict[str, str]:
        """Identity of each stage that ``stage`` reads from, and of the files that its settings name, if they are there."""
        records = {name: self.record(name) for name in self.after(stage)}
        found = {name: record.identity for name, record in records.items() if record is not None}
        return found | {name: text for name, path in self._named(stage).items() if (text := _content(path))}

    def _named(self, stage: str) -> dict[str, str]:
        """The files, or folders of models, that settings of ``stage`` name for it to read, by the setting."""
        config, found = self.config, dict[str, str]()
        patches = getattr(getattr(config, stage, None), "patches", None)
        if patches is not None and patches.model != "baseline":
            found[_MODEL] = patches.model
        if stage == "select":
            found |= {"select.ticket": config.select.ticket or "", "select.start": config.select.start or ""}
        if stage == "score" and config.score.model is not None:  # the probe's own, in place of the run's
            found["score.model.weights"] = config.score.model.weights
        elif stage in ("score", "baseline", "train"):
            found["model.weights"] = config.model.weights
        return {name: path for name, path in found.items() if path}

    def why(self, stage: str) -> str | None:
        """Why ``stage`` has to run, in a few words; None when it is done."""
        record = self.record(stage)
        if record is None:
            return "not done yet"
        for name in {**self.outputs(stage), **record.outputs}:
            path = self._place(name)
            if not path.exists():
                return f"{path.name} is gone"
            if path.stat().st_size != record.outputs.get(name):
                return f"{path.name} was changed"
        if stage == "prepare":
            there = lies(self.config.data.path)
            if there and there != record.values.get("lies"):  # images that are gone by now have been prepared
                return "the folder of images was changed"
        # What a record does not name is newer than it: it was made with what is the default now.
        wanted = self._settings(stage, self.config)
        stood = _filled(record.settings, self._settings(stage, Config()))
        changed = list(_changes({part: stood[part] for part in stood if part in wanted}, wanted))
        if changed:
            return f"{changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}"
        then, own = record.settings.get(_OWN), self.own(stage)
        then = (
            then if isinstance(then, dict) else {}
        )  # once it was one hash of all files, whether they were used or not
        for place in {**then, **own}:
            if then.get(place) != own.get(place):
                return f"{_OWN}: the file that {place} is in was changed, or is another"
        now = self.made_from(stage)
        for name in self._named(stage):  # what a record does not name is newer than it
            if name in now and now[name] != record.made_from.get(name, now[name]):
                return (
                    f"the model in {stage}.{_MODEL} was changed"
                    if name == _MODEL
                    else f"the file in {name} was changed"
                )
        for name in self.after(stage):
            if name in now and now[name] != record.made_from.get(name):
                return f"{name} was done again"
        return None

    def outdated(self, stages: Iterable[str]) -> list[str]:
        """Those of ``stages``, in order, that stand, and were made with other settings or from what was made again since."""
        found: list[str] = []
        for stage in stages:
            if self.record(stage) is None:
                continue
            why = self.why(stage) or ""
            # A file of the user's own that is not named this time changes nothing that stands.
            if (why and not why.startswith(_OWN)) or set(self.after(stage)) & set(found):
                found.append(stage)
        return found

    def finish(self, stage: str, *, seconds: float, image_forwards: float = 0, macs: float = 0,
               values: Mapping[str, Any] | None = None, left: Iterable[Path] = ()) -> Record:  # fmt: skip
        """Write the record of a stage whose outputs stand.

        Args:
            left: outputs that it has with these settings, beside those on its list
        """
        outputs = {**self.outputs(stage), **{self._name(path): path for path in left}}
        record = Record(
            stage=stage,
            settings=self.settings(stage),
            made_from=self.made_from(stage),
            outputs={name: path.stat().st_size for name, path in outputs.items()},
            seconds=round(seconds, 3),
            image_forwards=image_forwards,
            macs=macs,
            values=dict(values or {}),
        )
        write_json(self.folder / "stages" / f"{stage}.json", {"format": FORMAT, **vars(record)})
        return record

    def forget(self, stages: Sequence[str]) -> None:
        """Let these stages run again."""
        for stage in stages:
            (self.folder / "stages" / f"{stage}.json").unlink(missing_ok=True)

    def write_event(self, event: Event) -> None:
        """Append to log.jsonl, a whole line or none.

        Raises:
            Refused: it cannot be written.
        """
        told = {"time": round(time.time(), 3), **event.record()}
        append(self.log, json.dumps(_sound(told), allow_nan=False), _ROOM)


def _sound(value: Any) -> Any:
    """``value`` as JSON knows it: no number, for one that is infinite or none."""
    if isinstance(value, Mapping):
        return {name: _sound(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sound(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _named(part: Any, place: str, left_out: Set[str]) -> Iterator[tuple[str, str]]:
    """(setting, name) of each method that a part of the config names."""
    if isinstance(part, Method):
        yield place, part.name
    elif isinstance(part, tuple):
        for one in part:
            yield from _named(one, f"{place}.{one.name}" if isinstance(one, Method) else place, left_out)
    elif isinstance(part, Section):
        for name in type(part).model_fields:
            if f"{place}.{name}" not in left_out:
                yield from _named(getattr(part, name), f"{place}.{name}", left_out)


def _filled(old: Any, default: Any) -> Any:
    """``old`` with what it lacks; what may hold any names (options, a method's) is as it is."""
    if not isinstance(old, dict) or not isinstance(default, dict) or not default:
        return old
    return {**default, **{name: _filled(value, default.get(name)) for name, value in old.items()}}


def _changes(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """``train.lr: 0.001 -> 0.0005`` for each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    elif old != new:
        yield f"{place}: {json.dumps(old)} -> {json.dumps(new)}"


def lies(path: str) -> str:
    """Changes when pictures come or go at ``path``; empty where nothing lies there.

    A file goes by its size and time, a folder by the times of the folders in it, two levels down. No picture is looked at: one
    that is replaced under its old name is found by ``prepare --again`` alone.
    """
    try:
        top = os.stat(path) if path else None
        if top is None:
            return ""
        if not stat.S_ISDIR(top.st_mode):
            return digest([top.st_size, top.st_mtime_ns])
        times, level = [["", top.st_mtime_ns]], [path]
        for _ in range(2):
            level = sorted(entry.path for folder in level for entry in os.scandir(folder) if entry.is_dir())
            times += [[os.path.relpath(folder, path), os.stat(folder).st_mtime_ns] for folder in level]
        return digest(times)
    except OSError:
        return ""


def _content(path: str) -> str:
    """Changes when the file, or the model in the folder, does; empty where none lies there."""
    try:
        files = tuple(_model_files(path)) if Path(path).is_dir() else (Path(path),)
        stands = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:
        return ""
    return _hashed(files, tuple(stands))


def _model_files(folder: str) -> list[Path]:
    return [Path(folder) / "spec.json", Path(folder) / "model.safetensors"]


@functools.lru_cache(8)
def _hashed(files: tuple[Path, ...], stands: tuple[tuple[int, int], ...]) -> str:
    return digest_of(*files)


def versions() -> str:
    """What this runs on, a line each."""
    lines = [f"python {platform.python_version()}", f"system {platform.system()} {platform.machine()}",
             f"processors {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"]  # fmt: skip
    for name in ("lotus-vit", "torch", "torchvision", "timm", "deepspeed", "ffcv", "numba", "numpy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name} {importlib.metadata.version(name)}")
    return "\n".join(lines) + "\n"
