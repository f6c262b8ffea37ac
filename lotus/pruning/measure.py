"""One pass over the calibration images: what the criteria read, and what compensation needs.

Gates of 1 are multiplied into the inputs of proj and fc2, and into the queries, one for each image and unit, shape (B, 1, U):
one backward of the summed loss then gives every image's gradient for every unit. Nothing of the model is changed, and the
parameters' own gradients are neither read nor written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lotus.pruning.compensate import Compensate, Moments
from lotus.vit import anatomy
from lotus.vit.anatomy import Block
from lotus.vit.attention import matrix
from selection.errors import Refused

_AT_ONCE = 1 << 24  # numbers: 64 MiB
TOKENS = 400
"""Tokens of images that go through together on a CPU, where more are hardly faster: what a backward needs of them is held meanwhile."""
ENOUGH = 100_000
"""Tokens, of all calibration images together, beyond which scores and maps did not get better (docs/log.md)."""
FEWEST, MOST = 512, 2048
"""Calibration images, whatever their tokens: scores are an image's, not a token's."""
MANY = 64
"""Tokens of an image beyond which moments take some of them: neighbors say nearly the same, and the products of an MLP's units
cost more than the model."""


@dataclass
class Measured:
    """What one pass gave, by site: ``blocks.3.attn``, ``blocks.3.mlp`` and, for gradients, ``blocks.3.qk``."""

    images: int = 0
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    """(N, U) float32; empty where they were not asked for."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """Of the inputs of proj and fc2; empty where they were not asked for."""
    logits: dict[str, Logits] = field(default_factory=dict)
    """By block; empty where they were not asked for."""
    squares: dict[str, np.ndarray] = field(default_factory=dict)
    """``blocks.3.qkv``, ``.proj``, ``.fc1``, ``.fc2`` -> (out, in + 1) mean over images of the squared derivative of the loss
    by each weight, the bias last; empty where they were not asked for."""
    attention: dict[str, np.ndarray] = field(default_factory=dict)
    """By block, (H,): the largest attention of a query to a token, the mean over queries and images; empty where not asked for."""


class Logits:
    """What the logits of a block are made of: second moments of queries and keys, by head.

    Softmax does not see what is added to a whole row of logits, so the keys' moment is taken about each image's own mean; the
    queries' is taken about zero.
    """

    def __init__(self, block: Block) -> None:
        self.heads, self.dim = block.dims.heads, block.dims.qk_dim
        self.images = self.tokens = 0
        self._queries = torch.zeros(self.heads, self.dim, self.dim, dtype=torch.float64)
        self._keys = self._queries.clone()

    @torch.no_grad()
    def add(self, out: Tensor) -> None:
        """Take in what qkv gives, (B, N, H (2 Q + V))."""
        inner = self.heads * self.dim
        q, k = (
            part.reshape(*part.shape[:2], self.heads, self.dim).permute(2, 0, 1, 3)  # (H, B, N, Q)
            for part in _exact(out.detach()[..., : 2 * inner]).split(inner, dim=-1)
        )
        k = k - k.mean(dim=2, keepdim=True)
        self._queries = self._queries.to(q.device) + _products(q)
        self._keys = self._keys.to(k.device) + _products(k)
        self.images, self.tokens = self.images + len(out), self.tokens + out.shape[0] * out.shape[1]

    @property
    def queries(self) -> Tensor:
        """(H, Q, Q) float64."""
        return self._queries / self.tokens

    @property
    def keys(self) -> Tensor:
        """(H, Q, Q) float64, about each image's mean."""
        return self._keys / self.tokens


def is_backbone(model: Any) -> bool:
    """Whether what ``model`` gives are features, not scores of classes."""
    return getattr(model, "num_classes", None) == 0


