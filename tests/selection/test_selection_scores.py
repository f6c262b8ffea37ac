"""Every score against an oracle written image by image, and the laws that hold for the whole shelf."""

import inspect
import re
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats

from selection import methods, scores
from selection.errors import Refused
from selection.signals import VOCABULARY, Signals

SHELF = methods.names(scores)
BY_CHANCE = {"random"}  # says nothing of an image
FROM_ELSEWHERE = {"given"}  # no paper's, and recorded by no proxy
ONE_OF_TWINS = {"zcore"}  # of images that are alike it wants one
WHERE = {
    "moderate",
    "ssp",
    "cal",
    "zcore",
}  # where an image lies among the others, not how it was learned; see their own tests


def score(name, arrays, **options):
    signals = Signals(arrays, fingerprint="f")
    return methods.call(getattr(scores, name), signals.available(), options, place=name)


def permuted(arrays, order):
    return {name: np.take(array, order, axis=VOCABULARY[name].dims.index("N")) for name, array in arrays.items()}


# -- laws


def test_the_shelf_is_what_we_think():
    known = {"random", "el2n", "forgetting", "aum", "loss", "entropy", "margin", "least_confidence", "dual", "dyn_unc"}
    known |= {"grand", "tdds", "memorization", "moderate", "ssp", "cal", "zcore"}
    assert known <= set(SHELF)


@pytest.mark.parametrize("name", SHELF)
def test_reads_the_vocabulary_and_cites_its_source(name):
    method = getattr(scores, name)
    assert set(methods.reads(method)) <= set(VOCABULARY)
    assert inspect.Parameter.empty not in methods.settings(method).values()
    assert name in BY_CHANCE | FROM_ELSEWHERE or re.search(
        r"arXiv \d{4}\.\d{5}|(ICLR|ICML|NeurIPS|CVPR) 20\d\d", method.__doc__
    )


@pytest.mark.parametrize("name", SHELF)
def test_one_double_an_image_and_never_nan(name, make_arrays):
    values = score(name, make_arrays())
    assert values.shape == (60,)
    assert values.dtype == np.float64
    assert not np.isnan(values).any()
    assert not (values == -np.inf).any()
    assert len(np.unique(values)) > 1


@pytest.mark.parametrize("name", SHELF)
def test_images_that_are_all_alike_score_alike(name, make_arrays):
    """Also where nothing moves and everything is certain: no 0/0."""
    for image in (0, 1):
        arrays = permuted(make_arrays(), np.full(9, image))
        for value in (None, 0.0, 1.0):
            if value is not None:
                arrays["p_label"] = np.full_like(arrays["p_label"], value)
            values = score(name, arrays)
            assert not np.isnan(values).any()
            assert name in BY_CHANCE | ONE_OF_TWINS or len(np.unique(values)) == 1


@pytest.mark.parametrize("name", sorted(set(SHELF) - BY_CHANCE))
def test_a_score_belongs_to_the_image_not_to_its_row(name, make_arrays):
    arrays = make_arrays()
    order = np.random.default_rng(1).permutation(60)
    assert np.array_equal(score(name, arrays)[order], score(name, permuted(arrays, order)))


@pytest.mark.parametrize("name", SHELF)
def test_the_signals_are_left_alone(name, make_arrays):
    arrays = make_arrays()
    signals = Signals(arrays, fingerprint="f")
    before = {name: array.copy() for name, array in signals.available().items()}
    methods.call(getattr(scores, name), signals.available(), {}, place=name)
    for key, array in before.items():
        assert np.array_equal(signals[key], array)


@pytest.mark.parametrize("name", sorted(set(SHELF) - BY_CHANCE))
def test_a_seed_counts_like_any_other(name, make_arrays):
    """The same proxy twice changes nothing, and the order of the seeds does not matter."""
    arrays = make_arrays(seeds=3)
    watched = [key for key, signal in VOCABULARY.items() if signal.dims[0] == "S"]
    doubled = {k: np.concatenate([v, v]) if k in watched else v for k, v in arrays.items()}
    turned = {k: v[::-1] if k in watched else v for k, v in arrays.items()}
    np.testing.assert_allclose(score(name, doubled), score(name, arrays), rtol=1e-12)
    np.testing.assert_allclose(score(name, turned), score(name, arrays), rtol=1e-12)


