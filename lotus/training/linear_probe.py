"""Linear heads on features that were computed once: many trainings at the price of one forward pass.

No engine and no autograd: the gradient of softmax regression is a formula, and K heads are K slices of one product.

Legend: N images, M that a head trains on, K heads, B batch, C classes, D width of the features, E epochs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lotus.config import Recipe
from lotus.data.sample_plan import SamplePlan
from lotus.events import Step
from lotus.training.distributed import StopFlag, World
from lotus.training.dynamics import Recorder, says
from lotus.training.loop import Stopped
from lotus.training.objective import soft_targets
from lotus.training.optim import make_optimizer, make_schedule, set_lr
from selection.errors import Refused

_MOST = float(np.finfo(np.float16).max)
AT_ONCE = 1 << 30  # bytes that the recorder of a group of heads may take
_WIDENED = 1 << 28  # numbers up to which features are made float32 once instead of batch by batch: a gigabyte
_TOGETHER = 32  # heads at most: more make a step no cheaper a head
_ROWS = 1 << 14  # rows that are looked at together


class Heads(nn.Module):
    """K linear classifiers side by side; head k starts from ``seeds[k]`` alone, whoever stands beside it."""

    def __init__(self, width: int, classes: int, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        super().__init__()
        starts = [torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.weight = nn.Parameter(0.01 * torch.stack(starts).to(device))  # (K, C, D)
        self.bias = nn.Parameter(torch.zeros(len(seeds), classes, device=device))  # (K, C)

    def no_weight_decay(self) -> set[str]:
        """timm asks: a (K, C) bias looks like a matrix."""
        return {"bias"}

    def forward(self, features: Tensor) -> Tensor:
        """(K, B, D), or (B, D) for all heads alike -> (K, B, C)."""
        return torch.matmul(features.float(), self.weight.transpose(1, 2)) + self.bias[:, None]

    @torch.no_grad()
    def descend(self, features: Tensor, labels: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """Leave in ``grad`` the gradient of each head's mean cross-entropy, clipped head by head.

        The mean is over ``recipe.batch_size`` images however many there are, as in the training loop, so that an image in the
        smaller last step of an epoch weighs what any other does.

        Args:
            features: (K, B, D) float32
            labels: (K, B)

        Returns:
            (K, B, C) logits, (K, B, C) log-probabilities
        """
        logits: Tensor = self(features)
        log_p = logits.log_softmax(-1)
        targets = soft_targets(labels.flatten(), logits.shape[-1], recipe.smoothing).view_as(logits)
        error = (log_p.exp() - targets) / recipe.batch_size
        by_weight, by_bias = error.transpose(1, 2) @ features, error.sum(1)  # (K, C, D), (K, C)
        if recipe.clip:
            norm = (by_weight.square().sum((1, 2)) + by_bias.square().sum(1)).sqrt()  # (K,)
            scale = (recipe.clip / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
            by_weight, by_bias = by_weight * scale[:, None, None], by_bias * scale[:, None]
        self.weight.grad, self.bias.grad = by_weight, by_bias
        return logits, log_p


def standardized(features: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Each dimension with mean 0 and variance 1 over the images, one that does not vary 0: what the heads read.

    A batch norm without scale and shift before the classifier, as in MAE (2111.06377, appendix A.1): one learning rate then
    serves the features of any model.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    spread = np.zeros(features.shape[1])
    for first in range(0, len(features), _ROWS):
        spread += ((features[first : first + _ROWS] - mean) ** 2).sum(axis=0)
    std = np.sqrt(spread / len(features))
    still = std <= 1e-3 * np.abs(mean) + 1e-7  # no more than half precision rounds by
    found = np.empty_like(features)
    for first in range(0, len(features), _ROWS):
        part = np.where(still, 0, (features[first : first + _ROWS] - mean) / np.where(still, 1, std))
        found[first : first + _ROWS] = np.clip(part, -_MOST, _MOST)
    return found


def groups(heads: int, images: int, classes: int, recipe: Recipe, *, steps: bool) -> list[range]:
    """Heads that are trained together, so that what is recorded of them fits into a gigabyte; one at least."""
    each = images * (5 * 4 + 1 + 8) * recipe.epochs + (images * classes * 4 if steps else 0)  # see dynamics.Recorder
    size = min(heads, _TOGETHER, max(1, AT_ONCE // each))
    return [range(first, min(heads, first + size)) for first in range(0, heads, size)]


def fit(
    heads: Heads,
    features: Tensor,
    labels: Tensor,
    plans: Sequence[SamplePlan],
    recipe: Recipe,
    *,
    recorder: Recorder | None = None,
    stop: StopFlag | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Step]:
    """Train ``heads``; yields a sign of life an epoch, and each second of a longer one.

    Args:
        features: (N, D) of all images, in half precision or not
        labels: (N,)
        plans: which rows each head goes through, in which order; all of the same number
        recipe: of the proxy
        recorder: of K N rows, those of head 0 first; is shown every batch
        stop: asked after each step; None: nobody stops it
        clock: seconds, by which signs of life come

    Raises:
        Refused: the heads' weights are not finite in the end.
        Stopped: ``stop`` was raised.
    """

    def sign(epoch: int, part: float, log_p: Tensor, own: Tensor, lr: float) -> Step:
        loss = -log_p.gather(2, own[..., None]).mean()
        values = {"epoch": epoch + part, "loss": float(loss), "lr": lr}
        return Step("score", epoch + int(part), recipe.epochs, unit="epochs", values=values)

    optimizer = make_optimizer(heads, recipe, place="score")
    rate = make_schedule(recipe, place="score")
    if features.numel() <= _WIDENED:
        features = features.float()
    images, steps, world = len(labels), plans[0].steps(), World(device=features.device)
    first_row = torch.arange(len(plans), device=features.device)[:, None] * images  # (K, 1)
    told = clock()
    for epoch in range(recipe.epochs):
        orders = torch.from_numpy(np.stack([plan.order(epoch) for plan in plans])).to(features.device)  # (K, M)
        for number, rows in enumerate(orders.split(recipe.batch_size, dim=1)):  # (K, B)
            own = labels[rows]
            logits, log_p = heads.descend(features[rows].float(), own, recipe)
            if recorder is not None:
                recorder.add((rows + first_row).flatten(), logits.flatten(0, 1), own.flatten(), log_p.flatten(0, 1))
            lr, _ = rate(epoch * steps + number, steps)
            set_lr(optimizer, lr)
            optimizer.step()
            if stop:
                raise Stopped(
                    f"score: stopped ({stop.reason}). The features are kept; the same command goes on from them."
                )
            if clock() - told >= 1 and number + 1 < steps:
                told = clock()
                yield sign(epoch, (number + 1) / steps, log_p, own, lr)
        if recorder is not None:
            recorder.end(epoch, world)
        told = clock()
        yield sign(epoch, 1.0, log_p, own, lr)
    if not all(bool(p.isfinite().all()) for p in heads.parameters()):
        raise Refused(f"linear probe: the heads' weights are not finite. Lower lr ({recipe.lr:g}), or set clip=1.")


def _among(groups: int, number: int, signs: Iterator[Step]) -> Iterator[Step]:
    """The signs of life of group ``number``, counted over the epochs of all groups."""
    for sign in signs:
        yield dataclasses.replace(sign, done=number * sign.total + sign.done, total=groups * sign.total)


@torch.no_grad()
def probabilities(heads: Heads, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which rows, and (K, B, C) what each head gives them, once through all."""
    step = max(1, (_ROWS << 10) // heads.bias.numel())
    for first in range(0, len(features), step):
        part = slice(first, min(len(features), first + step))
        yield part, heads(features[part]).softmax(-1)


def macs(trained: float, epochs: int, width: int, classes: int) -> float:
    """Multiply-accumulates of training: forward, and one product of the same size for the gradient of the weights.

    Args:
        trained: images, of all heads together
        epochs: of each head
        width: D of the features
        classes: C
    """
    return 2.0 * trained * epochs * width * classes


def watched(
    features: Tensor,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    gradients: bool,
    stop: StopFlag | None = None,
) -> Generator[Step, None, dict[str, npt.NDArray[np.generic]]]:
    """Train a head a seed on all images; what a proxy records of them.

    Returns:
        what :class:`Recorder` gives, each (K, E, N), and with ``gradients`` the first head's ``errors`` (N, C)
    """
    images, width = features.shape
    parts = groups(len(seeds), images, classes, recipe, steps=gradients)
    signals: list[dict[str, npt.NDArray[np.generic]]] = []
    errors: dict[str, npt.NDArray[np.generic]] = {}
    for number, part in enumerate(parts):
        own = [seeds[head] for head in part]
        heads = Heads(width, classes, own, features.device)
        recorder = Recorder(len(own) * images, recipe.epochs, classes, steps=gradients)
        plans = [SamplePlan(np.arange(images), seed=seed, batch_size=recipe.batch_size) for seed in own]
        signs = fit(heads, features, labels, plans, recipe, recorder=recorder, stop=stop)
        yield from _among(len(parts), number, signs)
        signals.append(
            {
                name: values.reshape(recipe.epochs, len(own), images).transpose(1, 0, 2)
                for name, values in recorder.signals().items()
            }
        )
        if gradients and not errors:
            error = np.empty((images, classes), np.float16)
            for rows, p in probabilities(heads, features):
                p[0, torch.arange(len(p[0])), labels[rows]] -= 1
                error[rows] = p[0].half().cpu().numpy()
            errors["errors"] = error
    return {name: np.concatenate([one[name] for one in signals]) for name in signals[0]} | errors


def on_parts(
    features: Tensor,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    *,
    run_in: npt.NDArray[np.bool_],
    seeds: Sequence[int],
    correct: bool = False,
    stop: StopFlag | None = None,
) -> Generator[Step, None, npt.NDArray[np.float16]]:
    """Train head k on the images of ``run_in[k]`` alone; what each says of every image in the end.

    Args:
        features: (N, D) of all images
        labels: (N,)
        classes: C
        recipe: of the proxy
        run_in: (K, N), the same number in each row
        seeds: (K,) of the heads
        correct: whether the label had the highest logit, instead of its probability
        stop: asked after each step; None: nobody stops it

    Returns:
        (K, N), ``run_p_label`` of the vocabulary
    """
    images, width = features.shape
    found = np.empty(run_in.shape, np.float16)
    parts = groups(len(seeds), images, classes, recipe, steps=False)
    for number, part in enumerate(parts):
        own = [seeds[head] for head in part]
        heads = Heads(width, classes, own, features.device)
        plans = [
            SamplePlan(np.flatnonzero(run_in[head]), seed=seeds[head], batch_size=recipe.batch_size) for head in part
        ]
        yield from _among(len(parts), number, fit(heads, features, labels, plans, recipe, stop=stop))
        for rows, p in probabilities(heads, features):
            found[part.start : part.stop, rows] = says(p, labels[rows], correct=correct).half().cpu().numpy()
    return found
