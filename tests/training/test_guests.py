"""Guests: every one goes on bit for bit after a kill, in whatever order they are given; and what a guest may do."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from tiny import (
    CLASSES,
    ROWS,
    Batch,
    Killed,
    Memory,
    Outcome,
    ThatPrunes,
    kill,
    minutes,
    pictures,
    recipe,
    same,
    shrinking,
    train,
    vit,
)
from torch import Tensor, nn

import lotus.papers
import lotus.training
from lotus.config import Method, Patches, Sparsity, check
from lotus.data.sample_plan import SamplePlan
from lotus.events import Evaluated, Said, Step
from lotus.papers.sparse_vit.penalty import AttentionPenalty
from lotus.papers.zeros import masks
from lotus.papers.zeros.one_shot import Holding
from lotus.sparsity.gates import Gates
from lotus.training import guest_shelf, guests, named
from lotus.training.average import LateAverage, MovingAverage
from lotus.training.balanced import BalancedClasses
from lotus.training.checkpoint import Checkpoints
from lotus.training.data_pruning import DynamicPruning
from lotus.training.distill import Distiller, Taught, TaughtByUncut
from lotus.training.dynamics import Recorder, Watched
from lotus.training.fewer import FewerPatches
from lotus.training.freeze import Frozen
from lotus.training.growing import GrowingPictures
from lotus.training.guests import Epoch, Guest, Micro, Position, Seen, Training, Turn
from lotus.training.hardest import Hardest, proxy_of
from lotus.training.own_ticket import OwnTicket
from lotus.training.patch_buckets import Joint
from lotus.training.regularize import EarlyBird, Gating
from lotus.training.shrink import Shrink
from lotus.training.spikes import LossSpikes
from lotus.training.tracked import Tracked
from lotus.vit.tokens import Tokens
from selection import methods
from selection.errors import Refused

EPOCHS = 3
FULL = {"epochs": EPOCHS, "accumulate": 2, "mixup": 0.4, "cutmix": 1.0}  # 13 micro-batches an epoch


# ------------------------------------------------------------------------------------------ every one of the house


def _gates(model: nn.Module) -> Gates:
    bird = {"epsilon": 0.999, "epochs": 2}  # ends a training of three epochs after all of them
    return Gates(model, Sparsity(start=0.1, in_channels=True, early_bird=bird), target=0.5)


def _gating(model: nn.Module) -> list[Guest]:
    gates = _gates(model)
    return [Gating(gates), EarlyBird(gates)]


def _fewer(model: nn.Module) -> list[Guest]:
    settings = Patches.model_validate(
        {"mode": "dropout", "keep": 0.61, "joint": {"least": 0.4}, "warmup": 0.2, "ramp": 0.5}
    )
    sharing = Joint(np.random.default_rng(3).random(ROWS), settings, patches=16, seed=0)
    return [FewerPatches(Tokens(model, settings), joint=sharing)]


def _fewer_early(model: nn.Module) -> list[Guest]:
    settings = Patches.model_validate({"mode": "dropout", "keep": 0.5, "until": 0.45, "warmup": 0.1, "ramp": 0.2})
    return [
        FewerPatches(Tokens(model, settings))
    ]  # all patches from the tenth of 21 steps on, the third of the second epoch


def _holding(model: nn.Module) -> list[Guest]:
    masks.put(model, masks.magnitude(masks.listed(model), 0.5))
    return [Holding(model, "linears")]


def _uncut(model: nn.Module) -> list[Guest]:
    teaches = TaughtByUncut(lambda uncut: Distiller(uncut, "soft", 2.0, 0.7))
    return [teaches, shrinking(model, at=0.4, drop_path=0.2)]


def _own_ticket(model: nn.Module) -> list[Guest]:
    shrink = shrinking(model, at=0.4, drop_path=0.2)

    def draw(said: Mapping[str, np.ndarray], _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.sort(np.argsort(said["loss"].sum(0), kind="stable")[: ROWS // 2])
        return rows, np.ones(len(rows), np.float32)

    return [OwnTicket(Recorder(ROWS, EPOCHS, CLASSES, steps=True), draw, shrink.is_done), shrink]


GUESTS: dict[type[Guest], Callable[[nn.Module], list[Guest]]] = {
    Gating: _gating,
    EarlyBird: _gating,
    AttentionPenalty: lambda model: [AttentionPenalty(model, "entropy", 0.1)],
    Holding: _holding,
    Taught: lambda model: [Taught(Distiller(vit(seed=3, patch=4), "soft", 2.0, 0.7))],
    TaughtByUncut: _uncut,
    Frozen: lambda model: [Frozen(["patch_embed"], 0.4)],
    Watched: lambda model: [Watched(Recorder(ROWS, EPOCHS, CLASSES, steps=True))],
    DynamicPruning: lambda model: [DynamicPruning(ThatPrunes({"name": "infobatch", "saving": 0.3}, EPOCHS))],
    FewerPatches: _fewer,
    MovingAverage: lambda model: [MovingAverage(0.9)],
    BalancedClasses: lambda model: [BalancedClasses("equal", pictures()[1].numpy(), 3)],
    LateAverage: lambda model: [LateAverage(0.4, 2)],
    LossSpikes: lambda model: [LossSpikes(8.0, 50)],
    GrowingPictures: lambda model: [GrowingPictures([(0, 8), (0.4, 12), (0.7, 16)])],
    Shrink: lambda model: [shrinking(model, at=0.4, drop_path=0.2)],
    OwnTicket: _own_ticket,
    Tracked: lambda model: [Tracked("service", lambda: (lambda values, step: None, lambda: None), 3)],
    Hardest: lambda model: [Hardest(proxy_of(model, CLASSES, 0.3, 5), 0.5, 1e-3)],
}  # fmt: skip
QUICK = (Gating, DynamicPruning, FewerPatches)
"""The rest goes on with the slow tests; Watched and Shrink do so in test_own_ticket.py too."""


def every() -> list[type[Guest]]:
    """All guests that lotus has, read from its modules."""
    for package in (lotus.training, lotus.papers):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)

    def below(kind: type[Guest]) -> Iterator[type[Guest]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    return [kind for kind in below(Guest) if kind.__module__.startswith("lotus.")]


def joined(folder: Path, make: Callable[[nn.Module], list[Guest]], **more: Any) -> Outcome:
    model = vit(0.2, patch=4)
    settings = recipe(**FULL, save_minutes=0.5)
    return train(folder, settings, model=model, guests=make(model), weighted=True, **more)


def bits(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Such that NaN is like NaN."""
    return {name: value.contiguous().flatten().view(torch.uint8) for name, value in state.items()}


