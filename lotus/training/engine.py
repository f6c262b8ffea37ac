"""DeepSpeed behind one face: an engine around a model, and its state by parameter name, whatever the ZeRO stage.

DeepSpeed keeps fp32 numbers in five layouts (the parameters themselves, copies of each, flat partitions of groups, in
two kinds, and flat partitions of sub-groups). Here they are all *masters*: the tensors that the optimizer moves.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.config import Recipe
from lotus.training.compiled import Compiled
from lotus.training.deepspeed_config import check_flat, settings
from lotus.training.deepspeed_import import deepspeed, hushed
from lotus.training.distributed import World
from lotus.training.finite import Answer, can_be_told, clipped, tell
from lotus.training.muon import Muon, Place
from lotus.training.optim import set_lr
from lotus.training.precision import settled
from lotus.vit.attention import unfuse
from lotus.vit.steady import keep_freed

_LEFT = (
    "_external_params", "_original_parameters", "all_parameters", "applied_pre_backward_ref_cnt", "ds_external_parameters",
    "ds_grads_remaining", "ds_id", "ds_inflight_param_registry", "ds_recompute_parameters", "post_bwd_fn", "pre_bwd_fn",
)  # fmt: skip
"""What ZeRO 3 leaves on modules when it is gone, and would take for its own when it comes again, in a copy too."""


class Engine:
    """A model in training: forward, backward, step.

    Takes the model over (dtype, device, storage of its parameters) until :meth:`release` gives it back.

    Attributes:
        module: the model
        stage: the ZeRO stage in force, which the user's JSON may have set
        compiled: its blocks, where they are compiled
        masters: this rank's part of the fp32 numbers that the optimizer moves
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, world: World, *, place: str = "train"
    ) -> None:
        """
        Raises:
            Refused: the recipe and the user's DeepSpeed JSON contradict each other; an optimizer that ZeRO cannot cut up.
        """
        recipe = settled(recipe, model, world.device, world)
        if world.device.type == "cpu":
            keep_freed()
        numbers = sum(parameter.numel() for parameter in model.parameters())
        config = settings(recipe, world, numbers, place=place)
        self.world, self.module = world, model
        self.stage: int = config["zero_optimization"]["stage"]
        check_flat(optimizer, recipe, self.stage, place)
        bf16 = recipe.precision == "bf16"
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        # ZeRO 0 in fp32 does not ask whether the gradient is finite, and one NaN stays for good: there it is ours to ask and clip.
        self._plain = self.stage == 0 and recipe.precision == "fp32"
        self._clip: float = config["gradient_clipping"]
        if self._plain:
            config["gradient_clipping"] = 0.0
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._marks = {name: set(vars(p)) for name, p in model.named_parameters()}
        self._fuse = unfuse(model) if bf16 and world.device.type == "cpu" else lambda: None
        self.compiled = Compiled(model, place=place) if recipe.compile else None
        self._deepspeed = deepspeed()
        start = {name: _to_cpu(value) for name, value in model.state_dict().items()} if bf16 else {}
        self._engine = self._initialized(optimizer, config)
        self._optimizer = self._engine.optimizer
        if self._plain and world.size == 1:  # else DeepSpeed copies every gradient to a bucket and back, for nobody
            self._engine.enable_backward_allreduce = False
        self._base: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)  # torch's, or timm's
        self._later = False
        if world.device.type != "cpu":
            self.ask_later()
        self._frozen: dict[str, Tensor] = {}
        self._find_masters(start)

    def _initialized(self, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
        loud = self.stage == 1 and self._dtype == torch.bfloat16
        with hushed() if loud else contextlib.nullcontext():
            return self._deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)[0]

    def ask_later(self) -> None:
        """Let the device leave out steps whose gradient is not finite, where it can: the host need not ask then, step by step."""
        # ZeRO 1 in bf16, gradients added up in fp32:
        alone = hasattr(self._optimizer, "fp32_groups_gradient_flat_partition")
        scaled = (
            getattr(self._engine, "torch_autocast_z0_gradscaler", None) is not None
        )  # tells the optimizer by itself
        self._later = (self._plain or alone) and not scaled and can_be_told(self._base)
        if self._later and alone:
            self._optimizer.step = self._step_on_device

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 -> what the model gives, in its dtype."""
        return self._engine(images.to(self._dtype))

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss`` / accumulate, averaged over the ranks.

        Args:
            last: this is the last part of the optimizer step, which may come early in an epoch's tail
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr: float, momentum: float | None = None) -> bool | Answer:
        """Move the weights, or where the gradient was not finite nothing. All ranks agree.

        Returns:
            whether they moved; on a GPU mostly to be asked for later
        """
        set_lr(self._base, lr, momentum)
        if not (self._plain or self._later):
            self._engine.step()
            return bool(self._engine.was_step_applied())
        finite = clipped(self._gradients(), self._clip)  # gradients are the same on all ranks, and so is this
        if self._later:
            tell(self._base, finite)
            answer = Answer(finite)
            self._engine.step()
            return answer
        if not finite:
            self._engine.zero_grad()
            return False
        self._engine.step()
        return True

    def _gradients(self) -> list[Tensor]:
        """Of the step, in fp32; what has none has one of zeros then, as where gradients are reduced."""
        if not self._plain:
            return self._optimizer.get_grads_for_norm(for_clipping=True)
        for p in self._named.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self._named.values() if p.grad is not None]

    @torch.no_grad()
    def _step_on_device(self) -> None:
        """What DeepSpeed's step under ZeRO 1 in bf16 does, but for its three questions to the host: is the norm finite, is it a
        number, is it too large."""
        own = self._optimizer
        for part, gradient in zip(own.fp32_groups_flat_partition, own.fp32_groups_gradient_flat_partition, strict=True):
            part.grad = gradient
        self._base.step()
        own.update_lp_params()

    # ------------------------------------------------------------------------------------------------------- state

    def weights(self) -> dict[str, Tensor]:
        """The model's whole state dict, in fp32 from the masters, on the CPU. Every rank must call, every rank gets it."""
        with torch.no_grad():
            full = {id(p): self._full(name, p) for name, p in self.module.named_parameters()}
            return {
                name: _to_cpu(full.get(id(value), value))
                for name, value in self.module.state_dict(keep_vars=True).items()
            }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what :meth:`weights` gives."""
        return {name: tuple(self._shape(value)) for name, value in self.module.state_dict(keep_vars=True).items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`weights` gave, on any number of ranks."""
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
            self._frozen = {name: weights[name] for name in self._frozen}
            if self.stage == 3:
                self._load_shards(weights)
                return
            for name, p in self.module.named_parameters():
                if name not in self._named:
                    p.copy_(weights[name])
                elif name in self._own:
                    self._own[name].copy_(weights[name])
                else:
                    self._deepspeed.utils.safe_set_full_fp32_param(p, weights[name].to(p.device, torch.float32))
            self._spread()

    def moments(self) -> dict[str, Tensor]:
        """What the optimizer remembers, as ``PARAMETER/KEY``, whole and on the CPU; empty before the first step.

        Plain numbers become scalars of int64 or float64. Every rank must call.
        """
        moments = {}
        if not self._own and self._base.state:
            self._link()
        with torch.no_grad():
            for name, p in self._named.items():
                master = self._own[name] if self._own else self._flat_of(name)
                for key, value in self._base.state.get(master, {}).items():
                    if not self._own and torch.is_tensor(value) and value.shape == master.shape:
                        value = self._deepspeed.utils.safe_get_full_optimizer_state(p, key)
                    moments[f"{name}/{key}"] = _to_cpu(torch.as_tensor(value, dtype=_scalar_type(value)), cast=False)
        return moments

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`moments` gave, on any number of ranks."""
        if not moments:
            return
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for name, value in moments.items():
            parameter, _, key = name.rpartition("/")
            by_parameter.setdefault(parameter, {})[key] = value
        with torch.no_grad():
            if not self._own:
                self._load_flat_moments(by_parameter)
                return
            for name, state in by_parameter.items():
                own = self._own[name]
                self._base.state[own] = {key: self._placed(key, value, own) for key, value in state.items()}

    def _load_flat_moments(self, by_parameter: dict[str, dict[str, Tensor]]) -> None:
        """Under ZeRO 1 to 3, where a master is a vector of many parameters."""
        scalars = {
            key
            for name, state in by_parameter.items()
            for key, value in state.items()
            if tuple(value.shape) != tuple(self._shape(self._named[name]))
        }
        by_parameter = self._begun_together(by_parameter, scalars)
        flats = {id(flat): (flat, state) for name, state in by_parameter.items() for flat in [self._flat_of(name)]}
        for flat, state in flats.values():
            self._base.state[flat] = {
                key: self._placed(key, value, flat) if key in scalars else torch.zeros_like(flat)
                for key, value in state.items()
            }
        self._link()
        utils = self._deepspeed.utils
        for name, state in by_parameter.items():
            p = self._named[name]
            for key in state.keys() - scalars:
                value = state[key].to(p.device, torch.float32)
                if self.stage == 3:
                    utils.safe_set_local_optimizer_state(p, self._shard(p, value), key)
                else:
                    utils.safe_set_full_optimizer_state(p, value, key)

    def _begun_together(
        self, states: Mapping[str, dict[str, Tensor]], scalars: set[str]
    ) -> dict[str, dict[str, Tensor]]:
        """Without those of vectors that count steps, for all their parameters at once, and of which one parameter has no state:
        there all begin anew."""
        counted = {id(self._flat_of(name)) for name, state in states.items() if scalars & state.keys()}
        anew = {id(self._flat_of(name)) for name in self._named if name not in states} & counted
        return {name: state for name, state in states.items() if id(self._flat_of(name)) not in anew}

    @contextlib.contextmanager
    def carrying(self, numbers: list[Tensor]) -> Iterator[None]:
        """The model with other masters than its own, for the length of a ``with``."""
        with torch.no_grad():
            own = [master.detach().clone() for master in self.masters]
            torch._foreach_copy_(self.masters, numbers)
            self._spread()
            try:
                yield
            finally:
                torch._foreach_copy_(self.masters, own)
                self._spread()

    def release(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Give the model back as it came: plain fp32 parameters with storage of their own and no hooks of the engine's.

        Args:
            weights: what it shall hold. None, when something went wrong: no rank is asked for anything, and the model holds
                what lies here (rounded in bf16, in shards under ZeRO 3).
        """
        for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
            handle = getattr(self._engine, hook, None)
            if handle is not None:
                handle.remove()
        self._engine.destroy()
        # Its destructor would do it once more, whenever memory is collected: to parameters that are another engine's by then.
        self._engine.destroy = lambda: None
        if self.compiled is not None:
            self.compiled.release()
        self._fuse()
        if self.stage < 3 or weights is not None:
            self._give_back(weights or {})
        self._engine = self._optimizer = None

    @torch.no_grad()
    def _give_back(self, weights: Mapping[str, Tensor]) -> None:
        device = self.world.device
        if self.stage == 3:
            _unshard(self.module, weights, device)
        for name, p in self.module.named_parameters():
            for mark in set(vars(p)) - self._marks[name]:
                delattr(p, mark)
            p.grad = None
            p.data = weights.get(name, p.data).to(device, torch.float32, copy=True)
        for name, buffer in self.module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    # ----------------------------------------------------------------------------------------------------- layouts

    def _find_masters(self, start: Mapping[str, Tensor]) -> None:
        """Where they lie, and what they begin with: ``start`` holds the weights in fp32 where the model has them rounded."""
        self.masters, self._own = self._lay_out()
        # What is frozen is rounded to bf16 to compute with, and leaves as it came.
        self._frozen = {name: start[name] for name in self._marks.keys() - self._named.keys() if start}
        self._places = {} if self._own else self._find_places()
        if isinstance(self._base, Muon):
            self._base.join(self.world, self._places, in_shards=self.stage == 3)
        if start:
            # DeepSpeed makes fp32 masters of rounded weights, and at ZeRO 0 takes a first step at once, which decays them.
            self.load_weights(start)
            self._base.state.clear()

    def _lay_out(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The masters of this rank; and by parameter name those that stand for one whole parameter (ZeRO 0)."""
        own = self._optimizer
        for flat in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(own, flat):  # ZeRO 3; ZeRO 1 and 2; ZeRO 1 in bf16 with gradients added up in fp32
                return list(getattr(own, flat)), {}
        copies: dict[int, Tensor] = {id(p): p for p in self._named.values()}
        for low, high in zip(getattr(own, "fp16_groups", ()), getattr(own, "fp32_groups", ()), strict=True):  # bf16
            copies |= {id(p): copy for p, copy in zip(low, high, strict=True)}
        named = {name: copies[id(p)] for name, p in self._named.items()}
        return list(named.values()), named

    def _flat_of(self, name: str) -> Tensor:
        return self._places[id(self._named[name])].flat

    def _find_places(self) -> dict[int, Place]:
        """Where each parameter lies in the masters of ZeRO 1 to 3, by its id."""
        own = self._optimizer
        if self.stage == 3:
            positions = {id(p): own.grad_position[own.get_param_id(p)] for p in self._named.values()}
            return {key: Place(self.masters[group], start, length) for key, (group, start, length) in positions.items()}
        places: dict[int, Place] = {}
        groups = getattr(own, "round_robin_bit16_groups", None) or own.bf16_groups
        for flat, group, starts in zip(
            self.masters, groups, getattr(own, "round_robin_bit16_offsets", [None] * len(groups)), strict=True
        ):
            starts = starts or [0, *itertools.accumulate(p.numel() for p in group)]
            places |= {id(p): Place(flat, start, p.numel()) for p, start in zip(group, starts, strict=False)}
        return places

    def _spread(self) -> None:
        """Bring the masters into the parameters that the model computes with."""
        if hasattr(self._optimizer, "update_lp_params"):
            self._optimizer.update_lp_params()
        elif not self._plain:
            for name, p in self._named.items():
                p.copy_(self._own[name])

    def _full(self, name: str, p: Tensor) -> Tensor:
        """The whole parameter in fp32, of whatever layout."""
        if name not in self._named:
            if hasattr(p, "ds_id") and name not in self._frozen:
                with self._deepspeed.zero.GatheredParameters([p]):
                    return p.detach().clone()
            return self._frozen.get(name, p)
        if self._own:
            return self._own[name]
        return self._deepspeed.utils.safe_get_full_fp32_param(p)

    def _link(self) -> None:
        """Let parameters know their part of the optimizer's state.

        DeepSpeed does it once, after the first group's first step, when the other groups have no state yet.
        """
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO 3 looks it up
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _shape(self, p: Tensor) -> torch.Size:
        return getattr(p, "ds_shape", p.shape)

    def _shard(self, p: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole parameter, as ZeRO 3 cuts it: equal parts, the last one padded."""
        size = p.ds_tensor.numel()
        flat = F.pad(value.reshape(-1), (0, size * self.world.size - value.numel()))
        return flat.narrow(0, size * self.world.rank, size)

    def _load_shards(self, weights: Mapping[str, Tensor]) -> None:
        parameters = dict(self.module.named_parameters())
        with self._deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
            if self.world.is_main:
                for name, p in parameters.items():
                    p.copy_(weights[name])
        for name, p in self._named.items():
            value = weights[name].to(self.world.device, torch.float32)
            self._deepspeed.utils.safe_set_local_fp32_param(p, self._shard(p, value))

    def _placed(self, key: str, value: Tensor, master: Tensor) -> Any:
        """A value of the optimizer's state where it belongs; torch keeps ``step`` on the CPU but for fused kernels."""
        if value.ndim == 0 and value.dtype in (torch.int64, torch.float64):
            return value.item()
        group = next(
            (g for g in self._base.param_groups if any(master is p for p in g["params"])), self._base.param_groups[0]
        )
        if key == "step" and not (group.get("fused") or group.get("capturable")):
            return value.clone()
        return value.to(master.device, copy=True)


def _scalar_type(value: Any) -> torch.dtype | None:
    if isinstance(value, Tensor):
        return value.dtype
    return torch.int64 if isinstance(value, int) else torch.float64


def _to_cpu(tensor: Tensor, cast: bool = True) -> Tensor:
    """A copy on the CPU; floating-point weights in fp32."""
    dtype = torch.float32 if cast and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _unshard(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Plain parameters in place of ZeRO 3's, shared ones shared again."""
    whole: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        plain: dict[str, nn.Parameter | None] = {}
        for name, p in module._parameters.items():
            if p is not None and id(p) not in whole:
                value = weights[f"{prefix}.{name}" if prefix else name].to(device, copy=True)
                whole[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
            plain[name] = None if p is None else whole[id(p)]
        module._parameters = plain
        for name in _LEFT:
            vars(module).pop(name, None)
