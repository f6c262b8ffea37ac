"""Every knob of a run on one page, and the strict reader.

A config is YAML; ``key=value`` on the command line overrides it (``train.lr=3e-4 select.pick=ccs``). A name that is not
here is refused with its place and the nearest right one. A config may come from elsewhere: it can only choose among
methods by name, never run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from selection.errors import Refused
from selection.lottery import DEFAULT_PICK, DEFAULT_SCORE
from selection.memory import gigabytes
from selection.methods import nearest

# One part that stays, in (0, 1]: the one word for every budget.
Fraction = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


def _is_number(annotation: Any) -> bool:
    """Whether numbers, and no truth values, go into a setting."""
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return all(type(value) is int for value in inside)
    return annotation in (int, float) or (
        typing.get_origin(annotation) is not dict and any(_is_number(part) for part in inside)
    )


class Section(BaseModel):
    """A part of the page: typed, strict, unchangeable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _before(cls, value: Any, info: ValidationInfo) -> Any:
        """A truth value is no number, and options without a name are for the default method."""
        field = cls.model_fields[str(info.field_name)]
        members = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(member, bool) for member in members) and _is_number(field.annotation):
            raise ValueError("expected a number")
        if isinstance(field.default, Method) and isinstance(value, Mapping) and "name" not in value:
            return {"name": field.default.name, **value}
        return value


class Method(Section):
    """A method of a shelf by name, with its options: ``ccs`` or ``{name: ccs, bins: 20}``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _method(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


MethodOf = Annotated[Method, BeforeValidator(_method)]


class Redraw(Method):
    """A lottery redrawn each epoch: ``rs2``, ``{name: rs2, keep: 0.3}`` or ``{name: infobatch, saving: 0.3}``."""

    keep: Fraction | None = None
    """Part of the images in an epoch, for a method that reads a budget: null is a half. Others find their own number."""


RedrawBy = Annotated[Redraw, BeforeValidator(_method)]


class Data(Section):
    """Which images, and how they lie on disk."""

    name: str = "imagefolder"
    """A data set of the catalog: digits, cifar10, cifar100, npz, imagefolder, or ``hf:NAME``."""
    path: str = ""
    """Where the images lie: a folder or an .npz. Empty for digits."""
    options: dict[str, Any] = {}
    """What the catalog's function may be told, e.g. ``val_fraction: 0.2``."""
    write: Literal["raw", "jpg", "smart", "proportion"] = "smart"
    """How pixels are stored: raw (fast, large), jpg, smart (JPEG only above ``smart_threshold`` bytes), or a mix of both."""
    max_side: int = Field(256, ge=0)
    """Longest side of a stored image, in pixels; 0 keeps every image as it is."""
    jpeg_quality: int = Field(90, ge=1, le=100)
    """Quality of stored JPEGs."""
    smart_threshold: int = Field(16384, ge=0)
    """With ``write: smart``, images of more raw bytes than this are stored as JPEG."""
    jpeg_share: float = Field(0.5, ge=0, le=1)
    """With ``write: proportion``, the part of the images that is stored as JPEG."""
    damaged: Literal["fatal", "skip"] = "fatal"
    """An image that cannot be read ends the run with its path, or is skipped and counted."""
    folder: str = ""
    """Where train.beton and val.beton go; empty: ``data/`` in the run's folder. Runs may share one."""
    loader: Literal["auto", "ffcv", "torch"] = "auto"
    """auto takes FFCV where it is installed, else the plain torch loader, with a warning."""
    workers: int = Field(0, ge=0)
    """Threads that decode; 0: as many as this process may use."""


class Model(Section):
    """The ViT."""

    name: str = "deit_tiny_patch16_224"
    """A timm model name."""
    args: dict[str, Any] = {}
    """Arguments for timm.create_model: ``img_size``, ``patch_size``, ``embed_dim``, ``depth``, ``num_heads``, ..."""
    pretrained: bool = False
    """Start from timm's published weights (needs a network or a local cache)."""
    weights: str = ""
    """A .safetensors file, or a folder written by LOTUS, to start from."""
    pos_embed_std: float | None = Field(None, gt=0)
    """Standard deviation at which position embeddings start; timm's own is 0.02. Tiny images want more (0.2)."""
    patch_embed_init: Literal["timm", "xavier"] = "timm"
    """How the patch embedding starts."""


