"""Muon: against singular values, against timm, and the same under every ZeRO stage and any number of ranks.

Run as a script, it is one rank of the trainings that two ranks are compared by.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim.muon
import torch
from few import few
from ranks import two_ranks
from tiny import Killed, Later, kill, minutes, pictures, recipe, same, train, vit
from torch import Tensor, nn

from lotus.config import Recipe
from lotus.events import Said
from lotus.training import distributed, loop, muon
from lotus.training.engine import Engine
from lotus.training.muon import QUINTIC, Matrix, Muon, Place, matrices, newton_schulz
from lotus.training.optim import make_optimizer, set_lr
from selection.errors import Refused

LOW, HIGH = 0.7, 1.2  # the band of the quintic iteration, for singular values that are not tiny

# ------------------------------------------------------------------------------------------------- orthogonalization


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 8), (24, 128, 128), (2, 128, 512), (5, 32, 48), (2, 16, 32)])
def test_singular_values_go_to_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    turned = newton_schulz(x.clone()).double()
    inside = u.mT @ turned @ vh.mT  # (K, n, n), diagonal where the vectors are those of x
    new = inside.diagonal(dim1=-2, dim2=-1)
    large = s / s.norm(dim=-1, keepdim=True) > 3e-3
    assert large.float().mean() > 0.9
    assert new[large].min() > LOW
    assert new.max() < HIGH
    assert (new > 0).all()
    assert (inside - torch.diag_embed(new)).abs().max() < 1e-3
    polar = (u @ vh).flatten(1)
    assert (torch.cosine_similarity(turned.flatten(1), polar) > 0.99).all()


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 64, 100), (2, 64, 128), (3, 64, 256)])
@pytest.mark.parametrize("kind", ["flat", "decaying", "of low rank"])
def test_it_is_the_plain_iteration(shape: tuple[int, int, int], kind: str) -> None:
    """Whichever way it is computed: in float64 and one matrix product after the other."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    if kind == "decaying":
        x = u * torch.logspace(0, -5, s.shape[-1], dtype=torch.float64) @ vh
    elif kind == "of low rank":
        x = u[..., :5] @ vh[..., :5, :]
    plain = x / x.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in QUINTIC:
        gram = plain @ plain.mT
        plain = a * plain + (b * gram + c * gram @ gram) @ plain
    assert (newton_schulz(x.float()).double() - plain).norm() < 1e-3 * plain.norm()


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 32, 96)])
def test_in_bfloat16_as_on_a_gpu_it_stays_near(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    near, exact = newton_schulz(x.bfloat16()).float(), newton_schulz(x.clone())
    assert near.dtype == torch.float32
    assert (torch.cosine_similarity(near.flatten(1), exact.flatten(1)) > 0.98).all()


def test_zero_stays_zero() -> None:
    assert not newton_schulz(torch.zeros(2, 4, 16)).any()


# ------------------------------------------------------------------------------------------------ what goes to whom


def small(**args: Any) -> Any:
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**settings, **args})


