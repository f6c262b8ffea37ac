"""Who may join a training, and when it is asked.

The loop trains a model on images and knows nothing else. A technique (gates, a teacher, an average of the weights, a
dynamic data pruning) is a *guest*: an object with a few moments, all of which do nothing by default. Once an epoch

    before_epoch                      which rows, of what weight, in which groups, at which side and strength
        once a step
        before_step                   how far the training is
            once a micro-batch
            show, losses              what the model is shown; what each image's loss is
        after_backward
        after_step, spoiled           it moved the weights, or it was not finite
        due, detach, replace, replaced    another model takes the place of this one
            handed_over               it has
    end_epoch, ended                  before the evaluation; whether the training ends here
        evaluating                    around the evaluation
    close_epoch                       after it; what there is to tell

and besides ``equip`` and ``attach`` at the start, ``state`` and ``load_state`` around each checkpoint, ``summary``, ``macs``,
``own_macs`` and ``bill`` for what is told and billed, ``weights`` for what leaves in the end, and ``leave`` however it ends.

Every rank asks every guest, in the same order, so that a moment may be collective.

Letters: B batch, C classes, K rows of an epoch, N rows of the data set, S side of an image in pixels.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.config import Recipe
    from lotus.data.base import Batch
    from lotus.data.sample_plan import SamplePlan
    from lotus.events import Event
    from lotus.training.distributed import World
    from lotus.training.engine import Engine
    from lotus.training.finite import Answer
    from lotus.training.objective import Objective

Rows = npt.NDArray[np.int64]


class Turn(enum.IntEnum):
    """When a guest is asked, before and after whom: the order in which they meet a loss is this, and stands nowhere else.

    Among guests of the same turn it is the order in which they are given. What each image weighs multiplies at the very end.
    """

    TEACH = 0
    """Blends what the labels ask for with another model's opinion: whoever remembers a loss wants the one that is trained."""
    WATCH = 1
    """Remembers what was said of each image, before any penalty: a penalty chooses no images. Says who trains in an epoch."""
    PENALIZE = 2
    """Adds what the model itself costs, whatever the image."""
    LAST = 3
    """Asks for no particular place."""


@dataclass
class Position:
    """How far a training is: what a checkpoint says beside its tensors."""

    epoch: int = 0
    epoch_step: int = 0
    """Of this epoch, the number of the next step (:attr:`lotus.data.sample_plan.Step.number`), which any number of ranks knows."""
    step: int = 0
    """Optimizer steps that were tried; :attr:`applied` of them were finite and moved the weights, as far as the host has asked."""
    applied: int = 0
    failed: int = 0
    """The last steps in a row that were not finite."""
    rewinds: int = 0
    """Stretches that were to be passed over when it was here: :class:`lotus.training.spikes.Passed`."""
    images: int = 0
    seconds: float = 0.0
    threads: int = 0
    """That torch computed with; sums in another order have other last digits."""
    macs: float = 0.0
    """Of all training images' forward passes, where a guest counts them; 0 where none does."""
    top1: float = float("nan")
    loss: float = float("nan")
    per_class: Mapping[str, list[int]] = field(default_factory=dict)
    """Of the last evaluation: see :func:`lotus.training.evaluation.evaluate_classes`."""


@dataclass
class Training:
    """What a guest may look at. ``engine`` is another one after the model was replaced."""

    stage: str
    place: str
    """Where the recipe's settings stand: ``train``, ``finetune``, ``score``."""
    recipe: Recipe
    world: World
    plan: SamplePlan
    objective: Objective
    engine: Engine

    @property
    def model(self) -> nn.Module:
        return self.engine.module


@dataclass(frozen=True)
class Epoch:
    """What an epoch goes through."""

    number: int
    """From 0."""
    rows: Rows
    """(K,) of the data set."""
    weights: npt.NDArray[np.float32] | None = None
    """(K,) what each row counts in the loss, besides its weight in the ticket; None for 1 each."""
    groups: Rows | None = None
    """(K,) from 0; a step is of one group alone. None: they are one."""
    repeats: bool = False
    """Whether a row may stand there several times."""
    side: int | None = None
    """S; None: what the loader was opened with. Only for a loader whose ``epoch`` takes ``side``."""
    strength: float | None = None
    """A factor, 0 to 1, of how strongly pixels are changed; None: 1. Only for a loader whose ``epoch`` takes ``strength``."""

    @property
    def view(self) -> dict[str, Any]:
        """What a loader's ``epoch`` is told of it."""
        told = {"side": self.side, "strength": self.strength}
        return {name: value for name, value in told.items() if value is not None}


