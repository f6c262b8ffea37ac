"""The blocks of a model, compiled by torch."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_blocks(model: nn.Module) -> list[nn.Module]:
    """Compile block by block, which is quick since they are alike, and leaves names and hooks where they are."""
    blocks = getattr(model, "blocks", None)
    parts = list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else [model]
    for part in parts:
        part.compile()
    return parts


def release_blocks(parts: Iterable[nn.Module]) -> None:
    """As before :func:`compile_blocks`."""
    for part in parts:
        part._compiled_call_impl = None
