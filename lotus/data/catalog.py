"""SHELF: one function a data set.

It reads ``path`` (where the images lie) and, for the Hugging Face hub, ``name``; its keyword-only parameters are what
``data.options`` may set. It returns ``(train, val)``. Nothing is unpickled but through a reader that knows arrays,
lists and texts alone, so a file from elsewhere cannot run code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus.data import pictures
from lotus.data.pictures import Pixels
from lotus.data.source import Source, digest, split
from selection import npz as archives
from selection import pickles, regular
from selection.errors import Refused

__all__ = ["Source", "cifar10", "cifar100", "digits", "hf", "imagefolder", "npz"]

_TRAIN = ("train", "training")
_VAL = ("val", "validation", "valid", "test")


def digits(path: str, *, val_fraction: float = 0.2, seed: int = 0) -> tuple[Source, Source]:
    """scikit-learn's 1797 handwritten digits, 8 x 8, embedded there: no download. ``path`` is not needed.

    Values 0 to 16 become 0 to 255, grey becomes RGB. A seeded fifth of every class is held out.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return split(_in_memory("digits", grey, found.target, tuple("0123456789")), val_fraction, seed)


def imagefolder(path: str, *, val_fraction: float = 0.1, seed: int = 0) -> tuple[Source, Source]:
    """A folder of pictures: ``train/CLASS/*`` and ``val/CLASS/*`` (or ``training``; ``validation``, ``valid``, ``test``;
    in small letters or capitals).

    Where there is no val folder, a seeded part ``val_fraction`` of every class is held out, of ``train/CLASS/*`` or of
    ``CLASS/*``. Pictures may lie in folders inside the class's; hidden files and what is no picture by its name
    (:data:`lotus.data.pictures.SUFFIXES`) are passed over, and so are links to a folder that holds a class or lies in
    another class. Classes are sorted by name.
    """
    root = _existing(path, "imagefolder")
    if not root.is_dir():
        raise Refused(f"data.path: {path} is a file. imagefolder wants a folder of class folders.")
    train, val = _part(root, _TRAIN), next(filter(None, (_part(root, (name,)) for name in _VAL)), None)
    if train is None:
        if val is not None:  # else it would become a class
            raise Refused(
                f"data.path: {val} looks like a part of a data set, not like a class, and {root} has no train folder. "
                "Name the parts train and val, or give the folder in which the class folders lie."
            )
        return split(_folder(root), val_fraction, seed)
    first = _folder(train)
    if val is None:
        return split(first, val_fraction, seed)
    return first, _folder(val, first.classes)


