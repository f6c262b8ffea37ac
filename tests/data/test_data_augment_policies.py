"""What is drawn: pure, and as often and as strong as timm, torchvision and numpy draw it."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from timm.data import auto_augment as timm_augment
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter

from lotus.config import Augment, read
from lotus.data import erasing, policies
from lotus.data.policies import ACTIONS, Changes, change, changes
from selection.errors import Refused

N = 30_000
ROWS = np.arange(N)
WRITTEN = {
    "rand": Augment.model_validate({"auto": "rand-m9-n2-mstd0.5-inc1"}),
    "weights": Augment.model_validate({"auto": "rand-m7-n3-mstd101-p0.8-tweights"}),
    "trivial": Augment.model_validate({"auto": "trivial"}),
    "3a": Augment.model_validate({"auto": "3a", "color_jitter": 0.3}),
    "jitter": Augment.model_validate({"color_jitter": [0.4, 0.3, 0.2, 0.1]}),
}


def drawn(augment: Augment, seed: int = 1, epoch: int = 2, rows: np.ndarray = ROWS, **settings: float) -> Changes:
    return changes(augment, seed, epoch, rows, **{"size": 32, **settings})  # type: ignore[arg-type]


def shares(actions: np.ndarray) -> dict[str, float]:
    return {ACTIONS[place]: count / len(actions) for place, count in Counter(actions.tolist()).items()}


# ------------------------------------------------------------------------------------------------------------- pure


@pytest.mark.parametrize("name", WRITTEN)
def test_a_pure_function_of_seed_epoch_and_index(name: str) -> None:
    augment = WRITTEN[name]
    whole = drawn(augment)
    some = np.random.default_rng(0).permutation(N)[:100]
    for part, found in zip(drawn(augment, rows=some), whole, strict=True):
        assert np.array_equal(part, found[some]), "in whatever company an image comes"
    for other in (drawn(augment, epoch=3), drawn(augment, seed=2), drawn(augment, seed=2, epoch=1)):
        assert not np.array_equal(other.action, whole.action) or not np.array_equal(other.amount, whole.amount)


@pytest.mark.parametrize("name", WRITTEN)
def test_images_are_the_same_in_whatever_batch(name: str) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (90, 3, 20, 20), dtype=np.uint8))
    fill = np.array([100, 110, 120], np.uint8)
    made = drawn(WRITTEN[name], rows=np.arange(90))
    whole = change(images.clone(), made, fill=fill, size=20)
    assert not torch.equal(whole, images)
    parts = []
    for rows in np.split(np.arange(90), [1, 8, 60]):
        made = drawn(WRITTEN[name], rows=rows)
        parts.append(change(images[rows].clone(), made, fill=fill, size=20))
    assert torch.equal(torch.cat(parts), whole)


def test_nothing_is_drawn_where_nothing_is_set() -> None:
    assert drawn(Augment()).action.shape == (N, 0)
    assert not Augment().recolors
    assert len(erasing.boxes(Augment(), 0, 0, ROWS, 32)) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_gpu_makes_the_same_images(name: str) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (500, 3, 33, 33), dtype=np.uint8))
    made, fill = drawn(WRITTEN[name], rows=np.arange(500)), np.array([100, 110, 120], np.uint8)
    here = change(images.clone(), made, fill=fill, size=33)
    assert torch.equal(here, change(images.cuda(), made, fill=fill, size=33).cpu())


# ------------------------------------------------------------------------------------------------------ distributions


def test_randaugment_takes_each_operation_equally_often() -> None:
    made = drawn(WRITTEN["rand"])
    for layer in range(2):
        found = shares(made.action[:, layer])
        assert found.pop("nothing") == pytest.approx(0.5, abs=0.01)
        assert len(found) == 15
        assert all(share == pytest.approx(1 / 30, abs=0.004) for share in found.values())
    both = Counter(zip(*made.action.T.tolist()))
    alike = sum(count for (one, other), count in both.items() if one == other > 0)
    assert alike / N == pytest.approx(0.25 / 15, abs=0.003), "layers are drawn apart"
    kinds = made.between[made.action > 0]
    assert np.mean(kinds == policies.BICUBIC) == pytest.approx(0.5, abs=0.02)


def test_magnitudes_are_spread_as_timm_spreads_them() -> None:
    """Rotations tell the magnitude and the sign that were drawn."""
    rotate = ACTIONS.index("rotate")
    for written, deviation in (
        ("rand-m9-n1-p1-mstd0.5", 0.5),
        ("rand-m9-n1-p1-mstd2", 2.0),
        ("rand-m9-n1-p1-mstd101", np.inf),
    ):
        made = drawn(Augment.model_validate({"auto": written}))
        ours = np.sort(made.amount[made.action == rotate])
        generator = random.Random(0)
        draw = (lambda: generator.uniform(0, 9)) if deviation == np.inf else (lambda: generator.gauss(9, deviation))  # noqa: B023
        theirs = np.sort([generator.choice([-1, 1]) * min(10.0, max(0.0, draw())) * 3 for _ in range(60_000)])
        places = np.linspace(-30, 30, 200)
        gap = np.abs(np.searchsorted(ours, places) / len(ours) - np.searchsorted(theirs, places) / len(theirs))
        assert gap.max() < 1.95 * np.sqrt(1 / len(ours) + 1 / len(theirs)), "Kolmogorov and Smirnov, one in a thousand"


def test_weighted_sets_are_drawn_as_numpy_draws_them() -> None:
    made = drawn(Augment.model_validate({"auto": "rand-m9-n2-p1-tweights"}))
    theirs = timm_augment.rand_augment_transform("rand-m9-n2-p1-tweights", {})
    names = [policies.OPS[op.name][0] for op in theirs.ops]
    p = np.array(theirs.choice_weights)
    assert (made.action[:, 0] != made.action[:, 1]).all(), "none twice"
    found = shares(made.action[:, 0])
    second = shares(made.action[:, 1])
    for place, name in enumerate(names):
        assert found[name] == pytest.approx(p[place], abs=0.01)
        others = [q for other, q in enumerate(p) if other != place]
        assert second[name] == pytest.approx(sum(q * p[place] / (1 - q) for q in others), abs=0.01)


def test_trivialaugment_takes_one_of_14_at_one_of_31() -> None:
    made = drawn(WRITTEN["trivial"])
    assert made.action.shape == (N, 1)
    found = shares(made.action[:, 0])
    assert len(found) == 14
    assert all(share == pytest.approx(1 / 14, abs=0.006) for share in found.values())
    shears = made.amount[made.action == ACTIONS.index("shear_x")]
    values, counts = np.unique(np.round(shears, 6), return_counts=True)
    assert values == pytest.approx(np.linspace(-0.99, 0.99, 61), abs=1e-6)
    assert counts.min() > 10
    slides = made.amount[made.action == ACTIONS.index("translate_x")] * 32
    assert np.abs(slides).max() == 32
    assert (made.between == policies.NEAREST).all()


def test_three_augment_takes_one_of_three() -> None:
    made = drawn(Augment.model_validate({"auto": "3a"}))
    found = shares(made.action[:, 0])
    assert set(found) == {"solarize", "color", "gaussian_blur"}
    assert all(share == pytest.approx(1 / 3, abs=0.01) for share in found.values())
    amounts = {name: made.amount[made.action == ACTIONS.index(name)] for name in found}
    assert set(amounts["solarize"]) == {128}
    assert set(amounts["color"]) == {0}
    assert amounts["gaussian_blur"].min() == pytest.approx(0.1, abs=0.01)
    assert amounts["gaussian_blur"].max() == pytest.approx(2.0, abs=0.01)
    theirs = timm_augment.auto_augment_policy("3a", {})
    assert [ops[0].name for ops in theirs] == ["Solarize", "Desaturate", "GaussianBlurRand"]
    assert [ops[0].magnitude for ops in theirs] == [5, 10, 10]


def test_color_jitter_is_torchvision_s() -> None:
    made = drawn(WRITTEN["jitter"])
    assert made.action.shape == (N, 4)
    orders = Counter(map(tuple, made.action.tolist()))
    assert len(orders) == 24
    assert min(orders.values()) > N / 24 * 0.85
    theirs = ColorJitter(0.4, 0.3, 0.2, 0.1)
    for name, reach in (
        ("brightness", theirs.brightness),
        ("contrast", theirs.contrast),
        ("color", theirs.saturation),
        ("hue", theirs.hue),
    ):
        amount = made.amount[made.action == ACTIONS.index(name)]
        assert len(amount) == N
        assert (amount.min(), amount.max()) == pytest.approx(reach, abs=1e-3)
        assert amount.mean() == pytest.approx(sum(reach) / 2, abs=0.01)
    strong = drawn(Augment.model_validate({"color_jitter": [1.5, 0, 0]}))
    assert set(shares(strong.action.reshape(-1))) == {"nothing", "brightness"}
    assert strong.amount[strong.action > 0].min() == pytest.approx(0, abs=1e-3)


# -------------------------------------------------------------------------------------------------------- strength


def test_strength_is_a_factor_of_the_magnitude() -> None:
    for strength, written in (
        (4 / 9, "rand-m4-mstd0.5-inc1"),
        (0.0, "rand-m0-mstd0.5-inc1"),
        (1.0, "rand-m9-mstd0.5-inc1"),
    ):
        weaker = drawn(WRITTEN["rand"], strength=strength)
        plain = drawn(Augment.model_validate({"auto": written}))
        assert np.array_equal(weaker.action, plain.action)
        assert weaker.amount == pytest.approx(plain.amount, abs=1.001)  # a whole number may fall on the other side
        assert np.mean(np.abs(weaker.amount - plain.amount) > 1e-9) < 1e-3
    for name in ("3a", "jitter"):
        assert not drawn(WRITTEN[name], strength=0.0).action.any()
    assert np.mean(drawn(Augment.model_validate({"auto": "3a"}), strength=0.25).action > 0) == pytest.approx(
        0.25, abs=0.01
    )
    turned = drawn(WRITTEN["trivial"], strength=0.5)
    assert np.abs(turned.amount[turned.action == ACTIONS.index("rotate")]).max() == pytest.approx(135 / 2)
    erased = Augment(erase=0.5)
    assert len(erasing.boxes(erased, 0, 0, ROWS, 32, strength=0.5)) < 0.55 * len(erasing.boxes(erased, 0, 0, ROWS, 32))


def test_a_blur_is_as_wide_in_a_smaller_picture() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), dtype=np.uint8))
    blur = Changes(np.array([[ACTIONS.index("gaussian_blur")]]), np.array([[1.6]]), np.zeros((1, 1), np.int64))
    found = change(image.clone(), blur, fill=np.zeros(3, np.uint8), size=32)
    assert torch.equal(found, policies.pixel_ops.gaussian_blur(image, np.array([0.8])))


# ---------------------------------------------------------------------------------------------------------- erasing


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_are_timm_s(count: int) -> None:
    """How often, how large, of which shape and where: beside timm's own."""
    side, n = 32, 8000
    augment = Augment(erase=0.4, erase_mode="const", erase_count=count)
    ours = torch.ones(n, 1, side, side)
    erasing.erase(ours, erasing.boxes(augment, 3, 1, np.arange(n), side), "const")
    random.seed(0)
    theirs = RandomErasing(0.4, mode="const", max_count=count, device="cpu")(torch.ones(n, 1, side, side))
    for found in (lambda x: (x.amin((1, 2, 3)) == 0).float(), lambda x: 1 - x.mean((1, 2, 3))):
        one, other = found(ours), found(theirs)
        error = float((one.var() / n + other.var() / n).sqrt())
        assert float(one.mean() - other.mean()) == pytest.approx(0, abs=4 * error)
    where = (ours.mean((0, 1)) - theirs.mean((0, 1))).abs()
    assert where.max() < 5 * float((2 * 0.1 * 0.9 / n) ** 0.5), "in the middle more often than in a corner, alike"


