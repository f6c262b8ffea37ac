"""The engine: one config out of two, and the same state out of every layout."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from few import few
from tiny import CLASSES, pictures, recipe, same, vit
from torch import Tensor, nn

from lotus.training import distributed
from lotus.training.average import Average, moving
from lotus.training.deepspeed_config import settings
from lotus.training.distributed import World
from lotus.training.engine import Engine
from lotus.training.optim import make_optimizer
from selection.errors import Refused
from tools.soak import left_in_shared_memory, shared_memory


def made(model: nn.Module | None = None, **changed) -> Engine:
    asked = recipe(**changed)
    model = vit() if model is None else model
    return Engine(model, make_optimizer(model, asked), asked, distributed.start("cpu"))


def go(engine: Engine, steps: range, *, accumulate: int = 1) -> None:
    images, labels = pictures()
    for step in steps:
        for part in range(accumulate):
            rows = slice(8 * step + part, 8 * step + part + 8)
            loss = nn.functional.cross_entropy(engine.forward(images[rows]).float(), labels[rows])
            engine.backward(loss, last=part == accumulate - 1)
        assert engine.step(1e-2)


def poison(engine: Engine) -> bool:
    images, _ = pictures()
    engine.backward(engine.forward(images[:8]).float().sum() * math.nan)
    return bool(engine.step(1e-2))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "bf16")])
def test_a_device_leaves_out_what_is_not_finite_as_the_host_would(zero: int, precision: str, optimizer: str) -> None:
    """Also in the first step, in which an optimizer makes its state."""
    asked = {"zero": zero, "precision": precision, "optimizer": optimizer, "layer_decay": 0.8, "clip": 0.05}
    found: list[tuple[list[bool], dict[str, Tensor], dict[str, Tensor]]] = []
    for later in (False, True):
        engine = made(**asked)
        if later:
            engine.ask_later()
        said = [poison(engine)]
        go(engine, range(2))
        said.append(poison(engine))
        go(engine, range(2, 3))
        found.append((said, engine.weights(), engine.moments()))
        engine.release()
    (one, weights, moments), (other, same_weights, same_moments) = found
    assert one == other == [False, False]
    assert weights.keys() == same_weights.keys()
    assert moments.keys() == same_moments.keys()
    for name, value in {**weights, **moments}.items():
        torch.testing.assert_close({**same_weights, **same_moments}[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("asked", [{"optimizer": "sgd"}, {"optimizer": "lion"}, {"zero": 2}, {"zero": 1}])
def test_who_cannot_be_told_is_asked_at_once(asked: dict) -> None:
    engine = made(**{"zero": 0, **asked})
    engine.ask_later()
    images, _ = pictures()
    for factor, moved in ((1.0, True), (math.nan, False)):
        engine.backward(engine.forward(images[:8]).float().sum() * factor)
        assert engine.step(1e-2) is moved
    engine.release()


LAYOUTS = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16")))


@pytest.mark.parametrize(("zero", "precision"), few(LAYOUTS, [(0, "bf16"), (1, "fp32"), (3, "bf16")]))
def test_state_goes_out_and_in_and_the_model_comes_back(zero: int, precision: str) -> None:
    changed = {"zero": zero, "precision": precision, "accumulate": 2, "layer_decay": 0.8}
    model = vit()
    names, buffers = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    first = made(model, **changed)
    assert first.moments() == {}
    assert same(first.weights(), dict(vit().state_dict())), "bf16 does not round what the optimizer starts from"
    go(first, range(2), accumulate=2)
    weights, moments = first.weights(), first.moments()
    assert list(weights) == names
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert {key.rpartition("/")[2] for key in moments} == {"exp_avg", "exp_avg_sq", "step"}
    assert moments["blocks.0.mlp.fc1.weight/exp_avg"].shape == weights["blocks.0.mlp.fc1.weight"].shape
    go(first, range(2, 4), accumulate=2)

    second = made(**changed)
    second.load_weights(weights)
    second.load_moments(moments)
    assert same(second.weights(), weights)
    assert same(second.moments(), moments)
    go(second, range(2, 4), accumulate=2)
    assert same(second.weights(), first.weights())

    final = first.weights()
    assert not poison(second)
    assert same(second.weights(), final)
    go(second, range(4, 5), accumulate=2)
    assert all(value.isfinite().all() for value in second.weights().values())

    first.release(final)
    second.release()
    assert same(dict(model.state_dict()), final)
    assert [name for name, _ in model.named_buffers()] == buffers
    assert not any((m._forward_hooks or m._forward_pre_hooks or m._backward_hooks) for m in model.modules())
    assert not any(vars(p) for p in model.parameters())
    model(torch.zeros(1, 3, 16, 16)).sum().backward()
    go(made(model), range(1))  # and into another engine


def test_attention_in_bf16_on_a_cpu_is_not_the_fused_one() -> None:
    def fused(model: nn.Module) -> set[bool]:
        return {bool(module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn")}

    model = vit()
    assert fused(model) == {True}
    for precision, during in (("fp32", {True}), ("bf16", {False})):
        engine = made(model, zero=0, precision=precision)
        assert fused(model) == during
        engine.release(engine.weights())
        assert fused(model) == {True}


def test_state_moves_between_layouts() -> None:
    first = made(zero=1)
    go(first, range(2))
    weights, moments = first.weights(), first.moments()
    go(first, range(2, 4))
    for zero in (0, 2, 3):
        other = made(zero=zero)
        other.load_weights(weights)
        other.load_moments(moments)
        go(other, range(2, 4))
        for name, value in first.weights().items():
            torch.testing.assert_close(other.weights()[name], value, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("zero", [0, 1])
def test_it_is_the_bare_loop(zero: int) -> None:
    """Clipping, accumulation and AdamW as plain PyTorch does them."""
    engine = made(zero=zero, accumulate=2, clip=0.5)
    go(engine, range(3), accumulate=2)
    images, labels = pictures()
    model = vit()
    optimizer = make_optimizer(model, recipe(accumulate=2, clip=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for step in range(3):
        for part in range(2):
            rows = slice(8 * step + part, 8 * step + part + 8)
            (nn.functional.cross_entropy(model(images[rows]), labels[rows]) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in engine.weights().items():
        whole = model.state_dict()[name]
        if name.endswith(
            "qkv.bias"
        ):  # a softmax does not see its keys' biases: AdamW makes steps of what rounding leaves
            value, whole = (torch.cat([bias[: len(bias) // 3], bias[2 * len(bias) // 3 :]]) for bias in (value, whole))
        torch.testing.assert_close(value, whole, atol=1e-5, rtol=1e-4)


class Odd(nn.Module):
    """A frozen parameter, a shared one, a buffer, and sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 16 * 16, 7)
        self.second = nn.Linear(7, 7, bias=False)
        self.third = nn.Linear(7, 7, bias=False)
        self.third.weight = self.second.weight
        self.head = nn.Linear(7, CLASSES)
        self.fixed = nn.Parameter(torch.full((7,), 0.5), requires_grad=False)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(torch.relu(self.second(self.first(x.flatten(1)) + self.fixed))))


