"""Models that have shapes and no memory: to be looked at before they are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def without_memory() -> Iterator[None]:
    """Models made here have shapes but no memory (meta device)."""
    with torch.device("meta"), _Numbers():
        yield


_FILLS = {
    getattr(Tensor, name)
    for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "div_", "clamp_", "zero_", "fill_")
}
"""What draws a model's start, in place."""


class _Numbers(TorchFunctionMode):
    """Older timm (1.0.20) reads the rates of stochastic depth back from a tensor, which must then have values. A start that
    nobody will see is not drawn: torch's bookkeeping of it would be most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args and args[0].is_meta:
            return args[0]
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)
