"""Fewer tokens: against masks, explicit attention matrices and loops over single tokens; and what torch counts."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from few import few
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pruning"))
from tiny_vits import PLAIN, SMALL, pictures, random_plan, tiny

from lotus.config import Patches, Sparsity
from lotus.pruning import surgery
from lotus.sparsity.gates import Gates
from lotus.vit import anatomy, cost, token_ops, token_plan
from lotus.vit.attention import SplitAttention
from lotus.vit.tokens import Tokens
from lotus.vit.unmade import without_memory
from selection.errors import Refused

MODES = [
    {"mode": "input", "keep": 0.6},
    {"mode": "dropout", "keep": 0.6},
    {"mode": "evit", "keep": 0.6, "fuse": True},
    {"mode": "evit", "keep": 0.6, "fuse": False, "at": (1,)},
    {"mode": "tome", "keep": 0.75},
    {"mode": "cumulative", "keep": 0.5},
]
MODE_NAMES = ["input", "dropout", "evit", "evit drops", "tome", "cumulative"]


def settings(**changed) -> Patches:
    return Patches.model_validate({"evaluate": "dense" if changed.get("mode") == "dropout" else "sparse", **changed})


def split(seed: int = 3) -> Any:
    """A cut model with SplitAttention in it."""
    model = tiny()
    small = surgery.cut(model, random_plan(model, seed, decouple_qk=True))
    assert any(isinstance(block.attn, SplitAttention) for block in small.blocks)
    return small


def every(kind: str) -> Any:
    return split() if kind == "split" else tiny(kind)


ALL = [*PLAIN, "split"]
POOLED = ["pooled", "attention_pooled", "norm_after"]


def in_double(model: nn.Module) -> Any:
    """Explicit attention in float64, so that a near tie between two scores falls the same way everywhere."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False
    return model.double()


# ----------------------------------------------------------------------------- positions that are told in every block


def masked_whole(model: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """The oracle: all tokens go through all blocks, one image at a time, and nobody attends to those that left; explicit
    softmax, and the mean over what stayed."""
    prefix, outs = model.num_prefix_tokens, []
    for image, keep in zip(x, rows, strict=True):
        count = model.patch_embed.num_patches
        seen = torch.zeros(prefix + count, dtype=torch.bool)
        seen[:prefix] = True
        seen[prefix + keep] = True

        def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, seen=seen):
            logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            logits = logits if attn_mask is None else logits + attn_mask
            return logits.masked_fill(~seen, -math.inf).softmax(-1) @ v

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
            features = model.forward_features(image[None])
        outs.append(model.forward_head(features[:, seen]))
    return torch.cat(outs)


TURNED = ["eva", "eva02", "eva02_scale", "eva02_after", "rope", "rope_apart", "dinov3", "perception", "beit", "beitv2"]


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("kind", TURNED)
def test_angles_and_biases_go_with_the_patches_that_stay(kind: str, cut: bool) -> None:
    model = tiny(kind, dtype=torch.float64)
    for block in anatomy.blocks(model):
        block.attn.fused_attn = True
    if cut:
        model = surgery.cut(model, random_plan(model, 5)).eval()
    x = pictures(3, dtype=torch.float64)
    whole = model(x)
    scores = torch.rand(3, model.patch_embed.num_patches, generator=torch.Generator().manual_seed(4))
    with Tokens(model, settings(mode="input", keep=0.4)) as fewer, torch.no_grad():
        fewer.choose(scores)
        short = model(x)
    rows = token_ops.top(scores, token_plan.kept(model.patch_embed.num_patches, 0.4))
    with torch.no_grad():
        torch.testing.assert_close(short, masked_whole(model, x, rows))
    assert not torch.allclose(short, whole)
    torch.testing.assert_close(model(x), whole, rtol=0, atol=0)  # all of it is off again


