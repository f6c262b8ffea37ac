"""From scores and a budget to a plan: greedy, by chunks that keep every width a multiple of ``round``.

The chunks are those of :mod:`lotus.pruning.widths`. The least valuable one goes first; its value is the sum of its
units' scores. Query/key and value dimensions go together, so that blocks stay timm's, or, split, each for itself.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lotus.config import Prune
from lotus.pruning.plan import Plan
from lotus.pruning.widths import DECOUPLED, IN_CHANNELS, KINDS, SUBLAYERS, BlockWidths, Chunk, floors, looser, smallest
from lotus.vit.anatomy import Dims
from lotus.vit.cost import Cost, Outline
from selection.errors import Refused

COUNTED = ("macs", "params")
BUDGETS = (*COUNTED, "latency")
ALONE = Prune(round=1)
"""For widths that come from elsewhere: nothing is to be rounded."""


def fit_plan(
    outline: Outline,
    scores: Mapping[str, np.ndarray],
    request: Prune,
    *,
    whole: Cost | None = None,
    within: Sequence[Dims] | None = None,
) -> Plan:
    """The plan that keeps the most valuable units within a budget.

    The result lies below every budget, and no chunk that was cut could come back without breaking one.

    Args:
        outline: The model, as :func:`lotus.vit.cost.outline` reads it.
        scores: ``"blocks.3.attn"`` -> (H * V,), ``"blocks.3.mlp"`` -> (F,), ``"blocks.3.qk"`` -> (H * Q,) or absent (all equal);
            with ``in_channels`` also ``"blocks.3.attn_in"`` (D,) and ``"blocks.3.mlp_in"`` (D,).
        request: The budget, in macs, params or gates, and of its other settings:
            ``scope``. ``global``: all chunks compete by score a saved cost. ``per_type``: heads, dimensions and MLP units are each cut to
            the same share, and compete only among themselves (isomorphic, Fang et al. 2024, 2407.04616). ``threshold``: one
            threshold for the scores of all sites, whatever a unit costs (VTP, Zhu et al. 2021, 2104.08500, section 3.2). Heads
            of a block then keep equally many value dimensions: the mean of what the threshold leaves them. ``uniform``: all
            blocks (of a stage, in Swin) keep the same widths, their best units by score. MLP units go first, as timm's
            constructor can say them; dimensions only where units are not enough, and heads after those.
            ``round``: MLP units and head dimensions stay a multiple of it, where they are cut.
            ``decouple_qk``: query/key and value dimensions are cut each for itself, not together. By ``threshold``, query/key
            dimensions then stay whole, as in VTP.
            ``in_channels``: channels that attention and the MLP read of the residual stream may go too.
            ``sublayers``: whether a sublayer may go as a whole, and with both the block. None: only where the budget asks for less
            than units can give. By ``per_type`` and ``threshold`` True too means no more than that.
        whole: What the budget is a fraction of, where that is not the present model.
        within: Widths of the blocks of a larger plan, all of whose units may stay (``global`` alone): what this one keeps, that
            one keeps. It may keep a little less of the score than a plan that is free.

    Raises:
        Refused: a budget out of reach (with the range that is not), or of milliseconds; scores that do not fit or are not finite.
    """
    if request.keep.latency is not None:
        raise Refused("prune.keep.latency: milliseconds are not counted but measured; see lotus.pruning.latency.")
    if within is not None and request.scope != "global":
        raise Refused(f"prune.sizes: {request.scope!r} draws each budget for itself. Set prune.scope to global.")
    limits = check_reach(outline, request, whole=whole)
    blocks = of_outline(outline, scores, request)
    if within is not None:
        for block, most in zip(blocks, within, strict=True):
            block.dims = block.most = most
    kinds = (*(DECOUPLED if request.decouple_qk else KINDS), *(IN_CHANNELS if request.in_channels else ()))
    _cut(blocks, outline, limits, kinds, request)
    beyond = _Spent(blocks, outline, limits).over()
    if beyond:  # units alone do not get there, as check_reach allowed
        _cut_global(blocks, outline, limits, SUBLAYERS)
    if request.scope in ("global", "per_type"):  # the others would not stay one threshold, or alike
        sublayers = SUBLAYERS if request.sublayers or beyond else ()
        _refill(blocks, outline, limits, (*kinds, *sublayers), by_value=request.scope == "global")
    return Plan(tuple(block.plan() for block in blocks))


def _cut(
    blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], kinds: Sequence[str], request: Prune
) -> None:
    """Take units by the scope that is asked for, until the budgets hold or no more may go."""
    if request.scope == "threshold":
        _cut_threshold(blocks, outline, limits, request.keep.gates or 1.0, decouple_qk=request.decouple_qk)
    elif request.scope == "per_type":
        _cut_kinds(blocks, outline, limits, kinds)
    elif request.scope == "uniform":
        _cut_uniform(blocks, outline, limits, kinds)
    else:
        _cut_global(blocks, outline, limits, (*kinds, *(SUBLAYERS if request.sublayers else ())))


def of_outline(outline: Outline, scores: Mapping[str, np.ndarray], request: Prune) -> list[BlockWidths]:
    """The blocks at their present widths."""
    return [BlockWidths(index, outline, scores, request) for index in range(len(outline.dims))]


# ----------------------------------------------------------------------- widths that a search chooses, not the scores


def best(outline: Outline, scores: Mapping[str, np.ndarray], dims: Sequence[Dims]) -> Plan:
    """The plan of the widths ``dims`` (one a block) that keeps the units of the highest scores."""
    blocks = of_outline(outline, scores, ALONE)
    for block, one in zip(blocks, dims, strict=True):
        block.dims = one
    return Plan(tuple(block.plan() for block in blocks))


def by_ratios(
    outline: Outline, scores: Mapping[str, np.ndarray], request: Prune, *, attention: float, mlp: float
) -> tuple[Dims, ...]:
    """Widths that keep at most ``attention`` of the MACs of all attention and ``mlp`` of those of all MLPs, or the least there is.

    Inside of either, chunks of all blocks compete by score a saved MAC. Less of a ratio is always within more of it.
    """
    blocks = of_outline(outline, scores, request)
    floor = outline.cost(floors(outline, request)).blocks
    whole = outline.cost()
    kinds = DECOUPLED if request.decouple_qk else KINDS
    spent = whole.macs
    for part, name, own in ((attention, "attn_macs", kinds[:-1]), (mlp, "mlp_macs", kinds[-1:])):
        of, least = (sum(getattr(block, name) for block in cost) for cost in (whole.blocks, floor))
        _cut_global(blocks, outline, {"macs": spent - of + max(int(part * of + 0.5), least)}, own)
        spent = outline.cost([block.dims for block in blocks]).macs
    return tuple(block.dims for block in blocks)


def of_block(
    outline: Outline,
    scores: Mapping[str, np.ndarray],
    request: Prune,
    *,
    index: int,
    part: Literal["attention", "mlp"],
    share: float,
) -> Dims:
    """Widths of block ``index`` with at most ``share`` of its attention's or MLP's MACs, or the least there is."""
    block = of_outline(outline, scores, request)[index]
    kinds = DECOUPLED if request.decouple_qk else KINDS
    name, own = ("attn_macs", kinds[:-1]) if part == "attention" else ("mlp_macs", kinds[-1:])
    limit = share * getattr(block.cost(block.of), name)
    while getattr(block.cost(block.dims), name) > limit:
        chunks = [chunk for kind in own if (chunk := block.chunk(kind, block.fewer(kind))) is not None]
        if not chunks:
            break
        block.dims = min(chunks, key=lambda chunk: chunk.value / max(1, chunk.macs)).dims
    return block.dims


def fill(outline: Outline, scores: Mapping[str, np.ndarray], request: Prune, dims: Sequence[Dims]) -> tuple[Dims, ...]:
    """``dims``, which lie within the budget, with the chunks that still fit into it: the most valuable by cost first."""
    blocks = of_outline(outline, scores, request)
    for block, one in zip(blocks, dims, strict=True):
        block.dims = one
    limits = check_reach(outline, request.model_copy(update={"sublayers": False}))
    _refill(blocks, outline, limits, DECOUPLED if request.decouple_qk else KINDS, by_value=True)
    return tuple(block.dims for block in blocks)


def check_nested(keeps: Sequence[Mapping[str, float]]) -> None:
    """Refuse budgets that cannot each lie within the one before.

    Raises:
        Refused: one that is larger than an earlier one, of gates or weights, or a latency beside budgets without.
    """
    before = dict.fromkeys(BUDGETS, 1.0)
    for share in keeps:
        if not share.keys() <= set(BUDGETS) or ("latency" in share) != ("latency" in keeps[0]):
            raise Refused(f"prune.keep: nested budgets are of macs and params, or all of latency, not {list(keeps)}.")
        if any(part > before[what] for what, part in share.items()):
            raise Refused(f"prune.keep: nested budgets go from the largest to the smallest, not {list(keeps)}.")
        before |= share


def check_reach(outline: Outline, request: Prune, *, whole: Cost | None = None) -> dict[str, int]:
    """The budgets that are counted as whole numbers; needs no scores, so that one can be refused before anything is trained.

    Raises:
        Refused: a budget that no plan meets; names the range that can be reached.
    """
    limits = counted(outline, request, whole)
    if beyond := out_of_reach(outline, request, whole=whole):
        raise Refused(beyond)
    return limits


def counted(outline: Outline, request: Prune, whole: Cost | None = None) -> dict[str, int]:
    """The budgets that are counted, as whole numbers."""
    dense = whole or outline.cost()
    return {what: int(part * getattr(dense, what)) for what, part in request.keep.asked.items() if what in COUNTED}


def out_of_reach(outline: Outline, request: Prune, *, whole: Cost | None = None) -> str:
    """Why no plan meets a budget that is counted, with the range that can be reached; empty where one does."""
    dense, least, alone = whole or outline.cost(), floors(outline, request), smallest(outline, request)
    for what, limit in counted(outline, request, dense).items():
        lowest, of_all = max(getattr(one, what) for one in alone), getattr(dense, what)
        if lowest <= limit:
            continue
        reach = -(-10000 * lowest // of_all) / 10000  # rounded up, so that the number that is named can be had
        left = (
            "With one sublayer in all"
            if request.sublayers is not False
            else f"With {least[0].heads} head{'s' if least[0].heads > 1 else ''}, {least[0].v_dim} head dimensions and {least[0].hidden} MLP units a block"
        )
        more = ", or prune.sublayers (without prune.search)" if request.sublayers is False else ""
        apart = () if request.decouple_qk else smallest(outline, request.model_copy(update={"decouple_qk": True}))
        if apart and max(getattr(one, what) for one in apart) < lowest:
            more += ", or prune.decouple_qk, as query/key dimensions stay whole here and hold the others back"
        return (
            f"prune.keep.{what}: {getattr(request.keep, what)} is out of reach. {left}, {reach:.4f} of {of_all:,} remain. "
            f"Take {reach:.4f} to 1, or {looser(request)}{more}."
        )
    return ""


def _cut_global(blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], kinds: Sequence[str]) -> None:
    """Take the chunk of the least score a saved cost, until the budgets hold."""
    spent = _Spent(blocks, outline, limits)
    open_ = spent.over()
    if not open_:
        return
    order = itertools.count()
    stamps = [0] * len(blocks)  # a block's chunks change with it; older ones on the heap are stale
    heap: list[tuple[float, int, int, Chunk]] = []

    def push(block: BlockWidths) -> None:
        for kind in kinds:
            chunk = block.chunk(kind, block.fewer(kind))
            if chunk is not None:
                heapq.heappush(
                    heap, (chunk.value / spent.relative(chunk, open_), next(order), stamps[block.index], chunk)
                )

    for block in blocks:
        push(block)
    while open_ and heap:  # it runs out only where sublayers would have to go, and may not here
        _, _, stamp, chunk = heapq.heappop(heap)
        if stamp != stamps[chunk.index]:
            continue
        if chunk.kind in SUBLAYERS and sum(bool(b.dims.heads) + bool(b.dims.hidden) for b in blocks) == 1:
            continue  # something must stay
        blocks[chunk.index].dims = chunk.dims
        spent.take(chunk)
        stamps[chunk.index] += 1
        still = spent.over()
        if still and still != open_:  # one budget is met: what is left is weighed by the other alone
            open_ = still  # before pushing, which weighs by it
            heap.clear()
            for block in blocks:
                stamps[block.index] += 1
                push(block)
        elif still:
            push(blocks[chunk.index])
        open_ = still


def _cut_kinds(blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], kinds: Sequence[str]) -> None:
    """Cut every kind to the same share of its chunks: the smallest cut that meets the budgets, by bisection."""
    queues = {kind: _queue(blocks, kind) for kind in kinds}
    longest = max(len(queue) for queue in queues.values())

    def apply(step: int) -> bool:
        """Cut ``step / longest`` of each kind's chunks; whether the budgets hold."""
        for block in blocks:
            block.dims = block.of
        for kind, queue in queues.items():
            for index in queue[: -(-len(queue) * step // max(1, longest))]:  # rounded up
                fewer = blocks[index].fewer(kind)
                assert fewer is not None
                blocks[index].dims = fewer
        return not _Spent(blocks, outline, limits).over()

    apply(bisect.bisect_left(range(longest), True, key=apply))  # all chunks cut is within reach, or sublayers go too


def _cut_uniform(blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], kinds: Sequence[str]) -> None:
    """Take a chunk of every block at once, until the budgets hold: of MLP units and inputs first, then of dimensions, of heads last."""
    order = sorted(kinds, key=lambda kind: {"heads": 2, "dims": 1, "qk": 1, "v": 1}.get(kind, 0))
    for kind in order:
        while _Spent(blocks, outline, limits).over():
            less = [(block, fewer) for block in blocks if (fewer := block.fewer(kind)) is not None]
            if not less:
                break
            for block, fewer in less:
                block.dims = fewer


def _queue(blocks: list[BlockWidths], kind: str) -> list[int]:
    """Blocks in the order in which they lose chunks of ``kind``: by value a unit, least first."""
    chunks: list[tuple[float, int, int]] = []
    for block in blocks:
        block.dims, turn, worst = block.of, 0, 0.0
        while (chunk := block.chunk(kind, block.fewer(kind))) is not None:
            # A remainder chunk is smaller than others: compare by MAC. Inside of a block the order of scores stands.
            worst = max(worst, chunk.value / chunk.macs)
            chunks.append((worst, turn, block.index))
            block.dims, turn = chunk.dims, turn + 1
        block.dims = block.of
    return [index for *_, index in sorted(chunks)]


def _cut_threshold(
    blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], part: float, *, decouple_qk: bool
) -> None:
    """Close the units of the lowest scores of all sites, until ``part`` of them is left and the budgets hold."""
    pools: list[tuple[int, str, np.ndarray]] = []
    for block in blocks:
        pools += [(block.index, kind, found) for kind, found in block.pools()]
    scores = np.concatenate([found for *_, found in pools])
    order = np.argsort(scores, kind="stable")  # ties go by place
    starts = np.cumsum([0, *(len(found) for *_, found in pools)])

    def apply(closed: int) -> bool:
        stays = np.ones(len(scores), bool)
        stays[order[:closed]] = False
        for (index, kind, found), start in zip(pools, starts, strict=False):
            _leave(blocks[index], kind, stays[start : start + len(found)], decouple_qk=decouple_qk)
        return not _Spent(blocks, outline, limits).over()

    low = len(scores) - max(1, int(np.floor(part * len(scores) + 1e-9)))
    low = bisect.bisect_left(range(len(scores)), True, lo=low, key=apply)
    while not apply(low) and low < len(scores):  # heads' equal shares may be rounded up on the way
        low += 1


