"""How a model is trained: the recipe, and what the proxy, the training and the fine-tune add to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from lotus.config.augment import Augment
from lotus.config.marks import Mark, marked
from lotus.config.request import Keep
from lotus.config.section import BriefMethod, Fraction, Inside, Method, MethodOf, Section, by_name


class Dynamic(Method):
    """Dynamic data pruning: ``rs2``, ``{name: rs2, keep: 0.3}`` or ``{name: infobatch, saving: 0.3}``."""

    keep: Fraction | None = None
    """Fraction of the images in an epoch, for a method that reads a budget: null is a half. Others find their own number."""


DynamicBy = Annotated[Dynamic, BeforeValidator(by_name)]


class Joint(Section):
    """A joint budget of images and patches: images of a high ``select.score`` get more patches, the others fewer."""

    buckets: int = Field(3, ge=2, le=1024)
    """Numbers of patches that there are, evenly from ``least`` to all. A batch has images of one bucket alone."""
    least: Fraction | None = None
    """Fraction of its patches that the easiest image keeps; null: half of ``keep``."""


class Patches(Section):
    """Token pruning, merging or dropping: which patches of an image a training goes through, so that a step takes less time."""

    mode: Literal["input", "evit", "tome", "cumulative", "dropout"] = "evit"
    """input: those of the highest ``score`` enter the model (Data-LTH); evit: the class token's attention chooses, inside
    the model, at the blocks ``at``; tome: the most alike are merged, in every block; cumulative: attention summed over queries, heads and
    blocks so far chooses, in the later blocks (CP-ViT); dropout: any, by chance (the control)."""
    keep: Fraction = 0.7
    """input, dropout: fraction of the patches that enters. evit: fraction that stays at each block of ``at``. tome: tokens that
    the average block's MLP sees, as a fraction of the patches. cumulative: fraction that is left after the last block."""
    at: tuple[int, ...] = ()
    """evit: blocks (from 0) in which patches are dropped, between attention and MLP; empty: at 1/4, 1/2 and 3/4 of the depth,
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
    """Fraction of the training that goes through all patches first."""
    ramp: float = Field(0, ge=0, le=1)
    """Fraction of the training, after the warm-up, in which what stays falls to ``keep``, along a cosine."""
    until: Fraction = 1.0
    """Fraction of the training after which each step goes through all patches; a step is what it is at its beginning."""

    @property
    def asks_baseline(self) -> bool:
        """Whether the run's own dense model is asked, which has to be trained before."""
        return self.model == "baseline"


