"""Beside the laws, which every kind of tiny_vits goes through: what the families of timm have of their own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from tiny_vits import CLASSES, KINDS, NORMED, UNLIKE, asks, batches, pictures, random_plan, tiny

from lotus import export
from lotus.pruning import Given, compensate, criteria, lottery, measure, prune, spec, surgery
from lotus.pruning.plan import BlockPlan, Plan
from lotus.sparsity import gate_macs
from lotus.vit import anatomy, attention, cost, families, saliency
from lotus.vit import model as door
from selection import methods
from selection.errors import Refused

pytestmark = pytest.mark.slow  # many models: every family by every law

CRITERIA = [
    name for name in methods.names(criteria) if not {"gates", "attention"} & set(methods.reads(getattr(criteria, name)))
]


@pytest.mark.parametrize("kind", UNLIKE)
def test_every_criterion(kind):
    model, data = tiny(kind), batches(1, 4)
    dense = cost.count(model)
    for name in CRITERIA:
        small = prune(model, data, {"macs": 0.6}, criterion=name, round=4)
        assert cost.count(small).macs <= 0.6 * dense.macs
        assert small(pictures(2)).isfinite().all()
    learned = {site: torch.rand(linear.in_features) for site, linear in anatomy.sites(model).items()}
    drawn = lottery(model, data, asks({"macs": 0.6}, criterion="gate", round=4), Given(gates=learned))
    np.testing.assert_allclose(drawn.scores["blocks.1.mlp"], learned["blocks.1.mlp"].double())


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotated_model_computes_what_it_did(kind):
    """No weight of a head is changed where the architecture binds it to its basis, and no output anywhere."""
    from lotus.pruning import rotate

    model = families.opened(tiny(kind, dtype=torch.float64))
    found = rotate.statistics(model, batches(2, dtype=torch.float64))
    turned = rotate.apply(model, rotate.turns(model, found))
    images = pictures(dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(turned(images), model(images), rtol=1e-6, atol=1e-6)
    for before, after in zip(anatomy.blocks(model), anatomy.blocks(turned), strict=True):
        rows = slice(0, 2 * before.heads * before.dims.qk_dim)
        assert torch.equal(before.qkv.weight[rows], after.qkv.weight[rows]) == before.whole_qk


@pytest.mark.parametrize("kind", ["swin", "eva02"])
def test_gradients_are_those_of_each_image_alone(kind):
    """Windows of an image count together, and never those of another."""
    model = families.opened(tiny(kind, dtype=torch.float64))
    (batch,) = batches(1, 3, torch.float64)
    how = {"gradients": True, "moments": "none", "squares": True}
    whole = measure.measure(model, [batch], **how)
    alone = [measure.measure(model, [(batch[0][i : i + 1], batch[1][i : i + 1])], **how) for i in range(3)]
    for site, slopes in whole.gradients.items():
        np.testing.assert_allclose(slopes, np.concatenate([one.gradients[site] for one in alone]), rtol=1e-4, atol=1e-9)
    for name, squares in whole.squares.items():
        np.testing.assert_allclose(squares, sum(one.squares[name] for one in alone) / 3, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", ["eva02", "swiglu", "dinov3"])
def test_a_gated_unit_goes_with_both_of_its_halves(kind):
    model = tiny(kind)
    block = anatomy.blocks(model)[0]
    kept = tuple(range(0, block.hidden, 3))
    full = Plan.full(model)
    one = BlockPlan(**{**vars(full.blocks[0]), "units": kept})
    small = anatomy.blocks(surgery.cut(model, Plan((one, *full.blocks[1:]))))[0]
    for mine, theirs in zip(small.units, block.units, strict=True):
        rows = torch.tensor(kept) if len(block.units) == 2 else torch.tensor([*kept, *(block.hidden + k for k in kept)])
        assert torch.equal(mine.weight, theirs.weight[rows])
    assert torch.equal(small.fc2.weight, block.fc2.weight[:, list(kept)])


def test_a_head_takes_its_relative_positions_along():
    for kind in ("beit", "swin"):
        model = tiny(kind)
        plan = random_plan(model, 4)
        for block, before, keep in zip(
            anatomy.blocks(surgery.cut(model, plan)), anatomy.blocks(model), plan.blocks, strict=True
        ):
            assert before.table is not None
            assert torch.equal(block.table, before.table[:, list(keep.heads)])


@pytest.mark.parametrize(("kind", "named"), [("eva02", "rotary positions"), ("rope_apart", "qk-norm")])
def test_query_and_key_dimensions_stay_where_the_architecture_binds_them(kind, named):
    model = tiny(kind)
    with pytest.raises(Refused, match=rf"blocks\.0: has {named}"):
        surgery.cut(model, random_plan([block.dims for block in anatomy.blocks(model)], 3))
    drawn = lottery(model, batches(1), asks({"macs": 0.5}, decouple_qk=True))
    assert all(now.qk_dim == of.qk_dim for now, of in ((plan.dims, plan.of) for plan in drawn.plan.blocks))
    assert any(f"stay whole where {named}" in note for note in drawn.notes)


@pytest.mark.parametrize("kind", ["eva02_scale", "scale_norms"])
def test_a_norm_before_proj_is_told(kind):
    notes = lottery(tiny(kind), batches(1), asks({"macs": 0.7})).notes
    assert any("by index, not rotated" in note for note in notes)
    assert any("statistics from what stays" in note for note in notes)


@pytest.mark.parametrize("rms", [False, True])
def test_a_cut_norm_is_rescaled_to_what_it_gave(rms):
    """Against the norm of all inputs: after rescaling, the kept outputs are on average what they were."""
    torch.manual_seed(0)
    kind = timm.layers.RmsNorm if rms else timm.layers.LayerNorm
    dense, x = kind(64), torch.randn(4000, 64) * torch.linspace(0.2, 3, 64)
    with torch.no_grad():
        dense.weight.uniform_(0.5, 1.5)
        if not rms:
            dense.bias.normal_()
    moments = compensate.Moments()
    moments.add(dense(x))
    kept = list(range(20))  # the quiet ones: alone they come out far too loud
    small = families.resized(dense, 20)
    for name, weight in dense.named_parameters():
        setattr(small, name, torch.nn.Parameter(weight.detach()[kept]))
    with torch.no_grad():
        want, before = dense(x)[:, kept], small(x[:, kept])
        compensate.rescale(small, dense, kept, moments)
        after = small(x[:, kept])
    assert (after - want).square().mean() < 0.1 * (before - want).square().mean()
    torch.testing.assert_close(after.std(), want.std(), rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", NORMED)
def test_rescaling_brings_what_a_cut_mlp_writes_closer(kind, monkeypatch):
    """By much where the spread of the kept units hardly changes from token to token; where it does (SwiGLU), it costs nothing."""
    model, data, read, errors = tiny(kind), batches(4), [], {}
    with model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: read.append(args[0])), torch.no_grad():
        model(pictures(16))
    for how in ("left", "rescaled"):
        if how == "left":
            monkeypatch.setattr(compensate, "rescale", lambda *_: None)
        small: Any = prune(model, data, {"macs": 0.6}, criterion="variance", round=4)
        with torch.no_grad():
            errors[how] = float((small.blocks[0].mlp(read[0]) - model.blocks[0].mlp(read[0])).square().mean())
        monkeypatch.undo()
    assert errors["rescaled"] < (0.85 if kind == "scale_norms" else 1.03) * errors["left"]


@pytest.mark.parametrize("kind", [*UNLIKE, "swiglu", "scale_norms"])
def test_a_model_made_by_timm_tells_how_to_make_it_again(kind):
    model = tiny(kind)
    told = door.origin(model)
    again = timm.create_model(told["name"], **told["args"]).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(pictures()), model(pictures()))


def test_rotary_angles_that_no_weight_shows_are_compared():
    model = tiny("eva02")
    other = tiny("eva02", ref_feat_shape=(7, 7))
    assert [p.shape for p in model.parameters()] == [p.shape for p in other.parameters()]
    door.remember(other, door.origin(model))
    with pytest.raises(Refused, match="rope"):
        door.origin(other)


@pytest.mark.parametrize("kind", ["eva02", "beit", "swin"])
def test_a_cut_model_trains_is_saved_and_cut_again(kind, tmp_path):
    model = tiny(kind)
    small = prune(model, batches(1), {"macs": 0.6}, round=4).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    torch.nn.functional.cross_entropy(small(pictures()), torch.arange(8) % CLASSES).backward()
    assert all(weight.grad is not None for weight in small.parameters())
    optimizer.step()
    back = spec.load(spec.save(small, tmp_path / "a"))
    assert torch.equal(back(pictures()), small.eval()(pictures()))
    again = prune(back, batches(1), {"macs": 0.7}, round=4)
    assert torch.equal(spec.load(spec.save(again, tmp_path / "b"))(pictures()), again(pictures()))


@pytest.mark.parametrize("kind", ["eva02", "beit", "swin"])
def test_half_precision_is_kept_through_the_disk(kind, tmp_path):
    small = prune(tiny(kind).bfloat16(), batches(1), {"macs": 0.6}, round=4)
    assert {weight.dtype for weight in small.parameters()} == {torch.bfloat16}
    back = spec.load(spec.save(small, tmp_path / "a"))
    assert torch.equal(back(pictures(dtype=torch.bfloat16)), small(pictures(dtype=torch.bfloat16)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_model_compiles_without_breaks(kind):
    torch._dynamo.reset()  # it counts how often a class was compiled in this process, and gives up after eight
    small = prune(tiny(kind), batches(1), {"macs": 0.6}, round=4)
    with torch.no_grad():
        compiled = torch.compile(small, backend="eager", fullgraph=True)(pictures())
        torch.testing.assert_close(compiled, small(pictures()))


@pytest.mark.parametrize("kind", ["eva02", "eva02_norm", "beit", "swin", "swiglu"])
def test_equal_widths_load_with_timm_alone(kind, tmp_path):
    model = tiny(kind)
    plans = []
    for block in Plan.full(model).blocks:
        plans.append(BlockPlan(**{**vars(block), "units": tuple(range(block.of.hidden // 2))}))
    small = surgery.cut(model, Plan(tuple(plans))).eval()
    door.remember(small, door.origin(model))
    sent = export.export(small, tmp_path, onnx=False)
    code = "\n".join(export.lines(sent["timm"], tmp_path))
    space: dict = {}
    exec(code, space)
    assert torch.equal(space["model"].eval()(pictures()), small(pictures()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_computes_the_same(kind, tmp_path):
    pytest.importorskip("onnxruntime")
    model = tiny(kind)
    small = prune(model, batches(2), {"macs": 0.6}, round=4)
    sent = export.export(small, tmp_path, example=pictures(3))
    assert sent["onnx"]["max_abs_diff"] <= 1e-4


def test_patches_are_for_plain_vits():
    with pytest.raises(Refused, match=r"plain ViTs .* not for Eva"):
        saliency.watch(tiny("eva02"), pictures())


def test_split_attention_takes_windows_apart_as_timm_does():
    """A mask of shifted windows and relative positions, fused and not."""
    model = tiny("swin")
    block = anatomy.blocks(model)[1]
    assert any(block.module.shift_size), "the mask is what is tested"
    ours = families.split(block, block.dims)
    ours.load_state_dict(block.attn.state_dict(), assign=True)
    x, mask = torch.randn(2 * len(block.module.attn_mask), 49, 24), block.module.attn_mask
    for fused in (True, False):
        ours.fused_attn = block.attn.fused_attn = fused
        torch.testing.assert_close(ours(x, mask=mask), block.attn(x, mask=mask))
    assert type(ours) is attention.SplitAttention


def test_weights_of_older_timm_may_hold_tables(tmp_path):
    """relative_position_index used to lie in the file."""
    model = tiny("swin")
    state = {**model.state_dict(), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "old.pth")
    told = copy.deepcopy(door.origin(model)["args"])
    told.pop("num_classes")
    again, about = door.adopt("swin_tiny_patch4_window7_224", told, str(tmp_path / "old.pth"))
    assert torch.equal(again(pictures()), model(pictures()))
    assert about["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("kind", ["eva02", "swiglu", "swin"])
def test_a_gate_is_worth_the_macs_that_go_with_it(kind):
    model = tiny(kind)
    outline, sites = cost.outline(model), anatomy.sites(model)
    widths = [one.in_features for one in sites.values()]
    costs = gate_macs.Macs(model, sites, widths, torch.device("cpu")).costs
    assert costs is not None
    shares = dict(zip(sites, costs.split(widths), strict=True))
    for index, of in enumerate(outline.dims):
        whole = outline.block(index, of).macs
        unit = whole - outline.block(index, of._replace(hidden=of.hidden - 1)).macs
        head = whole - outline.block(index, of._replace(heads=of.heads - 1)).macs
        assert shares[f"blocks.{index}.mlp"][0] == pytest.approx(unit / outline.cost().macs)
        assert shares[f"blocks.{index}.attn"][0] == pytest.approx(head / of.v_dim / outline.cost().macs)


@pytest.mark.parametrize("kind", ["swin", "eva02"])
def test_activation_checkpointing_is_put_back(kind):
    model = tiny(kind).train()
    model.set_grad_checkpointing(True)
    lottery(model, batches(1), asks({"macs": 0.6}, round=4))
    switches = [module for module in model.modules() if hasattr(module, "grad_checkpointing")]
    assert any(module.grad_checkpointing for module in switches)
    assert model.training