class Augment(Section):
    """What happens to a training image. All parameters are a pure function of (seed, epoch, image index)."""

    crop: Literal["none", "pad", "resized"] = "none"
    """none: resize to the model's size; pad: shift by up to ``pad`` pixels; resized: random-resized crop."""
    pad: int = Field(4, ge=1)
    """Pixels of padding for ``crop: pad`` (filled with the image's mean colour of the data set)."""
    scale: tuple[float, float] = (0.25, 1.0)
    """Area of a random-resized crop, as a part of the image's."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio (width over height) of a random-resized crop."""
    flip: bool = False
    """Mirror half of the images."""

    @model_validator(mode="after")
    def _ranges(self) -> Augment:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale must be two numbers with 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("ratio must be two numbers with 0 < low <= high")
        return self


class Joint(Section):
    """A joint budget of images and patches: images of a high ``select.score`` get more patches, the others fewer."""

    buckets: int = Field(3, ge=2)
    """Numbers of patches that there are, evenly from ``least`` to all. A batch has images of one bucket alone."""
    least: Fraction | None = None
    """Part of its patches that the easiest image keeps; null: half of ``keep``."""


class Patches(Section):
    """Which patches of an image a training goes through: fewer tokens, so that a step takes less time."""

    mode: Literal["input", "evit", "tome", "cumulative", "dropout"] = "evit"
    """input: those of the highest ``score`` enter the model (Data-LTH); evit: the class token's attention chooses, inside
    the model, at the blocks ``at``; tome: the most alike are merged, in every block; cumulative: attention summed over queries, heads and
    blocks so far chooses, in the later blocks (CP-ViT); dropout: any, by chance (the control)."""
    keep: Fraction = 0.7
    """input, dropout: part of the patches that enters. evit: part that stays at each block of ``at``. tome: tokens that
    the average block's MLP sees, as a part of the patches. cumulative: part that is left after the last block."""
    at: tuple[int, ...] = ()
    """evit: blocks (from 0) in which patches leave, between attention and MLP; empty: at 1/4, 1/2 and 3/4 of the depth,
    which is 3, 6 and 9 of 12."""
    fuse: bool = True
    """evit: what leaves becomes one token, weighted by attention, instead of nothing."""
    score: MethodOf = Method(name="contrast")
    """input: a score of lotus/vit/patch_scores.py: higher = keep first."""
    model: str = ""
    """input: a folder written by LOTUS: the model that is asked where ``score`` reads one; or ``baseline``, the run's own
    dense model. Each training image is shown to it once; its scores are then cropped and mirrored as the pixels are."""
    cached: bool = False
    """input: likewise score each stored image once where ``score`` reads the image alone, instead of what augmentation and
    mixing made of it in every epoch. A random ticket is then the same in every epoch."""
    joint: Joint | None = None
    """Share the patches out among the images by their score, the mean being ``keep``; null: as many of each image."""
    evaluate: Literal["dense", "sparse"] = "dense"
    """Whether the model is measured on all patches, or on as few as it was trained on."""
    warmup: float = Field(0, ge=0, lt=1)
    """Part of the training that goes through all patches first."""
    ramp: float = Field(0, ge=0, le=1)
    """Part of the training, after the warm-up, in which what stays falls to ``keep``, along a cosine."""

    @model_validator(mode="after")
    def _fits(self) -> Patches:
        if self.mode == "dropout" and self.evaluate == "sparse":
            raise ValueError("dropout drops patches in training alone; evaluate: dense")
        if self.warmup + self.ramp > 1:
            raise ValueError("warmup and ramp are parts of the training, together at most 1")
        if self.mode != "evit" and (self.at or not self.fuse):
            raise ValueError(f"at and fuse are settings of evit, not of {self.mode}")
        if self.mode != "input" and (self.model or self.cached):
            raise ValueError(f"model and cached are settings of input, not of {self.mode}")
        if self.joint is not None:
            if self.keep == 1:
                raise ValueError("joint shares out what is left at a keep below 1")
            if (self.joint.least or 0) >= self.keep:
                raise ValueError(f"joint.least is below keep, the mean, which is {self.keep:g}")
        return self


