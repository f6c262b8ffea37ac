"""Fewer channels in the stream: nothing is lost before the cut, and the cut is the best that an orthogonal basis has."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import timm
import torch
from tiny_vits import KINDS, asks, batches, pictures, random_plan, tiny
from torch import nn

from lotus import pruning
from lotus.export import export
from lotus.pruning import measure, narrow, spec, surgery
from lotus.vit import anatomy, cost
from lotus.vit import model as door
from selection.errors import Refused

pytestmark = pytest.mark.slow  # many models: every family by every law

WHY_NOT = {
    "scale_norms": "scale norm",
    "attention_pooled": "pools by attention",
    "norm_after": "is post-norm",
    "qk_norm": "norms queries",
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if anatomy.is_vit(tiny(kind))])
def test_nothing_is_lost_until_the_stream_is_cut(kind):
    """Random norms, LayerScale, biases or none; the stream stays without a mean, and timm's LayerNorm is the norm."""
    model = tiny(kind)
    if kind in WHY_NOT:
        with pytest.raises(Refused, match=WHY_NOT[kind]):
            narrow.statistics(model, batches())
        return
    found = narrow.statistics(model, batches())
    images = pictures(seed=5)
    small = narrow.narrow(model, found, 48)
    means = []
    for block in small.blocks:
        block.register_forward_pre_hook(lambda _, args: means.append(float(args[0].mean(dim=-1).abs().max())))
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=0, atol=1e-4)
    assert max(means) < 1e-5
    assert {type(norm) for name, norm in small.named_modules() if name.endswith(("norm1", "norm2"))} <= {
        nn.LayerNorm,
        timm.layers.LayerNorm,
    }
    assert not any(module._forward_pre_hooks for module in model.modules())


def shaped(spread: torch.Tensor, **args) -> Any:
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
    """Writers that reach 20 directions only: 21 channels, whose sum is 0, are enough, whatever they are; 20 are not."""
    model = shaped((torch.arange(48) < 20).float())
    found = narrow.statistics(model, batches())
    with torch.no_grad():
        dense, enough, few = (one(pictures()) for one in (model, *(narrow.narrow(model, found, n) for n in (21, 20))))
    torch.testing.assert_close(enough, dense, rtol=0, atol=1e-4)
    assert (few - dense).abs().max() > 1e-3


def test_the_leading_axes_keep_more_than_others_and_compensation_helps():
    model, data = shaped(0.93 ** torch.arange(48), depth=3), batches(6)
    found = narrow.statistics(model, data)
    held = [(pictures(32, 99), None)]
    apart = {
        how: narrow.apart(model, narrow.narrow(model, found, 32, compensate=how), [images for images, _ in held])[0]
        for how in ("none", "affine")
    }
    turned = {}
    for seed in range(3):
        basis = torch.linalg.qr(
            torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ).Q
        moments: dict[str, Any] = {site: Turned(basis) for site in found.moments}
        fake = narrow.Statistics(found.images, moments)
        turned[seed] = narrow.apart(model, narrow.narrow(model, fake, 32, compensate="none"), [held[0][0]])[0]
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
    drawn = pruning.lottery(model, batches(), asks({"macs": 0.4}, embed_dim=0.75))
    assert cost.outline(drawn.model).width == 40, "36 is rounded to a multiple of 8"
    assert drawn.before["macs"] == cost.count(model).macs
    assert 0.3 < drawn.after["macs"] / drawn.before["macs"] <= 0.4
    assert drawn.after["macs"] == cost.count(drawn.model).macs
    assert drawn.notes[0] == "Of the residual stream's 48 channels 40 stay, turned."
    found = pruning.lottery(model, batches(), asks({"macs": 0.4}, embed_dim="search"))
    each = {part: pruning.lottery(model, batches(), asks({"macs": 0.4}, embed_dim=part)) for part in narrow.GRID}
    apart = {part: narrow.apart(model, one.model, batches())[0] for part, one in each.items()}
    best = min(apart, key=lambda part: apart[part])
    assert cost.outline(found.model).width == cost.outline(each[best].model).width
    assert any(note.startswith("Embedding dimensions tried") for note in found.notes)
    assert found.forwards > 4 * drawn.forwards
    plain = pruning.lottery(model, batches(), asks({"macs": 1}, embed_dim=1.0)).model
    with torch.no_grad():
        assert torch.equal(plain(pictures()), model(pictures())), "nothing is turned where all stays"


def test_a_stream_that_misses_the_budget_from_below_is_refused_and_not_searched():
    model, data = tiny(depth=3), batches(1)
    with pytest.raises(Refused, match=r"prune\.embed_dim: 8 of 48 .*larger width"):
        pruning.prune(model, data, {"macs": 0.8}, embed_dim=0.2)
    found = pruning.lottery(model, data, asks({"macs": 0.8}, embed_dim="search"))
    (told,) = [note for note in found.notes if note.startswith("Embedding dimensions tried")]
    assert "48: " in told
    assert "24: " not in told
    assert narrow.useful(model, (0.2,), asks({"macs": 1.0})) == [8], "nothing is asked but the width"


