"""How many tokens each block sees, and when."""

from __future__ import annotations

import math
from typing import NamedTuple

from lotus.config import Patches
from selection.errors import Refused
from selection.joint_budget import levels


def kept(patches: int, keep: float) -> int:
    """ceil(keep x patches), as EViT and ATS round; at least 1."""
    return max(1, math.ceil(keep * patches - 1e-9))


def shares(patches: int, settings: Patches) -> list[float]:
    """What an image of each bucket of a joint budget keeps."""
    joint = settings.joint
    assert joint is not None
    least = settings.keep / 2 if joint.least is None else joint.least
    return [int(level) / patches for level in levels(patches, joint.buckets, least)]


def keep_at(settings: Patches, progress: float, keep: float | None = None) -> float:
    """What stays when ``progress`` (0 to 1) of the training is done: all, then a cosine down to ``keep``, and all again from ``until`` on.

    EViT's schedule (2202.07800): of 300 epochs from scratch 10 are dense and 100 fall.

    Args:
        keep: what stays in the end; None: ``settings.keep``
    """
    keep = settings.keep if keep is None else keep
    if progress < settings.warmup or 1 > settings.until <= progress:
        return 1.0
    if progress >= settings.warmup + settings.ramp:
        return keep
    falling = (progress - settings.warmup) / settings.ramp
    return keep + (1 - keep) * (1 + math.cos(math.pi * falling)) / 2


class Passed(NamedTuple):
    """What a reduced forward pass goes through."""

    patches: tuple[tuple[int, int], ...]
    """Of each block: tokens beside the prefix that its attention and its MLP see."""
    merges: int = 0
    """tome: r, pairs that each block merges, half of its patches at most."""


def passed(patches: int, depth: int, settings: Patches, keep: float, *, place: str = "train.patches") -> Passed:
    """How many tokens each block sees.

    Raises:
        Refused: a block in ``at`` that is not there; a keep that merging cannot reach.
    """
    if keep >= 1:
        return Passed(((patches, patches),) * depth)
    if settings.mode in ("input", "dropout"):
        count = kept(patches, keep)
        return Passed(((count, count),) * depth)
    if settings.mode == "evit":
        at, seen, now = places(settings, depth, place), [], patches
        for number in range(depth):
            before = now
            if number in at and kept(now, keep) + settings.fuse < now:
                now = kept(now, keep) + settings.fuse
            seen.append((before, now))
        return Passed(tuple(seen))
    if settings.mode == "cumulative":
        after = [kept(patches, 1 - (1 - keep) * risen(number, depth)) for number in range(depth)]
        return Passed(tuple(zip([patches, *after], after)))
    for merges in range(patches // 2 + 1):
        seen, now = [], patches
        for _ in range(depth):
            before, now = now, now - min(merges, now // 2)
            seen.append((before, now))
        if sum(after for _, after in seen) <= keep * patches * depth + 1e-9:
            return Passed(tuple(seen), merges)
    least = sum(after for _, after in seen) / (patches * depth)
    raise Refused(
        f"{place}.keep: {keep:g} cannot be reached by merging, which halves the tokens in a block at most: at {depth} "
        f"blocks the average MLP still sees {least:.3f} of the {patches} patches. Keep more, or use evit or input."
    )


def risen(number: int, depth: int) -> float:
    """How much of what cumulative mode takes in all is gone after block ``number``: the ramp of CP-ViT's code, where of 12
    blocks (from 0) none takes any up to block 2, then each up to block 8 an equal part."""
    place = 11 * number / (depth - 1) if depth > 1 else 11
    return min(1.0, max(0.0, (place - 2) / 6))


def places(settings: Patches, depth: int, place: str = "train.patches") -> tuple[int, ...]:
    """Blocks in which EViT lets patches go; by default 3, 6 and 9 of 12, as in 2202.07800.

    Raises:
        Refused: one that is not there.
    """
    for number in settings.at:
        if not 0 <= number < depth:
            raise Refused(f"{place}.at: there is no block {number}. The model's are 0 to {depth - 1}.")
    return settings.at or tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
