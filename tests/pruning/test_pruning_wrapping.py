"""Models of others: wrapped, inside of other modules, without a classifier; batches in other forms."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vits import SIZE, asks, batches, pictures, tiny
from torch import Tensor, nn

import lotus
from lotus.pruning import lottery, measure, prune
from lotus.vit import anatomy
from selection.errors import Refused


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 100.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / 50


def bytes_of(data: list) -> list:
    return [((x * 50 + 100).clamp(0, 255).byte(), y) for x, y in data]


WRAPPINGS = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("how", WRAPPINGS)
def test_what_wraps_a_model_wraps_what_is_left_of_it(how: str) -> None:
    model = tiny()
    alone = prune(model, batches(), {"macs": 0.6})
    wrapped = WRAPPINGS[how](model)
    small = prune(wrapped, batches(), {"macs": 0.6})
    assert type(small) is type(wrapped)
    bare: Any = small
    while hasattr(bare, "_orig_mod") or isinstance(bare, nn.DataParallel):
        bare = getattr(bare, "_orig_mod", None) or bare.module
    torch.testing.assert_close(bare(pictures()), alone(pictures()), rtol=0, atol=0)
    assert not small.training


def test_ddp_comes_back_as_ddp() -> None:
    own = not torch.distributed.is_initialized()  # another test of this process may have left its group of one
    if own:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny()
        small = prune(nn.parallel.DistributedDataParallel(model), batches(), {"macs": 0.6})
        assert isinstance(small, nn.parallel.DistributedDataParallel)
        alone = prune(model, batches(), {"macs": 0.6})
        torch.testing.assert_close(small(pictures()), alone(pictures()), rtol=0, atol=0)
    finally:
        if own:
            torch.distributed.destroy_process_group()


def test_the_vit_inside_of_a_sequential_is_found_and_sees_what_it_saw() -> None:
    model = tiny()
    whole = nn.Sequential(Normalize(), model)
    before = copy.deepcopy(whole.state_dict())
    data = bytes_of(batches())
    small = prune(whole, data, {"macs": 0.6})
    assert isinstance(small, nn.Sequential)
    alone = prune(model, [(whole[0](x), y) for x, y in data], {"macs": 0.6})
    torch.testing.assert_close(small(data[0][0]), alone(whole[0](data[0][0])), rtol=0, atol=0)
    assert small[0] is not whole[0]
    assert all(torch.equal(weight, before[name]) for name, weight in whole.state_dict().items())


def test_several_vits_are_named() -> None:
    with pytest.raises(Refused, match=r"there are 2 ViTs in it, left, right.*model\.left"):
        prune(nn.ModuleDict({"left": tiny(), "right": tiny()}), batches(), {"macs": 0.6})


def test_torchvisions_vit_is_refused_by_its_own_name() -> None:
    vision = pytest.importorskip("torchvision")
    vit = vision.models.vision_transformer.VisionTransformer(SIZE, 8, 1, 2, 16, 32)
    for model in (vit, nn.Sequential(nn.Identity(), vit)):
        with pytest.raises(Refused, match=r"VisionTransformer .*vit_base_patch16_224"):
            prune(model, batches(), {"macs": 0.6})


@pytest.mark.parametrize(("images", "labels"), [("pixel_values", "labels"), ("image", "label")])
def test_batches_may_be_mappings(images: str, labels: str) -> None:
    data = batches()
    plans = [
        lottery(tiny(), given, asks({"macs": 0.6})).plan for given in (data, [{images: x, labels: y} for x, y in data])
    ]
    assert plans[0] == plans[1]


def test_bytes_are_refused_with_the_line_that_normalizes_them() -> None:
    with pytest.raises(Refused, match=r"images are uint8.*\(images / 255 - mean\) / std"):
        prune(tiny(), bytes_of(batches()), {"macs": 0.6})


def test_a_backbone_is_cut_by_its_features_and_asks_for_no_labels() -> None:
    """Half the mean square over many axes is the Gauss-Newton diagonal: sum over features of (df/dg)^2, by autograd."""
    model = tiny(num_classes=0, dtype=torch.float64)
    x = pictures(1, dtype=torch.float64)
    site, proj = "blocks.1.mlp", anatomy.blocks(model)[1].fc2
    gate = torch.ones(proj.in_features, dtype=torch.float64, requires_grad=True)

    def features(gate: Tensor) -> Tensor:
        handle = proj.register_forward_pre_hook(lambda _, args: (args[0] * gate,))
        try:
            return model(x)[0]
        finally:
            handle.remove()

    slopes = torch.autograd.functional.jacobian(features, gate)  # (D, F)
    found = measure.measure(model, [x.expand(2000, -1, -1, -1)], gradients=True, moments="none")
    estimated = torch.from_numpy(found.gradients[site]).double().square().mean(0)
    torch.testing.assert_close(estimated, slopes.square().sum(0), rtol=0.25, atol=1e-6)

    data = batches()
    wide = tiny(num_classes=0)
    small = prune(wide, [images for images, _ in data], {"macs": 0.6})
    assert small(x.float()).shape == wide(x.float()).shape
    relabeled = [(images, labels.flip(0)) for images, labels in data]
    again = prune(wide, relabeled, {"macs": 0.6})
    torch.testing.assert_close(again(x.float()), small(x.float()), rtol=0, atol=0)


def test_a_backbone_cut_by_its_features_is_nearer_than_by_chance() -> None:
    wide, data = tiny(num_classes=0), [images for images, _ in batches(8)]

    def far(criterion: str) -> float:
        small = lottery(
            wide, data, asks({"macs": 0.6}, criterion=criterion, rotate=False, compensate="none", embed_dim=None)
        )
        with torch.no_grad():
            return float((small.model(pictures(32)) - wide(pictures(32))).square().mean())

    assert far("fisher") < far("random")


@pytest.mark.parametrize("around", WRAPPINGS)
@torch.no_grad()
def test_what_is_around_a_model_is_not_saved(around: str, tmp_path: Path) -> None:
    model = tiny().eval()
    lotus.save(WRAPPINGS[around](model), tmp_path / "small")
    assert torch.equal(lotus.load(tmp_path / "small")(pictures()), model(pictures()))


def test_one_inside_of_another_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=re.escape("get_submodule('1')")):
        lotus.save(nn.Sequential(nn.Identity(), tiny()), tmp_path / "small")


@pytest.mark.parametrize("given", [None, 3, lambda: None])
def test_what_are_no_batches_is_refused(given: Any) -> None:
    with pytest.raises(Refused, match=r"batches are (NoneType|int), .*Give a DataLoader"):
        prune(tiny(), given, {"macs": 0.5})


def test_a_criterion_is_found_in_a_module_of_the_users_own() -> None:
    def outgoing(writes: np.ndarray) -> np.ndarray:
        return np.linalg.norm(writes, axis=1)

    outgoing.__module__ = "mine"
    shelf = ModuleType("mine")
    shelf.outgoing = outgoing  # type: ignore[attr-defined]
    asked: dict[str, Any] = {"keep": {"macs": 0.7}, "embed_dim": None}
    named, given = (
        prune(tiny(), batches(), **asked, **how)
        for how in ({"criterion": "outgoing", "shelves": [shelf]}, {"criterion": outgoing})
    )
    for name, weight in given.state_dict().items():
        assert torch.equal(weight, named.state_dict()[name])
