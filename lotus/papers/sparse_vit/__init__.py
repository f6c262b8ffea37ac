"""Sparse-ViT (Prasetyo et al., 2307.11988): a penalty on attention while training, ``train.guests: [attention_penalty]``, and how
peaked attention is after it, a stage of its own. Its pruning is lotus/papers/zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lotus.config import Method, Rule
from lotus.stage import Outcome, Section, Stage, Work, named
from lotus.stages.baseline import is_asked

if TYPE_CHECKING:
    from torch import nn

    from lotus.run import Run
    from lotus.stages.context import Context
    from lotus.training.guests import Guest

NAME = "attention_penalty"
LOOKED_AT = 512
"""Validation images on which attention is measured."""


def attention_penalty(
    model: nn.Module,
    *,
    kind: Literal["log", "entropy"] = "log",
    strength: Annotated[float, Field(ge=0)] = 0.01,
    layers: Literal["last", "all"] = "all",
) -> Guest:
    """A penalty on attention probabilities.

    Args:
        model: that trains
        kind: log: log(1 + a^2), as published, which spreads attention; entropy: which makes it sparse
        strength: lambda: what it counts in the loss
        layers: which blocks are penalized; published is the last alone
    """
    from lotus.papers.sparse_vit.penalty import AttentionPenalty

    return AttentionPenalty(model, kind, strength, layers)


def _penalties(recipe: Any) -> list[Method]:
    """Those that join a training."""
    return [guest for guest in getattr(recipe, "guests", ()) if guest.name == NAME]


def _measure(context: Context) -> Work:
    """How peaked attention was before training, is after it, and is in the dense baseline, which saw no penalty."""
    import numpy as np

    import lotus.pruning
    from lotus.config import options
    from lotus.data import beton
    from lotus.events import Step
    from lotus.papers.sparse_vit.focus import focus

    run, config = context.run, context.config
    models = {"start": context.new_model(), "train": lotus.pruning.load(run.of("train"))}
    if "baseline" in run.plan():
        models["baseline"] = lotus.pruning.load(run.of("baseline"))
    rows = np.arange(min(LOOKED_AT, beton.Manifest.load(run.val_beton).n))
    measured: dict[str, Any] = {}
    for name, model in models.items():
        with context.images(run.val_beton, rows, config.train, model) as loader:
            measured[name] = focus(model, loader.epoch(0), context.world.device)
        yield Step("attention", len(measured), len(models), unit="models measured")
    settings = options(attention_penalty, _penalties(config.train)[0].options, place="train.guests")
    return Outcome(values={"kind": settings["kind"], "layers": settings["layers"], "models": measured})


def _tell(run: Run, results: Mapping[str, Any]) -> Section:
    """A row a model, and what the penalty did to it, in words."""
    measured, where = results["attention"], "last" if results["attention"]["layers"] == "last" else "all"
    models, training, dense = measured["models"], named(run.stages, "training"), named(run.stages, "dense")
    names = (("start", "before training"), (training, "penalized"), (dense, "dense baseline, no penalty"))
    rows = [(name, models[key][where]) for key, name in names if key in models]
    told = f"The penalty is {measured['kind']}; measured in {'the last block' if where == 'last' else 'all blocks'}."
    if dense in models:
        apart = models[training][where]["entropy"] - models[dense][where]["entropy"]
        signed = f"{apart:+.2g}".replace("-", "−")
        word = "spread further than" if apart > 0 else "more peaked than"
        told += f" Attention is {word} the dense baseline's: {signed} nats of entropy a row."
    if measured["kind"] == "log":
        told += (
            " log(1 + a^2) costs least where a row is uniform: it is named a sparsity penalty and spreads attention."
        )
    return Section(
        "How peaked attention is",
        told,
        ("", "entropy of a row, nats", "largest in a row", "share above 0.1"),
        tuple(
            (name, f"{one['entropy']:.6f}", f"{one['largest']:.6f}", f"{100 * one['above']:.3f} %")
            for name, one in rows
        ),
    )


STAGE = Stage(
    "attention",
    "measure how peaked attention is",
    _measure,
    settings=("model", "seed"),
    after=lambda config: ("train", "baseline") if config.baseline or is_asked(config) else ("train",),
    tell=_tell,
    wanted=lambda config: bool(_penalties(config.train)),
)

_BAD = "train.guests=[attention_penalty]"

RULES = (
    Rule("Train", "shrink", lambda it: bool(_penalties(it)) and it.shrink is not None,
         "puts another model in place, and attention_penalty looks at the one it began with. Leave one of the two out",
         f"{_BAD} train.shrink={{}}", _BAD),
    Rule("Recipe", "compile", lambda it: bool(_penalties(it)) and it.compile,
         "compiled blocks do not show their attention, which attention_penalty reads. Set {place}.compile=false",
         f"{_BAD} train.compile=true", _BAD),
    Rule("Recipe", "patches", lambda it: bool(_penalties(it)) and it.patches is not None and it.patches.mode == "tome",
         "tome's attention is weighted by merged patches, and attention_penalty reads it. Take another {place}.patches.mode",
         f"{_BAD} train.patches.mode=tome", f"{_BAD} train.patches.mode=evit"),
)  # fmt: skip
