"""What `lotus inspect` finds of what was planted, in which time and memory. One command:

    python benchmarks/inspect_data.py CIFAR10.npz                  # 50,000 images: 3 CPU minutes a fraction of wrong labels
    python benchmarks/inspect_data.py IMAGENETTE --out OUT         # a folder of train/CLASS/picture, val/CLASS/picture
    python benchmarks/inspect_data.py CIFAR10.npz --images 10000 --fractions 0.1
    python benchmarks/inspect_data.py CIFAR10.npz --no-labels
    python benchmarks/inspect_data.py CIFAR10.npz --photos 224     # its 10,000 test images as JPEGs of 224 px, by `lotus inspect`
    python benchmarks/inspect_data.py --tiny                       # scikit-learn's digits; only shows that it works

It runs `lotus.inspect.findings.inspect`, as the command line does, on the data with a fraction of the labels changed to another
class, drawn evenly, and with copies added to train: one in twenty images again, cropped (0.8 to 0.97 of each side, anywhere),
mirrored, resized (to 0.5 to 0.8 of the side; of an array: and back) or compressed (JPEG, quality 40 to 90), a quarter each. As many
more, a tenth of that, are added to train from val: leaks.

Doubles: recall is how many copies are found with their original; precision is, of all pairs that hold a copy, those of it and
what it was made of, of pictures that have no double among the data as they came. Doubles that the data had are counted apart, for
somebody to look at. Labels: average precision of the ranking that `inspect` makes, precision
and recall of its list, and the same of cleanlab (if it is installed) on the same network's probabilities. Time is CPU time of this
process, all threads, and its largest memory; OMP_NUM_THREADS=1 makes it the time of one thread.

With --photos nothing is planted: the test images of an .npz are written as JPEGs of that side, enlarged bicubically by Pillow, into a
temporary folder (or --out) of class folders, all of them different pictures, and `lotus inspect` looks through it, as a process of its own
whose seconds, CPU seconds and largest memory are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else selection.py of this folder is found first

from lotus import config
from lotus.data import pictures
from lotus.data.dataset import open_data
from lotus.data.source import Source
from lotus.inspect import findings, labels, network

KINDS = ("crop", "flip", "resize", "jpeg")


def main() -> None:
    options = _parse()
    if options.photos:
        print(json.dumps(looked_through(options)))
        return
    train, val = _data(options)
    rows = []
    print(f"{'wrong':>6} {'AP':>6} {'listed':>7} {'right':>6} {'found':>6}   {'cleanlab: AP':>12} {'listed':>7} {'right':>6} {'found':>6}   "
          f"{'doubles: right':>14} {'found':>6} " + " ".join(f"{kind:>6}" for kind in KINDS) + f" {'leaks':>6}   {'CPU s':>6} {'MB':>6}")  # fmt: skip
    for fraction in options.fractions:
        row = measure(train, val, fraction, options.seed)
        rows.append(row)
        print(_line(row), flush=True)
    told = {
        "data": options.data or "digits",
        "train": len(train),
        "val": len(val),
        "rows": rows,
    }
    print(json.dumps(told))
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        (Path(options.out) / "inspect_data.json").write_text(json.dumps(told, indent=1))


def looked_through(options: argparse.Namespace) -> dict[str, Any]:
    """What `lotus inspect` takes for a folder of photos."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as made:
        photos = Path(options.out or made) / "photos"
        count = write_photos(_data(options)[1], photos, options.photos, options.images)
        command = [
            sys.executable,
            "-m",
            "lotus",
            "inspect",
            str(photos),
            "--out",
            str(Path(made) / "inspected"),
            "--json",
        ]
        began = time.perf_counter()
        told = json.loads(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout)
        spent = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {name: len(told[name]) for name in ("duplicates", "leaks", "labels", "outliers", "damaged")}
    return {
        "photos": count, "side": options.photos, "seconds": spent, "cpu_s": used.ru_utime + used.ru_stime,
        "rss_mb": used.ru_maxrss / 1e3, **found,
    }  # fmt: skip


def write_photos(source: Source, folder: Path, side: int, most: int = 0) -> int:
    """Images of ``source``, at ``most`` so many (0: all), as JPEGs of ``side`` pixels in class folders; returns how many."""
    count = min(len(source), most or len(source))
    for row in range(count):
        home = folder / source.classes[source.labels[row]]
        home.mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(source.read(row)).resize((side, side), Image.Resampling.BICUBIC)
        large.save(home / f"{row:06d}.jpg", quality=90)
    return count


