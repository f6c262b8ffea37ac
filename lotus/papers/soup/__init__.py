"""Instant soup (Jaiswal et al., 2306.10460): masks of copies that looked ahead, joined: ``prune.method: soup``.

It trains by ``finetune``'s recipe. LOTUS of 2024 (2405.00906) prunes so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lotus.papers.soup.recipe import Soup
from lotus.papers.zeros import common
from lotus.stage import TRAIN_FORWARDS
from lotus.way import Options, Way
from selection import methods

if TYPE_CHECKING:
    from lotus.stages.ahead import Ahead
    from lotus.stages.cut import Cutting, Uncut


def _make(uncut: Uncut, *, soup: Soup = Soup(), sweep: bool = False) -> Cutting:
    """
    Args:
        soup: how it is cooked
        sweep: also measure the trained model at sparsities from 0 to 90 %, to see where accuracy breaks
    """
    from lotus.papers.soup.simmer import simmer

    return (yield from simmer(uncut, soup, sweep=sweep))


def _forecast(ahead: Ahead, options: Options) -> float:
    from lotus.papers.soup.cook import steps

    config, looks = ahead.config, common.looks(ahead, options)
    if config.prune.keep.weights is None:
        return looks
    soup: Soup = methods.arguments(_make, options)["soup"]
    own, each = steps(config.prune.keep.weights, config.finetune.batch_size, soup, ahead.kept)
    return looks + TRAIN_FORWARDS * config.finetune.batch_size * (own + each)


WAY = Way(
    "soup",
    common.says,
    _make,
    settings=("finetune",),
    cuts=False,
    check=common.check,
    forecast=_forecast,
    hold=common.hold,
    tell=common.tell,
)

RULES = common.rules("soup")
