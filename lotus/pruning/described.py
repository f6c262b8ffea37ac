"""The model that a spec describes: the widths of its blocks as rows, checked, and the model of them, without memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lotus.pruning import surgery
from lotus.vit import anatomy, convolution, families, parts
from lotus.vit import model as door
from lotus.vit.anatomy import Dims
from selection.errors import Refused

_WIDTHS = ("heads", "qk_dim", "v_dim", "hidden")
_NONE, _ALL = (False,) * 3, (True,) * 3
_WIDEST = 1 << 20  # no block of ours has more units; a spec that asks for them is not ours


def rows_of(model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The widths of each block as a spec holds them: 0 heads or units where a sublayer is gone, all 0 where the block is; the
    channels that a sublayer reads where those are not all. And the side of each convolution, by the block's number as text."""
    rows: dict[int, dict[str, Any]] = {}
    kernels: dict[str, int] = {}
    for number, block in zip(parts.places(model), anatomy.blocks(model, convolved=True), strict=True):
        rows[number] = dict(zip(_WIDTHS, block.dims, strict=False))
        rows[number] |= {f"{of}_in": list(index) for of in ("attn", "mlp") if (index := block.reads(of)) is not None}
        kernels |= {str(number): block.kernel} if block.kernel else {}
    rows |= {number: dict.fromkeys(_WIDTHS, 0) for number in parts.gone(model)}
    return [rows[number] for number in sorted(rows)], kernels


def row_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a spec, refused by a TypeError where it is none."""
    Dims(**row)
    for name in ("attn_in", "mlp_in"):
        if not isinstance(row.get(name, []), list):
            raise TypeError(f"{name} is no list")
    return dict(row)


def skeleton(
    origin: Mapping[str, Any], rows: list[dict[str, Any]], kernels: Mapping[str, Any], *, place: str
) -> nn.Module:
    """The model that a spec describes, without memory (meta device).

    Args:
        origin: Name and arguments by which timm builds the dense model.
        rows: Of each of its blocks: heads, dimensions and units that are left.
        kernels: Number of a block, as text -> side of its convolution.
        place: What a refusal calls the spec.
    """
    model = _dense(origin, len(rows), place)
    sides = _sides(model, kernels, place)
    _check_rows(model, rows, sides, place)
    stays = [(row["heads"] > 0, row["hidden"] > 0) for row in rows]
    opened = families.opened(model)
    if not all(map(all, stays)):
        parts.strip(opened, stays)
    left = [(row, kernel) for row, kernel, stay in zip(rows, sides, stays, strict=True) if any(stay)]
    for block, (row, kernel) in zip(anatomy.blocks(opened), left, strict=True):
        _reshape(block, row, kernel, opened)
    return families.close(opened, model) if opened is not model else model


def _dense(origin: Mapping[str, Any], depth: int, place: str) -> nn.Module:
    """The model before any cut, of ``depth`` blocks, without memory."""
    if not isinstance(origin["name"], str):
        raise Refused(f"{place}: the model's name is {origin['name']!r}.")
    told = origin["args"].get("depth", origin["args"].get("depths"))
    deep = sum(d for d in told if isinstance(d, int)) if isinstance(told, (list, tuple)) else told
    if isinstance(deep, int) and deep != depth:  # before it is built: thousands of blocks take long
        raise Refused(f"{place}: widths for {depth} blocks, but a depth of {told}.")
    model = door.build(origin["name"], origin["args"], meta=True, place=place)
    if (built := len(anatomy.blocks(model))) != depth:
        raise Refused(f"{place}: widths for {depth} blocks, but {origin['name']} has {built}.")
    return model


def _sides(model: nn.Module, kernels: Mapping[str, Any], place: str) -> list[int]:
    """The side of each block's convolution; 0 for attention."""
    numbers = [str(number) for number in range(len(anatomy.blocks(model)))]
    known = all(type(side) is int and side in convolution.KERNELS for side in kernels.values())
    if not known or not set(kernels) <= set(numbers):
        raise Refused(f"{place}: convolutions {dict(kernels)} are none of this model's blocks and of 1 or 3 pixels.")
    if kernels and not anatomy.is_vit(model):
        raise Refused(f"{place}: a {type(model).__name__} has no attention that could be a convolution.")
    return [kernels.get(number, 0) for number in numbers]


def _check_rows(model: nn.Module, rows: Sequence[Mapping[str, Any]], sides: Sequence[int], place: str) -> None:
    """Refuse widths that a block cannot have; of other families than plain ViTs no sublayer goes and all channels are read."""
    plain = anatomy.is_vit(model)
    for block, row, side in zip(anatomy.blocks(model), rows, sides, strict=True):
        whole = plain or (row["heads"] and row["hidden"] and len(row) == len(_WIDTHS))
        if not whole or not _possible(row, block, side):
            raise Refused(f"{place}: {block.name} cannot have {row}.")
    if not any(row["heads"] or row["hidden"] for row in rows):
        raise Refused(f"{place}: nothing is left of any block.")


def _possible(row: Mapping[str, Any], block: anatomy.Block, kernel: int) -> bool:
    """Whether ``block``, which is whole, can have the widths of ``row``, and a convolution of side ``kernel`` (0: none)."""
    if any(type(row[name]) is not int or not 0 <= row[name] <= _WIDEST for name in _WIDTHS):
        return False
    heads, qk_dim, v_dim, hidden = (row[name] for name in _WIDTHS)
    attn_in, mlp_in = row.get("attn_in"), row.get("mlp_in")
    if kernel:
        attention = (heads, qk_dim) == (1, 0) and v_dim > 0 and attn_in is None
    else:
        attention = (heads > 0, qk_dim > 0, v_dim > 0) in (_NONE, _ALL)
    return attention and _can_read(block, attn_in, heads) and _can_read(block, mlp_in, hidden)


def _can_read(block: anatomy.Block, index: list[Any] | None, there: int) -> bool:
    """Whether a sublayer of ``there`` heads or units can read the channels ``index`` alone; None: all."""
    if index is None:
        return True
    rises = all(type(i) is int for i in index) and all(a < b for a, b in itertools.pairwise(index))
    inside = rises and bool(index) and index[0] >= 0 and index[-1] < block.width
    return inside and there > 0 and not block.norm_after


def _reshape(block: anatomy.Block, row: Mapping[str, Any], kernel: int, model: nn.Module) -> None:
    """Give ``block`` of ``model`` the widths of ``row``, and a convolution of side ``kernel`` (0: none)."""
    reads = {of: row.get(f"{of}_in") for of in ("attn", "mlp")}
    widths = [row[name] for name in _WIDTHS]
    dims = Dims(*widths, *(None if index is None else len(index) for index in reads.values()))
    if kernel:  # the attention first stays as it is: it tells the convolution what it reads and its biases
        surgery.reshape(block, block.dims._replace(hidden=dims.hidden, mlp_in=dims.mlp_in), reads)
        surgery.convolve(block, kernel, dims.v_dim, model)
    elif dims != block.dims:
        surgery.reshape(block, dims, reads)
