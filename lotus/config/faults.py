"""What pydantic finds wrong with a value, in words that say what to write instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from selection.methods import nearest

_PARSING = re.compile(r", unable to parse string as an? \w+")


def sentence(fault: Mapping[str, Any], where: str) -> str:
    """One fault of pydantic's, as a sentence that begins with its place."""
    value, kind = fault["input"], fault["type"]
    if kind == "tuple_type":
        one = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        within = where.rpartition(".")[2].isdigit()  # of a list of lists, which no word of a command sets
        cure = " docs/settings.md has an example." if within else f" Lists have brackets: {where}=[{value}]."
        return f"{where}: a list, not {value!r}." + (cure if one else "")
    if kind == "too_long" or (kind == "missing" and isinstance(value, (list, tuple))):
        where = where if kind == "too_long" else where.rpartition(".")[0]
        return f"{where}: a list of another length, not {value!r}. docs/settings.md has an example."
    if kind == "dict_type":
        return f"{where}: a section of settings, not {value!r}."
    if kind in ("model_type", "model_attributes_type"):
        return f"{where}: a name, or a name with settings like {{name: ..., ...}}, not {value!r}."
    said = _PARSING.sub("", fault["msg"].removeprefix("Value error, "))
    choices = re.findall(r"'([^']*)'", fault["ctx"]["expected"]) if kind == "literal_error" else []
    given = "" if isinstance(value, (dict, BaseModel)) else f", not {value!r}"
    return f"{where}: {said}{given}.{nearest(str(value), choices)}"


def one_of_each(kinds: Mapping[str, str]) -> list[str]:
    """The sentences about one setting: of one that takes a number or a word, what is said of each becomes one.

    Args:
        kinds: sentence -> pydantic's kind of fault
    """
    words = [sentence for sentence, kind in kinds.items() if kind == "literal_error"]
    others = [sentence for sentence in kinds if sentence not in words]
    if not words or not others or "Did you mean" in words[0]:
        return words or others
    word = words[0].partition("Input should be ")[2].rpartition(", not ")[0]
    return [f", or {word}, not ".join(others[0].rsplit(", not ", 1))]
