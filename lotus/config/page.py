"""Every knob of a run on one page. What is trained by and what is pruned have modules of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from lotus.config.marks import Mark, marked
from lotus.config.recipes import Finetune, Recipe, Train
from lotus.config.request import Prune
from lotus.config.section import BriefMethod, Fraction, Method, MethodOf, Section, by_name
from lotus.config.training_budget import Budget
from selection.atomic_files import digest
from selection.lottery import DEFAULT_PICK, DEFAULT_SCORE
from selection.memory import gigabytes

Three = tuple[
    Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]
]
"""A number a channel, for pixels in 0 to 1."""
_POWER = re.compile(r"[-+]?[0-9]{1,3}[eE][-+]?[0-9]{1,2}")


class Data(Section):
    """Which images, and how they lie on disk."""

    name: str = "imagefolder"
    """A data set of the catalog: digits, cifar10, cifar100, npz, imagefolder, webdataset, filelist, or ``hf:NAME``."""
    path: str = ""
    """Where the images lie: a folder, an .npz, shards (``train-{000..146}.tar``) or a list. Empty for digits."""
    options: dict[str, Any] = Field({})
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
    """With ``write: proportion``, the fraction of the images that is stored as JPEG."""
    normalize: Literal["weights", "data"] | tuple[Three, Three] = "weights"
    """Mean and deviation of a channel that pixels are normalized by: weights: those of the weights that are given or published,
    of the data where training begins from scratch; data: the data's always; or ``[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]``."""
    crop: Literal["weights"] | Fraction = "weights"
    """Fraction of an image's shorter side that evaluation looks at, in the middle: weights: as it was for the weights that are
    given or published, 7/8 where training begins from scratch; by area an image is never enlarged for it."""
    interpolation: Literal["weights", "area", "bilinear", "bicubic"] = "weights"
    """How evaluation resizes: weights: as it was for the weights, area from scratch. Random crops of a training are always by area."""
    damaged: Literal["fatal", "skip"] = "fatal"
    """An image that cannot be read ends the run with its path, or is skipped and counted."""
    folder: str = ""
    """Where train.beton and val.beton go; empty: ``data/`` in the run's folder. Runs may share one."""
    loader: Literal["auto", "ffcv", "torch"] = "auto"
    """auto takes FFCV where it is installed, else the plain torch loader, with a warning."""
    workers: int = Field(0, ge=0)
    """Threads that decode; 0: as many as this process may use."""
    keep_decoded: bool = True
    """A training keeps JPEG images decoded in memory once they are read, where all of a file's take at most half of what is free."""


class Model(Section):
    """The ViT."""

    name: str = "deit_tiny_patch16_224"
    """A timm model name."""
    args: dict[str, Any] = Field({})
    """Arguments for timm.create_model: ``img_size``, ``patch_size``, ``embed_dim``, ``depth``, ``num_heads``, ..."""
    pretrained: bool = False
    """Start from timm's published weights (needs a network or a local cache)."""
    weights: str = ""
    """A file (.safetensors, or a state dict or training checkpoint that torch saved) or a folder (of LOTUS, cut or not, or as the hub
    lays it out) to start from. A folder says itself which model it is. What is named in ``args.img_size`` and ``patch_size`` is
    resampled to."""
    pos_embed_std: float | None = Field(None, gt=0)
    """Standard deviation at which position embeddings start; timm's own is 0.02. Tiny images want more (0.2)."""
    patch_embed_init: Literal["timm", "xavier"] = "timm"
    """How the patch embedding starts."""
    start: MethodOf = Method(name="timm")
    """A start of lotus/vit/starts.py for weights that are not given: timm, xavier, mimetic, or ``{name: mimetic, beta_vo: 0.2}``."""

    @field_validator("args", mode="after")
    @classmethod
    def _powers(cls, args: dict[str, Any]) -> dict[str, Any]:
        """``init_values: 1e-5`` is a text to YAML, which wants a dot before an exponent, and a number to timm."""
        powers = {name: float(text) for name, text in args.items() if isinstance(text, str) and _POWER.fullmatch(text)}
        return args | powers