def test_boxes_lie_inside_and_noise_is_normal() -> None:
    augment = Augment(erase=1.0, erase_count=2)
    found = erasing.boxes(augment, 0, 0, np.arange(400), 24)
    assert (found[:, 1:3] >= 0).all()
    assert (found[:, 1] + found[:, 3] <= 24).all()
    assert (found[:, 2] + found[:, 4] <= 24).all()
    assert (found[:, 5] + 3 * found[:, 3] * found[:, 4] <= erasing.STRIP).all()
    images = torch.full((400, 3, 24, 24), 99.0)
    noise = erasing.erase(images, found, "pixel")
    values = noise[noise != 99]
    assert float(values.mean()) == pytest.approx(0, abs=0.02)
    assert float(values.std()) == pytest.approx(1, abs=0.02)
    assert len(values.unique()) > 0.5 * len(values)
    blocks = erasing.erase(torch.full((400, 3, 24, 24), 99.0), found[:1], "rand")[0]
    assert len(blocks.unique()) == 4, "one number a channel"


def test_boxes_are_a_pure_function_too() -> None:
    augment = Augment(erase=0.6, erase_count=2)
    whole = erasing.boxes(augment, 1, 2, np.arange(300), 32)
    some = erasing.boxes(augment, 1, 2, np.arange(100, 200), 32)
    mine = whole[(whole[:, 0] >= 100) & (whole[:, 0] < 200)] - [100, 0, 0, 0, 0, 0]
    assert sorted(map(tuple, some.tolist())) == sorted(map(tuple, mine.tolist()))


