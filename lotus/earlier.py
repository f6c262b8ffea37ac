"""What a run's stages left with other settings is kept in ``RUN/earlier/N``, N for each command that made something anew.

There lie models, tickets and results under the names that they had, with their records and the config of then: ``lotus predict``,
``lotus evaluate --model`` and ``lotus compare`` take them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lotus import files
from lotus.record import written
from lotus.run import Run


class Earlier:
    """Of one command: moves what gives way, and puts back what nothing took the place of."""

    def __init__(self, run: Run) -> None:
        """Before the run's config is written anew, which is kept beside."""
        self._run = run
        config = run.folder / "config.yaml"
        self._config = written(config)
        taken = [int(path.name) for path in (run.folder / "earlier").glob("*") if path.name.isdecimal()]
        self.folder = run.folder / "earlier" / str(1 + max(taken, default=0))
        self._moved: dict[str, list[Path]] = {}

    @property
    def kept(self) -> list[str]:
        """The stages whose results were moved and have not been put back."""
        return list(self._moved)

    def keep(self, stages: Iterable[str]) -> None:
        """Move what stands of those of ``stages`` that were made otherwise than they would be now.

        Args:
            stages: that are about to run, in order

        Raises:
            Refused: it cannot be moved; says where.
        """
        for name in stages:
            anew = any(other in self._moved for other in self._run.after(name))
            if places := self._run.replaced(name, anew=anew):
                self._move(name, places)

    def _move(self, stage: str, places: list[Path]) -> None:
        with files.refusing(self.folder):
            for place in places:
                there = self.folder / place.relative_to(self._run.folder)
                there.parent.mkdir(parents=True, exist_ok=True)
                files.move(place, there)
                self._moved.setdefault(stage, []).append(place)
            if self._config and not (self.folder / "config.yaml").exists():
                files.write_text(self.folder / "config.yaml", self._config)

    def put_back(self) -> None:
        """What was moved, of stages that have left nothing in its place: one that was refused, or stopped, has changed nothing."""
        for stage, places in list(self._moved.items()):
            if not any(place.exists() for place in places):
                for place in places:
                    files.move(self.folder / place.relative_to(self._run.folder), place)
                del self._moved[stage]
        if self.folder.exists() and not self._moved:
            files.remove(self.folder)
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()
