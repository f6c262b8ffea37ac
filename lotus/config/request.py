"""What to prune, and how far: the request, which travels whole from each door to where it is met.

``lotus run`` reads it as the section ``prune`` of a config, ``lotus prune --model`` from ``prune.NAME=VALUE``, and
:func:`lotus.prune` from its keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lotus.config.marks import Mark, marked
from lotus.config.section import BriefMethod, Fraction, Method, MethodOf, Section
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
    """Single weights that do not become zero: the budget of ways that cut no dimension."""
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
    metric: str = "divergence"
    """How far a cut model is from the trained one, of lotus/pruning/metrics.py: mean KL divergence in nats, rise of the loss in
    nats, or the fraction of the images that it decides otherwise (agreement). Or one of your own."""
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
    compare: BriefMethod | None = None
    """A rival to measure beside what is found, e.g. ``cp_vit`` (docs/papers.md); null: none."""


class Prune(Section):
    """Which dimensions stay."""

    method: BriefMethod = Method(name="structured")
    """structured: dimensions are cut out by scores, and the model is smaller and faster. Or another way by its name, with its own
    settings beside it: one of a published system (docs/papers.md), or of your own."""
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
    min_keep: Annotated[Fraction | None, Mark.BY_SCORES] = None
    """A sublayer that stays keeps at least this fraction of its heads, of their dimensions and of its MLP units, rounded up to
    ``round``, so that no layer becomes the bottleneck of all; null: one head, and ``round`` of the others."""
    exclude: Annotated[tuple[str, ...], Mark.BY_SCORES] = ()
    """Blocks or sublayers that stay whole: names or patterns, e.g. ``["blocks.0", "*.attn"]``. Then ``embed_dim: auto`` keeps all
    channels, since a smaller embedding dimension narrows every block; a number given for it does so."""
    in_channels: bool = False
    """Channels that attention and the MLP read may go too; the residual stream keeps its embedding dimension, and an
    index_select takes the rest."""
    sublayers: bool | None = None
    """Whether whole attention and MLP sublayers, and blocks, may go; null: only where units alone cannot meet the budget."""
    embed_dim: Fraction | Literal["auto", "search"] | None = "auto"
    """Fraction of the embedding dimension (the residual stream's channels) that stays, the rest being turned out of the way;
    search: try 1 to 0.375 and take what agrees best with the dense model; auto: the same one after the other, while all
    channels are not good enough and fewer are better (all of them with search, sizes, in_channels, sublayers or a budget of latency); null: all."""
    compensate: Literal["none", "mean", "affine", "denoised"] = "affine"
    """What the cut units carried is folded into the rest: not at all, their mean, their best affine prediction, or (denoised) that
    by the covariance without its noise (OB2C, 2608.17657)."""
    calibration: int | None = Field(None, ge=1)
    """Training images (of the ticket) on which scores and statistics are measured; null: 2,048, of large images 512."""
    latency_batch: int = Field(64, ge=1)
    """The batch at which ``keep.latency`` counts."""
    search: Annotated[Search | None, Mark.BY_SCORES] = None
    """Try how much of attention and of the MLPs should stay; null: scores alone decide."""
    sizes: Annotated[tuple[Fraction, ...], Mark.BY_SCORES] = ()
    """More budgets (fractions of the MACs, or of the latency where that is kept) to write beside ``prune/``, as
    ``prune-0.35/``: each size is within the next larger one. They are not fine-tuned."""

    @model_validator(mode="before")
    @classmethod
    def _without_a_budget(cls, raw: Any) -> Any:
        """An allowed drop is a target of its own: beside it the default budget stands for nothing. What stays whole is not narrowed."""
        if isinstance(raw, Mapping) and raw.get("exclude") and raw.get("embed_dim", "auto") == "auto":
            raw = {**raw, "embed_dim": None}
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
    def embed_fraction(self) -> float:
        """The fraction of the embedding dimension that stays whatever a search or sizes do to the rest: those
        take no ``auto``."""
        return self.embed_dim if isinstance(self.embed_dim, float) else 1.0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is to be cut: everything stays, and no search or further size is asked for."""
        fixed = self.embed_dim in (None, "auto", 1)
        return set(self.keep.asked.values()) == {1} and fixed and not self.search and not self.sizes

    @property
    def by_scores(self) -> str:
        """The settings that a cut by scores alone meets, those that are set, in words."""
        return ", ".join(name for name in marked(type(self), Mark.BY_SCORES) if getattr(self, name))

    @property
    def more_sizes(self) -> list[dict[str, float]]:
        """The budgets of ``sizes``, the largest first."""
        what = "macs" if self.keep.latency is None else "latency"
        return [{what: part} for part in sorted(self.sizes, reverse=True)]
