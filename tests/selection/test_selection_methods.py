"""A method is a function: found by name, bound by parameter name."""

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import pytest

from selection import methods
from selection.errors import Notice, Refused
from selection.lottery import select
from selection.signals import Signals


def shelf(source, name="shelf"):
    module = ModuleType(name)
    exec(source, module.__dict__)
    return module


OURS = shelf(
    """
from math import gcd
from textwrap import dedent
LIMIT = 3
class Thing: ...
def _private(x): ...
def easy(labels): return ("ours", labels)
def hard(loss, labels, *, window=10, kind='mean'): return (loss, labels, window, kind)
"""
)
THEIRS = shelf("def easy(labels): return ('theirs', labels)\ndef new(loss): return loss", "theirs")


def test_only_public_functions_of_the_shelf_itself_are_methods():
    assert methods.names(OURS) == ["easy", "hard"]


def test_a_later_shelf_wins():
    assert methods.find(OURS, "easy", place="p")(1) == ("ours", 1)
    assert methods.find([OURS, THEIRS], "easy", place="p")(1) == ("theirs", 1)
    assert methods.find([THEIRS, OURS], "easy", place="p")(1) == ("ours", 1)
    assert methods.find([OURS, THEIRS], "hard", place="p") is OURS.hard


def test_an_unknown_method_is_refused_with_place_nearest_and_list():
    with pytest.raises(Refused, match=r"^select\.score: .*'hard'\? .*easy, hard, new\.$"):
        methods.find([OURS, THEIRS], "hrd", place="select.score")
    with pytest.raises(Refused, match=r"'gcd'.*easy, hard\.$"):
        methods.find(OURS, "gcd", place="select.score")


def test_a_method_of_another_kind_is_no_choice():
    """A user's file holds scores, guests and criteria side by side; what each reads tells them apart."""
    with pytest.raises(Refused, match=r"^p: 'hard' reads loss.*'lost'\?.*labels, lost\.$"):
        methods.find(OURS, "hard", place="p", here=["labels", "lost"])
    with pytest.raises(Refused, match=r"^p: .*'hrd'.*easy\.$"):
        methods.find(OURS, "hrd", place="p", here=["labels"])
    assert methods.find([OURS, THEIRS], "easy", place="p", here=["labels"])(1) == ("theirs", 1)


def test_a_method_that_reads_nothing_is_of_another_kind_unless_it_may():
    """A guest reads nothing, and is no score."""
    other = ModuleType("other")
    exec("def guest(*, by=0.9): pass", vars(other))
    with pytest.raises(Refused, match=r"^p: 'guest' reads nothing.*some of: labels\.$"):
        methods.find([OURS, other], "guest", place="p", here=["labels"])
    with pytest.raises(Refused, match=r"^p: there is no 'gues'\. Here: easy\.$"):
        methods.find([OURS, other], "gues", place="p", here=["labels"])
    assert methods.find([OURS, other], "guest", place="p", here=["labels"], or_nothing=True) is other.guest


def test_a_method_of_another_kind_hides_none():
    other = ModuleType("other")
    exec("def easy(path): pass", vars(other))
    assert methods.find([OURS, other], "easy", place="p", here=["labels"]) is OURS.easy


def test_the_signature_is_the_schema():
    assert methods.reads(OURS.hard) == ["loss", "labels"]
    assert methods.settings(OURS.hard) == {"window": 10, "kind": "mean"}
    assert methods.settings(OURS.easy) == {}


def test_call_binds_by_name_and_gives_no_more_than_is_read():
    available = {"labels": "L", "loss": "l", "rest": "r"}
    assert methods.call(OURS.hard, available, {"window": 3}, place="p") == ("l", "L", 3, "mean")


def test_call_refuses_what_is_not_recorded():
    with pytest.raises(Refused, match=r"^p: 'hard' reads loss.*Here: labels, rest\.$"):
        methods.call(OURS.hard, {"rest": 0, "labels": 1}, {}, place="p")


def test_what_can_be_recorded_is_told_with_how_once():
    def mine(run_in, run_p_label, margin):
        pass

    cures = {"run_in": "Record it so.", "run_p_label": "Record it so."}
    with pytest.raises(Refused, match=r"run_in.*here\. Record it so\. Here: labels\.$"):
        methods.call(mine, {"labels": 0}, {}, place="--score", cures=cures)


def test_call_refuses_unknown_settings():
    with pytest.raises(Refused, match=r"^p\.windw: 'hard' .*'window'\? .*window, kind\.$"):
        methods.call(OURS.hard, {"loss": 0, "labels": 1}, {"windw": 3}, place="p")
    with pytest.raises(Refused, match=r"^p\.labels: 'easy' .*none\.$"):
        methods.call(OURS.easy, {"labels": 1}, {"labels": 3}, place="p")


def test_a_word_that_a_setting_does_not_know_is_refused_before_anything_is_read():
    """Settings are checked when a run is planned; the proxy that a picker waits for takes minutes."""

    def mine(labels, *, by: Literal["left", "right"] = "left", size: "Unknown" = 3):  # type: ignore[name-defined]  # noqa: F821
        return labels

    def told(labels, *, by: Literal["left", "right"] = "left"):
        return labels

    methods.check_settings(told, {"by": "right"}, place="p")
    with pytest.raises(Refused, match=r"^p\.by: .*'lefd'.*'left'\? .*left, right\.$"):
        methods.check_settings(told, {"by": "lefd"}, place="p")
    methods.check_settings(mine, {"by": "lefd", "size": 2}, place="p")  # annotated with what is nowhere: its own affair


