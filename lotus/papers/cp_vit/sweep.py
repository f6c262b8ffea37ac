"""CP-ViT with a fixed ratio (Song et al. 2022, 2203.04570): the baseline that a searched cut is compared with.

Of the paper only the abstract could be had; the scores are those of its released code, with its faults left out
(the class token and registers stay, images of a batch keep equally many patches, what is masked there is removed here):
patches are dropped by :class:`lotus.vit.tokens.Tokens` in mode ``cumulative``, heads by the surgeon. Nothing is compensated, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from lotus.config import Patches
from lotus.pruning import criteria, measure, surgery
from lotus.pruning.judge import Judge
from lotus.pruning.plan import BlockPlan, Plan
from lotus.report.numbers import percent
from lotus.vit import anatomy
from lotus.vit.token_plan import kept
from lotus.vit.tokens import Tokens


def head_scores(model: nn.Module, batches: Iterable[Any]) -> list[np.ndarray]:
    """(H,) of each block, empty where it has no attention: the criterion ``cumulative_attention``, head by head."""
    attention = measure.measure(model, batches, gradients=False, moments="none", attention=True).attention
    scores, watched = [], list[np.ndarray]()
    for block in anatomy.blocks(model):
        if not block.has_attn:
            scores.append(np.zeros(0))
            continue
        watched.append(attention[block.name])
        alike = np.stack([one for one in watched if len(one) == block.heads])
        scores.append(criteria.cumulative_attention(alike, block.heads))
    return scores


def cut_heads(model: nn.Module, scores: Sequence[np.ndarray], keep: float) -> nn.Module:
    """``model`` with the ceil(keep x H) best heads of each block; nothing else is cut."""
    plans = []
    for block, score in zip(anatomy.blocks(model), scores, strict=True):
        full = BlockPlan.full(block.dims)
        best = np.argsort(-score, kind="stable")[: kept(block.heads, keep)]
        heads = tuple(sorted(int(head) for head in best))
        plans.append(
            BlockPlan(full.of, heads, tuple(full.qk[h] for h in heads), tuple(full.v[h] for h in heads), full.units)
        )
    return surgery.cut(model, Plan(tuple(plans)))


def sweep(
    model: nn.Module, batches: Callable[[], Iterable[Any]], judge: Judge, keeps: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for each fixed ratio: ``keep`` of the heads of every block, and of the patches after the last one.

    Returns:
        ``name``, ``keep``, ``macs``, ``worse``, ``top1`` each.
    """
    scores = head_scores(model, batches())
    rows: list[dict[str, Any]] = []
    for keep in keeps:
        small = cut_heads(model, scores, keep).eval()
        with Tokens(small, Patches(mode="cumulative", keep=keep, evaluate="sparse")) as tokens:
            judged, macs = judge(small), tokens.macs(training=False)
        name = f"CP-ViT, {percent(keep)} of heads and patches"
        rows.append({"name": name, "keep": keep, "macs": float(macs), "worse": judged.worse, "top1": judged.top1})
    return rows
