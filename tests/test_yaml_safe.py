"""YAML from elsewhere: what is taken is what PyYAML takes; what costs, hides or claims is refused at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from lotus import yaml_safe
from lotus.config import read
from selection.errors import Refused


@pytest.mark.parametrize(
    "text",
    ["", "a", "1", "1e-3", "3e-4", "true", "null", "[1, 2.5, x]", "{a: 1, b: {c: [1, {d: e}]}}", "a: 1\nb:\n  - c\n  - d: 2\n",
     "? [1, 2]\n: x\n", "2001-12-14", "0x1f", "0o17", "1_000", ".inf", "'1'", '"\\e[31m"', "a: !!str 1", "<<: {a: 1}\na: 2"],
)  # fmt: skip
def test_what_is_plain_is_read_as_ever(text: str) -> None:
    if text.startswith("?"):  # a list as a name: neither takes it
        with pytest.raises(Refused, match="not valid YAML"):
            yaml_safe.load(text, "here")
    else:
        assert yaml_safe.load(text, "here") == yaml.safe_load(text)


HOSTILE = {
    "deep lists": ("a: " + "[" * 20_000, "brackets"),
    "deep lists that end": ("a: " + "[" * 20_000 + "]" * 20_000, "brackets"),
    "deep dictionaries": ("{a: " * 20_000, "brackets"),
    "deep steps": ("".join(" " * n + "a:\n" for n in range(1000)), "brackets"),
    "deep dashes": ("- " * 20_000, "brackets"),
    "a long number": ("seed: " + "9" * 5_000, "a number of 5000 signs"),
    "a long number in base 60": ("seed: 1" + ":59" * 5_000, "signs"),
    "a long fraction": ("seed: 1." + "9" * 5_000, "signs"),
    "the same twice": ("seed: 0\nname: x\nseed: 1\n", r"'seed' stands there twice \(lines 1 and 3\)"),
    "the same twice below": ("train: {lr: 1, lr: 2}", "'lr' stands there twice"),
    "an alias": ("a: &x [1]\nb: *x", "aliases"),
    "an alias of itself": ("a: &x [*x]", "aliases"),
    "an object": ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    "a date that is none": ("seed: 2001-99-99", "not valid YAML"),
    "a whole number that is none": ("seed: !!int x", "not valid YAML"),
    "bytes that are none": ("seed: !!binary x", "not valid YAML"),
    "an unhashable name": ("{[a]: 1}", "not valid YAML"),
    "an escape": ("name: \x1b[2J", "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "a tab": ("a:\n\t- b", "not valid YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused_at_once(name: str, tmp_path: Path) -> None:
    text, says = HOSTILE[name]
    began = time.perf_counter()
    with pytest.raises(Refused, match=f"^here: .*{says}"):
        yaml_safe.load(text, "here")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(Refused, match=says):
        read(tmp_path / "c.yaml")
    assert time.perf_counter() - began < 5, "not after half a minute"


@pytest.mark.parametrize("value", ["[" * 20_000, "9" * 5_000, "{a: 1, a: 2}", "2001-99-99"])
def test_an_override_is_read_by_the_same_rules(value: str) -> None:
    with pytest.raises(Refused, match="seed="):
        read(None, [f"seed={value}"])


def test_what_is_no_yaml_is_told_in_one_line_with_its_place() -> None:
    with pytest.raises(Refused) as told:
        yaml_safe.load("seed: 1\ntrain: [1", "mine.yaml")
    assert (
        str(told.value) == "mine.yaml: not valid YAML: expected ',' or ']', but got '<stream end>' (line 2, column 10)."
    )
