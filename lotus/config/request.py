"""What to prune, and how far: the request, which travels whole from each door to where it is met.

``lotus run`` reads it as the section ``prune`` of a config, ``lotus prune --model`` from ``prune.NAME=VALUE``, and
:func:`lotus.prune` from its keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lotus.config.section import Fraction, Method, MethodOf, Section
from selection.errors import Refused


class Keep(Section):
    """The budget after the cut, each a fraction of the dense model's. At least one; weights stand alone."""

    macs: Fraction | None = None
    """Multiply-accumulates an image."""
    params: Fraction | None = None
    """Parameters."""
    latency: Fraction | None = None
    """Milliseconds of a forward pass over ``prune.latency_batch`` images on the device that prunes, from a table that is
    measured there."""
    weights: Fraction | None = None
    """Single weights of the list ``prune.weights`` that do not become zero: the budget of unstructured pruning."""
    gates: Fraction | None = None
    """Scored units of all sites together, whatever they cost: for ``scope: threshold``."""

    @property
    def asked(self) -> dict[str, float]:
        """The budgets that are set."""
        return {name: part for name in type(self).model_fields if (part := getattr(self, name)) is not None}


class Search(Section):
    """How much of attention and of the MLPs stays, found by trying (docs/pruning.md)."""

    kind: Literal["ratios", "blocks"] = "ratios"
    """ratios: one for all attention, one for all MLPs (Feng et al. 2023); blocks: one for each of each block."""
    drop: float | None = Field(None, gt=0)
    """Cut as far as ``metric`` is at most this, with no budget beside it; null: to ``prune.keep``, with the least of it."""
    metric: Literal["divergence", "loss", "agreement"] = "divergence"
    """How far a cut model is from the trained one: mean KL divergence in nats, rise of the loss in nats, or the fraction of the
    images that it decides otherwise."""
    images: int = Field(2048, ge=1)
    """Held-out training images on which that is measured: of those that the ticket left out, where there are enough."""
    grid: int = Field(8, ge=0, le=10)
    """ratios: points an axis of the coarse grid (0, 0.1, ... of the MACs go); 0: no grid."""
    levels: int = Field(4, ge=1)
    """blocks: widths at which each attention and each MLP is tried alone."""
    rounds: int = Field(1, ge=1)
    """Cut in so many rounds, each within the one before, scored anew."""
    recovery: int = Field(0, ge=0)
    """Optimizer steps of training between two rounds, by ``finetune``'s recipe with its teacher; a small ticket is gone
    through as often as that takes."""
    compare: tuple[Fraction, ...] = ()
    """Also measure CP-ViT with these fixed ratios: the fraction of the heads, and of the patches, that stays."""


class Convolve(Section):
    """Attention that may become convolution, chosen by gates that train (SPViT, 2111.11802)."""

    epochs: int = Field(10, ge=1)
    """Epochs of the search, from the trained model; its weights are thrown away afterwards."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate of the weights in the search."""
    gate_lr: float = Field(1e-3, gt=0)
    """Learning rate of the gates (Adam, no weight decay)."""
    strength: float = Field(30.0, gt=0)
    """Lambda of lambda (prune.keep.macs - open MACs)^2, MACs as fractions of the dense model's. The paper tunes it until this
    is a little above the cross-entropy at the start."""


class Soup(Section):
    """Instant soup (2306.10460): masks of copies that looked ahead, joined. It trains by ``finetune``'s recipe."""

    step: float = Field(0.1, gt=0, lt=1)
    """Fraction of the weights left that a round lets go."""
    rounds: int = Field(10, ge=1)
    """Rounds at most; they end as soon as less than 5 % of all weights are still to go, which then go by magnitude."""
    train: Fraction = 0.1
    """Fraction of the ticket that the model is trained on before each round, and before the last weights go."""
    copies: int = Field(5, ge=1)
    """Copies that look ahead in a round."""
    steps: int = Field(50, ge=1)
    """Optimizer steps that a copy looks ahead."""
    data: Fraction = 0.1
    """Fraction of the ticket that a copy draws its images from."""
    vary: float = Field(2.0, ge=1)
    """A copy's learning rate and weight decay lie within this factor of the recipe's."""


