"""A limit on memory: read, kept, and refused with the figure that would do."""

import re
import tracemalloc

import numpy as np
import pytest
from few import few

from selection import facility, memory, methods, neighbors, pickers, scores
from selection.errors import Refused
from selection.lottery import Places, Request, draw, scored, select
from selection.signals import Signals
from selection.submodular import dense

SHELF = methods.names(pickers)


def found(pattern: str, text: str) -> str:
    """What the first group of ``pattern`` is in ``text``."""
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


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

    def building(kernel):
        built.append(len(kernel))
        return dense(kernel)

    monkeypatch.setattr(facility, "dense", building)
    for limit, matrices in (
        (0.08, [1500]),
        (0.0605, []),
    ):  # copies and blocks take 0.056, the similarities of all 0.009
        built.clear()
        drawn = select(signals, score="el2n", pick=pick, keep=0.1, balance=False, max_memory=limit)
        assert (built, len(drawn.subset)) == (matrices, 150)


@pytest.mark.parametrize("limit", few([0.0005, 0.01, 0.05, 0.0597], [0.01, 0.0597]))
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize(
    "pick",
    [
        "herding", "craig", "grad_match", {"name": "grad_match", "by": "batch"}, "facility_location", "top_k",
        *({"name": "facility_location", "maximizer": way} for way in ("lazy", "sparse", "stochastic")),
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
        named = float(found(r"set select\.max_memory=([0-9.e-]+)\.$", str(refusal)))
        assert named > limit
        assert len(select(uneven, score="el2n", pick=pick, keep=0.3, balance=balance, max_memory=named).subset) == 450
    else:
        assert limit > 0.0005 or pick == "top_k"


def test_a_limit_of_the_method_itself_is_more_particular(signals):
    pick = {"name": "facility_location", "maximizer": "lazy", "max_memory": 1.0}
    assert select(signals, score="el2n", pick=pick, keep=0.1, balance=False, max_memory=0.06).subset.rows.size == 150


# zcore: so many points at once that they are looked at in parts, and few in all.
SCORES = [
    {"name": "zcore", "draws": 1000, "subspaces": 1} if name == "zcore" else name for name in methods.names(scores)
]


@pytest.fixture(scope="module")
def many(make_arrays):
    """So many numbers an image that what is built of them cannot hide in the few bytes an image that are always allowed."""
    arrays = make_arrays(images=2000, classes=100, seeds=2, epochs=12)
    arrays["embeddings"] = np.random.default_rng(0).normal(size=(2000, 200))
    del arrays["p_label"], arrays["correct"]  # as our own proxy has it: they follow from others
    return Signals(arrays, fingerprint="made up")


def refusal_of(signals, score, limit):
    with pytest.raises(Refused) as told:
        scored(signals, score=score, max_memory=limit)
    return str(told.value)


@pytest.mark.parametrize("score", SCORES)
def test_a_score_keeps_to_the_figure_that_its_refusal_names(many, score, monkeypatch):
    """Though blocks are small, so that what is not done in blocks shows."""
    monkeypatch.setattr(neighbors, "BLOCK", 2**16)
    monkeypatch.setattr(memory, "BLOCKS", 2e-3)
    told = refusal_of(many, score, 1e-9)
    name = score if isinstance(score, str) else score["name"]
    assert told.startswith(f"select.score ({name}), for 2000 images at once: ")
    named = float(found(r"set select\.max_memory=([0-9.e-]+)\.$", told))
    free = scored(many, score=score)
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(scored(many, score=score, max_memory=named), free)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= named * 1e9


@pytest.mark.parametrize("score", SCORES)
def test_parts_change_no_score(many, score, monkeypatch):
    whole = scored(many, score=score)
    monkeypatch.setattr(neighbors, "BLOCK", 2**15)
    np.testing.assert_allclose(scored(many, score=score), whole, rtol=1e-9, atol=1e-12)


def test_many_neighbors_are_counted(many):
    told = (refusal_of(many, {"name": "cal", "neighbors": k}, 1e-9) for k in (10, 1000))
    few, more = (float(found(r"once: ([0-9.]+) GB", text)) for text in told)
    assert more == pytest.approx(few + 8 * 2000 * 990 / 1e9, abs=1e-3)


def test_a_score_and_its_picker_are_refused_with_one_figure_that_does(many):
    """The score takes less than the picker here, and is what is refused first."""
    with pytest.raises(Refused, match=r"^select\.score \(el2n\)") as told:
        select(many, score="el2n", pick="d2", keep=0.1, balance=False, max_memory=1e-4)
    named = float(found(r"set select\.max_memory=([0-9.e-]+)\.$", str(told.value)))
    assert len(select(many, score="el2n", pick="d2", keep=0.1, balance=False, max_memory=named).subset) == 200


def test_a_score_that_no_picker_reads_is_left_out_rather_than_refused(many):
    limit = 0.02  # zcore takes more
    refusal_of(many, "zcore", limit)
    drawn = select(many, score="zcore", pick="random", keep=0.1, max_memory=limit)
    assert drawn.scores is None
    assert len(drawn.subset) == 200


def test_the_limit_is_called_as_the_user_calls_it(many):
    places = Places(score="--score", pick="--pick", max_memory="--max-memory")
    with pytest.raises(Refused) as refusal:
        draw(many, Request(score="ssp", pick="top_k", keep=0.1, balance=False, max_memory=1e-9), places=places)
    told = str(refusal.value)
    assert told.startswith("--score (ssp), for 2000 images at once: ")
    assert " and --max-memory is 1e-09 GB." in told
    for limit in (0.001, None):  # None: the picker's own, of 0.5 GB, is what binds
        few = (
            many
            if limit
            else Signals({"labels": np.zeros(12000, int), "embeddings": np.eye(12000, 2)}, fingerprint="x")
        )
        pick = {"name": "facility_location", "maximizer": "lazy"}
        with pytest.raises(Refused, match=r"or set --max-memory=[0-9.e-]+\.$"):
            draw(few, Request(score="random", pick=pick, keep=0.1, balance=False, max_memory=limit), places=places)
