"""Embeddings and scores of others as signals: the same draw whichever file they come in, and files that do not fit."""

import struct
import zipfile

import numpy as np
import pytest

from selection import incoming
from selection.errors import Refused
from selection.lottery import select
from selection.signals import Signals

N, D = 60, 5


@pytest.fixture(scope="module")
def known():
    rng = np.random.default_rng(0)
    return {
        "embeddings": rng.normal(size=(N, D)).astype(np.float32),
        "labels": np.arange(N) % 3,
        "score": rng.random(N),
        "path": np.array([f"c{n % 3}/{n:02d}.png" for n in range(N)]),
    }


def rows(given, **more):
    how = {"score": "random", "pick": "facility_location", "keep": 0.2, "seed": 3} | more
    return select(given if isinstance(given, Signals) else given.signals, **how).subset.rows.tolist()


def of_ours(known, **more):
    return Signals(
        {"embeddings": known["embeddings"], "labels": known["labels"], "given": known["score"]}, fingerprint="x"
    )


def test_the_same_draw_from_an_npy_and_from_an_npz(known, tmp_path):
    np.save(tmp_path / "e.npy", known["embeddings"])
    np.save(tmp_path / "l.npy", known["labels"])
    (tmp_path / "l.txt").write_text("".join(f"{label}\n" for label in known["labels"]))
    (tmp_path / "l.csv").write_text("label\n" + "".join(f"name {label}\n" for label in known["labels"]))
    np.savez(tmp_path / "e.npz", features=known["embeddings"], targets=known["labels"], paths=known["path"])
    expected = rows(of_ours(known))
    for name in ("l.npy", "l.txt", "l.csv"):
        assert rows(incoming.read(tmp_path / "e.npy", labels=tmp_path / name)) == expected
    found = incoming.read(tmp_path / "e.npz")
    assert rows(found) == expected
    assert found.names == tuple(known["path"])
    assert incoming.read(tmp_path / "e.npy", labels=tmp_path / "l.csv").signals.classes == (
        "name 0",
        "name 1",
        "name 2",
    )


