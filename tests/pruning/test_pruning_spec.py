"""Saved and loaded: the same outputs to the last bit; what is foreign, damaged or newer is refused."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from few import few
from safetensors.torch import load_file, save_file
from tiny_vits import FAST, KINDS, pictures, random_plan, tiny

from lotus import config
from lotus.export import export
from lotus.pruning import spec, surgery
from lotus.vit import model as door
from selection.errors import Refused


def saved(tmp_path: Path, kind: str = "vit", seed: int = 1, decouple_qk: bool = False) -> tuple[torch.nn.Module, Path]:
    model = tiny(kind)
    small = surgery.cut(model, random_plan(model, seed, decouple_qk=decouple_qk))
    door.remember(small, door.origin(model))
    return small, spec.save(small, tmp_path / "small")


@pytest.mark.parametrize(
    ("kind", "decouple_qk"),
    few(itertools.product(KINDS, [False, True]), lambda one: one[0] in FAST and one[1] == (one[0] in ("vit", "beit"))),
)
def test_the_same_outputs_to_the_last_bit(tmp_path, kind, decouple_qk):
    small, folder = saved(tmp_path, kind, decouple_qk=decouple_qk)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "spec.json"]
    back = spec.load(folder)
    images = pictures()
    with torch.no_grad():
        assert torch.equal(small(images), back(images))
    assert not back.training
    assert all(a.requires_grad for a in back.parameters())
    assert spec.load(spec.save(back, tmp_path / "again")).state_dict().keys() == small.state_dict().keys()


def test_what_a_model_says_of_its_images_goes_with_it(tmp_path: Path) -> None:
    """Saved without a word about them: the numbers of its weights, not those that timm has for its name."""
    small: Any = saved(tmp_path)[0]
    names = [str(number) for number in range(small.num_classes)]
    own = {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.7,
        "interpolation": "bilinear",
        "label_names": names,
    }
    small.pretrained_cfg = {**small.pretrained_cfg, **own}
    back: Any = spec.load(spec.save(small, tmp_path / "own"))
    assert {name: back.pretrained_cfg[name] for name in own} == own
    assert back.pretrained_cfg["resize"] == "bilinear"
    about = {**spec.read(tmp_path / "own")["about"], "resize": "area"}  # for which timm has no word
    area = spec.load(spec.save(back, tmp_path / "area", about=about))
    twice: Any = spec.load(spec.save(area, tmp_path / "twice"))
    assert {name: twice.pretrained_cfg[name] for name in (*own, "resize")} == {**own, "resize": "area"}


def test_a_dense_model_can_be_saved_and_serves_as_weights(tmp_path):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    request = config.Model(name="vit_tiny_patch16_224", args=args)
    model = door.create(request, 5).bfloat16()
    folder = spec.save(model, tmp_path / "dense", about={"classes": ["a", "b"]})
    assert spec.read(folder)["about"]["classes"] == ["a", "b"]
    assert spec.load(folder).pos_embed.dtype == torch.bfloat16
    again = door.create(request.model_copy(update={"weights": str(folder)}), 5)
    assert torch.equal(again.pos_embed, model.pos_embed.float())


def test_weights_of_a_cut_model_do_not_fit_the_dense_one(tmp_path):
    _, folder = saved(tmp_path)
    request = config.Model(
        name="vit_tiny_patch16_224",
        args={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        weights=str(folder),
    )
    with pytest.raises(Refused, match=r"model\.weights: .* fit .*qkv\.weight is"):
        door.create(request, 5)


def test_more_tensors_may_lie_beside(tmp_path):
    model = tiny()
    folder = spec.save(model, tmp_path / "a", extra={"gates.safetensors": {"blocks.0.attn": torch.ones(48)}})
    assert load_file(folder / "gates.safetensors")["blocks.0.attn"].sum() == 48
    spec.save(model, folder)
    assert not (folder / "gates.safetensors").exists()
    with pytest.raises(Refused, match="plain name"):
        spec.save(model, folder, extra={"../x.safetensors": {}})


def test_the_spec_tells_what_it_is(tmp_path):
    small, folder = saved(tmp_path)
    told = json.loads((folder / "spec.json").read_text())
    assert (told["kind"], told["format"]) == ("lotus-vit", 1)
    assert told["model"]["name"] == "vit_tiny_patch16_224"
    assert told["cost"]["params"] == sum(weight.numel() for weight in small.parameters())
    assert told["cost"]["macs"] < told["dense_cost"]["macs"]
    assert set(told["versions"]) == {"lotus-vit", "timm", "torch"}
    assert [set(row) for row in told["blocks"]] == [{"heads", "qk_dim", "v_dim", "hidden"}] * 2


def edit(folder: Path, **changes) -> None:
    told = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**told, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": spec.FORMAT + 1}, "Take a newer LOTUS"),
        ({"kind": "other"}, "not written by LOTUS"),
        ({"format": 0}, "not written by LOTUS"),
        ({"format": "1"}, "not written by LOTUS"),
        ({"blocks": []}, "widths for 0 blocks"),
        ({"blocks": [{"heads": 1}]}, "damaged"),
        ({"blocks": 3}, "damaged"),
        ({"blocks": [{"heads": 0, "qk_dim": 8, "v_dim": 8, "hidden": 8}] * 2}, "cannot have"),
        ({"blocks": [{"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 1 << 40}] * 2}, "cannot have"),
        ({"blocks": [{"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 8}] * 2}, "does not fit"),
        ({"model": {"name": "resnet18", "args": {}}}, "ResNet"),
        ({"model": {"name": "os.system", "args": {}}}, "no model"),
        ({"model": {"name": 3, "args": {}}}, "name is 3"),
        ({"model": {"name": "vit_tiny_patch16_224", "args": {"block_fn": "os.system"}}}, "no such argument"),
        ({"model": {}}, "damaged"),
    ],
)
def test_a_spec_is_data_and_is_checked(tmp_path, changes, message):
    _, folder = saved(tmp_path)
    edit(folder, **changes)
    with pytest.raises(Refused, match=message):
        spec.load(folder)


@pytest.mark.parametrize("args", [{"depth": 1 << 40}, {"depths": [2, 1 << 40]}])
def test_a_spec_of_countless_blocks_is_refused_before_one_is_built(tmp_path, args):
    _, folder = saved(tmp_path, "swin" if "depths" in args else "vit")
    model = spec.read(folder)["model"]
    edit(folder, model={**model, "args": {**model["args"], **args}})
    with pytest.raises(Refused, match="but a depth of"):
        spec.load(folder)


def test_a_spec_that_has_a_row_for_each_of_countless_blocks(tmp_path):
    _, folder = saved(tmp_path)
    model = spec.read(folder)["model"]
    row = {"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 8}
    edit(folder, model={**model, "args": {**model["args"], "depth": 100_000}}, blocks=[row] * 100_000)
    with pytest.raises(Refused, match=r"spec.json.args.depth: .* beyond any model"):
        spec.load(folder)
    with pytest.raises(Refused, match="beyond any model"):
        spec.dense_cost(spec.read(folder), "here")


def test_tampered_and_truncated_weights_are_refused(tmp_path):
    _, folder = saved(tmp_path)
    file = folder / "model.safetensors"
    whole, good = file.read_bytes(), load_file(file)
    for change, message in (
        ({"head.bias": torch.zeros(6)}, r"head\.bias is \(6,\), not \(5,\)"),
        ({"hook": torch.zeros(1)}, "hook does not belong"),
    ):
        save_file({**good, **change}, file)
        with pytest.raises(Refused, match=message):
            spec.load(folder)
    save_file({name: tensor for name, tensor in good.items() if name != "norm.bias"}, file)
    with pytest.raises(Refused, match=r"norm\.bias is missing"):
        spec.load(folder)
    for cut in (0, 4, 500, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(Refused, match="Is it whole"):
            spec.load(folder)
    for dtype in (torch.int8, torch.float16, torch.complex64):
        save_file({**good, "head.weight": good["head.weight"].to(dtype)}, file)
        with pytest.raises(Refused, match=r"head\.weight is .*, not float32"):
            spec.load(folder)
    save_file({name: tensor.to(torch.int8) for name, tensor in good.items()}, file)
    with pytest.raises(Refused, match="int8, not float32"):
        spec.load(folder)
    file.unlink()
    with pytest.raises(Refused, match="cannot be read"):
        spec.load(folder)
    (folder / "spec.json").write_text("[" * 100_000)
    with pytest.raises(Refused, match="Is it whole"):
        spec.load(folder)
    (folder / "spec.json").write_text("{")
    with pytest.raises(Refused, match="Is it whole"):
        spec.load(folder)


def test_no_folder_and_a_foreign_folder(tmp_path):
    with pytest.raises(Refused, match="there is no such folder"):
        spec.load(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    with pytest.raises(Refused, match="no model folder"):
        spec.load(tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(Refused, match="Take another folder"):
        spec.save(tiny(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_older_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    first, folder = saved(tmp_path, seed=1)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Refused, match="No space left"):
        spec.save(tiny(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert torch.equal(spec.load(folder).head.weight, first.head.weight)
    monkeypatch.undo()
    second: Any
    second, _ = saved(tmp_path, seed=2)
    assert spec.load(folder).state_dict()["blocks.0.mlp.fc1.weight"].shape == second.blocks[0].mlp.fc1.weight.shape
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as a full disk")
def test_a_disk_that_is_full_for_real(tmp_path):
    """safetensors tells it by an error of its own."""
    first, folder = saved(tmp_path, seed=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(Refused, match=r"small: cannot be written \(File too large\)"):
            spec.save(tiny(), folder)
        with pytest.raises(Refused, match=r"sent: cannot be written \(File too large\)"):
            export(tiny(), tmp_path / "sent", onnx=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sent", "small"]
    assert not list((tmp_path / "sent").iterdir())
    assert torch.equal(spec.load(folder).head.weight, first.head.weight)


def test_what_no_file_keeps_is_made_without_the_widths_that_a_spec_asks_for(tmp_path, monkeypatch):
    """Else a tampered number takes all memory."""
    model = tiny("eva02")
    folder = spec.save(model, tmp_path / "model")
    told = json.loads((folder / "spec.json").read_text())
    told["model"]["args"]["mlp_ratio"] = 1000.0
    (folder / "spec.json").write_text(json.dumps(told))
    made, build = [], door.build

    def watched(*args, **more):
        made.append(build(*args, **more))
        return made[-1]

    monkeypatch.setattr(door, "build", watched)
    back = spec.load(folder)
    with torch.no_grad():
        assert torch.equal(back(pictures()), model(pictures()))
    held = [w.numel() for one in made for w in one.parameters() if not w.is_meta]
    assert 0 < sum(held) <= sum(weight.numel() for weight in model.parameters())


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    first, folder = saved(tmp_path)
    older = tmp_path / ".small.0123456789abcdef.part" / ".was-before"
    older.mkdir(parents=True)
    os.rename(folder, older / "small")
    assert torch.equal(spec.load(folder).head.weight, first.head.weight)


def test_a_model_that_could_not_come_back_is_refused(tmp_path):
    model = tiny()
    model.head = torch.nn.Sequential(model.head)
    with pytest.raises(Refused, match="head"):
        spec.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
