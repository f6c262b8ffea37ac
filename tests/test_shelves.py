"""Shelves that are there without being named: ours, and those of installed packages; a config names none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from lotus import shelves
from lotus.config import read
from selection.errors import Refused

SHELF = """
from lotus.way import Way

def make(uncut, *, part: float = 0.5):
    yield

WAY = Way("theirs", "cut it", make)
"""


@pytest.fixture
def looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """What is refused of a config that names the way of a package whose shelf is ``code``; empty where nothing is.

    The package is on the path, with what an installer leaves.
    """
    from lotus.stages import check

    def look(code: str) -> str:
        about = tmp_path / "theirs-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
        (about / "entry_points.txt").write_text(f"[{shelves.GROUP}]\ntheirs = their_shelf\n")
        (tmp_path / "their_shelf.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        shelves.installed.cache_clear()
        try:
            check(read(None, ["data.name=digits", "prune.method={name: theirs, part: 0.3}"]))
        except Refused as refusal:
            return str(refusal)
        return ""

    yield look
    shelves.installed.cache_clear()
    sys.modules.pop("their_shelf", None)


def test_an_installed_package_brings_a_shelf(looked: Callable[[str], str]) -> None:
    assert looked(SHELF) == ""


def test_one_that_cannot_be_imported_is_named(looked: Callable[[str], str]) -> None:
    assert "their_shelf, which an installed package brings" in looked("import nothing_of_that_name")


def test_the_published_systems_are_found_wherever_lotus_lies() -> None:
    there = {shelf.__name__.rpartition(".")[2] for shelf in shelves.installed()}
    assert {"cp_vit", "soup", "sparse_vit", "spvit", "zeros"} <= there


def test_the_users_own_file_wins() -> None:
    from types import ModuleType

    from lotus.stages import ways
    from lotus.way import Way

    mine = ModuleType("mine")
    mine.WAY = Way("soup", "mine", lambda uncut, *, salt=1: None)  # type: ignore[attr-defined]
    settings = read(None, ["prune.method={name: soup, salt: 2}"]).prune
    assert ways.chosen(settings, shelves.known([mine]))[1] == {"salt": 2}
    with pytest.raises(Refused, match=r"prune\.method\.salt: 'soup' has no such setting"):
        ways.chosen(settings, shelves.known())


@pytest.mark.parametrize("name", ["os", "their_shelf:WAY", "lotus.papers.soup", "../mine.py"])
def test_a_config_never_names_a_module(name: str) -> None:
    from lotus.stages import check

    with pytest.raises(Refused, match=r"prune\.method: there is no "):
        check(read(None, ["data.name=digits", f"prune.method={name!r}"]))
    with pytest.raises(Refused, match="with: no such setting"):
        read(None, [f"with=[{name!r}]"])


KINDS = """
def of_path(path): ...
def of_loss(loss): ...
def of_step(step): return 0.1
def of_nothing(*, by=0.9): ...
"""

PLACES = (
    "data.name", "select.score", "select.pick", "train.dynamic", "train.schedule", "train.guests", "train.sparsity.penalty",
    "prune.criterion",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_function_of_another_kind_is_refused_before_anything_is_done(place: str) -> None:
    """One file holds scores, schedules and data sets; each place takes what reads what is there, and lists no other."""
    from lotus.data.dataset import open_data
    from lotus.stages.checks import check

    mine = ModuleType("mine")
    exec(KINDS, vars(mine))

    def asked(name: str) -> str:
        gates = ["train.sparsity.gates=true"] if place == "train.sparsity.penalty" else []
        page = read(None, ["data.name=digits", *gates, f"{place}={[name] if place == 'train.guests' else name}"])
        look = partial(open_data, page.data) if place == "data.name" else partial(check, page)
        with pytest.raises(Refused) as told:
            look([mine])
        return str(told.value)

    other = {
        "data.name": "of_loss",
        "select.score": "of_step",
        "select.pick": "of_step",
        "train.dynamic": "of_step",
    }.get(place, "of_path")
    assert asked(other).startswith(f"{place}: {other!r} reads {other[3:]}, which is not here. ")
    if place not in ("data.name", "train.guests"):  # which may read nothing
        assert asked("of_nothing").startswith(f"{place}: 'of_nothing' reads nothing")
    near = asked(f"{other}s")
    assert near.startswith(f"{place}: there is no '{other}s'.")
    assert f"'{other}'" not in near
    assert f" {other}," not in near


def test_the_shelves_read_no_more_than_their_places_give() -> None:
    """What is told of a user's function must never refuse one of ours."""
    from lotus.data import catalog
    from lotus.pruning import criteria, scoring
    from lotus.sparsity import penalties
    from lotus.training import guest_shelf, named, optim, schedules
    from lotus.vit import patch_scores, saliency
    from selection import dynamic, dynamic_pruning, lottery, methods, pickers, scores
    from selection.signals import VOCABULARY

    for room, may in (
        (scores, VOCABULARY),
        (pickers, lottery.OF_PICKERS),
        (dynamic, dynamic_pruning.READS),
        (schedules, optim.SCHEDULE_READS),
        (guest_shelf, named.READS),
        (criteria, scoring.READS),
        (patch_scores, saliency.READS),
        (catalog, ("path", "name")),
        (penalties, ("values", "gradient", "descend", "lr", "strength")),
    ):
        for name in methods.names(room):
            assert set(methods.reads(getattr(room, name))) <= set(may), f"{room.__name__}.{name}"


def test_a_data_set_that_gives_none_and_a_schedule_that_gives_no_rate() -> None:
    from lotus.data.dataset import open_data
    from lotus.training.optim import make_schedule

    mine = ModuleType("mine")
    exec("def nothing(path): ...\ndef word(step): return 'fast'\ndef pair(path): return (1, 2)", vars(mine))
    with pytest.raises(Refused, match=r"^data\.name: 'nothing' .*two .*source\.Source"):
        open_data(read(None, ["data.name=nothing"]).data, [mine])
    with pytest.raises(Refused, match=r"^data\.name: 'pair' .*\(int, int\).*Return two"):
        open_data(read(None, ["data.name=pair"]).data, [mine])
    with pytest.raises(Refused, match=r"^train\.schedule: 'word' .*'fast'.*learning rate"):
        make_schedule(read(None, ["train.schedule=word"]).train, [mine])


@pytest.mark.parametrize("name", ["unstructured", "convolve"])
def test_a_way_is_refused_a_setting_by_its_own_name(name: str) -> None:
    from lotus.stages import ways

    settings = read(None, [f"prune.method={{name: {name}, foo: 3}}"]).prune
    with pytest.raises(Refused, match=rf"prune\.method\.foo: '{name}' has no such"):
        ways.chosen(settings, shelves.known())
