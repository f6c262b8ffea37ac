"""Images of another side than the model's own: positions are resampled in the forward pass, and nothing else changes.

The parameter of the positions keeps its shape and its name, and gets its gradient through the resampling (bicubic, class token
and registers left alone: timm's own ``dynamic_img_size``), so that an optimizer, ZeRO's shards, a checkpoint and an evaluation
at the model's own side notice nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lotus.vit import anatomy
from selection.errors import Refused


def why_not(model: nn.Module) -> str:
    """Why ``model`` cannot read another side than its own, in a sentence; empty where it can."""
    if fault := anatomy.why_not(model):
        return fault
    kind, vit = type(model).__name__, _loose(model)
    if anatomy.family(model) == "SwinTransformer":
        return f"{kind}: its windows are cut for one side."
    if any(block.table is not None for block in anatomy.blocks(model)):
        return f"{kind}: its tables of relative positions are made for one side."
    if getattr(vit, "rope", None) is not None and not vit.dynamic_img_size:
        return f"{kind}: its rotary positions are made for one side. Set model.args.dynamic_img_size=true."
    if not hasattr(vit, "dynamic_img_size"):
        return f"{kind}: its position embedding is made for one side."
    return ""


def check(model: nn.Module, side: int, *, place: str) -> None:
    """Refuse a side that ``model`` cannot read.

    Args:
        side: in pixels
        place: where the side is asked for

    Raises:
        Refused: by the model's kind, or since the side is no multiple of its patch.
    """
    if fault := why_not(model):
        raise Refused(f"{place}: {fault} Leave {place} out, or take a plain ViT (vit_*, deit*).")
    height, width = _loose(model).patch_embed.patch_size
    if side < 1 or side % height or side % width:
        patch = max(height, width)
        raise Refused(
            f"{place}: {side} pixels are no multiple of the patch, {height} x {width}. Take "
            f"{max(patch, round(side / patch) * patch)}."
        )


class AnySide:
    """Lets a model read images of any side that :func:`check` allows, until :meth:`remove`."""

    def __init__(self, model: nn.Module) -> None:
        vit = _loose(model)
        self._vit = None if vit.dynamic_img_size else vit
        self._set(True)

    def remove(self) -> None:
        """The model reads its own side alone, as before; may be called twice."""
        self._set(False)
        self._vit = None

    def _set(self, on: bool) -> None:
        if self._vit is None:
            return
        embed = self._vit.patch_embed
        self._vit.dynamic_img_size, embed.strict_img_size, embed.flatten = on, not on, not on
        embed.output_fmt = "NHWC" if on else "NCHW"


def _loose(model: Any) -> Any:
    """Without nn.Module's types of what it holds."""
    return model
