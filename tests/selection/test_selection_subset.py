"""A ticket cannot be wrong, belongs to one data set, and its file is whole or refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selection import npz
from selection.errors import Refused
from selection.signals import Signals
from selection.subset import Subset

KIND = "a ticket of LOTUS"
ABOUT = {"total": 10, "fingerprint": "data-1", "keep": 0.3, "origin": {}}


@pytest.fixture
def ticket():
    origin = {"score": {"name": "el2n", "epoch": 20}, "pick": {"name": "ccs"}, "balance": True, "seed": 4}
    return Subset([7, 2, 5], 10, fingerprint="data-1", weights=[0.5, 1.5, 1.0], keep=0.3, origin=origin)


def test_rows_are_sorted_and_weights_go_with_them(ticket):
    assert ticket.rows.tolist() == [2, 5, 7]
    assert ticket.weights.tolist() == [1.5, 1.0, 0.5]
    assert (ticket.rows.dtype, ticket.weights.dtype) == (np.int64, np.float32)
    assert (len(ticket), ticket.total, ticket.keep, ticket.fingerprint) == (3, 10, 0.3, "data-1")


def test_the_defaults():
    ticket = Subset([1, 3], 8, fingerprint="f")
    assert ticket.weights.tolist() == [1, 1]
    assert ticket.keep == 0.25
    assert ticket.origin == {}
    whole = Subset.whole(4, fingerprint="f")
    assert whole.rows.tolist() == [0, 1, 2, 3]
    assert whole.keep == 1
    assert whole.complement.tolist() == []


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_the_complement_is_the_rest(case):
    total, rows = case
    ticket = Subset(list(rows), total, fingerprint="f")
    assert sorted(ticket.rows.tolist() + ticket.complement.tolist()) == list(range(total))


def test_weights_are_spread_over_all_images_and_a_copy():
    ticket = Subset([4, 1], 6, fingerprint="f", weights=[0.5, 1.5])
    spread = ticket.spread()
    assert spread.dtype == np.float32
    assert spread.tolist() == [0, 1.5, 0, 0, 0.5, 0]
    spread[:] = 9
    assert ticket.weights.tolist() == [1.5, 0.5]


def test_nothing_can_be_changed_afterwards():
    rows, weights, origin = np.array([1, 2]), np.ones(2), {"seed": 1}
    ticket = Subset(rows, 5, fingerprint="f", weights=weights, origin=origin)
    rows[0], weights[0], origin["seed"] = 4, 9, 2
    assert ticket.rows.tolist() == [1, 2]
    assert ticket.weights.tolist() == [1, 1]
    assert ticket.origin == {"seed": 1}
    for array in (ticket.rows, ticket.weights):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("rows", "changes", "match"),
    [
        ([], {}, "rows are a list|no rows"),
        (np.array([], dtype=int), {}, "no rows"),
        ([1, 2, 2, 2], {}, "row 2 stands there 3 times"),
        ([1, 10], {}, "row 10 is out of range; the 10 images are 0 to 9"),
        ([-1, 3], {}, "row -1 is out of range"),
        ([1.0, 2.0], {}, "a list of row numbers, not float64"),
        (np.ones(10, bool), {}, "np.flatnonzero"),
        ([[1, 2]], {}, "a list of row numbers"),
        ([1, 2], {"total": 0}, "of 0 images"),
        ([1, 2], {"total": 10**400}, "takes inf GB of memory"),
        ([1, 2], {"total": 10.0}, "of 10.0 images"),
        ([1, 2], {"fingerprint": ""}, "fingerprint"),
        ([1, 2], {"weights": [1.0]}, r"2 rows want 2 weights"),
        ([1, 2], {"weights": [0.0, 2.0]}, "positive and finite"),
        ([1, 2], {"weights": [-1.0, 3.0]}, "positive and finite"),
        ([1, 2], {"weights": [np.nan, 1.0]}, "positive and finite"),
        ([1, 2], {"weights": [np.inf, 1.0]}, "positive and finite"),
        ([1, 2], {"weights": [1e-60, 2.0]}, "positive and finite, in single precision"),  # 0 in the file
        ([1, 2], {"weights": [1e300, 1.0]}, "positive and finite"),
        ([1, 2], {"weights": [1.0, 3.0]}, "mean is 2, not 1"),
        ([1, 2], {"weights": ["1", "1"]}, "2 rows want 2 weights"),
        ([1, 2], {"keep": 0}, "keep=0 is no fraction"),
        ([1, 2], {"keep": 1.5}, "keep=1.5 is no fraction"),
        ([1, 2], {"keep": "half"}, "keep='half' is no fraction"),
        ([1, 2], {"origin": {"f": print}}, "cannot be written as JSON"),
        ([1, 2], {"origin": {"f": float("nan")}}, "cannot be written as JSON"),
    ],
)
def test_what_cannot_be_is_refused(rows, changes, match):
    with pytest.raises(Refused, match=match):
        Subset(rows, **{"total": 10, "fingerprint": "f", **changes})


def test_a_ticket_of_other_data_is_refused(ticket):
    ticket.check("data-1", 10)
    with pytest.raises(
        Refused,
        match=r"^select\.ticket: .*data-1.*data-2\. Give another",
    ):
        ticket.check("data-2", 10, place="select.ticket")
    with pytest.raises(Refused, match="here are 11 of data data-1"):
        ticket.check("data-1", 11)


# -- the file


def test_what_is_saved_is_what_is_loaded(ticket, tmp_path):
    path = tmp_path / "new" / "subset.npz"
    ticket.save(path)
    back = Subset.load(path)
    assert back.rows.tolist() == ticket.rows.tolist()
    assert back.weights.tolist() == ticket.weights.tolist()
    for field in ("total", "fingerprint", "keep", "origin"):
        assert getattr(back, field) == getattr(ticket, field)
    assert [file.name for file in path.parent.iterdir()] == ["subset.npz"]


@pytest.mark.parametrize("part", [0.0, 0.01, 0.4, 0.8, 0.99])
def test_a_file_cut_short_is_refused(ticket, tmp_path, part):
    path = tmp_path / "subset.npz"
    ticket.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(Refused, match=r"subset\.npz: damaged.*select stage again"):
        Subset.load(path)


@pytest.mark.parametrize(
    ("rows", "about", "match"),
    [
        ([1, 1, 2], {}, "row 1 stands there 2 times"),
        ([1, 2, 10], {}, "row 10 is out of range"),
        ([-3, 2, 1], {}, "row -3 is out of range"),
        ([1.5, 2.0, 3.0], {}, "list of row numbers"),
        ([1, 2, 3], {"total": "10"}, "of '10' images"),
        ([1, 2, 3], {"total": None}, "of None images"),
        ([1, 2, 3], {"fingerprint": None}, "fingerprint"),
        ([1, 2, 3], {"keep": 2}, "no fraction in"),
        ([1, 2, 3], {"origin": "me"}, "no complete ticket"),
    ],
)
def test_bad_contents_are_refused_with_path_and_cure(rows, about, match, tmp_path):
    path = tmp_path / "t.npz"
    npz.write(path, {"rows": np.array(rows), "weights": np.ones(3)}, {**ABOUT, **about}, kind=KIND, version=1)
    with pytest.raises(Refused, match=rf"t\.npz.*(?:{match}).*Give another ticket"):
        Subset.load(path)


def test_foreign_and_later_files_are_refused(tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(Refused, match="No such file"):
        Subset.load(path)
    path.write_bytes(b"1 2 3")
    with pytest.raises(Refused, match=r"not a ticket .*no \.npz"):
        Subset.load(path)
    np.savez(path, rows=np.arange(3))
    with pytest.raises(Refused, match=r"not a ticket .*\(rows\)\. Give a ticket"):
        Subset.load(path)
    Signals({"labels": [0, 1]}, fingerprint="f").save(path)
    with pytest.raises(Refused, match=r"not a ticket .*signals of LOTUS"):
        Subset.load(path)
    npz.write(path, {"rows": np.arange(3)}, ABOUT, kind=KIND, version=1)
    with pytest.raises(Refused, match="no complete ticket"):
        Subset.load(path)
    npz.write(path, {"rows": np.arange(3), "weights": np.ones(3)}, ABOUT, kind=KIND, version=2)
    with pytest.raises(Refused, match="format 2"):
        Subset.load(path)


def test_a_place_that_cannot_be_written_is_refused(ticket, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be written"):
        ticket.save(tmp_path / "file" / "subset.npz")
    with pytest.raises(Refused, match="cannot be written"):
        ticket.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
