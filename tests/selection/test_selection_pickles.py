"""What pickles may hold, at every protocol; and what hostile ones may not do: reach memory, run code, take what they claim."""

from __future__ import annotations

import collections
import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selection import pickles

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def same(left: Any, right: Any) -> bool:
    if isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and np.array_equal(left, right)
    if isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in right)
    if isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


SHARED = [1, 2.5]
VALUES = {
    "plain": [1, -(2**70), 2.5, None, True, "é", b"\xff", (1, (2,)), {3}],
    "shared": [SHARED, SHARED, (SHARED,)],
    "arrays": [np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.array(3), np.zeros((0, 5)), np.arange(9)[::2]],
    "types": [np.arange(4).astype(code) for code in ("?", "i1", "u8", "<f2", ">f8", ">i4", "S3", "U5", ">U2")],
    "scalars": {"a": np.float64(1.5), "b": np.int64(3), "c": np.bool_(True), "d": np.str_("x")},
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", VALUES)
def test_what_is_plain_comes_back(name: str, protocol: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pickle.dumps(VALUES[name], protocol=protocol))
    assert same(pickles.load(tmp_path / "x"), VALUES[name])


def test_what_the_latest_protocol_alone_writes(tmp_path: Path) -> None:
    held = [frozenset({4}), bytearray(b"ab")]
    (tmp_path / "x").write_bytes(pickle.dumps(held, protocol=5))
    assert same(pickles.load(tmp_path / "x"), held)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_ordered_dictionary_is_a_dictionary(protocol: int, tmp_path: Path) -> None:
    held = collections.OrderedDict(b=np.arange(3), a=1)
    (tmp_path / "x").write_bytes(pickle.dumps(held, protocol=protocol))
    assert same(pickles.load(tmp_path / "x"), dict(held))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_back_as_torch_reads_them(zipped: bool, tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    held = {"whole": whole, "view": whole.T[1:], "flags": torch.tensor([True, False]), "none": torch.zeros(0, 3)}
    layer = torch.nn.Linear(2, 3).state_dict()  # hangs metadata on its dictionary
    torch.save([held, layer], tmp_path / "x", _use_new_zipfile_serialization=zipped)
    wanted = torch.load(tmp_path / "x", weights_only=True)
    found = pickles.load(tmp_path / "x")
    for got, right in zip(found, wanted, strict=True):
        assert same(got, {name: tensor.numpy() for name, tensor in right.items()})


def test_a_tensor_inside_a_plain_pickle(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pickle.dumps({"s": torch.arange(3)}))
    assert same(pickles.load(tmp_path / "x"), {"s": np.arange(3)})


def test_a_truth_value_is_one_or_none_whatever_its_byte(tmp_path: Path) -> None:
    """numpy adds the bytes up to know how many there are, and so would write beyond what it has taken."""
    whole = pickle.dumps(np.array([True] * 8), protocol=4)
    (tmp_path / "x").write_bytes(whole.replace(b"\x01" * 8, b"\x05" * 8))
    assert pickles.load(tmp_path / "x").view(np.uint8).tolist() == [1] * 8


# ------------------------------------------------------------------------------------------------------- hostile


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    return f"I{value}\n".encode()


def text(value: str) -> bytes:
    return f"V{value}\n".encode()


def raw(value: bytes) -> bytes:
    return b"B" + len(value).to_bytes(4, "little") + value


def group(*members: bytes) -> bytes:
    return b"(" + b"".join(members) + b"t"


ADDRESS = raw(b"A" * 8)
CORE = "numpy.core.multiarray"
ARRAY = b"cnumpy\nndarray\n"
EMPTY = call(CORE, "_reconstruct", ARRAY, group(number(0)), raw(b"b"))
F8 = call("numpy", "dtype", text("f8"))
OBJECT = call("numpy", "dtype", text("O8"))
RECORD = (
    call("numpy", "dtype", text("V8"))
    + group(number(3), text("|"), b"N", group(text("a")), b"}" + text("a") + group(OBJECT, number(0)) + b"s",
            number(8), number(1), number(27)) + b"b"
)  # fmt: skip
PICKLED = EMPTY + group(number(1), group(number(1)), F8, b"\x89", raw(b"A" * 8)) + b"b"
PIECES = {
    "an array by its constructor": call("numpy", "ndarray", group(number(1)), text("O"), ADDRESS),
    "the same of numbers": call("numpy", "ndarray", group(number(1)), text("f8"), ADDRESS),
    "beyond its bytes": call("numpy", "ndarray", group(number(1 << 20)), text("f8"), ADDRESS),
    "an array of objects": EMPTY + group(number(1), group(number(1)), OBJECT, b"\x89", ADDRESS) + b"b",
    "objects out of a buffer": call("numpy.core.numeric", "_frombuffer", ADDRESS, OBJECT, group(number(1)), text("C")),
    "an object as a scalar": call(CORE, "scalar", OBJECT, ADDRESS),
    "a record of objects": call(CORE, "scalar", RECORD, ADDRESS),
    "a dtype of a record": call("numpy", "dtype", b"](" + group(text("a"), text("O")) + b"e"),
    "a dtype by text": call("numpy", "dtype", text("f8,O")),
    "a record under another name": call("numpy", "dtype", text("f8"))
    + group(number(3), text("<"), b"N", group(text("a")), b"}", number(8), number(1), number(63)) + b"b",
    "bytes too few": EMPTY + group(number(1), group(number(1 << 40)), F8, b"\x89", ADDRESS) + b"b",
    "bytes too many": EMPTY + group(number(1), group(number(0)), F8, b"\x89", ADDRESS) + b"b",
    "a side below none": EMPTY + group(number(1), group(number(-1), number(-1)), F8, b"\x89", ADDRESS) + b"b",
    "sides that overflow": EMPTY + group(number(1), group(number(1 << 33), number(1 << 31)), F8, b"\x89", raw(b"")) + b"b",
    "a shape of texts": EMPTY + group(number(1), group(text("1")), F8, b"\x89", ADDRESS) + b"b",
    "no bytes but a list": EMPTY + group(number(1), group(number(1)), F8, b"\x89", b"]" + number(1) + b"a") + b"b",
    "nothing in it": EMPTY,
    "a type and nothing else": F8,
    "an array named": ARRAY,
    "another class rebuilt": call(CORE, "_reconstruct", b"cnumpy\ndtype\n", group(number(0)), raw(b"b")),
    "a subclass of an array": call(CORE, "_reconstruct", b"cnumpy\nmatrix\n", group(number(0)), raw(b"b")),
    "a function given new defaults": b"c_codecs\nencode\n" + group(b"N", b"}" + text("__defaults__") + b")s") + b"b",
    "a class given a new method": b"cnumpy\ndtype\n" + group(b"N", b"}" + text("build") + b"c__builtin__\nset\ns") + b"b",
    "a list that is built": b"]" + number(1) + b"b",
    "an array built twice": PICKLED + group(number(1), group(number(1 << 30)), F8, b"\x89", ADDRESS) + b"b",
    "a new object": ARRAY + group(group(number(1)), text("O"), ADDRESS) + b"\x81",
    "an object of old": b"(" + ARRAY + group(number(1)) + text("O") + ADDRESS + b"o",
    "an instance of old": b"(" + group(number(1)) + text("O") + ADDRESS + b"inumpy\nndarray\n",
    "an extension": b"\x82\x01",
    "a buffer from outside": b"\x97",
    "a memory slot far away": b"Nr\xff\xff\xff\xff",
    "a byte array of a terabyte": b"\x96" + (1 << 40).to_bytes(8, "little"),
    "bytes of a terabyte": b"\x8e" + (1 << 40).to_bytes(8, "little"),
    "a text of a terabyte": b"\x8d" + (1 << 40).to_bytes(8, "little"),
    "a number of 100,000 digits": b"I" + b"9" * 100_000 + b"\n",
    "a list in a list, 100,000 deep": b"]" * 100_000 + b"a" * 99_999,
    "lists that unfold": b"]q\x00(" + b"K\x01" * 50 + b"e" + b"".join(
        b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 50 + b"e" for level in range(1, 8)),
    "a list of itself": b"]q\x00h\x00a",
}  # fmt: skip
MEANT = {"a memory slot far away": None}  # a slot is a name for what was made: here of nothing, and nothing is taken


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_pickle_is_refused_and_reaches_no_memory(wrapped: bool, tmp_path: Path) -> None:
    """In a process of its own, which a wild pointer would end, with 2 GB beyond what it starts with."""
    for row, piece in enumerate(PIECES.values()):
        inside = call("__builtin__", "set", group(piece)) if wrapped else piece
        (tmp_path / f"{row:02}").write_bytes(b"\x80\x02" + inside + b".")
    code = (
        "import resource, sys, pathlib\n"
        "from selection import pickles\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30),) * 2)\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: found = 'read ' + repr(pickles.load(file))\n"
        "    except Exception as error: found = 'refused ' + type(error).__name__\n"
        "    print(found, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=100
    )
    said = dict(zip(PIECES, done.stdout.splitlines(), strict=False))
    assert done.returncode == 0, f"{done.returncode} after {list(said)[-1:]}: {done.stderr}"
    read = {name for name, word in said.items() if not word.startswith("refused")}
    assert len(said) == len(PIECES)
    assert read == set(MEANT), {name: said[name] for name in read}


def packed(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"x/{name.replace('__', '/').replace('_', '.')}", content)
    return file.getvalue()


def tensor(count: int, size: int, stride: int) -> bytes:
    storage = group(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), number(count)) + b"Q"
    whole = (storage, number(0), group(number(size)), group(number(stride)))
    return b"\x80\x02" + call("torch._utils", "_rebuild_tensor_v2", *whole) + b"."


def test_a_zip_file_that_claims_more_than_it_has(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(packed(data_pkl=tensor(1 << 22, 4, 1), data__0=bytes(1 << 24)))
    with pytest.raises(pickle.UnpicklingError, match="claims"):
        pickles.load(tmp_path / "x")


@pytest.mark.parametrize(("size", "stride", "match"), [(5, 1, "inside"), (1 << 50, 0, "many times")])
def test_a_tensor_larger_than_its_numbers(size: int, stride: int, match: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", tensor(4, size, stride))
        archive.writestr("x/data/0", bytes(16))
    (tmp_path / "x").write_bytes(file.getvalue())
    with pytest.raises(pickle.UnpicklingError, match=match):
        pickles.load(tmp_path / "x")


def test_a_storage_larger_than_its_file_takes_no_memory(tmp_path: Path) -> None:
    parts = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, dict[str, str]())]
    file = b"".join(parts) + tensor(1 << 40, 4, 1) + pickle.dumps(["0"], protocol=2) + (1 << 40).to_bytes(8, "little")
    (tmp_path / "x").write_bytes(file + bytes(64))
    with pytest.raises(pickle.UnpicklingError, match="cut short"):
        pickles.load(tmp_path / "x")
