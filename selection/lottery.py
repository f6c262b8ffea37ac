"""The data lottery: score, rank, pick, and share the budget among the classes. The one place that sorts and balances."""

from __future__ import annotations

import contextlib
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from selection import memory, methods, pickers, scores
from selection.errors import Refused
from selection.gradients import need_batches, need_products
from selection.signals import CURES, VOCABULARY, Signals
from selection.submodular import need, need_sparse, neighborhood
from selection.subset import Subset

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Streams of chance that must not repeat one another: seed, then one of these, then the class.
_QUOTAS, _RANKING, _PICK = 1, 2, 3

# Scores that say where an image lies and not how hard it is: the highest are what their authors keep.
_NOT_DIFFICULTY = {"random", "moderate", "zcore"}


class Named(Protocol):
    """A method by name, with its options: what a config has for ``score`` and ``pick``."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


Choice = str | Mapping[str, Any] | Named
"""``"ccs"``, ``{"name": "ccs", "bins": 20}``, or an object with ``name`` and ``options``."""


@dataclass(frozen=True)
class Places:
    """What a refusal calls what the user can change: a config's settings, unless the caller asks for them in another way."""

    score: str = "select.score"
    pick: str = "select.pick"
    keep: str = "select.keep"
    floor: str = "select.floor"
    unbalanced: str = "select.balance=false"
    start: str = "select.start"
    max_memory: str = "select.max_memory"
    options_of_score: str = "select.score"
    """What stands before a dot and the name of the option."""
    options_of_pick: str = "select.pick"


CONFIG = Places()


@dataclass(frozen=True, eq=False)
class Lottery:
    """What a lottery came to."""

    subset: Subset
    scores: Floats | None
    """(N,), higher = keep first, may hold +inf; None where nothing read them and what they read was not recorded."""
    warnings: tuple[str, ...] = ()
    """Sentences for the user."""


