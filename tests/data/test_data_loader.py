"""One law for both loaders, and that they give the same batches."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_data import Make, source
from few import few

from lotus.config import Augment, Data
from lotus.data import beton, loader
from lotus.data import kept as decoded
from lotus.data.base import Batch, Loader
from lotus.data.dataset import open_data
from lotus.data.format import JPEG
from lotus.data.loader import open_loader
from lotus.data.sample_plan import SamplePlan
from lotus.data.source import split
from lotus.data.torch_loader import resize, view
from lotus.data.views import Look, View, parameters
from selection.errors import Refused

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.22, 0.2)
AUGMENTS = {
    "evaluation": None,
    "none": Augment(),
    "flip": Augment(flip=True),
    "pad": Augment(crop="pad", pad=3, flip=True),
    "pad far": Augment(crop="pad", pad=40, flip=True),
    "resized": Augment(crop="resized", flip=True),
}


@pytest.fixture(params=["ffcv", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "ffcv":
        pytest.importorskip("ffcv")
    return str(request.param)


def open_(file: Path, plan: SamplePlan, kind: str, *, workers: int = 2, device: Any = "cpu", **look: Any) -> Loader:
    seen = Look(**{"size": 12, "mean": MEAN, "std": STD, "seed": 5, **look})
    return open_loader(file, plan, seen, kind=kind, workers=workers, device=device)


def training(n: int = 70, batch: int = 16, **changes: Any) -> SamplePlan:
    return SamplePlan(np.arange(n), **{"seed": 1, "batch_size": batch, **changes})


def all_of(loader: Loader, epoch: int = 0, skip: int = 0) -> list[Batch]:
    return list(loader.epoch(epoch, skip))


def levels(batch: torch.Tensor) -> torch.Tensor:
    """Back to gray levels, 0 to 255."""
    return (batch * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


# --------------------------------------------------------------------------------------------------------- the law


def test_a_batch_is_what_it_says(stored: dict[str, Path], kind: str) -> None:
    plan = training()
    with open_(stored["square"], plan, kind) as opened:
        assert opened.kind == kind
        batches = all_of(opened, 3)
    assert [len(batch.images) for batch in batches] == [16, 16, 16, 16, 6]
    assert np.array_equal(torch.cat([batch.index for batch in batches]), plan.order(3))
    for batch in batches:
        assert batch.images.dtype == torch.float32
        assert batch.images.shape[1:] == (3, 12, 12)
        assert batch.images.is_contiguous()
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        assert torch.equal(batch.labels, batch.index % 3)
        for image, row in zip(batch.images, batch.index):
            whole = beton.image(stored["square"], int(row)).astype(np.float32).transpose(2, 0, 1)
            mean, std = (np.array(v, np.float32)[:, None, None] * np.float32(255) for v in (MEAN, STD))
            assert np.array_equal(image.numpy(), (whole - mean) / std), "normalized to the last bit"


def test_rows_that_come_several_times_are_each_the_same_image(stored: dict[str, Path], kind: str) -> None:
    """As balanced sampling asks for them."""
    plan = training(batch=8)
    rows = np.repeat(np.arange(7), 10)
    plan.take(rows, repeats=True)
    with open_(stored["mixed"], plan, kind, augment=AUGMENTS["resized"]) as opened:
        batches = all_of(opened, 2)
    index = torch.cat([batch.index for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    assert sorted(index.tolist()) == rows.tolist()
    assert np.array_equal(index, plan.order(2))
    for row in range(7):
        mine = images[index == row]
        assert torch.equal(mine, mine[:1].expand_as(mine))


def test_nothing_is_a_view_of_a_buffer(stored: dict[str, Path], kind: str) -> None:
    """FFCV's own batches are overwritten after five more; a receiver may keep these for ever."""
    with open_(stored["square"], training(batch=4), kind) as opened:
        kept = all_of(opened)
        again = [tuple(part.clone() for part in batch) for batch in opened.epoch(0)]
    for one, other in zip(kept, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    kept[0].images.fill_(0)  # and do with them what it likes


def test_epochs_differ_and_repeat(stored: dict[str, Path], kind: str) -> None:
    with open_(stored["mixed"], training(), kind, augment=AUGMENTS["resized"]) as opened:
        first, second, again = (torch.cat([b.images for b in all_of(opened, e)]) for e in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_batches_of_groups_are_as_large_as_the_plan_says(stored: dict[str, Path], kind: str) -> None:
    """Small batches in the middle of an epoch, and the same batches after a restart among them."""
    plan = training()
    plan.take(np.arange(70), np.repeat([0, 1, 2], [21, 30, 19]))
    with open_(stored["mixed"], plan, kind, augment=AUGMENTS["resized"]) as opened:
        batches = all_of(opened, 1)
        assert [len(batch.index) for batch in batches] == plan.sizes(1)
        assert sorted(plan.sizes(1)) == [3, 5, 14, 16, 16, 16]
        assert plan.sizes(1)[-1] == 16, "the seed puts a small batch before a whole one"
        assert torch.cat([batch.index for batch in batches]).tolist() == plan.order(1).tolist()
        with open_(stored["mixed"], training(), "torch", augment=AUGMENTS["resized"]) as plainly:
            by_row = {int(row): image for batch in plainly.epoch(1) for row, image in zip(batch.index, batch.images)}
        for skip in range(7):
            for one, other in zip(all_of(opened, 1, skip), batches[skip:], strict=True):
                assert torch.equal(one.images, other.images)
        for batch in batches:
            assert all((levels(image[None]) - levels(by_row[int(row)][None])).abs().max() < 21
                       for row, image in zip(batch.index, batch.images))  # fmt: skip


def test_other_rows_each_epoch_need_no_new_loader(
    stored: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic data pruning: the plan takes other rows, and nothing is made or compiled anew."""
    plan = training()
    with open_(stored["mixed"], plan, kind, augment=AUGMENTS["resized"]) as opened:
        all_of(opened, 0)
        if kind == "ffcv":
            import ffcv

            def never(*_: object, **__: object) -> None:
                raise AssertionError("made anew")

            monkeypatch.setattr(ffcv.Loader, "generate_code", never)
            monkeypatch.setattr(ffcv.Loader, "__init__", never)
        for epoch, rows in ((1, [3, 69, 20]), (2, np.arange(0, 70, 2)), (3, np.arange(70))):
            plan.take(rows)
            batches = all_of(opened, epoch)
            assert set(torch.cat([batch.index for batch in batches]).tolist()) == set(np.asarray(rows).tolist())
            with open_(
                stored["mixed"], SamplePlan(rows, seed=1, batch_size=16), "torch", augment=AUGMENTS["resized"]
            ) as new:
                fresh = all_of(new, epoch)
            for one, other in zip(batches, fresh, strict=True):
                assert torch.equal(one.index, other.index)
                assert (
                    levels(one.images) - levels(other.images)
                ).abs().max() <= 2.01  # as everywhere, where it resizes


@pytest.mark.parametrize("skip", [1, 3, 5])
def test_resuming_in_the_middle_is_exact(stored: dict[str, Path], kind: str, skip: int) -> None:
    with open_(stored["mixed"], training(), kind, augment=AUGMENTS["resized"]) as opened:
        whole, rest = all_of(opened, 2), all_of(opened, 2, skip)
    assert len(rest) == len(whole) - skip
    for one, other in zip(whole[skip:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_threads_and_batches_change_nothing(stored: dict[str, Path], kind: str) -> None:
    seen = []
    for workers, batch in ((1, 64), (5, 16)):
        plan = training(batch=batch)
        with open_(stored["both"], plan, kind, workers=workers, augment=AUGMENTS["resized"]) as opened:
            batches = all_of(opened, 1)
        rows = torch.cat([b.index for b in batches])
        seen.append(torch.cat([b.images for b in batches])[torch.argsort(rows)])
    assert torch.equal(*seen)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_share_an_epoch(stored: dict[str, Path], kind: str, accumulate: int) -> None:
    rows = np.arange(3, 69)
    alone = SamplePlan(rows, seed=1, batch_size=16)
    with open_(stored["square"], alone, kind, augment=AUGMENTS["pad"]) as opened:
        steps = [dict(zip(b.index.tolist(), b.images)) for b in opened.epoch(4)]
    parts = []
    for rank in range(2):
        plan = SamplePlan(rows, seed=1, batch_size=16, world=2, rank=rank, accumulate=accumulate)
        with open_(stored["square"], plan, kind, augment=AUGMENTS["pad"]) as opened:
            micro = iter(all_of(opened, 4))
            parts.append([[next(micro) for _ in range(count)] for count in plan.batches(4)])
    for step, first, second in zip(steps, *parts, strict=True):
        rows_ = [row for batch in (*first, *second) for row in batch.index.tolist()]
        assert sorted(rows_) == sorted(step), "disjoint, and together the same step"
        for batch in (*first, *second):
            assert all(torch.equal(step[row], image) for row, image in zip(batch.index.tolist(), batch.images))


def test_evaluation_on_three_ranks(stored: dict[str, Path], kind: str) -> None:
    seen: list[int] = []
    for rank in range(3):
        plan = SamplePlan.evaluation(np.arange(70), batch_size=30, world=3, rank=rank)
        with open_(stored["square"], plan, kind) as opened:
            seen += [row for batch in opened.epoch(0) for row in batch.index.tolist()]
    assert sorted(seen) == list(range(70)), "nothing repeated, nothing dropped"


def test_last_batch_of_one_and_no_batch_at_all(stored: dict[str, Path], kind: str) -> None:
    with open_(stored["square"], training(17), kind) as opened:
        last = all_of(opened)[-1]
    assert last.images.shape == (1, 3, 12, 12)
    assert last.labels.shape == last.index.shape == (1,)
    idle = SamplePlan.evaluation([4], batch_size=8, world=2, rank=1)
    with open_(stored["square"], idle, kind) as opened:
        assert all_of(opened) == []
    with open_(stored["square"], training(16), kind) as opened:
        assert all_of(opened, 0, skip=1) == []


def test_broken_off_epochs_leave_no_thread(stored: dict[str, Path], kind: str) -> None:
    with open_(stored["square"], training(batch=4), kind) as opened:
        next(iter(opened.epoch(0)))
        before = threading.active_count()
        for epoch in range(6):
            for _ in opened.epoch(epoch):
                break
        held = opened.epoch(0)
        next(held)
        assert len(all_of(opened, 1)) == 18, "another epoch may begin while one is held"
        assert list(held) == [], "which ends it"
        assert threading.active_count() <= before + 1
        held = opened.epoch(0)
        next(held)
    assert not [t for t in threading.enumerate() if t.name.startswith("lotus-loader") or "_Epoch" in t.name]
    opened.close()
    with pytest.raises(RuntimeError, match="closed"):
        opened.epoch(0)


@pytest.mark.parametrize(("epoch", "skip"), [(-1, 0), (0, 6), (0, -1)])
def test_positions_that_are_not_there(stored: dict[str, Path], kind: str, epoch: int, skip: int) -> None:
    with open_(stored["square"], training(), kind) as opened, pytest.raises(ValueError, match="no batch"):
        opened.epoch(epoch, skip)


def test_bytes_that_travel_are_normalized_over_there(stored: dict[str, Path], kind: str) -> None:
    """On a GPU, images arrive as bytes and are normalized there: the same bits as on the CPU."""
    plan = training()
    with open_(stored["mixed"], plan, kind, augment=AUGMENTS["pad"]) as opened:
        here = all_of(opened)
    with open_(stored["mixed"], plan, kind, augment=AUGMENTS["pad"], device="meta") as opened:
        opened.device = torch.device("cpu")  # type: ignore[attr-defined]
        there = all_of(opened)
    for one, other in zip(here, there, strict=True):
        assert other.images.is_contiguous()
        assert torch.equal(one.images, other.images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(stored: dict[str, Path], kind: str) -> None:
    plan = training()
    with open_(stored["mixed"], plan, kind) as here, open_(stored["mixed"], plan, kind, device="cuda") as there:
        for one, other in zip(here.epoch(0), there.epoch(0), strict=True):
            assert other.images.is_cuda
            assert torch.equal(one.images, other.images.cpu())
            assert torch.equal(one.index, other.index.cpu())


def test_a_damaged_jpeg_reaches_the_consumer(make: Make, kind: str) -> None:
    """A disk that fails after everything was checked: FFCV would give gray pixels, or wait for ever."""
    file = make(source(12, lambda i: (24, 24)), write="jpg")
    start, about = int(beton.opened(file).pointers[7]), file.stat()
    with file.open("r+b") as raw:
        raw.seek(start)
        raw.write(bytes(30))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    with open_(file, training(12, 4), kind, size=16) as loading, pytest.raises(Refused, match="image 7 is damaged"):
        all_of(loading)


# ------------------------------------------------------------------------------------------------------------ equal


STORED = [
    ("square", 12, 0),  # raw, stored at the model's size
    ("square", 8, 1),  # shrunk
    ("square", 17, 1),  # enlarged
    ("mixed", 16, 1),
    ("jpeg", 32, 20),  # two JPEG decoders: FFCV's takes a faster, rougher cosine transform
]


@pytest.mark.parametrize(
    ("file", "size", "tolerance", "name"),
    few([(*one, name) for one in STORED for name in AUGMENTS], lambda one: one[3] == "resized" or one[0] == "mixed"),
)
def test_both_loaders_give_the_same_batches(
    stored: dict[str, Path], file: str, size: int, tolerance: float, name: str
) -> None:
    pytest.importorskip("ffcv")
    plan = training()
    with (
        open_(stored[file], plan, "ffcv", size=size, augment=AUGMENTS[name]) as one,
        open_(stored[file], plan, "torch", size=size, augment=AUGMENTS[name]) as other,
    ):
        resized = tolerance > 0 or name == "resized"
        for a, b in zip(one.epoch(2), other.epoch(2), strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.labels, b.labels)
            difference = (levels(a.images) - levels(b.images)).abs()
            assert difference.max() <= max(tolerance, resized) + 1e-3
            if tolerance > 1:
                assert difference.mean() < 2
            if not resized:
                assert torch.equal(a.images, b.images)


@pytest.mark.skipif("LOTUS_TEST_DATA" not in os.environ, reason="LOTUS_TEST_DATA names no folder with real data")
def test_both_loaders_on_real_images(make: Make) -> None:
    pytest.importorskip("ffcv")
    root = Path(os.environ["LOTUS_TEST_DATA"])
    for name, path, write, size, crop, most, usual in (
        ("cifar10", "cifar10.npz", "raw", 32, "pad", 0.0, 0.0),
        ("imagefolder", "imagenette224", "jpg", 160, "resized", 40.0, 1.5),
    ):
        if not (root / path).exists():
            continue
        train, _ = open_data(Data(name=name, path=str(root / path)))
        some = split(train, 90 / len(train), seed=0)[1]
        file = make(some, name, write=write)
        augment = Augment(crop=crop, flip=True)  # type: ignore[arg-type]
        with (
            open_(file, training(len(some), 32), "ffcv", size=size, augment=augment) as one,
            open_(file, training(len(some), 32), "torch", size=size, augment=augment) as other,
        ):
            for a, b in zip(one.epoch(0), other.epoch(0), strict=True):
                difference = (levels(a.images) - levels(b.images)).abs()
                assert difference.max() <= most
                assert difference.mean() <= usual


def test_the_table_is_what_is_seen() -> None:
    """Each line of the table, carried out by hand with slices."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    fill = np.array([1, 2, 3], np.uint8)
    found = view(pixels, np.array([0, 0, 6, 6, 2, -1, 0], np.int32), 6, fill)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    padded[:4], padded[-4:], padded[:, :4], padded[:, -4:] = fill, fill, fill, fill
    assert np.array_equal(found, padded[6:12, 3:9])
    mirrored = view(pixels, np.array([0, 0, 6, 6, 2, -1, 1], np.int32), 6, fill)
    assert np.array_equal(mirrored, found[:, ::-1])
    assert np.array_equal(view(pixels, np.array([1, 2, 3, 3, 0, 0, 0], np.int32), 3, fill), pixels[1:4, 2:5])


def test_resizing_is_opencv_s() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (120, 120, 3), dtype=np.uint8)
    for _ in range(300):
        height, width, size = (int(v) for v in (*rng.integers(1, 120, 2), rng.choice([8, 31, 32, 57, 96])))
        part = np.ascontiguousarray(noise[:height, :width])
        theirs = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA)
        assert np.abs(theirs.astype(int) - resize(part, size)).max() <= 1, (height, width, size)


def test_padding_is_the_mean_color(stored: dict[str, Path], kind: str) -> None:
    with open_(stored["square"], training(), kind, augment=Augment(crop="pad", pad=11)) as opened:
        batch = next(iter(opened.epoch(0)))
    view = View(size=12, augment=Augment(crop="pad", pad=11), seed=5)
    table = parameters(view, 0, batch.index.numpy(), np.full(16, 12), np.full(16, 12))
    for image, line in zip(batch.images, table):
        if line[4] > 0:
            assert image[:, -1].abs().max() * 0.25 * 255 <= 0.51, "normalized nought, to half a gray level"


# --------------------------------------------------------------------------------------------------------- refusals


def test_rows_beyond_the_file(stored: dict[str, Path], kind: str) -> None:
    with pytest.raises(Refused, match=r"row 70 .*holds 70"):
        open_(stored["square"], SamplePlan([3, 70], batch_size=2), kind)


def test_files_that_are_not_whole(make: Make, kind: str) -> None:
    file = make(source(20))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Refused, match="cut off"):
        open_(file, training(20), kind)
    beton.Manifest.path(file).unlink()
    with pytest.raises(Refused, match="half-written"):
        open_(file, training(20), kind)
    with pytest.raises(Refused, match="does not exist"):
        open_(file.with_name("none.beton"), training(20), kind)
    with pytest.raises(Refused, match=r"data\.loader"):
        open_(make(source(20)), training(20), "dali")


