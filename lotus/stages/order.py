"""The run: every stage that is not done, in order, on one rank or several."""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from lotus import watch
from lotus.config import Config
from lotus.earlier import Earlier
from lotus.events import Began, Ended, Event, Rewound, Said, Skipped
from lotus.run import Run
from lotus.stage import Stage, Work
from lotus.stages.checks import check, look_ahead
from lotus.stages.context import Context
from lotus.stages.hosts import Hosts
from lotus.stages.own_stage import begun
from lotus.stages.shelf import check_named, passed_over, run_of
from selection.errors import Refused

_LONG = 2e9  # bytes, from which on it is said that they are read


def go(
    config: Config,
    *,
    until: str | None = None,
    first: str | None = None,
    again: bool = False,
    replace: bool = False,
    shelves: Sequence[ModuleType] = (),
) -> Iterator[Event]:
    """Run every stage that leads to ``until`` (the last) and is not done, in order.

    Args:
        config: of the run, resolved.
        until: the last stage.
        first: run again from this stage on.
        again: run every stage again.
        replace: let go of what other settings have left; else it is kept (:mod:`lotus.earlier`).
        shelves: modules with methods, guests and stages of the user's own.

    Raises:
        Refused: what the user can mend: the machine, the data, a setting, a budget.
        KeyboardInterrupt: stopped on request; what was trained so far is saved.
        Lost: another rank is gone, or does not answer.
    """
    run = run_of(config, shelves)
    check_named(until, list(run.stages), "until")
    names = run.plan(until)
    check_named(first, names, "--from")
    asked = names if again else names[names.index(first) :] if first else []
    if asked or not run.is_done:  # what is done has been asked, and to ask takes torch
        check(config, shelves)
    # Several ranks must take the same decisions, so they are joined before the first; one alone answers at once.
    context = Context.open(run, shelves) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    lead = context is None or context.world.rank == 0
    with _held(run, context, lead):
        if left := passed_over(run, until):
            yield _logged(run, Said(names[-1], left, level="warning"), lead)
        earlier = None if replace or not lead else Earlier(run)
        yield from _go(run, context, names, asked, shelves, earlier)
        if earlier is not None and earlier.kept:
            text = f"what stood of {', '.join(earlier.kept)} was of other settings and is kept in {earlier.folder} (--replace: let it go)"
            yield _logged(run, Said(names[-1], text), lead)
        if lead and (older := run.outdated(run.plan())):
            text = (
                f"what stands of {', '.join(older)} is older than this or of other settings; lotus run makes it again"
            )
            yield _logged(run, Said(names[-1], text, level="warning"), lead)


@contextlib.contextmanager
def _held(run: Run, context: Context | None, lead: bool) -> Iterator[None]:
    """Rank 0 holds the run's folder, and every rank watches over the others."""
    with contextlib.ExitStack() as open_things:
        if context is None:
            open_things.enter_context(run.held())
        else:
            _lead(context, lambda: open_things.enter_context(run.held()))
            if lead:
                watch.clear(run.ranks)
            context.world.barrier()
            context.hosts = Hosts(run, context.world)
            context.share()
            from lotus.training.distributed import StopFlag

            rank, size = context.world.rank, context.world.size
            open_things.enter_context(watch.over(run.ranks, rank, size, 60 * run.config.rank_timeout, StopFlag))
        yield


def _lead(context: Context | None, action: Callable[[], object]) -> None:
    """Let rank 0 do ``action``; all ranks refuse what it refuses.

    Raises:
        Refused: it did.
    """
    refusal: Refused | None = None
    if context is None or context.world.is_main:
        try:
            action()
        except Refused as error:
            refusal = error
    _wait(context)  # it may take long
    if context is not None and context.world.any(refusal):
        raise refusal or Refused("rank 0 has refused to go on")
    if refusal is not None:
        raise refusal


def _check_read(run: Run, context: Context | None, names: Sequence[str], asked: Sequence[str]) -> Iterator[Event]:
    """Hold what stands and is to be read to what was written."""
    read = run.read_by(names, asked)
    stand = [record.outputs for name in read if (record := run.record(name)) is not None]
    size = sum(
        size for outputs in stand for name, size in outputs.items() if size < _LONG or not name.endswith(".beton")
    )
    lead = context is None or context.world.is_main
    if lead and size > _LONG:
        yield _logged(run, Said(names[0], f"reading through what stands, {size / 1e9:.1f} GB, for any change"), lead)
    _lead(context, lambda: run.check_whole(read))


