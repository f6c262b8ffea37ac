"""One block while it is cut: widths that only ever follow the order of scores, and the chunks by which they change.

A chunk is ``round`` MLP units of a block, a head, or ``round`` dimensions in all heads of a block; where that is asked for,
``round`` channels that a sublayer reads, or a sublayer as a whole.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lotus.config import Prune
from lotus.pruning.plan import BlockPlan
from lotus.vit.anatomy import Dims
from lotus.vit.cost import BlockCost, Cost, Outline
from selection.errors import Refused
from selection.methods import nearest

_PART = {"units": "mlp", "mlp_in": "mlp", "mlp": "mlp"}
"""Of which sublayer a kind of chunk is, where that is not attention."""
KINDS = ("heads", "dims", "units")
DECOUPLED = ("heads", "qk", "v", "units")
IN_CHANNELS = ("attn_in", "mlp_in")
SUBLAYERS = ("attn", "mlp")
_OF_KIND = {
    "heads": ("heads",), "dims": ("qk_dim", "v_dim"), "qk": ("qk_dim",), "v": ("v_dim",), "units": ("hidden",),
    "attn_in": ("attn_in",), "mlp_in": ("mlp_in",),
}  # fmt: skip
"""The widths that a chunk of each kind moves."""


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

    def __init__(self, index: int, outline: Outline, scores: Mapping[str, np.ndarray], request: Prune) -> None:
        self.index, self.outline, self.request, self.round = index, outline, request, request.multiple
        self.of = self.dims = outline.dims[index]
        self.most = self.of  # what may come back; less than all where a plan has to lie within another
        self.whole_qk = _whole_qk(outline, index)
        self.whole = _whole(outline, request)[index]
        self._least = _least(outline, index, request, decouple_qk=False)
        heads, qk_dim, v_dim, hidden = self.of[:4]
        name = f"blocks.{index}"
        self.reads: dict[str, int] = {}
        """Channels that each sublayer reads now, where some of them may go."""
        self.read_scores: dict[str, np.ndarray] = {}
        if request.in_channels:
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
        if _PART.get(kind, "attn") in self.whole:
            return None
        if kind == "attn":
            return Dims(0, 0, 0, self.dims.hidden, None, self.dims.mlp_in) if self.dims.heads else None
        if kind == "mlp":
            return self.dims._replace(hidden=0, mlp_in=None) if self.dims.hidden else None
        return self._moved(kind, self._less)

    def more(self, kind: str) -> Dims | None:
        """The widths with one chunk of ``kind`` more; None where all are there that may be. A sublayer comes
        back as small as it can be."""
        dims, least = self.dims, self.least()
        if kind == "attn":
            back = Dims(least.heads, least.qk_dim, least.v_dim, dims.hidden, least.attn_in, dims.mlp_in)
            return back if self.most.heads and not dims.heads else None
        if kind == "mlp":
            back = dims._replace(hidden=least.hidden, mlp_in=least.mlp_in)
            return back if self.most.hidden and not dims.hidden else None
        return self._moved(kind, lambda name, now: _more(now, self._wide(self.most, name), _step(name, self.request)))

    def _less(self, name: str, width: int) -> int:
        """The next smaller width that may be; the width itself where there is none."""
        step = _step(name, self.request)
        return max((width - 1) // step * step, min(width, self.floor(name)))

    def floor(self, name: str) -> int:
        """The least of a width that stays while its sublayer does."""
        return _floor(name, self._wide(self.of, name), self.request)

    def _wide(self, dims: Dims, name: str) -> int:
        """A width of ``dims`` as a number, where all channels that are read are written as None."""
        width: int | None = getattr(dims, name)
        return self.reads[name] if width is None else width

    def _moved(self, kind: str, to: Callable[[str, int], int]) -> Dims | None:
        """The widths with those that a chunk of ``kind`` is of moved, given the name and the present width of each; None where
        none moves, or may."""
        names = _OF_KIND[kind]
        there = self.dims.hidden if kind in ("units", "mlp_in") else self.dims.heads
        fixed = (kind in IN_CHANNELS and kind not in self.reads) or ("qk_dim" in names and self.whole_qk)
        if not there or fixed:
            return None
        moved = {name: to(name, self._wide(self.dims, name)) for name in names}
        if all(width == self._wide(self.dims, name) for name, width in moved.items()):
            return None
        all_again = {name: getattr(self.of, name) for name, width in moved.items() if width == self.reads.get(name)}
        return self.dims._replace(**{**moved, **all_again})

    def least(self) -> Dims:
        """The smallest widths at which both sublayers are still there."""
        reads = {
            kind: wide if _PART.get(kind, "attn") in self.whole else self.floor(kind)
            for kind, wide in self.reads.items()
        }
        return self._least._replace(
            **{kind: getattr(self.of, kind) if less == self.reads[kind] else less for kind, less in reads.items()}
        )

    def choices(self) -> tuple[list[int], list[int], list[int]]:
        """The widths that a cut may leave: of heads, of dimensions a head, of MLP units."""
        of = self.of
        dims = [of.v_dim] if self.whole_qk else self._multiples("v_dim")
        heads, units = self._multiples("heads"), self._multiples("hidden")
        if "attn" in self.whole:
            heads, dims = [of.heads], [of.v_dim]
        return heads, dims, [of.hidden] if "mlp" in self.whole else units

    def _multiples(self, name: str) -> list[int]:
        """The widths of one name that a cut may leave: multiples of its step, the least, and all."""
        width, step, least = getattr(self.of, name), _step(name, self.request), self.floor(name)
        return sorted({least, *range(-(-least // step) * step, width, step), width}) if width else [0]

    def pools(self) -> list[tuple[str, np.ndarray]]:
        """The scores of all that may go, by kind."""
        every = [*self.read_scores.items(), ("v", self.v.reshape(-1)), ("units", self.units)]
        return [(kind, found) for kind, found in every if _PART.get(kind, "attn") not in self.whole]

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
        # So does a sublayer with all that it reads.
        keys, reads = kind in ("dims", "qk"), kind in IN_CHANNELS
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


def _scores(scores: Mapping[str, np.ndarray], site: str, shape: tuple[int, ...]) -> np.ndarray:
    given = scores.get(site)
    if given is None:
        if site.endswith(".qk") or 0 in shape:  # a sublayer that is gone has no units
            return np.zeros(shape)
        raise Refused(f"{site}: has no scores. Here: {', '.join(sorted(scores)) or 'none'}.")
    array = np.asarray(given, dtype=np.float64)
    if array.size != np.prod(shape):
        raise Refused(f"{site}: {array.size} scores for {int(np.prod(shape))} units.")
    if not np.isfinite(array).all():
        raise Refused(f"{site}: scores are not finite. Are the weights and the calibration images?")
    return array.reshape(shape)


def _sums(best_first: np.ndarray) -> np.ndarray:
    """Sums over the first 0, 1, 2, ... along the last axis."""
    zero = np.zeros((*best_first.shape[:-1], 1))
    return np.concatenate([zero, np.cumsum(best_first, axis=-1)], axis=-1)


def _least(outline: Outline, index: int, request: Prune, *, decouple_qk: bool | None = None) -> Dims:
    """The smallest widths of a block at which the sublayers that are there stay."""
    of, whole = outline.dims[index], _whole(outline, request)[index]
    decouple_qk = request.decouple_qk if decouple_qk is None else decouple_qk
    names = [] if "mlp" in whole else ["hidden"]
    if "attn" not in whole:
        names += ["heads", *(() if _whole_qk(outline, index) else ("qk_dim", "v_dim"))]
        names += ["v_dim"] if decouple_qk else []
    return of._replace(**{name: _floor(name, getattr(of, name), request) for name in names})


def _step(name: str, request: Prune) -> int:
    """What a width stays a multiple of."""
    return 1 if name == "heads" else request.multiple


def looser(request: Prune) -> str:
    """What would let widths become smaller, in words."""
    if "*" in request.exclude:
        return "name less in prune.exclude"
    exclude = "name less in prune.exclude, or take " if request.exclude else ""
    return f"{exclude}a smaller round" + (" or min_keep" if request.min_keep else "")


def _floor(name: str, of: int, request: Prune) -> int:
    """The least that stays of a width."""
    step = _step(name, request)
    part = 0.0 if request.min_keep is None or name in IN_CHANNELS else request.min_keep
    return min(of, max(1, math.ceil(part * of / step - 1e-9)) * step)


def _whole(outline: Outline, request: Prune) -> list[set[str]]:
    """Which sublayers of each block ``request.exclude`` keeps whole.

    Raises:
        Refused: a pattern that matches nothing; with the nearest name.
    """
    names = [(f"blocks.{i}", f"blocks.{i}.attn", f"blocks.{i}.mlp") for i in range(len(outline.dims))]
    every = [name for of_block in names for name in of_block]
    for pattern in request.exclude:
        if not fnmatch.filter(every, pattern):
            raise Refused(
                f"prune.exclude: {pattern!r} matches nothing.{nearest(pattern, every)} Names are blocks.0 to "
                f"{names[-1][0]}, and of each its .attn and .mlp; * stands for anything."
            )

    def named(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in request.exclude)

    return [{part for part in SUBLAYERS if named(block) or named(f"{block}.{part}")} for block, *_ in names]


def _whole_qk(outline: Outline, index: int) -> bool:
    return bool(outline.whole_qk) and outline.whole_qk[index]


def floors(outline: Outline, request: Prune) -> list[Dims]:
    """The least that may stay of each block, its sublayers included."""
    return [_least(outline, index, request) for index in range(len(outline.dims))]


def smallest(outline: Outline, request: Prune) -> list[Cost]:
    """What it costs when no more can go."""
    least = floors(outline, request)
    whole = _whole(outline, request)
    if request.in_channels:

        def reads(name: str, of: int | None) -> int:
            return _floor(name, of or outline.width, request)

        least = [
            one._replace(
                attn_in=one.attn_in if "attn" in kept else reads("attn_in", one.attn_in) if one.heads else None,
                mlp_in=one.mlp_in if "mlp" in kept else reads("mlp_in", one.mlp_in) if one.hidden else None,
            )
            for one, kept in zip(least, whole, strict=True)
        ]
    # Whichever sublayer is the last one must do: greedy cannot know beforehand which that will be.
    return [outline.cost(left) for left in (_last(least, whole) if request.sublayers is not False else [least])]


def _last(least: Sequence[Dims], whole: Sequence[set[str]]) -> list[list[Dims]]:
    """Every way to keep one sublayer alone, as small as it can be, beside those that stay ``whole``."""
    bare = [_only(one, kept) for one, kept in zip(least, whole, strict=True)]
    if any(whole):
        return [bare]
    ways = [(i, {part}) for i, one in enumerate(least) for part in SUBLAYERS if (one.heads, one.hidden)[part == "mlp"]]
    return [[*bare[:i], _only(least[i], part), *bare[i + 1 :]] for i, part in ways]


def _only(dims: Dims, parts: set[str]) -> Dims:
    """``dims`` without the sublayers that are none of ``parts``."""
    attn = (dims.heads, dims.qk_dim, dims.v_dim, dims.attn_in) if "attn" in parts else (0, 0, 0, None)
    hidden, mlp_in = (dims.hidden, dims.mlp_in) if "mlp" in parts else (0, None)
    return Dims(*attn[:3], hidden, attn[3], mlp_in)


def _more(width: int, of: int, round: int) -> int:
    """The next larger multiple of ``round``, or all."""
    return min((width // round + 1) * round, of)


def _kept(order: np.ndarray, count: int) -> tuple[int, ...]:
    return tuple(sorted(int(i) for i in order[:count]))
