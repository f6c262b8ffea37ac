"""Gates: one number for each dimension that may go, learned while the model trains and driven to zero.

A gate multiplies what ``proj`` reads (an attention-output dimension) or what ``fc2`` reads (an MLP hidden unit); with
``in_channels`` also what ``qkv`` and ``fc1`` read of the residual stream: the four sites of VTP (2104.08500). Gates are float32 tensors outside the module, the engine and the optimizer, so that they work the same
under every ZeRO stage: after a backward their gradients, which lie in one flat vector, are averaged over the ranks, and
an Adam of a few lines moves them.

``Linear(x * a, W)`` and ``Linear(x, W * a)`` are the same function of x, W and a, gradients included. The second touches
(out, in) numbers and not (batch x tokens, in), and keeps no second copy of the activations: it is what the hooks do.
Where the weight is not whole when the hook runs (ZeRO-3), or a compiler reads the hook, they multiply the activations.

Steering. Lambda has to rise by orders of magnitude until the first gate closes, and closing takes hundreds of steps; a rule that
looks only at the MACs of closed gates sees nothing all the while, winds up, and then crushes them all. So:

* above the target, the gate *at the budget's edge* is watched: in ascending order of |a|, the one whose closing (with
  all before it) meets the budget. It has to fall at the rate that brings it to zero when ``_ARRIVAL`` of training is
  over. Lambda is multiplied by the square root of (rate wanted / rate seen): the rate answers to lambda within one
  period, half of the correction (on a log scale) is made at a time, and so it settles.
* once the budget is met lambda is 0 for the open gates: they are free, and what is left trains without a penalty. Those
  that are closed stay so: held at exact zero by ``proximal``, pressed on with the lambda of the arrival by
  ``subgradient``. Should some of the latter come back, so that the budget is missed again, the first rule takes over again.

Where the budget is a fraction of all gates (``prune.keep.gates``, VTP's), the same is done with a gate's share of the gates.

So the share of open MACs ends within one unit below the target with ``proximal``, and somewhat lower with
``subgradient``, where gates that were on their way swing through. ``lr`` times the steps after ``start`` should be 2 or
more: an Adam step is at most about ``lr``, and a gate has to go from 1 to 0 by steps that could also have kept it.

Early-bird. At the end of an epoch a mask is drawn at the budget: of all gates the largest. Once it hardly changes any more from
epoch to epoch, the search is over (You et al. 2020, 1909.11957, section 3.2; for transformers Chen et al. 2021, 2101.00063).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from lotus.config import Method, Sparsity
from lotus.sparsity import penalties
from lotus.sparsity.gate_macs import Macs
from lotus.sparsity.steering import EVERY, Steering
from lotus.vit import anatomy
from selection.errors import Refused
from selection.methods import call, find, reads

_BETAS = (0.9, 0.999)  # Adam's own defaults (1412.6980)
_EPS = 1e-8

Target = TypeVar("Target", nn.Module, dict[str, Tensor])

Press = Callable[[Tensor, Tensor, penalties.Descend, float, float | Tensor], Tensor]
"""(G,) gates, (G,) gradient, the optimizer's step, learning rate, lambda -> (G,)."""


def pressing(penalty: Method, shelves: Sequence[ModuleType] = (), *, place: str = "train.sparsity.penalty") -> Press:
    """The penalty of a config: a function of :mod:`lotus.sparsity.penalties`, or of the user's own.

    Raises:
        Refused: there is no such penalty, or no such setting of it; it reads what is not here, or gives no gates.
    """
    gates = torch.ones(2)
    tried = {
        "values": gates,
        "gradient": gates,
        "descend": lambda gradient: gates - gradient,
        "lr": 0.1,
        "strength": 0.1,
    }
    method = find([penalties, *shelves], penalty.name, place=place, here=tried)
    names = reads(method)
    found = call(method, tried, penalty.options, place=place)
    if not isinstance(found, Tensor) or found.shape != gates.shape:
        raise Refused(
            f"{place}: {penalty.name!r} gives no gates after the step. Return a tensor of the shape of values."
        )

    def press(
        values: Tensor, gradient: Tensor, descend: penalties.Descend, lr: float, strength: float | Tensor
    ) -> Tensor:
        here = {"values": values, "gradient": gradient, "descend": descend, "lr": lr, "strength": strength}
        moved: Tensor = method(*(here[name] for name in names), **penalty.options)
        return moved

    return press


def reaches_zero(press: Press) -> bool:
    """Whether a gate that the gradient leaves alone comes to rest at exact zero: tried on one that is half a step away."""
    half = torch.tensor([0.5])
    return bool(press(half, torch.zeros(1), lambda gradient: half - gradient, 1.0, 1.0) == 0)


