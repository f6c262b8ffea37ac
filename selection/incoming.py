"""Embeddings, scores and labels that others made, as signals: ``.npy``, ``.npz``, a table (``.csv``, ``.tsv``, ``.parquet``).

Nothing in such a file is run: arrays are read without pickle, and what one claims to hold is held to the file before memory is
taken (selection/npz.py). Letters: N images, D width of an embedding, C classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selection import npz, parsing, regular
from selection.errors import Refused, reason
from selection.images import Images, Words
from selection.signals import AXES, VOCABULARY, Signals

ENDINGS = (".npz", ".npy", ".csv", ".tsv", ".parquet")
WANTED = (
    "signals of LOTUS (signals.npz in the run's folder), embeddings (.npy of images x dimensions, or .npz with 'embeddings'), scores (.npy of one number an "
    "image), or a table with a score an image (.csv, .tsv, .parquet)"
)
NAMES: Mapping[str, tuple[str, ...]] = {
    "embeddings": ("embeddings", "embedding", "features", "feats", "emb"),
    "labels": ("labels", "label", "targets", "target", "class", "y"),
    "given": ("given", "score", "scores", "value"),
    "paths": ("paths", "path", "files", "file", "filename", "filenames", "image", "img", "names", "name"),
    "classes": ("classes", "class_names"),
    "fingerprint": ("fingerprint",),
}
"""What each array, or column, may be called."""

_OURS = {name for theirs in NAMES.values() for name in theirs} | set(VOCABULARY)

_LEAST, _MOST = 2.0**-4, 2.0**15
"""Between these the largest number of the embeddings stays as it is; half precision holds 6e-8 to 65504."""

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Incoming:
    """What a file said of its images."""

    signals: Signals
    names: tuple[str, ...] | None = None
    """N paths; None where it has none."""
    told: tuple[str, ...] = ()
    """Sentences for the user."""

    def images(self, say: Words | None = None) -> Images:
        """What files of others are held to."""
        own = self.signals
        return Images(own.images, own.fingerprint, own["labels"], own.classes, self.names, say=say or Words())


def read(
    path: str | Path, *, labels: str | Path = "", only: set[str] | None = None, say: Words | None = None
) -> Incoming:
    """What a file says of its images: signals of LOTUS as they are, or what others made of theirs.

    Args:
        path: of signals, embeddings or scores; see :data:`ENDINGS`
        labels: a file with a whole number, or the name of a class, an image: ``.npy``, ``.npz``, ``.txt``, or a table
        only: of signals of LOTUS, those to read; see :meth:`selection.signals.Signals.load`
        say: what refusals call ``labels``

    Raises:
        Refused: it cannot be read, holds neither embeddings nor scores, objects, a number that is not finite, or labels that
            do not fit; names the place and the cure.
    """
    path, flag = Path(path), (say or Words())("labels")
    if is_ours(path):
        if labels:
            raise Refused(f"{flag} {labels}: {path} are signals of LOTUS and have their labels. Leave it out.")
        return Incoming(Signals.load(path, only))
    columns = _ours(path, _columns(path))
    own = _told_labels(Path(labels), flag) if labels else columns.get("labels")
    return _incoming(path, columns, own, Path(labels) if labels else path)


def of_arrays(arrays: Mapping[str, np.ndarray], *, place: str = "arrays") -> Incoming:
    """:func:`read`, of arrays that are at hand: by the names of :data:`NAMES`.

    Args:
        arrays: (N, ...) each, or one for the whole, as ``classes``
        place: what refusals call them

    Raises:
        Refused: see :func:`read`.
    """
    columns = _ours(Path(place), arrays)
    return _incoming(Path(place), columns, columns.get("labels"), Path(place))


def _incoming(path: Path, found: Mapping[str, np.ndarray], labels: np.ndarray | None, of_labels: Path) -> Incoming:
    arrays, count = _signals(path, found)
    names = _names(path, found.get("paths"), count)
    arrays["labels"], classes = _classes(of_labels, labels, count, found.get("classes"))
    fingerprint = _known(found) or _digest(arrays, names)
    signals = Signals(arrays, fingerprint=fingerprint, classes=classes, place=str(path), unlabeled=labels is None)
    return Incoming(signals, names, () if labels is not None else (_UNLABELED,))


_UNLABELED = "there are no labels: all images are drawn from together"


def is_ours(path: Path) -> bool:
    """Whether a file is to be read as signals of LOTUS: it says so itself, or nothing can be said of it."""
    if path.suffix.lower() in ENDINGS and path.suffix.lower() != ".npz":
        return False
    try:
        with regular.check(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return npz.ABOUT in archive.files
    except OSError:
        return True  # which names the fault
    except Exception:  # a foreign file can break its parser in any way
        return path.suffix.lower() == ".npz"


def _ours(path: Path, held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by our names for them.

    Raises:
        Refused: see :func:`read`.
    """
    columns: dict[str, np.ndarray] = {}
    for ours, theirs in NAMES.items():
        there = [name for name in held if name.lower() in theirs]
        if len(there) > 1:
            raise Refused(f"{path}: {' and '.join(there)} could both be the {ours}. Keep one of them.")
        if there:
            columns[ours] = held[there[0]]
    columns |= {name: array for name, array in held.items() if name in VOCABULARY and name not in columns}
    if not {"embeddings", "given"} & set(columns) and not set(columns) & (set(VOCABULARY) - {"labels"}):
        raise Refused(f"{path}: holds {_few(held)}, and neither embeddings nor scores. Wanted is {WANTED}.")
    return columns


