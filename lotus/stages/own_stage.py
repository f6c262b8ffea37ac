"""A stage that a file of the user's own brings, held to what a stage is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lotus.events import Event, Rewound
from lotus.run import brought
from lotus.stage import Outcome, Stage, Work
from lotus.stages.context import Context
from lotus.watch import Lost
from selection.errors import Refused
from selection.methods import arguments, blamed, is_ours

_CURE = "Write it as a generator: yield events, return an Outcome."


def begun(stage: Stage, context: Context) -> Work:
    """What ``stage`` does; of a user's own, what goes wrong in it is refused."""
    files = [str(shelf.__file__) for shelf in context.shelves if stage.name in brought(shelf)]
    given = arguments(stage.make, stage.options(context.config)) if stage.is_set else {}
    if not files or is_ours(stage.make):
        return stage.make(context, **given)
    return _watched(stage, context, given, f"--with {files[-1]}: the stage {stage.name!r}")


def _watched(stage: Stage, context: Context, given: Mapping[str, Any], place: str) -> Work:
    """As ``stage.make``.

    Raises:
        Refused: it raises something, or is no generator of events that returns an outcome.
    """
    with blamed(stage.make, place=place, spared=(Lost, Rewound)):
        making = stage.make(context, **given)
        if not isinstance(making, Iterator):
            raise Refused(f"{place} gives a {type(making).__name__}. {_CURE}")
        while True:
            try:
                event = next(making)
            except StopIteration as end:
                outcome = end.value
                break
            if not isinstance(event, Event):
                raise Refused(f"{place} yields a {type(event).__name__}, which is no event. {_CURE}")
            yield event
    if not isinstance(outcome, Outcome):
        raise Refused(f"{place} returns a {type(outcome).__name__}, not an Outcome. {_CURE}")
    return outcome
