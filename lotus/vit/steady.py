"""What makes a model's passes as fast the next time, and timings of it comparable."""

from __future__ import annotations

import ctypes
import os

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>
_KEPT = (
    (_MMAP_THRESHOLD, 256 << 20, 32 << 20),  # older ones take no more than 32 MiB
    (_TRIM_THRESHOLD, 1 << 30),
    (_TOP_PAD, 64 << 20),
)
"""What is asked of glibc, and by how much; the first amount that it takes."""
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed() -> bool:
    """Let this process keep up to 1 GiB that is freed, blocks of up to 256 MiB among it: the next pass asks for the same.

    glibc gives what is large back to the system, at a threshold that moves with what was freed before, and takes it again a
    page fault at a time: thousands of them a training step of 128 x 6 at a batch of 128. False, and nothing is changed, where
    the user has set glibc's allocator in the environment, or the system has another library.
    """
    if any(name in os.environ for name in _USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - other libraries' mallopt may mean something else
        return all(any(library.mallopt(what, amount) for amount in amounts) for what, *amounts in _KEPT)
    except (AttributeError, OSError, TypeError):
        return False


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
