"""All that is found in the pictures of a data set, and the list of those that may go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus.data.source import Source
from lotus.inspect import doubles, labels
from lotus.inspect.look import Looked, look, passed_over

KINDS = ("duplicates", "leaks", "damaged", "labels")
"""What can go on the list to delete."""


@dataclass(eq=False)
class Findings:
    """What is wrong, rows of train first, each list with the worst first.

    A picture is called by ``(part, row)``: train or val, and its row there.
    """

    train: Source
    val: Source
    looked: tuple[Looked, Looked]
    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    """Rows of train that are the same picture, the lower first, and how alike they are."""
    leaks: list[tuple[int, int, float]] = field(default_factory=list)
    """A row of train, the row of val that is the same picture, and how alike they are."""
    mislabeled: list[tuple[int, int, float]] = field(default_factory=list)
    """A row of train, the likelier class, and the margin by which it is ranked."""
    outliers: list[tuple[int, float]] = field(default_factory=list)
    """A row of train, and how far it lies from its nearest five."""
    passed: dict[str, int] = field(default_factory=dict)
    """Files that are no pictures by their ending."""
    judged_by: str = "probe"
    """What the labels were judged by: a probe on pixels, or the margins of a run."""

    def to_delete(self, kinds: tuple[str, ...] = KINDS[:3]) -> list[int]:
        """Rows of train that may go: of doubles all but one, of leaks the copy in train, what is damaged, and wrong labels."""
        gone = set(self.looked[0].damaged) if "damaged" in kinds else set()
        if "leaks" in kinds:
            gone |= {row for row, _, _ in self.leaks}
        if "duplicates" in kinds:
            for first, second, _ in sorted(self.pairs):
                if first not in gone:
                    gone.add(second)
        if "labels" in kinds:
            gone |= {row for row, _, _ in self.mislabeled}
        return sorted(gone)

    def as_json(self) -> dict[str, Any]:
        """Everything, by names of pictures."""
        train, val = self.train, self.val
        name = train.classes
        return {
            "images": {"train": len(train), "val": len(val)},
            "classes": [
                {"class": name[i], "train": int((train.labels == i).sum()), "val": int((val.labels == i).sum())}
                for i in range(len(name))
            ],
            "duplicates": [
                {"keep": train.name(a), "double": train.name(b), "alike": round(s, 4),
                 "same_class": bool(train.labels[a] == train.labels[b])} for a, b, s in self.pairs
            ],
            "leaks": [{"train": train.name(a), "val": val.name(b), "alike": round(s, 4)} for a, b, s in self.leaks],
            "labels": [
                {"image": train.name(row), "label": name[train.labels[row]], "likelier": name[to], "margin": round(by, 4)}
                for row, to, by in self.mislabeled
            ],
            "labels_judged_by": self.judged_by,
            "outliers": [{"image": train.name(row), "distance": round(by, 4)} for row, by in self.outliers],
            "damaged": [
                {"image": part.name(row), "why": why}
                for part, seen in zip((train, val), self.looked, strict=True) for row, why in seen.damaged.items()
            ],
            "passed_over": self.passed,
        }  # fmt: skip


def inspect(
    train: Source,
    val: Source,
    *,
    margins: npt.NDArray[np.floating] | None = None,
    most: int = 1000,
    workers: int = 2,
    root: str = "",
) -> Findings:
    """Look through a data set.

    Args:
        margins: (S, E, N) that a run recorded of the training images; None: labels are judged by a probe on pixels.
        most: outliers and label errors that are listed at most.
        root: the folder whose other files are counted; empty: none.
    """
    looked = look(train, workers), look(val, workers)
    found = Findings(train, val, looked, passed=passed_over(root) if root else {})
    fine = [np.setdiff1d(np.arange(len(part.small)), list(part.damaged)) for part in looked]
    _double(found, fine)
    rows = fine[0]
    if len(rows) < 20:
        return found  # too few to know what is usual
    own = train.labels[rows]
    seen = labels.features(looked[0].small[rows])
    told = labels.left_out(seen, own, len(train.classes))
    wrong, likelier, margin = labels.confident(told, own)
    if margins is not None and margins.shape[2] == len(train):
        found.judged_by, margin = "aum", labels.aum(margins)[rows]
        wrong = np.flatnonzero(margin < 0)  # another class was said more loudly, over the whole training
        wrong = wrong[np.argsort(margin[wrong], kind="stable")]
        others = told.copy()
        others[np.arange(len(own)), own] = -1
        likelier = others.argmax(1)[wrong]
    found.mislabeled = [
        (int(rows[at]), int(to), float(margin[at])) for at, to in zip(wrong[:most], likelier[:most], strict=True)
    ]
    distance = labels.far(seen)
    order = np.argsort(-distance, kind="stable")[: min(most, max(1, len(rows) // 100))]
    found.outliers = [(int(rows[at]), float(distance[at])) for at in order]
    return found


def _double(found: Findings, fine: list[npt.NDArray[np.int64]]) -> None:
    """Doubles within train, and between train and val."""
    count = len(fine[0])
    small = np.concatenate([part.small[rows] for part, rows in zip(found.looked, fine, strict=True)])
    pairs, alike = doubles.find(small)
    for (a, b), by in zip(pairs.tolist(), alike.tolist(), strict=True):
        if b < count:
            found.pairs.append((int(fine[0][a]), int(fine[0][b]), by))
        elif a < count:
            found.leaks.append((int(fine[0][a]), int(fine[1][b - count]), by))
    found.pairs.sort(key=lambda pair: -pair[2])
    found.leaks.sort(key=lambda pair: -pair[2])