class Recipe(Section):
    """How a model is trained. The same for the dense baseline, the lottery's training, the probe and the fine-tune."""

    epochs: int = Field(20, ge=1)
    """Times that the rows of the ticket are gone through."""
    batch_size: int = Field(128, ge=1)
    """Images an optimiser step: all ranks and accumulation together."""
    accumulate: int = Field(1, ge=1)
    """Parts in which a rank goes through its share of a batch, to save memory."""
    optimizer: str = "adamw"
    """A timm optimiser name."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate, at this batch size."""
    schedule: Literal["cosine", "onecycle"] = "cosine"
    """cosine: a linear warm-up, then half a cosine down to ``min_lr``. onecycle: torch's OneCycleLR, up along half a cosine
    from lr / 25 within ``warmup_epochs``, down to lr / 250000, momentum moving against it from 0.95 to 0.85 and back."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = Field(2, ge=0)
    """Epochs of linear warm-up; may be a fraction."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled; not on biases, norms, class token and position embeddings."""
    layer_decay: Fraction = 1.0
    """Each block towards the input learns this much slower than the next."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing."""
    mixup: float = Field(0, ge=0)
    """Mixup's alpha; 0: off."""
    cutmix: float = Field(0, ge=0)
    """CutMix' alpha; 0: off."""
    drop_path: float = Field(0, ge=0, lt=1)
    """Stochastic depth, rising to this rate at the last block."""
    ema: float = Field(0, ge=0, lt=1)
    """Decay of the moving average of the weights; 0: off. Where on, the average is what is evaluated and kept."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights."""
    augment: Augment = Augment()
    """What happens to the training images."""
    patches: Patches | None = None
    """Train on a part of each image's patches; null: on all. The baseline sees all of them always, and so
    does the probe where it is not set there."""
    evaluate_every: int = Field(1, ge=0)
    """Epochs between evaluations; 0: only after the last."""
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage. 1 skips a step that is not finite; 2 and 3 are for models that do not fit."""
    deepspeed: str = ""
    """A DeepSpeed JSON of your own, merged over ours; ``"auto"`` in it means ours."""
    compile: bool = False
    """torch.compile the blocks (ZeRO 0 and 1)."""
    save_minutes: float = Field(10, gt=0)
    """Minutes between checkpoints inside an epoch; one is always written at the end of an epoch."""


class EarlyBird(Section):
    """End the search once the mask that the gates draw at the budget hardly changes any more (2020, 1909.11957)."""

    epsilon: float = Field(0.1, gt=0, le=1)
    """Largest part of the gates in which the masks of two successive epochs may differ."""
    epochs: int = Field(5, ge=1)
    """Successive epochs in which that has to hold."""


class Attention(Section):
    """A penalty on attention probabilities while training."""

    kind: Literal["log", "entropy"] = "log"
    """log: log(1 + a^2), as Sparse-ViT has it, which spreads attention; entropy: which makes it sparse."""
    strength: float = Field(0.01, ge=0)
    """Lambda: what it counts in the loss."""
    layers: Literal["last", "all"] = "all"
    """Which blocks are penalised; published is the last alone."""


class Sparsity(Section):
    """Gates that training drives to zero, on attention outputs and MLP units."""

    gates: bool = True
    """Learn gates while training. Needed by ``prune.criterion: gate``."""
    inputs: bool = False
    """Also gate what attention and the MLP read of the stream: VTP's four sites a block. For ``prune.inputs``."""
    penalty: Literal["proximal", "subgradient"] = "proximal"
    """How L1 acts: a proximal step reaches exact zeros, a subgradient (the papers' way) does not."""
    strength: float = Field(1e-3, ge=0)
    """Lambda: where it starts, or where it stays with ``steer: false``."""
    steer: bool = True
    """Steer lambda so that the open gates' MACs approach ``prune.keep.macs``."""
    lr: float = Field(2e-2, gt=0)
    """Learning rate of the gates (Adam, no weight decay). Times the steps after ``start`` it should be 2 or more: a gate
    goes from 1 to 0 by steps of at most about this."""
    start: float = Field(0.25, ge=0, lt=1)
    """Part of training before the penalty sets in."""
    early_bird: EarlyBird | None = None
    """End the training early, when the masks have settled; null: all epochs."""
    attention: Attention | None = None
    """Also penalise attention; null: not."""


class Train(Recipe):
    """The lottery's training."""

    sparsity: Sparsity = Sparsity()
    """Sparsity regularisation while training."""
    redraw: RedrawBy | None = None
    """A lottery of selection/dynamic.py that draws each epoch's images out of the ticket; null: all of it, every epoch."""


class Finetune(Recipe):
    """The recovery after the cut. What is not set here is as in ``train``, but for epochs, lr and warm-up."""

    epochs: int = Field(10, ge=0)
    """0: no fine-tuning."""
    distill: Literal["none", "soft", "hard"] = "soft"
    """The unpruned model teaches: its softened probabilities, its decisions, or not at all."""
    temperature: float = Field(2.0, gt=0)
    """Softening of both sides for ``distill: soft``."""
    teacher_weight: float = Field(0.7, ge=0, le=1)
    """Part of the loss that comes from the teacher; the labels have the rest."""


