"""The lottery as a whole: laws over every score with every picker, exact budgets and quotas, refusals, imports."""

import math
import subprocess
import sys
from fractions import Fraction
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from few import few
from hypothesis import given, settings
from hypothesis import strategies as st

from selection import Refused, Signals, Subset, choose, methods, pickers, scores, select
from selection.lottery import quotas
from selection.signals import VOCABULARY

SCORES, PICKERS = methods.names(scores), methods.names(pickers)
# Every score with a picker of each kind, and every picker with a score that is finite and one that may not be. (A draw in
# proportion to the score takes no negative ones.)
PAIRS = sorted(
    {(s, p) for s in SCORES for p in ("top_k", "ccs", "d2")} | {(s, p) for s in ("el2n", "forgetting") for p in PICKERS}
)
EACH_ONCE = {(score, "top_k") for score in SCORES} | {("el2n", pick) for pick in PICKERS}
"""Every score and every picker; all pairs go through the whole suite."""


@pytest.fixture(scope="module")
def signals(make_arrays):
    return Signals(make_arrays(images=90, classes=5), fingerprint="data-1", classes=list("abcde"))


def shelf(**functions):
    module = ModuleType("mine")
    for name, function in functions.items():
        function.__module__ = "mine"
        setattr(module, name, function)
    return module


def lopsided(images=100):
    """Labels with classes of very different sizes: 1, 2, 4, 13 and the rest."""
    labels = np.repeat([0, 1, 2, 3], [1, 2, 4, 13])
    return np.random.default_rng(0).permutation(np.r_[labels, np.full(images - len(labels), 4)])


# -- laws


@pytest.mark.parametrize(
    ("score", "pick", "balance"),
    few(
        [(*pair, balance) for pair in PAIRS for balance in (True, False)],
        lambda one: one[:2] in EACH_ONCE and (one[2] or one[0] == "el2n"),
    ),
)
def test_budget_quotas_and_repetition(signals, score, pick, balance):
    for keep in (0.1, 0.37, 0.72, 1.0):
        lottery = select(signals, score=score, pick=pick, keep=keep, balance=balance, seed=3)
        ticket = lottery.subset
        assert isinstance(ticket, Subset)
        assert len(ticket) == round(keep * 90)
        assert (ticket.total, ticket.fingerprint, ticket.keep) == (90, "data-1", keep)
        assert ticket.weights.mean() == pytest.approx(1)
        again = select(signals, score=score, pick=pick, keep=keep, balance=balance, seed=3)
        assert np.array_equal(again.subset.rows, ticket.rows)
        assert np.array_equal(again.scores, lottery.scores)
        if balance:
            sizes = np.bincount(signals["labels"])
            kept = np.bincount(signals["labels"][ticket.rows], minlength=5)
            assert (np.abs(kept - sizes * len(ticket) / 90) < 1).all()


WITHOUT_CHANCE = [
    (score, pick, balance)
    for score in SCORES
    if "seed" not in methods.settings(getattr(scores, score))
    for pick in PICKERS
    if "rng" not in methods.reads(getattr(pickers, pick))
    for balance in (True, False)
]


@pytest.mark.parametrize(
    ("score", "pick", "balance"),
    few(WITHOUT_CHANCE, lambda one: one[:2] in EACH_ONCE and (one[2] or one[0] == "el2n")),
)
def test_the_same_images_in_any_order(make_arrays, score, pick, balance):
    """What has no chance in it chooses images, not rows; of images that tie, as many."""
    arrays = make_arrays(images=80, classes=4)
    order = np.random.default_rng(1).permutation(80)
    turned = {name: np.take(array, order, axis=VOCABULARY[name].dims.index("N")) for name, array in arrays.items()}
    keep = 0.5
    here: Any = select(Signals(arrays, fingerprint="f"), score=score, pick=pick, keep=keep, balance=balance)
    there: Any = select(Signals(turned, fingerprint="f"), score=score, pick=pick, keep=keep, balance=balance)
    assert np.array_equal(here.scores[order], there.scores)
    kept_here, kept_there = here.subset.rows, order[there.subset.rows]
    if pick == "window" and len(np.unique(here.scores)) < 80:
        return  # how ties are broken moves what is in a window, and so which is best
    assert sorted(here.scores[kept_here]) == sorted(here.scores[kept_there])
    values, counts = np.unique(here.scores, return_counts=True)
    alone = np.flatnonzero(np.isin(here.scores, values[counts == 1]))
    assert set(kept_here) & set(alone) == set(kept_there) & set(alone)
    assert len(alone) > 60 or score in ("forgetting", "moderate")  # which count


