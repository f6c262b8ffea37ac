"""Structured pruning by trying: a search for the widths of blocks, and a rival beside what it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus import shelves as all_shelves
from lotus.config import Prune, Search, options
from lotus.events import Event, Said, Wrote, watched
from lotus.files import write_json
from lotus.report.numbers import accuracy, percent, si
from lotus.stage import TRAIN_FORWARDS, Section
from lotus.stages.context import HELD_OUT, Context
from lotus.stages.cut import Cut, Cutting, Uncut, narrow_stream, study, timed
from lotus.stages.fit import Images, Task, fit
from lotus.way import Options, Rival
from selection import methods
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import nn

    from lotus.pruning import Study
    from lotus.pruning.judge import Judge, Judged
    from lotus.pruning.search import SearchResult, Tried
    from selection.subset import Subset


def search_widths(uncut: Uncut) -> Cutting:
    """By trying: rounds of study, search and, between two, a little training. Leaves search.json and pareto.json."""
    from lotus.pruning import search
    from lotus.pruning.judge import Judge
    from lotus.vit.cost import count
    from selection.subset import Subset

    context, dense, asks = uncut.context, uncut.model, uncut.request.search
    assert asks is not None
    run, whole = context.run, count(dense)
    rows = yield from _held_out_images(context, uncut.calibration, Subset.load(run.ticket), asks)
    with context.images(run.train_beton, rows, context.config.train, dense) as held:
        judge = Judge(dense, lambda: held.epoch(0), asks.metric, context.shelves)
        searched = _Searched(dense, float(judge.forwards))
        yield from _rounds(uncut, judge, searched)
        after = count(searched.model)
        theirs = _compare(uncut, judge, lambda: held.epoch(0), searched)
        last = judge(searched.model)
    found = searched.last
    assert found is not None
    chosen = found.chosen
    best = search.pareto(searched.tried)
    written: dict[str, Any] = {
        "format": 1, "kind": asks.kind, "metric": asks.metric, "images": judge.images, "rounds": asks.rounds,
        "dense": {"macs": whole.macs, "params": whole.params, "top1": judge.dense.top1},
        "chosen": {"macs": after.macs, "params": after.params, "attention": chosen.attention, "mlp": chosen.mlp, **last._asdict()},
        "tried": searched.log, "pareto": [one.record() for one in best], "rows": theirs,
    }  # fmt: skip
    if theirs:
        title = rival(uncut.request, context.shelves)[0].title
        written["rival"] = title
        written["equal"], text = _equal(title, theirs, (whole.macs, judge.dense.top1), after.macs, last, judge.images)
        yield Said("prune", text)
    write_json(run.folder / "search.json", written)
    write_json(run.folder / "pareto.json", written["pareto"])
    yield Wrote("prune", str(run.folder / "search.json"))
    more = yield from timed(context, found.pruned)
    brief: dict[str, Any] = {
        name: written[name] for name in ("dense", "chosen", "equal", "rival", "rows") if name in written
    }
    before = {"params": whole.params, "macs": whole.macs}
    notes = (*searched.notes, *found.pruned.notes)
    cut = Cut(searched.model, before, {"params": after.params, "macs": after.macs}, searched.forwards, notes)
    told = {**brief, "kind": asks.kind, "metric": asks.metric, "tried": len(searched.log), "images": judge.images}
    return cut, {"search": told, **more}


@dataclass
class _Searched:
    """Where a search stands."""

    model: nn.Module
    forwards: float
    """In units of the dense model's forward pass of an image."""
    notes: list[str] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    last: SearchResult | None = None


def _rounds(uncut: Uncut, judge: Judge, searched: _Searched) -> Generator[Event, None, None]:
    """Study and search, and between two rounds recover."""
    from lotus.vit.cost import count
    from selection.subset import Subset

    context, dense, request, asks = uncut.context, uncut.model, uncut.request, uncut.request.search
    assert asks is not None
    ticket, whole = Subset.load(context.run.ticket), count(dense)
    searched.model, looked, searched.notes = yield from narrow_stream(context, dense, uncut.calibration, request)
    searched.forwards += looked
    for number in range(asks.rounds):
        this = uncut if number == 0 else dataclasses.replace(uncut, gates=None)
        studied = yield from study(this, searched.model, request)
        if uncut.table is not None:  # of the dense model, whatever earlier rounds left
            studied = dataclasses.replace(studied, beside=dense)
        now = count(searched.model)
        found = yield from _one_round(uncut, judge, studied, number)
        searched.last, searched.model = found, found.pruned.model
        searched.forwards += (studied.forwards + found.forwards) * now.macs / whole.macs
        searched.log += [{"round": number, **one.record()} for one in found.tried]
        searched.tried += found.tried
        if asks.recovery and number + 1 < asks.rounds:
            searched.model, seen, taught = yield from _recover(context, searched.model, dense, ticket.rows, number)
            searched.forwards += seen * (TRAIN_FORWARDS * found.chosen.macs / whole.macs + taught)


