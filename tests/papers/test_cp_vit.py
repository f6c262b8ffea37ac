"""CP-ViT at fixed ratios: scores of heads, what is cut, what it costs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pruning"))
from masking import masked
from tiny_vits import batches, pictures, tiny

from lotus.papers.cp_vit import sweep as cp_vit
from lotus.pruning.judge import Judge
from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit import anatomy, cost


def test_head_scores_accumulate_the_peaks_of_attention():
    model, data = tiny(), batches(2)
    scores = cp_vit.head_scores(model, data)
    expected, total = np.zeros(3), []
    images = torch.cat([one for one, _ in data])
    x = model._pos_embed(model.patch_embed(images))
    for block in model.blocks:
        q, k, _ = block.attn.qkv(block.norm1(x)).reshape(16, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        peaks = (q @ k.transpose(-2, -1) / 4).softmax(-1).amax(-1)
        expected = expected + peaks.mean((0, 2)).detach().numpy()
        total.append(expected)
        x = block(x)
    np.testing.assert_allclose(scores, total, rtol=1e-5)


def test_heads_are_cut_by_score_and_nothing_else():
    model = tiny()
    small = cp_vit.cut_heads(model, [np.array([1.0, 3, 2]), np.array([3.0, 1, 1])], 0.6)
    plans = []
    for heads, of in zip([(1, 2), (0, 1)], [block.dims for block in anatomy.blocks(model)]):
        full = BlockPlan.full(of)
        plans.append(BlockPlan(of, heads, full.qk[:2], full.v[:2], full.units))
    with torch.no_grad():
        torch.testing.assert_close(
            small(pictures()), masked(model, Plan(tuple(plans)))(pictures()), atol=1e-5, rtol=1e-4
        )


def test_a_sweep_costs_less_with_each_ratio_and_ends_clean():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judge = Judge(model, batches())
    rows = cp_vit.sweep(model, batches, judge, [1.0, 0.7, 0.4])
    assert rows[0]["macs"] == cost.count(model).macs
    assert rows[0]["worse"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["macs"] > rows[1]["macs"] > rows[2]["macs"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