def test_each_guest_of_the_house_is_tested_here() -> None:
    assert set(every()) == set(GUESTS), "say in GUESTS how it is made"


def goes_on(tmp_path: Path, make: Callable[[nn.Module], list[Guest]]) -> None:
    whole = joined(tmp_path / "whole", make)
    for after in (16, 5):  # in the second epoch; then once more, five micro-batches after the checkpoint
        with pytest.raises(Killed):
            joined(tmp_path / "torn", make, at={after: kill}, clock=minutes())
    torn = joined(tmp_path / "torn", make, clock=minutes())
    assert any("goes on after step" in event.text for event in torn.events if isinstance(event, Said))
    assert same(whole.fitted.state, torn.fitted.state)
    for name in ("top1", "loss", "images_seen", "steps", "epochs", "macs"):
        assert getattr(whole.fitted, name) == getattr(torn.fitted, name), name
    ends = [Checkpoints(tmp_path / name / "checkpoints", key="k").latest()[0] for name in ("whole", "torn")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    for name, tensors in ends[0].tensors.items():
        assert same(bits(tensors), bits(ends[1].tensors[name])), name


@pytest.mark.parametrize("kind", few(GUESTS, QUICK), ids=lambda kind: kind.__name__)
def test_each_goes_on_bit_for_bit(tmp_path: Path, kind: type[Guest]) -> None:
    goes_on(tmp_path, GUESTS[kind])


def test_it_goes_on_bit_for_bit_where_all_patches_come_back(tmp_path: Path) -> None:
    goes_on(tmp_path, _fewer_early)


@pytest.mark.parametrize("name", methods.names(guest_shelf))
def test_each_of_the_shelf_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    def make(model: nn.Module) -> list[Guest]:
        wanted = (Method(name=name),)
        named.check(wanted, (), place="train.guests")
        here = {
            "model": model, "recipe": recipe(**FULL), "rows": np.arange(ROWS), "labels": np.arange(ROWS) % CLASSES,
            "classes": CLASSES, "seed": 5, "world": None,
        }  # fmt: skip
        return named.chosen(wanted, here, (), place="train.guests")

    goes_on(tmp_path, make)


# -------------------------------------------------------------------------------------------------------- the order


def test_in_whatever_order_they_are_given_they_meet_a_loss_in_the_same(tmp_path: Path) -> None:
    def run(folder: Path, backwards: bool) -> dict[str, Tensor]:
        model = vit(patch=4)
        kinds = (AttentionPenalty, Watched, FewerPatches, Taught, MovingAverage)
        inside = [guest for kind in kinds for guest in GUESTS[kind](model)] + _gating(model)
        return train(folder, recipe(**FULL), model=model, guests=inside[::-1] if backwards else inside).fitted.state

    assert same(run(tmp_path / "a", False), run(tmp_path / "b", True))


def test_the_loss_that_is_remembered_is_the_taught_one_without_penalty_and_weights() -> None:
    """By hand, on one batch: teacher, then memory, then penalty."""
    found: list[str] = []

    class Noting(Guest):
        def __init__(self, turn: Turn, name: str) -> None:
            self.turn, self.name = turn, name  # type: ignore[misc]

        def losses(self, losses: Tensor, seen: Seen) -> Tensor:
            found.append(self.name)
            return losses

    given = [Noting(turn, turn.name.lower()) for turn in reversed(Turn)]
    for guest in guests.in_order(given):
        guest.losses(torch.zeros(1), None)  # type: ignore[arg-type]
    assert found == ["teach", "watch", "penalize", "last"]
    turns = {kind: kind.turn for kind in GUESTS}
    assert turns[Taught] < turns[DynamicPruning] == turns[Watched] < turns[AttentionPenalty]


def test_dynamic_data_pruning_is_told_the_taught_loss_without_the_penalty(tmp_path: Path) -> None:
    """Against the definition, where the step is too small to move the model."""
    still = recipe(epochs=1, optimizer="sgd", lr=1e-30, warmup_epochs=0, weight_decay=0, clip=0, zero=0)
    model, dynamic = vit(patch=4), ThatPrunes("repb", 1)
    inside = [*GUESTS[AttentionPenalty](model), DynamicPruning(dynamic), *GUESTS[Taught](model)]
    train(tmp_path, still, model=model, guests=inside, weighted=True)
    model, teacher, (images, labels) = vit(patch=4), vit(seed=3, patch=4), pictures()
    with torch.no_grad():
        own = nn.functional.cross_entropy(model.eval()(images), labels, reduction="none", label_smoothing=0.1)
        p, q = (one.eval()(images).div(2).log_softmax(1) for one in (model, teacher))
        taught = 4 * (q.exp() * (q - p)).sum(1)
    np.testing.assert_allclose(dynamic.known()["loss"], (0.3 * own + 0.7 * taught).numpy(), rtol=1e-3)


# ---------------------------------------------------------------------------------------------- what a guest may do


def test_a_guest_that_overrides_nothing_changes_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", recipe())
    beside = train(tmp_path / "beside", recipe(), guests=[Guest()])
    assert same(plain.fitted.state, beside.fitted.state)
    ends = [[event for event in run.events if isinstance(event, Evaluated)] for run in (plain, beside)]
    assert ends[0] == ends[1]


class Log(Guest):
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def attach(self, training: Training) -> None:
        self.said.append(("attach", training.stage, training.place, type(training.model).__name__))

    def leave(self) -> None:
        self.said.append("leave")

    def before_step(self, progress: float, group: int) -> None:
        self.said.append(("before", round(progress, 3)))

    def after_backward(self) -> None:
        self.said.append("backward")

    def after_step(self, at: Position, progress: float, finite: Any) -> None:
        self.said.append(("after", round(progress, 3), finite))

    def end_epoch(self, epoch: int) -> None:
        self.said.append(("end", epoch))

    def close_epoch(self, at: Position) -> Iterator[str]:
        self.said.append(("close", at.epoch, at.top1 > 0))
        yield "said by a guest"

    def summary(self) -> dict[str, float]:
        return {"seven": 7.0}

    def macs(self, macs: float) -> float:
        return macs + 10


def test_the_moments_of_a_training(tmp_path: Path) -> None:
    log = Log()
    done = train(tmp_path, recipe(epochs=1, batch_size=26), at={0: lambda losses: losses * math.nan}, guests=[log])
    assert log.said == [
        ("attach", "train", "train", "VisionTransformer"),
        ("before", 0.0), "backward", ("after", 0.0, False),
        ("before", 0.0), "backward", ("after", 0.5, True),
        ("end", 0), ("close", 0, True), "leave",
    ]  # fmt: skip
    assert [event.text for event in done.events if isinstance(event, Said)][-1] == "epoch 1: said by a guest"
    assert [event for event in done.events if isinstance(event, Step)][-1].values["seven"] == 7
    assert done.fitted.macs == 10 * ROWS


def test_it_is_let_go_however_a_training_ends(tmp_path: Path) -> None:
    log = Log()
    with pytest.raises(Killed):
        train(tmp_path, recipe(), at={2: kill}, guests=[log])
    assert log.said[-1] == "leave"


class Shorter(Guest):
    """Takes the last block away when a fraction of the training is done, and lets the optimizer remember the rest."""

    def __init__(self, at: float) -> None:
        self.at, self.done = at, False

    def due(self, at: Position, progress: float) -> bool:
        return not self.done and progress >= self.at

    def replace(self, model: Any, moments: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
        self.done, last = True, f"blocks.{len(model.blocks) - 1}."
        assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in model.parameters())
        model.blocks = model.blocks[:-1]
        return model, {name: value for name, value in moments.items() if not name.startswith(last)}

    def rebuilt(self, model: Any, state: Mapping[str, Tensor]) -> nn.Module:
        if state:
            model.blocks = model.blocks[:-1]
        return model

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(1)} if self.done else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.done = True


