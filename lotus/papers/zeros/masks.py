"""Unstructured pruning: the smallest weights become zeros, one by one, and stay zeros.

No row and no column leaves, so that a thinned model has the shapes, the MACs and the speed of the dense one: what
shrinks is the file, once it is compressed. The published systems that work so (Sparse-ViT, essential sparsity, instant soup)
are here to be run and compared; whoever wants a faster model cuts dimensions.

A mask holds True where a weight stays. A saved model needs no file of masks: they are where its zeros are.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lotus.vit import anatomy
from selection.errors import Refused
from selection.methods import check_choice

Weights = Literal["linears", "sparse_vit"]
Masks = Mapping[str, Tensor]

SWEEP = tuple(round(0.05 * step, 2) for step in range(19))
"""Sparsities at which essential sparsity is looked for: 0 to 90 % by 5 (2306.03805, section 3)."""


def listed(model: nn.Module, weights: Weights = "linears") -> dict[str, nn.Parameter]:
    """The weights that may become zero, by name; queries, keys and values are the rows of one matrix.

    Args:
        model: a plain ViT
        weights: ``linears``: of every block, as in essential sparsity (2306.03805) and instant soup (2306.10460). ``sparse_vit``:
            those, the patch embedding, the blocks' norms and the classifier (2307.11988; its code prunes the norms' gains too).

    Raises:
        Refused: no such list, or no supported ViT.
    """
    check_choice(weights, ("linears", "sparse_vit"), place="prune.method.weights")
    everything = dict(model.named_parameters())
    parts: tuple[str, ...] = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    if weights == "linears":
        parts = tuple(part for part in parts if not part.startswith("norm"))
    names = [f"{block.name}.{part}.weight" for block in anatomy.blocks(model) for part in parts]
    if weights == "sparse_vit":
        names = ["patch_embed.proj.weight", *names, "head.weight", "head_dist.weight"]
    return {name: everything[name] for name in names if name in everything}


def kept_of(keep: float, total: int) -> int:
    """How many of ``total`` weights stay; rounded as torch.nn.utils.prune rounds the number that goes."""
    return total - round((1 - keep) * total)


def magnitude(weights: Mapping[str, Tensor], keep: float, within: Masks | None = None) -> dict[str, Tensor]:
    """Masks of the largest weights, all of them in one ranking (global L1 magnitude); exactly :func:`kept_of` stay.

    Of equal weights the one that comes first stays.

    Args:
        weights: by name
        keep: the fraction of their numbers that stays
        within: nothing beyond these masks stays; :func:`kept_of` is of all weights all the same

    Raises:
        Refused: weights that are not finite, or ``within`` leaves fewer than are to stay.
    """
    sizes = {name: weight.detach().abs().flatten().float() for name, weight in weights.items()}
    every = torch.cat(list(sizes.values()))
    if not torch.isfinite(every).all():
        raise Refused("prune: weights that are not finite cannot be ranked. Prune a checkpoint from before.")
    count = kept_of(keep, len(every))
    if within is not None:
        inside = torch.cat([within[name].flatten() for name in weights]).to(every.device)
        if int(inside.sum()) < count:
            raise Refused(f"prune.keep.weights: {count:,} are to stay, and {int(inside.sum()):,} are left. Keep fewer.")
        every = torch.where(inside, every, -1.0)  # below every size
    stays = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    if count:
        edge = every.kthvalue(len(every) - count + 1).values  # the smallest that stays
        stays = every > edge
        ties = (every == edge).nonzero().flatten()
        stays[ties[: count - int(stays.sum())]] = True
    parts = stays.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def n_of_m(weights: Mapping[str, Tensor], n: int = 2, m: int = 4) -> dict[str, Tensor]:
    """Masks of the ``n`` largest of every ``m`` neighbors along a row (N:M sparsity, 2104.08378); of equal ones the first.

    Raises:
        Refused: a weight whose rows do not divide into groups of ``m``.
    """
    masks = {}
    for name, weight in weights.items():
        if weight.ndim < 2 or weight.flatten(1).shape[1] % m:
            raise Refused(
                f"prune.method.pattern: the rows of {name} {tuple(weight.shape)} do not divide by {m}. Take linears."
            )
        groups = weight.detach().abs().reshape(-1, m)
        order = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
        masks[name] = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view_as(weight)
    return masks


def pattern(text: str) -> tuple[int, int]:
    """``"2:4"`` -> (2, 4).

    Raises:
        Refused: it is none.
    """
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise Refused(f"prune.method.pattern: {text!r} is no N:M pattern. Say e.g. 2:4, which keeps 2 of 4.")
    return int(n), int(m)


def union(masks: Sequence[Masks]) -> dict[str, Tensor]:
    """What any of the masks keeps."""
    found = {name: mask.clone() for name, mask in masks[0].items()}
    for one in masks[1:]:
        for name, mask in found.items():
            mask |= one[name]
    return found


def counted(masks: Masks) -> tuple[int, int]:
    """(weights that stay, all of them)."""
    return sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())


def zeros(model: nn.Module, weights: Weights = "linears") -> dict[str, Tensor]:
    """The masks of a thinned model: where its listed weights are not zero."""
    return {name: weight.detach() != 0 for name, weight in listed(model, weights).items()}


def put(model: nn.Module, masks: Masks) -> None:
    """Set what the masks do not keep to zero, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


