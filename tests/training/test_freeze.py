"""What is frozen stays, has no gradient and no optimizer state; a head learns alone first; and what is spared is not billed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from few import few
from test_guests import Killed, joined, kill, minutes
from tiny import recipe, same, shrinking, train, vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lotus.events import Said
from lotus.training.checkpoint import Checkpoints
from lotus.training.freeze import STEM, Frozen, frozen, spared
from lotus.vit import cost
from selection.errors import Refused


def names(model: nn.Module, *patterns: str) -> set[str]:
    return set(frozen(model, patterns, place="train.freeze"))


def test_parts_go_by_their_names() -> None:
    model = vit(depth=4)
    every = {name for name, _ in model.named_parameters()}
    stem = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert names(model, "patch_embed") == stem
    assert names(model, "blocks.1") == {name for name in every if name.startswith("blocks.1.")}
    assert names(model, "blocks.0-2") == names(model, "blocks.0", "blocks.1", "blocks.2")
    assert names(model, "blocks.1-2.attn") == {
        name for name in every if name[:13] in ("blocks.1.attn", "blocks.2.attn")
    }
    assert names(model, "*.norm1") == {name for name in every if ".norm1." in name}
    assert names(model, "patch_embed", "blocks.*", "norm") == every - {"head.weight", "head.bias"}
    assert names(model, "head.bias") == {"head.bias"}
    assert set(STEM) >= {name.partition(".")[0] for name in stem}


@pytest.mark.parametrize("pattern", ["blocks.9", "block.0", "blocks.4-6", "mlp", ""])
def test_a_name_of_nothing_is_refused_with_the_parts(pattern: str) -> None:
    with pytest.raises(Refused, match=r"train\.freeze: .*Parts are patch_embed, blocks"):
        names(vit(depth=4), pattern)


def test_a_row_of_blocks_that_goes_on_beyond_the_last_is_refused() -> None:
    with pytest.raises(
        Refused, match=r"train\.freeze: 'blocks\.0-99\.attn' names blocks\.\d+\.attn, which the model does not have"
    ):
        frozen(vit(), ["blocks.0-99.attn"], place="train.freeze")


def test_blocks_keep_their_numbers_when_one_is_cut_out_whole() -> None:
    from lotus.vit.parts import strip

    model = vit(depth=3)
    strip(model, [(True, True), (False, False), (True, True)])
    assert {name[:8] for name in frozen(model, ["blocks.2"])} == {"blocks.1"}
    assert frozen(model, ["blocks.1"]) == []


# ------------------------------------------------------------------------------------------------- in a training


@pytest.mark.parametrize(
    ("zero", "precision", "optimizer"),
    few(
        [(zero, precision, one) for zero in range(4) for precision in ("fp32", "bf16") for one in ("adamw", "muon")],
        [(0, "fp32", "muon"), (1, "bf16", "adamw"), (3, "bf16", "adamw"), (2, "fp32", "adamw")],
    ),
)
def test_what_is_frozen_leaves_as_it_came_and_has_no_state(
    tmp_path: Path, zero: int, precision: str, optimizer: str
) -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    settings = recipe(zero=zero, precision=precision, optimizer=optimizer, layer_decay=0.9, ema=0.9 if zero < 3 else 0)
    done = train(tmp_path, settings, model=model, guests=[Frozen(["patch_embed", "blocks.0"])])
    held = names(model, "patch_embed", "blocks.0")
    for name, value in done.fitted.state.items():
        assert torch.equal(value, before[name]) == (name in held), name
    found = Checkpoints(tmp_path / "checkpoints", key="k").latest()[0]
    assert found is not None
    assert {name.rpartition("/")[0] for name in found.tensors["moments"]} == before.keys() - held
    assert all(weight.requires_grad for weight in model.parameters()), "the model is given back as it came"


def test_the_head_learns_alone_and_then_all_do(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Watching(Frozen):
        def after_backward(self) -> None:
            seen.append({name for name, weight in self._training.model.named_parameters() if weight.grad is not None})

    model = vit()
    done = train(tmp_path, recipe(epochs=3, zero=0), model=model, guests=[Watching(["patch_embed"], 0.5)])
    every = {name for name, _ in model.named_parameters()}
    steps = len(seen)
    opened = seen.index(every - names(model, "patch_embed"))
    assert all(one == {"head.weight", "head.bias"} for one in seen[:opened])
    assert all(one == every - names(model, "patch_embed") for one in seen[opened:])
    assert opened == -(-steps // 2), "after the first step that reaches it"
    told = [event.text for event in done.events if isinstance(event, Said) and "learned alone" in event.text]
    assert told == [f"the head has learned alone for {opened} steps; from here on all but patch_embed learns"]


def test_the_heads_optimizer_state_goes_on_where_it_lies_alone(tmp_path: Path) -> None:
    """Under ZeRO 0, where no vector is shared: the second moments of the head know all steps, those of the rest fewer."""
    train(tmp_path, recipe(epochs=2, zero=0), guests=[Frozen([], 0.5)])
    found = Checkpoints(tmp_path / "checkpoints", key="k").latest()[0]
    assert found is not None
    steps = {name: int(value) for name, value in found.tensors["moments"].items() if name.endswith("/step")}
    assert steps["head.weight/step"] == 14
    assert steps["blocks.0.mlp.fc1.weight/step"] == 7


def test_with_a_cut_the_frozen_blocks_are_cut_too_and_stay_from_then_on(tmp_path: Path) -> None:
    model = vit(depth=3, patch=4)
    guests = [shrinking(model, at=0.3), Frozen(["blocks.0"], 0.2)]
    done = train(tmp_path, recipe(epochs=3), model=model, guests=guests)
    small = done.fitted.model
    assert cost.count(small).macs < 0.51 * cost.count(vit(depth=3, patch=4)).macs
    begun = Checkpoints(tmp_path / "checkpoints", key="k").latest()[0]
    assert begun is not None
    assert not any(name.startswith("blocks.0.") for name in begun.tensors["moments"])
    assert any(name.startswith("blocks.1.") for name in begun.tensors["moments"])


def test_goes_on_bit_for_bit_on_both_sides_of_the_opening(tmp_path: Path) -> None:
    def make(model: nn.Module) -> list:
        return [shrinking(model, at=0.6, drop_path=0.2), Frozen(["patch_embed"], 0.4)]

    whole = joined(tmp_path / "whole", make)
    for after in (8, 12, 9):
        with pytest.raises(Killed):
            joined(tmp_path / "torn", make, at={after: kill}, clock=minutes())
    torn = joined(tmp_path / "torn", make, clock=minutes())
    assert same(whole.fitted.state, torn.fitted.state)


def test_nothing_left_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"train\.freeze: nothing is left"):
        train(tmp_path, recipe(), guests=[Frozen(["*"])])


# ------------------------------------------------------------------------------------------------------- the bill


def flops(model: nn.Module) -> int:
    """MACs of forward and backward of an image, as torch counts them."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # which the counter does not see on a CPU
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 64, 64)).sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "patterns",
    [
        ["patch_embed", "blocks.*", "norm"],
        ["patch_embed", "blocks.0-3"],
        ["patch_embed", "blocks.0-2", "blocks.3.attn", "blocks.3.norm1"],
        ["blocks.2-5"],
        ["blocks.*.attn"],
        ["blocks.*.mlp"],
        ["patch_embed"],
    ],
    ids=lambda patterns: "+".join(patterns),
)
def test_the_bill_is_what_torch_counts(patterns: list[str]) -> None:
    """Within two parts in a hundred of what three forwards count, on the side of more: what reads the first input is billed whole."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=6, num_heads=3)
    forward, whole = cost.count(model).macs, flops(copy.deepcopy(model))
    assert spared(model) == 0
    guest = Frozen(patterns)
    guest.equip(model)
    billed = (3 - spared(model)) * forward
    paid = flops(model)
    assert abs(3 * forward - whole) < 0.02 * 3 * forward
    assert -0.005 * whole < billed - paid < 0.035 * whole
    guest.leave()
    assert spared(model) == 0


def test_a_training_bills_its_two_parts(tmp_path: Path) -> None:
    model = vit()
    guest = Frozen(["patch_embed"], 0.5)
    done = train(tmp_path, recipe(epochs=2), model=model, guests=[guest])
    macs, n = cost.count(model).macs, done.fitted.images_seen
    parts = []
    for probe in (1.0, 0.0):
        one = Frozen(["patch_embed"], probe)
        one.equip(model)
        parts.append(spared(model))
        one.leave()
    forwards, spent = guest.bill()
    assert forwards == pytest.approx(-(n / 2) * sum(parts))
    assert spent == pytest.approx(forwards * macs)
    assert parts[0] > 1.9
    assert parts[1] < 0.5
