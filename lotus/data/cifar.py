"""CIFAR's batches: where they lie, how they are had and read. Nothing is unpickled but by a reader of arrays, lists and texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus.data.pictures import Pixels
from selection import pickles, regular
from selection.errors import Refused, reason

KINDS: Mapping[str, Mapping[str, Any]] = {
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


def layout(root: Path, which: str) -> tuple[Path, str] | None:
    """The folder with the batches, and of which kind they are."""
    for kind in ("python", "binary"):
        name, train, _ = KINDS[which][kind]
        for folder in (root / name, root):
            if (folder / train[0]).is_file():
                return folder, kind
    return None


def download(root: Path, which: str) -> None:
    """torchvision's own download, which compares the archive's checksum. It is read by us: nothing is unpickled there."""
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import download_and_extract_archive

        known = getattr(datasets, which)
        download_and_extract_archive(known.url, str(root), filename=known.filename, md5=known.tgz_md5)
    except Exception as error:  # no torchvision, no network, no room
        forms = f"an .npz with x_train, y_train, x_test, y_test, a folder train/CLASS/*, val/CLASS/*, or {which}'s own batches"
        raise Refused(
            f"data.path: {root} holds no {which}, and it cannot be downloaded ({error}). Say where it is by data.path=PATH, {forms}; or "
            "run this once with a network."
        ) from None


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        found = pickles.load(file, encoding="latin1")
    except Exception as error:  # a broken pickle can raise nearly anything
        raise Refused(f"{file}: not read: {error}. Take the data set from its official place.") from None
    if not isinstance(found, dict):
        raise Refused(f"{file}: holds a {type(found).__name__}, expected a CIFAR batch.")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}


def python_batches(folder: Path, names: list[str], which: str) -> tuple[Pixels, npt.NDArray[np.int64]]:
    images, labels = [], []
    for name in names:
        batch = _unpickled(folder / name)
        data, target = batch.get("data"), batch.get(KINDS[which]["labels"])
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise Refused(f"{folder / name}: its data are not (N, 3072) bytes.")
        if not isinstance(target, list) or len(target) != len(data) or not all(isinstance(t, int) for t in target):
            raise Refused(f"{folder / name}: its labels do not fit its {len(data)} images.")
        images.append(data)
        labels.append(np.array(target, dtype=np.int64))
    return _planes_last(np.concatenate(images)), np.concatenate(labels)


def binary_batches(folder: Path, names: list[str], which: str) -> tuple[Pixels, npt.NDArray[np.int64]]:
    before = KINDS[which]["bytes"]
    rows = []
    for name in names:
        try:
            flat = np.fromfile(regular.bounded(folder / name), np.uint8)
        except OSError as error:
            raise Refused(
                f"{folder / name}: cannot be read ({error.strerror}). Take the data set from its official place."
            ) from None
        if len(flat) == 0 or len(flat) % (before + 3072):
            raise Refused(f"{folder / name}: cut off, {len(flat)} bytes are no whole number of images.")
        rows.append(flat.reshape(-1, before + 3072))
    whole = np.concatenate(rows)
    return _planes_last(whole[:, before:]), whole[:, before - 1].astype(np.int64)


def _planes_last(flat: npt.NDArray[np.uint8]) -> Pixels:
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def class_names(folder: Path, which: str) -> tuple[str, ...]:
    count = 10 if which == "CIFAR10" else 100
    pickled, key, text = KINDS[which]["names"]
    names: list[str] = []
    if (folder / pickled).is_file():
        names = [str(name) for name in _unpickled(folder / pickled).get(key, [])]
    elif (folder / text).is_file():
        try:
            names = regular.text(folder / text).split()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(
                f"{folder / text}: cannot be read ({reason(error)}). Delete it, for numbers as names."
            ) from None
    return tuple(names) if len(names) == count else tuple(str(number) for number in range(count))
