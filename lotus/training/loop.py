"""The training loop: one for the dense baseline, the lottery's training, the probe and the fine-tune.

It yields what happens; drawing, logging and writing models belong to whoever listens. A run that is killed and started
again goes on where it was, bit for bit on a CPU: the order of the images is the plan's, augmentation and mixing follow
from (seed, epoch, image or step), and dropout's generator is seeded anew at every step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.config import Recipe
from lotus.events import Evaluated, Event, Said, Step
from lotus.training.checkpoint import Checkpoints, check_fits
from lotus.training.distributed import StopFlag, World
from lotus.training.engine import Average, Engine
from lotus.training.objective import Objective
from lotus.training.optim import lr_at, make_optimizer, momentum_at, unusual
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.data.loader import Batch, Loader
    from lotus.data.plan import SamplePlan
    from lotus.data.tickets import Tickets
    from lotus.sparsity.attention import AttentionPenalty
    from lotus.sparsity.gates import Gates
    from lotus.training.distill import Distiller
    from lotus.training.joint import Joint
    from lotus.training.probe import Recorder
    from lotus.training.redraw import Redrawing
    from lotus.vit.tokens import Tokens
    from selection.redraw import Drawn

TOO_MANY = 3
"""Steps in a row that may not be finite before training is given up."""

_SHOW_SECONDS = 0.25
_SAVE, _STOP = 1, 2


class Stopped(KeyboardInterrupt):
    """Training ended early because it was asked to. What was reached is saved; the message says where."""


@dataclass(frozen=True)
class Fitted:
    """What came out of a training."""

    state: dict[str, Tensor]
    """The weights in fp32 on the CPU, the moving average where that is on; gates are not folded in."""
    gates: dict[str, Tensor] | None
    """What the gates keep of themselves."""
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
    """Of all training images' forward passes, where patches were left out; 0 where none were, and nobody counted."""

    def load_into(self, model: nn.Module) -> nn.Module:
        """Put the weights into ``model``; returns it."""
        model.load_state_dict(self.state)
        return model


@dataclass
class Position:
    """How far a training is: what a checkpoint says beside its tensors."""

    epoch: int = 0
    micro: int = 0
    """Micro-batches of this epoch that are done."""
    step: int = 0
    """Optimiser steps that were tried; :attr:`applied` of them were finite and moved the weights."""
    applied: int = 0
    failed: int = 0
    """The last steps in a row that were not finite."""
    images: int = 0
    seconds: float = 0.0
    macs: float = 0.0
    """See :attr:`Fitted.macs`."""
    top1: float = float("nan")
    loss: float = float("nan")


