"""Arrays, lists and texts out of a pickle or a PyTorch file, and nothing else: what asks for any other thing is refused before it can act.

Published code leaves scores as pickled dictionaries, often of torch tensors. Here an array or a tensor is rebuilt from its
bytes; torch is not needed, and none of its own unpickling runs.

A pickle is a program, and numpy trusts the one that it reads: an array of type "O" takes a file's bytes for addresses. So
none of numpy's own functions can be called from here. While a pickle is read its arrays are :class:`_Later`, which know
their bytes and do nothing; only when all is read do they become arrays: of numbers or texts, and of as many bytes as they
brought. The machine that reads is Python's own in Python, which takes memory for what is there, not for what is claimed,
and of it only the instructions that plain data need.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selection import memory, regular

_ZIP = b"PK\x03\x04"
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file that torch.save wrote before it wrote zip files
_TYPE = re.compile(r"[biufSU][0-9]{1,9}")
_SPREAD = 64
"""How many numbers a file may hold for each of its bytes: lists that hold a list many times grow beyond any memory."""

_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1", "BoolStorage": "?",
}  # fmt: skip


def load(file: Path, *, encoding: str = "ASCII") -> Any:
    """What a pickle or a ``torch.save`` file holds: numbers, texts, lists, tuples, sets, dictionaries and arrays.

    Args:
        file: the path.
        encoding: of the texts of Python 2.

    Raises:
        Exception: any, where it is damaged or holds something else; the caller says what that means for the user.
    """
    memory.there(memory.size(regular.check(file).stat().st_size), str(file), "Take a part of it.")
    content = Path(file).read_bytes()
    found = _zipped(content) if content.startswith(_ZIP) else _stream(io.BytesIO(content), encoding)
    return _Finished(_SPREAD * len(content)).of(found)


class _Kind(NamedTuple):
    """A torch storage class, of which the type of its numbers is all that counts."""

    dtype: str


class _Later:
    """What stands for an array while a pickle is read."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        """What the pickle says of it once it is made."""
        raise pickle.UnpicklingError("it says more of a thing than there is to say")

    def value(self) -> np.ndarray:
        """The array, once all is read."""
        raise pickle.UnpicklingError("it holds something that is no array, number or text")


class _Dtype(_Later):
    """``numpy.dtype``: of numbers, truth values or texts. Objects, records and dates are none."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _TYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of type {code!r:.40}, which is no array of numbers or texts")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise pickle.UnpicklingError("an array of records, which is no array of numbers or texts")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(_Later):
    """``numpy.ndarray``, empty until the pickle says what is in it."""

    __slots__ = ("held",)

    def __init__(self, kind: Any, *_: Any) -> None:
        if kind is not _ndarray:
            raise pickle.UnpicklingError("an array of a kind that is not known")
        self.held: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array that does not say its shape, type and bytes")
        _, shape, dtype, by_column, raw = state
        self.held = _filled(raw, dtype, shape, "F" if by_column else "C")

    def value(self) -> np.ndarray:
        if self.held is None:
            raise pickle.UnpicklingError("an array without numbers")
        return self.held


class _Storage(_Later):
    """The numbers of tensors: ``count`` of them, which an older PyTorch file brings after all that is made of them."""

    __slots__ = ("count", "dtype", "numbers")

    def __init__(self, dtype: str, count: int) -> None:
        self.dtype, self.count = np.dtype(dtype), count
        self.numbers: np.ndarray | None = None

    def fill(self, raw: bytes) -> None:
        if self.count < 0 or len(raw) < self.count * self.dtype.itemsize:
            raise pickle.UnpicklingError("cut short: a tensor larger than its file")
        self.numbers = _clean(np.frombuffer(raw, self.dtype, self.count)) if self.count else np.zeros(0, self.dtype)


class _Tensor(_Later):
    """``torch._utils._rebuild_tensor_v2``."""

    __slots__ = ("layout", "storage")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without numbers")
        self.storage, self.layout = storage, (offset, size, stride)

    def value(self) -> np.ndarray:
        if self.storage.numbers is None:
            raise pickle.UnpicklingError("a tensor without numbers")
        return strided(self.storage.numbers, *self.layout)


