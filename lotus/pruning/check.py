"""Whether a model's folder is what it says it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotus.pruning import spec as specs
from lotus.vit import anatomy, cost, parts
from selection.errors import Refused

IMAGES = 4
"""Drawn images that go through the model."""


@dataclass(frozen=True)
class Verified:
    """What was found; true where nothing is wrong."""

    faults: tuple[str, ...]
    """Each difference in a sentence."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was looked at: ``name``, ``params``, ``macs``, ``tensors``; with ``against`` also ``agree`` (fraction of the drawn images
    for which both models name the same class) and ``distance`` (of the logits, relative)."""

    def __bool__(self) -> bool:
        return not self.faults


def verify(folder: str | Path, *, against: str | Path | None = None) -> Verified:
    """Check the folder of a model: tensors as the spec says and as they were written, finite, a finite forward pass, the cost
    that is recorded.

    Args:
        folder: Of ``spec.json`` and ``model.safetensors``.
        against: The folder of the model that it was cut from. Then architecture, classes, and that no block is wider are
            compared too; the outputs must be the same where nothing was cut, and how far they lie apart is told.

    Raises:
        Refused: never for what is wrong with the folder: that is a fault.
    """
    faults: list[str] = []
    facts: dict[str, Any] = {}
    model = _load(folder, faults, facts)
    if model is None:
        return Verified(tuple(faults), facts)
    embed: Any = model.patch_embed
    size, channels = embed.img_size, embed.proj.in_channels
    images = torch.randn(IMAGES, channels, *size, generator=torch.Generator().manual_seed(0))
    logits = _forward(model, images, str(folder), faults)
    if against is not None and logits is not None:
        _compare(folder, model, against, images, logits, faults, facts)
    return Verified(tuple(faults), facts)


def _load(folder: str | Path, faults: list[str], facts: dict[str, Any]) -> nn.Module | None:
    """The model of a folder, with what is wrong with it; None where it cannot be loaded."""
    try:
        spec = specs.read(folder)
        faults += specs.differences(folder)
        if faults:
            return None
        model = specs.load(folder)
    except Refused as refusal:
        faults.append(str(refusal))
        return None
    faults += specs.changed(folder)
    facts |= {"name": spec["model"]["name"], "tensors": len(model.state_dict())}
    faults += [
        f"{name}: holds values that are not finite."
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    found, dense = cost.count(model), specs.dense_cost(spec, str(folder))
    for where, counted in (("cost", found), ("dense_cost", dense)):
        recorded = spec.get(where)
        now = {"params": counted.params, "macs": counted.macs}
        if recorded != now:
            faults.append(f"{specs.SPEC}: {where} says {recorded}, counted are {now}.")
    facts |= {"params": found.params, "macs": found.macs}
    return model


@torch.no_grad()
def _forward(model: nn.Module, images: Tensor, where: str, faults: list[str]) -> Tensor | None:
    """The logits; None where the model cannot compute them."""
    try:
        logits: Tensor = model(images.to(next(model.parameters()).dtype)).float()
    except (RuntimeError, TypeError, ValueError) as error:
        faults.append(f"{where}: drawn images do not go through the model ({' '.join(str(error).split())[:200]}).")
        return None
    if not torch.isfinite(logits).all():
        faults.append(f"{where}: the model's output for drawn images is not finite.")
    return logits


def _compare(
    folder: str | Path,
    model: Any,
    against: str | Path,
    images: Tensor,
    logits: Tensor,
    faults: list[str],
    facts: dict[str, Any],
) -> None:
    other: list[str] = []
    origin: Any = _load(against, other, {})
    faults += [f"{against}: {fault}" for fault in other]
    if origin is None:
        return
    names = [specs.read(place)["model"]["name"] for place in (folder, against)]
    for what, here, there in (
        ("architecture", *names),
        ("classes", model.num_classes, origin.num_classes),
        ("image size", tuple(model.patch_embed.img_size), tuple(origin.patch_embed.img_size)),
        (
            "blocks, with those that were cut out",
            *(len(parts.places(one)) + len(parts.gone(one)) for one in (model, origin)),
        ),
    ):
        if here != there:
            faults.append(f"{what}: {here}, but {there} in {against}.")
    if faults:
        return
    same = parts.gone(model) == parts.gone(origin)
    there = dict(zip(parts.places(origin), anatomy.blocks(origin, convolved=True), strict=True))
    for number, mine in zip(parts.places(model), anatomy.blocks(model, convolved=True), strict=True):
        theirs = there.get(number)
        if theirs is None:
            faults.append(f"{mine.name}: is gone from {against}.")
            continue
        same &= (mine.dims, mine.kernel, mine.width) == (theirs.dims, theirs.kernel, theirs.width)
        for what, now, before in _widths(mine, theirs):
            if now > before:
                faults.append(f"{mine.name}: {what} is {now}, more than the {before} in {against}.")
    expected = _forward(origin, images, str(against), faults)
    if expected is None:
        return
    distance = float((logits - expected).norm() / expected.norm().clamp_min(1e-12))
    facts |= {"distance": distance, "agree": float((logits.argmax(1) == expected.argmax(1)).float().mean())}
    if same and not distance <= 1e-4:
        faults.append(f"nothing is cut, but the outputs differ from those of {against} by {distance:.2g} (relative).")


def _widths(mine: anatomy.Block, theirs: anatomy.Block) -> list[tuple[str, int, int]]:
    """What of a block may only have become less: (what, now, before)."""
    found = [("width", mine.width, theirs.width)]
    for what, now, before in zip(mine.dims._fields, mine.dims, theirs.dims, strict=True):
        if what == "v_dim" and mine.kernel and not theirs.kernel:  # one convolution reads the values of all heads
            before = theirs.dims.heads * theirs.dims.v_dim
        if what in ("attn_in", "mlp_in"):
            there = mine.has_attn if what == "attn_in" else mine.has_mlp
            now, before = (now or mine.width) if there else 0, before or theirs.width
        found.append((what, now or 0, before or 0))
    return found
