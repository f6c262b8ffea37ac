"""Tickets on the command line: what stands behind one, in and out as files of others. Needs no torch.

Others count the images of a data set as it comes; LOTUS counts those that train: without what it held out for validation and what it
found damaged. Wherever the data are at hand, files of others go by the others' count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from lotus import config
from lotus.config import Config
from lotus.data import beton, class_folders
from lotus.data.dataset import open_data
from lotus.data.pictures import Pixels
from lotus.data.source import Source
from lotus.run import Run
from selection import exchange, incoming
from selection.errors import Refused
from selection.exchange import Images, Words
from selection.incoming import Incoming
from selection.signals import Signals
from selection.subset import Known, Subset

WHERE = "a run's folder, a config, signals.npz, train.beton, embeddings or a table of others, or a folder of pictures"

_FLAGS = ("column", "order", "negate", "index", "keep", "seed", "force", "paths", "labels")
FLAGS = Words(
    {"kind": "--as"} | {name: f"--{name}" for name in _FLAGS}, " ", "Give --data a run, a config or a folder of files."
)
"""What refusals of selection call what is said on the command line."""


@dataclass(eq=False)
class Data:
    """The images behind a ticket, as far as they are at hand."""

    where: str
    settings: Config | None = None
    """How the data set is opened."""
    stored: Path | None = None
    """train.beton."""
    recorded: Path | None = None
    """signals.npz."""
    shelves: Sequence[ModuleType] = ()
    given: Incoming | None = None
    """What others made of them: embeddings or scores."""

    @cached_property
    def signals(self) -> Signals | None:
        """What was recorded of these very images; None where nothing was."""
        if self.given is not None:
            return self.given.signals
        signals = Signals.load(self.recorded) if self.recorded is not None else None
        if signals is not None and self._manifest is not None and signals.fingerprint != self._manifest.fingerprint:
            return None
        return signals

    @cached_property
    def source(self) -> Source | None:
        """The data set itself; it is listed, or read, when it is asked for."""
        if self.settings is None:
            return None
        return open_data(self.settings.data, self.shelves)[0]

    @cached_property
    def _manifest(self) -> beton.Manifest | None:
        return beton.Manifest.load(self.stored) if self.stored is not None else None

    def images(self, *, index: str = "") -> Images:
        """What files of others are held to.

        Args:
            index: ``"row"``: others count as LOTUS does; ``"source"``: as the data set comes; empty: the second, where it is known.

        Raises:
            Refused: the data set is not the one that was prepared, or how it comes is not known and asked for.
        """
        if index == "source" and self.settings is None:
            raise Refused(
                f"--index source: {self.where} does not say how the data set comes. Give --data a run or a config."
            )
        if self.settings is None or index == "row":
            fingerprint, labels, classes = self._own()
            given = None if self.given is None else self.given.names
            return Images(len(labels), fingerprint, labels, classes, given, say=FLAGS)
        source = self.source
        assert source is not None
        rows, fingerprint = self._train(source)
        # Of images that are no files the name is ours alone: nobody could read it back.
        names = [os.path.relpath(source.name(row), source.root) for row in rows.tolist()] if source.root else None
        numbers = rows if source.rows is None else source.rows[rows]
        counted = source.whole or len(source)
        return Images(
            len(rows), fingerprint, source.labels[rows], source.classes, names, numbers, counted,
            said=index == "source", say=FLAGS, root=source.root,
        )  # fmt: skip

    def _train(self, source: Source) -> tuple[npt.NDArray[np.int64], str]:
        """Which of the source's images train, in order, and the fingerprint of these: damaged ones were left out."""
        rows = np.arange(len(source))
        if self._manifest is None:
            return rows, source.fingerprint
        if self._manifest.source != source.fingerprint:
            raise Refused(
                f"{self.where}: its data set has changed since it was prepared. Prepare it again, or take the rows as they "
                "are counted there: --index row."
            )
        gone = {entry["name"] for entry in self._manifest.skipped}
        if gone:
            rows = np.array([row for row in rows.tolist() if source.name(row) not in gone])
        return rows, self._manifest.fingerprint

    def _own(self) -> tuple[str, npt.NDArray[np.int64], tuple[str, ...]]:
        """Fingerprint, labels and classes of the images that LOTUS counts."""
        if self._manifest is not None and self.stored is not None:
            return self._manifest.fingerprint, beton.labels(self.stored), self._manifest.classes
        if self.signals is not None:
            return self.signals.fingerprint, self.signals["labels"], self.signals.classes
        assert self.source is not None
        return self.source.fingerprint, self.source.labels, self.source.classes

    @property
    def fingerprint(self) -> str:
        return self._own()[0]

    def reader(self) -> Callable[[int], Pixels] | None:
        """Row -> pixels; None where none are at hand."""
        if self.stored is not None:
            stored = self.stored
            return lambda row: beton.image(stored, row)
        source = self.source
        return None if source is None else source.read


