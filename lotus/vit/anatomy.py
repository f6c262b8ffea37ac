"""What can be cut out of a ViT, and which slices go together.

timm's classes are recognised by their names, so that reading a model imports no timm. A class that merely inherits from
one of a block's parts may compute something else, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lotus.vit.attention import SplitAttention
from selection.errors import Refused

SUPPORTED = (
    "plain timm ViTs (vit_*, deit*, deit3*): class token or none, registers, LayerScale, token, average or map pooling, "
    "distilled heads, qk-norm; without scale norms, gated attention, rotary or relative positions"
)


class Dims(NamedTuple):
    """The widths of one block."""

    heads: int
    qk_dim: int
    """Query/key dimensions a head."""
    v_dim: int
    """Value dimensions a head: the attention's output is heads * v_dim wide."""
    hidden: int
    """MLP units."""


@dataclass(frozen=True, eq=False)
class Block:
    """A transformer block of a model, by its parts. The parts are the model's own modules, not copies."""

    name: str
    """``"blocks.3"``."""
    module: nn.Module

    @property
    def attn(self) -> Any:
        return self.module.attn

    @property
    def mlp(self) -> Any:
        return self.module.mlp

    @property
    def qkv(self) -> nn.Linear:
        """Rows: q of head 0, head 1, ..., then k, then v."""
        return self.attn.qkv

    @property
    def proj(self) -> nn.Linear:
        """Reads the attention's output: head 0's value dimensions, head 1's, ..."""
        return self.attn.proj

    @property
    def fc1(self) -> nn.Linear:
        return self.mlp.fc1

    @property
    def fc2(self) -> nn.Linear:
        """Reads the hidden units, after the activation."""
        return self.mlp.fc2

    @property
    def heads(self) -> int:
        return int(self.attn.num_heads)

    @property
    def head_dim(self) -> int:
        """Value dimensions a head, so that ``proj`` reads heads * head_dim."""
        return self.proj.in_features // self.heads

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised: their norm reads all dimensions of a head, so that all must stay."""
        return not isinstance(self.attn.q_norm, nn.Identity) or not isinstance(self.attn.k_norm, nn.Identity)

    @property
    def hidden(self) -> int:
        return self.fc2.in_features

    @property
    def dims(self) -> Dims:
        v_dim = self.head_dim
        return Dims(self.heads, (self.qkv.out_features // self.heads - v_dim) // 2, v_dim, self.hidden)


def blocks(model: nn.Module) -> list[Block]:
    """The blocks, in order.

    Raises:
        Refused: the model, or a part of a block, is none that can be cut; names it and what is supported.
    """
    supported(model)
    every: Any = model.blocks
    return [Block(f"blocks.{i}", module) for i, module in enumerate(every)]


def sites(model: nn.Module) -> dict[str, nn.Linear]:
    """Where gates multiply: ``"blocks.3.attn"`` -> proj, ``"blocks.3.mlp"`` -> fc2; a gate acts on that Linear's input.

    Raises:
        Refused: as :func:`blocks`.
    """
    found: dict[str, nn.Linear] = {}
    for block in blocks(model):
        found[f"{block.name}.attn"] = block.proj
        found[f"{block.name}.mlp"] = block.fc2
    return found


def supported(model: nn.Module) -> None:
    """Refuse a model that cannot be cut.

    Raises:
        Refused: names the model's class, the part that stands in the way, and what is supported.
    """
    fault = _fault(model)
    if fault:
        raise Refused(f"{type(model).__name__}: {fault}. Supported: {SUPPORTED}.")


def is_timm(module: object, *names: str) -> bool:
    """Whether ``module`` is exactly one of timm's classes called ``names``."""
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith("timm.")


def is_vit(model: object) -> bool:
    """Whether ``model`` is timm's VisionTransformer or inherits from it."""
    return any(
        kind.__name__ == "VisionTransformer" and kind.__module__ == "timm.models.vision_transformer"
        for kind in type(model).__mro__
    )


def _fault(model: Any) -> str:
    """Why ``model`` cannot be cut; empty when it can."""
    if not is_vit(model):
        return "is no plain timm Vision Transformer"
    if not is_timm(model.patch_embed, "PatchEmbed"):
        return f"patch_embed is {type(model.patch_embed).__name__}, not one linear PatchEmbed"
    pool = getattr(model, "attn_pool", None)
    if pool is not None and not is_timm(pool, "AttentionPoolLatent"):
        return f"attn_pool is {type(pool).__name__}"
    if not len(model.blocks):
        return "has no blocks"
    seen: set[int] = set()
    for i, block in enumerate(model.blocks):
        fault = _block_fault(block)
        if fault:
            return f"blocks.{i}{fault}"
        weights = {id(weight) for weight in block.parameters()}
        if weights & seen:
            return f"blocks.{i} shares weights with an earlier block"
        seen |= weights
    return ""


def _block_fault(block: Any) -> str:
    if not is_timm(block, "Block", "ResPostBlock"):
        return f" is {type(block).__name__}"
    attn, mlp = block.attn, block.mlp
    if not (is_timm(attn, "Attention") or type(attn) is SplitAttention):
        return f".attn is {type(attn).__name__}"
    if not isinstance(getattr(attn, "norm", _IDENTITY), nn.Identity):
        return ".attn has a norm on the attention's output (norm)"
    if getattr(attn, "gate", None) is not None:
        return ".attn is gated"
    if not is_timm(mlp, "Mlp"):
        return f".mlp is {type(mlp).__name__}"
    if not isinstance(getattr(mlp, "norm", _IDENTITY), nn.Identity):
        return ".mlp has a norm before fc2"
    for owner, where in ((attn, "attn"), (mlp, "mlp")):
        for name in ("qkv", "proj") if where == "attn" else ("fc1", "fc2"):
            linear = getattr(owner, name, None)
            # exactly nn.Linear: a parametrised, quantised or LoRA layer computes with more than its weight
            if type(linear) is not nn.Linear:
                return f".{where}.{name} is {type(linear).__name__}, not nn.Linear"
    return ""


_IDENTITY = nn.Identity()