@pytest.mark.parametrize("name", sorted(set(SHELF) - BY_CHANCE - WHERE))
def test_higher_is_keep_first(name, odd_one):
    """An image that wavers between its class and others to the end is worth more than one learned at once, to every score."""
    values = score(name, odd_one("wavers"))
    assert np.argmax(values) == 7
    assert values[7] > np.delete(values, 7).max() + 0.01


@pytest.mark.parametrize("name", ["el2n", "forgetting", "aum", "loss"])
def test_the_never_learned_come_first_where_difficulty_is_measured(name, odd_one):
    assert np.argmax(score(name, odd_one("never learned"))) == 7


# -- oracles, image by image


def each(arrays, of):
    """``of(dict of (E,) arrays)`` averaged over seeds, for each image."""
    watched = [key for key, signal in VOCABULARY.items() if signal.dims == ("S", "E", "N")]
    seeds, _, images = arrays["loss"].shape
    signals = Signals(arrays, fingerprint="f")
    return np.array(
        [
            sum(of({k: signals[k][s, :, i].astype(float) for k in watched}) for s in range(seeds)) / seeds
            for i in range(images)
        ]
    )


def windows(p, length):
    return [p[start : start + length] for start in range(len(p) - length + 1)]


def spread(p):
    return (sum((x - sum(p) / len(p)) ** 2 for x in p) / (len(p) - 1)) ** 0.5


ORACLES = [
    ("el2n", {}, 7, lambda x: x["error_norm"][-1]),
    ("el2n", {}, 25, lambda x: x["error_norm"][19]),
    ("el2n", {"epoch": 3}, 7, lambda x: x["error_norm"][2]),
    ("el2n", {"epoch": 4, "window": 3}, 7, lambda x: sum(x["error_norm"][1:4]) / 3),
    ("el2n", {"epoch": 2, "window": 10}, 7, lambda x: sum(x["error_norm"][:2]) / 2),
    ("aum", {}, 7, lambda x: -sum(x["margin"]) / 7),
    ("aum", {"kind": "probability"}, 7, lambda x: -sum(x["p_label"] - x["p_other"]) / 7),
    ("loss", {}, 7, lambda x: x["loss"][-1]),
    ("loss", {"epochs": 3}, 7, lambda x: sum(x["loss"][-3:]) / 3),
    ("entropy", {}, 7, lambda x: x["entropy"][-1]),
    ("entropy", {"epochs": 99}, 7, lambda x: sum(x["entropy"]) / 7),
    ("margin", {}, 7, lambda x: -abs(x["p_label"][-1] - x["p_other"][-1])),
    ("least_confidence", {}, 7, lambda x: 1 - max(x["p_label"][-1], x["p_other"][-1])),
    ("dyn_unc", {"window": 3}, 7, lambda x: np.mean([spread(p) for p in windows(x["p_label"], 3)])),
    ("dyn_unc", {}, 13, lambda x: np.mean([spread(p) for p in windows(x["p_label"], 10)])),
    ("dual", {}, 7, lambda x: spread(x["p_label"]) * (1 - sum(x["p_label"]) / 7)),
    ("dual", {}, 13, lambda x: np.mean([spread(p) * (1 - np.mean(p)) for p in windows(x["p_label"], 10)])),
    ("dual", {"window": 2}, 2, lambda x: spread(x["p_label"]) * (1 - np.mean(x["p_label"]))),
]


@pytest.mark.parametrize(("name", "options", "epochs", "oracle"), ORACLES)
def test_agrees_with_the_oracle(name, options, epochs, oracle, make_arrays):
    arrays = make_arrays(epochs=epochs)
    np.testing.assert_allclose(score(name, arrays, **options), each(arrays, oracle), rtol=1e-5, atol=1e-7)


def forgetting_oracle(correct):
    def of(history):
        if True not in history:
            return len(history)
        return sum(before and not after for before, after in pairwise(history))

    seeds, _, images = correct.shape
    return [
        float("inf") if not correct[:, :, i].any() else sum(of(list(correct[s, :, i])) for s in range(seeds)) / seeds
        for i in range(images)
    ]


def test_forgetting_against_the_oracle():
    correct = np.random.default_rng(0).random((3, 5, 400)) < 0.3
    values = scores.forgetting(correct)
    assert values.tolist() == pytest.approx(forgetting_oracle(correct))
    assert np.isinf(values).any()
    assert np.isfinite(values).any()


