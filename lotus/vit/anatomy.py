"""What can be cut out of a ViT, and which slices go together.

timm's classes are recognised by their names, so that reading a model imports no timm. A class that merely inherits from
one of a block's parts may compute something else, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lotus.vit.attention import SplitAttention
from lotus.vit.parts import OneBranch, Select, branches, norm_after
from selection.errors import Refused

SUPPORTED = (
    "plain timm ViTs (vit_*, deit*, deit3*): class token or none, registers, LayerScale, token, average or map pooling, "
    "distilled heads, qk-norm; without scale norms, gated attention, rotary or relative positions"
)


class Dims(NamedTuple):
    """The widths of one block. A branch that is gone has no heads (of no dimensions), or no MLP units."""

    heads: int
    qk_dim: int
    """Query/key dimensions a head."""
    v_dim: int
    """Value dimensions a head: the attention's output is heads * v_dim wide."""
    hidden: int
    """MLP units."""
    attn_in: int | None = None
    """Channels of the stream that attention reads; None: all."""
    mlp_in: int | None = None
    """Channels of the stream that the MLP reads; None: all."""


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
    def has_attn(self) -> bool:
        return branches(self.module)[0]

    @property
    def has_mlp(self) -> bool:
        return branches(self.module)[1]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Those of the branches that are there, by name."""
        found = {"qkv": self.qkv, "proj": self.proj} if self.has_attn else {}
        return found | ({"fc1": self.fc1, "fc2": self.fc2} if self.has_mlp else {})

    @property
    def width(self) -> int:
        """D: channels of the stream."""
        return self.proj.out_features if self.has_attn else self.fc2.out_features

    @property
    def norm_after(self) -> bool:
        """Whether what a branch gives is normed, not what it reads."""
        return norm_after(self.module)

    def reads(self, branch: str) -> tuple[int, ...] | None:
        """The channels of the stream that ``attn`` or ``mlp`` reads, where those are not all; None where they are."""
        norm = getattr(self.module, "norm1" if branch == "attn" else "norm2", None)
        return tuple(norm.index.tolist()) if isinstance(norm, Select) else None

    @property
    def heads(self) -> int:
        return int(self.attn.num_heads) if self.has_attn else 0

    @property
    def head_dim(self) -> int:
        """Value dimensions a head, so that ``proj`` reads heads * head_dim."""
        return self.proj.in_features // self.heads if self.has_attn else 0

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised: their norm reads all dimensions of a head, so that all must stay."""
        if not self.has_attn:
            return False
        return not isinstance(self.attn.q_norm, nn.Identity) or not isinstance(self.attn.k_norm, nn.Identity)

    @property
    def hidden(self) -> int:
        return self.fc2.in_features if self.has_mlp else 0

    @property
    def dims(self) -> Dims:
        v_dim = self.head_dim
        qk_dim = (self.qkv.out_features // self.heads - v_dim) // 2 if self.has_attn else 0
        reads = [None if (index := self.reads(branch)) is None else len(index) for branch in ("attn", "mlp")]
        return Dims(self.heads, qk_dim, v_dim, self.hidden, *reads)


def blocks(model: nn.Module) -> list[Block]:
    """The blocks, in order.

    Raises:
        Refused: the model, or a part of a block, is none that can be cut; names it and what is supported.
    """
    supported(model)
    every: Any = model.blocks
    return [Block(f"blocks.{i}", module) for i, module in enumerate(every)]


def sites(model: nn.Module, *, inputs: bool = False) -> dict[str, nn.Linear]:
    """Where gates multiply: ``"blocks.3.attn"`` -> proj, ``"blocks.3.mlp"`` -> fc2; a gate acts on that Linear's input.

    Args:
        inputs: also ``"blocks.3.attn_in"`` -> qkv, ``"blocks.3.mlp_in"`` -> fc1: the four sites of VTP (2104.08500).

    Raises:
        Refused: as :func:`blocks`; with ``inputs``, blocks that norm what their branches give.
    """
    found: dict[str, nn.Linear] = {}
    for block in blocks(model):
        if inputs and block.norm_after:
            raise Refused(
                f"{block.name}: norms what its branches give, so none of what they read can be left out (inputs). "
                "Turn train.sparsity.inputs and prune.inputs off."
            )
        of = block.linears
        names = {"attn_in": "qkv", "attn": "proj", "mlp_in": "fc1", "mlp": "fc2"}
        for site, name in names.items():
            if name in of and (inputs or not site.endswith("_in")):
                found[f"{block.name}.{site}"] = of[name]
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
    if not (is_timm(block, "Block", "ResPostBlock") or type(block) is OneBranch):
        return f" is {type(block).__name__}"
    has_attn, has_mlp = branches(block)
    return (_attn_fault(block.attn) if has_attn else "") or (_mlp_fault(block.mlp) if has_mlp else "")


def _attn_fault(attn: Any) -> str:
    if not (is_timm(attn, "Attention") or type(attn) is SplitAttention):
        return f".attn is {type(attn).__name__}"
    if not isinstance(getattr(attn, "norm", _IDENTITY), nn.Identity):
        return ".attn has a norm on the attention's output (norm)"
    if getattr(attn, "gate", None) is not None:
        return ".attn is gated"
    return _linear_fault(attn, "attn", "qkv", "proj")


def _mlp_fault(mlp: Any) -> str:
    if not is_timm(mlp, "Mlp"):
        return f".mlp is {type(mlp).__name__}"
    if not isinstance(getattr(mlp, "norm", _IDENTITY), nn.Identity):
        return ".mlp has a norm before fc2"
    return _linear_fault(mlp, "mlp", "fc1", "fc2")


def _linear_fault(owner: Any, where: str, *names: str) -> str:
    for name in names:
        linear = getattr(owner, name, None)
        # exactly nn.Linear: a parametrised, quantised or LoRA layer computes with more than its weight
        if type(linear) is not nn.Linear:
            return f".{where}.{name} is {type(linear).__name__}, not nn.Linear"
    return ""


_IDENTITY = nn.Identity()