class Subsets(Section):
    """Proxies on random parts of the images, which ``select.score: memorization`` reads (Feldman and Zhang 2020)."""

    runs: int = Field(10, ge=2)
    """How many. The paper has thousands; few are noisy."""
    fraction: float = Field(0.7, gt=0, lt=1)
    """Fraction of the images that each trains on, drawn over all classes; every image is in some runs and out of others."""
    record: Literal["probability", "correct"] = "probability"
    """What each run says of every image at its end: the probability of its label, or, as the paper has it, whether it was
    right, which takes more runs."""

    @property
    def least(self) -> int:
        """Fewer runs on such parts leave images that are in all or in none."""
        return math.ceil(1 / min(self.fraction, 1 - self.fraction) - 1e-6)


class Score(Recipe):
    """The proxy: a short training, or linear heads on frozen features, watched. What is not set here is as in ``train``,
    without augmentation, mixing or stochastic depth. A linear probe takes nothing from ``train`` but ``precision``."""

    LEAVES: ClassVar = (Mark.LENGTH, Mark.BLURS, Mark.ADDS)
    """Settings that it does not take from ``train``."""
    proxy: Literal["training", "linear_probe", "self"] = "training"
    """training: a short training of the whole model. linear_probe: its weights stay, every image goes through it once, and
    linear heads learn from the features. self: no proxy; the training itself is watched until its cut (``train.shrink``), and the
    ticket for the rest of it is drawn at the end of that epoch."""
    model: Annotated[Model, BeforeValidator(by_name)] | None = None
    """The proxy's: any timm model, by name or with ``model``'s settings; null: the run's. Without a name it is the run's
    with what is set here, e.g. ``score.model.weights=FILE``."""
    side: int = Field(0, ge=0)
    """Side in pixels of the images that it sees, where it reads any size; 0: that of the run's model."""
    epochs: int = Field(5, ge=1)
    """Epochs that the proxy trains and is recorded. linear_probe: 20."""
    seeds: int = Field(2, ge=1)
    """Short trainings, each from another start; their signals stand side by side."""
    heads: int = Field(4, ge=1)
    """Heads of a linear probe, trained at once: each has its own start and order of images, as ``seeds`` have."""
    subsets: Subsets | None = None
    """Further proxies on random parts of the images, e.g. ``{runs: 10}``; null: none."""
    gradients: bool = True
    """Also record the last layer's gradients and how predictions move, which tdds, cal, craig, grad_match and glister read:
    2 bytes an image and class in signals.npz, twice that in memory meanwhile. Turn off for many images of many classes."""
    guests: Annotated[tuple[BriefMethod, ...], Mark.OF_TRAINING] = Field((), examples=[["late_average"]])
    """Guests of lotus/training/guest_shelf.py, or of your own, that join this training alone (docs/training.md)."""

    @property
    def own_schedule(self) -> bool:
        return self.proxy != "linear_probe"  # whose heads go by our own schedules alone


# A few thousand steps on features whose every dimension has mean 0 and variance 1.
_LINEAR: dict[str, Any] = {
    "epochs": 20, "batch_size": 256, "lr": 5e-3, "min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0.0, "clip": 0,
    "smoothing": 0.0,
}  # fmt: skip


_BALANCES = ("fraction", "equal", "sqrt", "true", "false")


def _balance(value: Any) -> Any:
    """``fraction`` is what true has always been; runs that stand were made with it."""
    if isinstance(value, str) and value not in _BALANCES:
        raise ValueError(f"expected one of {', '.join(_BALANCES)}")
    return True if value == "fraction" else value


