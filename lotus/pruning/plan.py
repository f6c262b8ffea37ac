"""What stays of each block. Every method makes a Plan; one surgeon executes it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lotus.vit import anatomy, cost
from lotus.vit.anatomy import Dims
from selection.errors import Refused, reason

FORMAT = 2
"""Of a plan that takes out sublayers or inputs; one that does not is written as 1, which older versions read."""


@dataclass(frozen=True)
class BlockPlan:
    """What stays of one block: sorted indices into the block before the cut. A value that cannot be wrong.

    Without heads the attention is gone, without units the MLP; without both the block.
    """

    of: Dims
    """The widths before the cut."""
    heads: tuple[int, ...]
    """Kept heads."""
    qk: tuple[tuple[int, ...], ...]
    """Kept query/key dimensions of each kept head: equally many in all."""
    v: tuple[tuple[int, ...], ...]
    """Kept value dimensions of each kept head: equally many in all."""
    units: tuple[int, ...]
    """Kept MLP units."""
    attn_in: tuple[int, ...] | None = None
    """Kept channels of what attention reads now; None: all."""
    mlp_in: tuple[int, ...] | None = None
    """Kept channels of what the MLP reads now; None: all."""

    def __post_init__(self) -> None:
        _indices("heads", self.heads, self.of.heads)
        _indices("MLP units", self.units, self.of.hidden)
        for what, reads, of, there in (
            ("attention's inputs", self.attn_in, self.of.attn_in, self.heads),
            ("the MLP's inputs", self.mlp_in, self.of.mlp_in, self.units),
        ):
            if reads is None:
                continue
            if not reads:
                raise Refused(f"{what}: none is kept. At least one must be.")
            if not there:
                raise Refused(f"{what}: the sublayer that would read them is gone.")
            _indices(what, reads, of)
        for what, rows, limit in (("q/k dimensions", self.qk, self.of.qk_dim), ("v dimensions", self.v, self.of.v_dim)):
            if len(rows) != len(self.heads):
                raise Refused(f"{what} are given for {len(rows)} heads, but {len(self.heads)} are kept.")
            for head, row in zip(self.heads, rows, strict=True):
                _indices(f"{what} of head {head}", row, limit)
            if any(not row for row in rows):
                raise Refused(f"{what}: a head that stays needs at least one.")
            if len({len(row) for row in rows}) > 1:
                raise Refused(
                    f"{what}: the heads of a block must keep equally many, not {sorted({len(r) for r in rows})}."
                )

    @classmethod
    def full(cls, dims: Dims) -> BlockPlan:
        """Everything stays."""
        every = range(dims.heads)
        return cls(
            of=dims,
            heads=tuple(every),
            qk=tuple(tuple(range(dims.qk_dim)) for _ in every),
            v=tuple(tuple(range(dims.v_dim)) for _ in every),
            units=tuple(range(dims.hidden)),
        )

    @property
    def dims(self) -> Dims:
        """The widths after the cut."""
        qk_dim, v_dim = (len(self.qk[0]), len(self.v[0])) if self.heads else (0, 0)
        attn_in = len(self.attn_in) if self.attn_in is not None else self.of.attn_in if self.heads else None
        mlp_in = len(self.mlp_in) if self.mlp_in is not None else self.of.mlp_in if self.units else None
        return Dims(len(self.heads), qk_dim, v_dim, len(self.units), attn_in, mlp_in)

    @property
    def outputs(self) -> list[int]:
        """Kept attention outputs: columns of proj, in order; none changes its head."""
        return [head * self.of.v_dim + j for head, row in zip(self.heads, self.v, strict=True) for j in row]

    @property
    def queries(self) -> list[int]:
        """Kept rows of q, and of k, in order."""
        return [head * self.of.qk_dim + j for head, row in zip(self.heads, self.qk, strict=True) for j in row]


@dataclass(frozen=True)
class Plan:
    """What stays of each block, in order."""

    blocks: tuple[BlockPlan, ...]

    def __post_init__(self) -> None:
        if self.blocks and not any(plan.heads or plan.units for plan in self.blocks):
            raise Refused("The plan takes out every block. At least one sublayer must stay.")

    @classmethod
    def full(cls, model: nn.Module | Sequence[Dims]) -> Plan:
        """The plan by which nothing is cut from ``model`` (or from blocks of these widths)."""
        dims = [block.dims for block in anatomy.blocks(model)] if isinstance(model, nn.Module) else model
        return cls(tuple(BlockPlan.full(one) for one in dims))

    @property
    def dims(self) -> tuple[Dims, ...]:
        """The widths of each block after the cut."""
        return tuple(block.dims for block in self.blocks)

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this plan was not made for.

        Raises:
            Refused: another number of blocks, or other widths; or the model cannot be cut at all.
        """
        blocks = anatomy.blocks(model)
        if len(blocks) != len(self.blocks):
            raise Refused(f"The plan is for {len(self.blocks)} blocks, the model has {len(blocks)}.")
        for block, plan in zip(blocks, self.blocks, strict=True):
            if block.dims != plan.of:
                raise Refused(f"{block.name}: the plan is for {plan.of}, the model has {block.dims}.")
            for sublayer, reads in (("attn", plan.attn_in), ("mlp", plan.mlp_in)):
                if reads is not None and (block.norm_after or reads[-1] >= block.width):
                    raise Refused(
                        f"{block.name}: {sublayer} cannot read channel {reads[-1]} of the residual stream alone."
                    )
            if block.whole_qk and plan.heads and plan.dims.qk_dim != plan.of.qk_dim:
                why = "qk-norm, whose statistics are of" if block.qk_norm else "rotary positions, which turn"
                raise Refused(f"{block.name}: has {why} all query/key dimensions. Keep them all.")

    def cost(self, model: nn.Module | cost.Outline) -> cost.Cost:
        """What the cut model will cost; nothing is built."""
        outline = cost.outline(model) if isinstance(model, nn.Module) else model
        return outline.cost(self.dims)

    def summary(self) -> list[dict[str, int]]:
        """A row a block, for reports: ``heads``, ``head_dim``, ``qk_dim``, ``hidden``, each beside ``of_...``; 0 is gone."""
        return [
            {
                "heads": plan.dims.heads,
                "of_heads": plan.of.heads,
                "head_dim": plan.dims.v_dim,
                "of_head_dim": plan.of.v_dim,
                "qk_dim": plan.dims.qk_dim,
                "of_qk_dim": plan.of.qk_dim,
                "hidden": plan.dims.hidden,
                "of_hidden": plan.of.hidden,
            }
            for plan in self.blocks
        ]

    def to_json(self) -> str:
        """Text that :meth:`from_json` takes back."""
        rows = [
            {
                "of": list(b.of[:4] if b.of[4:] == (None, None) else b.of),
                "heads": list(b.heads),
                "qk": [list(r) for r in b.qk],
                "v": [list(r) for r in b.v],
                "units": list(b.units),
                **{
                    name: list(reads)
                    for name, reads in (("attn_in", b.attn_in), ("mlp_in", b.mlp_in))
                    if reads is not None
                },
            }
            for b in self.blocks
        ]
        older = all(b.heads and b.units and b.dims[4:] == (None, None) for b in self.blocks)
        return json.dumps({"format": 1 if older else FORMAT, "blocks": rows})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            Refused: not a plan, of a newer format, or one that contradicts itself.
        """
        try:
            raw = json.loads(text)
            newer = int(raw["format"]) > FORMAT
            rows: list[Any] = [] if newer else raw["blocks"]
            read = [
                (
                    Dims(*row["of"]),
                    tuple(row["heads"]),
                    _rows(row["qk"]),
                    _rows(row["v"]),
                    tuple(row["units"]),
                    _some(row.get("attn_in")),
                    _some(row.get("mlp_in")),
                )
                for row in rows
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"This is no plan ({reason(error)}).") from None
        if newer:
            raise Refused(f"The plan has format {raw['format']}, this LOTUS reads up to {FORMAT}. Take a newer LOTUS.")
        return cls(tuple(BlockPlan(*parts) for parts in read))


def _rows(rows: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _some(reads: Any) -> tuple[int, ...] | None:
    return None if reads is None else tuple(reads)


def _indices(what: str, indices: tuple[int, ...], limit: int | None) -> None:
    """Refuse what is not a sorted set of indices below ``limit``, or below any where that is not known here."""
    if any(type(i) is not int for i in indices):
        raise Refused(f"{what}: indices must be integers.")
    if not indices:
        return
    limit = indices[-1] + 1 if limit is None else limit
    if indices[0] < 0 or indices[-1] >= limit or any(a >= b for a, b in itertools.pairwise(indices)):
        raise Refused(f"{what}: indices must rise, each once, from 0 to {limit - 1}.")