class Subsets(Section):
    """Probes on random parts of the images, which ``select.score: memorization`` reads (Feldman and Zhang 2020)."""

    runs: int = Field(10, ge=2)
    """How many. The paper has thousands; few are noisy."""
    part: float = Field(0.7, gt=0, lt=1)
    """Part of the images that each trains on, drawn over all classes; every image is in some runs and out of others."""
    record: Literal["probability", "correct"] = "probability"
    """What each run says of every image at its end: the probability of its label, or, as the paper has it, whether it was
    right, which takes more runs."""

    @model_validator(mode="after")
    def _settles(self) -> Subsets:
        least = math.ceil(1 / min(self.part, 1 - self.part) - 1e-6)
        if self.runs < least:
            raise ValueError(
                f"{self.runs} runs on {self.part:g} leave images that are in all or in none; {least} do not"
            )
        return self


class Score(Recipe):
    """The probe: a short training, or linear heads on frozen features, watched. What is not set here is as in ``train``,
    without augmentation, mixing or stochastic depth. A linear probe takes nothing from ``train`` but ``precision``."""

    probe: Literal["train", "linear"] = "train"
    """train: a short training of the whole model. linear: its weights stay, every image goes through it once, and linear
    heads learn from the features."""
    model: Annotated[Model, BeforeValidator(_method)] | None = None
    """What is probed: any timm model, by name or with ``model``'s settings; null: the run's. Without a name it is the run's
    with what is set here, e.g. ``score.model.weights=FILE``."""
    side: int = Field(0, ge=0)
    """Side in pixels of the images that it sees, where it reads any size; 0: that of the run's model."""
    epochs: int = Field(5, ge=1)
    """Epochs that the probe trains and is recorded. Linear: 20."""
    seeds: int = Field(2, ge=1)
    """Short trainings, each from another start; their signals stand side by side."""
    heads: int = Field(4, ge=1)
    """Heads of a linear probe, trained at once: each has its own start and order of images, as ``seeds`` have."""
    subsets: Subsets | None = None
    """Further probes on random parts of the images, e.g. ``{runs: 10}``; null: none."""
    gradients: bool = True
    """Also record the last layer's gradients and how predictions move, which tdds, cal, craig, grad_match and glister read:
    2 bytes an image and class in signals.npz, twice that in memory meanwhile. Turn off for many images of many classes."""

    @model_validator(mode="after")
    def _fits(self) -> Score:
        if self.probe != "linear":
            for name in _BLURS:
                if getattr(self, name):
                    raise ValueError(f"{name}: an image is scored by what is said of it as it is. Remove it")
            return self
        if self.optimizer not in LINEAR_OPTIMIZERS:
            raise ValueError(f"the heads of a linear probe take optimizer {' or '.join(LINEAR_OPTIMIZERS)}")
        fields = Score.model_fields
        for name in _OF_IMAGES:
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is a setting of a training; a linear probe sees each image once. Remove it")
        return self


_BLURS = ("mixup", "cutmix", "drop_path")
"""What stands between an image and what the model says of it."""

LINEAR_OPTIMIZERS = ("adamw", "sgd")
"""Those that move each number by itself, so that heads that are trained at once do not meet."""

_OF_IMAGES = (
    "accumulate",
    "augment",
    "compile",
    "cutmix",
    "deepspeed",
    "drop_path",
    "ema",
    "layer_decay",
    "mixup",
    "patches",
)

# A few thousand steps on features whose every dimension has mean 0 and variance 1.
_LINEAR: dict[str, Any] = {
    "epochs": 20, "batch_size": 256, "lr": 5e-3, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.0, "clip": 0,
    "smoothing": 0.0,
}  # fmt: skip


class Select(Section):
    """Which images train: the ticket."""

    score: MethodOf = Method(name=DEFAULT_SCORE)
    """A score of selection/scores.py: higher = keep first."""
    pick: MethodOf = Method(name=DEFAULT_PICK)
    """A policy of selection/pickers.py."""
    keep: Fraction = 1.0
    """Part of the images that stays."""
    balance: bool = True
    """Keep the same part of every class."""
    floor: Fraction | None = None
    """With ``balance: false``: the part of what balance would give it that each class keeps at least. null: classes may vanish."""
    max_memory: Annotated[float, Field(gt=0)] | None = None
    """GB that score and picker may take (``4GB``, ``500MB``): what needs more is refused with the figure, or takes a way that needs
    less. null: 0.5 for matrices of similarities, no limit else."""
    start: str = ""
    """A ticket (.npz) whose images all stay; the picker adds to them."""
    ticket: str = ""
    """A ticket made elsewhere (.npz); then nothing is scored."""

    @field_validator("max_memory", mode="before")
    @classmethod
    def _gigabytes(cls, value: Any) -> Any:
        return gigabytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _floor(self) -> Select:
        if self.floor is not None and self.balance:
            raise ValueError("floor is for classes that are not balanced: set balance=false, or leave floor out")
        return self


