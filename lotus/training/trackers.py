"""SHELF of guests that tell a service of the user's own how a training goes: ``train.guests: [{name: wandb, project: mine}]``.

LOTUS does not depend on their packages and asks nobody for an account: whoever names one has both. A function a service, as in
:mod:`lotus.training.guest_shelf`. Rank 0 alone tells, after every so many steps and after each evaluation; a loss is read then and
not at each step, for which a GPU would have to be waited for.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import Tensor

from lotus.training.guests import Guest, Position, Seen, Training
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.config import Recipe

Every = Annotated[int, Field(ge=1)]


def wandb(recipe: Recipe, *, project: str = "lotus", name: str = "", id: str = "", every: Every = 50) -> Guest:
    """Weights & Biases.

    Args:
        recipe: whose settings are sent
        project: of yours
        name: of the run there; empty: the service finds one
        id: of a run that goes on; empty: a new one
        every: steps between two that are told
    """

    def begin() -> tuple[Tell, Callable[[], object]]:
        run = _package("wandb").init(
            project=project, name=name or None, id=id or None, resume="allow" if id else None,
            config=recipe.model_dump(mode="json"),
        )  # fmt: skip
        return lambda values, step: run.log(values, step=step), run.finish

    return Tracked("wandb", begin, every)


def mlflow(recipe: Recipe, *, experiment: str = "lotus", name: str = "", every: Every = 50) -> Guest:
    """MLflow, where its own settings (``MLFLOW_TRACKING_URI``) say.

    Args:
        recipe: whose settings are sent
        experiment: of yours
        name: of the run there; empty: the service finds one
        every: steps between two that are told
    """

    def begin() -> tuple[Tell, Callable[[], object]]:
        package = _package("mlflow")
        package.set_experiment(experiment)
        package.start_run(run_name=name or None)
        package.log_params({key: str(value) for key, value in recipe.model_dump(mode="json").items()})
        return lambda values, step: package.log_metrics(values, step=step), package.end_run

    return Tracked("mlflow", begin, every)


Tell = Callable[[Mapping[str, float], int], object]
"""Values by name, and the step that they are of."""


class Tracked(Guest):
    """Tells a service: ``train/loss``, ``train/images`` and ``train/seconds``; ``validation/top1`` and ``validation/loss``."""

    def __init__(self, name: str, begin: Callable[[], tuple[Tell, Callable[[], object]]], every: int) -> None:
        """
        Args:
            begin: opens the service's run; returns how it is told, and how it ends
            every: steps between two that are told
        """
        self.name = name  # type: ignore[misc]  # there may be two
        self._begin, self._every = begin, every
        self._tell: Tell | None = None
        self._end: Callable[[], object] | None = None
        self._main = False
        self._loss: Tensor | float = 0.0
        self._images = 0

    def attach(self, training: Training) -> None:
        if not training.world.is_main or self._tell is not None:
            return
        self._main, self._place = True, training.place
        try:
            self._tell, self._end = self._begin()
        except Refused as missing:
            raise Refused(f"{training.place}.guests: {missing}") from None

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        if self._main:
            self._loss = self._loss + losses.detach().sum()  # not read here
            self._images += len(losses)
        return losses

    def after_step(self, at: Position, progress: float, finite: bool) -> None:
        if self._tell is None or at.step % self._every:
            return
        mean = float(self._loss) / max(1, self._images)
        self._loss, self._images = 0.0, 0
        self._tell(_sound({"train/loss": mean, "train/images": at.images, "train/seconds": at.seconds}), at.step)

    def close_epoch(self, at: Position) -> Iterable[str]:
        if self._tell is not None:
            values = {"validation/top1": at.top1, "validation/loss": at.loss, "epoch": at.epoch + 1}
            self._tell(_sound(values), at.step)
        return ()

    def leave(self) -> None:
        if self._end is not None:
            self._end()
        self._tell = self._end = None


def _sound(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _package(name: str) -> Any:
    """
    Raises:
        Refused: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"{name} is not installed ({error}). Run: pip install {name}, or leave it out.") from None