def fit(
    model: nn.Module,
    *,
    stage: str,
    recipe: Recipe,
    loader: Loader,
    plan: SamplePlan,
    validation: Loader | None,
    objective: Objective,
    weights: npt.NDArray[np.float32] | None = None,
    gates: Gates | None = None,
    penalty: AttentionPenalty | None = None,
    distiller: Distiller | None = None,
    recorder: Recorder | None = None,
    redrawing: Redrawing | None = None,
    tokens: Tokens | None = None,
    tickets: Tickets | None = None,
    joint: Joint | None = None,
    folder: Path,
    world: World,
    stop: StopFlag | None = None,
    key: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Event, None, Fitted]:
    """Train ``model`` by ``recipe``, from the newest checkpoint in ``folder`` where there is one.

    Every rank runs the generator; only rank 0's yields. At the end ``model`` holds :attr:`Fitted.state`.

    Args:
        weights: (N,) what each row of the data set counts in the loss; None for 1 each
        penalty: of each image's attention, added to its loss
        recorder: is shown every training batch
        redrawing: says each epoch which rows ``plan`` goes through, and what they weigh besides ``weights``
        tokens: puts ``model`` on fewer patches; its schedule is followed, its MACs are counted
        tickets: what each patch of a training image scores, where ``tokens`` has to be told
        joint: shares the patches out among the rows of ``plan``, whose steps are then of one bucket each
        folder: ``checkpoints/`` lies in it
        key: hash of the settings; a checkpoint with another key is passed over
        clock: seconds

    Raises:
        Refused: what the user can mend: a recipe that contradicts itself, a checkpoint of another model, a full disk,
            a loss that is not finite several times in a row.
        Stopped: ``stop`` was raised; saved.
    """
    engine = Engine(model, make_optimizer(model, recipe), recipe, world)

    def told(*events: Event) -> tuple[Event, ...]:
        return events if world.is_main else ()

    try:
        average = Average(engine, recipe.ema) if recipe.ema else None
        checkpoints = Checkpoints(folder / "checkpoints", key=key, world=world)
        book = _Book(engine, average, gates, recorder, redrawing, checkpoints)
        at, notes = book.restore()
        notes += [(text, "warning") for text in unusual(recipe, "train" if stage == "baseline" else stage)]
        earlier = at.seconds
        yield from told(*(Said(stage, text, level) for text, level in notes))
        counts = None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=world.device)
        lesson = Lesson(engine, plan, objective, distiller, recorder, redrawing, counts, tokens, tickets, penalty)
        if joint is not None and redrawing is None:
            plan.take(plan.rows, joint.groups(plan.rows))
        pace = _Pace(stage, clock)
        saved = clock()
        while at.epoch < recipe.epochs and not (gates is not None and gates.settled()):
            if redrawing is not None:
                drawn = redrawing.draw(at.epoch)
                plan.take(drawn.rows, joint.groups(drawn.rows) if joint is not None else None)
                lesson = dataclasses.replace(lesson, counts=_counts(weights, drawn, plan, world))
            way = _Way.of(plan, at, recipe.epochs)
            total = way.total
            engine.module.train()
            pace.resume()
            with _closing(loader, at.epoch, at.micro) as batches:
                left = _left(plan.batches(at.epoch), at.micro)
                groups = plan.groups(at.epoch)
                for parts, bucket in zip(left, groups[len(groups) - len(left) :], strict=True):
                    lr = lr_at(way.gone(at), way.steps, recipe)
                    if tokens is not None:
                        share = tokens.shares[bucket] if tokens.shares else None
                        tokens.schedule(way.gone(at) / (recipe.epochs * way.steps), share)
                    loss, images = lesson.give(batches, at, parts)
                    pace.saw(loss, images)
                    finite = engine.step(lr, momentum_at(way.gone(at), way.steps, recipe))
                    at = dataclasses.replace(
                        at,
                        micro=at.micro + parts,
                        step=at.step + 1,
                        applied=at.applied + finite,
                        failed=0 if finite else at.failed + 1,
                        images=at.images + images * world.size,
                        seconds=at.seconds + pace.spent(),
                        macs=at.macs + (images * world.size * tokens.macs() if tokens is not None else 0.0),
                    )
                    if finite:
                        if gates is not None:
                            gates.step(way.gone(at) / (recipe.epochs * way.steps), _mean(world))
                        if average is not None:
                            average.update(at.applied)
                    else:
                        if gates is not None:
                            gates.skip()
                        pace.forget()
                        text = f"step {at.step}, learning rate {lr:.3g}: not finite, skipped"
                        yield from told(Said(stage, text, "warning"))
                        if at.failed == TOO_MANY:
                            raise Refused(_diverged(stage, at, lr, folder))
                    if world.is_main and pace.due(last=at.step == total):
                        yield pace.event(at, lr, world, (gates, penalty), tokens, total)
                    due = world.is_main and clock() - saved >= recipe.save_minutes * 60
                    wish = world.max(_STOP if stop else _SAVE if due else 0)
                    if wish:
                        path = book.save(at)
                        saved = clock()
                    if wish == _STOP:
                        raise Stopped(_stopped(stage, stop, at, total, path))
            if recorder is not None:
                recorder.end(at.epoch, world)
            done = at.epoch + 1
            if gates is not None:
                gates.end_epoch(at.epoch)
            settled = gates is not None and gates.settled()
            if validation is not None and (
                done == recipe.epochs or settled or (recipe.evaluate_every and done % recipe.evaluate_every == 0)
            ):
                engine.module.eval()
                try:
                    with average.carried() if average is not None else contextlib.nullcontext():
                        values = evaluate(engine.forward, validation, world, stop=stop)
                except Stopped:
                    raise Stopped(_stopped(stage, stop, at, total, book.save(at))) from None
                at = dataclasses.replace(at, top1=values["top1"], loss=values["loss"])
                yield from told(Evaluated(stage, done, values))
            if redrawing is not None:  # not sooner: whoever is stopped while evaluating must draw this epoch again
                redrawing.end(at.epoch, world)
                part = f"{len(plan.rows):,} of {len(redrawing.rows):,} images"
                saving = f"{100 * redrawing.saved(at.images, done):.1f} % of all passes saved"
                yield from told(Said(stage, f"epoch {done}: {part}, {saving}"))
            if gates is not None and settled and done < recipe.epochs:
                moved = ", ".join(f"{one:.3f}" for one in gates.distances())
                text = f"epoch {done}: the masks have settled (they moved by {moved}), so the search ends here"
                yield from told(Said(stage, text))
            at = dataclasses.replace(at, epoch=done, micro=0)
            book.save(at)
            saved = clock()
        state = (engine if average is None else average).weights()
    except BaseException:
        engine.release()
        raise
    engine.release(state)
    kept = gates.state() if gates is not None else None
    return Fitted(state, kept, at.top1, at.loss, at.images, at.seconds, at.step, at.epoch, earlier, at.macs)