def test_forgetting_by_hand():
    t, f = True, False
    histories = [[t, t, t, t], [f, t, t, t], [t, f, t, f], [f, f, f, f], [t, f, f, f], [f, f, f, t]]
    values = scores.forgetting(np.array([histories]).transpose(0, 2, 1))
    assert values.tolist() == [0, 0, 2, np.inf, 1, 0]
    assert scores.forgetting(np.array([[[t, f]]])).tolist() == [0, np.inf]  # one epoch: nothing to forget yet


def test_never_learned_in_one_proxy_of_two_is_above_any_that_both_learned():
    t, f = True, False
    often = [[t, f, t, f, t, f], [t, f, t, f, t, f]]
    once = [[f, f, f, f, f, f], [t, t, t, t, t, t]]
    never = [[f] * 6] * 2
    values = scores.forgetting(np.array([often, once, never]).transpose(1, 2, 0))
    assert values.tolist() == [3, 3, np.inf]
    often[0][5] = t
    assert scores.forgetting(np.array([often, once, never]).transpose(1, 2, 0)).tolist() == [2.5, 3, np.inf]


def test_margin_and_least_confidence_are_the_published_ones_where_the_label_is_among_the_first_two(make_arrays):
    arrays = make_arrays(images=200, epochs=1)
    p_label, p_other = arrays["p_label"], arrays["p_other"]
    top = np.maximum(p_label, p_other)
    np.testing.assert_allclose(score("least_confidence", arrays), 1 - top.mean(axis=(0, 1)), atol=1e-3)
    np.testing.assert_allclose(score("margin", arrays), -(2 * top - p_label - p_other).mean(axis=(0, 1)), atol=1e-3)


# -- how a prediction moves


def tdds_by_the_paper(p, window, decay):
    """Probabilities (E, C) of one image, window by window as the authors have it."""
    epochs = len(p)
    window = min(window, epochs)
    total = 0.0
    for k in range(epochs - window + 1):
        moves = [
            sum(abs(b * (np.log(b) - np.log(a))) for a, b in zip(p[j], p[j + 1], strict=True))
            for j in range(k, k + window - 1)
        ]
        mean = sum(moves) / (window - 1)
        total += sum((move - mean) ** 2 for move in moves) ** 0.5 * decay * (1 - decay) ** (epochs - window - k)
    return total


@pytest.mark.parametrize(("options", "epochs", "window", "decay"), [
    ({}, 12, 10, 0.9),
    ({"window": 4}, 12, 4, 0.9),
    ({"window": 4, "decay": 0.3, "epochs": 9}, 9, 4, 0.3),
    ({"window": 40}, 12, 12, 0.9),
])  # fmt: skip
def test_tdds_is_the_papers(options, epochs, window, decay, watch):
    logits = np.random.default_rng(0).normal(size=(2, 12, 20, 4))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    arrays = watch(logits, np.arange(20) % 4)
    expected = [np.mean([tdds_by_the_paper(p[s, :epochs, i], window, decay) for s in range(2)]) for i in range(20)]
    np.testing.assert_allclose(score("tdds", arrays, **options), expected, rtol=3e-3)  # half precision


# -- gradients and influence


def test_grand_is_the_norm_of_the_explicit_gradient(make_arrays):
    arrays = make_arrays(images=30, seeds=1)
    signals = Signals(arrays, fingerprint="f")
    features = np.c_[signals["embeddings"].astype(float), np.ones(30)]
    gradients = signals["errors"].astype(float)[:, :, None] * features[:, None, :]
    expected = np.sqrt((gradients**2).sum((1, 2)))
    np.testing.assert_allclose(score("grand", arrays), expected, rtol=2e-3)  # error_norm in half precision


def test_memorization_by_hand():
    run_in = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1]], bool)
    p = np.array([[0.9, 0.5, 1.0], [0.7, 0.5, 1.0], [0.2, 0.5, 0.0]])
    # in 0.9, 0.7, out 0.2;  in 0.5, 0.5, out 0.5;  in 1, 0, out 1
    np.testing.assert_allclose(scores.memorization(run_in, p), [0.6, 0.0, -0.5])


def test_memorization_refuses_what_it_cannot_tell():
    run_in = np.array([[1, 1, 0, 1], [0, 1, 0, 1]], bool)
    with pytest.raises(Refused, match=r"3 images, row 1 first.*2 runs"):
        scores.memorization(run_in, np.ones((2, 4)))


# -- where an image lies


