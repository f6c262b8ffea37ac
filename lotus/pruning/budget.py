"""From scores and a budget to a plan: greedy, by chunks that keep every width a multiple of ``round``.

A chunk is ``round`` MLP units of a block, a head, or ``round`` dimensions in all heads of a block; where that is asked for,
``round`` channels that a branch reads, or a branch as a whole. The least valuable one goes first; its value is the sum of its
units' scores. Query/key and value dimensions go together, so that blocks stay timm's, or, split, each for itself.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lotus.pruning.plan import BlockPlan, Plan
from lotus.vit.anatomy import Dims
from lotus.vit.cost import BlockCost, Cost, Outline
from selection.errors import Refused
from selection.methods import check_choice, nearest

Rank = Literal["pool", "kind", "quantile", "uniform"]
RANKS = ("pool", "kind", "quantile", "uniform")
KINDS = ("heads", "dims", "units")
SPLIT = ("heads", "qk", "v", "units")
INPUTS = ("attn_in", "mlp_in")
BRANCHES = ("attn", "mlp")
COUNTED = ("macs", "params")
BUDGETS = (*COUNTED, "latency")
OF_GATES = "gates"
"""The budget of ``quantile`` alone: the part of all scored units that stays."""


@dataclass(frozen=True)
class Chunk:
    """A cut that can be done, or undone, next: block ``index`` takes on ``dims``."""

    index: int
    kind: str
    dims: Dims
    value: float
    """Scores that go with it."""
    macs: int
    params: int
    """What it saves."""


class BlockWidths:
    """One block while it is cut: how many of its heads, dimensions and units are left, what the next chunk of a kind would
    take or bring back, and what that is worth. Counts only ever follow the order of scores."""

    def __init__(
        self, index: int, outline: Outline, scores: Mapping[str, np.ndarray], round: int, *, inputs: bool
    ) -> None:
        self.index, self.outline, self.round = index, outline, round
        self.of = self.dims = outline.dims[index]
        self.most = self.of  # what may come back; less than all where a plan has to lie within another
        self.whole_qk = bool(outline.whole_qk) and outline.whole_qk[index]
        heads, qk_dim, v_dim, hidden = self.of[:4]
        name = f"blocks.{index}"
        self.reads: dict[str, int] = {}
        """Channels that each branch reads now, where some of them may go."""
        self.read_scores: dict[str, np.ndarray] = {}
        if inputs:
            for kind, there, of in (("attn_in", heads, self.of.attn_in), ("mlp_in", hidden, self.of.mlp_in)):
                if there:
                    self.reads[kind] = of or outline.width
                    self.read_scores[kind] = _scores(scores, f"{name}.{kind}", (self.reads[kind],))
        self.read_order = {kind: np.argsort(-found, kind="stable") for kind, found in self.read_scores.items()}
        self.read_sums = {kind: _sums(found[self.read_order[kind]]) for kind, found in self.read_scores.items()}
        self.qk = _scores(scores, f"{name}.qk", (heads, qk_dim))
        self.v = _scores(scores, f"{name}.attn", (heads, v_dim))
        self.units = _scores(scores, f"{name}.mlp", (hidden,))
        # Best first; ties go by index, so that a plan depends on nothing but the scores.
        self.head_order = np.argsort(-self.v.sum(axis=1), kind="stable")
        self.qk_order = np.argsort(-self.qk, axis=1, kind="stable")
        self.v_order = np.argsort(-self.v, axis=1, kind="stable")
        self.unit_order = np.argsort(-self.units, kind="stable")
        # Sums over the best k: what is left of the scores when k stay.
        self.unit_sums = _sums(self.units[self.unit_order])  # (F + 1,)
        self.qk_sums = _sums(np.take_along_axis(self.qk, self.qk_order, 1))[
            self.head_order
        ]  # (H, Q + 1), best head first
        self.v_sums = _sums(np.take_along_axis(self.v, self.v_order, 1))[self.head_order]

    def fewer(self, kind: str) -> Dims | None:
        """The widths after one chunk of ``kind`` less; None where nothing more may go."""
        heads, qk_dim, v_dim, hidden = self.dims[:4]
        if kind == "mlp":
            return self.dims._replace(hidden=0, mlp_in=None) if hidden else None
        if kind in self.reads:
            there = heads if kind == "attn_in" else hidden
            now = getattr(self.dims, kind) or self.reads[kind]
            less = _less(now, self.round)
            return self.dims._replace(**{kind: less}) if there and less != now else None
        if kind == "units":
            units = _less(hidden, self.round) if hidden else 0
            return self.dims._replace(hidden=units) if units != hidden else None
        if not heads or kind in INPUTS:
            return None
        if kind == "attn":
            return Dims(0, 0, 0, hidden, None, self.dims.mlp_in)
        if kind == "heads":
            return self.dims._replace(heads=heads - 1) if heads > 1 else None
        if kind in ("dims", "qk") and self.whole_qk:
            return None
        if kind in ("dims", "qk", "v"):
            qk = qk_dim if kind == "v" else _less(qk_dim, self.round)
            v = v_dim if kind == "qk" else _less(v_dim, self.round)
            return self.dims._replace(qk_dim=qk, v_dim=v) if (qk, v) != (qk_dim, v_dim) else None
        raise AssertionError(kind)

    def more(self, kind: str) -> Dims | None:
        """The widths with one chunk of ``kind`` more; None where all are there that may be. A branch comes
        back as small as it can be."""
        heads, qk_dim, v_dim, hidden = self.dims[:4]
        least = self.least()
        if kind == "mlp":
            back = self.dims._replace(hidden=least.hidden, mlp_in=least.mlp_in)
            return back if self.most.hidden and not hidden else None
        if kind == "attn":
            back = Dims(least.heads, least.qk_dim, least.v_dim, hidden, least.attn_in, self.dims.mlp_in)
            return back if self.most.heads and not heads else None
        if kind in self.reads:
            there, now = (heads if kind == "attn_in" else hidden), getattr(self.dims, kind)
            if not there or now is None or now == getattr(self.most, kind):
                return None
            wide = _more(now, getattr(self.most, kind) or self.reads[kind], self.round)
            return self.dims._replace(**{kind: getattr(self.of, kind) if wide == self.reads[kind] else wide})
        if kind == "units":
            units = _more(hidden, self.most.hidden, self.round) if hidden else 0
            return self.dims._replace(hidden=units) if units != hidden else None
        if not heads or kind in INPUTS:
            return None
        if kind == "heads":
            return self.dims._replace(heads=heads + 1) if heads < self.most.heads else None
        if kind in ("dims", "qk") and self.whole_qk:
            return None
        if kind in ("dims", "qk", "v"):
            qk = qk_dim if kind == "v" else _more(qk_dim, self.most.qk_dim, self.round)
            v = v_dim if kind == "qk" else _more(v_dim, self.most.v_dim, self.round)
            return self.dims._replace(qk_dim=qk, v_dim=v) if (qk, v) != (qk_dim, v_dim) else None
        raise AssertionError(kind)

    def least(self) -> Dims:
        """The smallest widths at which both branches are still there."""
        reads = {kind: min(wide, self.round) for kind, wide in self.reads.items()}
        return _least(self.of, self.round, whole_qk=self.whole_qk)._replace(
            **{kind: getattr(self.of, kind) if less == self.reads[kind] else less for kind, less in reads.items()}
        )

    def worth(self, dims: Dims, *, keys: bool, reads: bool) -> float:
        """Sum of the scores that stay with ``dims``; of query/key dimensions too with ``keys``, of inputs with ``reads``."""
        attention = self.v_sums[: dims.heads, dims.v_dim].sum()
        if keys:
            attention += self.qk_sums[: dims.heads, dims.qk_dim].sum()
        beside = sum(self.read_sums[kind][getattr(dims, kind) or wide] for kind, wide in self.reads.items() if reads)
        return float(attention + self.unit_sums[dims.hidden] + beside)

    def cost(self, dims: Dims) -> BlockCost:
        return self.outline.block(self.index, dims)

    def chunk(self, kind: str, to: Dims | None) -> Chunk | None:
        """The chunk between the present widths and ``to``."""
        if to is None:
            return None
        here, there = self.cost(self.dims), self.cost(to)
        # A head takes its query/key dimensions along, but they act through its outputs alone: they are no extra loss.
        # So does a branch with all that it reads.
        keys, reads = kind in ("dims", "qk"), kind in INPUTS
        value = abs(self.worth(self.dims, keys=keys, reads=reads) - self.worth(to, keys=keys, reads=reads))
        return Chunk(self.index, kind, to, value, abs(here.macs - there.macs), abs(here.params - there.params))

    def plan(self) -> BlockPlan:
        heads = sorted(int(h) for h in self.head_order[: self.dims.heads])
        cut = {
            kind: _kept(order, count)
            for kind, order in self.read_order.items()
            if (count := getattr(self.dims, kind)) is not None and count < self.reads[kind]
        }
        return BlockPlan(
            of=self.of,
            heads=tuple(heads),
            qk=tuple(_kept(self.qk_order[h], self.dims.qk_dim) for h in heads),
            v=tuple(_kept(self.v_order[h], self.dims.v_dim) for h in heads),
            units=_kept(self.unit_order, self.dims.hidden),
            **cut,
        )


def fit_plan(
    outline: Outline,
    scores: Mapping[str, np.ndarray],
    keep: Mapping[str, float],
    *,
    rank: Rank = "pool",
    round: int = 8,
    split: bool = False,
    inputs: bool = False,
    branches: bool | None = None,
    whole: Cost | None = None,
    within: Sequence[Dims] | None = None,
) -> Plan:
    """The plan that keeps the most valuable units within a budget.

    The result lies below every budget, and no chunk that was cut could come back without breaking one.

    Args:
        outline: The model, as :func:`lotus.vit.cost.outline` reads it.
        scores: ``"blocks.3.attn"`` -> (H * V,), ``"blocks.3.mlp"`` -> (F,), ``"blocks.3.qk"`` -> (H * Q,) or absent (all equal).
        keep: ``{"macs": 0.5}``, ``{"params": 0.5}`` or both: parts of the present model's, in (0, 1]. ``{"gates": 0.6}``, for
            ``quantile``: the part of all units that stays.
        rank: ``pool``: all chunks compete by score a saved cost. ``kind``: heads, dimensions and MLP units are each cut to the
            same share, and compete only among themselves (isomorphic, Fang et al. 2024, 2407.04616). ``quantile``: one threshold
            for the scores of all sites, whatever a unit costs (VTP, Zhu et al. 2021, 2104.08500, section 3.2). Heads of a
            block then keep equally many value dimensions: the mean of what the threshold leaves them. ``uniform``: all blocks
            (of a stage, in Swin) keep the same widths, their best units by score. MLP units go first, as timm's constructor can say them; dimensions
            only where units are not enough, and heads after those.
        round: MLP units and head dimensions stay a multiple of this, where they are cut.
        split: Query/key and value dimensions are cut each for itself, not together. By ``quantile``, query/key dimensions
            then stay whole, as in VTP.
        inputs: Channels that attention and the MLP read of the stream may go too; scores at ``"blocks.3.attn_in"`` (D,) and
            ``"blocks.3.mlp_in"`` (D,).
        branches: Whether a branch may go as a whole, and with both the block. None: only where the budget asks for less
            than units can give. By ``kind`` and ``quantile`` True too means no more than that.
        whole: What ``keep`` is a part of, where that is not the present model.
        within: Widths of the blocks of a larger plan, all of whose units may stay (``pool`` alone): what this one keeps, that
            one keeps. It may keep a little less of the score than a plan that is free.

    Raises:
        Refused: a budget that is none, one out of reach (with the range that is not), scores that do not fit or are not finite.
    """
    share = check_keep(keep)
    if "latency" in share:
        raise Refused("prune.keep.latency: milliseconds are not counted but measured; see lotus.pruning.latency.")
    check_choice(rank, RANKS, place="prune.rank")
    if within is not None and rank != "pool":
        raise Refused(f"prune.sizes: {rank!r} draws each budget for itself. Set prune.rank to pool.")
    part = share.pop(OF_GATES, 1.0)
    if part < 1 and rank != "quantile":
        raise Refused("prune.keep.gates: a part of all units is what one threshold leaves. Set prune.rank to quantile.")
    limits = check_reach(outline, share, round=round, split=split, inputs=inputs, branches=branches, whole=whole)
    blocks = [BlockWidths(index, outline, scores, round, inputs=inputs) for index in range(len(outline.dims))]
    if within is not None:
        for block, most in zip(blocks, within, strict=True):
            block.dims = block.most = most
    kinds = (*(SPLIT if split else KINDS), *(INPUTS if inputs else ()))
    if rank == "quantile":
        _cut_quantile(blocks, outline, limits, part, split=split)
    elif rank == "kind":
        _cut_kinds(blocks, outline, limits, kinds)
    elif rank == "uniform":
        _cut_uniform(blocks, outline, limits, kinds)
    else:
        _cut_pool(blocks, outline, limits, (*kinds, *(BRANCHES if branches else ())))
    beyond = _Spent(blocks, outline, limits).over()
    if beyond:  # units alone do not get there, as check_reach allowed
        _cut_pool(blocks, outline, limits, BRANCHES)
    if rank not in ("quantile", "uniform"):  # which would not stay one threshold, or alike
        _refill(blocks, outline, limits, rank, (*kinds, *(BRANCHES if branches or beyond else ())))
    return Plan(tuple(block.plan() for block in blocks))


# ----------------------------------------------------------------------- widths that a search chooses, not the scores


def best(outline: Outline, scores: Mapping[str, np.ndarray], dims: Sequence[Dims]) -> Plan:
    """The plan of the widths ``dims`` (one a block) that keeps the units of the highest scores."""
    blocks = [BlockWidths(index, outline, scores, 1, inputs=False) for index in range(len(outline.dims))]
    for block, one in zip(blocks, dims, strict=True):
        block.dims = one
    return Plan(tuple(block.plan() for block in blocks))


def by_ratios(
    outline: Outline,
    scores: Mapping[str, np.ndarray],
    attention: float,
    mlp: float,
    *,
    round: int = 8,
    split: bool = False,
) -> tuple[Dims, ...]:
    """Widths that keep at most ``attention`` of the MACs of all attention and ``mlp`` of those of all MLPs, or the least there is.

    Inside of either, chunks of all blocks compete by score a saved MAC. Less of a ratio is always within more of it.
    """
    blocks = [BlockWidths(index, outline, scores, round, inputs=False) for index in range(len(outline.dims))]
    floor = outline.cost(_floors(outline, round, split)).blocks
    whole = outline.cost()
    kinds = SPLIT if split else KINDS
    spent = whole.macs
    for part, name, own in ((attention, "attn_macs", kinds[:-1]), (mlp, "mlp_macs", kinds[-1:])):
        of, least = (sum(getattr(block, name) for block in cost) for cost in (whole.blocks, floor))
        _cut_pool(blocks, outline, {"macs": spent - of + max(int(part * of + 0.5), least)}, own)
        spent = outline.cost([block.dims for block in blocks]).macs
    return tuple(block.dims for block in blocks)


def of_block(
    outline: Outline,
    scores: Mapping[str, np.ndarray],
    index: int,
    part: Literal["attention", "mlp"],
    share: float,
    *,
    round: int = 8,
    split: bool = False,
) -> Dims:
    """Widths of block ``index`` with at most ``share`` of its attention's or MLP's MACs, or the least there is."""
    block = BlockWidths(index, outline, scores, round, inputs=False)
    kinds = SPLIT if split else KINDS
    name, own = ("attn_macs", kinds[:-1]) if part == "attention" else ("mlp_macs", kinds[-1:])
    limit = share * getattr(block.cost(block.of), name)
    while getattr(block.cost(block.dims), name) > limit:
        chunks = [chunk for kind in own if (chunk := block.chunk(kind, block.fewer(kind))) is not None]
        if not chunks:
            break
        block.dims = min(chunks, key=lambda chunk: chunk.value / max(1, chunk.macs)).dims
    return block.dims


def fill(
    outline: Outline,
    scores: Mapping[str, np.ndarray],
    dims: Sequence[Dims],
    keep: Mapping[str, float],
    *,
    round: int = 8,
    split: bool = False,
) -> tuple[Dims, ...]:
    """``dims``, which lie within the budget, with the chunks that still fit into it: the most valuable by cost first."""
    blocks = [BlockWidths(index, outline, scores, round, inputs=False) for index in range(len(outline.dims))]
    for block, one in zip(blocks, dims, strict=True):
        block.dims = one
    limits = check_reach(outline, keep, round=round, split=split, branches=False)
    _refill(blocks, outline, limits, "pool", SPLIT if split else KINDS)
    return tuple(block.dims for block in blocks)


def check_keep(keep: Mapping[str, float]) -> dict[str, float]:
    """The budgets that are set.

    Raises:
        Refused: none is set, an unknown one, or a part outside of (0, 1].
    """
    if not isinstance(keep, Mapping):
        example = keep if isinstance(keep, float) else 0.5
        raise Refused(f"prune.keep: say which budget, e.g. {{'macs': {example}}}, not {keep!r}.")
    share = {what: part for what, part in keep.items() if part is not None}
    for what, part in share.items():
        if what not in (*BUDGETS, OF_GATES):
            raise Refused(f"prune.keep.{what}: no such budget.{nearest(what, BUDGETS)} Here: {', '.join(BUDGETS)}.")
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise Refused(f"prune.keep.{what}: the part that stays, above 0 and up to 1, not {part!r}.")
    if not share:
        raise Refused(f"prune.keep: say one of {', '.join(BUDGETS)}, or several, e.g. {{'macs': 0.5}}.")
    return share


def check_nested(keeps: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The budgets that are set, where each can lie within the one before.

    Raises:
        Refused: one that is none, one that is larger than an earlier one, or a latency beside budgets without.
    """
    found, before = [check_keep(keep) for keep in keeps], dict.fromkeys(BUDGETS, 1.0)
    for share in found:
        if not share.keys() <= set(BUDGETS) or ("latency" in share) != ("latency" in found[0]):
            raise Refused(f"prune.keep: nested budgets are of macs and params, or all of latency, not {list(keeps)}.")
        if any(part > before[what] for what, part in share.items()):
            raise Refused(f"prune.keep: nested budgets go from the largest to the smallest, not {list(keeps)}.")
        before |= share
    return found


