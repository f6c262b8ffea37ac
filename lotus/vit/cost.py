"""What a ViT costs: parameters and multiply-accumulates in closed form, latency by measurement.

A MAC count here is of one image and includes the two products of attention, QK^T and AV, which many counters leave out
(17.56 G for ViT-B/16 at 224 px with them, 16.85 G without). N tokens, D width; norms, activations and softmax count nothing.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lotus.vit import anatomy
from lotus.vit.anatomy import Dims
from selection.errors import Refused


class Biases(NamedTuple):
    """Which of a block's Linears have a bias."""

    qkv: bool = True
    proj: bool = True
    fc1: bool = True
    fc2: bool = True


class BlockCost(NamedTuple):
    """What a block costs, attention products included; its norms and LayerScale count with their branch."""

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
    linear_macs: int
    """The same without QK^T and AV: what counters report that do not see attention."""
    blocks: tuple[BlockCost, ...]


def attention_macs(tokens: int, width: int, heads: int, qk_dim: int, v_dim: int, *, reads: int | None = None) -> int:
    """q, k, v, QK^T, AV and proj: N D H (2 Q + V) + N^2 H (Q + V) + N H V D; qkv reads ``reads`` of the D channels."""
    linear = tokens * (reads or width) * heads * (2 * qk_dim + v_dim) + tokens * heads * v_dim * width
    return linear + products(tokens, heads, qk_dim, v_dim)


def products(tokens: int, heads: int, qk_dim: int, v_dim: int) -> int:
    """MACs of QK^T and AV: N^2 H (Q + V)."""
    return tokens * tokens * heads * (qk_dim + v_dim)


def mlp_macs(tokens: int, width: int, hidden: int, *, reads: int | None = None) -> int:
    """fc1 and fc2: 2 N D F; fc1 reads ``reads`` of the D channels."""
    return tokens * (width + (reads or width)) * hidden


def attention_params(
    width: int,
    heads: int,
    qk_dim: int,
    v_dim: int,
    *,
    qkv_bias: bool = True,
    proj_bias: bool = True,
    reads: int | None = None,
) -> int:
    """qkv and proj: (D + 1) H (2 Q + V) + H V D + D, with biases; qkv reads ``reads`` of the D channels."""
    made = ((reads or width) + qkv_bias) * heads * (2 * qk_dim + v_dim)
    return made + heads * v_dim * width + proj_bias * width


def mlp_params(
    width: int, hidden: int, *, fc1_bias: bool = True, fc2_bias: bool = True, reads: int | None = None
) -> int:
    """fc1 and fc2: (D + 1) F + F D + D, with biases; fc1 reads ``reads`` of the D channels."""
    return ((reads or width) + fc1_bias) * hidden + hidden * width + fc2_bias * width


@dataclass(frozen=True)
class Outline:
    """All of a model that its cost depends on; gives the cost of any dimensions without building them."""

    tokens: int
    """Patches and prefix tokens (class, distillation, registers)."""
    width: int
    dims: tuple[Dims, ...]
    """The widths of each block as they are now."""
    biases: tuple[Biases, ...]
    fixed_params: int
    """Parameters outside of the blocks."""
    fixed_macs: int
    """MACs outside of the blocks: patch embedding, pooling, classifier."""
    pool_products: int = 0
    """QK^T and AV of attention pooling, a part of ``fixed_macs``."""
    qk_norm: tuple[bool, ...] = ()
    """Of which blocks the query/key dimensions must all stay; empty: of none."""
    pool_token_macs: int = 0
    """MACs that attention pooling spends on each of the ``pool_reads`` tokens it reads."""
    pool_reads: int = 0
    beside: tuple[tuple[int, int], ...] = ()
    """Of each block: parameters beside the Linears that go with its attention, and with its MLP (norms, LayerScale)."""

    def block(self, index: int, dims: Dims, tokens: tuple[int, int] | None = None) -> BlockCost:
        """What block ``index`` would cost with ``dims``.

        Args:
            tokens: how many its attention and its MLP see; all where None
        """
        heads, qk_dim, v_dim, hidden, attn_in, mlp_in = dims
        bias = self.biases[index]
        attended, processed = tokens or (self.tokens, self.tokens)
        by_attn, by_mlp = self.beside[index] if self.beside else (0, 0)
        attn_params = attn_macs = fc_params = fc_macs = 0
        if heads:
            attn_params = by_attn + attention_params(
                self.width, heads, qk_dim, v_dim, qkv_bias=bias.qkv, proj_bias=bias.proj, reads=attn_in
            )
            attn_macs = attention_macs(attended, self.width, heads, qk_dim, v_dim, reads=attn_in)
        if hidden:
            fc_params = by_mlp + mlp_params(self.width, hidden, fc1_bias=bias.fc1, fc2_bias=bias.fc2, reads=mlp_in)
            fc_macs = mlp_macs(processed, self.width, hidden, reads=mlp_in)
        return BlockCost(attn_params, attn_macs, fc_params, fc_macs)

    def cost(self, dims: Sequence[Dims] | None = None, tokens: Sequence[tuple[int, int]] | None = None) -> Cost:
        """What the model would cost with ``dims`` (one a block); as it is now where None.

        Args:
            tokens: how many each block's attention and MLP see, where patches leave on the way (one pair a block)
        """
        dims = self.dims if dims is None else dims
        tokens = [(self.tokens, self.tokens)] * len(dims) if tokens is None else tokens
        each = tuple(self.block(index, *one) for index, one in enumerate(zip(dims, tokens, strict=True)))
        gone = self.tokens - tokens[-1][1]  # before the pooling
        macs = self.fixed_macs - gone * self.pool_token_macs + sum(block.macs for block in each)
        pooling = self.pool_products * (self.pool_reads - gone) // self.pool_reads if self.pool_reads else 0
        unseen = sum(products(seen, one.heads, one.qk_dim, one.v_dim) for one, (seen, _) in zip(dims, tokens))
        return Cost(
            params=self.fixed_params + sum(block.params for block in each),
            macs=macs,
            linear_macs=macs - unseen - pooling,
            blocks=each,
        )