def choose(
    *, score: Choice, pick: Choice, keep: float, shelves: Iterable[ModuleType] = (), places: Places = CONFIG
) -> list[str]:
    """Check a choice of methods before anything is recorded.

    Args:
        places: what refusals call what they speak of

    Returns:
        Sentences that the user should read: what is known to end badly.

    Raises:
        Refused: no such method or option, or a ``keep`` that is no fraction in (0, 1].
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise Refused(f"{places.keep}: {keep!r} is no fraction in (0, 1]. Say 0.3 to keep 30 % of the images.")
    shelves = list(shelves)
    score_name, _, _ = resolve(scores, shelves, score, places.score, options_place=places.options_of_score)
    pick_name, _, _ = resolve(pickers, shelves, pick, places.pick, options_place=places.options_of_pick)
    if pick_name == "top_k" and score_name not in _NOT_DIFFICULTY and keep < 0.5:
        return [
            f"{places.pick}: the {keep:.0%} that {score_name} ranks highest may train worse than a random {keep:.0%}: on CIFAR-10, "
            "the 10 % most forgotten gave 34 % top-1 and random ones about 79 % (Zheng et al. 2023). Take 'ccs'."
        ]
    return []


DEFAULT_SCORE, DEFAULT_PICK = "dual", "beta"
"""What is taken where nothing is said (docs/selection.md, which method when)."""

TOLD = frozenset({"labels", "scores", "ranking", "budget", "keep", "quotas", "rng", "start"})
"""What methods read that is known without a proxy."""


def reads(score: Choice, pick: Choice, shelves: Iterable[ModuleType] = ()) -> set[str]:
    """The signals that a score and a picker read, labels aside. A method that is on no shelf counts as reading all of them."""
    found: set[str] = set()
    for shelf, choice in ((scores, score), (pickers, pick)):
        try:
            _, method, _ = resolve(shelf, shelves, choice, "")
        except Refused:
            return set(VOCABULARY) - TOLD
        found |= set(methods.reads(method)) - TOLD
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
    balance: bool = True,
    floor: float | None = None,
    seed: int = 0,
    start: Subset | None = None,
    max_memory: float | None = None,
    shelves: Iterable[ModuleType] = (),
    places: Places = CONFIG,
) -> Lottery:
    """Draw the ticket: exactly ``round(keep * N)`` images.

    Args:
        signals: what is known of the N images. Labels alone will do where no method reads more.
        score: a function of selection/scores.py. A setting ``seed`` that it has is ``seed`` where it is not said.
        pick: a function of selection/pickers.py.
        keep: the fraction that stays, in (0, 1].
        balance: share the budget among the classes in proportion to their sizes (see :func:`quotas`) and pick in each.
        floor: where classes are not balanced, the fraction of what balance would give it (rounded up) that each class keeps at least,
            in (0, 1]. Classes that the picker leaves below it are picked from alone, the others again with what is left.
        seed: everything random follows from it.
        start: a ticket for the same images whose rows all stay; the picker adds to them. One that does not read ``start`` is
            handed the images that are not in yet and what is left of the budget; the rows of the ticket weigh 1.
        max_memory: GB that the score, and then the picker, may take beside the signals; None: the picker's own limit, where it has
            one. What would take more is refused before it is begun, or takes a way that needs less.
        shelves: modules with scores and pickers of the user's own; they win over ours.
        places: what refusals call what they speak of, a config's settings or the flags of a command line.

    Raises:
        Refused: see :func:`choose`; what a method reads is missing; a budget of no image, or of fewer than there are classes; a
            score that is NaN; a picker that does not return what it should.
    """
    shelves = list(shelves)
    warnings = choose(score=score, pick=pick, keep=keep, shelves=shelves, places=places)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise Refused(f"seed: {seed!r} is no whole number of at least 0.")
    score_name, scorer, score_options = _scorer(score, seed, shelves, places)
    pick_name, picker, pick_options = resolve(pickers, shelves, pick, places.pick)

    total = signals.images
    inside = np.zeros(total, dtype=bool)
    if start is not None:
        start.check(signals.fingerprint, total, place=places.start)
        inside[start.rows] = True

    _check_floor(floor, balance, places)
    budget = affordable(signals["labels"], keep, balance or floor is not None, places)
    read = {"scores", "ranking"} & set(methods.reads(picker))
    needed = bool(read) and budget < total
    together = floor is not None or "quotas" in methods.reads(picker)
    groups = list(_groups(signals["labels"], budget, balance or floor is not None, int(seed))) if budget < total else []
    enough = 0.0
    if max_memory is not None:
        sizes = {(total, budget)} if together else {(len(group), quota) for _, group, quota in groups}
        picking = [_working(n, picker, signals) + _matrices(n, k, picker, pick_options, signals) for n, k in sizes]
        enough = max([_scoring(scorer, score_options, signals) if needed else 0.0, *picking])
    values = None
    if needed or all(name in signals for name in methods.reads(scorer)):
        # What the picker does not read is told along where it can be had (of one epoch dual has nothing to say), and else not.
        with contextlib.nullcontext() if needed else contextlib.suppress(Refused):
            values = scored(
                signals, score=score, seed=seed, shelves=shelves, max_memory=max_memory, enough=enough, places=places
            )

    if budget == total:
        rows, weights = np.arange(total), np.ones(total)
    else:
        if max_memory is not None:
            _afford(signals, picker, f"{places.pick} ({pick_name})", max_memory, balance, enough, places)

        def draw(group: Rows, quota: int, key: int, shares: Rows | None = None) -> tuple[Rows, Floats]:
            limited = _limited(signals, picker, pick_options, max_memory, len(group), enough, places)
            stream = int(seed), key
            return _draw(signals, values, picker, limited, group, quota, keep, shares, inside[group], stream, places)

        if floor is not None:
            drawn = _above(floor, groups, budget, signals["labels"], draw)
        elif balance and together:
            drawn = [draw(np.arange(total), budget, 0, np.array([quota for *_, quota in groups]))]
        else:
            drawn = [draw(group, quota, key) for key, group, quota in groups]
        rows, weights = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    origin = {
        "score": {
            "name": score_name,
            **_as_read(scorer, {**methods.settings(scorer), **score_options}, signals.epochs),
        },
        "pick": {"name": pick_name, **methods.settings(picker), **pick_options},
        "balance": bool(balance),
        **({"floor": float(floor)} if floor is not None else {}),
        "seed": int(seed),
        **({"start": start.origin} if start is not None else {}),
    }
    subset = Subset(
        rows,
        total,
        fingerprint=signals.fingerprint,
        weights=weights / weights.mean(),
        keep=float(keep),
        origin=origin,
        labels=signals["labels"],
        classes=signals.classes,
        scores=values,
    )
    return Lottery(subset, values, tuple(warnings))


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


def _above(
    floor: float,
    groups: Sequence[tuple[int, Rows, int]],
    budget: int,
    labels: Rows,
    draw: Callable[[Rows, int, int], tuple[Rows, Floats]],
) -> list[tuple[Rows, Floats]]:
    """Draws over all classes together in which none falls below its floor.

    Classes that a draw leaves below it get it, picked from alone; then the others are drawn from again with what is left, for
    some of them may be below theirs now. A draw that took fewer from those leaves room for the rest, so it always ends.
    """
    least = {key: math.ceil(floor * quota - 1e-9) for key, _, quota in groups}
    short: set[int] = set()
    rest, key = np.arange(len(labels)), 0
    while True:
        rows, weights = draw(rest, budget - sum(least[key] for key in short), key)
        kept = np.bincount(labels[rows], minlength=int(labels.max()) + 1)
        below = {key for key, _, _ in groups if key not in short and kept[key] < least[key]}
        if not below:
            alone = [draw(group, least[key], key) for key, group, _ in groups if key in short]
            return [(rows, weights), *alone]
        short |= below
        rest = np.flatnonzero(~np.isin(labels, list(short)))
        key = int(labels.max()) + 1  # another stream of chance than any class has


def _widths(method: Any, signals: Signals) -> tuple[list[int], list[int]]:
    """Numbers an image of each signal that a method reads: of those that were watched, or said of it by runs, and of the others."""
    read = [name for name in methods.reads(method) if name in signals and len(VOCABULARY[name].dims) > 1]
    wide = [signals[name].shape[1] for name in read if VOCABULARY[name].dims[0] == "N"]
    watched = [signals.seeds * signals.epochs for name in read if VOCABULARY[name].dims == ("S", "E", "N")]
    runs = [len(signals[name]) for name in read if VOCABULARY[name].dims == ("K", "N")]
    return watched + runs, wide


def _working(n: int, picker: Any, signals: Signals) -> float:
    """GB that a picker takes for n of the images, beside matrices of its own."""
    watched, wide = _widths(picker, signals)
    return memory.working(n, watched + wide, blocks=bool(wide))


def _scoring(scorer: Any, options: Mapping[str, Any], signals: Signals) -> float:
    """GB that a score takes, which is handed all images at once and goes through them in parts."""
    n, (watched, wide) = signals.images, _widths(scorer, signals)
    k = {**methods.settings(scorer), **options}["neighbors"] if scorer is scores.cal else 0
    lists = 8 * n * (k + 1) / memory.GB if k and isinstance(k, int) else 0.0
    return memory.working(n, watched + wide, blocks=bool(wide)) + memory.parts(n, watched + wide) + lists


def _matrices(n: int, budget: int, picker: Any, options: Mapping[str, Any], signals: Signals) -> float:
    """GB that a picker of ours takes at least for matrices of its own, which come on top; of another's nothing is known."""
    wants = {**methods.settings(picker), **options}
    if "max_memory" in options or picker.__module__ != pickers.__name__:
        return 0.0
    if "maximizer" in wants and wants["maximizer"] != "stochastic":
        ways = {"lazy": need(n), "sparse": need_sparse(n, neighborhood(n, budget, wants["neighbors"]))}
        return ways.get(wants["maximizer"], min(ways.values()))
    if picker is pickers.grad_match and "errors" in signals and "embeddings" in signals:
        size = min(wants["batch"], budget)
        widths = signals["errors"].shape[1], signals["embeddings"].shape[1]
        return need_products(budget) if wants["by"] == "image" else need_batches(n, budget, size, *widths)
    return 0.0


