"""What a block of timm's becomes where its classes cannot hold a cut: a block with one sublayer, a norm of which a part is read.

Parts keep timm's names and stay timm's own modules. B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_OF = {"attn": ("norm1", "ls1", "drop_path1"), "mlp": ("norm2", "ls2", "drop_path2")}


class OneSublayer(nn.Module):
    """What is left of a block whose attention or MLP is gone: x + the other sublayer of it."""

    def __init__(self, block: nn.Module, sublayer: str) -> None:
        """
        Args:
            block: timm's ``Block`` or ``ResPostBlock``; the parts that stay are taken over, not copied
            sublayer: ``attn`` or ``mlp``: the one that stays
        """
        super().__init__()
        self.sublayer = sublayer
        self.norm_after = norm_after(block)
        for name in (sublayer, *_OF[sublayer]):
            part = getattr(block, name, None)
            if part is not None:
                setattr(self, name, part)
        self.train(block.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D); the arguments are those of timm's blocks."""
        own: Any = self
        norm, scale, drop = (getattr(own, name, nn.Identity()) for name in _OF[self.sublayer])
        y = x if self.norm_after else norm(x)
        y = own.attn(y, attn_mask=attn_mask, is_causal=is_causal) if self.sublayer == "attn" else own.mlp(y)
        found: Tensor = x + drop(norm(y) if self.norm_after else scale(y))
        return found

    def extra_repr(self) -> str:
        return f"sublayer={self.sublayer}"


class Select(nn.Module):
    """A norm over the whole residual stream, of which only some channels are read on."""

    index: Tensor

    def __init__(self, norm: nn.Module, index: Sequence[int]) -> None:
        super().__init__()
        self.norm = norm
        # Not in the state dict: a spec holds it, checked, and the weights cannot contradict it. It has memory always.
        self.register_buffer("index", torch.tensor(list(index), device="cpu"), persistent=False)
        like = next(norm.parameters(), None)
        if like is not None and not like.is_meta:
            self.index = self.index.to(like.device)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, channels that are read)."""
        found: Tensor = self.norm(x).index_select(-1, self.index)
        return found

    def extra_repr(self) -> str:
        return f"reads={len(self.index)}"


def norm_after(block: nn.Module) -> bool:
    """Whether a block is post-norm: norms what its sublayers give, not what they read."""
    return block.norm_after if isinstance(block, OneSublayer) else type(block).__name__ == "ResPostBlock"


def sublayers(block: nn.Module) -> tuple[bool, bool]:
    """Whether a block has its attention, and its MLP."""
    return getattr(block, "attn", None) is not None, getattr(block, "mlp", None) is not None


def gone(model: nn.Module) -> tuple[int, ...]:
    """Blocks that were cut out of ``model`` as a whole, by the numbers that they had in the dense one."""
    told: Any = getattr(model, "lotus_gone", ())
    return tuple(told)


def places(model: Any) -> list[int]:
    """The number that each block of ``model`` had in the dense one."""
    missing = set(gone(model))
    blocks = sum(len(stage.blocks) for stage in model.layers) if hasattr(model, "layers") else len(model.blocks)
    return [number for number in range(blocks + len(missing)) if number not in missing]


def strip(model: Any, stays: Sequence[tuple[bool, bool]]) -> None:
    """Take sublayers out of ``model``, in place: for each block, whether its attention and its MLP stay.

    A block without either is gone from ``model.blocks``; what comes after it moves up.
    """
    kept, numbers = [], places(model)
    missing = set(gone(model))
    for number, block, (attn, mlp) in zip(numbers, model.blocks, stays, strict=True):
        attn, mlp = attn and sublayers(block)[0], mlp and sublayers(block)[1]
        if not attn and not mlp:
            missing.add(number)
        elif (attn, mlp) == sublayers(block):
            kept.append(block)
        else:
            kept.append(OneSublayer(block, "attn" if attn else "mlp"))
    model.blocks = nn.Sequential(*kept)
    model.lotus_gone = tuple(sorted(missing))


def strip_like(model: Any, other: Any) -> None:
    """Take out of a dense ``model``, in place, the sublayers and blocks that ``other`` lacks."""
    there = dict(zip(places(other), other.blocks, strict=True))
    stays = [sublayers(there[number]) if number in there else (False, False) for number in range(len(model.blocks))]
    strip(model, stays)
