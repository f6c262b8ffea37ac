"""Weights & Biases and MLflow by packages of the same name that write down what they are told: LOTUS depends on neither."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import recipe, train

from lotus.config import Method
from lotus.training import named
from lotus.training.guests import Guest
from selection.errors import Refused


class Service:
    """Both packages at once."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.calls: list[tuple[str, Any]] = []

    def package(self, name: str) -> ModuleType:
        made = ModuleType(name)

        def note(what: str) -> Any:
            return lambda *given, **more: self.calls.append((what, more or given))

        def log(values: dict[str, float], step: int) -> None:
            self.told.append((step, values))

        def init(**more: Any) -> Any:
            self.calls.append(("init", more))
            return SimpleNamespace(log=log, finish=note("end"))

        vars(made).update(
            init=init, log_metrics=log, end_run=note("end"),
            **{what: note(what) for what in ("set_experiment", "start_run", "log_params")},
        )  # fmt: skip
        return made


def made(name: str, **options: Any) -> list[Guest]:
    wanted = (Method(name=name, **options),)
    named.check(wanted, (), place="train.guests")
    return named.chosen(wanted, {"recipe": recipe()}, (), place="train.guests")


@pytest.mark.parametrize(
    ("name", "options", "begins"), [("wandb", {"project": "p", "id": "x"}, "init"), ("mlflow", {"experiment": "e"}, "set_experiment")]
)  # fmt: skip
def test_a_service_is_told_of_steps_and_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], begins: str
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service.package(name))
    fitted = train(tmp_path, recipe(epochs=2), guests=made(name, every=3, **options)).fitted
    assert service.calls[0][0] == begins
    assert service.calls[-1][0] == "end"
    assert [call[0] for call in service.calls].count("end") == 1
    steps = [step for step, values in service.told if "train/loss" in values]
    assert steps == [3, 6, 9, 12]
    measured = [(step, values) for step, values in service.told if "validation/top1" in values]
    assert [step for step, _ in measured] == [7, 14]
    assert measured[-1][1]["validation/top1"] == fitted.top1
    if name == "wandb":
        init = service.calls[0][1]
        assert (init["project"], init["id"], init["resume"], init["config"]["epochs"]) == ("p", "x", "allow", 2)


def test_both_at_once_change_nothing_of_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, Service().package(name))
    bare = train(tmp_path / "a", recipe(epochs=1)).fitted
    told = train(tmp_path / "b", recipe(epochs=1), guests=[*made("wandb"), *made("mlflow")]).fitted
    assert all(bool((bare.state[key] == value).all()) for key, value in told.state.items())


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Refused, match=r"train\.guests: .*pip install wandb"):
        train(tmp_path, recipe(epochs=1), guests=made("wandb"))
    with pytest.raises(Refused, match=r"train\.guests\.wandb\.evry.*every"):
        made("wandb", evry=3)
