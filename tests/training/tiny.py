"""A training that takes a second: pictures drawn in memory, a ViT of two blocks. Run as a script, it is one rank of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lotus.config import Dynamic, Patches, Prune, Sparsity, Train
from lotus.config import Shrink as ShrinkBy
from lotus.data.sample_plan import SamplePlan
from lotus.events import Event
from lotus.papers.sparse_vit.penalty import AttentionPenalty
from lotus.papers.zeros import masks as unstructured
from lotus.pruning import Pruned, lottery
from lotus.sparsity.gates import Gates
from lotus.training import distributed, loop
from lotus.training.average import MovingAverage
from lotus.training.data_pruning import DynamicPruning, DynamicSelection
from lotus.training.distill import Distiller, Taught
from lotus.training.distributed import World
from lotus.training.dynamics import Recorder, Watched
from lotus.training.engine import Engine
from lotus.training.fewer import FewerPatches
from lotus.training.finite import Answer
from lotus.training.guests import Guest
from lotus.training.objective import Objective
from lotus.training.patch_buckets import Joint
from lotus.training.regularize import EarlyBird, Gating
from lotus.training.shrink import Shrink
from lotus.vit.patch_scores import contrast
from lotus.vit.tokens import Tokens

ROWS, CLASSES, SIDE = 52, 3, 16  # 52 = 6 batches of 8 and a tail of 4


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # as of lotus.data.base.Batch


def pictures(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """(N, 3, 16, 16) noise with a bright stripe where the class says, and (N,) classes."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, SIDE, SIDE, generator=draw)
    labels = torch.arange(rows) % CLASSES
    for row, label in enumerate(labels.tolist()):
        images[row, :, 5 * label : 5 * label + 5] += 1.5
    return images, labels


class Memory:
    """A loader over tensors, by the protocol."""

    kind = "torch"

    def __init__(self, plan: SamplePlan) -> None:
        self.plan = plan
        self.images, self.labels = pictures()
        self.open = 0

    def epoch(self, epoch: int, skip: int = 0, side: int | None = None) -> Iterator[Batch]:
        self.open += 1
        try:
            pieces = torch.from_numpy(self.plan.order(epoch)).split(self.plan.sizes(epoch))
            for index in pieces[skip:]:
                images = self.images[index].clone()
                yield Batch(images if side is None else F.interpolate(images, side), self.labels[index], index)
        finally:
            self.open -= 1

    def close(self) -> None: ...


def vit(drop_path: float = 0.0, seed: int = 0, width: int = 32, patch: int = 8, depth: int = 2) -> Any:
    import timm

    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=patch, embed_dim=width, depth=depth, num_heads=2, num_classes=CLASSES,
        drop_path_rate=drop_path,
    )  # fmt: skip


def recipe(**changed: Any) -> Train:
    base: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "warmup_epochs": 0.5, "save_minutes": 1e9}
    return Train.model_validate({**base, **changed})


class Hooked(Objective):
    """An objective that does something at chosen (micro-)steps, counted from 0 in this process."""

    def __init__(self, recipe: Train, at: dict[int, Callable[[Tensor], Tensor]] | None = None) -> None:
        super().__init__(recipe, CLASSES, seed=5)
        self.at, self.calls = at or {}, 0

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = super().losses(logits, targets)
        act = self.at.get(self.calls)
        self.calls += 1
        return act(losses) if act else losses


class ThatPrunes(DynamicSelection):
    """A lottery over the pictures, which tells what it knows."""

    def __init__(self, pick: Any, epochs: int, rows: Any = None) -> None:
        given = Dynamic.model_validate({"name": pick} if isinstance(pick, str) else pick)
        rows = np.arange(ROWS) if rows is None else rows
        super().__init__(given, rows=rows, labels=np.arange(ROWS) % CLASSES, epochs=epochs, seed=5)

    def known(self) -> dict[str, Any]:
        return {name: value.numpy() for name, value in self.state(World()).items()}


class Killed(BaseException):
    """As good as kill -9: nothing in the loop knows it."""


def kill(losses: Tensor) -> Tensor:
    raise Killed