class Prune(Section):
    """Which dimensions stay, or which single weights."""

    method: Literal["structured", "unstructured", "soup"] = "structured"
    """structured: dimensions are cut out, and the model is smaller and faster. unstructured: the smallest weights become
    zeros, and no MAC is saved. soup: the same, by masks that look ahead."""
    keep: Keep = Keep(macs=0.5)
    """The budget: hit within one rounding step, or refused."""
    criterion: MethodOf = Method(name="fisher")
    """A criterion of lotus/pruning/criteria.py."""
    scope: Literal["global", "per_type", "threshold", "uniform"] = "global"
    """global: all units compete by score a MAC; per_type: heads, head dimensions and MLP units each among themselves; threshold:
    one threshold for the scores of all sites (VTP); uniform: every block keeps the same widths, MLP units going first, so that
    timm alone can load what is left."""
    round: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """MLP units and head dimensions stay a multiple of this; auto: the smallest of 4 to 64 at which this device is fast, by
    measurement at ``latency_batch``."""
    rotate: bool = True
    """Turn each head's dimensions into those of which the first few carry the most (whitened SVD) before any is cut."""
    decouple_qk: bool = False
    """Let a block keep more value than query/key dimensions, or fewer. timm's own attention cannot hold that; LOTUS' does."""
    in_channels: bool = False
    """Channels that attention and the MLP read may go too; the residual stream keeps its embedding dimension, and an index_select takes the rest."""
    sublayers: bool | None = None
    """Whether whole attention and MLP sublayers, and blocks, may go; null: only where units alone cannot meet the budget."""
    embed_dim: Fraction | Literal["auto", "search"] | None = "auto"
    """Fraction of the residual stream's channels (the embedding dimension) that stays, the rest being turned out of the way; search: try 1 to 0.375 and take what
    agrees best with the dense model; auto: the same one after the other, while all channels are not good enough and fewer are
    better (all of them with search, convolve, sizes, in_channels, sublayers or a budget of latency); null: all."""
    compensate: Literal["none", "mean", "affine"] = "affine"
    """What the cut units carried is folded into the rest: not at all, their mean, or their best affine prediction."""
    calibration: int | None = Field(None, ge=1)
    """Training images (of the ticket) on which scores and statistics are measured; null: 2,048, of large images 512."""
    latency_batch: int = Field(64, ge=1)
    """The batch at which ``keep.latency`` counts."""
    weights: Literal["linears", "sparse_vit"] = "linears"
    """unstructured, soup: which weights may become zero: the blocks' matrices, or also patch embedding, norms and classifier."""
    pattern: str = ""
    """unstructured: keep N of every M neighbors, e.g. ``2:4``, instead of the largest of all."""
    soup: Soup = Soup()
    """How the soup is cooked."""
    sweep: bool = False
    """unstructured, soup: also measure the trained model at sparsities from 0 to 90 %, to see where accuracy breaks."""

    search: Search | None = None
    """Try how much of attention and of the MLPs should stay; null: scores alone decide."""
    convolve: Convolve | None = None
    """Let attention become 1x1 or 3x3 convolution; null: it stays attention. Gates choose, not ``criterion``."""
    sizes: tuple[Fraction, ...] = ()
    """More budgets (fractions of the MACs, or of the latency where that is kept) to write beside ``prune/``, as ``prune-0.35/``: each size is within the next larger
    one. They are not fine-tuned."""

    @model_validator(mode="before")
    @classmethod
    def _without_a_budget(cls, raw: Any) -> Any:
        """An allowed drop is a target of its own: beside it the default budget stands for nothing."""
        asks = raw.get("search") if isinstance(raw, Mapping) else None
        drop = isinstance(asks, Mapping) and asks.get("drop") is not None
        return {"keep": {"macs": 1.0}, **raw} if drop else raw

    def at(self, keep: Mapping[str, float], **changes: Any) -> Prune:
        """The same at another budget, and with ``changes``, which are taken to go with the rest."""
        return self.model_copy(update={"keep": Keep(**keep), **changes})

    @property
    def multiple(self) -> int:
        """What widths stay a multiple of.

        Raises:
            Refused: it is ``auto`` still, which is a measurement.
        """
        if self.round == "auto":
            raise Refused("prune.round: auto is measured on a model's device. Give a whole number here, e.g. 8.")
        return self.round

    @property
    def part_of_pattern(self) -> float:
        """N / M of ``pattern``."""
        n, _, m = self.pattern.partition(":")
        return int(n) / int(m)

    @property
    def embed_fraction(self) -> float:
        """The fraction of the channels that stays whatever a search, convolutions or sizes do to the rest: those take no ``auto``."""
        return self.embed_dim if isinstance(self.embed_dim, float) else 1.0

    @property
    def more_sizes(self) -> list[dict[str, float]]:
        """The budgets of ``sizes``, the largest first."""
        what = "macs" if self.keep.latency is None else "latency"
        return [{what: part} for part in sorted(self.sizes, reverse=True)]
