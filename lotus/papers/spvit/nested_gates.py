"""Nested gates: attention that may become a 3x3 or a 1x1 convolution of its own weights, and MLP units that may go, all
learned at once toward a budget of MACs (SPViT, He et al. 2021, 2111.11802, sections 3.2 and 3.3).

Three gates a block, g = sigmoid(theta), are multiplied one after the other, so that each is open only where all before it
are (nothing < 1x1 < 3x3 < attention):

    out = g2 MSA + g1 (1 - g2) conv3 + g0 (1 - g1) (1 - g2) conv1,    g_i <- g_0 ... g_i

and one gate an MLP unit. In training a gate is a hard Bernoulli sample whose gradient is that of its relaxation (temperature 1,
straight-through); else it is open above 1/2. To the loss comes lambda (keep - F)^2, F the MACs behind gates that are open now, as
a fraction of the dense model's; its gradient goes through sigmoid(g - 1/2), as in the paper's code.

As for other gates (:mod:`lotus.sparsity.gates`) theta is float32 and lives outside the module, the engine and the optimizer: what the forward
multiplies with are leaves, whose gradients are averaged over the ranks and carried back to theta here. One draw serves an
optimizer step, and all ranks draw alike. The mixtures Z and the batch norms are parameters of the model for as long as the gates are on it.

Shapes: B batch, N tokens, D width, H heads, d value dimensions a head, L blocks, F MLP units, G all gates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lotus.data.pixel_ops import sent
from lotus.papers.spvit import mixture
from lotus.vit import anatomy, convolution, cost
from selection.errors import Refused

START = 1.5
"""theta at the start, as published: every gate is open with probability 0.82."""
_BETAS = (0.9, 0.999)


class Paths(nn.Module):
    """What a block's attention needs beside its own weights to be a convolution too."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(heads * 9))  # Z; flat, so that no weight decay falls on it
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm3 = nn.BatchNorm2d(channels)

    def norm(self, kernel: int) -> nn.BatchNorm2d:
        return self.norm3 if kernel == 3 else self.norm1


def open_gates(theta: Tensor) -> Tensor:
    """1 where a gate is open at evaluation (sigmoid above 1/2), else 0; the gradient is that of sigmoid(sigmoid(theta) - 1/2)."""
    chance = theta.sigmoid()
    soft = (chance - 0.5).sigmoid()
    return (chance > 0.5).to(theta) - soft.detach() + soft


def sampled(theta: Tensor, noise: Tensor) -> Tensor:
    """1 where a Bernoulli sample of a gate is open, else 0; the gradient is that of the relaxed sample.

    Args:
        noise: logistic, log u - log (1 - u), of ``theta``'s shape
    """
    soft = (theta + noise).sigmoid()
    return (soft > 0.5).to(theta) - soft.detach() + soft


def nested(gates: Tensor) -> Tensor:
    """(3,) gates -> their products from the first on. Where a later gate is open too, an earlier one's own path learns nothing
    from this sample ("slow down the gradient for less complex gates", in the paper's code)."""
    products = gates.cumprod(0)
    later = torch.cat(
        [products[1:] > 0, torch.zeros_like(products[:1], dtype=torch.bool)]
    )  # not asked, for which a GPU is waited for
    return torch.where(later, products.detach(), products)