class Keep(Section):
    """The budget after the cut, each a part of the dense model's. At least one; weights stand alone."""

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
    """Scored units of all sites together, whatever they cost: for ``rank: quantile``."""

    @model_validator(mode="after")
    def _one(self) -> Keep:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError("say macs, params or latency, or several, e.g. keep: {macs: 0.5}")
        return self


class Search(Section):
    """How much of attention and of the MLPs stays, found by trying (docs/pruning.md)."""

    kind: Literal["ratios", "blocks"] = "ratios"
    """ratios: one for all attention, one for all MLPs (Feng et al. 2023); blocks: one for each of each block."""
    drop: float | None = Field(None, gt=0)
    """Cut as far as ``metric`` is at most this, with no budget beside it; null: to ``prune.keep``, with the least of it."""
    metric: Literal["divergence", "loss", "agreement"] = "divergence"
    """How far a cut model is from the trained one: mean KL divergence in nats, rise of the loss in nats, or the part of the
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
    """Optimiser steps of training between two rounds, by ``finetune``'s recipe with its teacher; a small ticket is gone
    through as often as that takes."""
    compare: tuple[Fraction, ...] = ()
    """Also measure CP-ViT with these fixed ratios: the part of the heads, and of the patches, that stays."""


class Convolve(Section):
    """Attention that may become convolution, chosen by gates that train (SPViT, 2111.11802)."""

    epochs: int = Field(10, ge=1)
    """Epochs of the search, from the trained model; its weights are thrown away afterwards."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate of the weights in the search."""
    gate_lr: float = Field(1e-3, gt=0)
    """Learning rate of the gates (Adam, no weight decay)."""
    strength: float = Field(30.0, gt=0)
    """Lambda of lambda (prune.keep.macs - open MACs)^2, MACs as parts of the dense model's. The paper tunes it until this
    is a little above the cross-entropy at the start."""


