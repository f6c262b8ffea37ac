"""Tickets and scores as files of others: round trips, what published code leaves, and what must be refused."""

import dataclasses
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selection import exchange, pickles
from selection.errors import Refused
from selection.exchange import Images, Words
from selection.lottery import select
from selection.signals import Signals
from selection.subset import Known, Subset

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
NAMES = [f"c{label}/img_{row}.png" for row, label in enumerate(LABELS)]


@pytest.fixture
def images():
    """Ten images as LOTUS counts them; others count twelve, of which the numbers 3 and 7 were held out."""
    numbers = np.delete(np.arange(12), [3, 7])
    return Images(10, "data", LABELS, ("c0", "c1", "c2"), NAMES, numbers, 12)


@pytest.fixture
def plain():
    return Images(10, "data", LABELS, ("c0", "c1", "c2"), NAMES)


def subset_of(images, rows, **changes):
    rows = np.asarray(sorted(rows))
    known = Known(images.labels, images.classes, changes.pop("scores", np.linspace(0, 1, images.total)))
    return Subset(rows, images.total, fingerprint=images.fingerprint, known=known, **changes)


# -- round trips


@st.composite
def cases(draw):
    total = draw(st.integers(1, 30))
    held = draw(st.integers(0, 5))
    numbers = np.sort(draw(st.permutations(range(total + held)))[:total])
    rows = draw(st.sets(st.integers(0, total - 1), min_size=1))
    labels = np.array(draw(st.lists(st.integers(0, 3), min_size=total, max_size=total)))
    score = st.floats(-1e3, 1e3, width=32) | st.just(float("inf"))
    scores = draw(st.none() | st.lists(score, min_size=total, max_size=total))
    heavy = np.array(draw(st.lists(st.floats(0.5, 2), min_size=len(rows), max_size=len(rows))))
    names = [f"c{label}/é {row}.png" for row, label in enumerate(labels)]
    images = Images(total, "data", labels, ("c0", "c1", "c2", "c3"), names, numbers, total + held)
    return images, subset_of(images, rows, scores=scores, weights=heavy / heavy.mean())


@pytest.mark.parametrize("name", ["t.npy", "t.json", "t.txt", "paths.txt", "labels.txt", "t.csv"])
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_what_is_written_is_what_is_read(name, case, tmp_path_factory):
    images, subset = case
    file = tmp_path_factory.mktemp("x") / name
    exchange.write(subset, file, images, paths=name == "paths.txt", labels=name == "labels.txt")
    found = exchange.read(file, images, kind="rows")
    back = exchange.ticket(found, images, name=name)
    assert np.array_equal(back.rows, subset.rows)
    assert back.fingerprint == "data"
    if name == "t.csv":
        assert np.allclose(back.weights, subset.weights, rtol=1e-5)
        assert (back.scores is None) == (subset.scores is None)
        assert subset.scores is None or np.array_equal(back.scores, subset.scores)


def test_others_count_what_is_held_out(images, tmp_path):
    exchange.write(subset_of(images, [2, 3, 9]), tmp_path / "t.npy", images)
    assert np.load(tmp_path / "t.npy").tolist() == [2, 4, 11]
    np.save(tmp_path / "some.npy", [3, 4, 7, 11])
    found = exchange.read(tmp_path / "some.npy", images)
    assert found.rows.tolist() == [3, 9]
    assert "2 of them are held out" in found.warnings[0]
    np.save(tmp_path / "some.npy", [3, 4, 7, 9])  # none above LOTUS' last row: it may be these that are counted
    with pytest.raises(Refused, match=r"2 of its numbers .*held out .*index=source if"):
        exchange.read(tmp_path / "some.npy", images)
    assert exchange.read(tmp_path / "some.npy", dataclasses.replace(images, said=True)).rows.tolist() == [3, 7]


def test_a_table_has_every_image(images, tmp_path):
    exchange.write(subset_of(images, [2, 3]), tmp_path / "t.csv", images)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "index,path,label,score,weight,kept"
    assert len(lines) == 11
    assert lines[4] == "4,c0/img_3.png,0,0.333333343,1,1"
    assert lines[1].endswith(",0,0")


