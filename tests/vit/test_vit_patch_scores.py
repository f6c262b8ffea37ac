"""Patch scores: against whole attention matrices, plain loops and pictures made by hand; and laws over the shelf."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pruning"))
from tiny_vits import pictures, random_plan, tiny

from lotus.config import Method
from lotus.pruning import surgery
from lotus.vit import anatomy, patch_scores, saliency
from selection import methods
from selection.errors import Refused

KINDS = ["vit", "distilled", "registers", "pooled", "attention_pooled", "norm_after", "split"]


def every(kind: str) -> Any:
    if kind != "split":
        return tiny(kind).double()
    model = tiny()
    return surgery.cut(model, random_plan(model, 3, decouple_qk=True)).double()


def explicit(model, image: Tensor) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """One image, block by block in numpy: attentions (H, N, N), values (H, N, V), and what the last block leaves (N, D)."""
    attentions, values = [], []
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    for block in anatomy.blocks(model):
        module = block.module
        read = x if type(module).__name__ == "ResPostBlock" else module.norm1(x)
        qkv = block.qkv(read)[0].detach().numpy()
        heads, qk, v, _ = block.dims[:4]
        parts = np.split(qkv, [heads * qk, 2 * heads * qk], axis=1)
        maps, vs = [], []
        for head in range(heads):
            q, k = (part[:, head * qk : (head + 1) * qk] for part in parts[:2])
            logits = np.exp(q @ k.T / math.sqrt(qk))
            maps.append(logits / logits.sum(1, keepdims=True))
            vs.append(parts[2][:, head * v : (head + 1) * v])
        attentions.append(np.stack(maps))
        values.append(np.stack(vs))
        x = module(x)
    return attentions, values, x[0].detach().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_model_scores_are_what_whole_matrices_give(kind):
    model, images = every(kind), pictures(3, dtype=torch.float64)
    prefix = model.num_prefix_tokens
    seen = saliency.watch(model, images)
    scores = {
        name: methods.call(getattr(patch_scores, name), seen, {}, place="x").numpy()
        for name in ("attention", "rollout", "ats", "token_norm")
    }
    for image in range(3):
        attentions, values, left = explicit(model, images[image])
        if kind == "split" or model.cls_token is not None:
            row = attentions[-1][:, 0]
            rolled = np.eye(len(left))
            for matrix in attentions:
                rolled = (0.5 * matrix.mean(0) + 0.5 * np.eye(len(left))) @ rolled
            np.testing.assert_allclose(scores["rollout"][image], rolled[0, prefix:])
            np.testing.assert_allclose(scores["attention"][image], row.mean(0)[prefix:])
            heads = []
            for head in range(len(row)):
                each = [
                    row[head, j] * math.dist(values[-1][head, j], [0] * values[-1].shape[2]) for j in range(len(left))
                ]
                heads.append(np.array(each[prefix:]) / sum(each[prefix:]))
            np.testing.assert_allclose(scores["ats"][image], sum(heads) / len(heads))
        else:
            rolled = np.eye(len(left))
            for matrix in attentions:
                rolled = (0.5 * matrix.mean(0) + 0.5 * np.eye(len(left))) @ rolled
            np.testing.assert_allclose(scores["rollout"][image], rolled[prefix:].mean(0)[prefix:])
        np.testing.assert_allclose(scores["token_norm"][image], [np.linalg.norm(token) for token in left[prefix:]])
    np.testing.assert_allclose(scores["ats"].sum(1), 1)


def test_watching_leaves_the_model_as_it_was():
    model = tiny().train()
    saliency.watch(model, pictures(2))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("patch", [(4, 4), (2, 8)])
def test_image_scores_are_what_plain_loops_give(patch):
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    contrast, edges = patch_scores.contrast(images, patch), patch_scores.edges(images, patch)
    for image in range(2):
        padded = np.pad(images[image].numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
        place = 0
        for top in range(0, 16, patch[0]):
            for left in range(0, 16, patch[1]):
                variances, energies = [], []
                for channel in range(3):
                    pixels = images[image, channel, top : top + patch[0], left : left + patch[1]].numpy()
                    variances.append(pixels.var())
                    for y in range(top, top + patch[0]):
                        for x in range(left, left + patch[1]):
                            w = padded[channel, y : y + 3, x : x + 3]
                            gx = (w[0, 2] + 2 * w[1, 2] + w[2, 2] - w[0, 0] - 2 * w[1, 0] - w[2, 0]) / 8
                            gy = (w[2, 0] + 2 * w[2, 1] + w[2, 2] - w[0, 0] - 2 * w[0, 1] - w[0, 2]) / 8
                            energies.append(gx**2 + gy**2)
                assert float(contrast[image, place]) == pytest.approx(math.sqrt(sum(variances) / 3))
                assert float(edges[image, place]) == pytest.approx(sum(energies) / len(energies))
                place += 1


def test_pictures_made_by_hand():
    images = torch.full((1, 3, 16, 16), 0.4)
    images[..., :4, 4:8] = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))  # noise in patch 1
    assert int(patch_scores.contrast(images, (4, 4)).argmax()) == 1
    assert int(patch_scores.edges(images, (4, 4)).argmax()) == 1
    flat = patch_scores.edges(torch.full((1, 3, 16, 16), 0.7), (4, 4))
    assert float(flat.max()) < 1e-12, "the border is no edge"
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    inner = patch_scores.edges(ramp, (4, 4)).view(4, 4)[:, 1:3]
    torch.testing.assert_close(inner, torch.ones(4, 2))  # a slope of 1 a pixel


@pytest.mark.parametrize("name", methods.names(patch_scores))
def test_laws_of_the_shelf(name):
    """Of the shape of the patches, finite on a flat picture too, each image for itself, sourced or ours."""
    found = getattr(patch_scores, name)
    model = tiny().double()
    images = pictures(3, dtype=torch.float64)
    images[1] = 0.3

    def scored(some: Tensor) -> Tensor:
        seen = {**saliency.watch(model, some), "rng": torch.Generator().manual_seed(7)}
        return methods.call(found, seen, {}, place="x")

    scores = scored(images)
    assert scores.shape == (3, 16)
    assert scores.isfinite().all()
    assert set(methods.reads(found)) <= set(saliency.watch(model, images))
    if name == "random":
        assert torch.equal(scores, scored(images)), "the same generator, the same draw"
    else:
        torch.testing.assert_close(scored(images.flip(0)), scores.flip(0))
    method = Method(name=name)
    if not saliency.reads_a_model(method) and name != "random":
        again = saliency.of_images(method)(images, (8, 8))
        torch.testing.assert_close(again.double(), scores, atol=1e-4, rtol=1e-4)


def test_what_needs_a_model_and_what_is_refused():
    needs = {name for name in methods.names(patch_scores) if saliency.reads_a_model(Method(name=name))}
    assert needs == {"attention", "rollout", "ats", "token_norm"}
    with pytest.raises(Refused, match=r"train.patches.score: there is no 'contrst'. Did you mean 'contrast'"):
        saliency.reads_a_model(Method(name="contrst"))
