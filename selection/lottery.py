"""The data lottery: score, rank, pick, and share the budget among the classes. The one place that balances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from selection import limits, memory, methods, pickers, scores
from selection.choices import CONFIG, Choice, Method, Places, check_seed, named, resolve
from selection.draws import QUOTAS, Drawing, Group, Weighed, above_floor
from selection.errors import Refused
from selection.ranks import ranking
from selection.shares import BALANCES, balance_of, quotas
from selection.signals import CURES, VOCABULARY, Signals
from selection.subset import Known, Subset

__all__ = [
    "CONFIG", "DEFAULT_PICK", "DEFAULT_SCORE", "HANDED", "Choice", "Lottery", "Places", "Request", "affordable", "choose", "draw", "goes_by_score",
    "quotas", "ranking", "reads", "scored", "select",
]  # fmt: skip

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Scores that say where an image lies and not how hard it is: the highest are what their authors keep.
_NOT_DIFFICULTY = {"random", "moderate", "zcore"}

_COUNTING = (scores.random, pickers.random)  # of the labels they only read how many there are
_UNDRAWN = (pickers.herding, pickers.k_center)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What ticket is wanted; see :func:`select`."""

    score: Choice
    pick: Choice
    keep: float
    balance: bool | str = True
    floor: float | None = None
    seed: int = 0
    start: Subset | None = None
    max_memory: float | None = None


@dataclass(frozen=True, eq=False)
class Lottery:
    """What a lottery came to."""

    subset: Subset
    scores: Floats | None
    """(N,), higher = keep first, may hold +inf; None where nothing read them and what they read was not recorded."""
    warnings: tuple[str, ...] = ()
    """Sentences for the user."""
    read: bool = True
    """Whether the picker went by the score."""