def test_a_setting_without_an_annotation_takes_what_its_default_is():
    def mine(loss, *, last=3, share=0.5, mean=True, kind="a", other=None):
        return loss

    for given in ({"last": 0.5}, {"share": 1}, {"mean": False}, {"kind": "b"}, {"other": "any"}):
        methods.check_settings(mine, given, place="p")
    for name, wrong, wanted in (("last", "x", "a number"), ("share", True, "a number"), ("last", None, "a number"),
                                ("mean", 1, "true or false"), ("kind", 2, "a word")):  # fmt: skip
        with pytest.raises(Refused, match=rf"^p\.{name}: {wanted} .*annotate"):
            methods.check_settings(mine, {name: wrong}, place="p")


def test_a_setting_without_a_default_has_to_be_said():
    def mine(loss, *, last):
        return loss

    with pytest.raises(Refused, match=r"^p\.last: has no default"):
        methods.check_settings(mine, {}, place="p")
    methods.check_settings(mine, {"last": 1}, place="p")


def test_a_method_that_takes_the_place_of_another_is_told():
    with pytest.warns(Notice, match=r"^p: 'easy' of theirs takes the place of that of .*another name"):
        methods.find([OURS, THEIRS], "easy", place="p")


@dataclass(frozen=True)
class Oven:
    heat: int = 200
    mode: Literal["fan", "grill"] = "fan"


def test_a_dataclass_of_settings_is_said_field_by_field():
    """Two methods that share settings share one type, and a config sees no difference."""

    def bake(dough, *, oven: Oven = Oven(), minutes: int = 20):
        return dough, oven, minutes

    assert methods.settings(bake) == {"heat": 200, "mode": "fan", "minutes": 20}
    assert methods.kinds(bake).items() >= {"heat": int, "minutes": int}.items()
    given = {"heat": 180, "minutes": 5}
    assert methods.call(bake, {"dough": "d"}, given, place="p") == ("d", Oven(180), 5)
    assert given == {"heat": 180, "minutes": 5}
    assert methods.call(bake, {"dough": "d"}, {}, place="p") == ("d", Oven(), 20)
    for wrong, says in (
        ({"heet": 1}, r"^p\.heet: .*'heat'\? It has: heat, mode, minutes"),
        ({"mode": "fam"}, r"^p\.mode: .*'fan'\?"),
        ({"oven": Oven()}, r"^p\.oven: .* It has: heat, mode, minutes"),
    ):
        with pytest.raises(Refused, match=says):
            methods.call(bake, {"dough": "d"}, wrong, place="p")


def test_nearest_is_silent_where_nothing_is_near():
    assert methods.nearest("kep", ["keep", "seed"]) == " Did you mean 'keep'?"
    assert methods.nearest("zzz", ["keep", "seed"]) == ""


@pytest.mark.parametrize(
    ("score", "pick", "says"),
    [
        ("el2n", {"name": "ccs", "bin": 20}, "select.pick.bin: 'ccs' has no such setting. Did you mean 'bins'?"),
        ("el2n", {"name": "ccs", "binning": "widht"}, "select.pick.binning: there is no 'widht'. Did you mean 'width'? Here: "),
        ("el2n", {"name": "grad_match", "by": "imag"}, "select.pick.by: there is no 'imag'. Did you mean 'image'?"),
        ("el2n", {"name": "facility_location", "maximizer": "laxy"}, "select.pick.maximizer: there is no 'laxy'. Did you mean 'lazy'?"),
        ("el2n", {"name": "ccs", "binning": 3}, "select.pick.binning: there is no 3. Here: width, quantile."),
        ({"name": "aum", "kind": "logits"}, "ccs", "select.score.kind: there is no 'logits'. Did you mean 'logit'?"),
    ],
)  # fmt: skip
def test_an_option_that_is_misspelt_is_told_with_the_nearest(score, pick, says):
    rng = np.random.default_rng(0)
    drawn = {
        "labels": np.arange(30) % 3,
        "embeddings": rng.normal(size=(30, 4)),
        "errors": rng.uniform(-0.3, 0.3, (30, 3)),
    }
    drawn |= {name: rng.random((1, 2, 30)) / 2 for name in ("error_norm", "margin", "p_label", "p_other")}
    with pytest.raises(Refused) as refusal:
        select(Signals(drawn, fingerprint="drawn"), score=score, pick=pick, keep=0.5)
    assert says in str(refusal.value)


def test_what_a_method_of_the_users_own_raises_is_told_with_its_place():
    mine = shelf("def broken(labels):\n    return 1 / labels", "mine").broken
    with pytest.raises(Refused, match=r"^select\.score \(broken\): Zero.*line 2\)\.$") as told:
        methods.call(mine, {"labels": 0}, {}, place="select.score")
    assert isinstance(told.value.__cause__, ZeroDivisionError)
    ours = shelf("def broken(labels):\n    return 1 / labels", "selection.scores").broken
    with pytest.raises(ZeroDivisionError):  # a fault of ours is no refusal
        methods.call(ours, {"labels": 0}, {}, place="select.score")