def minutes() -> Callable[[], float]:
    """A clock on which every look takes seven seconds."""
    now = itertools.count(7.0, 7.0)
    return lambda: next(now)


def asked(keep: float = 0.5, **more: Any) -> Prune:
    """What the cut of :func:`shrinking` is to be."""
    return Prune.model_validate({"keep": {"macs": keep}, "round": 4, "embed_dim": None, **more})


def shrinking(model: nn.Module, keep: float = 0.5, *, drop_path: float = 0.0, **given: Any) -> Shrink:
    """A guest that cuts the model on the pictures; ``prune`` of ``given`` are settings of the request."""
    request = asked(keep, **given.pop("prune", {}))

    def draw(model: nn.Module, request: Prune, dense: nn.Module | None) -> Pruned:
        return lottery(model, [pictures()], request, dense=dense)

    return Shrink(model, ShrinkBy.model_validate(given), request, draw, drop_path=drop_path)


class Outcome(NamedTuple):
    events: list[Event]
    fitted: loop.Fitted
    gates: Gates | None
    recorder: Recorder | None
    model: nn.Module


def guests_of(
    given: Train,
    *,
    gates: Any = None,
    distiller: Distiller | None = None,
    recorder: Recorder | None = None,
    dynamic: DynamicSelection | None = None,
    tokens: Tokens | None = None,
    tickets: Any = None,
    joint: Joint | None = None,
) -> list[Guest]:
    """Guests that hook these into a training."""
    found: list[Guest | None] = [
        None if gates is None else Gating(gates),
        EarlyBird(gates) if isinstance(gates, Gates) else None,
        None if distiller is None else Taught(distiller),
        None if recorder is None else Watched(recorder),
        None if dynamic is None else DynamicPruning(dynamic),
        None if tokens is None else FewerPatches(tokens, tickets, joint),
        MovingAverage(given.ema) if given.ema else None,
    ]
    return [guest for guest in found if guest is not None]


def train(
    folder: Path,
    given: Train,
    *,
    world: World | None = None,
    at: dict[int, Callable[[Tensor], Tensor]] | None = None,
    gated: bool = False,
    watched: bool = False,
    weighted: bool = False,
    drop_path: float = 0.0,
    model: nn.Module | None = None,
    events: list[Event] | None = None,
    guests: Sequence[Guest] = (),
    **more: Any,
) -> Outcome:
    """One fit from start to end. ``events`` also gets what came before an exception; ``more`` are parts of the loop's data and
    job, and what :func:`guests_of` makes guests of."""
    world = world or distributed.start("cpu")
    model = model or vit(drop_path)
    split = {"batch_size": given.batch_size, "world": world.size, "rank": world.rank}
    plan = SamplePlan(np.arange(ROWS), seed=5, accumulate=given.accumulate, **split)
    gates = Gates(model, Sparsity(start=0.1, in_channels=True), target=0.5, device="cpu") if gated else None
    recorder = Recorder(ROWS, given.epochs, CLASSES, steps=True) if watched else None
    weights = np.linspace(0.5, 1.5, ROWS, dtype=np.float32) if weighted else None
    data = {
        "loader": Memory(plan), "plan": plan, "validation": Memory(SamplePlan.evaluation(np.arange(ROWS), **split)),
        "objective": Hooked(given, at), "weights": weights,
    }  # fmt: skip
    job = {"stage": "train", "folder": folder, "world": world, "key": "k"}
    here, made = ({name: more.pop(name, value) for name, value in group.items()} for group in (data, job))
    made |= {name: more.pop(name) for name in ("stop", "clock", "place", "shelves") if name in more}
    joined = [*guests_of(given, gates=more.pop("gates", gates), recorder=recorder, **more), *guests]
    making = loop.fit(model, given, loop.Data(**here), loop.Job(**made), joined)
    events = [] if events is None else events
    while True:
        try:
            events.append(next(making))
        except StopIteration as stop:
            return Outcome(events, stop.value, gates, recorder, model)


