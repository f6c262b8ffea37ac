"""The only door to DeepSpeed, which is brought in quietly.

No compiler is needed at run time: the one operation that DeepSpeed would compile on a CPU (a shared-memory all-reduce:
a minute at the first start, and a file of 69 MB a rank left in /dev/shm) is declined, and gloo does its work.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch


@functools.cache
def deepspeed() -> ModuleType:
    """deepspeed, quiet, and without the operations that it would compile."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's own table of what this machine can compile: it is asked before anything is, and takes edits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its Muon, which ZeRO imports and nobody here uses, would load torch's inductor: a second. By name, since DeepSpeed's
    # own question for it asks for ranks first, and nobody has joined them yet.
    compiled, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    with contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    compiler.compile = compiled
    return deepspeed


def ready() -> None:
    """Import all that a training needs, what torch's optimizers load when the first is made among it: seconds that the first
    training of a process would be billed for, and no later one."""
    deepspeed()
    importlib.import_module("torch._dynamo")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """While ZeRO 1 in bf16 is made, it prints its memory whatever the log level, after a garbage collection each time: a third
    of a second each with torch and timm loaded, twice a parameter group. What exists is kept out of it."""
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if not before:  # else the caller froze, and wants it so
            gc.unfreeze()
