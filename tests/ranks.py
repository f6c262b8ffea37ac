"""Two processes that are the two ranks of one training."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


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


def left_in_shared_memory(before: set[str], wait: float = 5) -> set[str]:
    """What has come into /dev/shm since ``before`` and stays, but for what another living process holds.

    Tests that run meanwhile have segments and semaphores of their own there. One that was made a moment ago is mapped
    a moment later, hence the second look.
    """
    ends = time.monotonic() + wait
    while (left := _unheld(shared_memory() - before)) and time.monotonic() < ends:
        time.sleep(0.1)
    return left


def shared_memory() -> set[str]:
    """The names in /dev/shm."""
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


def _unheld(names: set[str]) -> set[str]:
    """Those of ``names`` whose inode no other process has mapped: a semaphore is mapped before it has its name."""
    held = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if names else ():
        if maps.parent.name != str(os.getpid()):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                held |= {line.split()[4] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    left = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if str(Path("/dev/shm", name).stat().st_ino) not in held:
                left.add(name)
    return left
