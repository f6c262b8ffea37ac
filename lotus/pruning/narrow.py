"""A smaller embedding dimension: the residual stream turned into its principal axes, and cut to the first of them.

A pre-norm ViT with LayerNorm computes the same in any orthogonal basis of its residual stream, once (SliceGPT, Ashkboos et al. 2024,
2401.15024, sections 3.1 and 3.2, for a ViT):

    folded        the gain and bias of each norm go into the Linear that reads it, LayerScale into the one that writes
    mean-free     every writer is multiplied by M = I - 1 1' / D: then LayerNorm is RMSNorm, n = x / sqrt(mean x^2)
    turned        x -> Q' x at every writer, W -> W Q at every reader, with one Q, (D, D' - 1) of orthonormal columns, for the
                  whole stream: the eigenvectors of the largest eigenvalues of E[n n'], the mean over tokens, images and all
                  norms: what readers see.
    laid out      in D' channels whose sum is 0: x -> Z Q' x at every writer, W -> W Q Z' at every reader, Z (D', D' - 1) of
                  orthonormal columns that are orthogonal to (1, 1, ..., 1). Of such channels LayerNorm is RMSNorm again, so
                  timm's LayerNorm stays (SliceGPT goes on with RMSNorm, and keeps D' axes in place of D' - 1).
    cut           A norm divides by the root of the mean over D' channels, where it was over D: where what was cut is 0,
                  x_S / rms(x) = sqrt(D / D') x_S / rms(x_S), and so readers are multiplied by sqrt(D / D').

Nothing is lost while D' - 1 is at least the rank of the stream; D - 1 always is. What is cut beyond that is made up for in each
reader by its best affine prediction from what stays (:mod:`lotus.pruning.compensate`). The model that comes out is timm's own
of a smaller ``embed_dim``, and heads of the widths that they had. D channels, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lotus.config import Prune
from lotus.pruning import measure, surgery
from lotus.pruning.compensate import Compensate, Known, Moments, fold
from lotus.vit import anatomy, cost, parts
from lotus.vit import model as door
from selection.errors import Refused

GRID = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375)
"""What ``width: search`` tries, and ``auto`` from the first on while that helps."""
CLOSE = 0.001
"""Nats an image. A model no further than this from the dense one is as good as that (docs/pruning.md): ``auto`` tries no other."""


def tries(model: nn.Module, request: Prune) -> tuple[float, ...]:
    """The parts of the stream that are to be tried. ``auto`` stands for all channels where there is no choice: for a budget that
    says nothing of the stream, with in_channels or sublayers, and for a model whose stream cannot be turned."""
    if request.embed_dim is None:
        return (1.0,)
    if request.embed_dim == "search":
        return GRID
    if request.embed_dim != "auto":
        return (request.embed_dim,)
    parts = request.keep.asked
    free = parts.keys() <= {"macs", "params"} and any(part < 1 for part in parts.values())
    return GRID if free and not (request.in_channels or request.sublayers) and can_turn(model) else (1.0,)


def can_turn(model: nn.Module) -> bool:
    """Whether the stream can be turned."""
    return anatomy.is_vit(model) and not _fault(model) and door.remade(model) is not None


def channels(model: nn.Module, part: float, round: int) -> int:
    """D': ``part`` of the stream's channels, as the nearest multiple of ``round``; at least two, which carry one axis."""
    width = anatomy.blocks(model)[0].width
    round = max(round, 1)
    near = max(1, int(part * width / round + 0.5)) * round
    return min(max(near, 2), width)


def useful(model: nn.Module, parts: Sequence[float], request: Prune, *, whole: cost.Cost | None = None) -> list[int]:
    """The channels of ``parts`` (:func:`channels`), but for those so few that the budgets would be missed from below: with
    ``round`` more of them, and nothing else cut, the model would lie within every budget still. Where a budget is 1, or of
    something else than macs and params, none is missed. Budgets are parts of ``whole``; None: of the model.

    Raises:
        Refused: none is left, or the stream cannot be turned.
    """
    wide, whole, round = anatomy.blocks(model)[0].width, whole or cost.count(model), request.multiple
    keep = request.keep.asked
    every = list(dict.fromkeys(channels(model, part, round) for part in parts))
    if not set(keep) <= {"macs", "params"} or 1 in keep.values():
        return every
    budgets = {what: part * getattr(whole, what) for what, part in keep.items()}

    def idle(width: int) -> bool:
        more = min(width + round, wide)
        if more == wide:
            return False
        widths = cost.count(skeleton(model, more))
        return all(getattr(widths, what) <= limit for what, limit in budgets.items())

    widths = [width for width in every if not idle(width)]
    if not widths:
        left = cost.count(skeleton(model, every[0]))
        told = " and ".join(f"{getattr(left, what) / getattr(whole, what):.3f} of {what}" for what in budgets)
        raise Refused(
            f"prune.embed_dim: {every[0]} of {wide} channels leave {told} before anything else is cut, less than prune.keep asks for. "
            "Take a larger width, or search, or a smaller budget."
        )
    return widths


@dataclass
class Statistics:
    """Of what each norm gives before its gain: ``blocks.3.attn``, ``blocks.3.mlp``, ``head``."""

    images: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)


def statistics(
    model: nn.Module, batches: Iterable[Any], *, progress: Callable[[int], None] | None = None
) -> Statistics:
    """Go through ``batches`` once, forward only, in eval mode.

    Raises:
        Refused: a model whose stream cannot be turned; no batch came, or the output is not finite.
    """
    found = Statistics()

    def look(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        found.moments[site] = Moments()

        def hook(norm: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            x = x if x.dtype == torch.float64 else x.float()
            found.moments[site].add(functional.layer_norm(x, (x.shape[-1],), eps=norm.eps))

        return hook

    with ExitStack() as stack:
        for site, (norm, _) in _readers(model).items():
            stack.callback(norm.register_forward_pre_hook(look(site)).remove)
        found.images = measure.measure(model, batches, gradients=False, moments="none", progress=progress).images
    return found


def narrow(model: nn.Module, found: Statistics, width: int, *, compensate: Compensate = "affine") -> nn.Module:
    """What ``model`` computes, with ``width`` channels in its stream; a model of its own, on its device and in its dtype.

    Raises:
        Refused: a model whose stream cannot be turned; names what stands in the way.
    """
    readers = _readers(model)
    dense: Any = model
    wide = anatomy.blocks(model)[0].width
    second = sum(one.covariance + torch.outer(one.mean, one.mean) for one in found.moments.values())
    assert isinstance(second, Tensor)
    mean_free = torch.eye(wide, dtype=second.dtype, device=second.device) - 1 / wide
    _, basis = torch.linalg.eigh(mean_free @ second @ mean_free)
    turn = mean_free @ basis.flip(1)  # (D, D), best first; norms give nothing along (1, 1, ...), to the last bit
    layout = _mean_free(width).to(turn)
    write = layout @ turn[:, : width - 1].T  # (D', D)
    small: Any = skeleton(model, width)
    state = _written(model, write, bias=small.patch_embed.proj.bias is not None)
    for site, (norm, linears) in readers.items():
        moments = found.moments[site]
        turned = Known(turn.T @ moments.mean, turn.T @ moments.covariance @ turn)
        gain, shift = norm.weight.detach().to(turn), norm.bias.detach().to(turn)
        for name, linear in linears.items():
            old = linear.weight.detach().to(turn)
            bias = old @ shift if linear.bias is None else linear.bias.detach().to(turn) + old @ shift
            weight, bias = fold((old * gain) @ turn, bias, range(width - 1), turned, compensate)
            weight = weight @ layout.T * math.sqrt(wide / width)
            state[f"{name}.weight"] = weight.to(linear.weight.device, linear.weight.dtype)
            assert bias is not None
            state[f"{name}.bias"] = bias.to(linear.weight.device, linear.weight.dtype)
    like = dense.patch_embed.proj.weight
    for name, tensor in small.state_dict().items():
        if name not in state:  # of the norms, whose gains and biases are folded: they start anew
            start = torch.zeros if name.endswith("bias") else torch.ones
            state[name] = start(tensor.shape, dtype=like.dtype, device=like.device)
    small.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    for weight in small.parameters():
        weight.requires_grad_(True)
    result: nn.Module = small.train(model.training)
    return result


def _written(model: Any, write: Tensor, *, bias: bool) -> dict[str, Tensor]:
    """What writes to the stream, turned by ``write`` (D', D), by name in the state dict.

    Args:
        bias: whether the patch embedding is to have one
    """

    def turned(linear: nn.Linear | nn.Conv2d, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A writer's weight (D', ...) and bias (D',)."""
        weight, found = linear.weight, []
        for tensor in (weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias):
            rows = tensor.detach().to(write)
            if gamma is not None:
                rows = rows * gamma.detach().to(rows).reshape(-1, *[1] * (rows.ndim - 1))
            found.append(torch.tensordot(write, rows, dims=([1], [0])).to(tensor.device, tensor.dtype))
        return found[0], found[1]

    embedded = turned(model.patch_embed.proj)
    state = {"patch_embed.proj.weight": embedded[0]} | ({"patch_embed.proj.bias": embedded[1]} if bias else {})
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        token = getattr(model, name, None)
        if token is not None:
            state[name] = (token.detach().to(write) @ write.T).to(token.device, token.dtype)
    for block in anatomy.blocks(model):
        for last, sublayer in (("proj", "attn"), ("fc2", "mlp")):
            if last in block.linears:
                place = f"{block.name}.{sublayer}.{last}"
                state[f"{place}.weight"], state[f"{place}.bias"] = turned(block.linears[last], block.gamma(sublayer))
    return state


def skeleton(model: nn.Module, width: int) -> nn.Module:
    """The model that :func:`narrow` fills, without memory (meta device).

    Raises:
        Refused: a model whose stream cannot be turned.
    """
    _readers(model)
    made = door.origin(model)
    args = {
        **made["args"],
        "embed_dim": width,
        "num_heads": 1,  # whatever divides it: the blocks are given their own heads and units
        "mlp_ratio": 4.0,
        "init_values": 0,  # LayerScale is folded
        "qkv_bias": True,  # for what the norms' biases leave
        "proj_bias": True,
    }
    small = door.build(made["name"], args, meta=True, place="prune.embed_dim")
    parts.strip_like(small, model)
    for new, old in zip(anatomy.blocks(small), anatomy.blocks(model), strict=True):
        surgery.reshape(new, old.dims)
    return small


def _mean_free(width: int) -> Tensor:
    """Z, (D', D' - 1) float64: all but the last column of the reflection that takes the last axis to (1, 1, ..., 1) / sqrt(D'),
    so that channels stay close to the axes that they lay out."""
    normal = torch.full((width,), -1 / math.sqrt(width), dtype=torch.float64)
    normal[-1] += 1
    normal /= normal.norm()
    return (torch.eye(width, dtype=torch.float64) - 2 * torch.outer(normal, normal))[:, :-1]


def apart(one: nn.Module, other: nn.Module, batches: Iterable[Any]) -> tuple[float, int]:
    """How far ``other`` is from ``one``: the mean over images of KL(one || other) in nats, in eval mode; and how many images there were.

    Of backbones: the mean over images of ||f - f0||^2 / ||f0||^2 of their features.
    """
    total, images = 0.0, 0
    where = next(one.parameters())
    with torch.no_grad(), measure.evaluating(one), measure.evaluating(other):
        for batch, _ in measure.pairs(batches, labeled=False):
            x = batch.to(where.device, where.dtype)
            images += len(x)
            outputs = [model(x).double() for model in (one, other)]
            if measure.is_backbone(one):
                whole, now = (features.flatten(1) for features in outputs)
                total += float(((now - whole).square().sum(1) / whole.square().sum(1).clamp_min(1e-12)).sum())
                continue
            outputs = [functional.log_softmax(scores, dim=-1) for scores in outputs]
            total += float(functional.kl_div(outputs[1], outputs[0], reduction="sum", log_target=True))
    return total / max(images, 1), images


def _readers(model: Any) -> dict[str, tuple[Any, dict[str, nn.Linear]]]:
    """Each norm over the stream and the Linears that read it, by name in the state dict.

    Raises:
        Refused: a model whose stream cannot be turned; names what stands in the way.
    """
    anatomy.plain(model, "prune.embed_dim")
    if fault := _fault(model):
        raise Refused(
            f"prune.embed_dim: {type(model).__name__}: {fault}, so its residual stream cannot be turned. Leave prune.embed_dim out."
        )
    return _norms(model)


def _norms(model: Any) -> dict[str, tuple[Any, dict[str, nn.Linear]]]:
    """As :func:`_readers`, of a model that may have others yet."""
    found: dict[str, tuple[Any, dict[str, nn.Linear]]] = {}
    for block in anatomy.blocks(model):
        if block.has_attn:
            found[f"{block.name}.attn"] = (block.module.norm1, {f"{block.name}.attn.qkv": block.qkv})
        if block.has_mlp:
            found[f"{block.name}.mlp"] = (block.module.norm2, {f"{block.name}.mlp.fc1": block.fc1})
    heads = {name: getattr(model, name, None) for name in ("head", "head_dist")}
    last = [norm for norm in (model.norm, model.fc_norm) if not isinstance(norm, nn.Identity)]
    if len(last) == 1 and isinstance(heads["head"], nn.Linear):
        found["head"] = (last[0], {name: head for name, head in heads.items() if isinstance(head, nn.Linear)})
    return found


def _fault(model: Any) -> str:
    """Why the stream of a plain ViT cannot be turned; empty where it can."""
    norms = _norms(model)
    if "head" not in norms:
        return "it does not end in one norm and a classifier"
    if not isinstance(getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity):
        return "a norm writes the residual stream (patch_embed.norm)"
    if not isinstance(model.norm_pre, nn.Identity):
        return "a norm writes the residual stream (norm_pre)"
    if getattr(model, "attn_pool", None) is not None:
        return "it pools by attention"
    faults = [f"{block.name} {fault}" for block in anatomy.blocks(model) if (fault := _fault_of_block(block))]
    if faults:
        return faults[-1]
    if any(type(norm).__name__ != "LayerNorm" for norm, _ in norms.values()):
        return "its norms are no LayerNorms"
    return ""


def _fault_of_block(block: anatomy.Block) -> str:
    if block.reads("attn") is not None or block.reads("mlp") is not None:
        return "reads only some of the stream's channels"
    if block.qk_norm:
        return "norms queries and keys"
    if block.norm("attn") is not None or block.norm("mlp") is not None:
        return "sub-LN / scale norm before proj or fc2"
    return "is post-norm" if block.norm_after else ""
