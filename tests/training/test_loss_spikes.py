"""The guest that tells which steps' loss jumped."""

from __future__ import annotations

import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from tiny import ROWS, Killed, kill, minutes, recipe, same, train

from lotus.config import check
from lotus.data.sample_plan import SamplePlan
from lotus.events import Rewound, Said
from lotus.training import named, spikes
from lotus.training.distributed import World
from lotus.training.guests import Epoch, Guest, Position, Turn
from lotus.training.spikes import BACK, LossSpikes
from selection.errors import Refused


def seen(rows: Any) -> Any:
    return types.SimpleNamespace(batch=types.SimpleNamespace(index=torch.as_tensor(rows)))


def watching(times: float = 8.0, window: int = 50, world: World | None = None) -> LossSpikes:
    guest = LossSpikes(times, window)
    guest.attach(types.SimpleNamespace(world=world or World()))  # type: ignore[arg-type]
    return guest


def goes(guest: LossSpikes, number: int, losses: Any, rows: Any, finite: bool = True) -> None:
    """A step of two micro-batches."""
    losses, rows = torch.as_tensor(losses, dtype=torch.float32), torch.as_tensor(rows)
    half = len(losses) // 2
    for part in (slice(0, half), slice(half, None)):
        assert guest.losses(losses[part], seen(rows[part])) is not None
    guest.after_step(Position(step=number), 0.5, finite)


def by_hand(steps: list[np.ndarray], times: float, window: int) -> list[int]:
    """Numbers of the steps that jump, from 1, by the definition."""
    found, means = [], [float(np.float32(step).astype(float).mean()) for step in steps]
    for number, mean in enumerate(means):
        before = means[max(0, number - window) : number]
        usual = np.median(before) if before else 0.0
        spread = 1.4826 * np.median([abs(one - usual) for one in before]) if before else 0.0
        if len(before) >= 8 and mean > usual + times * spread:
            found.append(number + 1)
    return found


