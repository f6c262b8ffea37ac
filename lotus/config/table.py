"""The table of rules for readers: ``python -m lotus.config.table > docs/settings.md``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lotus import shelves
from lotus.config import rules
from lotus.config.idle import IDLE
from lotus.config.page import Config
from lotus.config.reader import over
from lotus.config.rule import Rule
from lotus.config.rules_shrinking import OF_SHRINKING

HEAD = """# What goes with what

This page is printed from lotus/config/rules.py by `python -m lotus.config.table`: the rows that a config,
`lotus prune --model` and `lotus.prune` are asked. Each is shown by an example that is refused, and one near
it that is not. A file of your own (`--with mine.py`) adds rows as a list `RULES` of `lotus.config.Rule`.
"""

WITHOUT_EFFECT = """## Settings without effect

A setting that another one leaves without effect is told as a run begins, and not refused: a config may say it
for another choice of its own. These rows are in lotus/config/idle.py.
"""

PARTS: tuple[tuple[str, Callable[[], Iterable[Rule]]], ...] = (
    ("Training, scores and the ticket of images", lambda: rules.OF_TRAINING),
    ("Pruning", lambda: rules.OF_PRUNING),
    ("A training that shrinks", lambda: OF_SHRINKING),
    ("Published systems", lambda: _of_papers()),
    ("Pruning without a run: `lotus prune --model` and `lotus.prune`", lambda: rules.WITHOUT_A_RUN),
    ("Pruning by `lotus.prune` alone", lambda: rules.CALLED),
)


def markdown() -> str:
    """The page."""
    parts = [f"## {title}\n\n{_table(one_by_one(rows()))}\n" for title, rows in PARTS]
    return "\n".join(
        [HEAD, *parts, f"{WITHOUT_EFFECT}\n{_table(IDLE, 'why it changes nothing', 'told', 'not told')}\n"]
    )


def one_by_one(rows: Iterable[Rule]) -> list[Rule]:
    """``rows``, with those of marked settings a setting each, as the page has them."""
    kinds = {type(section).__name__: type(section) for _, section in rules.sections(Config())}
    return [one for row in rows for one in (row.rows(kinds[row.of]) if row.each else [row])]


def _of_papers() -> Iterator[Rule]:
    """Rows that our own shelves add: not what else is installed here."""
    for shelf in shelves.installed():
        if shelf.__name__.startswith("lotus."):
            yield from getattr(shelf, "RULES", ())


def _table(rows: Iterable[Rule], *head: str) -> str:
    why, bad, good = head or ("why it is refused, and the cure", "refused", "not refused")
    lines = [f"| setting | {why} | {bad} | {good} |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(" | ".join(["", *_cells(row), ""]).strip() for row in rows)])


def _cells(row: Rule) -> list[str]:
    place, told = sentence(row)
    return [f"`{place}`", f"{told}.".replace("|", "\\|"), f"`{row.bad}`", f"`{row.good}`" if row.good else "without it"]


def sentence(row: Rule) -> tuple[str, str]:
    """The place that a row refuses and what it says, by its example."""
    place, section = example(row, row.bad)
    return rules.join(place, row.place), row.sentence(section, place)


def example(row: Rule, settings: str) -> tuple[str, Any]:
    """The section that ``row`` reads of a page with these settings, which may break rows, and its place: the first where it is
    refused, if any."""
    page = Config.model_validate(over({}, words(settings)), context=rules.UNASKED)
    facts = {name: row.facts[name] for name in row.needs}
    found = [
        (place, one) for place, one in rules.sections(page) if row.of in {kind.__name__ for kind in type(one).__mro__}
    ]
    found.sort(key=lambda pair: f"{pair[0]}." not in settings)  # what was said there, before who takes it from there
    return next((pair for pair in found if any(rules.broken(pair[1], [row], **facts))), found[0])


def words(settings: str) -> list[str]:
    """``key=value`` words of a line; a value may have spaces."""
    return re.split(r" (?=[a-z_.]+=)", settings) if settings else []


if __name__ == "__main__":
    print(markdown(), end="")
