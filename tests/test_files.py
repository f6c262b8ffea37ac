"""Every writer of LOTUS writes by lotus.files: what a user has beside is left alone, what fails is refused, nothing stays half."""

from __future__ import annotations

import ast
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lotus import export, files
from lotus.cli import main
from lotus.config import Data
from lotus.data import beton, catalog, patch_maps
from lotus.pruning import spec
from lotus.report import ticket_picture as picture
from lotus.training.checkpoint import Checkpoints
from selection import exchange
from selection.errors import Refused
from selection.exchange import Images
from selection.signals import Signals
from selection.subset import Known, Subset

ROOT = Path(__file__).resolve().parent.parent
LABELS = np.arange(20) % 2
IMAGES = Images(20, "some", LABELS, ("a", "b"))


def subset(size: int) -> Subset:
    return Subset(np.arange(size), total=20, fingerprint="some", known=Known(LABELS, ("a", "b")))


def model(size: int) -> Any:
    from lotus.config import Model
    from lotus.vit.model import create

    args = {"img_size": 8, "patch_size": 4, "embed_dim": 8 * size, "depth": 1, "num_heads": 2}
    return create(Model(name="vit_tiny_patch16_224", args=args), 2)


def images(size: int, file: Path) -> None:
    train, _ = catalog.digits("")
    list(beton.prepare(train.part(np.arange(100 * size), "some"), file, Data(loader="torch"), anew=True))


def maps(size: int, file: Path) -> None:
    patch_maps.save(file, np.zeros((size, 2, 2), np.uint8), size=8, fingerprint="some")


def exported(size: int, file: Path) -> None:
    export.export(model(size), file.parent, onnx=False)


WRITERS: dict[str, tuple[str, Callable[[int, Path], Any]]] = {
    "text": ("t.txt", lambda size, file: files.write_text(file, "x" * size)),
    "json": ("t.json", lambda size, file: files.write_json(file, [size])),
    "tensors": ("gates.safetensors", lambda size, file: files.write_tensors(file, {"g": torch.zeros(size)})),
    "ticket": ("t.npz", lambda size, file: subset(size).save(file)),
    "signals": ("s.npz", lambda size, file: Signals({"labels": LABELS[: 4 * size]}, fingerprint="s").save(file)),
    "list": ("t.csv", lambda size, file: exchange.write(subset(size), file, IMAGES)),
    "picture": ("t.png", lambda size, file: picture.write(file, subset(size))),
    "patches": ("patches-0.npz", maps),
    "images": ("train.beton", images),
    "model": ("final", lambda size, file: spec.save(model(size), file)),
    "weights": ("model.safetensors", exported),
    "checkpoint": (
        "000001",
        lambda size, file: Checkpoints(file.parent, key="k").save({"w": {"w": torch.ones(size)}}, {}),
    ),
}
every = pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)


def told(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@every
def test_what_a_user_has_beside_is_left_alone(name: str, write: Callable[[int, Path], Any], tmp_path: Path) -> None:
    """All names that were once taken for what is being written, as files and as folders."""
    stem = Path(name).stem
    once = [f"{name}.tmp", f".{name}.tmp", f".{name}.{os.getpid()}.tmp", f"{name}.{os.getpid()}.tmp", f".{name}.old"]
    once += [f".{name}", f".{stem}.json.tmp", f".writing-{name}", f".{name}.part", f".{name}.0123.part"]
    for number, mine in enumerate(dict.fromkeys(once)):
        if number % 2:
            (tmp_path / mine).write_text("years of work")
        else:
            (tmp_path / mine).mkdir()
            (tmp_path / mine / "a").write_text("years of work")
    before = told(tmp_path)
    write(2, tmp_path / name)
    assert before.items() <= told(tmp_path).items()
    assert (tmp_path / name).exists()


@every
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_and_nothing_else(
    name: str, write: Callable[[int, Path], Any], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "deep" / name
    write(1, place)
    before = told(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(Refused, match=r"(?i)no space left.*(make room|free some space)"):
        write(2, place)
    now = told(tmp_path)
    for late in (
        "train.json",
        "model.safetensors",
        "MODEL.md",
        "config.json",
        "README.md",
    ):  # an older file that must not stand beside a newer one
        now.pop(f"deep/{late}", None), before.pop(f"deep/{late}", None)
    assert now == before


@every
def test_others_may_read_it_where_the_umask_says_so(
    name: str, write: Callable[[int, Path], Any], tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        write(1, tmp_path / name)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_six_tickets_into_one_file_all_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signals = Signals({"labels": np.arange(2000) % 10, "error_norm": np.ones((1, 1, 2000))}, fingerprint="s")
    signals.save(tmp_path / "signals.npz")
    monkeypatch.chdir(tmp_path)
    words = ["select", "signals.npz", "--score", "el2n", "--pick", "top_k", "--keep", "0.5", "--out", "t.npz"]
    children = []
    for seed in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = main([*words, "--seed", str(seed)])
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert len(Subset.load(tmp_path / "t.npz")) == 1000
    assert sorted(os.listdir(tmp_path)) == ["signals.npz", "t.npz"]


def test_tensors_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "g.safetensors", {"g": torch.arange(100.0)})
    assert torch.equal(files.read_tensors(tmp_path / "g.safetensors", "")["g"], torch.arange(100.0))
    whole = (tmp_path / "g.safetensors").read_bytes()
    for content in (whole[:-10], whole[:4], b"", None):
        (tmp_path / "g.safetensors").unlink()
        if content is not None:
            (tmp_path / "g.safetensors").write_bytes(content)
        with pytest.raises(Refused, match=r"g\.safetensors: cannot be read .* Train again"):
            files.read_tensors(tmp_path / "g.safetensors", "Train again.")


BARE = {"replace", "rename", "fsync", "mkstemp", "mkdtemp", "save_file", "NamedTemporaryFile"}


@pytest.mark.parametrize("top", ["lotus", "selection", "tools"])
def test_nobody_else_renames_or_syncs(top: str) -> None:
    """``os.replace`` and its like stand in the two files modules alone."""
    for path in sorted((ROOT / top).rglob("*.py")):
        if path.name in ("files.py", "atomic_files.py"):
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if any(name in text for name in ("os.", "tempfile", *BARE)) else ():
            if isinstance(node, ast.Attribute) and node.attr in BARE and isinstance(node.value, ast.Name):
                assert node.value.id not in ("os", "tempfile"), f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert not BARE & {alias.name for alias in node.names if node.module != "dataclasses"}, path