class Select(Section):
    """Which images train: the ticket."""

    score: MethodOf = Method(name=DEFAULT_SCORE)
    """A score of selection/scores.py: higher = keep first."""
    pick: MethodOf = Method(name=DEFAULT_PICK)
    """A picker of selection/pickers.py."""
    keep: Fraction = 1.0
    """Fraction of the images that stays."""
    balance: Annotated[bool | Literal["equal", "sqrt"], BeforeValidator(_balance)] = True
    """How the classes share what stays. fraction, true: the same fraction of every class. equal: as many of each, as far as it has
    them. sqrt: by the root of its size. false: whatever class the picker takes."""
    floor: Fraction | None = None
    """With ``balance: false``: the fraction of what balance would give it that each class keeps at least. null: classes may
    vanish."""
    max_memory: Annotated[float, Field(gt=0)] | None = None
    """GB that score and picker may take (``4GB``, ``500MB``): what needs more is refused with the figure, or takes a way that needs
    less. null: 0.5 for matrices of similarities, no limit else."""
    start: str = ""
    """A ticket (.npz) whose images all stay; the picker adds to them."""
    ticket: str = ""
    """A ticket made elsewhere (.npz); then nothing is scored."""
    exclude: str = ""
    """A list of images that shall not train, a path or a number a line, as ``lotus inspect`` leaves it; ``keep`` is a fraction of
    the others."""

    @field_validator("max_memory", mode="before")
    @classmethod
    def _gigabytes(cls, value: Any) -> Any:
        return gigabytes(value) if isinstance(value, str) else value


class Baseline(Section):
    """What the lottery is compared with."""

    name: Literal["best", "textbook", "small"] = "best"
    """best: the dense model on all images by ``train``'s recipe, without any lottery. textbook: the same by AdamW at 1e-3, with a
    warm-up and a cosine. small: a narrower model of ``prune.keep.macs``, from scratch, by ``train``'s recipe."""
    epochs: int | None = Field(None, ge=1)
    """Its length; null: as ``train``, and of a small model as many as cost what the lottery has cost in all."""


def _baseline(value: Any) -> Any:
    """true, false, or the name alone."""
    if isinstance(value, bool):
        return {} if value else None
    return {"name": value} if isinstance(value, str) else value


def _brief(baseline: Baseline | None) -> Any:
    """As it is written: a truth value or the name alone where that says it. Stages that stand were made with ``true``."""
    if baseline is None or baseline == Baseline():
        return baseline is not None
    return baseline.name if baseline.epochs is None else baseline.model_dump(mode="json")


