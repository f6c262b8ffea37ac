"""Every picker against an oracle, and the laws that hold for the whole shelf."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from selection import methods, pickers
from selection.errors import Refused
from selection.lottery import ranking

SHELF = methods.names(pickers)


def pick(name, scores, budget, keep=None, seed=0, p_label=None, **options):
    """What the lottery does for one class."""
    scores = np.asarray(scores, float)
    rng = np.random.default_rng(seed)
    if p_label is None:
        p_label = np.random.default_rng(99).random((1, 3, len(scores)))
    available = {
        "scores": scores,
        "ranking": ranking(scores, np.random.default_rng([seed, 1])),
        "budget": budget,
        "keep": budget / len(scores) if keep is None else keep,
        "rng": rng,
        "labels": np.zeros(len(scores), int),
        "embeddings": np.random.default_rng(98).normal(size=(len(scores), 3)),
        "p_label": p_label,
    }
    taken = methods.call(getattr(pickers, name), available, options, place=name)
    return np.asarray(taken[0] if isinstance(taken, tuple) else taken)


# -- laws

SCORES = st.lists(
    st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e-300, 1e300, np.inf]) | st.floats(0, 10), min_size=1, max_size=40
)


@pytest.mark.parametrize("name", SHELF)
@settings(max_examples=60, deadline=None)
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
def test_ties_do_not_favour_the_first_rows(name):
    """Of 40 images with one score, each is drawn about as often as any other."""
    times = np.zeros(40)
    for seed in range(200):
        times[pick(name, np.ones(40), 10, seed=seed, p_label=np.full((1, 2, 40), 0.5))] += 1
    assert times.min() > 20  # expected 50, standard deviation 6
    assert times.max() < 80


@pytest.mark.parametrize("name", SHELF)
def test_the_seed_decides(name):
    scores = np.random.default_rng(0).random(50)
    first = pick(name, scores, 20, seed=5)
    assert np.array_equal(first, pick(name, scores, 20, seed=5))
    if "rng" in methods.reads(getattr(pickers, name)):
        assert set(first.tolist()) != set(pick(name, scores, 20, seed=6).tolist())


@pytest.mark.parametrize("name", [name for name in SHELF if "rng" not in methods.reads(getattr(pickers, name))])
def test_a_picker_without_chance_follows_the_images(name):
    scores = np.random.default_rng(0).random(50)
    order = np.random.default_rng(1).permutation(50)
    assert set(order[pick(name, scores[order], 20)].tolist()) == set(pick(name, scores, 20).tolist())


@pytest.mark.parametrize("name", SHELF)
def test_what_it_is_given_is_left_alone(name):
    scores = np.random.default_rng(0).random(50)
    before = scores.copy()
    pick(name, scores, 20)
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
    strata = [[] for _ in range(bins)]
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
        ({"binning": "equal"}, r"binning='equal'.*'width', or 'quantile'"),
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


@pytest.mark.parametrize(("keep", "c_d", "images"), [(0.1, 4.0, 12), (0.5, 4.0, 12), (0.3, 11.0, 6)])
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
