"""What can be cut out of a ViT, and which slices go together.

timm's classes are recognized by their names, so that reading a model imports no timm. A class that merely inherits from
one of a block's parts may compute something else, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lotus.vit.attention import PackedGlu, SplitAttention
from lotus.vit.convolution import ConvAttention
from lotus.vit.parts import OneSublayer, Select, norm_after, sublayers
from selection.errors import Refused

SUPPORTED = (
    "timm's plain ViTs (vit_*, deit*, deit3*, beit3*), EVA and its kin (eva*, vit_*_rope_*, vit_pe_*, vit_*_dinov3*), BEiT (beit*) "
    "and Swin (swin_*); without gated, grouped or differential attention, parallel branches, mixed rotary positions, hybrid stems"
)

# Model -> its timm module and its blocks. What inherits from the model, but keeps its blocks, is of the family too.
FAMILIES = {
    "VisionTransformer": ("timm.models.vision_transformer", ("Block", "ResPostBlock")),
    "Eva": ("timm.models.eva", ("EvaBlock", "EvaBlockPostNorm")),
    "Beit": ("timm.models.beit", ("Block",)),
    "SwinTransformer": ("timm.models.swin_transformer", ("SwinTransformerBlock",)),
}
_ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope", "WindowAttention")
_MLPS = ("Mlp", "GluMlp", "SwiGLU")


class Dims(NamedTuple):
    """The widths of one block. A sublayer that is gone has no heads (of no dimensions), or no MLP units."""

    heads: int
    qk_dim: int
    """Query/key dimensions a head."""
    v_dim: int
    """Value dimensions a head: the attention's output is heads * v_dim wide."""
    hidden: int
    """MLP units."""
    attn_in: int | None = None
    """Channels of the residual stream that attention reads; None: all."""
    mlp_in: int | None = None
    """Channels of the stream that the MLP reads; None: all."""