REPLACED = [{"zero": 0}, {"zero": 1, "ema": 0.9}, {"zero": 2, "precision": "bf16"}]


@pytest.mark.parametrize("changed", few(REPLACED, REPLACED[1:2]), ids=str)
def test_a_model_may_be_replaced_in_the_middle_of_an_epoch(tmp_path: Path, changed: dict[str, Any]) -> None:
    settings = recipe(**{**FULL, **changed}, save_minutes=0.5)

    def run(folder: Path, **more: Any) -> Outcome:
        return train(folder, settings, guests=[Shorter(0.4)], **more)

    whole = run(tmp_path / "whole")
    assert whole.fitted.steps == 7 * EPOCHS, "one schedule on both sides"
    assert len(whole.fitted.model.blocks) == 1  # type: ignore[arg-type]
    assert not any(name.startswith("blocks.1.") for name in whole.fitted.state)
    assert same(dict(whole.fitted.model.state_dict()), whole.fitted.state)
    rates = [event.values["lr"] for event in whole.events if isinstance(event, Step)]
    kept, _ = Checkpoints(tmp_path / "whole" / "checkpoints", key="k").latest()
    assert kept is not None
    assert kept.tensors["weights"].keys() == whole.fitted.state.keys(), "the checkpoint holds the small model"
    assert rates[-1] < 1e-4
    for after in (14, 6, 8):  # before it, on the way to it, after it
        with pytest.raises(Killed):
            run(tmp_path / "torn", at={after: kill}, clock=minutes())
    torn = run(tmp_path / "torn", clock=minutes())
    assert same(whole.fitted.state, torn.fitted.state)
    assert whole.fitted.top1 == torn.fitted.top1


