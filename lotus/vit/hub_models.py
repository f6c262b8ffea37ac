"""Hugging Face's ViTs (ViTForImageClassification, CLIPVisionModel, Dinov2Model): as timm's, which is cut, and back in their class.

Recognized by names, so that no transformers is imported. Their blocks keep q, k and v apart; widths of a cut stand in attributes
that their forward reads, so that the class stays.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lotus.vit import anatomy
from lotus.vit import model as door
from selection.errors import Refused


class _Family(NamedTuple):
    """Where a class keeps what timm's has."""

    timm: str
    root: str
    """Of all but the classifier."""
    layers: str
    attention: str
    norms: tuple[str, str]
    last: str
    scales: tuple[str, str] | None = None


_FAMILIES = {
    "ViTForImageClassification": _Family(
        "vit_base_patch16_224", "vit", "layers", "attention", ("layernorm_before", "layernorm_after"), "layernorm"
    ),
    "Dinov2Model": _Family(
        "vit_base_patch14_dinov2", "", "encoder.layer", "attention", ("norm1", "norm2"), "layernorm", ("layer_scale1", "layer_scale2")
    ),
    "CLIPVisionModel": _Family(
        "vit_base_patch16_clip_224", "", "encoder.layers", "self_attn", ("layer_norm1", "layer_norm2"), "post_layernorm"
    ),
}  # fmt: skip


def is_hub(model: object) -> bool:
    """Whether ``model`` is one of the classes above."""
    kind = type(model)
    return kind.__name__ in _FAMILIES and kind.__module__.startswith("transformers.")


def as_timm(model: Any) -> nn.Module:
    """timm's ViT that computes what ``model`` does: logits, or the pooled class token; with its weights, copied.

    Raises:
        Refused: an activation or an MLP that timm's class does not have; it was cut.
    """
    name, args = origin(model)
    whole = door.build(name, args, meta=True)
    if any(row != dict(zip(row, block.dims, strict=False)) for row, block in zip(rows(model), anatomy.blocks(whole))):
        raise Refused(
            f"{type(model).__name__}: it was cut. Save it, and go on with what lotus.load gives, timm's class."
        )
    vit: Any = door.build(name, args)
    vit.load_state_dict(weights(model))
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps_of(model)
    weight = next(model.parameters())
    found: nn.Module = vit.to(weight.device, weight.dtype).eval()
    return found


def eps_of(model: Any) -> float:
    """What its norms add to a variance; timm's classes have theirs."""
    return float(model.config.layer_norm_eps)


def rows(model: Any) -> list[dict[str, int]]:
    """Widths of each block, which a cut changes."""
    found = []
    for layer in _layers(model):
        attn = getattr(layer, _FAMILIES[type(model).__name__].attention)
        heads = attn.q_proj.out_features // attn.head_dim
        found.append(
            {"heads": heads, "qk_dim": attn.head_dim, "v_dim": attn.head_dim, "hidden": layer.mlp.fc1.out_features}
        )
    return found


def origin(model: Any) -> tuple[str, dict[str, Any]]:
    """timm's name and arguments of what ``model`` was before any cut.

    Raises:
        Refused: an activation or an MLP that timm's class does not have.
    """
    config, family = model.config, _FAMILIES[type(model).__name__]
    name = family.timm
    if getattr(config, "use_swiglu_ffn", False):
        raise Refused(
            f"{type(model).__name__}: its MLPs are gated (use_swiglu_ffn). Take timm's vit_giant_patch14_dinov2."
        )
    if config.hidden_act == "quick_gelu":
        name = "vit_base_patch16_clip_quickgelu_224"
    elif config.hidden_act != "gelu":
        raise Refused(f"{type(model).__name__}: its activation is {config.hidden_act}. Known are gelu and quick_gelu.")
    classifier = getattr(model, "classifier", None)
    hidden = getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio)
    return name, {
        "img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.num_channels,
        "embed_dim": config.hidden_size, "depth": len(_layers(model)), "num_heads": config.num_attention_heads,
        "mlp_ratio": hidden / config.hidden_size, "qkv_bias": getattr(config, "qkv_bias", True),
        "num_classes": classifier.out_features if isinstance(classifier, nn.Linear) else 0,
    }  # fmt: skip


