"""What is asked of a run's folder outside of the order of its stages: a model measured on other images, patches without a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lotus
from lotus.cli import main
from lotus.config import Model
from lotus.data.beton import Manifest
from lotus.vit.model import create

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
SMALL = ["data.write=raw", "data.loader=torch", *(f"model.args.{name}={value}" for name, value in ARGS.items())]


def draw(folder: Path, seed: int, val: int, names: str = "abc") -> Path:
    rng = np.random.default_rng(seed)
    for part, count in (("train", 6), ("val", val)):
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared images, and a model that never trained."""
    folder = tmp_path_factory.mktemp("run")
    photos = draw(folder / "photos", seed=0, val=4)
    (folder / "mine.yaml").write_text(f"data: {{path: '{photos}'}}\nfolder: '{folder / 'run'}'\n")
    assert main(["prepare", str(folder / "mine.yaml"), *SMALL, "--plain"]) == 0
    torch.manual_seed(0)
    manifest = Manifest.load(folder / "run" / "data" / "train.beton")
    about = {"mean": manifest.mean, "std": manifest.std}  # else the folder says what timm has for the name
    lotus.save(create(Model(name="vit_tiny_patch16_224", args=ARGS), 3), folder / "model", about=about)
    return folder


def evaluated(run: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(["evaluate", str(run / "mine.yaml"), "--model", str(run / "model"), *SMALL, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def by_hand(run: Path, photos: Path) -> float:
    """The loss over the files, as the run's own images are normalized."""
    manifest = Manifest.load(run / "run" / "data" / "train.beton")
    files = sorted((photos / "val").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / 255
    images = torch.from_numpy((pixels - manifest.mean) / manifest.std).permute(0, 3, 1, 2).float()
    labels = torch.tensor(["abc".index(file.parent.name) for file in files])
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(lotus.load(run / "model").eval()(images), labels).item()


def test_a_model_is_measured_on_the_images_that_are_asked_for(run, tmp_path, capsys):
    other = draw(tmp_path / "other", seed=1, val=7)
    before = sorted(str(path) for path in (run / "run").rglob("*"))
    own = evaluated(run, capsys=capsys)
    assert (own["images"], own["own_data"]) == (12, True)
    assert own["loss"] == pytest.approx(by_hand(run, run / "photos"), abs=1e-5)
    told = evaluated(run, f"data.path={other}", capsys=capsys)
    assert (told["images"], told["own_data"]) == (21, False)
    assert told["loss"] == pytest.approx(by_hand(run, other), abs=1e-5)
    assert told["loss"] != own["loss"]
    assert evaluated(run, capsys=capsys) == own
    assert sorted(str(path) for path in (run / "run").rglob("*")) == before, "the run stays as it is"


def test_other_images_are_named_and_make_no_model_older(run, tmp_path, capsys):
    other = draw(tmp_path / "other", seed=1, val=7)
    words = ["evaluate", str(run / "mine.yaml"), "--model", str(run / "model"), *SMALL, f"data.path={other}"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert f"on 21 images of {other}, not the run's own" in told.out
    assert "older" not in told.err


def test_images_of_other_classes_and_none_are_refused(run, tmp_path, capsys):
    other = draw(tmp_path / "other", seed=1, val=2, names="abd")
    words = ["evaluate", str(run / "mine.yaml"), "--model", str(run / "model"), *SMALL]
    assert main([*words, f"data.path={other}"]) == 2
    assert "has the classes a, b, d, and the run a, b, c." in capsys.readouterr().err
    assert main([*words, f"data.path={tmp_path / 'nothing'}"]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err


def test_patches_without_a_config_say_as_which_model_they_are_cut(run, capsys):
    words = ["patches", str(run / "run" / "data"), "--score", "contrast", "--plain"]
    assert main(words) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "the images are cut into patches as deit_tiny_patch16_224 cuts them. Name another: model.name=NAME" in told
    assert main([*words, *SMALL[1:]]) == 0
    assert "cuts them" not in " ".join(capsys.readouterr().out.split())
    assert main([*words, *SMALL[1:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["cut_as"], told["patch"], told["of"]) == ("deit_tiny_patch16_224", [4, 4], 16)


@pytest.mark.parametrize("loader", ["torch", "ffcv"])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_a_model_is_measured_and_asked_as_timms_transform_and_a_plain_forward_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, loader: str
) -> None:
    """On photos smaller than its side, of its side, and larger, upright and lying; by `evaluate` and by `predict`."""
    if loader == "ffcv":
        pytest.importorskip("ffcv")
    draw(tmp_path / "photos", seed=2, val=0)
    rng, files = np.random.default_rng(3), []
    for number, (high, wide) in enumerate([(9, 13), (16, 16), (17, 30), (18, 18), (40, 31), (12, 50), (8, 8)]):
        blocks = rng.integers(0, 256, (high // 3 + 1, wide // 4 + 1, 3), np.uint8).repeat(3, 0).repeat(4, 1)
        files.append(tmp_path / "photos" / "val" / "abc"[number % 3] / f"{number}.png")
        Image.fromarray(np.ascontiguousarray(blocks[:high, :wide])).save(files[-1])
    about = {
        "classes": list("abc"), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic",
        "resize": "bicubic", "crop": 0.8, "crop_mode": mode,
    }  # fmt: skip
    lotus.save(lotus.load(run / "model"), tmp_path / "model", about=about)
    model: Any = lotus.load(tmp_path / "model")
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        logits = model(torch.stack([own(Image.open(file)) for file in files]))
    labels = torch.tensor(["abc".index(file.parent.name) for file in files])
    words = [*SMALL, f"data.loader={loader}", f"data.path={tmp_path / 'photos'}"]
    found = evaluated(run, *words, "--model", str(tmp_path / "model"), capsys=capsys)
    exact = loader == "torch"  # the other is Pillow's filter to within two gray levels
    wanted = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["loss"] == pytest.approx(wanted, abs=1e-5 if exact else 5e-3)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=1e-4)
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "model"), *map(str, files), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["class"] for one in told] == ["abc"[row] for row in logits.argmax(1)]
    assert [one["probability"] for one in told] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=2e-6)