def check_round(round: object) -> None:
    """Refuse what widths cannot be multiples of.

    Raises:
        Refused: it is no whole number from 1.
    """
    if type(round) is not int or round < 1:
        raise Refused(f"prune.round: must be a whole number from 1, or auto, not {round!r}.")


def check_reach(
    outline: Outline,
    keep: Mapping[str, float],
    *,
    round: int = 8,
    split: bool = False,
    inputs: bool = False,
    branches: bool | None = None,
    whole: Cost | None = None,
) -> dict[str, int]:
    """The budgets that are counted as whole numbers; needs no scores, so that one can be refused before anything is trained.

    Raises:
        Refused: a budget that is none, or one that no plan meets; names the range that can be reached.
    """
    share = check_keep(keep) if keep else {}
    share.pop(OF_GATES, None)
    check_round(round)
    least, alone = _smallest(outline, round, split, inputs, branches)
    dense = whole or outline.cost()
    limits = {}
    for what, part in share.items():
        if what not in COUNTED:
            continue
        lowest, of_all = max(getattr(one, what) for one in alone), getattr(dense, what)
        limits[what] = int(part * of_all)
        if lowest > limits[what]:
            reach = -(-10000 * lowest // of_all) / 10000  # rounded up, so that the number that is named can be had
            left = (
                "With one branch in all"
                if branches is not False
                else f"With one head, {least[0].v_dim} head dimensions and {least[0].hidden} MLP units a block"
            )
            more = ", or prune.branches (without prune.search)" if branches is False else ""
            apart = () if split else _smallest(outline, round, True, inputs, branches)[1]
            if apart and max(getattr(one, what) for one in apart) < lowest:
                more += ", or prune.split, as query/key dimensions stay whole here and hold the others back"
            raise Refused(
                f"prune.keep.{what}: {part} is out of reach. {left}, {reach:.4f} of {of_all:,} remain. "
                f"Take {reach:.4f} to 1, or a smaller round{more}."
            )
    return limits


def _smallest(
    outline: Outline, round: int, split: bool, inputs: bool, branches: bool | None
) -> tuple[list[Dims], list[Cost]]:
    """The least widths at which all branches stay, and what it costs when no more can go."""
    least = _floors(outline, round, split)
    if inputs:
        reads = min(outline.width, round)
        least = [
            one._replace(
                attn_in=min(one.attn_in or reads, reads) if one.heads else None,
                mlp_in=min(one.mlp_in or reads, reads) if one.hidden else None,
            )
            for one in least
        ]
    # Whichever branch is the last one must do: greedy cannot know beforehand which that will be.
    return least, [outline.cost(left) for left in (_last(least) if branches is not False else [least])]


def _last(least: Sequence[Dims]) -> list[list[Dims]]:
    """Every way to keep one branch alone, as small as it can be."""
    none = [Dims(0, 0, 0, 0)] * len(least)
    ways = []
    for index, one in enumerate(least):
        if one.heads:
            ways.append([*none[:index], one._replace(hidden=0, mlp_in=None), *none[index + 1 :]])
        if one.hidden:
            ways.append([*none[:index], Dims(0, 0, 0, one.hidden, None, one.mlp_in), *none[index + 1 :]])
    return ways


def _cut_pool(blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], kinds: Sequence[str]) -> None:
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
    while open_ and heap:  # it runs out only where branches would have to go, and may not here
        _, _, stamp, chunk = heapq.heappop(heap)
        if stamp != stamps[chunk.index]:
            continue
        if chunk.kind in BRANCHES and sum(bool(b.dims.heads) + bool(b.dims.hidden) for b in blocks) == 1:
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

    apply(bisect.bisect_left(range(longest), True, key=apply))  # all chunks cut is within reach, or branches go too


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
    found: list[tuple[float, int, int]] = []
    for block in blocks:
        block.dims, turn, worst = block.of, 0, 0.0
        while (chunk := block.chunk(kind, block.fewer(kind))) is not None:
            # A remainder chunk is smaller than others: compare by MAC. Inside of a block the order of scores stands.
            worst = max(worst, chunk.value / chunk.macs)
            found.append((worst, turn, block.index))
            block.dims, turn = chunk.dims, turn + 1
        block.dims = block.of
    return [index for *_, index in sorted(found)]


