"""Scores of all units of a model: each site's weights, and what was measured of it, are shown to a criterion.

U units of a site, F MLP units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lotus.pruning import criteria
from lotus.pruning.measure import Measured
from lotus.vit import anatomy
from lotus.vit.anatomy import Block
from lotus.vit.parts import Select
from selection import methods
from selection.errors import Refused

READS = frozenset(
    {"reads", "writes", "gradients", "gates", "covariance", "gain", "read_squares", "write_squares", "attention"}
    | {"rng", "units", "images"}
)
"""What a criterion may read (lotus/pruning/criteria.py says what it is)."""


def score(
    model: nn.Module,
    criterion: Callable[..., np.ndarray],
    options: Mapping[str, Any],
    *,
    measured: Measured,
    gates: Mapping[str, Tensor] | None = None,
    in_channels: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Scores of every unit by site, float64: what :func:`lotus.pruning.budget.fit_plan` reads.

    A criterion that reads learned gates says nothing of query/key dimensions, which have none: they are ranked by magnitude,
    and a head's are together worth as much as its outputs. One that reads attention says nothing of MLP units and input channels:
    they are ranked by magnitude, and a block's are together worth as much as the attention before them.

    Raises:
        Refused: the criterion reads what is not here, has no such option, or returns something else than a score a unit.
    """
    known = _Known(measured, gates, np.random.default_rng(seed))
    reads = set(methods.reads(criterion))
    scores: dict[str, np.ndarray] = {}
    worth = 1.0
    for block in anatomy.blocks(model):
        known.enter(block)
        weights = _weights(block, in_channels)
        for site, of_site in weights.items():
            units, attention = len(of_site["reads"]), site.endswith(".attn")
            if site.endswith(".qk") and {"gates", "attention"} & reads:
                continue
            if "attention" in reads and not attention:
                size = criteria.magnitude(of_site["reads"], of_site["writes"])
                scores[site] = worth * size / max(size.sum(), np.finfo(np.float64).tiny)
                continue
            given = known.of(block, site, of_site, attention="attention" in reads)
            found = methods.call(criterion, given, options, place="prune.criterion")
            scores[site] = _checked(found, units, site, criterion, [given[name] for name in reads])
            worth = float(scores[site].sum()) if attention else worth
        if block.has_attn and f"{block.name}.qk" not in scores:
            scores[f"{block.name}.qk"] = _keys(block, weights[f"{block.name}.qk"], scores[f"{block.name}.attn"])
    return scores


def _checked(found: Any, units: int, site: str, criterion: Callable[..., Any], read: Sequence[Any]) -> np.ndarray:
    """What ``criterion`` made of ``read``: a score a unit, (U,). Where its own input is not finite, that is not its fault."""
    place = methods.whose(criterion, "prune.criterion")
    try:
        scores = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise Refused(
            f"{place}: gave a {type(found).__name__} for {site} that is no array of numbers. Return a score a unit, ({units},)."
        ) from None
    if scores.shape != (units,):
        raise Refused(
            f"{place}: gave scores of shape {scores.shape} for {site}, not ({units},). Return a score a unit."
        )
    own = not methods.is_ours(criterion) and not np.isfinite(scores).all()
    if own and all(np.isfinite(one).all() for one in read if isinstance(one, np.ndarray)):
        raise Refused(f"{place}: gave scores for {site} that are not finite. Return a finite score a unit.")
    return scores


def _keys(block: Block, weights: Mapping[str, np.ndarray], outputs: np.ndarray) -> np.ndarray:
    """Scores of query/key dimensions where the criterion says nothing of them: by magnitude, a head's together worth as much as
    its ``outputs``."""
    heads, qk_dim, v_dim, _ = block.dims[:4]
    size = criteria.magnitude(weights["reads"], weights["writes"]).reshape(heads, qk_dim)
    of_heads = outputs.reshape(heads, v_dim).sum(axis=1, keepdims=True)
    total = size.sum(axis=1, keepdims=True)
    scores: np.ndarray = (of_heads * size / np.where(total > 0, total, 1)).reshape(-1)
    return scores


class _Known:
    """What criteria may read, site by site."""

    def __init__(self, measured: Measured, gates: Mapping[str, Tensor] | None, rng: np.random.Generator) -> None:
        self.measured, self.gates, self.rng = measured, gates or {}, rng
        self._watched: list[np.ndarray] = []  # attention of the blocks so far

    def enter(self, block: Block) -> None:
        if block.name in self.measured.attention:
            self._watched.append(self.measured.attention[block.name])

    def of(self, block: Block, site: str, weights: Mapping[str, Any], *, attention: bool) -> dict[str, Any]:
        """What may be read of ``site``, its ``weights`` among it."""
        known = {**weights, "units": len(weights["reads"]), "rng": self.rng, "images": self.measured.images}
        if site in self.measured.gradients:
            known["gradients"] = self.measured.gradients[site].astype(np.float64)
        known |= _spread(block, site, known["writes"], self.measured)
        known |= _squares_of(block, site, self.measured)
        if site in self.gates:
            known["gates"] = self.gates[site].detach().double().cpu().numpy()
        if attention:
            known["attention"] = np.stack([one for one in self._watched if len(one) == block.dims.heads])
        return known


