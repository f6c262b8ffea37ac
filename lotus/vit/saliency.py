"""What patch scores read, off a model or off the images alone.

Shapes: B batch, S side of an image in pixels, n patches, P prefix tokens, N = P + n, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor, nn

from lotus.config import Method
from lotus.vit import anatomy, attention, patch_scores
from selection import methods
from selection.errors import Refused

ALONE = {"images", "patch", "rng"}
"""What can be read without a model."""
READS = ALONE | {"prefix", "has_class", "readout", "values", "attentions", "features"}
"""What a score may read: :func:`watch` says what it is."""


def _found(method: Method, shelves: Sequence[ModuleType], place: str) -> Callable[..., Any]:
    return methods.find([patch_scores, *shelves], method.name, place=place, here=READS)


def reads(method: Method, shelves: Sequence[ModuleType] = (), *, place: str = "train.patches.score") -> set[str]:
    """What a patch score reads.

    Raises:
        Refused: there is no such score.
    """
    return set(methods.reads(_found(method, shelves, place)))


def reads_a_model(method: Method, shelves: Sequence[ModuleType] = (), *, place: str = "train.patches.score") -> bool:
    """Whether a patch score needs a model to ask.

    Raises:
        Refused: there is no such score, or it has no such setting.
    """
    function = _found(method, shelves, place)
    methods.check_settings(function, method.options, place=place)
    return bool(set(methods.reads(function)) - ALONE)


def of_images(
    method: Method, shelves: Sequence[ModuleType] = (), *, place: str = "train.patches.score"
) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    """The score as a function of images (B, 3, S, S) and a patch's (height, width) -> (B, n).

    Raises:
        Refused: there is no such score, or it needs a model.
    """
    function = _found(method, shelves, place)

    def score(images: Tensor, patch: tuple[int, int]) -> Tensor:
        given = {"images": images.float(), "patch": patch, "rng": None}
        result: Tensor = methods.call(function, given, method.options, place=place)
        return result

    return score


def by_images(
    method: Method,
    patch: tuple[int, int],
    batches: Iterator[Any],
    shelves: Sequence[ModuleType] = (),
    *,
    seed: int,
    place: str = "train.patches.score",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers (B,) and scores (B, n) of each batch, read off the images alone, on the CPU.

    Args:
        method: the score's name and options
        patch: height and width of a patch
        batches: of a loader, with ``images`` and ``index``
        shelves: modules with scores of the user's own
        seed: what a random score follows from
        place: where the score is named, for a refusal

    Raises:
        Refused: there is no such score, or it needs a model.
    """
    function = _found(method, shelves, place)
    rng = torch.Generator().manual_seed(seed)
    for batch in batches:
        given = {"images": batch.images.cpu(), "patch": patch, "rng": rng}
        yield batch.index.cpu(), _checked(methods.call(function, given, method.options, place=place), method, place)


def _checked(scores: Tensor, method: Method, place: str) -> Tensor:
    if not bool(scores.isfinite().all()):
        raise Refused(f"{place}: {method.name!r} gives a score that is not finite. Is what it reads sound?")
    return scores.float().cpu()


class Attentions(Sequence[Tensor]):
    """Each block's attention (B, H, N, N), made when it is looked at, so that one of them is held at a time."""

    def __init__(self, made: Sequence[Callable[[], Tensor]]) -> None:
        self._made = made

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, place: Any) -> Any:
        return Attentions(self._made[place]) if isinstance(place, slice) else self._made[place]()


def watch(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """One forward pass: everything that a score of :mod:`lotus.vit.patch_scores` may read. Fused attention stays on."""
    vit: Any = model
    anatomy.plain(model, "a score of patches")
    every = anatomy.blocks(model)
    blocks = [block for block in every if block.has_attn]
    if not blocks:
        raise Refused(f"{type(model).__name__}: no block has an attention any more that could be asked.")
    qkvs: list[Tensor] = []
    handles = [block.qkv.register_forward_hook(lambda module, inputs, out: qkvs.append(out)) for block in blocks]
    features: list[Tensor] = []
    handles.append(every[-1].module.register_forward_hook(lambda module, inputs, out: features.append(out)))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    prefix, has_class = int(vit.num_prefix_tokens), vit.cls_token is not None
    attn = blocks[-1].attn
    made = [lambda block=block, qkv=qkv: attention.matrix(block.attn, qkv) for block, qkv in zip(blocks, qkvs)]
    return {
        "images": images,
        "patch": tuple(vit.patch_embed.patch_size),
        "rng": None,
        "prefix": prefix,
        "has_class": has_class,
        "readout": attention.row(attn, qkvs[-1], prefix, has_class=has_class),
        "values": attention.parts(attn, qkvs[-1])[2],
        "attentions": Attentions(made),
        "features": features[0],
    }


def by_model(
    method: Method,
    model: nn.Module,
    batches: Iterator[Any],
    shelves: Sequence[ModuleType] = (),
    *,
    place: str = "train.patches.score",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers (B,) and scores (B, n) of each batch, on the CPU.

    Raises:
        Refused: there is no such score.
    """
    function = _found(method, shelves, place)
    for batch in batches:
        with torch.no_grad():
            scores = methods.call(function, watch(model, batch.images), method.options, place=place)
        yield batch.index.cpu(), _checked(scores, method, place)
