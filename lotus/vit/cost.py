"""What a ViT costs: parameters and multiply-accumulates in closed form, latency by measurement.

A MAC count here is of one image and includes the two products of attention, QK^T and AV, which many counters leave out
(17.56 G for ViT-B/16 at 224 px with them, 16.85 G without). N tokens, D width; norms, activations and softmax count nothing,
nor does turning by rotary positions. In windows (Swin) the products are of pairs inside of a window, padding included.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lotus.vit import anatomy, convolution
from lotus.vit.anatomy import Dims
from lotus.vit.attention import unfuse
from lotus.vit.steady import keep_freed, wait
from selection.errors import Refused


class Biases(NamedTuple):
    """Which of a block's Linears have a bias."""

    qkv: bool = True
    proj: bool = True
    fc1: bool = True
    fc2: bool = True
    keys: bool = True
    """Whether k has one where q and v do. Without, as in EVA and BEiT, it gets one with the attention of ours that holds a cut
    which timm's cannot: where heads do not fill the width."""


class Kind(NamedTuple):
    """What of a block is not told by its widths; the defaults are a plain ViT's."""

    width: int = 0
    """The embedding dimension, that of the residual stream; 0: the model's."""
    attended: int = 0
    """Tokens that the attention's Linears see, padding of windows included; 0: the model's."""
    pairs: int = 0
    """Of tokens that attend to each other; 0: all with all."""
    processed: int = 0
    """Tokens that the MLP sees; 0: the model's."""
    halves: int = 1
    """Rows of fc1 a unit: 2 where the MLP is gated."""
    per_head: int = 0
    """Parameters a head has beside Linears: its relative positions."""
    per_output: int = 0
    """Parameters an attention output has beside Linears: a norm before proj."""
    per_unit: int = 0
    """Parameters an MLP unit has beside Linears: a norm before fc2."""


class BlockCost(NamedTuple):
    """What a block costs, attention products included; its norms and LayerScale count with their sublayer."""

    attn_params: int
    attn_macs: int
    mlp_params: int
    mlp_macs: int

    @property
    def params(self) -> int:
        return self.attn_params + self.mlp_params

    @property
    def macs(self) -> int:
        return self.attn_macs + self.mlp_macs


@dataclass(frozen=True)
class Cost:
    """What a model costs."""

    params: int
    macs: int
    """Multiply-accumulates of one image, QK^T and AV included."""
    blocks: tuple[BlockCost, ...]


def attention_macs(tokens: int, width: int, heads: int, qk_dim: int, v_dim: int, *, reads: int | None = None) -> int:
    """q, k, v, QK^T, AV and proj: N D H (2 Q + V) + N^2 H (Q + V) + N H V D; qkv reads ``reads`` of the D channels."""
    linear = tokens * (reads or width) * heads * (2 * qk_dim + v_dim) + tokens * heads * v_dim * width
    return linear + products(tokens, heads, qk_dim, v_dim)


def products(tokens: int, heads: int, qk_dim: int, v_dim: int) -> int:
    """MACs of QK^T and AV: N^2 H (Q + V)."""
    return tokens * tokens * heads * (qk_dim + v_dim)


def mlp_macs(tokens: int, width: int, hidden: int, halves: int = 1, *, reads: int | None = None) -> int:
    """fc1 and fc2: 2 N D F; 3 N D F where the MLP is gated (two ``halves``); fc1 reads ``reads`` of the D channels."""
    return tokens * (halves * (reads or width) + width) * hidden