def _leaf(values: Tensor, gradient: Tensor) -> Tensor:
    """A leaf over a part of two flat vectors: autograd adds into the second in place, which needs no gathering."""
    leaf = values.detach().requires_grad_()
    leaf.grad = gradient
    return leaf


class Gates:
    """The gates of one model.

    Attributes:
        values: site ("blocks.3.attn", "blocks.3.mlp") -> its gates, float32 leaf tensors that start at 1
        tau: a gate of at most this size counts as closed: 0 where the penalty reaches exact zeros
    """

    values: dict[str, Tensor]

    def __init__(
        self,
        model: nn.Module,
        settings: Sparsity,
        *,
        target: float | None,
        of_gates: float | None = None,
        device: torch.device | str = "cpu",
        shelves: Sequence[ModuleType] = (),
    ) -> None:
        """
        Args:
            target: fraction of the model's MACs that is to stay open, or None where the budget is not in MACs
            of_gates: fraction of the gates that is to stay open, where that is the budget. Without either lambda stays as it
                is set.
            shelves: files of the user's own, for a penalty of theirs

        Raises:
            Refused: a target that no closing of gates can reach; a penalty that is on no shelf.
        """
        self.settings = settings
        self.device = torch.device(device)
        self._penalty = pressing(settings.penalty, shelves)
        self.tau = 0.0 if reaches_zero(self._penalty) else 2 * settings.lr
        self._model = model
        self._sites = anatomy.sites(model, in_channels=settings.in_channels)

        widths = [linear.in_features for linear in self._sites.values()]
        size = sum(widths)
        self._flat = torch.ones(size, device=self.device)
        self._gradient = torch.zeros(size, device=self.device)
        self._mean = torch.zeros(size, device=self.device)
        self._square = torch.zeros(size, device=self.device)
        parts = zip(self._flat.split(widths), self._gradient.split(widths), strict=True)
        self.values = dict(zip(self._sites, (_leaf(*part) for part in parts), strict=True))

        self._macs = Macs(model, self._sites, widths, self.device)
        fixed = float(self._macs.left(torch.zeros(size, dtype=torch.bool, device=self.device)))
        by_count = target is None and of_gates is not None
        if target is not None and target <= fixed:
            raise Refused(
                f"prune.keep.macs: {target:g} cannot be reached: {fixed:.3f} of the model's MACs lie outside of "
                "attention heads and MLP units. Keep more, or take a deeper or wider model."
            )
        target = of_gates if by_count else target
        self.target = target if target is not None and target < 1 else None
        self._steering = Steering(
            settings.strength, target=self.target, macs=self._macs, by_count=by_count, tau=self.tau
        )
        bird = settings.early_bird
        self._distances = torch.ones(bird.epochs if bird is not None else 1)  # of successive masks; nothing known yet
        self._drawn = torch.zeros(size, dtype=torch.bool)  # the mask of the last epoch that had one
        self._epoch = -1  # which that was
        self._pressed = False  # whether the penalty has set in
        self.steps = 0

        self._handles = [handle for site in self._sites for handle in self._hook(site)]

    def step(self, progress: float, reduce: Callable[[Tensor], None] | None = None) -> None:
        """Move the gates, after a backward at an accumulation boundary.

        Args:
            progress: fraction of training that is done, 0 to 1
            reduce: takes the mean over ranks in place, of all gates' gradients in one vector; None with one rank
        """
        if reduce is not None:
            reduce(self._gradient)
        self.steps += 1
        lr, pressing = self.settings.lr, progress >= self.settings.start
        self._pressed = pressing
        if pressing and self._steering.presses:
            moved = self._penalty(self._flat, self._gradient, self._descend, lr, self._steering.pressure(self._flat))
        else:
            moved = self._descend(self._gradient)
        before = self._flat.clone()
        self._flat.copy_(moved)
        self._gradient.zero_()
        if pressing and self.settings.steer and self.target is not None:
            self._steering.look(self._flat, before, progress, lr, due=self.steps % EVERY == 0)

    def skip(self) -> None:
        """Drop the gradients of a step that was not finite."""
        self._gradient.zero_()

    @property
    def strength(self) -> float:
        """Lambda; see :class:`lotus.sparsity.steering.Steering`."""
        return self._steering.strength

    @property
    def met(self) -> bool:
        """Whether the open gates' MACs are within the budget (only ever where lambda is steered)."""
        return self._steering.met

    def open_macs(self) -> float:
        """Fraction of the model's MACs that is left when every closed gate's unit is cut."""
        return float(self._macs.left(self._flat.abs() > self.tau))

    def end_epoch(self, epoch: int) -> None:
        """Draw the mask of ``epoch``, once, where the search may end early and the penalty has set in."""
        if self.settings.early_bird is None or self.target is None or not self._pressed or epoch <= self._epoch:
            return
        self._epoch = epoch
        sizes = self._flat.abs()
        mask = torch.ones(len(sizes), dtype=torch.bool)
        mask[self._steering.first_within(sizes).cpu()] = False
        # The first mask has nothing to be compared with.
        moved = 1.0 if not bool(self._drawn.any()) else float((mask != self._drawn).float().mean())
        self._distances = torch.cat([self._distances[1:], torch.tensor([moved])])
        self._drawn = mask

    def settled(self) -> bool:
        """Whether the masks of the last epochs lie within epsilon of each other: the search may end."""
        bird = self.settings.early_bird
        return bird is not None and self.target is not None and bool((self._distances < bird.epsilon).all())

    def distances(self) -> list[float]:
        """Fraction of the gates in which the masks of successive epochs differ, the last ones; 1 where nothing is known."""
        return [float(one) for one in self._distances]

    def summary(self) -> dict[str, float]:
        """``zero_gates`` (share of closed gates), ``lambda`` (of the open ones) and ``open_macs`` (share of the model's MACs)."""
        closed = float((self._flat.abs() <= self.tau).float().mean())
        return {"zero_gates": closed, "lambda": 0.0 if self.met else self.strength, "open_macs": self.open_macs()}

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, on the CPU: gates and moments by site, and where steering stood."""
        state = {
            f"{part}.{site}": values.detach().cpu().clone()
            for part, flat in self._parts().items()
            for site, values in zip(self._sites, flat.split([len(v) for v in self.values.values()]), strict=True)
        }
        state["early_bird"] = self._distances.clone()
        state["mask"] = self._drawn.clone()
        state["epoch"] = torch.tensor([self._epoch, self._pressed])
        state["steps"] = torch.tensor(self.steps)
        state["steering"] = self._steering.state()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`state` gave.

        Raises:
            Refused: it was taken from gates of another model.
        """
        for part, flat in self._parts().items():
            for site, values in zip(self._sites, flat.split([len(v) for v in self.values.values()]), strict=True):
                known = state.get(f"{part}.{site}")
                if known is None or known.shape != values.shape:
                    has = "no gates" if known is None else f"{known.numel()} gates"
                    raise Refused(
                        f"checkpoint: it has {has} at {site}, the model {len(values)}. It is of another model; "
                        "train again."
                    )
                values.copy_(known)
        if len(state["early_bird"]) == len(self._distances):
            self._distances, self._drawn = state["early_bird"].clone(), state["mask"].bool()
            self._epoch, self._pressed = int(state["epoch"][0]), bool(state["epoch"][1])
        self.steps = int(state["steps"])
        self._steering.load_state(state["steering"])
        self._gradient.zero_()

    def fold(self, target: Target) -> Target:
        """Multiply the gates into the columns of the Linears that they gate, in place; returns ``target``.

        What ``target`` computes without gates is then what the model computes with them, to the bit.

        Args:
            target: a model of the same shape, or a state dict of one. From the model that carries the gates they are
                taken off first.
        """
        if isinstance(target, nn.Module):
            if target is self._model:
                self.remove()
            sites = anatomy.sites(target, in_channels=self.settings.in_channels)
            weights = {site: linear.weight for site, linear in sites.items()}
        else:
            names = {id(module): name for name, module in self._model.named_modules()}
            weights = {site: target[f"{names[id(linear)]}.weight"] for site, linear in self._sites.items()}
        with torch.no_grad():
            for site, weight in weights.items():
                weight.mul_(self.values[site].to(weight))
        return target

    def remove(self) -> None:
        """Take the gates off the model. Their values stay here."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, site: str) -> list[torch.utils.hooks.RemovableHandle]:
        values = self.values[site]

        def before(linear: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            weight = linear._parameters["weight"]
            assert weight is not None
            if torch.compiler.is_compiling() or hasattr(weight, "ds_id"):
                return (inputs[0] * values.to(inputs[0].dtype),)
            # An entry of the instance shadows the parameter of the same name for the length of this one call.
            linear.__dict__["weight"] = weight * values.to(weight.dtype)  # (out, in) * (in,)
            return None

        def after(linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            linear.__dict__.pop("weight", None)

        linear = self._sites[site]
        return [
            linear.register_forward_pre_hook(before),
            linear.register_forward_hook(after, always_call=True),  # also after an exception, else it would shadow on
        ]

    def _parts(self) -> dict[str, Tensor]:
        return {"value": self._flat, "mean": self._mean, "square": self._square}

    def _descend(self, gradient: Tensor) -> Tensor:
        """Adam without weight decay: the values after its step."""
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square.lerp_(gradient.square(), 1 - _BETAS[1])
        scale = math.sqrt(1 - _BETAS[1] ** self.steps)
        denominator = self._square.sqrt().add_(_EPS * scale)
        lr = self.settings.lr * scale / (1 - _BETAS[0] ** self.steps)
        return torch.addcdiv(self._flat, self._mean, denominator, value=-lr)