PATCHES = "patch_embed.proj.weight"
IN_A_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            lambda: small(reg_tokens=2, init_values=1e-3),
            {PATCHES} | {f"blocks.{b}.{n}.weight" for b in range(2) for n in IN_A_BLOCK},
        ),
        (
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=24, num_classes=3),
            {PATCHES} | {f"blocks.0.{n}.weight" for n in IN_A_BLOCK},
        ),
        (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
            ),
            {f"layers.{b}.blocks.0.{n}.weight" for b in range(2) for n in IN_A_BLOCK}
            | {PATCHES, "layers.1.downsample.reduction.weight"},
        ),
    ],
    ids=["vit", "distilled", "swin"],
)  # fmt: skip
def test_matrices_are_muons_and_the_rest_is_adamws(model: Callable[[], nn.Module], expected: set[str]) -> None:
    made = model()
    optimizer = make_optimizer(made, Recipe(optimizer="muon", weight_decay=0.1))
    names = {id(p): name for name, p in made.named_parameters()}
    muons, *others = optimizer.param_groups
    assert {names[id(p)] for p in muons["params"]} == expected
    rest = [p for group in others for p in group["params"]]
    assert len(rest) + len(expected) == len(names)
    assert {id(p) for p in rest} | {id(p) for p in muons["params"]} == names.keys()
    assert muons["weight_decay"] == 0.1
    as_ever = make_optimizer(made, Recipe(weight_decay=0.1))
    decays, wanted = (
        {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
        for groups in (optimizer.param_groups, as_ever.param_groups)
    )
    assert decays == wanted


def test_convolutions_are_matrices_unless_they_have_groups() -> None:
    made = timm.create_model("mobilenetv3_small_050", num_classes=3)
    found = matrices(made)
    modules = dict(made.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            assert (f"{name}.weight" in found) == (module.groups == 1), name
    assert "classifier.weight" not in found
    one = modules["blocks.1.0.conv_pw"]
    assert found["blocks.1.0.conv_pw.weight"].shape == (one.out_channels, one.in_channels)


def test_values_of_another_width_than_queries_are_told_apart() -> None:
    attn = nn.Module()
    attn.qkv, attn.proj = nn.Linear(12, 2 * 6 + 10), nn.Linear(10, 12)
    made = nn.ModuleDict({"attn": attn, "pool": nn.ModuleDict({"kv": nn.Linear(12, 24)})})
    found = matrices(made)
    assert found["attn.qkv.weight"].rows == (6, 6, 10)
    assert found["attn.proj.weight"].rows == (12,)
    assert found["pool.kv.weight"].rows == (12, 12)


def test_a_model_without_matrices_is_refused() -> None:
    settings = Recipe(optimizer="muon")
    with pytest.raises(Refused, match=r"finetune\.optimizer: .*LayerNorm.*adamw"):
        make_optimizer(nn.LayerNorm(4), settings, place="finetune")
    model = small()
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("head")
    with pytest.raises(Refused, match=r"train\.optimizer"):
        make_optimizer(model, settings)


# --------------------------------------------------------------------------------------------------------- an update


def gradients(model: nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)


class Conv(nn.Module):
    """A wide, a high and a square matrix, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.high, self.square = nn.Linear(48, 8), nn.Linear(8, 20), nn.Linear(16, 16)
        self.conv = nn.Conv2d(6, 10, 3)


def test_the_update_is_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm iterates in bfloat16; here in float32, or rounding would hide everything."""
    exact = functools.partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", exact)
    ours, theirs = Conv(), Conv()
    optimizer = make_optimizer(ours, Recipe(optimizer="muon", lr=0.01, weight_decay=0.1))
    big, rest = ([p for p in theirs.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    oracle = timm.optim.muon.Muon(big, lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True)
    beside = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0)
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        gradients(ours, step)
        gradients(theirs, step)
        set_lr(optimizer, lr)
        for one in (oracle, beside):
            set_lr(one, lr)
            one.step()
        optimizer.step()
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-4, msg=f"{name} at {step}")


def change(model: nn.Module, settings: Recipe) -> dict[str, Tensor]:
    """What the first step, along given gradients, adds to each parameter."""
    optimizer = make_optimizer(model, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients(model)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_q_k_and_v_are_turned_apart_and_scaled_as_adamw() -> None:
    model = small()
    moved = change(model, Recipe(optimizer="muon", lr=0.01, weight_decay=0))
    name = "blocks.1.attn.qkv.weight"
    grad = dict(model.named_parameters())[name].grad
    assert grad is not None
    for step, part in zip(moved[name].split(32), grad.split(32), strict=True):
        u, _, vh = torch.linalg.svd(part, full_matrices=False)
        values = (u.T @ step @ vh.T).diagonal() / (-0.01 * 0.2 * math.sqrt(32))
        assert values[:-1].min() > LOW  # the last is of a nearly singular matrix
        assert values.max() < HIGH
    for other in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"):  # 0.2 is the size of AdamW's updates
        assert moved[other].square().mean().sqrt() / 0.01 == pytest.approx(0.2, rel=0.05)
    head = moved["head.weight"] / (-0.01 * dict(model.named_parameters())["head.weight"].grad.sign())  # type: ignore[union-attr]
    torch.testing.assert_close(head, torch.ones_like(head), atol=1e-3, rtol=0), "Adam's first step is the sign's"


def test_layer_decay_scales_matrices_and_the_rest() -> None:
    plain = change(vit(), Recipe(optimizer="muon", lr=0.01, weight_decay=0))
    scaled = change(vit(), Recipe(optimizer="muon", lr=0.01, weight_decay=0, layer_decay=0.5))
    for name, factor in (("head.weight", 1), ("blocks.1.mlp.fc1.weight", 0.5), ("blocks.1.mlp.fc1.bias", 0.5),
                         ("blocks.0.attn.qkv.weight", 0.25), ("blocks.0.norm1.bias", 0.25), ("patch_embed.proj.weight", 0.125)):  # fmt: skip
        torch.testing.assert_close(scaled[name], factor * plain[name], atol=1e-6, rtol=1e-3, msg=name)


def test_adamw_has_a_rate_of_its_own() -> None:
    plain = change(vit(), Recipe(optimizer="muon", lr=0.01, weight_decay=0))
    other = change(vit(), Recipe(optimizer="muon", lr=0.01, adamw_lr=0.002, weight_decay=0))
    for name, moved in other.items():
        factor = 1 if name in matrices(vit()) else 0.2
        torch.testing.assert_close(moved, factor * plain[name], atol=1e-6, rtol=1e-3, msg=name)


def test_decay_is_decoupled_and_of_its_layers_rate() -> None:
    model = small()
    optimizer = make_optimizer(model, Recipe(optimizer="muon", lr=0.1, weight_decay=0.5, layer_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = {"blocks.0.mlp.fc1.weight": 1 - 0.1 * 0.5 * 0.25, "head.weight": 1 - 0.1 * 0.5}.get(name)
        if factor is not None:
            torch.testing.assert_close(p.detach(), factor * before[name])


def test_what_has_no_gradient_stays_where_it_is() -> None:
    model = small()
    optimizer = make_optimizer(model, Recipe(optimizer="muon"))
    gradients(model)
    still = model.get_submodule("blocks.0.mlp.fc1")
    still.weight.grad = None  # type: ignore[union-attr]
    before = still.weight.detach().clone()  # type: ignore[operator,union-attr]
    optimizer.step()
    assert torch.equal(still.weight, before)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- through the engine


def engine_of(**changed: Any) -> Engine:
    settings = recipe(**{"optimizer": "muon", "weight_decay": 0.1, "layer_decay": 0.8, **changed})
    model = vit()
    return Engine(model, make_optimizer(model, settings), settings, distributed.start("cpu"))


def go(engine: Engine, steps: range, lr: float = 1e-2) -> None:
    images, labels = pictures()
    for step in steps:
        rows = slice(8 * step, 8 * step + 8)
        engine.backward(nn.functional.cross_entropy(engine.forward(images[rows]).float(), labels[rows]))
        assert engine.step(lr)


@pytest.mark.parametrize(
    ("computes_in", "cpu", "wanted"),
    [("fp32", True, torch.float32), ("bf16", False, torch.float32), ("bf16", True, torch.bfloat16)],
)
def test_matrices_are_orthogonalized_in_bf16_where_model_and_cpu_compute_in_it(
    monkeypatch: pytest.MonkeyPatch, computes_in: str, cpu: bool, wanted: torch.dtype
) -> None:
    seen = set()

    def watched(x: Tensor, buffer: muon.Buffers | None = None) -> Tensor:
        seen.add(x.dtype)
        return newton_schulz(x, buffer)

    monkeypatch.setattr(muon, "faster_in_bf16", lambda device: cpu)
    monkeypatch.setattr(muon, "newton_schulz", watched)
    go(engine_of(zero=0, precision=computes_in), range(1))
    assert seen == {wanted}


LAYOUTS = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16")))


@pytest.mark.parametrize(("zero", "precision"), few(LAYOUTS, [(0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16")]))
def test_state_goes_out_and_in_and_what_is_not_finite_is_skipped(zero: int, precision: str) -> None:
    first = engine_of(zero=zero, precision=precision)
    go(first, range(2))
    weights, moments = first.weights(), first.moments()
    hidden = matrices(vit())
    keys = {key.rpartition("/")[0]: set[str]() for key in moments}
    for key in moments:
        name, _, what = key.rpartition("/")
        keys[name].add(what)
    assert keys.keys() == weights.keys()
    assert all(found == ({"momentum_buffer"} if name in hidden else {"step", "exp_avg", "exp_avg_sq"}) for name, found in keys.items())  # fmt: skip
    go(first, range(2, 4))
    second = engine_of(zero=zero, precision=precision)
    second.load_weights(weights)
    second.load_moments(moments)
    assert same(second.moments(), moments)
    go(second, range(2, 4))
    assert same(second.weights(), first.weights()), "bit for bit"
    before, memory = second.weights(), second.moments()
    images, _ = pictures()
    second.backward(second.forward(images[:8]).float().sum() * math.nan)
    assert not second.step(1e-2)
    assert same(second.weights(), before)
    assert same(second.moments(), memory)
    go(second, range(4, 5))
    assert all(value.isfinite().all() for value in second.weights().values())
    first.release(before)
    second.release(before)


@pytest.mark.parametrize(("precision", "steps"), [("fp32", 4), ("bf16", 1)])
def test_every_zero_stage_moves_alike(precision: str, steps: int) -> None:
    """One step in bf16: where a weight is rounded the other way, what a gradient of low rank has of noise is another, and
    that is orthogonalized as well."""
    after = {}
    for zero in range(4):
        engine = engine_of(zero=zero, precision=precision)
        go(engine, range(steps), lr=3e-3)
        after[zero] = engine.weights()
    for zero, weights in after.items():
        for name, value in weights.items():
            torch.testing.assert_close(value, after[0][name], atol=1e-4, rtol=1e-3, msg=f"{name} under ZeRO {zero}")


def test_memory_moves_between_stages() -> None:
    first = engine_of(zero=1)
    go(first, range(2))
    weights, moments = first.weights(), first.moments()
    go(first, range(2, 4))
    for zero in (0, 2, 3):
        other = engine_of(zero=zero)
        other.load_weights(weights)
        other.load_moments(moments)
        go(other, range(2, 4))
        for name, value in first.weights().items():
            torch.testing.assert_close(other.weights()[name], value, atol=5e-4, rtol=1e-3, msg=name)


def test_timms_variants_are_still_refused_above_zero_0() -> None:
    with pytest.raises(Refused, match=r"train\.optimizer: 'nadamuon' .*ZeRO 1"):
        engine_of(optimizer="nadamuon", zero=1, layer_decay=1.0)


def test_by_hand_a_part_of_a_vector_is_the_whole() -> None:
    """Matrices end to end in one vector, as ZeRO 1 lays them, are moved as matrices are."""
    one, other = (
        nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(2))) for size in ((4, 12), (9, 3))
    )
    known = [Matrix((4, 12), (2, 2)), Matrix((9, 3), (3, 3, 3), 0.5)]
    draw = torch.Generator().manual_seed(3)
    grads = [torch.randn(p.shape, generator=draw) for p in (one, other)]
    flat = torch.cat([one.detach().flatten(), other.detach().flatten(), torch.zeros(1)])
    whole = Muon(list(zip((one, other), known, strict=True)), lr=0.1, weight_decay=0.2)
    cut = Muon(list(zip((one, other), known, strict=True)), lr=0.1, weight_decay=0.2)
    vector = nn.Parameter(flat)
    vector.grad = torch.cat([grad.flatten() for grad in grads] + [torch.zeros(1)])
    places = {id(one): Place(vector, 0, 48), id(other): Place(vector, 48, 27)}
    cut.join(distributed.World(), places, in_shards=False)
    cut.param_groups[0]["params"] = [vector]
    cut.step()
    for p, grad in zip((one, other), grads, strict=True):
        p.grad = grad
    whole.step()
    torch.testing.assert_close(vector.detach()[:-1], torch.cat([one.detach().flatten(), other.detach().flatten()]))
    assert vector[-1] == 0


# ----------------------------------------------------------------------------------------------------- whole trainings

WANTS: dict[str, Any] = {"optimizer": "muon", "ema": 0.0, "save_minutes": 0.5, "weight_decay": 0.1, "layer_decay": 0.9}


@pytest.mark.parametrize("zero", few([0, 1, 2, 3], [1]))
def test_killed_and_started_again_ends_the_same(tmp_path: Path, zero: int) -> None:
    straight = train(tmp_path / "straight", recipe(**WANTS, zero=zero))
    with pytest.raises(Killed):
        train(tmp_path / "killed", recipe(**WANTS, zero=zero), at={5: kill}, clock=minutes())
    done = train(tmp_path / "killed", recipe(**WANTS, zero=zero), clock=minutes())
    assert same(done.fitted.state, straight.fitted.state)
    assert straight.fitted.top1 > 60


def test_an_unusual_rate_is_warned_of_once_and_trained_with(tmp_path: Path) -> None:
    done = train(tmp_path, recipe(optimizer="muon", lr=0.02, epochs=1))
    told = [event.text for event in done.events if isinstance(event, Said) and event.level == "warning"]
    assert told == ["train.lr: 0.02 is far outside what is usual for muon, 0.0001 to 0.01"]
    assert done.fitted.epochs == 1


CELLS = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16")]
LATER = [(0, "fp32"), (1, "bf16")]
"""Where a GPU leaves out steps by itself."""


@pytest.mark.slow
def test_two_ranks_are_as_one_and_go_on_as_one(tmp_path: Path) -> None:
    """Over gloo: whole trainings, the rest of those begun here, ones begun there that are ended here, and ones asked as a GPU is."""
    alone = {}
    for zero, precision in CELLS:
        settings = recipe(**WANTS, zero=zero, precision=precision)
        alone[zero, precision] = train(tmp_path / "alone" / f"{zero}-{precision}", settings).fitted.state
        with pytest.raises(Killed):
            train(tmp_path / f"one-{zero}-{precision}", settings, at={5: kill}, clock=minutes())
    two_ranks(Path(__file__), tmp_path, timeout=280, base={"PATH": "/nonexistent", "HOME": str(tmp_path)})
    for zero, precision in CELLS:
        name = f"{zero}-{precision}"
        there = torch.load(tmp_path / f"two-{name}.pt", weights_only=True)
        settings = recipe(**WANTS, zero=zero, precision=precision)
        there["ended"] = train(tmp_path / f"two-{name}", settings).fitted.state
        for what, state in there.items():
            far = max((value - alone[zero, precision][key]).abs().max().item() for key, value in state.items())
            assert far < (2e-3 if precision == "fp32" else 4e-2), f"{name} {what}: {far:.2g} away"


def main(out: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for zero, precision in CELLS:
        name = f"{zero}-{precision}"
        settings = recipe(**WANTS, zero=zero, precision=precision)
        states = {what: train(out / f"{what}-{name}", settings, world=world).fitted.state for what in ("whole", "one")}
        with pytest.raises(Killed):
            train(out / f"two-{name}", settings, world=world, at={5: kill}, clock=minutes())
        if (zero, precision) in LATER:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "Engine", Later)
                states["later"] = train(out / f"later-{name}", settings, world=world).fitted.state
        if world.is_main:
            torch.save(states, out / f"two-{name}.pt")
        world.barrier()
    distributed.leave()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
