"""A config with a setting's old name, or an old value, is told the new one; so are Python and the command line."""

from __future__ import annotations

from typing import Any

import pytest

import lotus
from lotus import cli
from lotus.config import as_request, check, read
from lotus.config.reader import OLD, OLD_VALUES
from selection.errors import Refused


def nested(place: str, value: Any) -> dict[str, Any]:
    for step in reversed(place.split(".")):
        value = {step: value}
    return value


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_told_the_new_one(old: str) -> None:
    with pytest.raises(Refused) as refusal:
        check(nested(old, None))
    assert f"{old}: is called {OLD[old]} now. Say that." in str(refusal.value).splitlines()


@pytest.mark.parametrize("new", [new for new in OLD.values() if "=" in new])
def test_a_new_name_with_its_value_is_taken_alone(new: str) -> None:
    asked = new.replace("N:M", "2:4").replace("...", "sparse_vit")
    what = "macs" if "convolve" in new else "weights"
    assert read(None, [asked, *([f"prune.keep={{{what}: 0.5}}"] if "prune." in new else [])])


@pytest.mark.parametrize(("place", "old"), [(place, old) for place, values in OLD_VALUES.items() for old in values])
def test_an_old_value_is_told_the_new_one(place: str, old: str) -> None:
    with pytest.raises(Refused) as refusal:
        check(nested(place, old))
    new = OLD_VALUES[place][old]
    assert f"not {old!r}. That is called {new!r} now." in str(refusal.value)
    assert check(nested(place, new)), "which is taken"
    before = next(name for name, now in OLD.items() if now == place)
    with pytest.raises(Refused) as refusal:
        check(nested(before, old))
    assert f"{before}: is called {place} now. Say {place}={new}." in str(refusal.value).splitlines()


def test_what_is_inside_of_an_old_section_is_told_with_it() -> None:
    with pytest.raises(Refused, match=r"^train\.redraw: .*train\.dynamic"):
        read(None, ["train.redraw.name=infobatch", "train.redraw.saving=0.3"])


@pytest.mark.parametrize(
    ("old", "value"), [("width", 0.5), ("rank", "pool"), ("inputs", True), ("branches", True), ("split", True)]
)
def test_python_and_the_command_line_are_told_too(old: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    told = f"prune.{old}: is called {OLD[f'prune.{old}']} now."
    with pytest.raises(Refused) as refusal:
        as_request({old: value})
    assert told in str(refusal.value)
    with pytest.raises(Refused) as refusal:
        lotus.prune(None, [], keep={"macs": 0.5}, **{old: value})  # type: ignore[arg-type]
    assert told in str(refusal.value)
    assert cli.main(["run", "configs/staged.yaml", "--dry-run", f"prune.{old}={value}"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
