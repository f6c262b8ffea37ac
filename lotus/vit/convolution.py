"""What attention may become: a bottleneck convolution over the patch grid (lotus/papers/spvit), as a saved model holds it.

    out = W_o ReLU(BatchNorm(conv(x))) + b_o

The class token and registers are no pixels: they come out as they went in (normed, as attention reads them).

Shapes: B batch, N tokens, P prefix tokens, D width, d channels of the bottleneck.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KERNELS = (1, 3)


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
        self.proj = nn.Linear(channels, width, bias=proj_bias, **where)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("a convolution takes no attention mask: all patches must be there, in place")
        picture = x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)  # (B, D, h, w)
        seen = self.act(self.norm(self.conv(picture))).flatten(2).transpose(1, 2)  # (B, n, d)
        return torch.cat([x[:, : self.prefix], self.proj(seen)], 1)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, grid={self.grid}, prefix={self.prefix}"


def macs(patches: int, width: int, channels: int, kernel: int) -> int:
    """n D d (k^2 + 1): the kernel and the way back."""
    return patches * width * channels * (kernel**2 + 1)


def params(width: int, channels: int, kernel: int, *, bias: bool = True, proj_bias: bool = True) -> int:
    """Kernel, batch norm and output: k^2 D d + 2 d + d D, and biases."""
    return width * channels * (kernel**2 + 1) + (2 + bias) * channels + proj_bias * width
