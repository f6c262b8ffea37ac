"""Hugging Face's ViTs: as timm's and back; the oracle is their own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from masking import masked
from tiny_vits import batches, pictures, random_plan

import lotus
from lotus.pruning import prune, surgery
from lotus.vit import hub_models

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
    vit = hub_models.as_timm(model)
    torch.testing.assert_close(vit(x), told(model, x), rtol=1e-4, atol=1e-4)
    plan = random_plan(vit, 3)
    small = hub_models.put_back(model, surgery.cut(vit, plan))
    assert type(small) is type(model)
    torch.testing.assert_close(told(small, x), masked(vit, plan)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pruned_in_its_class(kind: str) -> None:
    model = made(kind)
    data = [{"pixel_values": x, "labels": y} for x, y in batches()]
    small: Any = prune(model, data, {"macs": 0.6})
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.isfinite(told(small, pictures())).all()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_saved_and_comes_back_as_timm_s(kind: str, cut: bool, tmp_path: Path) -> None:
    model, x = made(kind), pictures()
    if cut:
        model = hub_models.put_back(
            model, surgery.cut(hub_models.as_timm(model), random_plan(hub_models.as_timm(model), 3))
        )
    lotus.save(model, tmp_path / "saved", about={"classes": list("abcde")})
    back = lotus.load(tmp_path / "saved")
    torch.testing.assert_close(back(x), told(model, x), rtol=1e-4, atol=1e-4)
    again = hub_models.put_back(made(kind), back)  # into its own class
    torch.testing.assert_close(told(again, x), told(model, x), rtol=1e-4, atol=1e-4)
    lotus.save(back, tmp_path / "twice", about=lotus.pruning.spec.read(tmp_path / "saved")["about"])
    assert torch.equal(lotus.load(tmp_path / "twice")(x), back(x))


def test_norms_of_another_kind_are_refused(tmp_path: Path) -> None:
    model = made(KINDS[0])
    model.config.layer_norm_eps = 1e-2
    with pytest.raises(lotus.Refused, match="layer_norm_eps"):
        lotus.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_one_that_was_cut_says_how_it_goes_on() -> None:
    model = made(KINDS[0])
    small = prune(model, [{"pixel_values": x, "labels": y} for x, y in batches()], {"macs": 0.6})
    with pytest.raises(lotus.Refused, match=r"lotus\.load"):
        prune(small, [{"pixel_values": x, "labels": y} for x, y in batches()], {"macs": 0.9})
