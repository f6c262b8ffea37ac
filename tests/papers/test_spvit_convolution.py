"""Attention that became convolution: against the formula, pixel by pixel and offset by offset; and what it costs."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pruning"))
from tiny_vits import PLAIN, pictures, tiny

from lotus.config import Patches, Prune
from lotus.papers.spvit import mixture, project
from lotus.papers.spvit.nested_gates import NestedGates
from lotus.papers.spvit.project import Choice
from lotus.pruning import load, save, spec, surgery
from lotus.pruning.plan import Plan
from lotus.vit import anatomy, cost
from lotus.vit import model as door
from lotus.vit.convolution import ConvAttention
from lotus.vit.tokens import Tokens
from selection.errors import Refused

pytestmark = pytest.mark.slow  # many models: every family by every law

UNITS = tuple(range(0, 192, 3))


def mixes(model: nn.Module, seed: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [0.02 * torch.randn(block.heads, 9, generator=draw) for block in anatomy.blocks(model)]


def convolved(kind: str = "vit", kernels: tuple[int, ...] = (3, 1), **more) -> Any:
    model = tiny(kind, **more)
    small: Any = project.convert(model, [Choice(kernel, UNITS) for kernel in kernels], mixes(model))
    project.calibrate(small, [(pictures(6),)])
    return small


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("kind", ["vit", "registers", "pooled", "no_bias"])
def test_the_convolution_is_its_formula(kind, kernel):
    """Brute force over images, pixels, offsets and heads; on a grid that is not square."""
    model = tiny(kind, img_size=[24, 32]).double()
    block, mix = anatomy.blocks(model)[0], mixes(model)[0].double()
    small: Any = project.convert(model, [Choice(kernel, UNITS), Choice(0, UNITS)], [mix, mix])
    new = small.blocks[0].attn
    prefix, (down, across) = model.num_prefix_tokens, (3, 4)
    x = torch.randn(2, prefix + 12, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heads, d = block.heads, block.head_dim
    v, bias = block.qkv.weight[-heads * d :], block.qkv.bias
    chance = (mix / 1e-2).exp() / (mix / 1e-2).exp().sum(0)
    offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    used = range(9) if kernel == 3 else [4]
    y = torch.zeros(2, down, across, d, dtype=torch.float64)
    for image in range(2):
        for row in range(down):
            for column in range(across):
                for k in used:
                    i, j = row + offsets[k][0], column + offsets[k][1]
                    for h in range(heads):
                        if bias is not None:
                            y[image, row, column] += chance[h, k] * bias[-heads * d :][h * d : (h + 1) * d]
                        if 0 <= i < down and 0 <= j < across:
                            pixel = x[image, prefix + i * across + j]
                            y[image, row, column] += chance[h, k] * (v[h * d : (h + 1) * d] @ pixel)
    norm = new.norm
    nn.init.normal_(norm.running_mean, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    out = sum(chance[h, k] * block.proj.weight[:, h * d : (h + 1) * d] for h in range(heads) for k in used)
    expected = y.clamp(min=0).reshape(2, 12, d) @ out.T
    if block.proj.bias is not None:
        expected = expected + block.proj.bias
    found = new(x)
    torch.testing.assert_close(found[:, prefix:], expected)
    assert torch.equal(found[:, :prefix], x[:, :prefix]), "the class token and registers are no pixels"


def test_attention_with_a_head_an_offset_is_a_convolution():
    """The paper's reason: nine heads that each look at one neighbor compute a 3x3 convolution."""
    draw = torch.Generator().manual_seed(0)
    heads, d, width, side = 9, 2, 18, 4
    values, out = torch.randn(heads, d, width, generator=draw), torch.randn(width, heads, d, generator=draw)
    x = torch.randn(side * side, width, generator=draw)
    attended = torch.zeros(side * side, width)
    kernel = torch.zeros(width, width, 3, 3)
    for head in range(heads):
        i, j = head // 3 - 1, head % 3 - 1
        looks = torch.zeros(side * side, side * side)  # what softmax gives where one logit is far above the others
        for place in range(side * side):
            row, column = place // side + i, place % side + j
            if 0 <= row < side and 0 <= column < side:
                looks[place, row * side + column] = 1
        attended += looks @ x @ values[head].T @ out[:, head].T
        kernel[:, :, i + 1, j + 1] = out[:, head] @ values[head]
    picture = x.T.reshape(1, width, side, side)
    torch.testing.assert_close(
        nn.functional.conv2d(picture, kernel, padding=1).flatten(2)[0].T, attended, atol=1e-4, rtol=1e-4
    )
    # And where the mixture gives each offset its own head, that is the kernel of the bottleneck: V_k = W_v^k.
    z = torch.eye(9)
    weight, _, mixed = mixture.combined(values.flatten(0, 1), None, out.flatten(1), mixture.mixture(z, 3), d)
    torch.testing.assert_close(weight.permute(2, 3, 0, 1).flatten(0, 1), values)
    torch.testing.assert_close(mixed, out.sum(1))


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind not in ("qk_norm", "swiglu")])
@pytest.mark.parametrize("kernels", [(3, 1), (0, 3)])
def test_costs_are_what_torch_counts_and_what_is_there(kind, kernels):
    small = convolved(kind, kernels).requires_grad_(False)
    count = cost.count(small)
    assert count.params == sum(weight.numel() for weight in small.parameters())
    for module in small.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(pictures(1))
    assert 2 * count.macs == counter.get_total_flops()


