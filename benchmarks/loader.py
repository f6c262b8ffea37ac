"""Images a second: LOTUS' loader beside a torchvision DataLoader, in one run.

    python benchmarks/loader.py                           # pictures that it draws itself
    python benchmarks/loader.py IMAGES --cifar CIFAR10    # a folder of class folders, and CIFAR-10 (.npz or a folder)

Two stories, each a whole training input: decode, augment, normalize, batch of float32 tensors in order of a shuffle.

* 224 pixels: random-resized crop, flip. Both read the same JPEGs (longest side 256, quality 90): LOTUS from a .beton, the
  DataLoader from files through Pillow, as ``torchvision.datasets.ImageFolder`` does.
* CIFAR-10: crop after padding by 4, flip. LOTUS from a .beton, the DataLoader from an array in memory, as
  ``torchvision.datasets.CIFAR10`` does.

Each is warmed up by an epoch (compilation, worker processes, page cache), then they take turns, an epoch each; what is
shown is the median over the turns. To be reached: 2.0 times at 224 pixels, 4.0 times on CIFAR-10.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from lotus.config import Augment, Data
from lotus.data import beton
from lotus.data.dataset import open_data
from lotus.data.loader import writer
from lotus.data.source import Source
from selection import atomic_files
from selection.errors import Refused

TARGETS = {"224 px JPEG": 2.0, "CIFAR-10": 4.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="class folders of pictures; without, they are drawn")
    parser.add_argument("--cifar", default="", help="CIFAR-10; without, images of its size are drawn")
    parser.add_argument("--images", type=int, default=1536, help="at most so many pictures (%(default)s)")
    parser.add_argument("--small-images", type=int, default=20_000, help="and so many of CIFAR's size (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images a batch (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader processes, LOTUS threads (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="timed epochs of each (%(default)s)")
    parser.add_argument("--kind", default="ffcv", choices=["ffcv", "torch"], help="LOTUS' loader (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="LOTUS' loader keeps decoded images, as a training does")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    told = parser.parse_args()
    try:
        photos = open_data(Data(path=told.folder))[0] if told.folder else drawn(told.images, photo)
        small = (
            open_data(Data(name="cifar10", path=told.cifar))[0] if told.cifar else drawn(told.small_images, thumbnail)
        )
        with tempfile.TemporaryDirectory() as scratch:
            rows = [
                compare("224 px JPEG", first(photos, told.images), Path(scratch), told),
                compare("CIFAR-10", first(small, told.small_images), Path(scratch), told),
            ]
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores, batch {told.batch}, {told.workers} workers, median of {told.turns} turns, images a second")
    print(f"{'':14}{'torchvision':>14}{'LOTUS (' + told.kind + ')':>16}{'ratio':>8}{'wanted':>8}")
    for row in rows:
        print(
            f"{row['story']:14}{row['torchvision']:14,.0f}{row['lotus']:16,.0f}{row['ratio']:8.2f}{row['wanted']:8.1f}"
        )
    if told.json:
        atomic_files.write_json(told.json, {"cores": cores, "batch": told.batch, "workers": told.workers, "rows": rows})
    return 0


def compare(story: str, source: Source, scratch: Path, told: argparse.Namespace) -> dict[str, Any]:
    """Both loaders over the same images, by turns."""
    print(f"{story}: writing {len(source)} images", flush=True)
    large = story != "CIFAR-10"
    file = scratch / f"{'photos' if large else 'small'}.beton"
    for _ in beton.prepare(
        source, file, Data(write="jpg" if large else "raw", max_side=256, damaged="skip"), choose=writer
    ):
        pass
    manifest = beton.Manifest.load(file)
    theirs = torchvision_epochs(file, manifest, scratch / "files", large, told)
    ours = lotus_epochs(file, manifest, large, told)
    speeds: dict[str, list[float]] = {"torchvision": [], "lotus": []}
    for turn in range(told.turns + 1):
        for name, epoch in (("torchvision", theirs), ("lotus", ours)):
            began, images = time.perf_counter(), 0
            for count in epoch(turn):
                images += count
            speed = images / (time.perf_counter() - began)
            assert images == manifest.n
            if turn:  # the first warms up
                speeds[name].append(speed)
        if turn:
            print(f"  turn {turn}: {speeds['torchvision'][-1]:,.0f} and {speeds['lotus'][-1]:,.0f}", flush=True)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratio = medians["lotus"] / medians["torchvision"]
    return {"story": story, **medians, "ratio": ratio, "wanted": TARGETS[story], "turns": speeds}


Epoch = Callable[[int], Iterable[int]]
"""Goes through an epoch, batch after batch, and tells how many images each holds."""


def lotus_epochs(file: Path, manifest: beton.Manifest, large: bool, told: argparse.Namespace) -> Epoch:
    from lotus.data.loader import open_loader
    from lotus.data.sample_plan import SamplePlan
    from lotus.data.views import Look

    look = Look(
        size=224 if large else 32,
        augment=Augment(crop="resized" if large else "pad", pad=4, flip=True),
        mean=manifest.mean,
        std=manifest.std,
    )
    plan = SamplePlan(np.arange(manifest.n), batch_size=told.batch)
    loader = open_loader(file, plan, look, kind=told.kind, workers=told.workers, keep=told.keep)
    return lambda epoch: (len(batch.images) for batch in loader.epoch(epoch))


class Files:
    """``torchvision.datasets.ImageFolder``, for the pictures that the .beton holds."""

    def __init__(self, file: Path, folder: Path, transform: Callable[[Image.Image], Any]) -> None:
        opened = beton.opened(file)
        folder.mkdir()
        self.labels, self.transform = opened.labels.tolist(), transform
        self.files = [folder / f"{row}.jpg" for row in range(len(opened))]
        for row, path in enumerate(self.files):
            path.write_bytes(opened.payload(row).tobytes())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        with self.files[row].open("rb") as opened:
            return self.transform(Image.open(opened).convert("RGB")), self.labels[row]


class Arrays:
    """``torchvision.datasets.CIFAR10``."""

    def __init__(self, file: Path, transform: Callable[[Image.Image], Any]) -> None:
        opened = beton.opened(file)
        self.labels, self.transform = opened.labels.tolist(), transform
        self.images = np.stack([opened.image(row) for row in range(len(opened))])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


def torchvision_epochs(
    file: Path, manifest: beton.Manifest, folder: Path, large: bool, told: argparse.Namespace
) -> Epoch:
    from torch.utils.data import DataLoader
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(224, scale=(0.25, 1)) if large else transforms.RandomCrop(32, padding=4)
    transform = transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(manifest.mean, manifest.std),
        ]
    )
    dataset: Any = Files(file, folder, transform) if large else Arrays(file, transform)
    loader = DataLoader(
        dataset, told.batch, shuffle=True, num_workers=told.workers, persistent_workers=told.workers > 0
    )
    return lambda epoch: (len(images) for images, _ in loader)


def first(source: Source, count: int) -> Source:
    """``count`` of the images, by chance, the same each time."""
    if len(source) <= count:
        return source
    return source.part(np.sort(np.random.default_rng(0).permutation(len(source))[:count]), source.where)


def drawn(count: int, draw: Callable[[int], np.ndarray]) -> Source:
    return Source(
        labels=np.arange(count) % 10,
        classes=tuple("0123456789"),
        read=draw,
        name=lambda i: f"drawn {i}",
        fingerprint=f"{draw.__name__} {count}",
    )


def photo(number: int) -> np.ndarray:
    """500 x 375 pixels that compress about as a photograph does: soft light, edges, grain."""
    rng = np.random.default_rng(number)
    soft = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(soft).resize((500, 375), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, w, h = rng.integers(0, [500, 375, 160, 160])
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((int(x), int(y), int(x + w), int(y + h)), fill=color)
    return np.clip(np.asarray(picture) + rng.normal(0, 9, (375, 500, 1)), 0, 255).astype(np.uint8)


def thumbnail(number: int) -> np.ndarray:
    """32 x 32 pixels."""
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


if __name__ == "__main__":
    sys.exit(main())
