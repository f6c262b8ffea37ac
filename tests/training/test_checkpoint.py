"""Checkpoints: whatever is broken off, an intact one remains, and is found."""

from __future__ import annotations

import builtins
import errno
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from lotus.training import checkpoint
from lotus.training.checkpoint import FORMAT, Checkpoints, check_fits, verify
from selection.errors import Refused


def held(number: int, size: int = 50) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors from which the number can be told."""
    return {
        "weights": {"a": torch.full((size,), float(number)), "b.c": torch.arange(3) + number},
        "moments": {"a/step": torch.tensor(float(number))},
    }


def number_of(found: checkpoint.Checkpoint | None) -> int:
    """Which save this is; every part of it must be of the same."""
    assert found is not None
    numbers = {int(found.tensors["weights"]["a"][0]), int(found.tensors["moments"]["a/step"]), found.state["number"]}
    assert len(numbers) == 1
    return numbers.pop()


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    points = Checkpoints(tmp_path / "checkpoints", key="k")
    assert points.latest() == (None, [])
    path = points.save(held(7), {"number": 7, "rate": 0.1, "loss": float("nan")})
    found, passed = points.latest()
    assert path.name == "000001"
    assert not passed
    assert number_of(found) == 7
    assert found is not None
    assert found.state["rate"] == 0.1
    assert torch.equal(found.tensors["weights"]["b.c"], torch.arange(3) + 7)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_the_last_two_stay(tmp_path: Path) -> None:
    points = Checkpoints(tmp_path, key="k")
    for number in range(1, 5):
        points.save(held(number), {"number": number})
    assert sorted(os.listdir(tmp_path)) == ["000003", "000004"]
    assert number_of(points.latest()[0]) == 4


def test_another_key_is_passed_over(tmp_path: Path) -> None:
    Checkpoints(tmp_path, key="old").save(held(1), {"number": 1})
    new = Checkpoints(tmp_path, key="new")
    found, passed = new.latest()
    assert found is None
    assert "made with other settings" in passed[0]
    new.save(held(2), {"number": 2})
    assert number_of(new.latest()[0]) == 2
    assert number_of(Checkpoints(tmp_path, key="old").latest()[0]) == 1


def spoil_missing(path: Path) -> None:
    (path / "moments.safetensors").unlink()


def spoil_cut(path: Path) -> None:
    os.truncate(path / "weights.safetensors", 40)


def spoil_bit(path: Path) -> None:
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)


def spoil_state(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text().replace("7", "8"))


def spoil_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("")


def spoil_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def spoil_hollow(path: Path) -> None:
    (path / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": {}}))


def spoil_future(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def spoil_outside(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../x"] = {"bytes": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))


def spoil_other(path: Path) -> None:
    """Of another program, which keeps the same books."""
    (path / "state.json").write_text("[1]")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = checkpoint._told(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_missing, "moments.safetensors is missing"), (spoil_cut, "weights.safetensors has 40 bytes of"),
        (spoil_bit, "weights.safetensors is not what was written"), (spoil_state, "state.json is not what was written"),
        (spoil_manifest, "cannot be read"), (spoil_no_manifest, "manifest.json is missing"),
        (spoil_hollow, "does not name state.json"), (spoil_future, "format is 99"), (spoil_outside, "not inside"),
        (spoil_other, "cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_named_and_passed_over(tmp_path: Path, spoil, told: str) -> None:
    points = Checkpoints(tmp_path, key="k")
    points.save(held(1), {"number": 1})
    spoil(points.save(held(7), {"number": 7}))
    found, passed = points.latest()
    assert number_of(found) == 1
    assert len(passed) == 1
    assert "000002" in passed[0]
    assert told in passed[0]


class Fault(BaseException):
    """The process dies here, as far as the code can tell."""


def faults(patch: pytest.MonkeyPatch, after: int, error: type[BaseException] | OSError) -> list[int]:
    """Fail at call number ``after`` of anything that touches the disk; the list holds how many there were."""
    calls = [0]

    def failing(real):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] > after:
                raise error
            return real(*args, **kwargs)

        return call

    for name in ("replace", "open", "fsync"):
        patch.setattr(os, name, failing(getattr(os, name)))
    patch.setattr(builtins, "open", failing(builtins.open))
    patch.setattr(checkpoint, "put_tensors", failing(checkpoint.put_tensors))
    return calls


@pytest.mark.parametrize("error", [Fault, OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_at_every_write_an_intact_one_remains(tmp_path: Path, error) -> None:
    points = Checkpoints(tmp_path, key="k")
    points.save(held(0), {"number": 0})
    after, last = 0, 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            calls = faults(patch, after, error)
            fault = ""
            try:
                points.save(held(after + 1), {"number": after + 1})
            except (Fault, Refused) as raised:
                fault = f"{type(raised).__name__} {raised}"
        assert "Refused" not in fault or "cannot be written: No space left on device. Free some space" in fault
        found = number_of(points.latest()[0])
        assert found in (last, after + 1)
        last = found
        if not fault and calls[0] <= after:
            break
        after += 1
    assert after > 12
    points.save(held(99), {"number": 99})
    assert all(name.isdigit() for name in os.listdir(tmp_path)), "what the kills left is taken away"
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """A child writes without pause and is killed, again and again, in the same folder."""
    dice = random.Random(0)
    seen, longest = 0, 0.04
    for turn in range(500):
        if turn >= 25 and seen > 1:
            break
        if turn and not seen:  # on a busy machine a child may not get as far as a first one
            longest *= 1.2
        child = os.fork()
        if child == 0:
            try:
                points = Checkpoints(tmp_path, key="k")
                number = 0 if (found := points.latest()[0]) is None else number_of(found)
                while True:
                    number += 1
                    points.save(held(number, size=20_000), {"number": number})
            finally:
                os._exit(1)
        time.sleep(0.005 + longest * dice.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found, passed = Checkpoints(tmp_path, key="k").latest()
        assert not passed, "a folder with a checkpoint's name is whole"
        if found is not None:
            assert number_of(found) >= seen
            seen = number_of(found)
    assert seen > 1


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as a full disk")
def test_a_disk_that_is_full_for_real(tmp_path: Path) -> None:
    points = Checkpoints(tmp_path, key="k")
    points.save(held(1), {"number": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(Refused, match=r"000002: .*cannot be written"):
            points.save(held(2, size=1_000_000), {"number": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == ["000001"]
    assert number_of(points.latest()[0]) == 1


def test_another_model_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    points = Checkpoints(tmp_path, key="k")
    points.save(held(1), {"number": 1})
    found = points.latest()[0]
    assert found is not None
    check_fits(found, {"a": (50,), "b.c": (3,)})
    with pytest.raises(Refused, match=r"000001: .*a is \(50,\) .*\(60,\).*Remove "):
        check_fits(found, {"a": (60,), "b.c": (3,)})
    with pytest.raises(Refused, match=r"z is nothing there and \(1,\) here"):
        check_fits(found, {"a": (50,), "b.c": (3,), "z": (1,)})


def test_verify_gives_the_state(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, key="k").save(held(1), {"number": 1})
    assert verify(path) == {"format": FORMAT, "key": "k", "state": {"number": 1}}