class Recipe(Section):
    """How a model is trained. The same for the dense baseline, the lottery's training, the proxy and the fine-tune."""

    epochs: Annotated[int, Mark.LENGTH] = Field(20, ge=1)
    """Times that the rows of the ticket are gone through."""
    batch_size: int = Field(128, ge=1)
    """Images an optimizer step: all ranks and accumulation together."""
    accumulate: Annotated[int, Mark.OF_TRAINING] = Field(1, ge=1, examples=[2])
    """Parts in which a rank goes through its share of a batch, to save memory."""
    optimizer: str = "adamw"
    """A timm optimizer name. muon is LOTUS' own, under every ZeRO stage; it leaves the head and what is no matrix to AdamW."""
    lr: Annotated[float, Mark.RATE] = Field(1e-3, gt=0)
    """Peak learning rate, at this batch size."""
    adamw_lr: float | None = Field(None, gt=0)
    """Peak rate of what muon leaves to AdamW: head, positions, tokens, norms, biases; null: as ``lr``."""
    schedule: BriefMethod = Method(name="cosine")
    """A schedule of lotus/training/schedules.py, where each says what it is; with its settings, ``{name: wsd, decay: 0.3}``. Or one
    of your own."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end, of schedules that read one."""
    warmup_epochs: Annotated[float | None, Mark.LENGTH] = Field(2, ge=0)
    """Epochs in which the rate rises, along a line; 1.5 is one and a half. null: ``warmup_ratio`` says it."""
    warmup_ratio: Annotated[float | None, Mark.LENGTH] = Field(None, ge=0, le=1)
    """The same as a fraction of the training, however long that is, in place of ``warmup_epochs``: 0.1."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled; not on biases, norms, class token and position embeddings."""
    layer_decay: Annotated[Fraction, Mark.OF_TRAINING] = Field(1.0, examples=[0.9])
    """Each block toward the input learns this much slower than the next."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing."""
    mixup: Annotated[float, Mark.BLURS, Mark.OF_TRAINING] = Field(0, ge=0, examples=[0.2])
    """Mixup's alpha; 0: off."""
    cutmix: Annotated[float, Mark.BLURS, Mark.OF_TRAINING] = Field(0, ge=0, examples=[1])
    """CutMix' alpha; 0: off."""
    drop_path: Annotated[float, Mark.BLURS, Mark.OF_TRAINING] = Field(0, ge=0, lt=1, examples=[0.1])
    """Stochastic depth, rising to this rate at the last block."""
    ema: Annotated[float, Mark.ADDS, Mark.OF_TRAINING, Mark.OFF_WITHIN] = Field(0, ge=0, lt=1, examples=[0.9])
    """Decay of the moving average of the weights; 0: off. Where on, the average is what is evaluated and kept."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16 keeps fp32 master weights. auto: bf16 where the device is faster in it (a GPU from Ampere on, a CPU with AVX512-BF16 or
    AMX) and the model has no batch norms, else fp32."""
    augment: Annotated[Augment, Mark.ADDS, Mark.OF_TRAINING] = Field(Augment(), examples=[{"flip": True}])
    """What happens to the training images."""
    patches: Annotated[Patches | None, Mark.ADDS, Mark.OF_TRAINING, Mark.OFF_WITHIN] = Field(
        None, examples=[{"keep": 0.5}]
    )
    """Train on a fraction of each image's patches; null: on all. The baseline sees all of them always, and so
    does the proxy where it is not set there."""
    evaluate_every: Annotated[int, Mark.MEASURES] = Field(1, ge=0)
    """Epochs between evaluations; 0: only after the last."""
    on_spike: Annotated[Literal["stop", "skip", "rewind"] | None, Mark.OF_TRAINING] = Field(None, examples=["skip"])
    """What becomes of a step that is not finite or whose loss jumped (guest ``loss_spikes`` says when). stop: the training ends. skip:
    the weights stay. rewind: back to a checkpoint from before, and its images and those of up to nine steps before it are passed
    over. Step, rate and images are logged. null: skip, and no jump is looked for. Three in a row end it always."""
    keep_checkpoints: Annotated[int, Mark.BESIDE] = Field(2, ge=1)
    """How many of the newest checkpoints stay while it trains."""
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage: 0 shares nothing out among the ranks, and is quicker for a small model; 1 shares the optimizer's state;
    2 and 3 gradients and weights too, for models that do not fit."""
    deepspeed: Annotated[str, Mark.OF_TRAINING, Mark.FILE] = Field("", examples=["mine.json"])
    """A DeepSpeed JSON of your own, merged over ours; ``"auto"`` in it means ours."""
    compile: Annotated[bool, Mark.OF_TRAINING, Mark.OFF_WITHIN] = Field(False, examples=[True])
    """torch.compile the blocks (ZeRO 0 and 1)."""
    save_minutes: Annotated[float, Mark.BESIDE] = Field(10, gt=0)
    """Minutes between checkpoints inside an epoch; one is always written at the end of an epoch."""

    @model_validator(mode="before")
    @classmethod
    def _one_warm_up(cls, raw: Any) -> Any:
        """A fraction of the training takes the place of the usual epochs."""
        if isinstance(raw, Mapping) and raw.get("warmup_ratio") is not None:
            return {"warmup_epochs": None, **raw}
        return raw

    @classmethod
    def off_within(cls) -> dict[str, Any]:
        """The settings that are :attr:`Mark.OFF_WITHIN`, off."""
        page = cls()
        return {name: getattr(page, name) for name in marked(cls, Mark.OFF_WITHIN)}

    @property
    def own_schedule(self) -> bool:
        """Whether a schedule of the user's own may set the pace."""
        return True

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.warmup_epochs or (self.warmup_ratio or 0) * self.epochs


UNCUT = "uncut"
"""The model before the cut, by its name as a teacher."""


