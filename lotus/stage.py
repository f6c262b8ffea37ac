"""What a stage of a run is: one value, declared in the stage's own file, that says all that is known of it.

The run, the dry run, the checks, the ledger, the report and the command line go over such values and know none by name. A file
of the user's own (``--with mine.py``) may bring one, which then takes part in all of them::

    from lotus.stage import Outcome, Section, Stage

    def measure(context):
        yield ...  # what happens, as lotus.events
        return Outcome(values={"error": 0.03})

    STAGE = Stage("calibration", "measure how far the model's confidence is off", measure, after=("finetune",))
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar, cast

from lotus.config import Config, Patches, options, that_name_files
from lotus.events import Event
from selection import methods

T = TypeVar("T")
Names = tuple[str, ...]
ByConfig: TypeAlias = T | Callable[[Config], T]
"""A value, or what gives it for a config."""
Part = Literal["choosing", "training", "lottery", "shipped", "dense", "apart"]

TRAIN_FORWARDS = 3
"""Training an image costs a forward pass and a backward of twice its size (measured: 2.99 forwards)."""


def of(value: ByConfig[T], config: Config) -> T:
    """``value`` for ``config``."""
    return value(config) if callable(value) else cast(T, value)


@dataclass(frozen=True)
class Outcome:
    """What a stage cost and measured."""

    image_forwards: float = 0.0
    """Forward passes of one image; training one image counts three."""
    macs: float = 0.0
    """Multiply-accumulates spent in those passes."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What it measured, e.g. ``top1``; JSON-ready. It stands in results.json under the stage's name."""
    earlier_seconds: float = 0.0
    """Of training before it was last taken up again."""
    left: tuple[Path, ...] = ()
    """What it left beside the outputs on its list, with these settings: one that is missing or torn is made again."""


Work = Generator[Event, None, Outcome]
"""What a stage does: yields what happens, returns what it cost."""


@dataclass(frozen=True)
class Plot:
    """Lines over an axis, for the report."""

    title: str
    x: str
    y: str
    lines: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]
    """Name, places and values of each."""
    bounds: tuple[float | None, float | None] = (None, None)
    """Of the values' axis."""
    level: tuple[float, str] | None = None
    """A value to be marked, and what it is."""


@dataclass(frozen=True)
class Section:
    """What a stage tells of its own, at the end of a run and in the report; all of it is text and is shown as such."""

    title: str
    text: str = ""
    columns: Names = ()
    rows: tuple[Names, ...] = ()
    """A table under ``columns``."""
    plot: Plot | None = None


@dataclass(frozen=True)
class Curve:
    """How a stage shows in the report's pictures."""

    style: Literal["dense", "lotus", "tune"]
    point: str
    """Its name in the picture of accuracy for its cost."""
    course: str = ""
    """Its name among the courses of accuracy and loss; empty where it has none."""


def _nothing(*_: Any) -> None:
    return None


def _none(*_: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Stage:
    """A stage. ``make``, ``check``, ``forecast`` and ``tell`` are given what stands in :mod:`lotus.stages`; the rest is the config's."""

    name: str
    """Also of its folder, of its part of results.json, and of its model for ``lotus evaluate --model``."""
    says: ByConfig[str]
    """What it does, for people."""
    make: Callable[..., Work]
    """Does it, given a :class:`lotus.stages.context.Context`: yields what happens, returns what it cost. Its keyword-only parameters
    are settings of its own, which a config sets in ``stages``."""
    settings: ByConfig[Names] = ()
    """Parts of the config (``"train"``, ``"prune.keep.macs"``) that change what it makes, less those with a minus before them."""
    after: ByConfig[Names] = ()
    """Stages whose outputs it reads."""
    before: Names = ()
    """Stages, beside those that say so themselves, that are to read its outputs."""
    outputs: ByConfig[Names] = ()
    """What it leaves, relative to the run's folder, ``{data}`` for where the images lie; of a folder the file that is written last."""
    every_rank: bool = False
    """Every rank works in it; else rank 0 does while the rest wait."""
    identity: Callable[[Any], str] | None = None
    """What identifies what it leaves among the images, given the :class:`lotus.run.Run`: a host that does not share rank 0's folder
    does the stage for itself, and the two are compared. None: rank 0's is sent there."""
    excludes: str = ""
    """Of its outputs a list of images that shall not train, as ``select.exclude`` names one: whoever draws the ticket leaves them out."""
    part: Part = "apart"
    """What it is to the ledger: ``choosing`` images, the ``training`` on them, another part of the ``lottery``, the one that leaves
    the model that is ``shipped``, the ``dense`` training that all is compared with, or ``apart``: no part of what it cost."""
    files: Callable[[Config], Mapping[str, str]] = _none
    """The files, or folders of models, that its settings name for it to read, by the setting. Those that are empty are passed over.
    Settings that are marked as such (:attr:`lotus.config.marks.Mark.FILE`) need not be said."""
    calls: Callable[[Config], Mapping[str, str]] = _none
    """Names of functions that its settings call beside the methods among them, by the setting."""
    stale: Callable[[Config, Mapping[str, Any]], str | None] = _nothing
    """Why it has to run though its settings are unchanged, given the ``values`` of when it was made."""
    whole: Callable[[Any], None] = _nothing
    """Refuses what it left among the images where that is not what was written, given the :class:`lotus.run.Run`. The rest of its
    outputs are held to their digests by the run itself."""
    check: Callable[[Any], None] = _nothing
    """Refuses what can be known to fail before anything is done, given a :class:`lotus.stages.ahead.Ahead`."""
    forecast: Callable[[Any], tuple[float, float] | None] = _nothing
    """Image-forwards and MACs that it would cost, of the same."""
    measured_on: Callable[[Config], Patches | None] = _nothing
    """How patches are pruned or merged where its model is measured."""
    tell: Callable[[Any, dict[str, Any]], Section | Sequence[Section] | None] = _nothing
    """Puts what it has to say into the results (where the values of each stage stand under its name), given the
    :class:`lotus.run.Run` and them; may return sections of its own."""
    curve: Curve | None = None
    wanted: Callable[[Config], bool] = lambda config: True
    """Whether it is there at all with these settings."""
    bind: Callable[[Config, Sequence[ModuleType]], Mapping[str, Any]] = _none
    """What of it depends on the shelves beside LOTUS' own: other values of its fields."""

    def named(self, config: Config) -> dict[str, str]:
        """The files, or folders of models, that it reads by its settings, by the setting."""
        marked = that_name_files(config, of(self.settings, config))
        return {place: path for place, path in {**marked, **self.files(config)}.items() if path}

    @property
    def is_set(self) -> bool:
        """Whether it has settings of its own."""
        return bool(methods.settings(self.make))

    def options(self, config: Config) -> dict[str, Any]:
        """The settings of its own, those that the config does not name at their defaults.

        Raises:
            Refused: the config names one that it does not have, or of another kind.
        """
        asked = config.asked(self.name)
        return options(self.make, asked.options if asked else {}, place=f"stages.{self.name}", name=self.name)


def named(stages: Mapping[str, Stage], part: Part) -> str:
    """The name of the last of ``stages`` that is ``part`` of the ledger, as whoever trains further leaves the model that ships;
    empty where none is."""
    return next((stage.name for stage in reversed([*stages.values()]) if stage.part == part), "")
