"""Puts this folder on the path: few.py is for the tests of every folder. And what makes all of them quicker."""

from __future__ import annotations

import atexit
import gc
import random
import sys
from typing import Any

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported and collected stays: no later garbage collection, of which DeepSpeed asks for many, walks it again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same draws in each run, before any fixture: a model whose start a test does not care for is the same on all machines."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


LONGEST = (
    "tests/test_soak.py", "tests/test_faults.py", "tests/stages/test_stages_resumed.py", "tests/test_benchmarks.py", "tests/test_watch.py",
    "tests/data", "tests/test_search_stage.py", "tests/papers/test_papers.py", "tests/test_fuzz.py", "tests/training/test_loop.py",
    "tests/training/test_shrink.py", "tests/training/test_guests.py", "tests/inspect/test_inspect.py", "tests/test_device.py",
    "tests/stages/test_stages_plan.py", "tests/stages/test_stages_course.py", "tests/stages/test_stages_baselines.py",
    "tests/test_examples.py", "tests/test_predict.py", "tests/papers/test_papers_vtp.py",
)  # fmt: skip
"""Few tests that take long: begun last, they would keep one worker busy while the others wait. The rest goes by number of tests."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, the longest first, and the tests of data as one file: importing FFCV compiles for seconds, which one
    worker does."""
    from xdist.scheduler import LoadFileScheduling

    class Rooms(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/data" if nodeid.startswith("tests/data/") else super()._split_scope(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            for scope in reversed(LONGEST):
                if scope in self.workqueue:
                    self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    return Rooms(config, log) if config.getoption("dist") == "loadfile" else None
