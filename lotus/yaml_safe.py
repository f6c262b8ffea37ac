"""YAML from anywhere, of which nothing runs, nothing unfolds, and nothing is said twice."""

from __future__ import annotations

from typing import Any

import yaml

from selection.errors import Refused

DEEPEST = 50
"""Brackets in brackets. No config of ours has ten."""
LONGEST = 100
"""Signs of a number."""


class _Reader(yaml.SafeLoader):
    """Refuses while it reads: what comes after the first fault is not looked at, whatever it would cost."""

    def __init__(self, text: str, place: str) -> None:
        super().__init__(text)
        self._place, self._depth = place, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # It can blow a small file up to gigabytes.
            raise Refused(f"{self._place}: YAML aliases (*name) are not taken. Write the values out.")
        if self._depth == DEEPEST:
            raise Refused(f"{self._place}: more than {DEEPEST} brackets in one another. Write it flatter.")
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > LONGEST:
            raise Refused(f"{self._place}: a number of {len(node.value)} signs. Write one that can be meant.")
        return node

    def flatten_mapping(self, node: Any) -> None:
        """Called for each mapping before it is made."""
        seen: dict[Any, Any] = {}
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                lines = f"lines {seen[name].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise Refused(f"{self._place}: {key.value!r} stands there twice ({lines}). Keep one of them.")
            seen[name] = key
        super().flatten_mapping(node)


def load(text: str, place: str) -> Any:
    """What a text says in YAML: numbers, texts, truth values, lists and dictionaries.

    Args:
        text: the YAML.
        place: where the text stands, for messages.

    Raises:
        Refused: it is no YAML, uses aliases, says a name twice, or holds a number or a depth that nobody means.
    """
    try:
        reader = _Reader(text, place)
        try:
            return reader.get_single_data()
        finally:
            reader.dispose()
    except Refused:
        raise
    except Exception as error:  # a date of the 99th month, a base-64 of no base 64: each its own error
        said, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise Refused(f"{place}: not valid YAML: {said or ' '.join(str(error).split())}{where}.") from None