def _columns(path: Path) -> dict[str, np.ndarray]:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise Refused(f"{path}: no such file of embeddings or scores. Wanted is {WANTED}.")
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        ".npy": _npy, ".npz": _npz, ".parquet": lambda path: parsing.parquet(path, _OURS),
    }  # fmt: skip
    try:
        return readers.get(ending, _text)(path)
    except Refused:
        raise
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror or error}). Wanted is {WANTED}.") from None
    except Exception as error:  # a foreign file can break its parser in any way
        why = reason(error)
        cure = "Save plain numbers anew with np.save or np.savez" if ending in (".npy", ".npz") else "Write it anew"
        raise Refused(f"{path}: cannot be read: {why}. {cure}.") from None


def _npy(path: Path) -> dict[str, np.ndarray]:
    array = npz.array(path)
    if array.dtype.names:
        return {name: array[name] for name in array.dtype.names}
    if array.ndim == 1:
        return {"given": array}
    if array.ndim != 2:
        raise ValueError(f"of shape {array.shape}; embeddings are images x dimensions, scores one number an image")
    return {"embeddings": array}


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(regular.check(path), allow_pickle=False) as archive:
        held = list(archive.files)
    wanted = {name for name in held if name.lower() in _OURS}
    if not wanted:
        raise Refused(f"{path}: holds {_few(held)}, and neither embeddings nor scores. Wanted is {WANTED}.")
    return npz.arrays(path, wanted, what=str(path))


def _text(path: Path) -> dict[str, np.ndarray]:
    table = parsing.table(regular.check(path))
    assert isinstance(table, dict)  # of these endings
    return table


