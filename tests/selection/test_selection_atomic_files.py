"""Files are whole or not there, whatever fails; what lies beside them is left alone; a kill leaves nothing that stays."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from selection import atomic_files
from selection.errors import Refused


def writes_a_folder(path: Path, text: str) -> None:
    with atomic_files.refusing(path), atomic_files.folder_beside(path, replace=True) as new:
        (new / "inside").write_text(text)


def content(path: Path) -> str:
    return ((path / "inside") if path.is_dir() else path).read_text().strip().strip('"')


WRITERS: dict[str, Callable[..., None]] = {
    "bytes": lambda path, text: atomic_files.write_bytes(path, text.encode()),
    "text": atomic_files.write_text,
    "json": atomic_files.write_json,
    "folder": writes_a_folder,
}
every = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@every
def test_what_was_there_is_replaced_and_nothing_lies_beside(write, tmp_path):
    path = tmp_path / "deep" / "x"
    for text in ("old", "new"):
        write(path, text)
        assert content(path) == text
    assert os.listdir(path.parent) == ["x"]


@every
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("step", ["mkdir", "fsync", "replace"])
def test_a_write_that_fails_is_refused_and_leaves_what_was(write, code, step, tmp_path, monkeypatch):
    path = tmp_path / "x"
    write(path, "old")

    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        with pytest.raises(Refused) as refused:
            write(path, "new")
    cure = {errno.ENOSPC: "Make room", errno.EACCES: "Make it writable", errno.EROFS: "Make it writable"}.get(
        code, "place"
    )
    assert str(refused.value).startswith(f"{path}: cannot be written ({os.strerror(code)})")
    assert cure in str(refused.value)
    assert content(path) == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_the_second_of_two_renames_of_a_folder_fails(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "x", os.replace, []
    writes_a_folder(path, "old")

    def fails(old, new):
        calls.append(new)
        if len(calls) == 3:  # onto the folder; the folder aside; onto its place
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(Refused, match="Input/output"):
        writes_a_folder(path, "new")
    assert content(path) == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("write", [WRITERS["bytes"], WRITERS["json"]])
def test_what_is_no_plain_file_is_not_replaced(write, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "."):
        with pytest.raises(Refused, match="cannot be written"):
            write(tmp_path / name, "new")
        with pytest.raises(Refused, match="cannot be written"):
            atomic_files.check(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(Refused, match="no plain file"):
        atomic_files.append(tmp_path / "pipe", "would wait for a reader")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_folder_that_is_not_to_be_replaced_stays(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    with (
        pytest.raises(Refused, match="not empty"),
        atomic_files.refusing(tmp_path / "x"),
        atomic_files.folder_beside(tmp_path / "x"),
    ):
        pass
    assert os.listdir(tmp_path / "x") == ["mine"]
    assert os.listdir(tmp_path) == ["x"]


@every
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_are_what_the_umask_says(write, umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "x", "new")
        (tmp_path / "usual").touch()
    finally:
        os.umask(before)
    made = tmp_path / "x"
    inside = made / "inside" if made.is_dir() else made
    assert stat.S_IMODE(inside.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@every
def test_many_at_once_all_succeed(write, tmp_path):
    faults: list[BaseException] = []

    def go(who: int) -> None:
        try:
            for turn in range(10):
                write(tmp_path / "x", f"{who} {turn}")
        except BaseException as fault:
            faults.append(fault)

    writers = [threading.Thread(target=go, args=(who,)) for who in range(6)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert not faults
    assert content(tmp_path / "x").endswith(" 9")
    assert os.listdir(tmp_path) == ["x"]


def test_a_name_as_long_as_a_name_can_be(tmp_path):
    name = "ü" * 127 + "x"
    atomic_files.write_text(tmp_path / name, "new")
    assert os.listdir(tmp_path) == [name]


KILLED = """
import os, signal, sys
from selection import atomic_files
real, left = os.replace, [int(sys.argv[2])]
def dies(old, new):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(old, new)
os.replace = dies
with atomic_files.folder_beside(sys.argv[1], replace=True) as new:
    (new / "inside").write_text("new")
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("cure", ["tidy", "recover"])
def test_a_kill_loses_nothing_and_what_it_leaves_goes(renames, cure, tmp_path):
    """Killed before the first try, between the two renames of a folder, and after the older one has gone aside."""
    path = tmp_path / "x"
    writes_a_folder(path, "old")
    (tmp_path / ".mine.part").mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(renames)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == (3 if renames < 2 else 2)
    getattr(atomic_files, cure)(tmp_path if cure == "tidy" else path)
    assert content(path) == "old"
    atomic_files.tidy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine.part", "x"]


def test_what_somebody_is_at_work_on_is_not_taken_away(tmp_path):
    with atomic_files.beside(tmp_path / "x") as new:
        new.write_text("new")
        atomic_files.tidy(tmp_path)
        assert new.read_text() == "new"
    assert content(tmp_path / "x") == "new"
    atomic_files.tidy(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------- lines, hash


def test_a_line_that_finds_no_room_leaves_the_lines_before(tmp_path):
    """For real: the limit on a file's size lets a part of the line in."""
    path = tmp_path / "log"
    atomic_files.append(path, "first")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        with pytest.raises(Refused, match=r"log: cannot be written \(File too large\)"):
            atomic_files.append(path, "x" * 100)
        assert path.read_text() == "first\n"
        atomic_files.append(path, "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    with path.open("a") as cut:
        cut.write("cut off by a ki")
    atomic_files.append(path, "third")
    assert path.read_text().splitlines() == ["first", "second", "cut off by a ki", "third"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_know_is_named(number, tmp_path):
    with pytest.raises(Refused, match=rf"x.json: .* model.losses.1 is {number}"):
        atomic_files.write_json(tmp_path / "x.json", {"model": {"losses": [1.0, number]}})
    assert os.listdir(tmp_path) == []


def test_hashes_are_what_other_programs_print(tmp_path):
    (tmp_path / "a").write_bytes(b"some")
    (tmp_path / "b").write_bytes(b" bytes")
    both = [tmp_path / "a", tmp_path / "b"]
    assert atomic_files.digest_of(*both, size=32) == hashlib.blake2b(b"some bytes", digest_size=32).hexdigest()
    assert atomic_files.digest_of(*both, sha256=True) == hashlib.sha256(b"some bytes").hexdigest()
    value = {"b": [1, 2.5], "a": None}
    assert atomic_files.digest(value) == atomic_files.digest(json.loads(json.dumps({"a": None, "b": [1, 2.5]})))
    assert atomic_files.digest(value) == hashlib.blake2b(b'{"a": null, "b": [1, 2.5]}', digest_size=12).hexdigest()
