"""CP-ViT at fixed ratios (Song et al. 2022, 2203.04570), as a rival of a search: ``prune.search.compare: cp_vit``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lotus.config import Fraction
from lotus.way import Rival

if TYPE_CHECKING:
    from torch import nn

    from lotus.pruning.judge import Judge

_KEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def _make(
    model: nn.Module, batches: Callable[[], Iterable[Any]], judge: Judge, *, keep: tuple[Fraction, ...] = _KEEP
) -> list[dict[str, Any]]:
    """
    Args:
        keep: the fixed ratios: the fraction of the heads, and of the patches, that stays
    """
    from lotus.papers.cp_vit.sweep import sweep

    return sweep(model, batches, judge, sorted(keep, reverse=True))


def _check(model: nn.Module) -> None:
    from lotus.vit import anatomy

    anatomy.plain(model, "prune.search.compare")


CP_VIT = Rival("cp_vit", "CP-ViT with a fixed ratio", _make, _check)
