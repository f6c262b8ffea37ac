"""Steps that are not finite or whose loss jumped, and what becomes of them (``train.on_spike``).

A guest says which loss jumped, before the weights move, and makes it no number, which the engine skips under every ZeRO stage.
The loop then asks :func:`became`. To rewind is to write down which steps are to be passed over, and to begin the training once
more: from a checkpoint of before them, as after any kill, so that the end is the same however often and wherever it is killed.

Letters: K rows of a step, P stretches of steps, S steps that are remembered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lotus import files
from lotus.data.sample_plan import Rows
from lotus.events import Rewound
from lotus.training.distributed import World
from lotus.training.finite import Answer
from lotus.training.guests import Epoch, Guest, Micro, Position, Seen, Training, Turn
from selection import regular
from selection.errors import Refused

TOO_MANY = 3
"""Steps in a row that may not be finite, and rewinds of an epoch, before training is given up."""
BACK = 10
"""Steps that a rewind passes over, with that of the spike."""
_FEWEST, _TOLD = 8, 3
"""Steps before one is judged; spikes, or images, that are told by number."""


class LossSpikes(Guest):
    """Remembers each step's loss, and tells which jumped; where something is to become of those, before the weights move."""

    name = "loss_spikes"
    turn = Turn.WATCH

    def __init__(self, times: float, window: int, acts: bool = False) -> None:
        self._times, self._window, self._acts = times, window, acts
        if acts:  # those before it shall remember what the losses were
            self.turn = Turn.LAST  # type: ignore[misc]
        self._parts: list[Tensor] = []  # of the step under way, a micro-batch each
        # (5,) each: number, sum of losses, images, highest loss, its row; and whether it moved the weights
        self._steps: list[tuple[Tensor, bool | Answer]] = []
        self._old = 0  # of them those of earlier epochs
        self._why, self._side, self._last = "", 0, False

    def attach(self, training: Training) -> None:
        self._world = training.world

    def before_epoch(self, epoch: Epoch) -> Epoch:
        if self._acts and self._side != (epoch.side or 0):  # other pictures, another loss
            self._side, self._steps, self._old = epoch.side or 0, [], 0
        return epoch

    def handed_over(self, old: torch.nn.Module, new: torch.nn.Module) -> None:
        if self._acts:
            self._steps, self._old = [], 0

    def show(self, batch: Any, micro: Micro) -> Any:
        self._last = micro.last
        return batch

    def losses(self, losses: Tensor, seen: Seen) -> Tensor:
        each = losses.detach().double()
        highest, at = each.max(0, keepdim=True)
        row = seen.batch.index.to(each.device).gather(0, at).double()  # [at] would wait for the number
        parts = [each.sum(0, keepdim=True), torch.full_like(highest, len(each)), highest, row]
        self._parts.append(torch.cat(parts))
        if self._acts:
            self._why = self._jumped() if self._last else ""
        return losses * torch.nan if self._why else losses

    def _jumped(self) -> str:
        """Why the step under way is not to move the weights. Every rank asks, and each gets the same answer."""
        table = self._of_all_ranks([*(step for step, _ in self._steps[-self._window :]), self._step(0)])
        why = self._judged(table, len(table) - 1)
        return why and f"a loss of {why}"

    def spoiled(self) -> str:
        return self._why

    def _step(self, number: int) -> Tensor:
        """(5,) of the step whose micro-batches are through."""
        parts = torch.stack(self._parts)
        which = parts[:, 2].nan_to_num(torch.inf).argmax(0, keepdim=True)
        first = torch.full_like(parts[0, :1], number)
        return torch.cat([first, parts[:, :2].sum(0), parts.index_select(0, which)[0, 2:]])

    def after_step(self, at: Position, progress: float, finite: bool | Answer) -> None:
        if not self._acts or finite:
            self._steps.append((self._step(at.step), finite))
        self._parts = []

    def _moved(self) -> list[Tensor]:
        """The steps that moved the weights; the loop has told of the others, and they are left out from now on."""
        self._steps = [(step, True) for step, finite in self._steps if finite]
        return [step for step, _ in self._steps]

    def close_epoch(self, at: Position) -> Iterable[str]:
        table = self._of_all_ranks(self._moved())
        spikes = [
            f"step {table[now, 0]:.0f}, {told}"
            for now in range(self._old, len(table))
            if not self._acts and (told := self._judged(table, now))
        ]
        self._steps = self._steps[-self._window :]
        self._old = len(self._steps)
        if spikes:
            more = f", and {len(spikes) - _TOLD} more" if len(spikes) > _TOLD else ""
            yield f"{len(spikes)} loss spike{'s' if len(spikes) > 1 else ''}: {'; '.join(spikes[:_TOLD])}{more}"

    def _judged(self, table: npt.NDArray[np.float64], now: int) -> str:
        """What is told of a step; nothing where its loss is as usual."""
        means = table[max(0, now - self._window) : now + 1, 1] / table[max(0, now - self._window) : now + 1, 2]
        before, loss, (highest, row) = means[:-1], means[-1], table[now, 3:]
        if not np.isfinite(loss):
            return f"{loss} (row {row:.0f}: {highest:.3g})"
        if len(before) < _FEWEST:
            return ""
        usual = np.median(before)
        if loss <= usual + self._times * 1.4826 * np.median(np.abs(before - usual)):
            return ""
        return f"{loss:.3g} where {usual:.3g} is usual (row {row:.0f}: {highest:.3g})"

    def _of_all_ranks(self, steps: list[Tensor]) -> npt.NDArray[np.float64]:
        """(S, 5) of steps."""
        own = torch.stack(steps) if steps else torch.empty(0, 5, dtype=torch.float64)
        ranks = np.stack([part.numpy().reshape(-1, 5) for part in self._world.gather(own.flatten())])  # (R, S, 5)
        worst = ranks[np.nan_to_num(ranks[:, :, 3], nan=np.inf).argmax(0), np.arange(ranks.shape[1])]
        return np.concatenate([worst[:, :1], ranks[:, :, 1:3].sum(0), worst[:, 3:]], axis=1)

    def state(self) -> dict[str, Tensor]:
        side = {"side": torch.tensor(self._side)} if self._acts else {}
        return {"steps": torch.from_numpy(self._of_all_ranks(self._moved())), "old": torch.tensor(self._old), **side}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        steps, self._old = state["steps"].to(self._world.device, copy=True), int(state["old"])
        self._side = int(state.get("side", torch.tensor(0)))
        if not self._world.is_main:  # rank 0 has what all had
            steps[:, 1:3], steps[:, 3] = 0, -torch.inf
        self._steps = [(step, True) for step in steps.unbind()]


