"""Data sets of the library ``datasets`` in and out. Run where it is installed: it is of the extra hub."""

import numpy as np
import pytest

from selection import hub
from selection.errors import Refused
from selection.lottery import select
from selection.signals import Signals

datasets = pytest.importorskip("datasets", reason="of the extra hub")
N = 40


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {"emb": rng.normal(size=(N, 4)).astype(np.float32), "label": np.arange(N) % 2, "value": rng.random(N)}


@pytest.fixture(scope="module")
def dataset(arrays):
    kinds = datasets.Features({
        "emb": datasets.Sequence(datasets.Value("float32")), "label": datasets.ClassLabel(names=["cat", "dog"]),
        "value": datasets.Value("float64"), "file": datasets.Value("string"), "odd": datasets.Value("int64"),
    })  # fmt: skip
    rows = {name: array.tolist() for name, array in arrays.items()}
    names = [f"{n}.png" for n in range(N)]
    return datasets.Dataset.from_dict({**rows, "file": names, "odd": list(range(N))}, features=kinds)


def test_columns_are_what_arrays_are(arrays, dataset):
    found = hub.signals(dataset, embeddings="emb", label="label", path="file")
    own = Signals({"embeddings": arrays["emb"], "labels": arrays["label"]}, fingerprint="x")
    rows = [select(one, score="random", pick="facility_location", keep=0.2).subset.rows for one in (found.signals, own)]
    assert np.array_equal(*rows)
    assert found.signals.classes == ("cat", "dog")
    assert found.names is not None
    assert found.names[3] == "3.png"
    best = select(hub.signals(dataset, score="value").signals, score="given", pick="top_k", keep=0.1).subset
    assert best.rows.tolist() == sorted(np.argsort(-arrays["value"])[:4].tolist())


def test_a_ticket_applied_and_back(arrays, dataset, tmp_path):
    signals = hub.signals(dataset, embeddings="emb", label="label").signals
    drawn = select(signals, score="random", pick="random", keep=0.25, seed=2).subset
    part = hub.apply(drawn, dataset)
    assert part["odd"][:] == drawn.rows.tolist()
    assert part[hub.WEIGHT][:] == [1.0] * 10
    part.shuffle(seed=1).save_to_disk(tmp_path / "part")
    back = hub.ticket(datasets.load_from_disk(str(tmp_path / "part")), N, fingerprint=drawn.fingerprint)
    assert back.rows.tolist() == drawn.rows.tolist()
    back.check(drawn.fingerprint, N)
    fewer = hub.ticket(part.filter(lambda row: row["label"] == 0), N, fingerprint="x")
    assert fewer.rows.tolist() == [row for row in drawn.rows.tolist() if arrays["label"][row] == 0]
    assert hub.apply(fewer, dataset)["odd"][:] == fewer.rows.tolist()


def test_rows_that_were_held_out_count_elsewhere(dataset):
    rows = np.arange(1, N, 2)  # every other image trains
    signals = Signals({"labels": np.zeros(len(rows), np.int64)}, fingerprint="x")
    drawn = select(signals, score="random", pick="random", keep=0.5).subset
    part = hub.apply(drawn, dataset, rows)
    assert part["odd"][:] == rows[drawn.rows].tolist()
    assert hub.ticket(part, len(rows), fingerprint="x", rows=rows).rows.tolist() == drawn.rows.tolist()
    with pytest.raises(Refused, match=r"20 images.*40"):
        hub.apply(drawn, dataset)
    with pytest.raises(Refused, match="rows that the ticket's data"):
        hub.ticket(dataset.add_column(hub.INDEX, list(range(N))), len(rows), fingerprint="x", rows=rows)


def test_what_is_not_there_is_named(dataset):
    with pytest.raises(Refused, match=r"'embd'.*emb, label"):
        hub.signals(dataset, embeddings="embd")
    with pytest.raises(Refused, match="neither embeddings nor scores"):
        hub.signals(dataset, label="label")
    with pytest.raises(Refused, match="has no column 'lotus_index'"):
        hub.ticket(dataset, N, fingerprint="x")