def _afford(
    signals: Signals, picker: Any, what: str, max_memory: float, balance: bool, enough: float, places: Places
) -> None:
    """Refuse a picker whose copies of what it reads go beyond the limit, for the largest group that it is handed."""
    balance = balance and "quotas" not in methods.reads(picker)
    most = int(np.bincount(signals["labels"]).max()) if balance else signals.images
    cure = "Take one that reads scores alone (ccs, top_k)" if balance else "Balance the classes"
    memory.within(
        max_memory,
        _working(most, picker, signals),
        f"{what}, for {most} images at once",
        cure,
        enough=enough,
        name=places.max_memory,
    )


def _limited(
    signals: Signals,
    picker: Any,
    options: Mapping[str, Any],
    max_memory: float | None,
    n: int,
    enough: float,
    places: Places,
) -> Mapping[str, Any]:
    """``options`` with what the limit leaves for matrices of the picker's own; a limit in ``options`` is more particular."""
    own = methods.settings(picker).get("max_memory")
    if own is None or "max_memory" in options:
        return options
    if max_memory is None:
        return {**options, "max_memory": memory.Left(own, 0.0, name=places.max_memory)}
    return {**options, "max_memory": memory.Left(max_memory, _working(n, picker, signals), enough, places.max_memory)}


def scored(
    signals: Signals,
    *,
    score: Choice,
    seed: int = 0,
    shelves: Iterable[ModuleType] = (),
    max_memory: float | None = None,
    enough: float = 0.0,
    places: Places = CONFIG,
) -> Floats:
    """(N,) what each image scores; higher = keep first, may hold infinities.

    Args:
        seed: what a random score follows from, where it is not said
        max_memory: GB that it may take beside the signals; None: as it needs
        enough: GB that what comes after it will need, where that is known: a refusal names no less
        places: what refusals call what they speak of

    Raises:
        Refused: no such method or option; what it reads is missing; too little memory; a score that is NaN.
    """
    name, scorer, options = _scorer(score, seed, shelves, places)
    what = f"{places.score} ({name})"
    if max_memory is not None:
        needed = _scoring(scorer, options, signals)
        at_once = f"{what}, for {signals.images} images at once"
        memory.within(max_memory, needed, at_once, "Take one that reads less", enough=enough, name=places.max_memory)
    values = methods.call(scorer, signals.available(), options, place=places.score, here=signals.known, cures=CURES)
    return _checked_scores(values, signals.images, what)


