"""What LOTUS does on a device that is not the host's: run by test_device.py in a process of its own, since a device that was
registered stays. Prints a line of JSON a case: its name, how often the host waited and where, and what went wrong.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "training"))

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import lotus
from lotus import onnx_file, pruning
from lotus.config import Augment, Data, Patches, Sparsity, Train
from lotus.data import beton
from lotus.data.loader import open_loader
from lotus.data.sample_plan import SamplePlan
from lotus.data.source import Source
from lotus.data.views import Look
from lotus.export import export
from lotus.onnx_file import trace
from lotus.papers.sparse_vit.penalty import AttentionPenalty
from lotus.papers.spvit.nested_gates import NestedGates
from lotus.pruning import criteria
from lotus.sparsity.gates import Gates
from lotus.training import loop
from lotus.training.average import LateAverage, MovingAverage
from lotus.training.data_pruning import DynamicPruning
from lotus.training.distill import Distiller, Taught
from lotus.training.distributed import StopFlag, World
from lotus.training.dynamics import Recorder, Watched
from lotus.training.evaluation import evaluate_classes
from lotus.training.fewer import FewerPatches
from lotus.training.finite import Answer, can_be_told, clipped, tell
from lotus.training.freeze import Frozen
from lotus.training.growing import GrowingPictures
from lotus.training.hardest import Hardest
from lotus.training.optim import set_lr
from lotus.training.regularize import EarlyBird, Gating
from lotus.training.spikes import LossSpikes
from lotus.vit import cost
from lotus.vit.patch_scores import contrast
from lotus.vit.tokens import Tokens
from selection import methods
from tests.twin import DEVICE, Seen, twin

EPOCHS = 3


class Plain:
    """The engine's interface over torch alone: DeepSpeed knows no such device."""

    stage, compiled = 0, None
    seen: Seen

    def __init__(self, model: nn.Module, optimizer: Any, recipe: Train, world: World, *, place: str = "train") -> None:
        self.module, self.world, self.optimizer = model, world, optimizer
        self.masters: list[Tensor] = list(model.parameters())
        self.passes = 0
        assert can_be_told(optimizer)

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()
        self.passes += 1

    def step(self, lr: float, momentum: float | None = None) -> Answer:
        set_lr(self.optimizer, lr, momentum)
        finite = clipped([p.grad for p in self.module.parameters() if p.grad is not None], 1.0)
        tell(self.optimizer, finite)
        answer = Asked(finite, self)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return answer

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu") for name, value in self.module.state_dict().items()}

    def moments(self) -> dict[str, Tensor]:
        return {}

    def load_moments(self, moments: Any) -> None: ...

    def release(self, weights: Any = None) -> None: ...

    @contextlib.contextmanager
    def carrying(self, numbers: list[Tensor]) -> Iterator[None]:
        with torch.no_grad():
            own = [master.detach().clone() for master in self.masters]
            torch._foreach_copy_(self.masters, numbers)
            yield
            torch._foreach_copy_(self.masters, own)


class Asked(Answer):
    """An answer that is waited for unless the device has been given another backward pass to work on."""

    def __init__(self, told: Tensor, engine: Plain) -> None:
        super().__init__(told)
        self._engine, self._passes, self._known = engine, engine.passes, False

    def __bool__(self) -> bool:
        if not self._known and self._engine.passes == self._passes:
            self._engine.seen.wait("whether a step was finite")
        self._known = True
        return super().__bool__()


class There(tiny.Memory):
    """A loader whose batches lie on the device."""

    def epoch(self, *given: Any, **view: Any) -> Iterator[tiny.Batch]:
        for batch in super().epoch(*given, **view):
            yield tiny.Batch(*(part.to(DEVICE, non_blocking=True) for part in batch))


def vit(**more: Any) -> nn.Module:
    return tiny.vit(0.2, patch=4, **more).to(DEVICE)