class Soup(Section):
    """Instant soup (2306.10460): masks of copies that looked ahead, joined. It trains by ``finetune``'s recipe."""

    step: float = Field(0.1, gt=0, lt=1)
    """Part of the weights left that a round lets go."""
    rounds: int = Field(10, ge=1)
    """Rounds at most; they end as soon as less than 5 % of all weights are still to go, which then go by magnitude."""
    train: Fraction = 0.1
    """Part of the ticket that the model is trained on before each round, and before the last weights go."""
    copies: int = Field(5, ge=1)
    """Copies that look ahead in a round."""
    steps: int = Field(50, ge=1)
    """Optimiser steps that a copy looks ahead."""
    data: Fraction = 0.1
    """Part of the ticket that a copy draws its images from."""
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
    rank: Literal["pool", "kind", "quantile", "uniform"] = "pool"
    """pool: all units compete by score a MAC; kind: heads, head dimensions and MLP units each among themselves; quantile:
    one threshold for the scores of all sites (VTP); uniform: every block keeps the same widths, MLP units going first, so that
    timm alone can load what is left."""
    round: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """MLP units and head dimensions stay a multiple of this; auto: the smallest of 4 to 64 at which this device is fast, by
    measurement at ``latency_batch``."""
    rotate: bool = True
    """Turn each head's dimensions into those of which the first few carry the most (whitened SVD) before any is cut."""
    split: bool = False
    """Let a block keep more value than query/key dimensions, or fewer. timm's own attention cannot hold that; LOTUS' does."""
    inputs: bool = False
    """Channels that attention and the MLP read may go too; the stream keeps its width, and an index_select takes the rest."""
    branches: bool | None = None
    """Whether whole attention and MLP branches, and blocks, may go; null: only where units alone cannot meet the budget."""
    width: Fraction | Literal["auto", "search"] | None = "auto"
    """Part of the stream's channels that stays, the rest being turned out of the way; search: try 1 to 0.375 and take what
    agrees best with the dense model; auto: the same one after the other, while all channels are not good enough and fewer are
    better (all of them with search, convolve, sizes, inputs, branches or a budget of latency); null: all."""
    compensate: Literal["none", "mean", "affine"] = "affine"
    """What the cut units carried is folded into the rest: not at all, their mean, or their best affine prediction."""
    calibration: int | None = Field(None, ge=1)
    """Training images (of the ticket) on which scores and statistics are measured; null: 2,048, of large images 512."""
    latency_batch: int = Field(64, ge=1)
    """The batch at which ``keep.latency`` counts."""
    weights: Literal["linears", "sparse_vit"] = "linears"
    """unstructured, soup: which weights may become zero: the blocks' matrices, or also patch embedding, norms and classifier."""
    pattern: str = ""
    """unstructured: keep N of every M neighbours, e.g. ``2:4``, instead of the largest of all."""
    soup: Soup = Soup()
    """How the soup is cooked."""
    sweep: bool = False
    """unstructured, soup: also measure the trained model at sparsities from 0 to 90 %, to see where accuracy breaks."""

    search: Search | None = None
    """Try how much of attention and of the MLPs should stay; null: scores alone decide."""
    convolve: Convolve | None = None
    """Let attention become 1x1 or 3x3 convolution; null: it stays attention. Gates choose, not ``criterion``."""
    sizes: tuple[Fraction, ...] = ()
    """More budgets (parts of the MACs, or of the latency where that is kept) to write beside ``prune/``, as ``prune-0.35/``: each size is within the next larger
    one. They are not fine-tuned."""

    @model_validator(mode="before")
    @classmethod
    def _without_a_budget(cls, raw: Any) -> Any:
        """An allowed drop is a target of its own: beside it the default budget stands for nothing."""
        asks = raw.get("search") if isinstance(raw, Mapping) else None
        drop = isinstance(asks, Mapping) and asks.get("drop") is not None
        return {"keep": {"macs": 1.0}, **raw} if drop else raw

    @model_validator(mode="after")
    def _fits(self) -> Prune:
        structured = self.method == "structured"
        if structured and self.keep.weights is not None:
            raise ValueError("keep.weights is the budget of unstructured pruning: set method, or keep: {macs: 0.5}")
        if not structured and set(self.keep.model_dump(exclude_none=True)) != {"weights"}:
            raise ValueError(
                f"{self.method} pruning keeps a part of the weights: say keep={{weights: 0.7}} and nothing else"
            )
        if structured and self.sweep:
            raise ValueError("sweep is a setting of unstructured pruning and of soup")
        if self.pattern and self.method != "unstructured":
            raise ValueError("pattern is a setting of unstructured pruning")
        if self.pattern:
            n, _, m = self.pattern.partition(":")
            if not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
                raise ValueError("pattern is N:M, e.g. 2:4, which keeps 2 of every 4")
            if self.keep.weights != int(n) / int(m):
                raise ValueError(
                    f"pattern {self.pattern} keeps {int(n) / int(m):g} of the weights: say keep={{weights: {int(n) / int(m):g}}}"
                )
        if self.keep.gates is not None and self.rank != "quantile":
            raise ValueError("keep.gates is a budget of rank: quantile alone")
        others = self.inputs or self.branches or self.width not in (None, "auto")
        if self.keep.latency is not None and (others or self.split or self.rank != "pool"):
            raise ValueError(
                "keep.latency is predicted for heads, their dimensions and MLP units alone: with rank: pool, and without split, "
                "inputs, branches and width"
            )
        self._refuse_two_ways()
        return self

    @property
    def stream(self) -> float:
        """The part of the channels that stays whatever a search, convolutions or sizes do to the rest: those take no ``auto``."""
        return self.width if isinstance(self.width, float) else 1.0

    @property
    def more_sizes(self) -> list[dict[str, float]]:
        """The budgets of ``sizes``, the largest first."""
        what = "macs" if self.keep.latency is None else "latency"
        return [{what: part} for part in sorted(self.sizes, reverse=True)]

    def _refuse_two_ways(self) -> None:
        """Refuse settings of two ways to choose what stays."""
        ways = [name for name in ("search", "convolve", "sizes") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(
                "search and convolve are two ways to choose; set one of them"
                if ways[:2] == ["search", "convolve"]
                else "sizes are drawn by scores alone, without search or convolve"
            )
        if not ways:
            return
        (way,) = ways
        if self.method != "structured":
            raise ValueError(f"{way} cuts dimensions: set method: structured, or leave {way} out")
        if way == "convolve" and set(self.keep.model_dump(exclude_none=True)) != {"macs"}:
            raise ValueError("convolve aims at a budget in macs: set keep.macs, and nothing else")
        if self.rank != "pool":
            raise ValueError(f"{way} goes with rank: pool; leave rank or {way} out")
        if (
            self.search is not None
            and self.search.drop is not None
            and set(self.keep.model_dump().values()) != {1, None}
        ):
            raise ValueError(
                "search.drop and keep are two targets: set keep.macs=1 (or leave keep out), or search.drop=null"
            )
        if way == "convolve" and self.width not in (None, "auto"):
            raise ValueError("convolve keeps the stream's width; leave width or convolve out")
        if self.width not in (None, "auto") and self.inputs and self.criterion.name == "gate":
            raise ValueError(
                "width turns the stream, and learned gates of inputs belong to its channels; leave one out"
            )
        if self.width == "search":
            without = f"prune.{way}={'[]' if way == 'sizes' else 'null'}"
            raise ValueError(
                f"width: search is a search of its own; give width a number, or leave {way} out ({without})"
            )
        if way != "sizes" and (self.inputs or self.branches):
            what = "inputs" if self.inputs else "branches"
            raise ValueError(f"{way} chooses among heads, dimensions and MLP units; leave {what} or {way} out")
        if way == "convolve" and self.split:
            raise ValueError("convolve cuts MLP units alone; leave split or convolve out")


class Export(Section):
    """What leaves the house."""

    onnx: bool = True
    """Write model.onnx where the extra ``onnx`` is installed; parity is checked."""
    latency_batch: int = Field(64, ge=1)
    """The large batch at which latency is measured, beside batch 1."""


class Config(Section):
    """A run."""

    name: str = ""
    """The run's name; empty: the config file's."""
    folder: str = ""
    """The run's folder; empty: ``runs/NAME``."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Everything random follows from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    baseline: bool = True
    """Also train the dense model on all images by ``train``'s recipe, to compare with."""
    tensorboard: bool = False
    """Also write TensorBoard files under ``tensorboard/`` in the run's folder (extra ``tensorboard``)."""
    data: Data = Data()
    model: Model = Model()
    score: Score = Score()
    select: Select = Select()
    train: Train = Train()
    prune: Prune = Prune()
    finetune: Finetune = Finetune()
    export: Export = Export()

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        """score and finetune take from ``train`` what they do not set themselves."""
        if not isinstance(raw, Mapping):
            return raw
        raw = dict(raw)
        train = raw.get("train") or {}
        if isinstance(train, Mapping):
            own = {"epochs", "sparsity"}
            for part, also in (
                ("score", {"augment", "warmup_epochs", "ema", "patches", *_BLURS}),
                ("finetune", {"lr", "warmup_epochs"}),
            ):
                mine = raw.get(part)
                if mine is None or isinstance(mine, Mapping):
                    mine = mine or {}
                    shared = {k: v for k, v in train.items() if k in Recipe.model_fields and k not in own | also}
                    shared |= _shared_defaults(part, train)
                    if mine.get("probe") == "linear":
                        shared = {**_LINEAR, **{k: v for k, v in train.items() if k == "precision"}}
                    raw[part] = {**shared, **mine}
        score, model = raw.get("score"), raw.get("model") or {}
        asked = score.get("model") if isinstance(score, Mapping) else None
        if isinstance(asked, Mapping) and isinstance(model, Mapping) and "name" not in asked:
            raw["score"] = {**score, "model": {**model, **asked}}
        return raw

    def key(self, *parts: str) -> str:
        """Hash of the named parts (``"train"``, ``"prune.keep"``), by which a stage knows that its settings changed."""
        dump = self.model_dump(mode="json")
        chosen = {}
        for part in parts:
            value: Any = dump
            for step in part.split("."):
                value = value[step]
            chosen[part] = value
        return hashlib.blake2b(json.dumps(chosen, sort_keys=True).encode(), digest_size=12).hexdigest()

    def yaml(self) -> str:
        """The resolved page, as YAML that :func:`read` takes back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _shared_defaults(part: str, train: Mapping[str, Any]) -> dict[str, Any]:
    """A fine-tune starts at a third of the peak learning rate, with half an epoch of warm-up."""
    if part != "finetune":
        return {"warmup_epochs": 0.5}
    lr = train.get("lr", Recipe.model_fields["lr"].default)
    try:
        return {"lr": float(lr) / 3, "warmup_epochs": 0.5}
    except (TypeError, ValueError):
        return {"warmup_epochs": 0.5}  # train.lr is refused in its own place


def read(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a config file, or that of a run's folder, apply ``key=value`` overrides, and check it all.

    Raises:
        Refused: no such file, not YAML, an unknown setting, a value of the wrong kind; says where and what is right.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if (file / "config.yaml").is_file():
            file, overrides = file / "config.yaml", [f"folder={file}", *overrides]  # it may have been moved
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"{path}: cannot be read ({error}). Give a config file, e.g. configs/digits.yaml.") from None
        if len(text) > 1 << 20:
            raise Refused(f"{path}: larger than 1 MiB, which no config is.")
        raw = _load_yaml(text, str(path))
        raw.setdefault("name", file.stem)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise Refused(f"{override!r}: an override is key=value, e.g. train.lr=3e-4.")
        _set(raw, key.strip().split("."), _scalar(value, override), override)
    return check(raw, place=str(path) if path else "config")


def check(raw: Mapping[str, Any], place: str = "config") -> Config:
    """The typed page for a dictionary.

    Raises:
        Refused: with every fault, a line each.
    """
    faults = list(_unknown(raw, Config, ()))
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False)
        places = {fault["loc"] for fault in found}
        for fault in found:
            if fault["type"] == "extra_forbidden":
                continue  # named above, with the nearest right name
            if _inherited(fault["loc"], raw) and ("train", *fault["loc"][1:]) in places:
                continue  # named at train
            section = _at(fault["loc"])
            if section is not None and fault["type"] in ("model_type", "model_attributes_type"):
                faults.append(_no_section(".".join(map(str, fault["loc"])), section, fault["input"]))
                continue
            where = _where(fault["loc"]) or place
            told = fault["msg"].removeprefix("Value error, ")
            given = "" if isinstance(fault["input"], (dict, BaseModel)) else f", not {fault['input']!r}"
            choices = re.findall(r"'([^']*)'", fault["ctx"]["expected"]) if fault["type"] == "literal_error" else []
            faults.append(f"{where}: {told}{given}.{nearest(str(fault['input']), choices)}")
        raise Refused("\n".join(dict.fromkeys(faults))) from None
    if faults:
        raise Refused("\n".join(dict.fromkeys(faults)))
    return config


def _inherited(loc: tuple[int | str, ...], raw: Mapping[str, Any]) -> bool:
    """Whether the user did not write this setting of score or finetune."""
    own = raw.get(str(loc[0])) if loc else None
    return len(loc) > 1 and loc[0] in ("score", "finetune") and not (isinstance(own, Mapping) and loc[1] in own)


def _at(loc: Iterable[int | str]) -> type[Section] | None:
    """The Section that stands at a place of the page, if one does."""
    section: type[Section] | None = Config
    for step in loc:
        field = section.model_fields.get(str(step)) if section else None
        section = _section(field.annotation) if field else None
    return section


def _where(loc: Iterable[int | str]) -> str:
    """The setting at a place that pydantic names, without the kinds of value that it tried there."""
    section: type[Section] | None = Config
    steps = []
    for step in loc:
        field = section.model_fields.get(str(step)) if section else None
        if field is not None or isinstance(step, int):
            steps.append(str(step))
            section = _section(field.annotation) if field else None
    return ".".join(steps)


def _no_section(where: str, section: type[Section], given: Any) -> str:
    if issubclass(section, Method):
        return f"{where}: the name of a method, not {given!r}."
    if section is Keep:
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        return (
            f"{where}: a section, not {given!r}. Say {f'{where}.macs={given}' if number else f'e.g. {where}.macs=0.5'}."
        )
    name, field = next(iter(section.model_fields.items()))
    return f"{where}: a section, not {given!r}. Say e.g. {where}.{name}={field.get_default()}."


def _load_yaml(text: str, place: str) -> dict[str, Any]:
    try:
        # An alias can blow a small file up to gigabytes, and no config of ours needs one.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise Refused(f"{place}: YAML aliases (*name) are not taken. Write the values out.")
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise Refused(f"{place}: expected settings like 'seed: 0', not {type(loaded).__name__}.")
    return loaded


def _scalar(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError:
        raise Refused(f"{override!r}: the value is not valid YAML.") from None


def _set(raw: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    here = raw
    for depth, step in enumerate(path[:-1]):
        below = here.get(step)
        if below is None:
            below = {}
        elif isinstance(below, str):
            below = {"name": below}  # select.pick.bins=20 over 'pick: ccs'
        elif not isinstance(below, dict):
            raise Refused(f"{override!r}: {'.'.join(path[: depth + 1])} is a value, not a section.")
        here[step] = dict(below)
        here = here[step]
    here[path[-1]] = value


def _unknown(raw: Any, section: type[BaseModel], place: tuple[str, ...]) -> Iterable[str]:
    """A sentence for each setting that does not exist."""
    if not isinstance(raw, Mapping) or section.model_config.get("extra") != "forbid":
        return
    fields = section.model_fields
    for key, value in raw.items():
        where = ".".join((*place, str(key)))
        if key not in fields:
            known = ", ".join(fields)
            yield f"{where}: no such setting.{nearest(str(key), fields) or f' Here: {known}.'}"
        else:
            below = _section(fields[key].annotation)
            if below is not None:
                yield from _unknown(value, below, (*place, str(key)))


def _section(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation like ``Section | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) is Annotated:
        return _section(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for found in map(_section, typing.get_args(annotation)) if found), None)
    return None
