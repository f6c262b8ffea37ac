"""The training loop: one for the dense baseline, the lottery's training, the proxy and the fine-tune.

It yields what happens; drawing, logging and writing models belong to whoever listens, and every technique to a guest
(:mod:`lotus.training.guests`). A training that is killed and started again goes on where it was, bit for bit on a CPU: the
order of the images is the plan's, augmentation and mixing follow from (seed, epoch, image or step), and dropout's generator
is seeded anew at every step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lotus.config import Recipe
from lotus.data.sample_plan import Rows
from lotus.events import Evaluated, Event, Said
from lotus.training import threads
from lotus.training.book import Book
from lotus.training.checkpoint import Checkpoints
from lotus.training.distributed import StopFlag, Wishes, World
from lotus.training.engine import Engine
from lotus.training.evaluation import STOP, closing, evaluate_classes
from lotus.training.evaluation import Stopped as Stopped
from lotus.training.evaluation import evaluate as evaluate
from lotus.training.finite import Answer
from lotus.training.guests import Epoch, Guest, Position, Training, in_order, macs_of
from lotus.training.lesson import Lesson, counts_of
from lotus.training.objective import Objective
from lotus.training.optim import make_optimizer, make_schedule, unusual
from lotus.training.pace import Pace, StepCount
from lotus.training.precision import settled
from lotus.training.spikes import Passed, Spike, became, by_rows
from lotus.vit.cost import macs
from lotus.vit.model import image_size

if TYPE_CHECKING:
    from lotus.data.base import Batch, Loader
    from lotus.data.sample_plan import SamplePlan, Step

_SAVE, _STOP = 1, STOP


@dataclass(frozen=True)
class Data:
    """What is trained on, and asked for."""

    loader: Loader
    plan: SamplePlan
    objective: Objective
    validation: Loader | None = None
    weights: npt.NDArray[np.float32] | None = None
    """(N,) what each row of the data set counts in the loss; None for 1 each."""


@dataclass(frozen=True)
class Job:
    """Where a training is at work, and under which name."""

    stage: str
    folder: Path
    """``checkpoints/`` lies in it."""
    key: str
    """Hash of the settings; a checkpoint with another key is passed over."""
    world: World
    place: str = "train"
    """Where the recipe's settings stand, for a refusal to name them."""
    stop: StopFlag | None = None
    shelves: Sequence[ModuleType] = ()
    """Files of the user's own, for a schedule of theirs."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds."""
    named: Callable[[Rows], str] = by_rows
    """What is told of images, by their rows."""

    def told(self, *events: Event) -> tuple[Event, ...]:
        """``events`` on rank 0, none on others."""
        return events if self.world.is_main else ()

    def stopped(self, at: Position, total: int, path: Path) -> Stopped:
        why = (self.stop.reason if self.stop is not None else "") or "asked to on another rank"
        return Stopped(
            f"{self.stage}: stopped ({why}) after step {at.step} of {total}, saved to {path}. The same command goes on from "
            "there."
        )


@dataclass(frozen=True)
class Fitted:
    """What came out of a training."""

    model: nn.Module
    """With :attr:`state` as its weights: the one that was given, or the one that took its place."""
    state: dict[str, Tensor]
    """The weights in fp32 on the CPU, or what a guest makes leave in their place; gates are not folded in."""
    top1: float
    """Per cent of the validation set at the end; NaN without one."""
    loss: float
    """Nats, on the validation set at the end."""
    images_seen: int
    seconds: float
    """Of training, without evaluation; all sittings together."""
    steps: int
    epochs: int
    earlier_seconds: float = 0.0
    """The part of ``seconds`` before this sitting."""
    macs: float = 0.0
    """See :attr:`lotus.training.guests.Position.macs`."""
    per_class: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    """``right`` and ``of``, (C,) each: images of each class that were named right at the end, and how many there are."""

    def load_into(self, model: nn.Module) -> nn.Module:
        """Put the weights into ``model``; returns it."""
        model.load_state_dict(self.state)
        return model