@pytest.mark.parametrize("kind", ["dinov3", "beit"])
def test_rotary_and_relative_models_train_on_fewer_patches(kind: str) -> None:
    model = tiny(kind).train()
    model.set_grad_checkpointing(True)
    with Tokens(model, settings(mode="dropout", keep=0.5)) as fewer:
        torch.nn.functional.cross_entropy(model(pictures(4)), torch.tensor([0, 1, 2, 3])).backward()
        assert fewer.share() == 0.5
    assert all(weight.grad is not None for weight in anatomy.blocks(model)[0].attn.parameters())


@pytest.mark.parametrize(("kind", "mode"), [("dinov3", "evit"), ("beit", "tome"), ("swin", "input")])
def test_other_modes_and_windows_are_refused_by_name(kind: str, mode: str) -> None:
    with pytest.raises(Refused, match=r"train\.patches"):
        Tokens(tiny(kind), settings(mode=mode, keep=0.75))


# ------------------------------------------------------------------------------------------------------ from the input


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in POOLED])
def test_a_patch_that_does_not_enter_is_a_patch_that_nobody_attends_to(kind):
    model, x = every(kind), pictures(4)
    scores = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    rows = scores.argsort(1, descending=True)[:, :10]
    prefix = model.num_prefix_tokens
    mask = torch.full((4, 1, 1, prefix + 16), -torch.inf)
    mask[..., :prefix] = 0
    for image in range(4):
        mask[image, ..., prefix + rows[image]] = 0
    expected = model.forward_head(model.forward_features(x, attn_mask=mask))
    with Tokens(model, settings(mode="input", keep=0.6)) as reduced:
        reduced.choose(scores)
        torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", POOLED)
def test_pooling_reads_the_patches_that_entered(kind):
    model, x = tiny(kind), pictures(3)
    rows = torch.tensor([[0, 3, 5, 9], [1, 2, 3, 4], [0, 7, 14, 15]])
    embedded = model._pos_embed(model.patch_embed(x))
    expected = []
    for image in range(3):
        one = model.norm(model.blocks(model.norm_pre(embedded[image : image + 1, rows[image]])))
        expected.append(model.forward_head(one))
    with Tokens(model, settings(mode="input", keep=0.25)) as reduced:
        reduced.choose(torch.zeros(3, 16).scatter(1, rows, 1.0))
        torch.testing.assert_close(model(x), torch.cat(expected))


def test_what_is_not_chosen_is_refused_and_a_choice_serves_once():
    model, x = tiny(), pictures(2)
    with Tokens(model, settings(mode="input", keep=0.5)) as reduced:
        reduced.choose(torch.rand(2, 16))
        model(x)
        with pytest.raises(RuntimeError, match="choose"):
            model(x)


def test_scores_are_asked_of_the_images_themselves():
    model, x = tiny(), pictures(2)
    seen = []

    def score(images: Tensor, patch: tuple[int, int]) -> Tensor:
        seen.append((images, patch))
        return torch.arange(16.0).expand(len(images), -1)

    with Tokens(model, settings(mode="input", keep=0.5), score) as reduced:
        ours = model(x)
        assert seen[0][0] is x
        assert seen[0][1] == (8, 8)
        reduced.choose(torch.arange(16.0).expand(2, -1))
        assert torch.equal(model(x), ours)
        assert len(seen) == 1, "a choice that is given is not asked for"


