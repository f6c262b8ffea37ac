"""The stage ``prepare``: the images, written as .beton files."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Config, Data
from lotus.events import Said
from lotus.files import digest
from lotus.run import Run
from lotus.stage import Outcome, Stage, Work
from lotus.stages.context import Context
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.data.source import Source


def prepare(context: Context) -> Work:
    from lotus.data import beton, folders
    from lotus.data.dataset import open_data
    from lotus.data.loader import writer

    run, data = context.run, context.config.data
    here = _lie(data)
    train, val = open_data(data, context.shelves)
    yield Said("prepare", f"validates on {_told(val)}")
    for note in filter(None, (train.note, val.note)):
        yield Said("prepare", note, level="warning")
    if train.root and (passed := folders.unread(data.path)):
        yield Said("prepare", passed, level="warning")
    for source, file in ((train, run.train_beton), (val, run.val_beton)):
        yield from beton.prepare(source, file, data, choose=writer, anew=context.anew)
    manifest = context.manifest()
    values = {"images": manifest.n, "classes": len(manifest.classes), "skipped": len(manifest.skipped)}
    return Outcome(values={**values, "fingerprint": _identity(run), "lies": here or _lie(data)})


def _identity(run: Run) -> str:
    from lotus.data.beton import Manifest

    return digest([Manifest.load(file).fingerprint for file in (run.train_beton, run.val_beton)])


def _told(val: Source) -> str:
    """Which images validate, and how many of which classes."""
    classes = len(np.unique(val.labels))
    some = "" if classes == len(val.classes) else f" of {len(val.classes)}"
    return f"{val.where}: {len(val):,} images in {classes}{some} classes"


def lies(path: str) -> str:
    """Changes when pictures come or go at ``path``; empty where nothing lies there.

    A file, and each of several shards, goes by its size and time, a folder by the times of the folders in it, two levels down. No picture is looked at: one
    that is replaced under its old name is found by ``prepare --again`` alone.
    """
    from lotus.data import tar_shards

    try:
        inside = [[os.path.basename(file), *_stamp(file)] for file in tar_shards.files(path)]
        if inside and not os.path.isdir(path):
            return digest(inside)
        top = os.stat(path) if path else None
        if top is None:
            return ""
        if not stat.S_ISDIR(top.st_mode):
            return digest(_stamp(path))
        times, level = [["", top.st_mtime_ns]], [path]
        for _ in range(2):
            level = sorted(entry.path for folder in level for entry in os.scandir(folder) if entry.is_dir())
            times += [[os.path.relpath(folder, path), os.stat(folder).st_mtime_ns] for folder in level]
        return digest(times + inside)
    except (OSError, Refused):
        return ""


def _stamp(file: str) -> list[int]:
    about = os.stat(file)
    return [about.st_size, about.st_mtime_ns]


def _lie(data: Data) -> str:
    """As :func:`lies`, of what trains and, where that has a place of its own, of what validates."""
    return lies(data.path) + lies(str(data.options.get("val", "")))


def _stale(config: Config, values: Mapping[str, Any]) -> str | None:
    there = _lie(config.data)
    if there and there != values.get("lies"):  # images that are gone by now have been prepared
        return "the folder of images was changed"
    return None


def _whole(run: Run) -> None:
    from lotus.data import beton

    for file in (run.train_beton, run.val_beton):
        beton.verify(file, through=False)


# How pixels are decoded (data.loader, data.workers) and where they lie (data.folder) change no result of a stage.
_PIXELS = ("name", "path", "options", "write", "max_side", "jpeg_quality", "smart_threshold", "jpeg_share", "damaged")

STAGE = Stage(
    "prepare",
    "write the images as .beton files",
    prepare,
    settings=tuple(f"data.{name}" for name in _PIXELS),
    outputs=("{data}/train.json", "{data}/train.beton", "{data}/val.json", "{data}/val.beton"),
    calls=lambda config: {"data.name": config.data.name},
    stale=_stale,
    whole=_whole,
    identity=_identity,
)
