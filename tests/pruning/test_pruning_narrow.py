"""Fewer channels in the stream: nothing is lost before the cut, and the cut is the best that an orthogonal basis has."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny_vits import KINDS, batches, pictures, random_plan, tiny
from torch import nn

from lotus import pruning
from lotus.export import export
from lotus.pruning import narrow, spec, surgery
from lotus.vit import anatomy, cost
from lotus.vit import model as door
from selection.errors import Refused

pytestmark = pytest.mark.slow  # many models: every family by every law

WHY_NOT = {
    "scale_norms": "norms what proj",
    "attention_pooled": "pools by attention",
    "norm_after": "norms what its",
    "qk_norm": "norms queries",
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if anatomy.is_vit(tiny(kind))])
def test_nothing_is_lost_until_the_stream_is_cut(kind):
    """All channels; and one less, since a mean-free stream has one to spare. Random norms, LayerScale, biases or none."""
    model = tiny(kind)
    if kind in WHY_NOT:
        with pytest.raises(Refused, match=WHY_NOT[kind]):
            narrow.statistics(model, batches())
        return
    found = narrow.statistics(model, batches())
    images = pictures(seed=5)
    for width in (48, 47):
        small = narrow.narrow(model, found, width)
        with torch.no_grad():
            torch.testing.assert_close(small(images), model(images), rtol=0, atol=1e-4)
    assert small.embed_dim == 47
    assert {type(norm).__name__ for name, norm in small.named_modules() if name.endswith(("norm1", "norm2"))} == {
        "RmsNorm"
    }
    assert not any(module._forward_pre_hooks for module in model.modules())


def shaped(spread: torch.Tensor, **args) -> nn.Module:
    """A model whose writers reach the directions of a random basis by as much as ``spread`` says, (48,)."""
    model = tiny(**args)
    basis = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).Q
    onto = basis @ torch.diag(spread) @ basis.T
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.copy_(onto @ linear.weight)
                linear.bias.copy_(onto @ linear.bias)
        embed = model.patch_embed.proj
        embed.weight.copy_((onto @ embed.weight.flatten(1)).reshape(embed.weight.shape))
        embed.bias.copy_(onto @ embed.bias)
        for token in (model.cls_token, model.pos_embed):
            token.copy_(token @ onto)
    return model


def test_a_stream_of_low_rank_is_cut_to_it_without_loss():
    """Writers that reach 20 directions only: 20 channels are enough, whatever they are."""
    model = shaped((torch.arange(48) < 20).float())
    small = narrow.narrow(model, narrow.statistics(model, batches()), 20)
    with torch.no_grad():
        torch.testing.assert_close(small(pictures()), model(pictures()), rtol=0, atol=1e-4)


def test_the_leading_axes_keep_more_than_others_and_compensation_helps():
    model, data = shaped(0.93 ** torch.arange(48), depth=3), batches(6)
    found = narrow.statistics(model, data)
    held = [(pictures(32, 99), None)]
    apart = {
        how: narrow.apart(model, narrow.narrow(model, found, 32, compensate=how), [images for images, _ in held])
        for how in ("none", "affine")
    }
    turned = {}
    for seed in range(3):
        basis = torch.linalg.qr(
            torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ).Q
        fake = narrow.Statistics(found.images, {site: Turned(basis) for site in found.moments})
        turned[seed] = narrow.apart(model, narrow.narrow(model, fake, 32, compensate="none"), [held[0][0]])
    assert apart["none"] < min(turned.values())
    assert apart["affine"] < apart["none"]


class Turned:
    """Statistics by which the leading axes are those of a random basis."""

    def __init__(self, basis: torch.Tensor) -> None:
        self.mean = torch.zeros(48, dtype=torch.float64)
        self.covariance = basis @ torch.diag(torch.arange(48, 0, -1, dtype=torch.float64)) @ basis.T


def test_saved_exported_cut_again_and_trained(tmp_path):
    model = tiny("layerscale")
    first = surgery.cut(model, random_plan(model, 3))  # heads and units of any width
    door.remember(first, door.origin(model))
    small = narrow.narrow(first, narrow.statistics(first, batches()), 24)
    assert [block.dims for block in anatomy.blocks(small)] == [block.dims for block in anatomy.blocks(first)]
    again = surgery.cut(small, random_plan(small, 4))
    door.remember(again, door.origin(small))
    for one in (small, again):
        back = spec.load(spec.save(one.eval(), tmp_path / "a"))
        with torch.no_grad():
            assert torch.equal(back(pictures()), one(pictures()))
        assert cost.count(one).params == sum(weight.numel() for weight in one.parameters())
    if importlib.util.find_spec("onnxruntime") is not None:
        assert export(small, tmp_path / "export")["onnx"]["max_abs_diff"] < 1e-4
    again.train()(pictures()).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in again.parameters())


def test_a_width_joins_a_budget_and_the_search_takes_what_agrees_best():
    model = tiny(depth=3)
    drawn = pruning.lottery(model, batches(), {"macs": 0.4}, width=0.75)
    assert cost.outline(drawn.model).width == 40, "36 is rounded to a multiple of 8"
    assert drawn.before["macs"] == cost.count(model).macs
    assert 0.3 < drawn.after["macs"] / drawn.before["macs"] <= 0.4
    assert drawn.after["macs"] == cost.count(drawn.model).macs
    assert drawn.notes[0] == "Of the stream's 48 channels 40 stay, turned."
    found = pruning.lottery(model, batches(), {"macs": 0.4}, width="search")
    each = {part: pruning.lottery(model, batches(), {"macs": 0.4}, width=part) for part in narrow.GRID}
    apart = {part: narrow.apart(model, one.model, batches()) for part, one in each.items()}
    best = min(apart, key=lambda part: apart[part])
    assert cost.outline(found.model).width == cost.outline(each[best].model).width
    assert any(note.startswith("Widths tried") for note in found.notes)
    assert found.forwards > 4 * drawn.forwards
    plain = pruning.lottery(model, batches(), {"macs": 1}, width=1.0).model
    with torch.no_grad():
        assert torch.equal(plain(pictures()), model(pictures())), "nothing is turned where all stays"


def test_a_stream_that_misses_the_budget_from_below_is_refused_and_not_searched():
    model, data = tiny(depth=3), batches(1)
    with pytest.raises(Refused, match=r"prune\.width: 8 of 48 channels leave 0\.\d+ of macs .* Take a larger width"):
        pruning.prune(model, data, {"macs": 0.8}, width=0.2)
    found = pruning.lottery(model, data, {"macs": 0.8}, width="search")
    (told,) = [note for note in found.notes if note.startswith("Widths tried")]
    assert "48: " in told
    assert "24: " not in told
    assert narrow.useful(model, (0.2,), {"macs": 1.0}, 8) == [8], "nothing is asked but the width"


@pytest.mark.parametrize("width", [0, 1.5, True, "wide", -1])
def test_what_is_no_width_is_refused(width):
    with pytest.raises(Refused, match=r"prune\.width"):
        pruning.prune(tiny(), batches(), {"macs": 0.5}, width=width)
