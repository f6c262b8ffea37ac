"""Cost: the closed form against published counts, torch's own counter and the parameters that are there."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from lotus.pruning import surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import cost
from lotus.vit.anatomy import Dims
from lotus.vit.attention import SplitAttention
from lotus.vit.unmade import without_memory
from selection.errors import Refused

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def meta(name: str, **args):
    with without_memory():
        return timm.create_model(name, **args)


@pytest.mark.parametrize(
    ("name", "params", "macs", "linear"),
    [
        ("vit_tiny_patch16_224", 5_717_416, 1.2537, 1.0749),
        ("vit_small_patch16_224", 22_050_664, 4.5989, 4.2412),
        ("vit_base_patch16_224", 86_567_656, 17.5638, 16.8485),
        ("vit_large_patch16_224", 304_326_632, 61.5547, 59.6472),
    ],
)
def test_known_counts_of_the_vit_family(name, params, macs, linear):
    counted = cost.count(meta(name))
    assert counted.params == params
    assert round(counted.macs / 1e9, 4) == macs
    width, depth = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}[name.split("_")[1]]
    assert (
        round((counted.macs - depth * 2 * 197**2 * width) / 1e9, 4) == linear
    )  # of counters that do not see attention


@pytest.mark.parametrize(
    ("heads", "dim", "hidden", "params", "macs"),
    [
        (12, 64, 2456, 75.206, 15.327),
        (12, 64, 1536, 58.238, 11.986),
        (12, 48, 3072, 79.483, 15.991),
        (12, 32, 3072, 72.398, 14.417),
        (6, 64, 3072, 72.398, 14.417),
        (12, 48, 2456, 68.121, 13.754),
        (12, 40, 1840, 53.217, 10.731),
        (12, 32, 1536, 44.068, 8.840),
    ],
)
def test_known_counts_of_cuts_of_deit_base(heads, dim, hidden, params, macs):
    outline = cost.outline(meta("deit_base_patch16_224"))
    counted = outline.cost([Dims(heads, dim, dim, hidden)] * 12)
    assert round(counted.params / 1e6, 3) == params
    assert round(counted.macs / 1e9, 3) == macs
    d, a, f, n = 768, heads * dim, hidden, 197  # the formulas of a block, to the last one
    block = outline.block(0, Dims(heads, dim, dim, hidden))
    assert block.macs == n * d * 3 * a + n * n * 2 * a + n * a * d + 2 * n * d * f
    assert block.params == d * 3 * a + 3 * a + a * d + d + 2 * d * f + f + d + 4 * d


@pytest.mark.parametrize(
    ("dims", "params", "macs"),
    [(Dims(12, 64, 64, 3072), 43.317, 9.140), (Dims(12, 32, 32, 1536), 22.051, 4.599)],
)
def test_known_counts_of_deit_base_at_half_its_width(dims, params, macs):
    """The residual width alone, and all widths, which is DeiT-S with 12 heads of 32."""
    counted = cost.outline(meta("deit_base_patch16_224", embed_dim=384)).cost([dims] * 12)
    assert round(counted.params / 1e6, 3) == params
    assert round(counted.macs / 1e9, 3) == macs
    if dims.hidden == 1536:
        small = cost.count(meta("deit_small_patch16_224"))
        assert (counted.params, counted.macs) == (small.params, small.macs)


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("deit_base_patch16_224", Dims(12, 32, 32, 1536)),
        ("eva02_base_patch14_224", Dims(6, 64, 64, 1024)),
        ("beit_base_patch16_224", Dims(12, 48, 48, 1536)),
        ("swin_tiny_patch4_window7_224", None),
        ("vit_small_plus_patch16_dinov3", None),
    ],
)
def test_published_sizes_cut_for_real_are_counted_by_torch(name, dims):
    """Without memory; torch's own counter sees the model that the surgeon made."""
    args = {"dynamic_img_size": False} if "dinov3" in name else {}
    model = meta(name, **args).eval()
    full = Plan.full(model)
    plans = []
    for block in full.blocks:
        to = dims or Dims(block.of.heads - 1, block.of.qk_dim, block.of.v_dim, block.of.hidden // 2)
        heads = tuple(range(to.heads))
        rows = tuple(tuple(range(to.v_dim)) for _ in heads), tuple(tuple(range(to.qk_dim)) for _ in heads)
        plans.append(BlockPlan(of=block.of, heads=heads, v=rows[0], qk=rows[1], units=tuple(range(to.hidden))))
    plan = Plan(tuple(plans))
    small = surgery.cut(model, plan).requires_grad_(False)
    for module in small.modules():
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False
    counted = cost.count(small)
    assert plan.cost(model) == counted
    assert counted.params == sum(weight.numel() for weight in small.parameters())
    with FlopCounterMode(display=False) as counter:
        small(torch.zeros(1, 3, *model.patch_embed.img_size, device="meta"))
    assert counter.get_total_flops() == 2 * counted.macs


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_base_patch16_siglip_224", {}),  # pools by attention
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
        ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
        ("vit_tiny_patch16_224", {"global_pool": ""}),
    ],
)
def test_equal_to_torchs_counter(name, args):
    model = timm.create_model(name, **{**TINY, **args}).eval().requires_grad_(False)
    for module in model.modules():  # torch's counter does not see fused attention on the CPU
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    counted = cost.count(model)
    assert counter.get_total_flops() == 2 * counted.macs
    assert counted.params == sum(weight.numel() for weight in model.parameters())


def test_split_attention_is_counted_and_equals_timms_where_both_can():
    torch.manual_seed(0)
    whole: Any = timm.create_model("vit_tiny_patch16_224", **TINY)
    theirs = whole.blocks[0].attn.eval()
    ours = SplitAttention(48, 3, 16, 16).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 17, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.fused_attn = False
    torch.testing.assert_close(ours(x), theirs(x))
    narrow = SplitAttention(48, 3, 8, 16)
    narrow.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        narrow(x[:1])
    assert counter.get_total_flops() == 2 * cost.attention_macs(17, 48, 3, 8, 16)
    with pytest.raises(NotImplementedError):
        narrow(x, is_causal=True)


def test_latency_leaves_the_model_as_it_was():
    model = timm.create_model("vit_tiny_patch16_224", **TINY).train()
    assert cost.latency(model, 1, repeats=3, warmup=1) > 0
    assert model.training


def test_an_open_image_size_has_no_cost():
    model = meta("vit_tiny_patch16_224", **TINY)
    model.patch_embed.num_patches = model.patch_embed.img_size = None
    with pytest.raises(Refused, match="img_size"):
        cost.count(model)
    with pytest.raises(Refused, match="img_size"):
        cost.latency(model, 1)


def test_macs_of_a_model_that_is_only_a_proxy() -> None:
    """Against a sum over convolutions and classifiers, written out."""
    net = timm.create_model("resnet10t", num_classes=7).train()
    total = 0

    def add(module, given, out):
        nonlocal total
        if isinstance(module, torch.nn.Conv2d):
            total += out[0].numel() * module.weight[0].numel()
        elif isinstance(module, torch.nn.Linear):
            total += module.weight.numel()

    hooks = [module.register_forward_hook(add) for module in net.modules()]
    net(torch.zeros(2, 3, 40, 40))
    for hook in hooks:
        hook.remove()
    assert cost.macs(net, 40) == total > 0
    assert net.training
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8)
    assert cost.macs(vit, 999) == cost.count(vit).macs, "a size of its own"
    with pytest.raises(Refused, match=r"score\.model: ResNet .*0 x 0.*another side"):
        cost.macs(net, 0, place="score.model")