def test_without_labels_all_are_drawn_from_together(known, tmp_path):
    np.save(tmp_path / "e.npy", known["embeddings"])
    found = incoming.read(tmp_path / "e.npy")
    assert found.signals.unlabeled
    assert rows(found) == rows(of_ours(known), balance=False)
    assert "labels" not in found.signals.known
    with pytest.raises(Refused, match=r"select\.score: 'moderate' .*labels"):
        rows(found, score="moderate", pick="top_k")
    drawn = select(found.signals, score="random", pick="random", keep=0.2).subset
    assert drawn.labels is None
    found.signals.save(tmp_path / "s.npz")
    assert Signals.load(tmp_path / "s.npz").unlabeled
    assert incoming.read(tmp_path / "s.npz").signals.unlabeled


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_a_table_of_paths_and_scores(known, tmp_path, ending):
    file = tmp_path / f"t{ending}"
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="of the extra hub")
        from pyarrow import parquet

        columns = {"path": known["path"], "score": known["score"], "embedding": known["embeddings"].tolist()}
        parquet.write_table(pyarrow.table(columns), file)
    else:
        between = "," if ending == ".csv" else "\t"
        lines = [f"{path}{between}{value:.17g}" for path, value in zip(known["path"], known["score"], strict=True)]
        file.write_text("\n".join([f"path{between}score", *lines]))
    found = incoming.read(file)
    best = np.sort(np.argsort(-known["score"])[: N // 5])
    assert rows(found, score="given", pick="top_k") == best.tolist()
    assert found.names == tuple(known["path"])
    if ending == ".parquet":
        assert rows(found) == rows(of_ours(known), balance=False)


@pytest.mark.parametrize("factor", [1e9, 1e-9, 3e38])
def test_a_scale_that_half_precision_does_not_hold_changes_nothing(known, tmp_path, factor):
    np.save(tmp_path / "e.npy", known["embeddings"].astype(np.float64) * 2.0 ** round(np.log2(factor)))
    for pick in ("k_center", "facility_location", "herding"):
        assert rows(incoming.read(tmp_path / "e.npy"), pick=pick) == rows(of_ours(known), pick=pick, balance=False)


def test_a_fingerprint_is_of_the_images_and_not_of_a_score(known, tmp_path):
    for name, values in (("a", known["score"]), ("b", -known["score"])):
        np.savez(tmp_path / f"{name}.npz", path=known["path"], score=values)
    np.savez(tmp_path / "c.npz", path=known["path"][::-1], score=known["score"])
    a, b, c = (incoming.read(tmp_path / f"{name}.npz").signals.fingerprint for name in "abc")
    assert a == b != c


def _claiming(shape: tuple[int, ...]) -> bytes:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + b"\0" * 64


BAD = {
    "claims.npy": (lambda path: path.write_bytes(_claiming((10**10, 512))), "claims 20480000000000 bytes"),
    "objects.npy": (lambda path: np.save(path, np.array([{}, 1], object)), "Object arrays.*np.save"),
    "cube.npy": (lambda path: np.save(path, np.zeros((2, 3, 4))), "embeddings are images x dimensions"),
    "empty.npy": (lambda path: np.save(path, np.zeros((0, 4))), "holds no image"),
    "texts.npy": (lambda path: np.save(path, np.array([["a", "b"]])), "embeddings are texts"),
    "nan.npy": (lambda path: np.save(path, np.where(np.eye(4) > 0, np.nan, 1)), "nan at row 0, dimension 0"),
    "score.npy": (lambda path: np.save(path, np.array([1.0, np.nan])), "the score nan at 1"),
    "pickled.npz": (lambda path: path.write_bytes(b"\x80\x04N."), "no .npz at all"),
    "zip.npz": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "hello"), "a.txt, and neither"),
    "objects.npz": (lambda path: np.savez(path, embeddings=np.array([{}, 1], object)), "Object arrays"),
    "other.npz": (lambda path: np.savez(path, x_train=np.zeros(3)), "holds x_train, and neither embeddings nor scores"),
    "two.npz": (lambda path: np.savez(path, emb=np.zeros((3, 2)), features=np.zeros((3, 2))), "could both be"),
    "uneven.npz": (lambda path: np.savez(path, emb=np.zeros((3, 2)), score=np.zeros(4)), "embeddings 3, given 4"),
    "labels.npz": (lambda path: np.savez(path, emb=np.zeros((3, 2)), labels=np.zeros(4)), "of shape .4,., and there are 3"),
    "below.npz": (lambda path: np.savez(path, emb=np.zeros((3, 2)), labels=[0, -1, 2]), "label -1 of image 1"),
    "half.npz": (lambda path: np.savez(path, emb=np.zeros((3, 2)), labels=[0, 0.5, 2]), "whole numbers from 0"),
    "twice.npz": (lambda path: np.savez(path, score=np.zeros(2), path=["a", "a"]), "a stands there 2 times"),
    "blank.csv": (lambda path: path.write_text("path,score\na,1\nb,\n"), "line 3 has a blank"),
    "none.csv": (lambda path: path.write_text("path,size\na,1\n"), "neither embeddings nor scores"),
    "cut.csv": (lambda path: path.write_text("path,score\na,1\nb"), "line 3 has 1 columns"),
    "mine.pkl": (lambda path: path.write_bytes(b"\x80\x04N."), "Wanted is signals of LOTUS"),
    "no.parquet": (lambda path: path.write_bytes(b"PAR1"), "cannot be read|pyarrow"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_with_the_cure(name, tmp_path):
    make, says = BAD[name]
    make(tmp_path / name)
    with pytest.raises(Refused, match=says) as refused:
        incoming.read(tmp_path / name)
    assert str(refused.value).startswith(str(tmp_path / name))


def test_labels_that_do_not_fit(known, tmp_path):
    np.save(tmp_path / "e.npy", known["embeddings"])
    np.save(tmp_path / "o.npy", np.array([{}] * N, object))
    (tmp_path / "l.pt").write_bytes(b"")
    for name, says in (
        ("o.npy", "labels .*o.npy.*Object arrays"),
        ("no.npy", "No such file.*Give a label"),
        ("l.pt", "is wanted"),
        ("e.npy", "holds embeddings|shape"),
    ):
        with pytest.raises(Refused, match=says):
            incoming.read(tmp_path / "e.npy", labels=tmp_path / name)
    of_ours(known).save(tmp_path / "s.npz")
    with pytest.raises(Refused, match="have their labels"):
        incoming.read(tmp_path / "s.npz", labels=tmp_path / "o.npy")