@dataclass(frozen=True)
class Lesson:
    """An optimiser step up to the moment when the weights move."""

    engine: Engine
    plan: SamplePlan
    objective: Objective
    distiller: Distiller | None = None
    recorder: Recorder | None = None
    redrawing: Redrawing | None = None
    counts: Tensor | None = None
    tokens: Tokens | None = None
    tickets: Tickets | None = None
    penalty: AttentionPenalty | None = None

    def give(self, batches: Iterator[Batch], at: Position, parts: int) -> tuple[Tensor, int]:
        """Forward and backward through ``parts`` micro-batches: the sum of this rank's losses, and of how many images."""
        rank = self.engine.world.rank
        _seed(_hash(self.objective.seed, at.step, rank), self.engine.world.device)
        losses, images = [], 0
        for part in range(parts):
            batch = next(batches)
            loss = self._loss(batch, at.epoch, at.micro + part, rank)
            self.engine.backward(loss / self.plan.micro, last=part == parts - 1)
            losses.append(loss.detach())
            images += len(batch.labels)
        return torch.stack(losses).sum(), images

    def _loss(self, batch: Batch, epoch: int, number: int, rank: int) -> Tensor:
        """Sum over the micro-batch of each image's loss, times what the image counts."""
        images, targets = self.objective.mix(batch.images, batch.labels, epoch=epoch, step=number, rank=rank)
        if self.tokens is not None and self.tickets is not None:
            # As a picture with one channel the scores are mixed by the very lambda or box that their pixels are.
            seen = self.tickets.seen(batch.index, epoch)
            shown, _ = self.objective.mix(seen, batch.labels, epoch=epoch, step=number, rank=rank)
            self.tokens.choose(self.tickets.pooled(shown))
        logits = self.engine.forward(images)  # (B, C)
        losses = self.objective.losses(logits, targets)  # (B,)
        if self.distiller is not None:
            losses = self.distiller.losses(logits, images, losses)
        if self.recorder is not None:
            self.recorder.add(batch.index, logits, batch.labels)
        if self.redrawing is not None:
            self.redrawing.add(batch.index, losses)
        if self.penalty is not None:
            losses = losses + self.penalty.of_images()
        if self.counts is not None:
            losses = losses * self.counts[batch.index]
        return losses.sum()


