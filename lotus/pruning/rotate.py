"""Rotate the dimensions of heads, so that the first r of them are the best r that there are.

What a head computes does not depend on the basis of its queries and keys, nor on that of its values: for any invertible
matrices, q'k' = qk with q' = T q, k' = T^-T k, and W' v' = W v with v' = T v, W' = W T^-1. So a basis is chosen in which
cutting by index is the best cut of all: by Eckart and Young (1936), truncating the singular value decomposition in the space
where the calibration statistics are white.

    queries, keys    logits are q'k. With E[q q'] = F F', E[k k'] = G G', F'G = U S V': T = S^1/2 U' F^-1 for q, S^1/2 V' G^-1 for k.
                     Softmax does not see what is added to a whole row of logits, so of the keys only what differs between the
                     tokens of an image counts: their second moment is taken about the image's own mean, and a bias of k, like
                     all that is constant in it, weighs nothing. The queries' is taken about zero, with their bias.
    values           the head adds W o to the residual stream, where o = A v is mixed by attention: what is white is o, not v. With
                     E[o o'] = F F', W F = U S V': T = S^1/2 V' F^-1; it commutes with the mixing, A (v T') = (A v) T'. The
                     bias of proj takes up the mean, so the moment is taken about the mean; about zero where there is no bias.

Singular values fall from the first dimension to the last; S_i^2 is the mean square that is lost with dimension i. Nothing is
lost before a cut: the rotated model computes what the model computes, and whatever is measured on it (gates, moments) is
measured in the rotated basis. H heads, Q query/key and V value dimensions a head, D width, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lotus.pruning import measure
from lotus.pruning.compensate import Moments
from lotus.pruning.measure import Logits
from lotus.vit import anatomy
from lotus.vit.anatomy import Block

FLOOR = 1e-7
"""Variances below this fraction of the largest count as this fraction: a direction that calibration never saw can be turned back too."""


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
    """The best basis of what a head adds to the residual stream.

    Args:
        outputs: (V, V) second moment of its outputs, before proj.
        weight: (D, V) the columns of proj that read them, LayerScale folded in.
    """
    f = _root(outputs)
    written = weight @ f
    written = functional.pad(written, (0, 0, 0, max(0, len(f) - len(written))))  # a head may be wider than the stream
    _, s, vt = torch.linalg.svd(written, full_matrices=False)
    # Only a unit of measure, so it may be floored: a dimension that proj does not read stays what it is.
    half = s.clamp_min(FLOOR * s[0].clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
    return Turn(half[:, None] * torch.linalg.solve(f.T, vt.T).T, f @ vt.T / half, s)


@dataclass
class Statistics:
    """What a rotation needs of one block."""

    logits: Logits
    outputs: Moments
    """Of the inputs of proj."""


def statistics(
    model: nn.Module, batches: Iterable[Any], *, progress: Callable[[int], None] | None = None
) -> dict[str, Statistics]:
    """Go through ``batches`` once, forward only, in eval mode; by block.

    Raises:
        Refused: no batch came, or the model's output is not finite.
    """
    outputs: dict[str, Moments] = {}
    with ExitStack() as stack:
        for block in (block for block in anatomy.blocks(model) if block.has_attn):
            outputs[block.name] = Moments()
            stack.callback(block.proj.register_forward_pre_hook(_look_at(outputs[block.name])).remove)
        # A head has few dimensions and an image many tokens: of large images some are enough.
        every = max(1, (getattr(model.patch_embed, "num_patches", None) or 1) // measure.MANY)
        measured = measure.measure(
            model, batches, gradients=False, moments="none", logits=True, every=every, progress=progress
        )
    return {name: Statistics(measured.logits[name], moments) for name, moments in outputs.items()}


class Turns(NamedTuple):
    """The changes of basis of a block's heads, each of H; None where they stay as they are."""

    qk: list[Turn] | None
    v: list[Turn] | None


def turns(model: nn.Module, found: dict[str, Statistics], *, qk: bool = True, v: bool = True) -> dict[str, Turns]:
    """The best basis of every head, by block."""
    best: dict[str, Turns] = {}
    for block in (block for block in anatomy.blocks(model) if block.has_attn):
        whole = block.whole_qk  # what stands between q and the logits is bound to the basis
        best[block.name] = Turns(
            _of_queries_keys(found[block.name]) if qk and not whole else None,
            _of_values(block, found[block.name]) if v and block.norm("attn") is None else None,
        )
    return best


def apply(model: nn.Module, turned: Mapping[str, Turns]) -> nn.Module:
    """A copy of ``model`` with turned heads, which shares every other weight with it."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    for block in anatomy.blocks(made):
        qk, v = turned.get(block.name, Turns(None, None))
        heads, qk_dim, v_dim, _ = block.dims[:4]
        if qk is not None:
            _turn_rows(block.qkv, 0, torch.stack([turn.first for turn in qk]))
            _turn_rows(block.qkv, heads * qk_dim, torch.stack([turn.second for turn in qk]))
        if v is not None:
            _turn_rows(block.qkv, 2 * heads * qk_dim, torch.stack([turn.first for turn in v]))
            weight = block.proj.weight.detach().to(v[0].second)  # (D, H V)
            parts = weight.split(v_dim, dim=1)
            columns = torch.cat([part @ turn.second for part, turn in zip(parts, v, strict=True)], dim=1)
            block.proj.weight = _like(columns, block.proj.weight)
    return made


def dual(turned: Mapping[str, Turns]) -> dict[str, Turns]:
    """How gradients turn where weights turn so.

    What is W' = T W of the weights is grad' = T^-T grad of their gradients, and all that is linear in those, as momentum is:
    with first = second^-T of queries and keys the two change places, and with first = second^-1 of values and the columns of
    proj each becomes the other's transpose.
    """
    return {
        name: Turns(
            None if qk is None else [Turn(turn.second, turn.first, turn.singular) for turn in qk],
            None if v is None else [Turn(turn.second.T, turn.first.T, turn.singular) for turn in v],
        )
        for name, (qk, v) in turned.items()
    }


def _of_queries_keys(found: Statistics) -> list[Turn]:
    return [queries_keys(q, k) for q, k in zip(found.logits.queries, found.logits.keys, strict=True)]


def _of_values(block: Block, found: Statistics) -> list[Turn]:
    heads, _, v_dim = block.dims[:3]
    spread = found.outputs.covariance
    if block.proj.bias is None:
        spread = spread + torch.outer(found.outputs.mean, found.outputs.mean)
    scaled = block.proj.weight.detach().to(spread)  # (D, H V)
    gamma = block.gamma("attn")
    if gamma is not None:
        scaled = scaled * gamma.detach().to(spread)[:, None]
    parts = [slice(h * v_dim, (h + 1) * v_dim) for h in range(heads)]
    return [values(spread[part, part], scaled[:, part]) for part in parts]


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


def _look_at(outputs: Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        outputs.add(args[0])

    return hook


def _root(moment: Tensor) -> Tensor:
    """Symmetric F with F F' = ``moment``, floored so that it can be inverted."""
    spread, basis = torch.linalg.eigh(moment)
    largest = spread[-1].clamp_min(torch.finfo(spread.dtype).tiny)
    found: Tensor = (basis * spread.clamp_min(FLOOR * largest).sqrt()) @ basis.T
    return found
