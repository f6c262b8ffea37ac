"""Ranks and the stop flag."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from few import few
from ranks import free_port, heard, one_of_two

from lotus.training import distributed
from lotus.training.distributed import StopFlag, Wishes, World, start
from lotus.training.evaluation import Stopped, at_once
from selection.errors import Refused

ROOT = Path(__file__).resolve().parents[2]


def test_one_process_needs_no_launcher() -> None:
    world = start("cpu")
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    assert world.is_main
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert start("cpu") == world
    assert torch.distributed.is_initialized()


def test_with_one_rank_collectives_change_nothing() -> None:
    world, tensor = World(), torch.arange(3)
    assert world.sum_(tensor) is tensor
    assert world.mean_(tensor) is tensor
    assert tensor.tolist() == [0, 1, 2]
    assert world.max(-4) == -4
    assert world.main(5) == 5
    assert [part.tolist() for part in world.gather(torch.tensor([3, 4]))] == [[3, 4]]
    assert world.any([]) is False
    assert world.any("x") is True
    world.barrier()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match=r"device: 'cuda'.*device=cpu"):
        start("cuda")


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.slow
def test_what_an_engine_imports_asks_for_no_ranks() -> None:
    done = fresh("from lotus.training.deepspeed_import import ready; ready(); ready()")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_half_an_environment_is_refused() -> None:
    done = fresh(
        """
        from lotus.training.distributed import start
        from selection.errors import Refused
        import os
        try:
            start("cpu")
        except Refused as refused:
            print(refused)
        os.environ["WORLD_SIZE"] = "two"
        try:
            start("cpu")
        except Refused as refused:
            print(refused)
        """,
        WORLD_SIZE="2",
    )
    first, second = done.stdout.splitlines()
    assert "MASTER_ADDR and MASTER_PORT are not set" in first
    assert "Start with torchrun or deepspeed" in first
    assert "WORLD_SIZE='two'" in second
    assert not done.stderr


def test_signals_raise_the_flag_and_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, reason in ((signal.SIGTERM, "asked to terminate"), (signal.SIGINT, "interrupted")):
        with StopFlag() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
            assert stop.reason == reason
            stop.set("later")
            assert stop.reason == reason
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_interrupt_is_immediate_but_not_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5  # torchrun's own
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        now[0] += 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_it_takes_no_signals() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopFlag() as stop:
            found.append(signal.getsignal(signal.SIGTERM) is before)
            stop.set("because")
            found.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_without_a_launcher_nobody_watches() -> None:
    with StopFlag():
        assert not [thread for thread in threading.enumerate() if thread.name == "lotus-launcher-watch"]


# A launcher that starts a worker and is killed; the runner above it, whose name has "deepspeed" in it, may be killed as well.
WORKER = """
import sys, time
from lotus.training.distributed import StopFlag
from lotus.watch import over_launcher
over_launcher(every=0.05)
with StopFlag() as stop:
    print("ready", flush=True)
    until = time.monotonic() + 20
    while not stop and time.monotonic() < until:
        time.sleep(0.02)
    print(stop.reason, flush=True)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[-1], *sys.argv[1:-1]])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("mark", few(["TORCHELASTIC_RUN_ID", "CROSS_SIZE"], ["TORCHELASTIC_RUN_ID"]))
