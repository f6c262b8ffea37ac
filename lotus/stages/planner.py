"""The planner: from what a training may cost to epochs, cut and size, by rules that were measured (:mod:`lotus.stages.plan_table`).

It has no model of cost of its own: each candidate is a config, and what it would cost is what its stages forecast.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lotus.config import Config
from lotus.config.training_budget import Budget, Strategy
from lotus.files import digest, write_json
from lotus.run import Run
from lotus.stage import named
from lotus.stages import course, export, plan_table, prepare, score, speed, train
from lotus.stages.ahead import Ahead, Cost, training
from lotus.stages.plan_file import FILE, FORMAT, Plan, applied, stored
from lotus.stages.shelf import run_of
from lotus.stages.shrinking import forecast_looks
from lotus.stages.teacher import teacher_forecast
from selection.errors import Refused

_MOST = 100_000  # epochs
_NO_MATTER = ("folder", "name", "tensorboard", "device", "rank_timeout", "baseline", "export")


@dataclass(frozen=True)
class Candidate:
    """A way to spend the budget; the epochs are still open."""

    config: Config
    """That is asked."""
    way: Strategy
    start: plan_table.Start
    at: float
    keep: float
    """Fraction of the MACs."""
    first: Ahead
    """Of the config that is asked: images and dense model, which are opened once."""

    def settings(self, epochs: int) -> dict[str, Any]:
        """What changes of the config, by place."""
        config, recipe = self.config, self.config.train
        found: dict[str, Any] = {
            "train.epochs": epochs,
            "train.warmup_epochs": None,
            "train.warmup_ratio": min(recipe.warmup / recipe.epochs, 1),
            "train.sparsity": {},
            "finetune.epochs": 0,
            "finetune.distill": "none",
        }
        if self._all_images:
            found |= {"select.keep": 1.0}
        if self.way == "shrink":
            own = {} if recipe.shrink is None else recipe.shrink.model_dump(include={"carry", "evaluate"})
            found |= {"train.shrink": {**own, "at": self.at}}
            if "macs" not in config.prune.keep.asked or config.prune.keep.macs != self.keep:
                found |= {} if _other(config) else {"prune.keep": {"macs": self.keep}}
            return found
        found |= {"train.shrink": None, "prune.keep": {"macs": 1.0}, "prune.embed_dim": None, "prune.sublayers": False}
        found |= {"prune.calibration": 1}  # nothing is cut
        if self.way == "small":
            from lotus.vit.smaller import narrower

            found |= {"model.args": narrower(config.model, self.keep).args, "baseline": False}
        return found

    @property
    def _all_images(self) -> bool:
        asked = self.config.budget
        return asked is not None and asked.images == "all" and not self.config.select.ticket

    def resolved(self, epochs: int) -> Config:
        return applied(self.config, self.settings(epochs))

    def ahead(self, epochs: int) -> Ahead:
        """What is known of the run with so many epochs."""
        made = Ahead(self.resolved(epochs), self.first.shelves)
        made.__dict__["sources"] = self.first.sources
        if self.way != "small":
            made.__dict__ |= {"shape": self.first.shape, "dense": self.first.dense, "macs": self.first.macs}
        return made


def plan(config: Config, shelves: Sequence[ModuleType] = (), *, timed: speed.Timer | None = None) -> Plan:
    """How to spend ``config.budget``.

    Args:
        shelves: modules with methods of the user's own
        timed: seconds of a training step of a model; None: measured here

    Raises:
        Refused: nothing can be had for the budget; says the least that can.
    """
    budget, first = _budget(config), Ahead(config, shelves)
    _, dense = training(config.train.epochs * first.images, first.macs)
    measured: dict[str, Any] = {}
    if budget.minutes is None:
        one, why = _chosen(first, lambda _: budget.train or 0)
        epochs = _most(lambda epochs: sum(row["macs"] for row in parts(one, epochs)), (budget.train or 0) * dense)
    else:
        one, why, tempo = _timed(first, timed or speed.timer)
        epochs = _most(lambda epochs: tempo.seconds(one.ahead(epochs)), 60 * budget.minutes)
        measured = {"pace": tempo.record(), "seconds": tempo.seconds(one.ahead(max(1, epochs)))}
    if epochs == 0:
        raise _unmet(one, dense, measured)
    return {
        "format": FORMAT, "asked": key(config), "way": one.way, "why": why, "epochs": epochs,
        "at": one.at if one.way == "shrink" else None, "keep": one.keep, "ships": _ships(one), "budget": {"train": budget.train, "minutes": budget.minutes},
        "dense_macs": dense, "dense_epochs": config.train.epochs, "dense_model": _size(first), **measured, **_costs(one, epochs, dense),
        "settings": one.settings(epochs),
    }  # fmt: skip


def _ships(one: Candidate) -> dict[str, float]:
    """What ships by measure, as fractions of the dense model's."""
    asked = one.config.prune.keep.asked if one.way == "shrink" and _said(one.config) else {}
    return dict(asked) or {"macs": one.keep}