def _scorer(score: Choice, seed: int, shelves: Iterable[ModuleType], places: Places) -> tuple[str, Any, dict[str, Any]]:
    name, scorer, options = resolve(scores, shelves, score, places.score)
    return name, scorer, {"seed": int(seed), **options} if "seed" in methods.settings(scorer) else options


def ranking(scores: Floats, rng: np.random.Generator) -> Rows:
    """The rows, highest score first. Ties are in random order: in that of the rows, the first folder would always win."""
    shuffled = rng.permutation(len(scores))
    return shuffled[np.argsort(-scores[shuffled], kind="stable")]


def quotas(sizes: npt.ArrayLike, budget: int, rng: np.random.Generator) -> Rows:
    """Share ``budget`` among classes in proportion to their sizes, by largest remainder, at least one image a class.

    Exact: they sum to ``budget``, none is above its size, and each is within one of ``budget * size / sum(sizes)`` but where
    the least of one image moves it. Equal remainders are served in random order.

    Args:
        sizes: (C,) images of each class, at least 1 each.
        budget: C to ``sum(sizes)``.
    """
    order = rng.permutation(np.size(sizes))
    sizes = np.asarray(sizes, dtype=np.int64)[order]
    whole = int(sizes.sum())
    shares = np.maximum(1, sizes * budget // whole)
    missing = budget - int(shares.sum())
    for _ in range(abs(missing)):  # fewer than there are classes
        behind = sizes * budget - shares * whole  # in parts of an image: integers, hence exact
        if missing > 0:
            shares[np.argmax(np.where(shares < sizes, behind, np.iinfo(np.int64).min))] += 1
        else:
            shares[np.argmin(np.where(shares > 1, behind, np.iinfo(np.int64).max))] -= 1
    result = np.empty_like(shares)
    result[order] = shares
    return result


def resolve(
    shelf: ModuleType,
    shelves: Iterable[ModuleType],
    choice: Choice,
    place: str,
    *,
    options_place: str = "",
    also: Callable[[Callable[..., Any]], Iterable[str]] = lambda method: (),
) -> tuple[str, Any, dict[str, Any]]:
    """Name, function and options of a choice, which are checked.

    Args:
        options_place: what a refusal has before the name of an option; empty: ``place``
        also: what can be said beside a method's own settings, and was taken out of the options, for a refusal to name
    """
    name: Any
    options: Any
    if isinstance(choice, str):
        name, options = choice, {}
    elif isinstance(choice, Mapping):
        options = dict(choice)
        name = options.pop("name", None)
    else:
        name, options = getattr(choice, "name", None), getattr(choice, "options", None)
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise Refused(f"{place}: expected a name, or a name with options like {{name: ccs, bins: 20}}, not {choice!r}.")
    method = methods.find([shelf, *shelves], name, place=place)
    methods.check_settings(method, options, place=options_place or place, also=also(method))
    return name, method, dict(options)


def _groups(labels: Rows, budget: int, balance: bool, seed: int) -> Iterator[tuple[int, Rows, int]]:
    """(key, rows, quota) of each class; of all rows at once where classes are not balanced."""
    if not balance:
        yield 0, np.arange(len(labels)), budget
        return
    classes, sizes = np.unique(labels, return_counts=True)
    shares = quotas(sizes, budget, np.random.default_rng([seed, _QUOTAS]))
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    yield from zip((int(c) for c in classes), by_class, (int(q) for q in shares), strict=True)


def _draw(
    signals: Signals,
    values: Floats | None,
    picker: Any,
    options: Mapping[str, Any],
    group: Rows,
    quota: int,
    keep: float,
    shares: Rows | None,
    inside: npt.NDArray[np.bool_],
    stream: tuple[int, int],
    places: Places,
) -> tuple[Rows, Floats]:
    """Rows and weights that the picker takes out of one group, of which those ``inside`` are in already."""
    seed, key = stream
    have = np.flatnonzero(inside)
    short = len(have) > quota
    if shares is not None:
        counts = np.unique(signals["labels"][group], return_inverse=True)[1]
        begun = np.bincount(counts[have], minlength=len(shares))
        short = bool((begun > shares).any())
    if short:
        raise Refused(
            f"{places.start}: it has {len(have)} of {len(group)} images (class {key}, where classes are balanced), and {quota} are to stay. "
            "Keep more."
        )
    if len(have) and "start" not in methods.reads(picker):  # it adds to nothing: it is handed what is not in yet
        if len(have) == quota:
            return group[have], np.ones(quota)
        left = None
        if shares is not None:
            left = (shares - begun)[np.bincount(counts[~inside], minlength=len(shares)) > 0]
        others = group[~inside]
        rows, weights = _draw(
            signals, values, picker, options, others, quota - len(have), keep, left, np.zeros(len(others), bool), stream,
            places,
        )  # fmt: skip
        return np.concatenate([group[have], rows]), np.concatenate([np.ones(len(have)), weights])
    rng = np.random.default_rng([seed, _PICK, key])
    told: dict[str, Any] = {"budget": quota, "keep": float(keep), "quotas": shares, "rng": rng, "start": have}
    if values is not None:
        told["scores"] = values[group]
        told["ranking"] = ranking(told["scores"], np.random.default_rng([seed, _RANKING, key]))
    place = f"{places.pick} ({picker.__name__})"
    taken = methods.call(
        picker,
        ChainMap(told, signals.available(group)),  # type: ignore[arg-type]
        options,
        place=places.pick,
        here={*told, *signals.known},
        cures=CURES,
    )
    rows, weights = taken if isinstance(taken, tuple) else (taken, np.ones(quota))
    rows, weights = np.asarray(rows), np.asarray(weights, dtype=np.float64)
    if rows.shape != (quota,) or rows.dtype.kind not in "iu" or len(np.unique(rows)) < quota:
        raise Refused(
            f"{place}: was to return {quota} distinct rows, and gave {len(np.unique(rows))} in {rows.dtype} {rows.shape}."
        )
    if rows.min() < 0 or rows.max() >= len(group):
        raise Refused(f"{place}: was to return rows of 0 to {len(group) - 1}, and gave {rows.min()} to {rows.max()}.")
    if not np.isin(have, rows).all():
        raise Refused(f"{place}: was to keep the {len(have)} rows that it started from, and did not.")
    if weights.shape != (quota,) or not np.isfinite(weights).all() or weights.min() <= 0:
        raise Refused(f"{place}: was to return {quota} positive weights.")
    return group[rows], weights


def _as_read(scorer: Any, settings: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """``settings`` of a score of ours, with no more epochs than the proxy had: what its docstrings call a shorter proxy."""
    watched = any(name in VOCABULARY and "E" in VOCABULARY[name].dims for name in methods.reads(scorer))
    if scorer.__module__ != scores.__name__ or not watched or not epochs:
        return dict(settings)
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
