"""SHELF: one function a data set.

It reads ``path`` (where the images lie) and, for the Hugging Face hub, ``name``; its keyword-only parameters are what
``data.options`` may set. It returns ``(train, val)``. Nothing is unpickled but through a reader that knows arrays,
lists and texts alone, so a file from elsewhere cannot run code.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus.data import cifar, folders, hub_datasets, listed, pictures, tar_shards, written_labels
from lotus.data.source import Source, as_labels, digest, split
from selection import npz as archives
from selection import regular
from selection.errors import Notice, Refused, reason

__all__ = ["Source", "cifar10", "cifar100", "digits", "filelist", "hf", "imagefolder", "npz", "webdataset"]


def digits(path: str, *, val_fraction: float = 0.2, seed: int = 0) -> tuple[Source, Source]:
    """scikit-learn's 1797 handwritten digits, 8 x 8, embedded there: no download. ``path`` is not needed.

    Values 0 to 16 become 0 to 255, gray becomes RGB. A seeded fifth of every class is held out.
    """
    from sklearn.datasets import load_digits

    if path:
        warnings.warn(
            f"data.path: {path} is not looked at, since digits come with scikit-learn. For pictures of your own set "
            "data.name=imagefolder.",
            Notice,
            stacklevel=2,
        )
    found = load_digits()
    gray = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return split(_in_memory("digits", gray, found.target, tuple("0123456789")), val_fraction, seed)


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
        kinds = {".npz": "npz", ".tar": "webdataset", ".csv": "filelist", ".txt": "filelist"}
        other = kinds.get(root.suffix.lower(), "")
        hint = f" For a {root.suffix} set data.name={other}." if other else ""
        raise Refused(f"data.path: {path} is a file. imagefolder wants a folder of class folders.{hint}")
    if tar_shards.files(path) and not any(child.is_dir() for child in root.iterdir()):
        raise Refused(f"data.path: {path} has no class folders, but shards. Set data.name=webdataset.")
    train, val = (
        folders.part(root, folders.TRAIN),
        next(filter(None, (folders.part(root, (name,)) for name in folders.VAL)), None),
    )
    if train is None:
        if val is not None:  # else it would become a class
            raise Refused(
                f"data.path: {val} looks like a part of a data set, not like a class, and {root} has no train folder. "
                "Name the parts train and val, or give the folder in which the class folders lie."
            )
        return split(folders.folder(root), val_fraction, seed)
    first = folders.folder(train)
    if val is None:
        return split(first, val_fraction, seed)
    return first, folders.folder(val, first.classes)


def npz(path: str, *, val_fraction: float = 0.1, seed: int = 0) -> tuple[Source, Source]:
    """An ``.npz`` with ``x_train``, ``y_train`` and ``x_test``, ``y_test`` (or ``x_val``, ``y_val``).

    x: (N, H, W), (N, H, W, 1), (N, H, W, 3) or (N, H, W, 4), uint8 or uint16. y: (N,) or (N, 1), whole numbers from 0.
    ``classes``: (C,) names, if there; else the numbers are the names. Without a test part a seeded part of every class
    is held out. Arrays of Python objects, which would have to be unpickled, are refused.
    Images are not held in memory, unless they are compressed.
    """
    arrays, held = _archive(_existing(path, "npz"), path)
    labels = as_labels(arrays["y_train"], f"{path} y_train")
    if "classes" in arrays:
        classes = tuple(str(name) for name in arrays["classes"].reshape(-1))
    elif (highest := int(labels.max(initial=0))) >= max(1, len(labels)):  # one of them is empty; do not count up to it
        raise Refused(f"data.path: {path} y_train goes up to {highest} in {len(labels)} images. Count classes from 0.")
    else:
        classes = tuple(str(number) for number in range(highest + 1))
    train = _in_memory(f"{path} train", arrays["x_train"], labels, classes)
    if f"x_{held}" not in arrays:
        return split(train, val_fraction, seed)
    labels = as_labels(arrays[f"y_{held}"], f"{path} y_{held}")
    return train, _in_memory(f"{path} {held}", arrays[f"x_{held}"], labels, classes, partial=True)


def _archive(file: Path, path: str) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """The arrays of an ``.npz`` of images, and what its part for validation is called.

    Raises:
        Refused: it cannot be read, or lacks an array.
    """
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
        held = "val" if "x_val" in known else "test"
        images = {"x_train", f"x_{held}"}
        arrays = archives.arrays(file, {"classes", "y_train", f"y_{held}", *images}, mapped=images)
    except Refused as error:
        raise Refused(f"data.path: {error}") from None
    except Exception as error:  # a file from elsewhere may break its parsers in any way
        why = "it holds Python objects, which could run code" if "pickle" in str(error).lower() else str(error)
        raise Refused(f"data.path: {path} cannot be read as .npz: {why}.") from None
    for part in ("train", *([held] if f"x_{held}" in arrays else [])):
        for name in (f"x_{part}", f"y_{part}"):
            if name not in arrays:
                raise Refused(f"data.path: {path} has no {name}. It has: {', '.join(known) or 'nothing'}.")
    return arrays, held


def webdataset(
    path: str,
    *,
    val: str = "",
    image: str = "",
    label: str = "cls",
    classes: str = "",
    val_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[Source, Source]:
    """WebDataset's shards: one ``.tar``, a pattern (``train-{000..146}.tar``, ``train-*.tar``) or a folder of them.

    ``val`` names the shards that validate; empty: those of ``path`` with val, validation, valid or test in their names, and
    where there are none a seeded part ``val_fraction`` of every class is held out. ``image`` is the extension of the pictures
    (empty: whichever there is), ``label`` that of the labels: a number or a name in ``.cls``, or ``json.FIELD``. ``classes`` is
    a file of their names, a line each. Nothing is unpacked; a member that is a pickle, or a link, is refused.
    """
    shards = tar_shards.files(path)
    if not shards:
        raise Refused(
            f"data.path: {path or 'nothing'}: no .tar. Name one, a folder of them, or DATA/train-{{000..146}}.tar."
        )
    train, held = (shards, tar_shards.files(val)) if val else tar_shards.parts(shards)
    if val and not held:
        raise Refused(f"data.options.val: {val}: no .tar.")
    if not train:
        raise Refused(f"data.path: {path}: all {len(held)} shards validate by their names, none trains.")
    first = tar_shards.source(train, image, label, written_labels.names(classes))
    if not held:
        return split(first, val_fraction, seed)
    second = tar_shards.source(held, image, label, first.classes, partial=True)
    return first, second if val else _announced(second, "test" if "test" in Path(held[0]).name.lower() else "")


def filelist(
    path: str, *, val: str = "", root: str = "", classes: str = "", val_fraction: float = 0.1, seed: int = 0
) -> tuple[Source, Source]:
    """A list of pictures, ``path,label`` a line in a ``.csv``, else path, blank or tab, label.

    Paths start from ``root``; empty: the list's own folder. A label is a class's name or its number. ``val`` is the list that
    validates; empty: a seeded part ``val_fraction`` of every class. ``classes`` is a file of their names, a line each.
    """
    first = listed.source(_existing(path, "filelist"), root, written_labels.names(classes))
    if not val:
        return split(first, val_fraction, seed)
    return first, listed.source(Path(val), root, first.classes, partial=True)


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
    streaming: bool = False,
    layout: hub_datasets.Layout = hub_datasets.Layout(),
    val_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[Source, Source]:
    """A data set of the Hugging Face hub (``data.name: hf:NAME``), or a local folder that ``datasets`` can load.

    ``path`` is where it is cached; empty: the library's own place. ``config`` and ``revision`` name the configuration and
    the commit, ``layout`` (``train``, ``val``, ``image``, ``label``; see :class:`lotus.data.hub_datasets.Layout`) the splits and the columns.
    ``streaming`` caches nothing: labels are read first, and then every image once, in its order.
    """
    try:
        import datasets
    except ImportError:
        raise Refused(f"data.name: hf:{name} needs the library datasets: pip install 'lotus-vit[hub]'.") from None
    try:
        splits = datasets.load_dataset(
            name, config or None, revision=revision or None, cache_dir=path or None, streaming=streaming
        )
    except Exception as error:  # the hub, the network, a missing configuration: the library's own words say it best
        cure = f"See that {name!r} is right; without a network give a local folder, data.name=hf:FOLDER."
        raise Refused(f"data.name: hf:{name} cannot be loaded ({reason(error)}). {cure}") from None
    train, val = layout.train, layout.val
    for option, asked in (("train", train), ("val", val)):
        if asked not in splits and (asked or option == "train"):
            raise Refused(f"data.options.{option}: {name} has no split {asked!r}. It has: {', '.join(splits)}.")
    held = val or next((split_ for split_ in ("validation", "valid", "val", "test") if split_ in splits), "")
    column, target, classes = hub_datasets.columns(datasets, name, splits[train], layout)
    first = hub_datasets.source(datasets, splits[train], f"{name} {train}", column, target, classes)
    if not held:
        return split(first, val_fraction, seed)
    second = hub_datasets.source(datasets, splits[held], f"{name} {held}", column, target, classes, partial=True)
    return first, second if val else _announced(second, held)


def _announced(held: Source, part: str) -> Source:
    """A part that validates without having been asked for by its name; a test says so."""
    told = f"{held.where} validates: what is chosen by it makes it no test any more"
    return replace(held, note=told) if part == "test" else held


def _existing(path: str, kind: str) -> Path:
    if not path:
        raise Refused(f"data.path: {kind} needs to know where the images lie.")
    if not os.path.exists(path):
        raise Refused(f"data.path: {path} does not exist. Say where the images lie: data.path=PHOTOS.")
    return Path(path)


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


def _cifar(path: str, which: str, val_fraction: float, seed: int) -> tuple[Source, Source]:
    if not path:
        raise Refused(f"data.path: say where {which} lies, or into which folder it is to be downloaded.")
    root = Path(path)
    if root.is_file():
        return npz(path, val_fraction=val_fraction, seed=seed)
    found = cifar.layout(root, which)
    if found is None and (not root.exists() or not any(root.iterdir())):
        cifar.download(root, which)
        found = cifar.layout(root, which)
    if found is None:
        if any(child.is_dir() for child in root.iterdir()):
            return imagefolder(path, val_fraction=val_fraction, seed=seed)
        wanted = " or ".join(cifar.KINDS[which][kind][0] for kind in ("python", "binary"))
        raise Refused(f"data.path: {path} holds no {which}: no {wanted}, no class folders. Give an .npz or a folder.")
    folder, kind = found
    read = cifar.python_batches if kind == "python" else cifar.binary_batches
    classes = cifar.class_names(folder, which)
    _, train, test = cifar.KINDS[which][kind]
    return _in_memory(f"{path} train", *read(folder, train, which), classes), _in_memory(
        f"{path} test", *read(folder, test, which), classes, partial=True
    )
