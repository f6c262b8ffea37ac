"""Puts this folder on the path: few.py is for the tests of every folder. And what makes all of them quicker."""

from __future__ import annotations

import atexit
import gc
from typing import Any

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported and collected stays: no later garbage collection, of which DeepSpeed asks for many, walks it again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, with the tests of data as one file: importing FFCV compiles for seconds, which one worker does."""
    from xdist.scheduler import LoadFileScheduling

    class Rooms(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/data" if nodeid.startswith("tests/data/") else super()._split_scope(nodeid)

    return Rooms(config, log) if config.getoption("dist") == "loadfile" else None