@tries(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), epochs=st.integers(1, 4), window=st.sampled_from([8, 13, 50]))
def test_it_tells_the_steps_of_the_definition_whatever_the_epochs(seed: int, epochs: int, window: int) -> None:
    rng = np.random.default_rng(seed)
    steps = [rng.gamma(4, size=6) * (9 if rng.random() < 0.1 else 1) for _ in range(40)]
    guest, told = watching(3.0, window), list[int]()
    for number, losses in enumerate(steps, 1):
        goes(guest, number, losses, np.arange(6))
        if number % (len(steps) // epochs) == 0:
            for text in guest.close_epoch(Position(step=number)):
                count = int(text.split()[0])
                numbers = [int(part.split()[1].rstrip(",")) for part in text.partition(": ")[2].split("; ")]
                assert len(numbers) == min(3, count)
                told += numbers + [0] * (count - len(numbers))
    expected = by_hand(steps[: len(steps) // epochs * epochs], 3.0, window)
    assert len(told) == len(expected)
    assert {number for number in told if number} <= set(expected)


def test_it_names_the_step_and_the_image(tmp_path: Path) -> None:
    guest = watching()
    for number in range(1, 21):
        losses = np.full(6, 2.0) + 0.01 * (number % 3)
        losses[4] += 50 * (number == 17)
        goes(guest, number, losses, np.arange(6) + 100)
    (text,) = guest.close_epoch(Position(step=20))
    assert text.startswith("1 loss spike: step 17, 10.4 where 2.01 is usual (row 104: 52")
    assert list(guest.close_epoch(Position(step=20))) == [], "an epoch is told once"


def test_a_step_that_was_not_finite_is_the_loops_to_tell() -> None:
    guest = watching()
    for number in range(1, 12):
        goes(
            guest, number, np.full(4, np.inf if number == 10 else 1.0 + 0.1 * (number % 2)), np.arange(4), number != 10
        )
    assert list(guest.close_epoch(Position(step=11))) == []


def test_ranks_are_taken_together_and_come_back_on_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    steps, rows = rng.gamma(4, size=(12, 8)), rng.permutation(96).reshape(12, 8)
    alone, both = watching(), [watching(world=World(rank=rank, size=2)) for rank in range(2)]
    for number in range(12):
        goes(alone, number, steps[number], rows[number])
        for rank, guest in enumerate(both):
            goes(guest, number, steps[number, rank::2], rows[number, rank::2])
    expected = alone.state()

    def together() -> list[torch.Tensor]:
        """What each rank says of all of them."""
        handed: list[torch.Tensor] = []
        monkeypatch.setattr(World, "gather", lambda self, own: handed.append(own) or [own])  # type: ignore[func-returns-value]
        for guest in both:
            guest.state()
        monkeypatch.setattr(World, "gather", lambda self, own: handed)
        return [guest.state()["steps"] for guest in both]

    np.testing.assert_allclose(together()[0].numpy(), expected["steps"].numpy(), rtol=1e-12)
    for guest in both:
        guest.load_state(expected)
    assert torch.equal(together()[1], expected["steps"])


def test_a_training_with_a_broken_batch_is_told_it_and_goes_as_without(tmp_path: Path) -> None:
    asked = recipe(epochs=3, lr=1e-4)
    at = {16: lambda losses: losses + 30}
    plain = train(tmp_path / "plain", asked, at=dict(at))
    beside = train(tmp_path / "beside", asked, at=dict(at), guests=[LossSpikes(8.0, 50)])
    assert same(plain.fitted.state, beside.fitted.state)
    said = [event.text for event in beside.events if isinstance(event, Said) and "spike" in event.text]
    assert said, [event for event in beside.events if isinstance(event, Said)]
    assert "step 17," in said[-1]


@pytest.mark.parametrize(
    ("settings", "says"), [({"times": 0}, "times"), ({"window": 7}, "window"), ({"windw": 9}, "windw")]
)
def test_what_cannot_be_is_refused_before_anything_is_made(settings: dict[str, float], says: str) -> None:
    page = check({"train": {"guests": [{"name": "loss_spikes", **settings}]}})
    with pytest.raises(Refused, match=rf"^train\.guests\.loss_spikes\.{says}: "):
        named.check(page.train.guests, (), place="train.guests")


# ------------------------------------------------------------------------------------------------- what becomes of them

AT = 1
BAD = int(SamplePlan(np.arange(ROWS), seed=5, batch_size=8).order(AT)[8 * 4 + 3])
"""A row whose loss is 30 nats more in this epoch, in its fifth step."""


class Worse(Guest):
    """Makes it so, whichever step of whatever process it is in."""

    turn = Turn.TEACH

    def __init__(self, more: float = 30.0) -> None:
        self._more = more

    def before_epoch(self, epoch: Epoch) -> Epoch:
        self._here = epoch.number == AT
        return epoch

    def losses(self, losses: torch.Tensor, seen: Any) -> torch.Tensor:
        more = torch.where(seen.batch.index == BAD, self._more, 0.0)
        return losses + more if self._here else losses


def acting(folder: Path, how: str | None, more: float = 30.0, events: list[Any] | None = None, **rest: Any) -> Any:
    """A training with the bad row, begun once more whenever it is rewound, as the run does."""
    asked = recipe(epochs=3, lr=1e-4, on_spike=how, **rest.pop("asked", {}))
    events = [] if events is None else events
    for _ in range(9):
        watching = [LossSpikes(8.0, 50, acts=True)] if how else []
        try:
            return train(folder, asked, guests=[Worse(more), *watching], events=events, weighted=True, **rest)
        except Rewound as rewound:
            events.append(Said("train", str(rewound)))
    raise AssertionError("it never ends")


def bad_step() -> tuple[int, Any]:
    """The step with the bad row, from 0, and all its rows."""
    plan = SamplePlan(np.arange(ROWS), seed=5, batch_size=8)
    order = plan.order(AT)
    step = int(np.flatnonzero(order == BAD)[0]) // 8
    return plan.steps() * AT + step, order[8 * step : 8 * step + 8]


@pytest.mark.parametrize("more", few([30.0, np.nan], [30.0]))
@pytest.mark.parametrize("zero", few([0, 1, 2, 3], [0, 1]))
def test_skip_leaves_the_weights_as_a_step_that_is_not_finite_does(tmp_path: Path, zero: int, more: float) -> None:
    step, rows = bad_step()
    done = acting(tmp_path / "skip", "skip", more, asked={"zero": zero})
    plain = train(
        tmp_path / "plain",
        recipe(epochs=3, lr=1e-4, zero=zero),
        at={step: lambda losses: losses * torch.nan},
        weighted=True,
    )
    assert same(done.fitted.state, plain.fitted.state)
    (said,) = [event.text for event in done.events if isinstance(event, Said) and "skipped" in event.text]
    assert said.startswith(f"step {step + 1}, learning rate ")
    assert f"(row {BAD}: " in said
    assert said.endswith(f"its images: rows {', '.join(map(str, rows))}")


def test_stop_ends_it_and_says_where(tmp_path: Path) -> None:
    step, _ = bad_step()
    for _ in range(2):  # and once more from its checkpoint
        with pytest.raises(Refused, match=rf"step {step + 1}, .*row {BAD}.*on_spike=skip"):
            acting(tmp_path, "stop")


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """A training that goes back once and that nobody kills, and what happened in it."""
    events: list[Any] = []
    return acting(tmp_path_factory.mktemp("rewound"), "rewind", events=events), events


def test_rewind_passes_over_what_led_there_and_a_kill_changes_nothing(
    tmp_path: Path, rewound: tuple[Any, list[Any]]
) -> None:
    step, _ = bad_step()
    done, events = rewound
    first = max(7 * AT, step + 1 - BACK)
    assert f"goes back to before step {first + 1}, and passes over the steps to {step + 1}" in [
        event.text for event in events if isinstance(event, Said)
    ]
    assert done.fitted.steps == 21
    assert done.fitted.images_seen == 3 * ROWS - 8 * (step + 1 - first)
    for kills in ([step], [first, 2, 3]):
        folder = tmp_path / "-".join(map(str, kills))
        for after in kills:
            with pytest.raises(Killed):
                acting(folder, "rewind", at={after: kill}, clock=minutes(), asked={"save_minutes": 0.1})
        again = acting(folder, "rewind", clock=minutes(), asked={"save_minutes": 0.1})
        assert same(again.fitted.state, done.fitted.state), kills
        assert again.fitted.images_seen == done.fitted.images_seen


def test_what_is_passed_over_is_not_trained_on(tmp_path: Path, rewound: tuple[Any, list[Any]]) -> None:
    """Against a training in which a guest shows nothing of those steps: the rows have no weight at all there."""
    step, _ = bad_step()
    done, _ = rewound
    first = max(7 * AT, step + 1 - BACK)
    none = dict.fromkeys(range(first, step + 1), lambda losses: losses * torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "TOO_MANY", 99)
        plain = train(tmp_path / "plain", recipe(epochs=3, lr=1e-4), at=none, weighted=True)
    assert same(done.fitted.state, plain.fitted.state)


def test_a_row_that_spikes_wherever_it_comes_ends_after_three_rewinds(tmp_path: Path) -> None:
    class Always(Guest):
        turn = Turn.TEACH

        def losses(self, losses: torch.Tensor, seen: Any) -> torch.Tensor:
            return losses * torch.nan

    asked = recipe(epochs=1, lr=1e-4, on_spike="rewind")
    told: list[str] = []
    for _ in range(5):
        try:
            train(tmp_path, asked, guests=[Always(), LossSpikes(8.0, 50, acts=True)])
        except (Rewound, Refused) as end:
            told.append(f"{type(end).__name__}: {end}")
    assert [text.split(":")[0] for text in told] == ["Rewound"] * 3 + ["Refused"] * 2
    assert "after 3 rewinds in this epoch" in told[-1]


def test_ranks_agree_on_what_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [LossSpikes(8.0, 50, acts=True) for _ in range(2)]
    for rank, guest in enumerate(both):
        guest.attach(types.SimpleNamespace(world=World(rank=rank, size=2)))  # type: ignore[arg-type]
    sent, meet = [torch.empty(0)] * 2, threading.Barrier(2, timeout=30)

    def gather(self: World, own: torch.Tensor) -> list[torch.Tensor]:
        sent[self.rank] = own
        meet.wait()
        every = list(sent)
        meet.wait()  # nobody sends again before the other has read
        return every

    def step(rank: int, number: int) -> torch.Tensor:
        mine = np.full(4, 2 + 0.01 * (number % 3)) + (50 * (rank == 1 and number == 11))
        both[rank].show(None, types.SimpleNamespace(epoch=0, number=number, last=True))  # type: ignore[arg-type]
        given = both[rank].losses(torch.as_tensor(mine), seen([0, 1, 2, 3]))
        both[rank].after_step(Position(step=number + 1), 0.5, number < 11)
        return given

    monkeypatch.setattr(World, "gather", gather)
    with ThreadPoolExecutor(2) as ranks:
        for number in range(12):
            given = list(ranks.map(step, range(2), [number] * 2))
    assert [bool(one.isnan().all()) for one in given] == [True, True]
    assert both[0].spoiled() == both[1].spoiled() != ""
