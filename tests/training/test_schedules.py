"""Schedules: a law over the shelf, and each against its closed form."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
from tiny import recipe, same, train

from lotus.config import Recipe, check
from lotus.events import Step
from lotus.training import schedules
from lotus.training.optim import make_schedule
from selection import methods
from selection.errors import Refused

READS = {"step", "warm", "total", "peak", "low"}


def rates(steps: int, **settings: object) -> list[float]:
    recipe = Recipe.model_validate({"lr": 2.0, "min_lr": 0.5, "epochs": 4, "warmup_epochs": 1, **settings})
    rate = make_schedule(recipe)
    return [rate(step, steps)[0] for step in range(4 * steps + 2)]


@pytest.mark.parametrize("name", methods.names(schedules))
@pytest.mark.parametrize("warm", [0, 0.5, 2])
def test_every_schedule_is_sound(name: str, warm: float) -> None:
    """Positive until the end, never above the peak, which it reaches, and down to where it ends; it stays there."""
    assert set(methods.reads(getattr(schedules, name))) <= READS
    found = rates(10, schedule=name, warmup_epochs=warm, min_lr=0.0)
    assert all(0 < rate <= 2.0 * (1 + 1e-12) for rate in found[:39])
    assert max(found) == pytest.approx(2.0, rel=0.01), "between two steps, where there is no warm-up"
    assert found[39] < 0.2 * 2.0
    assert found[40] == found[41] <= found[39]
    turn = found.index(max(found))
    assert found[: turn + 1] == sorted(found[: turn + 1])
    assert found[turn:] == sorted(found[turn:], reverse=True)
    assert rates(10, schedule=name, warmup_epochs=4)[-1] >= 0, "nothing but a warm-up"


@pytest.mark.parametrize("epochs", [1, 4, 30])
def test_a_warm_up_may_be_a_fraction_of_the_training(epochs: int) -> None:
    fraction = Recipe(epochs=epochs, warmup_ratio=0.1)
    assert fraction.warmup_epochs is None
    assert fraction.warmup == pytest.approx(epochs / 10)
    same = Recipe(epochs=epochs, warmup_epochs=epochs / 10)
    one, other = (make_schedule(recipe) for recipe in (fraction, same))
    assert [one(step, 10) for step in range(10 * epochs)] == [other(step, 10) for step in range(10 * epochs)]
    assert Recipe.model_validate(fraction.model_dump()) == fraction


def test_linear_is_a_straight_line_to_zero() -> None:
    found = rates(10, schedule="linear")
    assert found[:10] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)])
    assert found[10:41] == pytest.approx([2.0 * (40 - step) / 30 for step in range(10, 41)])


@pytest.mark.parametrize("decay", [0.2, 0.5, 1.0])
def test_wsd_stays_and_then_falls(decay: float) -> None:
    found = rates(10, schedule={"name": "wsd", "decay": decay})
    falls = max(10, round(40 * (1 - decay)))
    assert found[:10] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)])
    assert found[10 : falls + 1] == [2.0] * (falls + 1 - 10)
    down = [2.0 - 1.5 * (step - falls) / (40 - falls) for step in range(falls, 41)]
    assert found[falls:41] == pytest.approx(down)
    assert found[41] == pytest.approx(0.5)


@pytest.mark.parametrize("decay", [0.2, 0.5])
def test_wsd_sqrt_falls_by_one_minus_the_root(decay: float) -> None:
    found, straight = (rates(10, schedule={"name": name, "decay": decay}) for name in ("wsd_sqrt", "wsd"))
    falls = round(40 * (1 - decay))
    assert found[: falls + 1] == straight[: falls + 1]
    part = np.arange(falls, 41) - falls
    np.testing.assert_allclose(found[falls:41], 0.5 + 1.5 * (1 - (part / (40 - falls)) ** 0.5))
    assert all(one < other for one, other in zip(found[falls + 1 : 40], straight[falls + 1 : 40], strict=True))
    assert found[40] == straight[40]


def test_it_is_named_in_a_config_with_its_options_and_written_back_as_it_was() -> None:
    page = check({"train": {"schedule": {"name": "wsd", "decay": 0.3}}, "score": {"schedule": "linear"}})
    assert page.train.schedule.options == {"decay": 0.3}
    dump = page.model_dump(mode="json")
    assert dump["train"]["schedule"] == {"name": "wsd", "decay": 0.3}
    assert dump["score"]["schedule"] == "linear", "a name alone, as in records of earlier versions"
    assert dump["finetune"]["schedule"] == dump["train"]["schedule"], "what is not set there is as in train"
    assert check({}).model_dump(mode="json")["train"]["schedule"] == "cosine"


def test_one_of_ones_own_is_found_in_training(tmp_path: Path) -> None:
    mine = types.ModuleType("mine")
    exec("def steady(peak, *, part: float = 1.0):\n    return part * peak, 0.5\n", vars(mine))
    settings = recipe(epochs=1, schedule={"name": "steady", "part": 0.25}, optimizer="momentum")
    done = train(tmp_path / "a", settings, shelves=[mine])
    assert {event.values["lr"] for event in done.events if isinstance(event, Step)} == {0.25 * 3e-3}
    slow = recipe(epochs=1, schedule="steady", lr=0.25 * 3e-3, optimizer="momentum")
    assert same(done.fitted.state, train(tmp_path / "b", slow, shelves=[mine]).fitted.state)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ("cosin", r"finetune\.schedule: there is no 'cosin'.*'cosine'"),
        ({"name": "wsd", "decai": 1}, r"finetune\.schedule\.decai.*decay"),
        ("weather", r"finetune\.schedule: 'weather' reads wind"),
    ],
)
def test_what_is_not_there_is_refused_with_its_place(schedule: object, says: str) -> None:
    mine = types.ModuleType("mine")
    exec("def weather(wind):\n    return wind\n", vars(mine))
    with pytest.raises(Refused, match=says):
        make_schedule(Recipe.model_validate({"schedule": schedule}), [mine], place="finetune")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("if step > 4: 1 / 0", r"^finetune\.schedule at step 5 \(bad\): ZeroDivisionError: .* \(<string>, line 2\)\.$"),
        ("if step > 4: return None", r"^finetune\.schedule: 'bad' gave None for step 5\. Return a learning rate"),
        ("if step > 4: return 1, 2, 3", r"^finetune\.schedule: 'bad' gave \(1, 2, 3\) for step 5\."),
    ],
)
def test_one_that_goes_wrong_later_is_refused_with_its_step(text: str, says: str) -> None:
    mine = types.ModuleType("mine")
    exec(f"def bad(step):\n    {text}\n    return 1e-3\n", vars(mine))
    rate = make_schedule(Recipe.model_validate({"schedule": "bad"}), [mine], place="finetune")
    assert rate(4, 10) == (1e-3, None)
    with pytest.raises(Refused, match=says):
        rate(5, 10)