def _leave(block: BlockWidths, kind: str, stays: np.ndarray, *, decouple_qk: bool) -> None:
    """Give ``block`` the widths that ``stays`` leaves of one kind; at least the least of each, and a multiple of the rounding."""
    dims, of = block.dims, block.of

    def wide(count: int, name: str, whole: int) -> int:
        return max(min(-(-count // block.round) * block.round, whole), block.floor(name))

    if kind == "units" and of.hidden:
        block.dims = dims._replace(hidden=wide(int(stays.sum()), "hidden", of.hidden))
    elif kind == "v" and of.heads:
        left = stays.reshape(of.heads, of.v_dim)
        heads = max(block.floor("heads"), int(left.any(axis=1).sum()))
        if block.whole_qk and not decouple_qk:
            block.dims = dims._replace(heads=heads)
            return
        v_dim = wide(int(np.rint(left.sum() / heads)), "v_dim", of.v_dim)
        qk_dim = of.qk_dim if decouple_qk else v_dim if of.qk_dim == of.v_dim else wide(v_dim, "qk_dim", of.qk_dim)
        block.dims = dims._replace(heads=heads, qk_dim=qk_dim, v_dim=v_dim)
    elif kind in block.reads:
        count = wide(int(stays.sum()), kind, block.reads[kind])
        block.dims = dims._replace(**{kind: getattr(of, kind) if count == block.reads[kind] else count})


def _refill(
    blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], kinds: Sequence[str], *, by_value: bool
) -> None:
    """Put back what still fits, since the last cut may have overshot: the most valuable by cost, or, where kinds must not be
    compared (not ``by_value``), the largest."""
    spent = _Spent(blocks, outline, limits)
    while True:
        fits = [
            chunk
            for block in blocks
            for kind in kinds
            if (chunk := block.chunk(kind, block.more(kind))) is not None and spent.fits(chunk)
        ]
        if not fits:
            return
        sizes = [spent.relative(chunk, list(limits)) for chunk in fits]
        keys = [(c.value / size, 0.0) if by_value else (size, c.value) for c, size in zip(fits, sizes, strict=True)]
        best = fits[max(range(len(fits)), key=keys.__getitem__)]
        blocks[best.index].dims = best.dims
        spent.put(best)


class _Spent:
    """What the blocks cost at their present widths, against the limits."""

    def __init__(self, blocks: Sequence[BlockWidths], outline: Outline, limits: Mapping[str, int]) -> None:
        cost = outline.cost([block.dims for block in blocks])
        self.limits = limits
        self.now = {what: getattr(cost, what) for what in limits}

    def over(self) -> list[str]:
        """Budgets that are still broken."""
        return [what for what, limit in self.limits.items() if self.now[what] > limit]

    def take(self, chunk: Chunk) -> None:
        for what in self.now:
            self.now[what] -= getattr(chunk, what)

    def put(self, chunk: Chunk) -> None:
        for what in self.now:
            self.now[what] += getattr(chunk, what)

    def fits(self, chunk: Chunk) -> bool:
        return all(self.now[what] + getattr(chunk, what) <= limit for what, limit in self.limits.items())

    def relative(self, chunk: Chunk, budgets: Sequence[str]) -> float:
        """What ``chunk`` saves, each budget as a fraction of its limit."""
        found: float = sum(getattr(chunk, what) / max(1, self.limits[what]) for what in budgets)
        return found
