"""Signals hold what fits and refuse the rest; their file is whole or refused."""

import json
import math
import os
import zipfile

import numpy as np
import pytest

from selection import npz
from selection.errors import Refused
from selection.methods import call
from selection.signals import VOCABULARY, Signals
from selection.subset import Subset


@pytest.fixture
def arrays(make_arrays):
    return make_arrays(images=12, classes=3, seeds=2, epochs=4)


@pytest.fixture
def signals(arrays):
    return Signals(arrays, fingerprint="data-1", classes=["ant", "bee", "cat"])


def refused(arrays, match, **changes):
    with pytest.raises(Refused, match=match):
        Signals({**arrays, **changes}, fingerprint="f")


def put(array, where, value):
    array = np.array(array, dtype=float)
    array[where] = value
    return array


# -- what is held


def test_the_example_covers_the_vocabulary(arrays):
    assert set(arrays) == set(VOCABULARY)


def test_everything_is_there_in_its_dtype(signals, arrays):
    assert (signals.images, signals.seeds, signals.epochs, signals.n_classes) == (12, 2, 4, 3)
    assert signals.classes == ("ant", "bee", "cat")
    assert signals.fingerprint == "data-1"
    assert list(signals) == list(VOCABULARY)
    for name, array in arrays.items():
        assert signals[name].dtype == VOCABULARY[name].dtype
        tolerance = 0 if VOCABULARY[name].dtype in (np.int64, np.bool_) else 1e-3
        np.testing.assert_allclose(signals[name], array, rtol=tolerance, atol=1e-6)


def test_easy_images_do_not_tie_in_the_compact_dtypes():
    """The probabilities 1 - 1e-4 and 1 - 2e-4 are one number in half precision."""
    p = np.array([[[1 - 1e-4, 1 - 2e-4]]])
    arrays = {
        "labels": [0, 1],
        "p_label": p,
        "loss": -np.log(p),
        "error_norm": math.sqrt(2) * (1 - p),
        "p_other": 1 - p,
    }
    signals = Signals(arrays, fingerprint="f")
    for name in ("p_label", "loss", "error_norm", "p_other"):
        assert signals[name][0, 0, 0] != signals[name][0, 0, 1], name


def test_errors_have_a_column_a_class(arrays):
    with pytest.raises(Refused, match=r"signals\.errors: C = 3 .* classes has 4\.$"):
        Signals(arrays, fingerprint="f", classes=list("abcd"))
    refused(
        arrays,
        r"signals\.labels: there is a class 7, but errors has 3\.$",
        labels=put(arrays["labels"], 3, 7).astype(int),
    )


def test_labels_alone_will_do():
    signals = Signals({"labels": [0, 2, 1, 2]}, fingerprint="f")
    assert (signals.images, signals.seeds, signals.epochs, signals.n_classes) == (4, 0, 0, 3)
    assert "loss" not in signals


def test_nothing_can_be_changed_afterwards(arrays):
    labels = arrays["labels"].astype(np.int64)
    signals = Signals({"labels": labels}, fingerprint="f")
    before = labels[0]
    labels[0] = 2 - before
    assert signals["labels"][0] == before
    with pytest.raises(ValueError, match="read-only"):
        signals["labels"][0] = 1


def test_available_is_what_methods_are_called_with(signals):
    def picked(loss, labels):
        return loss, labels

    loss, labels = call(picked, signals.available(), {}, place="p")
    assert loss is signals["loss"]
    assert labels is signals["labels"]


def test_take_cuts_the_axis_of_the_images(signals):
    rows = np.array([7, 3])
    assert signals.take("loss", rows).tolist() == signals["loss"][:, :, [7, 3]].tolist()
    assert signals.take("embeddings", rows).tolist() == signals["embeddings"][[7, 3]].tolist()
    assert signals.take("labels", rows).tolist() == signals["labels"][[7, 3]].tolist()