def npz(path: str, *, val_fraction: float = 0.1, seed: int = 0) -> tuple[Source, Source]:
    """An ``.npz`` with ``x_train``, ``y_train`` and ``x_test``, ``y_test`` (or ``x_val``, ``y_val``).

    x: (N, H, W), (N, H, W, 1), (N, H, W, 3) or (N, H, W, 4), uint8 or uint16. y: (N,) or (N, 1), whole numbers from 0.
    ``classes``: (C,) names, if there; else the numbers are the names. Without a test part a seeded part of every class
    is held out. Arrays of Python objects, which would have to be unpickled, are refused.
    """
    file = _existing(path, "npz")
    try:
        with regular.check(file).open("rb") as opened:
            head = opened.read(4)
    except OSError as error:
        raise Refused(f"data.path: {path} cannot be read as .npz: {error.strerror}.") from None
    if head != b"PK\x03\x04":  # numpy would take it for a pickle, and say so
        raise Refused(f"data.path: {path} cannot be read as .npz: it is none, whatever its name. np.savez writes one.")
    try:
        with np.load(file, allow_pickle=False) as found:
            known = list(found.files)
        parts = ("train", "val" if "x_val" in known else "test")
        arrays = archives.arrays(file, {"classes", *(f"{axis}_{part}" for part in parts for axis in "xy")})
    except Refused as error:
        raise Refused(f"data.path: {error}") from None
    except Exception as error:  # a file from elsewhere may break its parsers in any way
        why = "it holds Python objects, which could run code" if "pickle" in str(error).lower() else str(error)
        raise Refused(f"data.path: {path} cannot be read as .npz: {why}.") from None
    for part in ("train", *(["test"] if "x_test" in arrays else []), *(["val"] if "x_val" in arrays else [])):
        for name in (f"x_{part}", f"y_{part}"):
            if name not in arrays:
                raise Refused(f"data.path: {path} has no {name}. It has: {', '.join(known) or 'nothing'}.")
    labels = _labels(arrays["y_train"], f"{path} y_train")
    if "classes" in arrays:
        classes = tuple(str(name) for name in arrays["classes"].reshape(-1))
    elif (highest := int(labels.max(initial=0))) >= max(1, len(labels)):  # one of them is empty; do not count up to it
        raise Refused(f"data.path: {path} y_train goes up to {highest} in {len(labels)} images. Count classes from 0.")
    else:
        classes = tuple(str(number) for number in range(highest + 1))
    train = _in_memory(f"{path} train", arrays["x_train"], labels, classes)
    part = "val" if "x_val" in arrays else "test"
    if f"x_{part}" not in arrays:
        return split(train, val_fraction, seed)
    return train, _in_memory(
        f"{path} {part}", arrays[f"x_{part}"], _labels(arrays[f"y_{part}"], f"{path} y_{part}"), classes, partial=True
    )