def _size(first: Ahead) -> dict[str, int]:
    """Of the dense model."""
    from lotus.vit.cost import count

    found = count(first.dense)
    return {"macs": found.macs, "params": found.params}


def _costs(one: Candidate, epochs: int, dense: float) -> Plan:
    """What so many epochs cost, what is not in the budget, and what is expected."""
    rows = [{**row, "share": row["macs"] / dense} for row in parts(one, epochs)]
    cost, ahead = sum(row["share"] for row in rows), one.ahead(epochs)
    compared = training(epochs * ahead.images, ahead.macs)[1]
    beside = [{"part": "baseline", "macs": compared, "share": compared / dense}] if ahead.config.baseline else []
    return {
        "images": ahead.kept, "parts": rows, "beside": beside, "cost": cost, "expected": expected(one, cost),
        "notes": _notes(one, ahead, said=_said(one.config), aside=_aside(one)),
    }  # fmt: skip


def _timed(first: Ahead, timed: speed.Timer) -> tuple[Candidate, str, speed.Tempo]:
    """The way for so many minutes, why, and its pace here. Each way has the cost that it gets done in them: by the multiply-accumulate a
    narrow model is slower than a cut one, or quicker."""
    minutes, dense = _budget(first.config).minutes, training(first.config.train.epochs * first.images, first.macs)[1]
    assert minutes is not None
    paces: dict[Strategy, speed.Tempo] = {}

    def cost(one: Candidate) -> float:
        pace = paces[one.way] = timed(one.ahead(first.config.train.epochs))
        epochs = _most(lambda epochs: pace.seconds(one.ahead(epochs)), 60 * minutes)
        return sum(row["macs"] for row in parts(one, max(1, epochs))) / dense

    one, why = _chosen(first, cost)
    return one, why, paces[one.way]


def _chosen(first: Ahead, cost: Callable[[Candidate], float]) -> tuple[Candidate, str]:
    """The way that was measured to be best of those that there are, and why.

    Args:
        cost: what a way may cost, as a fraction of the dense training

    Raises:
        Refused: the budget allows none of them.
    """
    config, budget = first.config, _budget(first.config)
    start: plan_table.Start = "given" if config.model.pretrained or config.model.weights else "scratch"
    rule = plan_table.rule(start, budget.train or 1.0)
    asked = config.prune.keep.asked
    keep = asked.get("macs", min(asked.values())) if _said(config) else rule.keep
    ways, barred = _ways(first, start)
    if keep >= 1 and ways != ("dense",):
        raise Refused(
            "prune.keep.macs: all is to stay, so nothing is cut. Say how much, e.g. prune.keep.macs=0.5, or set budget.ways=[dense]."
        )
    there = {way: Candidate(config, way, start, rule.at, 1.0 if way == "dense" else keep, first) for way in ways}
    way, why = plan_table.choose(start, {way: cost(one) for way, one in there.items()}, keep, config.data.name)
    return there[way], barred or why