@pytest.mark.parametrize("training", [True, False])
def test_among_equals_chance_takes_any_patch_alike(training):
    """A black border all round a digit: what the digit leaves room for comes from all of it; and as often as it is asked,
    a model that is measured takes the same."""
    model, x = tiny().train(training), pictures(400)
    taken = []
    digit = [5, 6, 9, 10]

    def enters(module: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
        prefix, patches = embedded[:, :-16], embedded[:, -16:]
        marked = torch.arange(16.0)[None, :, None].expand_as(patches)
        return torch.cat([prefix, marked], 1)

    handle = model.patch_drop.register_forward_hook(enters)  # before the patches leave: each says its place

    def score(images: Tensor, patch: tuple[int, int]) -> Tensor:
        return torch.zeros(len(images), 16).index_fill_(1, torch.tensor(digit), 1.0)

    with Tokens(model, settings(mode="input", keep=0.5), score):
        model.norm_pre.register_forward_hook(lambda module, inputs, out: taken.append(inputs[0][:, -8:, 0].long()))
        torch.manual_seed(0)
        model(x)
        model(x)
    handle.remove()
    assert torch.equal(taken[0], taken[1]) != training
    counted = torch.bincount(taken[0].flatten(), minlength=16).double()
    assert (counted[digit] == 400).all()
    border = counted[[place for place in range(16) if place not in digit]]
    assert (border - 400 / 3).abs().max() < 5 * (400 * (1 / 3) * (2 / 3)) ** 0.5  # five standard errors


def test_dropout_takes_any_patch_alike_and_only_in_training():
    model, x = tiny().train(), pictures(4)
    dense = tiny()(x)
    counted = torch.zeros(16)
    with Tokens(model, settings(mode="dropout", keep=0.5)):
        handle = model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].shape[1]))
        seen: list[int] = []
        assert torch.equal(model.eval()(x), dense)
        model.train()(x)
        assert seen == [17, 9]
        handle.remove()
        torch.manual_seed(0)
        place = model.patch_drop.register_forward_hook(lambda module, inputs, out: found.append((inputs[0], out)))
        found: list = []
        for _ in range(100):
            model(x)
        place.remove()
    for before, after in found:
        same = (before[:, 1:, None] == after[:, None, 1:]).all(-1).any(-1)  # (B, 16)
        assert (same.sum(1) == 8).all()
        counted += same.sum(0)
    # 400 draws of 8 of 16: a patch is drawn 200 times, give or take 10.
    assert (counted - 200).abs().max() < 45


# ----------------------------------------------------------------------------------------------------------------- EViT


def slow_evit(model, x: Tensor, keep: float, at: tuple[int, ...], fuse: bool) -> Tensor:
    """EViT an image at a time, with whole attention matrices."""
    outs = []
    for image in x.split(1):
        h = model.norm_pre(model._pos_embed(model.patch_embed(image)))[0]  # (N, D)
        prefix = model.num_prefix_tokens
        for number, block in enumerate(anatomy.blocks(model)):
            module, attn = block.module, block.attn
            after = type(module).__name__ == "ResPostBlock"
            dims = block.dims
            read = h if after else module.norm1(h)
            qkv = attn.qkv(read)
            cuts = dims.heads * dims.qk_dim, dims.heads * dims.qk_dim, dims.heads * dims.v_dim
            q, k, v = (part.reshape(len(h), dims.heads, -1) for part in qkv.split(cuts, 1))
            q, k = attn.q_norm(q), attn.k_norm(k)
            heads, rows = [], []
            for head in range(dims.heads):
                matrix = (q[:, head] @ k[:, head].T / math.sqrt(dims.qk_dim)).softmax(1)
                heads.append(matrix @ v[:, head])
                if model.cls_token is not None:
                    rows.append(matrix[0])
                else:
                    rows.append((q[prefix:, head].mean(0) @ k[:, head].T / math.sqrt(dims.qk_dim)).softmax(0))
            out = attn.proj(torch.cat(heads, 1))
            h = h + (module.norm1(out) if after else module.ls1(out))
            n = len(h) - prefix
            k_left = math.ceil(keep * n)
            if number in at and k_left + fuse < n:
                row = torch.stack(rows).mean(0)[prefix:]
                order = row.argsort(descending=True).tolist()
                stays = sorted(order[:k_left])
                parts = [h[:prefix], h[[prefix + j for j in stays]]]
                if fuse:
                    parts.append(sum(row[j] * h[prefix + j] for j in order[k_left:])[None])
                h = torch.cat(parts)
            out = module.mlp(h if after else module.norm2(h))
            h = h + (module.norm2(out) if after else module.ls2(out))
        outs.append(model.forward_head(model.norm(h[None])))
    return torch.cat(outs)


