"""Anatomy: what can be cut, and who is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lotus.vit import anatomy
from lotus.vit.unmade import without_memory
from selection.errors import Refused

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny(name: str = "vit_tiny_patch16_224", **args) -> Any:
    return timm.create_model(name, **{**TINY, **args})


def test_blocks_name_their_parts():
    found = anatomy.blocks(tiny())
    assert [block.name for block in found] == ["blocks.0", "blocks.1"]
    block = found[1]
    assert (block.heads, block.head_dim, block.hidden) == (3, 16, 192)
    assert block.dims == anatomy.Dims(heads=3, qk_dim=16, v_dim=16, hidden=192)
    assert block.proj.in_features == block.heads * block.head_dim
    assert block.fc2.in_features == block.hidden


def test_sites_are_the_linears_that_gates_multiply_into():
    model = tiny()
    found = anatomy.sites(model)
    assert list(found) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert found["blocks.1.attn"] is model.blocks[1].attn.proj
    assert found["blocks.0.mlp"] is model.blocks[0].mlp.fc2


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_the_family_is_supported(name):
    anatomy.supported(tiny(name))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"attn_layer": "diff"}, "blocks.0.attn is DiffAttention"),
        ({"scale_mlp_norm": True, "norm_layer": "batchnorm1d"}, "blocks.0.mlp has a norm of a kind that is not known"),
    ],
)
def test_parts_that_cannot_be_cut_are_named(args, named):
    if not args.keys() <= inspect.signature(VisionTransformer.__init__).parameters.keys():
        pytest.skip("this timm has no such part")
    with pytest.raises(Refused, match=named):
        anatomy.blocks(tiny(**args))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("swinv2_tiny_window8_256", "SwinTransformerV2: is of no family"),
        ("vit_small_patch16_rope_mixed_224", "Eva: each head turns by angles of its own"),
        ("vit_base_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
        ("vit_small_r26_s32_224", "HybridEmbed"),
    ],
)
def test_other_architectures_are_named_with_what_is_supported(name, named):
    with without_memory():
        model = timm.create_model(name)
    with pytest.raises(Refused, match=named) as refusal:
        anatomy.supported(model)
    assert "deit3" in str(refusal.value)


def test_heads_that_share_keys_are_refused():
    model = timm.create_model("vit_small_patch16_rope_224", **TINY, qkv_fused=False, num_kv_heads=1)
    with pytest.raises(Refused, match=r"blocks\.0\.attn shares keys and values"):
        anatomy.blocks(model)


def test_layers_that_compute_more_than_their_weight_are_refused():
    model = tiny()
    nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc1)
    with pytest.raises(Refused, match=r"blocks\.1\.mlp\.fc1"):
        anatomy.blocks(model)


def test_shared_blocks_are_refused():
    model = tiny()
    model.blocks[1] = model.blocks[0]
    with pytest.raises(Refused, match="shares weights"):
        anatomy.blocks(model)


def test_a_wrapped_model_is_refused():
    with pytest.raises(Refused, match="Sequential"):
        anatomy.blocks(nn.Sequential(tiny()))
