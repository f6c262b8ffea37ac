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
from selection import links

Floats = npt.NDArray[np.float32]

KINDS = ("duplicates", "leaks", "damaged", "labels", "passed")
"""What can go on the list to delete."""


@dataclass(frozen=True)
class Listed:
    """What may go, as the list has it."""

    gone: list[str]
    """Paths, of val and of no picture too; of images that are no files their numbers in train."""
    held: list[str] = field(default_factory=list)
    """Paths that would be on it, but a picture that stays is a link to them."""
    links: int = 0
    """Links of val to pictures of train, on the list in place of these."""


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
    """Who judged the labels: the network, a model of the user's, features that were there, or the margins of a run (aum); nobody
    where too few are."""
    share_wrong: float = 0.0
    """Fraction of the labels that is estimated to be wrong, at most."""
    share_found: float = 0.0
    """Fraction of the labels that were made wrong on purpose that the list would hold."""

    @property
    def endings(self) -> dict[str, int]:
        """How many files were passed over, by their ending, the commonest first."""
        return endings(self.passed)

    def listed(self, kinds: tuple[str, ...]) -> Listed:
        """What may go; see :class:`Listed`."""
        train, val = self.train, self.val
        gone = self.to_delete(kinds)
        if not train.root:
            return Listed([str(row if train.rows is None else int(train.rows[row])) for row in gone])
        broken = [val.name(row) for row in self.looked[1].damaged] if "damaged" in kinds else []
        pointing = self._links_of_val() if "leaks" in kinds else []
        asked = [train.name(row) for row in gone] + broken + pointing + (self.passed if "passed" in kinds else [])
        pictures = [part.name(row) for part in (train, val) for row in range(len(part))]
        return Listed(*links.apart(asked, pictures), len(pointing))

    def to_delete(self, kinds: tuple[str, ...] = KINDS[:3]) -> list[int]:
        """Rows of train that may go: of doubles all but one, a link before the file that it points to, of leaks the copy in train
        (unless val's is a link to it: then the link goes), what is damaged, and wrong labels."""
        gone = set(self.looked[0].damaged) if "damaged" in kinds else set()
        if "leaks" in kinds:
            gone |= {row for row, other, _ in self.leaks if not self._points(row, other)}
        if "duplicates" in kinds:
            for first, second, _ in sorted(self.pairs):
                if first not in gone:
                    gone.add(self._kept_first(first, second)[1])
        if "labels" in kinds:
            gone |= {row for row, _, _ in self.mislabeled}
        return sorted(gone)

    def _kept_first(self, first: int, second: int) -> tuple[int, int]:
        """Of two that are the same picture the one that stays, and the other: a file stays, and not the link to it."""
        pointing = [bool(self.train.root) and os.path.islink(self.train.name(row)) for row in (first, second)]
        return (second, first) if pointing == [True, False] else (first, second)

    def _points(self, row: int, other: int) -> bool:
        """Whether the picture ``other`` of val is a link to the file ``row`` of train."""
        if not self.train.root or not os.path.islink(self.val.name(other)):
            return False
        return links.place(self.train.name(row)) in links.passed(self.val.name(other))

    def _links_of_val(self) -> list[str]:
        return sorted({self.val.name(other) for row, other, _ in self.leaks if self._points(row, other)})

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
    features: str | Floats = "",
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
        features: by which labels are judged, (N, D) of the training images, nan where one has none; or the folder of a model that
            makes them; empty: a network that is trained on these pictures judges.
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
    known = fine[0] if isinstance(features, str) else fine[0][np.isfinite(features[fine[0]]).all(1)]
    if most and can_judge(len(known), len(train.classes)):
        _judge(found, known, recorded, features, most, say)
    return found


def can_judge(images: int, classes: int) -> bool:
    """Whether labels of so many images can be judged."""
    return images >= labels.FEWEST and classes > 1


def _judge(
    found: Findings,
    rows: npt.NDArray[np.int64],
    recorded: npt.NDArray[np.floating] | None,
    given: str | Floats,
    most: int,
    say: Callable[[str], None],
) -> None:
    """Labels and outliers among the images ``rows`` of train."""
    own, classes = found.train.labels[rows], len(found.train.classes)
    told, planted = labels.plant(own, classes)
    if isinstance(given, str) and not given:
        from lotus.inspect import network  # and with it torch

        judged = network.judge(found.looked[0].small[rows], told, classes, say=say)
        probabilities, margins, features = judged.probabilities, judged.margins, judged.features
        suspects = labels.suspects(margins, planted)
    else:
        features = _features(found, rows, given, say)
        probabilities, margins, suspects = labels.by_features(features, own, classes)
    wrong, found.share_wrong, found.share_found = suspects.rows, suspects.share, suspects.found
    found.judged_by = "features" if not isinstance(given, str) else "model" if given else "network"
    if recorded is not None and found.judged_by == "network" and recorded.shape[2] in (len(rows), len(found.train)):
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


def _features(found: Findings, rows: npt.NDArray[np.int64], given: str | Floats, say: Callable[[str], None]) -> Floats:
    """(N, D) of the images ``rows`` of train: those that are given, or by the model in that folder."""
    if not isinstance(given, str):
        return given[rows]
    from lotus.inspect import network

    say(f"features of {given}")
    return network.embedded(given, found.train, rows)


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