def evaluate(
    forward: nn.Module | Callable[[Tensor], Tensor], loader: Loader, world: World, *, stop: StopFlag | None = None
) -> dict[str, float]:
    """Go through ``loader`` once and count, exactly: over ranks nothing is repeated and nothing left out.

    Args:
        forward: (B, 3, S, S) -> (B, C) logits. A module is put into eval mode meanwhile.

    Returns:
        ``top1`` and ``top5`` in per cent, ``loss`` in nats, ``images``.

    Raises:
        Refused: there are no images.
        Stopped: ``stop`` was raised on some rank.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # images, top 1, top 5, loss
    images: Tensor | None = None
    with _evaluating(forward), _closing(loader, 0, 0) as batches, torch.no_grad():
        while True:
            batch = next(batches, None)
            wish = world.max(_STOP if stop else int(batch is not None))
            if wish == _STOP:
                raise Stopped("stopped while evaluating")
            if not wish:
                break
            if batch is None:
                if images is not None:
                    forward(images)  # under ZeRO 3 no rank can go forward alone, and another one has a batch left
                continue
            images = batch.images
            logits = forward(images).float()  # (B, C)
            best = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]  # (B, 5)
            loss = F.cross_entropy(logits, batch.labels, reduction="none")
            sums += torch.stack([torch.ones_like(loss), best[:, 0], best.any(1), loss]).double().sum(1)
    count, top1, top5, loss_sum = world.sum_(sums).tolist()
    if not count:
        raise Refused("validation: there is no image to measure on. Give a validation set of at least one.")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count, "images": count}


class _Book:
    """What a checkpoint is made of, out and in."""

    def __init__(
        self,
        engine: Engine,
        average: Average | None,
        gates: Gates | None,
        recorder: Recorder | None,
        redrawing: Redrawing | None,
        checkpoints: Checkpoints,
    ) -> None:
        self._engine, self._average, self._gates, self._recorder = engine, average, gates, recorder
        self._redrawing, self._checkpoints = redrawing, checkpoints

    def save(self, at: Position) -> Path:
        """Every rank must call: the engine's state lies on all of them."""
        engine, world = self._engine, self._engine.world
        tensors = {"weights": engine.weights(), "moments": engine.moments()}
        if self._average is not None:
            tensors["average"] = self._average.weights()
        if self._gates is not None:
            tensors["gates"] = self._gates.state()
        if self._recorder is not None:
            tensors["recorder"] = self._recorder.state(world)
        if self._redrawing is not None:
            tensors["redraw"] = self._redrawing.state(world)
        return self._checkpoints.save(tensors, dataclasses.asdict(at))

    def restore(self) -> tuple[Position, list[tuple[str, str]]]:
        """Where to go on, and sentences (with their level) about it."""
        found, passed = self._checkpoints.latest()
        notes = [(text, "warning") for text in passed]
        if found is None:
            return Position(), notes
        check_fits(found, self._engine.shapes())
        self._engine.load_weights(found.tensors["weights"])
        self._engine.load_moments(found.tensors["moments"])
        if self._average is not None:
            self._average.load_weights(found.tensors["average"])
        if self._gates is not None:
            self._gates.load_state(found.tensors["gates"])
        if self._recorder is not None:
            self._recorder.load_state(found.tensors["recorder"], self._engine.world)
        if self._redrawing is not None:
            self._redrawing.load_state(found.tensors["redraw"], self._engine.world)
        at = Position(**found.state)
        return at, [*notes, (f"goes on after step {at.step}, from {found.path}", "info")]


@dataclass(frozen=True)
class _Way:
    """How far a training is, in steps of the epoch at hand.

    Every epoch is as long a part of the schedules as any other, however many steps a redrawn lottery gives it: how many the
    later ones will have, nobody knows. Steps that were not finite do not count. Where all epochs have the same number of
    steps, :meth:`gone` is the number of steps that moved the weights.
    """

    steps: int
    """Of this epoch."""
    before: int
    """Steps that were tried in the epochs before it."""
    total: int
    """Of all epochs, if those after this one have as many."""

    @classmethod
    def of(cls, plan: SamplePlan, at: Position, epochs: int) -> _Way:
        """At ``at``, in an epoch whose rows ``plan`` has."""
        parts = plan.batches(at.epoch)
        before = at.step - (len(parts) - len(_left(parts, at.micro)))
        return cls(len(parts), before, before + len(parts) * (epochs - at.epoch))

    def gone(self, at: Position) -> int:
        return max(0, at.epoch * self.steps + at.step - self.before - (at.step - at.applied))


