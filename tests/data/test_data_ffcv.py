"""FFCV's faults, each with its cure."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_data import source

from lotus.config import Augment
from lotus.data import cores
from lotus.data.base import Loader
from lotus.data.loader import open_loader
from lotus.data.sample_plan import SamplePlan
from lotus.data.views import Look
from selection.errors import Refused

# Imported where it is used: whoever only collects these tests would compile for seconds.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


def open_(
    file: Path,
    rows: Any = range(70),
    *,
    size: int = 12,
    batch: int = 8,
    workers: int = 2,
    augment: Augment | None = None,
) -> Loader:
    plan = SamplePlan(np.asarray(rows), seed=1, batch_size=batch)
    look = Look(size=size, augment=augment, mean=(0.5,) * 3, std=(0.2,) * 3)
    return open_loader(file, plan, look, workers=workers, kind="ffcv")


def test_one_compilation_serves_every_loader(stored: dict[str, Path]) -> None:
    import numba

    from lotus.data.paint import painted

    with open_(stored["square"]) as opened:
        list(opened.epoch(0))
    before = len(painted.signatures)
    for name, augment, size, workers in (
        ("mixed", Augment(crop="resized"), 16, 1),
        ("jpeg", Augment(crop="pad", flip=True), 24, 3),
        ("both", None, 8, 2),
    ):
        with open_(stored[name], range(9, 60), size=size, workers=workers, augment=augment) as opened:
            for epoch in range(3):
                assert sum(len(batch.labels) for batch in opened.epoch(epoch)) == 51
    assert len(painted.signatures) == before
    assert numba.types.uint8[::1].mutable, "which FFCV would have changed, for the whole process"
    assert painted.stats.cache_path, "and it is kept on disk for the next process"


def test_thread_counts_stay(stored: dict[str, Path]) -> None:
    """FFCV sets torch and numba to its own number of threads at import, for each loader and for each epoch."""
    import numba

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with open_(stored["square"], workers=1) as opened:
            assert torch.get_num_threads() == 3
            for _ in opened.epoch(0):
                assert torch.get_num_threads() == 3
            thread_sees: list[int] = []
            new = threading.Thread(target=lambda: thread_sees.append(torch.get_num_threads()))
            new.start()
            new.join()
            assert thread_sees == [3]
            assert numba.get_num_threads() >= 1
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_cores(stored: dict[str, Path]) -> None:
    """FFCV itself refuses: 'number of threads must be between 1 and N'."""
    with open_(stored["square"], workers=4 * (os.cpu_count() or 1) + 1) as opened:
        assert len(list(opened.epoch(0))) == 9


def test_only_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV counts the machine's, and in a container starts sixty threads on two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8, 9})
    assert cores.count() == 4
    assert cores.count(7) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores.count() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    assert cores.count() == 1


def within(seconds: float, what: Any) -> Any:
    """What ``what()`` returns or raises, or a failure if it takes longer."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((what(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"still waiting after {seconds} s"
    if outcome[0][1] is not None:
        raise outcome[0][1]
    return outcome[0][0]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_in_the_thread_reaches_the_consumer(
    stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    from lotus.data import ffcv as door

    def broken(*_: Any) -> int:
        raise ZeroDivisionError("in the pipeline")

    with open_(stored["square"], workers=workers) as opened:
        first = opened.epoch(0)
        next(first)
        monkeypatch.setattr(door, "paint", broken)
        with pytest.raises(ZeroDivisionError, match="in the pipeline"):
            within(20, lambda: list(opened.epoch(1)))
        monkeypatch.undo()
        assert len(list(opened.epoch(2))) == 9, "and the loader can be used again"


def test_a_thread_that_vanishes_is_noticed(stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from lotus.data import ffcv as door

    monkeypatch.setattr(door.Epoch, "run", lambda self: None)
    with open_(stored["square"]) as opened, pytest.raises(RuntimeError, match="ended without a word"):
        within(20, lambda: list(opened.epoch(0)))


def test_a_slow_consumer_loses_nothing(stored: dict[str, Path]) -> None:
    with open_(stored["square"], batch=2) as opened:
        seen = []
        for number, batch in enumerate(opened.epoch(0)):
            if number == 1:
                time.sleep(0.3)  # the thread has filled its queue and waits
            seen += batch.index.tolist()
    assert sorted(seen) == list(range(70))


@pytest.mark.parametrize("rows", [[-1, 3], [True, False], [2, 2], [], [70]])
def test_bad_rows_never_reach_ffcv(stored: dict[str, Path], rows: list[Any]) -> None:
    with pytest.raises(Refused):
        open_(stored["square"], rows, batch=1)


def test_a_subset_smaller_than_a_batch(stored: dict[str, Path]) -> None:
    with open_(stored["square"], [5, 60, 2], batch=64) as opened:
        (batch,) = opened.epoch(0)
    assert sorted(batch.index.tolist()) == [2, 5, 60]


@pytest.mark.slow
def test_a_live_epoch_at_the_interpreters_end(stored: dict[str, Path]) -> None:
    """FFCV aborts the process with code 134; and its import sets torch to one thread."""
    script = f"""
import numpy as np, torch
torch.set_num_threads(2)
from lotus.data.loader import open_loader
from lotus.data.sample_plan import SamplePlan
from lotus.data.views import Look
loader = open_loader({str(stored["square"])!r}, SamplePlan(np.arange(70), batch_size=2),
                     Look(size=12, mean=(0.5,) * 3, std=(0.2,) * 3), kind="ffcv", workers=2)
epoch = loader.epoch(0)
next(epoch)
print(torch.get_num_threads())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ffcv_alone_reads_our_files(tmp_path: Path) -> None:
    """Whichever writer wrote it, a .beton is FFCV's: anybody's FFCV code reads it."""
    from drawn_data import drawn

    from lotus.config import Data
    from lotus.data import beton
    from lotus.data import loader as loaders

    files = [tmp_path / f"{loader}.beton" for loader in ("ffcv", "torch")]
    for file in files:
        data = Data(write="raw", loader=file.stem)
        list(beton.prepare(source(20, lambda i: (10, 14)), file, data, choose=loaders.writer))
    # In a process of its own: FFCV marks numba's own type of byte arrays, not a copy, and nothing that this process has compiled
    # would be found again.
    script = (
        "import sys, numpy, ffcv\n"
        "for file in sys.argv[1:]:\n"
        "    plain = ffcv.Loader(file, batch_size=20, num_workers=1, os_cache=True, drop_last=False)\n"
        "    numpy.savez(file + '.npz', *[part.numpy() for part in next(iter(plain))])\n"
    )
    subprocess.run([sys.executable, "-c", script, *map(str, files)], check=True, capture_output=True)
    for file in files:
        images, labels, index = np.load(f"{file}.npz").values()
        assert index.ravel().tolist() == list(range(20))
        assert labels.ravel().tolist() == [i % 3 for i in range(20)]
        assert np.array_equal(images, np.stack([drawn(i, 10, 14) for i in range(20)]))
