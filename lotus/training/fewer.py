"""Token pruning while training: how many at which step, which ones, and shared out among the images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lotus.training.guests import Epoch, Guest, Micro, Training
from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.data.base import Batch
    from lotus.data.patch_maps import Tickets
    from lotus.training.patch_buckets import Joint
    from lotus.vit.tokens import Tokens


class FewerPatches(Guest):
    """Follows the schedule of a model that was put on fewer tokens, and counts its MACs."""

    name = "patches"

    def __init__(self, tokens: Tokens, tickets: Tickets | None = None, joint: Joint | None = None) -> None:
        """
        Args:
            tickets: what each patch of a training image scores, where ``tokens`` has to be told
            joint: shares the patches out among the rows of an epoch, whose steps are then of one bucket each
        """
        self._tokens, self._tickets, self._joint = tokens, tickets, joint

    def attach(self, training: Training) -> None:
        self._tokens.put_on(training.model)

    def detach(self) -> None:
        self._tokens.remove()

    def before_epoch(self, epoch: Epoch) -> Epoch:
        if self._joint is None:
            return epoch
        return dataclasses.replace(epoch, groups=self._joint.groups(epoch.rows))

    def before_step(self, progress: float, group: int) -> None:
        self._tokens.schedule(progress, self._tokens.shares[group] if self._tokens.shares else None)

    def show(self, batch: Batch, micro: Micro) -> Batch:
        """
        Raises:
            Refused: images of another side than the patches were counted for.
        """
        if (side := batch.images.shape[-1]) != self._tokens.side:
            raise Refused(
                f"patches: {side} pixels a side are shown, and which patches stay is known of {self._tokens.side}. Leave out "
                "growing pictures, or patches."
            )
        if (
            self._tickets is not None and self._tokens.keep < 1
        ):  # as a picture of one channel the scores are mixed as their pixels are
            seen = micro.mix(self._tickets.seen(batch.index, micro.epoch), batch.labels)
            self._tokens.choose(self._tickets.pooled(seen))
        return batch

    def summary(self) -> dict[str, float]:
        return {"patches": self._tokens.share()}

    def macs(self, macs: float) -> float:
        return float(self._tokens.macs())