def test_gated_mlps_and_other_families_are_refused():
    for kind, message in (("swiglu", "gated MLP"), ("swin", "for timm's plain ViTs")):
        with pytest.raises(Refused, match=message):
            project.refuse(tiny(kind))


@pytest.mark.parametrize("kind", ["vit", "registers", "layerscale", "pooled", "qk_norm", "no_bias"])
def test_saved_and_loaded_to_the_last_bit(kind, tmp_path):
    small = convolved(kind)
    save(small, tmp_path / "small")
    back: Any = load(tmp_path / "small")
    assert isinstance(back.blocks[0].attn, ConvAttention)
    with torch.no_grad():
        assert torch.equal(small(pictures()), back(pictures()))
    found = spec.read(tmp_path / "small")
    assert (found["format"], found["convolutions"]) == (2, {"0": 3, "1": 1})
    assert found["cost"]["macs"] == cost.count(small).macs < found["dense_cost"]["macs"]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"0": 5}, "1 or 3 pixels"),
        ({"7": 3}, "none of this model"),
        ({"0": "os.system"}, "1 or 3 pixels"),
        ([3], "damaged"),
        ({}, "cannot have"),
    ],
)
def test_a_spec_with_other_convolutions_is_refused(tmp_path, wrong, match):
    import json

    folder = save(convolved(), tmp_path / "small")
    file = folder / "spec.json"
    raw = json.loads(file.read_text())
    raw["convolutions"] = wrong
    file.write_text(json.dumps(raw))
    with pytest.raises(Refused, match=match):
        load(folder)


def test_a_dense_model_is_still_written_as_before(tmp_path):
    save(tiny(), tmp_path / "dense")
    assert spec.read(tmp_path / "dense")["format"] == 1


def test_what_reads_attention_refuses_a_convolution():
    from lotus.pruning import study

    small = convolved()
    for use in (
        lambda: anatomy.blocks(small),
        lambda: study(small, [(pictures(), torch.zeros(8, dtype=torch.long))], Prune()),
        lambda: Tokens(small, Patches(mode="evit", keep=0.5)),
    ):
        with pytest.raises(Refused, match=r"blocks\.0\.attn .*convolution"):
            use()
    with pytest.raises(NotImplementedError, match="mask"):
        small.blocks[0].attn(torch.zeros(1, 17, 48), attn_mask=torch.zeros(17, 17))