class Later(Engine):
    """Asked for what became of a step as on a GPU: while the next one is at work."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.ask_later()
        self.passes = 0
        self.asked: list[int] = []

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        super().backward(loss, last=last)
        self.passes += 1

    def step(self, lr: float, momentum: float | None = None) -> bool | Answer:
        answer, engine, at = super().step(lr, momentum), self, self.passes
        assert isinstance(answer, Answer)

        class Asked(Answer):
            def __init__(self) -> None:
                self.known = False

            def __bool__(self) -> bool:
                if not self.known:
                    engine.asked.append(engine.passes - at)
                self.known = True
                return bool(answer)

        return Asked()

    def release(self, weights: Any = None) -> None:
        LATE.append(self.asked)
        super().release(weights)


LATE: list[list[int]] = []
"""Backward passes between each step and the question what became of it, of each engine."""


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def patched(
    folder: Path,
    given: Train,
    mode: str,
    *,
    joint: bool | None = True,
    entered: list[int] | None = None,
    until: float = 1,
    **more: Any,
) -> tuple[Outcome, Tokens, Joint | None]:
    """A training on 0.61 of 16 patches; with ``joint`` shared out by made-up scores: 30 images on 7, 14 on 12 and 8 on 16,
    which two ranks can share evenly.

    Args:
        entered: gets the number of patches of each forward pass in training
    """
    model = vit(patch=4)
    more_settings = {"at": [0, 1]} if mode == "evit" else {}
    settings = Patches.model_validate(
        {"mode": mode, "keep": 0.61, "joint": {"least": 0.4} if joint else None, "until": until, **more_settings}
    )
    sharing = Joint(np.random.default_rng(3).random(ROWS), settings, patches=16, seed=0) if joint else None
    tokens = Tokens(model, settings, contrast if mode == "input" else None)
    if entered is not None:

        def note(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if block.training:
                entered.append(inputs[0].shape[1] - 1)

        model.blocks[0].register_forward_pre_hook(note)  # type: ignore[union-attr,index,operator]
    with tokens:
        return train(folder, given, model=model, tokens=tokens, joint=sharing, **more), tokens, sharing


PATCHED = (("input", True, 1), ("evit", False, 1), ("evit", True, 1), ("tome", False, 1), ("evit", False, 0.6))
"""Mode, joint and until of what two ranks train on fewer patches."""


def patches_main(out: Path, zero: int) -> None:
    """One rank of trainings with token pruning."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for mode, joint, until in PATCHED:
        name, asked = f"{mode}-{joint}-{until}", recipe(epochs=2, zero=zero, ema=0)
        done, _, _ = patched(out / name, asked, mode, joint=joint, until=until, world=world)
        if world.is_main:
            values = {"macs": torch.tensor(done.fitted.macs, dtype=torch.float64)}
            values["images"] = torch.tensor(done.fitted.images_seen)
            flat = {f"w/{name}": value.contiguous() for name, value in done.fitted.state.items()}
            save_file({**flat, **{f"v/{k}": v for k, v in values.items()}}, out / f"{name}.safetensors")
    distributed.leave()