def _one_round(uncut: Uncut, judge: Judge, studied: Study, number: int) -> Generator[Event, None, SearchResult]:
    """Search once, and tell what was found.

    Raises:
        Refused: an allowed drop is passed before any cut.
    """
    from lotus.pruning import search
    from lotus.vit.cost import count

    whole, now, request, asks = count(uncut.model), count(studied.model), uncut.request, uncut.request.search
    assert asks is not None
    part = (number + 1) / asks.rounds
    # Budgets fall by the same factor a round; what is allowed rises by the same step. Latency stays a fraction of the dense
    # model's, the others are of the present one's.
    keep = {
        what: min(1.0, share**part * (1 if what == "latency" else getattr(whole, what) / getattr(now, what)))
        for what, share in request.keep.asked.items()
    }
    drop = None if asks.drop is None else asks.drop * part
    grid = asks.grid if number == 0 else 0
    request = request.at(keep, search=asks.model_copy(update={"drop": drop, "grid": grid}))
    find = search.ratios if asks.kind == "ratios" else search.blocks
    most = grid**2 + 55 if asks.kind == "ratios" else 2 * asks.levels * len(whole.blocks) + 10
    found = yield from watched(
        "prune",
        most,
        lambda progress: find(studied, judge, request, table=uncut.table, progress=progress),
        unit="cuts tried, at most",
    )
    chosen = found.chosen
    yield Said(
        "prune",
        f"round {number + 1} of {asks.rounds}: {len(found.tried)} tried; of attention {chosen.attention:.2f} and of the "
        f"MLPs {chosen.mlp:.2f} of the MACs stay; {asks.metric} {chosen.worse:.4f}, held-out top-1 {accuracy(chosen.top1, judge.images)}",
    )
    if found.notes and number == 0:  # no recovery yet: it is the smaller embedding dimension that is too far already
        raise Refused(
            f"prune.search.drop: {drop:g} is passed before any cut ({found.chosen.worse:.4f}). Raise it, or keep "
            "more of the residual stream (prune.embed_dim)."
        )
    for note in found.notes:
        yield Said("prune", f"round {number + 1}: {note}", level="warning")
    return found


def rival(request: Prune, shelves: Sequence[ModuleType]) -> tuple[Rival, Options]:
    """That of ``prune.search.compare``, and all of its settings.

    Raises:
        Refused: there is none of that name, or it is given what it does not have.
    """
    assert request.search is not None
    assert request.search.compare is not None
    asked, place = request.search.compare, "prune.search.compare"
    found = all_shelves.find(Rival, shelves, asked.name, place=place)
    return found, options(found.make, asked.options, place=place, name=found.name)


def _compare(
    uncut: Uncut, judge: Judge, held: Callable[[], Iterable[Any]], searched: _Searched
) -> list[dict[str, Any]]:
    """What the rival that is to be compared reaches; nothing where none is."""
    from lotus.vit.cost import count

    asks, whole = uncut.request.search, count(uncut.model)
    assert asks is not None
    if asks.compare is None:
        return []
    theirs, settings = rival(uncut.request, uncut.context.shelves)
    rows: list[dict[str, Any]] = theirs.make(uncut.model, held, judge, **methods.arguments(theirs.make, settings))
    searched.forwards += judge.images * sum(1 + row["macs"] / whole.macs for row in rows)
    return rows


def _equal(
    title: str, theirs: list[dict[str, Any]], dense: tuple[float, float], macs: int, last: Judged, images: int
) -> tuple[dict[str, Any], str]:
    """Of a rival, the MACs at which it is as good as what was found, and a sentence.

    Args:
        title: Of the rival.
        dense: MACs and held-out top-1 of the dense model.
        macs: Of what was found.
        images: That were judged by.
    """
    from lotus.pruning.judge import macs_at

    equal = macs_at([*((row["macs"], row["top1"]) for row in theirs), dense], last.top1)
    close = macs_at([*((row["macs"], -row["worse"]) for row in theirs), (dense[0], 0.0)], -last.worse)
    ratio = f"{macs / equal:.4f} of its MACs" if equal else "it is not in the range of what was compared"
    return (
        {"top1": last.top1, "macs": equal, "macs_same_metric": close},
        f"{title} at the same held-out top-1 ({accuracy(last.top1, images)}), nothing fine-tuned: {ratio}",
    )


