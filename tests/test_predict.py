"""What leaves can be used elsewhere: timm's loader, onnxruntime and ``lotus predict`` say the same of a picture."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lotus
from lotus.cli import main
from lotus.data import pictures as looked_at
from lotus.data import unpacked
from lotus.data.source import Source
from lotus.data.views import Look
from lotus.export import export
from lotus.vit import model as door

ROOT = Path(__file__).resolve().parent.parent
ABOUT: dict[str, Any] = {"classes": ["ant", "bee", "cat", "dog"], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "crop": 1.0, "interpolation": "bilinear", "license": "mit"}  # fmt: skip


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
    export(model, folder / "out", onnx=False, about={**ABOUT, "top1": 90.0, "measured_on": 100})
    assert "Top-1 90.00 ± 3.00 % (n = 100)" in (folder / "out" / "README.md").read_text()


def test_other_classes_begin_anew_in_every_head_of_the_exported_folder(tmp_path: Path) -> None:
    args = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
    export(door.build("deit_tiny_distilled_patch16_224", args).eval(), tmp_path / "out", onnx=False)
    twin = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    assert twin.eval()(torch.randn(1, 3, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize("form", ["m", "out"])
def test_a_backbone_names_no_class(tmp_path: Path, capsys: Any, form: str) -> None:
    args = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = door.build("vit_tiny_patch16_224", args).eval()
    lotus.save(model, tmp_path / "m")
    export(model, tmp_path / "out", onnx=form == "out")
    assert "image-feature-extraction" in (tmp_path / "out" / "README.md").read_text()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if form == "m" or (tmp_path / "out" / "model.onnx").is_file():
        assert main(["predict", str(tmp_path / form), str(tmp_path / "a.png")]) == 2
        assert "has no classifier" in capsys.readouterr().err


def photo(high: int, wide: int) -> np.ndarray:
    """With edges and noise, so that filters differ."""
    rng = np.random.default_rng(high)
    blocks = rng.integers(0, 256, (high // 7 + 1, wide // 5 + 1, 3), np.uint8).repeat(7, 0).repeat(5, 1)[:high, :wide]
    return (blocks // 2 + rng.integers(0, 128, (high, wide, 3))).astype(np.uint8)


@pytest.mark.parametrize("how", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop", [0.5, 0.875, 0.9, 1.0])
def test_a_picture_is_seen_as_timms_transform_sees_it(how: str, crop: float) -> None:
    """Pixel by pixel, in every shape: larger and smaller than the model's side, upright, lying, of its side."""
    own = timm.data.create_transform((3, 24, 24), interpolation=how, crop_pct=crop, mean=(0,) * 3, std=(1,) * 3)
    for high, wide in ((80, 61), (37, 101), (24, 24), (24, 40), (25, 25), (9, 13), (27, 27), (48, 49)):
        pixels = photo(high, wide)
        wanted = (255 * own(Image.fromarray(pixels))).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(looked_at.middle(pixels, 24, crop, how), wanted), (high, wide)


@pytest.mark.parametrize("told", [{"interpolation": "bicubic"}, {"interpolation": "bilinear", "resize": "bilinear"}])
def test_it_predicts_what_timm_does_with_the_folders_transform(folder: Path, capsys: Any, told: dict[str, str]) -> None:
    shutil.rmtree(folder / "photos")
    (folder / "photos").mkdir()
    for number, shape in enumerate(((31, 20), (12, 40), (8, 8), (9, 9), (5, 6))):
        Image.fromarray(photo(*shape)).save(folder / "photos" / f"{number}.png")
    model: Any = lotus.load(folder / "m")
    about = {**ABOUT, "crop": 0.9, **told}
    lotus.save(model, folder / "n", about=about)
    export(lotus.load(folder / "n"), folder / "out", about=about)
    model = lotus.load(folder / "n")
    own = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    for place in ("n", "out"):
        if place == "out":
            pytest.importorskip("onnxruntime")
        _, found = answers(capsys, folder / place, folder / "photos")
        for one in found:
            with torch.no_grad():
                wanted = model(own(Image.open(one["file"]))[None]).softmax(1)[0]
            assert one["class"] == ABOUT["classes"][int(wanted.argmax())]
            assert one["probability"] == pytest.approx(float(wanted.max()), abs=2e-6 if place == "n" else 1e-4)