def behind(where: str | Path, shelves: Sequence[ModuleType] = (), *, flag: str = "--data ") -> Data:
    """The data that ``where`` names: see :data:`WHERE`; ``flag`` is what stands before it on the command line.

    Raises:
        Refused: it is none of these.
    """
    path = Path(where)
    if not path.exists():
        raise Refused(f"{flag}{where}: there is nothing. Give {WHERE}.")
    if path.is_dir() and not (path / "config.yaml").is_file():
        return Data(str(where), Config(data=config.Data(name="imagefolder", path=str(where))), shelves=shelves)
    if path.is_dir() or path.suffix in (".yaml", ".yml"):
        settings = config.read(path / "config.yaml" if path.is_dir() else path)
        if path.is_dir():
            settings = settings.model_copy(update={"folder": str(path)})
        run = Run(settings)
        stored = run.train_beton if run.train_beton.is_file() else None
        return Data(str(where), settings, stored, run.signals if run.signals.is_file() else None, shelves)
    if path.suffix == ".beton":
        return Data(str(where), stored=path)
    if path.suffix == ".npz" and incoming.is_ours(path):
        return Data(str(where), recorded=path)
    if path.suffix.lower() in incoming.ENDINGS:
        return Data(str(where), given=incoming.read(path))
    raise Refused(f"{flag}{where}: it is none of these: {WHERE}.")


def opened(file: str | Path, data: str = "", shelves: Sequence[ModuleType] = ()) -> tuple[Subset, Data | None]:
    """A ticket, or that of a run's folder, and the data behind it: ``data``, or the run in whose folder it lies.

    Raises:
        Refused: no ticket, no such data.
    """
    path = Path(file)
    if path.is_dir():
        path = path / "subset.npz"
        if not path.is_file():
            raise Refused(f"{file}: no ticket in this folder yet. Run: lotus score CONFIG, then lotus run CONFIG.")
    subset = Subset.load(path)
    if data:
        return subset, behind(data, shelves)
    return subset, behind(path.parent, shelves) if (path.parent / "config.yaml").is_file() else None


def recorded(
    signals: str | Path, subset: Subset, shelves: Sequence[ModuleType] = (), given: Incoming | None = None
) -> Data:
    """The data behind a ticket drawn from ``signals``: the run in whose folder they lie, if it is of the same, else they alone.

    Args:
        signals: the file
        subset: the ticket, whose fingerprint tells its data
        shelves: modules with data sets of the user's own
        given: what was read of them
    """
    folder = Path(signals).parent
    if (folder / "config.yaml").is_file():
        data = behind(folder, shelves)
        if data.fingerprint == subset.fingerprint:
            return data
    return behind(signals, shelves) if given is None else Data(str(signals), given=given)


