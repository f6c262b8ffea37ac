"""Patch tickets: a score map that equals a pattern of the pixels still lies on that pattern after augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lotus.config import Augment, Data, Recipe
from lotus.data import beton, patch_maps
from lotus.data.format import Beton
from lotus.data.loader import open_loader
from lotus.data.patch_maps import Maps, Tickets
from lotus.data.sample_plan import SamplePlan
from lotus.data.source import Source
from lotus.data.views import Look, View
from lotus.training.objective import Objective
from selection.errors import Refused

N, GRID = 24, 8


def patterned(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Gray pictures (N, side, side, 3) whose patch (y, x) has the brightness of a random map (N, 8, 8)."""
    maps = np.random.default_rng(0).integers(0, 256, (N, GRID, GRID)).astype(np.uint8)
    step = side // GRID
    return np.repeat(np.repeat(maps, step, 1), step, 2)[..., None].repeat(3, -1), maps


def written(folder: Path, pixels: np.ndarray) -> Path:
    labels = np.arange(N) % 2
    source = Source(labels, ("a", "b"), lambda row: pixels[row], str, "drawn")
    for _ in beton.prepare(source, folder / "x.beton", Data(write="raw", max_side=0)):
        pass
    return folder / "x.beton"


@pytest.mark.parametrize(
    "augment",
    [
        None,
        Augment(flip=True),
        Augment(crop="pad", pad=5, flip=True),
        Augment(crop="resized", scale=(0.2, 1.0), flip=True),
    ],
    ids=["none", "flip", "pad", "resized"],
)
@pytest.mark.parametrize("side", [32, 64])
def test_scores_lie_where_the_pixels_lie(tmp_path: Path, augment: Augment | None, side: int) -> None:
    pixels, maps = patterned(side)
    file = written(tmp_path, pixels)
    plan = SamplePlan(np.arange(N), seed=3, batch_size=8)
    stored = Beton(file)
    # Asked at the stored size, the model saw the whole picture.
    look = Look(size=32, augment=augment, seed=3, mean=(0, 0, 0), std=(1 / 255,) * 3)
    held = Tickets(Maps(maps, side), stored.heights, stored.widths, look, (4, 4))
    mixing = Objective(Recipe(mixup=0.5, cutmix=0.5), 2, seed=1)
    worst = []
    with open_loader(file, plan, look, kind="torch") as loader:
        for epoch in (0, 1):
            for number, batch in enumerate(loader.epoch(epoch)):
                seen = held.seen(batch.index, epoch)
                mixed, _ = mixing.mix(seen, batch.labels, epoch=epoch, step=number)
                images, _ = mixing.mix(batch.images, batch.labels, epoch=epoch, step=number)
                for ours, theirs in ((seen, batch.images), (mixed, images)):
                    truth = torch.nn.functional.avg_pool2d(theirs.mean(1, keepdim=True), (4, 4)).flatten(1)
                    worst.append((held.pooled(ours) - truth).abs().mean())
                    if side == 32 and (augment is None or augment.crop != "resized"):  # nothing is resized
                        torch.testing.assert_close(held.pooled(ours), truth, atol=1e-3, rtol=0)
    # Resizing smoothes the pixels across the edges of patches; a shifted or mirrored map would be off by 60 or more.
    assert max(worst) < 12


def test_what_was_not_scored_counts_as_the_middle() -> None:
    """An oblong image of which the asked model saw the square in the middle."""
    maps = np.zeros((1, 2, 2), np.uint8)
    view = View(size=8, augment=Augment(crop="resized", scale=(1.0, 1.0), ratio=(3.0, 3.0)))
    held = Tickets(Maps(maps, 8), np.array([8]), np.array([24]), view, (2, 2))
    seen = held.seen(torch.tensor([0]), 0)[0, 0]
    expected = [127.5, 127.5, 127.5, 0, 0, 127.5, 127.5, 127.5]  # 24 pixels on 8: a third of them was seen
    assert seen[0].tolist() == pytest.approx(expected)


def test_ranks() -> None:
    scores = torch.tensor([[0.1, 5.0, -2.0, 0.3], [1e9, 0.0, 1.0, 2.0]])
    rng = torch.Generator().manual_seed(1)
    assert patch_maps.ranks(scores, rng).tolist() == [[85, 255, 0, 170], [255, 0, 85, 170]]
    many = torch.randperm(196, generator=torch.Generator().manual_seed(0)).float()[None]
    assert torch.equal(patch_maps.ranks(many, rng)[0].argsort(), many[0].argsort())


def test_no_place_wins_among_equals() -> None:
    """A black border all round a digit: its patches stand below the digit, and each of them is the last one as often as another."""
    scores = torch.zeros(4000, 16)
    scores[:, [5, 6, 9, 10]] = torch.tensor([3.0, 1.0, 2.0, 4.0])
    found = patch_maps.ranks(scores, torch.Generator().manual_seed(0)).double()
    assert (found[:, [5, 6, 9, 10]] == torch.tensor([238.0, 204.0, 221.0, 255.0])).all()
    border = [place for place in range(16) if place not in (5, 6, 9, 10)]
    assert (found[:, border].mean(0) - 17 * 5.5).abs().max() < 5 * 17 * 3.46 / 4000**0.5  # five standard errors
    assert found[:, border].sort(1).values.unique(dim=0).tolist() == [[17.0 * place for place in range(12)]]


def test_the_file_comes_back_and_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "patches.npz"
    maps = np.random.default_rng(0).integers(0, 256, (5, 3, 3)).astype(np.uint8)
    patch_maps.save(file, maps, size=24, fingerprint="f")
    found, size = patch_maps.load(file, fingerprint="f")
    assert np.array_equal(found, maps)
    assert size == 24
    assert file.stat().st_size < maps.nbytes + 1500, "one byte a patch"
    with pytest.raises(Refused, match="other data"):
        patch_maps.load(file, fingerprint="g")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(Refused, match="cannot be read"):
        patch_maps.load(file, fingerprint="f")
    with pytest.raises(Refused, match="5 images, and the data has 4"):
        Tickets(Maps(maps, 3), np.ones(4, int), np.ones(4, int), View(size=3), (1, 1))
