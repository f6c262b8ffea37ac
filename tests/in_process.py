"""The command line in this process: what asks for no signal, no exit and no interpreter of its own need not import torch anew."""

from __future__ import annotations

import contextlib
import gc
import io
import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import torch

from lotus.cli import main

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in the processes that other tests start: a sum comes out the same in both."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lotus(*words: str, here: Path = ROOT, **more: str) -> CompletedProcess[str]:
    """What ``python -m lotus *words`` returns and prints in the folder ``here``; ``more`` stands in the environment.

    Errors that are not refusals are raised here, with their trace.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(here), mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **more}), _one_thread(),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        try:
            code = main(words)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    gc.collect()  # engines and loaders hold files, and what they hold is asked for next
    return CompletedProcess(["lotus", *words], code, out.getvalue(), err.getvalue())