# Objects of other classes, extensions and buffers from outside have no place in a file of arrays.
_FOREIGN = (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
            pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)  # fmt: skip
_STEPS: dict[int, Callable[[Any], None]] = {
    code: step for code, step in pickle._Unpickler.dispatch.items() if bytes([code]) not in _FOREIGN
}


class _Reader(pickle._Unpickler):
    """Knows what arrays and tensors are made of. All that it can call stands here, and none of it does more than note it.

    Args:
        storages: what a reference to a storage means; None: the file has none.
        inside: whether this is a file inside of a file, which has none inside of it.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(
        self,
        file: io.BytesIO,
        encoding: str = "ASCII",
        storages: Callable[[tuple[Any, ...]], Any] | None = None,
        *,
        inside: bool = False,
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._storages, self._inside = storages, inside

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Kind(_STORAGES[name])
        found = _ALLOWED.get((module.replace("numpy.core", "numpy._core"), name))  # numpy 2 moved its modules
        if found is None or (found is _inner and self._inside):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array, number or text")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._storages is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something outside of itself")
        return self._storages(pid)

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, _Later):
            made.build(state)
        elif not isinstance(made, _Ordered):  # PyTorch hangs metadata on a state dict, which are not wanted
            raise pickle.UnpicklingError("it says more of a thing than there is to say")

    def _bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        content = self.read(size)
        if len(content) != size:
            raise pickle.UnpicklingError("cut short")
        self.append(bytearray(content))

    dispatch = _STEPS | {pickle.BUILD[0]: _build, pickle.BYTEARRAY8[0]: _bytearray}


class _Finished:
    """What was read with its arrays in it.

    Args:
        most: numbers that there may be in all, each counted as often as it is met.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._done: dict[
            int, tuple[Any, int, Any]
        ] = {}  # by id: what became of it, its numbers, itself (to keep the id)

    def of(self, found: Any) -> Any:
        return self._of(found)[0]

    def _of(self, found: Any) -> tuple[Any, int]:
        if found is None or isinstance(found, (int, float, str, bytes, bytearray, np.generic)):
            return found, 1
        if not isinstance(found, (list, tuple, set, frozenset, dict, _Later)):
            raise pickle.UnpicklingError("it holds something that is no array, number or text")
        if id(found) not in self._done:
            made, numbers = self._made(found)
            if numbers > self._most:
                raise pickle.UnpicklingError("it unfolds to far more than it has bytes")
            self._done[id(found)] = made, numbers, found
        return self._done[id(found)][:2]

    def _made(self, found: Any) -> tuple[Any, int]:
        if isinstance(found, _Later):
            array = found.value()
            return array, array.size
        if isinstance(found, dict):
            keys, values = self._all(found), self._all(found.values())
            return dict(zip(keys[0], values[0], strict=True)), keys[1] + values[1]
        kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(found, kind))
        made, numbers = self._all(found)
        return kind(made), numbers

    def _all(self, found: Any) -> tuple[list[Any], int]:
        parts = [self._of(part) for part in found]
        return [part for part, _ in parts], 1 + sum(numbers for _, numbers in parts)


def _stream(file: io.BytesIO, encoding: str = "ASCII", *, inside: bool = False) -> Any:
    """One pickle, or what ``torch.save`` wrote before its zip files: five pickles, then the bytes of each storage."""
    first = _Reader(file, encoding, inside=inside).load()
    if type(first) is not int or first != _MAGIC:
        return first
    version, _system = _Reader(file).load(), _Reader(file).load()
    if version != 1001:
        raise pickle.UnpicklingError(f"a PyTorch file of version {version!r}")
    known: dict[str, _Storage] = {}

    def storage(pid: tuple[Any, ...]) -> _Storage:
        kind, key, numbers = pid[1], str(pid[2]), pid[4]
        if not isinstance(kind, _Kind) or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("a tensor of a kind that is not known")
        return known.setdefault(key, _Storage(kind.dtype, int(numbers)))

    found = _Reader(file, storages=storage, inside=inside).load()
    for key in _Reader(file).load():
        held = known[str(key)]
        if int.from_bytes(file.read(8), "little") != held.count:
            raise pickle.UnpicklingError("cut short")
        held.fill(file.read(max(0, held.count * held.dtype.itemsize)))
    return found