def enough(model: Any) -> int:
    """How many calibration images to look at where nobody says: large images have more tokens each, so fewer do."""
    return min(MOST, max(FEWEST, ENOUGH // (getattr(model.patch_embed, "num_patches", None) or 1)))


@dataclass(frozen=True)
class What:
    """What to record as the images go through."""

    gradients: bool
    """The loss' derivative by every gate, an image at a time."""
    moments: Compensate
    """What to keep of the activations: nothing, means, or means and covariances."""
    logits: bool = False
    """The moments of queries and keys too."""
    squares: bool = False
    """The mean square over images of the loss' derivative by every weight that can be cut."""
    in_channels: bool = False
    """Gradients and moments also of what qkv and fc1 read."""
    attention: bool = False
    """How much each head's queries attend to what they attend to most."""

    @property
    def graph(self) -> bool:
        """Whether there has to be a backward."""
        return self.gradients or self.squares


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    every: int = 1,
    progress: Callable[[int], None] | None = None,
    **what: Any,
) -> Measured:
    """Go through ``batches`` once, in eval mode, on the model's device.

    Args:
        model: A supported ViT; its mode is put back afterwards.
        batches: Of (images, labels, ...) or, without ``gradients`` and ``squares``, of images alone.
        every: Look at one in so many images of each batch.
        progress: Told the images gone through so far.
        what: What to record: the fields of :class:`What`.

    Raises:
        Refused: no batch came, labels are missing, or the loss is not finite.
    """
    watching, parameter = _Watching(model, What(**what)), next(model.parameters())
    result, graph = watching.result, watching.what.graph
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))
        watching.hook(model, stack)
        apart = graph and parameter.device.type == "cpu"
        for images, labels, through in _few(
            pairs(batches, graph and not is_backbone(model)), model, every, apart=apart
        ):
            with torch.set_grad_enabled(graph):
                scores = model(images.to(parameter.device, parameter.dtype))
                if not torch.isfinite(scores).all():
                    raise Refused(
                        f"The model's output is not finite after {result.images} calibration images. Are these finite, and the weights?"
                    )
                if graph:
                    watching.back(scores, labels)
            result.images += len(images)
            if progress is not None:
                progress(through)
    return watching.done()