@contextlib.contextmanager
def held(model: nn.Module, masks: Masks) -> Iterator[None]:
    """While entered, what the masks do not keep gets a gradient of exactly zero.

    A weight of zero whose gradient is zero from the first step on stays zero under every optimizer that works number by
    number, weight decay and moments included, whatever the ZeRO stage: the gradient is masked before it is reduced. See
    :func:`keeps_zeros`.
    """
    parameters = dict(model.named_parameters())
    handles = [parameters[name].register_hook(_masking(mask)) for name, mask in masks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masking(mask: Tensor) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        nonlocal mask
        mask = mask.to(gradient.device)  # the engine moves the model after the hook is there
        return gradient * mask

    return hook


def check(model: nn.Module, masks: Masks) -> None:
    """Refuse a model in which a masked weight has moved.

    Raises:
        Refused: names the weight.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        moved = int((parameters[name].detach()[~mask.to(parameters[name].device)] != 0).sum())
        if moved:
            raise Refused(
                f"{name}: {moved:,} weights that were pruned have moved. Train with an optimizer that works number by "
                "number, such as adamw."
            )


def keeps_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a weight of zero that has no gradient stays zero, tried on the optimizer's own parameters: they are used up.

    It does under all that work number by number, and not under those that mix a matrix' entries (muon, shampoo).
    """
    draw = torch.Generator().manual_seed(0)
    masked = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mask = torch.rand(parameter.shape, generator=draw) < 0.5
            masked.append((parameter, mask))
            parameter.data = torch.randn(parameter.shape, generator=draw) * mask
    for _ in range(3):
        for parameter, mask in masked:
            parameter.grad = torch.randn(parameter.shape, generator=draw) * mask
        optimizer.step()
    return all(bool((parameter.data[~mask] == 0).all()) for parameter, mask in masked)


def knee(sparsities: Sequence[float], top1: Sequence[float], drop: float = 1.0) -> float | None:
    """Essential sparsity (2306.03805, section 3): the last sparsity before one-shot magnitude first loses more than ``drop``
    points against the dense model; None where the last one still loses less, so that no knee was seen.

    Args:
        sparsities: ascending, beginning with 0
        top1: percent at each
    """
    for place in range(1, len(sparsities)):
        if top1[place] < top1[0] - drop:
            return sparsities[place - 1]
    return None


def compressed(file: Path) -> int:
    """Size in bytes of ``file`` once it is compressed (zlib, level 6): what zeros are worth on a disk."""
    packer, size = zlib.compressobj(6), 0
    with open(file, "rb") as data:
        while part := data.read(1 << 20):
            size += len(packer.compress(part))
    return size + len(packer.flush())
