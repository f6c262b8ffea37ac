"""Greedy choices against their definition, where shortcuts matter: groups smaller than the set, near lists, a random few; and gradients."""

import math
from typing import Any

import numpy as np
import pytest
from test_selection_pickers import drawn, made_up, pick, unit

from selection import neighbors, scores
from selection.gradients import Gradients
from selection.neighbors import Cosine, NearGradients, nearest
from selection.submodular import FacilityLocation, FarthestFirst, GraphCut, LogDet, dense, in_rounds, lazy, stochastic


def similarities(x):
    return (1 + unit(x) @ unit(x).T) / 2


# -- a random few


class Counted(FacilityLocation):
    """Facility location that keeps account of what it was asked."""

    def __init__(self, kernel):
        super().__init__(kernel, dense(kernel))
        self.asked, self.inside, self.values = [], [], [self.value]

    def gains(self, rows=None):
        if rows is not None:
            self.asked.append(set(rows.tolist()))
            assert not self.asked[-1] & set(self.inside)
        return super().gains(rows)

    def add(self, row):
        said = float(super().gains(np.array([row]))[0])
        super().add(row)
        self.inside.append(row)
        self.values.append(self.value)
        assert self.values[-1] - self.values[-2] == pytest.approx(said, abs=1e-3)


@pytest.mark.parametrize(("budget", "epsilon"), [(30, 0.05), (60, 0.3)])
def test_stochastic_greedy_is_nearly_greedy_and_looks_at_few(budget, epsilon):
    n = 300
    kernel = Cosine(np.random.default_rng(0).normal(size=(n, 8)))

    def worth(rows):
        return kernel.block(np.arange(n), np.array(rows)).max(1).sum()

    exact = worth(lazy(FacilityLocation(kernel, dense(kernel)), budget, order=np.arange(n)))
    looks = math.ceil(n / budget * math.log(1 / epsilon))
    found, by_chance = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        function = Counted(kernel)
        rows = stochastic(function, budget, rng, epsilon=epsilon, start=[7])
        assert rows[0] == 7
        assert len(set(rows)) == budget
        assert [len(asked) for asked in function.asked] == [looks] * (budget - 1)
        found.append(worth(rows))
        by_chance.append(worth(rng.choice(n, budget, replace=False)))
    assert np.mean(found) >= (1 - epsilon) * exact
    assert np.mean(found) - np.mean(by_chance) > 0.7 * (exact - np.mean(by_chance))  # 0: it did not look


# -- in rounds


def greedy_from(gain, n, budget, chosen):
    """Rows by the definition: again and again the one that ``gain(chosen)`` (n,) gives most."""
    chosen = list(chosen)
    while len(chosen) < budget:
        gains = gain(chosen)
        gains[chosen] = -np.inf
        chosen.append(int(gains.argmax()))
    return chosen


def farthest(x):
    away = ((x[:, None] - x) ** 2).sum(2)
    return lambda rows: away[:, rows].min(1)


def cut_apart(x, balance):
    s = similarities(x)
    return lambda rows: balance * s.sum(0) - 2 * s[:, rows].sum(1) - 1


def volume(x, ridge):
    x = unit(x)
    eye = np.eye(x.shape[1])

    def gain(rows):
        inverse = np.linalg.inv(eye + x[rows].T @ x[rows] / ridge)
        return np.log1p(np.einsum("nd,de,ne->n", x, inverse, x) / ridge)

    return gain


ROUNDS: dict[str, tuple[Any, Any]] = {
    "farthest first": (farthest, lambda x: FarthestFirst(x)),
    "graph cut": (lambda x: cut_apart(x, 1.5), lambda x: GraphCut(unit(x).astype(np.float32), 1.5)),
    "log det": (lambda x: volume(x, 0.3), lambda x: LogDet(unit(x).astype(np.float32), 0.3)),
}


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize(("n", "group", "budget"), [(80, 3, 40), (80, 20, 79), (900, 128, 300)])
def test_rounds_of_any_size_are_exactly_greedy(name, n, group, budget):
    """Groups smaller than the set, so that the bar of what stands outside decides when a round ends."""
    x = np.random.default_rng(n + group).normal(size=(n, 6)).astype(np.float32)
    truth, make = ROUNDS[name]
    greedy = make(x)
    greedy.begin(np.array([5, 11]))
    rows = in_rounds(greedy, budget, [5, 11], group=group, most=2 * group)
    assert rows == greedy_from(truth(x.astype(float)), n, budget, [5, 11])


# -- values never fall


def gains_of(value, rows):
    values = [value(rows[: count + 1]) for count in range(len(rows))]
    return np.diff(values)