def test_what_was_measured_by_area_is_asked_by_area(folder: Path, capsys: Any) -> None:
    """As evaluation sees an image of the data: the same view of it, to the last bit."""
    pixels = photo(31, 20)
    for file in (folder / "photos").iterdir():
        file.unlink()
    Image.fromarray(pixels).save(folder / "photos" / "one.png")
    lotus.save(lotus.load(folder / "m"), folder / "n", about={**ABOUT, "crop": 0.9, "resize": "area"})
    source = Source(np.zeros(1, np.int64), ("one",), lambda _: pixels, str, "x", where="here")
    look = Look(size=8, mean=ABOUT["mean"], std=ABOUT["std"], crop=0.9, interpolation="area")
    ((image, _),) = unpacked.batches(source, np.arange(1), look)
    with torch.no_grad():
        wanted = float(lotus.load(folder / "n")(image).softmax(1).max())
    _, (found,) = answers(capsys, folder / "n", folder / "photos")
    assert found["probability"] == pytest.approx(wanted, abs=2e-6)


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


def test_a_folder_without_pictures_says_what_is_in_it(folder, capsys):
    (folder / "phone").mkdir()
    (folder / "phone" / "a.heic").write_bytes(b"x")
    (folder / "phone" / ".hidden").mkdir()
    (folder / "photos" / "0.png").rename(folder / "phone" / ".hidden" / "0.png")
    assert main(["predict", str(folder / "m"), str(folder / "phone")]) == 2
    assert "1 .heic passed over" in capsys.readouterr().err
    (folder / "phone" / "gone.png").symlink_to(folder / "nowhere.png")
    assert main(["predict", str(folder / "m"), str(folder / "phone")]) == 3
    assert "gone.png" in capsys.readouterr().err
    os.mkfifo(folder / "phone" / "pipe.png")
    assert main(["predict", str(folder / "m"), str(folder / "phone")]) == 3
    assert "pipe.png" in capsys.readouterr().err


def test_a_damaged_picture_is_named_and_passed_over(folder, capsys):
    (folder / "photos" / "bad.jpg").write_text("<html>")
    code = main(["predict", str(folder / "m"), str(folder / "photos")])
    told = capsys.readouterr()
    assert code == 3
    assert "bad.jpg: cannot be read (a text" in told.err
    assert "Error" not in told.err
    assert "1 of 6" in told.err
    assert len(told.out.strip().splitlines()) == 5


def test_files_have_the_mode_that_the_umask_gives(folder):
    before = os.umask(0o022)
    try:
        export(lotus.load(folder / "m"), folder / "out", onnx=False)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder / "out").iterdir()} == {0o644}


def photos(folder: Path) -> dict[str, Path]:
    """A folder of photos, squares out of scikit-learn's two; of each class one more, outside of it."""
    from sklearn.datasets import load_sample_image

    new = {}
    for name in ("china", "flower"):
        (folder / "PHOTOS" / name).mkdir(parents=True)
        picture, tiles = load_sample_image(f"{name}.jpg"), []
        for top in range(0, 384, 96):
            tiles += [picture[top : top + 96, left : left + 96] for left in range(0, 576, 96)]
        new[name] = folder / f"new {name}.jpg"
        Image.fromarray(tiles.pop(7)).save(new[name])
        for number, tile in enumerate(tiles):
            Image.fromarray(tile).save(folder / "PHOTOS" / name / f"{number:02d}.jpg")
    return new


def first_block(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0].strip().splitlines()


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``line`` as a shell would run it in ``folder``, by the lotus that is tested."""
    command, *words = shlex.split(line, comments=True)
    assert command == "lotus"
    return in_process.lotus(*words, here=folder)


@pytest.mark.slow
def test_three_commands_lead_from_photos_to_a_prediction(tmp_path):
    new = photos(tmp_path)
    new["flower"].rename(tmp_path / "NEW.jpg")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = first_block("docs/deploy.md")
    assert len(lines) == 3
    for line in lines:
        done = shell(line, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.split()
    assert told[:2] == ["NEW.jpg", "flower"]
    assert float(told[2]) > 50
    for model in ("runs/imagefolder/export", "runs/imagefolder/finetune"):  # the three say the same
        other = shell(f"lotus predict {model} NEW.jpg", tmp_path)
        assert other.stdout.split()[:2] == told[:2], other.stderr
        assert float(other.stdout.split()[2]) == pytest.approx(float(told[2]), abs=0.1)


def test_a_run_without_a_model_says_how_it_gets_one(folder, capsys):
    (folder / "run" / "stages").mkdir(parents=True)
    assert main(["predict", str(folder / "run"), str(folder / "photos")]) == 2
    assert "lotus run" in capsys.readouterr().err
    (folder / "m").rename(folder / "run" / "finetune")
    assert main(["predict", str(folder / "run"), str(folder / "photos")]) == 0
