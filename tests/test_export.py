"""What is exported loads without LOTUS and computes the same."""

import subprocess
import sys

import pytest
import timm
import torch
from few import few
from safetensors.torch import load_file
from torch import nn

from lotus import export as module
from lotus.export import Mismatch, export
from lotus.pruning import spec, surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy
from lotus.vit import model as door

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def vit(**args):
    torch.manual_seed(0)
    args = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4, **args}
    return door.build("vit_tiny_patch16_224", args).eval()


def narrowed(model, units):
    """``model`` with the first ``units[i]`` MLP units of block i."""
    plans = []
    for block, kept in zip(anatomy.blocks(model), units, strict=True):
        full = BlockPlan.full(block.dims)
        plans.append(type(full)(**{**vars(full), "units": tuple(range(kept))}))
    return surgery.cut(model, Plan(tuple(plans))).eval()


@pytest.mark.parametrize("units", [None, (24, 24), (25, 25)])
def test_uniform_models_load_with_timm_alone(tmp_path, units):
    model = vit() if units is None else narrowed(vit(), units)
    sent = export(model, tmp_path, onnx=False)
    assert not sent["notes"]
    twin = timm.create_model(sent["timm"]["name"], **sent["timm"]["args"]).eval()
    twin.load_state_dict(load_file(tmp_path / sent["timm"]["file"]))
    assert torch.equal(twin(IMAGES), model(IMAGES))


@pytest.mark.parametrize("alone", few([False, True], [False]), ids=["here", "in an interpreter of its own"])
def test_the_page_can_be_followed(tmp_path, monkeypatch, alone):
    model = narrowed(vit(), (24, 24))
    export(model, tmp_path, onnx=False)
    code = (tmp_path / "MODEL.md").read_text().split("```python\n")[1].split("```")[0]
    torch.save(IMAGES, tmp_path / "images.pt")
    code += "import torch; torch.save(model.eval()(torch.load('images.pt')), 'logits.pt')"
    if alone:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    else:
        monkeypatch.chdir(tmp_path)
        exec(code, {})
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(IMAGES))


def test_a_models_folder_may_hold_all_that_an_export_writes() -> None:
    assert set(spec.EXPORTED) == set(module.FILES)


def test_blocks_of_different_widths_are_for_lotus(tmp_path):
    sent = export(narrowed(vit(), (24, 40)), tmp_path, onnx=False)
    assert sent["timm"] is None
    assert "lotus.load" in sent["notes"][0]
    assert "widths differ" in sent["notes"][0]
    assert "lotus.load" in (tmp_path / "MODEL.md").read_text()
    assert not (tmp_path / "model.safetensors").exists()


def test_why_timm_cannot_hold_heads_is_told(tmp_path):
    """All blocks alike, in heads that do not fill the stream."""
    kept = ((0, 1, 2, 3),) * 2
    plans = [BlockPlan(**{**vars(BlockPlan.full(b.dims)), "qk": kept, "v": kept}) for b in anatomy.blocks(vit())]
    model = surgery.cut(vit(), Plan(tuple(plans))).eval()
    why = "2 heads of 4 dimensions do not fill the 16 channels"
    assert export(model, tmp_path, onnx=False)["notes"] == [
        f"{why}, which timm's constructor cannot say: load the model by lotus.load"
    ]
    assert f"Here {why}" in (tmp_path / "MODEL.md").read_text()


def test_onnx_takes_any_batch_and_agrees(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = narrowed(vit(reg_tokens=1), (24, 40))
    sent = export(model, tmp_path, example=IMAGES)
    assert sent["onnx"]["max_abs_diff"] <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for size in (1, 2, 4):
        (logits,) = session.run(None, {"images": IMAGES[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(IMAGES[:size]).detach(), atol=1e-4, rtol=1e-4)
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    trace = module.onnx_file.trace

    def wrong(model, images, file):
        other = vit()
        nn.init.normal_(other.head.weight)
        return trace(other, images, file)

    monkeypatch.setattr(module.onnx_file, "trace", wrong)
    with pytest.raises(Mismatch, match="differs from the model"):
        export(vit(), tmp_path)
    assert not list(tmp_path.glob("*.onnx")) + list(tmp_path.glob(".*"))


def test_without_the_extra_there_is_a_note(tmp_path, monkeypatch):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest)
    )
    sent = export(vit(), tmp_path)
    assert sent["onnx"] is None
    assert "lotus-vit[onnx]" in sent["notes"][0]
