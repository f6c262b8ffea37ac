"""Tickets on the command line: what stands behind one, in and out as files of others. Needs no torch.

Others count the images of a data set as it comes; LOTUS counts those that train: without what it held out for validation and what it
found damaged. Wherever the data are at hand, files of others go by the others' count.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus import config, files
from lotus.config import Config
from lotus.data import beton
from lotus.data.dataset import open_data
from lotus.data.pictures import Pixels
from lotus.data.source import Source
from lotus.run import Run
from selection import exchange
from selection.errors import Refused
from selection.exchange import Images, Words
from selection.signals import Signals
from selection.subset import Subset

WHERE = "a run's folder, a config, signals.npz, train.beton, or a folder of pictures"

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

    @cached_property
    def signals(self) -> Signals | None:
        """What was recorded of these very images; None where nothing was."""
        found = Signals.load(self.recorded) if self.recorded is not None else None
        return (
            found
            if found is None or self._manifest is None or found.fingerprint == self._manifest.fingerprint
            else None
        )

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
            return Images(len(labels), fingerprint, labels, classes, say=FLAGS)
        source = self.source
        assert source is not None
        rows, fingerprint, labels = np.arange(len(source)), source.fingerprint, source.labels
        if self._manifest is not None:
            if self._manifest.source != source.fingerprint:
                raise Refused(
                    f"{self.where}: its data set has changed since it was prepared. Prepare it again, or take the rows as they "
                    "are counted there: --index row."
                )
            gone = {entry["name"] for entry in self._manifest.skipped}
            if gone:
                rows = np.array([row for row in rows.tolist() if source.name(row) not in gone])
            fingerprint, labels = self._manifest.fingerprint, labels[rows]
        # Of images that are no files the name is ours alone: nobody could read it back.
        names = [os.path.relpath(source.name(row), source.root) for row in rows.tolist()] if source.root else None
        numbers = rows if source.rows is None else source.rows[rows]
        counted = source.whole or len(source)
        return Images(
            len(rows), fingerprint, labels, source.classes, names, numbers, counted, said=index == "source", say=FLAGS
        )

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


def behind(where: str | Path, shelves: Sequence[ModuleType] = ()) -> Data:
    """The data that ``where`` names: see :data:`WHERE`.

    Raises:
        Refused: it is none of these.
    """
    path = Path(where)
    if not path.exists():
        raise Refused(f"--data {where}: there is nothing. Give {WHERE}.")
    if path.is_dir() and not (path / "config.yaml").is_file():
        return Data(str(where), Config(data=config.Data(name="imagefolder", path=str(where))), shelves=shelves)
    if path.is_dir() or path.suffix in (".yaml", ".yml"):
        settings = config.read(path / "config.yaml" if path.is_dir() else path)
        if path.is_dir():
            settings = settings.model_copy(update={"folder": str(path)})
        run = Run(settings)
        return Data(
            str(where),
            settings,
            run.train_beton if run.train_beton.is_file() else None,
            run.signals if run.signals.is_file() else None,
            shelves,
        )
    if path.suffix == ".beton":
        return Data(str(where), stored=path)
    if path.suffix == ".npz":
        return Data(str(where), recorded=path)
    raise Refused(f"--data {where}: it is none of these: {WHERE}.")


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


def recorded(signals: str | Path, subset: Subset, shelves: Sequence[ModuleType] = ()) -> Data:
    """The data behind a ticket drawn from ``signals``: the run in whose folder they lie, if it is of the same, else they alone."""
    folder = Path(signals).parent
    if (folder / "config.yaml").is_file():
        data = behind(folder, shelves)
        if data.fingerprint == subset.fingerprint:
            return data
    return behind(signals, shelves)


def export(
    subset: Subset,
    data: Data | None,
    out: str | Path,
    *,
    kind: str = "",
    index: str = "",
    paths: bool = False,
    labels: bool = False,
    copy: bool = False,
    force: bool = False,
) -> list[str]:
    """Write a ticket as a file of others, or as a folder of images by class.

    Args:
        kind: ``"folder"``, ``"beton"``; empty: by the ending of ``out``, which of a folder is none.
        copy: in a folder, copies in place of links.
        force: of data with another fingerprint, and over a file that is there.

    Returns:
        Sentences: what was written.

    Raises:
        Refused: the ticket is of other data, there is a file already, or what is asked for needs data that are not at hand.
    """
    out = Path(out)
    kind = kind or ("folder" if not out.suffix else out.suffix[1:])
    if kind != "folder" and out.exists() and not force:
        raise Refused(f"{out}: is there already. Give another name, remove it, or say --force to write over it.")
    told = []
    if data is not None:
        told += held(subset, data, force=force, risk="another image may come out under each row")
    if (kind in ("folder", "beton") or paths or labels) and data is None:
        raise Refused(f"{out}: needs the images. Say where they are: --data, {WHERE}.")
    if kind == "beton":
        assert data is not None
        if data.stored is None:
            raise Refused(f"{out}: {data.where} has no train.beton. Run: lotus prepare CONFIG.")
        manifest = beton.part(data.stored, subset.rows, out)
        told.append(
            f"{manifest.n} images, {manifest.bytes / 1e6:.1f} MB, byte for byte; row i is the i-th of the ticket"
        )
    elif kind == "folder":
        assert data is not None
        told.append(_folder(subset, data, out, copy))
    else:
        images = _numbered(subset, data, index, out, needs=paths or labels)
        exchange.write(subset, out, images, labels=labels, paths=paths)
        count = "the data set as it comes" if images.index is not None else "the images that LOTUS trains on"
        told.append(f"{len(subset)} images by {'path' if paths or labels else 'their index in ' + count}")
    if kind != "csv" and np.ptp(subset.weights) > 0:
        told.append("the weights of this ticket are left behind: a .csv has them")
    return told


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


def _numbered(subset: Subset, data: Data | None, index: str, out: Path, *, needs: bool) -> Images:
    """How the images of a list are counted. LOTUS' own rows have to be asked for: a reader would take them for others'."""
    if not (index or needs) and (data is None or data.settings is None):
        raise Refused(
            f"{out}: {'the ticket' if data is None else data.where} does not say how the data set comes, with the images that were held "
            f"out or damaged. Give --data a run, a config or a folder; or --index row for the rows of those that train, with which "
            "lotus ticket import takes it back."
        )
    if data is not None:
        return data.images(index="" if needs else index)
    if index == "source":
        raise Refused(f"--index source: say how the data set comes: --data, {WHERE}.")
    labels = subset.labels if subset.labels is not None else np.zeros(subset.total, np.int64)
    return Images(subset.total, subset.fingerprint, labels, subset.classes, say=FLAGS)


def _folder(subset: Subset, data: Data, out: Path, copy: bool) -> str:
    """Images by class: links to their files, hard links or copies where the file system has none; pictures of those that are no files."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out}: is there and not empty. Give another place, or delete it.")
    images = data.images() if data.settings is not None else None
    names = images.names if images is not None and data.source is not None and data.source.root else None
    read = data.reader()
    if names is None and read is None:
        raise Refused(f"{out}: needs the images, and {data.where} holds none. Give --data a run, a config or a folder.")
    labels = (images.labels if images is not None else data._own()[1])[subset.rows]
    classes = images.classes if images is not None else data._own()[2]
    folders = [_plain(classes[label] if label < len(classes) else str(label)) for label in range(labels.max() + 1)]
    if len(set(folders)) < len(folders):
        folders = [f"{number:04d}-{name}" for number, name in enumerate(folders)]
    kinds: dict[str, int] = {}
    with files.refusing(out), files.folder_beside(out) as beside:
        for label in np.unique(labels).tolist():
            (beside / folders[label]).mkdir(parents=True)
        for row, label in zip(subset.rows.tolist(), labels.tolist(), strict=True):
            home = beside / folders[label]
            if names is not None and data.source is not None:
                file = Path(data.source.root) / names[row]
                inside = Path(names[row]).parts
                # class/picture.jpg, whatever lies between; two of one name in folders of a class stay apart by theirs.
                name = "-".join(inside[1:]) if len(inside) > 1 else inside[0]
                way = _link(file, home / name, copy)
            else:
                from PIL import Image

                assert read is not None
                Image.fromarray(read(row)).save(home / f"{row:07d}.png")
                way = "pictures"
            kinds[way] = kinds.get(way, 0) + 1
    return f"{len(subset)} images in {len(set(labels.tolist()))} folders: {', '.join(f'{n} {way}' for way, n in kinds.items())}"