def cifar10(path: str, *, val_fraction: float = 0.1, seed: int = 0) -> tuple[Source, Source]:
    """CIFAR-10, of any of these: an ``.npz`` (see :func:`npz`), a folder of class folders (see :func:`imagefolder`), a
    folder with ``cifar-10-batches-py`` (torchvision's) or ``cifar-10-batches-bin`` inside, or that folder itself.

    Where ``path`` is an empty folder, or there is none yet, the data set is downloaded there by torchvision (170 MB,
    its checksum compared). ``val_fraction`` and ``seed`` are for data that come without a test part.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return _cifar(path, "CIFAR10", val_fraction, seed)


def cifar100(path: str, *, val_fraction: float = 0.1, seed: int = 0) -> tuple[Source, Source]:
    """CIFAR-100 with its 100 fine labels; as :func:`cifar10`, the folders being ``cifar-100-python`` and
    ``cifar-100-binary``."""
    return _cifar(path, "CIFAR100", val_fraction, seed)


def hf(
    name: str,
    path: str,
    *,
    config: str = "",
    revision: str = "",
    train: str = "train",
    val: str = "",
    image: str = "",
    label: str = "",
    val_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[Source, Source]:
    """A data set of the Hugging Face hub (``data.name: hf:NAME``), or a local folder that ``datasets`` can load.

    ``path`` is where it is cached; empty: the library's own place. ``config``, ``revision``, ``train`` and ``val`` name
    the configuration, the commit and the splits; an empty ``val`` takes validation, valid, val or test, or holds a
    seeded part out. ``image`` and ``label`` name the columns; empty: the only one that holds pictures, and the only one
    of class labels (or, for want of one, the whole numbers or texts in a column called label or labels).
    """
    try:
        import datasets
    except ImportError:
        raise Refused(f"data.name: hf:{name} needs the library datasets: pip install 'lotus-vit[hub]'.") from None
    try:
        found = datasets.load_dataset(name, config or None, revision=revision or None, cache_dir=path or None)
    except Exception as error:  # the hub, the network, a missing configuration: the library's own words say it best
        raise Refused(f"data.name: hf:{name} cannot be loaded: {' '.join(str(error).split())}") from None
    if train not in found:
        raise Refused(f"data.options.train: {name} has no split {train!r}. It has: {', '.join(found)}.")
    if val and val not in found:
        raise Refused(f"data.options.val: {name} has no split {val!r}. It has: {', '.join(found)}.")
    held = val or next((split_ for split_ in ("validation", "valid", "val", "test") if split_ in found), "")
    features = found[train].features
    pictured = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    column = _column(name, "image", image, pictured, features)
    labelled = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labelled = labelled or [key for key in ("label", "labels") if key in features]
    target = _column(name, "label", label, labelled, features)
    classes = tuple(getattr(features[target], "names", None) or ())
    if not classes:
        classes = tuple(map(str, sorted(set(found[train][target]))))
    first = _of_hub(datasets, found[train], f"{name} {train}", column, target, classes)
    if not held:
        return split(first, val_fraction, seed)
    return first, _of_hub(datasets, found[held], f"{name} {held}", column, target, classes, partial=True)


def _existing(path: str, kind: str) -> Path:
    if not path:
        raise Refused(f"data.path: {kind} needs to know where the images lie.")
    if not os.path.exists(path):
        raise Refused(f"data.path: {path} does not exist.")
    return Path(path)


def _labels(array: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise Refused(f"{where}: shape {array.shape} of {array.dtype}; labels are (N,) whole numbers.")
    return array.astype(np.int64)


def _in_memory(
    where: str, x: npt.NDArray[Any], labels: npt.NDArray[Any], classes: tuple[str, ...], *, partial: bool = False
) -> Source:
    """Images (N, ...) and labels (N,) that are in memory."""
    if x.ndim and len(x) != len(labels):
        raise Refused(f"{where}: {len(x)} images but {len(labels)} labels.")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)):
        hint = " The channels come last." if x.ndim == 4 and x.shape[1] in (1, 3) else ""
        raise Refused(f"{where}: images of shape {x.shape}, expected (N, H, W) or (N, H, W, channels).{hint}")
    if x.dtype not in (np.uint8, np.uint16):
        raise Refused(f"{where}: pixels are {x.dtype}. Make them uint8, 0 to 255.")
    return Source(
        labels=labels,
        classes=classes,
        read=lambda i: pictures.from_array(x[i]),
        name=lambda i: f"{where} {i}",
        fingerprint=digest(x, np.asarray(labels), classes),
        where=where,
        partial=partial,
    )


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder in ``root`` that has one of ``names``, in small letters or capitals."""
    try:
        found = sorted(entry.name for entry in os.scandir(root) if entry.name.lower() in names and entry.is_dir())
    except OSError as error:
        raise Refused(f"{root}: cannot be listed ({error.strerror}).") from None
    if len(found) > 1:
        raise Refused(f"data.path: {root} has {' and '.join(found)}, which mean the same part. Keep one of them.")
    return root / found[0] if found else None


def _folder(root: Path, classes: tuple[str, ...] | None = None) -> Source:
    """``root/CLASS/**/picture``; with ``classes`` given, no others are allowed, and some may be missing."""
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise Refused(f"{root}: cannot be listed ({error.strerror}).") from None
    if not names:
        raise Refused(f"{root}: no class folders. Pictures lie in one folder a class: {root.name}/CLASS/picture.jpg.")
    if classes is not None:
        for name in names:
            if name not in classes:
                raise Refused(f"{root / name}: a class that train does not have. Train has: {', '.join(classes)}.")
    known = classes or tuple(names)
    files: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    homes = {name: os.path.realpath(root / name) for name in names}
    for name in names:
        before = len(files)
        for file, size in _pictures(root / name, [home for other, home in homes.items() if other != name]):
            files.append(file)
            sizes.append(size)
        if len(files) == before and any(len(os.listdir(root / other)) for other in names):
            raise Refused(f"{root / name}: class {name!r} is empty, no pictures in it. Add some, or delete the folder.")
        labels += [known.index(name)] * (len(files) - before)
    if not files:
        raise Refused(f"{root}: no images in its {len(names)} class folders.")
    relative = [os.path.relpath(file, root) for file in files]
    return Source(
        labels=np.array(labels, dtype=np.int64),
        classes=known,
        read=lambda i: pictures.read(files[i]),
        name=lambda i: files[i],
        fingerprint=digest(relative, np.array(sizes, dtype=np.int64), np.array(labels, dtype=np.int64), known),
        where=str(root),
        partial=classes is not None,
        root=str(root),
    )