# ---------------------------------------------------------------------------------------------------------- settings


def augment_of(*overrides: str) -> Augment:
    return read(None, ["data.name=digits", *(f"train.augment.{each}" for each in overrides)]).train.augment


def test_timm_s_words() -> None:
    auto = augment_of("auto=rand-m9-n3-mstd0.5-mmax12-p0.7-inc1-t3aw").auto
    assert auto is not None
    assert auto.model_dump() == {
        "name": "rand", "m": 9, "n": 3, "p": 0.7, "mstd": 0.5, "mmax": 12, "inc": True, "t": "3aw", "interpolation": "",
    }  # fmt: skip
    assert augment_of("auto={name: rand, m: 9, mstd: 0.5}") == augment_of("auto=rand-m9-mstd0.5")
    assert augment_of("auto=rand-m9-n2", "auto.m=5") == augment_of("auto=rand-m5")
    assert augment_of("color_jitter=0.3").jitter == (0.3, 0.3, 0.3, 0)
    for written in ("rand-m9", "trivial", "3a"):
        one = augment_of(f"auto={written}")
        assert Augment.model_validate(one.model_dump(mode="json")) == one, "as a run keeps it"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("auto=rnad-m9", "auto.name: .* Did you mean 'rand'"),
        ("auto=rand-m9-msdt0.5", "auto: there is no 'msdt'. Did you mean 'mstd'"),
        ("auto={name: rand, mstdd: 3}", "auto.mstdd: no such setting. Did you mean 'mstd'"),
        ("auto=rand-m9-m8", "auto: m is said twice"),
        ("auto=rand-twieghts", "auto.t: .* Did you mean 'weights'"),
        ("auto=rand-m-3", "auto: there is no 'm'"),
        ("auto=rand-p2", "auto.p: .* less than or equal to 1"),
        ("auto=trivial-m9", "auto: m is a setting of rand, not of trivial"),
        ("auto=7", "auto: a section"),
        ("color_jitter=[1,2]", "color_jitter: a number, or three"),
        ("color_jitter=[0.1,0.1,0.1,0.7]", "at most 0.5"),
        ("color_jitter=-1", "color_jitter.0: .* greater than or equal to 0"),
        ("erase=2", "erase: .* less than or equal to 1"),
        ("erase_mode=pixels", "erase_mode: .* Did you mean 'pixel'"),
    ],
)
def test_what_is_not_known_is_refused(written: str, told: str) -> None:
    with pytest.raises(Refused, match=told):
        augment_of(written)


def test_scores_of_stored_images_do_not_follow_a_rotation() -> None:
    settings = ["data.name=digits", "train.patches.mode=input", "train.patches.cached=true"]
    with pytest.raises(Refused, match=r"train\.patches: .*augment\.auto=3a"):
        read(None, [*settings, "train.augment.auto=rand-m9"])
    read(None, [*settings, "train.augment.auto=3a"])