def near_value(x, k):
    """Facility location among the k nearest (itself one of them) by the definition."""
    s = similarities(x)
    least = np.sort(s, axis=1)[:, -k]
    above = np.maximum(s - least[:, None], 0)
    return lambda rows: above[:, rows].max(1).sum()


def gradient_value(n):
    made = made_up(n)
    g = np.einsum("nc,nd->ncd", made["errors"].astype(float), np.c_[made["embeddings"].astype(float), np.ones(n)])
    g = g.reshape(n, -1)
    away = np.linalg.norm(g[:, None] - g, axis=2)
    return lambda rows: (away.max() - away[:, rows]).max(1).sum()


def log_volume(x, ridge):
    x = unit(x)
    return lambda rows: np.linalg.slogdet(np.eye(len(rows)) + x[rows] @ x[rows].T / ridge)[1]


def cut_value(x, coverage):
    s = similarities(x)
    return lambda rows: coverage * s[:, rows].sum() - s[np.ix_(rows, rows)].sum()


def covered(x):
    s = similarities(x)
    return lambda rows: s[:, rows].max(1).sum()


X = made_up(60)["embeddings"].astype(float)
LAW = [
    ("facility_location", {"maximizer": "lazy"}, covered(X)),
    ("facility_location", {"maximizer": "sparse", "neighbors": 59}, covered(X)),
    ("facility_location", {"maximizer": "sparse", "neighbors": 9}, near_value(X, 10)),
    ("craig", {"maximizer": "lazy"}, gradient_value(60)),
    ("graph_cut", {"coverage": 2.0}, cut_value(X, 2.0)),
    ("graph_cut", {"coverage": 3.5}, cut_value(X, 3.5)),
    ("log_det", {"ridge": 0.1}, log_volume(X, 0.1)),
    ("log_det", {}, log_volume(X, 1.0)),
]


@pytest.mark.parametrize(("name", "options", "value"), LAW, ids=[f"{name} {options}" for name, options, _ in LAW])
def test_values_never_fall_and_gains_never_rise(name, options, value):
    """Submodular and greedy: what a row adds is at least nothing, and at most what the one before it added."""
    gains = gains_of(value, drawn(name, np.zeros(60), 60, **options)[0])
    assert (gains > -1e-5).all()
    assert (np.diff(gains) < 1e-5).all()
    assert gains[0] > gains[-1] + 0.01  # which says something


def test_the_values_that_maximizers_keep_are_those_of_the_definition():
    """And never fall, in whatever order rows come."""
    kernel = Cosine(X)
    function = Counted(kernel)
    rows = stochastic(function, 25, np.random.default_rng(0), start=[3])
    s = dense(kernel).astype(float)
    np.testing.assert_allclose(function.values[1:], [s[:, rows[: i + 1]].max(1).sum() for i in range(25)], rtol=1e-5)
    assert (np.diff(function.values) >= 0).all()

    greedy = LogDet(unit(X).astype(np.float32), 0.3)
    rows = in_rounds(greedy, 30, [], group=8)
    np.testing.assert_allclose(
        np.cumsum(greedy.gains), [log_volume(X, 0.3)(rows[: i + 1]) for i in range(30)], rtol=1e-4
    )
    assert min(greedy.gains) >= 0
    assert (np.diff(greedy.gains) < 1e-6).all()


# -- log_det


@pytest.mark.parametrize("first", [0, 17, 33])
def test_log_det_goes_on_as_greedy_does_and_heeds_the_ridge(first):
    """Its first pick is a tie of all, so it is given."""
    found = {}
    for ridge in (0.05, 20.0):
        found[ridge] = pick("log_det", np.zeros(60), 20, start=[first], ridge=ridge).tolist()
        assert found[ridge] == greedy_from(volume(X, ridge), 60, 20, [first])
    assert found[0.05] != found[20.0]


# -- near neighbors


def recall(kernel, index):
    n, k = index.shape
    block = kernel.block(np.arange(n))
    block[np.arange(n), np.arange(n)] = np.inf
    truth = np.argsort(-block, axis=1)[:, :k]
    return np.mean(
        [len(set(a[1:]) & set(b[1:])) / (k - 1) for a, b in zip(index.tolist(), truth.tolist(), strict=True)]
    )


def scattered(n=1500, width=32):
    return np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)


def clustered(n=1500, width=32):
    rng = np.random.default_rng(0)
    return (3 * rng.normal(size=(40, width))[np.arange(n) % 40] + rng.normal(size=(n, width))).astype(np.float32)