def _weights(block: Block, in_channels: bool) -> dict[str, dict[str, Any]]:
    """What makes each unit and what it writes, by site: ``reads`` and ``writes``, (U, ...) float64 arrays."""
    rows: dict[str, dict[str, Any]] = {}
    if block.has_attn:
        heads, qk_dim, _, _ = block.dims[:4]
        inner = heads * qk_dim
        qkv = _with_bias(block.qkv)
        rows |= {
            f"{block.name}.qk": {"reads": qkv[:inner], "writes": qkv[inner : 2 * inner]},
            f"{block.name}.attn": {"reads": qkv[2 * inner :], "writes": _columns(block, "attn")},
        }
    if block.has_mlp:
        rows[f"{block.name}.mlp"] = {"reads": _units(_with_bias(block.fc1), block), "writes": _columns(block, "mlp")}
    for sublayer, norm, linear in (("attn", "norm1", "qkv"), ("mlp", "norm2", "fc1")):
        if in_channels and linear in block.linears:
            rows[f"{block.name}.{sublayer}_in"] = {
                "reads": _gain(getattr(block.module, norm), block.reads(sublayer)),
                "writes": getattr(block, linear).weight.detach().double().T.cpu().numpy(),
            }
    return rows


def _gain(norm: Any, channels: tuple[int, ...] | None) -> np.ndarray:
    """(U, 2): gain and bias of the norm's channels that are read."""
    norm = norm.norm if isinstance(norm, Select) else norm
    gain = norm.weight.detach().double()
    bias = torch.zeros_like(gain) if getattr(norm, "bias", None) is None else norm.bias.detach().double()
    both = torch.stack((gain, bias), dim=1).cpu().numpy()
    return both if channels is None else both[list(channels)]


def _spread(block: Block, site: str, writes: np.ndarray, measured: Measured) -> dict[str, np.ndarray]:
    """``covariance`` and ``gain`` of a site, where they were measured."""
    if site.endswith(".qk"):
        if block.name not in measured.logits:
            return {}
        logits = measured.logits[block.name]
        products = (logits.queries * logits.keys).cpu()
        return {"covariance": torch.block_diag(*products).numpy(), "gain": np.ones(logits.heads * logits.dim)}
    if site not in measured.moments or not measured.moments[site].with_covariance:
        return {}
    return {"covariance": measured.moments[site].covariance.cpu().numpy(), "gain": (writes**2).sum(axis=1)}


def _squares_of(block: Block, site: str, measured: Measured) -> dict[str, np.ndarray]:
    """``read_squares`` and ``write_squares`` of a site, where they were measured, as ``reads`` and ``writes`` lie."""
    if not measured.squares:
        return {}
    inner = block.dims.heads * block.dims.qk_dim
    of = {name: measured.squares[f"{block.name}.{name}"] for name in block.linears}
    if site.endswith(".qk"):
        return {"read_squares": of["qkv"][:inner], "write_squares": of["qkv"][inner : 2 * inner]}
    if site.endswith("_in"):  # of the norm's own weights nothing is measured: they count nothing
        columns = of["qkv" if site.endswith(".attn_in") else "fc1"][:, :-1].T
        return {"read_squares": np.zeros((len(columns), 2)), "write_squares": columns}
    reads, columns, sublayer = (
        (of["qkv"][2 * inner :], of["proj"], "attn")
        if site.endswith(".attn")
        else (_units(of["fc1"], block), of["fc2"], "mlp")
    )
    gamma = block.gamma(sublayer)
    squares = columns[:, :-1].T  # without the bias, which stays
    if gamma is not None:  # the derivative by gamma w is that by w over gamma
        g = gamma.detach().double().cpu().numpy() ** 2
        squares = np.divide(squares, g, out=np.zeros_like(squares), where=g > 0)
    return {"read_squares": reads, "write_squares": squares}


def _with_bias(linear: nn.Linear) -> np.ndarray:
    """(out, in + 1): a unit's row and its bias."""
    weight = linear.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()
    return torch.cat((weight, bias[:, None]), dim=1).cpu().numpy()


def _units(rows: np.ndarray, block: Block) -> np.ndarray:
    """(F, R): a row a unit; of a gated MLP both halves side by side."""
    return np.concatenate(np.split(rows, 1 + block.glu), axis=1)


def _columns(block: Block, sublayer: str) -> np.ndarray:
    """(in, out): what a unit writes, times LayerScale."""
    weight = (block.proj if sublayer == "attn" else block.fc2).weight.detach().double()
    gamma = block.gamma(sublayer)
    if gamma is not None:
        weight = weight * gamma.detach().double()[:, None]
    return weight.T.cpu().numpy()
