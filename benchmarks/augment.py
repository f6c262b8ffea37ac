"""Images a second: LOTUS' augmentations on a batch beside timm's and torchvision's, image by image through Pillow.

    python benchmarks/augment.py                    # on the CPU, one process, as many threads as torch has
    python benchmarks/augment.py --device cuda      # LOTUS there, Pillow on one core as before

Both start from decoded bytes and end with bytes: what is drawn and what is done to the pixels is timed, not decoding,
resizing or normalizing. A loader of timm's has as many processes as there are cores, and LOTUS threads of torch's; so a
fair column is a core's, ``--threads 1``. They take turns; shown is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from lotus.config import Augment
from lotus.data import erasing, policies

POLICIES = {
    "RandAugment": {"auto": "rand-m9-n2-mstd0.5-inc1"},
    "RandAugment, bilinear": {"auto": {"name": "rand-m9-n2-mstd0.5-inc1", "interpolation": "bilinear"}},
    "TrivialAugment": {"auto": "trivial"},
    "3-Augment": {"auto": "3a", "color_jitter": 0.3},
    "color jitter": {"color_jitter": 0.4},
    "random erasing": {"erase": 0.25},
}
FILL = (124, 116, 104)

Run = Callable[[int], object]
"""Goes through all images once; told the number of the turn."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[32, 224], help="of the images, in pixels (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128, help="images a batch (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0: as it has them")
    parser.add_argument("--device", default="cpu", help="where LOTUS works (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    told = parser.parse_args()
    if told.threads:
        torch.set_num_threads(told.threads)
    rows = [compare(name, side, told) for side in told.sides for name in POLICIES]
    print(
        f"\n{torch.get_num_threads()} threads, batch {told.batch}, {told.device}, median of {told.turns} turns, images a second"
    )
    print(f"{'':24}{'side':>6}{'through Pillow':>16}{'LOTUS':>12}{'ratio':>8}")
    for row in rows:
        print(f"{row['policy']:24}{row['side']:6}{row['pillow']:16,.0f}{row['lotus']:12,.0f}{row['ratio']:8.2f}")
    if told.json:
        told.json.write_text(json.dumps({"threads": torch.get_num_threads(), "device": told.device, "rows": rows}))
    return 0


def compare(name: str, side: int, told: argparse.Namespace) -> dict[str, float | int | str]:
    """Both by turns, over the same images."""
    pixels = np.stack([soft(number, side) for number in range(told.batch)])  # (B, S, S, 3)
    runs = {"pillow": pillow(name, pixels), "lotus": lotus(name, pixels, told.device)}
    seconds: dict[str, list[float]] = {which: [] for which in runs}
    for turn in range(told.turns + 1):
        for which, run in runs.items():
            began = time.perf_counter()
            run(turn)
            if turn:  # the first warms up
                seconds[which].append(time.perf_counter() - began)
    speed = {which: told.batch / statistics.median(took) for which, took in seconds.items()}
    return {"policy": name, "side": side, **speed, "ratio": speed["lotus"] / speed["pillow"]}


def lotus(name: str, pixels: np.ndarray, device: str) -> Run:
    augment = Augment.model_validate(POLICIES[name])
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(device)
    noisy = images.float()
    rows, side, fill = np.arange(len(pixels)), pixels.shape[1], np.array(FILL, np.uint8)

    def run(epoch: int) -> None:
        if augment.recolors:
            made = policies.changes(augment, 0, epoch, rows, size=side)
            policies.change(images.clone(), made, fill=fill, size=side)
        if augment.erase:
            erasing.erase(noisy, erasing.boxes(augment, 0, epoch, rows, side), augment.erase_mode)
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def pillow(name: str, pixels: np.ndarray) -> Run:
    from timm.data import auto_augment
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    told = POLICIES[name]
    if "erase" in told:
        noisy = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float()
        erased = RandomErasing(told["erase"], mode="pixel", device="cpu")
        return lambda epoch: erased(noisy)
    hints: dict[str, object] = {
        "img_mean": FILL,
        "magnitude_max": 9.9,
    }  # at 10 timm asks for no bits, which Pillow 12 refuses
    if name.endswith("bilinear"):
        hints["interpolation"] = Image.Resampling.BILINEAR
    steps = {
        "RandAugment": lambda: [auto_augment.rand_augment_transform("rand-m9-n2-mstd0.5-inc1", hints)],
        "TrivialAugment": lambda: [transforms.TrivialAugmentWide(31, InterpolationMode.NEAREST, list(FILL))],
        "3-Augment": lambda: [
            auto_augment.auto_augment_transform("3a", hints), transforms.ColorJitter(0.3, 0.3, 0.3),
        ],
        "color jitter": lambda: [transforms.ColorJitter(0.4, 0.4, 0.4)],
    }[name.split(",")[0]]()  # fmt: skip
    done = transforms.Compose(steps)
    return lambda epoch: [np.asarray(done(Image.fromarray(picture))) for picture in pixels]


def soft(number: int, side: int) -> np.ndarray:
    """A picture (S, S, 3) of soft colors and some grain."""
    rng = np.random.default_rng(number)
    large = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((side, side), 3)
    return np.clip(np.asarray(large) + rng.normal(0, 6, (side, side, 1)), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