def _zipped(content: bytes, *, inside: bool = False) -> Any:
    """What ``torch.save`` writes today: ``NAME/data.pkl`` and ``NAME/data/0``, ``1`` and so on, none of them packed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(member.file_size for member in archive.infolist()) > len(content):
            raise pickle.UnpicklingError("a zip file that claims more than it has bytes, and none of PyTorch")
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(names) != 1:
            raise pickle.UnpicklingError("a zip file, and none of PyTorch")
        folder = names[0].removesuffix("data.pkl")
        known: dict[str, _Storage] = {}

        def storage(pid: tuple[Any, ...]) -> _Storage:
            kind, key = pid[1], str(pid[2])
            if not isinstance(kind, _Kind):
                raise pickle.UnpicklingError("a tensor of a kind that is not known")
            if key not in known:
                raw = archive.read(f"{folder}data/{key}")
                known[key] = _Storage(kind.dtype, len(raw) // np.dtype(kind.dtype).itemsize)
                known[key].fill(raw)
            return known[key]

        return _Reader(io.BytesIO(archive.read(names[0])), storages=storage, inside=inside).load()


def strided(numbers: np.ndarray, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """A view of ``numbers`` (n,), once it is sure to lie inside of them and to show none twice."""
    size, stride, offset = tuple(map(int, size)), tuple(map(int, stride)), int(offset)
    if len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    empty = 0 in size
    if min((offset, *size, *stride), default=0) < 0 or (not empty and last >= len(numbers)):
        raise pickle.UnpicklingError("a tensor that does not lie inside its numbers")
    if empty:
        return np.zeros(size, numbers.dtype)
    if math.prod(size) > len(numbers):
        raise pickle.UnpicklingError("a tensor that shows its numbers many times; save a contiguous one")
    steps = tuple(step * numbers.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(numbers[offset:], size, steps, writeable=False)


def _filled(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """The array of ``shape`` whose bytes are ``raw``: as many as it has, no more and no fewer."""
    if isinstance(raw, str):  # bytes of Python 2
        raw = raw.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array that does not say its shape, type and bytes")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise pickle.UnpicklingError("an array of a shape that cannot be")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise pickle.UnpicklingError(f"an array of the shape {shape} with {len(raw)} bytes")
    if not raw:
        return np.zeros(shape, dtype.dtype)
    return _clean(np.frombuffer(raw, dtype.dtype)).reshape(shape, order=order)


def _clean(array: np.ndarray) -> np.ndarray:
    """Truth values are 0 or 1: numpy counts others as more than one, and then writes beyond what it has counted."""
    return array.view(np.uint8) != 0 if array.dtype == np.bool_ else array


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    """``numpy._core.numeric._frombuffer``, by which protocol 5 writes an array."""
    made = _Array(_ndarray)
    made.held = _filled(raw, dtype, shape, order)
    return made


def _scalar(dtype: Any, raw: Any = None) -> Any:
    """``numpy._core.multiarray.scalar``: a number of numpy's."""
    return _filled(raw, dtype, (1,), "C")[0]


def _ndarray(*_: Any) -> None:
    """``numpy.ndarray``, which is named and never called."""
    raise pickle.UnpicklingError("it makes an array by hand; one that was pickled is not")


def _inner(content: Any) -> Any:
    """``torch.storage._load_from_bytes``: a tensor's numbers, in a file inside the file."""
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("a tensor without numbers")
    zipped = content.startswith(_ZIP)
    return _zipped(content, inside=True) if zipped else _stream(io.BytesIO(content), inside=True)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """``_codecs.encode``, by which old protocols write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an odd encoding")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """``bytes``, by which old protocols write that there are none."""
    return b""


class _Ordered(dict[Any, Any]):
    """``collections.OrderedDict``, as any dictionary is today."""


def _ordered(*pairs: Any) -> _Ordered:
    return _Ordered(*pairs)


def _set(members: Any = ()) -> set[Any]:
    return set(members)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _inner,
}
