"""Ways to prune, and rivals of a search: values of a shelf, found by the name that a config gives.

``prune.method: mine`` takes the way of that name, ``{name: mine, strength: 0.3}`` with settings: the keyword-only parameters of
its ``make``, of the kinds that they are annotated with. A file of the user's own (``--with mine.py``) may bring one::

    from lotus.stages.cut import Cut
    from lotus.way import Way

    def make(uncut, *, strength: float = 0.1):
        yield ...  # what happens, as lotus.events
        return Cut(small, before, after, forwards, notes=()), {}

    WAY = Way("mine", "cut what is not worth keeping", make)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lotus.stage import ByConfig, Names

Options = Mapping[str, Any]
"""The settings of a way, those that a config does not name at their defaults."""


def _nothing(*_: Any) -> None:
    return None


class Held(Protocol):
    """A guest of the fine-tune (:class:`lotus.training.guests.Guest`) by which a cut stays what it is."""

    def left(self, model: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What is told of the model that was fine-tuned, and what is written beside it.

        Raises:
            Refused: the cut is not what it was.
        """
        ...


@dataclass(frozen=True)
class Way:
    """A way to prune."""

    name: str
    says: ByConfig[str]
    """What it does, for people."""
    make: Callable[..., Any]
    """``make(uncut, **options)``: given a :class:`lotus.stages.cut.Uncut`, yields what happens and returns a
    :class:`lotus.stages.cut.Cut` and what is told of it. Its keyword-only parameters are what a config may set."""
    settings: ByConfig[Names] = ()
    """Parts of the config, beside ``prune`` and ``seed``, that change what it makes: ``("finetune",)`` where it trains by that."""
    cuts: bool = True
    """Dimensions go. Else the model keeps its shapes, and nothing is measured of the device."""
    check: Callable[[Any, Options], None] = _nothing
    """Refuses what can be known to fail before anything is done, given a :class:`lotus.stages.ahead.Ahead`."""
    forecast: Callable[[Any, Options], float] = lambda *_: 0.0
    """Forward passes of an image in the dense model that it would cost, of the same."""
    hold: Callable[[Any, Options], Any] = _nothing
    """The guest (:class:`Held`) that keeps the cut ``model`` so while it is fine-tuned; None where nothing has to be kept."""
    tell: Callable[[Any, dict[str, Any], Options], Any] = _nothing
    """As :attr:`lotus.stage.Stage.tell` of the stage ``prune``."""


@dataclass(frozen=True)
class Rival:
    """What a search is compared with: ``prune.search.compare``."""

    name: str
    title: str
    """For people."""
    make: Callable[..., Any]
    """``make(model, batches, judge, **options)``: a row for each cut of the dense model that it tries, with ``name``, ``macs``,
    ``worse`` and ``top1`` as ``judge`` (:class:`lotus.pruning.judge.Judge`) has them; ``batches()`` are its images."""
    check: Callable[[Any], None] = _nothing
    """Refuses a model that it cannot be made of."""