@pytest.mark.parametrize(("score", "pick"), few(PAIRS, EACH_ONCE))
def test_one_class_one_image_and_all_alike(make_arrays, score, pick):
    arrays = make_arrays(images=12, classes=3)
    for rows in ([0] * 12, [0], [1, 1]):
        alike = Signals(
            {name: np.take(a, rows, axis=VOCABULARY[name].dims.index("N")) for name, a in arrays.items()},
            fingerprint="f",
        )
        for balance in (True, False):
            ticket = select(alike, score=score, pick=pick, keep=0.5 if len(rows) > 1 else 1.0, balance=balance).subset
            assert len(ticket) == max(1, len(rows) // 2)


@pytest.mark.parametrize("pick", PICKERS)
@pytest.mark.parametrize("balance", [True, False])
def test_infinite_scores_are_taken_in_stride(make_arrays, pick, balance):
    arrays = make_arrays(images=60, classes=3)
    arrays["correct"] = np.zeros_like(arrays["correct"])
    arrays["correct"][:, 2:4, ::3] = True  # two images of three were never learned
    lottery: Any = select(Signals(arrays, fingerprint="f"), score="forgetting", pick=pick, keep=0.4, balance=balance)
    assert np.isinf(lottery.scores).sum() == 40
    assert len(lottery.subset) == 24
    if pick == "top_k" and not balance:
        assert np.isinf(lottery.scores[lottery.subset.rows]).all()


@pytest.mark.parametrize("pick", PICKERS)
def test_keep_1_is_everything_at_weight_1(signals, pick):
    ticket = select(signals, score="el2n", pick=pick, keep=1).subset
    assert ticket.rows.tolist() == list(range(90))
    assert ticket.weights.tolist() == [1] * 90


def test_another_seed_is_another_draw(signals):
    def rows(seed, score="el2n", pick="random"):
        return select(signals, score=score, pick=pick, keep=0.4, seed=seed).subset.rows.tolist()

    assert rows(0) != rows(1)
    assert rows(0, "random", "top_k") != rows(1, "random", "top_k")
    assert rows(0, {"name": "random", "seed": 9}, "top_k") == rows(1, {"name": "random", "seed": 9}, "top_k")
    assert rows(0, "el2n", "top_k") == rows(1, "el2n", "top_k")  # no ties, no chance


def test_ties_are_broken_by_the_seed_not_by_the_row():
    tied = Signals({"labels": np.zeros(100, int), "correct": np.ones((1, 3, 100), bool)}, fingerprint="f")

    def rows(seed):
        return select(tied, score="forgetting", pick="top_k", keep=0.5, seed=seed).subset.rows

    assert np.array_equal(rows(0), rows(0))
    assert not np.array_equal(rows(0), rows(1))
    assert 10 < (rows(0) < 50).sum() < 40


def test_top_k_keeps_the_best_of_each_class(signals):
    lottery: Any = select(signals, score="loss", pick="top_k", keep=0.5)
    values, kept = lottery.scores, set(lottery.subset.rows.tolist())
    for c in range(5):
        inside = [values[i] for i in range(90) if signals["labels"][i] == c and i in kept]
        outside = [values[i] for i in range(90) if signals["labels"][i] == c and i not in kept]
        assert min(inside) >= max(outside)


def test_pickers_see_their_own_class_only(signals):
    seen = []

    def looks(scores, labels, embeddings, p_label, budget, keep, rng):
        seen.append((scores, labels, embeddings, p_label, keep))
        return np.arange(budget)

    select(signals, score="loss", pick="looks", keep=0.3, shelves=[shelf(looks=looks)])
    expected = scores.loss(signals["loss"])
    assert len(seen) == 5
    for values, labels, embeddings, p_label, keep in seen:
        rows = np.flatnonzero(signals["labels"] == labels[0])
        assert np.array_equal(labels, signals["labels"][rows])
        assert np.array_equal(values, expected[rows])
        assert np.array_equal(embeddings, signals["embeddings"][rows])
        assert np.array_equal(p_label, signals["p_label"][:, :, rows])
        assert keep == 0.3


def test_weights_of_a_picker_reach_their_images_with_mean_1(signals):
    def weighs(scores, budget):
        rows = np.argsort(scores)[:budget]
        return rows, scores[rows] * 1000

    lottery: Any = select(signals, score="loss", pick="weighs", keep=0.4, shelves=[shelf(weighs=weighs)])
    kept = lottery.scores[lottery.subset.rows]
    np.testing.assert_allclose(lottery.subset.weights, kept / kept.mean(), rtol=1e-5)


# -- floors of classes


@pytest.mark.parametrize(
    ("pick", "floor"),
    few(
        [(pick, floor) for pick in PICKERS for floor in (0.3, 0.8, 1.0)], lambda one: one[1] == 0.8 or one[0] == "top_k"
    ),
)
def test_no_class_falls_below_its_floor(make_arrays, pick, floor):
    """Of what balance would give it; the budget is the budget. Classes of 3 to 60 images, the smallest of them easy and alike."""
    labels = np.repeat(np.arange(5), [3, 8, 15, 34, 60])
    arrays = make_arrays(images=120, classes=5)
    arrays = {
        **{name: array for name, array in arrays.items() if name not in ("run_in", "run_p_label")},
        "labels": labels,
    }
    arrays["error_norm"] = arrays["error_norm"] * (0.3 + 0.1 * labels)
    ours = Signals(arrays, fingerprint="f")
    for keep in (0.1, 0.45, 0.9):
        ticket = select(ours, score="el2n", pick=pick, keep=keep, balance=False, floor=floor).subset
        share = np.bincount(labels[select(ours, score="el2n", pick=pick, keep=keep).subset.rows], minlength=5)
        kept = np.bincount(labels[ticket.rows], minlength=5)
        assert kept.sum() == round(keep * 120)
        assert (kept >= np.ceil(floor * share - 1e-9)).all()
        if floor == 1:
            assert kept.tolist() == share.tolist()
        free = select(ours, score="el2n", pick=pick, keep=keep, balance=False).subset
        if (np.bincount(labels[free.rows], minlength=5) >= np.ceil(floor * share - 1e-9)).all():
            assert np.array_equal(ticket.rows, free.rows)  # a floor that nobody is below changes nothing


def test_a_floor_gives_the_best_of_a_class_and_the_rest_to_the_best_of_all():
    """Top 20 of 100: all of class 1, whose images score highest. Half of a fair share of 10 for class 0: its 5 best."""
    loss = np.r_[np.arange(50.0), np.arange(100.0, 150)].reshape(1, 1, 100) / 100
    ours = Signals({"labels": np.repeat([0, 1], 50), "loss": loss}, fingerprint="f")
    ticket = select(ours, score="loss", pick="top_k", keep=0.2, balance=False, floor=0.5).subset
    assert ticket.rows.tolist() == [*range(45, 50), *range(85, 100)]
    assert ticket.origin["floor"] == 0.5


def test_classes_that_sink_only_when_others_were_raised_are_raised_too():
    """Top 30 of 100: 18 of class 2, then 12 of class 1, which pays first for what class 0 is to have."""
    loss = np.r_[np.full(40, 0.1), np.full(30, 0.5), np.full(18, 0.9), np.full(12, 0.05)].reshape(1, 1, 100)
    ours = Signals({"labels": np.repeat([0, 1, 2], [40, 30, 30]), "loss": loss}, fingerprint="f")
    for floor, expected in ((0.5, [6, 6, 18]), (0.7, [9, 7, 14]), (1.0, [12, 9, 9])):
        rows = select(ours, score="loss", pick="top_k", keep=0.3, balance=False, floor=floor).subset.rows
        assert np.bincount(ours["labels"][rows]).tolist() == expected


@pytest.mark.parametrize("floor", [0, -0.5, 1.5, True, "half", float("nan")])
def test_a_floor_that_is_none(signals, floor):
    with pytest.raises(Refused, match=r"^select\.floor: .* is no fraction in \(0, 1\]"):
        select(signals, score="el2n", pick="ccs", keep=0.5, balance=False, floor=floor)


def test_floors_are_for_classes_that_are_not_balanced(signals):
    with pytest.raises(Refused, match=r"^select\.floor: .*select\.balance=false"):
        select(signals, score="el2n", pick="ccs", keep=0.5, floor=0.5)
    with pytest.raises(Refused, match=r"fewer than the 5 classes"):
        select(signals, score="el2n", pick="ccs", keep=0.03, balance=False, floor=0.5)


# -- a ticket to start from


@pytest.mark.parametrize("pick", PICKERS)
@pytest.mark.parametrize("balance", [True, False])
def test_a_ticket_is_added_to(signals, pick, balance):
    """By every picker: all rows of the ticket stay, the budget and the quotas are exact."""
    labels = signals["labels"]
    for first_pick, first_keep in ((pick, 0.2), ("random", 0.5)):
        first = select(signals, score="el2n", pick=first_pick, keep=first_keep, balance=balance).subset
        more = select(signals, score="el2n", pick=pick, keep=0.5, balance=balance, start=first).subset
        assert len(more) == 45
        assert set(first.rows.tolist()) <= set(more.rows.tolist())
        assert more.origin["start"] == first.origin
        if balance:
            fresh = select(signals, score="el2n", pick=pick, keep=0.5).subset
            assert np.bincount(labels[more.rows]).tolist() == np.bincount(labels[fresh.rows]).tolist()
    first = select(signals, score="el2n", pick=pick, keep=0.2, balance=balance).subset
    more = select(signals, score="el2n", pick=pick, keep=0.5, balance=balance, start=first).subset
    if pick == "k_center":  # without chance, the longer way is the same way
        assert np.array_equal(
            more.rows, select(signals, score="el2n", pick=pick, keep=0.5, balance=balance).subset.rows
        )


def test_what_a_ticket_adds_to_weighs_one_image_each(signals):
    first = select(signals, score="el2n", pick="random", keep=0.2).subset
    assert (select(signals, score="el2n", pick="ccs", keep=0.5, start=first).subset.weights == 1).all()
    more = select(signals, score="el2n", pick="grad_match", keep=0.5, start=first).subset
    old = np.isin(more.rows, first.rows)
    assert np.ptp(more.weights[~old]) > 0
    # All weights are divided by their mean, and so those of the others are what grad_match gave them once the old ones are 1.
    one = more.weights[old][0]
    assert (more.weights[old] == one).all()
    others, labels = np.setdiff1d(np.arange(signals.images), first.rows), signals["labels"]
    for of in np.unique(labels):
        new = more.weights[~old & (labels[more.rows] == of)] / one
        count = (labels[others] == of).sum()
        assert 0.3 * count < new.sum() < 1.5 * count  # they stand for the images of their class that were not in yet


def test_a_ticket_that_cannot_be_added_to(signals):
    random_half = select(signals, score="el2n", pick="random", keep=0.5).subset
    for pick in ("top_k", "window"):
        with pytest.raises(Refused, match=r"start: .*\d+ of \d+ images \(class 0.*Keep more"):
            select(signals, score="el2n", pick=pick, keep=0.3, start=random_half)
    lopped = Subset(
        np.flatnonzero(signals["labels"] == 0), 90, fingerprint="data-1"
    )  # all of a class: too many for its quota
    with pytest.raises(Refused, match=r"start: it has \d+ of \d+ images"):
        select(signals, score="el2n", pick="window", keep=0.6, start=lopped)
    with pytest.raises(Refused, match=r"start: .*\d+ of \d+ images \(class 0.*Keep more"):
        select(signals, score="el2n", pick="k_center", keep=0.3, start=random_half)
    with pytest.raises(Refused, match=r"start: .*data-2"):
        select(signals, score="el2n", pick="k_center", keep=0.6, start=Subset([1], 90, fingerprint="data-2"))

    def forgets(scores, budget, start):
        return np.r_[np.setdiff1d(np.arange(len(scores)), start), start][:budget]

    with pytest.raises(Refused, match=r"\d+ rows that it started from"):
        select(signals, score="el2n", pick="forgets", keep=0.6, start=random_half, shelves=[shelf(forgets=forgets)])


def test_who_adds_to_no_ticket_draws_from_what_is_not_in(signals):
    """The highest of the others; and a ticket's rows stand for themselves, which grad_match's own weights know nothing of."""
    loss = scores.loss(signals["loss"])
    first = Subset(np.argsort(loss)[:10], 90, fingerprint="data-1")  # the lowest ten
    more = select(signals, score="loss", pick="top_k", keep=0.5, balance=False, start=first).subset
    assert set(more.rows.tolist()) == set(np.argsort(loss)[:10].tolist()) | set(np.argsort(loss)[-35:].tolist())
    matched = select(signals, score="loss", pick="grad_match", keep=0.5, balance=False, start=first).subset
    at = np.isin(matched.rows, first.rows)
    assert len(np.unique(matched.weights[at])) == 1
    assert len(np.unique(matched.weights[~at])) > 5


# -- quotas


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
@settings(deadline=None)
def test_quotas_are_exact(sizes, data):
    budget = data.draw(st.integers(len(sizes), sum(sizes)))
    shares = quotas(sizes, budget, np.random.default_rng(data.draw(st.integers(0, 3)))).tolist()
    assert sum(shares) == budget
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
    ideal = [Fraction(size * budget, sum(sizes)) for size in sizes]
    if min(ideal) >= 1:  # largest remainder: nobody with a smaller remainder was rounded up before one with a larger
        assert all(math.floor(q) <= share <= math.ceil(q) for q, share in zip(ideal, shares, strict=True))
        up = [q - math.floor(q) for q, share in zip(ideal, shares, strict=True) if share > math.floor(q)]
        down = [
            q - math.floor(q) for q, share in zip(ideal, shares, strict=True) if share == math.floor(q) and q != share
        ]
        assert not up or not down or min(up) >= max(down)


def test_quotas_by_hand():
    rng = np.random.default_rng(0)
    assert quotas([50, 30, 20], 10, rng).tolist() == [5, 3, 2]
    assert quotas([53, 28, 19], 10, rng).tolist() == [5, 3, 2]  # 5.3, 2.8, 1.9
    assert quotas([97, 1, 1, 1], 10, rng).tolist() == [7, 1, 1, 1]  # one each comes first, the large class pays
    assert quotas([1, 1, 1], 3, rng).tolist() == [1, 1, 1]
    assert quotas([3, 5], 8, rng).tolist() == [3, 5]


def test_equal_classes_take_turns():
    """Three classes and a budget of 4: who has two is chance, not the first."""
    favored = [int(np.argmax(quotas([10, 10, 10], 4, np.random.default_rng(seed)))) for seed in range(60)]
    assert set(favored) == {0, 1, 2}


@pytest.mark.parametrize("pick", PICKERS)
def test_every_class_keeps_an_image(pick):
    labels = lopsided()
    rng = np.random.default_rng(0)
    arrays = {"labels": labels, "p_label": rng.random((1, 3, 100)), "loss": rng.random((1, 3, 100))}
    arrays |= {"embeddings": rng.random((100, 4)), "errors": rng.dirichlet(np.ones(5), 100) - np.eye(5)[labels]}
    ticket = select(Signals(arrays, fingerprint="f"), score="loss", pick=pick, keep=0.1).subset
    assert np.bincount(labels[ticket.rows]).tolist() == [1, 1, 1, 1, 6]


def test_without_balance_classes_may_vanish():
    labels = np.repeat([0, 1], 50)
    loss = np.r_[np.zeros(50), np.ones(50)].reshape(1, 1, 100)
    signals = Signals({"labels": labels, "loss": loss}, fingerprint="f")
    assert select(signals, score="loss", pick="top_k", keep=0.5, balance=False).subset.rows.tolist() == list(
        range(50, 100)
    )
    both = select(signals, score="loss", pick="top_k", keep=0.5, balance=True).subset.rows
    assert np.bincount(labels[both]).tolist() == [25, 25]


# -- what is said, and what is kept of it


def test_a_choice_is_a_name_a_mapping_or_an_object(signals):
    plain = select(signals, score={"name": "el2n", "epoch": 3}, pick={"name": "ccs", "bins": 7}, keep=0.5)
    named = select(
        signals,
        score=SimpleNamespace(name="el2n", options={"epoch": 3}),
        pick=SimpleNamespace(name="ccs", options={"bins": 7}),
        keep=0.5,
    )
    assert np.array_equal(plain.subset.rows, named.subset.rows)
    assert plain.subset.origin == named.subset.origin
    assert plain.subset.origin == {
        "score": {"name": "el2n", "epoch": 3, "window": 1},
        "pick": {"name": "ccs", "cut": None, "bins": 7, "binning": "width"},
        "balance": True,
        "seed": 0,
    }


def test_the_origin_holds_the_seed_that_was_used(signals):
    assert select(signals, score="random", pick="random", keep=0.5, seed=7).subset.origin["score"] == {
        "name": "random",
        "seed": 7,
    }


def test_the_origin_holds_the_epochs_that_were_read(signals):
    origin = select(signals, score="el2n", pick="random", keep=0.5).subset.origin
    assert origin["score"] == {"name": "el2n", "epoch": signals.epochs, "window": 1}, (
        "the proxy was shorter than 20 epochs"
    )


def test_labels_alone_will_do_where_nothing_else_is_read():
    labels_only = Signals({"labels": lopsided()}, fingerprint="f")
    assert len(select(labels_only, score="random", pick="top_k", keep=0.5).subset) == 50
    unscored = select(labels_only, score="el2n", pick="random", keep=0.5)
    assert unscored.scores is None
    assert len(unscored.subset) == 50
    assert select(labels_only, score="el2n", pick="ccs", keep=1.0).scores is None
    with pytest.raises(Refused, match=r"^select\.score: .*error_norm.*Here: labels\.$"):
        select(labels_only, score="el2n", pick="ccs", keep=0.5)
    with pytest.raises(Refused, match=r"^select\.pick: .*p_label.*Here: .*ranking"):
        select(labels_only, score="random", pick="beta", keep=0.5)


def test_a_shelf_of_the_users_own_wins(signals):
    def loss(labels):
        return np.arange(len(labels), dtype=np.float32)

    lottery = select(signals, score="loss", pick="top_k", keep=0.5, balance=False, shelves=iter([shelf(loss=loss)]))
    assert lottery.subset.rows.tolist() == list(range(45, 90))
    assert lottery.scores.dtype == np.float64


def test_choose_finds_both_methods_on_a_shelf_given_as_an_iterator():
    def mine(labels): ...
    def own(scores, budget): ...

    assert choose(score="mine", pick="own", keep=0.5, shelves=iter([shelf(mine=mine, own=own)])) == []


def test_hardest_first_is_warned_of_where_it_collapses(signals):
    (sentence,) = choose(score="forgetting", pick="top_k", keep=0.3)
    assert "forgetting" in sentence
    assert "30%" in sentence
    assert "ccs" in sentence
    assert choose(score="forgetting", pick="top_k", keep=0.5) == []
    assert choose(score="random", pick="top_k", keep=0.1) == []
    assert choose(score="forgetting", pick="ccs", keep=0.1) == []
    assert select(signals, score="loss", pick="top_k", keep=0.3).warnings == tuple(
        choose(score="loss", pick="top_k", keep=0.3)
    )
    assert select(signals, score="loss", pick="ccs", keep=0.3).warnings == ()


# -- refusals


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, "half", None, True, float("nan"), float("inf")])
def test_a_keep_that_is_no_part(signals, keep):
    for call in (choose, lambda **kw: select(signals, **kw)):
        with pytest.raises(Refused, match=r"^select\.keep: .* is no fraction in \(0, 1\]"):
            call(score="el2n", pick="ccs", keep=keep)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"score": "el2m"}, r"^select\.score: there is no 'el2m'\. Did you mean 'el2n'\?"),
        ({"pick": "css"}, r"^select\.pick: there is no 'css'\. Did you mean 'ccs'\?"),
        ({"score": {"name": "el2n", "epochs": 3}}, r"^select\.score\.epochs: .*Did you mean 'epoch'\?"),
        ({"pick": {"name": "ccs", "bin": 3}}, r"^select\.pick\.bin: .*Did you mean 'bins'\?"),
        ({"pick": {"name": "ccs", "budget": 3}}, r"^select\.pick\.budget: 'ccs' has no such setting"),
        ({"pick": {"bins": 3}}, r"^select\.pick: expected a name"),
        ({"score": 3}, r"^select\.score: expected a name"),
    ],
)
def test_a_choice_that_is_not_there(signals, changes, match):
    wanted = {"score": "el2n", "pick": "ccs", "keep": 0.5, **changes}
    for call in (choose, lambda **kw: select(signals, **kw)):
        with pytest.raises(Refused, match=match):
            call(**wanted)


