"""Every numeric setting at absurd values: a plan or a refusal that names it, never a traceback. Read from the page itself."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from few import few

from lotus.cli import main
from lotus.config import Config, read
from lotus.config.section import Method, Section
from selection.errors import Refused

ROOT = Path(__file__).resolve().parent.parent
BASE = [
    str(ROOT / "configs" / "staged.yaml"),
    "folder=nowhere",
    "model.args.depth=1",
    "model.args.embed_dim=16",
    "model.args.num_heads=2",
]
ABSURD = ["1.0e+30", "1.0e+300", "99999999999", "2147483647", "-1", "0", ".nan", ".inf", "1e400", "nan", "'1'"]

BEYOND = {"1.0e+300", ".nan", ".inf", "1e400", "nan"}
"""What no setting takes."""


def parts(annotation: Any) -> Iterator[Any]:
    """What a setting's type is made of, options of methods and free names aside."""
    if typing.get_origin(annotation) in (typing.Literal, dict):
        return
    inside = typing.get_args(annotation)
    yield from (part for one in inside for part in parts(one))
    if not inside:
        yield annotation


def numeric(section: type[Section], place: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        here = f"{place}.{name}".strip(".")
        found = list(parts(field.annotation))
        if {int, float} & set(found):
            yield here
        for part in found:
            if isinstance(part, type) and issubclass(part, Section):
                yield from numeric(part, here)


PLACES = sorted(set(numeric(Config)))


def test_the_page_is_walked() -> None:
    assert {"seed", "train.lr", "train.patches.joint.least", "prune.search.grid", "prune.round", "prune.sizes"} <= set(
        PLACES
    )
    assert not issubclass(Method, dict)
    assert len(PLACES) > 120


@pytest.mark.parametrize("place", few(PLACES, PLACES[::4]))
def test_absurd_numbers_are_read_or_refused(place: str) -> None:
    """Where they stand alone; that they go with the rest is another question."""
    for value in ABSURD:
        told = asked(place, value)
        assert not told or place.split(".")[0] in told
        assert told or value not in BEYOND, f"{place}={value} was taken"


def asked(place: str, value: str) -> str:
    """The refusal; empty where there is none."""
    try:
        read(BASE[0], [*BASE[1:], f"{place}={value}"])
    except Refused as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize("place", few(PLACES, PLACES[::12]))
def test_absurd_numbers_are_planned_or_refused(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("1.0e+30", "2147483647", "-1", "0"):
        code = main(["run", *BASE, f"{place}={value}", "--dry-run"])
        said = capsys.readouterr()
        assert code in (0, 2), said.err
        assert code == 0 or said.err.startswith("lotus: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [(["export.latency_batch=100000000"], "export.latency_batch: 100000000 images at once: takes"),
     (["prune.keep.latency=0.5", "prune.latency_batch=100000000"], "prune.latency_batch: 100000000 images at once: takes"),
     (["train.sparsity.lr=1.0e+300"], "train.sparsity.lr: a number of at most 1e"),
     (["model.args.norm_layer=BatchNorm2d"], "model.args: .* takes no images"),
     (["model.args.norm_layer=BatchNorm1d"], "model.args: .* takes no images"),
     (["train.patches.joint.buckets=99999999"], "train.patches.joint.buckets: ")],
)  # fmt: skip
def test_what_a_stage_would_stumble_over_is_refused_before_any_work(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["run", *BASE, *words, "--dry-run"]) == 2
    assert re.search(says, capsys.readouterr().err)