def _link(file: Path, place: Path, copy: bool) -> str:
    if not file.is_file():
        raise Refused(f"{file}: is gone. Put it back, or prepare the data again and draw a new ticket.")
    tries: list[tuple[str, Callable[[], Any]]] = [
        ("links", lambda: place.symlink_to(file.resolve())),
        ("hard links", lambda: os.link(file.resolve(), place)),
        ("copies", lambda: shutil.copyfile(file, place)),
    ]
    for way, make in tries[2:] if copy else tries[:2]:
        try:
            make()
            return way
        except OSError:
            if copy:
                raise
    shutil.copyfile(file, place)
    return "copies"


def _plain(name: str) -> str:
    """A class's name as a folder's: it cannot lead elsewhere."""
    return re.sub(r"[^\w .,+()-]", "_", name).strip(" .") or "_"


def bring(
    file: str | Path,
    data: Data,
    *,
    kind: str = "",
    column: str = "",
    order: str = "index",
    index: str = "",
    negate: bool = False,
    keep: float | None = None,
    seed: int = 0,
    force: bool = False,
) -> tuple[Subset | Signals, list[str]]:
    """A ticket, or signals with the score ``given``, out of a file of others. A ticket of LOTUS is bound to ``data`` by ``force``.

    Raises:
        Refused: see :func:`selection.exchange.read`.
    """
    path = Path(file)
    if _is_ticket(path):
        given = {"--as": kind, "--column": column, "--order": order != "index", "--index": index}
        given |= {"--negate": negate, "--keep": keep is not None, "--seed": seed != 0}
        if strange := [flag for flag, said in given.items() if said]:
            raise Refused(
                f"{', '.join(strange)}: {file} is a ticket of LOTUS, which says itself which images stay. Leave it out; lotus select "
                "draws another, and lotus ticket export makes a list of its rows."
            )
        subset = Subset.load(path)
        told = held(
            subset, data, force=force, risk="its rows stand for other images, and training goes on them unnoticed"
        )
        fingerprint, labels, classes = data._own()
        bound = Subset(
            subset.rows,
            subset.total,
            fingerprint=fingerprint,
            weights=subset.weights,
            keep=subset.keep,
            origin={**subset.origin, **({"forced": True} if told else {})},
            labels=labels,
            classes=classes,
            scores=subset.scores,
        )
        return bound, told or ["it is a ticket of this data already"]
    images = data.images(index=index)
    found = exchange.read(path, images, kind=kind, column=column, order=order, negate=negate, force=force)
    if seed and (found.rows is not None or keep is None):
        raise Refused(
            f"--seed {seed}: decides among equal scores when --keep takes the highest, and nothing is drawn from {file}. Leave it out."
        )
    told = [f"taken for {found.told}", *found.warnings]
    if order == "class":
        told.append(
            "within a class they are taken in the order of the index: code that sorts unstably (data_diet) need not agree"
        )
    if found.rows is None and keep is None:
        signals = exchange.scores(found, images, name=str(path), beside=data.signals)
        return signals, [*told, "draw from them with: lotus select FILE --score given --pick ccs --keep 0.3"]
    return exchange.ticket(found, images, name=path.name, keep=keep, seed=seed, force=force), told


def _is_ticket(path: Path) -> bool:
    """Whether a file says of itself that LOTUS wrote it. One that cannot be opened may be anything."""
    if path.suffix != ".npz":
        return False
    try:
        with np.load(path, allow_pickle=False) as archive:
            return "about" in archive.files
    except Exception:
        return False
