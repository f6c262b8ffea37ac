"""What the stage ``train`` does for ``score.proxy: self``: the ticket is drawn on the way, from what the training said itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.stages import course
from lotus.stages.ahead import Ahead
from lotus.stages.context import Context
from lotus.stages.select import draw
from selection import lottery
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.training.own_ticket import OwnTicket

FILE = "own_subset.npz"
"""The ticket, in the run's folder."""

RECORDED = frozenset({"labels", "p_label", "p_other", "error_norm", "loss", "entropy", "margin", "correct", "kl_step"})
"""What a score may read: of the rest something would have to be shown every image once more."""


def choosing(context: Context, images: int, cut: Callable[[], bool]) -> OwnTicket:
    """The guest that draws the ticket once ``cut``, out of ``images`` that train before."""
    from lotus.data import beton
    from lotus.training.dynamics import Recorder
    from lotus.training.own_ticket import OwnTicket
    from selection.signals import Signals

    run, config, manifest = context.run, context.config, context.manifest()
    labels = beton.labels(run.train_beton)
    lottery.affordable(labels, config.select.keep, bool(config.select.balance) or config.select.floor is not None)
    watched = course.watched_epochs(config, images)

    def drawn(said: Mapping[str, np.ndarray], unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = {"labels": labels} | {name: value[None] for name, value in said.items()}  # one seed
        signals = Signals(known, classes=manifest.classes, fingerprint=manifest.fingerprint)
        signals.save(run.signals)
        # Of an image that nothing showed nothing is known. Of select.start's all stay, known or not.
        subset, _ = draw(context, signals, unseen if len(unseen) and not config.select.start else None)
        subset.save(run.folder / FILE)
        return subset.rows.copy(), subset.weights.copy()

    recorder = Recorder(manifest.n, watched, len(manifest.classes), steps=config.score.gradients)
    return OwnTicket(recorder, drawn, cut)


def check(ahead: Ahead) -> None:
    """Refuse a ticket that could not be drawn, or after which nothing is trained.

    Raises:
        Refused: what its score reads is not recorded, or needs more epochs than there are before the cut.
    """
    from selection.signals import Signals

    config = ahead.config
    settings, epochs = config.select, course.watched_epochs(config, ahead.kept)
    recorded = RECORDED if config.score.gradients else RECORDED - {"kl_step"}
    missing = lottery.reads(settings.score, settings.pick, ahead.shelves) - recorded
    if missing:
        raise Refused(
            f"select.score: {', '.join(sorted(missing))} would be read, and a training that is its own proxy does not record it. Take "
            "el2n, aum or dual, or score.proxy=training."
        )
    if epochs >= config.train.epochs:
        raise Refused(
            f"score.proxy: self draws the ticket after epoch {epochs} of {config.train.epochs}, and nothing is trained on it. Cut sooner "
            "(train.shrink.at), or train longer."
        )
    rng, n = np.random.default_rng(0), 2 * ahead.classes  # said of nobody: does it do with so few epochs?
    p = rng.uniform(0.1, 0.9, (1, epochs, n))
    said = {
        "p_other": 1 - p,
        "error_norm": 1 - p,
        "loss": -np.log(p),
        "entropy": -np.log(p) / 10,
        "margin": p,
        "kl_step": p,
    }
    signals = Signals({"labels": np.arange(n) % ahead.classes, **said}, fingerprint="0" * 16)
    try:
        lottery.select(
            signals, score=settings.score, pick=settings.pick, keep=0.5, balance=False, shelves=ahead.shelves
        )
    except Refused as refusal:
        raise Refused(
            f"score.proxy: self draws the ticket after epoch {epochs}. {refusal} Cut later (train.shrink.at), or train longer."
        ) from None


def recorded(own: OwnTicket, images: int, epochs: int) -> dict[str, Any]:
    """What is recorded of the ticket."""
    assert own.rows is not None, "the training was cut"
    return {"own_ticket": {"kept": len(own.rows), "of": images}, "passes_of": epochs * images}