def _cut_quantile(
    blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], part: float, *, split: bool
) -> None:
    """Close the units of the lowest scores of all sites, until ``part`` of them is left and the budgets hold."""
    pools: list[tuple[int, str, np.ndarray]] = []
    for block in blocks:
        pools += [(block.index, kind, found) for kind, found in block.read_scores.items()]
        pools += [(block.index, "v", block.v.reshape(-1)), (block.index, "units", block.units)]
    scores = np.concatenate([found for *_, found in pools])
    order = np.argsort(scores, kind="stable")  # ties go by place
    starts = np.cumsum([0, *(len(found) for *_, found in pools)])

    def apply(closed: int) -> bool:
        stays = np.ones(len(scores), bool)
        stays[order[:closed]] = False
        for (index, kind, found), start in zip(pools, starts, strict=False):
            _leave(blocks[index], kind, stays[start : start + len(found)], split=split)
        return not _Spent(blocks, outline, limits).over()

    low = len(scores) - max(1, int(np.floor(part * len(scores) + 1e-9)))
    low = bisect.bisect_left(range(len(scores)), True, lo=low, key=apply)
    while not apply(low) and low < len(scores):  # heads' equal shares may be rounded up on the way
        low += 1


def _leave(block: BlockWidths, kind: str, stays: np.ndarray, *, split: bool) -> None:
    """Give ``block`` the widths that ``stays`` leaves of one kind; at least one of each, and a multiple of the rounding."""
    dims, of = block.dims, block.of

    def wide(count: int, whole: int) -> int:
        return min(-(-max(count, 1) // block.round) * block.round, whole)

    if kind == "units" and of.hidden:
        block.dims = dims._replace(hidden=wide(int(stays.sum()), of.hidden))
    elif kind == "v" and of.heads:
        left = stays.reshape(of.heads, of.v_dim)
        heads = max(1, int(left.any(axis=1).sum()))
        if block.whole_qk and not split:
            block.dims = dims._replace(heads=heads)
            return
        v_dim = wide(int(np.rint(left.sum() / heads)), of.v_dim)
        qk_dim = of.qk_dim if split else v_dim if of.qk_dim == of.v_dim else wide(v_dim, of.qk_dim)
        block.dims = dims._replace(heads=heads, qk_dim=qk_dim, v_dim=v_dim)
    elif kind in block.reads:
        count = wide(int(stays.sum()), block.reads[kind])
        block.dims = dims._replace(**{kind: getattr(of, kind) if count == block.reads[kind] else count})


def _refill(
    blocks: list[BlockWidths], outline: Outline, limits: Mapping[str, int], rank: Rank, kinds: Sequence[str]
) -> None:
    """Put back what still fits, since the last cut may have overshot: the most valuable by cost, or, where kinds must not be
    compared, the largest."""
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
        keys = [
            (c.value / size, 0.0) if rank == "pool" else (size, c.value) for c, size in zip(fits, sizes, strict=True)
        ]
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
        """What ``chunk`` saves, each budget as a part of its limit."""
        return sum(getattr(chunk, what) / max(1, self.limits[what]) for what in budgets)


def _scores(scores: Mapping[str, np.ndarray], site: str, shape: tuple[int, ...]) -> np.ndarray:
    found = scores.get(site)
    if found is None:
        if site.endswith(".qk") or 0 in shape:  # a branch that is gone has no units
            return np.zeros(shape)
        raise Refused(f"{site}: has no scores. Here: {', '.join(sorted(scores)) or 'none'}.")
    array = np.asarray(found, dtype=np.float64)
    if array.size != np.prod(shape):
        raise Refused(f"{site}: {array.size} scores for {int(np.prod(shape))} units.")
    if not np.isfinite(array).all():
        raise Refused(f"{site}: scores are not finite. Are the weights and the calibration images?")
    return array.reshape(shape)


def _sums(best_first: np.ndarray) -> np.ndarray:
    """Sums over the first 0, 1, 2, ... along the last axis."""
    zero = np.zeros((*best_first.shape[:-1], 1))
    return np.concatenate([zero, np.cumsum(best_first, axis=-1)], axis=-1)


def _floors(outline: Outline, round: int, split: bool) -> list[Dims]:
    """The least that may stay of each block, its branches included."""
    normed = outline.whole_qk or (False,) * len(outline.dims)
    return [_least(of, round, whole_qk=qk, split=split) for of, qk in zip(outline.dims, normed, strict=True)]


def _least(of: Dims, round: int, *, whole_qk: bool = False, split: bool = False) -> Dims:
    """The smallest widths at which the branches that are there stay."""
    heads, hidden = min(of.heads, 1), min(of.hidden, round)
    if whole_qk:
        return of._replace(heads=heads, v_dim=min(of.v_dim, round) if split else of.v_dim, hidden=hidden)
    return of._replace(heads=heads, qk_dim=min(of.qk_dim, round), v_dim=min(of.v_dim, round), hidden=hidden)


def _less(width: int, round: int) -> int:
    """The next smaller multiple of ``round``; the width itself where there is none."""
    return max((width - 1) // round * round, min(width, round))


def _more(width: int, of: int, round: int) -> int:
    """The next larger multiple of ``round``, or all."""
    return min((width // round + 1) * round, of)


def _kept(order: np.ndarray, count: int) -> tuple[int, ...]:
    return tuple(sorted(int(i) for i in order[:count]))
