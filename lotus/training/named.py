"""Guests that a config names: found on the shelf or in a file of the user's own, and made."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from types import ModuleType, NoneType
from typing import Any

from torch import Tensor, nn

from lotus.config import Method, options
from lotus.data.base import Batch
from lotus.events import Rewound
from lotus.training import guest_shelf, trackers
from lotus.training.guests import Epoch, Guest, Training
from lotus.watch import Lost
from selection import methods
from selection.errors import Refused

READS = ("model", "recipe", "rows", "labels", "classes", "seed", "world")
"""What a function that makes a guest may read: the model; its recipe; (K,) rows of the ticket; (N,) labels of the data set;
the number of classes; the training's seed; the ranks."""

_GIVES: dict[str, Any] = {
    "before_epoch": Epoch, "show": Batch, "losses": Tensor, "spoiled": str, "replace": Sequence, "rebuilt": nn.Module,
    "evaluating": contextlib.AbstractContextManager, "weights": (Mapping, NoneType), "state": (Mapping, NoneType),
    "summary": Mapping, "macs": Real, "own_macs": Real, "bill": Sequence,
}  # fmt: skip
"""What a moment gives; one that is not here may give anything."""
_SEVERAL = ("replaced", "close_epoch")
"""Moments that give what may be an iterator, which goes wrong only while it is gone through."""


def check(wanted: Sequence[Method], shelves: Sequence[ModuleType], *, place: str) -> None:
    """Refuse guests that are not on a shelf, or are given what they do not have, before anything is made.

    Args:
        wanted: their names and options
        shelves: modules with guests of the user's own
        place: where they are named, e.g. ``train.guests``

    Raises:
        Refused: with the nearest right name; or one is named twice.
    """
    names = [settings.name for settings in wanted]
    for number, settings in enumerate(wanted):
        method = _found(settings, shelves, place)
        if settings.name in names[:number]:
            raise Refused(
                f"{place}: {settings.name!r} is named twice, and the states of the two would share a file. Name it once."
            )
        options(method, settings.options, place=f"{place}.{settings.name}")


def chosen(
    wanted: Sequence[Method], available: Mapping[str, Any], shelves: Sequence[ModuleType], *, place: str
) -> list[Guest]:
    """The guests that a config names: each a function of a shelf, called with what it reads and what the config sets.

    Raises:
        Refused: there is no such function, or it makes no guest.
    """
    guests = []
    for settings in wanted:
        method, where = _found(settings, shelves, place), f"{place}.{settings.name}"
        guest = methods.call(method, available, options(method, settings.options, place=where), place=where, here=READS)
        if not isinstance(guest, Guest):
            raise Refused(
                f"{place}: {settings.name!r} makes a {type(guest).__name__}, not a guest. Return an instance of a subclass of "
                "lotus.training.guests.Guest."
            )
        guests.append(guest if methods.is_ours(type(guest)) else _watched(guest, where))
    return guests


def _watched(guest: Guest, place: str) -> Guest:
    """``guest``, a user's own: what goes wrong in a moment that it overrides is refused, with ``place``. What it would keep is asked as
    soon as it is attached: what is no state is refused before the first step, and not at the first checkpoint."""
    for name in filter(lambda name: inspect.isfunction(getattr(Guest, name)), vars(Guest)):
        moment = getattr(guest, name)
        if not methods.is_ours(moment):
            object.__setattr__(guest, name, _moment(name, moment, place))
    attach = guest.attach

    def attached(training: Training) -> None:
        attach(training)
        guest.state()

    object.__setattr__(guest, "attach", attached)
    return guest


def _moment(name: str, moment: Callable[..., Any], place: str) -> Callable[..., Any]:
    """``moment``, which refuses what goes wrong in it."""

    @functools.wraps(moment)
    def watched(*given: Any, **options: Any) -> Any:
        with methods.blamed(moment, place=place, spared=(Lost, Rewound)):
            found = moment(*given, **options)
            if name in _SEVERAL:
                found = tuple(found)
        kind = _GIVES.get(name, object)
        if name == "losses" and given and isinstance(found, Tensor) and found.shape != given[0].shape:
            raise Refused(
                f"{place}: losses gave a tensor of shape {tuple(found.shape)} for losses of {tuple(given[0].shape)}. Return one "
                "number for each image."
            )
        if not isinstance(found, kind) or (name == "state" and not _are_tensors(found)):
            tensors = " Its values are tensors, as in {'seen': torch.tensor(3)}." if name == "state" else ""
            raise Refused(
                f"{place}: {name} gave {_told(found)}. Return what lotus.training.guests.Guest.{name} says.{tensors}"
            )
        return _evaluating(moment, found, place) if name == "evaluating" else found

    return watched


@contextlib.contextmanager
def _evaluating(
    moment: Callable[..., Any], found: contextlib.AbstractContextManager[None], place: str
) -> Iterator[None]:
    """As ``found``, which is entered with the same care; what is raised inside is not its fault."""
    with contextlib.ExitStack() as inside:
        with methods.blamed(moment, place=place, spared=(Lost, Rewound)):
            inside.enter_context(found)
        yield


def _are_tensors(state: Mapping[str, Any] | None) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in (state or {}).items())


def _told(found: Any) -> str:
    """What it is, short."""
    kinds = {name: type(value).__name__ for name, value in found.items()} if isinstance(found, Mapping) else None
    return f"{kinds}" if kinds else f"a {type(found).__name__}"


def _found(settings: Method, shelves: Sequence[ModuleType], place: str) -> Any:
    return methods.find([guest_shelf, trackers, *shelves], settings.name, place=place, here=READS, or_nothing=True)