@dataclass(frozen=True)
class Export:
    """How a ticket is written for others: what ``lotus ticket export`` can be told."""

    kind: str = ""
    """``"folder"``, ``"beton"``; empty: by the ending of the file's name, which of a folder is none."""
    index: str = ""
    """How a list counts the images: see :meth:`Data.images`."""
    paths: bool = False
    labels: bool = False
    weights: bool = False
    copy: bool = False
    """In a folder, copies in place of links."""
    force: bool = False
    """Of data with another fingerprint, and over a file that is there."""

    @property
    def by_path(self) -> bool:
        return self.paths or self.labels


def export(subset: Subset, data: Data | None, out: str | Path, how: Export = Export()) -> list[str]:
    """Write a ticket as a file of others, or as a folder of images by class.

    Returns:
        Sentences: what was written.

    Raises:
        Refused: the ticket is of other data, there is a file already, or what is asked for needs data that are not at hand.
    """
    out = Path(out)
    kind = how.kind or out.suffix[1:] or "folder"
    if kind != "folder" and out.exists() and not how.force:
        raise Refused(f"{out}: is there already. Give another name, remove it, or say --force to write over it.")
    notes = []
    if data is not None:
        notes += held(subset, data, force=how.force, risk="another image may come out under each row")
    elif kind in ("folder", "beton") or how.by_path:
        raise Refused(f"{out}: needs the images. Say where they are: --data, {WHERE}.")
    if data is not None and kind == "beton":
        notes.append(_beton(subset, data, out))
    elif data is not None and kind == "folder":
        images, read = data.images(), data.reader()
        notes.append(
            class_folders.write(subset, images, out, source=data.source, read=read, copy=how.copy, where=data.where)
        )
    else:
        notes.append(_list(subset, data, out, how))
    return notes + _left(subset, kind, how)


def _left(subset: Subset, kind: str, how: Export) -> list[str]:
    """A sentence where weights are not written."""
    pictures = kind in ("beton", "folder")
    if kind in ("csv", "parquet") or (how.weights and not pictures) or np.ptp(subset.weights) == 0:
        return []
    more = "" if pictures else ", and --weights writes them"
    return [f"the weights of this ticket are left behind: a .csv has them{more}"]


def held(subset: Subset, data: Data, *, force: bool, risk: str) -> list[str]:
    """Hold a ticket to the data behind it.

    Returns:
        A sentence where ``force`` let pass what does not fit.

    Raises:
        Refused: it is of other data.
    """
    fingerprint, labels, _ = data._own()
    if subset.fingerprint == fingerprint and subset.total == len(labels):
        return []
    if not force:
        try:
            subset.check(fingerprint, len(labels))
        except Refused as error:
            raise Refused(f"{error} Or go on with --force, at the risk that {risk}.") from None
    if subset.total != len(labels):
        raise Refused(
            f"ticket: of {subset.total} images, and {data.where} has {len(labels)}. Nothing can force these together."
        )
    return [f"forced: the ticket is of data {subset.fingerprint} and this is {fingerprint}; {risk}"]


def _beton(subset: Subset, data: Data, out: Path) -> str:
    if data.stored is None:
        raise Refused(f"{out}: {data.where} has no train.beton. Run: lotus prepare CONFIG.")
    part = beton.part(data.stored, subset.rows, out)
    return f"{part.n} images, {part.bytes / 1e6:.1f} MB, byte for byte; row i is the i-th of the ticket"


def _list(subset: Subset, data: Data | None, out: Path, how: Export) -> str:
    images = _numbered(subset, data, out, how)
    exchange.write(subset, out, images, labels=how.labels, paths=how.paths, weights=how.weights)
    count = "the data set as it comes" if images.index is not None else "the images that LOTUS trains on"
    return f"{len(subset)} images by {'path' if how.by_path else 'their index in ' + count}"


