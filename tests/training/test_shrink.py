"""A training that shrinks: what it cuts, what it carries over, that it goes on, and on how many ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from few import few
from ranks import two_ranks
from safetensors.torch import load_file
from test_guests import FULL
from tiny import SHRINKING, Killed, Outcome, asked, kill, minutes, pictures, recipe, same, shrinking, shrunk, train, vit
from torch import Tensor, nn

from lotus.config import Patches
from lotus.events import Said, Step
from lotus.pruning import lottery
from lotus.training import shrink
from lotus.training.average import LateAverage, MovingAverage
from lotus.training.checkpoint import Checkpoints
from lotus.training.evaluation import Stopped
from lotus.training.fewer import FewerPatches
from lotus.training.guests import Guest, Position, Training
from lotus.training.shrink import Shrink
from lotus.vit import anatomy, cost
from lotus.vit.tokens import Tokens
from selection.errors import Refused


def run(
    folder: Path, more: dict[str, Any] | None = None, request: dict[str, Any] | None = None, **rest: Any
) -> Outcome:
    """Three epochs of thirteen micro-batches, seven steps each; cut after step 9."""
    model = vit(0.2, patch=4)
    guest = shrinking(model, **{"at": 0.4, **(request or {})})
    done = train(folder, recipe(**{**FULL, **(more or {})}, save_minutes=0.5), model=model, guests=[guest], **rest)
    done.events.append(guest)  # type: ignore[arg-type]
    return done


def guest_of(done: Outcome) -> Shrink:
    found = done.events[-1]
    assert isinstance(found, Shrink)
    return found


def test_one_schedule_and_the_budget_on_both_sides(tmp_path: Path) -> None:
    done = run(tmp_path)
    dense, small = cost.count(vit(patch=4)).macs, cost.count(done.fitted.model).macs
    assert done.fitted.steps == 21
    assert 0.4 < small / dense <= 0.5
    (cut,) = guest_of(done).cuts
    assert (cut["step"], cut["after"]["macs"], cut["before"]["macs"]) == (9, small, dense)
    rates = [event.values["lr"] for event in done.events if isinstance(event, Step)]
    assert rates[-1] < 1e-4
    seen = 52 + 16  # two epochs of 52 images, 52 / 7 steps an epoch of 8 each: 9 steps are 52 and 16
    assert done.fitted.macs == seen * dense + (3 * 52 - seen) * small
    said = [event.text for event in done.events if isinstance(event, Said)]
    assert sum("cut after step 9, in epoch 2" in text for text in said) == 1
    assert guest_of(done).bill() == (4 * 52, 4 * 52 * dense), "rotation, and forward and backward"


LAYOUTS: list[dict[str, Any]] = [
    {"zero": 0}, {"zero": 1, "ema": 0.9}, {"zero": 2, "precision": "bf16"}, {"zero": 3},
    {"zero": 0, "optimizer": "muon"}, {"zero": 1, "optimizer": "muon", "precision": "bf16"},
    {"zero": 3, "optimizer": "muon"}, {"zero": 0, "optimizer": "momentum"},
]  # fmt: skip


@pytest.mark.slow  # that one goes on, with its own ticket: test_own_ticket.py
@pytest.mark.parametrize("more", LAYOUTS, ids=str)
def test_a_killed_one_goes_on_bit_for_bit(
    tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", more)
    for after in (14, 2):  # before the cut
        with pytest.raises(Killed):
            run(tmp_path / "torn", more, at={after: kill}, clock=minutes())
    for moment in ("moments_of", "sentence"):  # in it, and when it is done and not saved yet
        with monkeypatch.context() as patch:
            patch.setattr(shrink, moment, lambda *_: kill(torch.zeros(1)))
            with pytest.raises(Killed):
                run(tmp_path / "torn", more, clock=minutes())
    kept, _ = Checkpoints(tmp_path / "torn" / "checkpoints", key="k").latest()
    assert kept is not None
    assert "shrink" not in kept.tensors
    with pytest.raises(Killed):  # right after it: at the first micro-batch of the small model, or soon
        run(tmp_path / "torn", more, at={6: kill}, clock=lambda: 0.0)
    kept, _ = Checkpoints(tmp_path / "torn" / "checkpoints", key="k").latest()
    assert kept is not None
    torn = run(tmp_path / "torn", more, clock=minutes())
    assert same(whole.fitted.state, torn.fitted.state)
    assert whole.fitted.top1 == torn.fitted.top1
    assert guest_of(whole).cuts == guest_of(torn).cuts
    assert guest_of(whole).bill() == guest_of(torn).bill()


STOPPED: list[dict[str, Any]] = [
    {"zero": 1, "ema": 0.9}, {"zero": 0, "optimizer": "muon", "precision": "bf16"}, {"zero": 3},
]  # fmt: skip


@pytest.mark.parametrize("more", few(STOPPED, STOPPED[:1]), ids=str)
def test_stopped_while_it_is_cut_it_is_saved_and_the_cut_comes_first(
    tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", more)

    def stopping() -> Iterator[tuple[Tensor, Tensor]]:
        yield pictures()
        raise Stopped("asked")

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "lottery", lambda model, _, request, **rest: lottery(model, stopping, request, **rest))
        with pytest.raises(Stopped, match=r"after step 9 of 21, saved to"):
            run(tmp_path / "torn", more)
    torn = run(tmp_path / "torn", more)
    assert same(whole.fitted.state, torn.fitted.state)
    assert guest_of(whole).cuts == guest_of(torn).cuts
    assert guest_of(whole).bill() == guest_of(torn).bill()


def test_it_is_saved_at_once(tmp_path: Path) -> None:
    """A checkpoint of the small model stands before its first step."""
    with pytest.raises(Killed):
        run(tmp_path, at={17: kill}, clock=lambda: 0.0)
    kept, _ = Checkpoints(tmp_path / "checkpoints", key="k").latest()
    assert kept is not None
    assert (kept.state["step"], kept.state["epoch"]) == (9, 1)
    assert kept.tensors["weights"]["blocks.0.mlp.fc1.weight"].shape[0] < 128


class Watching(Guest):
    """Notes what the engine holds right after the model was replaced."""

    name = "watching"

    def attach(self, training: Training) -> None:
        self.training = training

    def due(self, at: Position, progress: float) -> bool:
        self.moments = self.training.engine.moments()
        return False


@pytest.mark.parametrize("zero", few([0, 1, 2, 3], [1]))
def test_what_is_remembered_is_in_the_engine(tmp_path: Path, zero: int) -> None:
    model, watching = vit(patch=4), Watching()
    guest = shrinking(model, at=0.4)
    handed: dict[str, Tensor] = {}

    def replace(model: nn.Module, moments: Any, own: Any = guest.replace) -> Any:
        small, found = own(model, moments)
        handed.update(found)
        return small, found

    guest.replace = replace  # type: ignore[method-assign]
    train(
        tmp_path,
        recipe(epochs=1, zero=zero, optimizer="muon"),
        model=model,
        guests=[guest, watching],
        at={3: lambda losses: losses},
    )
    names = {name.rpartition("/")[0] for name in handed if name.endswith("momentum_buffer")}
    assert {"blocks.0.attn.qkv.weight", "blocks.1.attn.proj.weight", "blocks.0.mlp.fc2.weight"} <= names
    assert "blocks.0.attn.qkv.bias/exp_avg" not in handed, "Adam's, and turned"


def test_vectors_that_count_steps_together_begin_anew_together(tmp_path: Path) -> None:
    """Under ZeRO 1 the biases of q, k and v, which were turned, share their steps with what decays not; under ZeRO 0 they do not."""
    for zero, carried in ((0, True), (1, False)):
        looks: list[dict[str, Tensor]] = []

        class Looking(Watching):
            def before_step(self, progress: float, group: int) -> None:
                if progress >= 0.5:
                    looks.append(self.training.engine.moments())  # noqa: B023 - it does not outlive the turn

        model = vit(patch=4)
        request = recipe(epochs=2, zero=zero, optimizer="muon", warmup_epochs=0)
        train(tmp_path / str(zero), request, model=model, guests=[shrinking(model, at=0.5), Looking()])
        assert ("norm.weight/step" in looks[0]) == carried
        assert "blocks.0.attn.qkv.bias/step" not in looks[0]
        assert "head.weight/step" in looks[0], "of another vector"
        assert looks[1]["blocks.0.attn.qkv.bias/step"] == 1
        assert looks[1]["norm.weight/step"] == (8 if carried else 1)


def test_carrying_is_better_than_beginning_anew_and_can_be_turned_off(tmp_path: Path) -> None:
    on, off = (
        run(tmp_path / str(carry), {"optimizer": "muon"}, {"carry": carry}).fitted.state for carry in (True, False)
    )
    assert on.keys() == off.keys()
    assert not same(on, off)


@pytest.mark.slow
def test_several_cuts_each_a_part_of_the_dense_model(tmp_path: Path) -> None:
    steps = [{"at": 0.2, "keep": {"macs": 0.7}}, {"at": 0.5}]
    request = {"at": None, "steps": steps, "keep": 0.4}
    whole = run(tmp_path / "whole", request=request)
    first, second = guest_of(whole).cuts
    dense = cost.count(vit(patch=4)).macs
    assert first["before"] == second["before"]
    assert 0.6 < first["after"]["macs"] / dense <= 0.7
    assert 0.3 < second["after"]["macs"] / dense <= 0.4
    assert cost.count(whole.fitted.model).macs == second["after"]["macs"]
    for after in (12, 9, 9):  # between them, after both
        with pytest.raises(Killed):
            run(tmp_path / "torn", request=request, at={after: kill}, clock=minutes())
    torn = run(tmp_path / "torn", request=request, clock=minutes())
    assert same(whole.fitted.state, torn.fitted.state)


@pytest.mark.slow
def test_as_soon_as_the_plan_has_settled(tmp_path: Path) -> None:
    request = {"at": 0.9, "until_stable": {"epsilon": 0.9, "epochs": 1}}
    soon = guest_of(run(tmp_path / "soon", {"epochs": 4, "lr": 1e-6}, request))
    assert soon.cuts[0]["step"] == 15, "two plans alike, after the first step of the next epoch"
    late = guest_of(run(tmp_path / "late", {"epochs": 4}, {"at": 0.8, "until_stable": {"epsilon": 1e-9, "epochs": 3}}))
    assert late.cuts[0]["step"] == 23, "0.8 of 28 steps, at the latest"
    assert [one.bill()[0] for one in (soon, late)] == [3 * 208, 4 * 208], "each look is billed"


@pytest.mark.slow
def test_the_stream_is_narrowed_where_a_number_says_so(tmp_path: Path) -> None:
    request = {"prune": {"embed_dim": 0.75}, "drop_path": 0.2}
    whole = run(tmp_path / "whole", request=request)
    assert cost.outline(whole.fitted.model).width == 24
    assert any(getattr(module, "drop_prob", 0) for module in whole.fitted.model.modules())
    with pytest.raises(Killed):
        run(tmp_path / "torn", request=request, at={22: kill}, clock=minutes())
    assert same(whole.fitted.state, run(tmp_path / "torn", request=request, clock=minutes()).fitted.state)


@pytest.mark.parametrize("mode", few(["input", "evit", "tome", "cumulative", "dropout"], ["input"]))
def test_fewer_patches_follow_onto_the_small_model(tmp_path: Path, mode: str) -> None:
    from lotus.vit.patch_scores import contrast

    settings = Patches.model_validate({"mode": mode, "keep": 0.5, **({"at": [0]} if mode == "evit" else {})})

    def go(folder: Path, **more: Any) -> tuple[Outcome, Tokens]:
        model = vit(patch=4)
        guest = shrinking(model, at=0.4)
        tokens = Tokens(model, settings, contrast if mode == "input" else None)
        request = recipe(**FULL, save_minutes=0.5)
        return train(folder, request, model=model, guests=[guest, FewerPatches(tokens)], **more), tokens

    whole, tokens = go(tmp_path / "whole")
    small, dense = whole.fitted.model, vit(patch=4)
    before = Tokens(dense, settings, contrast)
    seen = 52 + 16
    assert whole.fitted.macs == seen * before.macs() + (3 * 52 - seen) * tokens.macs()
    lengths: list[int] = []
    anatomy.blocks(small)[1].fc1.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    small.train()(pictures()[0])
    assert lengths[0] < 17
    with pytest.raises(Killed):
        go(tmp_path / "torn", at={22: kill}, clock=minutes())
    torn, _ = go(tmp_path / "torn", clock=minutes())
    assert same(whole.fitted.state, torn.fitted.state)


def test_averages_begin_anew(tmp_path: Path) -> None:
    for average in (MovingAverage(0.9), LateAverage(0.1, 1)):
        model = vit(patch=4)
        done = train(
            tmp_path / type(average).__name__, recipe(), model=model, guests=[shrinking(model, at=0.4), average]
        )
        assert done.fitted.state.keys() == dict(done.fitted.model.state_dict()).keys()


def test_a_budget_out_of_reach_is_refused_on_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="macs"):
        run(tmp_path, request={"keep": 0.01})


def test_the_cut_is_that_of_lottery_on_the_model_of_then(tmp_path: Path) -> None:
    """What leaves `replace` is what lotus.prune would make of it."""
    model = vit(patch=4).requires_grad_(True)
    guest = shrinking(model, at=0.4)

    class Held:
        stage, place, recipe = "train", "train", recipe()
        from lotus.training.distributed import World

        world = World()

    guest.attach(Held)  # type: ignore[arg-type]
    small, carried = guest.replace(model, {})
    drawn = lottery(model, [pictures()], asked())
    assert same(dict(small.state_dict()), dict(drawn.model.state_dict()))
    assert carried == {}
    again = guest.rebuilt(model, guest.state())
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert all(p.requires_grad for p in small.parameters())


@pytest.mark.slow
def test_two_ranks_shrink_as_one(tmp_path: Path) -> None:
    two_ranks(Path(__file__).parent / "tiny.py", tmp_path, "shrink")
    for name in SHRINKING:
        one = shrunk(tmp_path / f"one-{name}", name).fitted.state
        two = load_file(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(two, one, rtol=0, atol=5e-3)
