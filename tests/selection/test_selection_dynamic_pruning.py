"""What is known while images train, kept exactly; and the one place that checks a draw."""

import math
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selection import dynamic, methods
from selection.dynamic_pruning import Seen, State, choose, epoch_subset, rehearse
from selection.errors import Refused

LABELS = np.arange(24) % 3


def same(one, other):
    """Bit for bit, and of the same kinds."""
    a, b = one.arrays(), other.arrays()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a)  # fmt: skip


def trained(epochs=4, seed=0):
    rng, state = np.random.default_rng(seed), State(LABELS)
    for epoch in range(epochs):
        rows = rng.permutation(24)[: rng.integers(5, 24)]
        for batch in np.array_split(rows, 3):
            state.add(batch, rng.exponential(size=len(batch)))
        state.end(epoch)
    return state


def test_what_is_known_is_the_recursion_of_the_textbook():
    state, rng, rows = State(LABELS, memory=0.7), np.random.default_rng(0), np.array([3, 5, 7])
    seen = []
    for epoch in range(5):
        losses = rng.exponential(size=3).astype(np.float32)
        seen.append(losses.astype(np.float64))
        state.add(rows, losses)
        state.end(epoch)
    mean, variance = seen[0].copy(), np.zeros(3)
    for then in seen[1:]:
        variance = 0.7 * variance + 0.3 * (then - mean) ** 2
        mean = 0.7 * mean + 0.3 * then
    np.testing.assert_allclose(state.mean[rows], mean, rtol=1e-5)
    np.testing.assert_allclose(state.variance[rows], variance, rtol=1e-5)
    assert np.array_equal(state.loss[rows], seen[-1].astype(np.float32))
    assert state.seen[rows].tolist() == [5, 5, 5]
    assert state.last[rows].tolist() == [4, 4, 4]
    others = np.setdiff1d(np.arange(24), rows)
    assert np.isinf(state.loss[others]).all()
    assert np.isinf(state.mean[others]).all()
    assert (state.last[others] == -1).all()
    assert state.saved == pytest.approx(1 - 15 / (5 * 24))


def test_below_is_of_its_own_batch():
    state = State(LABELS)
    state.add([0, 1, 2], [1.0, 2.0, 6.0])
    state.add([3, 4], [50.0, 70.0])
    state.end(0)
    assert state.below[:5].tolist() == [True, True, False, True, False]


def test_a_loss_that_is_not_finite_counts_as_not_seen():
    state = State(LABELS)
    state.add([0, 1, 2, 3], [1.0, math.nan, math.inf, 3.0])
    state.end(0)
    assert state.last[:4].tolist() == [0, -1, -1, 0]
    assert state.below[:4].tolist() == [True, False, False, False]  # the mean of the finite is 2
    assert state.passes == 2
    for name in methods.names(dynamic):
        assert np.isfinite(epoch_subset(state, pick=name, epoch=1, epochs=3).weights).all()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_what_ranks_saw_put_together_is_what_one_saw(data):
    ranks, rng = data.draw(st.integers(1, 4)), np.random.default_rng(data.draw(st.integers(0, 99)))
    alone, many = State(LABELS), [State(LABELS) for _ in range(ranks)]
    for epoch in range(3):
        order = rng.permutation(24)[: data.draw(st.integers(1, 24))]
        for number, batch in enumerate(np.array_split(order, 5)):
            losses = rng.exponential(size=len(batch))
            alone.add(batch, losses)
            many[number % ranks].add(batch, losses)
        parts = [state.pending() for state in many]
        alone.end(epoch)
        for state in many:
            state.end(epoch, parts)
            assert same(alone, state)


def test_a_row_that_two_ranks_saw_counts_once():
    state = State(LABELS)
    part = Seen(np.array([2]), np.array([1.5], np.float32), np.array([False]))
    state.end(0, [part, part])
    assert state.passes == state.seen[2] == 1


def test_whole_numbers_stay_whole():
    state = trained()
    assert {name: array.dtype.name for name, array in state.arrays().items()} == {
        "loss": "float32", "mean": "float32", "variance": "float32", "seen": "int64", "last": "int64", "below": "bool",
        "labels": "int64", "now": "float32", "now_below": "bool", "memory": "float64", "passes": "int64", "epochs": "int64",
    }  # fmt: skip
    assert state.pending().rows.dtype == np.int64


