"""The memory that scores and pickers take, held to the user's limit before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from selection import memory, methods, pickers, scores
from selection.choices import Method
from selection.gradients import need_batches, need_products
from selection.signals import VOCABULARY, Signals
from selection.submodular import need, need_sparse, neighborhood


def of_score(scorer: Method, signals: Signals) -> float:
    """GB that a score takes, which is handed all images at once and goes through them in parts."""
    n, (watched, wide) = signals.images, _widths(scorer.function, signals)
    k = scorer.settings["neighbors"] if scorer.function is scores.cal else 0
    lists = 8 * n * (k + 1) / memory.GB if k and isinstance(k, int) else 0.0
    return memory.working(n, watched + wide, blocks=bool(wide)) + memory.parts(n, watched + wide) + lists


def of_all(scorer: Method | None, picker: Method, signals: Signals, sizes: set[tuple[int, int]]) -> float:
    """GB with which a whole draw gets through, the picker's own matrices included, as far as they are known.

    Args:
        scorer: None where nothing is scored
        picker: and its options
        signals: of the images
        sizes: images and budget of each group that the picker is handed
    """
    picking = [_working(n, picker.function, signals) + _matrices(n, budget, picker, signals) for n, budget in sizes]
    return max([of_score(scorer, signals) if scorer is not None else 0.0, *picking])


def _widths(method: Callable[..., Any], signals: Signals) -> tuple[list[int], list[int]]:
    """Numbers an image of each signal that a method reads: of those that were watched, or said of it by runs, and of the others."""
    read = [name for name in methods.reads(method) if name in signals and len(VOCABULARY[name].dims) > 1]
    wide = [signals[name].shape[1] for name in read if VOCABULARY[name].dims[0] == "N"]
    watched = [signals.seeds * signals.epochs for name in read if VOCABULARY[name].dims == ("S", "E", "N")]
    runs = [len(signals[name]) for name in read if VOCABULARY[name].dims == ("K", "N")]
    return watched + runs, wide


def _working(n: int, picker: Callable[..., Any], signals: Signals) -> float:
    """GB that a picker takes for n of the images, beside matrices of its own."""
    watched, wide = _widths(picker, signals)
    return memory.working(n, watched + wide, blocks=bool(wide))


def _matrices(n: int, budget: int, picker: Method, signals: Signals) -> float:
    """GB that a picker of ours takes at least for matrices of its own, which come on top; of another's nothing is known."""
    settings = picker.settings
    if "max_memory" in picker.options or picker.function.__module__ != pickers.__name__:
        return 0.0
    if "maximizer" in settings and settings["maximizer"] != "stochastic":
        ways = {"lazy": need(n), "sparse": need_sparse(n, neighborhood(n, budget, settings["neighbors"]))}
        return ways.get(settings["maximizer"], min(ways.values()))
    if picker.function is pickers.grad_match and "errors" in signals and "embeddings" in signals:
        size = min(settings["batch"], budget)
        widths = signals["errors"].shape[1], signals["embeddings"].shape[1]
        return need_products(budget) if settings["by"] == "image" else need_batches(n, budget, size, *widths)
    return 0.0


@dataclass(frozen=True, eq=False)
class Limits:
    """What a picker may take."""

    signals: Signals
    picker: Method
    max_memory: float | None
    """GB beside the signals; None: the picker's own limit, where it has one."""
    name: str
    """What the user calls it."""
    enough: float = 0.0
    """GB with which all of the draw gets through, for refusals to name."""

    def check(self, what: str, balance: bool) -> None:
        """Hold the copies of what the picker reads to the limit, for the largest group that it is handed.

        Raises:
            Refused: they go beyond it.
        """
        if self.max_memory is None:
            return
        balance = balance and "quotas" not in methods.reads(self.picker.function)
        most = int(np.bincount(self.signals["labels"]).max()) if balance else self.signals.images
        cure = "Take one that reads scores alone (ccs, top_k)" if balance else "Balance the classes"
        needed = _working(most, self.picker.function, self.signals)
        at_once = f"{what}, for {most} images at once"
        memory.within(self.max_memory, needed, at_once, cure, enough=self.enough, name=self.name)

    def options(self, n: int) -> Mapping[str, Any]:
        """The picker's options, with what the limit leaves of n images for matrices of its own; a limit in them is more particular."""
        options = self.picker.options
        own = methods.settings(self.picker.function).get("max_memory")
        if own is None or "max_memory" in options:
            return options
        if self.max_memory is None:
            return {**options, "max_memory": memory.Left(own, 0.0, name=self.name)}
        taken = _working(n, self.picker.function, self.signals)
        return {**options, "max_memory": memory.Left(self.max_memory, taken, self.enough, self.name)}
