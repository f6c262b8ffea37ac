"""What several benchmarks do alike: a part of CIFAR-10, and tables that go on where they were stopped. No benchmark itself."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from selection import atomic_files


def pool_of_images(data: str | Path, count: int, file: Path) -> None:
    """Of an .npz of the catalog's ``count`` training images, the first of each class, equally many, in ``file``; once."""
    if file.exists():
        return
    with np.load(data) as whole:
        labels = np.asarray(whole["y_train"]).reshape(-1)
        classes = np.unique(labels)
        rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[: count // len(classes)] for label in classes]))
        others = {name: whole[name] for name in whole.files if not name.endswith("train")}
        with atomic_files.opened(file) as out:
            np.savez(out, x_train=whole["x_train"][rows], y_train=labels[rows], **others)


def key(settings: Mapping[str, Any]) -> str:
    """By which the rows of the same settings find each other."""
    return atomic_files.digest(settings, size=6)


def rows_of(book: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []


def as_they_end(
    running: Sequence[Future[dict[str, Any]]], book: Path | None, told: Callable[[dict[str, Any]], str]
) -> Iterator[dict[str, Any]]:
    """A row as its process ends, written into the book and told with the time that is left."""
    began = time.monotonic()
    for number, future in enumerate(as_completed(running), 1):
        row = future.result()
        if book is not None:
            atomic_files.append(book, json.dumps(row))
        left = (time.monotonic() - began) / number * (len(running) - number) / 60
        print(f"{number}/{len(running)}  {told(row)} ({left:.0f} min left)", file=sys.stderr, flush=True)
        yield row
