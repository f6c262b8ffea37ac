"""Rotate the dimensions of heads, so that the first r of them are the best r that there are.

What a head computes does not depend on the basis of its queries and keys, nor on that of its values: for any invertible
matrices, q'k' = qk with q' = T q, k' = T^-T k, and W' v' = W v with v' = T v, W' = W T^-1. So a basis is chosen in which
cutting by index is the best cut of all: by Eckart and Young (1936), truncating the singular value decomposition in the space
where the calibration statistics are white.

    queries, keys    logits are q'k. With E[q q'] = F F', E[k k'] = G G', F'G = U S V': T = S^1/2 U' F^-1 for q, S^1/2 V' G^-1 for k.
                     Softmax does not see what is added to a whole row of logits, so of the keys only what differs between the
                     tokens of an image counts: their second moment is taken about the image's own mean, and a bias of k, like
                     all that is constant in it, weighs nothing. The queries' is taken about zero, with their bias.
    values           the head adds W o to the stream, where o = A v is mixed by attention: what is white is o, not v. With
                     E[o o'] = F F', W F = U S V': T = S^1/2 V' F^-1; it commutes with the mixing, A (v T') = (A v) T'. The
                     bias of proj takes up the mean, so the moment is taken about the mean; about zero where there is no bias.

Singular values fall from the first dimension to the last; S_i^2 is the mean square that is lost with dimension i. Nothing is
lost before a cut: the rotated model computes what the model computes, and whatever is measured on it (gates, moments) is
measured in the rotated basis. H heads, Q query/key and V value dimensions a head, D width, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lotus.pruning import measure
from lotus.pruning.compensate import Moments
from lotus.vit import anatomy
from lotus.vit.anatomy import Block

FLOOR = 1e-7
"""Variances below this part of the largest count as this part: a direction that calibration never saw can be turned back too."""


class Turn(NamedTuple):
    """A change of basis of one head, float64."""

    first: Tensor
    """(R, R) for q, or for v: new = first @ old."""
    second: Tensor
    """(R, R) for k; for the columns of proj its inverse, (R, R): W' = W @ second."""
    singular: Tensor
    """(R,) falling."""


def queries_keys(queries: Tensor, keys: Tensor) -> Turn:
    """The best basis of a head's logits.

    Args:
        queries: (Q, Q) second moment of its queries.
        keys: (Q, Q) second moment of its keys about each image's mean.
    """
    f, g = _root(queries), _root(keys)
    u, s, vt = torch.linalg.svd(f.T @ g)
    half = s.sqrt()[:, None]
    return Turn(half * torch.linalg.solve(f.T, u).T, half * torch.linalg.solve(g.T, vt.T).T, s)


