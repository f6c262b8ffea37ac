"""What attention may become: a bottleneck convolution over the patch grid, made of the attention's own value and output
weights (SPViT, He et al. 2021, 2111.11802, section 3.2; what the paper leaves open is as in its released code).

An attention whose head h puts all of its weight on the patch at offset k is, over the patches, a convolution: it adds up
W_o^h W_v^h x at that offset. So a convolution can be read out of an attention's weights: each offset k takes a mixture of the
heads, p[h, k] = softmax_h(Z[h, k] / alpha), and both sides of the bottleneck are mixed alike:

    V_k = sum_h p[h, k] W_v^h        y = sum_k V_k x(offset k) + sum_k sum_h p[h, k] b_v^h
    out = (sum_k sum_h p[h, k] W_o^h) ReLU(BatchNorm(y)) + b_o

The class token and registers are no pixels: they come out as they went in (normed, as attention reads them).

Shapes: B batch, N tokens, P prefix tokens, D width, H heads, d value dimensions a head, K offsets (9 or 1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KERNELS = (1, 3)
CENTER = 4
"""Of the nine offsets, row by row, the one that is none: all that a 1x1 convolution has."""
ALPHA = 1e-2
"""Temperature of the mixture, as published."""


class ConvAttention(nn.Module):
    """Stands where a block's attention stood."""

    def __init__(
        self,
        width: int,
        channels: int,
        kernel: int,
        grid: tuple[int, int],
        prefix: int,
        *,
        bias: bool = True,
        proj_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            channels: d of the bottleneck
            grid: patches down and across
            prefix: P, tokens before the patches
        """
        super().__init__()
        self.kernel, self.grid, self.prefix = kernel, (int(grid[0]), int(grid[1])), prefix
        where = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=bias, **where)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(channels, **where)  # type: ignore[arg-type]
        self.act = nn.ReLU()
        self.proj = nn.Linear(channels, width, bias=proj_bias, **where)  # type: ignore[arg-type]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("a convolution takes no attention mask: all patches must be there, in place")
        picture = x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)  # (B, D, h, w)
        seen = self.act(self.norm(self.conv(picture))).flatten(2).transpose(1, 2)  # (B, n, d)
        return torch.cat([x[:, : self.prefix], self.proj(seen)], 1)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, grid={self.grid}, prefix={self.prefix}"


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


def macs(patches: int, width: int, channels: int, kernel: int) -> int:
    """n D d (k^2 + 1): the kernel and the way back."""
    return patches * width * channels * (kernel**2 + 1)


def params(width: int, channels: int, kernel: int, *, bias: bool = True, proj_bias: bool = True) -> int:
    """Kernel, batch norm and output: k^2 D d + 2 d + d D, and biases."""
    return width * channels * (kernel**2 + 1) + (2 + bias) * channels + proj_bias * width
