"""Where everything meets: what each stage does with the run's folder, and in which order the stages run.

A stage is a generator: it yields what happens and returns what it cost. Heavy packages are imported inside the stages,
so that a run whose stages are all done answers at once.

Each stage is a file, named as it is, with its declaration (a :class:`lotus.stage.Stage`) at the end. Each module stands on those
before it::

    context, ahead                what stages have at hand; what is known before anything is done
    patches, fit, proxy           what they share: token pruning, a training, the proxies
    cut, width_search, structured pruning by scores, by trying; the way that is both
    ways                          the way to prune that a config names
    outside                       pruning a model that LOTUS never trained, without a run
    prepare ... report            the stages, each named in lotus/stage_names.py
    shelf                         their order, and the place of a user's own among them
    checks, order                 what is refused before anything is done; the run itself
    plan_table, speed, planner    rules that were measured, how fast it goes here; how a budget of training is spent
    dry_run, commands             what a run would cost; what is asked of a run's folder outside of the order
"""

from lotus.stage import TRAIN_FORWARDS, Outcome, Section, Stage
from lotus.stages.checks import check
from lotus.stages.commands import evaluate_model, patch_ticket
from lotus.stages.dry_run import costs, forecast
from lotus.stages.order import go
from lotus.stages.shelf import STAGES, passed_over, run_of

__all__ = [
    "STAGES",
    "TRAIN_FORWARDS",
    "Outcome",
    "Section",
    "Stage",
    "check",
    "costs",
    "evaluate_model",
    "forecast",
    "go",
    "passed_over",
    "patch_ticket",
    "run_of",
]