def test_a_budget_too_small_names_the_smallest_that_is_not(signals):
    with pytest.raises(Refused, match=r"0\.001 of 90 images .*0\.011\.$"):
        select(signals, score="el2n", pick="ccs", keep=0.001)
    with pytest.raises(
        Refused,
        match=r"3 of 90 .*0\.056.*select\.balance=false",
    ):
        select(signals, score="el2n", pick="ccs", keep=0.03)
    assert len(select(signals, score="el2n", pick="ccs", keep=0.056).subset) == 5
    assert len(select(signals, score="el2n", pick="ccs", keep=0.03, balance=False).subset) == 3


@pytest.mark.parametrize("seed", [-1, 1.5, "x", None, True])
def test_a_seed_that_is_none(signals, seed):
    with pytest.raises(Refused, match=r"^seed: "):
        select(signals, score="el2n", pick="ccs", keep=0.5, seed=seed)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (lambda n: np.full(n, np.nan), r"select\.score \(mine\): nan for 90 images, the first is row 0"),
        (lambda n: np.r_[np.zeros(n - 1), -np.inf], r"-inf for 1 images, the first is row 89"),
        (lambda n: np.zeros(n - 1), r"90 numbers, one an image, and gave float64 \(89,\)"),
        (lambda n: np.zeros(n, complex), "complex"),
        (lambda n: None, "object"),
    ],
)
def test_a_score_that_is_none(signals, values, match):
    def mine(labels):
        return values(len(labels))

    with pytest.raises(Refused, match=match):
        select(signals, score="mine", pick="top_k", keep=0.5, shelves=[shelf(mine=mine)])


