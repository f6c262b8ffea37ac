"""Weights that become zeros: which, how many, and that they stay so."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pruning"))
from tiny_vits import pictures, tiny

import lotus.pruning
from lotus.papers.zeros import masks as unstructured
from selection.errors import Refused

LISTS = ("linears", "sparse_vit")


def brute(weights: dict[str, torch.Tensor], keep: float) -> np.ndarray:
    """The mask by sorting every weight: largest first, and of equal ones the first."""
    sizes = np.concatenate([weight.detach().abs().numpy().ravel() for weight in weights.values()])
    goes = round((1 - keep) * len(sizes))
    order = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    mask = np.zeros(len(sizes), bool)
    mask[order[: len(sizes) - goes]] = True
    return mask


def flat(masks: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([mask.numpy().ravel() for mask in masks.values()])


@pytest.mark.parametrize("weights", LISTS)
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.123])
def test_it_is_torchs_global_pruning_with_q_k_and_v_apart(weights: str, keep: float) -> None:
    model = tiny()
    listed = unstructured.listed(model, weights)
    masks = unstructured.magnitude(listed, keep)

    # The oracle sees queries, keys and values as three matrices, as Sparse-ViT's model has them.
    holders, owners = [], []
    for name, weight in listed.items():
        parts = weight.detach().chunk(3) if "qkv" in name else [weight.detach()]
        for part in parts:
            holder = nn.Module()
            holder.weight = nn.Parameter(part.clone())
            holders.append(holder)
            owners.append(name)
    torch_prune.global_unstructured([(one, "weight") for one in holders], torch_prune.L1Unstructured, amount=1 - keep)
    for name, mask in masks.items():
        theirs = [one.weight_mask for one, owner in zip(holders, owners, strict=True) if owner == name]
        assert torch.equal(mask, torch.cat(theirs).bool()), name


def test_the_list_of_sparse_vit() -> None:
    names = list(unstructured.listed(tiny(), "sparse_vit"))
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    blocks = [f"blocks.{i}.{part}.weight" for i in range(2) for part in block]
    assert names == ["patch_embed.proj.weight", *blocks, "head.weight"]
    assert list(unstructured.listed(tiny())) == [name for name in blocks if "norm" not in name]
    with pytest.raises(Refused, match=r"prune\.method\.weights: .*'all'"):
        unstructured.listed(tiny(), "all")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.floats(0.001, 1), st.integers(0, 39))
def test_the_rate_is_exact_and_of_equal_weights_the_first_stays(values: list[int], keep: float, cut: int) -> None:
    cut = min(cut, len(values) - 1)
    weights = {"a": torch.tensor(values[:cut], dtype=torch.float32), "b": torch.tensor(values[cut:]).float()}
    masks = unstructured.magnitude(weights, keep)
    assert np.array_equal(flat(masks), brute(weights, keep))
    assert unstructured.counted(masks) == (unstructured.kept_of(keep, len(values)), len(values))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1, width=16), min_size=8, max_size=8), st.integers(0, 255), st.integers(0, 8))
def test_within_other_masks(values: list[float], inside: int, stay: int) -> None:
    within = {"a": torch.tensor([bool(inside >> i & 1) for i in range(8)])}
    weights = {"a": torch.tensor(values)}
    if stay > int(within["a"].sum()):
        with pytest.raises(Refused, match=r"prune\.keep\.weights"):
            unstructured.magnitude(weights, stay / 8, within)
        return
    mask = unstructured.magnitude(weights, stay / 8, within)["a"]
    order = sorted((i for i in range(8) if within["a"][i]), key=lambda i: (-abs(values[i]), i))
    assert set(mask.nonzero().flatten().tolist()) == set(order[:stay])


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(Refused, match="not finite"):
        unstructured.magnitude({"a": torch.tensor([1.0, float("nan")])}, 0.5)


def test_two_of_four_by_brute_force() -> None:
    weights = unstructured.listed(tiny())
    masks = unstructured.n_of_m(weights, 2, 4)
    for name, weight in weights.items():
        for sizes, mask in zip(weight.detach().abs().view(-1, 4), masks[name].view(-1, 4), strict=True):
            assert mask.sum() == 2
            assert sizes[mask].min() >= sizes[~mask].max()
    assert unstructured.n_of_m({"a": torch.ones(1, 4)})["a"].tolist() == [[True, True, False, False]]
    with pytest.raises(Refused, match=r"blocks\.0\.norm1\.weight .*do not divide"):
        unstructured.n_of_m(unstructured.listed(tiny(), "sparse_vit"))
    with pytest.raises(Refused, match=r"prune\.method\.pattern: '4:2'"):
        unstructured.pattern("4:2")


@pytest.mark.parametrize("weights", LISTS)
def test_a_thinned_model_is_saved_and_its_masks_are_its_zeros(tmp_path, weights: str) -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    masks = unstructured.magnitude(unstructured.listed(model, weights), 0.6)
    small = copy.deepcopy(model)
    unstructured.put(small, masks)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "left as it was"
    lotus.pruning.save(small, tmp_path / "small")
    loaded = lotus.pruning.load(tmp_path / "small")
    assert torch.equal(loaded(pictures()), small(pictures()))
    found = unstructured.zeros(loaded, weights)
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(found[name], mask)
        assert torch.equal(loaded.state_dict()[name], before[name] * mask)
    others = before.keys() - masks.keys()
    assert all(torch.equal(loaded.state_dict()[name], before[name]) for name in others)


def test_zeros_are_worth_something_once_compressed(tmp_path) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(20_000, generator=draw)
    sizes = []
    for keep in (1.0, 0.1):
        mask = unstructured.magnitude({"a": weight}, keep)["a"]
        save_file({"a": weight * mask}, tmp_path / "a.safetensors")
        sizes.append(unstructured.compressed(tmp_path / "a.safetensors"))
    assert 70_000 < sizes[0] < 80_100, "the digits of a random number do not compress"
    assert sizes[1] < 0.25 * sizes[0]


@pytest.mark.parametrize(("name", "keeps"), [("adamw", True), ("momentum", True), ("lion", True), ("muon", False)])
def test_which_optimizers_leave_zeros_alone(name: str, keeps: bool) -> None:
    from timm.optim import create_optimizer_v2

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert unstructured.keeps_zeros(create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=0.1)) is keeps


def test_a_weight_that_moved_is_refused() -> None:
    model = tiny()
    masks = unstructured.magnitude(unstructured.listed(model), 0.5)
    with pytest.raises(Refused, match=r"blocks\.0\.attn\.qkv\.weight: .* have moved"):
        unstructured.check(model, masks)
    unstructured.put(model, masks)
    unstructured.check(model, masks)


def test_the_knee_is_the_last_before_a_point_is_lost() -> None:
    sparsities = (0.0, 0.1, 0.2, 0.3, 0.4)
    assert unstructured.knee(sparsities, (80, 80.5, 79.0, 78.9, 60)) == 0.2
    assert unstructured.knee(sparsities, (80, 70, 80, 80, 80)) == 0.0, "a later recovery does not count"
    assert unstructured.knee(sparsities, (80, 80, 80, 80, 79)) is None
    assert unstructured.SWEEP[0] == 0
    assert unstructured.SWEEP[-1] == 0.9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=6, max_size=30), st.integers(0, 2**16), st.floats(0.05, 0.95))
def test_the_largest_of_a_union_with_ones_own_mask_are_ones_own_mask(values: list[int], seed: int, keep: float) -> None:
    """So an adjustment right after the union, as the text of 2306.10460 has it, is one-shot magnitude again."""
    weights = {"a": torch.tensor(values).float()}
    own = unstructured.magnitude(weights, keep)
    draw = torch.Generator().manual_seed(seed)
    others = [{"a": torch.rand(len(values), generator=draw) < 0.5} for _ in range(3)]
    union = unstructured.union([own, *others])
    assert torch.equal(union["a"], own["a"] | others[0]["a"] | others[1]["a"] | others[2]["a"])
    assert torch.equal(unstructured.magnitude(weights, keep, within=union)["a"], own["a"])


@pytest.mark.parametrize("text", ["\u00b2:4", "2:\u2463"])
def test_a_digit_that_is_no_number_makes_no_pattern(text: str) -> None:
    """A superscript two is a digit to str.isdigit, and none to int."""
    from lotus.config import as_request, rules
    from lotus.papers.zeros import RULES, masks

    with pytest.raises(Refused, match=r"prune\.method\.pattern"):
        masks.pattern(text)
    request = as_request({"keep": {"weights": 0.5}, "method": {"name": "unstructured", "pattern": text}})
    with pytest.raises(Refused, match=r"method\.pattern"):
        rules.refuse(request, RULES, place="prune")