def put_back(model: Any, small: nn.Module) -> nn.Module:
    """A copy of ``model``, of its class, with the blocks of ``small``: what :func:`as_timm` made of it, cut."""
    made = copy.deepcopy(model)
    for layer, block in zip(_layers(made), anatomy.blocks(small), strict=True):
        attn: Any = getattr(layer, _FAMILIES[type(model).__name__].attention)
        heads, qk_dim, v_dim, _ = block.dims[:4]
        if qk_dim != v_dim:
            raise Refused(
                f"{type(model).__name__}: cannot hold other query/key than value dimensions. Leave decouple_qk out."
            )
        inner = heads * qk_dim
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(part * inner, (part + 1) * inner)
            _fill(getattr(attn, name), block.qkv.weight[rows], None if block.qkv.bias is None else block.qkv.bias[rows])
        _fill(getattr(attn, "o_proj", None) or attn.out_proj, block.proj.weight, block.proj.bias)
        _fill(layer.mlp.fc1, block.fc1.weight, block.fc1.bias)
        _fill(layer.mlp.fc2, block.fc2.weight, block.fc2.bias)
        attn.head_dim = qk_dim
        for name, value in (("num_attention_heads", heads), ("num_heads", heads), ("scaling", qk_dim**-0.5), ("scale", qk_dim**-0.5)):  # fmt: skip
            if hasattr(attn, name):
                setattr(attn, name, value)
    found: nn.Module = made.eval()
    return found


def _layers(model: Any) -> Any:
    family = _FAMILIES[type(model).__name__]
    return model.get_submodule(f"{family.root}.{family.layers}".strip("."))


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of all its weights, by timm's names."""
    family = _FAMILIES[type(model).__name__]
    root = model.get_submodule(family.root)
    found, parts = _outside(model, root)
    parts["norm"] = root.get_submodule(family.last)
    for number, layer in enumerate(_layers(model)):
        tensors, modules = _of_layer(layer, family)
        found |= {f"blocks.{number}.{name}": tensor for name, tensor in tensors.items()}
        parts |= {f"blocks.{number}.{name}": module for name, module in modules.items()}
    for name, module in parts.items():
        found |= {f"{name}.{what}": tensor for what, tensor in module.named_parameters(recurse=False)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _outside(model: Any, root: Any) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """Tensors and modules before and after the blocks, the last norm aside, by timm's names."""
    embed = root.embeddings
    if type(model).__name__ == "CLIPVisionModel":
        found = {"cls_token": embed.class_embedding[None, None], "pos_embed": embed.position_embedding.weight[None]}
        parts = {"patch_embed.proj": embed.patch_embedding, "norm_pre": root.pre_layrnorm}
    else:
        found = {"cls_token": embed.cls_token, "pos_embed": embed.position_embeddings}
        parts = {"patch_embed.proj": embed.patch_embeddings.projection}
    if isinstance(getattr(model, "classifier", None), nn.Linear):
        parts["head"] = model.classifier
    return found, parts


def _of_layer(layer: Any, family: _Family) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
    """Tensors and modules of a block, by timm's names inside of it."""
    attn = getattr(layer, family.attention)
    qkv = [getattr(attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    found = {
        f"attn.qkv.{what}": torch.cat([getattr(linear, what) for linear in qkv])
        for what in ("weight", "bias")
        if getattr(qkv[0], what) is not None
    }
    found |= {f"ls{k}.gamma": getattr(layer, scale).lambda1 for k, scale in enumerate(family.scales or (), 1)}
    parts = {
        "attn.proj": getattr(attn, "o_proj", None) or attn.out_proj,
        "mlp.fc1": layer.mlp.fc1,
        "mlp.fc2": layer.mlp.fc2,
    }
    return found, parts | {f"norm{k}": getattr(layer, name) for k, name in enumerate(family.norms, 1)}


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=linear.weight.requires_grad)
    if bias is not None and linear.bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=linear.bias.requires_grad)
