"""SHELF of learning-rate schedules. One pure function of the step a schedule.

Positional parameters say what it reads, out of

    step   optimizer step, counted from 0 over the whole training
    warm   W, steps of the warm-up; may be a fraction
    total  T, steps of the whole training
    peak   learning rate that the warm-up leads to
    low    learning rate at the end, at most ``peak``

and keyword-only parameters what a config may set. It returns the learning rate, or (learning rate, momentum) where it moves
both. A step beyond the last one has the rate of the end.

Those with a warm-up rise linearly, and step W is the first to have the peak. Step 0 is not wasted on a rate of zero: it has
the peak / (W + 1).
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

Decay = Annotated[float, Field(gt=0, le=1)]
"""Fraction of all steps."""


def cosine(step: float, warm: float, total: float, peak: float, low: float) -> float:
    """A linear warm-up, then half a cosine that reaches ``low`` at step T, one after the last (SGDR, 1608.03983, eq. 5,
    without restarts)."""
    if step < warm:
        return _rise(step, warm, peak)
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * _part(step, warm, total)))


def linear(step: float, warm: float, total: float, peak: float) -> float:
    """A linear warm-up, then a straight line that reaches zero at step T, one after the last (2502.15938)."""
    if step < warm:
        return _rise(step, warm, peak)
    return peak * (1 - _part(step, warm, total))


def wsd(step: float, warm: float, total: float, peak: float, low: float, *, decay: Decay = 0.2) -> float:
    """Warm-up, stable, decay (MiniCPM, 2404.06395): linear up, the peak, and a straight line down to ``low`` at step T.

    Args:
        step, warm, total, peak: see the head of this file
        decay: fraction of all steps in which the rate falls
    """
    if step < warm:
        return _rise(step, warm, peak)
    return peak + (low - peak) * _part(step, max(warm, (1 - decay) * total), total)


def wsd_sqrt(step: float, warm: float, total: float, peak: float, low: float, *, decay: Decay = 0.2) -> float:
    """As :func:`wsd`, but falling by 1 - sqrt of the way, first fast and then slowly (Hägele et al., 2405.18392).

    Args:
        step, warm, total, peak, low: see the head of this file
        decay: fraction of all steps in which the rate falls
    """
    if step < warm:
        return _rise(step, warm, peak)
    return peak + (low - peak) * math.sqrt(_part(step, max(warm, (1 - decay) * total), total))


def onecycle(step: float, warm: float, total: float, peak: float) -> tuple[float, float]:
    """torch's OneCycleLR with its defaults, whose rising part is the W warm-up steps: up along half a cosine from peak / 25,
    down to peak / 250000 at the last step, momentum moving against it from 0.95 to 0.85 and back (1803.09820)."""
    start = peak / _DIVIDE_FIRST
    return (
        _one_cycle(step, warm, total, start, peak, start / _DIVIDE_LAST),
        _one_cycle(step, warm, total, _CALM, _FAST, _CALM),
    )


# torch.optim.lr_scheduler.OneCycleLR: div_factor, final_div_factor, max_momentum, base_momentum.
_DIVIDE_FIRST, _DIVIDE_LAST = 25.0, 1e4
_CALM, _FAST = 0.95, 0.85


def _rise(step: float, warm: float, peak: float) -> float:
    return peak * (step + 1) / (warm + 1)


def _part(step: float, first: float, last: float) -> float:
    """How much of the way from ``first`` to ``last`` is done, at most 1."""
    return max(0.0, min(1.0, (step - first) / (last - first))) if last > first else float(step >= first)


def _one_cycle(step: float, warm: float, total: float, first: float, middle: float, last: float) -> float:
    """Half a cosine from ``first`` to ``middle``, which the last step of the warm-up has, and one on to ``last``, at the last
    step."""
    end = max(total - 1, 0)
    turn = min(warm - 1, end)
    if step <= turn:
        return _cosine(first, middle, step / turn if turn > 0 else 1.0)
    return _cosine(middle, last, min(1.0, (step - turn) / (end - turn)) if end > turn else 1.0)


def _cosine(low: float, high: float, part: float) -> float:
    return high + (low - high) / 2 * (1 + math.cos(math.pi * part))
