"""Arrays, lists and texts out of a pickle or a PyTorch file, and nothing else: what asks for any other thing is refused before it can act.

Published code leaves scores as pickled dictionaries, often of torch tensors. Here a tensor is rebuilt as a numpy array from its
bytes; torch is not needed, and none of its own unpickling runs.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_ZIP = b"PK\x03\x04"
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file that torch.save wrote before it wrote zip files

_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?",
}  # fmt: skip


class _Kind(NamedTuple):
    """A torch storage class, of which the type of its numbers is all that counts."""

    dtype: str


def load(file: Path, *, encoding: str = "ASCII") -> Any:
    """What a pickle or a ``torch.save`` file holds: numbers, texts, lists, tuples, sets, dictionaries and arrays.

    Args:
        encoding: of the texts of Python 2.

    Raises:
        Exception: any, where it is damaged or holds something else; the caller says what that means for the user.
    """
    content = Path(file).read_bytes()
    if content.startswith(_ZIP):
        return _zipped(content)
    return _stream(io.BytesIO(content), encoding)


class _Reader(pickle.Unpickler):
    """Finds what arrays and tensors are made of. All that it can call stands here, and none of it does more than build them."""

    def __init__(self, file: io.BytesIO, encoding: str = "ASCII", storages: Any = None) -> None:
        super().__init__(file, encoding=encoding)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Kind(_STORAGES[name])
        found = _ALLOWED.get((module.replace("numpy.core", "numpy._core"), name))  # numpy 2 moved its modules
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array, number or text")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._storages is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something outside of itself")
        return self._storages(pid)


def _stream(file: io.BytesIO, encoding: str = "ASCII") -> Any:
    """One pickle, or what ``torch.save`` wrote before its zip files: five pickles, then the bytes of each storage."""
    first = _Reader(file, encoding).load()
    if not isinstance(first, int) or first != _MAGIC:
        return first
    version, _system = _Reader(file).load(), _Reader(file).load()
    if version != 1001:
        raise pickle.UnpicklingError(f"a PyTorch file of version {version!r}")
    known: dict[str, np.ndarray] = {}

    def storage(pid: tuple[Any, ...]) -> np.ndarray:
        kind, key, numbers = pid[1], str(pid[2]), pid[4]
        if not isinstance(kind, _Kind) or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("a tensor of a kind that is not known")
        if not 0 <= int(numbers) * np.dtype(kind.dtype).itemsize <= len(file.getbuffer()):
            raise pickle.UnpicklingError("a tensor larger than its file")
        if key not in known:  # filled below, once its bytes come
            known[key] = np.zeros(int(numbers), kind.dtype)
        return known[key]

    found = _Reader(file, storages=storage).load()
    for key in _Reader(file).load():
        held = known[str(key)]
        count = int.from_bytes(file.read(8), "little")
        raw = file.read(held.nbytes)
        if count != len(held) or len(raw) != held.nbytes:
            raise pickle.UnpicklingError("cut short")
        held[:] = np.frombuffer(raw, held.dtype)
    return found


def _zipped(content: bytes) -> Any:
    """What ``torch.save`` writes today: ``NAME/data.pkl`` and ``NAME/data/0``, ``1`` and so on."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(names) != 1:
            raise pickle.UnpicklingError("a zip file, and none of PyTorch")
        folder = names[0].removesuffix("data.pkl")
        known: dict[str, np.ndarray] = {}

        def storage(pid: tuple[Any, ...]) -> np.ndarray:
            kind, key = pid[1], str(pid[2])
            if not isinstance(kind, _Kind):
                raise pickle.UnpicklingError("a tensor of a kind that is not known")
            if key not in known:
                known[key] = np.frombuffer(archive.read(f"{folder}data/{key}"), kind.dtype)
            return known[key]

        return _Reader(io.BytesIO(archive.read(names[0])), storages=storage).load()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """``torch._utils._rebuild_tensor_v2`` as a view, once it is sure to lie inside its storage."""
    size, stride, offset = tuple(map(int, size)), tuple(map(int, stride)), int(offset)
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    empty = 0 in size
    if min((offset, *size, *stride), default=0) < 0 or (not empty and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor that does not lie inside its numbers")
    if empty:
        return np.zeros(size, storage.dtype)
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _storage(content: Any) -> np.ndarray:
    """``torch.storage._load_from_bytes``: a tensor's numbers, in a file inside the file."""
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("a tensor without numbers")
    found = _zipped(content) if content.startswith(_ZIP) else _stream(io.BytesIO(content))
    if not isinstance(found, np.ndarray):
        raise pickle.UnpicklingError("a tensor without numbers")
    return found


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """``_codecs.encode``, by which old protocols write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an odd encoding")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,  # type: ignore[attr-defined]
    ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,  # type: ignore[attr-defined]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}