@pytest.mark.parametrize("make", [scattered, clustered])
@pytest.mark.parametrize("kind", ["cosine", "gradients"])
def test_near_lists_find_the_nearest(monkeypatch, make, kind):
    """Nine of ten, whether images cluster or not; where they do without looking through everything."""
    monkeypatch.setattr(neighbors, "PROBES", 3)
    x, rng = make(), np.random.default_rng(1)
    errors = rng.dirichlet(np.ones(4), len(x)) - np.eye(4)[0]
    kernel = Cosine(x) if kind == "cosine" else NearGradients(Gradients(errors, x), rng)
    compared = []

    def block(rows, columns=slice(None), plain=kernel.block):
        found = plain(rows, columns)
        compared.append(found.size)
        return found

    monkeypatch.setattr(kernel, "block", block)
    index, similar = nearest(kernel, 11, rng, exact=100)
    work = sum(compared) - neighbors.SAMPLE * len(x)
    monkeypatch.undo()
    assert recall(kernel, index) > 0.86  # 0.9, measured on a sample
    assert (index[:, 0] == np.arange(len(x))).all()
    assert (np.diff(similar, axis=1) <= 0).all()
    np.testing.assert_allclose(
        similar[:9, 1:], kernel.block(np.arange(9))[np.arange(9)[:, None], index[:9, 1:]], atol=1e-3
    )
    if make is clustered and kind == "cosine":
        assert work < 0.25 * len(x) ** 2


def test_lists_that_may_not_be_widened_say_what_they_find(monkeypatch):
    x = scattered()
    monkeypatch.setattr(neighbors, "PAIRS", 0.4 * len(x) ** 2)
    monkeypatch.setattr(neighbors, "PROBES", 3)
    with pytest.warns(UserWarning, match=r"10 neighbors of each of 1500 .*\d+% are found") as told:
        index, _ = nearest(Cosine(x), 11, np.random.default_rng(0), exact=100)
    said = int(str(told[0].message).partition("%")[0].split()[-1]) / 100
    assert said < 0.9
    assert recall(Cosine(x), index) == pytest.approx(said, abs=0.06)


def test_one_neighbor_is_oneself():
    index, similar = nearest(Cosine(scattered(300)), 1, np.random.default_rng(0), exact=100)
    assert index.ravel().tolist() == list(range(300))
    assert (similar == 1).all()


# -- gradients


@pytest.mark.parametrize(("dtype", "close"), [(np.float64, 1e-12), (np.float32, 2e-6)])
def test_gradients_are_those_that_are_written_out(dtype, close):
    """Closed forms as parts of what they could be at most: in double precision far below 1e-6, in single about that."""
    rng = np.random.default_rng(0)
    errors, features = rng.dirichlet(np.ones(7), 300) - np.eye(7)[rng.integers(0, 7, 300)], rng.normal(size=(300, 40))
    explicit = np.einsum("nc,nd->ncd", errors, np.c_[features, np.ones(300)]).reshape(300, -1)
    norms = np.linalg.norm(explicit, axis=1)
    closed = Gradients(errors, features, dtype=dtype)
    np.testing.assert_allclose(closed.norms, norms, rtol=close)
    np.testing.assert_allclose(closed.squares, norms**2, rtol=close)
    scale = np.outer(norms, norms)
    rows = np.array([3, 50, 299])
    assert np.abs((closed.inner(rows) - explicit[rows] @ explicit.T) / scale[rows]).max() < close
    away = ((explicit[rows][:, None] - explicit) ** 2).sum(2)
    largest = norms[rows][:, None] ** 2 + norms**2
    assert (np.abs(closed.squared_distances(rows) - away) / largest).max() < close
    weights = rng.random(300)
    total = (weights[:, None] * explicit).sum(0)
    assert (
        np.abs(closed.total(weights=weights).ravel() - total).max()
        < close * (weights[:, None] * np.abs(explicit)).sum(0).max()
    )
    along = explicit @ total / (norms * np.linalg.norm(total))
    found = closed.along(closed.total(weights=weights)) / (norms * np.linalg.norm(total))
    assert np.abs(found - along).max() < close


def test_grand_is_the_norm_that_is_written_out():
    rng = np.random.default_rng(1)
    errors, features = rng.dirichlet(np.ones(5), 200) - np.eye(5)[rng.integers(0, 5, 200)], rng.normal(size=(200, 30))
    explicit = np.einsum("nc,nd->ncd", errors, np.c_[features, np.ones(200)]).reshape(200, -1)
    np.testing.assert_allclose(
        scores.grand(np.linalg.norm(errors, axis=1)[None, None], features), np.linalg.norm(explicit, axis=1), rtol=1e-6
    )
