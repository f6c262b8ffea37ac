"""What is told, as lines of text: no more than strings, so that terminal and report may both show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus.events import Step
from lotus.report import ledger
from lotus.report.numbers import accuracy, count, duration, listed, percent, si, standard_error, times

BINS = 16  # of the score histogram
_STALL = 0.02  # fraction of the time, from which on it is told
BAR = 44  # columns of its longest bar

_FACTS: Mapping[str, Callable[[float], str]] = {
    "epoch": "epoch {:.0f}".format,
    "images_per_second": lambda value: f"{count(value)} images/s" if value else "",
    "mfu": lambda value: f"MFU {percent(value, 0)}",
    "stall": lambda value: f"waits for images {percent(value, 0)}" if value >= _STALL else "",
    "loss": "loss {:.3f}".format,
    "top1": "top-1 {:.2f} %".format,
    "zero_gates": lambda value: f"zero gates {percent(value, 0)}",
    "patches": lambda value: f"patches {percent(value, 0)}" if value < 1 else "",
    "side": "side {:.0f}".format,
}
"""What is told of a value, in this order; empty: nothing."""


class Progress:
    """What is known of the stage at work."""

    def __init__(self, name: str, now: float, why: str = "") -> None:
        self.name = name
        self.why = why
        self.began = now
        self.done = self.total = 0
        self.unit = "steps"
        self.values: dict[str, float] = {}
        self.rest = 0.0
        """What the run has to do after this stage, in times of the whole stage."""
        self._from = (0, now)  # where the pace is taken from: a resumed stage does not start at 0

    def step(self, event: Step, now: float) -> None:
        if event.done < self.done or not self.total:  # the first step, or a second proxy in the same stage
            self._from = (event.done, now)
        self.name, self.done, self.total, self.unit = event.stage, event.done, event.total, event.unit
        self.values |= event.values

    def left(self, now: float) -> float | None:
        """Seconds to the end at the pace so far; None before there is one."""
        done, since = self.done - self._from[0], now - self._from[1]
        return (self.total - self.done) * since / done if done > 0 and since > 0 else None

    def facts(self, now: float) -> list[str]:
        facts = [] if self.total or not self.why else [self.why]
        facts += [told(self.values[name]) for name, told in _FACTS.items() if name in self.values]
        left = self.left(now)
        if left is not None and self.done < self.total:
            facts.append(f"{duration(left)} left")
            if self.rest:
                run = left * (1 + self.rest * self.total / (self.total - self.done))
                facts.append(f"about {duration(run)} of the run")
        return [fact for fact in facts if fact]

    def sentence(self, now: float) -> str:
        return ", ".join([f"{self.unit} {count(self.done)} of {count(self.total)}", *self.facts(now)])


def measured(values: Mapping[str, float]) -> str:
    told = [f"top-1 {accuracy(values['top1'], values.get('images'))}"] if "top1" in values else []
    return ", ".join([*told, *([f"loss {values['loss']:.4f}"] if "loss" in values else [])])


def cut(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    names = {"params": "parameters", "macs": "MACs an image"}
    return ", ".join(
        f"{names.get(name, name)} {si(before[name])} to {si(after[name])} ({times(after[name] / before[name])})"
        for name in names
        if before.get(name) and name in after
    )


def reached(values: Mapping[str, Any]) -> str:
    told = []
    if "kept" in values and "of" in values:
        told.append(f"{count(values['kept'])} of {count(values['of'])} images")
    elif "images" in values and "classes" in values:
        told.append(f"{count(values['images'])} images in {count(values['classes'])} classes")
    if values.get("skipped"):
        told.append(f"{count(values['skipped'])} damaged image{'s' * (values['skipped'] != 1)} skipped")
    if "top1" in values:
        of = (values.get("per_class") or {}).get("of") or ()
        told.append(f"top-1 {accuracy(values['top1'], sum(of))}")
    if "params" in values:
        told.append(f"{si(values['params'])} parameters")
    if "macs" in values:
        told.append(f"{si(values['macs'])} MACs")
    if "zero_gates" in values:
        told.append(f"zero gates {percent(values['zero_gates'], 0)}")
    return ", ".join(told)


def kept_lines(kept: Mapping[str, Any]) -> list[str]:
    """What the three lotteries kept, a line each; without those that took no part."""
    lines = []
    images, passes, tokens = (kept.get(name) for name in ("images", "passes", "tokens"))
    if images:
        lines.append(f"images      {_part(images)}")
    if passes and passes["kept"] < passes["of"]:
        lines.append(f"passes      {_part(passes)}")
    if tokens and tokens["kept"] < tokens["of"]:
        lines.append(f"patches     {_part(tokens)}{ledger.patches_told(tokens)}")
    if (dimensions := kept.get("dimensions")) and dimensions["macs"] == dimensions["params"] == 1:
        lines.append("dimensions  all: nothing was cut")
    elif dimensions:
        lines.append(f"dimensions  {_dimensions(dimensions, kept.get('blocks'))}")
    if width := kept.get("width"):
        told = f"{count(width['kept'])} of the residual stream's {count(width['of'])} channels"
        lines.append(f"embed dim   {told} ({percent(width['kept'] / width['of'])})")
    if latency := kept.get("latency"):
        lines.append(f"latency     {ledger.latency_told(latency)}")
    if weights := kept.get("weights"):
        told = f"weights     {_part(weights)}, the others are zeros: no MACs are saved"
        if weights.get("bytes"):
            told += f", the compressed file takes {si(weights['bytes'])}B instead of {si(weights['of_bytes'])}B"
        lines.append(told)
    return lines


def _part(one: Mapping[str, Any]) -> str:
    return f"{count(one['kept'])} of {count(one['of'])} ({percent(one['kept'] / one['of'])})"


def _dimensions(dimensions: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]] | None) -> str:
    told = f"{percent(dimensions['macs'])} of the MACs, {percent(dimensions['params'])} of the parameters"
    if not blocks:
        return told
    widths = [
        (sum(b["heads"] for b in blocks), sum(b["of_heads"] for b in blocks), "heads"),
        (
            sum(b["heads"] * b["head_dim"] for b in blocks),
            sum(b["of_heads"] * b["of_head_dim"] for b in blocks),
            "attention dimensions",
        ),
        (sum(b["hidden"] for b in blocks), sum(b["of_hidden"] for b in blocks), "MLP units"),
    ]
    return f"{told}: {listed([f'{count(now)} of {count(was)} {what}' for now, was, what in widths])}"


def size_lines(results: Mapping[str, Any], stages: ledger.Stages) -> list[str]:
    """The sizes that were written beside the pruned model, a line each."""
    return [
        f"{one['name']:<11} {percent(one['share'])} of the MACs, "
        + (f"{percent(one['time'])} of the latency, " if "time" in one else "")
        + f"{si(one['params'])} parameters, top-1 {accuracy(one['top1'], results.get('validation_images'))} right after the cut"
        for one in ledger.sizes(results, stages)
    ]


def quantiles(values: Mapping[str, Any]) -> str:
    """Those of scores, each by its name; ``values`` as :func:`selection.exchange.describe` has them."""
    names = {"low": "lowest", "q25": "25 %", "median": "median", "q75": "75 %", "high": "highest"}
    parts = [f"{name} {values[at]:.4g}" for at, name in names.items() if values[at] is not None]
    return ", ".join([*parts, *([f"{count(values['unbounded'])} without bound"] if values["unbounded"] else [])])


def flat(value: Any) -> str:
    """A method with its options, or whatever else, on a line."""
    if not isinstance(value, Mapping):
        return str(value)
    rest = ", ".join(f"{key} {part}" for key, part in value.items() if key != "name" and part is not None)
    return f"{value.get('name', '')}{f' ({rest})' if rest and 'name' in value else rest}"


def histogram(scores: npt.NDArray[np.floating], rows: npt.NDArray[np.integer], *, unicode: bool = True) -> list[str]:
    """Scores (N,) in :data:`BINS` lines of bars: first what is kept (K,), then, paler, what is not."""
    full, pale = ("█", "░") if unicode else ("#", ".")
    finite = np.isfinite(scores)
    is_kept = np.zeros(len(scores), bool)
    is_kept[rows] = True
    groups: list[tuple[str, int, int]] = []
    if finite.any():
        low, high = float(scores[finite].min()), float(scores[finite].max())
        edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low, high])
        number = np.clip(np.searchsorted(edges, scores[finite], side="right") - 1, 0, len(edges) - 2)
        all_of = np.bincount(number, minlength=len(edges) - 1)
        kept_of = np.bincount(number[is_kept[finite]], minlength=len(edges) - 1)
        groups = [(f"{edge:.4g}", int(k), int(n)) for edge, k, n in zip(edges[:-1], kept_of, all_of, strict=True)]
    if not finite.all():
        groups.append(("no bound", int((is_kept & ~finite).sum()), int((~finite).sum())))
    most = max(n for *_, n in groups)
    lines = []
    for name, k, n in groups:
        length = math.ceil(BAR * n / most)
        part = round(length * k / n) if n else 0
        bar = full * part + pale * (length - part)
        lines.append(f"{name:>10}  {bar:<{BAR}}  {count(k)} of {count(n)}")
    return lines


def pruned(plan: str, values: Mapping[str, float], out: str, alone: Sequence[str] = ()) -> list[str]:
    """The end of ``lotus prune --model``."""
    lines = ["", *plan.splitlines()]
    if "top1" in values:
        n = int(values.get("measured_on", 0))
        error, on = (f" ± {standard_error(values['top1'], n):.2f}", f", on n = {count(n)} images") if n else ("", "")
        lines.append(
            f"top-1: {values['top1']:.2f}{error} % after the cut, {values['top1_before']:.2f} % before{on}, without any fine-tuning"
        )
    if "agreement" in values:
        told = accuracy(values["agreement"], values.get("measured_on"))
        lines.append(f"names the same class as the dense model for {told} of the images")
    if "likeness" in values:
        lines.append(
            f"its features point where the whole model's do: cosine {values['likeness']:.4f}, the mean over the images"
        )
    lines += [
        "",
        f"{out}: spec.json and model.safetensors. To load it:",
        "import lotus",
        f"model = lotus.load({out!r})",
    ]
    if alone:
        lines += ["", "Without LOTUS:", *alone]
    return lines