class Noted(Guest):
    """Notes which rows this rank saw in each step that was taken, and kills the training after so many."""

    name = "noted"

    def __init__(self, kills: int | None = None) -> None:
        self.kills = kills
        self.steps: list[list[int]] = []  # epoch, step of the epoch, rows
        self._step: list[int] = []

    def show(self, batch: Any, micro: Any) -> Any:
        if len(self.steps) == self.kills:
            raise Killed
        now = [micro.epoch, micro.number // 2]
        self._step = (self._step if micro.number % 2 else now) + batch.index.tolist()
        return batch

    def after_step(self, at: Any, progress: float, finite: Any) -> None:
        self.steps.append(self._step)


PARTED = ((0.61, 0.5), (0.68, 0.4))
"""Keep and least of a joint budget: 34, 13 and 5 images, of which two ranks go through two last steps in one part and not two; and
25, 11 and 16, of which they leave out a whole step."""


def parted(folder: Path, which: int, *, kills: int | None = None, world: World | None = None) -> list[list[int]]:
    """A training in two parts a step that is saved after each; the steps of its two epochs that this rank took."""
    keep, least = PARTED[which]
    settings = Patches.model_validate({"mode": "dropout", "keep": keep, "joint": {"least": least}})
    model, noted = vit(patch=4), Noted(kills)
    sharing = Joint(np.random.default_rng(3).random(ROWS), settings, patches=16, seed=0)
    more: dict[str, Any] = {"world": world, "joint": sharing, "guests": [noted], "clock": minutes()}
    with Tokens(model, settings, None) as tokens, contextlib.suppress(Killed):
        train(folder, recipe(accumulate=2, save_minutes=0.05), model=model, tokens=tokens, **more)
    return noted.steps


def parted_main(out: Path) -> None:
    """One rank: the rest of what one process began, and the beginning of what one ends."""
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for which in range(len(PARTED)):
        told = [
            parted(out / f"one-{which}", which, world=world),
            parted(out / f"two-{which}", which, kills=6, world=world),
        ]
        (out / f"{which}-{world.rank}.json").write_text(json.dumps(told))
    distributed.leave()


def dynamic_main(out: Path) -> None:
    """One rank of a training with dynamic data pruning: what it was told to see, saw, and knows in the end."""
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    given = recipe(epochs=4)
    for name in ("whole", "begun"):
        plan = SamplePlan(np.arange(ROWS), seed=5, batch_size=8, world=world.size, rank=world.rank)
        dynamic, kept = ThatPrunes({"name": "infobatch", "saving": 0.3}, given.epochs), {}

        class Noting(Memory):
            def epoch(self, epoch: int, skip: int = 0, side: int | None = None) -> Iterator[Batch]:
                kept[f"drawn/{epoch}"] = self.plan.rows  # noqa: B023 - it does not outlive the turn
                kept[f"seen/{epoch}"] = self.plan.order(epoch)  # noqa: B023
                return super().epoch(epoch, skip)

        train(out / name, given, world=world, plan=plan, loader=Noting(plan), dynamic=dynamic)
        for epoch in range(given.epochs):
            kept.setdefault(f"drawn/{epoch}", np.zeros(0, np.int64))
        np.savez(out / f"{name}-{world.rank}.npz", **kept, **{f"known/{k}": v for k, v in dynamic.known().items()})
    distributed.leave()


def masked(folder: Path, zero: int, world: World | None = None) -> Outcome:
    """A training under masks and with a penalty on attention."""
    model = vit()
    masks = unstructured.magnitude(unstructured.listed(model, "sparse_vit"), 0.5)
    unstructured.put(model, masks)
    penalty = AttentionPenalty(model, "entropy", 0.1)
    with unstructured.held(model, masks):
        done = train(folder, recipe(zero=zero, weight_decay=0.3), world=world, model=model, guests=[penalty])
    unstructured.check(model, masks)
    return done


def masked_main(out: Path) -> None:
    """One rank of trainings under masks."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for zero in (1, 2, 3):
        done = masked(out / str(zero), zero, world)
        if world.is_main:
            save_file(done.fitted.state, out / f"{zero}.safetensors")
    distributed.leave()


def gated(folder: Path, zero: int, world: World | None = None) -> Outcome:
    """A training whose penalty closes some gates. By SGD: Adam turns the rounding of gradients that are zero (those of the
    keys' biases) into whole steps, which would hide what the gates do."""
    model = vit()
    settings = Sparsity(start=0.1, in_channels=True, steer=False, strength=0.3, lr=0.1)
    gates = Gates(model, settings, target=0.5, device="cpu")
    given = recipe(epochs=4, zero=zero, optimizer="momentum", lr=1e-2, weight_decay=0)
    return train(folder, given, world=world, model=model, gates=gates)._replace(gates=gates)


def gated_main(out: Path) -> None:
    """One rank of trainings with gates."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for zero in (1, 2, 3):
        done = gated(out / str(zero), zero, world)
        assert done.gates is not None
        save_file(
            {k: v.detach().clone() for k, v in done.gates.values.items()}, out / f"{zero}-{world.rank}.safetensors"
        )
    distributed.leave()


SHRINKING: dict[str, dict[str, Any]] = {
    "adamw-0": {"zero": 0}, "adamw-1": {"zero": 1}, "muon-1": {"zero": 1, "optimizer": "muon"},
    "muon-2": {"zero": 2, "optimizer": "muon"}, "muon-3": {"zero": 3, "optimizer": "muon"},
}  # fmt: skip


def shrunk(folder: Path, name: str, world: World | None = None) -> Outcome:
    """A training that is cut on the way."""
    model = vit(patch=4)
    return train(folder, recipe(**SHRINKING[name]), world=world, model=model, guests=[shrinking(model, at=0.4)])


def shrink_main(out: Path) -> None:
    """One rank of trainings that shrink."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for name in SHRINKING:
        done = shrunk(out / name, name, world)
        if world.is_main:
            save_file(done.fitted.state, out / f"{name}.safetensors")
    distributed.leave()


class Curve(Guest):
    """Notes of each micro-batch what this rank's images lose, as the optimizer's loss has it, and how many they are."""

    name = "curve"

    def __init__(self) -> None:
        self.told: list[tuple[float, float]] = []

    def losses(self, losses: Tensor, seen: Any) -> Tensor:
        self.told.append((float(losses.detach().double().sum()), float(len(losses))))
        return losses


CURVES = [f"{what}-{zero}" for what in ("score", "train", "finetune") for zero in range(4)]


def curved(folder: Path, name: str, world: World | None = None) -> tuple[Outcome, Tensor]:
    """A training as a stage has it, and its curve (micro-batches, 2). By SGD: Adam makes whole steps of gradients that are nothing
    but rounding (those of the keys' biases), which the losses do not show and the weights do."""
    what, zero = name.split("-")
    model, curve = vit(patch=4), Curve()
    wants = recipe(zero=int(zero), optimizer="momentum", lr=0.1)
    more: dict[str, Any] = {"guests": [curve], "watched": what == "score"}
    if what == "train":
        more["guests"].append(shrinking(model, at=0.4))
    if what == "finetune":
        more["distiller"] = Distiller(vit(seed=3, patch=4), "soft", 2.0, 0.5)
    done = train(folder, wants, world=world, model=model, **more)
    return done, torch.tensor(curve.told, dtype=torch.float64)


def curves_main(out: Path) -> None:
    """One rank of trainings whose losses are noted."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for name in CURVES:
        done, curve = curved(out / name, name, world)
        save_file({**done.fitted.state, "curve": curve}, out / f"{name}-{world.rank}.safetensors")
    distributed.leave()


PAIR: dict[str, Any] = {"gated": True, "watched": True, "weighted": True}
"""What the test of two ranks trains; no drop_path, which draws by rank."""


def main(out: Path) -> None:
    """One rank: a whole training, and the rest of one that a single process began in ``out``/begun."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for name in ("whole", "begun"):
        done = train(out / name, recipe(ema=0.9), world=world, **PAIR)
        assert done.gates is not None
        assert done.recorder is not None
        if world.is_main:
            said = {key: torch.from_numpy(value.astype(np.float32)) for key, value in done.recorder.signals().items()}
            values = {"top1": torch.tensor(done.fitted.top1), "events": torch.tensor(len(done.events))}
            groups = {"w": done.fitted.state, "g": dict(done.gates.values), "s": said, "v": values}
            flat = {
                f"{group}/{key}": value.detach().clone()
                for group, held in groups.items()
                for key, value in held.items()
            }
            save_file(flat, out / f"{name}.safetensors")
        else:
            assert not done.events
    distributed.leave()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder, *words = sys.argv[1:]
    if words[:1] == ["patches"]:
        patches_main(Path(folder), int(words[1]))
    else:
        {
            (): main,
            ("dynamic",): dynamic_main,
            ("masked",): masked_main,
            ("gated",): gated_main,
            ("shrink",): shrink_main,
            ("curves",): curves_main,
            ("parted",): parted_main,
        }[tuple(words)](Path(folder))
