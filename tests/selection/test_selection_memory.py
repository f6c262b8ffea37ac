"""A limit on memory: read, kept, and refused with the figure that would do."""

import re
import tracemalloc

import numpy as np
import pytest

from selection import memory, methods, pickers
from selection.errors import Refused
from selection.lottery import select
from selection.signals import Signals
from selection.submodular import dense

SHELF = methods.names(pickers)


@pytest.mark.parametrize(
    ("said", "gigabytes"),
    [
        ("4GB", 4),
        ("4", 4),
        (4, 4),
        (0.5, 0.5),
        ("500 MB", 0.5),
        ("1GiB", 1.073741824),
        ("2g", 2),
        ("64KB", 6.4e-5),
        ("1kib", 1.024e-6),
    ],
)
def test_amounts(said, gigabytes):
    assert memory.gigabytes(said) == pytest.approx(gigabytes)


@pytest.mark.parametrize("said", ["", "much", "4 cows", "-1GB", "0", True, None, "1.2.3", "nan", "inf"])
def test_no_amounts(said):
    with pytest.raises(Refused, match="no amount of memory"):
        memory.gigabytes(said)


@pytest.fixture(scope="module")
def signals():
    rng = np.random.default_rng(0)
    n, width, classes = 1500, 64, 5
    errors = rng.dirichlet(np.ones(classes), n).astype(np.float32)
    labels = np.arange(n) % classes
    errors[np.arange(n), labels] -= 1
    return Signals(
        {
            "labels": labels,
            "error_norm": rng.random((1, 3, n)),
            "p_label": rng.random((1, 3, n)),
            "embeddings": rng.normal(size=(n, width)),
            "errors": errors,
        },
        fingerprint="made up",
    )


@pytest.mark.parametrize("pick", SHELF)
@pytest.mark.parametrize(("balance", "limit"), [(True, 0.006), (False, 0.08)])
def test_the_limit_is_kept(signals, pick, balance, limit):
    if "quotas" in methods.reads(getattr(pickers, pick)):  # it looks at all classes at once
        limit = 0.08
    select(signals, score="el2n", pick=pick, keep=0.1, balance=balance)  # what is imported late is no part of it
    tracemalloc.start()
    try:
        select(signals, score="el2n", pick=pick, keep=0.1, balance=balance, max_memory=limit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= limit * 1e9


@pytest.mark.parametrize("pick", ["facility_location", "craig"])
def test_it_goes_sparse_rather_than_beyond(signals, pick, monkeypatch):
    built = []
    monkeypatch.setattr(pickers, "dense", lambda kernel: built.append(len(kernel)) or dense(kernel))
    for limit, matrices in (
        (0.08, [1500]),
        (0.0605, []),
    ):  # copies and blocks take 0.056, the similarities of all 0.009
        built.clear()
        drawn = select(signals, score="el2n", pick=pick, keep=0.1, balance=False, max_memory=limit)
        assert (built, len(drawn.subset)) == (matrices, 150)


@pytest.mark.parametrize("limit", [0.0005, 0.01, 0.05, 0.0597])
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize(
    "pick",
    [
        "herding", "craig", "grad_match", {"name": "grad_match", "by": "batch"}, "facility_location", "top_k",
        *({"name": "facility_location", "maximiser": way} for way in ("lazy", "sparse", "stochastic")),
    ],
)  # fmt: skip
def test_the_figure_that_is_named_is_enough(signals, pick, balance, limit):
    """At once: copies and matrices together, of the class that needs most."""
    uneven = Signals(
        {name: np.asarray(signals[name]) for name in signals} | {"labels": np.minimum(np.arange(1500) // 100, 4)},
        fingerprint="x",
    )
    try:
        select(uneven, score="el2n", pick=pick, keep=0.3, balance=balance, max_memory=limit)
    except Refused as refusal:
        named = float(re.search(r"set max_memory=([0-9.e-]+)\.$", str(refusal))[1])
        assert named > limit
        assert len(select(uneven, score="el2n", pick=pick, keep=0.3, balance=balance, max_memory=named).subset) == 450
    else:
        assert limit > 0.0005 or pick == "top_k"


def test_a_limit_of_the_method_itself_is_more_particular(signals):
    pick = {"name": "facility_location", "maximiser": "lazy", "max_memory": 1.0}
    assert select(signals, score="el2n", pick=pick, keep=0.1, balance=False, max_memory=0.06).subset.rows.size == 150
