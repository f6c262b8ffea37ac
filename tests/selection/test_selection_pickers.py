"""Every picker against an oracle, and the laws that hold for the whole shelf."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from few import few
from hypothesis import given, settings
from hypothesis import strategies as st

from selection import methods, pickers
from selection.errors import Refused
from selection.lottery import ranking
from selection.neighbors import Cosine, largest, nearest
from selection.submodular import SparseFacilityLocation

SHELF = methods.names(pickers)


def drawn(name, scores, budget, keep=None, seed=0, start=(), signals=None, **options):
    """Rows and weights, as the lottery has them for one class."""
    scores = np.asarray(scores, float)
    rng = np.random.default_rng(seed)
    available = {
        "scores": scores,
        "ranking": ranking(scores, np.random.default_rng([seed, 1])),
        "budget": budget,
        "keep": budget / len(scores) if keep is None else keep,
        "quotas": None,
        "rng": rng,
        "start": np.array(start, dtype=np.int64),
        **made_up(len(scores)),
        **(signals or {}),
    }
    taken = methods.call(getattr(pickers, name), available, options, place=name)
    rows, weights = taken if isinstance(taken, tuple) else (taken, np.ones(np.size(taken)))
    return np.asarray(rows), np.asarray(weights)


def pick(name, scores, budget, keep=None, seed=0, p_label=None, **options):
    """The rows of :func:`drawn`."""
    signals = options.pop("signals", {}) | ({} if p_label is None else {"p_label": p_label})
    return drawn(name, scores, budget, keep, seed, signals=signals, **options)[0]


def made_up(images, classes=3, width=4):
    """Signals of images of one class, 0, as proxies record them: in half precision."""
    rng = np.random.default_rng(98)
    errors = rng.dirichlet(np.ones(classes), images)
    errors[:, 0] -= 1
    return {
        "labels": np.zeros(images, int),
        "embeddings": rng.normal(size=(images, width)).astype(np.float16),
        "errors": errors.astype(np.float16),
        "p_label": rng.random((1, 3, images)),
    }


def alike(images):
    """As if one image stood there again and again."""
    one = made_up(1)
    return {name: np.repeat(array, images, axis=2 if name == "p_label" else 0) for name, array in one.items()}


# -- laws

SCORES = st.lists(
    st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e-300, 1e300, np.inf]) | st.floats(0, 10), min_size=1, max_size=40
)


@pytest.mark.parametrize("name", SHELF)
@settings(max_examples=25, deadline=None)
@given(scores=SCORES, data=st.data())
def test_the_budget_is_met_exactly_with_distinct_rows(name, scores, data):
    """Constant scores, ties, all infinite, one image, everything kept: all the same."""
    budget = data.draw(st.integers(1, len(scores)))
    rows = pick(name, scores, budget, seed=data.draw(st.integers(0, 3)))
    assert rows.shape == (budget,)
    assert len(set(rows.tolist())) == budget
    assert rows.min() >= 0
    assert rows.max() < len(scores)


@pytest.mark.parametrize("name", SHELF)
@pytest.mark.parametrize(
    "scores", [np.zeros(30), np.full(30, 2.5), np.full(30, np.inf), np.r_[np.full(29, np.inf), 1.0]]
)
def test_scores_that_say_nothing_still_give_a_ticket(name, scores):
    for budget in (1, 7, 29, 30):
        assert len(set(pick(name, scores, budget).tolist())) == budget


@pytest.mark.parametrize("name", SHELF)
def test_ties_do_not_favor_the_first_rows(name):
    """Of 40 images with one score, each is drawn about as often as any other."""
    times = np.zeros(40)
    for seed in range(200):
        times[pick(name, np.ones(40), 10, seed=seed, signals=alike(40))] += 1
    assert times.min() > 20  # expected 50, standard deviation 6
    assert times.max() < 80


@pytest.mark.parametrize("name", SHELF)
def test_the_seed_decides_or_the_images_do(name):
    """The same seed is the same draw. Another seed is another, or chance has no part in it and the images decide, not their rows."""
    scores, signals = np.random.default_rng(0).random(50), made_up(50)
    first, weights = drawn(name, scores, 20, seed=5)
    again = drawn(name, scores, 20, seed=5)
    assert np.array_equal(first, again[0])
    assert np.array_equal(weights, again[1])
    if set(first.tolist()) == set(pick(name, scores, 20, seed=6).tolist()):
        order = np.random.default_rng(1).permutation(50)
        turned = {key: np.take(array, order, axis=2 if key == "p_label" else 0) for key, array in signals.items()}
        assert set(order[pick(name, scores[order], 20, signals=turned)].tolist()) == set(first.tolist())
    else:
        assert "rng" in methods.reads(getattr(pickers, name))


@pytest.mark.parametrize("name", SHELF)
def test_weights_are_positive_and_only_where_the_method_gives_them(name):
    rows, weights = drawn(name, np.arange(30.0), 12)
    assert weights.shape == rows.shape
    assert weights.min() > 0
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("name", [name for name in SHELF if "start" in methods.reads(getattr(pickers, name))])
@pytest.mark.parametrize("begun", [1, 7, 12])
def test_a_warm_start_keeps_what_it_is_given(name, begun):
    """And a pick that is taken up half-way ends as one that was never put down."""
    first = pick(name, np.arange(30.0), begun)
    rows = pick(name, np.arange(30.0), 12, start=first)
    assert set(first.tolist()) <= set(rows.tolist())
    assert len(set(rows.tolist())) == 12
    if name != "facility_location":
        assert set(rows.tolist()) == set(pick(name, np.arange(30.0), 12).tolist())


@pytest.mark.parametrize("name", SHELF)
def test_what_it_is_given_is_left_alone(name):
    scores, signals = np.random.default_rng(0).random(50), made_up(50)
    for array in signals.values():
        array.setflags(write=False)
    before = scores.copy()
    pick(name, scores, 20, signals=signals)
    assert np.array_equal(scores, before)


# -- top_k and random


def test_top_k_takes_the_highest_and_infinity_first():
    assert pick("top_k", [1, 5, np.inf, 3, -2], 3).tolist() == [2, 1, 3]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
@settings(deadline=None)
def test_top_k_leaves_out_nothing_better(scores, data):
    budget = data.draw(st.integers(1, len(scores)))
    kept = pick("top_k", scores, budget)
    assert sorted((scores[i] for i in kept), reverse=True) == sorted(scores, reverse=True)[:budget]


def test_random_reads_no_score():
    assert np.array_equal(pick("random", np.arange(30), 10), pick("random", -np.arange(30), 10))


# -- ccs


def ccs_by_the_paper(scores, budget, beta, bins):
    """How many images each stratum of algorithm 1 gives: in AUM's terms, low = hard, one stratum after the other."""
    aum = sorted(-s for s in scores)[int(beta * len(scores) + 1e-9) :]
    low, high = aum[0], aum[-1]
    strata: list[list[int]] = [[] for _ in range(bins)]
    for value in aum:
        strata[min(int((value - low) / (high - low) * bins), bins - 1)].append(value)
    by_stratum, left = {}, budget
    order = sorted(range(bins), key=lambda b: len(strata[b]))
    for visited, b in enumerate(order):
        by_stratum[b] = min(len(strata[b]), left // (bins - visited))
        left -= by_stratum[b]
    assert left == 0
    return [sorted(strata[b]) for b in range(bins)], [by_stratum[b] for b in range(bins)]


@pytest.mark.parametrize(
    ("budget", "cut", "bins"), [(50, 0.3, 50), (90, 0.1, 10), (200, 0.0, 7), (10, 0.5, 3), (140, 0.3, 50)]
)
def test_ccs_gives_what_algorithm_1_gives(budget, cut, bins):
    scores = np.random.default_rng(4).normal(size=200) ** 3
    strata, shares = ccs_by_the_paper(scores, budget, cut, bins)
    kept = -scores[pick("ccs", scores, budget, cut=cut, bins=bins)]
    for stratum, share in zip(strata, shares, strict=True):
        assert np.isin(kept, stratum).sum() == share


def test_ccs_drops_the_hardest_and_them_alone():
    scores = np.r_[np.arange(90.0), np.full(10, np.inf)]
    taken = set()
    for seed in range(60):
        taken |= set(pick("ccs", scores, 30, cut=0.1, seed=seed).tolist())
    assert taken == set(range(90))


def test_ccs_with_fewer_images_than_bins_leaves_no_part_out():
    """Read to the letter, 10 images from 50 bins give most bins floor(10 / 50) = 0, and the largest, the easy, all."""
    scores = np.r_[np.linspace(0, 1, 950), np.linspace(1, 10, 50)]
    kept = scores[pick("ccs", scores, 10, cut=0.0)]
    assert sorted(np.minimum(kept, 9.99).astype(int).tolist()) == list(range(10))


def test_ccs_with_infinite_scores_below_the_cut_puts_them_with_the_hardest():
    """20 were never learned, 10 of them fall to the cut; the other 10 share a bin with the highest finite scores."""
    scores = np.r_[np.arange(80.0), np.full(20, np.inf)]
    kept = pick("ccs", scores, 10, cut=0.1, bins=10)
    assert sorted(min(int(k // 8), 9) for k in kept) == list(range(10))


def test_ccs_covers_the_easy_where_top_k_does_not():
    scores = np.arange(1000.0)
    kept = pick("ccs", scores, 100, cut=0.0, bins=10)
    assert np.bincount(kept // 100, minlength=10).tolist() == [10] * 10
    assert pick("top_k", scores, 100).min() == 900


def test_ccs_by_quantile_is_not_led_by_an_outlier():
    scores = np.r_[np.arange(99.0), 1e9]
    by_width = pick("ccs", scores, 10, cut=0.0, bins=10)
    by_quantile = pick("ccs", scores, 10, cut=0.0, bins=10, binning="quantile")
    assert np.bincount(by_quantile // 10, minlength=10).tolist() == [1] * 10
    assert 99 in by_width  # alone in its bin, hence always taken
    assert not all(99 in pick("ccs", scores, 10, cut=0.0, bins=10, binning="quantile", seed=seed) for seed in range(20))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["ccs", "d2"])
def test_scores_so_large_that_their_difference_overflows(name):
    scores = np.repeat([1e308, -1e308, 1e300], [10, 10, 20])
    assert len(set(pick(name, scores, 10, cut=0.0).tolist())) == 10


def test_ccs_negative_scores_all_find_a_bin():
    """The published code widens the last edge by max * 1.0001, which narrows it where scores are negative."""
    scores = -np.arange(1.0, 101.0)
    assert set(pick("ccs", scores, 100, keep=1.0).tolist()) == set(range(100))


@pytest.mark.parametrize(
    ("keep", "cut"), [(1.0, 0), (0.7, 0), (0.5, 0.1), (0.4, 0.15), (0.3, 0.2), (0.2, 0.2), (0.1, 0.3), (0.05, 0.3)]
)
def test_the_cut_is_the_published_one_for_the_part_kept(keep, cut):
    scores = np.arange(1000.0)
    budget = round(keep * 1000)
    hardest = max(pick("ccs", scores, budget, bins=1, seed=seed).max() for seed in range(40))
    limit = 1000 - round(cut * 1000)
    assert limit - 1000 // budget * 2 - 5 <= hardest < limit


def test_the_cut_is_never_deeper_than_what_goes():
    for keep in np.linspace(0.01, 1, 100):
        budget = max(1, round(keep * 100))
        assert len(pick("ccs", np.arange(100.0), budget, keep=float(keep))) == budget


def test_a_small_class_rounded_up_keeps_its_budget():
    """5 images, a cut of 3 and a budget of 3: the budget goes first."""
    assert sorted(pick("ccs", [9, 8, 7, 6, 5], 3, keep=0.4, cut=0.6).tolist()) == [2, 3, 4]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cut": 0.6}, r"ccs\(cut=0.6\): with keep=0.5, a part from 0 to 0.5"),
        ({"cut": -0.1}, "cut=-0.1"),
        ({"cut": "deep"}, "cut='deep'"),
        ({"cut": float("nan")}, "cut=nan"),
        ({"bins": 0}, "bins=0"),
        ({"bins": 2.5}, "bins=2.5"),
        ({"binning": "equal"}, r"binning: there is no 'equal'.* Here: width, quantile"),
    ],
)
def test_bad_settings_of_ccs(options, match):
    with pytest.raises(Refused, match=match):
        pick("ccs", np.arange(10.0), 5, **options)


# -- beta


def beta_by_the_paper(scores, p, keep, c_d):
    hardest = sorted(range(len(scores)), key=lambda i: -scores[i])[:10]
    mu = sum(p[i] for i in hardest) / len(hardest)
    b = 15 * (1 - mu) * (1 - (1 - keep) ** c_d)
    weights = np.array(scores) * scipy.stats.beta.pdf(p, 16 - b, b)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("keep", "c_d", "images"), few([(0.1, 4.0, 12), (0.5, 4.0, 12), (0.3, 11.0, 6)], [(0.3, 11.0, 6)])
)
def test_beta_draws_by_the_published_probabilities(keep, c_d, images):
    rng = np.random.default_rng(1)
    scores, p_label = rng.random(images) + 0.1, rng.uniform(0.3, 0.9, (2, 3, images))
    expected = beta_by_the_paper(scores, p_label.mean(axis=(0, 1)), keep, c_d)
    draws = 4000
    times = np.zeros(images)
    for seed in range(draws):
        times[pick("beta", scores, 1, keep=keep, seed=seed, p_label=p_label, c_d=c_d)] += 1
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(times / draws - expected) < 4.5 * error + 1e-3).all()


def test_beta_finds_mu_among_the_highest_scores():
    """The ten highest scores are hard images here, the rest easy ones: another ten would move the whole density."""
    p = np.r_[np.full(10, 0.2), np.linspace(0.3, 0.95, 40)]
    scores = np.r_[np.full(10, 1.1), np.ones(40)]
    probabilities = beta_by_the_paper(scores, p, 0.3, 4.0)
    drawn = [p[pick("beta", scores, 1, keep=0.3, seed=seed, p_label=p[None, None])][0] for seed in range(1000)]
    assert np.mean(drawn) == pytest.approx(probabilities @ p, abs=0.02)


def test_beta_moves_to_the_easy_as_fewer_stay():
    p = np.linspace(0.02, 0.98, 200)
    scores = p * (1 - p)

    def ease(keep):
        return np.mean(
            [p[pick("beta", scores, 10, keep=keep, seed=seed, p_label=p[None, None])].mean() for seed in range(20)]
        )

    assert ease(0.05) > ease(0.3) + 0.05 > ease(0.9) + 0.05


def test_beta_takes_images_without_weight_last():
    scores = np.r_[np.zeros(10), np.ones(10)]
    p_label = np.full((1, 1, 20), 0.6)
    assert set(pick("beta", scores, 10, p_label=p_label).tolist()) == set(range(10, 20))
    assert set(pick("beta", scores, 12, p_label=p_label).tolist()) > set(range(10, 20))


def test_beta_survives_certainty():
    """Mean probabilities of exactly 0 and 1, where the density has its poles."""
    p_label = np.r_[np.zeros(5), np.ones(5), np.full(5, 0.5)][None, None]
    for keep in (0.01, 0.5, 1.0):
        with np.errstate(all="raise"):
            rows = pick("beta", np.ones(15), 7, keep=keep, p_label=p_label)
        assert len(set(rows.tolist())) == 7


def test_beta_counts_infinity_as_the_highest_finite():
    p_label = np.full((1, 1, 4), 0.5)
    first = [pick("beta", [0.0, 1.0, 1.0, np.inf], 1, seed=seed, p_label=p_label)[0] for seed in range(300)]
    assert np.bincount(first, minlength=4)[1:].min() > 60  # a hundred each, standard deviation 8
    assert 0 not in first


def test_bad_input_of_beta():
    with pytest.raises(Refused, match=r"there is one of -0.5\. Take dual"):
        pick("beta", [1, -0.5, 2], 2)
    for bad in (0, -1, "x", float("inf"), float("nan")):
        with pytest.raises(Refused, match="a positive number"):
            pick("beta", [1, 2, 3], 2, c_d=bad)


# -- stretches of the ranking


def test_bottom_and_middle():
    scores = np.arange(10.0)
    assert sorted(pick("bottom", scores, 3).tolist()) == [0, 1, 2]
    assert sorted(pick("middle", scores, 4).tolist()) == [3, 4, 5, 6]
    assert sorted(pick("middle", scores, 4, at=0).tolist()) == [6, 7, 8, 9]
    assert sorted(pick("middle", scores, 4, at=1).tolist()) == [0, 1, 2, 3]
    assert pick("bottom", [1, np.inf, 0, 3], 2).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("keep", "cut", "dropped"), [(0.1, None, 30), (0.4, None, 20), (0.3, 0.25, 25), (1.0, None, 0)]
)
def test_double_end_drops_the_hardest_and_keeps_the_next(keep, cut, dropped):
    budget = round(keep * 100)
    kept = pick("double_end", np.arange(100.0), budget, **({} if cut is None else {"cut": cut}))
    assert sorted(kept.tolist()) == list(range(100 - dropped - budget, 100 - dropped))