def outline(model: nn.Module) -> Outline:
    """Read off ``model`` what its cost depends on.

    Raises:
        Refused: no supported ViT, or one without a fixed image size.
    """
    found = anatomy.blocks(model)
    vit: Any = model
    if vit.patch_embed.num_patches is None:
        raise Refused(f"{type(model).__name__}: has no fixed image size, so its cost is open. Create it with img_size.")
    patches = int(vit.patch_embed.num_patches)
    tokens = patches + int(vit.num_prefix_tokens)
    of_blocks = [block.linears for block in found]
    inside = sum(weight.numel() for block in found for weight in block.module.parameters())
    pooling = _pooling(vit, tokens)
    read = tokens if vit.global_pool == "" else 1  # unpooled, the classifier sees every token
    classifier = read * sum(linear.weight.numel() for linear in _linears(vit, "head", "head_dist"))
    return Outline(
        tokens=tokens,
        width=found[0].width,
        dims=tuple(block.dims for block in found),
        biases=tuple(
            Biases(**{name: linear.bias is not None for name, linear in linears.items()}) for linears in of_blocks
        ),
        fixed_params=sum(weight.numel() for weight in model.parameters()) - inside,
        fixed_macs=patches * vit.patch_embed.proj.weight.numel() + pooling.macs + classifier,
        pool_products=pooling.products,
        pool_token_macs=pooling.token_macs,
        pool_reads=pooling.reads,
        qk_norm=tuple(block.qk_norm for block in found),
        beside=tuple(_beside(block) for block in found),
    )


def _beside(block: anatomy.Block) -> tuple[int, int]:
    """Parameters of a block beside its Linears, by branch."""

    def of(branch: str, number: int) -> int:
        parts = (getattr(block.module, name, None) for name in (branch, f"norm{number}", f"ls{number}"))
        return sum(weight.numel() for part in parts if part is not None for weight in part.parameters())

    linear = {name: sum(weight.numel() for weight in one.parameters()) for name, one in block.linears.items()}
    attn = of("attn", 1) - linear["qkv"] - linear["proj"] if block.has_attn else 0
    mlp = of("mlp", 2) - linear["fc1"] - linear["fc2"] if block.has_mlp else 0
    return attn, mlp


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

    try:
        return count(model).macs
    except Refused:
        pass
    training, here = model.training, next(model.parameters())
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]  # which the counter does not see on a CPU
    try:
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side, device=here.device, dtype=here.dtype))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise Refused(
            f"{place}: {type(model).__name__} cannot read an image of {side} x {side} pixels ({text}). Set score.side, or "
            "take another model."
        ) from None
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]
        model.train(training)
    return int(counter.get_total_flops()) // 2


def latency(
    model: nn.Module,
    batch: int,
    repeats: int = 20,
    device: torch.device | str | None = None,
    *,
    warmup: int = 3,
) -> float:
    """Median milliseconds of a forward pass over ``batch`` random images, in eval mode, after ``warmup`` passes.

    On the model's own device, or on a copy of it on ``device``.
    """
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
                _wait(device)
                start = time.perf_counter()
                timed(images)
                _wait(device)
                if turn >= warmup:
                    times.append(time.perf_counter() - start)
    finally:
        timed.train(training)
    return 1000 * statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _linears(model: Any, *names: str) -> list[nn.Linear]:
    owners = (getattr(model, name, None) for name in names)
    return [m for owner in owners if owner is not None for m in owner.modules() if isinstance(m, nn.Linear)]


class _Pooling(NamedTuple):
    """What pooling costs; nothing where it is a mean or a token."""

    macs: int = 0
    products: int = 0
    """QK^T and AV, a part of ``macs``."""
    token_macs: int = 0
    reads: int = 0


def _pooling(model: Any, tokens: int) -> _Pooling:
    """The cost of timm's AttentionPoolLatent, where there is one."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return _Pooling()
    if not getattr(model, "pool_include_prefix", False):
        tokens -= int(model.num_prefix_tokens)
    latent = int(pool.latent_len)
    products = 2 * latent * pool.num_heads * pool.head_dim  # of each token
    token_macs = products + pool.kv.weight.numel()
    others = latent * sum(linear.weight.numel() for linear in _linears(pool, "q", "proj", "mlp"))
    return _Pooling(tokens * token_macs + others, tokens * products, token_macs, tokens)