def fit(
    model: nn.Module, recipe: Recipe, data: Data, job: Job, guests: Sequence[Guest] = ()
) -> Generator[Event, None, Fitted]:
    """Train ``model`` by ``recipe``, from the newest checkpoint in the job's folder where there is one.

    Every rank runs the generator; only rank 0's yields. At the end ``model`` holds :attr:`Fitted.state`.

    Args:
        model: trained in place
        recipe: how long, by which optimizer and schedule, on how much a step
        data: which images, in which order, their labels and the loss, and what validates
        job: who asks: the stage, its folder and place, the ranks, the clock
        guests: who joins, in any order

    Raises:
        Refused: what the user can mend: a recipe that contradicts itself, a checkpoint of another model, a full disk,
            a loss that is not finite several times in a row, or what ``on_spike: stop`` ends.
        Stopped: it was asked to stop; saved.
        Rewound: by ``on_spike: rewind``; the same training, made anew, goes on from before the spike.
    """
    course = _Course(model, recipe, data, job, in_order(guests))
    try:
        yield from course.begin()
        earlier = course.at.seconds
        while not course.over():
            yield from course.epoch()
        state = course.leaving()
    except BaseException:
        course.release()
        raise
    course.release(state)
    at = course.at
    return Fitted(
        course.model, state, at.top1, at.loss, at.images, at.seconds, at.step, at.epoch, earlier, at.macs, at.per_class
    )  # fmt: skip


