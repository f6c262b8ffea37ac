"""Watching a training: what the model said of every image in every epoch.

Legend: N images, E epochs, B batch, C classes, D width of the features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.training.distributed import World
from selection.errors import Refused
from selection.signals import VOCABULARY

if TYPE_CHECKING:
    from lotus.data.loader import Loader

WATCHED = ("p_label", "p_other", "error_norm", "loss", "entropy", "margin", "correct")
"""What is recorded, names of :data:`selection.signals.VOCABULARY`."""


class Recorder:
    """Holds, for each epoch and image, what the model said when it was trained on the image.

    An image that an epoch did not see keeps what was last said of it, or, before its first time, what was said then.
    """

    def __init__(self, n: int, epochs: int, classes: int) -> None:
        """
        Args:
            n: rows of the data set
        """
        if classes < 2:
            raise Refused(f"score: {classes} class. A probe needs at least two to tell apart.")
        self._said = torch.zeros(epochs, len(WATCHED), n)  # (E, 7, N) float32
        self._seen = torch.zeros(epochs, n, dtype=torch.bool)  # (E, N)
        self._ended = 0  # epochs that are complete
        self._now: Tensor | None = None  # (8, N) of the epoch under way, this rank's rows, zero elsewhere; row 7: seen

    def add(self, index: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch. An image whose logits are not finite counts as not seen.

        Args:
            index: (B,) row numbers
            logits: (B, C)
            labels: (B,) int64
        """
        with torch.no_grad():
            now = self._current(logits.device)
            good = logits.isfinite().all(1)
            values = torch.cat([watch(logits, labels), torch.ones_like(labels, dtype=torch.float32)[None]])  # (8, B)
            now[:, index[good]] = values[:, good]

    def end(self, epoch: int, world: World) -> None:
        """Close ``epoch``: bring together what the ranks saw. A second call for the same epoch does nothing."""
        if epoch < self._ended:
            return
        whole = self._gathered(world)
        self._said[epoch] = whole[:-1]
        self._seen[epoch] = whole[-1] > 0
        self._ended, self._now = epoch + 1, None

    def signals(self) -> dict[str, npt.NDArray[np.generic]]:
        """Name -> (E, N) in the dtypes of the vocabulary.

        Raises:
            Refused: some image was never seen.
        """
        epochs = torch.arange(len(self._seen))[:, None]
        never = len(self._seen)
        last = torch.where(self._seen, epochs, -1).cummax(0).values  # (E, N) epoch that last saw the image
        first = torch.where(self._seen, epochs, never).amin(0)  # (N,)
        if bool((first == never).any()):
            rows = torch.nonzero(first == never)[:, 0]
            raise Refused(
                f"score: {len(rows)} images, row {int(rows[0])} first, were never seen by the probe. "
                "Give it more epochs, or let it go through all rows."
            )
        source = torch.where(last < 0, first, last)  # (E, N)
        found = {}
        for number, name in enumerate(WATCHED):
            values = self._said[:, number].gather(0, source).numpy()
            dtype = VOCABULARY[name].dtype
            if np.issubdtype(dtype, np.floating):
                values = np.clip(values, -np.finfo(dtype).max, np.finfo(dtype).max)  # type: ignore[type-var]
            found[name] = values.astype(dtype)
        return found

    def state(self, world: World) -> dict[str, Tensor]:
        """All that a resumed probe needs; every rank must call."""
        return {
            "said": self._said.clone(),
            "seen": self._seen.to(torch.uint8),
            "ended": torch.tensor(self._ended),
            "now": self._gathered(world).cpu(),
        }

    def load_state(self, state: dict[str, Tensor], world: World) -> None:
        """Take up what :meth:`state` gave, on any number of ranks."""
        self._said.copy_(state["said"])
        self._seen.copy_(state["seen"].bool())
        self._ended = int(state["ended"])
        # What all ranks saw lies on one of them; the sum over ranks is the same.
        self._now = state["now"].to(world.device, copy=True) if world.is_main else None

    def _current(self, device: torch.device) -> Tensor:
        if self._now is None:
            self._now = torch.zeros(len(WATCHED) + 1, self._said.shape[2], device=device)
        return self._now

    def _gathered(self, world: World) -> Tensor:
        """(8, N) of the epoch under way over all ranks: each row was seen by one, so that adding zeros is exact."""
        return world.sum_(self._current(world.device).clone()).cpu()


def watch(logits: Tensor, labels: Tensor) -> Tensor:
    """What :data:`WATCHED` names, of each image of a batch.

    Args:
        logits: (B, C), C at least 2
        labels: (B,) int64

    Returns:
        (7, B) float32
    """
    logits = logits.float()
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    at = labels[:, None]
    p_label, margin = p.gather(1, at)[:, 0], logits.gather(1, at)[:, 0]
    error = p.scatter_add(1, at, -torch.ones_like(p[:, :1]))  # softmax - onehot
    others = torch.ones_like(p, dtype=torch.bool).scatter_(1, at, False)
    margin = margin - logits.masked_fill(~others, -torch.inf).amax(1)
    return torch.stack(
        [
            p_label,
            p.masked_fill(~others, -torch.inf).amax(1),
            error.norm(dim=1),
            -log_p.gather(1, at)[:, 0],
            -torch.special.xlogy(p, p).sum(1),
            margin,
            (logits.argmax(1) == labels).float(),
        ]
    )


def embeddings(model: nn.Module, loader: Loader, n: int, world: World) -> npt.NDArray[np.float16]:
    """(N, D) features that the head reads (timm's ``forward_head(pre_logits=True)``), in one pass in eval mode.

    Args:
        model: a timm model
        loader: goes through every row once over all ranks
        n: rows of the data set

    Raises:
        Refused: a row did not come, or the model gives no features.
    """
    forward_features, forward_head = (getattr(model, name, None) for name in ("forward_features", "forward_head"))
    if forward_features is None or forward_head is None:
        raise Refused("score: embeddings need a timm model, with forward_features and forward_head.")
    training = model.training
    model.eval()
    features: Tensor | None = None
    seen = torch.zeros(n, dtype=torch.int64)
    width = 0
    try:
        with torch.no_grad():
            for batch in loader.epoch(0):
                values = forward_head(forward_features(batch.images), pre_logits=True).float().cpu()  # (B, D)
                if features is None:
                    width = values.shape[1]
                    features = torch.zeros(n, width)
                rows = batch.index.cpu()
                features[rows] = values
                seen[rows] += 1
    finally:
        model.train(training)
    width = world.max(width)  # a rank may have had no rows
    whole = world.sum_(features if features is not None else torch.zeros(n, width))
    missing = torch.nonzero(world.sum_(seen) == 0)
    if len(missing):
        raise Refused(f"score: {len(missing)} rows, {int(missing[0])} first, did not come from the loader.")
    most = float(np.finfo(np.float16).max)
    return whole.clamp(-most, most).numpy().astype(np.float16)
