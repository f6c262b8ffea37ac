"""What is done to the tokens of a batch: which stay, which become one, which are merged.

Shapes: B batch, P prefix tokens (class, distillation, registers; they always stay), n patches, K kept ones, N = P + n,
D width, H heads, Q query/key dimensions a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


def keep_rows(x: Tensor, rows: Tensor, prefix: int) -> Tensor:
    """The prefix and the patches ``rows``: (B, P + n, D), (B, K) -> (B, P + K, D)."""
    return torch.cat([x[:, :prefix], _rows(x[:, prefix:], rows)], 1)


def keep_bias(bias: Tensor, rows: Tensor, prefix: int) -> Tensor:
    """What relative positions add to the logits between the prefix and the patches ``rows``: (1, H, N, N), (B, K) ->
    (B, H, P + K, P + K)."""
    first = torch.arange(prefix, device=rows.device).expand(len(rows), -1)
    stays = torch.cat([first, rows + prefix], 1)  # (B, P + K)
    return bias[0][:, stays[:, :, None], stays[:, None, :]].transpose(0, 1)


def top(scores: Tensor, count: int) -> Tensor:
    """The ``count`` patches of the highest score, in the image's order: (B, n) -> (B, K)."""
    return scores.topk(count, dim=1).indices.sort(1).values


def top_by_chance(scores: Tensor, count: int, rng: torch.Generator | None = None) -> Tensor:
    """As :func:`top`. Among equals, such as the patches of a black border, chance decides: by their place, one side of every
    image would win.

    Args:
        scores: (B, n)
        count: how many of each image
        rng: on the scores' device; None: torch's own
    """
    mixed = torch.rand(scores.shape, generator=rng, device=scores.device).argsort(1)
    return mixed.gather(1, top(scores.gather(1, mixed), count)).sort(1).values


def evit(x: Tensor, scores: Tensor, count: int, prefix: int, *, fuse: bool) -> Tensor:
    """Keep the ``count`` most attended patches -> (B, P + K, D), or (B, P + K + 1, D) with the rest fused.

    EViT (2202.07800, inattentive token fusion): the rest becomes one token, the sum of a_i x_i over those that leave,
    through which gradients reach the attention.

    Args:
        x: (B, P + n, D)
        scores: (B, n) attention of the class token, the mean over heads
        prefix: P
        fuse: the rest becomes a token; else it is dropped
    """
    stays = top(scores, count)
    kept = keep_rows(x, stays, prefix)
    if not fuse:
        return kept
    left = scores.scatter(1, stays, 0.0)  # (B, n) attention of those that leave
    return torch.cat([kept, left[:, None].to(x.dtype) @ x[:, prefix:]], 1)


def received(matrix: Tensor, prefix: int) -> Tensor:
    """What a block adds to the patches' cumulative score: (B, H, N, N) -> (B, n).

    Sum over heads of the largest attention that any query pays to the patch (CP-ViT, 2203.04570, as its code has it).
    """
    return matrix[..., prefix:].amax(2).sum(1)


class Merging(NamedTuple):
    """Which patches are merged into which: of every second patch (the sources), ``merged`` go into another."""

    stays: Tensor
    """(B, S - r) sources that stay, in order."""
    merged: Tensor
    """(B, r) sources that go."""
    into: Tensor
    """(B, r) targets that they go into."""


def match(metric: Tensor, count: int) -> Merging:
    """Bipartite soft matching (ToMe, 2210.09461): each source's most similar target; the best edges merge.

    Targets are patches 0, 2, ..., sources 1, 3, ...: as the paper's code with a class token before them.

    Args:
        metric: (B, n, Q) what similarity is the cosine of: keys, the mean over heads
        count: r, sources that go, at most n // 2
    """
    with torch.no_grad():
        metric = nn.functional.normalize(metric, dim=-1)
        best, target = (metric[:, 1::2] @ metric[:, ::2].transpose(1, 2)).max(-1)  # (B, S)
        order = best.argsort(1, descending=True)
        merged = order[:, :count]
        return Merging(order[:, count:].sort(1).values, merged, target.gather(1, merged))


def merge(x: Tensor, sizes: Tensor, found: Merging, prefix: int) -> tuple[Tensor, Tensor]:
    """Means of what is merged, weighted by how many patches each token stands for (2210.09461, tracking token size).

    Args:
        x: (B, P + n, D)
        sizes: (B, n) patches that each token stands for
        found: who merges into whom
        prefix: P

    Returns:
        (B, P + n - r, D), sources that stay before targets, and their sizes (B, n - r)
    """
    patches = x[:, prefix:]
    sources, targets = patches[:, 1::2], patches[:, ::2]
    weights, mass = sizes[:, 1::2], sizes[:, ::2]
    weighted = targets * mass[..., None].to(x.dtype)
    incoming = weights.gather(1, found.merged)
    weighted = weighted.scatter_add(
        1, _wide(found.into, x), _rows(sources, found.merged) * incoming[..., None].to(x.dtype)
    )
    mass = mass.scatter_add(1, found.into, incoming)
    stays = _rows(sources, found.stays)
    return (
        torch.cat([x[:, :prefix], stays, weighted / mass[..., None].to(x.dtype)], 1),
        torch.cat([weights.gather(1, found.stays), mass], 1),
    )


def _wide(rows: Tensor, x: Tensor) -> Tensor:
    return rows[..., None].expand(-1, -1, x.shape[-1])


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """(B, n, D), (B, K) -> (B, K, D)."""
    return x.gather(1, _wide(rows, x))
