"""Files of arrays from elsewhere: what they claim is held to the bytes that are there and to the memory that is free."""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selection import exchange, memory, npz, parsing
from selection.errors import Refused
from selection.exchange import Images
from selection.signals import Signals
from selection.subset import Subset


def claiming(shape: tuple[int, ...], dtype: str = "<f8", content: bytes = bytes(64)) -> bytes:
    """A .npy of which the header says whatever it likes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + content


def archive(file: Path, packed: bool = False, **members: bytes) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as opened:
        for name, content in members.items():
            opened.writestr(f"{name}.npy", content)
    return file


def written(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


CLAIMS = {
    "a terabyte": claiming((1 << 37,)),
    "one too many": claiming((9,)),
    "an overflow": claiming((1 << 32, 1 << 32)),
    "of nothing": claiming((1 << 50,), "|V0"),
    "of empty texts": claiming((1 << 50,), "<U0"),
    "one large thing": claiming((1,), f"|V{1 << 30}"),
    "below none": claiming((-1, -8)),
    "no array": b"hello",
    "cut short": claiming((8,))[:20],
    "objects": claiming((8,), "|O"),
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_claim_is_refused_before_memory_is_taken(
    name: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object, **__: object) -> None:
        raise AssertionError("it is read, though its head shows that it cannot be")

    file = archive(tmp_path / "x.npz", packed, a=CLAIMS[name])
    (tmp_path / "x.npy").write_bytes(CLAIMS[name])
    monkeypatch.setattr(np.lib.format, "read_array", taken)
    for read in (lambda: npz.arrays(file), lambda: npz.array(tmp_path / "x.npy")):
        with pytest.raises(ValueError, match=r".") as caught:
            read()
        assert not isinstance(caught.value, Refused), "not for want of memory"


def test_what_fits_no_memory_is_refused_though_its_bytes_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = archive(tmp_path / "x.npz", a=written(np.zeros(1000)), b=written(np.zeros(10)))
    np.save(tmp_path / "x.npy", np.zeros(1000))
    monkeypatch.setattr(memory, "available", lambda: 5e-6)
    for read in (lambda: npz.arrays(file), lambda: npz.array(tmp_path / "x.npy")):
        with pytest.raises(Refused, match=re.escape("x.np") + ".*GB"):
            read()
    assert npz.arrays(file, {"b"})["b"].shape == (10,)


def test_what_is_whole_comes_back(tmp_path: Path) -> None:
    held = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.array("text"),
        "c": np.zeros((0, 1 << 40)),
        "d": np.array([True]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **held, zeros=np.zeros(1 << 20))
        found = npz.arrays(tmp_path / "x.npz")
        assert all(np.array_equal(found[name], array) for name, array in held.items())
    np.save(tmp_path / "x.npy", held["a"].T)
    assert np.array_equal(npz.array(tmp_path / "x.npy"), held["a"].T)


def test_a_truth_value_is_one_or_none(tmp_path: Path) -> None:
    file = archive(tmp_path / "x.npz", a=claiming((4,), "|b1", b"\x00\x05\xff\x01"))
    assert npz.arrays(file)["a"].view(np.uint8).tolist() == [0, 1, 1, 1]


def test_signals_and_files_of_others_go_the_same_way(tmp_path: Path) -> None:
    plain = Images(10, "data", np.arange(10) % 3)
    about = written(np.array('{"kind": "signals of LOTUS", "format": 1, "fingerprint": "x"}'))
    archive(tmp_path / "s.npz", labels=CLAIMS["a terabyte"], about=about)
    with pytest.raises(Refused, match="'labels' claims"):
        Signals.load(tmp_path / "s.npz")
    archive(tmp_path / "x.npz", a=CLAIMS["a terabyte"])
    (tmp_path / "x.npy").write_bytes(CLAIMS["a terabyte"])
    for name in ("x.npz", "x.npy"):
        with pytest.raises(Refused, match="claims"):
            exchange.read(tmp_path / name, plain)


def test_a_ticket_of_a_quadrillion_images(tmp_path: Path) -> None:
    Subset(np.array([1, 2]), 10, fingerprint="x").save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as found:
        told, rows, weights = str(found["about"]), found["rows"], found["weights"]
    np.savez(tmp_path / "t.npz", rows=rows, weights=weights, about=np.array(told.replace("10", str(10**15))))
    with pytest.raises(Refused, match=r"t.npz: a ticket of 1000000000000000 images.*GB"):
        Subset.load(tmp_path / "t.npz")


def test_memory_that_is_free_is_some() -> None:
    assert 0 < memory.available() <= math.inf
    memory.there(0.0, "nothing", "")
    with pytest.raises(Refused, match="all: takes"):
        memory.there(1e12, "all", "")


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, told in {"max": "8000000\n", "current": "6000000\n", "stat": "anon 5\ninactive_file 1000000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(told)
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert memory.available() == pytest.approx(0.003)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() > 0.003


def test_a_pickle_larger_than_memory_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "t.pkl").touch()
    os.truncate(tmp_path / "t.pkl", 1 << 42)
    with pytest.raises(Refused, match=r"t.pkl: takes .* GB of memory"):
        parsing.table(tmp_path / "t.pkl")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_lies_unpacked_in_a_file_is_mapped(tmp_path: Path, save: Any, order: Any) -> None:
    file, rng = tmp_path / "x.npz", np.random.default_rng(0)
    made = {
        "x": np.array(rng.integers(0, 256, (50, 4, 3), np.uint8), order=order),
        "none": np.zeros((0, 4)),
        "y": np.arange(50),
    }
    save(file, **made)
    found = npz.arrays(file, mapped={"x", "none"})
    assert isinstance(found["x"], np.memmap) == (save is np.savez)
    assert not isinstance(found["y"], np.memmap)
    for name, array in made.items():
        assert np.array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    if save is np.savez:
        with file.open("r+b") as opened:
            opened.seek(file.read_bytes().index(made["x"].tobytes(order="A")) + 7)
            opened.write(b"\0\1\2\3")
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            npz.arrays(file, mapped={"x"})
