"""A place is handed down: a refusal names the setting where the user wrote it."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import recipe, train, vit

import lotus.training
from lotus.config import Model, Patches, check
from lotus.stages import STAGES
from lotus.stages.checks import look_ahead
from lotus.training.deepspeed_config import settings
from lotus.training.distributed import World
from lotus.training.engine import Engine
from lotus.training.optim import make_optimizer
from lotus.training.patch_buckets import Joint
from lotus.vit.model import create
from selection.errors import Refused


def nan(losses: torch.Tensor) -> torch.Tensor:
    return losses * math.nan


def test_divergence_names_the_rate_of_this_training(tmp_path: Path) -> None:
    with pytest.raises(Refused) as told:
        train(tmp_path, recipe(epochs=1), at={0: nan, 1: nan, 2: nan}, place="finetune", stage="finetune")
    assert "Lower finetune.lr, or set finetune.clip=1" in str(told.value)
    assert "train." not in str(told.value).replace(str(tmp_path), "")


THEIRS: list[dict[str, Any]] = [
    {"train_batch_size": 64}, {"train_micro_batch_size_per_gpu": 4}, {"gradient_accumulation_steps": 2},
    {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}, {"optimizer": {"params": {"lr": 0.1}}},
    {"zero_optimization": {"stage": 4}},
]  # fmt: skip


@pytest.mark.parametrize("place", ["train", "finetune", "score"])
def test_the_engine_names_the_place_it_was_given(tmp_path: Path, place: str) -> None:
    file, world = tmp_path / "mine.json", World()

    def refused(asked: Any, ranks: World = world) -> str:
        with pytest.raises(Refused) as told:
            settings(asked, ranks, place=place)
        return str(told.value)

    found = [
        refused(recipe(batch_size=100), World(size=3)),
        refused(recipe(ema=0.9, zero=3)),
        refused(recipe(compile=True, zero=2)),
        refused(recipe(deepspeed="nowhere.json")),
    ]
    for theirs in THEIRS:
        file.write_text(json.dumps(theirs))
        found.append(refused(recipe(deepspeed=str(file))))
    model, asked = vit(), recipe(optimizer="lamb")
    optimizer = make_optimizer(model, asked, place=place)
    with pytest.raises(Refused) as told:
        Engine(model, optimizer, asked, world, place=place)
    found.append(str(told.value))
    others = {"train.", "finetune.", "score."} - {f"{place}."}
    for text in found:
        assert text.startswith(f"{place}."), text
        assert not any(other in text for other in others), text


@pytest.mark.parametrize("place", ["train", "finetune", "score"])
def test_a_mistyped_optimizer_is_refused_where_it_was_written(place: str) -> None:
    """What stands in ``train`` is inherited, and is named there."""
    with pytest.raises(Refused, match=rf"^{place}\.optimizer: .*'adamww'.*'adamw'"):
        look_ahead(check({place: {"optimizer": "adamww"}}), STAGES)


@pytest.mark.parametrize("place", ["model", "score.model"])
def test_a_model_names_the_place_it_was_given(place: str) -> None:
    asked = Model.model_validate({"name": "vit_tiny_patch16_224", "args": {"depth": 1}, "start": {"name": "xavierr"}})
    with pytest.raises(Refused) as told:
        create(asked, 3, place=place)
    assert str(told.value).startswith(f"{place}.start: there is no 'xavierr'. Did you mean 'xavier'?")


def test_a_joint_budget_names_the_place_it_was_given() -> None:
    asked = Patches.model_validate({"keep": 0.5, "joint": {"least": 0.49}})
    with pytest.raises(Refused, match=r"^finetune\.patches\.joint\.least: "):
        Joint(np.arange(8.0), asked, patches=4, seed=0, place="finetune.patches.joint").groups(np.arange(8))


def test_no_low_room_spells_the_name_of_a_top_floor() -> None:
    for name in ("engine", "optim", "schedules", "loop", "lesson", "pace", "guests", "average", "objective"):
        tree = ast.parse((Path(lotus.training.__path__[0]) / f"{name}.py").read_text(encoding="utf-8"))
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                for place in ("train.", "finetune.", "score."):
                    assert place not in node.value.replace("lotus.training.", ""), f"{name}: {node.value}"
