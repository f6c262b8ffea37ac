"""How many threads may work."""

from __future__ import annotations

import os

_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's; DeepSpeed's launcher's


def count(workers: int = 0) -> int:
    """``workers``, or for 0 as many as this process may use.

    That is the cores it is allowed on (a container may be given two of a machine's sixty-four), shared among the ranks
    that a launcher started on this machine.
    """
    if workers > 0:
        return workers
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return max(1, cores // ranks_here())


def ranks_here() -> int:
    """How many ranks a launcher started on this machine; 1 without one."""
    ranks = next((os.environ[name] for name in _RANKS_HERE if name in os.environ), "1")
    return max(1, int(ranks) if ranks.isdigit() else 1)