def compared(found: Mapping[str, Any]) -> Section | None:
    """The rival beside the searched cut: a row each, and the MACs at equal accuracy in words.

    Args:
        found: What the stage tells of its search; nothing where there was none.
    """
    if not {"rows", "chosen", "dense", "rival"} <= set(found):
        return None
    theirs, chosen, dense, title = (found[name] for name in ("rows", "chosen", "dense", "rival"))
    rows = [("dense", dense["macs"], dense["top1"], 0.0), ("searched", chosen["macs"], chosen["top1"], chosen["worse"])]
    rows += [(one["name"], one["macs"], one["top1"], one["worse"]) for one in theirs]
    equal = found.get("equal") or {}
    metric = found.get("metric", "divergence")
    metric = {"loss": "rise of the loss", "agreement": "agreement with dense"}.get(metric, metric)

    def at(level: str, macs: float | None) -> str:
        if not macs:
            return f"at the same {level} {title} has no MACs to compare with: nothing that it tried gets there"
        return f"at the same {level} the searched cut takes {percent(chosen['macs'] / macs)} of its MACs ({si(macs)})"

    top1 = at(f"held-out top-1, {accuracy(chosen['top1'], found.get('images'))},", equal.get("macs"))
    return Section(
        f"Beside {title}",
        f"MACs at equal accuracy compared: {top1}; {at(metric, equal.get('macs_same_metric'))}. Right after the cut, nothing "
        f"fine-tuned; between two of its cuts it is taken to lie on a straight line. {found.get('images', 0):,} images.",
        ("", "MACs an image", "of dense", "held-out top-1, %", metric),
        tuple(
            (name, si(macs), percent(macs / dense["macs"]), f"{top1:.2f}", f"{worse:.4f}")
            for name, macs, top1, worse in rows
        ),
    )


def _held_out_images(
    context: Context, calibration: np.ndarray, ticket: Subset, asks: Search
) -> Generator[Event, None, np.ndarray]:
    """Rows to search by; says where some of them were trained on."""
    rng = np.random.default_rng([context.config.seed, HELD_OUT])
    rows = held_out(ticket.rows, ticket.total, calibration, asks.images, rng)
    if len(rows) and np.isin(rows, ticket.rows).any():
        left = ticket.total - len(ticket.rows)
        cure = f"prune.search.images={left}, or a smaller select.keep" if left else "select.keep below 1 gives some"
        text = (
            f"some held-out images were trained on: the ticket leaves {left} out, and {asks.images} are wanted; {cure}"
        )
        yield Said("prune", text, level="warning")
    return rows


def _recover(
    context: Context, model: nn.Module, dense: nn.Module, ticket: np.ndarray, number: int
) -> Generator[Event, None, tuple[nn.Module, int, bool]]:
    """A little training after a round, by the fine-tune's recipe: the model, the images that it saw, and whether ``dense`` taught."""
    import copy

    from lotus.training.distill import Taught, make_distiller

    config, asks = context.config, context.config.prune.search
    assert asks is not None
    passes, images = passes_for(asks.recovery, config.finetune.batch_size, len(ticket))
    off = config.finetune.off_within()
    recipe = config.finetune.model_copy(update={**off, "epochs": passes, "warmup_epochs": 0.0, "warmup_ratio": None})
    rng = np.random.default_rng([config.seed, HELD_OUT, number])
    rows = np.sort(rng.choice(ticket, size=images, replace=False))
    twin = copy.deepcopy(model)
    distiller = make_distiller(copy.deepcopy(dense), recipe, context.world.device)
    task = Task("prune", recipe, place="finetune", seed=config.seed + 1 + number, evaluate=False)
    fitted, _ = yield from fit(context, task, model, Images(rows), [] if distiller is None else [Taught(distiller)])
    return fitted.load_into(twin).to(context.world.device).eval(), fitted.images_seen, distiller is not None


def passes_for(steps: int, batch: int, images: int) -> tuple[int, int]:
    """How often to go through how many of ``images``, so that ``steps`` optimizer steps are taken; a few more where they do
    not fill the passes evenly."""
    passes = -(-steps * batch // images)
    each = -(-steps // passes)
    return passes, min(images, each * batch)


def held_out(
    ticket: np.ndarray, total: int, calibration: np.ndarray, images: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows of training images to search by: first those that nothing was trained on, then those that did not calibrate."""
    outside = np.setdiff1d(np.arange(total), ticket)
    chosen = rng.choice(outside, size=min(images, len(outside)), replace=False)
    if len(chosen) < images:
        others = np.setdiff1d(ticket, calibration)
        others = others if len(others) else ticket
        more = rng.choice(others, size=min(images - len(chosen), len(others)), replace=False)
        chosen = np.concatenate([chosen, more])
    return np.sort(chosen)