class Export(Section):
    """What leaves the house."""

    onnx: bool = True
    """Write model.onnx where the extra ``onnx`` is installed; parity is checked."""
    onnx_input: Literal["float32", "uint8"] = "float32"
    """What model.onnx takes: normalized images, or pixels of 0 to 255, which it normalizes itself."""
    int8: bool = False
    """Also write model.int8.onnx, of 8 bits, calibrated on the run's calibration images; top-1, size and latency are measured."""
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
    rank_timeout: float = Field(10, gt=0)
    """Minutes for which a rank may give no sign of life (it is stopped, or its machine is gone) before the others end. Of one that
    was killed on the same machine they know at once."""
    baseline: Annotated[Baseline | None, BeforeValidator(_baseline), PlainSerializer(_brief)] = Baseline()
    """Also train a model to compare with: best, textbook, small, or settings; true: best; false, null: none."""
    tensorboard: bool = False
    """Also write TensorBoard files under ``tensorboard/`` in the run's folder (extra ``tensorboard``)."""
    budget: Budget | None = None
    """What the training may cost: then epochs, cut and size are planned (``lotus plan``); null: as the rest of the page says."""
    stages: tuple[BriefMethod, ...] = ()
    """Stages beside the usual ones, by name, and settings of those that have some of their own, of a file of yours too:
    ``[inspect]``, ``[{name: inspect, delete: [labels]}]``."""
    data: Data = Data()
    """Which images, and how they lie on disk."""
    model: Annotated[Model, BeforeValidator(by_name)] = Model()
    """The ViT, by its name in timm, or by settings."""
    score: Score = Score()
    """The proxy that says what is known of each image: what is not set here is as in ``train``."""
    select: Select = Select()
    """Which images train: the ticket."""
    train: Train = Train()
    """The training on the ticket; the baseline's, proxy's and fine-tune's recipes follow from it."""
    prune: Prune = Prune()
    """Which dimensions stay, and how many."""
    finetune: Finetune = Finetune()
    """The recovery after the cut: what is not set here is as in ``train``, but for epochs, lr, warm-up and teacher."""
    export: Export = Export()
    """What leaves: ONNX files, and at which batch latency is measured."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        """score and finetune take from ``train`` what they do not set themselves."""
        if not isinstance(raw, Mapping):
            return raw
        raw = _shrinking(dict(raw))
        train = raw.get("train") or {}
        if isinstance(train, Mapping):
            for part in ("score", "finetune"):
                mine = raw.get(part)
                if mine is None or isinstance(mine, Mapping):
                    mine = mine or {}
                    raw[part] = {**_inherited(part, mine, train), **mine}
        score, model = raw.get("score"), raw.get("model") or {}
        asked = score.get("model") if isinstance(score, Mapping) else None
        if isinstance(asked, Mapping) and isinstance(model, Mapping) and "name" not in asked:
            raw["score"] = {**score, "model": {**model, **asked}}
        return raw

    def asked(self, stage: str) -> Method | None:
        """What ``stages`` says of one; None: it does not name it."""
        return next((one for one in self.stages if one.name == stage), None)

    @property
    def watches_itself(self) -> bool:
        """Whether the training draws the ticket for its own rest, on the way."""
        return self.score.proxy == "self" and self.select.keep < 1 and not self.select.ticket

    def key(self, *parts: str) -> str:
        """Hash of the named parts (``"train"``, ``"prune.keep"``), by which a stage knows that its settings changed."""
        dump = self.model_dump(mode="json")
        chosen = {}
        for part in parts:
            value: Any = dump
            for step in part.split("."):
                value = value[step]
            chosen[part] = value
        return digest(chosen)

    def yaml(self) -> str:
        """The resolved page, as YAML that :func:`read` takes back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class OneCut(Section):
    """What is read of the page where a model that LOTUS never trained is pruned, without a run."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Which images are drawn."""
    data: Data = Data()
    """Which images, and how they lie on disk."""
    model: Model = Model()
    """The ViT."""
    prune: Prune = Prune()
    """Which dimensions stay, and how many."""


def _shrinking(raw: dict[str, Any]) -> dict[str, Any]:
    """A training that shrinks leaves nothing to recover, and nobody to teach that: what is not set is so."""
    train, tune = raw.get("train"), raw.get("finetune")
    if not isinstance(train, Mapping) or train.get("shrink") is None:
        return raw
    if tune is None or isinstance(tune, Mapping):
        raw["finetune"] = {"epochs": 0, **({} if "teacher" in (tune or {}) else {"distill": "none"}), **(tune or {})}
    return raw


def taken(part: type[Score | Finetune], train: type[Train] = Train) -> set[str]:
    """Names of the settings that ``part`` takes from ``train`` where it does not set them: those of any training that it does not
    leave, and those that a training shares."""
    shared = {name for name in marked(train, Mark.SHARED) if name in part.model_fields}
    return {*Recipe.model_fields, *shared} - {*marked(train, *part.LEAVES)}


def _inherited(part: str, mine: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    """What ``score`` or ``finetune`` takes from ``train``, or has instead."""
    if mine.get("proxy") == "linear_probe":
        found = {**_LINEAR, **{name: value for name, value in train.items() if name == "precision"}}
    else:
        known = taken(Finetune if part == "finetune" else Score)
        shared = {name: value for name, value in train.items() if name in known}
        found = shared | _shared_defaults(part, train)
    return found if mine.get("warmup_ratio") is None else {**found, "warmup_epochs": None}


def _shared_defaults(part: str, train: Mapping[str, Any]) -> dict[str, Any]:
    """A fine-tune starts at a third of the peak learning rate, with half an epoch of warm-up."""
    if part != "finetune":
        return {"warmup_epochs": 0.5}
    lr = train.get("lr", Recipe.model_fields["lr"].default)
    try:
        return {"lr": float(lr) / 3, "warmup_epochs": 0.5}
    except (TypeError, ValueError):
        return {"warmup_epochs": 0.5}  # train.lr is refused in its own place