@dataclass(frozen=True, eq=False)
class Block:
    """A transformer block of a model, by its parts. The parts are the model's own modules, not copies.

    Widths, biases and norms are the same however timm's class stores them. ``qkv`` and ``fc1`` are there where the block is
    open, as :func:`lotus.vit.families.opened` leaves it: one Linear each that is called as a module.
    """

    name: str
    """``"blocks.3"``: the third after the first, through all stages of a Swin."""
    module: nn.Module
    rotary: bool = False
    """Whether queries and keys are turned by their position: each pair of dimensions by an angle of its own."""

    @property
    def attn(self) -> Any:
        return self.module.attn

    @property
    def mlp(self) -> Any:
        return self.module.mlp

    @property
    def qkv(self) -> nn.Linear:
        """Rows: q of head 0, head 1, ..., then k, then v."""
        found: nn.Linear = self.attn.qkv
        return found

    @property
    def proj(self) -> nn.Linear:
        """Reads the attention's output: head 0's value dimensions, head 1's, ..."""
        found: nn.Linear = self.attn.proj
        return found

    @property
    def fc1(self) -> nn.Linear:
        """A row a unit; a gated MLP has two, F rows apart: of the half that is activated and of the other."""
        found: nn.Linear = self.mlp.fc1
        return found

    @property
    def fc2(self) -> nn.Linear:
        """Reads the hidden units, after the activation."""
        found: nn.Linear = self.mlp.fc2
        return found

    @property
    def kernel(self) -> int:
        """Side of the convolution that stands in place of the attention; 0 where none does."""
        attn = getattr(self.module, "attn", None)
        return attn.kernel if type(attn) is ConvAttention else 0

    @property
    def has_attn(self) -> bool:
        return sublayers(self.module)[0]

    @property
    def has_mlp(self) -> bool:
        return sublayers(self.module)[1]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Those of the sublayers that are there, by name; of an open block; where a convolution stands, its way back alone (``proj``)."""
        linears = {"qkv": self.qkv} if self.has_attn and not self.kernel else {}
        linears |= {"proj": self.proj} if self.has_attn else {}
        return linears | ({"fc1": self.fc1, "fc2": self.fc2} if self.has_mlp else {})

    @property
    def norm_after(self) -> bool:
        """Whether what a sublayer gives is normed, not what it reads."""
        return norm_after(self.module)

    def reads(self, sublayer: str) -> tuple[int, ...] | None:
        """The channels of the residual stream that ``attn`` or ``mlp`` reads, where those are not all; None where they are."""
        norm = getattr(self.module, "norm1" if sublayer == "attn" else "norm2", None)
        return tuple(norm.index.tolist()) if isinstance(norm, Select) else None

    @property
    def heads(self) -> int:
        if self.kernel:
            return 1
        return int(self.attn.num_heads) if self.has_attn else 0

    @property
    def head_dim(self) -> int:
        """Value dimensions a head, so that ``proj`` reads heads * head_dim."""
        return self.proj.in_features // self.heads if self.has_attn else 0

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized: their norm reads all dimensions of a head, so that all must stay."""
        if self.kernel:
            return False
        norms = (getattr(self.attn, name, None) if self.has_attn else None for name in ("q_norm", "k_norm"))
        return any(not isinstance(norm, (nn.Identity, type(None))) for norm in norms)

    @property
    def whole_qk(self) -> bool:
        """Whether all query/key dimensions must stay, and in their basis."""
        return self.has_attn and not self.kernel and (self.qk_norm or self.rotary)

    @property
    def hidden(self) -> int:
        return self.fc2.in_features if self.has_mlp else 0

    @property
    def width(self) -> int:
        """The embedding dimension: of the residual stream that the block reads and writes."""
        return self.proj.out_features if self.has_attn else self.fc2.out_features

    @property
    def dims(self) -> Dims:
        v_dim = self.head_dim
        rows = 0 if self.kernel else sum(linear.out_features for linear in self.projections)
        qk_dim = (rows // self.heads - v_dim) // 2 if self.has_attn and not self.kernel else 0
        reads = [None if (index := self.reads(sublayer)) is None else len(index) for sublayer in ("attn", "mlp")]
        return Dims(self.heads, qk_dim, v_dim, self.hidden, *reads)

    @property
    def projections(self) -> list[nn.Linear]:
        """qkv, or q, k and v where timm keeps them apart."""
        attn = self.attn if self.has_attn else None
        every = (getattr(attn, name, None) for name in ("qkv", "q_proj", "k_proj", "v_proj"))
        return [linear for linear in every if linear is not None]

    @property
    def glu(self) -> bool:
        """Whether the MLP is gated: a unit is an activated half times another (SwiGLU)."""
        return self.has_mlp and (is_timm(self.mlp, "GluMlp", "SwiGLU") or type(self.mlp) is PackedGlu)

    @property
    def units(self) -> list[nn.Linear]:
        """fc1, or its halves where timm keeps them apart."""
        return [self.mlp.fc1_g, self.mlp.fc1_x] if is_timm(self.mlp, "SwiGLU") else [self.mlp.fc1]

    @property
    def is_open(self) -> bool:
        if type(self.module) is OneSublayer:
            return True
        return len(self.projections) == len(self.units) == 1 and getattr(self.attn, "q_bias", None) is None

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether queries and values have a bias, and whether keys have one."""
        if getattr(self.attn, "q_bias", None) is not None:
            return True, False
        return self.projections[0].bias is not None, self.projections[len(self.projections) // 2].bias is not None

    def gamma(self, sublayer: str) -> Tensor | None:
        """LayerScale of ``attn`` or ``mlp``; timm keeps it in a module of its own, or in the block."""
        number = 1 if sublayer == "attn" else 2
        scale = getattr(getattr(self.module, f"ls{number}", None), "gamma", None)
        return getattr(self.module, f"gamma_{number}", None) if scale is None else scale

    def norm(self, sublayer: str) -> nn.Module | None:
        """The norm right before ``proj`` (``attn``) or ``fc2`` (``mlp``), where there is one (scale norm, sub-LN)."""
        norm = getattr(getattr(self.module, sublayer, None), "norm", None)
        return None if norm is None or isinstance(norm, nn.Identity) else norm

    @property
    def table(self) -> Tensor | None:
        """Relative positions, (distances, H): what is added to the logits of each head."""
        return getattr(self.attn, "relative_position_bias_table", None) if self.has_attn else None


def blocks(model: nn.Module, *, convolved: bool = False) -> list[Block]:
    """The blocks, in order.

    Args:
        model: A plain ViT, or one of a family that opens as one.
        convolved: Blocks may have a convolution for an attention (:mod:`lotus.vit.convolution`): they have no ``qkv``.

    Raises:
        Refused: the model, or a part of a block, is none that can be cut; names it and what is supported.
    """
    supported(model, convolved=convolved)
    rotary = getattr(model, "rope", None) is not None
    return [Block(f"blocks.{i}", module, rotary) for i, module in enumerate(_modules(model))]


def sites(model: nn.Module, *, in_channels: bool = False) -> dict[str, nn.Linear]:
    """Where gates multiply: ``"blocks.3.attn"`` -> proj, ``"blocks.3.mlp"`` -> fc2; a gate acts on that Linear's input.

    Args:
        model: as :func:`blocks` takes it
        in_channels: also ``"blocks.3.attn_in"`` -> qkv, ``"blocks.3.mlp_in"`` -> fc1: the four sites of VTP (2104.08500).

    Raises:
        Refused: as :func:`blocks`; with ``in_channels``, post-norm blocks.
    """
    if in_channels:
        plain(model, "in_channels")
    sites: dict[str, nn.Linear] = {}
    for block in blocks(model):
        if in_channels and block.norm_after:
            raise Refused(
                f"{block.name}: is post-norm, so none of what its sublayers read can be left out (in_channels). "
                "Turn that off."
            )
        for there, sublayer, reads, writes in (
            (block.has_attn, "attn", "qkv", "proj"),
            (block.has_mlp, "mlp", "fc1", "fc2"),
        ):
            if there and in_channels:
                sites[f"{block.name}.{sublayer}_in"] = getattr(block, reads)
            if there:
                sites[f"{block.name}.{sublayer}"] = getattr(block, writes)
    return sites


def supported(model: nn.Module, *, convolved: bool = False) -> None:
    """Refuse a model that cannot be cut.

    Raises:
        Refused: names the model's class, the part that stands in the way, and what is supported.
    """
    if fault := why_not(model, convolved=convolved):
        raise Refused(fault)


def why_not(model: nn.Module, *, convolved: bool = False) -> str:
    """Why ``model`` cannot be cut, as :func:`supported` tells it; empty where it can."""
    fault = _fault(model, convolved)
    return f"{type(model).__name__}: {fault}. Supported: {SUPPORTED}." if fault else ""


def plain(model: nn.Module, what: str) -> None:
    """Refuse a model of another family than the plain ViTs, for what knows no other.

    Raises:
        Refused: names ``what`` and the family.
    """
    if not is_vit(model):
        raise Refused(f"{what}: is for timm's plain ViTs (vit_*, deit*, deit3*), not for {type(model).__name__}.")


def is_timm(module: object, *names: str) -> bool:
    """Whether ``module`` is exactly one of timm's classes called ``names``."""
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith("timm.")


def is_vit(model: object) -> bool:
    """Whether ``model`` is timm's VisionTransformer or inherits from it."""
    return family(model) == "VisionTransformer"


def family(model: object) -> str:
    """The model of :data:`FAMILIES` that ``model`` is or inherits from; empty where it is none."""
    for kind in type(model).__mro__:
        if kind.__name__ in FAMILIES and FAMILIES[kind.__name__][0] == kind.__module__:
            return kind.__name__
    return ""


def _modules(model: Any) -> list[nn.Module]:
    """The blocks, through all stages."""
    return (
        [block for stage in model.layers for block in stage.blocks] if hasattr(model, "layers") else list(model.blocks)
    )


def _fault(model: Any, convolved: bool = False) -> str:
    """Why ``model`` cannot be cut; empty when it can."""
    kind = family(model)
    if not kind:
        return "is of no family that can be cut"
    if not is_timm(model.patch_embed, "PatchEmbed"):
        return f"patch_embed is {type(model.patch_embed).__name__}, not one linear PatchEmbed"
    pool = getattr(model, "attn_pool", None)
    if pool is not None and not is_timm(pool, "AttentionPoolLatent"):
        return f"attn_pool is {type(pool).__name__}"
    if getattr(model, "rope_mixed", False):
        return "each head turns by angles of its own (mixed rotary positions)"
    if getattr(model, "rel_pos_bias", None) is not None:
        return "its blocks share one table of relative positions"
    if not all(is_timm(stage, "SwinTransformerStage") for stage in getattr(model, "layers", ())):
        return "a stage is no SwinTransformerStage"
    every = _modules(model)
    if not every:
        return "has no blocks"
    seen: set[int] = set()
    for i, block in enumerate(every):
        fault = _block_fault(block, FAMILIES[kind][1], convolved)
        if fault:
            return f"blocks.{i}{fault}"
        weights = {id(weight) for weight in block.parameters()}
        if weights & seen:
            return f"blocks.{i} shares weights with an earlier block"
        seen |= weights
    return ""


def _block_fault(block: Any, kinds: tuple[str, ...], convolved: bool = False) -> str:
    if not (is_timm(block, *kinds) or type(block) is OneSublayer):
        return f" is {type(block).__name__}"
    has_attn, has_mlp = sublayers(block)
    return (_attn_fault(block.attn, convolved) if has_attn else "") or (_mlp_fault(block.mlp) if has_mlp else "")


def _attn_fault(attn: Any, convolved: bool) -> str:
    if type(attn) is ConvAttention:
        if not convolved:
            return ".attn became a convolution, which is not cut or read as attention is"
        return "" if type(attn.proj) is nn.Linear else f".attn.proj is {type(attn.proj).__name__}, not nn.Linear"
    if not (is_timm(attn, *_ATTENTIONS) or type(attn) is SplitAttention):
        return f".attn is {type(attn).__name__}"
    if getattr(attn, "gate", None) is not None:
        return ".attn is gated"
    if getattr(attn, "num_kv_groups", 1) != 1:
        return ".attn shares keys and values between heads"
    return _parts_fault(attn, "attn", ("qkv", "q_proj", "k_proj", "v_proj", "proj"))


def _mlp_fault(mlp: Any) -> str:
    if not (is_timm(mlp, *_MLPS) or type(mlp) is PackedGlu):
        return f".mlp is {type(mlp).__name__}"
    return _parts_fault(mlp, "mlp", ("fc1", "fc1_g", "fc1_x", "fc2"))


def _parts_fault(owner: Any, where: str, names: tuple[str, ...]) -> str:
    norm = getattr(owner, "norm", None)
    if (
        not isinstance(norm, (nn.Identity, type(None)))
        and not is_timm(norm, *_NORMS)
        and type(norm) is not nn.LayerNorm
    ):
        return f".{where} has a norm of a kind that is not known ({type(norm).__name__})"
    for name in names:
        linear = getattr(owner, name, None)
        # exactly nn.Linear: a parametrized, quantized or LoRA layer computes with more than its weight
        if linear is not None and type(linear) is not nn.Linear:
            return f".{where}.{name} is {type(linear).__name__}, not nn.Linear"
    return ""


_NORMS = ("LayerNorm", "LayerNormFp32", "RmsNorm", "SimpleNorm")


def hooked(model: nn.Module) -> str:
    """The first Linear of a block's sublayers that carries a forward hook, by name; empty where none does."""
    for block in blocks(model):
        owners = (getattr(block.module, name, None) for name in ("attn", "mlp"))
        for name, linear in (pair for owner in owners if owner is not None for pair in owner.named_modules()):
            if isinstance(linear, nn.Linear) and (linear._forward_pre_hooks or linear._forward_hooks):
                return f"{block.name}: {name}"
    return ""