def test_without_ffcv_the_torch_loader_stands_in_and_says_so(
    stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lotus.data.ffcv", None)  # importing it raises ImportError
    monkeypatch.setattr(loader, "warned", set())
    with pytest.warns(UserWarning, match="stands in.*2.4 times on JPEG"):
        opened = open_(stored["square"], training(), "auto")
    assert opened.kind == "torch"
    assert len(all_of(opened)) == 5
    opened.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_(stored["square"], training(), "auto").close()  # once is enough
    with pytest.raises(Refused, match="ffcv is not here"):
        open_(stored["square"], training(), "ffcv")


@pytest.mark.parametrize("write", ["raw", "jpg"])
def test_an_image_that_changed_is_named_before_its_batch_is_given(make: Make, kind: str, write: str) -> None:
    file = make(source(40), write=write, loader="torch")
    stored = beton.opened(file)
    about = file.stat()
    with file.open("r+b") as opened:  # under its old time, as a disk may do it
        opened.seek(int(stored.pointers[29] + stored.sizes[29]) - 4)
        opened.write(b"\xaa\xbb")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    plan = SamplePlan.evaluation(np.arange(40), batch_size=8)
    with open_(file, plan, kind, size=8) as made:
        given = made.epoch(0)
        got = [next(given) for _ in range(3)]
        assert [batch.index.tolist()[0] for batch in got] == [0, 8, 16]
        with pytest.raises(Refused, match=r"train\.beton: image 29 .*Delete the file"):
            next(given)


@pytest.mark.parametrize("name", few(["jpeg", "both"], ["both"]))
def test_images_that_stay_decoded_are_the_same_and_decoded_once(
    stored: dict[str, Path], kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Look(size=12, augment=AUGMENTS["resized"], mean=MEAN, std=STD, seed=5)

    def made(keep: bool) -> Any:
        return open_loader(stored[name], training(60), look, kind=kind, workers=2, keep=keep)

    with made(False) as fresh, made(True) as keeps, made(True) as shares:
        assert fresh.kept is decoded.NOTHING
        for epoch in range(2):
            for one, other in zip(fresh.epoch(epoch), keeps.epoch(epoch), strict=True):
                assert torch.equal(one.images, other.images)
        packed = keeps.beton.modes == JPEG
        assert np.array_equal(keeps.kept.there, packed & (np.arange(70) < 60)), "of what nobody reads, nothing"
        assert f"{packed.sum()} JPEG images stay decoded" in decoded.sentence(keeps.beton, keeps.kept)
        keeps.kept.pool[:] = 7
        for batch in shares.epoch(0):
            flat = batch.images.flatten(2).std(2).amax(1) < 1e-5
            assert np.array_equal(flat, packed[batch.index]), "read where they were kept, by any loader"
    decoded.HELD.pop(beton.opened(stored[name]))  # the next one is not to see sevens
    monkeypatch.setattr(decoded, "room", lambda: 100.0)
    with made(True) as lacks:
        assert lacks.kept is decoded.NOTHING
        assert "are decoded whenever they are read" in decoded.sentence(lacks.beton, lacks.kept)
