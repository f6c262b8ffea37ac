"""The command line in this process: what asks for no signal, no exit and no interpreter of its own need not import torch anew."""

from __future__ import annotations

import contextlib
import gc
import io
import os
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from lotus.cli import main

ROOT = Path(__file__).resolve().parent.parent


def lotus(*words: str, **more: str) -> CompletedProcess[str]:
    """What ``python -m lotus *words`` returns and prints, of the repository's root; ``more`` stands in the environment.

    Errors that are not refusals are raised here, with their trace.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(ROOT), mock.patch.dict(os.environ, more),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        try:
            code = main(words)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    gc.collect()  # engines and loaders hold files, and what they hold is asked for next
    return CompletedProcess(["lotus", *words], code, out.getvalue(), err.getvalue())