@dataclass(frozen=True)
class Outline:
    """All of a model that its cost depends on; gives the cost of any dimensions without building them.

    Blocks without a ``kinds`` are a plain ViT's.
    """

    tokens: int
    """Patches and prefix tokens (class, distillation, registers)."""
    width: int
    dims: tuple[Dims, ...]
    """The widths of each block as they are now."""
    biases: tuple[Biases, ...]
    fixed_params: int
    """Parameters outside of what :meth:`block` counts."""
    fixed_macs: int
    """MACs outside of the blocks: patch embedding, pooling, classifier."""
    whole_qk: tuple[bool, ...] = ()
    """Of which blocks the query/key dimensions must all stay; empty: of none."""
    kinds: tuple[Kind, ...] = ()
    pool_token_macs: int = 0
    """MACs that attention pooling spends on each of the tokens it reads."""
    beside: tuple[tuple[int, int], ...] = ()
    """Of each block: parameters beside the Linears that go with its attention, and with its MLP (norms, LayerScale)."""
    kernels: tuple[int, ...] = ()
    """Side of the convolution that each block has for an attention, 0 for attention; empty: all attend."""
    prefix: int = 0
    """Tokens that are no patches, over which convolutions do not go."""

    def block(self, index: int, dims: Dims, tokens: tuple[int, int] | None = None) -> BlockCost:
        """What block ``index`` would cost with ``dims``.

        Args:
            tokens: how many its attention and its MLP see; all where None
        """
        bias, kind, hidden = self.biases[index], self.kind(index), dims.hidden
        width = kind.width or self.width
        attended, processed = tokens or (kind.attended or self.tokens, kind.processed or self.tokens)
        attention = attn_macs = mlp = fc_macs = 0
        by_attn, by_mlp = self.beside[index] if self.beside else (0, 0)
        kernel = self.kernels[index] if self.kernels else 0
        if kernel:
            attention = by_attn + convolution.params(width, dims.v_dim, kernel, bias=bias.qkv, proj_bias=bias.proj)
            attn_macs = convolution.macs(attended - self.prefix, width, dims.v_dim, kernel)
        elif dims.heads:
            attention, attn_macs = self._attention(index, dims, attended)
            attention += by_attn
        if hidden:
            mlp = by_mlp + hidden * kind.per_unit + kind.halves * ((dims.mlp_in or width) + bias.fc1) * hidden
            mlp += hidden * width + bias.fc2 * width
            fc_macs = mlp_macs(processed, width, hidden, kind.halves, reads=dims.mlp_in)
        return BlockCost(attention, attn_macs, mlp, fc_macs)

    def _attention(self, index: int, dims: Dims, attended: int) -> tuple[int, int]:
        """Parameters and MACs of the attention of block ``index``, over ``attended`` tokens; what stands beside it is not in it."""
        heads, qk_dim, v_dim, _, reads, _ = dims
        bias, kind = self.biases[index], self.kind(index)
        width = kind.width or self.width
        params = ((reads or width) + bias.qkv) * heads * (2 * qk_dim + v_dim) + (heads * v_dim + bias.proj) * width
        params += heads * kind.per_head + heads * v_dim * kind.per_output
        if bias.qkv and not bias.keys and qk_dim == v_dim and heads * v_dim == width:
            params -= heads * qk_dim
        macs = attention_macs(attended, width, heads, qk_dim, v_dim, reads=reads)
        if kind.pairs:
            macs += (kind.pairs - attended * attended) * heads * (qk_dim + v_dim)
        return params, macs

    def kind(self, index: int) -> Kind:
        return self.kinds[index] if self.kinds else Kind()

    def cost(self, dims: Sequence[Dims] | None = None, tokens: Sequence[tuple[int, int]] | None = None) -> Cost:
        """What the model would cost with ``dims`` (one a block); as it is now where None.

        Args:
            tokens: how many each block's attention and MLP see, where patches are dropped on the way (one pair a block)
        """
        dims = self.dims if dims is None else dims
        each = tuple(self.block(i, one, None if tokens is None else tokens[i]) for i, one in enumerate(dims))
        gone = 0 if tokens is None else self.tokens - tokens[-1][1]  # before the pooling
        macs = self.fixed_macs - gone * self.pool_token_macs + sum(block.macs for block in each)
        return Cost(self.fixed_params + sum(block.params for block in each), macs, each)


