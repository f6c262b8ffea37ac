"""What makes timings of a model comparable."""

from __future__ import annotations

import ctypes
from functools import cache

import torch


@cache
def keep_freed() -> bool:
    """Ask glibc to keep freed memory for the next allocation, as servers' allocators do; False where there is no glibc.

    By default it gives large pieces back at a threshold that moves with what was freed before. The same pass then takes
    1 or 1.5 times as long, depending on which models the process ran earlier.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    return bool(mallopt(threshold, 32 << 20) and mallopt(trim, 2**31 - 1))  # both at their largest


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