@dataclass(frozen=True)
class Micro:
    """Which micro-batch this is."""

    epoch: int
    number: int
    """In the epoch, from 0, where each step has as many as any: the same for any number of ranks."""
    world: World
    objective: Objective
    last: bool = True
    """Whether it is the last of its step."""

    def mixed(self, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`lotus.training.objective.Objective.mix`; every rank calls."""
        return self.objective.mix(pictures, labels, epoch=self.epoch, step=self.number, world=self.world)

    def mix(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """(B, any, S, S) mixed by the very lambda or box that the images are mixed by; every rank calls."""
        return self.mixed(pictures, labels)[0]


@dataclass(frozen=True)
class Seen:
    """A micro-batch after its forward pass."""

    batch: Batch
    images: Tensor
    """(B, 3, S, S) as the model saw them, mixed ones too."""
    logits: Tensor
    """(B, C)"""


class Guest:
    """One who joins a training; a subclass overrides the moments that it wants."""

    name: ClassVar[str] = ""
    """Of its file in a checkpoint, unlike any other's; empty: the class' name in lower case."""
    turn: ClassVar[Turn] = Turn.LAST

    def equip(self, model: nn.Module) -> None:
        """An optimizer and an engine are about to be made around ``model``: the last moment to say which parameters learn. Again
        where it was replaced."""

    def attach(self, training: Training) -> None:
        """Once before the first step, and again when the model was replaced: what was held of the old one is of no use."""

    def detach(self) -> None:
        """The model is about to be replaced: take off it what was put on it. :meth:`attach` comes next, perhaps with the same."""

    def leave(self) -> None:
        """The training is over, finished or not."""

    def before_epoch(self, epoch: Epoch) -> Epoch:
        """What is gone through, given what those before this guest said. The same however often it is asked."""
        return epoch

    def before_step(self, progress: float, group: int) -> None:
        """``progress`` is the fraction of the training that is done, 0 to 1; ``group`` is that of the step's images."""

    def show(self, batch: Batch, micro: Micro) -> Batch:
        """What is trained on in place of ``batch``, e.g. a part of it; not mixed yet."""
        return batch

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        """(B,) float32 of each image, before weights -> (B,)."""
        return losses

    def after_backward(self) -> None:
        """The step's gradients are there."""

    def after_step(self, at: Position, progress: float, finite: bool | Answer) -> None:
        """The weights have moved; or, where the step was not ``finite``, nothing has. Whoever asks (``if finite``) lets the host
        wait for a GPU; the answer can be kept, and asked for later."""

    def spoiled(self) -> str:
        """Why it has kept the last step from moving the weights, by losses that are no numbers; empty: it has not."""
        return ""

    def due(self, at: Position, progress: float) -> bool:
        """Whether the model is to be replaced now, between two steps. All ranks must agree."""
        return False

    def replace(self, model: nn.Module, moments: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """The model that takes ``model``'s place, and what its optimizer is to remember.

        Args:
            model: as plain as before the training, with the weights of now
            moments: as :meth:`lotus.training.engine.Engine.moments` gives them; nothing for an optimizer that begins anew
        """
        return model, moments

    def replaced(self, at: Position) -> Iterable[Event]:
        """Its model has taken the place of the other and is in training: what happened. Every rank is asked."""
        return ()

    def handed_over(self, old: nn.Module, new: nn.Module) -> None:
        """``new`` has taken the place of ``old``, which is as plain as before the training, and nobody's any more; they may be one
        and the same. Every guest is asked, before :meth:`equip`."""

    def rebuilt(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The model of the shape that it had when ``state`` was taken; asked before a checkpoint is taken up."""
        return model

    def end_epoch(self, epoch: int) -> None:
        """Its steps are through, its evaluation is to come; asked again where that was interrupted."""

    def ended(self) -> bool:
        """Whether the training ends with the last epoch that was closed. All ranks must agree."""
        return False

    def close_epoch(self, at: Position) -> Iterable[str]:
        """After the evaluation: sentences to tell. ``at.epoch`` is the epoch that closes."""
        return ()

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Around an evaluation, e.g. with other weights."""
        return contextlib.nullcontext()

    def weights(self) -> dict[str, Tensor] | None:
        """What leaves in the end in place of the weights that were trained; None: those. The first guest that has some wins."""
        return None

    def state(self) -> dict[str, Tensor]:
        """All that a resumed training needs, whatever the number of ranks; nothing: there is nothing to keep. Asked at any time
        after :meth:`attach`, right then of a user's own guest."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave; comes after :meth:`attach`."""

    def summary(self) -> dict[str, float]:
        """Values to show with a step. Only rank 0 is asked."""
        return {}

    def macs(self, macs: float) -> float:
        """Of an image's whole forward pass now, given what those before this guest said; 0: nobody has counted it."""
        return macs

    def own_macs(self) -> float:
        """Of what it computes of an image beside that pass; asked once the training is over."""
        return 0

    def bill(self) -> tuple[float, float]:
        """Image-forwards and MACs that it spent beside the training's own passes, on all ranks together and in all sittings; below
        zero for what it spared of them."""
        return 0.0, 0.0


_TAKEN = ("weights", "moments")
"""Files of a checkpoint that are the loop's own."""


def macs_of(guests: Iterable[Guest]) -> float:
    """Of an image's forward pass, as the guests count them."""
    macs = 0.0
    for guest in guests:
        macs = guest.macs(macs)
    return macs


def name_of(guest: Guest) -> str:
    """Under which a guest's state stands in a checkpoint."""
    return guest.name or type(guest).__name__.lower()


def in_order(guests: Iterable[Guest]) -> tuple[Guest, ...]:
    """As they are asked, by :class:`Turn`.

    Raises:
        Refused: two of one name, or a name that is no file's.
    """
    found = tuple(sorted(guests, key=lambda guest: guest.turn))
    names = [name_of(guest) for guest in found]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise Refused(
                f"guests: two are called {name!r}, and their states would share a file. Give one another name."
            )
        if name in _TAKEN or not name.replace("-", "_").isidentifier():
            raise Refused(
                f"guests: {name!r} cannot name a file of a checkpoint. Take another name, of letters and digits."
            )
    return found