def _numbered(subset: Subset, data: Data | None, out: Path, how: Export) -> Images:
    """How the images of a list are counted. LOTUS' own rows have to be asked for: a reader would take them for others'."""
    if not (how.index or how.by_path) and (data is None or data.settings is None):
        raise Refused(
            f"{out}: {'the ticket' if data is None else data.where} does not say how the data set comes, with the images that were held "
            f"out or damaged. Give --data a run, a config or a folder; or --index row for the rows of those that train, with which "
            "lotus ticket import takes it back."
        )
    if data is not None:
        return data.images(index="" if how.by_path else how.index)
    if how.index == "source":
        raise Refused(f"--index source: say how the data set comes: --data, {WHERE}.")
    labels = subset.labels if subset.labels is not None else np.zeros(subset.total, np.int64)
    return Images(subset.total, subset.fingerprint, labels, subset.classes, say=FLAGS)


@dataclass(frozen=True)
class Import:
    """How a file of others is taken: what ``lotus ticket import`` can be told. See :func:`selection.exchange.read`."""

    kind: str = ""
    column: str = ""
    order: str = "index"
    index: str = ""
    """How numbers in it count the images: see :meth:`Data.images`."""
    negate: bool = False
    keep: float | None = None
    """Of scores, the fraction of the highest that becomes a ticket; None: they stay scores."""
    seed: int = 0
    """For ties among them."""
    force: bool = False
    """Of data that do not fit; a ticket of LOTUS is bound to them."""


def bring(file: str | Path, data: Data, how: Import = Import()) -> tuple[Subset | Signals, list[str]]:
    """A ticket, or signals with the score ``given``, out of a file of others; and sentences: what it was taken for.

    Raises:
        Refused: see :func:`selection.exchange.read`.
    """
    path = Path(file)
    if _is_ticket(path):
        return _bound(path, data, how)
    images, keep, seed = data.images(index=how.index), how.keep, how.seed
    contents = exchange.read(
        path, images, kind=how.kind, column=how.column, order=how.order, negate=how.negate, force=how.force
    )
    if seed and (contents.rows is not None or keep is None):
        raise Refused(
            f"--seed {seed}: decides among equal scores when --keep takes the highest, and nothing is drawn from {file}. Leave it out."
        )
    notes = [f"taken for {contents.told}", *contents.warnings]
    if how.order == "class":
        notes.append(
            "within a class they are taken in the order of the index: code that sorts unstably (data_diet) need not agree"
        )
    if contents.rows is None and keep is None:
        signals = exchange.scores(contents, images, name=str(path), beside=data.signals)
        return signals, [*notes, "draw from them with: lotus select FILE --score given --pick ccs --keep 0.3"]
    return exchange.ticket(contents, images, name=path.name, keep=keep, seed=seed, force=how.force), notes


def _bound(path: Path, data: Data, how: Import) -> tuple[Subset, list[str]]:
    """A ticket of LOTUS, of this data."""
    said = [FLAGS(part.name) for part in fields(how) if getattr(how, part.name) != part.default]
    if strange := [flag for flag in said if flag != FLAGS("force")]:
        raise Refused(
            f"{', '.join(strange)}: {path} is a ticket of LOTUS, which says itself which images stay. Leave it out; lotus select "
            "draws another, and lotus ticket export makes a list of its rows."
        )
    subset = Subset.load(path)
    risk = "its rows stand for other images, and training goes on them unnoticed"
    notes = held(subset, data, force=how.force, risk=risk)
    fingerprint, labels, classes = data._own()
    bound = Subset(
        subset.rows, subset.total, fingerprint=fingerprint, weights=subset.weights, keep=subset.keep,
        origin={**subset.origin, **({"forced": True} if notes else {})}, known=Known(labels, classes, subset.scores),
    )  # fmt: skip
    return bound, notes or ["it is a ticket of this data already"]


def _is_ticket(path: Path) -> bool:
    """Whether a file says of itself that LOTUS wrote it. One that cannot be opened may be anything."""
    if path.suffix != ".npz":
        return False
    try:
        with np.load(path, allow_pickle=False) as archive:
            return "about" in archive.files
    except Exception:
        return False
