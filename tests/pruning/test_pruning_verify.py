"""A folder is what its spec says, or each difference is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vits import batches, tiny

import lotus
from lotus import cli
from lotus.papers.spvit import project
from lotus.pruning import prune, spec, surgery
from lotus.pruning.plan import Plan
from lotus.vit import anatomy
from lotus.vit import model as door

pytestmark = pytest.mark.slow

KINDS = ("vit", "eva02", "swin")
WAYS = ("embed_dim", "sublayers", "in_channels", "convolved")
"""Ways of cutting beside heads, dimensions and units."""


def folders(tmp_path: Path, kind: str = "vit", keep: float = 0.6, **settings: Any) -> tuple[Path, Path]:
    """A dense model's folder and that of what was cut from it: of units alone, unless ``settings`` say otherwise."""
    model = tiny(kind)
    small = prune(model, batches(1), {"macs": keep}, **{"round": 4, "embed_dim": None, **settings})
    return spec.save(model, tmp_path / "dense"), spec.save(small, tmp_path / "small")


def spoil(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of a folder, ``__`` for a dot; None takes one away."""
    file = folder / "model.safetensors"
    state = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


@pytest.mark.parametrize("width", ["auto", None])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_whole(tmp_path, kind, width):
    dense, small = folders(tmp_path, kind, embed_dim=width)
    found = lotus.verify(small, against=dense)
    assert found, found.faults
    assert found.facts["macs"] <= 0.6 * lotus.verify(dense).facts["macs"]
    assert found.facts["distance"] > 0


def cut_by(way: str, model: torch.nn.Module) -> Any:
    if way == "convolved":
        choices = [project.Choice(kernel, tuple(range(0, 192, 3))) for kernel in (3, 0)]
        small = project.convert(model, choices, [torch.zeros(block.heads, 9) for block in anatomy.blocks(model)])
        project.calibrate(small, batches(1))
        return small
    if way == "embed_dim":  # and nothing else: the blocks' own widths stay
        return prune(model, batches(1), {"macs": 1.0}, round=4, embed_dim=0.75)
    first, *others = Plan.full(model).blocks
    gone = {"heads": (), "qk": (), "v": ()} if way == "sublayers" else {"attn_in": tuple(range(8)), "mlp_in": (3, 5)}
    small = surgery.cut(model, Plan((dataclasses.replace(first, **gone), *others)))
    door.remember(small, door.origin(model))
    return small


@pytest.mark.parametrize("way", WAYS)
def test_whatever_was_cut_is_less_than_what_it_was_cut_from(tmp_path, way):
    model = tiny()
    dense = spec.save(model, tmp_path / "dense")
    small = spec.save(cut_by(way, model), tmp_path / "small")
    found = lotus.verify(small, against=dense)
    assert found, found.faults
    assert found.facts["distance"] > 0
    twin = spec.save(lotus.load(small), tmp_path / "twin")
    assert lotus.verify(twin, against=small), "against itself"
    more = " ".join(lotus.verify(dense, against=small).faults)
    named = {"embed_dim": "width is 48, more than the 36", "sublayers": "heads is 3, more than the 0",
             "convolved": "qk_dim is 16, more than the 0", "in_channels": "mlp_in is 48, more than the 2"}  # fmt: skip
    assert named[way] in more


def test_values_that_were_changed_are_found_by_their_digest(tmp_path):
    _, small = folders(tmp_path)
    assert lotus.verify(small)
    spoil(small, head__bias=load_file(small / "model.safetensors")["head.bias"] + 1e-3)
    (fault,) = lotus.verify(small).faults
    assert "model.safetensors: its bytes have changed since it was written" in fault
    beside = spec.save(tiny(), tmp_path / "beside", extra={"gates.safetensors": {"g": torch.ones(3)}})
    assert lotus.verify(beside)
    (beside / "gates.safetensors").unlink()
    assert lotus.verify(beside).faults == ("gates.safetensors: is missing.",)


def test_a_folder_of_an_older_lotus_has_no_digests_and_is_whole(tmp_path):
    _, small = folders(tmp_path)
    told = json.loads((small / "spec.json").read_text())
    assert told["format"] == 1
    del told["digests"]
    (small / "spec.json").write_text(json.dumps(told))
    assert lotus.verify(small)
    (small / "spec.json").write_text(json.dumps({**told, "digests": {"../x.safetensors": ""}}))
    assert "no file of this folder" in lotus.verify(small).faults[0]
    (small / "spec.json").write_text(json.dumps({**told, "digests": 3}))
    assert "no digests" in lotus.verify(small).faults[0]


def test_every_tampered_tensor_is_named(tmp_path):
    _, small = folders(tmp_path)
    spoil(small, head__bias=torch.zeros(6), hook=torch.zeros(1), norm__bias=None, cls_token=torch.zeros(1, 1, 9))
    found = lotus.verify(small)
    assert not found
    told = " ".join(found.faults)
    assert len(found.faults) == 4
    for name in (
        "norm.bias is missing",
        "hook does not belong",
        "head.bias is (6,), not (5,)",
        "cls_token is (1, 1, 9)",
    ):
        assert name in told


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.complex64])
def test_a_tensor_of_another_dtype_is_named(tmp_path, dtype, capsys):
    """By its digest nothing was changed."""
    _, small = folders(tmp_path)
    spoil(small, head__weight=load_file(small / "model.safetensors")["head.weight"].to(dtype))
    told = json.loads((small / "spec.json").read_text())
    digests = {
        "model.safetensors": hashlib.blake2b((small / "model.safetensors").read_bytes(), digest_size=32).hexdigest()
    }
    (small / "spec.json").write_text(json.dumps({**told, "digests": digests}))
    assert cli.main(["verify", str(small)]) == 2
    assert f"head.weight is {str(dtype)[6:]}, not float32" in capsys.readouterr().err


def test_values_and_costs_are_checked(tmp_path):
    _, small = folders(tmp_path)
    spoil(small, norm__bias=torch.full((48,), torch.nan))
    told = json.loads((small / "spec.json").read_text())
    told["cost"]["macs"] += 1
    told["digests"] = {
        "model.safetensors": hashlib.blake2b((small / "model.safetensors").read_bytes(), digest_size=32).hexdigest()
    }
    (small / "spec.json").write_text(json.dumps(told))
    faults = " ".join(lotus.verify(small).faults)
    assert "norm.bias: holds values that are not finite" in faults
    assert "output for drawn images is not finite" in faults
    assert "spec.json: cost says" in faults
    assert "dense_cost" not in faults


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 99}, "Take a newer LOTUS"),
        ({"kind": "other"}, "not written by LOTUS"),
        ({"model": {"name": "os.system", "args": {}}}, "no model 'os.system'"),
        (
            {"model": {"name": "vit_tiny_patch16_224", "args": {"norm_layer": {"import": "os"}}}},
            "must be a number, text",
        ),
        ({"model": {"name": "local-dir:/tmp/x", "args": {}}}, "no model"),
    ],
)
def test_a_spec_is_data(tmp_path, change, named):
    _, small = folders(tmp_path)
    told = json.loads((small / "spec.json").read_text())
    (small / "spec.json").write_text(json.dumps({**told, **change}))
    (fault,) = lotus.verify(small).faults
    assert named in fault


def test_against_another_model(tmp_path):
    dense, small = folders(tmp_path)
    other = spec.save(tiny(num_classes=7), tmp_path / "other")
    assert lotus.verify(small, against=other).faults == (f"classes: 5, but 7 in {other}.",)
    wider = lotus.verify(dense, against=small).faults
    assert any("hidden is 192, more than the" in fault for fault in wider)
    (fault,) = lotus.verify(spec.save(tiny(seed=1), tmp_path / "moved"), against=dense).faults
    assert "nothing is cut, but the outputs differ" in fault


def test_the_verb(tmp_path, capsys):
    dense, small = folders(tmp_path)
    assert cli.main(["verify", str(small), "--against", str(dense)]) == 0
    assert "whole. vit_tiny_patch16_224" in capsys.readouterr().out
    spoil(small, hook=torch.zeros(1))
    assert cli.main(["verify", str(small)]) == 2
    assert "hook does not belong" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "nowhere"), "--json"]) == 2
    assert "there is no such folder" in json.loads(capsys.readouterr().out)["faults"][0]


def test_a_folder_that_is_not_there_is_said_to_be_missing_once(tmp_path, capsys):
    from lotus.cli import main

    assert main(["verify", str(tmp_path / "nosuch")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path / 'nosuch'}: there is no such folder.")
    assert said.count("nosuch") == 1