def trained(guests: Callable[[nn.Module], list[Any]] = lambda model: [], **recipe: Any) -> Callable[[], int]:
    """Gives the steps that it takes."""

    def run() -> int:
        model = vit()
        asked = tiny.recipe(**{"epochs": EPOCHS, "mixup": 0.4, "cutmix": 1.0, "zero": 0, **recipe})
        with tempfile.TemporaryDirectory() as folder:
            done = tiny.train(
                Path(folder),
                asked,
                world=World(device=DEVICE),
                model=model,
                guests=guests(model),
                weighted=True,
                clock=lambda: 0.0,  # no line is due but the last
            )
        return done.fitted.steps

    return run


def pruned(**settings: Any) -> Callable[[], None]:
    def run() -> None:
        images, labels = tiny.pictures()
        batches = [(a.to(DEVICE), b.to(DEVICE)) for a, b in zip(images.split(26), labels.split(26), strict=True)]
        small = lotus.prune(vit(), batches, **{"keep": {"macs": 0.5}, **settings})
        assert small(batches[0][0]).device == DEVICE

    return run


def gated(**settings: Any) -> Callable[[nn.Module], list[Any]]:
    def make(model: nn.Module) -> list[Any]:
        asked = Sparsity.model_validate({"start": 0.1, "lr": 0.1, **settings})
        gates = Gates(model, asked, target=0.5, device=DEVICE)
        return [Gating(gates), EarlyBird(gates)]

    return make


def fewer(**settings: Any) -> Callable[[nn.Module], list[Any]]:
    def make(model: nn.Module) -> list[Any]:
        asked = Patches.model_validate({"keep": 0.6, **settings})
        return [FewerPatches(Tokens(model, asked, contrast if asked.mode == "input" else None))]

    return make


def loaded(size: int) -> Callable[[], None]:
    """An epoch of a loader whose images are changed in each way."""

    def run() -> None:
        augment = Augment.model_validate(
            {"crop": "resized", "flip": True, "auto": "rand-m9-n3", "color_jitter": (0.4, 0.4, 0.4, 0.2), "erase": 1}
        )
        images, labels = tiny.pictures()
        drawn = (images * 40 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        source = Source(labels.numpy(), tuple("abc"), lambda i: drawn[i], str, "pictures")
        look = Look(size=16, augment=augment, mean=(0.5,) * 3, std=(0.25,) * 3)
        plan = SamplePlan(np.arange(tiny.ROWS), batch_size=size)
        with tempfile.TemporaryDirectory() as folder:
            list(beton.prepare(source, file := Path(folder) / "train.beton", Data(write="raw", max_side=0)))
            with open_loader(file, plan, look, device=DEVICE, kind="torch", workers=1) as opened:
                for batch in opened.epoch(0):
                    assert {part.device for part in batch} == {DEVICE}

    return run


class OfTwo(World):
    """One of two ranks, the other of which has the same images; they wait for each other, and so for the device."""

    def max(self, value: int) -> int:
        return int(torch.tensor([value]).to(DEVICE, non_blocking=True))

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(2)


def evaluated(size: int) -> Callable[[], None]:
    def run() -> None:
        plan = SamplePlan.evaluation(np.arange(tiny.ROWS), batch_size=size)
        values, _ = evaluate_classes(vit(), tiny.Memory(plan), OfTwo(size=2, device=DEVICE), stop=StopFlag())
        assert values["images"] == 2 * tiny.ROWS

    return run


def exported(onnx: bool) -> Callable[[], None]:
    """As ``lotus.export`` does it of a model on the device; traced is a copy on the host, since torch traces no such tensors."""

    def run() -> None:
        model = vit().eval()
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_file, "trace", traced)
            sent = export(model, folder, onnx=onnx, onnx_input="uint8")
            assert (sent["onnx"] is not None) == onnx
            pruning.save(model, Path(folder) / "kept")
            again = pruning.load(Path(folder) / "kept").to(DEVICE)
            for one in (model, again):
                for batch in (1, 4):
                    assert cost.latency(one, batch, 5, device=DEVICE) > 0
            assert cost.latency(model, 1, 5, device="cpu") > 0

    return run


