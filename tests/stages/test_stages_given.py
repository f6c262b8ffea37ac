"""A run from given weights: what is loaded, how its images are normalized and looked at, and what is refused before anything is done."""

from __future__ import annotations

import contextlib
import json
import shutil
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

import lotus
from lotus.cli import main
from lotus.config import Config, Model, check, shipped
from lotus.data import beton
from lotus.data.base import Batch
from lotus.run import Run
from lotus.stages import export, fit, given, run_of
from lotus.stages.ahead import check_fit
from lotus.stages.context import Context
from lotus.training.distributed import World
from lotus.vit.preprocessing import Preprocessing
from selection.errors import Notice, Refused

NAME, ARGS = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
LOOK = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop": 0.9}


def vit(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=classes, **ARGS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut model in a folder of LOTUS, with what it knows of its images."""
    folder = tmp_path_factory.mktemp("given") / "small"
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 3, 32, 32, generator=draw), torch.arange(32) % 5
    cut = lotus.prune(vit(), [(images, labels)], keep={"macs": 0.6}, round=4, embed_dim=None)
    lotus.save(cut, folder, about={**LOOK, "interpolation": "bilinear", "classes": list("abcde")})
    return folder


def loaded(weights: Path | str, classes: int = 5, **args: Any) -> nn.Module:
    return given.model_of(Model(name=NAME, args={**ARGS, **args}, weights=str(weights)), classes)


# ------------------------------------------------------------------------------------------------------ the model


def test_a_cut_folder_goes_on_as_it_was_saved_and_learns(small: Path) -> None:
    with warnings.catch_warnings(action="error"):
        model = loaded(small)
    saved = lotus.load(small)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    lotus.save(model, small.parent / "again")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(lotus.load(small.parent / "again")(images), saved(images))


def test_a_folder_says_itself_which_model_it_is(small: Path) -> None:
    model = given.model_of(Model(name="vit_base_patch16_224", weights=str(small)), 5)
    assert sum(weight.numel() for weight in model.parameters()) < 40_000


def test_for_other_classes_the_head_starts_anew_with_a_line_and_all_else_stays(small: Path) -> None:
    with pytest.warns(Notice, match=r"model\.weights: .*5 classes.* 7.*head starts anew"):
        model = loaded(small, 7)
    saved = lotus.load(small).state_dict()
    assert model.state_dict()["head.weight"].shape == (7, 32)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if "head" not in name)
    lotus.save(model, small.parent / "seven")
    assert lotus.load(small.parent / "seven").num_classes == 7


@pytest.mark.parametrize("form", ["ours", "hub"])
def test_as_many_classes_of_other_names_are_other_classes(tmp_path: Path, small: Path, form: str) -> None:
    folder = small
    if form == "hub":
        folder = tmp_path
        told = {"architecture": NAME, "num_classes": 5, "model_args": ARGS, "label_names": list("abcde")}
        (tmp_path / "config.json").write_text(json.dumps(told))
        safetensors.torch.save_file(vit().state_dict(), tmp_path / "model.safetensors")
    asked = Model(name=NAME, args=ARGS, weights=str(folder))
    with warnings.catch_warnings(action="error"):
        same = given.model_of(asked, 5, names=list("abcde")).state_dict()
    with pytest.warns(Notice, match=r"knows other classes, 'd' where the data has 'x': head starts anew"):
        other = given.model_of(asked, 5, names=list("abcxe")).state_dict()
    changed = {name for name in same if not torch.equal(same[name], other[name])}
    assert {"head.weight"} <= changed <= {"head.weight", "head.bias"}


def test_at_another_side_its_positions_are_resampled_and_it_can_be_saved(small: Path) -> None:
    with pytest.warns(Notice, match="resampled to .*48 pixels"):
        model: Any = loaded(small, img_size=48)
    assert model.pos_embed.shape[1] == 1 + 36
    lotus.save(model, small.parent / "large")
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(lotus.load(small.parent / "large")(images), model.eval()(images))


@pytest.mark.parametrize("form", ["file", "wrapped", "timm", "hub"])
def test_every_form_of_weights_gives_the_same_model(tmp_path: Path, form: str) -> None:
    import argparse

    whole, path = vit(), tmp_path / "model.pth"
    if form == "file":
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file(whole.state_dict(), path)
    elif form == "wrapped":
        torch.save({"state_dict": {f"module.{name}": value for name, value in whole.state_dict().items()}}, path)
    elif form == "timm":
        older = {name: torch.zeros_like(value) for name, value in whole.state_dict().items()}
        torch.save({"args": argparse.Namespace(lr=1), "state_dict": older, "state_dict_ema": whole.state_dict()}, path)
    else:
        path = tmp_path
        told = {"architecture": NAME, "num_classes": 5, "model_args": ARGS, "pretrained_cfg": {"crop_pct": 0.95}}
        (tmp_path / "config.json").write_text(json.dumps(told))
        safetensors.torch.save_file(whole.state_dict(), tmp_path / "model.safetensors")
    model = loaded(path)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_shape_has_no_weights_of_anybody(small: Path) -> None:
    assert given.shape_of(Model(name=NAME, args=ARGS, pretrained=True), 10).num_classes == 10, (
        "nobody is asked for them"
    )
    with warnings.catch_warnings(action="error"):
        assert given.shape_of(Model(weights=str(small)), 10).num_classes == 10


def test_what_holds_weights_and_what_does_not(tmp_path: Path, small: Path) -> None:
    assert given.holds_weights(small)
    assert given.holds_weights(Path("nowhere.safetensors")), "it is refused as weights that are not there"
    for path in (tmp_path, tmp_path / "run.yaml", tmp_path / "nothing"):
        assert not given.holds_weights(path)
    (tmp_path / "spec.json").write_text("{}")
    assert given.holds_weights(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    assert not given.holds_weights(tmp_path), "a run's"


def test_it_is_told_that_a_model_was_cut_before(small: Path) -> None:
    (line,) = given.notes(small)
    assert "of its dense model's MACs. What is cut now is a fraction of what is left" in line
    (line,) = given.notes(small, again=False)
    assert "of its dense model's MACs, and is not cut again. prune.keep.macs=0.8 would" in line
    lotus.save(vit(), small.parent / "whole")
    assert given.notes(small.parent / "whole") == given.notes(Path("x.pth")) == []


# ----------------------------------------------------------------------------------------------- before it begins


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({}, "nowhere.pth: there is no such file or folder"),
        ({"depth": 3}, "does not fit this model"),
        ({"embed_dim": 48}, "does not fit this model"),
        ({"patch_size": 4, "img_size": None}, "it has other patches"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_prepare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: dict[str, Any], says: str
) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(vit().state_dict(), file)
    args = {name: value for name, value in {**ARGS, **words}.items() if value is not None}
    page = [f"model.args={json.dumps(args)}", f"model.name={NAME}", "data.name=digits", "prune.keep.macs=0.5"]
    weights = file if words else "nowhere.pth"
    folder = tmp_path / "run"
    assert main(["finetune", str(weights), *page, f"folder={folder}", "train.batch_size=32"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (folder / "data").exists()


def test_the_check_loads_weights_that_are_given_and_none_else(tmp_path: Path) -> None:
    check_fit("model", Model(name=NAME, args=ARGS))
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(Refused, match=r"score\.model\.weights: .*whole\?"):
        check_fit("score.model", Model(name=NAME, args=ARGS, weights=str(broken)))
    safetensors.torch.save_file(vit().state_dict(), broken)
    with warnings.catch_warnings(action="error"):
        check_fit("model", Model(name=NAME, args=ARGS, weights=str(broken)))  # of other classes: no line yet


# ------------------------------------------------------------------------------------------- how images are shown


def pixels(folder: Path, **data: Any) -> Preprocessing:
    """What a run in ``folder`` shows, over images of mean 0.25 and deviation 0.125."""
    page = {"folder": str(folder), "data": {**data}, **({"model": data.pop("model")} if "model" in data else {})}
    page["data"].pop("model", None)
    context = Context(Run(check(page)), World(), ())
    context.manifest = lambda: type("M", (), {"mean": (0.25,) * 3, "std": (0.125,) * 3})()  # type: ignore[method-assign]
    return context.preprocessing()


def test_from_scratch_the_data_says_and_7_of_8_by_area(tmp_path: Path) -> None:
    found = pixels(tmp_path)
    assert found[:4] == ((0.25,) * 3, (0.125,) * 3, "area", 0.875)


def test_weights_say_how_their_images_were_made(tmp_path: Path, small: Path) -> None:
    model = {"name": NAME, "weights": str(small)}
    assert pixels(tmp_path, model=model)[:4] == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "area", 0.9), (
        "measured by LOTUS, so by area"
    )
    assert pixels(tmp_path, model=model, normalize="data")[:4] == ((0.25,) * 3, (0.125,) * 3, "area", 0.9)
    own = pixels(tmp_path, model=model, normalize=[[0.5] * 3, [0.2] * 3], crop=1.0, interpolation="bicubic")
    assert own[:4] == ((0.5,) * 3, (0.2,) * 3, "bicubic", 1.0)


@pytest.mark.parametrize("name", ["vit_small_patch16_224.augreg_in21k", "deit3_small_patch16_224.fb_in1k", "vit_base_patch16_clip_224.openai"])  # fmt: skip
def test_published_weights_are_shown_images_as_timm_says(tmp_path: Path, name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    found = pixels(tmp_path, model={"name": name, "pretrained": True})
    assert found[:4] == (tuple(cfg.mean), tuple(cfg.std), cfg.interpolation, cfg.crop_pct)


def test_a_hub_folder_says_it_itself(tmp_path: Path) -> None:
    told = {"architecture": NAME, "model_args": ARGS, "pretrained_cfg": {"mean": [0.3] * 3, "crop_pct": 0.95, "interpolation": "bilinear"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(told))
    safetensors.torch.save_file(vit().state_dict(), tmp_path / "model.safetensors")
    found = pixels(tmp_path, model={"name": "vit_base_patch16_224", "weights": str(tmp_path)})
    assert (found.mean, found.interpolation, found.crop, found.side) == ((0.3,) * 3, "bilinear", 0.95, 32)


def test_a_crop_is_a_fraction(tmp_path: Path) -> None:
    for wrong in ("data.crop=0", "data.crop=1.1", "data.crop=true", "data.interpolation=lanczos", "data.crop=most"):
        with pytest.raises(Refused, match=wrong.partition("=")[0].replace(".", r"\.")):
            lotus_read(wrong)


def lotus_read(word: str) -> Config:
    from lotus.config import read

    return read(None, [word])


# -------------------------------------------------------------------------------------------- one command, whole


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 40 x 48 pixels, a dark and a bright one."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for name, shade in (("dark", 60), ("light", 180)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                drawn = np.clip(rng.normal(shade, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(drawn).save(folder / split / name / f"{number}.png")
    return folder


SHORT = ["train.epochs=2", "train.batch_size=8", "train.shrink={at: 0.3}", "prune.calibration=16", "export.onnx=false",
         "export.latency_batch=2", "--plain"]  # fmt: skip


@pytest.mark.slow
def test_one_command_adapts_a_cut_folder_and_says_how_it_looked(tmp_path: Path, small: Path, photos: Path) -> None:
    folder = tmp_path / "run"
    words = [f"data.path={photos}", f"folder={folder}", *SHORT, "train.probe_epochs=0.5", "train.freeze=[patch_embed]"]
    assert main(["finetune", str(small), *words]) == 0
    about = json.loads((folder / "finetune" / "spec.json").read_text())["about"]
    assert {name: about[name] for name in ("mean", "std")} == {name: LOOK[name] for name in ("mean", "std")}
    assert (about["crop"], about["resize"], about["classes"]) == (0.9, "area", ["dark", "light"])
    before, after = (lotus.load(one).state_dict() for one in (small, folder / "finetune"))
    stem = [name for name in after if name.startswith(("patch_embed", "pos_embed", "cls_token"))]
    assert all(torch.equal(before[name], after[name]) for name in stem)
    results = json.loads((folder / "results.json").read_text())
    assert results["finetune"]["macs"] <= 0.5 * results["train"]["uncut"]["macs"]
    assert not results.get("baseline"), "nothing is compared with where that is not asked for"


def test_a_cut_folder_goes_on_as_it_is_unless_a_cut_is_asked_for(
    small: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of what was left of a small model may be out of reach, and nobody asked for it."""

    def rows(*words: str) -> tuple[str, Any]:
        assert (
            main(["finetune", str(small), f"data.path={photos}", "train.batch_size=8", *words, "--dry-run", "--json"])
            == 0
        )
        said, _, found = capsys.readouterr().out.rpartition("\n[")
        return said, json.loads(f"[{found}")

    said, plain = rows()
    assert "is not cut again" in said
    assert plain == rows(*given.AS_IT_IS)[1]
    for word in ("prune.keep.macs=0.9", "train.shrink.at=0.3", "train.teacher=uncut"):
        said, found = rows(word, "prune.calibration=16")
        assert "is a fraction of what is left" in said, word
        assert found != plain, word


def test_pixels_are_what_the_weights_were_shown_whatever_the_images_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What calibrates and measures 8 bits goes into a file that normalizes as the weights want it."""
    drawn = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "area", 1.0)
    mean, std = (torch.tensor(three).reshape(3, 1, 1) for three in (wanted.mean, wanted.std))
    batch = Batch((drawn / 255 - mean) / std, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    loader = types.SimpleNamespace(epoch=lambda number: [batch])
    context = Context(run_of(check({"export": {"onnx_input": "uint8"}})), World(), ())
    monkeypatch.setattr(Context, "preprocessing", lambda self: wanted)
    monkeypatch.setattr(Context, "manifest", lambda self: types.SimpleNamespace(mean=(0.1,) * 3, std=(0.9,) * 3))
    monkeypatch.setattr(Context, "images", lambda self, *given: contextlib.nullcontext(loader))
    ((pixels, _),) = export._given(context, None, None)
    assert torch.equal(pixels, drawn)


def test_the_config_that_is_shipped_is_found() -> None:
    assert shipped("finetune").read_text(encoding="utf-8").startswith("# lotus finetune")


def test_weights_are_said_once(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    assert main(["finetune", str(small), "model.weights=other"]) == 2
    assert "are the weights already. Leave out model.weights." in capsys.readouterr().err


def test_images_of_a_spike_are_told_by_their_files(tmp_path: Path) -> None:
    """Where the validation images are held out of the folder and a damaged picture is left out, each is the one that was stored."""
    draw = np.random.default_rng(0)
    for name in (f"{label}/{number}.png" for label in "ab" for number in range(20)):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "a" / "3.png").write_bytes(b"none")
    data = {"name": "imagefolder", "path": str(tmp_path / "photos"), "write": "raw", "max_side": 0, "damaged": "skip"}
    page = check({"folder": str(tmp_path / "run"), "data": data})
    context = Context(Run(page), World(), ())
    config = tmp_path / "c.yaml"
    config.write_text(page.yaml())
    assert main(["prepare", str(config)]) in (0, 3)
    count = context.manifest().n
    told = fit._names(context)(np.arange(count)).split(", ")
    assert count < 39
    for row, name in enumerate(told):
        stored = beton.image(context.run.train_beton, row)
        assert np.array_equal(stored, np.asarray(Image.open(tmp_path / "photos" / name)))
    shutil.rmtree(tmp_path / "photos")
    assert fit._names(context)(np.arange(2)) == "rows 0, 1"
