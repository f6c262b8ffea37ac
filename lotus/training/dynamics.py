"""Watching a training: what the model said of every image in every epoch.

Legend: N images, E epochs, B batch, C classes, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.training.distributed import World
from lotus.training.guests import Guest, Seen, Training, Turn
from selection.errors import Refused
from selection.signals import VOCABULARY

if TYPE_CHECKING:
    from lotus.data.base import Loader

WATCHED = ("p_other", "error_norm", "loss", "entropy", "margin")
"""What is recorded, names of :data:`selection.signals.VOCABULARY`; from these the probability of the label follows, and whether it
was right."""

_MOST = float(np.finfo(np.float16).max)


class Recorder:
    """Holds, for each epoch and image, what the model said when it was trained on the image.

    An image that an epoch did not see keeps what was last said of it, or, before its first time, what was said then.
    """

    def __init__(self, n: int, epochs: int, classes: int, *, steps: bool = False) -> None:
        """
        Args:
            n: rows of the data set
            steps: also record ``kl_step``, how far a prediction moved since the epoch before; 4 C bytes an image meanwhile
        """
        if classes < 2:
            raise Refused(f"score: {classes} class. A proxy needs at least two to tell apart.")
        self._said = torch.zeros(epochs, len(WATCHED), n)  # (E, 5, N) float32
        self._seen = torch.zeros(epochs, n, dtype=torch.bool)  # (E, N)
        self._ended = 0  # epochs that are complete
        self._now: Tensor | None = None  # (6, N) of the epoch under way, this rank's rows, zero elsewhere; row 5: seen
        # Log-probabilities, in half precision: what an error of theirs does to a step is multiplied by the probability.
        self._before = torch.zeros(n, classes, dtype=torch.float16) if steps else None  # (N, C) as last said
        self._after: Tensor | None = None  # (N, C) of the epoch under way, as ``_now``
        self._moved = torch.zeros(epochs, n) if steps else None  # (E, N)

    def add(self, index: Tensor, logits: Tensor, labels: Tensor, log_p: Tensor | None = None) -> None:
        """Take in a batch. An image whose logits are not finite counts as not seen.

        Args:
            index: (B,) row numbers
            logits: (B, C)
            labels: (B,) int64
            log_p: (B, C) float32, the logits' log_softmax, where somebody has it already
        """
        with torch.no_grad():
            now = self._current(logits.device)
            good = logits.isfinite().all(1)  # not asked whether all are: on a GPU the host would wait for the answer
            log_p = F.log_softmax(logits.float(), dim=1) if log_p is None else log_p
            now[:-1, index] = torch.where(good, watch(logits, labels, log_p), now[:-1, index])
            now[-1, index] = torch.where(good, 1.0, now[-1, index])
            if self._before is not None:
                if self._after is None:
                    self._after = torch.zeros_like(self._before, device=logits.device)
                said = log_p.clamp(min=torch.finfo(torch.float16).min).half()
                self._after[index] = torch.where(good[:, None], said, self._after[index])

    def end(self, epoch: int, world: World) -> None:
        """Close ``epoch``: bring together what the ranks saw. A second call for the same epoch does nothing."""
        if epoch < self._ended:
            return
        whole = self._gathered(world)
        self._said[epoch] = whole[:-1]
        self._seen[epoch] = whole[-1] > 0
        if self._before is not None and self._moved is not None:
            rows = torch.nonzero(self._seen[epoch])[:, 0]
            after = self._gathered_after(world)[rows].float()
            moved = (after.exp() * (after - self._before[rows].float()).abs()).sum(1)
            self._moved[epoch, rows] = torch.where(self._seen[:epoch, rows].any(0), moved, 0.0)
            self._before[rows] = after.half()
            self._after = None
        self._ended, self._now = epoch + 1, None

    def unseen(self) -> npt.NDArray[np.int64]:
        """(U,) rows that no complete epoch has shown."""
        return torch.nonzero(~self._seen[: self._ended].any(0))[:, 0].numpy()

    def signals(self, *, of_all: bool = True) -> dict[str, npt.NDArray[np.generic]]:
        """Name -> (E, N) in the dtypes of the vocabulary, of the epochs that are complete.

        Args:
            of_all: every image must have been seen; else of one that was not stands what is said of the middle one of the others

        Raises:
            Refused: some image was never seen.
        """
        never, seen, rows = self._ended, self._seen[: self._ended], self.unseen()
        epochs = torch.arange(never)[:, None]
        last = torch.where(seen, epochs, -1).cummax(0).values  # (E, N) epoch that last saw the image
        first = torch.where(seen, epochs, never).amin(0)  # (N,)
        if len(rows) and (of_all or len(rows) == seen.shape[1]):
            raise Refused(
                f"score: {len(rows)} images, row {int(rows[0])} first, were never seen by the proxy. "
                "Give it more epochs, or let it go through all rows."
            )
        source = torch.where(last < 0, first.clamp(max=never - 1), last)  # (E, N)
        signals = {}
        for number, name in enumerate(WATCHED):
            values = self._said[:never, number].gather(0, source).numpy()
            if len(rows):
                values[:, rows] = np.median(np.delete(values, rows, axis=1), axis=1, keepdims=True)
            dtype = VOCABULARY[name].dtype
            if np.issubdtype(dtype, np.floating):
                values = np.clip(values, -np.finfo(dtype).max, np.finfo(dtype).max)
            signals[name] = values.astype(dtype)
        if self._moved is not None:
            signals["kl_step"] = self._moved[:never].clamp(max=_MOST).numpy().astype(np.float16)
        return signals

    def state(self, world: World) -> dict[str, Tensor]:
        """All that a resumed proxy needs; every rank must call."""
        state = {
            "said": self._said.clone(),
            "seen": self._seen.to(torch.uint8),
            "ended": torch.tensor(self._ended),
            "now": self._gathered(world),
        }
        if self._before is not None and self._moved is not None:
            state |= {
                "before": self._before.clone(),
                "after": self._gathered_after(world),
                "moved": self._moved.clone(),
            }
        return state

    def load_state(self, state: dict[str, Tensor], world: World) -> None:
        """Take up what :meth:`state` gave, on any number of ranks."""
        self._said.copy_(state["said"])
        self._seen.copy_(state["seen"].bool())
        self._ended = int(state["ended"])
        # What all ranks saw lies on one of them; the sum over ranks is the same.
        self._now = state["now"].to(world.device, copy=True) if world.is_main else None
        if self._before is not None and self._moved is not None:
            self._before.copy_(state["before"])
            self._moved.copy_(state["moved"])
            self._after = state["after"].to(world.device, copy=True) if world.is_main else None

    def _current(self, device: torch.device) -> Tensor:
        if self._now is None:
            self._now = torch.zeros(len(WATCHED) + 1, self._said.shape[2], device=device)
        return self._now

    def _gathered(self, world: World) -> Tensor:
        """(6, N) of the epoch under way over all ranks: each row was seen by one, so that adding zeros is exact."""
        return world.sum_(self._current(world.device).clone()).cpu()

    def _gathered_after(self, world: World) -> Tensor:
        assert self._before is not None
        own = self._after if self._after is not None else torch.zeros_like(self._before)
        return world.sum_(own.clone()).cpu()


class Watched(Guest):
    """Shows a recorder every batch of a training."""

    name = "recorder"
    turn = Turn.WATCH

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def attach(self, training: Training) -> None:
        self._world = training.world

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        self._recorder.add(seen.batch.index, seen.logits, seen.batch.labels)
        return losses

    def end_epoch(self, epoch: int) -> None:
        self._recorder.end(epoch, self._world)

    def state(self) -> dict[str, Tensor]:
        return self._recorder.state(self._world)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._recorder.load_state(dict(state), self._world)


def watch(logits: Tensor, labels: Tensor, log_p: Tensor | None = None) -> Tensor:
    """What :data:`WATCHED` names, of each image of a batch.

    Args:
        logits: (B, C), C at least 2
        labels: (B,) int64
        log_p: as of :meth:`Recorder.add`

    Returns:
        (5, B) float32
    """
    logits = logits.float()
    log_p = F.log_softmax(logits, dim=1) if log_p is None else log_p
    p = log_p.exp()
    at = labels[:, None]
    error = p.scatter_add(1, at, -torch.ones_like(p[:, :1]))  # softmax - onehot
    others = torch.ones_like(p, dtype=torch.bool).scatter_(1, at, False)
    margin = logits.gather(1, at)[:, 0] - logits.masked_fill(~others, -torch.inf).amax(1)
    return torch.stack(
        [
            p.masked_fill(~others, -torch.inf).amax(1),
            error.norm(dim=1),
            -log_p.gather(1, at)[:, 0],
            -torch.special.xlogy(p, p).sum(1),
            margin,
        ]
    )


def says(p: Tensor, labels: Tensor, *, correct: bool) -> Tensor:
    """(..., B, C) -> (..., B): the probability of the label, or, with ``correct``, 1 where it is the highest and 0."""
    if correct:
        return (p.argmax(-1) == labels).float()
    return p.gather(-1, labels.expand(p.shape[:-1])[..., None])[..., 0]


def last_layer(
    model: nn.Module, loader: Loader, n: int, world: World, *, errors: bool = False
) -> dict[str, npt.NDArray[np.float16]]:
    """What the head reads of every image, in one pass in eval mode, and what its gradient is made of.

    Args:
        model: a timm model
        loader: goes through every row once over all ranks
        n: rows of the data set
        world: the ranks
        errors: also ``errors``

    Returns:
        ``embeddings`` (N, D), timm's ``forward_head(pre_logits=True)``; ``errors`` (N, C), softmax minus one-hot label

    Raises:
        Refused: a row did not come, or the model gives no features.
    """
    return _drained(_last_layer(model, loader, n, world, errors=errors, bf16=False))


def features(
    model: nn.Module, loader: Loader, n: int, world: World, *, bf16: bool = False
) -> Generator[int, None, npt.NDArray[np.float16]]:
    """The ``embeddings`` of :func:`last_layer`, told on the way how many rows of this rank are through.

    Args:
        model, loader, n, world: as there
        bf16: go forward in mixed precision
    """
    arrays = yield from _last_layer(model, loader, n, world, errors=False, bf16=bf16)
    return arrays["embeddings"]


def label_probability(
    model: nn.Module, loader: Loader, n: int, world: World, *, correct: bool = False
) -> npt.NDArray[np.float16]:
    """(N,) what :func:`says` of every image, in one pass in eval mode; arguments as of :func:`last_layer`."""

    def read(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"p": says(model(images).float().softmax(1), labels, correct=correct)[:, None]}

    return _drained(_of_every_image(model, loader, n, world, read, ("p",)))["p"][:, 0]


_Reading = Generator[int, None, dict[str, npt.NDArray[np.float16]]]


def _last_layer(model: nn.Module, loader: Loader, n: int, world: World, *, errors: bool, bf16: bool) -> _Reading:
    forward_features, forward_head = (getattr(model, name, None) for name in ("forward_features", "forward_head"))
    if forward_features is None or forward_head is None:
        raise Refused("score: embeddings need a timm model, with forward_features and forward_head.")

    def read(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            tokens = forward_features(images)
            values = {"embeddings": forward_head(tokens, pre_logits=True).flatten(1)}  # (B, D)
        if errors:
            p = forward_head(tokens).float().softmax(1)
            values["errors"] = p.scatter_add(1, labels[:, None], -torch.ones_like(p[:, :1]))
        return values

    names = ("embeddings", "errors") if errors else ("embeddings",)
    return (yield from _of_every_image(model, loader, n, world, read, names))


def _of_every_image(
    model: nn.Module,
    loader: Loader,
    n: int,
    world: World,
    read: Callable[[Tensor, Tensor], dict[str, Tensor]],
    names: tuple[str, ...],
) -> _Reading:
    """Name -> (N, X): what ``read`` gives for images and labels, (B, X) of each batch, brought together over the ranks."""
    training = model.training
    model.eval()
    whole: dict[str, Tensor] = {}
    seen = torch.zeros(n, dtype=torch.int64)
    done = 0
    try:
        for batch in loader.epoch(0):
            with torch.no_grad():
                values = read(batch.images, batch.labels)
            rows = batch.index.cpu()
            for name, value in values.items():
                if name not in whole:
                    whole[name] = torch.zeros(n, value.shape[1], dtype=torch.float16)
                whole[name][rows] = value.float().clamp(-_MOST, _MOST).half().cpu()
            seen[rows] += 1
            done += len(rows)
            yield done
    finally:
        model.train(training)
    missing = torch.nonzero(world.sum_(seen) == 0)
    if len(missing):
        raise Refused(f"score: {len(missing)} rows, {int(missing[0])} first, did not come from the loader.")
    for name in names:
        width = world.max(whole[name].shape[1] if name in whole else 0)  # a rank may have had no rows
        whole[name] = world.sum_(whole.get(name, torch.zeros(n, width, dtype=torch.float16)))
    return {name: whole[name].numpy() for name in names}


def _drained(reading: _Reading) -> dict[str, npt.NDArray[np.float16]]:
    while True:
        try:
            next(reading)
        except StopIteration as stop:
            arrays: dict[str, npt.NDArray[np.float16]] = stop.value
            return arrays