def traced(model: nn.Module, images: Tensor, file: Path) -> None:
    there, given = copy.deepcopy(model).to("cpu"), images.to("cpu")
    with _disable_current_modes():
        trace(there, given, file)


def infobatch(model: nn.Module) -> list[Any]:
    return [DynamicPruning(tiny.ThatPrunes({"name": "infobatch", "saving": 0.3}, EPOCHS))]


GUESTS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "none": lambda model: [],
    "gates": gated(in_channels=True, early_bird={"epsilon": 0.999, "epochs": 2}),
    "gates of units": gated(penalty="subgradient"),
    "attention penalty": lambda model: [AttentionPenalty(model, "entropy", 0.1)],
    "teacher": lambda model: [Taught(Distiller(vit(seed=3), "soft", 2.0, 0.7))],
    "recorder": lambda model: [Watched(Recorder(tiny.ROWS, EPOCHS, tiny.CLASSES, steps=True))],
    "infobatch": infobatch,
    "ema": lambda model: [MovingAverage(0.9)],
    "loss spikes": lambda model: [LossSpikes(8.0, 50)],
    "hardest": lambda model: [Hardest(tiny.vit(width=16, patch=4, seed=1), 0.5, 1e-3)],
    "growing": lambda model: [GrowingPictures([(0, 8), (0.4, 16)])],
    "frozen": lambda model: [Frozen(["patch_embed", "blocks.0"])],
    "patches of the input": fewer(mode="input"),
    "patches by attention": fewer(mode="evit", at=[0, 1]),
    "patches merged": fewer(mode="tome"),
}
CASES: dict[str, Callable[[], int | None]] = {
    **{f"{name}, {8 // size} times the steps": trained(make, batch_size=size, optimizer="muon")
       for name, make in GUESTS.items() for size in (8, 4)},
    **{f"loader, {8 // size} times the steps": loaded(size) for size in (8, 4)},
    **{f"evaluation by two ranks, {8 // size} times the steps": evaluated(size) for size in (8, 4)},
    "export": exported(onnx=False),
    **({"export to ONNX": exported(onnx=True)} if importlib.util.find_spec("onnx") else {}),
    "adamw": trained(),
    "nested gates": trained(lambda model: [Gating(NestedGates(model, keep=0.5, lr=0.05, strength=30.0, device=DEVICE))]),
    "late average": trained(lambda model: [LateAverage(0.4, 2)]),
    "shrink": trained(lambda model: [tiny.shrinking(model, at=0.4, drop_path=0.2)], optimizer="muon"),
    "embedding": pruned(embed_dim=0.75),
    "parameters": pruned(keep={"params": 0.5}),
    **{f"criterion {name}": pruned(criterion=name) for name in methods.names(criteria) if name != "gate"},
}  # fmt: skip


def planted(fault: Callable[[Tensor], Any]) -> Callable[[], None]:
    def run() -> None:
        fault(torch.tensor([1.0, 2.0]).to(DEVICE, non_blocking=True))

    return run


PLANTED: dict[str, Callable[[], None]] = {
    "meets the host's": planted(lambda x: x + torch.ones(2)),
    "is sent by a host that waits": planted(lambda x: x + torch.ones(2).to(DEVICE)),
    "gives a number": planted(lambda x: float(x.sum())),
    "picks by a number": planted(lambda x: x[x.argmax()]),
    "picks by a mask": planted(lambda x: x[x > 1]),
    "is asked": planted(lambda x: 1 if x.sum() > 1 else 2),
    "is counted": planted(lambda x: torch.bincount(x.long())),
}
"""What has to be found."""


def main() -> None:
    loop.Engine = Plain  # type: ignore[assignment,misc]
    tiny.Memory = There  # type: ignore[misc]
    for name, run in {**{f"planted: {name}": run for name, run in PLANTED.items()}, **CASES}.items():
        wrong, steps = "", None
        with twin() as seen:
            Plain.seen = seen
            try:
                steps = run()
            except Exception:
                wrong = traceback.format_exc()[-1500:]
        print(json.dumps({"name": name, "steps": steps, "waits": Counter(seen.waits), "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