def measure(train: Source, val: Source, fraction: float, seed: int) -> dict[str, Any]:
    """One row of the table."""
    rng = np.random.default_rng(seed)
    changed, wrong = _wrong(train, fraction, rng)
    planted = Planted.of(changed, val, rng)
    kept: dict[str, Any] = {}
    whole, judged = labels.suspects, network.judge

    def watched(margins: Any, rows: Any) -> labels.Suspects:
        kept.update(margins=margins, planted=rows)
        return whole(margins, rows)

    def judging(*given: Any, **more: Any) -> network.Judged:
        kept["probabilities"], kept["told"] = (made := judged(*given, **more)).probabilities, given[1]
        return made

    labels.suspects, network.judge = watched, judging
    began = time.process_time()
    try:
        found = findings.inspect(planted.train, val, most=len(planted.train))
    finally:
        labels.suspects, network.judge = whole, judged
    spent = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "fraction": fraction,
        **_labels(found, kept, wrong),
        **planted.judged(found),
        "cpu_s": spent,
        "rss_mb": memory,
    }


def _labels(found: findings.Findings, kept: dict[str, Any], wrong: np.ndarray) -> dict[str, Any]:
    """Of the images that are no copies and whose labels were not made wrong by `inspect` itself."""
    if "margins" not in kept:
        return {}
    count = len(wrong)
    rows = np.setdiff1d(np.arange(count), kept["planted"])
    listed = np.array([row for row, _, _ in found.mislabeled if row < count], np.int64)
    told = _listed(listed, wrong, rows) | {"found_of_planted": found.share_found, "wrong_estimated": found.share_wrong}
    if wrong[rows].any():
        told["ap"] = average_precision_score(wrong[rows], -kept["margins"][:count][rows])
        told["ap_all"] = average_precision_score(wrong, -_last(kept["margins"], kept["planted"])[:count])
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return told
    own, probabilities = found.train.labels[:count][rows], kept["probabilities"][:count][rows]
    issues = rows[np.flatnonzero(find_label_issues(own, probabilities, n_jobs=1))]
    told["cleanlab"] = _listed(issues, wrong, rows)
    if wrong[rows].any():
        told["cleanlab"]["ap"] = max(
            average_precision_score(wrong[rows], -get_label_quality_scores(own, probabilities, method=method))
            for method in ("self_confidence", "normalized_margin")
        )
    return told


