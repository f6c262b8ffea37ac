"""The convolution that an attention's own value and output weights make (SPViT, He et al. 2021, 2111.11802, section 3.2; what the
paper leaves open is as in its released code).

An attention whose head h puts all of its weight on the patch at offset k is, over the patches, a convolution: it adds up
W_o^h W_v^h x at that offset. So a convolution can be read out of an attention's weights: each offset k takes a mixture of the
heads, p[h, k] = softmax_h(Z[h, k] / alpha), and both sides of the bottleneck are mixed alike:

    V_k = sum_h p[h, k] W_v^h        y = sum_k V_k x(offset k) + sum_k sum_h p[h, k] b_v^h
    out = (sum_k sum_h p[h, k] W_o^h) ReLU(BatchNorm(y)) + b_o

Shapes: D width, H heads, d value dimensions a head, K offsets (9 or 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

CENTER = 4
"""Of the nine offsets, row by row, the one that is none: all that a 1x1 convolution has."""
ALPHA = 1e-2
"""Temperature of the mixture, as published."""


def mixture(scores: Tensor, kernel: int) -> Tensor:
    """(H, 9) scores Z -> (H, K) parts of the heads in each offset of the kernel."""
    parts = (scores / ALPHA).softmax(0)
    return parts if kernel == 3 else parts[:, CENTER : CENTER + 1]


def combined(
    qkv: Tensor, bias: Tensor | None, proj: Tensor, parts: Tensor, v_dim: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The kernel (d, D, k, k), its bias (d,) and the output's weight (D, d) that attention's weights make.

    Args:
        qkv: (H (2 Q + d), D), of which the last H d rows are the values'
        bias: of ``qkv``
        proj: (D, H d)
        parts: (H, K), see :func:`mixture`
        v_dim: d
    """
    heads, offsets = parts.shape
    side = round(offsets**0.5)
    values = qkv[-heads * v_dim :].unflatten(0, (heads, v_dim))  # (H, d, D)
    kernel = torch.einsum("hk,hdi->dik", parts, values).unflatten(2, (side, side))
    out = torch.einsum("hk,ohd->od", parts, proj.unflatten(1, (heads, v_dim)))
    if bias is None:
        return kernel, None, out
    return kernel, torch.einsum("hk,hd->d", parts, bias[-heads * v_dim :].unflatten(0, (heads, v_dim))), out
