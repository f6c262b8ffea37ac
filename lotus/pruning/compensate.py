"""What the cut units carried is folded into those that stay, in closed form, before any fine-tuning.

A Linear reads x; of its inputs S stay and P go. The best affine prediction of x_P from x_S over the calibration images,
x_P ~ mu_P + B (x_S - mu_S), turns W x + b into a smaller Linear:

    B = C_PS (C_SS + lambda I)^-1        W' = W_S + W_P B        b' = b + W_P (mu_P - B mu_S)

At lambda = 0 this is the optimal-brain-surgeon update of the group (Hassibi & Stork 1993) and the least-squares fit of the
Linear's outputs; B = 0 folds the mean alone (variance-based pruning, 2507.12988). By the covariance without its noise it is OB2C
(2608.17657). D outputs, U inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lotus.pruning import surgery
from lotus.pruning.plan import Plan
from lotus.pruning.spectrum import denoised
from lotus.vit import anatomy
from lotus.vit.anatomy import Block

Compensate = Literal["none", "mean", "affine", "denoised"]
_ROWS = 256
"""Rows of a covariance that are worked out at once: pieces larger than the activations would keep a heap from using theirs again."""


class Moments:
    """Mean and covariance of a stream of vectors.

    Sums are kept in float64 about the first batch's mean, so that large means do not swallow small variances; a batch's own
    products are taken in float32 (float64 for float64 activations), whose error lies far below the ridge. Of the sums of
    products only those from the diagonal on are kept up to date.
    """

    def __init__(self, *, covariance: bool = True) -> None:
        self.count = self.images = 0
        self.with_covariance = covariance
        self._shift = self._sum = self._outer = None  # type: Tensor | None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in (..., U) vectors, of as many images as there are along the first axis."""
        self.images += len(x)
        x = x.detach().reshape(-1, x.shape[-1])
        if x.device.type == "mps":  # has no float64
            x = x.cpu()
        if x.dtype != torch.float64:
            x = x.float()
        if self._shift is None:
            self._shift = x.mean(dim=0)
            self._sum = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            if self.with_covariance:
                self._outer = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        x = x - self._shift
        assert self._sum is not None
        self._sum += x.sum(dim=0, dtype=torch.float64)
        if self._outer is not None:
            for start in range(0, x.shape[1], _ROWS):
                rows = slice(start, start + _ROWS)
                self._outer[rows, start:] += x[:, rows].T @ x[:, start:]
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """(U,) float64."""
        assert self._shift is not None, "no vectors were added"
        assert self._sum is not None
        return self._shift.double() + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(U, U) float64, divided by the count."""
        assert self._sum is not None, "no vectors were added"
        assert self._outer is not None, "only the mean was asked for"
        drift = self._sum / self.count
        upper = self._outer.triu()
        upper += upper.triu(1).T
        return upper.div_(self.count).sub_(torch.outer(drift, drift))


@dataclass(frozen=True)
class Known:
    """Moments that were worked out, not gathered."""

    mean: Tensor
    """(U,) float64."""
    covariance: Tensor
    """(U, U) float64."""
    images: int = 0
    """That they are of; 0: nobody counted them, and no noise is taken out."""


def fold(
    weight: Tensor,
    bias: Tensor | None,
    kept: Sequence[int],
    moments: Moments | Known | None,
    how: Compensate,
    *,
    ridge: float = 1e-4,
) -> tuple[Tensor, Tensor | None]:
    """Weight (D, |S|) and bias (D,) of the Linear that reads only ``kept``.

    A Linear without bias has no place for a mean: ``mean`` then changes nothing, ``affine`` takes the best linear prediction.

    Args:
        weight: (D, U).
        bias: (D,) or None.
        kept: The inputs that stay, in order.
        moments: Of the Linear's inputs, in the model before the cut. Not needed for ``none``.
        how: ``none``, ``mean``, ``affine`` or ``denoised``.
        ridge: lambda, as a fraction of the kept inputs' mean variance; of ``denoised`` of all inputs' without noise (Lee et al.
            2026, algorithm 3; they do not say which).
    """
    stay = torch.as_tensor(kept, dtype=torch.long)
    gone_mask = torch.ones(weight.shape[1], dtype=torch.bool)
    gone_mask[stay] = False
    gone = gone_mask.nonzero().squeeze(1)
    small = weight[:, stay.to(weight.device)]
    if how == "none" or not len(gone) or moments is None or (how == "mean" and bias is None):
        return small, bias
    mean = moments.mean
    stay, gone = stay.to(mean.device), gone.to(mean.device)
    w = weight.to(mean.device, torch.float64)
    w_gone = w[:, gone]
    predict = torch.zeros(len(gone), len(stay), dtype=torch.float64, device=mean.device)  # B
    if how in ("affine", "denoised"):
        spread = moments.covariance
        if bias is None:
            spread = spread + torch.outer(mean, mean)
        whole = None
        if how == "denoised" and moments.images:
            spread = torch.from_numpy(denoised(spread.cpu().numpy(), moments.images)).to(spread)
            whole = spread.diagonal().mean()
        predict = _regress(spread[stay][:, stay], spread[gone][:, stay], ridge, whole)
        small = w[:, stay] + w_gone @ predict
    if bias is not None:
        shift = w_gone @ (mean[gone] - predict @ mean[stay])
        bias = (bias.to(shift) + shift).to(bias.device, bias.dtype)
    return small.to(weight.device, weight.dtype), bias


@torch.no_grad()
def rescale(norm: nn.Module | None, dense: nn.Module | None, kept: Sequence[int], moments: Moments | None) -> None:
    """Multiply the weights of a cut norm, in place, by the mean spread of what it reads now, so that its outputs are again
    about what they were before the cut.

    A norm gives z = (h - mean) / spread of all U inputs; of the kept ones alone it gives (z_S - m) / s, with mean and spread
    taken over z_S. On average over the calibration images s^2 = mean E[z_S^2] - E[m^2], which follows from the moments. An
    RMSNorm takes no mean. For a norm without weights, or without moments, nothing is done.

    Args:
        norm: The cut norm, before the Linear that is compensated.
        dense: The norm before the cut.
        kept: The inputs that stay, in order.
        moments: Of what the norm gave, in the model before the cut.
    """
    weight, before = getattr(norm, "weight", None), getattr(dense, "weight", None)
    if weight is None or before is None or moments is None or not moments.with_covariance or len(kept) == len(before):
        return
    stay = torch.as_tensor(kept, dtype=torch.long, device=moments.mean.device)
    gain = before.detach().to(moments.mean)[stay]
    bias = getattr(dense, "bias", None)
    shift = 0 if bias is None else bias.detach().to(moments.mean)[stay]
    if (gain == 0).any():  # then z cannot be read off what the norm gave
        return
    mean = (moments.mean[stay] - shift) / gain
    second = moments.covariance[stay][:, stay] / torch.outer(gain, gain) + torch.outer(mean, mean)  # E[z z']
    square = second.diagonal().mean()
    if isinstance(norm, nn.LayerNorm):
        square = square - second.mean()
        small_bias = getattr(norm, "bias", None)
        if small_bias is not None:
            small_bias += (gain * mean.mean()).to(small_bias)
    weight *= square.clamp_min(0).sqrt().to(weight)


def apply(linear: nn.Linear, dense: nn.Linear, kept: Sequence[int], moments: Moments | None, how: Compensate) -> None:
    """Give ``linear``, which reads only ``kept`` of what ``dense`` reads, the folded weights; in place."""
    bias = None if dense.bias is None else dense.bias.detach()
    _put(linear, fold(dense.weight.detach(), bias, kept, moments, how))


def carry_over(
    small: nn.Module, dense: nn.Module, plan: Plan, moments: Mapping[str, Moments], how: Compensate
) -> list[str]:
    """Fold what ``plan`` cut out of ``dense`` into ``small``, which is what was left; in place.

    Of a sublayer that is gone, its mean stays: added to the bias of whatever wrote to the stream last before it, where
    nothing reads in between.

    Args:
        moments: Of the dense model's sites; one that is missing has nothing folded.
        how: As ``prune.compensate`` says it.

    Returns:
        Sentences on what could not be done.
    """
    before = anatomy.blocks(dense)
    after = {index: block for (index, _), block in zip(surgery.survivors(plan), anatomy.blocks(small), strict=True)}
    notes: list[str] = []
    writers: list[tuple[Block, str]] = []
    for index, (old, kept) in enumerate(zip(before, plan.blocks, strict=True)):
        block = after.get(index)
        for sublayer, last, first, stays, reads in (
            ("attn", "proj", "qkv", kept.outputs, kept.attn_in),
            ("mlp", "fc2", "fc1", list(kept.units), kept.mlp_in),
        ):
            if last not in old.linears:
                continue
            site = f"{old.name}.{sublayer}"
            if block is not None and stays:
                rescale(block.norm(sublayer), old.norm(sublayer), stays, moments.get(site))
                apply(getattr(block, last), getattr(old, last), stays, moments.get(site), how)
                if reads is not None:
                    whole = surgery.cut_weights(old, dataclasses.replace(kept, attn_in=None, mlp_in=None))[first]
                    _put(getattr(block, first), fold(*whole, reads, moments.get(f"{site}_in"), how))
                writers.append((block, sublayer))
            elif how != "none" and not _shift(small, writers, _mean_of(old, sublayer, moments.get(site))):
                notes.append(f"{old.name}: the mean of its {sublayer} could not be folded anywhere, and is dropped.")
    return notes


def _put(linear: nn.Linear, folded: tuple[Tensor, Tensor | None]) -> None:
    with torch.no_grad():
        linear.weight.copy_(folded[0])
        if folded[1] is not None:
            linear.bias.copy_(folded[1])


def _mean_of(block: Block, sublayer: str, moments: Moments | None) -> Tensor | None:
    """(D,) what a sublayer adds to the residual stream on the average token; None where no closed form knows it."""
    if moments is None or block.norm_after:
        return None
    linear = block.proj if sublayer == "attn" else block.fc2
    mean = linear.weight.detach().to(moments.mean) @ moments.mean
    mean = mean if linear.bias is None else mean + linear.bias.detach().to(mean)
    gamma = block.gamma(sublayer)
    return mean if gamma is None else mean * gamma.to(mean)


def _shift(model: Any, writers: Sequence[tuple[Block, str]], by: Tensor | None) -> bool:
    """Add ``by`` (D,) to the stream after the last of ``writers``, or to what enters the blocks; whether that could be done."""
    if by is None:
        return False
    with torch.no_grad():
        return _shift_writer(*writers[-1], by) if writers else _shift_entry(model, by)


def _shift_writer(block: Block, sublayer: str, by: Tensor) -> bool:
    bias = (block.proj if sublayer == "attn" else block.fc2).bias
    gamma = block.gamma(sublayer)
    if bias is None or block.norm_after or (gamma is not None and bool((gamma == 0).any())):
        return False
    bias.add_((by if gamma is None else by / gamma.to(by)).to(bias))
    return True


def _shift_entry(model: Any, by: Tensor) -> bool:
    if not isinstance(model.norm_pre, nn.Identity):
        if getattr(model.norm_pre, "bias", None) is None:
            return False
        model.norm_pre.bias.add_(by.to(model.norm_pre.bias))
        return True
    patches = model.patch_embed.proj.bias if model.pos_embed is None else model.pos_embed
    if patches is None:
        return False
    patches.add_(by.to(patches))  # the last axis of either is the stream's
    if model.pos_embed is None or model.no_embed_class:  # what stands before the patches has no position
        for token in (getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")):
            if token is not None:
                token.add_(by.to(token))
    return True


def _regress(stay: Tensor, cross: Tensor, ridge: float, whole: Tensor | None = None) -> Tensor:
    """B (P, S) = cross (P, S) @ (stay (S, S) + lambda I)^-1, with as much more lambda as the factorization needs; lambda is
    ``ridge`` of the mean variance in ``stay``, or of ``whole``."""
    scale = (stay.diagonal().mean() if whole is None else whole).clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(stay), dtype=stay.dtype, device=stay.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(stay + ridge * scale * eye)
        if not failed:
            return torch.cholesky_solve(cross.T, factor).T
        ridge = max(10 * ridge, 1e-12)
