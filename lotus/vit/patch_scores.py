"""SHELF of patch scores: which patches of an image are worth training on; higher = keep first.

A positional parameter says what a score reads, a keyword-only one what a config may set. Read off the image alone:
``images`` and ``patch``. Read off a model (:func:`lotus.vit.saliency.watch`): ``readout``, ``attentions``, ``values``,
``features``, ``prefix``, ``has_class``. Read by the control: ``rng``.

Shapes: B batch, S side of an image in pixels, n patches, P prefix tokens, N = P + n, L blocks, D width, H heads,
V value dimensions a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def attention(readout: Tensor, prefix: int) -> Tensor:
    """What the last block's class token attends to, the mean over heads (EViT, 2202.07800: attentive token
    identification; Data-LTH, 2211.01484, asks such a model for its tickets).

    Args:
        readout: (B, H, N) the class token's row of the last block's attention
        prefix: P
    """
    return readout.mean(1)[:, prefix:]


def rollout(attentions: Sequence[Tensor], prefix: int, has_class: bool) -> Tensor:
    """Attention rollout (Abnar and Zuidema, 2005.00928): the product over blocks of (A + I) / 2, each A the
    mean over heads; the class token's row of it, or, without one, the mean row of the patches.

    From the last block down only a row is multiplied: n^2 and not n^3 a block.

    Args:
        attentions: L of (B, H, N, N)
        prefix: P
        has_class: whether the first of the P is the class token
    """
    last = attentions[-1]
    row = last.new_zeros(len(last), 1, last.shape[-1])
    if has_class:
        row[..., 0] = 1
    else:
        row[..., prefix:] = 1 / (last.shape[-1] - prefix)
    for matrix in reversed(attentions):
        row = (row @ matrix.mean(1) + row) / 2  # rows of (A + I) / 2 sum to 1 as they are
    return row[:, 0, prefix:]


def ats(readout: Tensor, values: Tensor, prefix: int) -> Tensor:
    """The last block's class attention weighted by the norm of what each patch would hand over: A_j |V_j| over the sum of
    all patches', summed over heads (ATS, 2111.15667: token scoring); here the mean over heads, which sums to 1.

    Args:
        readout: (B, H, N)
        values: (B, H, N, V) of the last block
        prefix: P
    """
    weighted = (readout * values.norm(dim=-1))[..., prefix:]  # (B, H, n)
    found: Tensor = (weighted / weighted.sum(-1, keepdim=True)).mean(1)
    return found


def token_norm(features: Tensor, prefix: int) -> Tensor:
    """Length of what the last block leaves at each patch, before the last norm: for models without a class token. Large
    ViTs store global things in few tokens of outlying length (2309.16588), and these then come first.

    Args:
        features: (B, N, D)
        prefix: P
    """
    found: Tensor = features.norm(dim=-1)[:, prefix:]
    return found


def contrast(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Local contrast: root mean square of the pixels' deviation from the patch's mean color. Needs no model.

    Args:
        images: (B, 3, S, S)
        patch: height and width of a patch in pixels
    """
    pieces = images.unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))  # (B, 3, rows, height, columns, width)
    found: Tensor = pieces.var((3, 5), correction=0).mean(1).sqrt().flatten(1)
    return found


def edges(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Edge energy: mean over the patch of the squared Sobel gradient, over channels. Needs no model; the border of the
    image is repeated beyond itself, so that it is no edge.

    Args:
        images: (B, 3, S, S)
        patch: height and width of a patch in pixels
    """
    smooth, slope = images.new_tensor([1, 2, 1]) / 4, images.new_tensor([-1, 0, 1]) / 2
    kernels = torch.stack([smooth[:, None] * slope, slope[:, None] * smooth])[:, None]  # (2, 1, 3, 3)
    gray = functional.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")  # (B 3, 1, S + 2, S + 2)
    energy = functional.conv2d(gray, kernels).square().sum(1, keepdim=True)
    found: Tensor = functional.avg_pool2d(energy, patch).unflatten(0, images.shape[:2]).mean(1).flatten(1)
    return found


def random(images: Tensor, patch: tuple[int, int], rng: torch.Generator | None) -> Tensor:
    """Any patch alike: the control.

    Args:
        images: (B, 3, S, S)
        patch: height and width of a patch, pixels
        rng: torch's own generator where None
    """
    count = (images.shape[-2] // patch[0]) * (images.shape[-1] // patch[1])
    return torch.rand(len(images), count, generator=rng, device=images.device)