class Teacher(Section):
    """A model whose opinion of each image is a part of the loss (distillation), frozen."""

    name: str = ""
    """``uncut``, the model before the cut; else any timm model name, also one that LOTUS does not prune, e.g. resnet50."""
    args: dict[str, Any] = Field({})
    """Arguments for timm.create_model."""
    weights: str = ""
    """A file or folder, as ``model.weights``, trained on the same classes. A folder says itself which model it is. Empty: timm's
    published weights of ``name``."""

    @property
    def is_uncut(self) -> bool:
        return self.name == UNCUT

    @property
    def says_more(self) -> bool:
        """Whether anything is set beside the name."""
        return bool(self.weights or self.args)


def _teacher(value: Any) -> Any:
    """none; a name; or, where something lies there or it looks like a path, weights."""
    if not isinstance(value, str):
        return value
    if value in ("", "none"):
        return None
    lies = "/" in value or value.endswith((".safetensors", ".pth", ".pt", ".bin")) or os.path.isdir(value)
    return {"weights" if lies else "name": value}


def _brief_teacher(teacher: Teacher | None) -> Any:
    """As it is written: a word where that says it."""
    if teacher is None:
        return "none"
    said = {name: value for name, value in teacher.model_dump(mode="json").items() if value}
    return next(iter(said.values())) if said.keys() == {"name"} or _teacher(teacher.weights) == said else said


TeacherBy = Annotated[Teacher | None, BeforeValidator(_teacher), PlainSerializer(_brief_teacher)]


class Taught(Recipe):
    """A training that may have a teacher."""

    teacher: TeacherBy = None
    """Who teaches beside the labels: none; uncut, the model before the cut; a timm model name; a folder or file of weights; or
    ``{name: resnet50, weights: FILE}``. It sees the images as they are augmented, normalized and sized as it wants them."""
    distill: Literal["none", "soft", "hard"] = "soft"
    """What the teacher says: its softened probabilities, its decisions, or nothing."""
    temperature: float = Field(2.0, gt=0)
    """Softening of both sides for ``distill: soft``."""
    teacher_weight: float = Field(0.7, ge=0, le=1)
    """Fraction of the loss that comes from the teacher; the labels have the rest."""

    @property
    def taught_by(self) -> Teacher | None:
        """The teacher, where it has a say."""
        return self.teacher if self.distill != "none" and self.teacher_weight > 0 else None


class EarlyBird(Section):
    """End the search once the mask that the gates draw at the budget hardly changes any more (2020, 1909.11957)."""

    epsilon: float = Field(0.1, gt=0, le=1)
    """Largest fraction of the gates in which the masks of two successive epochs may differ."""
    epochs: int = Field(5, ge=1)
    """Successive epochs in which that has to hold."""


class Sparsity(Section):
    """Gates that training drives to zero, on attention outputs and MLP units."""

    gates: bool = False
    """Learn gates while training. Needed by ``prune.criterion: gate``, and by nothing else (docs/cheaper.md: what they cost)."""
    in_channels: Annotated[bool, Mark.OF_GATES] = False
    """Also gate what attention and the MLP read of the residual stream: VTP's four sites a block. For ``prune.in_channels``."""
    penalty: Annotated[BriefMethod, Mark.OF_GATES] = Method(name="proximal")
    """How L1 acts, of lotus/sparsity/penalties.py: a proximal step reaches exact zeros, a subgradient (the papers' way) does
    not."""
    strength: Annotated[float, Mark.OF_GATES] = Field(1e-3, ge=0)
    """Lambda: where it starts, or where it stays with ``steer: false``."""
    steer: Annotated[bool, Mark.OF_GATES] = True
    """Steer lambda so that the open gates' MACs approach ``prune.keep.macs``."""
    lr: Annotated[float, Mark.OF_GATES] = Field(2e-2, gt=0)
    """Learning rate of the gates (Adam, no weight decay). Times the steps after ``start`` it should be 2 or more: a gate
    goes from 1 to 0 by steps of at most about this."""
    start: Annotated[float, Mark.OF_GATES] = Field(0.25, ge=0, lt=1)
    """Fraction of the training before the penalty sets in."""
    early_bird: EarlyBird | None = None
    """End the training early, when the masks have settled; null: all epochs."""


Growth = tuple[float, int] | tuple[float, int, float]