def test_values_beyond_half_precision_are_held_at_its_end(arrays):
    signals = Signals(
        {**arrays, "loss": put(arrays["loss"], (0, 0, 0), 1e9), "margin": put(arrays["margin"], 0, -1e9)},
        fingerprint="f",
    )
    assert signals["loss"][0, 0, 0] == 65504
    assert signals["margin"][0, 0, 0] == -65504


def test_rounding_over_the_edge_is_taken_back(arrays):
    signals = Signals(
        {
            **arrays,
            "p_label": put(arrays["p_label"], (0, 0, 0), 1 + 1e-6),
            "loss": put(arrays["loss"], (1, 0, 0), -1e-7),
        },
        fingerprint="f",
    )
    assert signals["p_label"][0, 0, 0] == 1
    assert signals["loss"][1, 0, 0] == 0


# -- what is refused


def test_bad_names_and_missing_parts(arrays):
    refused(
        arrays,
        r"^signals\.losses: no such signal\. Did you mean 'loss'\? There are: labels, p_label",
        losses=arrays["loss"],
    )
    with pytest.raises(Refused, match="labels are missing"):
        Signals({"loss": arrays["loss"]}, fingerprint="f")
    for nothing in ("", None):
        with pytest.raises(Refused, match="fingerprint"):
            Signals(arrays, fingerprint=nothing)
    for bad in ("ant", [1, 2, 3], 7):
        with pytest.raises(Refused, match="list of names"):
            Signals(arrays, fingerprint="f", classes=bad)
    with pytest.raises(Refused, match=r"^signals\.los: .*'loss'\?"):
        Signals(arrays, fingerprint="f")["los"]


@pytest.mark.parametrize("name", [name for name in VOCABULARY if name != "labels"])
def test_every_shape_is_held_to_the_others(arrays, name):
    dims = VOCABULARY[name].dims
    refused(
        arrays,
        rf"signals\.{name}: expected the shape \({', '.join(dims)}\), not \(12, 4, 2, 1\)",
        **{name: np.ones((12, 4, 2, 1))},
    )
    short = np.take(arrays[name], range(11), axis=dims.index("N"))
    refused(arrays, rf"signals\.{name}: N = 11 \(rows\), but labels has 12", **{name: short})
    refused(arrays, rf"signals\.{name}: there is no row in", **{name: np.take(arrays[name], [], axis=dims.index("N"))})
    for axis, letter in enumerate(dims):
        if letter in "SE" and name != "p_label":
            refused(
                arrays,
                rf"signals\.{name}: {letter} = 1 .* but p_label has",
                **{name: np.take(arrays[name], [0], axis=axis)},
            )


@pytest.mark.parametrize(
    "name", [name for name, signal in VOCABULARY.items() if signal.dtype in (np.float16, np.float32)]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_its_place(arrays, name, value):
    at = {"S": 1, "E": 2, "N": 9, "D": 2, "C": 2, "K": 3}
    called = {"S": "seed", "E": "epoch", "N": "row", "D": "dimension", "C": "class column", "K": "run"}
    where = tuple(at[letter] for letter in VOCABULARY[name].dims)
    words = ", ".join(f"{called[letter]} {at[letter]}" for letter in VOCABULARY[name].dims)
    refused(arrays, rf"signals\.{name}: not finite at {words}\.$", **{name: put(arrays[name], where, value)})


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("p_label", 1.01, r"p_label: 1.01 is above 1 at seed 1, epoch 2, row 9"),
        ("p_label", -0.01, r"p_label: -0.01 is below 0 at seed 1, epoch 2, row 9"),
        ("p_other", 1.01, "above 1"),
        ("error_norm", 1.5, "above 1.41421"),
        ("error_norm", -0.1, "below 0"),
        ("loss", -0.1, "below 0"),
        ("entropy", -0.1, "below 0"),
        ("entropy", 1.2, "above 1.09861"),
    ],
)
def test_out_of_range(arrays, name, value, match):
    with pytest.raises(Refused, match=match):
        Signals(
            {**arrays, name: put(arrays[name], (1, 2, 9), value)},
            fingerprint="f",
            classes=list("abc"),
        )


