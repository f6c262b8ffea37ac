"""Whole sublayers and blocks, and what sublayers read: masked == cut, saved, exported, chosen by the budget, made up for."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch
from masking import masked
from tiny_vits import KINDS, asks, batches, pictures, random_plan, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lotus import pruning
from lotus.export import export
from lotus.pruning import budget, compensate, measure, spec, surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, cost
from lotus.vit import model as door
from lotus.vit.anatomy import Dims
from lotus.vit.parts import OneSublayer, Select
from selection.errors import Refused

pytestmark = pytest.mark.slow  # many models: every family by every law

PLAIN = [kind for kind in KINDS if anatomy.is_vit(tiny(kind))]
IN = {"attn_in": (0, 3, 7, 20, 41), "mlp_in": (1, 2, 5, 40)}


def without(plan: BlockPlan, *sublayers: str) -> BlockPlan:
    gone = {"attn": {"heads": (), "qk": (), "v": (), "attn_in": None}, "mlp": {"units": (), "mlp_in": None}}
    return dataclasses.replace(
        plan, **{name: value for sublayer in sublayers for name, value in gone[sublayer].items()}
    )


def plans(model: nn.Module, seed: int = 3) -> dict[str, Plan]:
    """One of each kind of cut, over units that are cut too."""
    first, second = random_plan(model, seed).blocks
    found = {
        "no attention": (without(first, "attn"), second),
        "no MLP": (first, without(second, "mlp")),
        "first block gone": (without(first, "attn", "mlp"), second),
        "last block gone": (first, without(second, "attn", "mlp")),
        "one sublayer left": (without(first, "attn", "mlp"), without(second, "attn")),
    }
    if not anatomy.blocks(model)[0].norm_after:
        reads = [dataclasses.replace(plan, **IN) for plan in (first, second)]
        found["in_channels"] = (reads[0], reads[1])
        found["inputs and no MLP"] = (without(reads[0], "mlp"), reads[1])
    return {name: Plan(both) for name, both in found.items()}


def equal(one: nn.Module, other: nn.Module) -> None:
    images = pictures()
    with torch.no_grad():
        torch.testing.assert_close(one(images), other(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", PLAIN)
def test_masked_equals_cut_at_the_cost_that_was_told_and_is_saved(tmp_path, kind):
    model = tiny(kind)
    for name, plan in plans(model).items():
        small = surgery.cut(model, plan)
        equal(masked(model, plan), small)
        told, counted = plan.cost(model), cost.count(small)
        params = sum(weight.numel() for weight in small.parameters())
        assert (told.params, told.macs) == (params, counted.macs) == (counted.params, counted.macs), name
        assert len(small.blocks) == sum(any(block.dims[:4]) for block in plan.blocks)
        assert all(weight.numel() for weight in small.parameters()), "no empty Linear"
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
        assert Plan.from_json(plan.to_json()) == plan
        if name not in ("no attention", "first block gone", "inputs and no MLP"):
            continue
        door.remember(small, door.origin(model))
        back = spec.load(spec.save(small, tmp_path / "small"))
        with torch.no_grad():
            assert torch.equal(back(pictures()), small(pictures())), name
        rows = json.loads((tmp_path / "small" / "spec.json").read_text())["blocks"]
        assert [any(row[width] for width in ("heads", "hidden")) for row in rows] == [
            any(block.dims[:4]) for block in plan.blocks
        ]


def test_the_macs_are_those_of_torchs_counter():
    model = tiny("layerscale")
    for plan in plans(model).values():
        small = surgery.cut(model, plan).requires_grad_(False)
        for module in small.modules():
            if hasattr(module, "fused_attn"):
                vars(module)["fused_attn"] = False
        with FlopCounterMode(display=False) as counter:
            small(pictures(1))
        assert counter.get_total_flops() == 2 * plan.cost(model).macs


def test_what_was_cut_can_be_cut_again_and_trains():
    model = tiny(depth=3)
    first, second, third = Plan.full(model).blocks
    once = surgery.cut(
        model, Plan((without(first, "attn"), without(second, "attn", "mlp"), dataclasses.replace(third, **IN)))
    )
    assert once.lotus_gone == (1,)
    a, b = Plan.full(once).blocks
    again = Plan((without(a, "mlp"), dataclasses.replace(b, attn_in=(0, 2, 4), heads=(0, 2), qk=b.qk[:2], v=b.v[:2])))
    twice = surgery.cut(once, again)
    equal(masked(once, again), twice)
    assert twice.lotus_gone == (0, 1)
    assert anatomy.blocks(twice)[0].reads("attn") == (0, 7, 41), "channels of the stream, not of what was read before"
    twice.train()(pictures()).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in twice.parameters())


def test_what_is_left_of_a_block_is_timms_own():
    model = tiny("layerscale")
    small: Any = surgery.cut(model, plans(model)["inputs and no MLP"])
    assert type(small.blocks[0]) is OneSublayer
    assert type(small.blocks[1]) is type(model.blocks[1])
    assert type(small.blocks[1].norm1) is Select
    assert set(small.state_dict()) == {
        name.replace("norm1.", "norm1.norm.").replace("norm2.", "norm2.norm.")
        for name in model.state_dict()
        if not name.startswith(("blocks.0.mlp", "blocks.0.norm2", "blocks.0.ls2"))
    }


@pytest.mark.parametrize("which", ["no attention", "in_channels"])
def test_onnx_and_compile(tmp_path, which):
    model = tiny()
    small = surgery.cut(model, plans(model)[which])
    door.remember(small, door.origin(model))
    compiled = torch.compile(small, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pictures()), small(pictures()), rtol=0, atol=1e-5)
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("the extra onnx is not installed")
    sent = export(small, tmp_path / "export")
    assert sent["onnx"]["max_abs_diff"] < 1e-4
    assert sent["timm"] is None


def test_a_model_that_lost_blocks_alone_is_timms_own(tmp_path):
    import timm
    from safetensors.torch import load_file

    model = tiny(depth=3)
    first, *rest = Plan.full(model).blocks
    small = surgery.cut(model, Plan((without(first, "attn", "mlp"), *rest)))
    door.remember(small, door.origin(model))
    sent = export(small, tmp_path, onnx=False)["timm"]
    assert sent["args"]["depth"] == 2
    again = timm.create_model(sent["name"], **sent["args"]).eval()
    again.load_state_dict(load_file(tmp_path / sent["file"]))
    equal(again, small)


# --------------------------------------------------------------------------------------------------- the budget


def test_sublayers_are_chosen_by_their_score_a_mac():
    """A sublayer that is worth nothing goes before the units of the others; one that carries all stays."""
    outline = cost.outline(tiny(depth=4))
    scores = {
        f"blocks.{i}.{site}": np.ones(48 if site == "attn" else 192) for i in range(4) for site in ("attn", "mlp")
    }
    scores["blocks.2.attn"][:] = 0
    scores["blocks.1.mlp"][:] = 0
    whole = outline.dims[0]
    mine = [whole, whole._replace(hidden=0), Dims(0, 0, 0, whole.hidden), whole]
    part = (outline.cost(mine).macs + 0.5) / outline.cost().macs
    plan = budget.fit_plan(outline, scores, asks({"macs": part}, sublayers=True))
    assert [(bool(block.heads), bool(block.units)) for block in plan.blocks] == [
        (True, True), (True, False), (False, True), (True, True),
    ]  # fmt: skip
    assert list(plan.dims) == mine
    never = budget.fit_plan(outline, scores, asks({"macs": part}, sublayers=False))
    assert all(block.heads and block.units for block in never.blocks)


@pytest.mark.parametrize("scope", ["global", "per_type"])
@pytest.mark.parametrize("in_channels", [False, True])
def test_below_what_units_can_give_sublayers_go_by_themselves(scope, in_channels):
    outline = cost.outline(tiny(depth=4))
    rng = np.random.default_rng(0)
    wide = {"attn": 48, "mlp": 192, "attn_in": 48, "mlp_in": 48}
    scores = {f"blocks.{i}.{site}": rng.exponential(size=wide[site]) for i in range(4) for site in wide}
    with pytest.raises(Refused, match=r"or prune\.sublayers"):
        budget.fit_plan(outline, scores, asks({"macs": 0.02}, scope=scope, in_channels=in_channels, sublayers=False))
    whole = outline.cost().macs
    floor = budget.check_reach(outline, asks({"macs": 1.0}, in_channels=in_channels))["macs"]
    assert floor == whole
    with pytest.raises(Refused, match=r"With one sublayer in all") as refusal:
        budget.fit_plan(outline, scores, asks({"macs": 0.001}, scope=scope, in_channels=in_channels))
    lowest = float(str(refusal.value).split("Take ")[1].split(" to")[0])
    for part in (lowest, lowest + 0.01):
        plan = budget.fit_plan(outline, scores, asks({"macs": part}, scope=scope, in_channels=in_channels))
        assert plan.cost(outline).macs <= part * whole
        assert any(block.heads or block.units for block in plan.blocks)
        assert not all(block.heads and block.units for block in plan.blocks)


def test_inputs_are_cut_where_they_are_worth_least():
    outline = cost.outline(tiny())
    rng = np.random.default_rng(1)
    wide = {"attn": 48, "mlp": 192, "attn_in": 48, "mlp_in": 48}
    scores = {f"blocks.{i}.{site}": 10 + rng.exponential(size=wide[site]) for i in range(2) for site in wide}
    scores["blocks.1.mlp_in"] = scores["blocks.1.mlp_in"] / 1000
    plan = budget.fit_plan(outline, scores, asks({"macs": 0.8}, in_channels=True, sublayers=False))
    kept = plan.blocks[1].mlp_in
    assert kept is not None
    assert len(kept) < 48, "some of them may have come back, where nothing dearer fitted"
    gone = np.setdiff1d(np.arange(48), kept)
    assert scores["blocks.1.mlp_in"][list(kept)].min() >= scores["blocks.1.mlp_in"][gone].max()
    assert plan.cost(outline).macs <= 0.8 * outline.cost().macs
    with pytest.raises(Refused, match=r"blocks\.0\.attn_in: has no scores"):
        budget.fit_plan(
            outline, {k: v for k, v in scores.items() if not k.endswith("_in")}, asks({"macs": 0.8}, in_channels=True)
        )


# ------------------------------------------------------------------------------------------------- one threshold


def test_a_quantile_is_one_threshold_over_all_sites():
    """VTP: the lowest of all scores go, whatever they cost; heads of a block then share what is left to them."""
    outline = cost.outline(tiny())
    rng = np.random.default_rng(2)
    wide = {"attn": 48, "mlp": 192, "attn_in": 48, "mlp_in": 48}
    scores = {f"blocks.{i}.{site}": rng.uniform(size=wide[site]) * (1 + i) for i in range(2) for site in wide}
    plan = budget.fit_plan(
        outline,
        scores,
        asks({"gates": 0.6}, scope="threshold", in_channels=True, decouple_qk=True, round=1, sublayers=False),
    )
    tau = np.quantile(np.concatenate(list(scores.values())), 0.4)
    for i, block in enumerate(plan.blocks):
        assert block.units == tuple(np.flatnonzero(scores[f"blocks.{i}.mlp"] > tau))
        for reads, site in ((block.attn_in, "attn_in"), (block.mlp_in, "mlp_in")):
            assert reads == tuple(np.flatnonzero(scores[f"blocks.{i}.{site}"] > tau))
        left = int((scores[f"blocks.{i}.attn"] > tau).sum())
        assert abs(block.dims.heads * block.dims.v_dim - left) <= block.dims.heads / 2
        assert block.dims.qk_dim == 16, "VTP cuts no queries and keys"
    by_macs = budget.fit_plan(
        outline, scores, asks({"macs": 0.5}, scope="threshold", in_channels=True, decouple_qk=True, round=1)
    )
    assert 0.45 < by_macs.cost(outline).macs / outline.cost().macs <= 0.5
    with pytest.raises(Refused, match=r"prune\.keep\.gates"):
        budget.fit_plan(outline, scores, asks({"gates": 0.6}, in_channels=True))


# ----------------------------------------------------------------------------------------------- what is made up for


@pytest.mark.parametrize("kind", ["vit", "layerscale", "registers", "pooled", "distilled"])
@pytest.mark.parametrize("index", [0, 1])
def test_the_mean_of_a_sublayer_that_goes_is_folded_exactly(kind, index):
    """Against the model in which the sublayer gives its mean over tokens and images."""
    model, data = tiny(kind), batches()
    found = measure.measure(model, data, gradients=False, moments="affine").moments
    full = list(Plan.full(model).blocks)
    for gone in (("attn",), ("mlp",), ("attn", "mlp")):
        plan = Plan(tuple(without(one, *gone) if i == index else one for i, one in enumerate(full)))
        small = surgery.cut(model, plan)
        assert compensate.carry_over(small, model, plan, found, "affine") == []
        # What a sublayer gives is read off before anything is changed: that of the MLP with the attention still there.
        means: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, scale, last in (("attn", "ls1", "proj"), ("mlp", "ls2", "fc2")):
                linear = getattr(getattr(model.blocks[index], name), last)
                seen: list[torch.Tensor] = []
                hook = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                for images, _ in data:
                    model(images)
                hook.remove()
                given = getattr(model.blocks[index], scale)(linear(torch.cat(seen)))
                means[name] = given.flatten(0, 1).mean(0)
        constant = copy.deepcopy(model)
        for name in gone:
            scale = "ls1" if name == "attn" else "ls2"
            getattr(constant.blocks[index], scale).forward = lambda x, mean=means[name]: torch.zeros_like(x) + mean
        with torch.no_grad():
            torch.testing.assert_close(small(pictures()), constant(pictures()), rtol=0, atol=1e-4)


def test_a_mean_that_has_no_place_is_said():
    model = tiny("norm_after")
    found = measure.measure(model, batches(), gradients=False, moments="mean").moments
    full = Plan.full(model).blocks
    plan = Plan((full[0], without(full[1], "mlp")))
    notes = compensate.carry_over(surgery.cut(model, plan), model, plan, found, "mean")
    assert notes == ["blocks.1: the mean of its mlp could not be folded anywhere, and is dropped."]


def test_inputs_are_made_up_for_as_least_squares_would():
    """The folded qkv reads five channels and gives what the best affine map from them to the dense qkv's output gives."""
    model, data = tiny(), batches(6)
    found = measure.measure(model, data, gradients=False, moments="affine", in_channels=True).moments
    full = Plan.full(model).blocks
    plan = Plan((dataclasses.replace(full[0], attn_in=IN["attn_in"]), full[1]))
    small: Any = surgery.cut(model, plan)
    compensate.carry_over(small, model, plan, found, "affine")
    seen: list[torch.Tensor] = []
    hook = model.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for images, _ in data:
            model(images)
        hook.remove()
        x = torch.cat(seen).flatten(0, 1).double()
        y = x @ model.blocks[0].attn.qkv.weight.double().T + model.blocks[0].attn.qkv.bias.double()
        kept = torch.cat([x[:, list(IN["attn_in"])], torch.ones(len(x), 1)], dim=1)
        best = torch.linalg.lstsq(kept, y).solution
        mine = small.blocks[0].attn.qkv
        given = kept[:, :-1] @ mine.weight.double().T + mine.bias.double()
        error, least = (given - y).square().mean(), (kept @ best - y).square().mean()
        plain = x[:, list(IN["attn_in"])] @ model.blocks[0].attn.qkv.weight[:, list(IN["attn_in"])].double().T - y
    assert least <= error * (1 + 1e-9) <= least * 1.001
    assert error < 0.95 * plain.square().mean()