def _pictures(folder: Path, others: list[str]) -> Iterator[tuple[str, int]]:
    """Pictures below ``folder`` by name and their sizes in bytes, sorted. Links to folders are followed once, and not at
    all to a folder that holds a class or lies in another: one of ``others``."""

    def foreign(below: str) -> bool:
        real = os.path.realpath(below)
        above = [os.path.realpath(folder), *others]
        return any(_inside(home, real) for home in above) or any(_inside(real, home) for home in others)

    seen: set[str] = set()
    for here, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link in a circle
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not foreign(os.path.join(here, name)))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in pictures.SUFFIXES and not name.startswith("."):
                file = os.path.join(here, name)
                try:
                    yield file, os.stat(file).st_size
                except OSError:
                    yield file, 0  # a link to nowhere: named as damaged when it is read


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


_CIFAR: Mapping[str, Mapping[str, Any]] = {
    "CIFAR10": {
        "python": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
        "binary": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
        "names": ("batches.meta", "label_names", "batches.meta.txt"),
        "labels": "labels",
        "bytes": 1,
    },
    "CIFAR100": {
        "python": ("cifar-100-python", ["train"], ["test"]),
        "binary": ("cifar-100-binary", ["train.bin"], ["test.bin"]),
        "names": ("meta", "fine_label_names", "fine_label_names.txt"),
        "labels": "fine_labels",
        "bytes": 2,  # a coarse label, then the fine one
    },
}


def _cifar(path: str, which: str, val_fraction: float, seed: int) -> tuple[Source, Source]:
    if not path:
        raise Refused(f"data.path: say where {which} lies, or into which folder it is to be downloaded.")
    root = Path(path)
    if root.is_file():
        return npz(path, val_fraction=val_fraction, seed=seed)
    found = _cifar_layout(root, which)
    if found is None and (not root.exists() or not any(root.iterdir())):
        _download(root, which)
        found = _cifar_layout(root, which)
    if found is None:
        if any(child.is_dir() for child in root.iterdir()):
            return imagefolder(path, val_fraction=val_fraction, seed=seed)
        wanted = " or ".join(_CIFAR[which][kind][0] for kind in ("python", "binary"))
        raise Refused(f"data.path: {path} holds no {which}: no {wanted}, no class folders. Give an .npz or a folder.")
    folder, kind = found
    read = _python_batches if kind == "python" else _binary_batches
    classes = _cifar_names(folder, which)
    _, train, test = _CIFAR[which][kind]
    return _in_memory(f"{path} train", *read(folder, train, which), classes), _in_memory(
        f"{path} test", *read(folder, test, which), classes, partial=True
    )


def _cifar_layout(root: Path, which: str) -> tuple[Path, str] | None:
    """The folder with the batches, and of which kind they are."""
    for kind in ("python", "binary"):
        name, train, _ = _CIFAR[which][kind]
        for folder in (root / name, root):
            if (folder / train[0]).is_file():
                return folder, kind
    return None


def _download(root: Path, which: str) -> None:
    """torchvision's own download, which compares the archive's checksum. It is read by us: nothing is unpickled there."""
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import download_and_extract_archive

        known = getattr(datasets, which)
        download_and_extract_archive(known.url, str(root), filename=known.filename, md5=known.tgz_md5)
    except Exception as error:  # no torchvision, no network, no room
        raise Refused(f"data.path: {root} is empty and {which} cannot be downloaded ({error}). Put it there.") from None


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        found = pickles.load(file, encoding="latin1")
    except Exception as error:  # a broken pickle can raise nearly anything
        raise Refused(f"{file}: not read: {error}. Take the data set from its official place.") from None
    if not isinstance(found, dict):
        raise Refused(f"{file}: holds a {type(found).__name__}, expected a CIFAR batch.")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}


