"""The guest that tells which steps' loss jumped."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from tiny import recipe, same, train

from lotus.config import check
from lotus.events import Said
from lotus.training import named
from lotus.training.distributed import World
from lotus.training.guest_shelf import LossSpikes
from lotus.training.guests import Position
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
    wants = recipe(epochs=3, lr=1e-4)
    at = {16: lambda losses: losses + 30}
    plain = train(tmp_path / "plain", wants, at=dict(at))
    beside = train(tmp_path / "beside", wants, at=dict(at), guests=[LossSpikes(8.0, 50)])
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