def clusters(per=30, width=5, seed=0, spread=0.1):
    """Four classes around four directions."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), per)
    return labels, np.eye(4, width)[labels] * 5 + spread * rng.normal(size=(4 * per, width))


def test_moderate_keeps_the_middle_of_the_distances():
    labels, embeddings = clusters()
    values = scores.moderate(embeddings, labels)
    middle = np.array([np.median(embeddings[labels == c], axis=0) for c in range(4)])
    rank = np.argsort(np.argsort(np.linalg.norm(embeddings - middle[labels], axis=1)))
    for part in (0.2, 0.5, 0.8):
        kept = np.argsort(-values)[: int(part * 120)]
        expected = np.flatnonzero(np.abs((rank + 0.5) / 120 - 0.5) < part / 2)
        assert set(kept.tolist()) == set(expected.tolist())


def test_ssp_puts_the_far_first():
    labels, embeddings = clusters()
    embeddings[17] = [3, 3, 3, 3, 0]
    values = score("ssp", {"labels": labels, "embeddings": embeddings})
    assert np.argmax(values) == 17
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    means = np.array([unit[(labels == c) & (np.arange(120) != 17)].mean(0) for c in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    others = np.delete(np.arange(120), [*range(30)])  # 17 moved the center of the first
    np.testing.assert_allclose(values[others], 1 - (unit @ means.T).max(1)[others], atol=1e-3)


def test_ssp_of_one_prototype_is_the_cosine_to_the_mean():
    embeddings = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float16) + np.float16(0.5)
    unit = embeddings.astype(float) / np.linalg.norm(embeddings.astype(float), axis=1, keepdims=True)
    mean = unit.mean(0)
    values = score("ssp", {"labels": np.arange(50) % 5, "embeddings": embeddings}, clusters=1)
    np.testing.assert_allclose(values, 1 - unit @ mean / np.linalg.norm(mean), atol=1e-5)


def cal_by_the_paper(p, embeddings, k):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = []
    for i in range(len(p)):
        near = np.argsort(-(unit @ unit[i]))
        near = near[near != i][:k]
        found.append(np.mean([(p[j] * np.log(p[j] / p[i])).sum() for j in near]))
    return np.array(found)


def test_cal_is_the_papers_and_puts_the_highest_divergence_first():
    labels, embeddings = clusters(spread=0.5)
    p = np.random.default_rng(1).dirichlet(np.ones(4) * 5, 120)
    p[50] = [0.001, 0.001, 0.001, 0.997]
    arrays = {"labels": labels, "embeddings": embeddings, "errors": p - np.eye(4)[labels]}
    values = score("cal", arrays, neighbors=7)
    expected = cal_by_the_paper(p, embeddings.astype(np.float16).astype(float), 7)
    np.testing.assert_allclose(values, expected, rtol=0.02, atol=2e-3)
    assert np.argmax(values) == 50


def test_zcore_puts_the_lonely_before_the_crowded():
    rng = np.random.default_rng(0)
    crowd, lonely = rng.normal(size=(200, 4)) * 0.05, rng.uniform(-2, 2, (40, 4))
    values = score("zcore", {"labels": np.zeros(240, int), "embeddings": np.r_[crowd, lonely]})
    assert values.min() == 0
    assert values.max() == 1
    assert np.median(values[200:]) > np.median(values[:200])
    assert (np.argsort(-values)[:30] >= 200).mean() > 0.8


def test_zcore_agrees_with_every_neighbor_looked_at():
    """64 of them are as good as all; and the draws of the authors' code, one by one over all images, give the same ranking."""
    embeddings = np.random.default_rng(0).normal(size=(300, 3))
    arrays = {"labels": np.zeros(300, int), "embeddings": embeddings}
    fast = score("zcore", arrays, draws=20_000, subspaces=50)
    full = score("zcore", arrays, draws=20_000, subspaces=50, neighbors=299)
    assert np.corrcoef(fast, full)[0, 1] > 0.998
    rng = np.random.default_rng(1)
    slow = np.zeros(300)
    x = embeddings.astype(np.float16).astype(float)
    for _ in range(12_000):
        dims = rng.choice(3, 2, replace=False)
        plane = x[:, dims]
        point = rng.triangular(plane.min(0), np.median(plane, 0), plane.max(0))
        hit = np.abs(plane - point).sum(1).argmin()
        slow[hit] += 1
        away = np.abs(plane - plane[hit]).sum(1)
        away[hit] = np.inf
        slow -= away**-4.0 / (away**-4.0).sum()
    assert np.corrcoef(fast, slow)[0, 1] > 0.93


