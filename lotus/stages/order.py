"""The run: every stage that is not done, in order, on one rank or several."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from lotus.config import Config
from lotus.events import Began, Ended, Event, Said, Skipped
from lotus.run import BY_NAME, Run
from lotus.stages import finish, probe, prune, train
from lotus.stages.checks import check, look_ahead
from lotus.stages.shop import Making, Shop, plan
from selection.errors import Refused

EVERY_RANK = ("score", "baseline", "train", "finetune")
"""Stages in which every rank works; the others are done by rank 0 while the rest wait."""

MAKERS: dict[str, Callable[[Shop], Making]] = {
    "prepare": probe.prepare,
    "score": probe.score,
    "select": probe.select,
    "baseline": train.baseline,
    "train": train.train,
    "prune": prune.prune,
    "finetune": train.finetune,
    "export": finish.export,
    "report": finish.report,
}
assert list(MAKERS) == list(BY_NAME)


def go(
    config: Config,
    *,
    until: str = "report",
    first: str | None = None,
    again: bool = False,
    shelves: Sequence[ModuleType] = (),
) -> Iterator[Event]:
    """Run every stage up to ``until`` that is not done, in order.

    Args:
        first: run again from this stage on.
        again: run every stage again.

    Raises:
        Refused: what the user can mend: the machine, the data, a setting, a budget.
        KeyboardInterrupt: stopped on request; what was trained so far is saved.
    """
    check(config, shelves)
    run, names = Run(config, shelves), plan(config, until)
    if first is not None and first not in names:
        raise Refused(f"--from {first}: this run has no such stage. It has: {', '.join(names)}.")
    asked = names if again else names[names.index(first) :] if first else []
    # Several ranks must take the same decisions, so they are joined before the first; one alone answers at once.
    shop = Shop.open(run, shelves) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    lead = shop is None or shop.world.rank == 0
    with run.held() if lead else contextlib.nullcontext():
        if asked or any(run.why(name) for name in names):
            look_ahead(config)
        _wait(shop)  # nobody changes what stands before everybody has looked
        if lead:
            run.settle()
            run.forget(asked)
        for name in names:
            _wait(shop)
            why = run.why(name)
            _wait(shop)  # nobody starts, and changes what stands, before everybody has looked
            if why is None:
                yield _logged(run, Skipped(name), lead)
                continue
            if shop is None:
                shop = Shop.open(run, shelves)
            shop.anew = "prepare" in asked
            if lead:
                run.forget([name])
            yield _logged(run, Began(name, why), lead)
            began = time.perf_counter()
            if name in EVERY_RANK:
                outcome = yield from _make(name, shop, lead)
            elif lead:
                outcome = yield from _make(name, shop.alone(), lead)
            if lead:
                seconds = time.perf_counter() - began + outcome.earlier_seconds
                run.finish(
                    name,
                    seconds=seconds,
                    image_forwards=outcome.image_forwards,
                    macs=outcome.macs,
                    values=outcome.values,
                    left=outcome.left,
                )
                shutil.rmtree(run.work(name), ignore_errors=True)
                yield _logged(run, Ended(name, seconds, _numbers(outcome.values)), lead)
        if lead and (older := run.outdated(plan(config))):
            text = (
                f"what stands of {', '.join(older)} is older than this or of other settings; lotus run makes it again"
            )
            yield _logged(run, Said(names[-1], text, level="warning"), lead)


def _make(name: str, shop: Shop, lead: bool) -> Making:
    """Carry out a stage, writing down what happens. Where that cannot be, a training is saved before it is refused."""
    making = MAKERS[name](shop)
    full: Refused | None = None
    while True:
        try:
            event = next(making)
        except StopIteration as end:
            return end.value
        except KeyboardInterrupt as stopped:
            if full is None:
                raise
            raise Refused(f"{full} {stopped}") from None
        if lead and full is None:
            full = _unwritten(shop.run, event)
        yield event


def _unwritten(run: Run, event: Event) -> Refused | None:
    """Write ``event`` down; why that cannot be, where somebody was at work who is asked to save it now and stop.

    Raises:
        Refused: it cannot be, and nobody was.
    """
    try:
        run.write_event(event)
    except Refused as refusal:
        from lotus.training.distributed import StopFlag

        if not StopFlag.ask("the log cannot be written"):
            raise
        return refusal
    return None


def _wait(shop: Shop | None) -> None:
    if shop is not None:
        shop.world.barrier()


def _logged(run: Run, event: Event, lead: bool) -> Event:
    if lead:
        run.write_event(event)
    return event


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
