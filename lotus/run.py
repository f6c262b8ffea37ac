"""A run is a folder of finished stages. It is handed its stages and knows none by name.

A stage is done when its record stands, its outputs stand with the sizes they were written with, its settings are
unchanged, and so is what it was made from. What a stage reads is held to the digests that were taken as it was written
(:meth:`Run.check_whole`). Nothing here needs torch: a finished run answers at once, and reads through none of its files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import operator
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any

from lotus.config import Config, Method, Section, that_count
from lotus.doctor import versions
from lotus.events import Event, sound
from lotus.files import append, digest, digest_once, tidy, write_json, write_text
from lotus.folder_lock import locked
from lotus.record import SPEC, WEIGHTS, Record, changes, content, filled, is_current, stored, written
from lotus.shelves import values, watches
from lotus.stage import Stage, of
from lotus.way import Rival, Way
from selection import lottery, methods, regular
from selection.errors import Refused

_DATA = "{data}/"
_ROOM = "Make room there, or make it writable; the same command goes on."
_OWN = "--with"


class Run:
    """The folder of a run."""

    def __init__(self, config: Config, stages: Iterable[Stage] = (), shelves: Sequence[ModuleType] = ()) -> None:
        """
        Args:
            stages: in the order in which they run
            shelves: files of the user's own (``--with``), by which the stages that call a method of theirs were done
        """
        self.config, self._watches = config, functools.partial(watches, own=shelves)
        self.stages = {stage.name: stage for stage in stages}
        # As they are now: an editor may be at work on them while the run is.
        texts = [Path(shelf.__file__).read_text(encoding="utf-8") if shelf.__file__ else "" for shelf in shelves]
        self._own = [
            ([*methods.names(shelf), *values(shelf, Way), *values(shelf, Rival)], list(brought(shelf)), digest(text))
            for shelf, text in zip(shelves, texts, strict=True)
        ]
        name = re.sub(r"[^\w.-]+", "-", config.name or "run").strip("-.") or "run"
        self.folder = Path(config.folder) if config.folder else Path("runs") / name
        self.data = Path(config.data.folder) if config.data.folder else self.folder / "data"
        self.train_beton = self.data / "train.beton"
        self.val_beton = self.data / "val.beton"
        self.signals = self.folder / "signals.npz"
        self.features = self.folder / "features.npz"
        self.ticket = self.folder / "subset.npz"
        self.gates = self.folder / "gates.safetensors"
        self.results = self.folder / "results.json"
        self.report = self.folder / "report.html"
        self.log = self.folder / "log.jsonl"
        self.ranks = self.folder / ".ranks"

    def of(self, stage: str) -> Path:
        """The folder that ``stage`` leaves."""
        return self.folder / stage

    def work(self, stage: str) -> Path:
        """Where a stage keeps what it needs to resume; gone once the stage is done."""
        return self.folder / "checkpoints" / stage

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            Refused: another run is at work in it, or it cannot be made.
        """
        with locked(self.folder):
            self.check_kinds()
            for folder in (self.folder, self.folder / "stages", self.train_beton.parent, *self._left()):
                tidy(folder)
            yield

    def check_kinds(self) -> None:
        """Before any work: whether files are where the run has files, and folders where it has folders.

        Raises:
            Refused: one is of another kind.
        """
        folders = [self.folder / "stages", self.folder / "checkpoints", *self._left()]
        files = [self.log, self.signals, self.features, self.ticket, self.gates, self.results, self.report,
                 *map(self._record_of, self.stages)]  # fmt: skip
        for path, kind in [*((path, "folder") for path in folders), *((path, "file") for path in files)]:
            if path.exists() and not (path.is_dir() if kind == "folder" else path.is_file()):
                raise Refused(
                    f"{path}: is no {kind}, and the run has one there. Move it away, or give another folder=PATH."
                )

    def _left(self) -> list[Path]:
        """The folders that stages leave in the run's."""
        parents = (path.parent for name in self.stages for path in self.outputs(name).values())
        return [folder for folder in dict.fromkeys(parents) if folder not in (self.folder, self.data)]

    def settle(self, text: str = "") -> str:
        """Write down what this run is: the resolved config (``text`` instead), and the versions it runs on; returns the config before."""
        before = written(file := self.folder / "config.yaml")
        write_text(file, text or self.config.yaml())
        write_text(self.folder / "versions.txt", versions())
        return before

    # ------------------------------------------------------------------------------------------------ what is done

    def record(self, stage: str) -> Record | None:
        """The record of ``stage``, or None where there is none that can be read, or it is not as it was written."""
        return Record.of(stored(self._record_of(stage)))

    def _record_of(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"

    def _place(self, output: str) -> Path:
        """Where an output lies; its name begins with ``{data}`` for the folder of the images, else with that of the run."""
        return self.data / output.removeprefix(_DATA) if output.startswith(_DATA) else self.folder / output

    def _name(self, path: Path) -> str:
        """The name of an output, by which :meth:`_place` finds it."""
        return _DATA + path.name if path.parent == self.data else str(path.relative_to(self.folder))

    def plan(self, until: str | None = None) -> list[str]:
        """The stages that lead to ``until``, else to the last, in order."""
        names = list(self.stages)
        if not names:
            return []
        wanted = {until or names[-1]}
        for name in reversed(names[: names.index(until or names[-1]) + 1]):
            wanted |= set(self.after(name)) if name in wanted else set()
        return [name for name in names if name in wanted]

    def outputs(self, stage: str) -> dict[str, Path]:
        """Where each output of ``stage`` lies, by its name."""
        return {name: self._place(name) for name in of(self.stages[stage].outputs, self.config)}

    def models(self) -> dict[str, Path]:
        """The folders of the models that stages leave, by the stage."""
        return {name: self.of(name) for name in self.stages if self.of(name) / SPEC in self.outputs(name).values()}

    def strangers(self) -> list[str]:
        """Folders of models here that no stage has left, those of an older LOTUS among them."""
        own = {path.name for path in self.models().values()}
        return sorted(spec.parent.name for spec in self.folder.glob("*/spec.json") if spec.parent.name not in own)

    @property
    def is_older(self) -> bool:
        """Whether records of an older LOTUS stand here."""
        records = (stored(self._record_of(name)) for name in self.stages)
        return any(one and not is_current(one) for one in records)

    def settings(self, stage: str) -> dict[str, Any]:
        """The part of the config that ``stage`` depends on."""
        own = self.own(stage)
        return self._settings(stage, self.config) | ({_OWN: own} if own else {})

    def own(self, stage: str) -> dict[str, str]:
        """The text of the user's own files that ``stage`` calls a method of, as a hash, by the setting that names the method; and of
        the one that brought the stage, by the stage's name."""
        parts = of(self.stages[stage].settings, self.config)
        left_out = {part.removeprefix("-") for part in parts if part.startswith("-")}
        named = [pair for part in parts if not part.startswith("-")
                 for pair in _named(functools.reduce(getattr, part.split("."), self.config), part, left_out)]  # fmt: skip
        named += self.stages[stage].calls(self.config).items()
        texts = {place: text for place, name in named if (text := self.own_text(name)) and not self._watches(name)}
        brought_by = [text for _, stages, text in self._own if stage in stages]
        return texts | ({stage: brought_by[-1]} if brought_by else {})

    def own_text(self, method: str) -> str:
        """The text of the user's own file that has ``method``, as a hash; empty where none has."""
        return next((text for names, _, text in reversed(self._own) if method in names), "")  # the last one wins

    def _settings(self, stage: str, config: Config) -> dict[str, Any]:
        dump = config.model_dump(mode="json")
        settings: dict[str, Any] = {}
        for part in of(self.stages[stage].settings, self.config):
            *way, last = part.removeprefix("-").split(".")
            if part.startswith("-"):
                functools.reduce(operator.getitem, way, settings).pop(last)
            else:
                settings[part] = functools.reduce(operator.getitem, [*way, last], dump)
        settings = that_count(config, settings, self._watches)
        if self.stages[stage].is_set:
            settings[f"stages.{stage}"] = asked.options if (asked := config.asked(stage)) else {}
        return settings

    def after(self, stage: str) -> tuple[str, ...]:
        """Stages whose outputs ``stage`` reads."""
        more = tuple(name for name, other in self.stages.items() if stage in other.before)
        return (*of(self.stages[stage].after, self.config), *more)

    @property
    def needs_proxy(self) -> bool:
        """Whether the ticket is drawn, or patches are shared out, by what a proxy tells. One serves every score and picker."""
        return bool(reads(self.config))

    def reads(self, shelves: Sequence[ModuleType] = ()) -> set[str]:
        """The signals of a proxy that the ticket and a joint budget of patches are made from."""
        return reads(self.config, shelves)

    def made_from(self, stage: str) -> dict[str, str]:
        """Identity of each stage that ``stage`` reads from, and of the files that its settings name, if they are there."""
        records = {name: self.record(name) for name in self.after(stage)}
        identities = {name: record.identity for name, record in records.items() if record is not None}
        named = self.stages[stage].named(self.config)
        return identities | {name: text for name, path in named.items() if (text := content(path))}

    def why(self, stage: str) -> str | None:
        """Why ``stage`` has to run, in a few words; None when it is done."""
        record = self.record(stage)
        if record is None:
            return f"{self._record_of(stage).name} was damaged" if self.is_hurt(stage) else "not done yet"
        stale = self.stages[stage].stale(self.config, record.values)
        reasons = itertools.chain(
            self._lost(stage, record), [stale] if stale else [], self._set_otherwise(stage, record),
            self._reads_otherwise(stage, record),
        )  # fmt: skip
        return next(reasons, None)

    def is_hurt(self, stage: str) -> bool:
        """Whether what ``stage`` left is not as it left it: its record, or an output that is gone or of another size."""
        if (record := self.record(stage)) is not None:
            return any(self._lost(stage, record))
        file = self._record_of(stage)
        return file.exists() and (not (told := stored(file)) or is_current(told))

    def _lost(self, stage: str, record: Record) -> Iterator[str]:
        """Outputs that are not as they were left. One that only these settings leave is told by what they changed."""
        for name, size in record.outputs.items():
            path = self._place(name)
            if not path.exists():
                yield f"{path.name} is gone"
            elif path.stat().st_size != size:
                yield f"{path.name} was changed"

    def _set_otherwise(self, stage: str, record: Record) -> Iterator[str]:
        # What a record does not name is newer than it: it was made with what is the default now.
        wanted = self._settings(stage, self.config)
        stood = that_count(self.config, filled(record.settings, self._settings(stage, Config())), self._watches)
        changed = list(changes({part: stood[part] for part in stood if part in wanted}, wanted))
        if changed:
            yield f"{changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}"
        then, own = record.settings.get(_OWN, {}), self.own(stage)
        for place in {**then, **own}:
            if then.get(place) != own.get(place):
                yield f"{_OWN}: the file that {place} is in was changed, or is another"

    def _reads_otherwise(self, stage: str, record: Record) -> Iterator[str]:
        now = self.made_from(stage)
        for name, read in self.stages[stage].named(self.config).items():  # what a record does not name is newer than it
            if name in now and now[name] != record.made_from.get(name, now[name]):
                yield f"the {'model' if Path(read).is_dir() else 'file'} in {name} was changed"
        for name in self.after(stage):
            if name in now and now[name] != record.made_from.get(name):
                yield f"{name} was done again"
        for name, path in self.outputs(stage).items():
            if name not in record.outputs:
                yield f"{path.name} was not made then"

    def replaced(self, stage: str, *, anew: bool = False) -> list[Path]:
        """The files and folders of ``stage`` in the run's, its record last, where they are whole and would now be made otherwise.

        Args:
            anew: what it reads is about to be made otherwise
        """
        record = self.record(stage)
        if record is None or any(self._lost(stage, record)) or not (anew or self.why(stage)):
            return []
        own = {self.folder / Path(name).parts[0]: None for name in record.outputs if not name.startswith(_DATA)}
        return [*own, self._record_of(stage)] if own else []

    @property
    def is_done(self) -> bool:
        """Whether nothing at all is to be done."""
        return all(self.why(name) is None for name in self.plan())

    def read_by(self, stages: Sequence[str], anew: Iterable[str]) -> list[str]:
        """Of ``stages``, in order, those that stand and are read, near or far, by one that has to run.

        Args:
            anew: stages that are to run whatever stands
        """
        runs: set[str] = set(anew)
        for name in stages:
            if self.why(name) is not None or runs & set(self.after(name)):
                runs.add(name)
        wanted = set(runs)
        for name in reversed(stages):
            wanted |= set(self.after(name)) if name in wanted else set()
        return [name for name in stages if name in wanted - runs]

    def check_whole(self, stages: Iterable[str]) -> None:
        """Hold what ``stages`` left to what they wrote: it is read through, once a process; about a second a gigabyte.

        Raises:
            Refused: a file is another; says which, and how it comes back.
        """
        for stage in stages:
            self._check_digests(stage)
            self.stages[stage].whole(self)

    def check_file(self, path: Path) -> None:
        """:meth:`check_whole` of one file that a stage left.

        Raises:
            Refused: it is another.
        """
        for stage in self.stages:
            self._check_digests(stage, path)

    def _check_digests(self, stage: str, only: Path | None = None) -> None:
        if (record := self.record(stage)) is None:
            return
        for name, known in record.digests.items():
            if only not in (None, path := self._place(name)):
                continue
            # Weights without a spec are nobody's.
            cure = f"Delete {path.parent if path.name == SPEC else path}, and lotus run makes it again."
            try:
                same = path.stat().st_size == record.outputs.get(name) and digest_once(path) == known
            except OSError as error:
                raise Refused(f"{path}: cannot be read ({error.strerror}). {cure}") from None
            if not same:
                raise Refused(f"{path}: its bytes have changed since the stage {stage} wrote it. {cure}")

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
            stage: its name
            seconds: that it took
            image_forwards: forward passes of an image that it spent; a training step counts three
            macs: multiply-accumulates that it spent
            values: what it tells, by name
            left: outputs that it has with these settings, beside those on its list
        """
        outputs = {**self.outputs(stage), **{self._name(path): path for path in left}}
        for spec in [path for path in outputs.values() if path.name == SPEC]:  # a model's weights lie beside it
            outputs |= {self._name(path): path for path in sorted(spec.parent.glob(f"*{WEIGHTS}"))}
        record = Record(
            stage=stage,
            settings=self.settings(stage),
            made_from=self.made_from(stage),
            outputs={name: path.stat().st_size for name, path in outputs.items()},
            seconds=round(seconds, 3),
            image_forwards=image_forwards,
            macs=macs,
            values=dict(values or {}),
            digests={name: digest_once(path) for name, path in outputs.items() if not name.startswith(_DATA)},
        )
        write_json(self._record_of(stage), record.sealed())
        return record

    def written_again(self, path: Path) -> None:
        """An output of a finished stage was written anew from what stands: its record tells of it as it is now."""
        name = self._name(path)
        for stage in self.stages:
            record = self.record(stage)
            if record is None or name not in record.outputs:
                continue
            outputs, digests = (
                {**record.outputs, name: path.stat().st_size},
                {**record.digests, name: digest_once(path)},
            )
            write_json(self._record_of(stage), dataclasses.replace(record, outputs=outputs, digests=digests).sealed())

    def forget(self, stages: Sequence[str]) -> dict[str, str]:
        """Let these stages run again; returns the records that stood, for :meth:`recall`."""
        stood: dict[str, str] = {}
        for stage in stages:
            if self.record(stage) is not None:
                stood[stage] = regular.text(self._record_of(stage))
            self._record_of(stage).unlink(missing_ok=True)
        return stood

    def recall(self, stood: Mapping[str, str]) -> None:
        """Put records back that :meth:`forget` took away, of stages that were not done again, and whose outputs are as they were."""
        for stage, text in stood.items():
            if self._record_of(stage).exists():
                continue
            event = json.loads(text)
            places = {name: self._place(name) for name in event["outputs"]}
            if all(
                path.is_file() and path.stat().st_size == event["outputs"][name] and event["digests"].get(name) in (None, digest_once(path))
                for name, path in places.items()
            ):  # fmt: skip
                write_text(self._record_of(stage), text)

    def write_event(self, event: Event) -> None:
        """Append to log.jsonl, a whole line or none.

        Raises:
            Refused: it cannot be written.
        """
        append(self.log, json.dumps(sound({"time": round(time.time(), 3), **event.record()}), allow_nan=False), _ROOM)


def brought(shelf: ModuleType) -> dict[str, Stage]:
    """The stages that a file of the user's own brings, by name."""
    return values(shelf, Stage)


def reads(config: Config, shelves: Sequence[ModuleType] = ()) -> set[str]:
    """The signals of a proxy that the ticket and a joint budget of patches are made from. One proxy serves every score and picker."""
    request, signals = config.select, set[str]()
    if not request.ticket and request.keep < 1 and not config.watches_itself:
        scored = lottery.goes_by_score(request.pick, shelves)
        signals |= lottery.reads(request.score if scored else None, request.pick, shelves)
    if any(recipe.patches and recipe.patches.joint for recipe in (config.train, config.finetune)):
        signals |= lottery.reads(request.score, None, shelves)
    return signals


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
