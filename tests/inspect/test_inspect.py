"""lotus inspect: planted doubles, leaks, damage and wrong labels are found; the list goes where it shall."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lotus import cli
from lotus.inspect import doubles, labels
from selection import exclude
from selection.errors import Refused
from selection.images import Images
from selection.lottery import select
from selection.signals import Signals


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Pictures with structure at every scale."""
    rng = np.random.default_rng(seed)
    layers = [
        rng.uniform(0, 255, (count, side, side, 3)).repeat(32 // side, 1).repeat(32 // side, 2) for side in (2, 4, 8)
    ]
    return np.mean(layers, 0).astype(np.uint8)


def planted(picture: np.ndarray, kind: str) -> np.ndarray:
    image, packed = Image.fromarray(picture), io.BytesIO()
    if kind == "crop":
        return np.asarray(image.crop((2, 1, 31, 30)).resize((32, 32), Image.Resampling.BICUBIC))
    if kind == "flip":
        return picture[:, ::-1]
    if kind == "resize":
        return np.asarray(image.resize((20, 20)).resize((32, 32)))
    image.save(packed, "JPEG", quality=60)
    return np.asarray(Image.open(packed))


@pytest.mark.parametrize("kind", ["crop", "flip", "jpeg", "resize"])
def test_a_planted_double_is_found_and_nothing_else(kind: str) -> None:
    every = pictures(60)
    pairs, alike = doubles.find(np.concatenate([every, planted(every[7], kind)[None]]))
    assert pairs.tolist() == [[7, 60]]
    assert alike[0] >= doubles.SAME


def test_left_out_is_what_a_regression_without_the_image_says() -> None:
    rng = np.random.default_rng(0)
    x, own = rng.standard_normal((40, 3)).astype(np.float32), rng.integers(0, 2, 40)
    told = labels.left_out(x, own, 2)
    # Brute force: the same ridge without image 5.
    seen = np.c_[(x - x.mean(0)) / (x.std(0) + 1e-6), np.ones(40)]
    ridge = labels._RIDGE * np.trace(seen.T @ seen) / 4 * np.eye(4)
    logit = []
    for row in range(40):
        stay = np.arange(40) != row
        solved = np.linalg.solve(seen[stay].T @ seen[stay] + ridge, seen[stay].T @ np.eye(2)[own[stay]])
        scores = seen[row] @ solved
        logit.append(scores[1] - scores[0])
    by = np.log(told[:, 1] / told[:, 0]) / np.array(logit)  # one sharpness for all
    assert np.allclose(by, by[0], rtol=1e-3)


def test_confident_learning_by_hand() -> None:
    told = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.05, 0.95]])
    wrong, likelier, margin = labels.confident(told, np.array([0, 0, 1, 1, 0]))
    # Usual for 0: mean(0.9, 0.8, 0.05) = 0.583; for 1: 0.85. Only the last says the other class more surely than that.
    assert wrong.tolist() == [4]
    assert likelier.tolist() == [1]
    assert margin[4] == pytest.approx(-0.9)


def folder(root: Path) -> Path:
    every = pictures(50)
    for row, picture in enumerate(every):
        home = root / ("val" if row >= 40 else "train") / "ab"[row % 2]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(home / f"{row:02d}.png")
    Image.fromarray(planted(every[4], "flip")).save(root / "train/a/z mirrored.png")
    Image.fromarray(every[45]).save(root / "train/b/zz.jpg", quality=80)
    (root / "train/a/x.heic").write_bytes(b"no reader")
    (root / "train/a/zero.jpg").write_bytes(b"")
    (root / "train/b/page.jpg").write_bytes(b"<html>")
    return root


def test_a_folder_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = folder(tmp_path / "photos"), tmp_path / "out"
    assert cli.main(["inspect", str(root), "--out", str(out)]) == 0
    assert "1 .heic" in capsys.readouterr().out
    told = json.loads((out / "inspect.json").read_text())
    assert [Path(one["double"]).name for one in told["duplicates"]] == ["z mirrored.png"]
    assert [Path(one["val"]).name for one in told["leaks"]] == ["45.png"]
    assert {Path(one["image"]).name for one in told["damaged"]} == {"zero.jpg", "page.jpg"}
    listed = (out / "delete.txt").read_text().splitlines()
    assert {Path(name).name for name in listed} == {"z mirrored.png", "zz.jpg", "zero.jpg", "page.jpg"}
    assert all(Path(name).is_file() for name in listed)  # xargs finds them from here
    page = (out / "inspect.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "<script" not in page


def test_flags_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder(tmp_path / "photos")), "--delete", "twins"]) == 2
    assert "--delete twins" in capsys.readouterr().err


def test_what_is_excluded_is_in_no_ticket(tmp_path: Path) -> None:
    names = [f"c/{row}.png" for row in range(20)]
    images = Images(20, "data", np.arange(20) % 2, names=names, counted=25, index=np.arange(20))
    (tmp_path / "delete.txt").write_text("photos/train/c/3.png\nc/4.png\nc/held_out.png\n")
    gone = exclude.rows(tmp_path / "delete.txt", images)
    assert gone.tolist() == [3, 4]
    signals = Signals({"labels": np.arange(20) % 2, "given": np.arange(20.0)}, fingerprint="data")
    drawn = select(exclude.others(signals, gone), score="given", pick="top_k", keep=0.5, balance=False)
    ticket = exclude.among(drawn.subset, gone, signals)
    assert ticket.total == 20
    assert len(ticket) == 9
    assert not {3, 4} & set(ticket.rows.tolist())
    assert set(ticket.rows.tolist()) == {11, 12, 13, 14, 15, 16, 17, 18, 19}
    assert (tmp_path / "empty.txt").write_text("") == 0
    assert not len(exclude.rows(tmp_path / "empty.txt", images))


def test_a_list_of_everything_or_of_nothing_known(tmp_path: Path) -> None:
    images = Images(2, "data", np.arange(2), names=["c/0.png", "c/1.png"])
    (tmp_path / "all.txt").write_text("c/0.png\nc/1.png\n")
    with pytest.raises(Refused, match=r"select\.exclude: .* none is left"):
        exclude.rows(tmp_path / "all.txt", images)
    (tmp_path / "other.txt").write_text("d/9.png\n")
    with pytest.raises(Refused, match="no image of this data"):
        exclude.rows(tmp_path / "other.txt", images)