class _Watching:
    """Hooks that record a pass, and what they recorded."""

    def __init__(self, model: nn.Module, what: What) -> None:
        self.what, self.result = what, Measured()
        if what.moments != "none":
            for site in anatomy.sites(model, in_channels=what.in_channels):
                self.result.moments[site] = Moments(covariance=what.moments != "mean")
        self._recorded: dict[str, _Rows] = {}
        self._gates: dict[str, Tensor] = {}
        self._tracked: list[tuple[str, nn.Linear, Tensor, Tensor]] = []
        self._backbone, self._chance = is_backbone(model), torch.Generator().manual_seed(0)

    def hook(self, model: nn.Module, stack: ExitStack) -> None:
        """Hook on to ``model`` until ``stack`` is left."""
        blocks, what = anatomy.blocks(model), self.what
        attentive = [block for block in blocks if block.has_attn]
        if what.squares:  # before the gates, whose inputs these outputs are
            for block in blocks:
                for name, linear in block.linears.items():
                    stack.callback(linear.register_forward_hook(self._track(f"{block.name}.{name}")).remove)
        if what.logits:
            for block in attentive:
                stack.callback(block.qkv.register_forward_hook(self._keep_logits(block)).remove)
        if what.attention:
            for block in attentive:
                stack.callback(block.qkv.register_forward_hook(self._keep_attention(block)).remove)
        for site, linear in anatomy.sites(model, in_channels=what.in_channels).items():
            stack.callback(linear.register_forward_pre_hook(self._look(site)).remove)
        if what.gradients:
            for block in attentive:
                stack.callback(block.qkv.register_forward_hook(self._gate_queries(block)).remove)

    def _look(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        turn = itertools.count()

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            (x,) = args
            if site in self.result.moments:
                self.result.moments[site].add(some_tokens(x, next(turn)))
            if not self.what.gradients:
                return None
            self._gates[site] = torch.ones(
                x.shape[0], 1, x.shape[2], dtype=x.dtype, device=x.device, requires_grad=True
            )
            return (x * self._gates[site],)

        return hook

    def _gate_queries(self, block: Block) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        site, count = f"{block.name}.qk", block.dims.heads * block.dims.qk_dim

        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            self._gates[site] = torch.ones(
                out.shape[0], 1, count, dtype=out.dtype, device=out.device, requires_grad=True
            )
            return torch.cat((out[..., :count] * self._gates[site], out[..., count:]), dim=-1)

        return hook

    def _keep_attention(self, block: Block) -> Callable[[nn.Module, Any, Tensor], None]:
        self.result.attention[block.name] = np.zeros(block.heads)

        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            most = matrix(block.attn, out.detach()).amax(dim=-1).mean(dim=-1)  # (B, H)
            self.result.attention[block.name] += most.sum(dim=0).double().cpu().numpy()

        return hook

    def _keep_logits(self, block: Block) -> Callable[[nn.Module, Any, Tensor], None]:
        into = self.result.logits[block.name] = Logits(block)
        return lambda _, __, out: into.add(out)

    def _track(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if not out.requires_grad:  # nothing before it does: frozen, or the first block
                out = out.detach().requires_grad_()
            assert isinstance(linear, nn.Linear)
            self._tracked.append((name, linear, args[0].detach(), out))
            return out

        return hook

    def back(self, scores: Tensor, labels: Tensor | None) -> None:
        """Take the derivatives of the loss of a part that has gone through."""
        count, gates, tracked = len(scores), self._gates, self._tracked
        if self._backbone:
            loss = self._projected(scores)
        else:
            assert labels is not None
            _refuse_labels(scores, labels)
            loss = functional.cross_entropy(scores.float(), labels.to(scores.device), reduction="sum")
        slopes = torch.autograd.grad(loss, [*gates.values(), *(out for *_, out in tracked)])
        for site, slope in zip(gates, slopes, strict=False):
            each = slope.reshape(count, -1, slope.shape[-1]).sum(1)  # over an image's windows
            self._recorded.setdefault(site, _Rows()).add(each.float().cpu().numpy())
        for (name, linear, x, _), slope in zip(tracked, slopes[len(gates) :], strict=True):
            total = _squares(linear, *(t.reshape(count, -1, t.shape[-1]) for t in (x, slope))).cpu().numpy()
            self.result.squares[name] = self.result.squares.get(name, 0) + total
        gates.clear()
        tracked.clear()

    def _projected(self, features: Tensor) -> Tensor:
        """A backbone's features on random axes, an image's on its own: the derivative's mean square by a gate is that of all
        features, sum_i (df_i/dg)^2, and half of it what the squared error ||f - f0||^2 / 2 rises by when the unit goes, to second
        order (Hutchinson's estimate of the Gauss-Newton diagonal; ours)."""
        axes = torch.randn(features.shape, generator=self._chance).to(features.device)
        return (features.float() * axes).sum()

    def done(self) -> Measured:
        """What was recorded.

        Raises:
            Refused: nothing went through.
        """
        result = self.result
        if result.images == 0:
            raise Refused("prune: no calibration batch came. Give some images, e.g. 2,048.")
        for total in (*result.squares.values(), *result.attention.values()):
            total /= result.images
        result.gradients = {site: rows.held for site, rows in self._recorded.items()}
        return result


class _Rows:
    """Rows that come a few at a time, in one array: small pieces between what a pass frees would keep all of it from being used again."""

    def __init__(self) -> None:
        self._room, self._count = np.empty((0, 0), np.float32), 0

    def add(self, rows: np.ndarray) -> None:
        """Take in (B, U) rows."""
        end = self._count + len(rows)
        if end > len(self._room):
            more = np.empty((max(FEWEST, end, 2 * len(self._room)), rows.shape[1]), np.float32)
            if self._count:
                more[: self._count] = self.held
            self._room = more
        self._room[self._count : end] = rows
        self._count = end

    @property
    def held(self) -> np.ndarray:
        """(N, U)"""
        return self._room[: self._count]


def _squares(linear: nn.Linear, x: Tensor, slope: Tensor) -> Tensor:
    """(out, in + 1) sum over images of the squared derivative by each weight, from (B, N, in) inputs and (B, N, out) slopes."""
    x = torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)
    total = torch.zeros(slope.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
    some = max(1, _AT_ONCE // total.numel())
    for inputs, slopes in zip(x.float().split(some), slope.float().split(some), strict=True):
        total += (slopes.transpose(1, 2) @ inputs).square_().sum(dim=0)  # (b, out, in + 1)
    return total.double() if total.device.type != "mps" else total


def _products(x: Tensor) -> Tensor:
    """(H, Q, Q) sums of products over (H, B, N, Q)."""
    rows = x.flatten(1, 2)
    return rows.transpose(1, 2) @ rows


def _exact(x: Tensor) -> Tensor:
    """At least float32, where float64 sums can be kept (mps has none)."""
    x = x.cpu() if x.device.type == "mps" else x
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode without activation checkpointing; every module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    checkpointing = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    model.eval()
    for module in checkpointing:  # Swin's stages have a switch each
        module.grad_checkpointing = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module in checkpointing:
            module.grad_checkpointing = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that a graph keeps nothing for theirs."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def some_tokens(x: Tensor, turn: int) -> Tensor:
    """(B, N, U) with some of the tokens, others each ``turn``: at least :data:`MANY`, and all of no more than twice as many."""
    stride = x.shape[1] // MANY if x.ndim == 3 else 1
    return x[:, turn % stride :: stride] if stride > 1 else x


def _few(
    batches: Iterator[tuple[Tensor, Tensor | None]], model: Any, every: int, *, apart: bool
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """One in ``every`` images of each batch, in small parts where they are to go through ``apart``; and how many of all are
    done after them."""
    tokens, done = getattr(model.patch_embed, "num_patches", None) or 1, 0
    for images, labels in batches:
        whole = len(images)
        images, labels = images[::every], None if labels is None else labels[::every]
        some = max(1, TOKENS // tokens) if apart else len(images)
        for start in range(0, len(images), some):
            part = slice(start, start + some)
            yield images[part], None if labels is None else labels[part], done + min(whole, every * (start + some))
        done += whole


def pairs(batches: Iterable[Any], labeled: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    for batch in batches:
        if isinstance(batch, Tensor):
            images, labels = batch, None
        elif isinstance(batch, (tuple, list)) and batch:
            images, labels = batch[0], batch[1] if len(batch) > 1 else None
        else:
            raise Refused(f"prune: a calibration batch is (images, labels), not {type(batch).__name__}.")
        if labeled and labels is None:
            raise Refused("prune: this criterion reads gradients of the loss, so a batch must be (images, labels).")
        for what, part in (("images", images), *([("labels", labels)] if labeled else [])):
            if not isinstance(part, Tensor):
                raise Refused(
                    f"prune: {what} of a calibration batch are a {type(part).__name__}, not a tensor. Give torch.as_tensor({what})."
                )
        if len(images):
            yield images, labels


def _refuse_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2:
        raise Refused(
            f"prune: the model gives {tuple(logits.shape)}, not (images, classes): it has no classifier to take a loss of."
        )
    if labels.shape == logits.shape and labels.is_floating_point():  # a probability for each class
        return
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise Refused(
            f"prune: labels are {str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}, not {len(logits)} class numbers. "
            "Give them as labels.long(), one an image."
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
        raise Refused(
            f"prune: labels run from {int(labels.min())} to {int(labels.max())}, the model has {logits.shape[1]} classes."
        )
