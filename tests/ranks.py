"""Two processes that are the two ranks of one training, and launchers that start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def two_ranks(
    script: Path, *words: str | Path, timeout: float = 300, base: Mapping[str, str] | None = None
) -> list[str]:
    """What each rank of ``script`` says, over gloo on this machine; both must end well.

    Args:
        base: the environment that they are started in, beside what makes them ranks; None: this process's
    """
    here, port = Path(script).parent, free_port()
    shared = {**(os.environ if base is None else base), "PYTHONPATH": f"{here.parent.parent}:{here.parent}:{here}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, words)], env={**shared, **one_of_two(rank, port)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        spoken = [process.communicate(timeout=timeout)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], spoken
    return spoken


def launched(launcher: str, *words: str, home: Path = ROOT) -> subprocess.Popen[str]:
    """A launcher (``torchrun``, ``deepspeed``) at work in ``home``, on the CPU; what it says is in its ``stdout``."""
    bins = Path(sys.executable).parent
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{bins}:{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.Popen(
        [str(bins / launcher), *words],
        cwd=home,
        env=shared,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def heard(started: Sequence[subprocess.Popen[str]], timeout: float = 300) -> list[str]:
    """What each of ``started`` says until its end; none is left."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()


def one_of_two(rank: int, port: int) -> dict[str, str]:
    """The environment that makes a process one of two ranks on this machine."""
    return {
        "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
