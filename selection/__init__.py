"""Choosing: which images are worth training on. Arrays in, arrays out; needs neither torch nor lotus.

>>> signals = selection.Signals({"labels": labels, "error_norm": error_norm}, fingerprint="my data")
>>> ticket = selection.select(signals, score="el2n", pick="ccs", keep=0.3).subset
>>> ticket.rows, ticket.weights
"""

import sys
from typing import TYPE_CHECKING, Any

from selection.errors import Refused

if TYPE_CHECKING:
    from selection.lottery import Lottery, choose, select
    from selection.signals import Signals
    from selection.subset import Known, Subset

__all__ = ["Known", "Lottery", "Refused", "Signals", "Subset", "choose", "select"]

_LATE = {
    "Known": "subset", "Lottery": "lottery", "Signals": "signals", "Subset": "subset", "choose": "lottery", "select": "lottery",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """numpy and the shelves take a quarter of a second to import; who wants a refusal alone must not wait for them."""
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(f"selection.{_LATE[name]}"), name)
    raise AttributeError(f"module 'selection' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if f"{__name__}.{name}" in sys.modules)})
