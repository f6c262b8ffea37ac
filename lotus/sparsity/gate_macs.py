"""What closing gates saves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lotus.vit import cost


class Macs:
    """The fraction of a model's MACs that is left when gates are closed.

    With an MLP unit go a row of fc1 (two where it is gated) and a column of fc2. With an attention-output dimension go, since a block's q, k
    and v keep equally many, its rows of qkv, its column of proj, and its part of QK^T and AV. With an input goes a column
    of qkv or fc1, and what that saves depends on how many rows are left.
    """

    costs: Tensor | None
    """(G,) fraction of the model's MACs that goes with each gate; None with inputs, where it depends on the others."""

    def __init__(self, model: nn.Module, sites: dict[str, nn.Linear], widths: list[int], device: torch.device) -> None:
        outline = cost.outline(model)
        self._total, self._tokens, self._width = outline.cost().macs, outline.tokens, outline.width
        inside = sum(block.macs for block in outline.cost().blocks)
        self._fixed = (self._total - inside) / self._total
        self.device, self._sites = device, len(widths)
        self._of = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths)).to(device)
        self.costs = None
        if any(site.endswith("_in") for site in sites):
            self._of_parts = self._parts(list(sites), outline)
        else:
            each = []
            for site, linear in sites.items():
                width, kind = linear.out_features, outline.kind(int(site.split(".")[1]))
                seen = kind.attended or outline.tokens
                if site.endswith(".mlp"):
                    each.append((kind.halves + 1) * (kind.processed or outline.tokens) * width)
                else:
                    each.append(4 * seen * width + 2 * (kind.pairs or seen**2))
            rates = torch.tensor([macs / self._total for macs in each])
            self.costs = torch.repeat_interleave(rates, torch.tensor(widths)).to(device)
            self._fixed = 1 - float(self.costs.sum())

    def _parts(self, sites: list[str], outline: cost.Outline) -> tuple[Tensor, Tensor, Tensor]:
        """(2, P) the sites of what is in the middle (heads, hidden units) of each part of a block, and of what it reads; (P,) MACs of a
        unit of the middle for each channel that is read; (P,) for each unit whatever is read."""
        n, d = self._tokens, self._width
        places, reads, always = [], [], []
        for number, site in enumerate(sites):
            if site.endswith("_in"):
                continue
            halves = outline.kind(int(site.split(".")[1])).halves
            places.append((number, sites.index(f"{site}_in")))
            attention = site.endswith(".attn")
            reads.append(3 * n if attention else n * halves)
            always.append(n * d + 2 * n * n if attention else n * d)
        made = torch.tensor(places).T, torch.tensor(reads).double(), torch.tensor(always).double()
        return made[0].to(self.device), made[1].to(self.device), made[2].to(self.device)

    def left(self, stays: Tensor) -> Tensor:
        """Of (G,) open gates; a number on their device."""
        if self.costs is not None:
            return self._fixed + (self.costs @ stays.float()).double()
        (middle, read), reads, always = self._of_parts
        counts = torch.zeros(self._sites, dtype=torch.float64, device=self.device).index_add_(
            0, self._of, stays.double()
        )
        macs = (counts[middle] * (reads * counts[read] + always)).sum()
        return self._fixed + macs / self._total
