"""The pass over the calibration images: what it holds at once, and what it leaves out of large images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_vits import CLASSES, tiny

from lotus.pruning import measure, rotate
from lotus.vit import anatomy


def drawn(images: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(images, 3, side, side), torch.arange(images) % CLASSES


def test_images_that_go_through_in_small_parts_give_the_same(monkeypatch):
    model, batch = tiny(), drawn(7)
    whole = measure.measure(model, [batch], gradients=True, moments="affine", squares=True)
    monkeypatch.setattr(measure, "TOKENS", 2 * 16)  # of 16 patches each
    told: list[int] = []
    parts = measure.measure(model, [batch], gradients=True, moments="affine", squares=True, progress=told.append)
    assert told == [2, 4, 6, 7]
    assert parts.images == whole.images == 7
    for site, gradients in whole.gradients.items():
        np.testing.assert_allclose(parts.gradients[site], gradients, rtol=1e-4, atol=1e-6)
    for site, moments in whole.moments.items():
        torch.testing.assert_close(parts.moments[site].covariance, moments.covariance, rtol=1e-4, atol=1e-7)
    for name, squares in whole.squares.items():
        np.testing.assert_allclose(parts.squares[name], squares, rtol=1e-3, atol=1e-9)


def test_a_graph_keeps_nothing_for_the_weights_and_they_ask_again_afterwards():
    model = tiny()
    first = next(model.parameters()).requires_grad_(False)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    saved: list[int] = []
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        measure.measure(model, [drawn(2)], gradients=True, moments="none")
        mine, saved[:] = sum(saved), []
        torch.nn.functional.cross_entropy(model(drawn(2)[0]), torch.zeros(2, dtype=torch.long))
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert not first.requires_grad
    assert mine < 0.9 * sum(saved)


def test_of_many_tokens_some_are_taken_and_each_has_its_turn():
    x = torch.arange(2 * 197 * 3).reshape(2, 197, 3)
    stride = 197 // measure.MANY
    parts = [measure.some_tokens(x, turn) for turn in range(stride)]
    assert all(measure.MANY <= part.shape[1] < 2 * measure.MANY for part in parts)
    assert sorted(token for part in parts for token in part[0, :, 0].tolist()) == x[0, :, 0].tolist()
    assert measure.some_tokens(x[:, :127], 1) is not None
    assert measure.some_tokens(x[:, :127], 1).shape[1] == 127
    windows = torch.zeros(2, 14, 14, 3)
    assert measure.some_tokens(windows, 0) is windows


def test_some_tokens_and_some_images_say_nearly_what_all_do(monkeypatch):
    model = tiny(img_size=96, patch_size=8)  # 144 patches and a class token
    batches = [drawn(24, 96)] * 4
    some = measure.measure(model, batches, gradients=False, moments="affine")
    turned = rotate.statistics(model, batches)
    monkeypatch.setattr(measure, "MANY", 10**6)
    every = measure.measure(model, batches, gradients=False, moments="affine")
    whole = rotate.statistics(model, batches)
    for site, moments in every.moments.items():
        assert 2 * some.moments[site].count < moments.count + 4 * 24 * 2
        near = torch.linalg.norm(some.moments[site].covariance - moments.covariance)
        assert near < 0.1 * torch.linalg.norm(moments.covariance)
    for name, found in whole.items():
        assert turned[name].logits.images == found.logits.images / 2
        near = torch.linalg.norm(turned[name].logits.queries - found.logits.queries)
        assert near < 0.1 * torch.linalg.norm(found.logits.queries)
    assert len(anatomy.blocks(model)) == len(whole)


@pytest.mark.parametrize("batch", [1, 5])
def test_progress_counts_images_that_are_passed_over(batch):
    told: list[int] = []
    images, labels = drawn(batch)
    found = measure.measure(
        tiny(), [(images, labels)] * 2, gradients=False, moments="none", every=3, progress=told.append
    )
    assert told == [batch, 2 * batch]
    assert found.images == 2 * -(-batch // 3)


@pytest.mark.parametrize(("side", "patch", "images"), [(32, 8, 2048), (224, 32, 2040), (224, 16, 512), (384, 16, 512)])
def test_large_images_are_fewer(side, patch, images):
    assert measure.enough(tiny(img_size=side, patch_size=patch)) == images
