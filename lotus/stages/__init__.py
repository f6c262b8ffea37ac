"""Where everything meets: what each stage does with the run's folder, and in which order the stages run.

A stage is a generator: it yields what happens and returns what it cost. Heavy packages are imported inside the stages,
so that a run whose stages are all done answers at once.

Each module stands on those before it::

    shop, patches, fit            what stages share: the run at hand, fewer patches, a training
    probe, train                  the stages prepare, score and select; baseline, train and finetune
    cut, search, zeros, prune     the stage prune: by scores, by trying, to zeros
    outside                       the same for a model that LOTUS never trained, without a run
    finish                        the stages export and report
    checks, order                 what is refused before anything is done; the run itself
    dry_run, commands             what a run would cost; what is asked of a run's folder outside of the order
"""

from lotus.stages.checks import check
from lotus.stages.commands import evaluate_model, patch_ticket
from lotus.stages.dry_run import forecast
from lotus.stages.order import go
from lotus.stages.shop import TRAIN_FORWARDS, plan

__all__ = ["TRAIN_FORWARDS", "check", "evaluate_model", "forecast", "go", "patch_ticket", "plan"]