class NestedGates:
    """The gates of one model in a search; the training loop steps them as it steps :class:`lotus.sparsity.gates.Gates`.

    Attributes:
        theta: (G,) of all blocks: three for attention, then one for each MLP unit
        under: theta as this step's gates were drawn of it, for their gradient
        graph: this step's gates by block, (3,) of attention and one for each MLP unit, as a function of ``under``
        leaves: the same, cut off, by which the forward multiplies; their gradients go on through ``graph``
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: float,
        lr: float,
        strength: float,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            keep: fraction of the model's MACs that is aimed at
            strength: lambda

        Raises:
            Refused: a patch grid that convolutions do not go over, a model with token pruning, or no supported model.
        """
        vit: Any = model
        self._blocks = anatomy.blocks(model)
        self._outline = cost.outline(model)
        for block in self._blocks:
            if not (block.has_attn and block.has_mlp) or block.reads("attn") or block.reads("mlp"):
                raise Refused(
                    f"prune.method: {block.name} lost a sublayer, or reads a part of the residual stream. Take the model from before that cut."
                )
        if not isinstance(vit.patch_drop, nn.Identity):
            raise Refused("prune.method: convolutions need every patch in its place. Remove patch_drop_rate.")
        self._grid, self._prefix = tuple(vit.patch_embed.grid_size), int(vit.num_prefix_tokens)
        self.keep, self.lr, self.strength, self.seed = keep, lr, strength, seed
        self.widths = [3 + block.hidden for block in self._blocks]
        device = torch.device(device)
        self.theta = torch.full((sum(self.widths),), START, device=device)
        self._mean, self._square = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.steps = 0
        self._costs = torch.tensor([self._prices(index) for index in range(len(self._blocks))], device=device)
        self._fixed = 1 - float(
            (self._costs[:, 2] + self._costs[:, 3] * torch.tensor(self.widths, device=device).sub(3)).sum()
        )
        self.leaves: list[tuple[Tensor, Tensor]] = []
        self.graph: list[tuple[Tensor, Tensor]] = []
        self.under: Tensor | None = None
        self._handles = []
        for index, block in enumerate(self._blocks):
            block.attn.paths = Paths(block.heads, block.head_dim).to(next(model.parameters()))
            block.attn.forward = functools.partial(self._attend, index)
            self._handles.append(block.fc2.register_forward_pre_hook(functools.partial(self._gate_units, index)))
        self._draw()

    # ---------------------------------------------------------------------------------------- what the loop asks for

    def step(self, progress: float, reduce: Callable[[Tensor], None] | None = None) -> None:
        """Move the gates, after a backward at an accumulation boundary; then draw anew."""
        leaves = [leaf for pair in self.leaves for leaf in pair]
        seen = torch.cat([(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten() for leaf in leaves])
        if reduce is not None:
            reduce(seen)
        assert self.under is not None
        outputs = [output.flatten() for pair in self.graph for output in pair]
        (gradient,) = torch.autograd.grad(torch.cat(outputs), self.under, seen)
        theta = self.theta.clone().requires_grad_()
        (pull,) = torch.autograd.grad(self.strength * (self.keep - self.share(theta)) ** 2, theta)
        self._descend(gradient + pull)
        self._draw()

    def skip(self) -> None:
        """Drop the gradients of a step that was not finite."""
        for pair in self.leaves:
            for leaf in pair:
                leaf.grad = None

    def open_macs(self) -> float:
        """Fraction of the model's MACs behind the gates that are open at evaluation."""
        with torch.no_grad():
            return float(self.share(self.theta))

    def summary(self) -> dict[str, float]:
        """``zero_gates`` (share of closed gates), ``open_macs``, ``attention`` (share of blocks that attend)."""
        attends = [float((theta[:3] > 0).all()) for theta in self.theta.split(self.widths)]
        return {
            "zero_gates": float((self.theta <= 0).float().mean()),
            "open_macs": self.open_macs(),
            "attention": sum(attends) / len(attends),
        }

    def state(self) -> dict[str, Tensor]:
        """All that a resumed search needs, on the CPU."""
        kept = {"theta": self.theta, "mean": self._mean, "square": self._square}
        return {
            **{name: value.detach().cpu().clone() for name, value in kept.items()},
            "steps": torch.tensor(self.steps),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`state` gave.

        Raises:
            Refused: it was taken from gates of another model.
        """
        found = state.get("theta")
        if found is None or found.shape != self.theta.shape:
            raise Refused("checkpoint: its nested gates are of another model; search again.")
        for own, name in ((self.theta, "theta"), (self._mean, "mean"), (self._square, "square")):
            own.copy_(state[name])
        self.steps = int(state["steps"])
        self._draw()

    # ------------------------------------------------------------------------------------------------ what came out

    def by_block(self) -> list[tuple[Tensor, Tensor]]:
        """theta of each block, on the CPU: (3,) of its attention, (F,) of its MLP."""
        return [(theta[:3].cpu().clone(), theta[3:].cpu().clone()) for theta in self.theta.split(self.widths)]

    def mixes(self) -> list[Tensor]:
        """(H, 9) scores Z of each block."""
        return [block.attn.paths.mix.detach().float().cpu().view(-1, 9).clone() for block in self._blocks]

    def remove(self) -> None:
        """Take the gates and all that they brought off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for block in self._blocks:
            block.attn.__dict__.pop("forward", None)
            if hasattr(block.attn, "paths"):
                del block.attn.paths

    # ------------------------------------------------------------------------------------------------ in the forward

    def _attend(self, index: int, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D): attention and both convolutions, each as far as its gate is open."""
        attn: Any = self._blocks[index].attn
        attend = functools.partial(type(attn).forward, attn)
        if attn.training:
            first, second, third = self.leaves[index][0].to(x)
            return (
                third * attend(x)
                + second * (1 - third) * self._convolve(attn, x, 3)
                + first * (1 - second) * (1 - third) * self._convolve(attn, x, 1)
            )
        level = int((self.theta.split(self.widths)[index][:3] > 0).cumprod(0).sum())
        if level == 3:
            return attend(x)
        return torch.zeros_like(x) if level == 0 else self._convolve(attn, x, 3 if level == 2 else 1)

    def _convolve(self, attn: Any, x: Tensor, kernel: int) -> Tensor:
        v_dim = attn.proj.in_features // int(attn.num_heads)
        parts = mixture.mixture(attn.paths.mix.view(-1, 9), kernel)
        weight, bias, out = mixture.combined(attn.qkv.weight, attn.qkv.bias, attn.proj.weight, parts, v_dim)
        picture = x[:, self._prefix :].transpose(1, 2).unflatten(2, self._grid)
        seen = attn.paths.norm(kernel)(functional.conv2d(picture, weight, bias, padding=kernel // 2)).relu()
        patches = functional.linear(seen.flatten(2).transpose(1, 2), out, attn.proj.bias)
        return torch.cat([x[:, : self._prefix], patches], 1)

    def _gate_units(self, index: int, fc2: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        units = self.leaves[index][1] if fc2.training else self.theta.split(self.widths)[index][3:] > 0
        return (x * units.to(x),)

    # ----------------------------------------------------------------------------------------------------- the gates

    def _draw(self) -> None:
        """Sample all gates for the next step: leaves for the forward, and the graph from theta to them."""
        rng = torch.Generator().manual_seed(hash((self.seed, self.steps)) % 2**63)
        chance = torch.rand(len(self.theta), generator=rng).clamp(1e-6, 1 - 1e-6)
        noise = sent(chance.log() - (1 - chance).log(), self.theta.device)
        self.under = self.theta.clone().requires_grad_()
        with torch.enable_grad():
            gates = sampled(self.under, noise)
            self.graph = [(nested(part[:3]), part[3:]) for part in gates.split(self.widths)]
        leaves = [tuple(output.detach().clone().requires_grad_() for output in pair) for pair in self.graph]
        self.leaves = leaves  # type: ignore[assignment]

    def share(self, theta: Tensor) -> Tensor:
        """MACs of the open gates, as a fraction of the model's; differentiable."""
        total = theta.new_full((), self._fixed)
        for part, (one, three, attention, unit) in zip(open_gates(theta).split(self.widths), self._costs, strict=True):
            first, second, third = part[:3].cumprod(0)
            total = total + first * one + second * (three - one) + third * (attention - three) + part[3:].sum() * unit
        return total

    def _prices(self, index: int) -> list[float]:
        """1x1, 3x3, attention and one MLP unit of a block, as parts of the model's MACs."""
        outline, dims = self._outline, self._outline.dims[index]
        whole, spent = outline.cost().macs, outline.block(index, dims)
        patches = outline.tokens - outline.prefix
        paths = [convolution.macs(patches, outline.width, dims.v_dim, kernel) for kernel in convolution.KERNELS]
        return [price / whole for price in (*paths, spent.attn_macs, spent.mlp_macs / dims.hidden)]

    def _descend(self, gradient: Tensor) -> None:
        """A step of Adam without weight decay."""
        self.steps += 1
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square.lerp_(gradient.square(), 1 - _BETAS[1])
        mean = self._mean / (1 - _BETAS[0] ** self.steps)
        spread = (self._square / (1 - _BETAS[1] ** self.steps)).sqrt()
        self.theta.sub_(self.lr * mean / (spread + 1e-8))