class _Course:
    """A training from its first step to its last."""

    def __init__(self, model: nn.Module, recipe: Recipe, data: Data, job: Job, guests: tuple[Guest, ...]) -> None:
        self.model, self.at = model, Position()
        self._asked, self._recipe = recipe.precision, settled(recipe, model, job.world.device, job.world)
        self._data, self._job, self._guests = data, job, guests
        self._rate = make_schedule(recipe, job.shelves, place=job.place)
        self._rows, self._drawn = data.plan.rows, False
        self._book = Book(
            guests, Checkpoints(job.folder / "checkpoints", key=job.key, world=job.world, keep=recipe.keep_checkpoints)
        )
        self._counts = counts_of(data.weights, None, job.world)
        self._engine: Engine | None = None
        self._threads = 0
        self._taken_up = False
        """From the middle of an epoch, just now."""
        self._unasked: tuple[Spike, bool | Answer] | None = None
        """The last step, as what it is if it did not move the weights, and whether it did."""

    def begin(self) -> Iterator[Event]:
        """From a checkpoint or from nothing; tells which."""
        self._passed = Passed.of(self._job.folder, self._job.key, self._job.world)
        checkpoint, notes = self._book.find(self._passed)
        if checkpoint is not None:
            self.model = self._book.rebuilt(self.model, checkpoint)
        began_with = checkpoint.state.get("threads", 0) if checkpoint is not None else 0
        self._threads = threads.take(self.model, self._data.plan.micro, self._job.world, began_with)
        if (now := torch.get_num_threads()) != self._threads:
            notes.append((f"computes with {now} of {self._threads} threads, as many as its steps keep busy", "info"))
        if self._asked == "auto" and self._recipe.precision == "bf16":
            notes.append(("computes in bf16, in which this device is faster (precision: auto)", "info"))
        notes += [(text, "warning") for text in unusual(self._recipe, self._job.place)]
        self._pace = Pace(self._job.stage, self._job.world, self._job.clock)
        self._macs = macs(self.model, image_size(self.model)) if self._pace.peak else 0.0
        engine = self._engage(self.model)
        if checkpoint is not None:
            self.at = self._book.restore(checkpoint, engine)
            self._taken_up = self.at.epoch_step > 0
        self.at = dataclasses.replace(self.at, rewinds=len(self._passed.stretches), threads=torch.get_num_threads())
        yield from self._job.told(*(Said(self._job.stage, text, level) for text, level in notes))
        self._saved, self._wishes = self._job.clock(), Wishes(self._job.world, self._job.clock)

    def over(self) -> bool:
        return self.at.epoch >= self._recipe.epochs or self._ended()

    def epoch(self) -> Iterator[Event]:
        """From where it is to its end, evaluated and saved."""
        at, view = self.at, self._draw(self.at.epoch)
        steps = self._data.plan.dealt(at.epoch)
        count = StepCount.of(steps, at, self._recipe.epochs)
        through = sum(step.parts for step in steps if step.number < at.epoch_step)
        self._lesson.engine.module.train()
        if self._taken_up:  # it may have been stopped while a model was being replaced
            self._taken_up = False
            yield from self._replacements(count)
        self._pace.resume()
        with closing(self._data.loader, at.epoch, through, **view) as batches:
            fed = self._pace.fed(batches)
            for step in [step for step in steps if step.number >= at.epoch_step]:
                if self._passed.covers(self.at.step):
                    self._pass_over(fed, step)
                    continue
                yield from self._step(fed, step, count)
                yield from self._save_if_due(count)
            yield from self._ask(count)
            self.at = dataclasses.replace(
                self.at, seconds=self.at.seconds + self._pace.spent()
            )  # of the last step's end
        with self._saved_where_stopped(count):
            for guest in self._guests:
                guest.end_epoch(at.epoch)
        if self._is_evaluated():
            yield from self._evaluate(count)
        yield from self._told_of_compiling()
        for guest in self._guests:  # not sooner: whoever is stopped while evaluating must do this epoch's end again
            with self._saved_where_stopped(count):
                told = tuple(guest.close_epoch(self.at))
            for text in told:
                yield from self._job.told(Said(self._job.stage, f"epoch {at.epoch + 1}: {text}"))
        self.at = dataclasses.replace(self.at, epoch=at.epoch + 1, epoch_step=0)
        self._save()

    def _told_of_compiling(self, *, at_once: bool = False) -> Iterator[Event]:
        """What compiling brought, and what it does not; ``at_once`` that alone."""
        if (compiled := self._lesson.engine.compiled) is None:
            return
        if not at_once and (text := compiled.news()):
            yield from self._job.told(Said(self._job.stage, text))
        if text := compiled.warning():
            yield from self._job.told(Said(self._job.stage, text, "warning"))

    def leaving(self) -> dict[str, Tensor]:
        """The weights that leave."""
        given = (guest.weights() for guest in self._guests)
        return next((weights for weights in given if weights is not None), None) or self._lesson.engine.weights()

    def release(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Give the model back, and let the guests go."""
        if self._engine is not None:
            self._engine.release(state)
        for guest in self._guests:
            guest.leave()
        if self._threads:
            torch.set_num_threads(self._threads)

    def _engage(self, model: nn.Module) -> Engine:
        """An engine around ``model``, known to all guests."""
        job, data, recipe = self._job, self._data, self._recipe
        for guest in self._guests:
            guest.equip(model)
        optimizer = make_optimizer(model, recipe, place=job.place)
        self.model, engine = model, Engine(model, optimizer, recipe, job.world, place=job.place)
        self._engine = engine
        self._lesson = Lesson(engine, data.plan, data.objective, self._guests, self._counts)
        training = Training(job.stage, job.place, recipe, job.world, data.plan, data.objective, engine)
        for guest in self._guests:
            guest.attach(training)
        return engine

    def _draw(self, number: int) -> dict[str, Any]:
        """Let the plan go through what the guests say of an epoch; returns what the loader is told of it."""
        whole = Epoch(number, self._rows)
        asked = whole
        for guest in self._guests:
            asked = guest.before_epoch(asked)
        if self._drawn or asked.rows is not whole.rows or asked.groups is not None:
            self._data.plan.take(asked.rows, asked.groups, repeats=asked.repeats)
            self._drawn = True
        self._counts = counts_of(self._data.weights, asked, self._job.world)
        self._lesson = dataclasses.replace(self._lesson, counts=self._counts)
        return asked.view

    def _step(self, batches: Iterator[Batch], step: Step, count: StepCount) -> Iterator[Event]:
        """An optimizer step, and what is told of it."""
        world, guests = self._job.world, self._guests
        at = dataclasses.replace(self.at, epoch_step=step.number)
        for guest in guests:
            guest.before_step(count.progress(at), step.group)
        loss, images = self._lesson.give(batches, at, step.parts)
        for guest in guests:
            guest.after_backward()
        yield from self._ask(count)  # of the step before: a GPU has this one to work on meanwhile
        self._pace.saw(loss, images)
        lr, momentum = self._rate(count.gone(self.at), count.steps)
        finite = self._lesson.engine.step(lr, momentum)
        self.at = at = dataclasses.replace(
            self.at,
            epoch_step=step.number + 1,
            step=at.step + 1,
            applied=self.at.applied + (finite is not False),
            images=at.images + images * world.size,
            seconds=at.seconds + self._pace.spent(),
            macs=at.macs + images * world.size * macs_of(guests),
        )
        why = next(filter(None, (guest.spoiled() for guest in guests)), "")
        self._unasked = Spike(at.step, 0, lr, step.rows, why, self._recipe.on_spike, self._job.named), finite
        for guest in guests:
            guest.after_step(at, count.progress(at), finite)
        if isinstance(finite, bool):
            yield from self._ask(count)
        if world.is_main and self._pace.due(last=at.step == count.total):
            if not finite:  # the loss is waited for here anyway; what becomes of the step all ranks ask together
                self._pace.forget()
            yield self._pace.event(at, lr, guests, count.total, macs_of(guests) or self._macs)
            yield from self._told_of_compiling(at_once=True)
        yield from self._replacements(count)

    def _ask(self, count: StepCount) -> Iterator[Event]:
        """Whether the last step moved the weights, if nobody has asked yet; and what becomes of one that did not."""
        if self._unasked is None:
            return
        (spike, finite), self._unasked = self._unasked, None
        at, failed = self.at, 0 if finite else self.at.failed + 1
        if failed != at.failed:
            believed = not finite and finite is not False  # to have moved them, until it was asked
            self.at = dataclasses.replace(at, applied=at.applied - believed, failed=failed)
        if finite:
            return
        self._pace.forget()
        spike = dataclasses.replace(spike, failed=failed)
        yield from self._job.told(Said(self._job.stage, str(spike), "warning"))
        became(spike, self._passed, self.at.epoch, count.before, place=self._job.place, stage=self._job.stage)

    def _replacements(self, count: StepCount) -> Iterator[Event]:
        for guest in self._guests:
            if guest.due(self.at, count.progress(self.at)):
                yield from self._ask(count)
                if guest.due(self.at, count.progress(self.at)):  # the last step may have been none
                    yield from self._replace(guest, count)

    def _pass_over(self, batches: Iterator[Batch], step: Step) -> None:
        """A step that nobody takes."""
        for _ in range(step.parts):
            next(batches)
        self.at = dataclasses.replace(self.at, epoch_step=step.number + 1, step=self.at.step + 1)

    def _replace(self, guest: Guest, count: StepCount) -> Iterator[Event]:
        """Another model takes the place of this one, between two steps; saved at once, since it may have taken long. Where it is
        stopped on the way, what was trained is saved, and the replacement comes first when it is taken up."""
        old = self._lesson.engine
        weights, moments = old.weights(), old.moments()
        old.release(weights)
        self._engine = None
        for other in self._guests:
            other.detach()
        try:
            model, carried = guest.replace(self.model, moments)
        except Stopped:
            engine = self._engage(self.model)
            engine.load_weights(weights)
            engine.load_moments(moments)
            raise self._job.stopped(self.at, count.total, self._save()) from None
        for other in self._guests:
            other.handed_over(self.model, model)
        engine = self._engage(model)
        engine.load_moments(carried)
        engine.module.train()
        yield from self._job.told(*guest.replaced(self.at))
        self._save()

    def _ended(self) -> bool:
        return any(guest.ended() for guest in self._guests)

    def _is_evaluated(self) -> bool:
        done, every = self.at.epoch + 1, self._recipe.evaluate_every
        if self._data.validation is None:
            return False
        return done == self._recipe.epochs or self._ended() or bool(every and done % every == 0)

    def _evaluate(self, count: StepCount) -> Iterator[Event]:
        engine, job, validation = self._lesson.engine, self._job, self._data.validation
        assert validation is not None
        engine.module.eval()
        with self._saved_where_stopped(count), contextlib.ExitStack() as inside:
            for guest in self._guests:
                inside.enter_context(guest.evaluating())
            values, per_class = evaluate_classes(engine.forward, validation, job.world, stop=job.stop)
        self.at = dataclasses.replace(self.at, top1=values["top1"], loss=values["loss"], per_class=per_class)
        yield from job.told(Evaluated(job.stage, self.at.epoch + 1, values))

    @contextlib.contextmanager
    def _saved_where_stopped(self, count: StepCount) -> Iterator[None]:
        """What is stopped inside is asked for again when the training is taken up."""
        try:
            yield
        except Stopped:
            raise self._job.stopped(self.at, count.total, self._save()) from None

    def _save_if_due(self, count: StepCount) -> Iterator[Event]:
        """Also where the training is asked to stop, which it then does.

        Raises:
            Stopped: it was.
        """
        job = self._job
        due = job.world.is_main and job.clock() - self._saved >= self._recipe.save_minutes * 60
        wish = self._wishes.exchanged(_STOP if job.stop else _SAVE if due else 0)
        if wish:
            yield from self._ask(count)
            path = self._save()
        if wish == _STOP:
            raise job.stopped(self.at, count.total, path)

    def _save(self) -> Path:
        path = self._book.save(self.at, self._lesson.engine)
        self._saved = self._job.clock()
        return path
