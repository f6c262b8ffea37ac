"""Hugging Face's ViTs: as timm's and back; the oracle is their own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vits import batches, pictures, random_plan

from lotus.pruning import prune, surgery
from lotus.vit import hub

transformers = pytest.importorskip("transformers", reason="the extra hub is not installed")

SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    name = {
        "ViTForImageClassification": "ViTConfig",
        "Dinov2Model": "Dinov2Config",
        "CLIPVisionModel": "CLIPVisionConfig",
    }[kind]
    more = {"num_labels": 5} if kind.startswith("ViT") else {}
    more = more if kind == "Dinov2Model" else {**more, "intermediate_size": 96}
    model = getattr(transformers, kind)(getattr(transformers, name)(**SMALL, **more))
    with torch.no_grad():
        for where, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + ("norm" in where and where.endswith("weight")))
    return model.eval()


def told(model: Any, x: torch.Tensor) -> torch.Tensor:
    out = model(pixel_values=x)
    return out.logits if hasattr(out, "logits") else out.pooler_output


KINDS = ["ViTForImageClassification", "Dinov2Model", "CLIPVisionModel"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_as_timm_and_cut_it_computes_what_it_does(kind: str) -> None:
    model, x = made(kind), pictures()
    vit = hub.as_timm(model)
    torch.testing.assert_close(vit(x), told(model, x), rtol=1e-4, atol=1e-4)
    plan = random_plan(vit, 3)
    small = hub.put_back(model, surgery.cut(vit, plan))
    assert type(small) is type(model)
    torch.testing.assert_close(told(small, x), surgery.masked(vit, plan)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pruned_in_its_class(kind: str) -> None:
    model = made(kind)
    data = [{"pixel_values": x, "labels": y} for x, y in batches()]
    small: Any = prune(model, data, {"macs": 0.6})
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.isfinite(told(small, pictures())).all()