def _python_batches(folder: Path, names: list[str], which: str) -> tuple[Pixels, npt.NDArray[np.int64]]:
    images, labels = [], []
    for name in names:
        batch = _unpickled(folder / name)
        data, target = batch.get("data"), batch.get(_CIFAR[which]["labels"])
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise Refused(f"{folder / name}: its data are not (N, 3072) bytes.")
        if not isinstance(target, list) or len(target) != len(data) or not all(isinstance(t, int) for t in target):
            raise Refused(f"{folder / name}: its labels do not fit its {len(data)} images.")
        images.append(data)
        labels.append(np.array(target, dtype=np.int64))
    return _planes_last(np.concatenate(images)), np.concatenate(labels)


def _binary_batches(folder: Path, names: list[str], which: str) -> tuple[Pixels, npt.NDArray[np.int64]]:
    before = _CIFAR[which]["bytes"]
    rows = []
    for name in names:
        try:
            flat = np.fromfile(regular.check(folder / name), np.uint8)
        except OSError as error:
            raise Refused(f"{folder / name}: cannot be read ({error.strerror}).") from None
        if len(flat) == 0 or len(flat) % (before + 3072):
            raise Refused(f"{folder / name}: cut off, {len(flat)} bytes are no whole number of images.")
        rows.append(flat.reshape(-1, before + 3072))
    whole = np.concatenate(rows)
    return _planes_last(whole[:, before:]), whole[:, before - 1].astype(np.int64)


def _planes_last(flat: npt.NDArray[np.uint8]) -> Pixels:
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _cifar_names(folder: Path, which: str) -> tuple[str, ...]:
    count = 10 if which == "CIFAR10" else 100
    pickled, key, text = _CIFAR[which]["names"]
    names: list[str] = []
    if (folder / pickled).is_file():
        names = [str(name) for name in _unpickled(folder / pickled).get(key, [])]
    elif (folder / text).is_file():
        names = (folder / text).read_text(encoding="utf-8").split()
    return tuple(names) if len(names) == count else tuple(str(number) for number in range(count))


def _column(data_set: str, what: str, asked: str, found: list[str], features: Mapping[str, Any]) -> str:
    if asked:
        if asked not in features:
            raise Refused(f"data.options.{what}: {data_set} has no column {asked!r}. It has: {', '.join(features)}.")
        return asked
    if len(found) != 1:
        seen = f"{len(found)} that could be it ({', '.join(found)})" if found else "none that could be it"
        raise Refused(f"data.options.{what}: {data_set} has {seen}. Name one of: {', '.join(features)}.")
    return found[0]


def _of_hub(
    datasets: Any, rows: Any, where: str, image: str, label: str, classes: tuple[str, ...], *, partial: bool = False
) -> Source:
    """One split; pictures stay encoded until they are read, and are decoded by us."""
    values = list(rows[label])
    if values and (isinstance(values[0], str) or not hasattr(rows.features[label], "names")):
        number = {name: i for i, name in enumerate(classes)}
        unknown = next((value for value in values if str(value) not in number), None)
        if unknown is not None:
            raise Refused(f"{where}: label {unknown!r} is not among those of train.")
        values = [number[str(value)] for value in values]
    labels = _labels(np.array(values), f"{where} {label}")
    encoded = rows.cast_column(image, datasets.Image(decode=False))

    def read(i: int) -> Pixels:
        packed = encoded[i][image]
        return pictures.read(packed["bytes"] if packed["bytes"] is not None else packed["path"])

    about = rows.info
    return Source(
        labels=labels,
        classes=classes,
        read=read,
        name=lambda i: f"{where} {i}",
        fingerprint=digest(where, labels, classes, image, str(about.version), str(about.dataset_size), str(len(rows))),
        where=where,
        partial=partial,
    )
