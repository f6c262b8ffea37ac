"""What leaves can be used elsewhere: timm's loader, onnxruntime and ``lotus predict`` say the same of a picture."""

import json
import os
import stat
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lotus
from lotus.cli import main
from lotus.export import export
from lotus.vit import model as door

ABOUT = {"classes": ["ant", "bee", "cat", "dog"], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "crop": 1.0, "interpolation": "bilinear", "license": "mit"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    args = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    lotus.save(door.build("vit_tiny_patch16_224", args).eval(), tmp_path / "m", about=ABOUT)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def answers(capsys, *words):
    code = main(["predict", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_timm_makes_the_model_of_the_exported_folder_with_its_images(folder):
    model: Any = lotus.load(folder / "m")
    export(model, folder / "out", onnx=False, about=ABOUT)
    twin = timm.create_model(f"local-dir:{folder / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(twin(images), model(images))
    told = timm.data.resolve_model_data_config(twin)
    assert tuple(told["mean"]) == tuple(ABOUT["mean"])
    assert tuple(told["std"]) == tuple(ABOUT["std"])
    assert told["crop_pct"] == 1.0
    assert tuple(model.pretrained_cfg["mean"]) == tuple(ABOUT["mean"])
    assert (folder / "out" / "README.md").read_text().startswith("---\nlibrary_name: timm\n")
    assert "0.4, 0.5, 0.6" in (folder / "out" / "MODEL.md").read_text()


@pytest.mark.parametrize("takes", ["float32", "uint8"])
def test_torch_and_onnx_say_the_same(folder, capsys, takes):
    pytest.importorskip("onnxruntime")
    export(lotus.load(folder / "m"), folder / "out", onnx_input=takes, about=ABOUT)
    code, first = answers(capsys, folder / "m", folder / "photos")
    assert code == 0
    assert len(first) == 5
    _, second = answers(capsys, folder / "out" / "model.onnx", folder / "photos", "--batch", 2)
    for one, other in zip(first, second, strict=True):
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-3)


def test_a_damaged_picture_is_named_and_passed_over(folder, capsys):
    (folder / "photos" / "bad.jpg").write_text("<html>")
    code = main(["predict", str(folder / "m"), str(folder / "photos")])
    told = capsys.readouterr()
    assert code == 3
    assert "bad.jpg" in told.err
    assert "1 of 6" in told.err
    assert len(told.out.strip().splitlines()) == 5


def test_files_have_the_mode_that_the_umask_gives(folder):
    before = os.umask(0o022)
    try:
        export(lotus.load(folder / "m"), folder / "out", onnx=False)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder / "out").iterdir()} == {0o644}