@pytest.mark.slow
def test_onnx_computes_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    from lotus.export import export

    sent = export(convolved(), tmp_path)
    assert sent["timm"] is None
    assert sent["onnx"]["max_abs_diff"] < 1e-4
    assert "convolution of 3 x 3" in (tmp_path / "MODEL.md").read_text()


def test_calibration_is_the_mean_and_variance_of_the_images():
    small = convolved()
    norm, seen = small.blocks[0].attn.norm, []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    assert project.calibrate(small, [(pictures(4, 1),), (pictures(4, 2),)]) == 8
    handle.remove()
    means, variances = (torch.stack([op(x) for x in seen]).mean(0) for op in (mean, variance))
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert not norm.training
    assert norm.momentum == 0.1
    assert project.calibrate(tiny(), [(pictures(4),)]) == 0


def mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3))


def variance(x: Tensor) -> Tensor:
    return x.var((0, 2, 3), unbiased=True)


def test_mixtures_are_parts():
    z = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixture.mixture(z, 3).sum(0), torch.ones(9))
    assert mixture.mixture(z, 1).shape == (5, 1)
    torch.testing.assert_close(mixture.mixture(torch.ones(4, 9), 3), torch.full((4, 9), 0.25))
    one = [math.exp(float(value) / 1e-2 - float(z[:, 4].max()) / 1e-2) for value in z[:, 4]]
    torch.testing.assert_close(mixture.mixture(z, 1)[:, 0], torch.tensor([value / sum(one) for value in one]))


def cut_sublayers(**gone) -> Any:
    full = Plan.full(tiny(depth=3))
    return surgery.cut(tiny(depth=3), Plan((replace(full.blocks[0], **gone), *full.blocks[1:])))


@pytest.mark.parametrize("gone", [{"units": ()}, {"heads": (), "qk": (), "v": ()}, {"mlp_in": tuple(range(8))}])
def test_what_lost_a_sublayer_or_inputs_does_not_convolve(gone):
    model = cut_sublayers(**gone)
    with pytest.raises(Refused, match=r"prune\.method: blocks\.0 .*sublayer"):
        NestedGates(model, keep=0.5, lr=1e-3, strength=30.0)
    choices = [Choice(0, tuple(range(block.hidden))) for block in anatomy.blocks(model)]
    with pytest.raises(Refused, match=r"prune\.method: blocks\.0 .*sublayer"):
        project.convert(model, choices, mixes(tiny(depth=3)))


def test_patches_do_not_leave_between_sublayers_that_are_not_there():
    with pytest.raises(Refused, match=r"blocks\.0 lost one of them"):
        Tokens(cut_sublayers(units=()), Patches(mode="cumulative", keep=0.5))


GOLDEN = {
    "deit_tiny_patch16_224": ([1, 1] + [0] * 10, "744 758 764 767 766 764 756 659 633 473 179 145", 1.040, 4.77),
    "deit_small_patch16_224": ([1] + [0] * 11, "1304 1399 1344 1214 1251 1183 1140 925 742 391 104 103", 3.355, 15.87),
    "deit_base_patch16_224": (
        [1, 1, 1, 3, 3] + [0] * 7,
        "1118 489 1050 1345 1336 1326 1431 1564 1606 1702 1290 190",
        8.413,
        41.58,
    ),
}
"""The released models' choices, and what they cost by the paper's formulas (which count norms too): G MACs, M parameters."""


@pytest.mark.parametrize("name", GOLDEN)
def test_the_released_models_cost_what_the_paper_says(name):
    kernels, units, macs, params = GOLDEN[name]
    dense = cost.outline(door.build(name, {}, meta=True))
    dims = [
        anatomy.Dims(1, 0, 64, int(hidden)) if kernel else of._replace(hidden=int(hidden))
        for kernel, hidden, of in zip(kernels, units.split(), dense.dims, strict=True)
    ]
    found = replace(dense, kernels=tuple(kernels)).cost(dims)
    assert found.macs / 1e9 == pytest.approx(macs, rel=0.005)
    assert found.params / 1e6 == pytest.approx(params, rel=0.005)
