"""Hosts that do not share the run's folder: each keeps a copy of rank 0's, and writes its own images.

Nothing is set: whoever does not see a file that rank 0 has just written stands apart. Between two stages rank 0 sends what has
changed in the folder (records, tickets, models, checkpoints); the images are not sent, since each host prepares its own, and their
fingerprints are compared.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lotus import files
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.run import Run
    from lotus.training.distributed import World

_COPY = ".copy-of-rank-0"
_OWN = (".lock", ".ranks", "log.jsonl")  # of one host alone
_IMAGES = ("train.beton", "train.json", "val.beton", "val.json")
_DATA = "{data}/"
_PATIENT = 5.0  # seconds for a file of another host to be seen


class Hosts:
    """Who stands apart. Every rank makes one at the same time, once rank 0 has the run's folder."""

    def __init__(self, run: Run, world: World) -> None:
        """
        Raises:
            Refused: a host apart has something of its own where the copy is to lie.
        """
        self._run, self._world = run, world
        self._sent: dict[str, list[int]] = {}
        name = f".seen-{world.text(secrets.token_hex(8))}"
        if world.is_main:
            files.write_text(run.folder / name, "")
        world.barrier()
        apart = not _seen(run.folder / name)
        world.barrier()
        if world.is_main:
            (run.folder / name).unlink(missing_ok=True)
        self.any = world.any(apart)
        self.copies = apart and world.local_rank == 0
        """Whether this rank writes for its host."""
        self.together(lambda: _check_own(run.folder) if self.copies else None)

    def share(self) -> None:
        """Bring the copies up to date with rank 0's folder; every rank calls."""
        self._world.barrier()
        if not self.any:
            return
        places = _listed(self._run) if self._world.is_main or self.copies else {}
        stands = {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in places.items()}
        told: dict[str, list[int]] = json.loads(self._world.text(json.dumps(stands)))
        for name, about in told.items():
            if self._sent.get(name) != about:
                content = self._world.bytes(places[name].read_bytes() if self._world.is_main else b"")
                self.together(functools.partial(self._write, name, content))
        for name, path in places.items() if self.copies else ():
            if name not in told and not name.startswith(_DATA):
                path.unlink(missing_ok=True)
        self._sent = told

    def _write(self, name: str, content: bytes) -> None:
        if self.copies:
            own = name.startswith(_DATA)
            path = self._run.data / name.removeprefix(_DATA) if own else self._run.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, content)

    def hold(self, what: str, mine: Callable[[], str]) -> None:
        """Hold what lies on this host to rank 0's; every rank calls.

        Raises:
            Refused: on all ranks, where one host has other images.
        """
        own = mine()
        other = self._world.text(own) != own
        if self._world.any(other):
            place = f"{self._run.data} of this host" if other else "another host"
            raise Refused(
                f"data: the images in {place} are not those of rank 0 ({what}). Give each host the same images, by data.path."
            )

    def together(self, action: Callable[[], object]) -> None:
        """Do ``action`` on this rank; all refuse what one refuses."""
        refusal: Refused | None = None
        try:
            action()
        except Refused as error:
            refusal = error
        except OSError as error:
            refusal = Refused(f"{self._run.folder}: cannot be written on this host ({error.strerror or error}).")
        self._world.barrier()  # it may take long
        if self._world.any(refusal):
            raise refusal or Refused("another host has refused to go on; it says why")


def _seen(file: Path) -> bool:
    """Whether a file that another host has written is there; network file systems may take a while."""
    ends = time.monotonic() + _PATIENT
    while not file.exists():
        if time.monotonic() > ends:
            return False
        time.sleep(0.1)
    return True


def _check_own(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / _COPY).exists():
        raise Refused(
            f"{folder}: this host does not see rank 0's folder, and has one of its own there. Share the folder, or move this one away."
        )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / _COPY, "A copy of the folder that rank 0 of a run writes.\n")


def _listed(run: Run) -> dict[str, Path]:
    """What is copied, by its name: of the run's folder all but what is one host's own; of images elsewhere the tickets of patches."""
    found = {}
    for here, below, names in os.walk(run.folder):
        below[:] = [name for name in below if name not in _OWN and not name.startswith(".")]
        for path in (Path(here, name) for name in names if name not in _OWN and not name.startswith(".")):
            if not path.is_symlink() and not (path.parent == run.data and path.name in _IMAGES):
                found[str(path.relative_to(run.folder))] = path
    if run.folder not in run.data.parents:
        found |= {_DATA + path.name: path for path in run.data.glob("patches-*.npz")}
    return dict(sorted(found.items()))