def test_window_finds_the_stretch_that_teaches():
    """Half of the ranking is noise: its labels are no function of its embeddings. The window keeps clear of it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    embeddings = rng.normal(size=(200, 8))
    embeddings[100:] += 4 * np.eye(3, 8)[labels[100:]]  # low scores: learnable
    scores = np.arange(200.0)[::-1]
    kept = pick("window", scores, 50, signals={"labels": labels, "embeddings": embeddings})
    assert kept.min() >= 90


def test_window_is_the_same_stretch_of_every_class():
    """Brute force over stretches."""
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], [90, 60, 30])
    place = np.concatenate(
        [rng.permutation(size) / size for size in (90, 60, 30)]
    )  # in its class' ranking, hardest first
    embeddings = rng.normal(size=(180, 6))
    embeddings += np.where(place < 2 / 3, 2, 0)[:, None] * np.eye(3, 6)[labels]
    signals, quotas = {"labels": labels, "embeddings": embeddings}, np.array([27, 18, 9])
    # A class whose scores are all higher: windows of the ranking of all would be of one class.
    kept = pick("window", 2 * labels + 1 - place, 54, signals=signals | {"quotas": quotas}, step=0.1)
    assert np.bincount(labels[kept]).tolist() == quotas.tolist()
    x, found = np.c_[embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), np.ones(180)], []
    for tenth in range(8):
        rows = np.flatnonzero((place >= tenth / 10 - 1e-9) & (place < tenth / 10 + 0.3 - 1e-9))
        w = np.linalg.solve(x[rows].T @ x[rows] + np.eye(7), x[rows].T @ np.eye(3)[labels[rows]])
        found.append((((x @ w).argmax(1) == labels).sum(), -((x @ w - np.eye(3)[labels]) ** 2).sum(), set(rows)))
    assert set(kept) == max(found, key=lambda one: one[:2])[2]


@pytest.mark.parametrize("ridge", [0.01, 0.5, 30])
def test_window_is_the_best_of_all_windows(ridge):
    rng = np.random.default_rng(1)
    labels, embeddings, scores = rng.integers(0, 4, 120), rng.normal(size=(120, 5)), rng.random(120)
    kept = pick("window", scores, 30, signals={"labels": labels, "embeddings": embeddings}, step=0.1, ridge=ridge)
    x = np.c_[embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), np.ones(120)]
    order, onehot, found = np.argsort(-scores), np.eye(4)[labels], []
    for first in [*range(0, 91, 12), 90]:
        rows = order[first : first + 30]
        w = np.linalg.solve(x[rows].T @ x[rows] + ridge * np.eye(6), x[rows].T @ onehot[rows])
        found.append((((x @ w).argmax(1) == labels).sum(), -((x @ w - onehot) ** 2).sum(), first))
    first = max(found)[2]
    assert set(kept.tolist()) == set(order[first : first + 30].tolist())


# -- geometry


def unit(embeddings):
    x = embeddings.astype(float)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def herding_by_the_paper(x, budget):
    mean, chosen = x.mean(0), list[int]()
    for _ in range(budget):
        away = [np.linalg.norm((len(chosen) + 1) * mean - x[[*chosen, i]].sum(0)) for i in range(len(x))]
        chosen.append(min((i for i in range(len(x)) if i not in chosen), key=lambda i: away[i]))
    return chosen


def test_herding_takes_the_nearest_and_never_the_farthest():
    x = made_up(40)["embeddings"].astype(float)
    kept = pick("herding", np.zeros(40), 12)
    assert kept.tolist() == herding_by_the_paper(x, 12)
    assert kept[0] == np.linalg.norm(x - x.mean(0), axis=1).argmin()
    gap = [np.linalg.norm(x[rows].mean(0) - x.mean(0)) for rows in (kept, pick("random", np.zeros(40), 12))]
    assert gap[0] < 0.3 * gap[1]


def k_center_by_the_paper(x, budget, chosen=()):
    chosen = list(chosen) or [int(np.linalg.norm(x - x.mean(0), axis=1).argmin())]
    while len(chosen) < budget:
        chosen.append(int(np.linalg.norm(x[:, None] - x[chosen], axis=2).min(1).argmax()))
    return chosen


@pytest.mark.parametrize("budget", [1, 5, 60, 200])
def test_k_center_takes_the_farthest(budget):
    x = np.random.default_rng(0).normal(size=(200, 6))
    kept = pick("k_center", np.zeros(200), budget, signals={"embeddings": x})
    assert kept.tolist() == k_center_by_the_paper(x, budget)


def test_k_center_goes_on_from_a_ticket():
    x = np.random.default_rng(0).normal(size=(60, 6))
    kept = pick("k_center", np.zeros(60), 20, signals={"embeddings": x}, start=[5, 9])
    assert kept.tolist() == k_center_by_the_paper(x, 20, [5, 9])


def test_k_center_takes_duplicates_last():
    x = np.repeat(np.random.default_rng(0).normal(size=(20, 4)), 3, axis=0)
    assert sorted((pick("k_center", np.zeros(60), 20, signals={"embeddings": x}) // 3).tolist()) == list(range(20))


def greedy_by_definition(value, n, budget):
    chosen = list[int]()
    while len(chosen) < budget:
        chosen.append(max((i for i in range(n) if i not in chosen), key=lambda i: value([*chosen, i])))
    return chosen


def test_facility_location_is_greedy_on_its_value():
    x = unit(made_up(40)["embeddings"])
    similar = (1 + x @ x.T) / 2
    for options in ({}, {"maximizer": "sparse", "neighbors": 39}):
        chosen = pick("facility_location", np.zeros(40), 10, **options).tolist()
        for count, row in enumerate(chosen):
            worth = [similar[:, [*chosen[:count], i]].max(1).sum() for i in range(40)]
            assert worth[row] == pytest.approx(max(worth), rel=1e-6)  # two that are each other's nearest gain the same


def similarities(x):
    return (1 + unit(x) @ unit(x).T) / 2


@given(st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_gains_among_neighbors_are_kept_up_to_date(seed):
    """Of every row not taken the gain by its definition, to the last bit where rows are equal."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 40)), int(rng.integers(1, 12))
    x = rng.integers(-2, 3, (n, 3)).astype(np.float32)  # duplicates, zeros
    index, similar = nearest(Cosine(x), min(k, n), rng)
    greedy = SparseFacilityLocation(index, similar)
    above = np.zeros((n, n))  # what column j can do for row i
    np.put_along_axis(above, index, (similar - similar[:, -1:]).astype(float), 1)
    cover, left = np.zeros(n), set(range(n))
    for row in rng.permutation(n)[: n // 2 + 1].tolist():
        greedy.begin(np.array([row]))
        left.discard(row)
        cover = np.maximum(cover, above[:, row])
        rest = sorted(left)
        expected = np.maximum(above[:, rest] - cover[:, None], 0).sum(0)
        np.testing.assert_allclose(greedy.values[rest], expected, rtol=0, atol=1e-12)
    assert (greedy.values[[row for row in range(n) if row not in left]] == -np.inf).all()


@pytest.mark.parametrize(
    ("n", "width", "clusters", "part"),
    [(2000, 32, 1, 0.02), (2000, 32, 40, 0.2), pytest.param(10_500, 64, 1, 0.05, marks=pytest.mark.slow)],
)
def test_sparse_facility_location_is_worth_what_exact_is(monkeypatch, n, width, clusters, part):
    """Within 1 %, though neighbors are looked for in lists; with one cluster, of which lists know nothing, as well."""
    monkeypatch.setitem(nearest.__kwdefaults__, "exact", 1000)
    rng = np.random.default_rng(0)
    x = (2 * rng.normal(size=(clusters, width)) * (clusters > 1))[rng.integers(0, clusters, n)]
    x = (x + rng.normal(size=(n, width))).astype(np.float32)
    budget = round(part * n)
    similar = similarities(x)
    worth = {}
    for maximizer in ("lazy", "sparse"):
        rows = pick(
            "facility_location", np.zeros(n), budget, signals={"embeddings": x}, maximizer=maximizer, max_memory=4
        )
        worth[maximizer] = similar[:, rows].max(1).sum()
    assert worth["sparse"] >= 0.99 * worth["lazy"]
    assert similar[:, rng.choice(n, budget, replace=False)].max(1).sum() < worth["sparse"]


@given(st.integers(1, 20), st.integers(1, 400), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_largest_of_each_row_are_found_in_order(rows, width, seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, min(width, 15) + 1))
    block = rng.integers(-4, 5, (rows, width)).astype(np.float32)  # many ties
    block[rng.random(block.shape) < 0.2] = rng.choice(np.float32([-0.0, np.inf, 1e-40, -1 / 3]))
    columns, values = largest(block, k)
    expected = np.argsort(-block, axis=1, kind="stable")[:, :k]
    assert np.array_equal(columns, expected)
    assert np.array_equal(values, np.take_along_axis(block, expected, 1))


@pytest.mark.parametrize("coverage", [0.5, 1.0, 2.0])
def test_graph_cut_is_greedy_on_its_value(coverage):
    x = unit(made_up(40)["embeddings"])
    s = (1 + x @ x.T) / 2
    expected = greedy_by_definition(lambda rows: coverage * s[:, rows].sum() - s[np.ix_(rows, rows)].sum(), 40, 14)
    assert pick("graph_cut", np.zeros(40), 14, coverage=coverage).tolist() == expected


def test_log_det_seeks_no_redundancy():
    """That it is greedy: tests/selection/test_selection_greedy.py."""
    twins = np.repeat(made_up(10)["embeddings"], 4, axis=0)
    spread = pick("log_det", np.zeros(40), 4, signals={"embeddings": twins}, ridge=0.01)
    assert len(set((spread // 4).tolist())) == 4  # the wrong sign takes four of one kind


def d2_by_the_paper(scores, x, budget, k, forward, reverse):
    n = len(scores)
    away = np.linalg.norm(x[:, None] - x, axis=2)
    near = [[j for j in np.argsort(away[i]) if j != i][:k] for i in range(n)]
    score = scores - scores.min()
    message = [score[i] + sum(np.exp(-forward * away[i, j]) * score[j] for j in near[i]) for i in range(n)]
    chosen = list[int]()
    while len(chosen) < budget:
        best = max((i for i in range(n) if i not in chosen), key=lambda i: message[i])
        chosen.append(best)
        for j in near[best]:
            message[j] -= np.exp(-reverse * away[best, j]) * message[best]
    return chosen


@pytest.mark.parametrize(("options", "k", "forward", "reverse"), [
    ({}, 5, 1.0, 0.1),
    ({"neighbors": 2, "gamma_forward": 0.3, "gamma_reverse": 1.0}, 2, 0.3, 1.0),
])  # fmt: skip
def test_d2_passes_the_messages_of_the_paper(options, k, forward, reverse):
    scores, x = np.random.default_rng(3).random(50), unit(made_up(50)["embeddings"])
    expected = d2_by_the_paper(scores, x, 20, k, forward, reverse)
    for lowest in (-2, 0, 2):  # scores count from the lowest, wherever that is
        assert pick("d2", scores + lowest, 20, cut=0.0, **options).tolist() == expected


def test_d2_cuts_as_ccs_does():
    hardest = set(range(900, 1000))
    for cut, dropped in ((None, 0), (0.3, 300)):
        kept = pick(
            "d2", np.arange(1000.0), 700 if cut is None else 100, keep=0.7, **({} if cut is None else {"cut": cut})
        )
        assert bool(hardest & set(kept.tolist())) == (dropped == 0)


# -- gradients


def written_out(n, errors=None):
    made = made_up(n)
    errors = made["errors"] if errors is None else errors
    features = np.c_[made["embeddings"].astype(float), np.ones(n)]
    return (errors.astype(float)[:, :, None] * features[:, None, :]).reshape(n, -1)


@pytest.mark.parametrize("options", [
    {},
    {"maximizer": "sparse", "neighbors": 39},
    {"maximizer": "stochastic", "epsilon": 1e-6, "max_memory": 1e-9},  # looks at all of them, without the matrix
])  # fmt: skip
def test_craig_takes_and_weighs_images_by_their_explicit_gradients(options):
    g = written_out(40)
    away = np.linalg.norm(g[:, None] - g, axis=2)
    expected = greedy_by_definition(lambda rows: (away.max() - away[:, rows]).max(1).sum(), 40, 10)
    rows, weights = drawn("craig", np.zeros(40), 10, **options)
    assert rows.tolist() == expected
    nearest = away[:, expected].argmin(1)
    assert weights.tolist() == np.bincount(nearest, minlength=10).tolist()
    assert weights.sum() == 40


def test_craig_gives_each_weight_to_the_image_that_earned_it():
    """Rows and gradients are not shuffled apart: in two tight groups of 30 and 10, one image of each stands for its group."""
    rng = np.random.default_rng(0)
    errors = np.repeat([[-0.9, 0.9], [-0.1, 0.1]], [30, 10], axis=0) + rng.normal(size=(40, 1)) * [0.001, -0.001]
    order = rng.permutation(40)
    rows, weights = drawn("craig", np.zeros(40), 2, signals={"errors": errors[order], "embeddings": np.ones((40, 3))})
    assert {bool(order[row] < 30): weight for row, weight in zip(rows, weights, strict=True)} == {True: 30, False: 10}


def matched(g, rows, weights, ridge):
    return ((weights @ g[rows] - g.sum(0)) ** 2).sum() + ridge * (weights**2).sum()


def grad_match_by_the_paper(g, budget, ridge):
    target, chosen = g.sum(0), list[int]()
    w = np.empty(0)
    while len(chosen) < budget:
        toward = g @ (target - w @ g[chosen]) if chosen else g @ target
        toward[chosen] = -np.inf
        chosen.append(int(toward.argmax()))
        a = g[chosen]
        w = np.linalg.solve(a @ a.T + ridge * np.eye(len(chosen)), a @ target)
    stacked = np.r_[g[chosen].T, np.sqrt(ridge) * np.eye(budget)]
    return chosen, scipy.optimize.nnls(stacked, np.r_[target, np.zeros(budget)])[0]


@pytest.mark.parametrize("ridge", [0.5, 3.0])
def test_grad_match_is_orthogonal_matching_pursuit_on_the_explicit_gradients(ridge):
    g = written_out(60)
    rows, weights = drawn("grad_match", np.zeros(60), 9, ridge=ridge)
    expected, truth = grad_match_by_the_paper(g, 9, ridge)
    assert rows.tolist() == expected
    positive = truth > 0.02 * truth.mean()
    np.testing.assert_allclose(weights[positive], truth[positive], rtol=2e-3)
    assert matched(g, rows, weights, ridge) <= 1.01 * matched(g, expected, truth, ridge) + 1e-3


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_grad_match_fits_the_weights_anew_where_some_would_be_negative(ridge):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, 60)
    errors = (rng.dirichlet(np.ones(3), 60) - np.eye(3)[labels]).astype(np.float16)
    g = written_out(60, errors)
    rows, weights = drawn("grad_match", np.zeros(60), 30, ridge=ridge, signals={"errors": errors})
    a, target = g[rows], g.sum(0)
    unbound = np.linalg.solve(a @ a.T + ridge * np.eye(30), a @ target)
    truth = scipy.optimize.nnls(np.r_[a.T, np.sqrt(ridge) * np.eye(30)], np.r_[target, np.zeros(30)])[0]
    assert unbound.min() < 0 == truth.min()
    np.testing.assert_allclose(
        weights, np.maximum(truth, 0.01 * truth[truth > 0].mean()), rtol=1e-3, atol=3e-3 * truth.mean()
    )


def test_grad_match_with_and_without_the_matrix_and_several_at_once():
    g = written_out(60)
    rows, weights = drawn("grad_match", np.zeros(60), 20, at_once=4)
    others, _ = drawn("grad_match", np.zeros(60), 20)
    assert len(set(rows.tolist()) & set(others.tolist())) >= 10
    by_chance, _ = drawn("random", np.zeros(60), 20)
    assert matched(g, rows, weights, 0.5) < 0.2 * matched(g, by_chance, np.full(20, 3.0), 0.5)
    # 60 images, 5 classes times 13 numbers: the products of all with all are the smaller
    wide = made_up(60, classes=5, width=12)
    here = drawn("grad_match", np.zeros(60), 8, signals=wide)
    there = drawn("grad_match", np.zeros(60), 8, signals=wide, max_memory=2e-6)
    assert here[0].tolist() == there[0].tolist()
    np.testing.assert_allclose(here[1], there[1], rtol=1e-3)


def test_grad_match_by_batch_takes_whole_batches_at_one_weight():
    g = written_out(60)
    rows, weights = drawn("grad_match", np.zeros(60), 20, by="batch", batch=5)
    assert len(np.unique(weights)) <= 4
    assert all(len(set(weights[first : first + 5])) == 1 for first in range(0, 20, 5))
    order = np.random.default_rng(0).permutation(60)
    sums = np.stack([g[order[first : first + 5]].sum(0) for first in range(0, 60, 5)])
    picked, truth = grad_match_by_the_paper(sums, 4, 0.5)
    assert rows.tolist() == [row for number in picked for row in order[5 * number : 5 * number + 5]]
    np.testing.assert_allclose(weights[::5], np.maximum(truth, 0.01 * truth[truth > 0].mean()), rtol=1e-3)
    # One image is all that matters, and it would be in the short batch at the end.
    alone = np.zeros((33, 3))
    alone[np.random.default_rng(0).permutation(33)[-1]] = 1, -0.5, -0.5
    assert len(pick("grad_match", np.zeros(33), 32, by="batch", signals={"errors": alone})) == 32
    for n, budget, batch in ((60, 59, 7), (13, 5, 32), (33, 32, 32), (60, 60, 8)):
        assert len(set(pick("grad_match", np.zeros(n), budget, by="batch", batch=batch).tolist())) == budget


def test_grad_match_with_nothing_to_match():
    rows, weights = drawn("grad_match", np.zeros(20), 6, signals={"errors": np.zeros((20, 3), np.float16)})
    assert len(set(rows.tolist())) == 6
    assert (weights > 0).all()


def glister_by_the_paper(p, labels, x, budget, step, rounds):
    x = np.c_[x, np.ones(len(x))]
    head = np.zeros((p.shape[1], x.shape[1]))
    onehot, base, chosen = np.eye(p.shape[1])[labels], np.log(p), list[int]()
    size = -(-budget // rounds)
    while len(chosen) < budget:
        z = base + x @ head.T
        now = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        slope = (now - onehot).T @ x
        gain = np.array([(np.outer(p[i] - onehot[i], x[i]) * slope).sum() for i in range(len(x))])
        gain[chosen] = -np.inf
        taken = np.argsort(-gain)[: min(size, budget - len(chosen))].tolist()
        chosen += taken
        head -= step * sum(np.outer(p[i] - onehot[i], x[i]) for i in taken)
    return chosen


def test_glister_refreshes_the_gradient_of_the_loss():
    made = made_up(50)
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(3), 50), rng.integers(0, 3, 50)
    signals = {"errors": p - np.eye(3)[labels], "labels": labels}
    x = made["embeddings"].astype(float)
    kept = pick("glister", np.zeros(50), 20, signals=signals, step=0.05, rounds=10)
    assert kept.tolist() == glister_by_the_paper(p, labels, x, 20, 0.05, 10)
    assert set(kept.tolist()) != set(glister_by_the_paper(p, labels, x, 20, 0.05, 1))  # which refreshes nothing


# -- limits and settings


@pytest.mark.parametrize("name", ["facility_location", "craig"])
def test_memory_is_refused_before_it_is_spent(name):
    with pytest.raises(
        Refused,
        match=rf"{name}: .*sparse.*max_memory=0\.00036\.$",
    ):
        pick(name, np.zeros(300), 10, maximizer="lazy", max_memory=1e-4)
    with pytest.raises(Refused, match=rf"{name}: .*60 nearest .*fewer neighbors"):
        pick(name, np.zeros(300), 10, max_memory=1e-4)
    assert len(pick(name, np.zeros(300), 10, maximizer="stochastic", max_memory=1e-4)) == 10


def test_grad_match_refuses_what_does_not_fit():
    for by in ("image", "batch"):
        with pytest.raises(Refused, match=r"grad_match: .*1e-06 GB.*[Bb]alance the classes"):
            pick("grad_match", np.zeros(300), 100, by=by, max_memory=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("middle", {"at": 1.5}, r"middle\(at=1.5\): a number from 0 to 1"),
        ("double_end", {"cut": 0.9}, r"double_end\(cut=0.9\): with keep=0.5, a part from 0 to 0.5"),
        ("window", {"step": 0}, "step=0"),
        ("window", {"ridge": -1}, "ridge=-1"),
        ("facility_location", {"maximizer": "eager"}, "maximizer: there is no 'eager'"),
        ("facility_location", {"neighbors": 0}, "neighbors=0"),
        ("facility_location", {"epsilon": 1}, "epsilon=1"),
        ("graph_cut", {"coverage": -1}, "coverage=-1"),
        ("log_det", {"ridge": 0}, "ridge=0"),
        ("d2", {"neighbors": 1.5}, "neighbors=1.5"),
        ("d2", {"cut": 0.7}, "cut=0.7"),
        ("grad_match", {"by": "epoch"}, "by: there is no 'epoch'"),
        ("grad_match", {"ridge": "much"}, "ridge='much'"),
        ("grad_match", {"at_once": 0}, "at_once=0"),
        ("glister", {"rounds": 0}, "rounds=0"),
        ("glister", {"step": float("nan")}, "step=nan"),
    ],
)
def test_bad_settings_of_the_others(name, options, match):
    with pytest.raises(Refused, match=match):
        pick(name, np.arange(10.0), 5, **options)


# -- the ranking that they read


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, np.inf]), min_size=1, max_size=30), st.integers(0, 5))
@settings(deadline=None)
def test_the_ranking_is_a_permutation_from_high_to_low(scores, seed):
    order = ranking(np.array(scores), np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(scores)))
    assert [scores[i] for i in order] == sorted(scores, reverse=True)


def test_ccs_share_is_exact_arithmetic():
    """0.29 of 100 is 29 images, though 0.29 * 100 is 28.999999999999996."""
    assert int(0.29 * 100) == 28
    assert Fraction(29, 100) * 100 == 29
    kept = {int(k) for seed in range(30) for k in pick("ccs", np.arange(100.0), 40, cut=0.29, bins=1, seed=seed)}
    assert max(kept) == 70