def test_bad_labels(arrays):
    refused(arrays, r"labels: -1 is below 0 at row 9", labels=put(arrays["labels"], 9, -1).astype(int))
    for huge in (2**31, 2**40, 2**63 + 5):
        labels = arrays["labels"].astype(np.uint64)
        labels[9] = huge
        refused(arrays, r"labels: \d+ is above 2147483647 at row 9", labels=labels)
    refused(arrays, r"labels: expected int64, not float64", labels=arrays["labels"].astype(float))
    refused(arrays, r"labels: expected int64, not bool", labels=arrays["labels"] > 0)
    refused(arrays, r"labels: there is no row", labels=np.array([], dtype=int))
    with pytest.raises(Refused, match=r"labels: 2 is above 1 at row"):
        Signals({"labels": [0, 1, 2]}, fingerprint="f", classes=["ant", "bee"])


def test_bad_dtypes(arrays):
    refused(arrays, r"correct: expected bool, not int64", correct=arrays["correct"].astype(int))
    refused(arrays, r"loss: expected float16, not complex128", loss=arrays["loss"].astype(complex))
    refused(arrays, r"loss: expected float16, not object", loss=arrays["loss"].astype(object))
    refused(arrays, r"loss: expected float16, not bool", loss=arrays["loss"] > 0)


# -- the file


def test_what_is_saved_is_what_is_loaded(signals, tmp_path):
    path = tmp_path / "new" / "signals.npz"
    signals.save(path)
    back = Signals.load(path)
    assert list(back) == list(signals)
    for name in signals:
        assert back[name].dtype == signals[name].dtype
        assert np.array_equal(back[name], signals[name]), name
    assert (back.fingerprint, back.classes) == (signals.fingerprint, signals.classes)
    assert [file.name for file in path.parent.iterdir()] == ["signals.npz"]


def test_only_what_is_asked_for_is_read(signals, tmp_path):
    signals.save(tmp_path / "s.npz")
    some = Signals.load(tmp_path / "s.npz", only={"loss", "never_recorded"})
    assert set(some) == {"labels", "loss"}
    assert np.array_equal(some["loss"], signals["loss"])
    assert (some.fingerprint, some.classes) == (signals.fingerprint, signals.classes)


def test_what_follows_is_found_without_being_recorded(arrays, tmp_path):
    few = {name: arrays[name] for name in ("labels", "loss", "margin")}
    few["loss"] = np.abs(few["loss"]).astype(np.float16)
    signals = Signals(few, fingerprint="f")
    assert list(signals) == ["labels", "loss", "margin"]
    assert set(signals.available()) == {"labels", "loss", "margin", "p_label", "correct"}
    np.testing.assert_allclose(signals["p_label"], np.exp(-few["loss"].astype(np.float64)), rtol=1e-6)
    assert np.array_equal(signals["correct"], few["margin"] > 0)
    rows = np.array([3, 0])
    assert np.array_equal(signals.available(rows)["correct"], few["margin"][:, :, rows] > 0)
    signals.save(tmp_path / "s.npz")
    assert set(Signals.load(tmp_path / "s.npz", only={"p_label"})) == {"labels", "loss"}
    with pytest.raises(Refused, match="p_other: not recorded"):
        signals["p_other"]
    # What was recorded is not overridden by what would follow.
    told = {**few, "p_label": np.full_like(arrays["p_label"], 0.25)}
    assert (Signals(told, fingerprint="f")["p_label"] == 0.25).all()


def test_what_cannot_change_is_not_copied(arrays):
    errors = arrays["errors"].astype(np.float16)
    errors.setflags(write=False)
    assert Signals({**arrays, "errors": errors}, fingerprint="f")["errors"] is errors
    writable = arrays["errors"].astype(np.float16)
    assert not np.shares_memory(Signals({**arrays, "errors": writable}, fingerprint="f")["errors"], writable)


