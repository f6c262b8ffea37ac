"""A training that shrinks: on the way the model is cut to a budget, and what is left trains on by the same schedule.

At a point of the training, or as soon as the plan that would be drawn has settled, the model is looked at on images of the
training, cut and compensated, and the engine is made anew around what is left. What the optimizer remembers is carried over where
that is exact (:mod:`lotus.pruning.carry`); averages of the weights begin anew. Rank 0 draws the plan, and all cut by it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lotus.config import Prune
from lotus.config import Shrink as ShrinkBy
from lotus.events import Event, Said
from lotus.pruning import Plan, Pruned, carry, narrow, surgery
from lotus.report.numbers import accuracy
from lotus.training import muon
from lotus.training.distributed import World
from lotus.training.evaluation import Stopped
from lotus.training.guests import Guest, Position, Training
from lotus.vit import cost, families
from lotus.vit import model as door
from selection.errors import Refused

Draw = Callable[[nn.Module, Prune, nn.Module | None], Pruned]
"""Looks at a model, and cuts it as is asked; budgets are parts of the third, where that is another."""
Measure = Callable[[nn.Module], Mapping[str, float]]
"""``top1`` in percent, ``loss`` in nats, ``images``."""
Record = dict[str, Any]
"""Of a cut, JSON-ready: ``plan``, ``channels`` of a smaller embedding dimension (null: all), ``before`` and ``after`` with ``macs`` and
``params``, ``images``, ``notes``, and what was measured before and after."""


class Shrink(Guest):
    """Cuts the model that it joins."""

    name = "shrink"

    def __init__(
        self,
        model: nn.Module,
        settings: ShrinkBy,
        request: Prune,
        draw: Draw,
        *,
        measure: Measure | None = None,
        drop_path: float = 0.0,
    ) -> None:
        """
        Args:
            model: that is trained, before anything is put on it
            request: what the last cut is to
            measure: looks at the model before and after a cut, on all ranks together; None: nobody does
            drop_path: of the recipe, for a model whose stream was narrowed
        """
        self._settings, self._request, self._draw, self._measure = settings, request, draw, measure
        self._drop_path, self._macs = drop_path, cost.count(model).macs
        self._dense = copy.deepcopy(model) if len(settings.cuts) > 1 or settings.until_stable is not None else None
        self.cuts: list[Record] = []
        self._bill = [0.0, 0.0]
        stable = settings.until_stable
        self._moved = torch.ones(0 if stable is None else stable.epochs, dtype=torch.float64)  # nothing known yet
        self._kept, self._epoch = torch.zeros(0, dtype=torch.bool), -1

    def attach(self, training: Training) -> None:
        self._training = training

    def is_done(self) -> bool:
        """Whether the last cut is made."""
        return len(self.cuts) == len(self._settings.cuts)

    def bill(self) -> tuple[float, float]:
        return self._bill[0], self._bill[1]

    def end_epoch(self, epoch: int) -> None:
        """Draw the plan of ``epoch``, once, where the cut waits until it has settled."""
        if self._settings.until_stable is None or self.cuts or epoch <= self._epoch:
            return
        world, dense = self._training.world, self._dense
        assert dense is not None
        dense.load_state_dict(self._training.engine.weights())

        def draw() -> dict[str, Tensor]:
            drawn = self._draw(dense.to(world.device), self._request, None)
            return {"kept": kept(drawn.plan), "forwards": torch.tensor(float(drawn.forwards))}

        found = by_main(world, draw)
        now, before = found["kept"], self._kept
        self._epoch, self._kept = epoch, now  # not sooner: who is stopped while it is drawn does it again
        moved = 1.0 if len(before) != len(now) else float((now != before).double().mean())
        self._moved = torch.cat([self._moved[1:], torch.tensor([moved], dtype=torch.float64)])
        self._pay(float(found["forwards"]), self._macs)

    def due(self, at: Position, progress: float) -> bool:
        if self.is_done():
            return False
        stable = self._settings.until_stable
        settled = stable is not None and bool((self._moved < stable.epsilon).all())
        return settled or progress >= self._settings.cuts[len(self.cuts)].at

    def replace(self, model: nn.Module, moments: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Tensor]]:
        paid = list(self._bill)
        try:
            return self._cut(model, moments)
        except Stopped:  # all of it is done again
            self._bill = paid
            raise

    def _cut(self, model: nn.Module, moments: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Tensor]]:
        number, training = len(self.cuts), self._training
        keep, request = self._settings.cuts[number].keep, self._request
        if keep is not None:  # all but the last leave the stream as it is
            request = request.at(keep.asked, embed_dim=None)
        top1 = self._looked(model)

        def cut() -> dict[str, Tensor]:
            dense = self._dense.to(training.world.device) if number and self._dense is not None else None
            drawn = self._draw(model, request, dense)
            weights = drawn.model.state_dict()
            remembered = moments_of(model, drawn, moments, training.recipe.optimizer) if self._settings.carry else {}
            return {
                "record": _packed(record(model, drawn)),
                "forwards": torch.tensor(float(drawn.forwards)),
                **{f"weights/{name}": value for name, value in weights.items()},
                **{f"moments/{name}": value for name, value in remembered.items()},
            }

        found = by_main(training.world, cut)
        self._pay(float(found["forwards"]), self._macs)
        done = _unpacked(found["record"])
        small = reshaped(model, done, self._drop_path)
        small.load_state_dict(_under("weights/", found))
        after = self._looked(small)
        self._macs = done["after"]["macs"]
        self.cuts.append({**done, **_named("before", top1), **_named("after", after)})
        return small, _under("moments/", found)

    def replaced(self, at: Position) -> Iterable[Event]:
        done = self.cuts[-1]
        done |= {"step": at.step, "epoch": at.epoch + 1}
        yield Said(self._training.stage, sentence(done))
        for note in done["notes"]:
            yield Said(self._training.stage, note)

    def rebuilt(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        for done in _unpacked(state["cuts"]) if state else []:
            model = reshaped(model, done, self._drop_path)
            self._macs = done["after"]["macs"]
        return model

    def state(self) -> dict[str, Tensor]:
        if not self.cuts and self._epoch < 0:
            return {}
        return {
            "cuts": _packed(self.cuts), "bill": torch.tensor(self._bill, dtype=torch.float64),
            "moved": self._moved.clone(), "kept": self._kept.clone(), "epoch": torch.tensor(self._epoch),
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.cuts, self._bill = _unpacked(state["cuts"]), state["bill"].tolist()
        self._moved, self._kept = state["moved"].clone(), state["kept"].bool()
        self._epoch = int(state["epoch"])

    def macs(self, macs: float) -> float:
        return macs or self._macs

    def _looked(self, model: nn.Module) -> Mapping[str, float]:
        """What is measured of a model, where it is; billed."""
        if self._measure is None:
            return {}
        measured = self._measure(model)
        self._pay(measured["images"], cost.count(model).macs)
        return {name: measured[name] for name in ("top1", "loss", "images")}

    def _pay(self, forwards: float, macs: float) -> None:
        self._bill = [self._bill[0] + forwards, self._bill[1] + forwards * macs]


def record(model: nn.Module, drawn: Pruned) -> Record:
    """What is known of a cut."""
    now, before = cost.outline(drawn.model).width, cost.outline(model).width
    return {
        "plan": drawn.plan.to_json(),
        "channels": None if now == before else now,
        "before": drawn.before,
        "after": drawn.after,
        "images": drawn.images,
        "notes": list(drawn.notes),
    }


def reshaped(model: nn.Module, done: Record, drop_path: float = 0.0) -> nn.Module:
    """A model of the shape that a cut left of ``model``; its weights are still to come.

    Raises:
        Refused: the cut was made in another model.
    """
    origin = door.remade(model)
    if done["channels"] is not None:
        device = next(model.parameters()).device
        model = narrow.skeleton(model, done["channels"]).to_empty(device=device).requires_grad_(True)
        if drop_path:
            door.set_drop_path(model, drop_path)
        origin = door.remade(model)
    small = families.close(surgery.cut(families.opened(model), Plan.from_json(done["plan"])), model)
    if origin is not None:
        door.remember(small, origin)
    return small


def moments_of(model: nn.Module, drawn: Pruned, moments: Mapping[str, Tensor], optimizer: str) -> dict[str, Tensor]:
    """What the optimizer is to remember of the small model; nothing where the stream was turned, with norms folded into it."""
    if cost.outline(drawn.model).width != cost.outline(model).width:
        return {}
    carried = carry.moments(model, moments, drawn.plan, drawn.turned)
    if optimizer.lower() != "muon":
        return carried
    hidden = muon.matrices(drawn.model)  # one that is too thin by now is AdamW's
    buffers = {name.rpartition("/")[0] for name in carried if name.endswith("/momentum_buffer")}
    return {name: value for name, value in carried.items() if name.rpartition("/")[0] not in buffers - hidden.keys()}


def kept(plan: Plan) -> Tensor:
    """(units of the model,) whether each value dimension of a head and each MLP unit stays."""
    parts = []
    for block in plan.blocks:
        values = torch.zeros(block.of.heads * block.of.v_dim, dtype=torch.bool)
        values[block.outputs] = True
        units = torch.zeros(block.of.hidden, dtype=torch.bool)
        units[list(block.units)] = True
        parts += [values, units]
    return torch.cat(parts)


def sentence(done: Record) -> str:
    """A cut in one sentence."""
    shares = {what: done["after"][what] / done["before"][what] for what in ("macs", "params")}
    text = (
        f"cut after step {done['step']}, in epoch {done['epoch']}: {shares['macs']:.3f} of the dense model's MACs stay, "
        f"{shares['params']:.3f} of its parameters; {done['images']:,} images were looked at"
    )
    if "top1_before" in done:
        before, after = (accuracy(done[f"top1_{when}"], done.get(f"images_{when}")) for when in ("before", "after"))
        text += f"; top-1 {before} before, {after} after"
    return text


def by_main(world: World, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What rank 0's ``work`` gives, on all ranks; a refusal of it is one on all, and so is its end on request."""
    shared: dict[str, Tensor] = {}
    if world.is_main:
        try:
            shared = work()
        except Refused as refusal:
            shared = {"refused": _packed(str(refusal))}
        except Stopped as stopped:
            shared = {"stopped": _packed(str(stopped))}
    world.barrier(leaves=False)  # within what follows no wish to stop is heard
    shared = world.from_main(shared)
    if "stopped" in shared:
        raise Stopped(_unpacked(shared["stopped"]))
    if "refused" in shared:
        raise Refused(_unpacked(shared["refused"]))
    return shared


def _packed(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _unpacked(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()).decode())


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _named(when: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}_{when}": value for name, value in values.items()}
