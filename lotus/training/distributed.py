"""The ranks of a run, and how it is asked to stop.

``python``, ``torchrun`` and ``deepspeed`` all start the same program: what a launcher leaves in the environment is used,
what is missing is filled in for one process. Collectives cost nothing with one rank.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lotus.watch import ALONE, launcher_is_gone, over_launcher, placed
from selection.errors import Refused

_MILLISECONDS, _MOST_STEPS = 2**20, 50  # of a step, and between two exchanges of wishes
_PATIENCE = datetime.timedelta(hours=12)  # the others wait while rank 0 prepares a large data set or prunes


@dataclass(frozen=True)
class World:
    """Which rank this is, of how many, and where it computes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that speaks and writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; integers stay integers."""
        if self.size > 1:
            here = tensor.to(self.device).contiguous()  # NCCL takes nothing that lies in the host's memory
            dist.all_reduce(here)
            if here is not tensor:
                tensor.copy_(here)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Mean over the ranks, in place."""
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """(K,) of every rank, in their order, on the CPU; K may differ from rank to rank. Nothing is converted on the way."""
        if self.size == 1:
            return [tensor.cpu()]
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(tensor)
        self.sum_(lengths)
        padded = torch.zeros(int(lengths.max()), dtype=tensor.dtype, device=self.device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part[:length].cpu() for part, length in zip(parts, lengths.tolist(), strict=True)]

    def any(self, flag: object) -> bool:
        """Whether ``flag`` is set on any rank."""
        return bool(self.max(int(bool(flag))))

    def main(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, src=0)
        return int(tensor)

    def from_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's tensors by name, on every rank, on the CPU; what the others give is not looked at."""
        if self.size == 1:
            return {name: tensor.cpu() for name, tensor in tensors.items()}
        from safetensors.torch import load, save

        whole = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        packed = self.bytes(save(whole) if self.is_main else b"")
        return whole if self.is_main else load(packed)

    def bytes(self, content: bytes) -> bytes:
        """Rank 0's, on every rank; what the others give is not looked at."""
        if self.size == 1:
            return content
        length = self.main(len(content))
        if not length:
            return b""
        if self.is_main:
            sent = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)
        else:
            sent = torch.empty(length, dtype=torch.uint8, device=self.device)
        dist.broadcast(sent, src=0)
        return content if self.is_main else sent.cpu().numpy().tobytes()

    def text(self, text: str) -> str:
        """Rank 0's, on every rank; what the others give is not looked at."""
        return self.bytes(text.encode()).decode()

    def passed(self, tensor: Tensor, to: int, of: int) -> Tensor:
        """What rank ``of`` passes to this one, which passes ``tensor`` to rank ``to``; of one shape on all ranks."""
        if to == self.rank or not tensor.numel():
            return tensor
        here, there = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        both = [dist.P2POp(dist.isend, here, to), dist.P2POp(dist.irecv, there, of)]
        for sent in dist.batch_isend_irecv(both):
            sent.wait()
        return there

    def barrier(self, *, leaves: bool = True) -> None:
        """Wait until every rank is here, which may take as long as another one works alone; a wish to stop is heard meanwhile, as it is
        not within torch.

        Args:
            leaves: whoever hears one leaves; else it waits on, and the one that works is told by :class:`lotus.watch.Watch`

        Raises:
            KeyboardInterrupt: it left.
        """
        if self.size == 1:
            return
        met = dist.all_reduce(torch.zeros(1, device=self.device), async_op=True)
        pause = 0.0005
        while not met.is_completed():
            if leaves and (stop := StopFlag.now()):
                raise KeyboardInterrupt(
                    f"stopped ({stop.reason}) beside another rank's work. The same command goes on."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        met.wait()


def leave(code: int = 0) -> NoReturn:
    """End this process, a rank: the last thing that it does.

    Python's own end takes down the threads of torch and gloo one by one, in which a rank that had done all its work was once seen
    aborted (SIGABRT): its launcher would call that a failed training.

    Args:
        code: the exit code; with 0, every rank comes here, and the group ends first
    """
    if code == 0:
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def start(device: str = "auto") -> World:
    """Join the other ranks, or be the only one. A second call returns what the first one made.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        Refused: a GPU was asked for and there is none, or more ranks than GPUs; a launcher that gave half of what it takes.
    """
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise Refused("device: 'cuda' was asked for, and torch sees no GPU here. Use device=cpu, or auto.")
    environment = os.environ
    # Read when deepspeed is imported, once for the life of the process.
    environment["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather|reduce_scatter).*")
    for name, value in ALONE.items():
        environment.setdefault(name, value)
    rank, size, local = placed()
    where = torch.device("cuda", local) if cuda else torch.device("cpu")
    world = World(rank, size, local, where)
    if cuda:
        _take_gpu(world)
    if dist.is_initialized():
        return world
    meeting = _alone() if size == 1 else _with_others(size)
    if cuda:
        meeting["device_id"] = where
    with _ended_by_sigterm():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE, **meeting)
    return world