EVIT = [(kind, fuse, at) for kind in ALL for fuse, at in ((True, (0, 1)), (False, (0, 1)), (True, (1,)), (False, (0,)))]


@pytest.mark.parametrize(
    ("kind", "fuse", "at"), few(EVIT, lambda one: one[0] in ("vit", "split") or one[1:] == (True, (0, 1)))
)
def test_evit_is_what_single_tokens_and_whole_matrices_give(kind, fuse, at):
    model, x = every(kind).double(), pictures(3, dtype=torch.float64)
    with Tokens(model, settings(mode="evit", keep=0.6, fuse=fuse, at=at)):
        torch.testing.assert_close(model(x), slow_evit(model, x, 0.6, at, fuse))


def test_gradients_reach_the_attention_through_the_fused_token():
    model, x = tiny().double(), pictures(2, dtype=torch.float64)
    found = []
    for forward in (lambda: model(x), lambda: slow_evit(model, x, 0.6, (0, 1), True)):
        model.zero_grad()
        with Tokens(model, settings(mode="evit", keep=0.6)):
            forward().square().sum().backward()
        found.append([weight.grad.clone() for weight in model.parameters()])
    # The oracle calls the parts of the model, not its blocks: Tokens changes nothing there.
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


# ----------------------------------------------------------------------------------------------------------------- ToMe


def slow_merge(x, sizes, keys, count):
    """One image's bipartite matching and merging in plain loops: (n, D), (n,), (n, Q)."""
    sources, targets = list(range(1, len(x), 2)), list(range(0, len(x), 2))
    edges = []
    for s in sources:
        likeness = [float(torch.cosine_similarity(keys[s], keys[t], dim=0)) for t in targets]
        edges.append((max(likeness), s, targets[likeness.index(max(likeness))]))
    edges.sort(key=lambda edge: -edge[0])
    groups = {t: [t] for t in targets}
    for _, s, t in edges[:count]:
        groups[t].append(s)
    alone = sorted(s for _, s, _ in edges[count:])
    out = [x[s] for s in alone]
    mass = [sizes[s] for s in alone]
    for t in targets:
        total = sum(sizes[j] for j in groups[t])
        out.append(sum(sizes[j] * x[j] for j in groups[t]) / total)
        mass.append(total)
    return torch.stack(out), torch.stack(mass)


@pytest.mark.parametrize(("n", "count"), [(16, 5), (17, 8), (9, 1), (2, 1), (5, 0)])
def test_merging_is_what_plain_loops_give(n, count):
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(3, 2 + n, 6, generator=draw, dtype=torch.float64)
    keys = torch.randn(3, n, 4, generator=draw, dtype=torch.float64)
    sizes = torch.randint(1, 5, (3, n), generator=draw).double()
    ours, mass = token_ops.merge(x, sizes, token_ops.match(keys, count), 2)
    assert torch.equal(ours[:, :2], x[:, :2]), "the prefix stays"
    assert ours.shape == (3, 2 + n - count, 6)
    for image in range(3):
        patches, weights = slow_merge(x[image, 2:], sizes[image], keys[image], count)
        torch.testing.assert_close(ours[image, 2:], patches)
        torch.testing.assert_close(mass[image], weights)
    torch.testing.assert_close(mass.sum(1), sizes.sum(1))
    torch.testing.assert_close((ours[:, 2:] * mass[..., None]).sum(1), (x[:, 2:] * sizes[..., None]).sum(1))


TWINS = [(kind, fused) for kind in ALL if kind != "attention_pooled" for fused in (True, False)]