def test_saved_in_the_middle_of_an_epoch_it_goes_on_bit_for_bit(tmp_path):
    whole = trained()
    whole.add([1, 2, 3], [0.1, 0.2, 0.9])
    whole.save(tmp_path / "state.npz")
    back = State.load(tmp_path / "state.npz")
    assert same(whole, back)
    for state in (whole, back):
        state.add([4, 5], [0.3, 0.4])
        state.end(4)
    assert same(whole, back)
    assert whole.last[[1, 5]].tolist() == [4, 4]
    for name in methods.names(dynamic):
        one, other = (epoch_subset(state, pick=name, epoch=5, epochs=9, keep=0.3, seed=2) for state in (whole, back))
        assert np.array_equal(one.rows, other.rows)
        assert np.array_equal(one.weights, other.weights)


def test_an_epoch_is_closed_once():
    state = trained()
    before = State.of(state.arrays())
    state.add([0], [9.0])
    state.end(2)
    state.end(3)
    assert np.array_equal(state.seen, before.seen)
    assert len(state.pending().rows) == 1


def test_drawing_changes_nothing():
    state = trained()
    before = State.of(state.arrays())
    for name in methods.names(dynamic):
        epoch_subset(state, pick=name, epoch=4, epochs=9, keep=0.5)
    assert same(state, before)
    with pytest.raises(ValueError, match="read-only"):
        state.known()["loss"][0] = 1


@pytest.mark.parametrize(
    ("rows", "losses", "says"),
    [
        ([0, 24], [1, 1], "rows 0 to 24; the 24 images are 0 to 23"),
        ([-1], [1], "rows -1"),
        ([0.5], [1], "one loss a row"),
        ([True], [1], "one loss a row"),
        ([0, 1], [1], "one loss a row"),
        ([[0]], [[1]], "one loss a row"),
    ],
)
def test_what_was_not_seen_cannot_be_added(rows, losses, says):
    with pytest.raises(Refused, match=says):
        State(LABELS).add(rows, losses)


@pytest.mark.parametrize(
    ("labels", "more", "says"),
    [
        ([], {}, "labels"), ([0.5], {}, "labels"), ([[0]], {}, "labels"), (LABELS, {"memory": 1}, "memory"),
        (LABELS, {"memory": True}, "memory"), (LABELS, {"memory": math.nan}, "memory"),
    ],
)  # fmt: skip
def test_no_state_without_labels_and_a_memory(labels, more, says):
    with pytest.raises(Refused, match=says):
        State(labels, **more)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    with pytest.raises(Refused, match=r"state\.npz: .* Begin the training anew"):
        State.load(path)
    trained().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match="cut short"):
        State.load(path)
    np.savez(path, a=1)
    with pytest.raises(Refused, match="foreign"):
        State.load(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays: arrays.pop("loss"),
        lambda arrays: arrays.pop("labels"),
        lambda arrays: arrays.update(seen=arrays["seen"].astype(float)),
        lambda arrays: arrays.update(last=arrays["last"][:-1]),
        lambda arrays: arrays.update(memory=np.ones(3)),
        lambda arrays: arrays.update(memory=np.array(2.0)),
        lambda arrays: arrays.update(passes=np.array(1.5)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(spoil):
    arrays = trained().arrays()
    spoil(arrays)
    with pytest.raises(Refused):
        State.of(arrays)


# -- the draw


def shelf(function):
    module = ModuleType("mine")
    function.__module__, function.__name__ = "mine", "mine"
    vars(module)["mine"] = function
    return module


def test_five_lines_make_a_lottery():
    def mine(loss, budget, rng, *, power=1.0):
        """The higher the loss, the likelier."""
        p = np.where(np.isfinite(loss), loss, 1) ** power
        return rng.choice(len(loss), budget, replace=False, p=p / p.sum())

    drawn = epoch_subset(
        trained(), pick={"name": "mine", "power": 2.0}, epoch=4, epochs=9, keep=0.5, shelves=[shelf(mine)]
    )
    assert len(drawn.rows) == 12
    assert (np.diff(drawn.rows) > 0).all()
    assert drawn.rows.dtype == np.int64
    assert drawn.weights.dtype == np.float32
    with pytest.raises(Refused, match=r"dynamic\.powr: 'mine' .*'power'\?"):
        epoch_subset(trained(), pick={"name": "mine", "powr": 2}, epoch=4, epochs=9, shelves=[shelf(mine)])


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        ([], "distinct rows, at least one"),
        ([1, 1], "distinct rows"),
        ([0.5], "distinct rows"),
        ([[1]], "distinct rows"),
        ([24], "rows of 0 to 23"),
        ([-1], "rows of 0 to 23"),
        (([1, 2], [1.0]), "2 positive weights"),
        (([1, 2], [1.0, 0.0]), "positive weights"),
        (([1, 2], [1.0, math.nan]), "positive weights"),
    ],
)
def test_a_lottery_that_gives_nonsense_is_refused(gives, says):
    def mine(labels):
        return gives

    with pytest.raises(Refused, match=rf"dynamic \(mine\).*{says}"):
        epoch_subset(State(LABELS), pick="mine", epoch=0, epochs=1, shelves=[shelf(mine)])