def _last(margins: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those that are not judged, ranked behind all others."""
    ranked = margins.copy()
    ranked[rows] = margins.max() + 1
    return ranked


def _listed(listed: np.ndarray, wrong: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    right = int(wrong[listed].sum())
    return {
        "listed": len(listed),
        "right": right / max(1, len(listed)),
        "found": right / max(1, int(wrong[rows].sum())),
    }


@dataclasses.dataclass
class Planted:
    """Train with copies behind it."""

    train: Source
    count: int
    """Images of train before."""
    originals: list[int]
    """Of each copy: its row in train, or -1 - its row in val."""

    @classmethod
    def of(cls, train: Source, val: Source, rng: np.random.Generator) -> Planted:
        count = max(4, len(train) // 20)
        leaked = max(1, min(count // 10, len(val)))
        originals = [
            *rng.permutation(len(train))[:count].tolist(), *(-1 - rng.permutation(len(val))[:leaked]).tolist()
        ]  # fmt: skip
        seeds = rng.integers(1 << 62, size=len(originals))

        def read(row: int) -> np.ndarray:
            if row < len(train):
                return train.read(row)
            at, where = row - len(train), originals[row - len(train)]
            pixels = train.read(where) if where >= 0 else val.read(-1 - where)
            return copied(pixels, KINDS[at % 4], np.random.default_rng(seeds[at]))

        own = [train.labels[where] if where >= 0 else val.labels[-1 - where] for where in originals]
        more = dataclasses.replace(
            train, labels=np.concatenate([train.labels, own]), read=read, name=str, root="", rows=None, whole=0
        )
        return cls(more, len(train), originals)

    def judged(self, found: findings.Findings) -> dict[str, Any]:
        """Precision and recall of pairs."""
        count = self.count
        pairs = {(a, b) for a, b, _ in found.pairs}
        own = {row for pair in pairs if max(pair) < count for row in pair}
        leaks = {(a, b) for a, b, _ in found.leaks}
        hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        leaked = []
        for at, where in enumerate(self.originals):
            if where >= 0:
                hits[KINDS[at % 4]].append((where, count + at) in pairs)
            else:
                leaked.append((count + at, -1 - where) in leaks)
        clean = [(a, b) for a, b in pairs if b >= count and self._plain(a, own) and self._plain(b, own)]
        right = [self._root(a) == self._root(b) for a, b in clean]
        every = [hit for some in hits.values() for hit in some]
        return {
            "doubles_right": float(np.mean(right)) if right else None, "doubles_found": float(np.mean(every)),
            "doubles_wrong": [pair for pair, fine in zip(clean, right, strict=True) if not fine],
            **{kind: float(np.mean(some)) for kind, some in hits.items()}, "leaks_found": float(np.mean(leaked)),
            "copies": len(self.originals), "own_pairs": sum(b < count for _, b in pairs), "own_doubles": len(own),
        }  # fmt: skip

    def _root(self, row: int) -> int:
        return row if row < self.count else self.originals[row - self.count]

    def _plain(self, row: int, own: set[int]) -> bool:
        return (root := self._root(row)) >= 0 and root not in own


def copied(pixels: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The picture again, as it is found on disks."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if kind == "flip":
        return np.ascontiguousarray(pixels[:, ::-1])
    if kind == "crop":
        across, down = (rng.uniform(0.8, 0.97) * side for side in (width, height))
        left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
        box = left, top, left + across, top + down
        size = (width, height) if width <= 64 else (round(across), round(down))
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
    if kind == "resize":
        by = rng.uniform(0.5, 0.8)
        smaller = image.resize((max(1, round(by * width)), max(1, round(by * height))), Image.Resampling.BICUBIC)
        return np.asarray(smaller.resize((width, height), Image.Resampling.BICUBIC) if width <= 64 else smaller)
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=int(rng.integers(40, 91)))
    return pictures.read(packed.getvalue())


def _wrong(train: Source, fraction: float, rng: np.random.Generator) -> tuple[Source, np.ndarray]:
    """A fraction of the labels changed to another class, drawn evenly; and (N,) whether each is wrong."""
    rows = rng.permutation(len(train))[: round(fraction * len(train))]
    own, classes = train.labels.copy(), len(train.classes)
    own[rows] = (own[rows] + rng.integers(1, classes, len(rows))) % classes
    return dataclasses.replace(train, labels=own), own != train.labels


def _data(options: argparse.Namespace) -> tuple[Source, Source]:
    if options.tiny:
        train, val = open_data(config.Data(name="digits"))
    else:
        kind = "npz" if options.data.endswith(".npz") else "imagefolder"
        train, val = open_data(config.Data(name=kind, path=options.data))
    if options.images and options.images < len(train):
        rows = np.sort(np.random.default_rng(0).permutation(len(train))[: options.images])
        train = train.part(rows, train.where)
    return train, val


def _line(row: dict[str, Any]) -> str:
    def put(value: float | None, wide: int = 6) -> str:
        return f"{'-' if value is None else f'{value:.3f}':>{wide}}"

    other = row.get("cleanlab", {})
    return (
        f"{row['fraction']:6.2f} {put(row.get('ap'))} {row.get('listed', 0):7,} {put(row.get('right'))} {put(row.get('found'))}   "
        f"{put(other.get('ap'), 12)} {other.get('listed', 0):7,} {put(other.get('right'))} {put(other.get('found'))}   "
        f"{put(row['doubles_right'], 14)} {put(row['doubles_found'])} " + " ".join(put(row[kind]) for kind in KINDS)
        + f" {put(row['leaks_found'])}   {row['cpu_s']:6.0f} {row['rss_mb']:6.0f}"
    )  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="", help="an .npz of the catalog, or a folder of pictures")
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2], help="of labels made wrong"
    )
    parser.add_argument("--images", type=int, default=0, help="of train at most (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-labels", action="store_true", help="doubles and leaks alone, which take a third of the time"
    )
    parser.add_argument("--photos", type=int, default=0, metavar="SIDE",
                        help="write the test images as JPEGs of that side, and look through them")  # fmt: skip
    parser.add_argument("--out", default="", help="a folder for inspect_data.json, or for the photos")
    parser.add_argument("--tiny", action="store_true", help="scikit-learn's digits, which need no file")
    options = parser.parse_args()
    if not options.data and not options.tiny:
        parser.error("give an .npz or a folder, or --tiny")
    if options.tiny:
        network.SEEN = 4000
    if options.no_labels:
        labels.FEWEST, options.fractions = sys.maxsize, [0.0]
    return options


if __name__ == "__main__":
    main()
