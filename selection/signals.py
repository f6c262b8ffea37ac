"""What is known of each image: named arrays, each with its place in one vocabulary.

Legend: N images, S seeds (independent proxies), E epochs of a proxy, D width of an embedding, C classes, K runs on random
parts of the images.

A proxy need not record all of it. What each costs: one that is watched, 2 bytes an image an epoch; ``embeddings`` 2 D and
``errors`` 2 C bytes an image, once; ``kl_step`` 2 bytes an image an epoch, and while it is recorded the C probabilities of every
image in the epoch before. Our own records five that are watched, from which two more follow (:data:`DERIVED`): 10 bytes an
image an epoch, and two more with ``kl_step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selection import npz
from selection.errors import Refused
from selection.identity import check_classes, check_fingerprint
from selection.methods import nearest

KIND, FORMAT = "signals of LOTUS", 1
CURE = "Remove it and run the score stage again."
MADE = "Signals are what the score stage writes: signals.npz in the run's folder. `lotus score CONFIG` makes them."
AXES = {"S": "seed", "E": "epoch", "N": "row", "D": "dimension", "C": "class column", "K": "run"}


@dataclass(frozen=True)
class Signal:
    """A word of the vocabulary."""

    dims: tuple[str, ...]
    dtype: type[Any]
    meaning: str
    low: float = -math.inf
    high: float = math.inf


_WATCHED = ("S", "E", "N")

# Half precision is relative: 11 significant bits, down to 6e-8. That serves quantities for which an easy image lies near
# zero: error norm, loss and entropy of two easy images stay apart. The probability of the label lies near *one* there, where
# half precision has steps of 5e-4 and would tie every image that is well learned; so it is not recorded but follows from the
# loss, to a part in two thousand of its distance from one. Where it is recorded, it has 24 bits.
VOCABULARY: dict[str, Signal] = {
    "labels": Signal(("N",), np.int64, "class of the image", low=0, high=2**31 - 1),
    "p_label": Signal(_WATCHED, np.float32, "probability given to the label", low=0, high=1),
    "p_other": Signal(_WATCHED, np.float16, "highest probability given to another class", low=0, high=1),
    "error_norm": Signal(_WATCHED, np.float16, "L2 norm of softmax minus one-hot label", low=0, high=math.sqrt(2)),
    "loss": Signal(_WATCHED, np.float16, "cross-entropy in nats", low=0),
    "entropy": Signal(_WATCHED, np.float16, "entropy of the prediction in nats", low=0),  # at most ln C
    "margin": Signal(_WATCHED, np.float16, "logit of the label minus the highest other logit"),
    "correct": Signal(_WATCHED, np.bool_, "the label had the highest logit"),
    "kl_step": Signal(
        _WATCHED, np.float16, "sum over classes of |p ln(p / p of the epoch before)|, 0 in the first epoch", low=0
    ),
    "embeddings": Signal(("N", "D"), np.float16, "features before the head, first seed, end of the proxy"),
    # With the embeddings it is the whole gradient of the head (selection/gradients.py). Not the probabilities themselves: see
    # above on half precision near one. They are this plus the one-hot label.
    "errors": Signal(
        ("N", "C"), np.float16, "softmax minus one-hot label, first seed, end of the proxy", low=-1, high=1
    ),
    "run_in": Signal(("K", "N"), np.bool_, "the image was trained on in the run"),
    "run_p_label": Signal(
        ("K", "N"),
        np.float16,
        "probability given to the label at the end of the run, or 1 where right and 0",
        low=0,
        high=1,
    ),
    "given": Signal(
        ("N",), np.float64, "score from elsewhere, higher = keep first; without bound: the largest number that there is"
    ),
}

DERIVED: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "p_label": (("loss",), lambda loss: np.exp(-loss.astype(np.float32))),
    "correct": (("margin",), lambda margin: margin > 0),
}
"""What follows from other signals where it was not recorded: from which, and how."""

CURES = {
    "run_in": (
        "run_in and run_p_label are recorded with score.subsets: lotus score CONFIG score.subsets.runs=10 "
        "(docs/selection.md, Memorization)."
    ),
    "kl_step": "errors and kl_step are recorded with score.gradients: lotus score CONFIG score.gradients=true.",
    "given": "Scores from elsewhere come by lotus ticket import.",
}
"""How what a proxy need not record is to be had."""
CURES |= {"run_p_label": CURES["run_in"], "errors": CURES["kl_step"]}


class Signals:
    """Arrays by name, all of the same images. What exists is consistent, finite and in range; nothing can be changed.

    Args:
        arrays: by the names of :data:`VOCABULARY`, converted to its dtypes (values beyond half precision's 65504 become 65504);
            ``labels`` is a must, the rest is what was recorded.
        fingerprint: of the data that the rows are of.
        classes: their names; empty where there are none, then there are ``max(labels) + 1``.
        unlabeled: the labels, all 0, stand for none; what reads labels is refused.

    Raises:
        Refused: a name that is not in the vocabulary, a shape, a dtype or a value that does not fit.
    """

    def __init__(
        self,
        arrays: Mapping[str, npt.ArrayLike],
        *,
        fingerprint: str,
        classes: Sequence[str] = (),
        place: str = "signals",
        unlabeled: bool = False,
    ) -> None:
        self.unlabeled = unlabeled
        for name in arrays:
            if name not in VOCABULARY:
                raise Refused(
                    f"{place}.{name}: no such signal.{nearest(name, VOCABULARY)} There are: {', '.join(VOCABULARY)}."
                )
        if "labels" not in arrays:
            raise Refused(f"{place}: labels are missing, and every image needs one.")
        self.fingerprint = check_fingerprint(fingerprint, place)
        self.classes = check_classes(classes, place)
        self._arrays: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, str]] = {"C": (len(self.classes), "classes")} if self.classes else {}
        for name in VOCABULARY:  # in this order: labels come first and settle N and C
            if name in arrays:
                array = np.asarray(arrays[name])
                _check_shape(name, array, sizes, place)
                high = VOCABULARY[name].high
                if self.classes:  # nothing bounds these two where the number of classes was not said
                    high = {"labels": len(self.classes) - 1.0, "entropy": math.log(len(self.classes))}.get(name, high)
                self._arrays[name] = _fitted(name, array, high, place)
        if "C" in sizes and self._arrays["labels"].max() >= sizes["C"][0]:
            raise Refused(
                f"{place}.labels: there is a class {self._arrays['labels'].max()}, but {sizes['C'][1]} has {sizes['C'][0]}."
            )
        self.recorded: tuple[str, ...] = tuple(self._arrays)
        """All that the file holds, where they were loaded from one, whether it was read or not."""
        self.images = sizes["N"][0]
        self.seeds = sizes["S"][0] if "S" in sizes else 0
        self.epochs = sizes["E"][0] if "E" in sizes else 0

    @property
    def known(self) -> list[str]:
        """All that was recorded, and what follows from it."""
        return [
            name
            for name in VOCABULARY
            if (name in self.recorded and not (self.unlabeled and name == "labels"))
            or (name in DERIVED and all(part in self.recorded for part in DERIVED[name][0]))
        ]

    @property
    def n_classes(self) -> int:
        return len(self.classes) or int(self._arrays["labels"].max()) + 1

    def __getitem__(self, name: str) -> np.ndarray:
        return self.take(name)

    def __contains__(self, name: object) -> bool:
        """Whether it was recorded, or follows from what was."""
        return name in self._arrays or (name in DERIVED and all(part in self._arrays for part in DERIVED[name][0]))

    def __iter__(self) -> Iterator[str]:
        """What was recorded."""
        return iter(self._arrays)

    def __repr__(self) -> str:
        watched = f", {self.seeds} seeds x {self.epochs} epochs" if self.seeds else ""
        return f"Signals({self.images} images, {self.n_classes} classes{watched}: {', '.join(self._arrays)})"

    def available(self, rows: npt.NDArray[np.int64] | None = None) -> Mapping[str, np.ndarray]:
        """What a method may read, by name, made when it is read; of some images only where ``rows`` are given."""
        return _Available(self, rows)

    def take(self, name: str, rows: npt.NDArray[np.int64] | None = None) -> np.ndarray:
        """The signal ``name``; of some images only (the axis N has ``len(rows)``) where ``rows`` are given.

        Raises:
            Refused: it was not recorded, and does not follow from what was.
        """
        if name in self._arrays:
            array = self._arrays[name]
            return array if rows is None else np.take(array, rows, axis=VOCABULARY[name].dims.index("N"))
        if name not in self:
            raise Refused(
                f"signals.{name}: not recorded.{nearest(name, self._arrays)} Here: {', '.join(self._arrays)}."
            )
        parts, follows = DERIVED[name]
        return follows(*(self.take(part, rows) for part in parts))

    def save(self, path: str | Path) -> None:
        """Write all to an .npz, beside and renamed.

        Raises:
            Refused: it cannot be written there.
        """
        about: dict[str, Any] = {"fingerprint": self.fingerprint, "classes": self.classes}
        about |= {"unlabeled": True} if self.unlabeled else {}
        npz.write(path, self._arrays, about, kind=KIND, version=FORMAT)

    @classmethod
    def load(cls, path: str | Path, only: Collection[str] | None = None) -> Signals:
        """Read what :meth:`save` wrote.

        Args:
            path: the .npz.
            only: besides the labels, these signals, as far as they were recorded; None: all. ``errors`` may be gigabytes.

        Raises:
            Refused: the file is missing, cut short, damaged, foreign, or holds what does not fit; names the path and the cure.
        """
        names = None
        if only is not None:
            names = {"labels", *only, *(part for name in only if name in DERIVED for part in DERIVED[name][0])}
        arrays, about = npz.read(path, kind=KIND, version=FORMAT, cure=CURE, made=MADE, only=names)
        try:
            signals = cls(
                arrays, fingerprint=about.get("fingerprint", ""), classes=about.get("classes") or (), place=str(path),
                unlabeled=about.get("unlabeled") is True,
            )  # fmt: skip
        except Refused as error:
            raise Refused(f"{error} {CURE}") from None
        signals.recorded = npz.names(path)
        return signals


class _Available(Mapping[str, np.ndarray]):
    """Signals by name, those that follow from others included."""

    def __init__(self, signals: Signals, rows: npt.NDArray[np.int64] | None) -> None:
        self._signals, self._rows = signals, rows

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._signals:
            raise KeyError(name)
        return self._signals.take(name, self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._signals

    def __iter__(self) -> Iterator[str]:
        return (name for name in VOCABULARY if name in self._signals)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _check_shape(name: str, array: np.ndarray, sizes: dict[str, tuple[int, str]], place: str) -> None:
    """Hold ``array`` to its dimensions, and those to what the arrays before said; ``sizes``: letter -> (size, who said so)."""
    dims = VOCABULARY[name].dims
    if array.ndim != len(dims):
        raise Refused(f"{place}.{name}: expected the shape ({', '.join(dims)}), not {array.shape}.")
    for letter, size in zip(dims, array.shape, strict=True):
        if size == 0:
            raise Refused(f"{place}.{name}: there is no {AXES[letter]} in {array.shape}.")
        known, by = sizes.setdefault(letter, (size, name))
        if size != known:
            raise Refused(f"{place}.{name}: {letter} = {size} ({AXES[letter]}s), but {by} has {known}.")


def _fitted(name: str, array: np.ndarray, high: float, place: str) -> np.ndarray:
    """``array`` in the vocabulary's dtype, once its values are in range: a read-only copy, or itself where it is read-only."""
    signal = VOCABULARY[name]
    real = issubclass(signal.dtype, np.floating)
    if array.dtype.kind not in ("fiu" if real else "iu" if signal.dtype is np.int64 else "b"):
        raise Refused(f"{place}.{name}: expected {np.dtype(signal.dtype).name}, not {array.dtype}.")
    if signal.dtype is not np.bool_:
        array = _in_range(name, array, high, place, real)
    if array.dtype == signal.dtype and array.flags.c_contiguous and not array.flags.writeable:
        return array  # errors of a million images in a thousand classes are 2.6 GB
    fitted = np.array(array, dtype=signal.dtype, order="C")
    fitted.setflags(write=False)
    return fitted


def _in_range(name: str, array: np.ndarray, high: float, place: str, real: bool) -> np.ndarray:
    """``array``, whose values are in range; those of ``real`` ones that rounding took beyond it by a little are put back."""
    low = VOCABULARY[name].low
    least, most = float(array.min()), float(array.max())  # NaN where there is one
    slack = 1e-3 * max(1.0, high if math.isfinite(high) else 0.0) if real else 0.0  # rounding to half precision
    if not (math.isfinite(least) and math.isfinite(most)):
        raise Refused(f"{place}.{name}: not finite{_where(name, ~np.isfinite(array))}.")
    form = "g" if real else ".0f"
    if least < low - slack:
        raise Refused(f"{place}.{name}: {least:{form}} is below {low:g}{_where(name, array == array.min())}.")
    if most > high + slack:
        raise Refused(f"{place}.{name}: {most:{form}} is above {high:{form}}{_where(name, array == array.max())}.")
    if real:
        widest = float(np.finfo(np.dtype(VOCABULARY[name].dtype)).max)
        low, high = max(low, -widest), min(high, widest)
        if least < low or most > high:
            array = np.clip(array, low, high)
    return array


def _where(name: str, faults: np.ndarray) -> str:
    """``" at seed 0, epoch 3, row 17"``: the first of ``faults``."""
    first = np.unravel_index(int(faults.argmax()), faults.shape)
    steps = zip(VOCABULARY[name].dims, first, strict=True)
    return " at " + ", ".join(f"{AXES[letter]} {int(index)}" for letter, index in steps)