def values(outputs: Tensor, weight: Tensor) -> Turn:
    """The best basis of what a head adds to the stream.

    Args:
        outputs: (V, V) second moment of its outputs, before proj.
        weight: (D, V) the columns of proj that read them, LayerScale folded in.
    """
    f = _root(outputs)
    _, s, vt = torch.linalg.svd(weight @ f, full_matrices=False)
    # Only a unit of measure, so it may be floored: a dimension that proj does not read stays what it is.
    half = s.clamp_min(FLOOR * s[0].clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
    return Turn(half[:, None] * torch.linalg.solve(f.T, vt.T).T, f @ vt.T / half, s)


@dataclass
class Statistics:
    """What a rotation needs of one block."""

    queries: Tensor
    """(H, Q, Q) float64."""
    keys: Tensor
    """(H, Q, Q) float64, about each image's mean."""
    outputs: Moments
    """Of the inputs of proj."""
    images: int = 0


def statistics(
    model: nn.Module, batches: Iterable[Any], *, progress: Callable[[int], None] | None = None
) -> dict[str, Statistics]:
    """Go through ``batches`` once, forward only, in eval mode; by block.

    Raises:
        Refused: no batch came, or the model's output is not finite.
    """
    found: dict[str, Statistics] = {}
    with ExitStack() as stack:
        for block in anatomy.blocks(model):
            heads, qk_dim, _, _ = block.dims
            empty = torch.zeros(heads, qk_dim, qk_dim, dtype=torch.float64)
            found[block.name] = Statistics(empty, empty.clone(), Moments())
            stack.callback(block.qkv.register_forward_hook(_look_at_qkv(found[block.name], block)).remove)
            stack.callback(block.proj.register_forward_pre_hook(_look_at_outputs(found[block.name])).remove)
        measure.measure(model, batches, gradients=False, moments="none", progress=progress)
    return found


def rotate(model: nn.Module, found: dict[str, Statistics], *, qk: bool = True, v: bool = True) -> nn.Module:
    """A model that computes what ``model`` computes, with rotated heads; it shares every other weight with ``model``."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    turned = copy.deepcopy(model, shared)
    for block in anatomy.blocks(turned):
        if qk and not block.qk_norm:  # a norm between q and the logits is bound to the basis
            _turn_queries_keys(block, found[block.name])
        if v:
            _turn_values(block, found[block.name])
    return turned


def _turn_queries_keys(block: Block, found: Statistics) -> None:
    turns = [queries_keys(q, k) for q, k in zip(found.queries, found.keys, strict=True)]
    inner = block.dims.heads * block.dims.qk_dim
    _turn_rows(block.qkv, 0, torch.stack([turn.first for turn in turns]))
    _turn_rows(block.qkv, inner, torch.stack([turn.second for turn in turns]))


def _turn_values(block: Block, found: Statistics) -> None:
    heads, qk_dim, v_dim, _ = block.dims
    spread = found.outputs.covariance
    if block.proj.bias is None:
        spread = spread + torch.outer(found.outputs.mean, found.outputs.mean)
    weight = block.proj.weight.detach().to(spread)  # (D, H V)
    scaled = weight
    gamma = getattr(getattr(block.module, "ls1", None), "gamma", None)
    if gamma is not None:
        scaled = weight * gamma.detach().to(spread)[:, None]
    parts = [slice(h * v_dim, (h + 1) * v_dim) for h in range(heads)]
    turns = [values(spread[part, part], scaled[:, part]) for part in parts]
    _turn_rows(block.qkv, 2 * heads * qk_dim, torch.stack([turn.first for turn in turns]))
    columns = torch.cat([weight[:, part] @ turn.second for part, turn in zip(parts, turns, strict=True)], dim=1)
    block.proj.weight = _like(columns, block.proj.weight)


def _turn_rows(linear: nn.Linear, start: int, turns: Tensor) -> None:
    """Multiply the rows of each head from ``start`` on by its (R, R) matrix."""
    heads, dim, _ = turns.shape
    rows = slice(start, start + heads * dim)
    for name in ("weight", "bias"):
        old = getattr(linear, name)
        if old is None:
            continue
        new = old.detach().to(turns.device, turns.dtype, copy=True)
        new[rows] = (turns @ new[rows].reshape(heads, dim, -1)).reshape(new[rows].shape)
        setattr(linear, name, _like(new, old))


def _like(tensor: Tensor, old: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(old.device, old.dtype).contiguous(), requires_grad=old.requires_grad)


def _look_at_qkv(into: Statistics, block: Block) -> Callable[[nn.Module, Any, Tensor], None]:
    heads, qk_dim, _, _ = block.dims
    inner = heads * qk_dim

    def hook(_: nn.Module, __: Any, out: Tensor) -> None:  # out (B, N, H (2 Q + V))
        q, k = (
            part.reshape(*part.shape[:2], heads, qk_dim).permute(2, 0, 1, 3)  # (H, B, N, Q)
            for part in _exact(out.detach()[..., : 2 * inner]).split(inner, dim=-1)
        )
        into.images += len(out)
        into.queries = _grown(into.queries, q)
        into.keys = _grown(into.keys, k - k.mean(dim=2, keepdim=True))

    return hook


def _look_at_outputs(into: Statistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        into.outputs.add(args[0])

    return hook


def _grown(total: Tensor, x: Tensor) -> Tensor:
    """(H, Q, Q) sums of products. Their number is only a unit of measure: no basis depends on it."""
    rows = x.flatten(1, 2)
    return total.to(x.device) + rows.transpose(1, 2) @ rows


def _exact(x: Tensor) -> Tensor:
    """At least float32, where float64 sums can be kept (mps has none)."""
    x = x.cpu() if x.device.type == "mps" else x
    return x if x.dtype == torch.float64 else x.float()


def _root(moment: Tensor) -> Tensor:
    """Symmetric F with F F' = ``moment``, floored so that it can be inverted."""
    spread, basis = torch.linalg.eigh(moment)
    largest = spread[-1].clamp_min(torch.finfo(spread.dtype).tiny)
    return (basis * spread.clamp_min(FLOOR * largest).sqrt()) @ basis.T