def choose(
    *, score: Choice, pick: Choice, keep: float, shelves: Iterable[ModuleType] = (), places: Places = CONFIG
) -> list[str]:
    """Check a choice of methods before anything is recorded.

    Args:
        score, pick: a method each, by name or with options
        keep: fraction of the images that stays
        shelves: modules with methods of the user's own
        places: what refusals call what they speak of

    Returns:
        Sentences that the user should read: what is known to end badly.

    Raises:
        Refused: no such method or option, or a ``keep`` that is no fraction in (0, 1].
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise Refused(f"{places.keep}: {keep!r} is no fraction in (0, 1]. Say 0.3 to keep 30 % of the images.")
    shelves = list(shelves)
    score_name = resolve(
        scores, shelves, score, places.score, options_place=places.options_of_score, here=VOCABULARY
    ).name
    pick_name = resolve(pickers, shelves, pick, places.pick, options_place=places.options_of_pick, here=OF_PICKERS).name
    if pick_name == "top_k" and score_name not in _NOT_DIFFICULTY and keep < 0.5:
        return [
            f"{places.pick}: the {keep:.0%} that {score_name} ranks highest may train worse than a random {keep:.0%}: on CIFAR-10, "
            "the 10 % most forgotten gave 34 % top-1 and random ones about 79 % (Zheng et al. 2023). Take 'ccs'."
        ]
    return []


DEFAULT_SCORE, DEFAULT_PICK = "dual", "beta"
"""What is taken where nothing is said (docs/selection.md, which method when)."""

HANDED = frozenset({"labels", "scores", "ranking", "budget", "keep", "quotas", "rng", "start"})
"""What methods read that is known without a proxy."""

_OF_SCORES = {"scores", "ranking"}

OF_PICKERS = HANDED | frozenset(VOCABULARY)
"""What a picker may read; a score: what is in the vocabulary."""


def goes_by_score(pick: Choice, shelves: Iterable[ModuleType] = ()) -> bool:
    """Whether a picker reads what images score; one that is on no shelf counts as doing so."""
    function = named(pickers, shelves, pick, OF_PICKERS)
    return function is None or bool(_OF_SCORES & set(methods.reads(function)))


def reads(score: Choice | None, pick: Choice | None, shelves: Iterable[ModuleType] = ()) -> set[str]:
    """The signals that a score and a picker read (None: there is none), labels aside. A method that is on no shelf counts as
    reading all of them."""
    found: set[str] = set()
    for shelf, choice, here in ((scores, score, frozenset(VOCABULARY)), (pickers, pick, OF_PICKERS)):
        if choice is None:
            continue
        function = named(shelf, shelves, choice, here)
        found |= set(VOCABULARY if function is None else methods.reads(function)) - HANDED
    return found


def affordable(labels: Rows, keep: float, balance: bool, places: Places = CONFIG) -> int:
    """How many of the images ``keep`` is.

    Raises:
        Refused: none, or fewer than there are classes where they are balanced.
    """
    total, classes = len(labels), len(np.unique(labels))
    budget = round(keep * total)
    if budget < 1:
        raise Refused(f"{places.keep}: {keep:g} of {total} images is none. Keep at least {1 / total:.2g}.")
    if balance and budget < classes:
        raise Refused(
            f"{places.keep}: {budget} of {total} images is fewer than the {classes} classes. "
            f"Keep at least {classes / total:.2g}, or set {places.unbalanced}."
        )
    return budget


def select(
    signals: Signals,
    *,
    score: Choice,
    pick: Choice,
    keep: float,
    balance: bool | str = True,
    floor: float | None = None,
    seed: int = 0,
    start: Subset | None = None,
    max_memory: float | None = None,
    shelves: Iterable[ModuleType] = (),
) -> Lottery:
    """Draw the ticket: exactly ``round(keep * N)`` images.

    Args:
        signals: what is known of the N images. Labels alone will do where no method reads more.
        score: a function of selection/scores.py. A setting ``seed`` that it has is ``seed`` where it is not said.
        pick: a function of selection/pickers.py.
        keep: the fraction that stays, in (0, 1].
        balance: share the budget among the classes (see :func:`selection.shares.quotas`) and pick in each: ``"fraction"`` (or True)
            in proportion to their sizes, ``"equal"``, ``"sqrt"``; False: do not.
        floor: where classes are not balanced, the fraction of what balance would give it (rounded up) that each class keeps at least,
            in (0, 1]. Classes that the picker leaves below it are picked from alone, the others again with what is left.
        seed: everything random follows from it.
        start: a ticket for the same images whose rows all stay; the picker adds to them. One that does not read ``start`` is
            handed the images that are not in yet and what is left of the budget; the rows of the ticket weigh 1.
        max_memory: GB that the score, and then the picker, may take beside the signals; None: the picker's own limit, where it has
            one. What would take more is refused before it is begun, or takes a way that needs less.
        shelves: modules with scores and pickers of the user's own; they win over ours.

    Raises:
        Refused: see :func:`choose`; what a method reads is missing; a budget of no image, or of fewer than there are classes; a
            score that is NaN; a picker that does not return what it should.
    """
    request = Request(
        score=score, pick=pick, keep=keep, balance=balance, floor=floor, seed=seed, start=start, max_memory=max_memory
    )
    return draw(signals, request, shelves)


def draw(signals: Signals, request: Request, shelves: Iterable[ModuleType] = (), places: Places = CONFIG) -> Lottery:
    """As :func:`select`.

    Args:
        signals: what was recorded of the images
        request: what is to be drawn, and how
        shelves: modules with scores and pickers of the user's own
        places: what refusals call what they speak of, a config's settings or the flags of a command line.
    """
    if not isinstance(signals, Signals):
        raise Refused(f"signals: a {type(signals).__name__} is none. Of what others made, give its .signals.")
    shelves, floor, max_memory = list(shelves), request.floor, request.max_memory
    warnings = choose(score=request.score, pick=request.pick, keep=request.keep, shelves=shelves, places=places)
    seed, share = check_seed(request.seed), balance_of(request.balance, places.balance)
    scorer = _scorer(request.score, seed, shelves, places)
    picker = resolve(pickers, shelves, request.pick, places.pick, here=OF_PICKERS)
    begun = _begun(request.start, signals, places)
    _check_floor(floor, bool(share), places)
    by_class = _by_class(share, floor)
    budget = affordable(signals["labels"], request.keep, bool(by_class), places)
    groups = list(_groups(signals["labels"], budget, by_class, seed))

    read = set(methods.reads(picker.function))
    going, together = bool(read & _OF_SCORES), floor is not None or "quotas" in read
    needed = bool(groups) and going
    _check_labels(signals, [(places.score, scorer)] * needed + [(places.pick, picker)] * bool(groups), places)
    handed = [(0, np.arange(signals.images), budget)] if together else groups
    sizes = {(len(group), quota) for _, group, quota in handed}
    enough = 0.0 if max_memory is None else limits.of_all(scorer if needed else None, picker, signals, sizes)
    score_of = _scored if needed else _scored_if_it_can_be
    values = score_of(signals, scorer, max_memory, enough, places)
    limit = limits.Limits(signals, picker, max_memory, places.max_memory, enough)
    if groups:
        limit.check(f"{places.pick} ({picker.name})", bool(share))
    drawing = Drawing(signals, values, limit, float(request.keep), begun, seed, places)
    rows, weights = _drawn(drawing, groups, budget, at_once=bool(share) and together, floor=floor)
    origin = {
        "score": {"name": scorer.name, **_as_read(scorer, signals.epochs)},
        "pick": {"name": picker.name, **picker.settings},
        "balance": share if share in BALANCES[1:] else bool(share),
        **_said(
            floor=floor, seed=seed, score_read=None if going else False, start=request.start and request.start.origin
        ),
    }
    subset = Subset(
        rows, signals.images, fingerprint=signals.fingerprint, weights=weights / weights.mean(), keep=float(request.keep),
        origin=origin, known=Known(None if signals.unlabeled else signals["labels"], signals.classes, values),
    )  # fmt: skip
    return Lottery(subset, values, (*warnings, *_seeded(picker, seed, places)), going)


def _begun(start: Subset | None, signals: Signals, places: Places) -> Rows:
    """Images that are in already.

    Raises:
        Refused: they are of other data.
    """
    if start is None:
        return np.empty(0, np.int64)
    start.check(signals.fingerprint, signals.images, place=places.start)
    return start.rows


def _said(**parts: Any) -> dict[str, Any]:
    """Without those that are None."""
    return {name: value for name, value in parts.items() if value is not None}


def _seeded(picker: Method, seed: int, places: Places) -> list[str]:
    told = f"{places.pick}: {picker.name} draws nothing, so that another seed than 0 gives the same images"
    return [told] if picker.function in _UNDRAWN and seed else []


def _drawn(drawing: Drawing, groups: list[Group], budget: int, *, at_once: bool, floor: float | None) -> Weighed:
    """Rows and weights: of all where there are no groups; out of each group, or of all groups at once for a picker that keeps their
    quotas, or where they have a floor."""
    images = drawing.signals.images
    if not groups:
        return np.arange(images), np.ones(images)
    if floor is not None:
        drawn = above_floor(floor, groups, budget, drawing.signals["labels"], drawing.draw)
    elif at_once:
        drawn = [drawing.draw(np.arange(images), budget, 0, np.array([quota for *_, quota in groups]))]
    else:
        drawn = [drawing.draw(group, quota, key) for key, group, quota in groups]
    rows, weights = zip(*drawn, strict=True)
    return np.concatenate(rows), np.concatenate(weights)


def _needs_labels(signals: Signals, method: Method) -> bool:
    """Whether a method reads labels that the images do not have."""
    reads_some = "labels" in methods.reads(method.function) and method.function not in _COUNTING
    return signals.unlabeled and reads_some


def _check_labels(signals: Signals, chosen: Iterable[tuple[str, Method]], places: Places) -> None:
    for place, method in chosen:
        if _needs_labels(signals, method):
            raise Refused(f"{place}: {method.name!r} reads labels, and these images have none. Give {places.labels}.")


def _by_class(share: str, floor: float | None) -> str:
    """How classes share the budget, or what each would have of it: a floor is a part of that."""
    return share or (BALANCES[0] if floor is not None else "")


def _check_floor(floor: Any, balance: bool, places: Places) -> None:
    if floor is None:
        return
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 < floor <= 1:
        raise Refused(
            f"{places.floor}: {floor!r} is no fraction in (0, 1]. Say 0.5 for half of what balance gives a class."
        )
    if balance:
        raise Refused(
            f"{places.floor}: every class keeps its share already. Set {places.unbalanced}, or leave the floor out."
        )


def scored(
    signals: Signals,
    *,
    score: Choice,
    seed: int = 0,
    shelves: Iterable[ModuleType] = (),
    max_memory: float | None = None,
) -> Floats:
    """(N,) what each image scores; higher = keep first, may hold infinities.

    Args:
        signals: of N images
        score: a name, or a mapping with ``name`` and options
        seed: what a random score follows from, where it is not said
        shelves: modules with scores of the user's own
        max_memory: GB that it may take beside the signals; None: as it needs

    Raises:
        Refused: no such method or option; what it reads is missing; too little memory; a score that is NaN.
    """
    return _scored(signals, _scorer(score, seed, shelves, CONFIG), max_memory, 0.0, CONFIG)


def _scored(signals: Signals, scorer: Method, max_memory: float | None, enough: float, places: Places) -> Floats:
    what = f"{places.score} ({scorer.name})"
    if max_memory is not None:
        needed = limits.of_score(scorer, signals)
        at_once = f"{what}, for {signals.images} images at once"
        memory.within(max_memory, needed, at_once, "Take one that reads less", enough=enough, name=places.max_memory)
    values = methods.call(
        scorer.function, signals.available(), scorer.options, place=places.score, here=signals.known, cures=CURES
    )
    return _checked_scores(values, signals.images, what)


def _scored_if_it_can_be(
    signals: Signals, scorer: Method, max_memory: float | None, enough: float, places: Places
) -> Floats | None:
    """What the picker does not read is told along where it can be had (of one epoch dual has nothing to say), and else not."""
    if any(name not in signals for name in methods.reads(scorer.function)) or _needs_labels(signals, scorer):
        return None
    try:
        return _scored(signals, scorer, max_memory, enough, places)
    except Refused:
        return None


def _scorer(score: Choice, seed: int, shelves: Iterable[ModuleType], places: Places) -> Method:
    scorer = resolve(scores, shelves, score, places.score, here=VOCABULARY)
    if "seed" not in methods.settings(scorer.function):
        return scorer
    return scorer._replace(options={"seed": int(seed), **scorer.options})


def _groups(labels: Rows, budget: int, balance: str, seed: int) -> Iterator[Group]:
    """(key, rows, quota) of each class; of all rows at once where classes are not balanced; none where all stay."""
    if budget == len(labels):
        return
    if not balance:
        yield 0, np.arange(len(labels)), budget
        return
    classes, sizes = np.unique(labels, return_counts=True)
    shares = quotas(sizes, budget, np.random.default_rng([seed, QUOTAS]), balance)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    yield from zip((int(c) for c in classes), by_class, (int(q) for q in shares), strict=True)


def _as_read(scorer: Method, epochs: int) -> dict[str, Any]:
    """The settings of a score, of ours with no more epochs than the proxy had: what its docstrings call a shorter proxy."""
    settings, read = scorer.settings, methods.reads(scorer.function)
    watched = any(name in VOCABULARY and "E" in VOCABULARY[name].dims for name in read)
    if scorer.function.__module__ != scores.__name__ or not watched or not epochs:
        return settings
    clipped = {
        name: min(settings[name], epochs)
        for name in ("epoch", "epochs", "window")
        if isinstance(settings.get(name), int) and not isinstance(settings[name], bool)
    }
    return {**settings, **clipped}


def _checked_scores(values: Any, total: int, place: str) -> Floats:
    given = np.asarray(values)
    if given.shape != (total,) or given.dtype.kind not in "fiu":
        raise Refused(f"{place}: was to return {total} numbers, one an image, and gave {given.dtype} {given.shape}.")
    checked: Floats = given.astype(np.float64)
    wrong = np.flatnonzero(np.isnan(checked) | (checked == -np.inf))
    if len(wrong):
        raise Refused(
            f"{place}: {checked[wrong[0]]} for {len(wrong)} images, the first is row {wrong[0]}. A score is finite or +inf."
        )
    checked.setflags(write=False)
    return checked