def test_what_the_optimizer_remembers_is_carried_over(tmp_path: Path) -> None:
    """A replacement by the same model changes nothing, to the bit; one that forgets does."""

    class Same(Shorter):
        def replace(self, model: Any, moments: Mapping[str, Tensor]) -> tuple[nn.Module, Any]:
            self.done = True
            return model, moments

    class Forgetful(Shorter):
        def replace(self, model: Any, moments: Mapping[str, Tensor]) -> tuple[nn.Module, Any]:
            self.done = True
            return model, {}

    plain = train(tmp_path / "plain", recipe()).fitted.state
    assert same(plain, train(tmp_path / "same", recipe(), guests=[Same(0.3)]).fitted.state)
    assert not same(plain, train(tmp_path / "forgetful", recipe(), guests=[Forgetful(0.3)]).fitted.state)


def test_an_epoch_may_be_of_another_side_and_of_other_rows(tmp_path: Path) -> None:
    class Growing(Guest):
        def before_epoch(self, epoch: Epoch) -> Epoch:
            return dataclasses.replace(epoch, rows=epoch.rows[: 16 * (epoch.number + 1)], side=8 * (epoch.number + 1))

    class Resizing(Memory):
        def epoch(self, epoch: int, skip: int = 0, side: int | None = None) -> Iterator[Batch]:
            assert side is not None
            for batch in super().epoch(epoch, skip):
                seen.append((epoch, side, len(batch.index)))
                small = nn.functional.interpolate(batch.images, side)
                yield batch._replace(images=nn.functional.interpolate(small, 16))

    seen: list[tuple[int, int, int]] = []
    plan = SamplePlan(np.arange(ROWS), seed=5, batch_size=8)
    done = train(tmp_path, recipe(), plan=plan, loader=Resizing(plan), guests=[Growing()])
    assert seen == [(0, 8, 8)] * 2 + [(1, 16, 8)] * 4
    assert done.fitted.images_seen == 48