class _Pace:
    """When to tell of a step, and what: the mean loss of rank 0's images and the speed of all since it last told."""

    def __init__(self, stage: str, clock: Callable[[], float]) -> None:
        self._stage, self._clock = stage, clock
        self._ticked = self._told = clock()
        self._loss: Tensor | float = 0.0
        self._images, self._seconds = 0, 0.0

    def resume(self) -> None:
        """Time before this does not count."""
        self._ticked = self._clock()

    def spent(self) -> float:
        """Seconds since this, or :meth:`resume`, was last called."""
        now = self._clock()
        seconds, self._ticked = now - self._ticked, now
        self._seconds += seconds
        return seconds

    def saw(self, loss: Tensor, images: int) -> None:
        self._loss = self._loss + loss  # not read here: a GPU would have to be waited for
        self._images += images

    def forget(self) -> None:
        """Begin anew."""
        self._loss, self._images, self._seconds = 0.0, 0, 0.0

    def due(self, *, last: bool) -> bool:
        return last or self._clock() - self._told >= _SHOW_SECONDS

    def event(
        self,
        at: Position,
        lr: float,
        world: World,
        sparsity: tuple[Gates | None, AttentionPenalty | None],
        tokens: Tokens | None,
        total: int,
    ) -> Step:
        values = {
            "epoch": float(at.epoch + 1),
            "loss": float(self._loss) / max(self._images, 1),
            "lr": lr,
            "images_per_second": self._images * world.size / self._seconds if self._seconds else 0.0,
            **{name: value for one in sparsity if one is not None for name, value in one.summary().items()},
            **({"patches": tokens.share()} if tokens is not None else {}),
        }
        self.forget()
        self._told = self._clock()
        return Step(self._stage, at.step, total, values=values)


def _counts(weights: npt.NDArray[np.float32] | None, drawn: Drawn, plan: SamplePlan, world: World) -> Tensor:
    """(N,) what each row counts in an epoch: its weight in the ticket times that of the draw."""
    counts = np.zeros(1 + int(plan.rows.max()) if weights is None else len(weights), np.float32)
    counts[drawn.rows] = drawn.weights if weights is None else weights[drawn.rows] * drawn.weights
    return torch.as_tensor(counts, device=world.device)


def _left(parts: list[int], done: int) -> list[int]:
    """Micro-batches of each optimiser step that is still to come, when ``done`` micro-batches are through."""
    step = 0
    while step < len(parts) and done > 0:
        done -= parts[step]
        step += 1
    return parts[step:]


def _mean(world: World) -> Callable[[Tensor], Any] | None:
    return world.mean_ if world.size > 1 else None


def _seed(seed: int, device: torch.device) -> None:
    """torch.manual_seed for the devices that are used; that one takes a millisecond where a GPU was never touched."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _hash(*numbers: int) -> int:
    """63 bits that look random, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def _diverged(stage: str, at: Position, lr: float, folder: Path) -> str:
    stays = f"What was good stays in {folder / 'checkpoints'}. " if (folder / "checkpoints").is_dir() else ""
    return (
        f"{stage}: the loss or its gradient was not finite at step {at.step}, learning rate {lr:.3g}, and at the "
        f"{TOO_MANY - 1} steps before. {stays}Lower train.lr, or set train.clip=1 "
        "and a longer warm-up."
    )


def _stopped(stage: str, stop: StopFlag | None, at: Position, total: int, path: Path) -> str:
    why = (stop.reason if stop is not None else "") or "asked to on another rank"
    return f"{stage}: stopped ({why}) after step {at.step} of {total}, saved to {path}. The same command goes on from there."


@contextlib.contextmanager
def _closing(loader: Loader, epoch: int, skip: int) -> Iterator[Iterator[Batch]]:
    """An epoch of ``loader`` that is closed when it is left early."""
    batches = iter(loader.epoch(epoch, skip))
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


@contextlib.contextmanager
def _evaluating(forward: object) -> Iterator[None]:
    if not isinstance(forward, nn.Module) or not forward.training:
        yield
        return
    forward.eval()
    try:
        yield
    finally:
        forward.train()
