"""The DeepSpeed config of a recipe, with the user's own JSON merged over it. DeepSpeed itself is not asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lotus.config import Recipe
from lotus.training.distributed import World
from lotus.training.muon import Muon
from selection import regular
from selection.errors import Refused, reason

_LARGEST_BUCKET = int(5e8)  # numbers, DeepSpeed's own default
# These look at a whole tensor (its norm, its rows and columns), and ZeRO 1 to 3 give them flat vectors of many; Adagrad is
# made anew by DeepSpeed there, and loses its groups.
NOT_FLAT = frozenset(
    (
        "Adafactor", "AdafactorBigVision", "Adagrad", "Adahessian", "AdamP", "Kron", "Lamb", "Lars", "Mars", "Muon",
        "NvNovoGrad", "SGDP",
    )
)  # fmt: skip


def settings(recipe: Recipe, world: World, numbers: int = _LARGEST_BUCKET, *, place: str = "train") -> dict[str, Any]:
    """The DeepSpeed config of a recipe, with the user's own JSON merged over it.

    Args:
        recipe: of the training
        world: the ranks, among whom the batch is divided
        numbers: how many the model has; DeepSpeed's communication buffers need not be larger
        place: where the recipe's settings stand, for a refusal to name them

    Raises:
        Refused: a batch that does not divide; a JSON that cannot be read, or that contradicts the recipe.
    """
    ranks = world.size * recipe.accumulate
    if recipe.batch_size % ranks:
        raise Refused(
            f"{place}.batch_size: {recipe.batch_size} does not divide by {world.size} ranks x {recipe.accumulate} "
            f"(accumulate). Take {max(recipe.batch_size // ranks, 1) * ranks}."
        )
    bucket = min(numbers + numbers % 2, _LARGEST_BUCKET)  # DeepSpeed wants it even
    bf16 = recipe.precision == "bf16"
    ours: dict[str, Any] = {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // ranks,
        "gradient_accumulation_steps": recipe.accumulate,
        "gradient_clipping": recipe.clip,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": recipe.zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # It would replace torch.nn.functional.linear for the whole process, and the gates count on the real one.
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,  # timm's
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }
    if recipe.deepspeed:
        _merge(ours, _read(Path(recipe.deepspeed), place), recipe.deepspeed, (), place)
    stage = ours["zero_optimization"]["stage"]
    if bf16 and stage > 0:
        ours.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    check_stage(recipe, stage, place)
    return ours


def check_stage(recipe: Recipe, stage: int, place: str) -> None:
    """Refuse what cannot be had under a ZeRO stage."""
    if recipe.ema and stage == 3:
        raise Refused(
            f"{place}.ema: under ZeRO 3 no rank has the weights that are averaged. Use {place}.ema=0, or ZeRO 0 to 2."
        )
    if stage == 3 and any(guest.name == "late_average" for guest in getattr(recipe, "guests", ())):
        raise Refused(f"{place}.guests: late_average: under ZeRO 3 no rank has the weights. Use ZeRO 0 to 2.")
    if recipe.compile and stage > 1:
        raise Refused(
            f"{place}.compile: under ZeRO {stage} the compiled blocks break. Use {place}.zero=1, or compile=false."
        )


def stage_of(recipe: Recipe, place: str) -> int:
    """The ZeRO stage of a recipe, which a JSON of the user's own may say.

    Raises:
        Refused: the JSON cannot be read, or is none of DeepSpeed's.
    """
    asked: dict[str, Any] = {"zero_optimization": {"stage": recipe.zero}}
    if recipe.deepspeed:
        theirs = _read(Path(recipe.deepspeed), place).get("zero_optimization", {})
        _merge(asked, {"zero_optimization": theirs}, recipe.deepspeed, (), place)
    return int(asked["zero_optimization"]["stage"])


def check_flat(optimizer: torch.optim.Optimizer, recipe: Recipe, stage: int, place: str) -> None:
    """Refuse an optimizer that ZeRO cannot cut up."""
    if stage > 0 and type(optimizer).__name__ in NOT_FLAT and not isinstance(optimizer, Muon):
        raise Refused(
            f"{place}.optimizer: {recipe.optimizer!r} goes wrong under ZeRO {stage}, which lays tensors end to end "
            f"in one vector. Use {place}.zero=0, or an optimizer such as adamw."
        )


_SAME = {
    ("train_batch_size",): "{place}.batch_size",
    ("train_micro_batch_size_per_gpu",): "{place}.batch_size and {place}.accumulate",
    ("gradient_accumulation_steps",): "{place}.accumulate",
    ("bf16", "enabled"): "{place}.precision",
}
"""Where a JSON may say nothing else than the recipe says, and what to set instead."""


def _read(file: Path, place: str) -> dict[str, Any]:
    try:
        config = json.loads(regular.text(file))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"{place}.deepspeed: {file} cannot be read ({reason(error)}). Give a DeepSpeed JSON, or nothing."
        ) from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{place}.deepspeed: {file} is no JSON: {error}.") from None
    if not isinstance(config, dict):
        raise Refused(f"{place}.deepspeed: {file} holds a {type(config).__name__}, not settings in {{}}.")
    for section, cure in (("optimizer", "optimizer, lr and weight_decay"), ("scheduler", "lr and min_lr")):
        given = config.pop(section, None) or {}
        params = given.get("params", {}) if isinstance(given, dict) else None
        if not isinstance(params, dict) or any(value != "auto" for value in params.values()):
            raise Refused(
                f"{place}.deepspeed: {file}: {section}: the recipe makes it. Take the section out and set {place}.{cure}."
            )
    fp16 = config.pop("fp16", None)
    if isinstance(fp16, dict) and fp16.get("enabled") is True:
        raise Refused(f"{place}.deepspeed: {file}: fp16: not supported. Take it out and set {place}.precision=bf16.")
    return config


def _merge(ours: dict[str, Any], theirs: Mapping[str, Any], file: str, inside: tuple[str, ...], place: str) -> None:
    """Put ``theirs`` over ``ours``, in place; ``"auto"`` is ours."""
    for name, value in theirs.items():
        here = (*inside, name)
        if value == "auto":
            continue
        if isinstance(value, Mapping) and isinstance(ours.setdefault(name, {}), dict):
            _merge(ours[name], value, file, here, place)
        elif isinstance(ours.get(name), dict):
            raise Refused(f"{place}.deepspeed: {file}: {'.'.join(here)} is {json.dumps(value)}, not settings in {{}}.")
        elif here in _SAME and value != ours[name]:
            raise Refused(
                f"{place}.deepspeed: {file}: {'.'.join(here)} is {json.dumps(value)}, and the recipe comes to "
                f'{json.dumps(ours[name])}. Set {_SAME[here].format(place=place)}, and write "auto" in the JSON.'
            )
        elif here == ("zero_optimization", "stage") and value not in (0, 1, 2, 3):
            raise Refused(
                f"{place}.deepspeed: {file}: zero_optimization.stage is 0, 1, 2 or 3, not {json.dumps(value)}."
            )
        else:
            ours[name] = value