def test_a_guest_may_show_a_part_of_a_batch(tmp_path: Path) -> None:
    class Half(Guest):
        def show(self, batch: Any, micro: Micro) -> Any:
            return Batch(*(value[: len(value) // 2] for value in batch))

        def losses(self, losses: Tensor, seen: Seen) -> Tensor:
            sizes.append(len(losses))
            return 2 * losses

    sizes: list[int] = []
    done = train(tmp_path, recipe(epochs=1), guests=[Half()])
    assert sizes == [4] * 6 + [2]
    assert done.fitted.images_seen == ROWS // 2
    assert isinstance([event for event in done.events if isinstance(event, Evaluated)][-1], Evaluated)


def test_a_late_average_is_the_mean_of_the_weights_that_were_taken(tmp_path: Path) -> None:
    taken: list[dict[str, Tensor]] = []

    class Copying(Guest):
        def attach(self, training: Training) -> None:
            self.engine = training.engine

        def after_step(self, at: Position, progress: float, finite: Any) -> None:
            if progress >= 0.5 and at.step % 3 == 0:
                taken.append(self.engine.weights())

    done = train(tmp_path, recipe(), guests=[LateAverage(0.5, 3), Copying()])
    assert len(taken) == 2
    for name, value in done.fitted.state.items():
        torch.testing.assert_close(value, sum(one[name] for one in taken) / 2, atol=1e-7, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- bad input, names


@pytest.mark.parametrize(("name", "says"), [("moments", "cannot name a file"), ("a/b", "cannot name a file")])
def test_names_that_no_checkpoint_can_hold_are_refused(name: str, says: str) -> None:
    class Bad(Guest):
        pass

    Bad.name = name
    with pytest.raises(Refused, match=says):
        guests.in_order([Bad()])
    with pytest.raises(Refused, match="two are called 'log'"):
        guests.in_order([Log(), Log()])


def test_what_a_config_names_is_found_or_refused_with_its_place(tmp_path: Path) -> None:
    import types

    mine = types.ModuleType("mine")
    exec(
        "def plain(recipe, *, often: int = 3):\n    return recipe, often\n\ndef odd(weather):\n    return weather\n",
        vars(mine),
    )
    page = check({"train": {"guests": ["late_average", {"name": "plain", "often": 4}]}})
    assert [one.name for one in page.train.guests] == ["late_average", "plain"]
    assert page.finetune.guests == page.score.guests == (), "they join the training that names them alone"
    named.check(page.train.guests, [mine], place="train.guests")
    for wanted, says in (
        ({"name": "late_avrage"}, r"train\.guests: there is no 'late_avrage'.*late_average"),
        ({"name": "late_average", "evry": 2}, r"train\.guests\.late_average\.evry.*every"),
        ({"name": "odd"}, r"train\.guests: 'odd' reads weather"),
    ):
        with pytest.raises(Refused, match=says):
            named.check([Method(**wanted)], [mine], place="train.guests")
    with pytest.raises(Refused, match=r"train\.guests: 'plain' .*tuple"):
        named.chosen([Method(name="plain")], {"recipe": recipe()}, [mine], place="train.guests")
    with pytest.raises(Refused, match=r"score\.?.*guests"):
        check({"score": {"proxy": "linear_probe", "guests": ["late_average"]}})