def test_weights_stay_with_their_rows():
    def mine(labels):
        return [5, 2, 9], [0.5, 0.2, 0.9]

    drawn = epoch_subset(State(LABELS), pick="mine", epoch=0, epochs=1, shelves=[shelf(mine)])
    assert drawn.rows.tolist() == [2, 5, 9]
    np.testing.assert_allclose(drawn.weights, [0.2, 0.5, 0.9])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep": 0}, "dynamic.keep: 0"), ({"keep": 1.1}, "dynamic.keep"), ({"keep": True}, "dynamic.keep"),
        ({"seed": -1}, "seed: -1"), ({"seed": 0.5}, "seed"), ({"epoch": 3}, "no epoch 3 of 3"), ({"epoch": -1}, "no epoch -1"),
        ({"pick": "rs3"}, "Did you mean 'rs2'"), ({"pick": {"name": "seta", "group": 3}}, "Did you mean 'groups'"),
        ({"pick": 3}, "expected a name"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused(wrong, says):
    with pytest.raises(Refused, match=says):
        epoch_subset(State(LABELS), **{"pick": "rs2", "epoch": 0, "epochs": 3, **wrong})


def test_chance_is_not_that_of_the_order_of_the_images():
    """The sample plan shuffles by (seed, epoch): the same numbers must not decide who is drawn."""
    for seed in range(3):
        drawn = epoch_subset(State(np.zeros(100, int)), pick="rs2", epoch=0, epochs=9, keep=0.2, seed=seed)
        order = np.random.default_rng(np.random.SeedSequence([seed, 0])).permutation(100)
        assert set(order[:20].tolist()) != set(drawn.rows.tolist())


def test_a_choice_is_checked_before_anything_trains():
    assert choose(pick="rs2", keep=None, epochs=5) == 0.5
    assert choose(pick="rs2", keep=0.3, epochs=5) == 0.3
    for wrong, says in (
        ({"pick": "infobatch", "keep": 0.3}, r"train\.dynamic\.keep: 'infobatch' finds .* Set train\.dynamic\.prune or saving"),
        ({"pick": {"name": "infobatch", "saving": 0.9}, "keep": None}, "at most"),
        ({"pick": "rs2", "keep": 2}, "keep"),
        ({"pick": "rs3", "keep": None}, r"train\.dynamic: there is no 'rs3'"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=says):
            choose(**wrong, epochs=5, place="train.dynamic")


@pytest.mark.parametrize(
    ("name", "option", "says"),
    [
        ("rs2", "savng", "Did you mean 'saving'? It has: replacement, saving, keep."),
        ("rs2", "kep", "Did you mean 'keep'? It has: replacement, saving, keep."),
        ("infobatch", "savng", "Did you mean 'saving'? It has: prune, until, saving."),
        ("infobatch", "kep", "It has: prune, until, saving."),
    ],
)
def test_a_budget_that_is_misspelt_is_told_with_the_nearest_way_to_say_it(name, option, says):
    """``saving`` and ``keep`` are no settings of a method that reads a budget, and yet can be said of it."""
    pick = SimpleNamespace(name=name, options={option: 0.3}, keep=None)  # as a config has it
    with pytest.raises(Refused) as refusal:
        choose(pick=pick, keep=None, epochs=5, place="train.dynamic")
    assert str(refusal.value) == f"train.dynamic.{option}: {name!r} has no such setting. {says}"
    with pytest.raises(Refused) as refusal:
        choose(pick={"name": name, option: 0.3}, keep=None, epochs=5)
    assert str(refusal.value).endswith("saving."), "keep is an argument here, no option"


def test_a_rehearsal_tells_what_a_training_will_see():
    assert rehearse(pick="rs2", keep=0.3, epochs=4) == pytest.approx(0.3)
    assert rehearse(pick={"name": "infobatch", "saving": 0.25}, keep=None, epochs=8) == pytest.approx(0.75)
    assert rehearse(pick="selective_backprop", keep=0.5, epochs=10) == pytest.approx(0.8)  # four epochs of ten at half
    assert 0.6 < rehearse(pick="infobatch", keep=None, epochs=10) < 0.9


# -- a saving that is asked for


@pytest.mark.parametrize("name", methods.names(dynamic))
@pytest.mark.parametrize("saving", [0.0, 0.1, 0.3])
def test_a_saving_that_is_asked_for_is_had(name, saving):
    """By every lottery, over a whole training, with losses that fall at their own speeds: to the image, or half of one an epoch."""
    n, epochs, rng = 403, 12, np.random.default_rng(2)
    state, speed = State(np.arange(n) % 7), rng.exponential(size=n)
    pick = {"name": name, "saving": saving}
    keep = choose(pick=pick, keep=None, epochs=epochs)
    for epoch in range(epochs):
        drawn = epoch_subset(state, pick=pick, epoch=epoch, epochs=epochs, keep=keep, seed=3)
        for rows in np.array_split(rng.permutation(drawn.rows), 6):
            state.add(rows, np.exp(-speed[rows] * epoch / 4) + 0.1 * rng.random(len(rows)))
        state.end(epoch)
    solved = "saving" in methods.settings(getattr(dynamic, name))
    assert solved == (name in ("infobatch", "seta", "repb", "selective_backprop"))
    assert abs(n * epochs - state.passes - saving * n * epochs) <= (0.5 if solved else 0.5 * epochs)


def test_a_saving_of_seta_still_slides_from_easy_to_hard():
    """Where there is more to save than the windows leave out, none outside of one comes back."""
    state = State(np.zeros(100, int))
    state.add(np.arange(100), np.repeat([0.0, 1.0, 2.0, 3.0, 4.0], 20))
    state.end(0)
    for epoch, outside in ((2, range(80, 100)), (3, range(20))):
        rows = epoch_subset(state, pick={"name": "seta", "saving": 0.4}, epoch=epoch, epochs=20).rows
        assert not set(rows.tolist()) & set(outside)
        assert 40 < len(rows) < 80


def test_a_small_saving_of_seta_leaves_out_all_that_its_window_does_until_it_is_had():
    state, seen = State(np.zeros(100, int)), []
    for epoch in range(20):
        rows = epoch_subset(state, pick={"name": "seta", "saving": 0.05, "window": 0.6}, epoch=epoch, epochs=20).rows
        seen.append(len(rows))
        state.add(rows, np.repeat([0.0, 1.0, 2.0, 3.0, 4.0], 20)[rows])
        state.end(epoch)
    # Epoch 0 has no losses and leaves out 5, which then count with the hardest; after it some 40 lie outside of the window.
    assert seen == [95, 58, 60, 87, *[100] * 16]


def test_a_saving_of_repb_is_of_those_below_their_batch_alone():
    state = State(np.zeros(100, int))
    state.add(np.arange(100), np.repeat([0.0, 1.0], [70, 30]))
    state.end(0)
    drawn = epoch_subset(state, pick={"name": "repb", "saving": 0.3}, epoch=1, epochs=10)
    assert len(drawn.rows) == 66  # 300 passes in nine epochs
    assert set(range(70, 100)) <= set(drawn.rows.tolist())
    assert len(epoch_subset(state, pick={"name": "repb", "saving": 0.9}, epoch=1, epochs=10).rows) == 30
    assert (drawn.weights == 1).all()  # all were in every epoch so far
    state.add(drawn.rows, np.arange(66))
    state.end(1)
    after = epoch_subset(state, pick={"name": "repb", "saving": 0.3}, epoch=2, epochs=10)
    missed = ~np.isin(after.rows, drawn.rows)
    assert missed.any()
    np.testing.assert_allclose(after.weights, np.where(missed, 3 / 2, 1))  # epochs so far over those that it was in


def test_a_saving_that_cannot_be_had_is_refused():
    def mine(loss):
        return np.arange(len(loss))

    for pick, keep, says in (
        ({"name": "mine", "saving": 0.3}, None, r"train\.dynamic\.saving: 'mine' finds the number of images itself"),
        ({"name": "rs2", "saving": 1.0}, None, r"saving: 1\.0 is no part"),
        ({"name": "rs2", "saving": 0.3}, 0.5, "keep and saving say the same thing twice"),
        ({"name": "seta", "saving": 0.3}, 0.5, "keep and saving"),
        ({"name": "seta", "saving": 1.0}, None, "saving=1.0"),
        ({"name": "selective_backprop", "saving": 0.5}, None, r"only the epochs 5 to 8 .* can save 0\.3996 of all"),
    ):
        with pytest.raises(Refused, match=says):
            choose(pick=pick, keep=keep, epochs=10, shelves=[shelf(mine)], place="train.dynamic")