@pytest.mark.parametrize("width", [0, 1.5, True, "wide", -1])
def test_what_is_no_width_is_refused(width):
    with pytest.raises(Refused, match=r"prune\.embed_dim"):
        pruning.prune(tiny(), batches(), {"macs": 0.5}, embed_dim=width)


def told_widths(drawn: pruning.Pruned) -> list[int]:
    """The widths that were tried, as the note lists them; empty where only one was."""
    found = [note for note in drawn.notes if note.startswith("Embedding dimensions tried")]
    return [int(pair.split(":")[0]) for pair in found[0].split("): ")[1].split(", ")] if found else []


def test_auto_looks_at_narrower_streams_only_where_units_alone_lead_too_far(monkeypatch):
    """And stops where a narrower one agrees less, with the best of those that it saw."""
    monkeypatch.setattr(measure, "FEWEST", 24)
    model, data = shaped(0.8 ** torch.arange(48), depth=3), batches()
    near = pruning.lottery(model, data, asks({"macs": 0.9}))
    assert cost.outline(near.model).width == 48
    assert told_widths(near) == []
    monkeypatch.setattr(narrow, "CLOSE", 0.0)
    found = pruning.lottery(model, data, asks({"macs": 0.35}))
    seen = told_widths(found)
    assert seen == [48, 40, 32, 24, 16][: len(seen)]
    assert len(seen) > 1
    # All channels by all images, fewer by every eighth; each judged by another eighth.
    some, others = ([tuple(part[at::8] for part in batch) for batch in data] for at in (0, 7))
    trials = {48: pruning.lottery(model, data, asks({"macs": 0.35}, embed_dim=None))}
    trials |= {width: pruning.lottery(model, some, asks({"macs": 0.35}, embed_dim=width / 48)) for width in seen[1:]}
    apart = [narrow.apart(model, trials[width].model, others)[0] for width in seen]
    nearest = [one for one in apart if one == min(apart)]
    assert apart[:-1] == sorted(apart[:-1], reverse=True), "else it had ended before"
    ended = apart[-1] > apart[-2]
    assert ended or seen[-1] == 16
    assert len(nearest) == 1
    best = seen[-2] if ended else seen[-1]
    whole = {
        width: pruning.lottery(model, data, asks({"macs": 0.35}, embed_dim=width / 48)).model for width in {48, best}
    }
    judged = {width: narrow.apart(model, one, others)[0] for width, one in whole.items()}
    assert cost.outline(found.model).width == min(judged, key=lambda width: judged[width])
    assert found.forwards > near.forwards


@pytest.mark.parametrize("images", [1, 7, 20])
@pytest.mark.parametrize("settings", [{}, {"criterion": "magnitude", "rotate": False, "compensate": "none"}])
def test_few_images_try_every_width_all_together(monkeypatch, images, settings):
    """One in eight of them would say nothing, or be too few for a smaller embedding dimension to show what it can do."""
    monkeypatch.setattr(narrow, "CLOSE", 0.0)
    model, data = shaped(0.8 ** torch.arange(48)), [(pictures(images), torch.arange(images) % 5)]
    found = pruning.lottery(model, iter(data), asks({"macs": 0.35}, **settings))
    seen = told_widths(found)
    assert len(seen) > 1
    each = [
        pruning.lottery(model, data, asks({"macs": 0.35}, embed_dim=width / 48, **settings)).model for width in seen
    ]
    apart = [narrow.apart(model, one, data)[0] for one in each]
    assert min(apart) > 0
    assert cost.outline(found.model).width == seen[apart.index(min(apart))]


def test_out_of_reach_of_all_channels_few_images_still_judge():
    """The nearest of those that meet it, not the narrowest."""
    model, data = shaped(0.8 ** torch.arange(48)), [(pictures(5), torch.arange(5))]
    found = pruning.lottery(model, data, asks({"macs": 0.125}, sublayers=False))
    seen = told_widths(found)
    assert len(seen) > 1
    assert 48 not in seen
    each = [
        pruning.lottery(model, data, asks({"macs": 0.125}, sublayers=False, embed_dim=width / 48)).model
        for width in seen
    ]
    apart = [narrow.apart(model, one, data)[0] for one in each]
    assert cost.outline(found.model).width == seen[apart.index(min(apart))]


@pytest.mark.parametrize(
    "settings", [{"in_channels": True}, {"sublayers": True}, {"embed_dim": None}, {"embed_dim": 1}]
)
def test_auto_keeps_all_channels_where_there_is_no_choice(monkeypatch, settings):
    monkeypatch.setattr(narrow, "CLOSE", 0.0)
    drawn = pruning.lottery(tiny(depth=3), batches(), asks({"macs": 0.4}, **settings))
    assert cost.outline(drawn.model).width == 48
    assert told_widths(drawn) == []


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_what_the_model_allows(monkeypatch, kind):
    """Every family: what cannot be turned keeps its stream and is not refused."""
    monkeypatch.setattr(narrow, "CLOSE", 0.0)
    model = tiny(kind)
    drawn = pruning.lottery(model, batches(), asks({"macs": 0.6}))
    assert drawn.after["macs"] <= 0.6 * drawn.before["macs"]
    turns = anatomy.is_vit(model) and kind not in WHY_NOT
    assert bool(told_widths(drawn)) == turns