def test_a_name_that_is_no_utf_8_cannot_stand_in_a_parquet(plain, tmp_path):
    pytest.importorskip("pyarrow")
    odd = dataclasses.replace(plain, names=["c0/\udcff.png", *NAMES[1:]])
    with pytest.raises(Refused, match=r"udcff.*no UTF-8.*Write a \.csv"):
        exchange.write(subset_of(odd, [2, 3]), tmp_path / "t.parquet", odd)
    exchange.write(subset_of(odd, [2, 3]), tmp_path / "t.csv", odd)
    assert exchange.read(tmp_path / "t.csv", odd, kind="scores").scores is not None


def test_a_file_is_there_whole_or_not_at_all(images, tmp_path, monkeypatch):
    (tmp_path / "t.npy").write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Refused, match="No space left"):
        exchange.write(subset_of(images, [2]), tmp_path / "t.npy", images)
    assert [file.name for file in tmp_path.iterdir()] == ["t.npy"]
    assert (tmp_path / "t.npy").read_bytes() == b"old"


# -- what published code leaves


def test_scores_with_their_ascending_order_as_tdds_and_dual_leave_them(plain, tmp_path):
    values = np.random.default_rng(0).random(10)
    np.save(tmp_path / "tdds_score.npy", values)
    np.save(tmp_path / "tdds_mask.npy", values.argsort())
    by_score = exchange.ticket(exchange.read(tmp_path / "tdds_score.npy", plain), plain, name="x", keep=0.3)
    by_order = exchange.ticket(exchange.read(tmp_path / "tdds_mask.npy", plain), plain, name="x", keep=0.3)
    assert set(by_score.rows) == set(by_order.rows) == set(values.argsort()[-3:])
    np.save(tmp_path / "tdds_mask.npy", values.argsort()[::-1])
    with pytest.raises(Refused, match="not its ascending order"):
        exchange.read(tmp_path / "tdds_score.npy", plain)


@pytest.mark.parametrize("how", ["pickle2", "pickle4", "pickle5", "save", "old save"])
def test_dictionaries_of_tensors_as_ccs_and_d2_leave_them(plain, how, tmp_path):
    el2n = torch.rand(10, 2)[:, 0]  # a view: its numbers do not lie one after another
    told = {"el2n": el2n, "forgetting": torch.arange(10), "targets": torch.tensor(LABELS)}
    file = tmp_path / "data-score.pickle"
    if how.startswith("pickle"):
        file.write_bytes(pickle.dumps(told, protocol=int(how[-1])))
    else:
        torch.save(told, file, _use_new_zipfile_serialization=how == "save")
    assert np.allclose(exchange.read(file, plain, column="el2n").scores, el2n.numpy())
    with pytest.raises(Refused, match=r"el2n, forgetting, targets.*column="):
        exchange.read(file, plain)
    with pytest.raises(Refused, match=r"Did you mean 'el2n'"):
        exchange.read(file, plain, column="elzn")
    told["targets"] = told["targets"].flip(0)
    torch.save(told, file)
    with pytest.raises(Refused, match="labels are not those"):
        exchange.read(file, plain, column="el2n")


def test_class_sorted_scores_as_data_diet_leaves_them(plain, tmp_path):
    values = np.random.default_rng(0).random(10)
    np.save(tmp_path / "s.npy", values[np.argsort(LABELS, kind="stable")])
    assert np.array_equal(exchange.read(tmp_path / "s.npy", plain, order="class").scores, values)
    assert not np.array_equal(exchange.read(tmp_path / "s.npy", plain).scores, values)
    order = np.random.default_rng(1).permutation(10)
    np.save(tmp_path / "order.npy", order)
    np.save(tmp_path / "s.npy", values[order])
    found = exchange.read(tmp_path / "s.npy", plain, order=str(tmp_path / "order.npy"))
    assert np.array_equal(found.scores, values)