@pytest.mark.parametrize(("kind", "fused"), few(TWINS, lambda one: one[0] in ("vit", "split") or one[1]))
def test_merging_twins_changes_nothing(kind, fused):
    """Proportional attention and weighted pooling: ten equal tokens are worth as much as one of size ten."""
    model = every(kind).double()
    if not fused:
        in_double(model)
    with torch.no_grad():
        model.pos_embed.zero_()
    two = pictures(2, dtype=torch.float64)[:, :, :8, :8]  # two kinds of patches, 11 of one and 5 of the other
    kinds = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0]).view(4, 4)
    x = two[kinds].permute(2, 0, 3, 1, 4).reshape(1, 3, 32, 32)
    dense = model(x)
    with Tokens(model, settings(mode="tome", keep=0.5 + 3 / 32)) as reduced:
        before, after = reduced.passed().patches[0]
        assert before == 16
        assert after <= 11
        torch.testing.assert_close(model(x), dense)


def test_a_merged_token_weighs_by_its_size_in_the_next_block():
    model, x = tiny().double(), pictures(2, dtype=torch.float64)
    masks: list = []
    with Tokens(model, settings(mode="tome", keep=0.75)) as reduced:
        model.blocks[1].attn.register_forward_pre_hook(
            lambda attn, inputs, named: masks.append(named["attn_mask"]), with_kwargs=True
        )
        model(x)
        merges = reduced.passed().merges
    sizes = masks[0][:, 0, 0].exp()
    assert sizes.shape == (2, 1 + 16 - merges)
    torch.testing.assert_close(sizes.sum(1), torch.full((2,), 17.0, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------- budgets and schedules


@pytest.mark.parametrize(
    ("depth", "keep"), [(2, 0.6), (2, 0.97), (4, 0.5), (4, 0.7), (12, 0.3), (12, 0.5), (12, 0.7), (12, 0.9)]
)
def test_merging_ends_within_one_pair_below_its_keep(depth, keep):
    found = token_plan.passed(196, depth, settings(mode="tome", keep=keep), keep)
    mean = sum(after for _, after in found.patches) / (196 * depth)
    assert mean <= keep
    assert mean > keep - (depth + 1) / 2 / 196 - 1e-9
    assert all(after >= before - before // 2 for before, after in found.patches)


def test_what_merging_cannot_reach_is_refused():
    with pytest.raises(Refused, match=r"patches\.keep: 0\.3 .*0\.375"):
        Tokens(tiny(), settings(mode="tome", keep=0.3))


def test_evit_of_the_paper():
    """DeiT-S, keep 0.7, fused, at 3, 6 and 9: 138 + 1, then 98 + 1, then 70 + 1 patches; 3.0 G MACs of 4.6."""
    found = token_plan.passed(196, 12, settings(mode="evit", keep=0.7), 0.7)
    assert [after for _, after in found.patches] == [196] * 3 + [139] * 3 + [99] * 3 + [71] * 3
    assert [before for before, _ in found.patches] == [196] * 4 + [139] * 3 + [99] * 3 + [71] * 2

    with without_memory():
        deit = timm.create_model("deit_small_patch16_224")
    assert round(Tokens(deit, settings(mode="evit", keep=0.7)).macs() / 1e9, 1) == 3.0


def test_the_schedule():
    asked = settings(mode="evit", keep=0.6, warmup=0.2, ramp=0.4)
    at = [token_plan.keep_at(asked, progress) for progress in (0, 0.1999, 0.2, 0.3, 0.4, 0.5, 0.6, 1)]
    middle = [0.6 + 0.4 * (1 + math.cos(math.pi / 4)) / 2, 0.8, 0.6 + 0.4 * (1 - math.cos(math.pi / 4)) / 2]
    assert at == pytest.approx([1, 1, 1, *middle, 0.6, 0.6])
    assert token_plan.keep_at(settings(mode="evit", keep=0.6), 0) == 0.6
    early = settings(mode="evit", keep=0.6, until=0.7, evaluate="dense")
    assert [token_plan.keep_at(early, step / 10) for step in (0, 6, 7, 9, 10)] == [0.6, 0.6, 1, 1, 1]
    model, x = tiny().train(), pictures(2)
    dense = model(x)
    with Tokens(model, asked) as reduced:
        reduced.schedule(0.1)
        assert torch.equal(model(x), dense)
        assert reduced.macs() == cost.count(model).macs
        assert reduced.share() == 1
        reduced.schedule(0.4)
        half = reduced.macs()
        assert not torch.equal(model(x), dense)
        reduced.schedule(0.9)
        assert reduced.macs() < half < cost.count(model).macs


# --------------------------------------------------------------------------------------------------------- cumulative


@pytest.mark.parametrize("kind", ["vit", "registers", "qk_norm", "layerscale", "pooled", "norm_after", "split"])
def test_cumulative_scores_are_the_peaks_of_all_attention_so_far(kind):
    """Against a loop over images, heads, queries and patches; patches leave for good, and take their scores along."""
    model = split_of(3) if kind == "split" else tiny(kind, depth=3)
    model = in_double(model)
    x, prefix = pictures(2).double(), model.num_prefix_tokens
    asked = settings(mode="cumulative", keep=0.5)
    counts = [after for _, after in token_plan.passed(16, 3, asked, 0.5).patches]
    expected = []
    for image in range(2):
        now = model.norm_pre(model._pos_embed(model.patch_embed(x[image : image + 1])))
        total = dict.fromkeys(range(16), 0.0)
        alive = list(range(16))
        for number, block in enumerate(model.blocks):
            after = type(block).__name__ == "ResPostBlock"
            read = now if after else block.norm1(now)
            heads = attention_matrix(block.attn, read)[0]  # (H, N, N)
            for place, patch in enumerate(alive):
                total[patch] += sum(float(head[:, prefix + place].detach().max()) for head in heads)
            attended = block.attn(read)
            now = now + (block.norm1(attended) if after else block.ls1(attended))
            best = sorted(sorted(alive, key=lambda patch: -total[patch])[: counts[number]])
            stays = [*range(prefix), *(prefix + alive.index(patch) for patch in best)]
            alive, now = best, now[:, stays]
            processed = block.mlp(now if after else block.norm2(now))
            now = now + (block.norm2(processed) if after else block.ls2(processed))
        expected.append(model.forward_head(model.norm(now)))
    with Tokens(model, asked):
        torch.testing.assert_close(model(x), torch.cat(expected), atol=1e-9, rtol=1e-7)


def split_of(depth: int) -> Any:
    model = tiny(depth=depth)
    return surgery.cut(model, random_plan(model, 3, decouple_qk=True))


def attention_matrix(attn: nn.Module, x: Tensor) -> Tensor:
    heads, v = attn.num_heads, attn.proj.in_features // attn.num_heads
    q, k, _ = attn.qkv(x).split([(attn.qkv.out_features - heads * v) // 2] * 2 + [heads * v], dim=-1)
    q, k = (part.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for part in (q, k))
    return (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)


def test_cumulative_follows_the_published_ramp():
    """Of 12 blocks: none up to block 2, then a twentieth more a block up to 0.3 from block 8 on (CP-ViT's code, its MHSA ratios)."""
    after = [after for _, after in token_plan.passed(1000, 12, settings(mode="cumulative", keep=0.7), 0.7).patches]
    assert after == [1000] * 3 + [950, 900, 850, 800, 750] + [700] * 4
    for depth in (1, 2, 6, 24):
        seen = [count for _, count in token_plan.passed(100, depth, settings(mode="cumulative", keep=0.4), 0.4).patches]
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] == 40


# -------------------------------------------------------------------------------------------------------- on the model


COUNTED = [(kind, name) for kind in ALL for name in MODE_NAMES]


@pytest.mark.parametrize(
    ("kind", "name"), few(COUNTED, lambda one: one[0] in ("vit", "split") or one[1] in ("evit", "tome"))
)
def test_macs_are_what_torch_counts(kind, name):
    model, mode = every(kind), MODES[MODE_NAMES.index(name)]
    model.requires_grad_(False).train()
    for module in model.modules():  # torch's counter does not see fused attention on the CPU
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    dense = cost.count(model).macs
    with Tokens(model, settings(**mode)) as reduced, FlopCounterMode(display=False) as counter, torch.no_grad():
        if mode["mode"] == "input":
            reduced.choose(torch.rand(1, 16))
        model(pictures(1))
    assert counter.get_total_flops() == 2 * reduced.macs()
    assert reduced.macs() < 0.93 * dense


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("kind", ["vit", "pooled", "norm_after", "split"])
def test_a_model_is_left_as_it_was(kind, mode):
    model, x = every(kind), pictures(2)
    keys, before = list(model.state_dict()), model(x)
    score = (lambda images, patch: images.new_ones(len(images), 16)) if mode["mode"] == "input" else None
    with Tokens(model, settings(**mode), score):
        assert list(model.state_dict()) == keys
        anatomy.supported(model)
        model.train()(x)
        model.eval()
    assert torch.equal(model(x), before)
    assert torch.equal(copy.deepcopy(model)(x), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


@pytest.mark.parametrize("mode", [MODES[2], MODES[4]], ids=["evit", "tome"])
@pytest.mark.parametrize("evaluate", ["dense", "sparse"])
def test_evaluation_is_dense_or_sparse_as_asked(mode, evaluate):
    model, x = tiny(), pictures(2)
    dense = model(x)
    with Tokens(model, settings(**{**mode, "evaluate": evaluate, "warmup": 0.5})) as reduced:
        reduced.schedule(0.0)  # training is dense as yet; what is measured is what will ship
        assert torch.equal(model(x), dense) == (evaluate == "dense")
        assert (reduced.macs(training=False) == cost.count(model).macs) == (evaluate == "dense")


@pytest.mark.parametrize("mode", [MODES[2], MODES[4]], ids=["evit", "tome"])
def test_gates_act_as_ever(mode):
    model, x = tiny().train(), pictures(4)
    gates = Gates(model, Sparsity(), target=None)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in gates.values.values():
            values.copy_(torch.rand(values.shape, generator=draw))
    folded = tiny().train()
    gates.fold(folded)
    with Tokens(model, settings(**mode)), Tokens(folded, settings(**mode)):
        out = model(x)
        torch.testing.assert_close(out, folded(x))
        out.square().sum().backward()
    assert all(float(values.grad.abs().sum()) > 0 for values in gates.values.values())


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_bf16(mode):
    model = tiny().to(torch.bfloat16).train()
    score = (lambda images, patch: torch.rand(len(images), 16)) if mode["mode"] == "input" else None
    with Tokens(model, settings(**mode), score):
        out = model(pictures(2).to(torch.bfloat16))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_refusals():
    with pytest.raises(Refused, match=r"patches\.at: .*block 2.*0 to 1"):
        Tokens(tiny(), settings(mode="evit", at=(2,)))
    with pytest.raises(Refused, match="patch_drop_rate"):
        Tokens(timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, **SMALL), settings(mode="evit"))
    with pytest.raises(Refused, match=r"keep: 0\.9 of 16 .*fused token"):
        Tokens(tiny(), settings(mode="evit", keep=0.9))
    for wrong in (
        {"mode": "dropout", "evaluate": "sparse"},
        {"mode": "tome", "at": (1,)},
        {"mode": "input", "fuse": False},
        {"mode": "evit", "model": "x"},
        {"mode": "evit", "warmup": 0.6, "ramp": 0.6},
    ):
        with pytest.raises(ValueError, match=r"evaluate: dense|settings? of|at most 1"):
            Patches.model_validate(wrong)