@pytest.mark.parametrize("exponent", [0.0, 1.0, 4.0])
def test_zcore_draws_from_triangles_and_weighs_by_the_exponent(exponent):
    """Beside the expectation, by numerical integration: where values are skewed, the median is far from the mean."""
    x = (np.random.default_rng(0).random((60, 2)) ** 4).astype(np.float16).astype(float)
    values = score(
        "zcore",
        {"labels": np.zeros(60, int), "embeddings": x},
        draws=40_000,
        subspaces=20,
        neighbors=59,
        exponent=exponent,
    )
    at = (np.arange(120) + 0.5) / 120
    grid = [scipy.stats.triang.ppf(at, (np.median(v) - v.min()) / np.ptp(v), v.min(), np.ptp(v)) for v in x.T]
    points = np.stack(np.meshgrid(*grid), -1).reshape(-1, 2)
    hits = np.bincount(np.abs(points[:, None] - x).sum(2).argmin(1), minlength=60) / len(points)
    apart = np.abs(x[:, None] - x).sum(2)
    np.fill_diagonal(apart, np.inf)
    share = np.maximum(apart, 1e-12) ** -exponent * (apart < np.inf)
    expected = hits - hits @ (share / share.sum(1, keepdims=True))
    expected = (expected - expected.min()) / np.ptp(expected)
    np.testing.assert_allclose(values, expected, atol=0.04)


def test_zcore_leaves_one_of_two_twins():
    embeddings = np.random.default_rng(0).normal(size=(80, 3))
    embeddings[11] = embeddings[60]
    values = score("zcore", {"labels": np.zeros(80, int), "embeddings": embeddings}, draws=4_000)
    assert min(values[11], values[60]) == 0
    assert max(values[11], values[60]) > 0.15


def test_what_is_given_stays_as_it_is():
    values = np.array([0.1, np.finfo(float).max, -3.0])
    assert score("given", {"labels": np.zeros(3, int), "given": values}).tolist() == [0.1, np.inf, -3.0]


def test_random_follows_its_seed_and_nothing_else():
    labels = np.zeros(1000, int)
    values = scores.random(labels, seed=3)
    assert np.array_equal(values, scores.random(labels + 1, seed=3))
    assert not np.array_equal(values, scores.random(labels, seed=4))
    assert len(np.unique(values)) == 1000
    assert 0.45 < values.mean() < 0.55


# -- refusals


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("el2n", {"epoch": 0}, r"el2n\(epoch=0\): a whole number of at least 1"),
        ("el2n", {"epoch": "ten"}, "epoch='ten'"),
        ("el2n", {"window": 0}, "window=0"),
        ("el2n", {"window": True}, "window=True"),
        ("loss", {"epochs": -1}, "epochs=-1"),
        ("entropy", {"epochs": 1.5}, "epochs=1.5"),
        ("margin", {"epochs": 0}, "epochs=0"),
        ("least_confidence", {"epochs": 0}, "epochs=0"),
        ("dual", {"window": 1}, "window=1"),
        ("dyn_unc", {"window": 1}, "window=1"),
        ("tdds", {"window": 2}, "window=2"),
        ("tdds", {"epochs": 2}, "epochs=2"),
        ("tdds", {"decay": 1}, "decay=1"),
        ("ssp", {"clusters": 0}, "clusters=0"),
        ("cal", {"neighbors": 0}, "neighbors=0"),
        ("zcore", {"draws": 0}, "draws=0"),
        ("zcore", {"exponent": -1}, "exponent=-1"),
        ("aum", {"kind": "logits"}, "kind: there is no 'logits'. Did you mean 'logit'"),
    ],
)
def test_bad_settings_are_refused(name, options, match, make_arrays):
    with pytest.raises(Refused, match=match):
        score(name, make_arrays(), **options)


@pytest.mark.parametrize("name", ["dual", "dyn_unc"])
def test_one_epoch_does_not_move(name, make_arrays):
    with pytest.raises(Refused, match="Watch two epochs"):
        score(name, make_arrays(epochs=1))


def test_two_epochs_move_once():
    with pytest.raises(Refused, match="Watch three epochs"):
        scores.tdds(np.zeros((1, 2, 5)))
