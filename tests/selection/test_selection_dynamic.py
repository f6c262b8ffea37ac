"""Every method of dynamic data pruning against an oracle, and the laws that hold for the whole shelf."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from selection import dynamic, methods
from selection.dynamic_pruning import State, epoch_subset
from selection.errors import Refused
from selection.ranks import shares
from selection.strata import k_means

SHELF = methods.names(dynamic)
READS = {name: methods.reads(getattr(dynamic, name)) for name in SHELF}
BUDGETED = [name for name in SHELF if "budget" in READS[name]]


def draw(name, *, epoch=3, epochs=10, budget=None, seed=0, images=None, options=None, **known):
    """Rows and weights of a method that is told what ``known`` says; the rest as of images that were seen last epoch."""
    n = images if images is not None else len(next(iter(known.values())))
    told = {
        "loss": np.ones(n, np.float32), "mean": np.ones(n, np.float32), "variance": np.zeros(n, np.float32),
        "seen": np.full(n, epoch), "last": np.full(n, epoch - 1), "below": np.zeros(n, bool), "labels": np.zeros(n, int),
        "epoch": epoch, "epochs": epochs, "budget": budget or max(1, n // 2), "seed": seed,
        "rng": np.random.default_rng([seed, epoch]),
    }  # fmt: skip
    told |= {name: np.array(value) for name, value in known.items()}
    for value in told.values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)  # no method may change what it is given
    taken = getattr(dynamic, name)(*(told[read] for read in READS[name]), **(options or {}))
    rows, weights = taken if isinstance(taken, tuple) else (taken, np.ones(len(taken)))
    return rows, weights


def known_after(losses, labels=None, seed=0):
    """What a state knows after epochs with these losses, NaN: not seen."""
    losses = np.atleast_2d(losses)
    state = State(np.zeros(losses.shape[1], int) if labels is None else labels)
    for epoch, values in enumerate(losses):
        rows = np.flatnonzero(~np.isnan(values))
        state.add(rows, values[rows])
        state.end(epoch)
    return state


# -- laws

LOSSES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 1e-30, 1e30, math.nan]) | st.floats(0, 10, width=32), min_size=1, max_size=40)  # fmt: skip


@pytest.mark.parametrize("name", SHELF)
@settings(max_examples=25, deadline=None)
@given(losses=LOSSES, data=st.data())
def test_a_draw_is_distinct_rows_and_positive_weights(name, losses, data):
    """Ties, constants, images never seen (NaN), one image, one class: all the same."""
    n, epochs = len(losses), data.draw(st.integers(1, 12))
    labels = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    state = known_after(losses, labels)
    epoch, keep = data.draw(st.integers(0, epochs - 1)), data.draw(st.floats(0.01, 1))
    drawn = epoch_subset(state, pick=name, epoch=epoch, epochs=epochs, keep=keep, seed=data.draw(st.integers(0, 3)))
    assert 1 <= len(drawn.rows) <= n
    assert (np.diff(drawn.rows) > 0).all()
    assert drawn.rows[0] >= 0
    assert drawn.rows[-1] < n
    assert drawn.weights.shape == drawn.rows.shape
    assert (drawn.weights > 0).all()
    assert np.isfinite(drawn.weights).all()
    in_force = name != "selective_backprop" or 0.5 * epochs <= epoch < 0.9 * epochs
    if name in BUDGETED:
        assert len(drawn.rows) == (max(1, round(keep * n)) if in_force else n)


@pytest.mark.parametrize("name", BUDGETED)
def test_everything_kept_is_everything(name):
    rng = np.random.default_rng(0)
    for epoch in range(5):
        rows, weights = draw(name, loss=rng.random(31), labels=np.arange(31) % 4, budget=31, epoch=epoch, epochs=5)
        assert sorted(rows.tolist()) == list(range(31))
        assert (weights == 1).all()


@pytest.mark.parametrize("name", SHELF)
def test_the_same_seed_is_the_same_draw_and_another_is_another(name):
    state = known_after(np.random.default_rng(0).random((6, 60)), np.arange(60) % 3)
    first, again, other = (epoch_subset(state, pick=name, epoch=6, epochs=10, keep=0.4, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.rows, again.rows)
    assert np.array_equal(first.weights, again.weights)
    if name != "ucb":  # the losses decide
        assert not np.array_equal(first.rows, other.rows)


@pytest.mark.parametrize("name", SHELF)
def test_no_row_is_favored_where_all_are_alike(name):
    """Of 40 images of which nothing tells one from another, each is drawn about as often as any other."""
    times, total = np.zeros(40), 0
    for seed in range(200):
        rows, _ = draw(name, images=40, budget=10, epoch=6, seed=seed, below=np.ones(40, bool))
        times[rows] += 1
        total += len(rows)
    expected = total / 40
    spread = math.sqrt(expected * (1 - expected / 200))
    assert abs(times - expected).max() <= 4.5 * max(spread, 1e-9)


@pytest.mark.parametrize("name", [name for name in SHELF if name not in ("rs2", "ucb")])
def test_shuffled_images_are_drawn_as_often(name):
    """Equivariance, where chance draws by row: how often an image comes does not depend on where it stands."""
    rng = np.random.default_rng(4)
    loss = np.exp(rng.normal(size=30)).astype(np.float32)
    known: dict[str, np.ndarray] = {"loss": loss, "labels": np.arange(30) % 3, "below": loss < 1, "seen": rng.integers(2, 7, 30),
             "last": rng.integers(4, 6, 30)}  # fmt: skip
    order = rng.permutation(30)
    often = {}
    for key, place in (("as they are", np.arange(30)), ("shuffled", order)):
        times = np.zeros(30)
        for seed in range(200):
            rows, _ = draw(name, epoch=6, budget=12, seed=seed, **{k: v[place] for k, v in known.items()})
            times[place[rows]] += 1
        often[key] = times / 200
    assert abs(often["as they are"] - often["shuffled"]).max() < 0.23  # 4.5 standard deviations


def test_ucb_is_equivariant():
    rng = np.random.default_rng(4)
    mean, variance, order = rng.random(30), rng.random(30), rng.permutation(30)
    one, _ = draw("ucb", mean=mean, variance=variance)
    other, _ = draw("ucb", mean=mean[order], variance=variance[order])
    assert set(one.tolist()) == set(order[other].tolist())


@pytest.mark.parametrize("name", SHELF)
def test_at_the_first_epoch_nothing_is_known_and_it_draws(name):
    drawn = epoch_subset(State(np.arange(50) % 5), pick=name, epoch=0, epochs=10, keep=0.3)
    everything = {"infobatch", "repb", "selective_backprop"}
    assert len(drawn.rows) == (50 if name in everything else 45 if name == "seta" else 15)


@pytest.mark.parametrize(
    ("pick", "says"),
    [
        ({"name": "infobatch", "prune": 1}, "prune=1"),
        ({"name": "infobatch", "prune": -0.1}, "prune"),
        ({"name": "infobatch", "prune": True}, "prune=True"),
        ({"name": "infobatch", "until": 1.5}, "until"),
        ({"name": "infobatch", "saving": "much"}, "saving"),
        ({"name": "infobatch", "saving": 0.8}, "can save 0.6986 of all passes at most"),
        ({"name": "rs2", "replacement": 1}, "replacement"),
        ({"name": "seta", "groups": 0}, "groups"),
        ({"name": "seta", "groups": 2.0}, "groups"),
        ({"name": "seta", "drop": 1}, "drop"),
        ({"name": "repb", "drop": 1.0}, "drop"),
        ({"name": "orderdp", "take": 0}, "take"),
        ({"name": "rcap", "temperature": 0}, "temperature"),
        ({"name": "rcap", "temperature": math.inf}, "temperature"),
        ({"name": "ucb", "confidence": -1}, "confidence"),
        ({"name": "ucb", "confidence": math.nan}, "confidence"),
        ({"name": "selective_backprop", "start": -1}, "start"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_first_epoch(pick, says):
    with pytest.raises(Refused, match=says):
        epoch_subset(State(np.zeros(500, int)), pick=pick, epoch=0, epochs=10)


# -- infobatch


def test_infobatch_is_unbiased():
    """Over many draws the weighted sum of anything is its full sum; and in each draw the weights are of the right size."""
    rng = np.random.default_rng(0)
    loss, gradient = rng.exponential(size=200), rng.normal(size=200)
    low = loss < loss.mean()
    sums, times = [], np.zeros(200)
    for seed in range(500):
        rows, weights = draw("infobatch", loss=loss, seed=seed)
        times[rows] += weights
        sums.append(weights @ gradient[rows])
        assert weights.sum() == pytest.approx(200)
        assert set(np.flatnonzero(~low)) <= set(rows.tolist())
        assert (weights[~low[rows]] == 1).all()
        assert len(rows) == 200 - round(0.5 * low.sum())
    spread = np.std(sums) / math.sqrt(500)
    assert abs(np.mean(sums) - gradient.sum()) < 4 * spread
    np.testing.assert_allclose(times[low] / 500, 1, atol=0.2)


def test_infobatch_by_its_definition():
    loss = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, np.inf])
    rows, weights = draw("infobatch", loss=loss, options={"prune": 0.5})
    assert {4, 5, 6, 7} <= set(rows.tolist())  # the mean of the known is 6 / 7: only zeros are below it
    assert sorted(weights.tolist()) == [1, 1, 1, 1, 2, 2]
    full = draw("infobatch", loss=loss, epoch=9)[0]  # 0.875 of 10 epochs are over
    assert len(full) == len(draw("infobatch", loss=loss, epoch=0)[0]) == 8
    assert len(draw("infobatch", loss=loss, epoch=8)[0]) == 8
    assert len(draw("infobatch", loss=loss, epoch=7)[0]) == 6
    assert len(draw("infobatch", loss=loss, epoch=2, epochs=3)[0]) == 8  # the last epoch at least
    assert len(draw("infobatch", loss=loss, epoch=2, epochs=3, options={"until": 1})[0]) == 6


def test_infobatch_never_leaves_out_all_that_is_learned():
    rows, weights = draw("infobatch", loss=[0.0, 1.0], options={"prune": 0.9})
    assert rows.tolist() == [0, 1]
    assert weights.tolist() == [1, 1]
    assert len(draw("infobatch", loss=np.ones(5))[0]) == 5  # nothing is below the mean


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 80), epochs=st.integers(3, 20), saving=st.floats(0, 0.5), prune=st.floats(0, 0.9), seed=st.integers(0, 9))  # fmt: skip
def test_infobatch_saves_what_it_was_told_to_the_image(n, epochs, saving, prune, seed):
    rng = np.random.default_rng(seed)
    state, pick = State(np.zeros(n, int)), {"name": "infobatch", "saving": saving, "prune": prune}
    active = math.floor(0.875 * epochs) - 1
    if round(saving * epochs * n) > active * (n - 1):
        with pytest.raises(Refused, match="at most"):
            epoch_subset(state, pick=pick, epoch=0, epochs=epochs)
        return
    passes = []
    for epoch in range(epochs):
        drawn = epoch_subset(state, pick=pick, epoch=epoch, epochs=epochs, seed=seed)
        assert drawn.weights.sum() == pytest.approx(n, rel=1e-5)
        state.add(drawn.rows, rng.exponential(size=len(drawn.rows)))
        state.end(epoch)
        passes.append(len(drawn.rows))
    assert n * epochs - sum(passes) == round(saving * epochs * n)
    assert state.passes == sum(passes)
    assert max(passes[1 : active + 1]) - min(passes[1 : active + 1]) <= 1, "spread evenly"


def test_infobatch_saves_at_the_lowest_losses():
    loss = np.random.default_rng(0).permutation(100).astype(float)
    options = {"saving": 0.21, "prune": 0.5}
    out = set()
    for seed in range(60):
        rows, weights = draw("infobatch", loss=loss, seed=seed, epoch=3, options=options)
        left = set(range(100)) - set(rows.tolist())
        assert len(left) == 30  # 210 of 1000 passes in epochs 1 to 7
        assert sorted(set(weights.tolist())) == [1, 2]
        out |= left
    assert {loss[row] for row in out} == set(range(60))


# -- rs2


@given(n=st.integers(1, 20), budget=st.integers(1, 20), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_rs2_walks_through_all_before_any_comes_again(n, budget, seed):
    budget = min(budget, n)
    epochs = 2 * n
    each = [draw("rs2", images=n, budget=budget, epoch=epoch, epochs=epochs, seed=seed)[0] for epoch in range(epochs)]
    assert all(len(set(rows.tolist())) == budget for rows in each)
    seen = np.zeros(n, int)
    for rows in each:  # an image comes a second time only in an epoch that ends the walk
        seen[rows] += 1
        assert seen.max() - seen.min() <= 1 or np.isin(np.flatnonzero(seen == seen.min()), rows).sum() == 0
        assert seen.max() - seen.min() <= 2 - (seen.sum() % n == 0)
    assert (sum(np.bincount(rows, minlength=n) for rows in each[:n]) == budget).all()


def test_rs2_with_replacement_draws_anew():
    each = [draw("rs2", images=1000, budget=500, epoch=e, options={"replacement": True})[0] for e in range(2)]
    assert 200 < len(np.intersect1d(*each)) < 300
    without = [draw("rs2", images=1000, budget=500, epoch=e)[0] for e in range(2)]
    assert len(np.intersect1d(*without)) == 0


# -- seta


def test_setas_groups_are_k_means():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=300)
    start = np.quantile(values, (np.arange(5) + 0.5) / 5)[:, None]
    means = KMeans(5, init=start, n_init=1, tol=0, max_iter=500).fit(values[:, None])
    rank = np.argsort(np.argsort(means.cluster_centers_[:, 0]))
    assert np.array_equal(k_means(values, 5), rank[means.labels_])


@pytest.mark.parametrize("window", [0.55, 0.6, 0.65])
def test_setas_window_slides_from_easy_to_hard(window):
    """Of ``round(window * groups)`` groups."""
    loss = np.repeat([0.0, 10.0, 20.0, 30.0, 40.0], 20) + np.tile(np.linspace(0, 1, 20), 5)
    loss[99] = np.inf
    options = {"drop": 0.0, "groups": 5, "window": window}
    for epoch in range(8):
        rows, weights = draw("seta", loss=loss, epoch=epoch, options=options)
        first = epoch % 3
        assert sorted(set((rows // 20).tolist())) == [first, first + 1, first + 2]
        assert len(rows) == 60
        assert (weights == 1).all()
    assert len(draw("seta", loss=loss, epoch=9, options=options)[0]) == 100
    assert len(draw("seta", loss=loss, epoch=9)[0]) == 90  # drop=0.1


# -- repb


def test_repb_by_its_definition():
    """Left out with ``drop`` when below the mean of the batch; back with ``1 - drop``; weight E / N_i(E)."""
    n = 4000
    was_in, below = np.arange(n) % 2 == 0, np.arange(n) % 4 < 2
    seen = np.where(was_in, 4, 2)
    last = np.where(was_in, 4, 3)
    rows, weights = draw("repb", below=below, last=last, seen=seen, epoch=5, options={"drop": 0.3})
    inside = np.isin(np.arange(n), rows)
    assert inside[was_in & ~below].all()
    assert inside[was_in & below].mean() == pytest.approx(0.7, abs=0.06)
    assert inside[~was_in].mean() == pytest.approx(0.7, abs=0.05)
    assert np.array_equal(weights, np.where(was_in, 6 / 5, 6 / 3)[rows])


def test_repbs_weights_make_up_for_the_epochs_missed():
    """Over a long training an image that the lottery left out half of the time weighs about what one that was in always does."""
    n, epochs, rng = 300, 200, np.random.default_rng(0)
    easy = np.arange(n) % 2 == 0
    state, total = State(np.zeros(n, int)), np.zeros(n)
    for epoch in range(epochs):
        drawn = epoch_subset(state, pick="repb", epoch=epoch, epochs=epochs)
        total[drawn.rows] += drawn.weights
        order = rng.permutation(drawn.rows)
        for batch in np.array_split(order, 5):
            state.add(batch, np.where(easy[batch], 0.1, 2.0))
        state.end(epoch)
    assert total[~easy] == pytest.approx(epochs)
    assert total[easy].mean() == pytest.approx(epochs, rel=0.05)
    assert 0.6 < state.passes / (n * epochs) < 0.85


# -- orderdp


def test_orderdp_is_the_hardest_of_a_uniform_pool():
    """An image of rank k (0 the hardest) is drawn when it is in the pool with fewer than ``budget`` harder ones: hypergeometric."""
    from scipy.stats import hypergeom

    n, budget = 20, 6
    loss = -np.arange(n, dtype=float)
    times = np.zeros(n)
    for seed in range(800):
        times[draw("orderdp", loss=loss, budget=budget, seed=seed)[0]] += 1
    pool = 10  # 6 / 0.6
    oracle = [pool / n * hypergeom(n - 1, rank, pool - 1).cdf(budget - 1) for rank in range(n)]
    np.testing.assert_allclose(times / 800, oracle, atol=0.075)
    assert set(draw("orderdp", loss=loss, budget=6, options={"take": 1})[0].tolist()) != set(range(6))
    assert set(draw("orderdp", loss=loss, budget=15)[0].tolist()) == set(range(15))  # the pool is all there is
    loss[17] = np.inf
    assert all(17 in draw("orderdp", loss=loss, budget=15, seed=seed)[0] for seed in range(5))


# -- rcap


def test_rcap_shares_follow_the_root_of_what_is_left():
    """By the formula: in-class softmax of loss / 2, added up over the images of last epoch, times the prior, the root of it."""
    labels = np.repeat([0, 1, 2], [300, 200, 100])
    loss = np.random.default_rng(0).exponential(size=600)
    last = np.where(np.random.default_rng(1).random(600) < 0.5, 2, 1)
    wanted = []
    for c in range(3):
        own = np.exp(np.minimum(loss[labels == c], math.log(3)) / 2)
        own /= own.sum()
        wanted.append(math.sqrt(own[last[labels == c] == 2].sum() * (labels == c).mean()))
    rows, _ = draw("rcap", loss=loss, labels=labels, last=last, budget=150)
    exact = 1 + 147 * np.array(wanted) / sum(wanted)
    assert abs(np.bincount(labels[rows], minlength=3) - exact).max() < 1


def test_rcap_draws_in_proportion_without_replacement():
    """One of two in a class: exp(loss / temperature) decides, losses clipped at ln C."""
    labels = np.repeat(np.arange(2), 2)
    loss = np.array([0.0, 5.0, 0.3, np.inf])  # clipped at ln 2
    times = np.zeros(4)
    for seed in range(800):
        times[draw("rcap", loss=loss, labels=labels, budget=2, seed=seed, options={"temperature": 0.5})[0]] += 1
    first, second = 1 / (1 + 4), math.exp(0.6) / (math.exp(0.6) + 4)
    np.testing.assert_allclose(times / 800, [first, 1 - first, second, 1 - second], atol=0.07)


def test_rcap_no_class_is_lost_for_good():
    """Ninety-nine classes of one image each beside a large one: every class comes in every epoch that has room for it."""
    labels = np.concatenate([np.zeros(400, int), np.arange(1, 100)])
    state = State(labels)
    for epoch in range(6):
        drawn = epoch_subset(state, pick="rcap", epoch=epoch, epochs=6, keep=0.3)
        assert set(labels[drawn.rows].tolist()) == set(range(100))
        state.add(drawn.rows, np.full(len(drawn.rows), 0.1))
        state.end(epoch)


def test_rcap_a_class_that_was_left_out_comes_back():
    """None of it was in the last epoch: by the formula its share is 0, and would be from then on."""
    labels = np.repeat([0, 1], [50, 5])
    rows, _ = draw("rcap", loss=np.ones(55), labels=labels, last=np.where(labels == 1, 0, 2), epoch=3, budget=10)
    assert np.bincount(labels[rows]).tolist() == [9, 1]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_shares_are_exact_and_fit(data):
    sizes = np.array(data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=12)))
    budget = data.draw(st.integers(0, int(sizes.sum())))
    wanted = np.array(data.draw(st.lists(st.floats(0, 5), min_size=len(sizes), max_size=len(sizes))))
    found = shares(wanted, sizes, budget)
    assert found.sum() == budget
    assert (found <= sizes).all()
    assert (found >= 0).all()


# -- ucb


def test_ucb_is_mean_plus_deviation():
    rng = np.random.default_rng(0)
    mean, variance = rng.random(40), rng.random(40)
    bound = [m + 2 * math.sqrt(v) for m, v in zip(mean, variance)]
    for budget in range(1, 40):
        rows, _ = draw("ucb", mean=mean, variance=variance, budget=budget, options={"confidence": 2.0})
        assert sorted(rows.tolist()) == sorted(sorted(range(40), key=lambda i: -bound[i])[:budget])
    mean[3] = np.inf
    assert 3 in draw("ucb", mean=mean, variance=variance, budget=1)[0]


# -- selective_backprop


def test_selective_backprop_draws_by_the_power_of_the_rank():
    """One of n, so that sampling without replacement is plain sampling: P(rank) ~ rank ** (n / 1 - 1)."""
    n = 6
    loss = np.array([0.5, 0.1, 0.9, 0.3, np.inf, 0.7])
    times = np.zeros(n)
    for seed in range(800):
        times[draw("selective_backprop", loss=loss, budget=1, epoch=6, seed=seed)[0]] += 1
    ranks = (np.argsort(np.argsort(loss)) + 0.5) / n
    np.testing.assert_allclose(times / 800, ranks ** (n - 1) / (ranks ** (n - 1)).sum(), atol=0.07)
    harder = sum(
        int(draw("selective_backprop", loss=[0, 1], budget=1, epoch=6, seed=seed)[0][0]) for seed in range(800)
    )
    assert harder / 800 == pytest.approx(0.75, abs=0.06)  # 3/4 over 1/4 + 3/4: the power is 2 / 1 - 1


def test_selective_backprop_keeps_all_at_both_ends():
    sizes = [len(draw("selective_backprop", images=20, budget=5, epoch=e)[0]) for e in range(10)]
    assert sizes == [20] * 5 + [5] * 4 + [20]
