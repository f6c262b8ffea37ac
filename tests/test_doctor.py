"""The doctor: each fault is named with its cure."""

from __future__ import annotations

import importlib.metadata
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from lotus import doctor


def asked(name: str) -> doctor.Check:
    """The first of the doctor's questions that is called so; no dearer one is asked."""
    return next(check for check in doctor.checks() if check.name == name)


def pair(torch: str, vision: str, requires: str) -> doctor.Check:
    versions = {"torch": torch, "torchvision": vision}
    return next(doctor.pair(versions.get, lambda name: ["numpy", requires]))


@pytest.mark.parametrize(
    ("torch", "vision", "requires", "fits"),
    [
        ("2.15.0", "0.29.2", "torch==2.15.0", True),
        ("2.13.0", "0.29.2", "torch==2.15.0", False),
        ("2.13.0+cpu", "0.28.0", "torch==2.13.0", False),
        ("2.13.0+cpu", "0.28.0+cpu", "torch==2.13.0", True),
        ("2.11.0+cu130", "0.26.0+cu130", "torch==2.11.0", True),
    ],
)
def test_torch_and_torchvision_must_be_a_pair(torch: str, vision: str, requires: str, fits: bool) -> None:
    check = pair(torch, vision, requires)
    assert bool(check.cure) is not fits
    if not fits:
        assert "no pair" in check.cure
        assert "pip install" in check.cure
        assert check.fatal


def test_this_machine_is_fit() -> None:
    assert doctor.refusals() == []


def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "timm":
            raise PackageNotFoundError
        return "2.9.1" if name == "torch" else "99.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = {name: asked(name) for name in ("torch", "timm", "numpy")}
    assert "torch >= 2.10" in said["torch"].cure
    assert said["timm"].found == "not installed"
    assert said["numpy"].cure == ""


def test_a_small_shm_and_no_compiler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 << 20})())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "--shm-size" in asked("/dev/shm").cure
    assert "g++" in asked("C++ compiler").cure


def test_a_run_is_read_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lotus import cli

    folder = tmp_path / "run"
    words = ["data.name=digits", "model.args={img_size: 8, patch_size: 4, embed_dim: 8, depth: 1, num_heads: 2}"]
    config = tmp_path / "c.yaml"
    config.write_text("data: {name: digits, write: raw, max_side: 0}\nmodel: {name: vit_tiny_patch16_224}\n")
    assert cli.main(["prepare", str(config), f"folder={folder}", *words]) == 0
    assert cli.main(["doctor", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "prepare" in said
    assert "not done yet" in said
    record = folder / "stages" / "prepare.json"
    whole = record.read_bytes()
    record.write_bytes(whole[:50])
    assert cli.main(["doctor", str(folder)]) == 2
    said = capsys.readouterr().out
    assert "was damaged" in said
    assert "Nothing is damaged" not in said
    record.write_bytes(whole)
    with (folder / "data" / "train.beton").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert cli.main(["doctor", str(folder)]) == 2
    said = capsys.readouterr().out
    assert "damaged" in said
    assert "train.beton" in "".join(said.split())
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "no run is here" in capsys.readouterr().err