def _signals(path: Path, found: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """All but the labels, and how many images they are of."""
    arrays: dict[str, np.ndarray] = {}
    for name in VOCABULARY:
        if name not in found or name == "labels":
            continue
        array = found[name]
        if name == "given":
            array = parsing.numbers(path, array, "score")
            array = np.where(np.isfinite(array), array, np.finfo(np.float64).max)
        _check_finite(path, name, array)
        arrays[name] = _scaled(array) if name == "embeddings" else array
    for name, array in arrays.items():
        if array.ndim != len(VOCABULARY[name].dims):
            dims = ", ".join(VOCABULARY[name].dims)
            raise Refused(f"{path}: {name} are of shape {array.shape}. Wanted is ({dims}), N images.")
    sizes = {name: array.shape[VOCABULARY[name].dims.index("N")] for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise Refused(f"{path}: not of the same images: {told}. Save one row an image in each.")
    if not sizes or not next(iter(sizes.values())):
        raise Refused(f"{path}: holds no image. Save one row an image.")
    return arrays, next(iter(sizes.values()))


def _check_finite(path: Path, name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "biuf":
        raise Refused(f"{path}: {name} are {_kind(array)}, not numbers. Save numbers.")
    if not np.isfinite(array).all():
        at = np.argwhere(~np.isfinite(array))[0].tolist()
        where = ", ".join(f"{AXES[letter]} {place}" for letter, place in zip(VOCABULARY[name].dims, at, strict=False))
        raise Refused(f"{path}: {name} hold {array[tuple(at)]} at {where}. Mend it, or leave that image out.")


def _scaled(array: np.ndarray) -> np.ndarray:
    """Embeddings that half precision holds: times a power of two where they are too large or small for it, which changes no angle
    and no order of distances."""
    if array.ndim != 2 or not array.size:
        return array
    most = max(abs(float(array.max())), abs(float(array.min())))
    if not math.isfinite(most) or most == 0 or _LEAST <= most <= _MOST:
        return array
    return np.ldexp(array.astype(np.float64), -math.frexp(most)[1])


def _told_labels(path: Path, flag: str) -> np.ndarray:
    """(N,) numbers or names of classes."""
    readers: dict[str, Callable[[Path], Any]] = {".npy": _npy, ".npz": _columns, ".parquet": _columns}
    if path.suffix.lower() not in (*readers, ".csv", ".tsv", ".txt", ".lst", ".list"):
        raise Refused(f"{flag} {path}: a .npy, .npz, .txt, .csv, .tsv or .parquet with a label an image is wanted.")
    try:
        table = readers.get(path.suffix.lower(), parsing.table)(path)
    except Refused as error:
        raise Refused(f"{flag}: {error}") from None
    except OSError as error:
        raise Refused(f"{flag} {path}: cannot be read ({error.strerror or error}). Give a label an image.") from None
    except Exception as error:  # a foreign file can break its parser in any way
        why = reason(error)
        raise Refused(f"{flag} {path}: cannot be read: {why}. Save whole numbers with np.save, or text.") from None
    held = table if isinstance(table, dict) else {"labels": table}
    named: list[np.ndarray] = [array for name, array in held.items() if name.lower() in NAMES["labels"]]
    if not named and len(held) > 1:
        raise Refused(f"{flag} {path}: holds {_few(held)}. Call the labels 'labels'.")
    return (named or list(held.values()))[0]


def _classes(
    path: Path, labels: np.ndarray | None, count: int, named: np.ndarray | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) from 0, and the classes' names; one class of all where there are no labels.

    Raises:
        Refused: they are not one whole number from 0 or one name an image.
    """
    if labels is None:
        return np.zeros(count, np.int64), ("all",)
    labels = labels.reshape(count) if labels.shape == (count, 1) else labels
    if labels.shape != (count,):
        raise Refused(
            f"{path}: labels of shape {labels.shape}, and there are {count} images. Save one an image, in their order."
        )
    if labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)) and np.isfinite(labels).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iuU":
        raise Refused(f"{path}: labels are {_kind(labels)}. Save whole numbers from 0, or names.")
    if labels.dtype.kind != "U" and labels.min() < 0:
        at = int(labels.argmin())
        raise Refused(f"{path}: the label {labels[at]} of image {at}. They count from 0; leave unlabeled images out.")
    if labels.dtype.kind == "U" or int(labels.max()) >= max(count, 1 << 16):  # IDs of somebody's are names
        values, numbers = np.unique(labels, return_inverse=True)
        return numbers.astype(np.int64), tuple(map(str, values.tolist()))
    return labels, tuple(map(str, np.ravel(() if named is None else named).tolist()))


def _names(path: Path, names: np.ndarray | None, count: int) -> tuple[str, ...] | None:
    if names is None or names.dtype.kind != "U":
        return None
    if names.shape != (count,):
        raise Refused(f"{path}: {names.shape} paths, and there are {count} images. Save one an image.")
    values, times = np.unique(names, return_counts=True)
    if len(values) < count:
        raise Refused(f"{path}: {values[times > 1][0]} stands there {times.max()} times. Leave one line an image.")
    return tuple(names.tolist())


def _known(found: Columns) -> str:
    """The fingerprint of the data, where the file says it, as a file of features that LOTUS made does."""
    told = found.get("fingerprint")
    return str(told) if told is not None and told.ndim == 0 and told.dtype.kind == "U" else ""


def _digest(arrays: Columns, names: tuple[str, ...] | None) -> str:
    """Of what the rows are rows of: the same images in another order are other data."""
    hashed = hashlib.blake2b(digest_size=12)
    if names is not None:  # then another score of the same files is of the same data
        hashed.update("\0".join(names).encode("utf-8", "surrogateescape"))
        return hashed.hexdigest()
    for name in sorted(set(arrays) - {"labels"}):
        array = np.ascontiguousarray(arrays[name])
        hashed.update(f"{name}{array.dtype.str}{array.shape}".encode())
        hashed.update(array.data)
    return hashed.hexdigest()


def _kind(array: np.ndarray) -> str:
    return "texts" if array.dtype.kind in "US" else f"{array.dtype} {array.shape}"


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing"