def _ways(first: Ahead, start: plan_table.Start) -> tuple[tuple[Strategy, ...], str]:
    """The ways to choose from, the best first. And why a smaller model, which is allowed, is none of them; empty: it is, or no start
    for one.

    Raises:
        Refused: none that is allowed does as the config says.
    """
    config, allowed = first.config, _budget(first.config).ways
    asks = _cut_alone(config)
    if asks and "shrink" not in allowed:
        raise Refused(
            f"budget.ways: {' and '.join(asks)} wants a training that shrinks. Allow shrink, or leave that out."
        )
    other = sorted(config.prune.keep.asked.keys() - {"macs"}) if _said(config) else []
    if other and set(allowed) == {"small"}:
        raise Refused(
            f"budget.ways: a smaller model is one of so many MACs, and prune.keep asks for {' and '.join(other)}. Say prune.keep.macs "
            "alone, or allow shrink."
        )
    barred = _barred(first, asks + [f"prune.keep.{name}" for name in other])
    found = plan_table.possible(start, tuple(way for way in allowed if way != "small" or not barred) or allowed)
    missed = start == "scratch" and "small" in allowed and found == ("shrink",)
    return found, barred if missed else ""


def _cut_alone(config: Config) -> list[str]:
    """What the config asks for that a cut alone can do."""
    teacher = config.train.taught_by
    found = {
        "train.teacher=uncut": teacher is not None and teacher.is_uncut,
        "score.proxy=self": config.watches_itself and _budget(config).images == "select",
    }
    return [name for name, wanted in found.items() if wanted]


def _barred(first: Ahead, asks: Sequence[str]) -> str:
    """Why no smaller model does it, which is a narrower ViT of so many MACs; empty: one does."""
    from lotus.vit import anatomy

    if asks:
        return f"only a cut does as {' and '.join(asks)} says"
    return "" if anatomy.is_vit(first.shape) else "a smaller model is a narrower ViT, and this model is none"


def _said(config: Config) -> bool:
    """Whether the config says how much stays, and that is asked for."""
    return _says_keep(config) and _budget(config).keep == "prune"


def _says_keep(config: Config) -> bool:
    return "prune" in config.model_fields_set and "keep" in config.prune.model_fields_set


def parts(one: Candidate, epochs: int) -> list[dict[str, Any]]:
    """What each part would cost, by the forecasts of its stages; those that cost nothing too."""
    ahead = one.ahead(epochs)
    run = run_of(ahead.config, ahead.shelves)
    costs = {name: run.stages[name].forecast(ahead) or (0.0, 0.0) for name in run.plan()}
    trained, compared = named(run.stages, "training"), named(run.stages, "dense")
    first = (prepare.STAGE.name, score.STAGE.name)
    rows = [_row(name, *costs.get(name, (0.0, 0.0))) for name in first]
    rows += _training(ahead, costs[trained])
    told = (*first, trained, compared)
    return rows + [
        _row(name, *cost) for name, cost in costs.items() if name == export.STAGE.name or (cost[1] and name not in told)
    ]


def _training(ahead: Ahead, cost: Cost) -> list[dict[str, Any]]:
    """The parts of the training, which together cost what its stage forecasts. The two sides of a cut share what is drawn, shown and
    frozen as they share the images."""
    recipe, taught = ahead.config.train, (0.0, 0.0)
    looks = (0.0, 0.0) if recipe.shrink is None else forecast_looks(ahead)
    if recipe.teacher is not None:
        taught = teacher_forecast(recipe, train.passes(ahead)[0], ahead)
    forwards, macs = (sums[0] - sums[1] - sums[2] for sums in zip(cost, looks, taught, strict=True))
    rows, gone = [_row("calibration", *looks)], course.pieces(ahead)
    images, spent = sum(piece.images for piece in gone), sum(piece.images * piece.macs for piece in gone)
    for part, side in itertools.groupby(gone, lambda piece: "after the cut" if piece.cuts else "whole model"):
        there = list(side)
        seen, price = sum(one.images for one in there), sum(one.images * one.macs for one in there)
        share = sum(one.part for one in there)
        rows.append(_row(f"training, {part}", forwards * seen / images, macs * price / spent, share * recipe.epochs))
    return [*rows, _row("teacher", *taught)]


