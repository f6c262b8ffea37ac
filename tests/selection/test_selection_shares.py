"""How classes share a budget: laws that the shares must keep, whatever the algorithm."""

import numpy as np
import pytest

from selection.errors import Refused
from selection.lottery import select
from selection.shares import BALANCES, balance_of, quotas
from selection.signals import Signals

ROOT = {"equal": lambda sizes: np.ones(len(sizes)), "sqrt": np.sqrt}


@pytest.mark.parametrize("balance", ["equal", "sqrt"])
@pytest.mark.parametrize("seed", range(60))
def test_there_is_one_level_for_all_classes(balance, seed):
    """Each class says between which levels t its share is within one of clip(t w, 1, size); all agree on some t."""
    rng = np.random.default_rng(seed)
    sizes = np.ceil(rng.pareto(0.7, rng.integers(1, 40)) * 5 + 1).clip(1, 5000).astype(int)
    budget = int(rng.integers(len(sizes), sizes.sum() + 1))
    shares = quotas(sizes, budget, rng, balance)
    assert shares.sum() == budget
    assert (shares >= 1).all()
    assert (shares <= sizes).all()
    weights = ROOT[balance](sizes)
    least = np.where(shares == 1, 0, (shares - 1) / weights)  # a share of one says nothing from below
    most = np.where(shares == sizes, np.inf, (shares + 1) / weights)  # and a whole class nothing from above
    assert least.max() <= most.min() + 1e-9


def test_equal_is_as_even_as_can_be():
    """Brute force over all shares: the smallest is as large as can be, then the next."""
    import itertools

    sizes = np.array([2, 5, 9])
    for budget in range(3, 17):
        every = itertools.product(*(range(1, size + 1) for size in sizes))
        best = max(tuple(sorted(one)) for one in every if sum(one) == budget)
        assert tuple(sorted(quotas(sizes, budget, np.random.default_rng(0), "equal").tolist())) == best


def test_ties_are_served_by_chance():
    taken = [quotas([10, 10, 10], 10, np.random.default_rng(seed), "equal").argmax() for seed in range(40)]
    assert set(taken) == {0, 1, 2}


@pytest.mark.parametrize("balance", [*BALANCES, True, False])
def test_a_draw_keeps_the_shares(balance):
    labels = np.repeat(np.arange(4), (100, 40, 10, 4))
    signals = Signals({"labels": labels}, fingerprint="x")
    drawn = select(signals, score="random", pick="random", keep=0.25, balance=balance, seed=1).subset
    kept = np.bincount(labels[drawn.rows], minlength=4)
    assert kept.sum() == round(0.25 * len(labels)) == 38
    if balance == "equal":
        assert sorted(kept.tolist()) == [4, 10, 12, 12]
    if balance == "sqrt":  # roots 10, 6.3, 3.2, 2 of 38
        assert np.abs(kept - np.array([17.7, 11.2, 5.6, 3.5])).max() < 1
    if balance in (True, "fraction"):
        assert np.abs(kept - labels.size * 0.25 * np.array([100, 40, 10, 4]) / 154).max() < 1
        same = select(signals, score="random", pick="random", keep=0.25, seed=1).subset
        assert np.array_equal(same.rows, drawn.rows)
    assert drawn.origin["balance"] == (balance if balance in ("equal", "sqrt") else bool(balance))


def test_a_word_that_is_none():
    assert [balance_of(one, "x") for one in (True, False, "sqrt")] == ["fraction", "", "sqrt"]
    with pytest.raises(Refused, match=r"select\.balance: .*'equals'.*'equal'"):
        balance_of("equals", "select.balance")
