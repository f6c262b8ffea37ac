"""One pass over the calibration images: what the criteria read, and what compensation needs.

Gates of 1 are multiplied into the inputs of proj and fc2, and into the queries, one for each image and unit, shape (B, 1, U):
one backward of the summed loss then gives every image's gradient for every unit. Nothing of the model is changed, and the
parameters' own gradients are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lotus.pruning import criteria
from lotus.pruning.compensate import Compensate, Moments
from lotus.vit import anatomy
from lotus.vit.anatomy import Block
from selection import methods
from selection.errors import Refused


@dataclass
class Measured:
    """What one pass gave, by site: ``blocks.3.attn``, ``blocks.3.mlp`` and, for gradients, ``blocks.3.qk``."""

    images: int = 0
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    """(N, U) float32; empty where they were not asked for."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """Of the inputs of proj and fc2; empty where they were not asked for."""


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    gradients: bool,
    moments: Compensate,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Go through ``batches`` once, in eval mode, on the model's device.

    Args:
        model: A supported ViT; its mode is put back afterwards.
        batches: Of (images, labels, ...) or, without ``gradients``, of images alone.
        gradients: Record the loss' derivative by every gate, an image at a time.
        moments: What to keep of the activations: nothing, means, or means and covariances.
        progress: Told the images done so far after each batch.

    Raises:
        Refused: no batch came, labels are missing, or the loss is not finite.
    """
    found = anatomy.blocks(model)
    parameter = next(model.parameters())
    result = Measured()
    if moments != "none":
        for site in anatomy.sites(model):
            result.moments[site] = Moments(covariance=moments == "affine")
    recorded: dict[str, list[Tensor]] = {}
    gates: dict[str, Tensor] = {}

    def look(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            (x,) = args
            if site in result.moments:
                result.moments[site].add(x)
            if not gradients:
                return None
            gates[site] = torch.ones(x.shape[0], 1, x.shape[2], dtype=x.dtype, device=x.device, requires_grad=True)
            return (x * gates[site],)

        return hook

    def gate_queries(site: str, count: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            gates[site] = torch.ones(out.shape[0], 1, count, dtype=out.dtype, device=out.device, requires_grad=True)
            return torch.cat((out[..., :count] * gates[site], out[..., count:]), dim=-1)

        return hook

    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for site, linear in anatomy.sites(model).items():
            stack.callback(linear.register_forward_pre_hook(look(site)).remove)
        if gradients:
            for block in found:
                count = block.dims.heads * block.dims.qk_dim
                stack.callback(block.qkv.register_forward_hook(gate_queries(f"{block.name}.qk", count)).remove)
        for images, labels in _pairs(batches, gradients):
            images = images.to(parameter.device, parameter.dtype)
            with torch.set_grad_enabled(gradients):
                logits = model(images)
                if not torch.isfinite(logits).all():
                    raise Refused(
                        f"The model's output is not finite after {result.images} calibration images. Are its weights?"
                    )
                if gradients:
                    assert labels is not None
                    _refuse_labels(logits, labels)
                    loss = functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
                    for (site, _), gradient in zip(
                        gates.items(), torch.autograd.grad(loss, list(gates.values())), strict=True
                    ):
                        recorded.setdefault(site, []).append(gradient.squeeze(1).float().cpu())
                    gates.clear()
            result.images += len(images)
            if progress is not None:
                progress(result.images)
    if result.images == 0:
        raise Refused("prune: no calibration batch came. Give some images, e.g. 2,048.")
    while recorded:  # a site at a time: all of them are N times the model's width, twice would be much
        site, parts = recorded.popitem()
        result.gradients[site] = torch.cat(parts).numpy()
    return result


def score(
    model: nn.Module,
    criterion: Callable[..., np.ndarray],
    options: Mapping[str, Any],
    *,
    gradients: Mapping[str, np.ndarray],
    gates: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Scores of every unit by site, float64: what :func:`lotus.pruning.budget.fit_plan` reads.

    A criterion that reads learned gates says nothing of query/key dimensions, which have none: they are ranked by magnitude,
    and a head's are together worth as much as its outputs.

    Raises:
        Refused: the criterion reads what is not here, has no such option, or returns something else than a score a unit.
    """
    rng = np.random.default_rng(seed)
    scores: dict[str, np.ndarray] = {}
    for block in anatomy.blocks(model):
        heads, qk_dim, v_dim, _ = block.dims
        for site, known in _weights(block).items():
            units = len(known["reads"])
            known = {**known, "units": units, "rng": rng}
            if site in gradients:
                known["gradients"] = gradients[site].astype(np.float64)
            if gates is not None and site in gates:
                known["gates"] = gates[site].detach().double().cpu().numpy()
            if site.endswith(".qk") and "gates" in methods.reads(criterion):
                continue
            found = np.asarray(methods.call(criterion, known, options, place="prune.criterion"), dtype=np.float64)
            if found.shape != (units,):
                raise Refused(f"{site}: the criterion gave scores of shape {found.shape}, not ({units},).")
            scores[site] = found
        site = f"{block.name}.qk"
        if site not in scores:
            known = _weights(block)[site]
            size = criteria.magnitude(known["reads"], known["writes"]).reshape(heads, qk_dim)
            worth = scores[f"{block.name}.attn"].reshape(heads, v_dim).sum(axis=1, keepdims=True)
            total = size.sum(axis=1, keepdims=True)
            scores[site] = (worth * size / np.where(total > 0, total, 1)).reshape(-1)
    return scores


def _weights(block: Block) -> dict[str, dict[str, Any]]:
    """What makes each unit and what it writes, by site: ``reads`` and ``writes``, (U, ...) float64 arrays."""
    heads, qk_dim, _, _ = block.dims
    inner = heads * qk_dim
    qkv = _with_bias(block.qkv)
    return {
        f"{block.name}.qk": {"reads": qkv[:inner], "writes": qkv[inner : 2 * inner]},
        f"{block.name}.attn": {"reads": qkv[2 * inner :], "writes": _columns(block.proj, block.module, "ls1")},
        f"{block.name}.mlp": {"reads": _with_bias(block.fc1), "writes": _columns(block.fc2, block.module, "ls2")},
    }


def _with_bias(linear: nn.Linear) -> np.ndarray:
    """(out, in + 1): a unit's row and its bias."""
    weight = linear.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()
    return torch.cat((weight, bias[:, None]), dim=1).cpu().numpy()


def _columns(linear: nn.Linear, block: nn.Module, scale: str) -> np.ndarray:
    """(in, out): what a unit writes, times LayerScale."""
    weight = linear.weight.detach().double()
    gamma = getattr(getattr(block, scale, None), "gamma", None)
    if gamma is not None:
        weight = weight * gamma.detach().double()[:, None]
    return weight.T.cpu().numpy()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode without activation checkpointing; every module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    checkpointing = getattr(model, "grad_checkpointing", None)
    model.eval()
    if checkpointing:
        model.grad_checkpointing = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if checkpointing:
            model.grad_checkpointing = checkpointing


def _pairs(batches: Iterable[Any], labelled: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    for batch in batches:
        if isinstance(batch, Tensor):
            images, labels = batch, None
        elif isinstance(batch, (tuple, list)) and batch:
            images, labels = batch[0], batch[1] if len(batch) > 1 else None
        else:
            raise Refused(f"prune: a calibration batch is (images, labels), not {type(batch).__name__}.")
        if labelled and labels is None:
            raise Refused("prune: this criterion reads gradients of the loss, so a batch must be (images, labels).")
        if len(images):
            yield images, labels


def _refuse_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2:
        raise Refused(
            f"prune: the model gives {tuple(logits.shape)}, not (images, classes): it has no classifier to take a loss of."
        )
    if labels.ndim == 1 and len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
        raise Refused(
            f"prune: labels run from {int(labels.min())} to {int(labels.max())}, the model has {logits.shape[1]} classes."
        )
