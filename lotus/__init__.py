"""LOTUS: train Vision Transformers on the images worth training on, and ship the dimensions worth keeping.

>>> small = lotus.prune(model, batches, keep={"macs": 0.5})
>>> lotus.save(small, "small/")
>>> model = lotus.load("small/")
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from selection.errors import Refused

if TYPE_CHECKING:
    from lotus.pruning import load, prune, save, verify

__all__ = ["Refused", "load", "prune", "save", "verify"]
__version__ = "0.1.0"

_LATE = ("load", "prune", "save", "verify")


def __getattr__(name: str) -> Any:
    """torch and timm take seconds to import; ``lotus --help`` must not wait for them."""
    if name in _LATE:
        import lotus.pruning

        return getattr(lotus.pruning, name)
    raise AttributeError(f"module 'lotus' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *(name for name in globals() if f"{__name__}.{name}" in sys.modules)})
