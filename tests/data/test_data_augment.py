from __future__ import annotations

import numpy as np
import pytest

from lotus.config import Augment
from lotus.data.views import DOWN, FLIP, HEIGHT, LEFT, RIGHT, TOP, WIDTH, View, center, parameters, uniform

N = 4000
ROWS = np.arange(N)
HIGH = 20 + ROWS % 200
WIDE = 30 + ROWS % 170
RESIZED = Augment(crop="resized", flip=True)


def table(augment: Augment | None, seed: int = 1, epoch: int = 2, rows: np.ndarray = ROWS) -> np.ndarray:
    return parameters(View(size=32, augment=augment, seed=seed), epoch, rows, HIGH[rows], WIDE[rows])


def test_a_pure_function_of_seed_epoch_and_index() -> None:
    whole = table(RESIZED)
    assert whole.shape == (N, 7)
    assert whole.dtype == np.int32
    some = np.random.default_rng(0).permutation(N)[:100]
    assert np.array_equal(table(RESIZED, rows=some), whole[some]), "in whatever company an image comes"
    assert not np.array_equal(table(RESIZED, epoch=3), whole)
    assert not np.array_equal(table(RESIZED, seed=2), whole)
    assert not np.array_equal(table(RESIZED, seed=2, epoch=1), whole), "seed and epoch are no sum"


def test_boxes_lie_inside_and_have_the_asked_area_and_ratio() -> None:
    found = table(RESIZED)
    high, wide = found[:, HEIGHT], found[:, WIDTH]
    assert (found[:, TOP] >= 0).all()
    assert (found[:, TOP] + high <= HIGH).all()
    assert (found[:, LEFT] >= 0).all()
    assert (found[:, LEFT] + wide <= WIDE).all()
    large = (high > 20) & (wide > 20) & (np.maximum(HIGH, WIDE) < 2 * np.minimum(HIGH, WIDE))
    part = (high * wide) / (HIGH * WIDE)
    assert part[large].min() > 0.23
    assert part.max() <= 1
    ratio = (wide / high)[large]
    assert ratio.min() > 0.7
    assert ratio.max() < 1.45
    assert 0.47 < found[:, FLIP].mean() < 0.53
    assert (found[:, DOWN] == 0).all()


def test_a_shape_that_no_crop_fits_gives_the_middle() -> None:
    narrow = Augment(crop="resized", scale=(0.9, 1.0), ratio=(1.0, 1.0))
    found = parameters(View(size=8, augment=narrow), 0, np.arange(3), np.array([100, 10, 1]), np.array([10, 100, 1]))
    assert found[:, :4].tolist() == [[45, 0, 10, 10], [0, 45, 10, 10], [0, 0, 1, 1]]


def test_shifts_cover_the_padding_evenly() -> None:
    found = table(Augment(crop="pad", pad=2))
    for column in (DOWN, RIGHT):
        values, counts = np.unique(found[:, column], return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert counts.min() > N / 5 * 0.85
    assert abs(np.corrcoef(found[:, DOWN], found[:, RIGHT])[0, 1]) < 0.06
    assert (found[:, FLIP] == 0).all()
    assert np.array_equal(found[:, :4], center(HIGH, WIDE, 32))


@pytest.mark.parametrize(
    ("height", "width", "size", "box"),
    [
        (224, 224, 224, [0, 0, 224, 224]),  # stored at the model's size: seen whole
        (256, 340, 224, [16, 58, 224, 224]),  # the usual 224 of 256, without resizing
        (512, 512, 224, [32, 32, 448, 448]),  # 7/8 of the shorter side
        (240, 400, 224, [8, 88, 224, 224]),  # as it is, rather than enlarged
        (32, 32, 224, [0, 0, 32, 32]),  # small: the whole of it
        (8, 8, 8, [0, 0, 8, 8]),
    ],
)
def test_evaluation_looks_at_the_middle(height: int, width: int, size: int, box: list[int]) -> None:
    found = parameters(View(size=size), 0, [0], [height], [width])
    assert found[0].tolist() == [*box, 0, 0, 0]
    other = parameters(View(size=size, augment=Augment(), seed=9), 9, [0], [height], [width])
    assert other.tolist() == found.tolist()


def test_the_hash_is_uniform_and_known() -> None:
    numbers = uniform(0, 0, np.arange(100_000, dtype=np.uint64), 0)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.histogram(numbers, 20, (0, 1))[0] / 5000 - 1).max() < 0.06
    # A change here would change every run that is resumed: these numbers stand for ever.
    kept = uniform(1, 2, np.array([3, 4], np.uint64), 5)
    assert kept.tolist() == [0.38975379509256947, 0.5887892019325118]
