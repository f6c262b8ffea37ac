"""All that is found in the pictures of a data set, and the list of those that may go."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lotus.data.folders import endings, passed_over
from lotus.data.source import Source
from lotus.inspect import doubles, labels
from lotus.inspect.thumbnails import Looked, look

KINDS = ("duplicates", "leaks", "damaged", "labels", "passed")
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
    passed: list[str] = field(default_factory=list)
    """Files that are no pictures by their ending."""
    judged_by: str = "nobody"
    """Who judged the labels: the network, a model of the user's, or the margins of a run (aum); nobody where too few are."""
    share_wrong: float = 0.0
    """Fraction of the labels that is estimated to be wrong, at most."""
    share_found: float = 0.0
    """Fraction of the labels that were made wrong on purpose that the list would hold."""

    @property
    def endings(self) -> dict[str, int]:
        """How many files were passed over, by their ending, the commonest first."""
        return endings(self.passed)

    def listed(self, kinds: tuple[str, ...]) -> list[str]:
        """What may go, as a list has it: paths, of val and of no picture too; of images that are no files their numbers in train."""
        train, val = self.train, self.val
        gone = self.to_delete(kinds)
        if not train.root:
            return [str(row if train.rows is None else int(train.rows[row])) for row in gone]
        broken = [val.name(row) for row in self.looked[1].damaged] if "damaged" in kinds else []
        return [train.name(row) for row in gone] + broken + (self.passed if "passed" in kinds else [])

    def to_delete(self, kinds: tuple[str, ...] = KINDS[:3]) -> list[int]:
        """Rows of train that may go: of doubles all but one, a link before the file that it points to, of leaks the copy in train, what
        is damaged, and wrong labels."""
        gone = set(self.looked[0].damaged) if "damaged" in kinds else set()
        if "leaks" in kinds:
            gone |= {row for row, _, _ in self.leaks}
        if "duplicates" in kinds:
            for first, second, _ in sorted(self.pairs):
                if first not in gone:
                    gone.add(self._kept_first(first, second)[1])
        if "labels" in kinds:
            gone |= {row for row, _, _ in self.mislabeled}
        return sorted(gone)

    def _kept_first(self, first: int, second: int) -> tuple[int, int]:
        """Of two that are the same picture the one that stays, and the other: a file stays, and not the link to it."""
        links = [bool(self.train.root) and os.path.islink(self.train.name(row)) for row in (first, second)]
        return (second, first) if links == [True, False] else (first, second)

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
                 "same_class": bool(train.labels[a] == train.labels[b])}
                for first, second, s in self.pairs for a, b in [self._kept_first(first, second)]
            ],
            "leaks": [{"train": train.name(a), "val": val.name(b), "alike": round(s, 4)} for a, b, s in self.leaks],
            "labels": [
                {"image": train.name(row), "label": name[train.labels[row]], "likelier": name[to], "margin": round(by, 4)}
                for row, to, by in self.mislabeled
            ],
            "labels_judged_by": self.judged_by,
            "labels_wrong_estimated": round(self.share_wrong, 4),
            "labels_found_of_planted": round(self.share_found, 4),
            "outliers": [{"image": train.name(row), "distance": round(by, 4)} for row, by in self.outliers],
            "damaged": [
                {"image": part.name(row), "why": why}
                for part, seen in zip((train, val), self.looked, strict=True) for row, why in seen.damaged.items()
            ],
            "passed_over": self.endings,
            "passed_over_files": self.passed,
        }  # fmt: skip


def inspect(
    train: Source,
    val: Source,
    *,
    recorded: npt.NDArray[np.floating] | None = None,
    model: str = "",
    most: int = 1000,
    workers: int = 2,
    root: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Findings:
    """Look through a data set.

    Args:
        train: the training set.
        val: the validation set, which may hold copies of its images.
        recorded: (S, E, N) margins that a run watched, of the training images or of those that are not damaged; they rank the labels.
        model: the folder of a model whose features judge the labels; empty: a network that is trained on these pictures does.
        most: outliers and label errors that are listed at most; 0: nobody judges, which takes a minute or two.
        workers: threads that decode.
        root: the folder whose other files are listed; empty: none.
        say: is told what is done next.
    """
    say(f"looking at {len(train) + len(val):,} pictures")
    looked = look(train, workers), look(val, workers)
    found = Findings(train, val, looked, passed=passed_over(root) if root else [])
    fine = [np.setdiff1d(np.arange(len(part.small)), list(part.damaged)) for part in looked]
    say("laying them over each other")
    _double(found, fine)
    if most and can_judge(len(fine[0]), len(train.classes)):
        _judge(found, fine[0], recorded, model, most, say)
    return found


def can_judge(images: int, classes: int) -> bool:
    """Whether labels of so many images can be judged."""
    return images >= labels.FEWEST and classes > 1


def _judge(
    found: Findings,
    rows: npt.NDArray[np.int64],
    recorded: npt.NDArray[np.floating] | None,
    model: str,
    most: int,
    say: Callable[[str], None],
) -> None:
    """Labels and outliers among the images ``rows`` of train."""
    from lotus.inspect import network

    own, classes = found.train.labels[rows], len(found.train.classes)
    told, planted = labels.plant(own, classes)
    if model:
        say(f"features of {model}")
        features = network.embedded(model, found.train, rows)
        probabilities, margins, suspects = labels.by_features(features, own, classes)
    else:
        judged = network.judge(found.looked[0].small[rows], told, classes, say=say)
        probabilities, margins, features = judged.probabilities, judged.margins, judged.features
        suspects = labels.suspects(margins, planted)
    wrong, found.share_wrong, found.share_found = suspects.rows, suspects.share, suspects.found
    found.judged_by = "model" if model else "network"
    if recorded is not None and not model and recorded.shape[2] in (len(rows), len(found.train)):
        # Where both say so, by what was watched over the whole training, perhaps without damaged images.
        watched = labels.aum(recorded)
        watched = watched if len(watched) == len(rows) else watched[rows]
        wrong = np.flatnonzero((watched < 0) & (margins < 0) & ~np.isin(np.arange(len(rows)), planted))
        wrong, margins = wrong[np.argsort(watched[wrong], kind="stable")], watched
        found.judged_by = "aum"
    rather = labels.likelier(probabilities, own)
    found.mislabeled = [(int(rows[at]), int(rather[at]), float(margins[at])) for at in wrong[:most]]
    distance = labels.far(features)
    order = np.argsort(-distance, kind="stable")[: min(most, max(1, len(rows) // 100))]
    found.outliers = [(int(rows[at]), float(distance[at])) for at in order]


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
