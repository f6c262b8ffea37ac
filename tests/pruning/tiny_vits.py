"""Small random ViTs, one of each kind, with weights large enough that every unit matters; and random plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from lotus.config import Prune, as_request
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy
from lotus.vit.anatomy import Dims

SIZE, CLASSES = 32, 5
SMALL = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES}

_PLAIN: dict[str, tuple[str, dict]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layerscale": ("deit3_small_patch16_224", {"init_values": 0.5}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5}),
    "pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "attention_pooled": ("vit_base_patch16_siglip_224", {}),
    "norm_after": ("vit_base_patch16_rpn_224", {}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no_bias": ("vit_tiny_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "swiglu": ("vit_giant_patch14_dinov2", {"init_values": 0.5, "mlp_ratio": 5.34}),
}
KINDS: dict[str, tuple[str, dict]] = {
    **_PLAIN,
    "scale_norms": ("beit3_base_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "eva02_norm": ("eva02_base_patch14_224", {}),
    "eva02_scale": ("eva02_base_patch16_clip_224", {}),
    "eva02_after": ("eva02_enormous_patch14_clip_224", {}),
    "rope": ("vit_small_patch16_rope_224", {"init_values": 0.5}),
    "rope_apart": ("vit_small_patch16_rope_224", {"init_values": 0.5, "qkv_fused": False, "qk_norm": True}),
    "dinov3": ("vit_small_plus_patch16_dinov3", {"init_values": 0.5, "dynamic_img_size": False}),
    "perception": ("vit_pe_core_tiny_patch16_384", {"attn_pool_num_heads": 3}),
    "beit": ("beit_base_patch16_224", {}),
    "beitv2": ("beitv2_base_patch16_224", {"init_values": None, "swiglu_mlp": True, "scale_mlp": True}),
    "swin": ("swin_tiny_patch4_window7_224", {}),
}
_SWIN = {"img_size": SIZE, "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 3), "window_size": 7}
NORMED = ("scale_norms", "eva02_norm", "eva02_scale", "beitv2")
"""Kinds with a norm before proj or fc2: what is cut changes its statistics."""
UNLIKE = ("eva", "eva02", "eva02_scale", "rope_apart", "beit", "swin")
"""One of each way in which timm stores a block; the others differ by what stands around it."""
FAST = ("vit", "attention_pooled", "swiglu", *UNLIKE)
"""For laws that every kind goes through in the whole suite."""
PLAIN = list(_PLAIN)
"""Kinds of timm's VisionTransformer without norms inside of sublayers."""


def tiny(kind: str = "vit", seed: int = 0, dtype: torch.dtype = torch.float32, **args) -> Any:
    name, own = KINDS[kind]
    base = {**_SWIN, "num_classes": CLASSES} if kind == "swin" else SMALL
    model = timm.create_model(name, **{**base, **own, **args})
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for where, weight in model.named_parameters():
            spread = torch.randn(weight.shape, generator=draw) * 0.15
            weight.copy_(1 + spread if "norm" in where and where.endswith("weight") else spread)
    return model.to(dtype).eval()


def pictures(rows: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batches(count: int = 3, rows: int = 8, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [(pictures(rows, 10 + i, dtype), torch.randint(CLASSES, (rows,), generator=draw)) for i in range(count)]


def random_plan(model: nn.Module | Sequence[Dims], seed: int, *, decouple_qk: bool = False) -> Plan:
    """Any valid plan; ``decouple_qk`` lets query/key and value dimensions differ in number. All query/key dimensions stay where they must."""
    rng = np.random.default_rng(seed)
    found = anatomy.blocks(model) if isinstance(model, nn.Module) else []
    dims = [block.dims for block in found] if isinstance(model, nn.Module) else model
    bound = [block.whole_qk for block in found] or [False] * len(dims)

    def some(count: int, most: int) -> tuple[int, ...]:
        return tuple(sorted(int(i) for i in rng.choice(most, size=count, replace=False)))

    plans = []
    for of, whole in zip(dims, bound, strict=True):
        heads = some(int(rng.integers(1, of.heads + 1)), of.heads)
        v = int(rng.integers(1, of.v_dim + 1))
        qk = of.qk_dim if whole else int(rng.integers(1, of.qk_dim + 1)) if decouple_qk else v
        plans.append(
            BlockPlan(
                of=of,
                heads=heads,
                qk=tuple(some(qk, of.qk_dim) for _ in heads),
                v=tuple(some(v, of.v_dim) for _ in heads),
                units=some(int(rng.integers(1, of.hidden + 1)), of.hidden),
            )
        )
    return Plan(tuple(plans))


def asks(keep: Mapping[str, float] | None = None, **settings: Any) -> Prune:
    """What to prune, of the settings of a config's section."""
    return as_request({**({} if keep is None else {"keep": keep}), **settings})


def shelf(function: Callable[..., Any]) -> ModuleType:
    """A module of the user's own with one criterion."""
    made = ModuleType(function.__module__)
    setattr(made, function.__name__, function)
    return made