def _take_gpu(world: World) -> None:
    if world.local_rank >= torch.cuda.device_count():
        raise Refused(
            f"device: rank {world.rank} wants GPU {world.local_rank}, and this host has {torch.cuda.device_count()}. "
            "Start as many processes as there are GPUs (deepspeed --num_gpus N), or use device=cpu."
        )
    torch.cuda.set_device(world.local_rank)


def _alone() -> dict[str, Any]:
    """How one process joins: nothing to meet, so no port is opened; DeepSpeed looks at these two all the same."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if Path("/sys/class/net/lo").exists():  # gloo otherwise looks the host's name up, which containers may not know
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}


def _with_others(size: int) -> dict[str, Any]:
    """How one of ``size`` processes joins: torch reads where they meet from the environment."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise Refused(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: the "
            "ranks cannot find each other. Start with torchrun or deepspeed, or unset WORLD_SIZE for one process."
        )
    return {}


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Where nothing has begun, and python itself would not be asked: whoever waits for ranks that never come waits in torch."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Wishes:
    """What ranks ask of each other after their steps: the largest wish is everybody's.

    Several GPUs would have to be waited for after each step. So they ask about once a second, all after the same step: how long a
    step takes is exchanged with the wish. It is known only once they were waited for, so that at first they ask more often. What
    computes on the host asks after each.
    """

    def __init__(self, world: World, clock: Callable[[], float]) -> None:
        """
        Args:
            clock: seconds
        """
        self._world, self._clock = world, clock
        self._asked, self._steps, self._every = clock(), 0, 1

    def exchanged(self, wish: int) -> int:
        """The largest of the ranks' wishes, from 0, where they are exchanged now; else 0, and a wish has to be made again."""
        world = self._world
        if world.size == 1 or world.device.type == "cpu":
            return world.max(wish)
        self._steps += 1
        if self._steps < self._every:
            return 0
        now = self._clock()
        each = min(int(1000 * (now - self._asked) / self._steps), _MILLISECONDS)
        told = world.max(wish * (_MILLISECONDS + 1) + each)  # of the same wish the slowest rank's time
        self._asked, self._steps = now, 0
        wish, each = divmod(told, _MILLISECONDS + 1)
        self._every = min(max(1, 1000 // max(each, 1)), 2 * self._every, _MOST_STEPS)
        return wish


class StopFlag:
    """Raised by Ctrl-C, by SIGTERM, and when the launcher is gone; whoever works in a long loop looks at it.

    A second Ctrl-C, two seconds after the first or later, interrupts at once. (Sooner it is the same key: the terminal
    signals every process, and torchrun passes its own signal on as well.)

    >>> with StopFlag() as stop:
    ...     while work() and not stop: ...
    """

    _open: ClassVar[list[StopFlag]] = []

    def __init__(self) -> None:
        self.reason = ""
        self._first = 0.0  # time.monotonic() of the first Ctrl-C
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.reason)

    @classmethod
    def now(cls) -> StopFlag | None:
        """The flag of whoever works in a long loop now, for what they call; None where nobody does."""
        return cls._open[-1] if cls._open else None

    @classmethod
    def ask(cls, reason: str) -> bool:
        """Ask whoever works in a long loop now to stop; False where nobody does."""
        for flag in cls._open:
            flag.set(reason)
        if cls._open and threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main(signal.SIGTERM)  # for whoever looks at no flag: lotus.training.evaluation.at_once
        return bool(cls._open)

    def set(self, reason: str) -> None:
        """Ask to stop; ``reason`` is shown. The first one stays."""
        self.reason = self.reason or reason

    def __enter__(self) -> StopFlag:
        self._open.append(self)
        if threading.current_thread() is threading.main_thread():  # only there python takes signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._signaled)
        over_launcher()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _signaled(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first and now - self._first >= 2:
                raise KeyboardInterrupt
            self._first = self._first or now
        told = "the launcher is gone" if launcher_is_gone() else "asked to terminate"
        self.set("interrupted" if number == signal.SIGINT else told)