def test_where_nothing_is_to_go_all_stay(plain, tmp_path):
    """As `lotus inspect` leaves it where it found nothing."""
    (tmp_path / "delete.txt").write_text("\n")
    assert exchange.read(tmp_path / "delete.txt", plain, kind="remove").rows.tolist() == list(range(10))
    with pytest.raises(Refused, match="empty"):
        exchange.read(tmp_path / "delete.txt", plain, kind="rows")


def test_ids_to_remove_as_moderate_leaves_them(plain, tmp_path):
    (tmp_path / "drop.bin").write_bytes(pickle.dumps([0, 2, 4]))
    assert exchange.read(tmp_path / "drop.bin", plain, kind="remove").rows.tolist() == [1, 3, 5, 6, 7, 8, 9]


def test_a_table_of_some_images_may_say_which_go(plain, tmp_path):
    """Their scores say nothing of the others, and are not needed where what is there stays, or goes."""
    file = tmp_path / "worst.csv"
    file.write_text("index,score\n0,0.5\n2,0.25\n4,0.125\n")
    assert exchange.read(file, plain, kind="remove").rows.tolist() == [1, 3, 5, 6, 7, 8, 9]
    assert exchange.read(file, plain, kind="rows").rows.tolist() == [0, 2, 4]
    for kind in ("", "scores"):
        with pytest.raises(Refused, match=r"3 of 10 images.*kind=rows.*kind=remove"):
            exchange.read(file, plain, kind=kind)


def test_paths_and_labels_as_dyn_unc_leaves_them(plain, tmp_path):
    lines = [f"/somewhere/train/{NAMES[row]} {LABELS[row]}" for row in (4, 1)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    assert exchange.read(tmp_path / "list.txt", plain).rows.tolist() == [4, 1]
    (tmp_path / "list.txt").write_text(f"{NAMES[4]} 0\n")
    with pytest.raises(Refused, match="1 of 1 labels"):
        exchange.read(tmp_path / "list.txt", plain)
    assert exchange.read(tmp_path / "list.txt", plain, force=True).warnings


@pytest.mark.parametrize("head", ["", "filename,score\n", "image_path,my_metric\n"])
def test_scores_by_file_as_in_tables(plain, head, tmp_path):
    head = head.replace("image_path", "path")
    values = np.random.default_rng(0).random(10)
    order = np.random.default_rng(1).permutation(10)
    lines = [f"{NAMES[row].split('/')[1]},{float(values[row])!r}" for row in order]
    (tmp_path / "s.csv").write_text(head + "\n".join(lines))
    found = exchange.read(tmp_path / "s.csv", plain)
    assert np.array_equal(found.scores, values)
    (tmp_path / "s.csv").write_text(head + "\n".join(lines[:-1]))
    with pytest.raises(Refused, match="9 of 10 images"):
        exchange.read(tmp_path / "s.csv", plain)


def test_imported_scores_feed_select(plain, tmp_path):
    values = np.array([3, np.inf, 1, 0, 5, 2, 9, 8, 7, 6])
    np.save(tmp_path / "s.npy", values)
    found = exchange.read(tmp_path / "s.npy", plain)
    beside = Signals({"labels": LABELS, "embeddings": np.ones((10, 2))}, fingerprint="data", classes=plain.classes)
    exchange.scores(found, plain, name="s", beside=beside).save(tmp_path / "given.npz")
    signals = Signals.load(tmp_path / "given.npz")
    assert "embeddings" in signals
    drawn = select(signals, score="given", pick="top_k", keep=0.3, balance=False)
    assert drawn.subset.rows.tolist() == [1, 6, 7]
    assert np.array_equal(drawn.scores, values)


def test_negated(plain, tmp_path):
    np.save(tmp_path / "aum.npy", np.arange(10.0))
    found = exchange.read(tmp_path / "aum.npy", plain, negate=True)
    assert exchange.ticket(found, plain, name="x", keep=0.2).rows.tolist() == [0, 1]


def test_masks(images, tmp_path):
    mask = np.zeros(12, bool)
    mask[[0, 3, 11]] = True
    np.save(tmp_path / "m.npy", mask)
    assert exchange.read(tmp_path / "m.npy", images).rows.tolist() == [0, 9]
    np.save(tmp_path / "m.npy", mask.astype(int))
    with pytest.raises(Refused, match="kind=rows"):
        exchange.read(tmp_path / "m.npy", images)
    assert exchange.read(tmp_path / "m.npy", images, kind="mask").rows.tolist() == [0, 9]
    (tmp_path / "m.txt").write_text("\n".join(str(value) for value in mask))
    assert exchange.read(tmp_path / "m.txt", images).rows.tolist() == [0, 9]


# -- what must not pass


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("value", [Evil(), {"el2n": Evil()}, [1, Evil()], np.array([Evil()], dtype=object)])
def test_a_pickle_never_runs(plain, value, tmp_path):
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(value))
    with pytest.raises(Refused, match=r"exec|no array"):
        exchange.read(tmp_path / "x.pickle", plain)
    torch.save({"a": value}, tmp_path / "x.pt")
    with pytest.raises(Refused, match=r"exec|no array"):
        exchange.read(tmp_path / "x.pt", plain)


