"""Checkpoints that survive a kill at any moment, and any change of the number of ranks.

A checkpoint is a folder, ``checkpoints/000012``: tensors by name in safetensors, numbers in ``state.json``, and
``manifest.json`` with the size and SHA-256 of each. It is written under another name beside, fsynced, and renamed, and
only then are older ones removed; what counts is the newest folder whose manifest verifies. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lotus import files
from lotus.files import put_tensors
from lotus.training.distributed import World
from selection import regular
from selection.errors import Refused

FORMAT = 2
_NAME = re.compile(r"\d{6,}")
_STATE, _MANIFEST = "state.json", "manifest.json"


class Damaged(Exception):
    """A checkpoint that does not verify, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """File name without its ending ("weights", "moments", ...) -> name -> tensor, on the CPU."""
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they live; seen by every rank
        key: hash of the settings; a checkpoint with another key is passed over
        keep: how many stay
    """

    def __init__(self, folder: Path, *, key: str, world: World | None = None, keep: int = 2) -> None:
        self.folder, self.key, self.keep = folder, key, keep
        self._world = world or World()

    def save(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint; rank 0 does, the others wait. Older ones beyond ``keep`` go afterwards.

        Args:
            tensors: file name without its ending -> name -> tensor
            state: numbers, texts and lists of them

        Raises:
            Refused: it cannot be written, e.g. no space is left; what was there before stays.
        """
        fault: OSError | None = None
        path = self.folder / f"{(self._numbers() or [0])[-1] + 1:06d}"
        if self._world.is_main:
            try:
                files.tidy(self.folder)
                with files.folder_beside(path) as beside:
                    _write(beside, tensors, {"format": FORMAT, "key": self.key, "state": dict(state)})
            except OSError as error:
                fault = error
        if self._world.any(fault):
            why = fault.strerror or str(fault) if fault else "rank 0 could not write it"
            full = fault is not None and fault.errno in (errno.ENOSPC, errno.EDQUOT)
            cure = "Free some space" if full else "See to it"
            raise Refused(
                f"{path}: the checkpoint cannot be written: {why}. {cure}; the same command goes on from the last one."
            )
        if self._world.is_main:
            with contextlib.suppress(OSError):  # it only takes room
                for number in self._numbers()[: -self.keep]:
                    files.remove(self.folder / f"{number:06d}")
        return path

    def latest(
        self, why_not: Callable[[Mapping[str, Any]], str] = lambda state: ""
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies and has this key, and a sentence for each newer one that was passed over.

        Every rank must call; rank 0 verifies, all read.

        Args:
            why_not: why a state is not to be gone on from; empty where it is
        """
        passed: list[str] = []
        found = 0
        if self._world.is_main:
            for number in reversed(self._numbers()):
                path = self.folder / f"{number:06d}"
                try:
                    told = verify(path)
                    why = why_not(told["state"]) if told["key"] == self.key else "made with other settings"
                    if not why:
                        found = number
                        break
                    passed.append(f"{path}: {why}, passed over")
                except Damaged as damage:
                    passed.append(f"{path}: {damage}, passed over")
        found = self._world.main(found)
        return (read(self.folder / f"{found:06d}") if found else None), passed

    def _numbers(self) -> list[int]:
        try:
            return sorted(int(name) for name in os.listdir(self.folder) if _NAME.fullmatch(name))
        except (FileNotFoundError, NotADirectoryError):
            return []


def verify(path: Path) -> dict[str, Any]:
    """What ``state.json`` holds (``format``, ``key``, ``state``), once every file agrees with the manifest.

    Raises:
        Damaged: something is missing, cut short, changed, or of another format.
    """
    try:
        manifest = json.loads(regular.text(path / _MANIFEST))
        if manifest["format"] != FORMAT:
            raise Damaged(f"its format is {manifest['format']}, this version reads {FORMAT}")
        if _STATE not in manifest["files"]:
            raise Damaged(f"its manifest does not name {_STATE}")
        for name, told in manifest["files"].items():
            if Path(name).name != name:
                raise Damaged(f"its manifest names {name!r}, which is not inside")
            size = (path / name).stat().st_size
            if size != told["bytes"]:
                raise Damaged(f"{name} has {size} bytes of {told['bytes']}")
            if files.digest_of(path / name, sha256=True) != told["sha256"]:
                raise Damaged(f"{name} is not what was written")
        told = json.loads(regular.text(path / _STATE))
        return {**told, "key": told["key"], "state": dict(told["state"])}
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"it cannot be read ({error})") from None


def read(path: Path) -> Checkpoint:
    """A checkpoint that verified."""
    state = json.loads(regular.text(path / _STATE))["state"]
    return Checkpoint(path, {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}, state)


def check_fits(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse the checkpoint of another model.

    Args:
        checkpoint: as :func:`load` read it
        expected: name -> shape of each tensor in the model's state dict

    Raises:
        Refused: names the first tensor that differs.
    """
    there = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.get("weights", {}).items()}
    for name in sorted(there.keys() | expected.keys(), key=lambda name: (name in there and name in expected, name)):
        if there.get(name) != expected.get(name):
            has, needed = (shapes.get(name, "nothing") for shapes in (there, expected))
            raise Refused(
                f"{checkpoint.path}: of another model: {name} is {has} there and {needed} here. "
                f"Remove {checkpoint.path.parent}, or give the run another folder."
            )


@contextlib.contextmanager
def taken_up(checkpoint: Checkpoint) -> Iterator[None]:
    """While its parts go where they belong.

    Raises:
        Refused: one does not fit: another version of LOTUS, or of a guest, has written it.
    """
    try:
        yield
    except Refused:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Refused(
            f"{checkpoint.path}: another version has written it, and it cannot be taken up ({type(error).__name__}: {error}). Remove "
            f"{checkpoint.path.parent}, and the training begins anew."
        ) from error


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    told = {}
    for name, group in tensors.items():
        file = folder / f"{name}.safetensors"
        put_tensors(group, file)
        told[file.name] = _told(file)
    for name, content in ((_STATE, state), (_MANIFEST, {"format": FORMAT, "files": told})):
        with open(folder / name, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1)
        told[name] = _told(folder / name)


def _told(file: Path) -> dict[str, Any]:
    """What the manifest tells of a file."""
    return {"bytes": file.stat().st_size, "sha256": files.digest_of(file, sha256=True)}
