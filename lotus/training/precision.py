"""Whether a training computes in bfloat16 where its recipe leaves that to the device."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lotus.config import Recipe
from lotus.training.distributed import World

R = TypeVar("R", bound=Recipe)
_CPUINFO, _FLAGS = Path("/proc/cpuinfo"), {"avx512_bf16", "amx_bf16"}
_AMPERE = (8, 0)


def settled(recipe: R, model: nn.Module, device: torch.device | str, world: World | None = None) -> R:
    """``recipe`` with ``precision: auto`` decided for ``model`` on ``device``; any other as it is.

    It is fp32 for a model with batch norms, whose statistics bf16 would leave in fp32, and torch takes no such mixture.

    Args:
        world: ranks that train the model together, all of which ask: of different machines they take what all are faster in
    """
    if recipe.precision != "auto":
        return recipe
    half = faster_in_bf16(torch.device(device)) and not has_batch_norms(model)
    if world is not None:
        half = not world.any(not half)
    return recipe.model_copy(update={"precision": "bf16" if half else "fp32"})


def faster_in_bf16(device: torch.device) -> bool:
    """GPUs from Ampere on, and CPUs that multiply in bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    return device.type == "cpu" and _multiplies_in_bf16()


@functools.cache
def _multiplies_in_bf16() -> bool:
    try:
        with _CPUINFO.open(encoding="utf-8") as told:
            flags = next((line for line in told if line.startswith("flags")), "")
    except OSError:  # not on Linux
        return False
    return bool(_FLAGS & set(flags.split()))


def has_batch_norms(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())