def test_a_launcher_that_vanishes_raises_the_flag(mark: str) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", PARENT, WORKER], env={**os.environ, mark: "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert launcher.stdout is not None
        lines = iter(launcher.stdout.readline, "")
        assert next(lines).strip().isdigit()
        assert next(lines) == "ready\n"
        launcher.kill()
        assert next(lines) == "the launcher is gone\n"
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_runner_above_the_launcher_counts_as_well() -> None:
    """DeepSpeed's runner dies of SIGTERM without a word; its launcher and the workers stay."""
    runner = subprocess.Popen(
        [sys.executable, "-c", PARENT, "deepspeed", WORKER, PARENT],
        env={**os.environ, "CROSS_SIZE": "1", "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    launcher = 0
    try:
        assert runner.stdout is not None
        lines = iter(runner.stdout.readline, "")
        launcher = int(next(lines))
        assert next(lines).strip().isdigit()
        assert next(lines) == "ready\n"
        runner.terminate()
        runner.wait()
        assert next(lines) == "the launcher is gone\n"
    finally:
        runner.kill()
        runner.wait()
        if launcher:
            os.kill(launcher, signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class OfTwo(World):
    """One of two ranks on GPUs, the other of which takes 90 ms a step and wants nothing."""

    asked: list[int] = dataclasses.field(default_factory=list)

    def max(self, value: int) -> int:
        self.asked.append(value)
        return max(value, 90)


def test_gpus_exchange_wishes_about_once_a_second_and_none_is_lost() -> None:
    now = 0.0
    world = OfTwo(size=2, device=torch.device("cuda"))
    wishes = Wishes(world, lambda: now)
    heard = []
    for step in range(60):
        now += 0.05
        heard.append(wishes.exchanged(2 if step >= 30 else 0))
    assert len(world.asked) == 7, "after 1, 2, 4 and 8 steps more, then each eleven of 90 ms, the slower rank's"
    assert [(step, wish) for step, wish in enumerate(heard) if wish] == [(36, 2), (56, 2)]


def test_a_device_that_is_far_behind_its_host_is_not_left_alone_for_long() -> None:
    """The host hands over a batch in a millisecond, and waits for it, 400 ms, only where wishes are exchanged."""
    now, behind, longest = 0.0, 0, 0.0

    class Behind(World):
        def max(self, value: int) -> int:
            nonlocal now, behind, longest
            now, longest, behind = now + 0.4 * behind, max(longest, 0.4 * behind), 0
            return value

    wishes = Wishes(Behind(size=2, device=torch.device("cuda")), lambda: now)
    for _ in range(200):
        wishes.exchanged(0)
        now, behind = now + 0.001, behind + 1
    assert longest < 3


WAITING = """
import sys, time
from lotus.cli.stopping import terminated_like_interrupted
from lotus.training.distributed import start
world = start("cpu")
world.barrier()
print("there", flush=True)
with terminated_like_interrupted():
    if world.is_main:
        time.sleep(60)
    try:
        world.barrier()
    except KeyboardInterrupt:
        print("heard", flush=True)
        import os
        os._exit(75)
"""


@pytest.mark.slow
def test_a_rank_that_waits_for_another_hears_a_wish_to_stop() -> None:
    """Rank 0 prunes, or writes a data set, for as long as that takes; within torch no signal is heard."""
    port = free_port()
    ranks = [
        subprocess.Popen([sys.executable, "-c", WAITING], env={**os.environ, "PYTHONPATH": str(ROOT), **one_of_two(rank, port)},
                         stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert all(rank.stdout is not None and rank.stdout.readline() == "there\n" for rank in ranks)
        time.sleep(1)
        ranks[1].terminate()
        assert ranks[1].wait(timeout=20) == 75
        assert ranks[0].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


DRAWING = """
import sys, time
from pathlib import Path
import torch
from lotus import watch
from lotus.training.distributed import StopFlag, leave, start
from lotus.training.evaluation import Stopped, at_once, heard
from lotus.training.shrink import by_main
world = start("cpu")
def cut():
    for _ in heard(iter(lambda: time.sleep(0.05), 0)):
        pass
def picked():
    with at_once():
        while True:
            time.sleep(0.05)
with StopFlag(), watch.over(Path(sys.argv[1]), world.rank, world.size, 60, StopFlag):
    for work in (cut, picked)[int(sys.argv[2]):]:
        world.barrier()
        print("there", flush=True)
        try:
            by_main(world, work)
        except Stopped as stopped:
            print("heard", stopped, flush=True)
            leave(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize("work", [0, 1], ids=["a cut", "a picker"])
def test_a_wish_of_one_rank_ends_what_another_does_for_all(tmp_path: Path, work: int) -> None:
    """Rank 0 draws a cut within a training, or a ticket by a picker that looks at no flag; rank 1 alone is asked to stop."""
    port = free_port()
    ranks = [
        subprocess.Popen([sys.executable, "-c", DRAWING, str(tmp_path), str(work)],
                         env={**os.environ, "PYTHONPATH": str(ROOT), **one_of_two(rank, port)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert all(rank.stdout is not None and rank.stdout.readline() == "there\n" for rank in ranks)
        time.sleep(0.5)
        ranks[1].terminate()
    finally:
        said = heard(ranks, timeout=20)
    assert [rank.returncode for rank in ranks] == [75, 75]
    assert all("heard stopped (asked to terminate)" in one for one in said)


def _asked_while_busy(swallowed: bool) -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    except Stopped as stopped:
        if swallowed:  # as a library in C may
            raise RuntimeError(str(stopped)) from None
        raise


@pytest.mark.parametrize("swallowed", [False, True])
def test_what_looks_at_no_flag_ends_at_once(swallowed: bool) -> None:
    with StopFlag() as flag:
        own = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Stopped, match="asked to terminate"), at_once():
            _asked_while_busy(swallowed)
        assert signal.getsignal(signal.SIGTERM) == own
        assert flag
        with pytest.raises(Stopped), at_once():
            pytest.fail("asked before")
    with at_once():
        pass


def test_on_the_host_wishes_are_exchanged_after_each_step() -> None:
    world = OfTwo(size=2)
    wishes = Wishes(world, lambda: 0.0)
    for _ in range(3):
        wishes.exchanged(0)
    assert world.asked == [0, 0, 0]
