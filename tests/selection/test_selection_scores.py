"""Every score against an oracle written image by image, and the laws that hold for the whole shelf."""

import inspect
from itertools import pairwise

import numpy as np
import pytest

from selection import methods, scores
from selection.errors import Refused
from selection.signals import VOCABULARY, Signals

SHELF = methods.names(scores)
BY_CHANCE = {"random"}  # says nothing of an image


def score(name, arrays, **options):
    signals = Signals(arrays, fingerprint="f")
    return methods.call(getattr(scores, name), signals.available(), options, place=name)


def permuted(arrays, order):
    return {name: np.take(array, order, axis=VOCABULARY[name].dims.index("N")) for name, array in arrays.items()}


# -- laws


def test_the_shelf_is_what_we_think():
    known = {"random", "el2n", "forgetting", "aum", "loss", "entropy", "margin", "least_confidence", "dual", "dyn_unc"}
    assert known <= set(SHELF)


@pytest.mark.parametrize("name", SHELF)
def test_reads_the_vocabulary_and_cites_its_source(name):
    method = getattr(scores, name)
    assert set(methods.reads(method)) <= set(VOCABULARY)
    assert inspect.Parameter.empty not in methods.settings(method).values()
    assert name in BY_CHANCE or "arXiv" in method.__doc__


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
            assert name in BY_CHANCE or len(np.unique(values)) == 1


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
    """The same probe twice changes nothing, and the order of the seeds does not matter."""
    arrays = make_arrays(seeds=3)
    watched = [key for key, signal in VOCABULARY.items() if signal.dims[0] == "S"]
    doubled = {k: np.concatenate([v, v]) if k in watched else v for k, v in arrays.items()}
    turned = {k: v[::-1] if k in watched else v for k, v in arrays.items()}
    np.testing.assert_allclose(score(name, doubled), score(name, arrays), rtol=1e-12)
    np.testing.assert_allclose(score(name, turned), score(name, arrays), rtol=1e-12)


@pytest.mark.parametrize("name", sorted(set(SHELF) - BY_CHANCE))
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


def test_never_learned_in_one_probe_of_two_is_above_any_that_both_learned():
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
        ("aum", {"kind": "logits"}, "kind='logits'.*'logit' or 'probability'"),
    ],
)
def test_bad_settings_are_refused(name, options, match, make_arrays):
    with pytest.raises(Refused, match=match):
        score(name, make_arrays(), **options)


@pytest.mark.parametrize("name", ["dual", "dyn_unc"])
def test_one_epoch_does_not_move(name, make_arrays):
    with pytest.raises(Refused, match=r"score\.epochs=2"):
        score(name, make_arrays(epochs=1))