def by_rows(rows: Rows) -> str:
    """What is told of images that have no other names."""
    return f"rows {', '.join(map(str, rows))}"


@dataclass(frozen=True)
class Spike:
    """A step that did not move the weights."""

    step: int
    """Its number, from 1."""
    failed: int
    """How many of its kind there were in a row, with it."""
    lr: float
    rows: Rows
    """(K,) of its images, of all ranks."""
    why: str
    """Empty: its loss or gradient was not finite."""
    how: str | None
    """``on_spike``."""
    named: Callable[[Rows], str]
    """What is told of images, by their rows."""

    def __str__(self) -> str:
        images = self.named(self.rows[:BACK])
        more = f" and {len(self.rows) - BACK} more" if len(self.rows) > BACK else ""
        ends = {"stop": "the end of it", "rewind": "goes back"}.get(self.how or "", "skipped")
        return f"step {self.step}, learning rate {self.lr:.3g}: {self.why or 'not finite'}, {ends}; its images: {images}{more}"


@dataclass(frozen=True)
class Passed:
    """Steps of a training that are passed over; ``rewound.json`` beside its checkpoints."""

    file: Path
    key: str
    """Hash of the settings."""
    world: World
    stretches: tuple[tuple[int, int, int], ...] = ()
    """(P, 3): epoch, first step and the one after the last, counted from 0 over the whole training."""

    @classmethod
    def of(cls, folder: Path, key: str, world: World) -> Passed:
        """Those of the training in ``folder``; rank 0 reads, and a file that is none or of other settings tells of none."""
        passed = np.zeros((0, 3), np.int64)
        file = folder / "rewound.json"
        if world.is_main and file.is_file():
            try:
                record = json.loads(regular.text(file))
                if record["key"] == key and record["digest"] == files.digest(record["passed"]):
                    passed = np.asarray(record["passed"], np.int64).reshape(-1, 3)
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
                pass  # it comes to the spike once more, and to the same stretch
        shared = world.from_main({"passed": torch.from_numpy(passed)})["passed"].tolist()
        return cls(file, key, world, tuple((epoch, first, last) for epoch, first, last in shared))

    def covers(self, step: int) -> bool:
        """Whether a step, from 0, is passed over."""
        return any(first <= step < last for _, first, last in self.stretches)

    def why_not(self, state: Mapping[str, Any]) -> str:
        """Why a checkpoint with this state is no place to go on from."""
        unknown = self.stretches[state.get("rewinds", 0) :]
        return "after steps that are passed over" if any(state["step"] > first for _, first, _ in unknown) else ""

    def more(self, epoch: int, first: int, last: int) -> None:
        """Write down one more stretch.

        Raises:
            Refused: it cannot be written.
        """
        fault: Refused | None = None
        if self.world.is_main:
            stretches = [*map(list, self.stretches), [epoch, first, last]]
            try:
                files.write_json(self.file, {"key": self.key, "passed": stretches, "digest": files.digest(stretches)})
            except Refused as refusal:
                fault = refusal
        if self.world.any(fault):
            raise fault or Refused(f"{self.file}: rank 0 could not write it.")


def became(spike: Spike, passed: Passed, epoch: int, begin: int, *, place: str, stage: str) -> None:
    """What becomes of a spike, where it is not passed by.

    Args:
        spike: what was seen
        passed: the steps that are passed over, and their file
        epoch: of the spike, from 0
        begin: steps that were tried before this epoch
        place: where the recipe stands
        stage: its name, for a refusal

    Raises:
        Refused: the training ends with it.
        Rewound: it goes on from before the spike.
    """
    stays = "What was good stays in its checkpoints. " if (passed.file.parent / "checkpoints").is_dir() else ""
    cure = f"{stays}Lower {place}.lr, or set {place}.clip=1 and a longer warm-up"
    kind = "the loss or its gradient was not finite" if spike.how is None else "one more spike"
    what = f"{stage}: {kind} at step {spike.step}, learning rate {spike.lr:.3g}"
    if spike.how == "stop":
        raise Refused(f"{stage}: {spike}. {cure}; {place}.on_spike=skip goes on without such steps.")
    if spike.failed == TOO_MANY:
        raise Refused(f"{what}, and at the {TOO_MANY - 1} steps before. {cure}.")
    if spike.how == "rewind":
        if sum(one == epoch for one, _, _ in passed.stretches) == TOO_MANY:
            raise Refused(f"{what}, after {TOO_MANY} rewinds in this epoch. {cure}.")
        first = max(begin, spike.step - BACK)
        passed.more(epoch, first, spike.step)
        raise Rewound(f"goes back to before step {first + 1}, and passes over the steps to {spike.step}")
