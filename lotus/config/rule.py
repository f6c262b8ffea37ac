"""A row of the table of what goes with what (lotus/config/rules.py)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from lotus.config.marks import Mark, marked
from selection import methods


@dataclass(frozen=True)
class Rule:
    """A row."""

    of: str
    """The section that it reads: the name of its class."""
    place: str
    """The setting that is refused, from that section on; empty: the section."""
    broken: Callable[..., bool]
    """Whether a section breaks it; what it reads beside the section are further parameters."""
    says: str
    """What is wrong, and the cure. ``{it}`` is the section, ``{place}`` where it stands."""
    bad: str
    """Settings that break it, as ``key=value`` words of a config."""
    good: str
    """Settings near those that do not."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the page cannot know, for these examples."""
    each: Mark | None = None
    """It stands for a row of each setting of the section with this mark: ``{name}`` in its texts, and ``name`` of its condition, is the
    setting's, ``{value}`` its example."""

    def rows(self, section: type[BaseModel]) -> Iterator[Rule]:
        """Itself; or the rows that it stands for in ``section``."""
        if self.each is None:
            yield self
            return
        for name in marked(section, self.each):
            value = json.dumps((section.model_fields[name].examples or [None])[0]).replace('"', "")
            bad, good = (text.replace("{name}", name).replace("{value}", value) for text in (self.bad, self.good))
            yield replace(
                self, place=name, broken=functools.partial(self.broken, name=name), bad=bad, good=good, each=None
            )

    @functools.cached_property
    def needs(self) -> list[str]:
        """What it reads beside the section."""
        return methods.reads(self.broken)[1:]

    def sentence(self, section: Any, place: str) -> str:
        return self.says.format(it=section, place=place)


def changed(it: Any, name: str) -> bool:
    """Whether a section says something else of a setting than is so by default."""
    return bool(getattr(it, name) != type(it).model_fields[name].default)


def of_patches(place: str, words: str) -> str:
    """Words for ``train.patches``, with the mode that they are of."""
    return f"train.patches.mode={place} {words}".strip()


ZEROS = "prune.method=unstructured prune.keep.weights=0.5"