class Stable(Section):
    """Cut once the plan that would be drawn at the end of an epoch hardly changes any more (early-bird, 1909.11957)."""

    epsilon: Fraction = 0.05
    """Largest fraction of the units (value dimensions of heads, MLP units) in which successive plans may differ."""
    epochs: int = Field(2, ge=1)
    """Successive epochs in which that has to hold."""


class ShrinkStep(Section):
    """One of several cuts."""

    at: Inside
    """Fraction of the training before it."""
    keep: Keep | None = None
    """What stays, as parts of the dense model's; null: ``prune.keep``, for the last."""


class Shrink(Section):
    """A training in which the model is cut as ``prune`` says, and which goes on with what is left: one schedule, and what the
    optimizer remembers is carried over where that is exact. ``prune.embed_dim: auto`` is all channels here; a number is met by the last
    cut."""

    at: Inside | None = None
    """Fraction of the training before the cut; null: 0.12. With ``until_stable`` it is cut by then at the latest; null: 0.5."""
    steps: tuple[ShrinkStep, ...] = ()
    """Several cuts in place of ``at``, e.g. ``[{at: 0.05, keep: {macs: 0.6}}, {at: 0.12}]``; the last is to ``prune.keep``."""
    until_stable: Stable | None = None
    """Cut sooner, as soon as the plan has settled, which is drawn and billed at the end of each epoch; null: at ``at``."""
    carry: bool = True
    """Carry over what the optimizer remembers; false: it begins anew."""
    evaluate: bool = True
    """Measure on the validation images right before and after each cut."""

    @property
    def cuts(self) -> tuple[ShrinkStep, ...]:
        """In order."""
        return self.steps or (ShrinkStep(at=self.at or (0.12 if self.until_stable is None else 0.5)),)


Sampling = Literal["none", "equal", "sqrt"]


class Train(Taught):
    """The lottery's training."""

    freeze: tuple[str, ...] = ()
    """What stays as it is given: parts of the model by name, e.g. [patch_embed, blocks.0-3, "blocks.*.norm1"]. patch_embed takes
    positions and tokens along. What is frozen has no gradient and no optimizer state."""
    probe_epochs: float = Field(0, ge=0)
    """Linear probing first: epochs, or a fraction of one, in which the head learns alone (2202.10054); 0: none."""

    sparsity: Sparsity = Sparsity()
    """Sparsity regularization while training."""
    shrink: Shrink | None = None
    """Cut the model on the way, within this training; null: after it, by the stage ``prune``."""
    dynamic: DynamicBy | None = None
    """A lottery of selection/dynamic.py that draws each epoch's images out of the ticket; null: all of it, every epoch."""
    balance: Annotated[Sampling, Mark.SHARED] = "none"
    """How often each class is seen in an epoch, which stays as long as it is. equal: each as often. sqrt: by the root of its size.
    Images of small classes then come several times. none: each image once."""
    sides: tuple[Growth, ...] = ()
    """Growing pictures: [[0, 112], [0.4, 160], [0.7, 224]] = from this fraction of the training on, this side in pixels. A third
    number is how strongly pixels are changed, 0 to 1. Empty: the model's own side. It is always measured at that."""
    guests: tuple[BriefMethod, ...] = ()
    """Guests of lotus/training/guest_shelf.py, or of your own, that join this training alone (docs/training.md)."""

    @property
    def holds_still(self) -> bool:
        """Whether some of the model does not learn, now and then or ever."""
        return bool(self.freeze or self.probe_epochs)


class Finetune(Taught):
    """The recovery after the cut. What is not set here is as in ``train``, but for epochs, lr, warm-up and teacher."""

    LEAVES: ClassVar = (Mark.LENGTH, Mark.RATE)
    """Settings that it does not take from ``train``."""
    epochs: int = Field(10, ge=0)
    """0: no fine-tuning."""
    teacher: TeacherBy = Teacher(name=UNCUT)
    """As ``train.teacher``."""
    balance: Sampling = "none"
    """As ``train.balance``, which it is where it is not set here."""
    guests: tuple[BriefMethod, ...] = ()
    """Guests of lotus/training/guest_shelf.py, or of your own, that join this training alone (docs/training.md)."""