# ------------------------------------------------------------------------------------------------ from end to end


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": {"macs": 0.4}, "sublayers": True},
        {"keep": {"macs": 0.11}, "round": 4},
        {"keep": {"macs": 0.4}, "in_channels": True},
        {
            "keep": {"gates": 0.5},
            "scope": "threshold",
            "in_channels": True,
            "decouple_qk": True,
            "rotate": False,
            "round": 1,
        },
        {"keep": {"macs": 0.5}, "in_channels": True, "criterion": "hessian"},
        {"keep": {"macs": 0.5}, "criterion": "cumulative_attention", "scope": "per_type"},
    ],
    ids=str,
)
def test_pruned_saved_and_loaded(tmp_path, settings):
    model = tiny("layerscale", depth=3)
    drawn = pruning.lottery(model, batches(), asks(**settings))
    keep = settings["keep"].get("macs", 1)
    assert drawn.after["macs"] <= keep * drawn.before["macs"]
    assert drawn.after["macs"] == cost.count(drawn.model).macs
    back = spec.load(spec.save(drawn.model, tmp_path / "small"))
    with torch.no_grad():
        assert torch.equal(back(pictures()), drawn.model(pictures()))
    assert drawn.text().count("\n") >= 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"heads": 0, "qk_dim": 0, "v_dim": 0, "hidden": 0}, "nothing is left"),
        ({"heads": 0, "qk_dim": 0, "v_dim": 0, "hidden": 8, "attn_in": [0]}, "cannot have"),
        ({"heads": 1, "qk_dim": 8, "v_dim": 0, "hidden": 8}, "cannot have"),
        ({"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 8, "mlp_in": [3, 3]}, "cannot have"),
        ({"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 8, "mlp_in": [0, 48]}, "cannot have"),
        ({"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 8, "mlp_in": [-1, 4]}, "cannot have"),
        ({"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 8, "mlp_in": []}, "cannot have"),
        ({"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 8, "mlp_in": "abc"}, "damaged"),
        ({"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 8, "mlp_in": [0, 5]}, "does not fit"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(tmp_path, row, message):
    folder = spec.save(tiny(), tmp_path / "a")
    told = json.loads((folder / "spec.json").read_text())
    assert told["format"] == 1, "what an older version can read is written for it"
    (folder / "spec.json").write_text(json.dumps({**told, "format": 2, "blocks": [row] * 2}))
    with pytest.raises(Refused, match=message):
        spec.load(folder)


def test_a_plan_that_contradicts_itself_is_refused():
    full = Plan.full(tiny()).blocks[0]
    with pytest.raises(Refused, match="takes out every block"):
        Plan((without(full, "attn", "mlp"),))
    with pytest.raises(Refused, match=r"sublayer .*is gone"):
        dataclasses.replace(without(full, "attn"), attn_in=(0, 1))
    with pytest.raises(Refused, match="none is kept"):
        dataclasses.replace(full, mlp_in=())
    with pytest.raises(Refused, match="cannot read channel 48"):
        surgery.cut(tiny(), Plan((dataclasses.replace(full, mlp_in=(0, 48)),) * 2))
    with pytest.raises(Refused, match="is post-norm"):
        anatomy.sites(tiny("norm_after"), in_channels=True)
    assert dataclasses.replace(without(full, "mlp"), attn_in=(0, 1)).dims == Dims(3, 16, 16, 0, 2, None)


def test_other_families_keep_their_sublayers_and_their_stream():
    model = tiny("swin")
    for settings in (
        {"sublayers": True},
        {"in_channels": True},
        {"embed_dim": 0.5},
        {"criterion": "cumulative_attention"},
    ):
        with pytest.raises(Refused, match="plain ViTs"):
            pruning.prune(model, batches(1, 4), {"macs": 0.6}, **settings)
    with pytest.raises(Refused, match="out of reach"):
        pruning.prune(model, batches(1, 4), {"macs": 0.01})