def _row(part: str, forwards: float, macs: float, epochs: float | None = None) -> dict[str, Any]:
    return {"part": part, "image_forwards": forwards, "macs": macs, "epochs": epochs}


def expected(one: Candidate, cost: float) -> dict[str, Any]:
    """The measurement nearest to a plan, and how far it is from the dense training of about that cost."""
    data, start = one.config.data.name, one.start
    seen = plan_table.nearest(data, start, one.way, cost, one.keep)
    if seen is None:
        return {}
    dense = plan_table.nearest(seen.data, start, "dense", seen.cost, 1.0)
    far = max(seen.cost / cost, cost / seen.cost, seen.keep / one.keep, one.keep / seen.keep)
    return {**seen._asdict(), "dense_top1": dense and dense.top1, "dense_cost": dense and dense.cost, "far": far > 1.5}


# ------------------------------------------------------------------------------------------------------------ in a run


def resolved(
    config: Config, shelves: Sequence[ModuleType] = (), *, timed: speed.Timer | None = None, ranks: int = 1
) -> tuple[Config, Plan]:
    """``config`` as it is run: by the plan in its folder where that is of the same settings, else by a new one.

    Raises:
        Refused: as :func:`plan`; the folder holds a training of another plan; several ranks would have to be timed.
    """
    run = run_of(config, shelves)
    stands = stored(run)
    if stands is not None and stands["asked"] == key(config):
        return applied(config, stands["settings"]), stands
    if run.record(named(run.stages, "training")) is not None:
        raise Refused(
            f"budget: {run.folder} holds a training that is finished, by another plan. Give another folder=PATH, or leave the budget out."
        )
    if ranks > 1 and _budget(config).minutes is not None:
        raise Refused("budget.minutes: several processes cannot be timed before they run. Say budget.train instead.")
    found = plan(config, shelves, timed=timed)
    return applied(config, found["settings"]), found


def write(run: Run, found: Plan) -> None:
    """Put the plan into the run's folder."""
    with run.held():
        write_json(run.folder / FILE, found)


def check_open(config: Config, shelves: Sequence[ModuleType] = ()) -> None:
    """Refuse to plan what is finished."""
    run = run_of(config, shelves)
    if run.record(named(run.stages, "training")) is not None:
        raise Refused(
            f"folder: {run.folder} holds a training that is finished, and there is nothing to plan. Give another folder=PATH, or see "
            f"lotus report {run.folder}."
        )


def key(config: Config) -> str:
    """Of what a plan is made from."""
    raw = {name: value for name, value in config.model_dump(mode="json").items() if name not in _NO_MATTER}
    return digest([raw, _says_keep(config)])


# ---------------------------------------------------------------------------------------------------------------- below


def _budget(config: Config) -> Budget:
    if config.budget is None:
        raise Refused(
            "budget: nothing says what the training may cost. Say it behind the config: budget.train=0.33, a third of what its dense "
            "training costs, or budget.minutes=20."
        )
    return config.budget


def _other(config: Config) -> bool:
    """Whether the size is asked for in another measure than MACs."""
    asked = config.prune.keep.asked
    return "macs" not in asked and _budget(config).keep == "prune"


def _most(spent: Callable[[int], float], budget: float) -> int:
    """The largest number of epochs within ``budget``; 0 where one is too much. What is spent rises with them."""
    low, high = 0, 1
    while high <= _MOST and spent(high) <= budget * (1 + 1e-9):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= budget * (1 + 1e-9) else (low, middle)
    return low