def outline(model: nn.Module, side: int | None = None) -> Outline:
    """Read off ``model`` what its cost depends on.

    Args:
        side: of the images in pixels, a multiple of the patch; None: the model's own. Another one is for models that
            :mod:`lotus.vit.sides` knows.

    Raises:
        Refused: no supported ViT, or one without a fixed image size.
    """
    blocks = anatomy.blocks(model, convolved=True)
    vit: Any = model
    if vit.patch_embed.num_patches is None:
        raise Refused(f"{type(model).__name__}: has no fixed image size, so its cost is open. Create it with img_size.")
    patches = int(vit.patch_embed.num_patches)
    if side is not None:
        patches = math.prod(side // patch for patch in vit.patch_embed.patch_size)
    tokens = patches + int(getattr(vit, "num_prefix_tokens", 0))
    pooled, pool_token_macs = _pooling(vit, tokens)
    read = tokens if vit.global_pool == "" else 1  # unpooled, the classifier sees every token
    classifier = read * sum(linear.weight.numel() for linear in _linears(vit, "head", "head_dist"))
    made = Outline(
        tokens=tokens,
        width=blocks[0].width,
        dims=tuple(block.dims for block in blocks),
        biases=tuple(_biases(block) for block in blocks),
        fixed_params=0,
        fixed_macs=patches * vit.patch_embed.proj.weight.numel() + pooled + classifier + _merging(vit),
        pool_token_macs=pool_token_macs,
        whole_qk=tuple(block.whole_qk for block in blocks),
        kinds=tuple(_kind(block, blocks[0].width) for block in blocks),
        kernels=tuple(block.kernel for block in blocks),
        prefix=int(getattr(vit, "num_prefix_tokens", 0)),
        beside=tuple(_beside(block) for block in blocks),
    )
    whole = sum(weight.numel() for weight in model.parameters())
    return dataclasses.replace(made, fixed_params=whole - made.cost().params)


def _biases(block: anatomy.Block) -> Biases:
    biases = Biases()
    if block.kernel:
        biases = biases._replace(qkv=block.attn.conv.bias is not None, proj=block.proj.bias is not None)
    elif block.has_attn:
        queries, keys = block.biases
        biases = biases._replace(qkv=queries, proj=block.proj.bias is not None, keys=keys)
    if block.has_mlp:
        biases = biases._replace(fc1=block.units[0].bias is not None, fc2=block.fc2.bias is not None)
    return biases


def _kind(block: anatomy.Block, width: int) -> Kind:
    norms = [0 if norm is None else len(list(norm.parameters())) for norm in (block.norm("attn"), block.norm("mlp"))]
    kind = Kind(
        width=0 if block.width == width else block.width,
        halves=1 + block.glu,
        per_head=0 if block.table is None else len(block.table),
        per_output=norms[0],
        per_unit=norms[1],
    )
    module: Any = block.module
    if not hasattr(module, "window_size"):
        return kind
    high, wide = module.input_resolution
    padded = [-(-side // window) * window for side, window in zip((high, wide), module.window_size)]
    area = math.prod(module.window_size)
    attended = math.prod(padded)
    return kind._replace(attended=attended, pairs=attended * area, processed=high * wide)


def _merging(model: Any) -> int:
    """MACs of what brings a Swin from stage to stage: four patches become one."""
    total = 0
    for stage in getattr(model, "layers", ()):
        if not isinstance(stage.downsample, nn.Identity):
            total += math.prod(stage.output_resolution) * stage.downsample.reduction.weight.numel()
    return total


def _beside(block: anatomy.Block) -> tuple[int, int]:
    """Parameters of a block that go with a whole sublayer alone: its norms and LayerScale, by sublayer."""

    def of(there: bool, *names: str) -> int:
        parts = [getattr(block.module, name, None) for name in names]
        parts += (
            [getattr(block.attn, name, None) for name in ("q_norm", "k_norm")] if names[0] == "norm1" and there else []
        )
        modules = [part for part in parts if isinstance(part, nn.Module)]
        return sum(weight.numel() for part in modules for weight in part.parameters()) if there else 0

    return of(block.has_attn, "norm1", "ls1"), of(block.has_mlp, "norm2", "ls2")


def count(model: nn.Module) -> Cost:
    """What ``model`` costs, dense or cut.

    Raises:
        Refused: as :func:`outline`.
    """
    return outline(model).cost()


def macs(model: nn.Module, side: int, *, place: str = "model") -> int:
    """Multiply-accumulates of one image: :func:`count`'s, or, of a model that it does not know, those that torch counts in a
    forward pass over an image of ``side`` pixels.

    Raises:
        Refused: the model cannot read such an image.
    """
    from torch.utils.flop_counter import FlopCounterMode

    embed: Any = getattr(model, "patch_embed", None)
    if not anatomy.why_not(model, convolved=True) and embed.num_patches is not None:
        return count(model).macs
    training, here = model.training, next(model.parameters())
    fuse = unfuse(model)  # the counter does not see fused attention on a CPU
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side, device=here.device, dtype=here.dtype))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise Refused(
            f"{place}: {type(model).__name__} cannot read an image of {side} x {side} pixels ({text}). Give it another "
            "side, or take another model."
        ) from None
    finally:
        fuse()
        model.train(training)
    return int(counter.get_total_flops()) // 2


ENOUGH = 20.0
"""Seconds after which a slow model has been timed often enough."""


def latency(
    model: nn.Module,
    batch: int,
    repeats: int = 20,
    device: torch.device | str | None = None,
    *,
    warmup: int = 3,
    fastest: bool = False,
) -> float:
    """Median (or least) milliseconds of a forward pass over ``batch`` random images, in eval mode, after ``warmup`` passes.

    Of ``repeats`` passes, or of five at least where more would take longer than ``ENOUGH`` seconds.
    On the model's own device, or on a copy of it on ``device``. From the first call on glibc keeps what is freed
    (:func:`lotus.vit.steady.keep_freed`), or passes would pay for pages that the ones before gave back, large models more of them.
    """
    keep_freed()
    here = next(model.parameters())
    device = here.device if device is None else torch.device(device)
    same = device.type == here.device.type and device.index in (None, here.device.index)
    timed = model if same else copy.deepcopy(model).to(device)
    embed: Any = model.patch_embed
    size, channels = embed.img_size, embed.proj.in_channels
    if size is None:
        raise Refused(f"{type(model).__name__}: has no fixed image size to time it at. Create it with img_size.")
    images = torch.randn(batch, channels, *size, device=device, dtype=here.dtype)
    training = timed.training
    timed.eval()
    times = []
    try:
        with torch.inference_mode():
            for turn in range(warmup + repeats):
                wait(device)
                start = time.perf_counter()
                timed(images)
                wait(device)
                if turn >= warmup:
                    times.append(time.perf_counter() - start)
                if len(times) >= 5 and sum(times) > ENOUGH:
                    break
    finally:
        timed.train(training)
    return 1000 * (min(times) if fastest else statistics.median(times))


def _linears(model: Any, *names: str) -> list[nn.Linear]:
    owners = (getattr(model, name, None) for name in names)
    return [m for owner in owners if owner is not None for m in owner.modules() if isinstance(m, nn.Linear)]


def _pooling(model: Any, tokens: int) -> tuple[int, int]:
    """MACs of timm's AttentionPoolLatent, where there is one, and what of them each token takes that it reads."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0, 0
    if not getattr(model, "pool_include_prefix", not anatomy.is_vit(model)):  # EVA's reads all
        tokens -= int(model.num_prefix_tokens)
    latent = int(pool.latent_len)
    token_macs = 2 * latent * pool.num_heads * pool.head_dim + pool.kv.weight.numel()  # QK^T, AV, k and v
    others = latent * sum(linear.weight.numel() for linear in _linears(pool, "q", "proj", "mlp"))
    return tokens * token_macs + others, token_macs