@pytest.mark.parametrize("zero", few([0, 1, 3], [1, 3]))
def test_frozen_and_shared_parameters_and_buffers(zero: int) -> None:
    torch.manual_seed(0)
    model = Odd()
    engine = made(model, zero=zero)
    go(engine, range(2))
    weights = engine.weights()
    assert set(weights) == set(Odd().state_dict())
    assert torch.equal(weights["second.weight"], weights["third.weight"])
    assert torch.equal(weights["fixed"], torch.full((7,), 0.5))
    assert weights["seen"] == 3
    other = made(Odd(), zero=zero)
    other.load_weights(weights)
    assert same(other.weights(), weights)
    engine.release(weights)
    assert model.third.weight is model.second.weight
    assert not model.fixed.requires_grad
    assert same(dict(model.state_dict()), weights)


AVERAGED = few([(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16")], [(0, "bf16"), (1, "fp32")])


@pytest.mark.parametrize(("zero", "precision"), AVERAGED)
def test_average_is_carried_and_put_down(zero: int, precision: str) -> None:
    engine = made(zero=zero, precision=precision)
    average = Average(engine)
    start = engine.weights()
    go(engine, range(1))
    average.take(moving(0.5, 1))
    now = engine.weights()
    decay = min(0.5, 2 / 11)
    for name, value in average.weights().items():
        torch.testing.assert_close(value, decay * start[name] + (1 - decay) * now[name])
    images, _ = pictures()
    before = engine.forward(images[:4])
    with average.carried():
        assert not torch.equal(engine.forward(images[:4]), before)
    assert torch.equal(engine.forward(images[:4]), before)
    kept = average.weights()
    other = Average(engine)
    other.load_weights(kept)
    assert same(other.weights(), kept)
    assert same(engine.weights(), now)


def test_a_rank_alone_moves_as_where_gradients_are_reduced() -> None:
    """What no gradient came to included: DeepSpeed gives it one of zeros when it reduces, and weight decay moves it."""

    def moved(reduces: bool) -> dict[str, Tensor]:
        model = vit()
        model.register_parameter("unused", nn.Parameter(torch.ones(2, 3)))
        engine = made(model, zero=0, weight_decay=0.1)
        engine._engine.enable_backward_allreduce |= reduces
        go(engine, range(2))
        return engine.weights()

    alone = moved(reduces=False)
    assert same(alone, moved(reduces=True))
    assert (alone["unused"] < 1).all()


def test_nothing_is_compiled_and_nothing_left_in_shared_memory() -> None:
    before = shared_memory()
    go(made(), range(1))
    import deepspeed.comm.comm

    assert deepspeed.comm.comm.cdb.shm_comm_op is None
    assert not left_in_shared_memory(before)


def test_an_optimizer_that_zero_cannot_cut_is_refused() -> None:
    with pytest.raises(Refused, match=r"train\.optimizer: 'lamb' .*ZeRO 1.*train\.zero=0"):
        made(optimizer="lamb")
    go(made(optimizer="lamb", zero=0), range(1))


@pytest.mark.parametrize("name", ["momentum", "lion", "nadamw", "adabelief"])
def test_other_optimizers_keep_their_memory(name: str) -> None:
    first = made(optimizer=name)
    go(first, range(2))
    second = made(optimizer=name)
    second.load_weights(first.weights())
    second.load_moments(first.moments())
    for engine in (first, second):
        go(engine, range(2, 3))
    assert same(first.weights(), second.weights())


# ------------------------------------------------------------------------------------------------------------- config


def merged(tmp_path: Path, theirs: object, *, world: World | None = None, **changed) -> dict:
    file = tmp_path / "mine.json"
    file.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
    return settings(recipe(deepspeed=str(file), **changed), world or World())


def test_the_config_of_a_recipe() -> None:
    config = settings(recipe(batch_size=96, accumulate=3, clip=0.7, zero=2), World(size=4), numbers=1001)
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 3
    assert config["train_batch_size"] == 96
    assert config["gradient_clipping"] == 0.7
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["reduce_bucket_size"] == 1002
    assert config["bf16"] == {"enabled": False}


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(Refused, match=r"train\.batch_size: 100 .* 3 ranks x 2 .*Take 96"):
        settings(recipe(batch_size=100, accumulate=2), World(size=3))


def test_the_users_json_is_merged_over_ours(tmp_path: Path) -> None:
    config = merged(
        tmp_path,
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 0.3,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
            "fp16": {"enabled": "auto"},
            "bf16": {"enabled": "auto"},
            "comms_logger": {"enabled": True},
        },
    )
    assert config["train_batch_size"] == 8
    assert config["gradient_clipping"] == 0.3
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["overlap_comm"] is False
    assert isinstance(config["zero_optimization"]["reduce_bucket_size"], int)
    assert config["comms_logger"] == {"enabled": True}
    assert "optimizer" not in config
    assert "fp16" not in config


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"train_batch_size": 64}, r"train_batch_size is 64, and the recipe comes to 8\. Set train\.batch_size"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            r"train_micro_batch_size_per_gpu is 4, .* 8\. Set train\.batch_size and",
        ),
        ({"gradient_accumulation_steps": 2}, r"is 2, and the recipe comes to 1\. Set train\.accumulate"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled is true, .* false\. Set train\.precision"),
        ({"fp16": {"enabled": True}}, r"fp16: not supported.*train\.precision=bf16"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, r"optimizer: the recipe makes it.*train\.optimizer"),
        ({"optimizer": {"params": [1]}}, r"optimizer: the recipe makes it"),
        ({"scheduler": "WarmupLR"}, r"scheduler: the recipe makes it"),
        ({"zero_optimization": {"stage": 4}}, r"stage is 0, 1, 2 or 3, not 4"),
        ("{", "is no JSON"),
        ("[]", "holds a list"),
    ],
)
def test_contradictions_are_refused_with_their_cure(tmp_path: Path, theirs: object, told: str) -> None:
    with pytest.raises(Refused, match=rf"train\.deepspeed: .*mine\.json.*{told}"):
        merged(tmp_path, theirs)


def test_a_json_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match=r"train\.deepspeed: nowhere\.json cannot be read"):
        settings(recipe(deepspeed="nowhere.json"), World())


def test_what_cannot_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"train\.ema: under ZeRO 3"):
        settings(recipe(ema=0.9, zero=3), World())
    with pytest.raises(Refused, match=r"train\.ema: under ZeRO 3"):
        merged(tmp_path, {"zero_optimization": {"stage": 3}}, ema=0.9)
    with pytest.raises(Refused, match=r"train\.compile: under ZeRO 2"):
        settings(recipe(compile=True, zero=2), World())


def test_a_json_reaches_the_engine(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.1}))
    engine = made(deepspeed=str(file))
    assert engine.stage == 2
    go(engine, range(2))


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json")))
def test_the_shipped_jsons_change_nothing_but_the_stage(file: Path) -> None:
    stage = int(file.stem.removeprefix("zero"))
    merged, ours = settings(recipe(deepspeed=str(file)), World()), settings(recipe(zero=stage), World())
    assert merged["zero_optimization"]["stage"] == stage
    del merged["zero_optimization"], ours["zero_optimization"]
    assert merged == ours
