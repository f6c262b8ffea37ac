"""The way to prune that is our own: dimensions go by their scores, to one budget, to several sizes, or as far as a search finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lotus.config import Config
from lotus.run import Run
from lotus.stage import Section
from lotus.stages.ahead import Ahead, check_batch
from lotus.stages.cut import Cut, Cutting, Uncut, draw, draw_sizes
from lotus.stages.width_search import compared, rival, search_widths
from lotus.way import Options, Way

MODES: dict[str, Callable[[Uncut], Cutting]] = {"search": search_widths, "sizes": draw_sizes}
"""Settings of ``prune`` by which more is asked of the scores than one budget."""


def _make(uncut: Uncut) -> Cutting:
    if uncut.request.keeps_all and uncut.gates is None:
        from lotus.vit.cost import count

        whole = count(uncut.model)
        now = {"params": whole.params, "macs": whole.macs}
        return Cut(uncut.model, now, now, 0, []), {}
    mode = next((mode for name, mode in MODES.items() if getattr(uncut.request, name)), draw)
    return (yield from mode(uncut))


def _check(ahead: Ahead, options: Options) -> None:
    """Refuse a budget that this model cannot meet in the way that is asked for."""
    from lotus.pruning import budget, latency, narrow
    from lotus.vit import anatomy
    from lotus.vit.cost import outline

    request, model = ahead.config.prune, ahead.shape
    whole = outline(model)
    if request.round == "auto":
        request = request.model_copy(update={"round": 8})
    if request.in_channels:
        anatomy.sites(model, in_channels=True)
    if request.keep.latency is not None:
        latency.timings(model)
        check_batch("prune.latency_batch", request.latency_batch, model, ahead.config.device)
    if request.search is None:
        widths = (request.embed_fraction,) if request.sizes else narrow.tries(model, request)
        narrowest, least = min(widths), whole
        if narrowest < 1:
            least = outline(narrow.skeleton(model, narrow.channels(model, narrowest, request.multiple)))
        sublayers = request.sublayers if anatomy.is_vit(model) else False
        for keep in (request.keep.asked, *request.more_sizes):
            budget.check_reach(least, request.at(keep, sublayers=sublayers), whole=whole.cost())
        if not request.sizes:
            narrow.useful(model, widths, request)
    elif request.search.compare is not None:
        rival(request, ahead.shelves)[0].check(model)
    if request.search is not None and request.search.drop is None:
        least = whole
        if request.embed_fraction < 1:
            least = outline(narrow.skeleton(model, narrow.channels(model, request.embed_fraction, request.multiple)))
        budget.check_reach(least, request.model_copy(update={"sublayers": False}), whole=whole.cost())


def _forecast(ahead: Ahead, options: Options) -> float:
    from lotus.pruning.measure import enough
    from lotus.pruning.narrow import GRID
    from lotus.pruning.study import forwards_of

    request = ahead.config.prune
    if request.keeps_all and not ahead.config.train.sparsity.gates:
        return 0
    searched = request.search
    images = min(request.calibration or enough(ahead.dense), ahead.kept)
    forwards = forwards_of(request, ahead.shelves) * images
    if searched is not None:
        # about: what is tried has half of the MACs, and how much is tried follows from what is found
        each = 8 * searched.levels * searched.rounds
        tries = searched.grid**2 + 40 * searched.rounds if searched.kind == "ratios" else each
        return searched.rounds * forwards + round(searched.images * tries / 2)
    if request.embed_dim != "search":  # auto: at least the first of these
        return forwards
    return (
        len(GRID) * forwards + (1 + 2 * len(GRID)) * images
    )  # the stream is looked at once; each is compared with the model


def _settings(config: Config) -> tuple[str, ...]:
    search = config.prune.search
    return ("finetune",) if search is not None and search.recovery > 0 else ()


def _tell(run: Run, found: dict[str, Any], options: Options) -> Section | None:
    if "latency" in found["prune"]:
        found["kept"]["latency"] = found["prune"]["latency"]
    return compared(found["prune"].get("search") or {})


STRUCTURED = Way(
    "structured",
    "cut what is not worth keeping",
    _make,
    settings=_settings,
    check=_check,
    forecast=_forecast,
    tell=_tell,
)