@pytest.mark.parametrize(
    ("taken", "match"),
    [
        (lambda k, n: np.arange(k - 1), r"select\.pick \(mine\): was to return 45 distinct rows, and gave 44"),
        (lambda k, n: np.zeros(k, int), "45 distinct rows, and gave 1"),
        (lambda k, n: np.arange(k) - 1, "rows of 0 to 89, and gave -1 to 43"),
        (lambda k, n: np.arange(k) + n - 10, "rows of 0 to 89"),
        (lambda k, n: np.arange(k) * 1.0, "float64"),
        (lambda k, n: (np.arange(k), np.zeros(k)), "45 positive weights"),
        (lambda k, n: (np.arange(k), np.ones(k - 1)), "45 positive weights"),
        (lambda k, n: (np.arange(k), np.full(k, np.nan)), "45 positive weights"),
    ],
)
def test_a_picker_that_does_not_keep_its_word(signals, taken, match):
    def mine(scores, budget):
        return taken(budget, len(scores))

    with pytest.raises(Refused, match=match):
        select(signals, score="loss", pick="mine", keep=0.5, balance=False, shelves=[shelf(mine=mine)])


# -- the house


def test_importing_selection_brings_neither_torch_nor_lotus_nor_sklearn():
    code = "import sys, selection; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'lotus', 'sklearn', 'scipy', 'pandas'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_picker_that_reads_no_scores_needs_none():
    """Of one epoch dual says nothing, which is no reason to refuse what goes by embeddings alone."""
    rng = np.random.default_rng(0)
    signals = Signals(
        {"labels": np.arange(40) % 2, "p_label": rng.random((1, 1, 40)), "embeddings": rng.normal(size=(40, 5))},
        fingerprint="made up",
    )
    drawn = select(signals, score="dual", pick="facility_location", keep=0.25)
    assert len(drawn.subset) == 10
    assert drawn.scores is None
    with pytest.raises(Refused, match="dual"):
        select(signals, score="dual", pick="top_k", keep=0.5)
