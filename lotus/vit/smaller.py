"""A smaller ViT of the same kind: what a cut has to be compared with, and what takes its place where it is as good.

Of the same depth, patches and MLP ratio, but narrower. Heads keep their dimensions where fewer of them come near the budget;
else there are as many heads, each of fewer dimensions. The width is a multiple of the heads in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lotus.config import Model
from lotus.vit import anatomy
from lotus.vit.cost import count
from lotus.vit.model import build
from selection.errors import Refused

NEAR = 0.9
"""Fraction of the budget that fewer heads of the old dimensions have to use up, or the heads become thinner."""


def narrower(model: Model, keep: float, *, place: str = "model") -> Model:
    """The ViT of at most ``keep`` of ``model``'s MACs (an image, ten classes) that comes nearest, to train from scratch.

    Args:
        keep: fraction of the MACs, in (0, 1]
        place: where ``model`` stands in the config

    Returns:
        ``model`` with other ``embed_dim`` and ``num_heads``, without weights of anybody's.

    Raises:
        Refused: it is no plain ViT, whose width is one number; no width is within the budget; says the least.
    """
    plain = model.model_copy(update={"pretrained": False, "weights": ""})
    dense: Any = build(plain.name, plain.args, meta=True, place=place)
    if not anatomy.is_vit(dense):
        raise Refused(
            f"{place}.name: {plain.name} has no one width that could be narrowed. Take a plain ViT, e.g. vit_tiny_patch16_224."
        )
    heads, width = dense.blocks[0].attn.num_heads, dense.embed_dim
    budget, head_dim = keep * count(dense).macs, width // heads

    def args(width: int, heads: int) -> dict[str, Any]:
        return {**plain.args, "embed_dim": width, "num_heads": heads}

    def macs(made: Mapping[str, Any]) -> int:
        return count(build(plain.name, made, meta=True, place=place)).macs

    fewer = _most(lambda h: macs(args(h * head_dim, h)), heads, budget)
    thinner = _most(lambda d: macs(args(d * heads, heads)), head_dim, budget)
    found = [args(fewer * head_dim, fewer)] if fewer else []
    found += [args(thinner * heads, heads)] if thinner else []
    if not found:
        least = macs(args(heads, heads)) / count(dense).macs
        raise Refused(f"{place}: no width of {plain.name} is within {keep:g} of its MACs; the least is {least:.4f}.")
    near = next((one for one in found[:1] if macs(one) >= NEAR * budget), None)
    return plain.model_copy(update={"args": near or max(found, key=macs)})


def _most(macs: Callable[[int], int], most: int, budget: float) -> int:
    """The largest number from 1 to ``most`` whose MACs, which rise with it, are within ``budget``; 0 where none is."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if macs(middle) <= budget + 0.5 else (low, middle - 1)
    return low