@pytest.mark.parametrize("shape", [((0,), (11,), (1,)), ((0,), (2,), (10,)), ((-1,), (2,), (1,)), ((5,), (2,), (-1,))])
def test_a_tensor_cannot_reach_outside(shape):
    (offset,), size, stride = shape
    with pytest.raises(pickle.UnpicklingError, match="inside"):
        pickles.strided(np.zeros(10), offset, size, stride)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.npy", np.array([0.1] * 9), "9 values, and the data has 10"),
        ("x.npy", np.array([np.nan] * 10), "nan at 0"),
        ("x.npy", np.array([0.0] * 9 + [-np.inf]), "-inf at 9"),
        ("x.npy", np.array([1, 2, 10]), "no image 10"),
        ("x.npy", np.array([1, -2]), "no image -2"),
        ("x.npy", np.arange(30), "other data"),
        ("x.npy", np.zeros(10, bool), "keeps no image"),
        ("x.npy", np.zeros((10, 2)), "shape"),
        ("x.npy", np.arange(10)[::-1].copy(), "several things"),
        ("x.json", "[1, 1]", "several|stands there 2 times"),
        ("x.json", '{"a": {"b": 1}}', "without a list"),
        ("x.txt", "", "empty"),
        ("x.txt", "nowhere.png\n", "no image of this data"),
        ("x.csv", "index,score\n0,1\n1\n", "cut short"),
        ("x.csv", "index,kept\n0,2\n", "true and false"),
        ("x.csv", "index,path\n0,c9/other.png\n", "not those of the images"),
        ("x.bin", "garbage", "cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused(plain, name, content, match, tmp_path):
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(Refused, match=match):
        exchange.read(tmp_path / name, plain)


@pytest.mark.parametrize("name", ["t.npy", "t.json", "t.csv", "t.pickle", "t.pt"])
@pytest.mark.parametrize("part", [0.0, 0.4, 0.95])
def test_a_file_cut_short(plain, name, part, tmp_path):
    file = tmp_path / name
    if name == "t.pickle":
        file.write_bytes(pickle.dumps({"s": torch.rand(10)}))
    elif name == "t.pt":
        torch.save({"s": torch.rand(10)}, file)
    else:
        exchange.write(subset_of(plain, range(7)), file, plain)
    whole = file.read_bytes()
    # The last line of a table may be cut so that it still reads as one: then only its number of images can tell.
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(Refused):
        exchange.ticket(exchange.read(file, plain), plain, name=name)


def test_two_images_of_one_name_want_their_folder(tmp_path):
    images = Images(2, "d", np.array([0, 1]), ("a", "b"), ["a/1.png", "b/1.png"])
    (tmp_path / "x.txt").write_text("1.png\n")
    with pytest.raises(Refused, match="several images"):
        exchange.read(tmp_path / "x.txt", images)
    (tmp_path / "x.txt").write_text("./b/1.png\n")
    assert exchange.read(tmp_path / "x.txt", images).rows.tolist() == [1]


def test_scores_want_a_keep_and_rows_do_not(plain, tmp_path):
    np.save(tmp_path / "s.npy", np.random.default_rng(0).random(10))
    with pytest.raises(Refused, match="keep"):
        exchange.ticket(exchange.read(tmp_path / "s.npy", plain), plain, name="s")
    np.save(tmp_path / "r.npy", [1, 2])
    with pytest.raises(Refused, match="Leave it out"):
        exchange.ticket(exchange.read(tmp_path / "r.npy", plain), plain, name="r", keep=0.3)
    with pytest.raises(Refused, match="no scores"):
        exchange.scores(exchange.read(tmp_path / "r.npy", plain), plain, name="r")


@pytest.mark.parametrize("keep", [float("nan"), float("inf"), 0.0, -1.0, 1.5, 0.01])
def test_a_keep_that_cannot_be(plain, keep, tmp_path):
    np.save(tmp_path / "s.npy", np.linspace(0, 1, 10))
    found = exchange.read(tmp_path / "s.npy", plain)
    with pytest.raises(Refused, match="keep"):
        exchange.ticket(found, plain, name="s", keep=keep)
    with pytest.raises(Refused, match="seed: -1"):
        exchange.ticket(found, plain, name="s", keep=0.5, seed=-1)


def test_a_table_is_what_it_is_said_to_be(plain, tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("index,score,kept\n" + "".join(f"{row},{row / 10},{int(row < 2)}\n" for row in range(10)))
    assert exchange.read(file, plain).rows.tolist() == [0, 1]
    assert exchange.read(file, plain, kind="mask").rows.tolist() == [0, 1]
    found = exchange.read(file, plain, kind="scores")
    assert (found.rows, found.told) == (None, "scores by index")
    assert exchange.ticket(found, plain, name="t", keep=0.2).rows.tolist() == [8, 9]
    with pytest.raises(Refused, match="kind=order"):
        exchange.read(file, plain, kind="order")
    file.write_text("index,score,kept\n0,1,1\n1,2,0\n")
    with pytest.raises(Refused, match="scores for 2 of 10"):
        exchange.read(file, plain, kind="scores")
    file.write_text("index,path\n" + f"0,{NAMES[0]}\n1,{NAMES[1]}\n")
    assert exchange.read(file, plain, kind="rows").rows.tolist() == [0, 1]
    for kind, says in (("mask", "no column 'kept'"), ("scores", "has no score")):
        with pytest.raises(Refused, match=says):
            exchange.read(file, plain, kind=kind)


def test_refusals_speak_as_the_caller_does(plain, tmp_path):
    flags = dataclasses.replace(plain, say=Words({"kind": "--as", "keep": "--keep"}, " "))
    (tmp_path / "t.csv").write_text("index,score,kept\n0,1,1\n")
    with pytest.raises(Refused, match=r"^--as order: .* Take --as rows or --as scores\."):
        exchange.read(tmp_path / "t.csv", flags, kind="order")
    np.save(tmp_path / "s.npy", np.linspace(0, 1, 10))
    with pytest.raises(Refused, match=r"Say --keep 0\.3"):
        exchange.ticket(exchange.read(tmp_path / "s.npy", flags), flags, name="s")


def test_nothing_here_knows_a_command_line():
    for file in Path(exchange.__file__).parent.glob("*.py"):
        assert not re.search(r"""[\s"'`(]--[a-z]""", file.read_text()), file


def test_scores_by_number_or_path_in_json(plain, tmp_path):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({str(row): row / 10 for row in range(9, -1, -1)}))
    assert exchange.read(file, plain).scores.tolist() == [row / 10 for row in range(10)]
    file.write_text(json.dumps({name: row / 10 for row, name in enumerate(NAMES)}))
    assert exchange.read(file, plain).scores.tolist() == [row / 10 for row in range(10)]
    file.write_text(json.dumps({"0": 0.3, "10": 0.1}))
    with pytest.raises(Refused, match="no image 10"):
        exchange.read(file, plain)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("index,score\n0,0.3\n\n1,\n2,0.1\n", "line 4 has a blank"),
        ("index\tscore\n0\t0.3\n1\thigh\n2\t0.1\n", "line 3 has high"),
        ("index,weight\n0,0\n1,0\n", "from 0 to 0"),
        ("index,weight\n0,1\n1,inf\n", "from 1 to inf"),
        ("index,weight,kept\n0,1,0\n1,1,0\n", "no image is left"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_cell_that_cannot_be_is_named(text, says, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(Refused, match=says):
        exchange.read(tmp_path / "t.csv", Images(3, "d", np.zeros(3, int)))


def test_a_broken_npz_may_be_scores_or_a_ticket(plain, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(Refused, match=r"list of row numbers.*draw it again"):
        exchange.read(tmp_path / "x.npz", plain)


# -- compare, show


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
def test_spearman_is_scipys(pairs):
    a, b = np.array(pairs).T.astype(float)
    mine = exchange.spearman(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert mine is None
    else:
        assert mine == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_what_tickets_share(plain):
    a, b, c = subset_of(plain, [0, 1, 2]), subset_of(plain, [2, 3]), subset_of(plain, [2], scores=None)
    told = exchange.compare([a, b, c])
    first, second, _ = told["pairs"]
    assert (first["both"], first["jaccard"], first["spearman"]) == (1, 0.25, 1.0)
    assert second["spearman"] is None
    assert (told["kept_by_all"], told["kept_by_any"]) == (1, 4)
    assert [row["kept"] for row in told["classes"]] == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    json.dumps(told)
    other = Subset([1], 10, fingerprint="another")
    with pytest.raises(Refused, match="data another"):
        exchange.compare([a, other])
    assert exchange.compare([a, other], force=True)["pairs"][0]["both"] == 1
    with pytest.raises(Refused, match="share no rows"):
        exchange.compare([a, Subset([1], 11, fingerprint="data")], force=True)


def test_jaccard_by_chance_is_that_of_random_tickets():
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(200):
        one, other = (Subset(rng.permutation(200)[:k], 200, fingerprint="d") for k in (60, 100))
        pair = exchange.compare([one, other])["pairs"][0]
        draws.append(pair["jaccard"])
    assert np.mean(draws) == pytest.approx(pair["by_chance"], abs=0.01)


def test_what_a_ticket_holds(plain):
    scores = np.append(np.arange(9.0), np.inf)
    told = exchange.describe(subset_of(plain, [7, 8, 9], scores=scores))
    assert (told["kept"], told["of"], told["fingerprint"]) == (3, 10, "data")
    assert told["scores"]["kept"] == {"low": 7, "q25": 7.25, "median": 7.5, "q75": 7.75, "high": 8, "unbounded": 1}
    assert told["scores"]["dropped"]["median"] == 3
    assert [row["kept"] for row in told["classes"]] == [1, 1, 1]
    assert exchange.describe(Subset([1], 3, fingerprint="d"))["scores"] is None
    json.dumps(told)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.npz", b"PK\x03\x04 and no more", r"a \.npz or PyTorch file, cut short"),
        ("x.pt", b"\x80\x02}q\x00", "a pickle or PyTorch file, cut short"),
        ("x.npy", b"\x93NUMPY\x01", r"a \.npy, cut short"),
        ("x.txt", b"", "an empty file"),
        ("x.bin", b"", "an empty file"),
        ("x.txt", b"1 2 3\n4 5 6\n", "text, and .* several numbers each"),
        ("x.dat", b"a  b  c\n", "text, and"),
    ],
)
def test_odd_files_are_called_what_they_are(plain, name, content, match, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=rf"{re.escape(name)}: {match}.*Wanted is a list"):
        exchange.read(tmp_path / name, plain)