def _go(
    run: Run, context: Context | None, names: Sequence[str], asked: Sequence[str], shelves: Sequence[ModuleType],
    earlier: Earlier | None,
) -> Iterator[Event]:  # fmt: skip
    """Every stage that is asked for or not done."""
    lead = context is None or context.world.rank == 0
    if asked or any(_why(run, context, name) for name in names):
        look_ahead(run.config, run.stages.values(), shelves)
        yield from _check_read(run, context, names, asked)
    _wait(context)  # nobody changes what stands before everybody has looked
    if lead and run.is_older:
        yield _logged(run, Said(names[0], _older_told(run), level="warning"), lead)
    before = run.settle() if lead else ""
    stood: dict[str, str] = {}
    finished = False
    try:
        _keep(context, earlier, asked)
        stood |= run.forget(asked) if lead else {}
        for event in _each(run, context, names, asked, shelves, stood, earlier):
            finished |= isinstance(event, Ended)
            yield event
    except Refused:
        if lead:  # what was refused has changed nothing that stood
            run.recall(stood)
            if before and not finished:
                run.settle(before)
        raise
    finally:
        if earlier is not None:
            earlier.put_back()


def _keep(context: Context | None, earlier: Earlier | None, stages: Sequence[str]) -> None:
    """Put aside what stands of ``stages``, which are about to run, and was made otherwise."""
    _lead(context, lambda: earlier.keep(stages) if earlier is not None else None)


def _each(
    run: Run, context: Context | None, names: Sequence[str], asked: Sequence[str], shelves: Sequence[ModuleType],
    stood: dict[str, str], earlier: Earlier | None,
) -> Iterator[Event]:  # fmt: skip
    """Every stage that is not done, in order; ``stood`` gathers the records that give way."""
    lead = context is None or context.world.rank == 0
    for name in names:
        why = _why(run, context, name)
        if why is None:
            _elsewhere(run.stages[name], context)
            yield _logged(run, Skipped(name), lead)
            continue
        if context is None:
            context = Context.open(run, shelves)
        context.anew = name in asked
        _keep(context, earlier, [name])
        if lead:
            stood |= run.forget([name])
        yield from _carry_out(run.stages[name], why, context, lead)
    if context is not None:
        context.share()  # what the last one left


def _why(run: Run, context: Context | None, name: str) -> str | None:
    """Why a stage has to run, to rank 0: a host apart may think otherwise of images that are its own."""
    if context is None:
        return run.why(name)
    context.share()
    return context.world.text((run.why(name) or "") if context.world.is_main else "") or None


def _elsewhere(stage: Stage, context: Context | None) -> None:
    """Let hosts that do not share rank 0's folder do a stage for themselves, and compare."""
    if stage.identity is None or context is None or context.hosts is None or not context.hosts.any:
        return
    hosts, here, identity = context.hosts, context.alone(), stage.identity
    hosts.together(lambda: collections.deque(begun(stage, here), maxlen=0) if hosts.copies else None)
    context.world.barrier()
    hosts.hold(stage.name, lambda: identity(context.run))


def _carry_out(stage: Stage, why: str, context: Context, lead: bool) -> Iterator[Event]:
    """A stage, from its beginning to its record."""
    run, name = context.run, stage.name
    if stage.every_rank:
        from lotus.training.deepspeed_import import ready

        ready()  # not later: with the first images it would be silence for too long
    yield _logged(run, Began(name, why), lead)
    began = time.perf_counter()
    if stage.every_rank:
        outcome = yield from _make(stage, context, lead)
    elif lead:
        outcome = yield from _make(stage, context.alone(), lead)
    _elsewhere(stage, context)
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


def _make(stage: Stage, context: Context, lead: bool) -> Work:
    """Carry out a stage, writing down what happens. Where that cannot be, a training is saved before it is refused."""
    making = begun(stage, context)
    full: Refused | None = None
    while True:
        try:
            event = next(making)
        except StopIteration as end:
            return end.value
        except Rewound as rewound:
            if context.world.size > 1:
                context.share()  # a host apart has no checkpoint of this stage yet
            making, event = begun(stage, context), Said(stage.name, str(rewound), "warning")
        except KeyboardInterrupt as stopped:
            if full is None:
                raise
            raise Refused(f"{full} {stopped}") from None
        if lead and full is None:
            full = _unwritten(context.run, event)
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


def _older_told(run: Run) -> str:
    models = ", ".join(f"{name}/" for name in run.strangers())
    stay = f" The models in {models} stay as they are." if models else ""
    return (
        f"{run.folder} was written by an older LOTUS, whose records are not read any more: its stages run again.{stay}"
    )


def _wait(context: Context | None) -> None:
    if context is not None:
        context.world.barrier()


def _logged(run: Run, event: Event, lead: bool) -> Event:
    if lead:
        run.write_event(event)
    return event


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