def _unmet(one: Candidate, dense: float, measured: Mapping[str, Any]) -> Refused:
    if measured:
        return Refused(
            f"budget.minutes: an epoch takes {measured['seconds'] / 60:.3g} minutes here, calibration included. Give at least as many, a "
            "smaller model, or fewer images."
        )
    rows = parts(one, 1)
    least = sum(row["macs"] for row in rows) / dense
    apart = sum(row["macs"] for row in rows if row["epochs"] is None) / dense
    asked = _budget(one.config).train
    told = f"{least:.4g}" + (f", of which proxy and calibration are {apart:.4g}" if apart else "")
    shrink, cheaper = one.resolved(1).train.shrink, ""
    if shrink is not None:
        cheaper = ", or fewer images to look at (prune.calibration)"
        cheaper += ", or set train.shrink.evaluate=false" if shrink.evaluate else ""
        small = _allowed_small(one)
        if small is not None and sum(row["macs"] for row in parts(small, 1)) <= (asked or 0) * dense:
            cheaper += ", or set budget.ways=[small]: a smaller model from scratch fits"
    return Refused(
        f"budget.train: {asked:g} of the dense training is less than one epoch costs: {told}. Give at least "
        f"budget.train={_up(least):g}{cheaper}."
    )


def _allowed_small(one: Candidate) -> Candidate | None:
    """A smaller model from scratch of as many MACs, where ``budget.ways`` alone bars it."""
    others = _cut_alone(one.config) or (one.config.prune.keep.asked.keys() - {"macs"} if _said(one.config) else ())
    if one.start == "given" or "small" in _budget(one.config).ways or others or _barred(one.first, ()):
        return None
    return dataclasses.replace(one, way="small")


def _up(number: float) -> float:
    """``number`` to three digits, rounded up."""
    import math

    scale = 10 ** (2 - math.floor(math.log10(number)))
    return math.ceil(number * scale) / scale


def _aside(one: Candidate) -> list[str]:
    """Settings that the plan does without."""
    config, shrink = one.config, one.config.train.shrink
    found = {
        "finetune.epochs": "epochs" in config.finetune.model_fields_set and config.finetune.epochs > 0,
        "train.sparsity": config.train.sparsity.gates,
        "select.keep": config.select.keep < 1 and one.resolved(1).select.keep == 1,
        "train.shrink.steps": shrink is not None and bool(shrink.steps),
        "train.shrink.until_stable": shrink is not None and shrink.until_stable is not None,
        "train.shrink.at": one.way == "shrink" and shrink is not None and shrink.at not in (None, one.at),
        "prune.embed_dim": one.way != "shrink" and config.prune.embed_fraction < 1,
        "prune.sublayers": one.way != "shrink" and bool(config.prune.sublayers),
    }
    return [name for name, goes in found.items() if goes]


def _notes(one: Candidate, ahead: Ahead, *, said: bool, aside: Sequence[str]) -> list[str]:
    config, notes = ahead.config, []
    if aside:
        notes.append(f"the plan does without {', '.join(aside)}; docs/planning.md says what it decides")
    if _budget(one.config).images == "select" and ahead.config.select.keep == 1 and not ahead.config.select.ticket:
        notes.append("budget.images=select leaves no image out, since select.keep is 1")
    if one.way == "small" and one.config.baseline:
        notes.append(
            "a smaller model has no baseline here; to compare, lotus run with budget.ways=[dense] or train.shrink=null and a folder of "
            "its own, then lotus compare"
        )
    if not said:
        notes.append("how much stays is the planner's choice; say it by prune.keep.macs=0.5")
    if config.baseline:
        notes.append("the baseline is a comparison and not in the budget; leave it out by baseline=false")
    if config.train.optimizer.lower() != "muon":
        notes.append(f"what is expected was measured with muon, and this recipe trains by {config.train.optimizer}")
    return notes
