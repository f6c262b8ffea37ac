"""What a process keeps of the memory that it has let go of."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from lotus.vit.steady import keep_freed

_FAULTS = """
import ctypes, resource, sys
import torch
from lotus.vit.steady import keep_freed

torch.set_num_threads(1)
kept = keep_freed()


def step():
    blocks = [torch.zeros(10_000_000) for _ in range(3)]  # 40 MB each, above the 32 MiB that glibc ever keeps by itself
    del blocks


for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(int(kept), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""


def _faults(**environment: str) -> tuple[bool, int]:
    """Whether it is kept, and the page faults a step."""
    asked = {**os.environ, **environment}
    told = subprocess.run([sys.executable, "-c", _FAULTS], env=asked, capture_output=True, text=True, check=True).stdout
    kept, faults = told.split()
    return kept == "1", int(faults)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_a_step_finds_the_memory_of_the_step_before() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    kept, faults = _faults()
    assert kept
    assert faults < 0.05 * 3 * 40_000_000 / page


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MALLOC_TOP_PAD_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not keep_freed()


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed()


def test_of_an_older_glibc_less_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ``mallopt`` takes no threshold above half of a heap of 64 MiB, and says 0."""
    taken: dict[int, int] = {}

    class Older:
        gnu_get_libc_version = None

        def mallopt(self, what: int, amount: int) -> int:
            if what == -3 and amount > 32 << 20:
                return 0
            taken[what] = amount
            return 1

    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Older())
    assert keep_freed()
    assert taken == {-3: 32 << 20, -1: 1 << 30, -2: 64 << 20}
