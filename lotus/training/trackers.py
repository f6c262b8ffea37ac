"""SHELF of guests that tell a service of the user's own how a training goes: ``train.guests: [{name: wandb, project: mine}]``.

LOTUS does not depend on their packages and asks nobody for an account: whoever names one has both. A function a service, as in
:mod:`lotus.training.guest_shelf`; what they make is in :mod:`lotus.training.tracked`, so that a run can ask which guests only
watch without torch. Rank 0 alone tells, after every so many steps and after each evaluation; a loss is read then and not at each
step, for which a GPU would have to be waited for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.config import Recipe
    from lotus.training.guests import Guest
    from lotus.training.tracked import Tell

WATCHERS = ("mlflow", "wandb")
"""The guests here that change nothing of a training (:func:`lotus.shelves.watches`)."""
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
    from lotus.training.tracked import Tracked

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
    from lotus.training.tracked import Tracked

    def begin() -> tuple[Tell, Callable[[], object]]:
        package = _package("mlflow")
        package.set_experiment(experiment)
        package.start_run(run_name=name or None)
        package.log_params({key: str(value) for key, value in recipe.model_dump(mode="json").items()})
        return lambda values, step: package.log_metrics(values, step=step), package.end_run

    return Tracked("mlflow", begin, every)


def _package(name: str) -> Any:
    """
    Raises:
        Refused: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"{name} is not installed ({error}). Run: pip install {name}, or leave it out.") from None
