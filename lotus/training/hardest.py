"""The hardest part of each batch, as a small model sees it that trains along (KellerJordan/cifar10-airbench, airbench96).

The small model goes through every batch forward and back; the model that is trained sees the images whose loss is highest there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.config import Model
from lotus.data.base import Batch
from lotus.training.guests import Guest, Micro, Training
from lotus.vit import cost, smaller
from lotus.vit import model as door
from selection.errors import Refused


def proxy_of(model: nn.Module, classes: int, part: float, seed: int) -> nn.Module:
    """A narrower model of ``part`` of ``model``'s MACs, from scratch."""
    origin = door.origin(model)
    args = {name: value for name, value in origin["args"].items() if name != "num_classes"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return door.create(smaller.narrower(Model(name=origin["name"], args=args), part, place="hardest"), classes)


def stays(keep: float, images: int) -> int:
    """How many of a batch are shown on."""
    return max(1, round(keep * images))


class Hardest(Guest):
    """Shows the model ``keep`` of each batch: what a proxy that trains along finds hardest."""

    name = "hardest"

    def __init__(self, proxy: nn.Module, keep: float, lr: float) -> None:
        """
        Args:
            proxy: of the model's side and classes
            keep: fraction of a batch, in (0, 1]
            lr: of the proxy, by AdamW

        Raises:
            Refused: no fraction.
        """
        if not 0 < keep <= 1:
            raise Refused(f"hardest: keep {keep:g} is a fraction of a batch, in (0, 1].")
        self._proxy, self._keep, self._macs = proxy, keep, cost.count(proxy).macs
        self._optimizer = torch.optim.AdamW(proxy.parameters(), lr=lr, weight_decay=0.05)
        self._seen = torch.zeros(2, dtype=torch.float64)  # images that the proxy saw, images that were shown on

    def attach(self, training: Training) -> None:
        if training.world.size > 1:
            raise Refused(
                f"{training.place}.guests: hardest: its proxy is one process's. Train with one, or leave it out."
            )
        self._proxy.to(training.world.device).train()

    def show(self, batch: Batch, micro: Micro) -> Batch:
        losses = F.cross_entropy(self._proxy(batch.images), batch.labels, reduction="none")  # (B,)
        self._optimizer.zero_grad()
        losses.mean().backward()
        self._optimizer.step()
        shown = stays(self._keep, len(losses))
        rows = losses.detach().topk(shown).indices.sort().values
        self._seen += torch.tensor([len(losses), shown])
        return Batch(*(part[rows] for part in batch))

    def own_macs(self) -> float:
        """Of the proxy, an image that was shown on."""
        seen, shown = self._seen.tolist()
        return self._macs * seen / shown if shown else 0.0

    def state(self) -> dict[str, Tensor]:
        state = {f"weights/{name}": value for name, value in self._proxy.state_dict().items()}
        for number, held in self._optimizer.state_dict()["state"].items():
            state |= {f"moments/{number}/{name}": torch.as_tensor(value) for name, value in held.items()}
        return {name: value.detach().cpu().clone() for name, value in {**state, "seen": self._seen}.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        weights = {name.removeprefix("weights/"): value for name, value in state.items() if name.startswith("weights/")}
        self._proxy.load_state_dict(weights)
        moments: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            if name.startswith("moments/"):
                _, number, what = name.split("/")
                moments.setdefault(int(number), {})[what] = value.clone()
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        self._seen = state["seen"].clone()