def test_the_extremes_survive_the_file(tmp_path):
    """log(3) and sqrt(2) round upwards or downwards in half precision; neither may make our own file refused."""
    for classes in (2, 3, 10, 1000):
        arrays = {
            "labels": [0, 1],
            "entropy": np.full((1, 1, 2), math.log(classes)),
            "error_norm": np.full((1, 1, 2), math.sqrt(2)),
        }
        Signals(arrays, fingerprint="f", classes=[str(c) for c in range(classes)]).save(tmp_path / "s.npz")
        assert Signals.load(tmp_path / "s.npz")["entropy"][0, 0, 0] == np.float16(math.log(classes))


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(signals, tmp_path, part):
    path = tmp_path / "signals.npz"
    signals.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(Refused, match=r"signals\.npz: damaged.*score stage again"):
        Signals.load(path)


def test_a_flipped_bit_is_refused(signals, tmp_path):
    path = tmp_path / "signals.npz"
    signals.save(path)
    whole = bytearray(path.read_bytes())
    at = whole.find(signals["loss"].tobytes())
    assert at > 0
    whole[at + 5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(Refused, match="damaged"):
        Signals.load(path)


def test_foreign_files_are_refused(signals, tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(Refused, match=r"x\.npz: cannot be read \(No such file"):
        Signals.load(path)
    with pytest.raises(Refused, match="cannot be read"):
        Signals.load(tmp_path)
    path.write_text("rows: 1, 2, 3")
    with pytest.raises(Refused, match=r"no \.npz at all"):
        Signals.load(path)
    np.savez(path, labels=np.arange(3))
    with pytest.raises(Refused, match=r"not signals .*\(labels\).*score stage"):
        Signals.load(path)
    np.savez(path, labels=np.arange(3), about=np.array("[]"))
    with pytest.raises(Refused, match=r"a foreign \.npz \(labels, about\)"):
        Signals.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels", b"no array")
        archive.writestr("about", b"no array")
    with pytest.raises(Refused, match="'labels' is no array"):
        Signals.load(path)
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(Refused, match=r"no \.npz at all"):
        Signals.load(path)
    Subset.whole(3, fingerprint="f").save(path)
    with pytest.raises(Refused, match=r"not signals .*a ticket of LOTUS") as refusal:
        Signals.load(path)
    assert "Remove" not in str(refusal.value), "it is the user's own file"


def test_a_pickle_inside_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "went off"), "w"))

    path = tmp_path / "x.npz"
    np.savez(path, labels=np.array([Bomb()], dtype=object), about=np.array("{}"))
    with pytest.raises(Refused, match="damaged"):
        Signals.load(path)
    assert not (tmp_path / "went off").exists()


def test_a_later_format_and_bad_contents_are_refused(signals, tmp_path):
    path = tmp_path / "s.npz"
    about = {"fingerprint": "f", "classes": []}
    npz.write(path, {"labels": np.arange(3)}, about, kind="signals of LOTUS", version=2)
    with pytest.raises(Refused, match=r"format 2.*format 1"):
        Signals.load(path)
    npz.write(path, {"labels": -np.arange(3)}, about, kind="signals of LOTUS", version=1)
    with pytest.raises(Refused, match=r"s\.npz\.labels: -2 .*score stage again"):
        Signals.load(path)
    npz.write(path, {"labels": np.arange(3)}, {"fingerprint": 7}, kind="signals of LOTUS", version=1)
    with pytest.raises(Refused, match="fingerprint"):
        Signals.load(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(signals, tmp_path, monkeypatch):
    path = tmp_path / "signals.npz"
    signals.save(path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(Refused, match=r"signals\.npz: .*\(No space left on device\)"):
        signals.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["signals.npz"]


def test_the_new_file_takes_its_name_only_when_it_is_whole(signals, tmp_path, monkeypatch):
    path = tmp_path / "signals.npz"
    path.write_text("old")

    def killed(beside, final):
        assert beside.parent.parent == final.parent
        with np.load(beside) as file:
            assert np.array_equal(file["embeddings"], signals["embeddings"])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        signals.save(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["signals.npz"]


def test_the_header_is_plain_json(signals, tmp_path):
    signals.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert json.loads(str(file["about"])) == {
            "kind": "signals of LOTUS",
            "format": 1,
            "fingerprint": "data-1",
            "classes": ["ant", "bee", "cat"],
        }
